"""Questions with free answers: what is learned, what is written, and how it is scored."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from distillery import metrics, models, params, tasks, training
from distillery.params import UserError

TASK = tasks.Task(kind="qa", prompt={"instruction": "Answer.", "template": "{text}"})
PHASE = {"data": ["q/train"], "loss": {"ce": 1.0}, "steps": 60, "batch_size": 4, "learning_rate": 1.0e-2}
QUESTIONS = pd.DataFrame(
    {
        "where": "q/train",
        "id": ["a", "b", "c", "d"],
        "text": ["profit quarter", "sales year", "company share", "market price"],
        "label": "right",
        "answers": ["net sales | sales", "operating profit", "the board", "EUR"],
    }
)


def student(folder, **more) -> models.LabelModel:
    model = models.load(folder, "causal", layers="first-2")
    return models.LabelModel(model, models.load_tokenizer(folder), TASK, "causal", prompt="plain", **more)


def test_a_student_learns_to_write_the_answers(tiny_models, tmp_path):
    model = student(tiny_models / "tiny-llama")
    before = training.scores(training.predicted(model, QUESTIONS), TASK.names)
    rows = training.phase_rows(QUESTIONS, params.Phase(**PHASE), TASK.names)
    assert [rows.answers[i] for i in rows.targets] == ["net sales", "operating profit", "the board", "EUR"]
    training.run_phase(model, rows, params.Phase(**PHASE), folder=tmp_path, seed=0)
    said = training.predicted(model, QUESTIONS)
    assert said["answer"].tolist() == ["net sales", "operating profit", "the board", "EUR"]
    after = training.scores(said, TASK.names)
    assert before["exact_match"] == 0 < after["exact_match"] == after["accuracy"] == after["token_f1"] == 1


@pytest.mark.parametrize(
    "more, told",
    [
        ({"loss": {"ce": 1.0, "rationale": 1.0}}, "loss.rationale"),
        ({"loss": {"kl": 1.0}, "teachers": ["one"]}, "loss.kl"),
        ({"teachers": ["one"], "take": {"confidence": 0.5}}, "take"),
        ({"teachers": ["one", "two"], "mix": "validation"}, "mix"),
        ({"teachers": ["one"], "order": "confidence"}, "order: confidence"),
    ],
)
def test_what_needs_labels_is_refused(more, told):
    with pytest.raises(UserError, match=f"^phases: {told}: answers are free text"):
        training.phase_rows(QUESTIONS, params.Phase(**PHASE | more), TASK.names)


def test_answers_are_judged_by_all_that_are_accepted():
    rows = QUESTIONS.assign(answers=["net sales | sales", "operating profit", None, "EUR"])
    said = training.judged(rows, ["The sales.", "profit of the quarter", "whatever", ""])
    assert said["prediction"].tolist() == ["right", "wrong", "wrong", "wrong"]
    assert said["probabilities"].map(list).tolist() == [[1, 0], [0, 1], [0, 1], [0, 1]]
    # "profit of the quarter" without its article: 1 of 3 words, 1 of 2 wanted
    np.testing.assert_allclose(said.loc[1, ["token_f1", "token_precision", "token_recall"]].tolist(), [0.4, 1 / 3, 0.5])
    assert said["token_f1"].tolist()[2:] == [0, 0]


def test_the_best_accepted_answer_counts():
    assert metrics.token_overlap("a red fox", ["wolf", "fox", "red fox cub"]) == pytest.approx((0.8, 1.0, 2 / 3))
    assert metrics.token_overlap(None, ["fox"]) == (0, 0, 0)
    for text in ("fox", "the fox ran", "", "cub cub"):
        f1, _, _ = metrics.token_overlap(text, ["fox", "fox cub"])
        assert f1 == pytest.approx(metrics.token_f1(text, ["fox", "fox cub"]))
    with pytest.raises(ValueError, match="at least one alias"):
        metrics.token_overlap("fox", [])


def test_without_gold_the_teachers_answer_is_learned():
    told = ["from the teacher", None, "cash", "debt"]
    rows = QUESTIONS.assign(answers=[None, "own", None, None], answer_t=told, fold_t=-1)
    learned = training.phase_rows(rows, params.Phase(**PHASE | {"teachers": ["t"]}), TASK.names)
    assert [learned.answers[i] for i in learned.targets] == ["from the teacher", "own", "cash", "debt"]
    with pytest.raises(UserError, match="1 rows of q/train have no answer"):
        training.phase_rows(
            rows.assign(answer_t=[*told[:3], ""]), params.Phase(**PHASE | {"teachers": ["t"]}), TASK.names
        )


@pytest.mark.parametrize(
    ("change", "what"), [({"loss": {"kl": 1.0}}, "loss.kl"), ({"order": "confidence"}, "order: confidence")]
)
def test_what_needs_labels_is_refused_in_one_line(change, what):
    phase = params.Phase(**PHASE | {"teachers": ["t"]} | change)
    with pytest.raises(UserError, match=rf"^phases: {what}: answers are free text, not labels") as caught:
        training.phase_rows(QUESTIONS.assign(answer_t="x", fold_t=-1), phase, TASK.names)
    assert "\n" not in str(caught.value)


def test_a_classifier_writes_no_answers(tiny_models):
    folder = tiny_models / "tiny-bert"
    model = models.load(folder, "classifier", labels=TASK.names)
    with pytest.raises(UserError, match="a classifier writes no answers"):
        models.LabelModel(model, models.load_tokenizer(folder), TASK, "classifier")


def test_alerts_carry_confidence_and_severity():
    task = tasks.Task(
        kind="classification", labels={"risk": "", "care": "", "safe": ""}, severity={"risk": 1.0, "care": 0.5}
    )
    p = [[0.1, 0.2, 0.7], [0.5, 0.4, 0.1], [0.2, 0.8, 0.0]]
    said = pd.DataFrame({"id": ["a", "b", "c"], "prediction": ["safe", "risk", "care"], "probabilities": p})
    found = training.alerts(said, task)
    assert found[["id", "alert"]].to_numpy().tolist() == [["b", "risk"], ["c", "care"]]
    np.testing.assert_allclose(found[["confidence", "severity"]], [[0.5, 0.7], [0.8, 0.6]])
    assert training.alerts(said.head(0), task).empty
