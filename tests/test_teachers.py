"""Teachers: which paraphrases are kept, folds whose model never saw a row, and answers that are computed once."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model_state_dict
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import tiny
from distillery.config.load import validate_section
from distillery.config.schema import (
    AnswerFilesConfig,
    LoraSettings,
    ModelConfig,
    Params,
    ParaphraseFilter,
    TeacherConfig,
)
from distillery.errors import UserError
from distillery.evaluation.speed import probability_function
from distillery.files import read_yaml
from distillery.models import label_model
from distillery.models.label_model import LabelModel
from distillery.models.load import load_model, load_tokenizer
from distillery.models.packed.frozen_layers import SharedStates
from distillery.models.packed.token_tree import common_prefix
from distillery.models.save import save_model, save_trained_weights
from distillery.pipeline.inputs import experiment_record
from distillery.tasks.chosen_prompt import student_task
from distillery.tasks.parsing import first_sentence
from distillery.tasks.prompts import chat_turns, render_prompt
from distillery.tasks.schema import Perturbations, Task, load_task
from distillery.teachers.agreement import combine_votes, pseudo_label_precision, teacher_votes
from distillery.teachers.base import open_teacher
from distillery.teachers.cache import STORE_PATH
from distillery.teachers.calibration import fit_clusters
from distillery.teachers.directions import directions, numbers, tickers
from distillery.teachers.few_shot import GoldExamples
from distillery.teachers.file import FileTeacher, read_answer_files
from distillery.teachers.finetune import assign_folds, cross_fit, finetune_teacher
from distillery.teachers.identity import model_identity
from distillery.teachers.local import LocalTeacher
from distillery.teachers.paraphrases import (
    filter_paraphrases,
    generate_paraphrases,
    label_paraphrases,
    paraphrase_prompts,
    rejection_reason,
    text_similarity,
)
from distillery.teachers.prompt_search import (
    NO_CONTENT,
    _information,
    compare_prompts,
    estimate_calibration,
)
from distillery.teachers.rationales import add_rationales, contradicts
from distillery.teachers.signals import label_rows, score_signals, signal_table
from distillery.training.teacher_models import load_teacher_model

TASK = load_task("finance-sentiment", tiny.ROOT / "tasks")
LABELS = TASK.names
RULES = TASK.perturbations
KEEP = ParaphraseFilter()

# ------------------------------------------------------------------------------- rules for paraphrases


@pytest.mark.parametrize(
    "text, expected",
    [
        ("EUR 1,234.5 mn, up 48% from 12", ["12", "1234.5", "48"]),
        ("1,234 and 1234", ["1234", "1234"]),
        ("12,34 is a decimal comma", ["12,34"]),
        ("in 2010, 3.5.", ["2010", "3.5"]),
        ("no number", []),
    ],
)
def test_numbers(text, expected):
    assert numbers(text) == sorted(expected)


def test_tickers_are_words_in_capitals():
    assert tickers("$aapl and EUR beat IBM, but I and Nokia did not", RULES.tickers) == {"$aapl", "EUR", "IBM"}


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Profit ROSE.", {"up"}),
        ("Sales fell", {"down"}),
        ("Sales fell less than profit rose", {"down", "up"}),
        ("An update on the downtown office", set()),
        ("It will be held in May", set()),
    ],
)
def test_directions(text, expected):
    assert directions(text, RULES.directions) == expected


def test_a_direction_word_belongs_to_one_family():
    up, down = (set(RULES.directions[family]) for family in ("up", "down"))
    assert not up & down and {"up", "rose"} <= up and {"down", "fell"} <= down


SOME = ["the", "profit", "of", "Nokia", "rose", "to", "EUR", "12", "mn", "in", "2010", "sales", "fell", "by", "3.5%"]
WORDS = st.lists(st.sampled_from(SOME), max_size=9)


@given(WORDS, WORDS)
def test_similarity_is_a_share_and_whole_for_the_same_text(a, b):
    a, b = " ".join(a), " ".join(b)
    assert 0 <= text_similarity(a, b) <= 1
    assert text_similarity(a, a.upper()) == 1


@given(WORDS.filter(bool))
def test_a_copy_is_dropped_whatever_its_case(words):
    text = " ".join(words)
    assert rejection_reason(text, text, keep=KEEP, perturbations=RULES) == "copy"
    assert rejection_reason(text, text.upper(), keep=KEEP, perturbations=RULES) == "copy"


SOURCE = "Net sales of IBM went up 48% to EUR 1,200 mn in 2010 as demand for its servers came back."


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "empty"),
        (SOURCE + ".", "copy"),
        ("zzz qqq", "off topic"),
        ("In 2010 the net sales of IBM were up 49% and came to EUR 1,200 mn as servers sold.", "numbers changed"),
        ("In 2010 the net sales of IBM were up and came to EUR 1,200 mn as servers sold.", "numbers changed"),
        ("In 2010 the company's net sales were up 48% and came to EUR 1200 mn as servers sold.", "tickers lost"),
        ("In 2010 the net sales of IBM were down 48% and came to EUR 1,200 mn as servers sold.", "direction changed"),
        ("In 2010 the net sales of IBM moved 48% and came to EUR 1,200 mn as servers sold.", "direction changed"),
        ("In 2010 the net sales of IBM rose by 48% and came to EUR 1200 mn as servers sold.", "kept"),
    ],
)
def test_rejection_reasons(text, reason):
    assert rejection_reason(SOURCE, text, keep=KEEP, perturbations=RULES) == reason


def test_a_task_without_perturbations_checks_neither_tickers_nor_directions():
    text = "In 2010 the company's net sales were down 48% and came to EUR 1200 mn as servers sold."
    assert rejection_reason(SOURCE, text, keep=KEEP, perturbations=RULES) == "tickers lost"
    assert rejection_reason(SOURCE, text, keep=KEEP, perturbations=Perturbations()) == "kept"
    only = Perturbations(directions={"rising": ["went"]})
    assert rejection_reason(SOURCE, text, keep=KEEP, perturbations=only) == "direction changed"


def test_a_good_paraphrase_near_a_held_out_row_is_dropped_and_thresholds_are_those_of_params():
    good = "In 2010 the net sales of IBM rose by 48% and came to EUR 1200 mn as servers sold."
    off = ParaphraseFilter(same_facts=False, same_label=False, max_similarity=1.0, min_similarity=0.0)
    for text in ("The company lost 9 EUR", SOURCE, "x"):
        assert rejection_reason(SOURCE, text, keep=off, perturbations=RULES) == "kept"
    assert "held-out" in rejection_reason(SOURCE, good, keep=off, perturbations=RULES, overlap=True)
    assert "held-out" in rejection_reason(SOURCE, good, keep=KEEP, perturbations=RULES, overlap=True)
    assert rejection_reason(SOURCE, good, keep=ParaphraseFilter(max_similarity=0.3), perturbations=RULES) == "copy"
    assert rejection_reason(SOURCE, good, keep=ParaphraseFilter(min_similarity=0.9), perturbations=RULES) == "off topic"


@given(st.integers(0, 999), st.sampled_from(["up", "rose", "higher"]), st.sampled_from(["down", "fell", "lower"]))
def test_a_changed_direction_is_never_kept(number, up, down):
    source = f"Quarterly profit of the company moved {up} {number}% from a year ago"
    turned = f"The profit that the company made in the quarter went {down} {number}% against a year ago"
    assert rejection_reason(source, turned, keep=KEEP, perturbations=RULES) != "kept"


def test_a_sentence_ends_at_a_full_stop_not_within_a_number():
    assert first_sentence("Profit rose to 1.5 mn. More follows.") == "Profit rose to 1.5 mn."
    assert first_sentence("It ended: no end") == "It ended: no end"


# ------------------------------------------------------------------------------- folds


@given(st.lists(st.integers(0, 8), min_size=12, max_size=40), st.integers(2, 3), st.integers(0, 5))
def test_folds_hold_whole_groups(groups, k, seed):
    rows = pd.DataFrame({"group": [f"g{g}" for g in groups], "label": [LABELS[g % 3] for g in groups]})
    if rows["group"].nunique() < k:
        with pytest.raises(UserError, match=rf"finetune.folds: {k} folds need {k} groups, there are 1"):
            assign_folds(rows, k, seed)
        return
    fold = assign_folds(rows, k, seed)
    assert set(fold) <= set(range(k)) and rows.assign(fold=fold).groupby("group")["fold"].nunique().max() == 1
    assert fold.tolist() == assign_folds(rows, k, seed).tolist()


def test_folds_spread_labels_evenly():
    rows = pd.DataFrame({"group": [f"g{i}" for i in range(60)], "label": [LABELS[i % 3] for i in range(60)]})
    fold = assign_folds(rows, 3, 0)
    counts = pd.crosstab(fold, rows["label"]).to_numpy()
    assert counts.max() - counts.min() <= 2
    assert fold.tolist() != assign_folds(rows, 3, 1).tolist()


# ------------------------------------------------------------------------------- models and rows of other folds


@pytest.fixture(scope="module")
def experiment(tiny_models, tmp_path_factory) -> tuple[Path, Params]:
    """A root folder with gold rows, and for teacher `encoder` a kept model and two fold models that differ."""
    root = tmp_path_factory.mktemp("experiment")
    (root / "dvc.yaml").touch()
    raw = json.loads(json.dumps(read_yaml(tiny.ROOT / "tests/smoke.yaml")))
    for name in ("tiny-llama", "tiny-bert"):
        raw["models"][name]["folder"] = str(tiny_models / name)
    params = validate_section(Params, raw, "params.yaml")
    for k, part in enumerate(("model", "folds/0", "folds/1")):
        model = load_model(tiny_models / "tiny-bert", "classifier", labels=LABELS, seed=k)
        with torch.no_grad():
            model.classifier.bias.copy_(torch.tensor([1.0, 2.0, 3.0]).roll(k))  # each prefers another label
        save_model(model, load_tokenizer(tiny_models / "tiny-bert"), root / "data/teacher/encoder" / part)
    return root, params


def gold_rows(n: int) -> pd.DataFrame:
    rows = [json.loads(line) for line in (tiny.ROOT / "data/corpora/finance.jsonl").read_text().splitlines()[:n]]
    frame = pd.DataFrame(rows)[["id", "text", "label", "group"]]
    return frame.assign(source="finance", split="train")


def answers(root: Path, folder: str, params: Params, texts: list[str]) -> np.ndarray:
    teacher = open_teacher(root, "encoder", params, TASK, tuned=root / "data/teacher/encoder" / folder)
    return teacher.predict(pd.DataFrame({"text": texts}))


def test_gold_rows_are_labelled_by_the_model_that_was_not_trained_on_them(experiment):
    root, params = experiment
    gold, other = gold_rows(6), gold_rows(9)[6:].assign(split="pool")
    rows = pd.concat([other, gold], ignore_index=True)
    memorised = signal_table(rows, answers(root, "model", params, rows["text"].tolist()), LABELS, -1)
    fold = np.array([0, 1, 1, 0, 1, 0])
    signals = cross_fit("encoder", params, TASK, gold, fold, root / "data/teacher/encoder/folds", memorised)
    assert signals["id"].tolist() == rows["id"].tolist() and signals["split"].tolist() == rows["split"].tolist()
    assert signals["fold"].tolist() == [-1, -1, -1, *fold]
    for i, k in enumerate(signals["fold"]):
        folder = "model" if k < 0 else f"folds/{k}"
        expected = answers(root, folder, params, [rows["text"][i]])[0]
        assert np.abs(signals["probabilities"][i] - expected).max() < 1e-5
        assert signals["label"][i] == LABELS[expected.argmax()]
    changed = [
        not np.allclose(a, b, atol=0.05) for a, b in zip(signals.probabilities, memorised.probabilities, strict=True)
    ]
    assert changed == [False] * 3 + [True] * 6
    no_fold = assign_folds(gold, 0, seed=0)
    left = cross_fit("encoder", params, TASK, gold, no_fold, root / "no folder", memorised)
    assert left["id"].tolist() == other["id"].tolist() and left.columns.tolist() == memorised.columns.tolist()


def test_a_paraphrase_is_labelled_by_the_fold_of_its_row(experiment):
    root, params = experiment
    params = params.model_copy(update={"teachers": {"encoder": params.teachers["encoder"]}})
    gold = gold_rows(4)
    known = signal_table(gold, np.full((4, 3), 1 / 3), LABELS, np.array([0, 1, 0, 1]))
    known.to_parquet(root / "data/teacher/encoder/signals.parquet")
    kept = pd.DataFrame(
        {
            "id": ["b#1", "a#0", "b#0"],
            "text": gold["text"].iloc[[1, 0, 1]].str.replace("the", "that").tolist(),
            "label": "neutral",
            "group": "g",
            "source_id": gold["id"].iloc[[1, 0, 1]].tolist(),
        }
    )
    signals = label_paraphrases(root, params, TASK, kept)
    assert signals.columns.tolist() == [
        *("teacher", "source", "split", "id", "label", "probabilities", "fold", "rationale")
    ]
    assert signals["id"].tolist() == ["b#1", "a#0", "b#0"] and signals["fold"].tolist() == [1, 0, 1]
    assert set(signals["split"]) == {"augmented"} and set(signals["teacher"]) == {"encoder"}
    for i, k in enumerate(signals["fold"]):
        assert (
            np.abs(signals["probabilities"][i] - answers(root, f"folds/{k}", params, [kept["text"][i]])[0]).max() < 1e-5
        )
    known[known["id"] != kept["source_id"][1]].to_parquet(root / "data/teacher/encoder/signals.parquet")
    assert label_paraphrases(root, params, TASK, kept)["id"].tolist() == ["b#1", "b#0"]
    nothing = label_paraphrases(root, params, TASK, kept[:0])
    assert nothing.empty and nothing.columns.tolist() == signals.columns.tolist()


def test_tuning_continues_in_a_folder_of_its_own_rows(experiment, tmp_path):
    _, params = experiment
    gold, texts = gold_rows(8), gold_rows(12)["text"].tolist()
    one, history = finetune_teacher("encoder", params, TASK, gold, folder=tmp_path)
    again, _ = finetune_teacher("encoder", params, TASK, gold, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1 and history["step"].max() == 2
    assert np.array_equal(one.predict(texts), again.predict(texts))
    part, _ = finetune_teacher("encoder", params, TASK, gold[:4], folder=tmp_path, part="without fold 0")
    assert len(list(tmp_path.iterdir())) == 2 and not np.allclose(one.predict(texts), part.predict(texts), atol=1e-6)


def test_saved_adapters_of_a_fold_predict_the_same(experiment, tmp_path):
    root, params = experiment
    gold = gold_rows(6)
    tuned, _ = finetune_teacher("lm", params, TASK, gold, folder=tmp_path / "work")
    expected = tuned.predict(gold["text"].tolist())
    save_trained_weights(tuned.model, tuned.tokenizer, tmp_path / "fold")
    assert (tmp_path / "fold/adapter_config.json").exists() and not (tmp_path / "fold/model.safetensors").exists()
    again = open_teacher(root, "lm", params, TASK, tuned=tmp_path / "fold")
    assert np.abs(again.predict(gold) - expected).max() < 1e-5
    untuned = open_teacher(root, "lm", params, TASK)
    assert np.abs(untuned.predict(gold) - expected).max() > 1e-5


FOLDS = np.arange(12) % 2
PARTS = {"all": FOLDS >= 0, "0": FOLDS != 0, "1": FOLDS != 1}


def tune_above_frozen_layers(params: Params, work: Path, shared: SharedStates | None, **length):
    """Tune `lm` with adapters in its last 2 of 4 layers on 12 rows, and without each of 2 folds.

    Returns of each model its adapters, and the tokens that each layer computed.
    """
    spec, forward = params.teachers["lm"], LlamaDecoderLayer.forward
    settings = {"batch_size": 4, "lora": LoraSettings(r=2, layers="last-2")} | length
    spec = spec.model_copy(update={"finetune": spec.finetune.model_copy(update=settings)})
    params = params.model_copy(update={"teachers": {"lm": spec}})
    tokens, adapters = {}, {}

    def count(layer, hidden_states, *args, **kwargs):
        tokens[part][layer.self_attn.layer_idx] += hidden_states.shape[1]
        return forward(layer, hidden_states, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaDecoderLayer, "forward", count)
        for part, chosen in PARTS.items():
            tokens[part] = Counter()
            rows = gold_rows(12)[chosen]
            tuned, _ = finetune_teacher("lm", params, TASK, rows, folder=work, part=part, shared=shared)
            adapters[part] = get_peft_model_state_dict(tuned.model)
            save_trained_weights(tuned.model, tuned.tokenizer, work / part)
    return adapters, tokens


def test_the_layers_below_all_adapters_run_once_for_a_teacher_and_its_folds(experiment, tmp_path):
    _, params = experiment
    own, own_tokens = tune_above_frozen_layers(params, tmp_path / "own", None, steps=None, epochs=2)
    shared, tokens = tune_above_frozen_layers(params, tmp_path / "shared", SharedStates(), steps=None, epochs=2)
    assert [tokens[part][0] for part in ("0", "1")] == [0, 0] and own_tokens["0"][0] > 0 and tokens["0"][3] > 0
    assert all(torch.equal(weight, shared["all"][name]) for name, weight in own["all"].items())
    for part in ("0", "1"):  # its rows shared other batches below the adapters: rounding alone
        assert all(torch.allclose(weight, shared[part][name], atol=1e-5) for name, weight in own[part].items())
        assert not any(torch.allclose(w, shared["all"][n], atol=1e-5) for n, w in own[part].items() if w.any())


def test_a_fold_predicts_from_the_states_of_the_teacher(experiment, tmp_path):
    root, params = experiment
    gold, states = gold_rows(12), SharedStates()
    rows = pd.concat([gold_rows(16)[12:].assign(split="pool"), gold], ignore_index=True)
    tune_above_frozen_layers(params, tmp_path, states, steps=None, epochs=2)
    signals, tokens, forward = {}, {}, LlamaDecoderLayer.forward

    def count(layer, hidden_states, *args, **kwargs):
        tokens[shared][layer.self_attn.layer_idx] += hidden_states.shape[1]
        return forward(layer, hidden_states, *args, **kwargs)

    for shared in (None, states):
        final = open_teacher(root, "lm", params, TASK, tuned=tmp_path / "all")
        if shared:
            final.share_states(shared)
        whole = label_rows(final, rows, -1, 8)
        with pytest.MonkeyPatch.context() as patch:
            tokens[shared] = Counter()
            patch.setattr(LlamaDecoderLayer, "forward", count)
            signals[shared] = cross_fit("lm", params, TASK, gold, FOLDS, tmp_path, whole, shared)
    prefix = common_prefix(final.model.encode(gold["text"].tolist()))
    assert tokens[states][0] == 2 * prefix  # whose keys and values every layer gives
    assert tokens[states][3] == tokens[None][3] == tokens[None][0]
    own, continued = (np.stack(signals[shared]["probabilities"]) for shared in (None, states))
    assert np.array_equal(continued[:4], own[:4])
    assert np.abs(continued - own).max() < 1e-5 < np.abs(np.stack(whole["probabilities"]) - own)[4:].max()
    kept = {prompt for _, prompt, _ in final.model.known_states.states}
    assert kept == set(map(tuple, final.model.encode(gold["text"].tolist())))  # not those of the pool


def test_no_states_are_computed_for_rows_that_are_drawn_once(experiment, tmp_path):
    _, params = experiment
    _, tokens = tune_above_frozen_layers(params, tmp_path, None, steps=1, epochs=None)
    assert tokens["1"][0] == tokens["1"][3] > 0


def test_scores_are_those_of_each_split(experiment):
    gold = gold_rows(6)
    rows = pd.concat([gold.assign(split=split) for split in ("train", "test")], ignore_index=True)
    right = np.array([[0.8 if name == label else 0.1 for name in LABELS] for label in rows["label"]])
    wrong = np.roll(right, 1, axis=1)
    signals = signal_table(rows, np.where((rows["split"] == "train").to_numpy()[:, None], right, wrong), LABELS, -1)
    scores = score_signals(rows, signals.sample(frac=1, random_state=0), LABELS)
    assert scores["train"]["accuracy"] == 1 and scores["test"]["accuracy"] == 0
    assert scores["train"]["log_loss"] == pytest.approx(-np.log(0.8), rel=1e-6)


# ------------------------------------------------------------------------------- texts


def test_paraphrases_are_generated_once_and_depend_on_the_seed(experiment, monkeypatch):
    root, params = experiment
    augment = params.augment.model_copy(update={"per_row": 2})
    params, gold = params.model_copy(update={"augment": augment}), gold_rows(3)
    rows = generate_paraphrases(root, params, TASK, gold)
    assert rows["id"].tolist() == [*(gold["id"] + "#0"), *(gold["id"] + "#1")]
    assert rows["source_id"].tolist() == gold["id"].tolist() * 2
    assert rows["label"].tolist() == gold["label"].tolist() * 2 and rows["group"].tolist() == gold["group"].tolist() * 2
    assert rows["source_text"].tolist() == gold["text"].tolist() * 2
    assert rows["text"][:3].tolist() != rows["text"][3:].tolist()  # another seed
    with monkeypatch.context() as patch:
        patch.setattr(transformers.LlamaForCausalLM, "generate", None)  # what is in the store is not written again
        pd.testing.assert_frame_equal(generate_paraphrases(root, params, TASK, gold), rows)
    for file in root.glob(f"{STORE_PATH}*"):
        file.unlink()
    pd.testing.assert_frame_equal(generate_paraphrases(root, params, TASK, gold), rows)
    other = params.model_copy(update={"augment": augment.model_copy(update={"seed": 5})})
    assert generate_paraphrases(root, other, TASK, gold)["text"].tolist() != rows["text"].tolist()
    reworded = params.model_copy(update={"augment": augment.model_copy(update={"instruction": "Say it anew."})})
    assert paraphrase_prompts(TASK, ["a"], "Say it anew.") == [[{"role": "user", "content": "Say it anew.\n\na"}]]
    assert generate_paraphrases(root, reworded, TASK, gold)["text"].tolist() != rows["text"].tolist()
    nothing = params.model_copy(update={"augment": augment.model_copy(update={"per_row": 0})})
    assert generate_paraphrases(root, nothing, TASK, gold).columns.tolist() == rows.columns.tolist()


def test_kept_paraphrases_take_the_place_of_a_model(experiment):
    """Text, label and signal of each come from the file; a row without one has an empty candidate."""
    root, params = experiment
    gold = gold_rows(3)
    p = {"positive": 0.1, "neutral": 0.2, "negative": 0.7}
    lines = [
        {"id": f"{gold['id'][i]}#0", "paraphrase": f"{gold['text'][i]} At least so they say.", **p} for i in (0, 2)
    ]
    (root / "kept.jsonl").write_text("\n".join(map(json.dumps, lines)))
    columns = {"id": "id", "text": None, "paraphrase": "paraphrase", "probabilities": {name: name for name in p}}
    raw = {"kind": "answers", "answers": {"files": ["kept.jsonl"], "columns": columns}}
    kept = validate_section(TeacherConfig, raw, "x")
    keep = params.augment.keep.model_copy(update={"max_similarity": 1.0})
    augment = params.augment.model_copy(update={"teacher": "kept", "per_row": 1, "keep": keep})
    params = params.model_copy(update={"teachers": {"kept": kept}, "augment": augment})
    candidates = generate_paraphrases(root, params, TASK, gold)
    assert candidates["text"].tolist() == [lines[0]["paraphrase"], "", lines[1]["paraphrase"]]
    filtered = filter_paraphrases(root, params, TASK, candidates.assign(label="negative"), [], 0.85)
    assert filtered["reason"].tolist() == ["kept", "empty", "kept"]
    other = filter_paraphrases(root, params, TASK, candidates.assign(label="positive"), [], 0.85)
    assert other["reason"].tolist() == ["label changed", "empty", "label changed"]
    signals = label_paraphrases(root, params, TASK, filtered[filtered["reason"] == "kept"].reset_index(drop=True))
    assert signals["id"].tolist() == [line["id"] for line in lines] and set(signals["label"]) == {"negative"}
    assert np.allclose(np.stack(signals["probabilities"]), [list(p.values())] * 2)


def test_kept_paraphrases_are_labelled_by_the_teacher_that_wrote_them_alone(experiment):
    """Another teacher of answers has paraphrases of the same rows, with the same ids and other texts."""
    root, params = experiment
    gold = gold_rows(2)
    probabilities = {"first": [0.8, 0.1, 0.1], "second": [0.1, 0.1, 0.8]}
    teachers = {}
    for name, values in probabilities.items():
        lines = [
            {"id": f"{row_id}#0", "paraphrase": f"{text} So the {name}.", **dict(zip(LABELS, values, strict=True))}
            for row_id, text in zip(gold["id"], gold["text"], strict=True)
        ]
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
        columns = {"id": "id", "text": None, "paraphrase": "paraphrase", "probabilities": {n: n for n in LABELS}}
        raw = {"kind": "answers", "answers": {"files": [f"{name}.jsonl"], "columns": columns}}
        teachers[name] = validate_section(TeacherConfig, raw, "x")
    for writer in teachers:
        augment = params.augment.model_copy(update={"teacher": writer, "per_row": 1})
        augmented = params.model_copy(update={"teachers": teachers, "augment": augment})
        candidates = generate_paraphrases(root, augmented, TASK, gold)
        assert candidates["text"].str.endswith(f"{writer}.").all()
        signals = label_paraphrases(root, augmented, TASK, candidates)
        assert signals["teacher"].tolist() == [writer] * 2
        assert np.allclose(np.stack(signals["probabilities"]), [probabilities[writer]] * 2)


def test_every_candidate_gets_one_reason(experiment, tiny_models):
    root, params = experiment
    lm = root / "data/teacher/lm/model"
    if not lm.exists():
        save_model(load_model(tiny_models / "tiny-llama", "causal"), load_tokenizer(tiny_models / "tiny-llama"), lm)
    good = "In 2010 the net sales of IBM rose by 48% and came to EUR 1200 mn as servers sold."
    better = "The net sales of IBM, 48% higher in 2010, were EUR 1,200 mn when demand for servers came."
    held_out = "Demand for servers came back in 2010 and drove up net sales at IBM by 48% to EUR 1,200 mn."
    texts = [SOURCE, good, good, better, held_out]
    candidates = pd.DataFrame({"id": list("abcde"), "text": texts, "source_text": SOURCE, "label": "positive"})
    keep = params.augment.keep.model_copy(update={"same_label": False})
    open_ended = params.model_copy(update={"augment": params.augment.model_copy(update={"keep": keep})})
    filtered = filter_paraphrases(root, open_ended, TASK, candidates, [held_out], 0.85)
    reasons = ["copy", "kept", "written twice", "kept", "near-duplicate of a held-out row"]
    assert filtered["reason"].tolist() == reasons
    read = open_teacher(root, "lm", params, TASK, tuned=lm).predict(pd.DataFrame({"text": [better]}))[0].argmax()
    for label in LABELS:
        strict = filter_paraphrases(root, params, TASK, candidates.assign(label=label), [held_out], 0.85)
        assert strict["reason"][3] == ("kept" if label == LABELS[read] else "label changed")
    assert filter_paraphrases(root, params, TASK, candidates[:0], [held_out], 0.85)["reason"].tolist() == []


def test_rationales_are_for_the_gold_label_and_the_same_each_time(experiment):
    root, params = experiment
    gold = gold_rows(6)
    rows = pd.concat([gold, gold_rows(10)[6:].assign(split="test")], ignore_index=True)
    signals = signal_table(rows, np.full((10, 3), 1 / 3), LABELS, -1)
    explained = add_rationales(root, "lm", params, TASK, rows, signals)
    assert (
        explained["contradicts"].notna().sum() == 2
        and explained.loc[explained["rationale"].isna(), "contradicts"].isna().all()
    )
    assert explained["rationale"].notna().sum() == params.teachers["lm"].rationales == 2
    assert not explained.loc[rows["split"] == "test", "rationale"].notna().any()
    assert signals["rationale"].isna().all()  # the frame that was given stays as it was
    pd.testing.assert_frame_equal(explained, add_rationales(root, "lm", params, TASK, rows, signals))
    others = gold_rows(20)[10:].assign(split="pool")  # without a signal, as gold rows without folds are
    shuffled = pd.concat([others, rows.iloc[::-1]], ignore_index=True)
    pd.testing.assert_frame_equal(explained, add_rationales(root, "lm", params, TASK, shuffled, signals))


def test_explanations_from_files_are_for_the_gold_label_too(experiment):
    """A reason for the wrong label of a gold row is none for the row; in the pool the teacher's label counts."""
    root, params = experiment
    rows = gold_rows(4).assign(split=["train", "train", "pool", "validation"])
    rows["label"] = ["positive", "negative", None, "positive"]
    lines = [{"id": i, "label": "positive", "why": f"Since {n}."} for n, i in enumerate(rows["id"])]
    (root / "explained.jsonl").write_text("\n".join(map(json.dumps, lines)))
    columns = {"id": "id", "text": None, "label": "label", "explanation": "why"}
    raw = {"kind": "answers", "answers": {"files": ["explained.jsonl"], "columns": columns}}
    params = params.model_copy(update={"teachers": {"kept": validate_section(TeacherConfig, raw, "x")}})
    signals = signal_table(rows, np.tile([1.0, 0.0, 0.0], (4, 1)), LABELS, -1)
    explained = add_rationales(root, "kept", params, TASK, rows, signals)
    assert explained["rationale"].tolist() == ["Since 0.", None, "Since 2.", None]
    assert explained["contradicts"].tolist() == [False, None, False, None]


def test_an_unreadable_answer_gets_no_rationale(experiment):
    root, params = experiment
    rows = gold_rows(6).assign(split="pool", label=None)
    p = np.full((6, 3), 1 / 3)
    p[[0, 2, 4]] = np.nan
    spec = params.teachers["lm"].model_copy(update={"rationales": 6})
    params = params.model_copy(update={"teachers": params.teachers | {"lm": spec}})
    explained = add_rationales(root, "lm", params, TASK, rows, signal_table(rows, p, LABELS, -1))
    assert explained["rationale"].notna().tolist() == [False, True] * 3
    nothing = add_rationales(root, "lm", params, TASK, rows, signal_table(rows, p * np.nan, LABELS, -1))
    assert nothing["rationale"].isna().all()


def test_a_teacher_in_four_bits_answers_and_its_answers_have_a_key_of_their_own(experiment):
    root, params = experiment
    whole, packed = (prompted(params, quantize=way, dtype="bfloat16") for way in ("none", "nf4"))
    models_ = [open_teacher(root, "lm", one, TASK).model for one in (whole, packed)]
    layers = [{type(module).__name__ for module in model.model.modules()} for model in models_]
    assert "Linear4bit" in layers[1] and "Linear4bit" not in layers[0]
    p, q = (model.predict(gold_rows(6)["text"].tolist()) for model in models_)
    assert np.isfinite(q).all() and np.abs(p - q).max() < 0.2 and (p != q).any()
    identities = [model_identity("tiny-llama", params.models["tiny-llama"], model) for model in models_]
    assert [identity["quantization"] for identity in identities] == [None, "nf4"]
    tuned = params.teachers["lm"].model_dump()
    assert TeacherConfig.model_validate(tuned | {"quantize": "nf4"}).finetune.lora  # QLoRA
    whole = tuned | {"finetune": tuned["finetune"] | {"lora": None}}
    for refused in (tuned | {"quantize": "int8"}, whole | {"quantize": "nf4"}):
        with pytest.raises(ValueError, match="`quantize` is for a `kind: lm` or `seq2seq` that is only prompted, or"):
            TeacherConfig.model_validate(refused)


def test_labels_are_predicted_in_batches_of_the_teachers_size(experiment, monkeypatch):
    root, params = experiment
    teacher, sizes = open_teacher(root, "lm", prompted(params, batch_size=4), TASK), []
    teacher.cache = None
    forward = LabelModel.forward
    monkeypatch.setattr(
        LabelModel, "forward", lambda self, ids, *a, **k: sizes.append(len(ids)) or forward(self, ids, *a, **k)
    )
    teacher.predict(gold_rows(10))
    assert sizes == [4, 4, 2]


def test_a_rationale_that_names_another_label_contradicts_its_own():
    assert contradicts(TASK, "This is clearly negative news.", "positive")
    assert not contradicts(TASK, "Not negative at all, but positive.", "positive")
    assert not contradicts(TASK, "Sales rose.", "positive")


# ------------------------------------------------------------------------------- prompted only


def test_examples_come_from_other_groups_than_the_row(tiny_models):
    gold = gold_rows(12).assign(group=[f"g{i // 2}" for i in range(12)])
    for encoder in (None, tiny_models / "tiny-bert"):
        examples = GoldExamples(gold, 3, encoder)
        chosen = examples.choose(gold["text"].tolist(), gold["group"].tolist())
        for group, positions in zip(gold["group"], chosen, strict=True):
            assert len(set(positions)) == 3 and group not in examples.gold["group"].iloc[list(positions)].tolist()
    fixed = GoldExamples(gold, 3).choose(["a", "b"], ["x", "y"])
    assert fixed[0] == fixed[1] and len(set(GoldExamples(gold, 3).gold["label"][list(fixed[0])])) == 3
    free = GoldExamples(gold, 3, tiny_models / "tiny-bert").choose(gold["text"].tolist(), [None] * 12)
    own = GoldExamples(gold, 3, tiny_models / "tiny-bert")
    for text, positions in zip(gold["text"], free, strict=True):
        assert own.gold["text"][positions[-1]] == text  # without groups a row is most similar to itself


def prompted(params: Params, **changes) -> Params:
    spec = params.teachers["lm"].model_copy(update={"finetune": None, "prompt": "chat"} | changes)
    return params.model_copy(update={"teachers": params.teachers | {"lm": spec}})


def test_rows_are_predicted_with_their_own_examples_and_calibrated(experiment, tiny_models):
    root, params = experiment
    params = prompted(params)
    gold = gold_rows(12).assign(group=[f"g{i // 2}" for i in range(12)])
    teacher = open_teacher(root, "lm", params, TASK)
    assert teacher.model.max_length == 512  # as long as its positions reach: examples take room
    examples = teacher.examples = GoldExamples(gold, 2)
    rows = gold.head(7)
    chosen = examples.choose(rows["text"].tolist(), rows["group"].tolist())
    assert len(set(chosen)) > 1  # the rows that are among the examples get others
    p = teacher.predict(rows)
    for row, text, positions in zip(p, rows["text"], chosen, strict=True):
        alone = teacher.model.predict([text], shots=[examples.at(positions)])[0]
        np.testing.assert_allclose(row, alone, atol=1e-5)
        turns = chat_turns(TASK, text, examples.at(positions))
        shown = teacher.prompt(rows[rows["text"] == text].iloc[0])
        assert shown == render_prompt(turns, teacher.model.tokenizer)
    teacher.calibration = estimate_calibration(teacher, "batch", rows)
    np.testing.assert_allclose(teacher.calibration.prior, p.mean(0), rtol=1e-6)
    expected = p / p.mean(0)
    np.testing.assert_allclose(teacher.predict(rows), expected / expected.sum(1, keepdims=True), rtol=1e-5)
    empty = teacher.model.predict(NO_CONTENT, shots=[examples.at((0, 1))] * 3).mean(0)
    teacher.calibration = None
    np.testing.assert_allclose(estimate_calibration(teacher, "contextual", rows).prior, empty, atol=1e-5)
    assert estimate_calibration(teacher, "none", rows) is None


@pytest.mark.parametrize("kind", ["labels", "answers"])
def test_a_killed_teacher_continues_from_its_cache_and_a_second_run_computes_nothing(
    experiment, tmp_path, monkeypatch, kind
):
    root, params = experiment
    params = prompted(params, batch_size=3, dtype="bfloat16")
    task = TASK if kind == "labels" else Task(kind="qa", prompt={"instruction": "Answer.", "template": "{text}"})
    rows, calls, allowed = gold_rows(10).assign(answers="a"), [], 99
    holder, name = (LabelModel, "forward") if kind == "labels" else (label_model, "generate_batch")
    original = getattr(holder, name)

    def counted(model, prompts, *args, **more):
        calls.append(len(prompts))
        if len(calls) > allowed:
            raise KeyboardInterrupt
        return original(model, prompts, *args, **more)

    monkeypatch.setattr(holder, name, counted)
    monkeypatch.setattr("distillery.models.label_model.compute_prefix_kv", lambda *_: None)

    def run(folder: Path, **changes) -> pd.DataFrame:
        calls.clear()
        teacher = open_teacher(folder, "lm", prompted(params, **changes), task)
        return label_rows(teacher, rows, -1, 4)

    whole = run(tmp_path / "whole")
    assert calls == [3, 3, 3, 1]
    allowed = 2
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed")
    allowed = 99
    rest = run(tmp_path / "killed")
    assert calls == [3, 1]
    pd.testing.assert_frame_equal(rest, whole)  # to the bit
    pd.testing.assert_frame_equal(run(tmp_path / "killed"), whole)
    assert calls == []
    run(tmp_path / "killed", dtype="float32")  # another precision gives other answers
    assert calls == [3, 3, 3, 1]
    with sqlite3.connect(tmp_path / "killed" / STORE_PATH) as store:
        kept = store.execute("SELECT prompt, answer FROM answers").fetchall()
    assert len(kept) == 20 and all(any(text in json.loads(prompt) for text in rows["text"]) for prompt, _ in kept)
    if kind == "labels":
        assert all(json.loads(answer).keys() == set(LABELS) for _, answer in kept)


def test_a_prompted_teacher_is_measured_with_its_own_examples_and_calibration(experiment, monkeypatch):
    root, params = experiment
    params = prompted(params, few_shot=len(TASK.few_shot) + 3, examples_from="gold")
    monkeypatch.setattr("distillery.teachers.base.gather_rows", lambda *_: gold_rows(20))
    teacher = open_teacher(root, "lm", params, TASK, prompting={"prompt": None, "prior": [0.5, 0.3, 0.2]})
    assert teacher.examples.n == len(TASK.few_shot) + 3
    rows, calls = gold_rows(30).tail(4), []
    wanted, predict = teacher.predict(rows), LabelModel.predict
    monkeypatch.setattr(LabelModel, "predict", lambda *a, **k: calls.append(1) or predict(*a, **k))
    timed = probability_function(teacher)
    for n in (1, 2):  # nothing comes from the cache: it is timed
        np.testing.assert_allclose(timed(rows), wanted, atol=1e-6)
        assert len(calls) == n


def test_a_teacher_that_will_be_tuned_can_be_shown_many_examples_before(experiment):
    root, params = experiment
    task = TASK.model_copy(update={"few_shot": list(TASK.few_shot) * 2})
    spec = params.teachers["lm"]
    for name, max_length in (("encoder", 256), ("lm", 512)):
        origin = params.models[params.teachers[name].model]
        assert load_teacher_model(name, params.teachers[name], origin, task).max_length == 256  # as it will be tuned
        assert open_teacher(root, name, params, task).model.max_length == max_length
    untuned = open_teacher(root, "lm", params, task)
    untuned.model.few_shot = len(task.few_shot)
    assert spec.finetune and len(untuned.model.encode(["Profit rose."])[0]) > 256
    assert untuned.predict(gold_rows(3)).shape == (3, 3)


def test_the_best_prompt_on_validation_rows_is_chosen_and_used(experiment):
    root, params = experiment
    other = TASK.prompt.model_copy(update={"instruction": "Say the opposite.", "system": ""})
    task = TASK.model_copy(update={"prompts": {"short": other}})
    params = prompted(params, prompts=["short"], calibrate="batch")
    rows = gold_rows(12)
    rows.loc[4:, "split"], rows.loc[8:, "split"] = "validation", "pool"
    table, prompting = compare_prompts(root, "lm", params, task, rows)
    assert table["prompt"].tolist() == ["prompt"] * 3 + ["short"] * 3
    assert table["calibrate"].tolist() == ["none", "contextual", "batch"] * 2  # too few rows for clusters
    batch = table[table["calibrate"] == "batch"].set_index("prompt")["macro_f1"]
    assert prompting["prompt"] == (None if batch["prompt"] >= batch["short"] else "short")
    assert len(prompting["prior"]) == 3 and abs(sum(prompting["prior"]) - 1) < 1e-3
    assert (table["low"] <= table["accuracy"]).all() and (table["accuracy"] <= table["high"]).all()
    path = root / "data/teacher/lm/prompting.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"prompt": "short", "prior": [0.2, 0.3, 0.5]}))
    opened = open_teacher(root, "lm", params, task)
    assert opened.task.prompt == other and opened.calibration.prior.tolist() == [0.2, 0.3, 0.5]
    explicit = open_teacher(root, "lm", params, task, prompting={"prompt": None, "prior": None})
    assert explicit.task.prompt == task.prompt and explicit.calibration is None
    message = "^data/teacher/lm/prompting.json: the task has no prompt `short`; it has: meanings, bare$"
    with pytest.raises(UserError, match=message):
        open_teacher(root, "lm", params, TASK)
    path.unlink()
    with pytest.raises(UserError, match="teachers.lm.prompts: the task has no prompt `short`; it has: meanings, bare"):
        compare_prompts(root, "lm", params, TASK, rows)


class Worded:
    """A teacher that is sure of `positive` after one prompt, and sure of another label for each row after the other."""

    def __init__(self, prompt: str | None):
        self.prompt = prompt

    def predict(self, rows: pd.DataFrame) -> np.ndarray:
        seen = [0 if self.prompt is None else i % 3 for i in range(len(rows))]
        return np.eye(3)[seen] * 0.97 + 0.01


def test_a_prompt_is_chosen_without_a_label_by_mutual_information(experiment, monkeypatch, capsys):
    root, params = experiment
    task = TASK.model_copy(update={"prompts": {"short": TASK.prompt}})
    params = prompted(params, prompts=["short"], choose_prompt_by="mutual_information")
    monkeypatch.setattr(
        "distillery.teachers.prompt_search.open_teacher", lambda *_, prompting: Worded(prompting["prompt"])
    )
    pool = gold_rows(12).assign(split="pool", label=None)
    table, prompting = compare_prompts(root, "lm", params, task, pool)
    assert table.empty and prompting == {"prompt": "short", "prior": None}
    p = np.array([0.98, 0.01, 0.01])
    one = -(p * np.log(p)).sum()
    line = f"12 rows and their predictions, in nats: prompt 0.000, short {np.log(3) - one:.3f}"
    assert line in capsys.readouterr().out
    validation = gold_rows(12).assign(split="validation", label="positive")  # by these labels the other one is better
    table, prompting = compare_prompts(root, "lm", params, task, pd.concat([pool, validation], ignore_index=True))
    assert prompting["prompt"] == "short" and table["mutual_information"].iloc[0] == pytest.approx(0, abs=1e-9)
    assert table["accuracy"].iloc[0] == 1 > table["accuracy"].iloc[-1]
    with pytest.raises(UserError, match="^params.yaml: teachers.lm.choose_prompt_by: no row of pool or train"):
        compare_prompts(root, "lm", params, task, validation)


def test_information_counts_for_the_share_of_rows_that_were_read():
    """Two answers that differ tell as much as all could, of half of the rows."""
    probabilities = np.full((4, 3), np.nan)
    probabilities[0], probabilities[1] = [1, 0, 0], [0, 1, 0]
    assert _information(probabilities, LABELS) == pytest.approx(np.log(2) / 2)
    assert _information(probabilities[2:], LABELS) == 0


def test_a_student_reads_the_prompt_that_its_teacher_chose(tmp_path):
    other = TASK.prompt.model_copy(update={"instruction": "Say the opposite."})
    task = TASK.model_copy(update={"prompts": {"short": other}})
    assert student_task(tmp_path, task, None) == student_task(tmp_path, task, "lm") == task  # it chose none
    folder = tmp_path / "data/teacher/lm"
    folder.mkdir(parents=True)
    for chosen, prompt in (("short", other), (None, task.prompt)):
        (folder / "prompting.json").write_text(json.dumps({"prompt": chosen, "prior": None}))
        assert student_task(tmp_path, task, "lm").prompt == prompt
    assert student_task(tmp_path, task, None).prompt == task.prompt


def test_the_inputs_of_a_student_have_the_prompt_that_its_teacher_chose(experiment, tmp_path):
    """As its training reads them; without `prompt_of` they are as if there were no such key. A teacher that is opened
    for its tokens or hidden states reads the prompt of its labels."""
    _, params = experiment
    prompt = TASK.prompt.model_copy(update={"instruction": "Say the opposite."})
    task = TASK.model_copy(update={"prompts": {"short": prompt}})
    files = {"data/processed/finance/task.json": task.model_dump(), "build/models/tiny-llama.json": {}}
    files["data/teacher/lm/prompting.json"] = {"prompt": "short", "prior": None}
    files["data/teacher/lm/metrics.json"] = {"validation": {"accuracy": 0.5, "macro_f1": 0.5}}
    for file, content in files.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(json.dumps(content))
    params = prompted(params, prompts=["short"])
    phase = params.students["half-gkd"].phases[0].model_copy(update={"teachers": ["lm"], "loss": {"hidden": 1.0}})
    spec = params.students["half-gkd"].model_copy(update={"phases": [phase]})

    def record(prompt_of: str | None) -> dict:
        student = spec.model_copy(update={"prompt_of": prompt_of})
        return experiment_record(tmp_path, params.model_copy(update={"students": {"half-gkd": student}}), "half-gkd")

    assert record("lm")["task"]["prompt"] == prompt.model_dump() != record(None)["task"]["prompt"]
    assert record("lm")["spec"] == record(None)["spec"] and "prompt_of" not in record(None)["spec"]
    assert record(None)["openable_teachers"]["lm"]["task"]["prompt"] == prompt.model_dump()


# ------------------------------------------------------------------------------- answers from files

LINES = """sentence,reply
Sales rose.,"POSITIVE

The text says so."
Sales fell.,"POSITIVE

The text says so."
A meeting.,"Neutral. Nothing happens."
Profit fell.,"It is hard to say"
Sales rose.,negative
"""


def file_teacher(tmp_path, repeats: str = "drop") -> FileTeacher:
    (tmp_path / "answers.csv").write_text(LINES)
    columns = {"text": "sentence", "answer": "reply"}
    spec = validate_section(AnswerFilesConfig, {"files": ["answers.csv"], "columns": columns, "repeats": repeats}, "x")
    return FileTeacher(read_answer_files(spec, TASK, tmp_path), TASK)


def test_answers_from_a_file_teach_without_those_that_repeat_the_one_before(tmp_path):
    teacher = file_teacher(tmp_path)
    assert teacher.answers["status"].tolist() == ["kept", "repeats the answer before", "kept", "cannot be read", "kept"]
    assert teacher.answers["at"].iloc[2] == "answers.csv, line 8"
    rows = pd.DataFrame({"text": ["Sales  rose.", "Sales fell.", "A meeting.", "Profit fell."], "id": list("abcd")})
    assert teacher.covered(rows).tolist() == [True, False, True, True]
    p = teacher.predict(rows)
    assert p[0].tolist() == [0.5, 0, 0.5] and p[2].tolist() == [0, 1, 0]  # two answers to one text share it
    assert np.isnan(p[[1, 3]]).all()
    signals = signal_table(rows.assign(source="s", split="pool"), p, LABELS, -1)
    assert signals["label"].tolist() == ["positive", None, "neutral", None]
    assert np.allclose(signals["probabilities"][3], 1 / 3)
    explanations = teacher.explanations(rows, ["positive", "positive", "neutral", "negative"])
    assert explanations == ["The text says so.", None, "Nothing happens.", None]
    assert "Nothing happens." in teacher.prompt(rows.iloc[2])
    assert file_teacher(tmp_path, "keep").covered(rows).all()


def test_probabilities_from_a_file_are_calibrated_by_their_mean(experiment):
    root, params = experiment
    columns = {"text": None, "id": "id", "probabilities": {name: f"p.{name}" for name in LABELS}}
    spec = {"kind": "answers", "answers": {"files": ["biased.jsonl"], "columns": columns}, "calibrate": "batch"}
    config = validate_section(TeacherConfig, spec, "x")
    params = params.model_copy(update={"teachers": params.teachers | {"biased": config}})
    rows = gold_rows(300)
    rows.loc[100:, "split"], rows.loc[200:, "split"] = "validation", "pool"
    p = np.random.default_rng(0).dirichlet([4.0, 1.0, 1.0], len(rows))
    lines = [
        json.dumps({"id": i, "p": dict(zip(LABELS, row, strict=True))}) for i, row in zip(rows["id"], p, strict=True)
    ]
    (root / "biased.jsonl").write_text("\n".join(lines))
    table, prompting = compare_prompts(root, "biased", params, TASK, rows)
    assert table["calibrate"].tolist() == ["none", "batch", "clusters"] and prompting["prompt"] is None
    assert np.allclose(prompting["prior"], p[200:].mean(0), atol=1e-6)  # of all rows of the pool
    expected = p / p[200:].mean(0)
    teacher = open_teacher(root, "biased", params, TASK, prompting=prompting)
    assert np.allclose(teacher.predict(rows), expected / expected.sum(1, keepdims=True), atol=1e-4)
    plain = open_teacher(root, "biased", params, TASK, prompting={"prompt": None, "prior": None})
    assert np.allclose(plain.predict(rows), p)
    by_clusters = config.model_copy(update={"calibrate": "clusters"})
    other = params.model_copy(update={"teachers": params.teachers | {"biased": by_clusters}})
    same_table, clustered = compare_prompts(root, "biased", other, TASK, rows)
    pd.testing.assert_frame_equal(same_table, table)
    expected_p = fit_clusters(p[200:]).apply(p)
    teacher = open_teacher(root, "biased", other, TASK, prompting=json.loads(json.dumps(clustered)))
    assert clustered["prior"] is None and np.allclose(teacher.predict(rows), expected_p, atol=1e-6)
    few = rows[(rows["split"] != "pool") | (rows.index < 250)]
    message = "^params.yaml: teachers.biased.calibrate: clusters: needs rows with 90 different .*, and there are 50$"
    with pytest.raises(UserError, match=message):
        compare_prompts(root, "biased", other, TASK, few)
    lines_there = [line for line, name in zip(lines, rows["id"], strict=True) if name in set(few["id"])]
    (root / "biased.jsonl").write_text("\n".join(lines_there))  # answers to 50 of the 100 rows of the pool
    uncalibrated = config.model_copy(update={"calibrate": "none"})
    part = params.model_copy(update={"teachers": params.teachers | {"biased": uncalibrated}})
    covered, kept = compare_prompts(root, "biased", part, TASK, rows)
    assert covered["calibrate"].tolist() == ["none", "batch"] and kept == {"prompt": None, "prior": None}
    (root / "biased.jsonl").write_text("\n".join(lines))
    alone, kept = compare_prompts(root, "biased", params, TASK, rows[rows["split"] == "pool"].assign(label=None))
    assert alone.empty and kept == prompting  # nothing is compared, and the calibration needs no labels
    several = config.model_copy(update={"prompts": ["short"]})
    searched = params.model_copy(update={"teachers": params.teachers | {"biased": several}})
    with pytest.raises(UserError, match="^params.yaml: teachers.biased.prompts: no validation row with a label"):
        compare_prompts(root, "biased", searched, TASK, rows[rows["split"] == "pool"])
    with pytest.raises(UserError, match="^params.yaml: teachers.biased.calibrate: no row of pool or train to label"):
        compare_prompts(root, "biased", params, TASK, rows[rows["split"] == "validation"])


def test_a_teacher_from_a_file_generates_nothing(tmp_path):
    teacher = file_teacher(tmp_path)
    with pytest.raises(UserError, match="^params.yaml: teachers: `kind: answers` generates no text$"):
        teacher.generate([], max_new_tokens=4)
    teacher.task = Task(kind="qa", prompt={"instruction": "Answer.", "template": "{text}"})
    with pytest.raises(UserError, match="^params.yaml: teachers: free answers come from `kind: lm` and `seq2seq` only"):
        label_rows(teacher, gold_rows(2), -1, 4)


def test_answers_that_miss_a_column_or_a_text_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": 1, "label": "positive"}\n{"id": null, "label": "x"}\n')
    spec = {"files": ["a.jsonl"], "columns": {"id": "id", "text": None, "label": "label"}}
    with pytest.raises(UserError, match="^a.jsonl, line 2: `id` is empty$"):
        read_answer_files(validate_section(AnswerFilesConfig, spec, "x"), TASK, tmp_path)
    spec["columns"] = {"text": "sentence", "label": "label"}
    with pytest.raises(UserError, match="^a.jsonl: no column `sentence`; there are: id, label$"):
        read_answer_files(validate_section(AnswerFilesConfig, spec, "x"), TASK, tmp_path)


def test_the_explanation_of_a_label_may_stand_in_its_second_answer(tmp_path):
    answers = [("neutral", ""), ("positive", "Up."), ("neutral", "Flat. And more."), ("neutral", "Later.")]
    lines = [json.dumps({"id": "a", "label": label, "why": why}) for label, why in answers]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    columns = {"id": "id", "text": None, "label": "label", "explanation": "why"}
    spec = validate_section(AnswerFilesConfig, {"files": ["a.jsonl"], "columns": columns}, "x")
    teacher = FileTeacher(read_answer_files(spec, TASK, tmp_path), TASK, by="id")
    rows = pd.DataFrame({"id": ["a"] * 3 + ["b"], "text": ""})
    assert teacher.explanations(rows, ["neutral", "positive", "negative", "neutral"]) == ["Flat.", "Up.", None, None]


@pytest.mark.parametrize("column", ["explanation", "paraphrase"])
def test_explanations_and_paraphrases_may_be_in_one_file_of_several(tmp_path, column):
    (tmp_path / "labels.jsonl").write_text('{"id": "a", "label": "positive"}\n{"id": "b", "label": "neutral"}\n')
    (tmp_path / "texts.jsonl").write_text(
        '{"id": "b#0", "label": "neutral"}\n{"id": "c#0", "label": "x", "why": "So."}'
    )
    spec = {"files": ["labels.jsonl", "texts.jsonl"], "columns": {"id": "id", "text": None, "label": "label"}}
    spec["columns"][column] = "why"
    answers = read_answer_files(validate_section(AnswerFilesConfig, spec, "x"), TASK, tmp_path)
    assert answers[column].tolist() == ["", "", "", "So."]
    spec["columns"][column] = "wyh"
    with pytest.raises(UserError, match="^labels.jsonl, texts.jsonl: no column `wyh`; there are: id, label, why$"):
        read_answer_files(validate_section(AnswerFilesConfig, spec, "x"), TASK, tmp_path)


# ------------------------------------------------------------------------------- several teachers


def test_teachers_that_agree_are_more_often_right_and_the_table_shows_it(experiment, tmp_path):
    _, params = experiment
    gold = gold_rows(9).assign(split="pool", rationale=None)
    folder = tmp_path / "data/processed/finance"
    folder.mkdir(parents=True)
    gold[["id", "text"]].to_parquet(folder / "pool.parquet")
    sure = np.array([[0.9 if name == label else 0.05 for name in LABELS] for label in gold["label"]])
    other = np.roll(sure, 1, axis=1)
    for name, p in (("lm", np.where(np.arange(9)[:, None] < 6, sure, other * 0.5 + 1 / 6)), ("encoder", sure)):
        signals = signal_table(gold, p, LABELS, -1)
        (tmp_path / "data/teacher" / name).mkdir(parents=True)
        signals.drop(index=8 if name == "lm" else 7).to_parquet(tmp_path / "data/teacher" / name / "signals.parquet")
    params = params.model_copy(
        update={"teachers": {"lm": params.teachers["lm"], "encoder": params.teachers["encoder"]}}
    )
    voted, p = teacher_votes(tmp_path, params, "finance")
    assert voted["id"].tolist() == gold["id"].tolist()[:7] and p.shape == (2, 7, 3)  # those that both have answered
    pseudo = combine_votes(voted, p, LABELS)
    assert pseudo["agree"].tolist() == [True] * 6 + [False]
    assert pseudo["label"].tolist() == gold["label"].tolist()[:7]
    np.testing.assert_allclose(pseudo["confidence"], p.mean(0).max(-1))
    wrong = gold["label"].tolist()[:6] + ["none of them"]
    table = pseudo_label_precision(pseudo, wrong, (0.0, 0.85, 0.99)).set_index(
        ["all teachers agree", "confidence from"]
    )
    assert table.loc[(False, 0.0), "precision"] == pytest.approx(6 / 7) and table.loc[(True, 0.0), "precision"] == 1
    assert table.loc[(True, 0.85), "rows"] == 6 and table.loc[(True, 0.0), "coverage"] == pytest.approx(6 / 7)
    assert table.loc[(True, 0.99), "rows"] == 0 and np.isnan(table.loc[(True, 0.99), "precision"])


# ------------------------------------------------------------------------------- encoder-decoders


def test_an_encoder_decoder_labels_learns_and_gives_rationales(experiment, tiny_models, tmp_path):
    root, params = experiment
    changes = {"kind": "seq2seq", "model": "tiny-t5", "prompt": "plain"}
    spec = params.teachers["lm"].model_copy(update=changes)
    origin = ModelConfig(folder=str(tiny_models / "tiny-t5"))
    params = params.model_copy(update={"teachers": {"t5": spec}, "models": params.models | {"tiny-t5": origin}})
    gold = gold_rows(6)
    before = open_teacher(root, "t5", params, TASK).predict(gold)
    tuned, history = finetune_teacher("t5", params, TASK, gold, folder=tmp_path / "work")
    after = LocalTeacher(tuned).predict(gold)
    assert history["step"].max() == 2 and np.abs(after - before).max() > 1e-6
    np.testing.assert_allclose(after.sum(1), 1, atol=1e-5)
    save_trained_weights(tuned.model, tuned.tokenizer, tmp_path / "fold")
    again = open_teacher(root, "t5", params, TASK, tuned=tmp_path / "fold")
    np.testing.assert_allclose(again.predict(gold), after, atol=1e-5)
    signals = signal_table(gold, after, LABELS, -1)
    explained = add_rationales(root, "t5", params, TASK, gold, signals)
    assert explained["rationale"].notna().sum() == 2
