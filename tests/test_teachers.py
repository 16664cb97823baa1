"""Teachers: what may be kept of a paraphrase, folds that hide a row from its judge, and texts written once."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

import tiny
from distillery.config.load import validate_section
from distillery.config.schema import AnswerFilesConfig, ModelConfig, Params, ParaphraseFilter, TeacherConfig
from distillery.errors import UserError
from distillery.evaluation.speed import probability_function
from distillery.files import read_yaml
from distillery.models.label_model import LabelModel
from distillery.models.load import load_model, load_tokenizer
from distillery.models.save import save_model, save_trained_weights
from distillery.tasks.parsing import first_sentence
from distillery.tasks.prompts import chat_turns, render_prompt
from distillery.tasks.schema import Perturbations, Task, load_task
from distillery.teachers.agreement import combine_votes, pseudo_label_precision, teacher_votes
from distillery.teachers.base import open_prompted_teacher, open_teacher
from distillery.teachers.cache import STORE_PATH
from distillery.teachers.directions import directions, numbers, tickers
from distillery.teachers.few_shot import GoldExamples
from distillery.teachers.file import FileTeacher, read_answer_files
from distillery.teachers.finetune import assign_folds, cross_fit, finetune_teacher
from distillery.teachers.identity import model_identity
from distillery.teachers.local import predict_labels, row_prompt
from distillery.teachers.paraphrases import (
    filter_paraphrases,
    generate_paraphrases,
    label_paraphrases,
    rejection_reason,
    text_similarity,
)
from distillery.teachers.prompt_search import CALIBRATIONS, NO_CONTENT, compare_prompts, estimate_label_prior
from distillery.teachers.rationales import add_rationales, contradicts
from distillery.teachers.signals import label_rows, score_signals, signal_table

TASK = load_task("finance-sentiment", tiny.ROOT / "tasks")
LABELS = TASK.names
RULES = TASK.perturbations
KEEP = ParaphraseFilter()

# ------------------------------------------------------------------------------- what a program can see


@pytest.mark.parametrize(
    "text, found",
    [
        ("EUR 1,234.5 mn, up 48% from 12", ["12", "1234.5", "48"]),
        ("1,234 and 1234", ["1234", "1234"]),
        ("12,34 is a decimal comma", ["12,34"]),
        ("in 2010, 3.5.", ["2010", "3.5"]),
        ("no number", []),
    ],
)
def test_numbers(text, found):
    assert numbers(text) == sorted(found)


def test_tickers_are_words_in_capitals():
    assert tickers("$aapl and EUR beat IBM, but I and Nokia did not", RULES.tickers) == {"$aapl", "EUR", "IBM"}


@pytest.mark.parametrize(
    "text, found",
    [
        ("Profit ROSE.", {"up"}),
        ("Sales fell", {"down"}),
        ("Sales fell less than profit rose", {"down", "up"}),
        ("An update on the downtown office", set()),
        ("It will be held in May", set()),
    ],
)
def test_directions(text, found):
    assert directions(text, RULES.directions) == found


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
def test_why_a_paraphrase_is_dropped(text, reason):
    assert rejection_reason(SOURCE, text, keep=KEEP, perturbations=RULES) == reason


def test_a_task_without_perturbations_checks_neither_tickers_nor_directions():
    text = "In 2010 the company's net sales were down 48% and came to EUR 1200 mn as servers sold."
    assert rejection_reason(SOURCE, text, keep=KEEP, perturbations=RULES) == "tickers lost"
    assert rejection_reason(SOURCE, text, keep=KEEP, perturbations=Perturbations()) == "kept"
    only = Perturbations(directions={"rising": ["went"]})
    assert rejection_reason(SOURCE, text, keep=KEEP, perturbations=only) == "direction changed"


def test_a_good_paraphrase_near_a_held_out_row_is_dropped_and_thresholds_are_those_of_params():
    good = "In 2010 the net sales of IBM rose by 48% and came to EUR 1200 mn as servers sold."
    assert "held-out" in rejection_reason(SOURCE, good, keep=KEEP, perturbations=RULES, overlap=True)
    assert rejection_reason(SOURCE, good, keep=ParaphraseFilter(max_similarity=0.3), perturbations=RULES) == "copy"
    assert rejection_reason(SOURCE, good, keep=ParaphraseFilter(min_similarity=0.9), perturbations=RULES) == "off topic"


@given(st.integers(0, 999), st.sampled_from(["up", "rose", "higher"]), st.sampled_from(["down", "fell", "lower"]))
def test_a_turned_direction_is_never_kept(number, up, down):
    source = f"Quarterly profit of the company moved {up} {number}% from a year ago"
    turned = f"The profit that the company made in the quarter went {down} {number}% against a year ago"
    assert rejection_reason(source, turned, keep=KEEP, perturbations=RULES) != "kept"


def test_a_sentence_ends_at_a_full_stop_not_within_a_number():
    assert first_sentence("Profit rose to 1.5 mn. More follows.") == "Profit rose to 1.5 mn."
    assert first_sentence("It said: no end") == "It said: no end"


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


# ------------------------------------------------------------------------------- models that did not see the row


@pytest.fixture(scope="module")
def experiment(tiny_models, tmp_path_factory) -> tuple[Path, Params]:
    """A root folder with gold rows, and for teacher `encoder` a kept model and two fold models that differ."""
    root = tmp_path_factory.mktemp("experiment")
    (root / "dvc.yaml").touch()
    raw = json.loads(json.dumps(read_yaml(tiny.ROOT / "tests/smoke.yaml")))
    for name in ("tiny-llama", "tiny-bert"):
        raw["models"][name]["folder"] = str(tiny_models / name)
    params = validate_section(Params, raw, "params.yaml")
    for k, where in enumerate(("model", "folds/0", "folds/1")):
        model = load_model(tiny_models / "tiny-bert", "classifier", labels=LABELS, seed=k)
        with torch.no_grad():
            model.classifier.bias.copy_(torch.tensor([1.0, 2.0, 3.0]).roll(k))  # each prefers another label
        save_model(model, load_tokenizer(tiny_models / "tiny-bert"), root / "data/teacher/encoder" / where)
    return root, params


def gold_rows(n: int) -> pd.DataFrame:
    rows = [json.loads(line) for line in (tiny.ROOT / "data/corpora/finance.jsonl").read_text().splitlines()[:n]]
    frame = pd.DataFrame(rows)[["id", "text", "label", "group"]]
    return frame.assign(source="finance", split="train")


def answers(root: Path, where: str, params: Params, texts: list[str]) -> np.ndarray:
    return open_teacher("encoder", params, TASK, tuned=root / "data/teacher/encoder" / where).predict(texts)


def test_gold_rows_are_answered_by_the_model_that_did_not_see_them(experiment):
    root, params = experiment
    gold, other = gold_rows(6), gold_rows(9)[6:].assign(split="pool")
    rows = pd.concat([other, gold], ignore_index=True)
    memorised = signal_table(rows, answers(root, "model", params, rows["text"].tolist()), LABELS, -1)
    fold = np.array([0, 1, 1, 0, 1, 0])
    said = cross_fit("encoder", params, TASK, gold, fold, root / "data/teacher/encoder/folds", memorised)
    assert said["id"].tolist() == rows["id"].tolist() and said["split"].tolist() == rows["split"].tolist()
    assert said["fold"].tolist() == [-1, -1, -1, *fold]
    for i, k in enumerate(said["fold"]):
        where = "model" if k < 0 else f"folds/{k}"
        expected = answers(root, where, params, [rows["text"][i]])[0]
        assert np.abs(said["probabilities"][i] - expected).max() < 1e-5
        assert said["label"][i] == LABELS[expected.argmax()]
    changed = [
        not np.allclose(a, b, atol=0.05) for a, b in zip(said.probabilities, memorised.probabilities, strict=True)
    ]
    assert changed == [False] * 3 + [True] * 6
    nobody = assign_folds(gold, 0, seed=0)
    left = cross_fit("encoder", params, TASK, gold, nobody, root / "no folder", memorised)
    assert left["id"].tolist() == other["id"].tolist() and left.columns.tolist() == memorised.columns.tolist()


def test_a_paraphrase_is_answered_by_the_fold_of_its_row(experiment):
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
    said = label_paraphrases(root, params, TASK, kept, gold)
    assert said.columns.tolist() == [
        *("teacher", "source", "split", "id", "label", "probabilities", "fold", "rationale")
    ]
    assert said["id"].tolist() == ["b#1", "a#0", "b#0"] and said["fold"].tolist() == [1, 0, 1]
    assert set(said["split"]) == {"augmented"} and set(said["teacher"]) == {"encoder"}
    for i, k in enumerate(said["fold"]):
        assert np.abs(said["probabilities"][i] - answers(root, f"folds/{k}", params, [kept["text"][i]])[0]).max() < 1e-5
    known[known["id"] != kept["source_id"][1]].to_parquet(root / "data/teacher/encoder/signals.parquet")
    assert label_paraphrases(root, params, TASK, kept, gold)["id"].tolist() == ["b#1", "b#0"]
    nothing = label_paraphrases(root, params, TASK, kept[:0], gold)
    assert nothing.empty and nothing.columns.tolist() == said.columns.tolist()


def test_tuning_continues_in_a_folder_of_its_own_rows(experiment, tmp_path):
    _, params = experiment
    gold, texts = gold_rows(8), gold_rows(12)["text"].tolist()
    one, history = finetune_teacher("encoder", params, TASK, gold, folder=tmp_path)
    again, _ = finetune_teacher("encoder", params, TASK, gold, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1 and history["step"].max() == 2
    assert np.array_equal(one.predict(texts), again.predict(texts))
    part, _ = finetune_teacher("encoder", params, TASK, gold[:4], folder=tmp_path, part="without fold 0")
    assert len(list(tmp_path.iterdir())) == 2 and not np.allclose(one.predict(texts), part.predict(texts), atol=1e-6)


def test_adapters_alone_are_kept_of_a_fold_and_say_the_same(experiment, tmp_path):
    _, params = experiment
    gold = gold_rows(6)
    tuned, _ = finetune_teacher("lm", params, TASK, gold, folder=tmp_path / "work")
    expected = tuned.predict(gold["text"].tolist())
    save_trained_weights(tuned.model, tuned.tokenizer, tmp_path / "fold")
    assert (tmp_path / "fold/adapter_config.json").exists() and not (tmp_path / "fold/model.safetensors").exists()
    again = open_teacher("lm", params, TASK, tuned=tmp_path / "fold")
    assert np.abs(again.predict(gold["text"].tolist()) - expected).max() < 1e-5
    untuned = open_teacher("lm", params, TASK)
    assert np.abs(untuned.predict(gold["text"].tolist()) - expected).max() > 1e-5


def test_scores_are_those_of_each_split(experiment):
    gold = gold_rows(6)
    rows = pd.concat([gold.assign(split=split) for split in ("train", "test")], ignore_index=True)
    right = np.array([[0.8 if name == label else 0.1 for name in LABELS] for label in rows["label"]])
    wrong = np.roll(right, 1, axis=1)
    said = signal_table(rows, np.where((rows["split"] == "train").to_numpy()[:, None], right, wrong), LABELS, -1)
    found = score_signals(rows, said.sample(frac=1, random_state=0), LABELS)
    assert found["train"]["accuracy"] == 1 and found["test"]["accuracy"] == 0
    assert found["train"]["log_loss"] == pytest.approx(-np.log(0.8), rel=1e-6)


# ------------------------------------------------------------------------------- texts


def test_paraphrases_are_written_once_and_hang_on_the_seed(experiment, monkeypatch):
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
    nothing = params.model_copy(update={"augment": augment.model_copy(update={"per_row": 0})})
    assert generate_paraphrases(root, nothing, TASK, gold).columns.tolist() == rows.columns.tolist()


def test_the_judge_gives_every_candidate_one_reason(experiment, tiny_models):
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
    judged = filter_paraphrases(root, open_ended, TASK, candidates, [held_out], 0.85)
    reasons = ["copy", "kept", "written twice", "kept", "near-duplicate of a held-out row"]
    assert judged["reason"].tolist() == reasons
    read = open_teacher("lm", params, TASK, tuned=lm).predict([better])[0].argmax()
    for label in LABELS:
        strict = filter_paraphrases(root, params, TASK, candidates.assign(label=label), [held_out], 0.85)
        assert strict["reason"][3] == ("kept" if label == LABELS[read] else "label changed")
    assert filter_paraphrases(root, params, TASK, candidates[:0], [held_out], 0.85)["reason"].tolist() == []


def test_rationales_are_for_the_gold_label_and_the_same_each_time(experiment):
    root, params = experiment
    gold = gold_rows(6)
    rows = pd.concat([gold, gold_rows(10)[6:].assign(split="test")], ignore_index=True)
    said = signal_table(rows, np.full((10, 3), 1 / 3), LABELS, -1)
    told = add_rationales(root, "lm", params, TASK, rows, said)
    assert told["contradicts"].notna().sum() == 2 and told.loc[told["rationale"].isna(), "contradicts"].isna().all()
    assert told["rationale"].notna().sum() == params.teachers["lm"].rationales == 2
    assert not told.loc[rows["split"] == "test", "rationale"].notna().any()
    assert said["rationale"].isna().all()  # the frame that was given stays as it was
    pd.testing.assert_frame_equal(told, add_rationales(root, "lm", params, TASK, rows, said))


def test_nobody_is_asked_why_an_unreadable_answer_holds(experiment):
    root, params = experiment
    rows = gold_rows(6).assign(split="pool", label=None)
    p = np.full((6, 3), 1 / 3)
    p[[0, 2, 4]] = np.nan
    spec = params.teachers["lm"].model_copy(update={"rationales": 6})
    params = params.model_copy(update={"teachers": params.teachers | {"lm": spec}})
    told = add_rationales(root, "lm", params, TASK, rows, signal_table(rows, p, LABELS, -1))
    assert told["rationale"].notna().tolist() == [False, True] * 3


def test_a_teacher_in_four_bits_answers_and_its_answers_have_a_key_of_their_own(experiment):
    root, params = experiment
    whole, packed = (prompted(params, quantize=way, dtype="bfloat16") for way in ("none", "nf4"))
    models_, texts = [], gold_rows(6)["text"].tolist()
    for one in (whole, packed):
        models_.append(open_teacher("lm", one, TASK))
    kinds = {type(module).__name__ for module in models_[1].model.modules()}
    assert "Linear4bit" in kinds and "Linear4bit" not in {
        type(module).__name__ for module in models_[0].model.modules()
    }
    p, q = (model.predict(texts) for model in models_)
    assert np.isfinite(q).all() and np.abs(p - q).max() < 0.2 and (p != q).any()
    asked = [model_identity(one, "tiny-llama", model) for one, model in zip((whole, packed), models_, strict=True)]
    assert [one["quantization"] for one in asked] == [None, "nf4"]
    with pytest.raises(ValueError, match="`quantize` is for a `kind: lm` or `seq2seq` that is only prompted"):
        TeacherConfig.model_validate(params.teachers["lm"].model_dump() | {"quantize": "nf4"})


def test_label_scores_are_asked_for_in_batches_of_the_teachers_size(experiment, monkeypatch):
    root, params = experiment
    teacher, sizes = open_teacher("lm", prompted(params, batch_size=4), TASK), []
    forward = type(teacher).forward
    monkeypatch.setattr(
        type(teacher), "forward", lambda self, ids, *a, **k: sizes.append(len(ids)) or forward(self, ids, *a, **k)
    )
    predict_labels(teacher, gold_rows(10))
    assert sizes == [4, 4, 2]


def test_a_reason_that_names_another_label_contradicts_its_own():
    assert contradicts(TASK, "This is clearly negative news.", "positive")
    assert not contradicts(TASK, "Not negative at all, but positive.", "positive")
    assert not contradicts(TASK, "Sales rose.", "positive")


# ------------------------------------------------------------------------------- prompted only


def test_examples_come_from_other_groups_than_the_row(tiny_models):
    gold = gold_rows(12).assign(group=[f"g{i // 2}" for i in range(12)])
    for encoder in (None, tiny_models / "tiny-bert"):
        shots = GoldExamples(gold, 3, encoder)
        chosen = shots.choose(gold["text"].tolist(), gold["group"].tolist())
        for group, which in zip(gold["group"], chosen, strict=True):
            assert len(set(which)) == 3 and group not in shots.gold["group"].iloc[list(which)].tolist()
    fixed = GoldExamples(gold, 3).choose(["a", "b"], ["x", "y"])
    assert fixed[0] == fixed[1] and len(set(GoldExamples(gold, 3).gold["label"][list(fixed[0])])) == 3
    free = GoldExamples(gold, 3, tiny_models / "tiny-bert").choose(gold["text"].tolist(), [None] * 12)
    own = GoldExamples(gold, 3, tiny_models / "tiny-bert")
    for text, which in zip(gold["text"], free, strict=True):
        assert own.gold["text"][which[-1]] == text  # without groups a row is most similar to itself


def prompted(params: Params, **changes) -> Params:
    spec = params.teachers["lm"].model_copy(update={"finetune": None, "prompt": "chat"} | changes)
    return params.model_copy(update={"teachers": params.teachers | {"lm": spec}})


def test_rows_are_asked_about_with_their_own_examples_and_calibrated(experiment, tiny_models):
    root, params = experiment
    params = prompted(params)
    gold = gold_rows(12).assign(group=[f"g{i // 2}" for i in range(12)])
    teacher = open_teacher("lm", params, TASK)
    assert teacher.max_length == 512  # as long as its positions reach: examples take room
    teacher.shots = GoldExamples(gold, 2)
    asked = gold.head(7)
    chosen = teacher.shots.choose(asked["text"].tolist(), asked["group"].tolist())
    assert len(set(chosen)) > 1  # the rows that are among the examples get others
    p = predict_labels(teacher, asked)
    for row, text, which in zip(p, asked["text"], chosen, strict=True):
        alone = teacher.predict([text], shots=[[teacher.shots.shots[k] for k in which]])[0]
        np.testing.assert_allclose(row, alone, atol=1e-5)
        turns = chat_turns(TASK, text, [teacher.shots.shots[k] for k in which])
        shown = row_prompt(teacher, asked[asked["text"] == text].iloc[0])
        assert shown == render_prompt(turns, teacher.tokenizer)
    prior = estimate_label_prior(teacher, "batch", asked)
    np.testing.assert_allclose(prior, p.mean(0), rtol=1e-6)
    teacher.prior = prior
    expected = p / p.mean(0)
    np.testing.assert_allclose(predict_labels(teacher, asked), expected / expected.sum(1, keepdims=True), rtol=1e-5)
    empty = teacher.predict(NO_CONTENT, shots=[[teacher.shots.shots[k] for k in (0, 1)]] * 3).mean(0)
    teacher.prior = None
    np.testing.assert_allclose(estimate_label_prior(teacher, "contextual", asked), empty, atol=1e-5)
    assert estimate_label_prior(teacher, "none", asked) is None


@pytest.mark.parametrize("kind", ["labels", "answers"])
def test_a_killed_teacher_goes_on_where_it_stood_and_a_second_run_asks_nothing(experiment, tmp_path, monkeypatch, kind):
    root, params = experiment
    params = prompted(params, batch_size=3, dtype="bfloat16")
    task = TASK if kind == "labels" else Task(kind="qa", prompt={"instruction": "Answer.", "template": "{text}"})
    rows, calls, allowed = gold_rows(10).assign(answers="a"), [], 99
    inside = "forward" if kind == "labels" else "_generate"
    original = getattr(LabelModel, inside)

    def counted(self, prompts, *args, **more):
        calls.append(len(prompts))
        if len(calls) > allowed:
            raise KeyboardInterrupt
        return original(self, prompts, *args, **more)

    monkeypatch.setattr(LabelModel, inside, counted)
    monkeypatch.setattr("distillery.models.label_model.compute_prefix_kv", lambda *_: None)

    def run(folder: Path, **changes) -> pd.DataFrame:
        calls.clear()
        teacher = open_prompted_teacher(
            folder, "lm", prompted(params, **changes), task, {"prompt": None, "prior": None}
        )
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
    teacher = open_prompted_teacher(root, "lm", params, TASK, {"prompt": None, "prior": [0.5, 0.3, 0.2]})
    rows, calls = gold_rows(30).tail(4), []
    wanted, predict = predict_labels(teacher, rows), LabelModel.predict
    monkeypatch.setattr(LabelModel, "predict", lambda *a, **k: calls.append(1) or predict(*a, **k))
    say = probability_function(teacher)
    for n in (1, 2):  # nothing is remembered: it is timed
        np.testing.assert_allclose(say(rows["text"].tolist()), wanted, atol=1e-6)
        assert len(calls) == n


def test_a_teacher_that_will_be_tuned_can_be_shown_many_examples_before(experiment):
    root, params = experiment
    task = TASK.model_copy(update={"few_shot": list(TASK.few_shot) * 2})
    encoder = open_prompted_teacher(root, "encoder", params, TASK, {"prompt": None, "prior": None})
    assert encoder.max_length == open_teacher("encoder", params, TASK).max_length  # of its tokenizer's making
    assert params.teachers["lm"].finetune and open_teacher("lm", params, task).max_length == 256
    asked = open_prompted_teacher(root, "lm", params, task, {"prompt": None, "prior": None})
    asked.few_shot = len(task.few_shot)
    assert len(asked.encode(["Profit rose."])[0]) > 256
    assert predict_labels(asked, gold_rows(3)).shape == (3, 3)


def test_the_best_prompt_on_validation_rows_is_taken_and_kept(experiment):
    root, params = experiment
    other = TASK.prompt.model_copy(update={"instruction": "Say the opposite.", "system": ""})
    task = TASK.model_copy(update={"prompts": {"short": other}})
    params = prompted(params, prompts=["short"], calibrate="batch")
    rows = gold_rows(12)
    rows.loc[4:, "split"], rows.loc[8:, "split"] = "validation", "pool"
    table, how = compare_prompts(root, "lm", params, task, rows)
    assert table["prompt"].tolist() == ["prompt"] * 3 + ["short"] * 3
    assert table["calibrate"].tolist() == [*CALIBRATIONS] * 2
    batch = table[table["calibrate"] == "batch"].set_index("prompt")["macro_f1"]
    assert how["prompt"] == (None if batch["prompt"] >= batch["short"] else "short")
    assert len(how["prior"]) == 3 and abs(sum(how["prior"]) - 1) < 1e-3
    assert (table["low"] <= table["accuracy"]).all() and (table["accuracy"] <= table["high"]).all()
    path = root / "data/teacher/lm/asked.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"prompt": "short", "prior": [0.2, 0.3, 0.5]}))
    opened = open_prompted_teacher(root, "lm", params, task)
    assert opened.task.prompt == other and opened.prior.tolist() == [0.2, 0.3, 0.5]
    path.unlink()
    with pytest.raises(UserError, match="teachers.lm.prompts: the task has no `short`; it has: meanings, bare"):
        compare_prompts(root, "lm", params, TASK, rows)


# ------------------------------------------------------------------------------- answers from files

LINES = """sentence,said
Sales rose.,"POSITIVE

The text says so."
Sales fell.,"POSITIVE

The text says so."
A meeting.,"Neutral. Nothing happens."
Profit fell.,"It is hard to say"
Sales rose.,negative
"""


def file_teacher(tmp_path, repeats: str = "drop") -> FileTeacher:
    (tmp_path / "said.csv").write_text(LINES)
    columns = {"text": "sentence", "answer": "said"}
    spec = validate_section(AnswerFilesConfig, {"files": ["said.csv"], "columns": columns, "repeats": repeats}, "x")
    return FileTeacher(read_answer_files(spec, TASK, tmp_path), TASK)


def test_answers_from_a_file_teach_without_those_that_repeat_the_one_before(tmp_path):
    teacher = file_teacher(tmp_path)
    assert teacher.answers["fate"].tolist() == ["kept", "repeats the answer before", "kept", "cannot be read", "kept"]
    assert teacher.answers["at"].iloc[2] == "said.csv, line 8"
    rows = pd.DataFrame({"text": ["Sales  rose.", "Sales fell.", "A meeting.", "Profit fell."], "id": list("abcd")})
    assert teacher.covered(rows).tolist() == [True, False, True, True]
    p = teacher.look_up(rows)
    assert p[0].tolist() == [0.5, 0, 0.5] and p[2].tolist() == [0, 1, 0]  # two answers to one text share it
    assert np.isnan(p[[1, 3]]).all()
    said = signal_table(rows.assign(source="s", split="pool"), p, LABELS, -1)
    assert said["label"].tolist() == ["positive", None, "neutral", None]
    assert np.allclose(said["probabilities"][3], 1 / 3)
    told = teacher.explanations(rows, ["positive", "positive", "neutral", "negative"])
    assert told == ["The text says so.", None, "Nothing happens.", None]
    assert "Nothing happens." in row_prompt(teacher, rows.iloc[2])
    assert file_teacher(tmp_path, "keep").covered(rows).all()


def test_answers_that_miss_a_column_or_a_text_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": 1, "label": "positive"}\n{"id": null, "label": "x"}\n')
    spec = {"files": ["a.jsonl"], "columns": {"id": "id", "text": None, "label": "label"}}
    with pytest.raises(UserError, match="^a.jsonl, line 2: `id` is empty$"):
        read_answer_files(validate_section(AnswerFilesConfig, spec, "x"), TASK, tmp_path)
    spec["columns"] = {"text": "sentence", "label": "label"}
    with pytest.raises(UserError, match="^a.jsonl: no column `sentence`; there are: id, label$"):
        read_answer_files(validate_section(AnswerFilesConfig, spec, "x"), TASK, tmp_path)


# ------------------------------------------------------------------------------- several teachers


def test_teachers_that_agree_are_more_often_right_and_the_table_says_so(experiment, tmp_path):
    _, params = experiment
    gold = gold_rows(9).assign(split="pool", rationale=None)
    folder = tmp_path / "data/processed/finance"
    folder.mkdir(parents=True)
    gold[["id", "text"]].to_parquet(folder / "pool.parquet")
    sure = np.array([[0.9 if name == label else 0.05 for name in LABELS] for label in gold["label"]])
    other = np.roll(sure, 1, axis=1)
    for name, p in (("lm", np.where(np.arange(9)[:, None] < 6, sure, other * 0.5 + 1 / 6)), ("encoder", sure)):
        said = signal_table(gold, p, LABELS, -1)
        (tmp_path / "data/teacher" / name).mkdir(parents=True)
        said.drop(index=8 if name == "lm" else 7).to_parquet(tmp_path / "data/teacher" / name / "signals.parquet")
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


def test_an_encoder_decoder_labels_learns_and_gives_reasons(experiment, tiny_models, tmp_path):
    root, params = experiment
    changes = {"kind": "seq2seq", "model": "tiny-t5", "prompt": "plain"}
    spec = params.teachers["lm"].model_copy(update=changes)
    origin = ModelConfig(folder=str(tiny_models / "tiny-t5"))
    params = params.model_copy(update={"teachers": {"t5": spec}, "models": params.models | {"tiny-t5": origin}})
    gold = gold_rows(6)
    before = predict_labels(open_teacher("t5", params, TASK), gold)
    tuned, history = finetune_teacher("t5", params, TASK, gold, folder=tmp_path / "work")
    after = predict_labels(tuned, gold)
    assert history["step"].max() == 2 and np.abs(after - before).max() > 1e-6
    np.testing.assert_allclose(after.sum(1), 1, atol=1e-5)
    save_trained_weights(tuned.model, tuned.tokenizer, tmp_path / "fold")
    again = open_teacher("t5", params, TASK, tuned=tmp_path / "fold")
    np.testing.assert_allclose(predict_labels(again, gold), after, atol=1e-5)
    said = signal_table(gold, after, LABELS, -1)
    told = add_rationales(root, "t5", params, TASK, gold, said)
    assert told["rationale"].notna().sum() == 2
