"""Rows with any number of labels: how files have them, their splits and audit, their losses, scores and thresholds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit, rel_entr, xlogy
from sklearn import metrics as sk

from distillery import losses, metrics
from distillery.config.load import validate_section
from distillery.config.schema import AnswerFilesConfig, ColumnNames, PhaseConfig, SourceConfig, SplitShares
from distillery.config.schema.data import OwnSplits
from distillery.data.label_sets import audit_label_sets
from distillery.data.prepare import PreparedSource, prepare_source
from distillery.data.splitting import split_groups
from distillery.data.storage import read_split, write_source
from distillery.errors import UserError
from distillery.evaluation.checks import find_shortcuts
from distillery.evaluation.results import ModelResult
from distillery.label_sets import NO_LABELS, LabelSets, membership, rows_with, sets_of, split_labels
from distillery.metrics.label_sets import SET_SCORES
from distillery.tasks.schema import Task
from distillery.teachers.agreement import combine_votes
from distillery.teachers.file import FileTeacher, read_answer_files
from distillery.teachers.label_review import find_label_errors, find_rows_to_label
from distillery.training.rows import phase_rows

NAMES = LabelSets(["up", "down", "guidance"])
TASK = Task(kind="multilabel", labels={"up": "rises", "down": "falls", "guidance": "a forecast"})
SHARES = SplitShares(train=0.4, validation=0.3, test=0.3)
SETS = [["up", "guidance"], ["down"], [], ["guidance"], ["up"], ["down", "guidance"]] * 5
TEXTS = ["up | guidance", "down", NO_LABELS, "guidance", "up", "down | guidance"]


def source(file: Path, **columns: Any) -> SourceConfig:
    return SourceConfig(source=file.name, task="x", split=SHARES, columns=ColumnNames(**columns), near_duplicate=1.0)


def prepare(file: Path, task: Task = TASK, **columns: Any) -> PreparedSource:
    return prepare_source("x", source(file, **columns), task, file.parent)


def text_of(i: int) -> str:
    return f"{'abcdefgh'[i % 8] * (i + 3)} row"


def json_lines(folder: Path, values: list[Any]) -> Path:
    path = folder / "a.jsonl"
    rows = [{"text": text_of(i), "label": value} for i, value in enumerate(values)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def csv_file(folder: Path, values: list[str]) -> Path:
    path = folder / "a.csv"
    pd.DataFrame({"text": [text_of(i) for i in range(len(values))], "label": values}).to_csv(path, index=False)
    return path


def parquet_file(folder: Path, values: list[list[str]]) -> Path:
    path = folder / "a.parquet"
    pq.write_table(pa.table({"text": [text_of(i) for i in range(len(values))], "label": values}), path)
    return path


def marked_file(folder: Path, **columns: list) -> Path:
    """Columns of 1 and 0 beside the text."""
    table = {"text": [text_of(i) for i in range(len(SETS))]}
    table |= {name: [int(name in labels) for labels in SETS] for name in NAMES} | columns
    pd.DataFrame(table).to_csv(folder / "a.csv", index=False)
    return folder / "a.csv"


# ------------------------------------------------------------------------------------------------------------- files


def test_columns_of_1_and_0_are_sets_and_no_longer_columns(tmp_path):
    prepared = prepare(marked_file(tmp_path, stars=[3] * len(SETS)), label_columns=list(NAMES))
    assert list(prepared.rows["label"]) == TEXTS * 5
    assert not {*NAMES} & {*prepared.rows} and "stars" in prepared.rows
    (tmp_path / "a.csv").write_text((tmp_path / "a.csv").read_text().replace("guidance", "Vorschau", 1))
    named = {"label_columns": ["up", "down", "Vorschau"], "values": {"Vorschau": "guidance"}}
    assert list(prepare(tmp_path / "a.csv", **named).rows["label"]) == TEXTS * 5


def test_a_column_called_label_beside_columns_of_1_and_0_is_left_out(tmp_path):
    prepared = prepare(marked_file(tmp_path, label=["secret"] * len(SETS)), label_columns=list(NAMES))
    assert list(prepared.rows["label"]) == TEXTS * 5
    assert "The column `label` is left out: the labels stand in others." in prepared.audit["decisions"]


def test_a_row_of_a_pool_without_marks_is_unknown_and_one_of_zeros_has_no_label(tmp_path):
    lines = [{"text": text_of(i), **{name: int(name in SETS[i]) for name in NAMES}} for i in range(24)]
    pool = [{"text": f"pool {text_of(i)}"} | (dict.fromkeys(NAMES, 0) if i else {}) for i in range(2)]
    for name, rows in (("a.jsonl", lines[:12]), ("b.jsonl", lines[12:]), ("p.jsonl", pool)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = OwnSplits(train="a.jsonl", test="b.jsonl", pool="p.jsonl")
    spec = SourceConfig(task="x", splits=splits, columns=ColumnNames(label_columns=list(NAMES)), near_duplicate=1.0)
    rows = prepare_source("x", spec, TASK, tmp_path).rows
    assert list(rows.loc[rows["text"].str.startswith("pool"), "label"]) == [None, NO_LABELS]


@pytest.mark.parametrize(
    "columns, task, line",
    [
        ({"label_columns": ["up", "dwn"]}, TASK, "a.csv: no column `dwn` of `label_columns`; there are: `text`, `up`"),
        ({"label_columns": ["up", "text"]}, TASK, "a.csv, line 2: `text` must be 1 or 0, not 'aaa row'"),
        ({"label_columns": ["up", "stars"]}, TASK, "a.csv, line 2: `stars` must be 1 or 0, not '3'"),
        ({"label_columns": ["up", "other"]}, TASK, "a.csv, line 2: unknown label 'other'; allowed: up, down, guidance"),
        (
            {"label_columns": ["up", "down"]},
            TASK.model_copy(update={"kind": "classification"}),
            "a.csv: `columns.label_columns` is for a task of `kind: multilabel`",
        ),
    ],
)
def test_wrong_columns_of_1_and_0_end_in_one_line(tmp_path, columns, task, line):
    file = marked_file(tmp_path, stars=[3] * len(SETS), other=[1] * len(SETS))
    with pytest.raises(UserError) as error:
        prepare(file, task, **columns)
    assert str(error.value).startswith(line)


def test_labels_stand_in_one_place():
    with pytest.raises(UserError, match="`label_columns` stands in place of `label` and `label_separator`"):
        validate_section(ColumnNames, {"label_columns": ["up", "down"], "label": "tags"}, "params.yaml")


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: json_lines(folder, SETS),
        lambda folder: parquet_file(folder, SETS),
        lambda folder: csv_file(folder, [";".join(labels) for labels in SETS]),
        lambda folder: csv_file(folder, [" | ".join(labels) for labels in SETS]),
        lambda folder: csv_file(folder, [", ".join(reversed(labels)) for labels in SETS]),
        lambda folder: csv_file(folder, [" ".join(labels) for labels in SETS]),
        lambda folder: csv_file(folder, [json.dumps(labels) for labels in SETS]),
        lambda folder: csv_file(folder, [repr(labels) for labels in SETS]),  # as pandas writes a column of lists
        lambda folder: csv_file(folder, [TEXTS[i % 6] for i in range(30)]),  # as `distillery predict` writes them
    ],
    ids=["json list", "parquet", ";", "|", ",", "space", "JSON in CSV", "Python in CSV", "predictions"],
)
def test_a_set_of_labels_is_read_in_every_form(tmp_path, write):
    rows = prepare(write(tmp_path)).rows
    assert rows["label"].tolist() == TEXTS * 5


def test_what_was_decided_of_the_labels_is_in_the_audit(tmp_path):
    (separator, empty) = prepare(csv_file(tmp_path, [";".join(labels) for labels in SETS])).audit["decisions"]
    assert separator == 'The labels of a row are divided by ";"; see `label_separator`.'
    assert empty == "5 rows with nothing in the column of labels have no label."
    assert prepare(json_lines(tmp_path, SETS)).audit["decisions"] == []


def test_a_separator_that_is_named_needs_no_guess(tmp_path):
    prepared = prepare(csv_file(tmp_path, ["/".join(labels) for labels in SETS]), label_separator="/")
    assert prepared.rows["label"].tolist() == TEXTS * 5
    assert prepared.audit["decisions"][0].startswith("5 rows")


def test_other_names_are_mapped_one_by_one(tmp_path):
    path = json_lines(tmp_path, [[{"up": 1, "down": 2, "guidance": 3}[label] for label in labels] for labels in SETS])
    rows = prepare(path, values={1: "up", 2: "down", 3: "guidance"}).rows
    assert rows["label"].tolist() == TEXTS * 5


@pytest.mark.parametrize(
    ("value", "line"),
    [
        (
            ["up", "sideways"],
            r"a.jsonl, line 31: unknown label 'sideways'; allowed: up, down, guidance. To name the label",
        ),
        (["up", "Up"], "a.jsonl, line 31: `label` holds the label `up` twice; each label once"),
        ("up;sideways", "a.jsonl, line 31: unknown label 'sideways'; allowed: up, down, guidance"),
        ("[{[]: 1}]", r"a.jsonl, line 31: unknown label '\[{\[\]: 1}\]'; allowed: up, down, guidance"),
        ("up/down", "unknown label 'up/down'; allowed: .* write columns: {label_separator: \"/\"}"),
        ([["up"]], r"a.jsonl, line 31: `label` must hold labels, not a list \(\['up'\]\); allowed: up"),
        ({"up": True}, r"a.jsonl, line 31: `label` must hold labels, not an object"),
        ([None], r"a.jsonl, line 31: `label` must hold labels, not nothing \(None\)"),
    ],
)
def test_a_wrong_label_names_the_row(tmp_path, value, line):
    with pytest.raises(UserError, match=line):
        prepare(json_lines(tmp_path, [*SETS, value]))


def test_a_separator_is_for_label_sets_alone(tmp_path):
    one_label = Task(kind="classification", labels=TASK.labels)
    with pytest.raises(UserError, match="`columns.label_separator` is for a task of `kind: multilabel`$"):
        prepare(json_lines(tmp_path, ["up", "down", "guidance"] * 9), one_label, label_separator=";")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"labels": {"a | b": "", "c": ""}}, "`|` divides the labels of a row"),
        ({"labels": {NO_LABELS: "", "c": ""}}, "stands for none"),
        ({"severity": {"up": 0.5}}, "`severity` is not for `kind: multilabel`"),
        ({"few_shot": [{"text": "a", "label": "up"}]}, "`few_shot` is not for `kind: multilabel`"),
    ],
)
def test_a_task_that_no_set_can_have_is_refused(change, line):
    with pytest.raises(ValueError, match=line.replace("|", r"\|").replace("(", r"\(")):
        Task.model_validate({"kind": "multilabel", "labels": TASK.labels} | change)


def test_a_pool_without_labels_stays_without_and_its_sets_are_hidden(tmp_path):
    rows = [{"text": text_of(i), "label": labels, "part": "train"} for i, labels in enumerate(SETS)]
    for i, row in enumerate(rows):
        row["part"] = ("train", "validation", "test", "pool")[i // 6 % 4]
    rows[18] |= {"label": None}
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = SourceConfig(source=path.name, task="x", split_column="part", near_duplicate=1.0)
    write_source(prepare_source("x", spec, TASK, tmp_path), tmp_path / "out")
    pool, hidden = read_split(tmp_path / "out", "pool"), read_split(tmp_path / "out", "pool_labels")
    assert "label" not in pool and hidden["label"].tolist() == [None, *TEXTS[1:]]
    assert read_split(tmp_path / "out", "train")["label"].tolist() == [*TEXTS, *TEXTS]


# ------------------------------------------------------------------------------------------------- splits and audit


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1))
def test_each_split_gets_its_share_of_every_label_and_of_rows_without_one(seed):
    rng = np.random.default_rng(seed)
    members = rng.random((400, 3)) < [0.5, 0.2, 0.05]
    members[:9, 2] = True
    labels, groups = sets_of(members, NAMES), [str(i // 2) for i in range(400)]
    split = split_groups(groups, labels, NAMES, {"train": 0.5, "validation": 0.2, "test": 0.3}, seed % 1000)
    for name, share in {"train": 0.5, "validation": 0.2, "test": 0.3}.items():
        held = (split == name)[:, None] & np.column_stack([members, ~members.any(1)])
        counts = np.column_stack([members, ~members.any(1)]).sum(0)
        assert (held[:, :3].sum(0) > 0).all()
        assert (np.abs(held.sum(0) - share * counts) <= 3 + 0.1 * counts).all()
    assert pd.Series(split).groupby(groups).nunique().max() == 1


def test_a_label_of_too_few_rows_cannot_be_split(tmp_path):
    with pytest.raises(UserError, match=r"label `down` has 1 group\(s\) of rows .* too few to split"):
        prepare(json_lines(tmp_path, [["up", "guidance"]] * 9 + [["down", "up"]]))


def test_the_audit_counts_labels_sets_and_what_meets(tmp_path):
    audit = prepare(json_lines(tmp_path, SETS)).audit
    assert audit["label_sets"] == {
        "distinct": 6,
        "sets": dict.fromkeys(TEXTS, 5),
        "without_label": 5,
        "labels_per_row": round(35 / 30, 4),
        "co_occurrence": {"up": {"guidance": 5}, "down": {"guidance": 5}, "guidance": {"up": 5, "down": 5}},
    }
    assert sum(part["labels"]["guidance"] for part in audit["splits"].values()) == 15
    assert set(audit["lengths"]["by_label"]) == set(NAMES)
    assert audit_label_sets(pd.DataFrame({"label": [None]}), NAMES)["labels_per_row"] == 0


# ------------------------------------------------------------------------------------------------------------ values


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=9))
def test_a_set_as_text_and_as_columns_is_the_same(rows):
    members = np.array(rows)
    texts = sets_of(members, NAMES)
    assert (membership(texts, NAMES) == members).all()
    assert [len(split_labels(text)) for text in texts] == members.sum(1).tolist()
    for k, name in enumerate(NAMES):
        assert (rows_with(texts, name, NAMES) == members[:, k]).all()
    assert (rows_with(texts, NO_LABELS, NAMES) == ~members.any(1)).all()


# ------------------------------------------------------------------------------------------------------------ losses


def binary_kl(p: np.ndarray, s: np.ndarray) -> np.ndarray:
    return rel_entr(p, s) + rel_entr(1 - p, 1 - s)


def test_binary_terms_by_hand():
    logits = losses.two_outcome_logits(torch.tensor([[0.0, math.log(3)]], dtype=torch.float64))  # s = 1/2, 3/4
    teacher = losses.two_outcome_probabilities(torch.tensor([[0.5, 0.25]], dtype=torch.float64))
    gold = losses.two_outcome_probabilities(torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    ce = losses.cross_entropy(logits, gold.flatten(0, 1))
    assert ce.tolist() == pytest.approx([math.log(2), math.log(4)])
    kl = losses.kl(logits, teacher.flatten(0, 1).log())
    assert kl.tolist() == pytest.approx([0, 0.25 * math.log(1 / 3) + 0.75 * math.log(3)], abs=1e-12)
    # at T = 2 the odds of 3 and 1/3 become their square roots
    softened = 1 / (1 + math.sqrt(3))
    expected = softened * math.log(1 / math.sqrt(3)) + (1 - softened) * math.log(math.sqrt(3))
    assert losses.kl(logits, teacher.flatten(0, 1).log(), 2.0)[1].item() == pytest.approx(expected)


REFERENCES = {  # of p and s, the probabilities of `yes` at the temperature, and beta = 0.3, alpha = 0.2
    "kl": binary_kl,
    "reverse_kl": lambda p, s: binary_kl(s, p),
    "jsd": lambda p, s: 0.3 * binary_kl(p, 0.3 * p + 0.7 * s) + 0.7 * binary_kl(s, 0.3 * p + 0.7 * s),
    "skew_kl": lambda p, s: binary_kl(p, 0.2 * p + 0.8 * s),
    "skew_reverse_kl": lambda p, s: binary_kl(s, 0.8 * p + 0.2 * s),
    "tvd": lambda p, s: np.abs(p - s),
}


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**32 - 1),
    term=st.sampled_from(["ce", *REFERENCES]),
    temperature=st.floats(0.5, 5),
    scale=st.sampled_from([0.1, 1.0, 4.0]),
)
def test_every_binary_term_agrees_with_scipy_and_with_torch(seed, term, temperature, scale):
    rng = np.random.default_rng(seed)
    n, k = rng.integers(1, 6), rng.integers(1, 8)
    z, gold = rng.normal(size=(n, k)) * scale, rng.integers(0, 2, (n, k)).astype(float)
    p = expit(rng.normal(size=(n, k)) * scale)
    logits = torch.tensor(z, requires_grad=True)
    outcomes = [losses.two_outcome_probabilities(torch.tensor(values)).flatten(0, 1) for values in (gold, p)]
    total, _ = losses.combine_terms(
        {term: 1.0},
        losses.two_outcome_logits(logits),
        targets=outcomes[0],
        teacher_logprobs=outcomes[1].log(),
        temperature=temperature,
        scale_by_t2=False,
        beta=0.3,
        alpha=0.2,
        denominator=n * k,
    )
    total.backward()
    s = expit(z / temperature)
    if term == "ce":
        own = torch.tensor(z, requires_grad=True)
        reference = torch.nn.BCEWithLogitsLoss()(own, torch.tensor(gold))
        reference.backward()
        assert logits.grad.numpy() == pytest.approx(own.grad.numpy(), abs=1e-9)
        by_hand = -(xlogy(gold, expit(z)) + xlogy(1 - gold, expit(-z))).mean()
        assert reference.item() == pytest.approx(by_hand, abs=1e-9)
        assert total.item() == pytest.approx(reference.item(), abs=1e-9)
    else:
        assert total.item() == pytest.approx(REFERENCES[term](expit(logit(p) / temperature), s).mean(), abs=1e-9)
    if term == "kl":  # the gradient of the mean: (s - p) / T for each decision
        expected = (s - expit(logit(p) / temperature)) / temperature / (n * k)
        assert logits.grad.numpy() == pytest.approx(expected, abs=1e-9)


@given(
    st.lists(st.sampled_from([0.0, 1e-30, 0.5, 1 - 1e-7, 1.0]), min_size=2, max_size=2),
    st.floats(-1e4, 1e4),
    st.sampled_from(list(losses.DISTRIBUTION_TERMS)),
)
def test_certain_teachers_and_extreme_logits_give_finite_losses(p, z, term):
    logits = torch.tensor([[z, -z]], requires_grad=True)
    teacher = losses.two_outcome_probabilities(torch.tensor([p])).flatten(0, 1).log()
    value = losses.DISTRIBUTION_TERMS[term](losses.two_outcome_logits(logits), teacher).sum()
    value.backward()
    assert value.isfinite() and value >= -1e-6 and logits.grad.isfinite().all()


def test_values_that_are_no_probabilities_are_refused():
    for wrong in (1.5, -0.1, math.nan):
        with pytest.raises(ValueError, match="from 0 to 1"):
            losses.two_outcome_probabilities(torch.tensor([wrong]))
    with pytest.raises(ValueError, match=r"\[n, K\], not \[3\]"):
        losses.two_outcome_logits(torch.zeros(3))


# ---------------------------------------------------------------------------------------------------- training rows


def phase(**changes: Any) -> PhaseConfig:
    values = {
        "data": ["x/train", "x/pool"],
        "teachers": ["a", "b"],
        "loss": {"kl": 1.0},
        "steps": 1,
        "learning_rate": 1.0,
    }
    return PhaseConfig.model_validate(values | changes)


def test_rows_of_a_phase_have_sets_as_targets_and_a_mean_of_teachers():
    frame = pd.DataFrame(
        {
            "split_ref": ["x/train", "x/pool", "x/pool", "x/pool"],
            "text": list("abcd"),
            "label": ["up | guidance", None, None, None],
            "probabilities_a": [[0.1, 0.2, 0.3], [0.9, 0.4, 0.5], [1.0, 0.0, 0.2], None],
            "probabilities_b": [[0.3, 0.4, 0.5], [0.7, 0.2, 0.3], None, None],
            "fold_a": [0, -1, -1, None],
            "fold_b": [-1, -1, None, None],
        }
    )
    rows = phase_rows(frame, phase(), NAMES)
    assert rows.texts == ["a", "b", "c"] and rows.are_sets
    assert rows.targets.tolist() == [[1, 0, 1], [1, 0, 0], [1, 0, 0]]
    yes = rows.logprobs.exp()[..., 1].numpy()
    assert yes == pytest.approx(np.array([[0.2, 0.3, 0.4], [0.8, 0.3, 0.4], [1.0, 0.0, 0.2]]), abs=1e-6)
    assert rows.logprobs.exp().sum(-1).numpy() == pytest.approx(np.ones((3, 3)))
    assert rows.gold.tolist() == [True, False, False]
    assert rows.teacher_weights["b"].tolist() == [0.5, 0.5, 0.0] and rows.teacher_folds["a"] == [0, -1, -1]


# ------------------------------------------------------------------------------------------------------------ scores


@st.composite
def predicted_sets(draw):
    """Gold and predicted membership [n, K], probabilities; labels that no row holds and empty sets included."""
    n, rng = draw(st.integers(1, 40)), np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    share = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    gold, predicted = rng.random((n, 3)) < share, rng.random((n, 3)) < rng.choice([0.0, 0.3, 0.7])
    p = rng.random((n, 3)) if draw(st.booleans()) else rng.integers(0, 3, (n, 3)) / 2
    return gold, predicted, p


@settings(max_examples=40)
@given(predicted_sets())
@pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:RuntimeWarning")  # of scikit-learn on absent labels
def test_scores_agree_with_scikit_learn(case):
    gold, predicted, p = case
    report = metrics.classification_report(sets_of(gold, NAMES), sets_of(predicted, NAMES), p, NAMES)
    present = (gold | predicted).any(0)
    by_label = sk.f1_score(gold, predicted, average=None, zero_division=0)
    macro = by_label[present].mean() if present.any() else 0.0
    expected = {
        "accuracy": sk.accuracy_score(gold, predicted),
        "hamming_loss": sk.hamming_loss(gold, predicted),
        "micro_f1": sk.f1_score(gold, predicted, average="micro", zero_division=0),
        "micro_precision": sk.precision_score(gold, predicted, average="micro", zero_division=0),
        "micro_recall": sk.recall_score(gold, predicted, average="micro", zero_division=0),
        "weighted_f1": sk.f1_score(gold, predicted, average="weighted", zero_division=0),
        "macro_f1": macro,
        "brier": np.square(p - gold).mean(),
        "log_loss": np.mean([sk.log_loss(gold[:, k], p[:, k], labels=[False, True]) for k in range(3)]),
        "labels_per_row": predicted.sum(1).mean(),
    }
    if ((p == 0) & gold).any() or ((p == 1) & ~gold).any():
        del expected["log_loss"]  # another floor
    for name, value in expected.items():
        assert report[name] == pytest.approx(value, abs=1e-6), name
    precision, recall, f1, support = sk.precision_recall_fscore_support(gold, predicted, average=None, zero_division=0)
    for k, name in enumerate(NAMES):
        row = report["labels"][name]
        ranked = sk.average_precision_score(gold[:, k], p[:, k]) if gold[:, k].any() else 0.0
        values = [row[score] for score in ("precision", "recall", "f1", "support", "average_precision")]
        assert values == pytest.approx([precision[k], recall[k], f1[k], support[k], ranked])
        others = sk.recall_score(~gold[:, k], ~predicted[:, k], zero_division=0)
        assert row["specificity"] == pytest.approx(others)
    held = gold.any(0)
    ranks = [sk.average_precision_score(gold[:, k], p[:, k]) for k in np.flatnonzero(held)]
    assert report["macro_average_precision"] == pytest.approx(np.mean(ranks) if held.any() else 0.0)
    scores = metrics.mean_scores(sets_of(gold, NAMES), sets_of(predicted, NAMES), NAMES)
    assert scores == {name: report[name] for name in SET_SCORES}


def test_scores_by_hand():
    gold, predicted = ["up | guidance", "down", NO_LABELS, "up"], ["up", "down", "down", "up"]
    report = metrics.classification_report(gold, predicted, None, NAMES)
    assert report["accuracy"] == 0.5 and report["hamming_loss"] == pytest.approx(2 / 12)
    assert report["micro_f1"] == pytest.approx(2 * 3 / (4 + 4)) and report["macro_f1"] == pytest.approx(
        (1 + 2 / 3 + 0) / 3
    )
    assert "log_loss" not in report and report["commonest_answer"] == 0.5
    assert {type(value) for key, value in report.items() if key != "labels"} == {int, float}


@pytest.mark.parametrize("gold", [[], ["sideways"], ["guidance | up"], [None]])
def test_gold_that_is_no_set_is_refused(gold):
    with pytest.raises(ValueError, match="gold label set"):
        metrics.classification_report(gold, ["up"] * len(gold), None, NAMES)


def test_an_answer_that_cannot_be_read_is_wrong_even_where_no_label_is_right():
    report = metrics.classification_report([NO_LABELS, "up"], [None, None], None, NAMES)
    assert report["accuracy"] == 0 and report["labels"]["up"]["recall"] == 0


def test_intervals_are_those_of_resampled_groups():
    rng = np.random.default_rng(0)
    gold, predicted = sets_of(rng.random((60, 3)) < 0.4, NAMES), sets_of(rng.random((2, 60, 3)) < 0.4, NAMES)
    groups = [str(i // 3) for i in range(60)]
    drawn = metrics.bootstrap_scores(gold, predicted[0], NAMES, groups, n=20, seed=5)
    units = np.unique(groups)  # the groups by their names, and the draws of `significance._draw`
    draws = np.random.default_rng([5, 0]).integers(0, len(units), (20, len(units)))
    for i, chosen in enumerate(draws):
        rows = np.concatenate([np.flatnonzero(np.array(groups) == units[unit]) for unit in chosen])
        expected = metrics.mean_scores(gold[rows], predicted[0][rows], NAMES)
        assert {name: drawn[name][i] for name in SET_SCORES} == pytest.approx(expected), i
    same = metrics.paired_difference(gold, predicted, predicted, NAMES, groups, n=100)
    assert set(same) == set(SET_SCORES) and all(score["mean"] == 0 for score in same.values())
    right = metrics.paired_difference(gold, gold, predicted, NAMES, groups, n=100)
    assert right["accuracy"]["low"] > 0 and right["micro_f1"]["p"] < 0.05 and right["hamming_loss"]["mean"] < 0


def test_the_divergence_from_a_teacher_is_the_mean_over_labels():
    p, q = np.array([[0.9, 0.2, 0.5]]), np.array([[0.6, 0.2, 0.1]])
    assert metrics.kl_divergence(p, q, NAMES) == pytest.approx(binary_kl(p, q).mean(1), abs=1e-6)


# -------------------------------------------------------------------------------------------------------- thresholds


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), ties=st.booleans())
def test_no_threshold_has_a_higher_f1_than_the_chosen_one(seed, ties):
    rng = np.random.default_rng(seed)
    gold = rng.random((rng.integers(1, 30), 3)) < rng.choice([0.1, 0.5])
    p = (rng.integers(0, 4, gold.shape) / 3 if ties else rng.random(gold.shape)).astype(np.float32)
    thresholds = metrics.choose_thresholds(sets_of(gold, NAMES), p, NAMES)
    chosen = membership(metrics.decide(p, NAMES, thresholds), NAMES)
    for k in range(3):
        if not gold[:, k].any():
            assert thresholds[k] == 0.5
            continue
        held, tried = gold[:, k], [p[:, k] >= t for t in p[:, k]]
        best = max(2 * (held & predicted).sum() / (held.sum() + predicted.sum()) for predicted in tried)
        assert sk.f1_score(held, chosen[:, k], zero_division=0) == pytest.approx(best)
        assert 0 <= thresholds[k] <= 1


def test_a_threshold_lies_between_probabilities_and_near_one_half():
    gold = ["up", "up", NO_LABELS, NO_LABELS]
    p = np.array([[0.9, 0.5, 0.5], [0.3, 0.5, 0.5], [0.1, 0.5, 0.5], [0.0, 0.5, 0.5]])
    assert metrics.choose_thresholds(gold, p, NAMES).tolist() == [pytest.approx(0.2), 0.5, 0.5]
    assert metrics.decide(p, NAMES, [0.2, 0.6, 0.6]).tolist() == gold
    assert metrics.decide(p[:1], NAMES).tolist() == ["up | down | guidance"]  # 0.5 is enough
    assert metrics.decide(np.array([0.2, 0.7, 0.1]), list(NAMES), [0.9, 0.9, 0.9]) == "down"  # one label a row


def test_the_confidence_of_a_set_is_its_probability():
    p = np.array([[0.9, 0.2, 0.5]])
    assert metrics.confidence(p, ["up"], NAMES) == pytest.approx([0.9 * 0.8 * 0.5])
    assert metrics.confidence(p, ["up"], list(NAMES)) == pytest.approx([0.9])


# -------------------------------------------------------------------------------------------------- answers in files


def answers(folder: Path, rows: list[dict], columns: dict[str, Any]) -> tuple[pd.DataFrame, FileTeacher]:
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = AnswerFilesConfig.model_validate({"files": ["answers.jsonl"], "columns": columns})
    table = read_answer_files(spec, TASK, folder)
    return table, FileTeacher(table, TASK)


def test_answers_are_lists_texts_or_probabilities_of_each_label(tmp_path):
    rows = [
        {"text": "a", "topics": ["up", "guidance"]},
        {"text": "a", "topics": "up"},
        {"text": "b", "topics": "down;guidance"},
        {"text": "c", "topics": []},
        {"text": "d", "topics": "I cannot say"},
    ]
    table, teacher = answers(tmp_path, rows, {"label": "topics"})
    assert table["status"].tolist() == ["kept"] * 4 + ["cannot be read"]
    shares = teacher.predict(pd.DataFrame({"text": list("abcd")}))
    assert shares[:3].tolist() == [[1, 0, 0.5], [0, 1, 1], [0, 0, 0]] and np.isnan(shares[3]).all()
    columns = {"probabilities": {"up": "u", "down": "d", "guidance": "g"}}
    _, teacher = answers(tmp_path, [{"text": "a", "u": 0.9, "d": 0.8, "g": 0}], columns)
    assert teacher.predict(pd.DataFrame({"text": ["a"]})).tolist() == [[0.9, 0.8, 0]]
    with pytest.raises(UserError, match="line 1: probabilities must be numbers from 0 to 1, not u 1.2, d 0, g 0"):
        answers(tmp_path, [{"text": "a", "u": 1.2, "d": 0, "g": 0}], columns)
    with pytest.raises(UserError, match="answers.columns.answer: holds one label"):
        answers(tmp_path, rows, {"answer": "topics"})


# ----------------------------------------------------------------------------------------------- what a person reads


def test_labels_that_the_teacher_contradicts_and_rows_it_is_unsure_of_are_listed():
    members = np.tile(np.eye(3, dtype=bool), (8, 1))
    p = np.where(members, 0.9, 0.1)
    p[0] = [0.05, 0.1, 0.1]  # its label `up` is probably wrong
    p[23] = [0.1, 0.45, 0.9]
    rows = pd.DataFrame({"source": "x", "split": "train", "id": [str(i) for i in range(24)], "text": "t"})
    rows["label"], rows["group"] = sets_of(members, NAMES), rows["id"]
    rows.loc[22:, "split"] = "pool"
    signals = rows[["source", "split", "id"]].assign(probabilities=list(p))
    errors = find_label_errors(rows, signals, TASK)
    assert errors[["id", "label", "suggestion"]].values.tolist() == [["0", "up", NO_LABELS]]
    assert errors["probability"][0] == pytest.approx(0.95 * 0.9**2)
    to_label = find_rows_to_label(rows, signals, TASK)
    assert to_label["id"].tolist() == ["23", "22"] and to_label["margin"].tolist() == pytest.approx([0.1, 0.8])


def test_answers_that_cannot_be_read_are_no_set_that_is_predicted_too_often():
    label = pd.Series(["up", "down", "up | down", "(none)"] * 10)
    some = np.array([*label[:4], *[None] * 36], dtype=object)
    for run, words in ((some, "each label for some of them"), (np.full(40, None), "no answer to the test rows")):
        checks = find_shortcuts(ModelResult("m", "m", "teacher", "s", run[None]), label, LabelSets(["up", "down"]))
        assert len(checks) == 1 and words in checks[0].text


def test_pseudo_labels_of_several_teachers_are_sets():
    p = np.array([[[0.9, 0.8, 0.1], [0.2, 0.1, 0.3]], [[0.7, 0.6, 0.3], [0.4, 0.1, 0.9]]])
    votes = pd.DataFrame({"id": ["a", "b"], "text": "t", "x": ["up | down", NO_LABELS], "y": ["up | down", "guidance"]})
    pseudo = combine_votes(votes, p, LabelSets(["up", "down", "guidance"]))
    assert pseudo["label"].tolist() == ["up | down", "guidance"] and pseudo["agree"].tolist() == [True, False]
    np.testing.assert_allclose(pseudo["confidence"], [0.8 * 0.7 * 0.8, 0.7 * 0.9 * 0.6])
