"""Models and data sets from a hub, through the real clients: what is fetched, what is refused and how it is told."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import hub
import tiny
from distillery.config.schema import SourceConfig

SCRIPT = """
import json, os, sys, time
from pathlib import Path
from distillery.config.schema import ModelConfig, SourceConfig
from distillery.errors import UserError
asked = json.loads(sys.stdin.read())
cache, out = Path(asked["cache"]), []
time.sleep = lambda seconds: None  # the client waits before it tries again
for kind, name, spec, more in asked["jobs"]:
    os.environ.pop("HF_TOKEN", None)
    if more and "token" in more:
        os.environ["HF_TOKEN"] = more.pop("token")
    try:
        if kind == "model":
            from distillery.models.fetch import fetch_model
            from distillery.models.load import load_model, load_tokenizer
            folder = fetch_model(name, ModelConfig(**spec), cache)
            found = {"files": sorted(path.name for path in folder.iterdir())}
            if more:
                model = load_model(folder, more["arch"], labels=["a", "b"])
                found |= {"class": type(model).__name__, "pad": load_tokenizer(folder).pad_token}
        else:
            from distillery.data.prepare import prepare_source
            from distillery.tasks.schema import load_task
            prepared = prepare_source(name, SourceConfig(**spec), load_task(spec["task"]), Path("."))
            counts = {part: about["rows"] for part, about in prepared.audit["splits"].items()}
            found = {"rows": counts, "labels": sorted({*prepared.rows["label"]} - {None})}
        out.append(found)
    except UserError as error:
        out.append({"error": str(error)})
print("\\n" + json.dumps(out))
"""


def ask(url: str, home: Path, jobs: list[tuple]) -> list[dict[str, Any]]:
    """What came of each job (kind, name, section, more), all in a process whose hub is at `url`."""
    told = {"cache": str(home / "models"), "jobs": jobs}
    return json.loads(with_hub(url, home, SCRIPT, told, tiny.ROOT).splitlines()[-1])


def with_hub(url: str, home: Path, script: str, told: Any, folder: Path) -> str:
    """What `script` prints in a process whose hub is at `url`; it reads `told` as JSON."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    clean |= {"HF_ENDPOINT": url, "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    clean |= {"HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(tiny.ROOT / "src"), "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(told),
        cwd=folder,
        env=clean,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def parquet(rows: list[dict], labels: dict[str, list[str]] | None = None) -> bytes:
    """A table as the hub keeps it; `labels` names the integers of a column."""
    import datasets

    made = datasets.Dataset.from_list(rows)
    for column, names in (labels or {}).items():
        made = made.cast_column(column, datasets.ClassLabel(names=names))
    out = io.BytesIO()
    made.to_parquet(out)
    return out.getvalue()


@pytest.fixture(scope="module")
def fetched(tiny_models, tmp_path_factory):
    """What each of the jobs below came to: one process asks for them all."""
    good = hub.folder(tiny_models / "tiny-bert")
    config = json.loads(good["config.json"])
    own = {"AutoConfig": "code.StrangeConfig", "AutoModelForSequenceClassification": "code.Strange"}
    remote = {"auto_map": own, "model_type": "strange"}
    strange = good | {"config.json": json.dumps(config | remote).encode(), "code.py": b"raise SystemExit('ran')"}
    pickled = {name: content for name, content in good.items() if not name.endswith(".safetensors")}
    pickled |= {"pytorch_model.bin": b"pickle"}
    words = [
        "profit",
        "sales",
        "margin",
        "orders",
        "costs",
        "output",
        "cash",
        "debt",
        "staff",
        "stock",
        "price",
        "volume",
    ]
    tables = {}
    for part in ("train", "validation", "test"):
        rows = [{"sentence": f"{word} in the {part}", "label": i % 3} for i, word in enumerate(words)]
        tables[f"data/{part}-00000-of-00001.parquet"] = parquet(rows, {"label": ["negative", "neutral", "positive"]})
    repos = {
        "me/good": hub.Repo(
            good | {"pytorch_model.bin": b"pickle", "code.py": b"raise SystemExit('ran')"}, branches=("v1",)
        ),
        "me/gated": hub.Repo(good, fault="gated"),
        "me/private": hub.Repo(good, fault="private"),
        "me/truncated": hub.Repo(good, fault="truncated"),
        "me/altered": hub.Repo(good, fault="altered"),
        "me/pickled": hub.Repo(pickled),
        "me/strange": hub.Repo(strange),
        "datasets/me/table": hub.Repo(tables),
        "datasets/me/gated": hub.Repo(tables, fault="gated"),
        "datasets/me/script": hub.Repo({"script.py": b"raise SystemExit('ran')"}),
    }
    commit = repos["me/good"].commit
    split = {"split": {"train": 0.5, "validation": 0.25, "test": 0.25}}
    own = {
        "hub_splits": {"train": "train[:50%]", "validation": "validation[50%:]", "test": "test"},
        "near_duplicate": 1.0,
    }
    table = {"task": "finance-sentiment", "columns": {"text": "sentence"}, "near_duplicate": 1.0}
    jobs = {
        "pinned": ("model", "m", {"hub": "me/good", "revision": commit}, {"arch": "classifier"}),
        "tag": ("model", "m", {"hub": "me/good", "revision": "v1"}, None),
        "no revision": ("model", "m", {"hub": "me/good", "revision": "v2"}, None),
        "gated": ("model", "m", {"hub": "me/gated", "revision": "main"}, None),
        "private": ("model", "m", {"hub": "me/private", "revision": "main"}, None),
        "gated, with a token": ("model", "m", {"hub": "me/gated", "revision": "main"}, {"token": hub.TOKEN}),
        "private, with a token": ("model", "m", {"hub": "me/private", "revision": "main"}, {"token": hub.TOKEN}),
        "none": ("model", "m", {"hub": "me/none", "revision": "main"}, None),
        "truncated": ("model", "m", {"hub": "me/truncated", "revision": "main"}, None),
        "altered": ("model", "m", {"hub": "me/altered", "revision": "main"}, None),
        "pickled": ("model", "m", {"hub": "me/pickled", "revision": "main"}, None),
        "remote code": ("model", "m", {"hub": "me/strange", "revision": "main"}, {"arch": "classifier"}),
        "table": ("data", "d", table | split | {"source": "hub:me/table@main"}, None),
        "own splits": ("data", "d", table | own | {"source": "hub:me/table@main"}, None),
        "table, no revision": ("data", "d", table | split | {"source": "hub:me/table@v9"}, None),
        "table, gated": ("data", "d", table | split | {"source": "hub:me/gated@main"}, None),
        "table, none": ("data", "d", table | split | {"source": "hub:me/none"}, None),
        "table, script": ("data", "d", table | split | {"source": "hub:me/script"}, None),
    }
    home = tmp_path_factory.mktemp("hub")
    with hub.serving(repos) as (url, asked):
        out = dict(zip(jobs, ask(url, home, list(jobs.values())), strict=True))
    return out, asked, home


def test_a_pinned_model_is_fetched_as_safetensors_without_code(fetched):
    out, asked, home = fetched
    assert out["pinned"]["class"] == "BertForSequenceClassification"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(out["pinned"]["files"])
    assert not {"pytorch_model.bin", "code.py", ".cache"} & set(out["pinned"]["files"])
    assert out["tag"]["files"] == out["pinned"]["files"]
    assert not [line for line in asked if line.endswith((".bin", ".py")) and "/datasets/" not in line]  # not asked for
    # nothing of what was refused stays
    assert len(list((home / "models").iterdir())) == 4  # by commit, tag and token, and the one with own code


REFUSED = {
    "no revision": "cannot fetch me/good@v2: no such revision",
    "gated": "cannot fetch me/gated@main: its owner must let you; accept its terms on the hub and set HF_TOKEN",
    "gated, with a token": "cannot fetch me/gated@main: its owner must let you; accept its terms on the hub and set",
    "private": "cannot fetch me/private@main: no such model (or it is private; then set HF_TOKEN)",
    "none": "cannot fetch me/none@main: no such model (or it is private; then set HF_TOKEN)",
    "truncated": "cannot fetch me/truncated@main: ",
    "altered": "cannot fetch me/altered@main: model.safetensors is not what its checksum says; nothing kept",
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_cannot_be_had_is_told_in_one_line(fetched, case):
    told = fetched[0][case]["error"]
    assert told.startswith(f"params.yaml: models.m.hub: {REFUSED[case]}")
    assert "\n" not in told


def test_a_token_opens_what_is_private(fetched):
    assert "model.safetensors" in fetched[0]["private, with a token"]["files"]


def test_pickled_weights_and_code_of_others_are_refused(fetched):
    assert fetched[0]["pickled"]["error"] == (
        "params.yaml: models.m: no safetensors weights; pickled weights are not loaded"
    )
    assert "trust_remote_code" in fetched[0]["remote code"]["error"]
    assert "\n" not in fetched[0]["remote code"]["error"]


def test_a_table_of_the_hub_is_split_or_keeps_its_own_splits(fetched):
    found = fetched[0]["table"]
    assert "error" not in found, found
    assert found["labels"] == ["negative", "neutral", "positive"]
    assert sum(found["rows"].values()) == 12
    assert fetched[0]["own splits"].get("rows", fetched[0]["own splits"]) == {
        "train": 6,
        "pool": 0,
        "validation": 6,
        "test": 12,
    }


@pytest.mark.parametrize("case", ["table, no revision", "table, gated", "table, none", "table, script"])
def test_a_table_that_cannot_be_had_is_told_in_one_line(fetched, case):
    told = fetched[0][case]["error"]
    assert told.startswith("hub:me/")
    assert "\n" not in told


# ------------------------------------------------------------------------------------------------ recipes

TYPES = {  # what stands behind the hub ids that the recipes name
    "meta-llama/Llama-2-7b-hf": "llama",
    "meta-llama/Llama-2-13b-hf": "llama",
    "bigscience/bloom-1b1": "bloom",
    "ProsusAI/finbert": "bert",
    "google-bert/bert-base-uncased": "bert",
    "FacebookAI/roberta-base": "roberta",
    "distilbert/distilbert-base-uncased": "distilbert",
    "albert/albert-base-v2": "albert",
    "google/flan-t5-small": "t5",
    "google/flan-t5-base": "t5",
    "google/flan-t5-large": "t5",
    "google/flan-t5-xl": "t5",
    "google-t5/t5-small": "t5",
    "google-t5/t5-large": "t5",
    "facebook/opt-13b": "opt",
    "facebook/opt-1.3b": "opt",
    "openai-community/gpt2-xl": "gpt2",
    "openai-community/gpt2": "gpt2",
}
SHAPES = {
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2},
    "bloom": {"hidden_size": 16, "n_layer": 1, "n_head": 2},
    "distilbert": {"dim": 16, "hidden_dim": 16, "n_layers": 1, "n_heads": 2},
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 1},
    "opt": {
        "hidden_size": 16,
        "ffn_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 16,
    },
    "albert": {"embedding_size": 8},
}
SHAPE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def of_type(kind: str, folder: Path) -> dict[str, bytes]:
    """The files of a tiny model of this architecture."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    encoder = kind in ("bert", "roberta", "distilbert", "albert")
    tokenizer = tiny.word_tokenizer(["profit rose and fell"], "bert" if encoder else "llama")
    shape = SHAPES.get(kind, {}) if kind in SHAPES and kind != "albert" else SHAPE | SHAPES.get(kind, {})
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **shape)
    torch.manual_seed(0)
    auto = AutoModel if encoder else AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    auto.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return hub.folder(folder)


def tables() -> dict[str, hub.Repo]:
    """The public data sets that the recipes name, a few rows each, in the columns they have."""
    words = ["profit", "sales", "margin", "orders", "costs", "output"]
    many = [f"{a} of the {b} business in quarter {i}" for i, (a, b) in enumerate((a, b) for a in words for b in words)]

    def parts(rows: list[dict], labels: dict | None = None, under: str = "data", names=("train", "validation", "test")):
        return {f"{under}/{name}-00000-of-00001.parquet": parquet(rows, labels) for name in names}

    def configs(name: str, splits: tuple[str, ...]) -> dict[str, bytes]:
        files = "".join(f"  - split: {split}\n    path: {name}/{split}-*\n" for split in splits)
        return {"README.md": f"---\nconfigs:\n- config_name: {name}\n  data_files:\n{files}---\n".encode()}

    three = ("train", "validation", "test")
    fpb = [{"sentence": text, "label": i % 3} for i, text in enumerate(many)]
    news = [{"headline": text} for text in many]
    grande = [
        {"sentence": f"the _ of {t}", "option1": "a", "option2": "b", "answer": str(1 + i % 2)}
        for i, t in enumerate(many)
    ]
    siqa = [
        {"context": t, "question": "why?", "answerA": "x", "answerB": "y", "answerC": "z", "label": str(1 + i % 3)}
        for i, t in enumerate(many)
    ]
    aqua = [
        {
            "question": t,
            "options": [f"{x}){n}" for n, x in enumerate("ABCDE")],
            "rationale": "so",
            "correct": "ABCDE"[i % 5],
        }
        for i, t in enumerate(many)
    ]
    trivia = [
        {"question": t, "question_id": f"q{i}", "answer": {"value": f"V{i}", "aliases": [f"V{i}", "W"], "type": "x"}}
        for i, t in enumerate(many)
    ]
    return {
        "datasets/atrost/financial_phrasebank": hub.Repo(parts(fpb, {"label": ["negative", "neutral", "positive"]})),
        "datasets/ashraq/financial-news": hub.Repo(parts(news, names=("train",))),
        "datasets/allenai/winogrande": hub.Repo(parts(grande, under="winogrande_xl") | configs("winogrande_xl", three)),
        "datasets/lighteval/siqa": hub.Repo(parts(siqa, names=("train", "validation"))),
        "datasets/deepmind/aqua_rat": hub.Repo(parts(aqua, under="raw") | configs("raw", three)),
        "datasets/mandarjoshi/trivia_qa": hub.Repo(
            parts(trivia, under="rc.nocontext") | configs("rc.nocontext", three)
        ),
    }


def few(source: SourceConfig) -> dict[str, Any]:
    """A recipe's source for tables of 36 rows: the hub's words for shares are for many thousand."""
    spec = source.model_dump(exclude_unset=True) | {"hub_split": "train", "near_duplicate": 1.0}
    if source.hub_splits:
        own = {part: text.partition("[")[0] for part, text in spec["hub_splits"].items()}
        cut = {"train": "[:18]", "pool": "[18:24]", "validation": "[24:30]", "test": "[30:]"}
        spec["hub_splits"] = {part: text + cut[part] for part, text in own.items()}
    return spec


def test_every_model_and_table_that_a_recipe_names_resolves(tmp_path):
    """By its id, at its revision, as the right class, with the columns, splits and configurations that are named."""
    from distillery.config.load import validate_section
    from distillery.config.schema import Params
    from distillery.pipeline.recipe import load_recipe

    repos, jobs, arch = tables(), {}, {"lm": "causal", "classifier": "classifier", "seq2seq": "seq2seq"}
    files = {kind: of_type(kind, tmp_path / kind) for kind in sorted(set(TYPES.values()))}
    repos |= {name: hub.Repo(files[kind]) for name, kind in TYPES.items()}
    for path in sorted((tiny.ROOT / "recipes").glob("*.yaml")):
        params = validate_section(Params, load_recipe(tiny.ROOT, path.stem), path.name)
        used = {teacher.model: arch[teacher.kind] for teacher in params.teachers.values() if teacher.model}
        used |= {student.model: student.arch for student in params.students.values()}
        for model, wanted in used.items():
            if params.models[model].hub:
                job = ("model", model, params.models[model].model_dump(), {"arch": wanted})
                jobs.setdefault((params.models[model].hub, wanted), job)
        for name, source in params.data.items():
            if source.source.startswith("hub:"):
                jobs.setdefault((source.source, ""), ("data", name, few(source), None))
    with hub.serving(repos) as (url, _):
        found = dict(zip(jobs, ask(url, tmp_path, list(jobs.values())), strict=True))
    wrong = {key: value["error"] for key, value in found.items() if "error" in value}
    assert not wrong
    assert {name for name, wanted in found if wanted} == set(TYPES)
    ending = {
        "causal": ("CausalLM", "LMHeadModel"),
        "classifier": ("SequenceClassification",),
        "seq2seq": ("Generation",),
    }
    for (name, wanted), value in found.items():
        if wanted:
            assert value["class"].lower().startswith(TYPES[name]) and value["class"].endswith(ending[wanted]), name
        else:
            assert value["rows"]["pool" if "news" in name else "train"] > 0


NOTEBOOK = """
import json, sys
import matplotlib
matplotlib.use("agg")
cells = json.load(open("notebooks/01_data.ipynb"))["cells"]
for name in json.loads(sys.stdin.read()):
    there = {"__name__": "__main__"}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), there)
            there["source"] = name
"""


def test_the_data_notebook_shows_every_table_of_the_recipes(tmp_path):
    """With the hub's own splits, without labels, with options, with written answers; each in its last cell's files."""
    from distillery.config.load import validate_section
    from distillery.config.schema import Params
    from distillery.files import read_yaml
    from distillery.pipeline.recipe import load_recipe

    repo, data = tiny.experiment(tmp_path / "repo"), {}
    raw = read_yaml(repo / "params.yaml")
    for teacher in raw["teachers"].values():
        teacher["data"] = ["finance"]
    for path in sorted((tiny.ROOT / "recipes").glob("*.yaml")):
        params = validate_section(Params, load_recipe(tiny.ROOT, path.stem), path.name)
        for name, source in params.data.items():
            if source.source.startswith("hub:"):
                data[f"{path.stem}-{name}"] = few(source)
    (repo / "params.yaml").write_text(json.dumps(raw | {"data": raw["data"] | data}))  # JSON is YAML
    with hub.serving(tables()) as (url, _):
        with_hub(url, tmp_path, NOTEBOOK, list(data), repo)
    kinds = {(source["task"], "hub_splits" in source) for source in data.values()}
    assert len(kinds) >= 5 and any(source["columns"].get("label", "") is None for source in data.values())
    for name in data:
        assert (repo / f"data/processed/{name}/audit.json").exists(), name
