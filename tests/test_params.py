"""The configuration file: a mistake in it gives one line, with the key and what is allowed."""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distillery.config.effects import unused_settings
from distillery.config.load import load_params, validate_section
from distillery.config.schema import Params, SplitRef, StudentConfig
from distillery.errors import UserError
from experiments import BASE, DELETE, changed, load, prepare

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def folder(tmp_path):
    return prepare(tmp_path)


def test_the_experiments_in_the_repository_are_valid():
    checked = load_params(ROOT / "params.yaml")
    assert checked.evaluate.headline in checked.students
    assert checked.data["finance"].split.pool == 0.45


@pytest.mark.parametrize("kind", ["none", "lora", "qlora", "series"])
def test_a_student_that_a_stage_has_stored_is_read_again(kind):
    adapter = {"kind": kind} | {"series": {"size": 8}, "none": {}}.get(kind, {"r": 4})
    student = StudentConfig.model_validate({"model": "m", "arch": "causal", "adapter": adapter, "phases": []})
    assert StudentConfig.model_validate(student.model_dump()) == student


def test_base_is_valid_and_typed(folder):
    path = folder / "params.yaml"
    path.write_text(BASE)
    checked = load_params(path)
    # the key `on` and a number without a point: YAML 1.1 would read them as True and as text
    assert checked.teachers["llm"].finetune.on == "news/train"
    assert checked.teachers["llm"].finetune.learning_rate == 1e-3
    assert checked.teacher_sources("llm") == ["news", "bare"]
    assert checked.students["kd"].init.layers == [0, 2]


HIDDEN = {"data": ["news/train"], "teachers": ["encoder"], "loss": {"hidden": 1.0}, "steps": 3, "learning_rate": 0.1}
AUTO = {"data": ["news/train"], "loss": {"ce": 1.0}, "steps": "auto", "learning_rate": 1.0e-4}
# key, value, the line after "params.yaml: "
MISTAKES = [
    ("seedz", [1], "seedz: unknown key; did you mean `seeds`? allowed: seeds, data, models, teachers, augment, "),
    ("seeds", DELETE, "seeds: missing"),
    ("seeds", [], "seeds: must not be empty"),
    ("seeds", 0, "seeds: must be a list, not 0"),
    ("seeds", ["a"], "seeds.0: must be a whole number, not 'a'"),
    ("seeds", [True], "seeds.0: must be a whole number, not True"),
    ("seeds", [1, 1], "seeds: each seed once, not [1, 1]"),
    ("evaluate", DELETE, "evaluate: missing"),
    # sources
    ("data", {}, "data: must not be empty"),
    ("data", None, "data: must be a section of keys and values, not None"),
    ("data.news", "news.csv", "data.news: must be a section of keys and values, not 'news.csv'"),
    ("data.my news", {}, "data.my news: must be a name of letters, digits, `_` and `-`, without a dot, which DVC"),
    (
        "data.news.encoding",
        "utf-88",
        "data.news.encoding: must be an encoding that Python knows, such as utf-8, cp1252",
    ),
    (
        "data.news.encoding",
        "base64",
        "data.news.encoding: must be an encoding that Python knows, such as utf-8, cp1252",
    ),
    ("data.news.delimiter", ";;", "data.news.delimiter: "),
    ("data.news.filter", {"keep": {"answer": []}}, "data.news.filter.keep.answer: must not be empty"),
    ("data.news.source", 3, "data.news.source: must be text, not 3"),
    ("data.news.task", "moood", "data.news.task: unknown task `moood`; known: mood, topic"),
    ("data.news.colums", {}, "data.news.colums: unknown key; did you mean `columns`? allowed: source, task, split"),
    ("data.news.columns", {"txt": "x"}, "data.news.columns.txt: unknown key; did you mean `text`? allowed: text"),
    ("data.news.split.train", "0.2", "data.news.split.train: must be a number, not '0.2'"),
    ("data.news.split.train", 0.5, "data.news.split: train + pool + validation + test must add up to 1, not 1.3"),
    (
        "data.news.split",
        None,
        "data.news: needs exactly one of `split` (shares), `splits` (a file or split of the hub for each) or",
    ),
    (
        "data.news.splits",
        {"validation": "v", "test": "t"},
        "data.news: needs exactly one of `split` (shares), `splits`",
    ),
    ("data.news.split_column", "part", "data.news: needs exactly one of `split` (shares), `splits`"),
    ("data.news.splits", {"train": "t"}, "data.news.splits: needs `test`, or `pool` alone"),
    ("data.news.splits", {}, "data.news.splits: needs `test`, or `pool` alone"),
    ("data.news", {"task": "mood", "split_column": "x"}, "data.news: needs `source`, or `splits` with a file for each"),
    (
        "data.news",
        {"source": "a.csv", "task": "mood", "splits": {"train": "b.csv", "test": "c.csv"}},
        "data.news: `splits` names the files: take `source` away, or write `source: hub:owner/name`",
    ),
    ("data.news.columns", {"label": None}, "data.news: rows without label are all pool; take `split`, `splits`"),
    ("data.news.columns", {"first": 2}, "data.news.columns.first: must be 0, 1 or 'A', not 2"),
    ("data.news.split.test", 0, "data.news.split.test: must be greater than 0, not 0"),
    ("data.news.limit", 0, "data.news.limit: must be greater than 0, not 0"),
    ("data.news.near_duplicate", 85, "data.news.near_duplicate: must be less than or equal to 1, not 85"),
    # a search
    ("search", {"student": "kd"}, "search: nothing to search: give `learning_rate` or `choices`"),
    ("search", {"student": "no", "learning_rate": [0.1, 0.2]}, "search.student: unknown student `no`; known: "),
    ("search", {"student": "kd", "phase": 9, "learning_rate": [0.1, 0.2]}, "search.phase: `kd` has no phase 9"),
    # models
    ("models.llm.sha256", "x", "models.llm.sha256: must be 64 digits of 0-9 and a-f or a list, not 'x'"),
    ("models.llm.sha256", DELETE, "models.llm: a `wheel` needs `sha256` and one of `gguf` or `folder`"),
    ("models.llm.wheel", "a-b", "models.llm.wheel: must be name==version or a list, not 'a-b'"),
    ("models.llm.wheel", ["a==1", "b"], "models.llm.wheel.1: must be name==version, not 'b'"),
    ("models.llm.wheel", ["a==1"], "models.llm.wheel: needs at least 2"),
    ("models.llm.wheel", ["a==1", "b==1"], "models.llm: 2 `wheel` need as many `sha256`, in the same order; not 1"),
    ("models.llm.wheel", "a{1..2}==1", "models.llm: 2 `wheel` need as many `sha256`, in the same order; not 1"),
    ("models.llm.wheel", "a{2..1}==1", "models.llm: `a{2..1}==1`: its ranges must have one length, of at least 1"),
    ("models.llm.gguf", "a{1..2}/b{1..3}", "models.llm: `a{1..2}/b{1..3}`: its ranges must have one length"),
    ("models.llm.gguf", "a{1..2}/b", "models.llm: a `gguf` of 2 pieces needs as many `wheel`, not 1"),
    (
        "models.llm",
        {"wheel": "a{1..2}==1", "gguf": "a{1..2}", "sha256": ["0" * 64] * 2},
        "models.llm: a `gguf` in pieces needs one `sha256`, that of the whole file",
    ),
    ("models.encoder", {}, "models.encoder: needs exactly one of `wheel`, `hub`, `folder` or `random`"),
    ("models.encoder.hub", "a/b", "models.encoder: needs exactly one of `wheel`, `hub`, `folder` or `random`"),
    ("models.encoder", {"hub": "a/b"}, "models.encoder: a `hub` model needs a pinned `revision`"),
    # teachers
    ("teachers.llm.model", "lm", "teachers.llm.model: unknown model `lm`; known: llm, encoder"),
    (
        "teachers.llm.kind",
        "llm",
        "teachers.llm.kind: must be 'lm', 'classifier', 'seq2seq', 'api' or 'answers', not",
    ),
    ("teachers.llm.data", ["x"], "teachers.llm.data.0: unknown source `x`; known: news, bare, other"),
    ("teachers.llm.data", ["news", "other"], "teachers.llm.data: sources of one task only, not mood, topic"),
    ("teachers.llm.finetune.on", "news/test", "teachers.llm.finetune.on: `news/test` must be `source/split` with"),
    ("teachers.llm.finetune.on", "x/train", "teachers.llm.finetune.on: unknown source `x`; known: news, bare, other"),
    ("teachers.llm.finetune.on", "other/train", "teachers.llm.finetune.on: `other` has another task than its data"),
    ("teachers.llm.data", ["bare"], "teachers.llm.finetune.on: `news` is not among its `data`: add it there"),
    ("teachers.llm.finetune.folds", 1, "teachers.llm.finetune.folds: must be 0 or greater than or equal to 2, not 1"),
    (
        "teachers.llm.finetune.folds",
        0,
        "students.kd.phases.0.data: `news/augmented`: `llm` was tuned on these rows, or",
    ),
    ("teachers.llm.finetune.steps", 3, "teachers.llm.finetune: needs exactly one of `epochs` or `steps`"),
    (
        "teachers.llm.finetune.learning_rate",
        "1e-4",
        "teachers.llm.finetune.learning_rate: must be a number, not '1e-4'",
    ),
    (
        "teachers.llm.finetune.learning_rate",
        float("inf"),
        "teachers.llm.finetune.learning_rate: must be a finite number",
    ),
    ("teachers.llm.finetune.lora.rank", 3, "teachers.llm.finetune.lora.rank: unknown key; allowed: r, alpha, dropout"),
    (
        "teachers.llm.finetune.lora.targets",
        3,
        "teachers.llm.finetune.lora.targets: must be 'all-linear' or a list, not",
    ),
    ("teachers.llm.kind", "api", "teachers.llm: `kind: api` needs `api`, not `model`"),
    ("teachers.llm.api", {"model": "m"}, "teachers.llm: `kind: lm` needs `model`, not `api`"),
    ("teachers.llm.prompts", ["short"], "teachers.llm: `prompts`, `examples_from` and `calibrate` are for"),
    ("teachers.llm.choose_prompt_by", "mutual_information", "teachers.llm.choose_prompt_by: has no effect: it needs"),
    ("students.kd.prompt_of", "nobody", "students.kd.prompt_of: unknown teacher `nobody`"),
    ("students.kd.prompt_of", "llm", "students.kd.prompt_of: has no effect: a classifier"),
    ("teachers.llm.examples_from", "similar", "teachers.llm: `examples_from: similar` and `embeddings` (an encoder"),
    (
        "teachers.llm",
        {"kind": "api", "api": {"model": "m", "key": "sk-my-key"}},
        "teachers.llm.api.key: must be the name of an environment variable, never the key itself\n",
    ),
    (
        "teachers.llm",
        {"kind": "api", "api": {"model": "m", "base_url": "https://me:word@x"}},
        "teachers.llm.api.base_url: must be http://… or https://…, without a user name or password\n",
    ),
    ("teachers.llm", {"kind": "api", "api": {"model": "m", "max_cost": 1.0}}, "teachers.llm.api: `max_cost` needs"),
    ("teachers.llm", {"kind": "api", "api": {"model": "m", "samples": 3}}, "teachers.llm.api: `samples` above 1 need"),
    (
        "teachers.llm",
        {"kind": "api", "api": {"model": "m", "client": "anthropic", "labels": "logprobs"}},
        "teachers.llm.api: `labels: logprobs` is not for `client: anthropic`",
    ),
    *(
        ("teachers.llm", {"kind": "api", "api": {"model": "m"} | keys}, f"teachers.llm.api{line}")
        for keys, line in [
            ({"extra_body": {"messages": []}}, ": `extra_body` cannot set `messages`\n"),
            ({"extra_body": {"n": 4}}, ": `extra_body` cannot set `n`: use `samples` of this section\n"),
            (
                {"extra_body": {"max_completion_tokens": 4}},
                ": `extra_body` cannot set `max_completion_tokens`: use `max_to",
            ),
            ({"extra_body": ["a"]}, ".extra_body: must be a section of keys and values\n"),
            ({"reasoning_effort": 0}, ".reasoning_effort: must be text, not 0\n"),
            ({"client": "anthropic", "reasoning_effort": "low"}, ": `reasoning_effort` is not for `client: anthropic`"),
            (
                {"client": "anthropic", "chat_template_kwargs": {"a": 1}},
                ": `chat_template_kwargs` is not for `client: a",
            ),
            *(
                (keys, f": `{path}` looks like a key or a password, which no file may hold: put it into an environment")
                for keys, path in [
                    ({"extra_body": {"headers": {"Authorization": "x"}}}, "extra_body.headers.Authorization"),
                    ({"extra_body": {"a": [0, {"X-Api-Key": "x"}]}}, "extra_body.a.1.X-Api-Key"),
                    ({"extra_body": {"client_secret": "x"}}, "extra_body.client_secret"),
                    ({"extra_body": {"token": "x"}}, "extra_body.token"),
                    ({"extra_body": {"a": "Bearer abc"}}, "extra_body.a"),
                    ({"extra_body": {"a": "sk-proj-abcdefgh1234"}}, "extra_body.a"),
                    ({"extra_body": {"a": ["hf_abcdefgh1234"]}}, "extra_body.a.0"),
                    ({"chat_template_kwargs": {"a": "AIzaSyD-abcdefgh1234"}}, "chat_template_kwargs.a"),
                    ({"reasoning_effort": "sk-abcdefgh1234"}, "reasoning_effort"),
                ]
            ),
        ]
    ),
    (
        "teachers.llm",
        {"kind": "answers", "answers": {"files": ["a.csv"], "columns": {}}},
        "teachers.llm.answers.columns: needs exactly one of `label`, `probabilities` or `answer`",
    ),
    (
        "teachers.llm",
        {"kind": "answers", "answers": {"files": ["a.csv"], "columns": {"label": "label"}}, "calibrate": "batch"},
        "teachers.llm: `kind: answers` can be calibrated by `calibrate: batch` or `clusters`, and only if its files",
    ),
    ("models.llm.labels", {"LABEL_0": "a", "LABEL_1": "b"}, "models.llm.labels: are for a classifier, and no"),
    ("models.encoder.labels", {"LABEL_0": "a"}, "models.encoder.labels: needs at least 2"),
    # augment
    ("augment.source", "x", "augment.source: unknown source `x`; known: news, bare, other"),
    ("augment.teacher", "x", "augment.teacher: unknown teacher `x`; known: llm, encoder"),
    ("augment.teacher", "encoder", "augment.teacher: `encoder` cannot write; needs `kind: lm or seq2seq or api`"),
    (
        "teachers.llm",
        {"kind": "answers", "data": ["news"], "answers": {"files": ["a.csv"], "columns": {"label": "l"}}},
        "augment.teacher: `llm` cannot write; needs `answers.columns.paraphrase`",
    ),
    (
        "teachers.llm",
        {"kind": "answers", "answers": {"files": ["a.csv"], "columns": {"label": "l", "paraphrase": "p"}}},
        "teachers.llm.answers.columns: `paraphrase` needs `id`, by which a paraphrase finds its row",
    ),
    ("augment.source", "other", "augment.teacher: `llm` does not label that source"),
    ("augment.keep", {"same_labels": True}, "augment.keep.same_labels: unknown key; did you mean `same_label`?"),
    # students
    ("students.kd.model", "x", "students.kd.model: unknown model `x`; known: llm, encoder"),
    ("students.kd.control", "x", "students.kd.control: unknown other student `x`; known: gold"),
    ("students.kd.control", "kd", "students.kd.control: unknown other student `kd`; known: gold"),
    ("students.kd.arch", "bert", "students.kd.arch: must be 'causal', 'classifier' or 'seq2seq', not 'bert'"),
    ("students.kd.adapter", {"kind": "qlora"}, "students.kd.adapter.kind: qlora is for `arch: causal`, not classifier"),
    ("students.kd.adapter", {"kind": "series", "r": 4}, "students.kd.adapter: `r` is no key of `kind: series`"),
    ("students.kd.adapter", {"kind": "lora", "size": 4}, "students.kd.adapter: `size` is no key of `kind: lora`"),
    ("students.kd.adapter", {"activation": "relu"}, "students.kd.adapter: `activation` is no key of `kind: none`"),
    (
        "students.kd.phases.0.select",
        {"by": "luck"},
        "students.kd.phases.0.select.by: must be 'doubt' or 'disagreement'",
    ),
    (
        "students.kd.phases.0.select",
        {"share": 0.0},
        "students.kd.phases.0.select.share: must be greater than 0, not 0.0",
    ),
    ("students.kd.init.layers", "frist-3", "students.kd.init.layers: must be a list or `all`, `first-N`, `last-N` or"),
    ("students.kd.init.layers", [0, -1], "students.kd.init.layers.1: must be greater than or equal to 0, not -1"),
    ("students.kd.init.layers", [], "students.kd.init.layers: must not be empty"),
    ("students.kd.phases", {}, "students.kd.phases: must be a list"),
    (
        "students.kd.phases.0.temprature",
        2.0,
        "students.kd.phases.0.temprature: unknown key; did you mean `temperature`?",
    ),
    ("students.kd.phases.0.loss", {"kld": 1.0}, "students.kd.phases.0.loss.kld: must be 'ce', 'kl', 'reverse_kl', "),
    ("students.kd.phases.0.loss", {"kl": 0}, "students.kd.phases.0.loss.kl: must be greater than 0, not 0"),
    ("students.kd.phases.0.loss", {}, "students.kd.phases.0.loss: must not be empty"),
    ("students.kd.phases.0.teachers", [], "students.kd.phases.0: loss term `kl` needs `teachers`"),
    ("students.kd.phases.0.teachers", ["x"], "students.kd.phases.0.teachers: unknown teacher `x`; known: llm, encoder"),
    ("students.kd.phases.0.data", [], "students.kd.phases.0.data: must not be empty"),
    (
        "students.kd.phases.0.data",
        ["news"],
        "students.kd.phases.0.data: `news` must be `source/split` with split one of",
    ),
    ("students.kd.phases.0.data", ["news/test"], "students.kd.phases.0.data: `news/test` must be `source/split` with"),
    ("students.kd.phases.0.data", ["x/pool"], "students.kd.phases.0.data: unknown source `x`; known: news, bare"),
    (
        "students.kd.phases.0.data",
        ["bare/pool"],
        "students.kd.phases.0.data: `bare/pool` is empty: data.bare.split.pool",
    ),
    ("students.kd.phases.0.data", ["bare/augmented"], "students.kd.phases.0.data: `bare/augmented`: only `news` is"),
    (
        "students.kd.phases.0.data",
        ["other/train"],
        "students.kd.phases.0.data: `other/train`: no teacher labels these rows; see teachers.llm.data",
    ),
    ("students.gold.phases.0.data", ["news/pool"], "students.gold.phases.0.loss: `ce` on a pool needs `teachers`"),
    ("students.gold.phases.0.order", "confidence", "students.gold.phases.0: `order: confidence` needs `teachers`"),
    ("students.gold.phases.0.early_stopping", {"evry": 1}, "students.gold.phases.0.early_stopping.evry: unknown key;"),
    ("students.gold.phases.0.steps", "autom", "students.gold.phases.0.steps: must be a whole number or 'auto', not"),
    ("students.gold.phases.0.epochs", "auto", "students.gold.phases.0: needs exactly one of `epochs` or `steps`"),
    ("students.gold.phases.0.max_steps", 9, "students.gold.phases.0: `max_steps` is the upper bound of `steps: auto`"),
    ("students.gold.phases.0.balance", "weights", "students.gold.phases.0.balance: must be 'none', 'class_weights' or"),
    (
        "students.gold.phases.0",
        AUTO | {"schedule": "linear"},
        "students.gold.phases.0: `schedule: linear` needs a known end: use `inverse_sqrt` or `constant` with `auto`",
    ),
    (
        "students.gold.phases.0",
        AUTO | {"balance": "batches", "order": "length"},
        "students.gold.phases.0: `balance: batches` draws rows at random: leave out `order: length`",
    ),
    (
        "students.kd.phases.0",
        AUTO | {"teachers": ["encoder"], "loss": {"hidden": 1.0}, "balance": "class_weights"},
        "students.kd.phases.0: `balance: class_weights` weighs `ce`, the divergences and `uld`, and `loss` has none",
    ),
    ("students.kd.long_texts", {"window": 3}, "students.kd.long_texts.window: unknown key; did you mean `windows`?"),
    ("students.kd.long_texts", {"windows": 1}, "students.kd.long_texts.windows: must be greater than or equal to 2"),
    (
        "students.kd",
        {"model": "llm", "arch": "causal", "phases": [], "long_texts": {}},
        "students.kd: `long_texts` is for `arch: classifier`, not causal",
    ),
    (
        "students.kd",
        {"model": "encoder", "arch": "classifier", "long_texts": {}, "phases": [HIDDEN]},
        "students.kd: `long_texts` is not for loss terms over hidden states: a text has no single one",
    ),
    ("teachers.llm.long_texts", {}, "teachers.llm: `long_texts` is for `kind: classifier`, not lm"),
    (
        "teachers.llm",
        {"kind": "api", "api": {"model": "x"}, "max_length": 99},
        "teachers.llm: `max_length` is for local models, not `kind: api`",
    ),
    ("students.kd.prompt_of", "nobody", "students.kd.prompt_of: unknown teacher `nobody`; known: "),
    ("students.kd.prompt_of", "llm", "students.kd.prompt_of: has no effect: a classifier reads no prompt"),
    ("teachers.llm.choose_prompt_by", "mutual_information", "teachers.llm.choose_prompt_by: has no effect: it needs"),
    ("evaluate.headline", "x", "evaluate.headline: unknown student `x`; known: kd, gold"),
    ("evaluate.pretrained_on", {"nobody": ["news"]}, "evaluate.pretrained_on: unknown model or teacher `nobody`"),
    ("evaluate.confidence", 95, "evaluate.confidence: must be less than 1, not 95"),
]


@pytest.mark.parametrize(("key", "value", "line"), MISTAKES, ids=[f"{key}={value!r:.20}" for key, value, _ in MISTAKES])
def test_mistakes_give_one_line(folder, key, value, line):
    with pytest.raises(UserError) as caught:
        load(folder, changed(key, value))
    message = str(caught.value)
    assert f"{message}\n".startswith(f"params.yaml: {line}")
    assert "\n" not in message


def test_every_student_needs_validation_and_test_rows_of_its_task(folder):
    pool, phase = {"source": "pool.csv", "task": "topic", "columns": {"label": None}}, {"data": ["pool/pool"]}
    raw = changed("data", {"pool": pool, "bench": {"splits": {"test": "b.csv"}, "task": "topic"}})
    raw["teachers"] = {"llm": {"kind": "lm", "model": "llm"}}
    raw["augment"] |= {"source": "pool", "per_row": 0}
    phase |= {"teachers": ["llm"], "loss": {"kl": 1.0}, "steps": 3, "learning_rate": 0.1}
    raw["students"] = {"kd": {"model": "encoder", "arch": "classifier", "phases": [phase]}}
    with pytest.raises(UserError) as caught:
        load(folder, raw)
    assert str(caught.value) == (
        "params.yaml: students.kd: `pool` has no validation and no test rows, and no other source of the task `topic` "
        "has both validation and test rows to choose and score it on"
    )
    raw["data"]["bench"]["splits"]["validation"] = "v.csv"
    assert load(folder, raw).test_source("kd") == "bench"


@pytest.mark.parametrize(
    ("settings", "choices", "line"),
    [
        # the schedule of `auto` would stay in the trials, and with --write the run would have another
        ({"steps": "auto"}, {"steps": [20, 40]}, "phase: a search reads no validation rows, which `steps: auto` needs"),
        ({"steps": "auto", "max_steps": 90}, {"steps": [20]}, "phase: a search reads no validation rows, which `steps"),
        (
            {"epochs": "auto"},
            {"steps": [20, 40]},
            "phase: a search reads no validation rows, which `epochs: auto` needs",
        ),
        ({"steps": 40}, {"epochs": [1, 2]}, "choices.epochs: the phase has `steps`: search that, or give it `epochs`"),
        (
            {"epochs": 1},
            {"epochs": [2, "auto"]},
            "choices.epochs: `auto` needs validation rows, and a search reads none",
        ),
    ],
)
def test_each_trial_of_a_search_is_a_phase_with_a_known_length(folder, settings, choices, line):
    raw = changed("search", {"student": "gold", "choices": choices})
    phase = raw["students"]["gold"]["phases"][0]
    raw["students"]["gold"]["phases"][0] = {k: phase[k] for k in phase if k not in ("steps", "epochs")} | settings
    with pytest.raises(UserError, match=f"^params.yaml: search.{line}"):
        load(folder, raw)


def test_a_search_may_list_lengths_of_its_phase(folder):
    raw = changed("search", {"student": "gold", "choices": {"steps": [20, 40]}})
    assert raw["students"]["gold"]["phases"][0]["steps"]
    assert load(folder, raw).search.choices == {"steps": [20, 40]}


def test_hidden_states_of_a_teacher_that_reads_windows(folder):
    raw = changed("teachers.encoder.long_texts", {})
    raw["students"]["kd"]["phases"] = [HIDDEN]
    with pytest.raises(UserError) as caught:
        load(folder, raw)
    line = "`encoder` reads `long_texts` in windows: a text has no hidden state"
    assert str(caught.value) == f"params.yaml: students.kd.phases.0.teachers: {line}"


def test_a_student_may_be_scored_on_rows_that_it_learns_nothing_of(folder):
    raw = changed("students.kd.test_source", "news")
    raw["students"]["kd"]["phases"] = raw["students"]["kd"]["phases"][:1]
    raw["students"]["kd"]["phases"][0]["data"] = ["bare/train"]
    assert load(folder, raw).test_source("kd") == "news"
    for source, line in (
        ("none", "unknown source `none`; known: news, bare, other"),
        ("other", "one task only, not mood, topic"),
    ):
        raw["students"]["kd"]["test_source"] = source
        with pytest.raises(UserError, match=re.escape(line)):
            load(folder, raw)


def test_two_tasks_in_one_student(folder):
    raw = changed("students.gold.phases.0.data", ["news/train"])
    second = copy.deepcopy(raw["students"]["gold"]["phases"][0]) | {"data": ["other/train"]}
    raw["students"]["gold"]["phases"].append(second)
    with pytest.raises(UserError, match="students.gold.phases: one task only, not mood, topic"):
        load(folder, raw)


def test_a_teacher_without_folds_teaches_on_rows_it_was_not_tuned_on(folder):
    raw = changed("teachers.llm.finetune.folds", 0)
    raw["students"]["kd"]["phases"] = raw["students"]["kd"]["phases"][:1]
    raw["students"]["kd"]["phases"][0]["data"] = ["news/pool", "bare/train"]
    assert load(folder, raw).teachers["llm"].finetune.folds == 0
    raw["students"]["kd"]["phases"][0]["data"] = ["news/pool", "news/train"]
    with pytest.raises(UserError, match=r"students.kd.phases.0.data: `news/train`: `llm` was tuned on these rows"):
        load(folder, raw)


def test_an_instruction_for_paraphrases_that_are_in_files(folder):
    columns = {"id": "i", "text": None, "label": "l", "paraphrase": "p"}
    raw = changed(
        "teachers.llm", {"kind": "answers", "data": ["news"], "answers": {"files": ["a.csv"], "columns": columns}}
    )
    load(folder, raw)
    raw["augment"]["instruction"] = "Say it anew."
    with pytest.raises(UserError, match="augment.instruction: the paraphrases of `llm` are in files; leave it out"):
        load(folder, raw)


def test_which_teachers_paraphrase_test_rows(folder):
    raw = changed("evaluate.paraphrased_rows", 4)
    load(folder, raw)  # `llm` is a language model
    columns = {"id": "i", "text": None, "label": "l"}
    raw["teachers"]["llm"] = {"kind": "answers", "data": ["news"], "answers": {"files": ["a.csv"], "columns": columns}}
    raw["augment"]["per_row"] = 0
    with pytest.raises(UserError, match=r"evaluate.paraphrased_rows: `llm` \(augment.teacher\) cannot write"):
        load(folder, raw)
    columns["paraphrase"] = "p"
    load(folder, raw)


def test_what_cannot_be_cut_into_shards(folder):
    raw = changed("compute", {"strategy": "fsdp"})
    with pytest.raises(
        UserError, match=r"compute: `strategy: fsdp` shards a model over several `processes`, and there"
    ):
        load(folder, raw)
    raw["compute"]["processes"] = 2
    load(folder, raw)
    for section, place in (
        (raw["students"]["kd"]["phases"][-1], r"students\.kd\.phases\.\d"),
        (raw["teachers"]["llm"]["finetune"], r"teachers\.llm\.finetune"),
    ):
        section["optimizer"] = "paged_adamw_8bit"
        with pytest.raises(UserError, match=rf"{place}\.optimizer: paged_adamw_8bit: its states cannot be cut into sh"):
            load(folder, raw)
        section.pop("optimizer")
    raw["teachers"]["llm"]["quantize"] = "nf4"
    raw["teachers"]["llm"]["finetune"]["lora"] = {"r": 4}
    with pytest.raises(UserError, match=r"teachers\.llm\.quantize: weights in 4 bits cannot be cut into shards; set"):
        load(folder, raw)


def test_no_gold_rows_to_fine_tune_on_or_to_paraphrase(folder):
    raw = changed("data.news.split", {"train": 0, "pool": 0.5, "validation": 0.25, "test": 0.25})
    with pytest.raises(UserError, match=r"teachers.llm.finetune.on: `news/train` is empty: data.news.split.train is 0"):
        load(folder, raw)
    raw["teachers"]["llm"]["finetune"] = None
    raw["teachers"].pop("encoder")
    raw["students"]["kd"]["phases"].pop()
    with pytest.raises(UserError, match=r"augment.source: `news/train` is empty"):
        load(folder, raw)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "params.yaml: (the whole file): must be a section of keys and values, not None"),
        (b"- 1\n", "params.yaml: (the whole file): must be a section of keys and values"),
        (b"seeds: [1\ndata: 2\n", "params.yaml, line 2: not valid YAML: "),
        (b"seeds: [1]\nseeds: [2]\n", "params.yaml, line 2: not valid YAML: found duplicate key"),
        (b"seeds: [1]\n\tdata: 2\n", "params.yaml, line 2: not valid YAML: "),
        (b"seeds: [1] # caf\xe9\n", "params.yaml: byte 16 is not UTF-8; save the file as UTF-8"),
    ],
)
def test_files_that_are_no_configuration(folder, content, line):
    path = folder / "params.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_params(path)
    message = str(caught.value).replace(f"{folder}/", "")
    assert message.startswith(line)
    assert "\n" not in message


def test_missing_file_and_folder_in_its_place(folder):
    with pytest.raises(UserError, match=r"params.yaml: no such file"):
        load_params(folder / "params.yaml")
    (folder / "params.yaml").mkdir()
    with pytest.raises(UserError, match=r"params.yaml: cannot be read: Is a directory"):
        load_params(folder / "params.yaml")


@settings(max_examples=60)
@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), st.lists, max_leaves=4)
)
def test_any_value_anywhere_is_accepted_or_refused(value):
    """A wrong value never ends in another error than UserError, and never in several lines."""
    for key in (
        "seeds",
        "data",
        "data.news.columns",
        "models.llm",
        "teachers.llm.finetune",
        "students.kd.phases.0.loss",
    ):
        try:
            validate_section(Params, changed(key, value), "params.yaml")
        except UserError as error:
            assert re.match(rf"params\.yaml: {re.escape(key)}", str(error))
            assert "\n" not in str(error)


def test_split_references():
    ref = SplitRef.parse("finance/pool")
    assert (ref.source, ref.split, str(ref)) == ("finance", "pool", "finance/pool")
    assert ref == SplitRef("finance", "pool") and len({ref, SplitRef("finance", "pool")}) == 1
    assert SplitRef.parse("finance/augmented").split == "augmented"
    for text in ("finance", "finance/", "/pool", "finance/pools", "finance/pool/x", ""):
        with pytest.raises(
            ValueError, match=r"must be `source/split` with split one of train, pool, validation, test, a"
        ):
            SplitRef.parse(text)
    with pytest.raises(ValueError, match="`finance/pool` must be `source/split` with split one of train$"):
        SplitRef.parse("finance/pool", ("train",))


# --------------------------------------------------------------------------------------- distillery check


def run_check(folder: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "distillery", "check"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_check_counts_the_sections(folder):
    (folder / "params.yaml").write_text(BASE)
    done = run_check(folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "params.yaml: 3 source(s), 2 teacher(s), 2 student(s) x 1 seed(s)\n"


def test_check_warns_of_a_setting_without_effect(folder):
    (folder / "params.yaml").write_text(BASE.replace("loss: {ce: 1.0}", "loss: {ce: 1.0}, temperature: 2.0"))
    done = run_check(folder)
    assert done.returncode == 0 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(
        "warning: params.yaml: students.gold.phases.0.temperature: has no effect in this phase"
    )


def test_check_shows_a_mistake_without_a_traceback(folder):
    (folder / "params.yaml").write_text(BASE.replace("seeds:", "seedz:"))
    done = run_check(folder)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: params.yaml: seedz: unknown key; did you mean `seeds`?")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_a_whole_experiment(recipe, tmp_path):
    """`cp recipes/<name>.yaml params.yaml` must leave a params.yaml that passes every check."""
    shutil.copytree(ROOT / "tasks", tmp_path / "tasks")
    shutil.copy(recipe, tmp_path / "params.yaml")
    loaded = load_params(tmp_path / "params.yaml")
    assert all((ROOT / s.source).exists() for s in loaded.data.values() if not s.source.startswith("hub:"))
    assert unused_settings(loaded) == []
    assert Params.model_validate(loaded.model_dump()) == loaded  # stages store sections with all their keys
