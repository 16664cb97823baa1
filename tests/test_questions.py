"""Questions with free answers: training, generated answers and their scores; and alerts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from distillery import metrics
from distillery.config.schema import PhaseConfig
from distillery.errors import UserError
from distillery.evaluation.speed import probability_function
from distillery.models.label_model import LabelModel
from distillery.models.load import load_model, load_tokenizer
from distillery.models.predictions import find_alerts, predict_rows, score_answers, score_predictions
from distillery.tasks.schema import Task
from distillery.training.openable_teachers import OpenableTeacher
from distillery.training.rows import phase_rows
from distillery.training.run import train_phase, validation_rows

TASK = Task(kind="qa", prompt={"instruction": "Answer.", "template": "{text}"})
PHASE = {"data": ["q/train"], "loss": {"ce": 1.0}, "steps": 60, "batch_size": 4, "learning_rate": 1.0e-2}
QUESTIONS = pd.DataFrame(
    {
        "split_ref": "q/train",
        "id": ["a", "b", "c", "d"],
        "text": ["profit quarter", "sales year", "company share", "market price"],
        "label": "right",
        "answers": ["net sales | sales", "operating profit", "the board", "EUR"],
    }
)


def student(folder) -> LabelModel:
    model = load_model(folder, "causal", layers="first-2")
    return LabelModel(model, load_tokenizer(folder), TASK, "causal", prompt="plain")


def test_a_student_learns_to_write_the_answers(tiny_models, tmp_path):
    model = student(tiny_models / "tiny-llama")
    before = score_predictions(predict_rows(model, QUESTIONS), TASK.names)
    rows = phase_rows(QUESTIONS, PhaseConfig(**PHASE), TASK.names)
    assert [rows.answers[i] for i in rows.targets] == ["net sales", "operating profit", "the board", "EUR"]
    train_phase(model, rows, PhaseConfig(**PHASE), folder=tmp_path, seed=0)
    predictions = predict_rows(model, QUESTIONS)
    assert predictions["answer"].tolist() == ["net sales", "operating profit", "the board", "EUR"]
    after = score_predictions(predictions, TASK.names)
    assert before["exact_match"] == 0 < after["exact_match"] == after["accuracy"] == after["token_f1"] == 1


def answer_loss(model: LabelModel, rows: pd.DataFrame) -> float:
    """The mean over the tokens of the first accepted answers, row by row with the model's own forward pass."""
    nll, n = 0.0, 0
    for text, accepted in zip(rows["text"], rows["answers"], strict=True):
        (prompt,) = model.encode([text])
        answer = model.tokenizer(f" {accepted.split(' | ')[0]}", add_special_tokens=False)["input_ids"]
        answer = [*answer, model.tokenizer.eos_token_id]
        if model.arch == "causal":
            logits = model.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        else:
            logits = model.model(input_ids=torch.tensor([prompt]), labels=torch.tensor([answer])).logits[0]
        nll -= logits.log_softmax(-1)[range(len(answer)), answer].sum().item()
        n += len(answer)
    return nll / n


@pytest.mark.parametrize("arch, on_policy", [("causal", 0.0), ("causal", "adaptive"), ("seq2seq", 0.0)])
def test_the_gold_answers_of_validation_rows_have_a_loss(tiny_models, tmp_path, capsys, arch, on_policy):
    """In the history and the printed lines; early stopping and the on-policy share follow it."""
    folder = tiny_models / ("tiny-llama" if arch == "causal" else "tiny-t5")
    more = {"early_stopping": {"metric": "loss", "patience": 9, "every": 2}, "steps": 4}
    if on_policy:
        more |= {"loss": {"kl": 1.0}, "space": "vocabulary", "teachers": ["one"], "on_policy": on_policy}
    spec = PhaseConfig(**PHASE | more | {"max_new_tokens": 3})
    model = LabelModel(load_model(folder, arch), load_tokenizer(folder), TASK, arch, prompt="plain", batch_size=2)
    held_out = QUESTIONS.iloc[[3, 1, 0]].reset_index(drop=True).assign(answers=["no one | EUR", "sales", None])
    rows = phase_rows(QUESTIONS.assign(answer_one="x", fold_one=-1), spec, TASK.names)
    teachers = (
        {"one": OpenableTeacher(lambda _: student(folder), ["one"], 4, tmp_path / "outputs")} if on_policy else {}
    )
    validation = validation_rows(held_out, TASK)
    history = train_phase(model, rows, spec, folder=tmp_path, seed=0, validation=validation, teachers=teachers)
    assert history["step"].tolist() == [2, 4] and history["validation_loss"].notna().all()
    printed = capsys.readouterr().out
    assert f"on validation rows loss {history['validation_loss'].iloc[-1]:.4f}, accuracy 0.0000" in printed
    expected = history["validation_loss"].min()  # of the weights that early stopping went back to
    assert f"; best loss {expected:.3f} after" in printed
    model.model.eval()
    assert answer_loss(model, held_out.iloc[:2]) == pytest.approx(expected, abs=1e-4)
    assert len(model.label_token_ids) == len(rows.answers)  # the labels stay those of the training


def test_answers_and_a_teachers_distribution_over_their_tokens_are_learned_together(tiny_models, tmp_path):
    """Of the likeliest tokens alone, each row from the fold that did not learn from it: both terms fall."""

    def open_fold(fold: int) -> LabelModel:
        teacher = student(tiny_models / "tiny-llama")
        generator = torch.Generator().manual_seed(fold)
        for weights in teacher.model.parameters():
            weights.data += 0.1 * torch.randn(weights.shape, generator=generator)
        return teacher

    frame = QUESTIONS.assign(answer_one=None, fold_one=[0, 1, 0, 1])
    settings = {"loss": {"ce": 0.5, "kl": 0.5}, "space": "vocabulary", "top_k": 4, "teachers": ["one"], "steps": 20}
    phase = PhaseConfig(**PHASE | settings)
    teachers = {"one": OpenableTeacher(open_fold, ["one"], 4, tmp_path / "outputs")}
    rows = phase_rows(frame, phase, TASK.names)
    model = student(tiny_models / "tiny-llama")
    history = train_phase(model, rows, phase, folder=tmp_path / "run", seed=0, teachers=teachers)
    first, last = history.iloc[0], history.iloc[-1]
    assert 0 < last["kl"] < first["kl"] and last["ce"] < first["ce"]
    assert last["loss"] == pytest.approx(0.5 * last["ce"] + 0.5 * last["kl"], rel=1e-3)


@pytest.mark.parametrize(
    "changes, key",
    [
        ({"loss": {"ce": 1.0, "rationale": 1.0}}, "loss.rationale"),
        ({"loss": {"kl": 1.0}, "teachers": ["one"]}, "loss.kl"),
        ({"teachers": ["one"], "pseudo_labels": {"min_confidence": 0.5}}, "pseudo_labels"),
        ({"teachers": ["one", "two"], "mix": "validation"}, "mix"),
        ({"teachers": ["one"], "order": "confidence"}, "order: confidence"),
    ],
)
def test_settings_that_need_labels_are_refused(changes, key):
    with pytest.raises(UserError, match=f"^phases: {key}: answers are free text"):
        phase_rows(QUESTIONS, PhaseConfig(**PHASE | changes), TASK.names)


def test_answers_are_scored_against_all_accepted_ones():
    rows = QUESTIONS.assign(answers=["net sales | sales", "operating profit", None, "EUR"])
    scores = score_answers(rows, ["The sales.", "profit of the quarter", "whatever", ""])
    assert scores["prediction"].tolist() == ["right", "wrong", "wrong", "wrong"]
    assert scores["probabilities"].map(list).tolist() == [[1, 0], [0, 1], [0, 1], [0, 1]]
    # "profit of the quarter" without its article: 1 of 3 words, 1 of 2 wanted
    np.testing.assert_allclose(
        scores.loc[1, ["token_f1", "token_precision", "token_recall"]].tolist(), [0.4, 1 / 3, 0.5]
    )
    assert scores["token_f1"].tolist()[2:] == [0, 0]


def test_the_best_accepted_answer_counts():
    assert metrics.token_overlap("a red fox", ["wolf", "fox", "red fox cub"]) == pytest.approx((0.8, 1.0, 2 / 3))
    assert metrics.token_overlap(None, ["fox"]) == (0, 0, 0)
    with pytest.raises(ValueError, match="at least one alias"):
        metrics.token_overlap("fox", [])


def test_without_gold_the_teachers_answer_is_learned():
    answers = ["from the teacher", None, "cash", "debt"]
    rows = QUESTIONS.assign(answers=[None, "own", None, None], answer_t=answers, fold_t=-1)
    training_rows = phase_rows(rows, PhaseConfig(**PHASE | {"teachers": ["t"]}), TASK.names)
    assert [training_rows.answers[i] for i in training_rows.targets] == ["from the teacher", "own", "cash", "debt"]
    with pytest.raises(UserError, match="1 rows of q/train have no answer"):
        phase_rows(rows.assign(answer_t=[*answers[:3], ""]), PhaseConfig(**PHASE | {"teachers": ["t"]}), TASK.names)


@pytest.mark.parametrize(
    ("change", "key"), [({"loss": {"kl": 1.0}}, "loss.kl"), ({"order": "confidence"}, "order: confidence")]
)
def test_settings_that_need_labels_are_refused_in_one_line(change, key):
    phase = PhaseConfig(**PHASE | {"teachers": ["t"]} | change)
    with pytest.raises(UserError, match=rf"^phases: {key}: answers are free text, not labels") as caught:
        phase_rows(QUESTIONS.assign(answer_t="x", fold_t=-1), phase, TASK.names)
    assert "\n" not in str(caught.value)


def test_questions_have_answers_and_no_distribution_over_labels(tiny_models):
    model, texts = student(tiny_models / "tiny-llama"), QUESTIONS["text"].tolist()
    with pytest.raises(ValueError, match="^predict: a `qa` task has no distribution over labels"):
        model.predict(texts)
    assert probability_function(model)(QUESTIONS) == model.answer_questions(texts)  # what is timed


def test_a_classifier_writes_no_answers(tiny_models):
    folder = tiny_models / "tiny-bert"
    model = load_model(folder, "classifier", labels=TASK.names)
    with pytest.raises(UserError, match="a classifier writes no answers"):
        LabelModel(model, load_tokenizer(folder), TASK, "classifier")


def test_alerts_carry_confidence_and_severity():
    task = Task(kind="classification", labels={"risk": "", "care": "", "safe": ""}, severity={"risk": 1.0, "care": 0.5})
    p = [[0.1, 0.2, 0.7], [0.5, 0.4, 0.1], [0.2, 0.8, 0.0]]
    predictions = pd.DataFrame({"id": ["a", "b", "c"], "prediction": ["safe", "risk", "care"], "probabilities": p})
    alerts = find_alerts(predictions, task)
    assert alerts[["id", "alert"]].to_numpy().tolist() == [["b", "risk"], ["c", "care"]]
    np.testing.assert_allclose(alerts[["confidence", "severity"]], [[0.5, 0.7], [0.8, 0.6]])
    assert find_alerts(predictions.head(0), task).empty
