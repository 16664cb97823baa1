"""The rows that a student chooses by its own predictions at the start of a phase."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError

import tiny
from distillery.config.schema import PhaseConfig, StudentConfig
from distillery.errors import UserError
from distillery.models.label_model import LabelModel
from distillery.tasks.schema import ANSWER_LABELS, load_task
from distillery.training.active import row_scores, select_rows
from distillery.training.rows import TrainingRows, phase_rows
from distillery.training.run import train_phases
from distillery.training.student import build_student

TASK = load_task("finance-sentiment", tiny.ROOT / "tasks")
TEXTS = tiny.texts()[:12]


def phase(**more) -> PhaseConfig:
    settings = {"data": ["a/pool"], "teachers": ["t"], "loss": {"kl": 1.0}, "steps": 6, "batch_size": 4}
    return PhaseConfig(**(settings | {"learning_rate": 1e-2, "select": {"by": "doubt", "share": 0.5}} | more))


def frame(seed: int = 0) -> pd.DataFrame:
    p = np.random.default_rng(seed).dirichlet([0.5] * 3, len(TEXTS)).astype(np.float32)
    return pd.DataFrame({"text": TEXTS, "split_ref": "a/pool", "label": None, "probabilities_t": list(p)}).assign(
        id=[str(i) for i in range(len(TEXTS))], fold_t=-1
    )


@pytest.fixture
def student(tiny_models) -> LabelModel:
    spec = StudentConfig(model="m", arch="classifier", phases=[])
    model = build_student(spec, tiny_models / "tiny-bert", TASK, 0)
    for weight in model.model.parameters():  # so that its predictions differ from row to row
        weight.data.mul_(6 if weight.dim() > 1 else 1)
    return model


# ------------------------------------------------------------------------------- scores

P = np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [1 / 3, 1 / 3, 1 / 3]])


def test_doubt_is_the_entropy_of_the_prediction():
    rows = TrainingRows(["a", "b", "c"], np.zeros(3, dtype=int))
    np.testing.assert_allclose(row_scores(P, rows, "doubt"), [0, np.log(2), np.log(3)], atol=1e-9)


def test_disagreement_is_the_divergence_from_the_teachers():
    rows = TrainingRows(
        ["a", "b", "c"], np.zeros(3, dtype=int), torch.tensor(np.eye(3)[[0, 0, 0]]).clamp_min(1e-30).log()
    )
    np.testing.assert_allclose(row_scores(P, rows, "disagreement"), [0, np.log(2), np.log(3)], atol=1e-9)


def test_scores_of_label_sets_add_up_over_the_labels():
    yes = np.array([[0.5, 0.5], [1.0, 0.5], [1.0, 0.0]])
    teacher = np.stack([1 - yes[::-1], yes[::-1]], -1)
    rows = TrainingRows(["a", "b", "c"], (yes > 0.5).astype(float), torch.tensor(teacher).clamp_min(1e-30).log())
    np.testing.assert_allclose(row_scores(yes, rows, "doubt"), [2 * np.log(2), np.log(2), 0], atol=1e-9)
    expected = [2 * np.log(2), 0, np.inf]  # the student rules out what the teachers find as likely as not
    scores = row_scores(yes, rows, "disagreement")
    np.testing.assert_allclose(scores[:2], expected[:2], atol=1e-9)
    assert scores[2] > 20


# ------------------------------------------------------------------------------- choice


def test_the_rows_of_highest_score_are_kept_in_their_order(student, tmp_path, capsys):
    wanted = phase(select={"by": "disagreement", "share": 0.4})
    rows = phase_rows(frame(), wanted, TASK.names)
    scores = row_scores(student.predict(TEXTS), rows, "disagreement")
    chosen = select_rows(student, rows, wanted, tmp_path / "rows.json", "phase 1 of 1")
    best = sorted(np.argsort(-scores)[:5])  # 0.4 of 12, rounded up
    assert chosen.texts == [TEXTS[i] for i in best]
    line = f"phase 1 of 1: 5 of 12 rows by disagreement: {scores[best].mean():.3f} nats on average, {scores.mean():.3f}"
    assert capsys.readouterr().out == f"{line} of all rows\n"
    for weight in student.model.classifier.parameters():  # trained since: a run that continues keeps its choice
        weight.data.mul_(-3)
    assert select_rows(student, rows, wanted, tmp_path / "rows.json", "").texts == chosen.texts
    assert select_rows(student, rows, wanted, tmp_path / "new.json", "").texts != chosen.texts


def test_of_equal_scores_the_first_rows_are_kept(student, tmp_path):
    for weight in student.model.classifier.parameters():
        weight.data.zero_()
    rows = phase_rows(frame(), wanted := phase(), TASK.names)
    assert select_rows(student, rows, wanted, tmp_path / "rows.json", "").texts == TEXTS[:6]
    assert select_rows(student, rows, phase(select=None), tmp_path / "none.json", "") is rows


def test_a_subset_has_every_column_of_its_rows():
    n = 5
    rows = TrainingRows(
        texts=list("abcde"),
        targets=np.arange(n),
        logprobs=torch.arange(2.0 * n).view(n, 2),
        rationales=[None, "b", None, "d", "e"],
        teacher_weights={"t": torch.arange(n)},
        teacher_folds={"t": list(range(n))},
        label_prior=torch.tensor([1.0, 2.0]),
        answers=["x", "y"],
        accepted_answers=list("vwxyz"),
        teacher_answers={"t": [None, *"wxyz"]},
        n_options=list(range(n)),
        gold=np.array([True, False, True, False, True]),
        ids=[("a", str(i)) for i in range(n)],
        teacher_targets=np.array([4, 3, 2, -1, 0]),
    )
    part = rows.subset([3, 1])
    assert all(getattr(rows, field.name) is not None for field in fields(rows))
    assert part.texts == ["d", "b"] and part.targets.tolist() == [3, 1] and part.logprobs.tolist() == [[6, 7], [2, 3]]
    assert part.rationales == ["d", "b"] and part.teacher_weights["t"].tolist() == part.teacher_folds["t"] == [3, 1]
    assert part.accepted_answers == ["y", "w"] and part.n_options == [3, 1] and part.ids == [("a", "3"), ("a", "1")]
    assert part.teacher_targets.tolist() == [-1, 3]
    assert part.gold.tolist() == [False, False] and part.answers == ["x", "y"] and part.label_prior.tolist() == [1, 2]


# ------------------------------------------------------------------------------- training


def test_each_phase_chooses_anew_and_a_second_run_chooses_the_same(tiny_models, tmp_path, monkeypatch):
    chosen: dict[str, list[list[str]]] = {}
    spec = StudentConfig(model="m", arch="classifier", phases=[phase(), phase(), phase(select=None)])
    held_out = frame().assign(label="neutral")[["id", "text", "label"]].head(3)
    for run in ("one", "two"):
        rows_of_phases = chosen.setdefault(run, [])
        original = train_phases.__globals__["train_phase"]

        def watched(student, rows, *args, _into=rows_of_phases, _train=original, **more):
            _into.append(rows.texts)
            return _train(student, rows, *args, **more)

        with monkeypatch.context() as patched:
            patched.setitem(train_phases.__globals__, "train_phase", watched)
            model = build_student(spec, tiny_models / "tiny-bert", TASK, 0)
            train_phases(model, frame(), spec, folder=tmp_path / run, seed=0, validation=held_out, test=held_out)
    first, second, third = chosen["one"]
    assert chosen["two"] == chosen["one"]
    assert len(first) == len(second) == 6 and third == TEXTS
    assert first != second


# ------------------------------------------------------------------------------- mistakes


def test_disagreement_needs_teachers():
    with pytest.raises(ValidationError, match="`select: {by: disagreement}` needs `teachers`"):
        phase(teachers=[], loss={"ce": 1.0}, select={"by": "disagreement"})


def test_free_answers_have_no_doubt():
    rows = frame().assign(answer_t="x", answers=None)
    with pytest.raises(UserError, match="phases: select: answers are free text, not labels"):
        phase_rows(rows, phase(loss={"ce": 1.0}), list(ANSWER_LABELS))
