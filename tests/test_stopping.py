"""Training that needs no luck: early stopping, `auto`, and balanced labels."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from transformers import Trainer, TrainingArguments, get_scheduler

import tiny
from distillery import losses
from distillery.config.load import validate_section
from distillery.config.schema import (
    FinetuneConfig,
    ModelConfig,
    Params,
    PhaseConfig,
    PseudoLabelFilter,
    StudentConfig,
    TeacherConfig,
)
from distillery.errors import UserError
from distillery.models.label_model import ModelOutput
from distillery.models.predictions import predict_rows, score_predictions
from distillery.tasks.schema import load_task
from distillery.teachers.finetune import finetune_teacher
from distillery.training import run
from distillery.training import validation as validation_module
from distillery.training.completions import MicroBatch, PhaseCompletions, StepCounts
from distillery.training.phase_loss import PhaseLoss
from distillery.training.progress import example_line
from distillery.training.rows import TrainingRows, phase_rows, teacher_targets
from distillery.training.run import train_phases, validation_rows
from distillery.training.sampler import BalancedSampler
from distillery.training.stopping import (
    count_optimizer_steps,
    end_sentence,
    evaluation_interval,
    is_out_of_patience,
    schedule_arguments,
)
from distillery.training.teacher_signals import TeacherSignals
from test_training import LABELS, TASK, learner, phase, toy, trained

# ------------------------------------------------------------------------------- how long a training lasts


def test_settings_without_auto_give_what_they_gave_before():
    spec = phase({"ce": 1.0}, steps=40, warmup=0.1)
    assert spec.stopping is None and count_optimizer_steps(999, spec) == 40 and spec.length == "40 steps"
    assert schedule_arguments(999, spec) == {"lr_scheduler_type": "linear", "warmup_steps": 4}
    constant = phase({"ce": 1.0}, epochs=2.0, schedule="constant", warmup=0.0)
    assert constant.length == "2 epochs" and phase({"ce": 1.0}, epochs=1.0).length == "1 epoch"
    assert schedule_arguments(32, constant) == {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0}


@pytest.mark.parametrize("length", [{"steps": 400}, {"steps": "auto", "max_steps": 400}])
def test_the_inverse_square_root_has_one_meaning_whatever_gives_the_length(length):
    """u = 100 steps: an epoch of 1600 rows."""
    spec = phase({"ce": 1.0}, schedule="inverse_sqrt", warmup=0.0, **length)
    arguments = TrainingArguments(use_cpu=True, report_to="none", **schedule_arguments(1600, spec))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_scheduler(
        arguments.lr_scheduler_type,
        optimizer,
        num_warmup_steps=arguments.warmup_steps,
        num_training_steps=400,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
    )
    rate = schedule.lr_lambdas[0]
    assert rate(300) == pytest.approx(rate(0) / 2)  # sqrt(100 / 400)


@pytest.mark.parametrize(
    ("settings", "rows", "steps", "every"),
    [
        ({"epochs": "auto"}, 1600, 2000, 100),  # 20 epochs of 100 steps, and a look each epoch
        ({"epochs": "auto", "max_epochs": 3}, 1600, 300, 100),
        ({"epochs": "auto"}, 40, 60, 20),
        ({"epochs": "auto"}, 1_000_000, 1_250_000, 500),
        ({"steps": "auto"}, 40, 2000, 20),
        ({"steps": "auto", "max_steps": 10}, 40, 10, 10),
        ({"steps": "auto", "early_stopping": {"every": 7}}, 40, 2000, 7),
        ({"steps": 50, "early_stopping": {}}, 40, 50, 20),
    ],
)
def test_auto_has_an_upper_bound_and_looks_about_once_an_epoch(settings, rows, steps, every):
    spec = PhaseConfig(data=["toy/train"], loss={"ce": 1.0}, learning_rate=1e-3, **settings)
    assert count_optimizer_steps(rows, spec) == steps and evaluation_interval(rows, spec) == every
    assert PhaseConfig.model_validate(spec.model_dump()) == spec
    assert spec.length.startswith("at most ") and spec.length.endswith("s (early stopping)")
    tuning = FinetuneConfig(on="toy/train", learning_rate=1e-3, **settings)
    assert tuning.as_phase() == spec


@pytest.mark.parametrize("metric, sign", [("macro_f1", 1), ("agreement", 1), ("loss", -1)])
def test_patience_counts_from_the_first_best_score(metric, sign):
    stopping = phase({"ce": 1.0}, teachers=["one"], early_stopping={"metric": metric, "patience": 2}).early_stopping

    def log(*scores):
        return [{"step": 10 * i, f"eval_{metric}": sign * score} for i, score in enumerate(scores, 1)]

    assert not is_out_of_patience([], stopping)
    assert not is_out_of_patience(log(0.1, 0.5, 0.4), stopping)
    assert is_out_of_patience(log(0.1, 0.5, 0.4, 0.5), stopping)  # as good is not better
    assert not is_out_of_patience(log(0.1, 0.5, 0.4, 0.6), stopping)
    assert is_out_of_patience(log(0.1, math.nan, math.nan), stopping)
    for bound, settings in (("max_steps", {"steps": "auto"}), ("max_epochs", {"epochs": "auto"})):
        spec = phase({"ce": 1.0}, **settings, teachers=["one"], early_stopping={"metric": metric, "patience": 2})
        never = end_sentence(log(math.nan, math.nan, math.nan), 90, spec)
        kept = "so the last weights are kept: lower `learning_rate`"
        assert never == f"30 of at most 90 steps; {metric} was never a number, {kept}"
        ended = end_sentence(log(0.1, 0.5, 0.4, 0.4), 90, spec)
        assert ended == f"40 of at most 90 steps; best {metric} 0.500 after 20 steps, whose weights are kept"
        assert end_sentence(log(0.1, 0.5), 20, spec).endswith(f"; its score may still have risen: raise `{bound}`")


def test_early_stopping_without_validation_rows_is_one_line(tiny_models, tmp_path):
    student, nothing = learner(tiny_models, "classifier"), TrainingRows([], np.array([], dtype=int))
    for validation in (None, nothing):
        with pytest.raises(UserError, match="^training: `early_stopping` and `auto` need validation rows, and there"):
            trained(student, toy(6), phase({"ce": 1.0}, steps="auto"), tmp_path, validation=validation)


def test_looks_at_validation_rows_change_no_weight_and_are_kept(tiny_models, tmp_path, capsys):
    """At every second step: loss and accuracy in the history, a line with their mean so far, and a training row."""
    validation, weights, histories = toy(9, seed=1), [], []
    for every in (None, 2):
        student = learner(tiny_models, "classifier", scale=4)
        spec = phase({"kl": 1.0}, steps=6, batch_size=4, learning_rate=1e-2, validate_every=every)
        rows = validation_rows(validation, TASK)
        histories.append(trained(student, toy(8), spec, tmp_path / str(every), validation=rows))
        weights.append(student.model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    plain, looked = histories
    assert "validation_loss" not in plain and looked["step"].tolist() == [2, 4, 6]
    report = score_predictions(predict_rows(student, validation), LABELS)  # at the end
    assert looked["validation_loss"].iloc[-1] == pytest.approx(report["log_loss"], abs=1e-6)
    assert looked["validation_accuracy"].iloc[-1] == report["accuracy"]
    out = capsys.readouterr().out.splitlines()
    lines = [line for line in out if "on validation rows" in line]
    accuracies = looked["validation_accuracy"].tolist()
    mean = f"{sum(accuracies) / 3:.4f}"
    loss = f"{looked['validation_loss'].iloc[-1]:.4f}"
    assert len(lines) == 3
    assert lines[-1] == (
        f"training: step 6, on validation rows loss {loss}, accuracy {accuracies[-1]:.4f}, mean of the last 3 {mean}"
    )
    shown = [line for line in out if line.startswith("row: ")]
    frame = toy(8)
    for step, line in zip((2, 4, 6), shown, strict=True):
        teacher = LABELS[int(np.argmax(frame["probabilities_one"][step]))]
        start = f"row: {frame['text'][step].strip()} | label: {frame['label'][step]} | teacher: {teacher} | student: "
        assert line.startswith(start) and line.removeprefix(start) in LABELS


def test_a_row_of_free_answers_is_shown_with_the_students_answer(tiny_models):
    """Long texts are cut."""
    task = load_task("trivia", tiny.ROOT / "tasks")
    student = learner(tiny_models, "causal", task)
    rows = TrainingRows(["who " * 99, "a b"], np.array([1, 0]), answers=["x", "y"])
    student.set_answers(rows.answers)
    first, second = example_line(student, rows, 4), example_line(student, rows, 5)
    assert first.startswith(f"row: {('who ' * 99)[:200]}… | answer: y | student: ")
    assert second == f"row: a b | answer: x | student: {student.answer_questions(['a b'])[0]}"


@pytest.mark.parametrize("names", [("one",), ("one", "two")])
def test_a_row_of_free_answers_is_shown_with_those_of_its_teachers(tiny_models, names):
    """Those that have one, by name where they are several; also of a part of the rows."""
    task = load_task("trivia", tiny.ROOT / "tasks")
    student = learner(tiny_models, "causal", task)
    frame = pd.DataFrame({"split_ref": "q/train", "text": ["a b", "c d", "e f"], "answers": ["x | y", "z", "x"]})
    for teacher in names:
        frame = frame.assign(**{f"answer_{teacher}": [f"{teacher} says", None, "no"], f"fold_{teacher}": -1})
    rows = phase_rows(frame, phase({"ce": 1.0}, data=["q/train"], teachers=list(names)), task.names)
    shown = {("one",): "teacher: one says", ("one", "two"): "teacher one: one says | teacher two: two says"}[names]
    student.set_answers(rows.answers)
    assert example_line(student, rows, 3).startswith(f"row: a b | answer: x | {shown} | student: ")
    assert example_line(student, rows, 1).startswith("row: c d | answer: z | student: ")
    assert " | answer: x | teacher" in example_line(student, rows.subset([2, 0]), 0)


def test_looks_without_validation_rows_are_one_line(tiny_models, tmp_path):
    student = learner(tiny_models, "classifier")
    with pytest.raises(UserError, match="^training: `validate_every` needs validation rows, and there are none"):
        trained(student, toy(6), phase({"ce": 1.0}, validate_every=2), tmp_path)


def test_auto_stops_by_itself_and_its_rate_falls_with_the_root_of_the_steps(tiny_models, tmp_path, capsys):
    student, other = learner(tiny_models, "classifier", scale=4), toy(12, seed=1)
    settings = {"steps": "auto", "max_steps": 400, "batch_size": 8, "learning_rate": 3e-3, "warmup": 0.1}
    validation = validation_rows(other, TASK)
    history = trained(student, toy(24), phase({"ce": 1.0}, **settings), tmp_path, validation=validation)
    last = history["step"].iloc[-1]
    assert 80 <= last < 400  # the best score comes late, and three looks after it bring no better one
    rates = history.set_index("step")["learning_rate"]
    assert rates[10] == pytest.approx(3e-3 * 9 / 20) and rates[80] == pytest.approx(3e-3 * math.sqrt(20 / 79))
    predictions = np.array(LABELS)[student.predict(other["text"].tolist()).argmax(1)]
    assert (predictions == other["label"]).mean() > 0.9
    plan, end = [line for line in capsys.readouterr().out.splitlines() if "of at most" in line or "looked" in line]
    assert plan == (
        "training: at most 400 steps; macro_f1 on 12 validation rows is looked at every 20 steps, and 3 looks without "
        "a better one end it"
    )
    assert end.startswith(f"training: {last} of at most 400 steps; best macro_f1 ") and "raise" not in end


SCORES = ("accuracy", "macro_f1", "log_loss")


class KilledError(Exception):
    """Ends a training as a signal would: nothing behind it runs."""


def test_a_killed_early_stopping_ends_like_an_unbroken_one(tiny_models, tmp_path, monkeypatch):
    """Killed while it counts evaluations without a better score, and after the last of them."""
    other = toy(12, seed=2)
    other["label"] = other["label"].sample(frac=1, random_state=1).to_list()  # fitting the rows makes these worse
    validation, save = validation_rows(other, TASK), Trainer._save_checkpoint
    stopping = {"metric": "loss", "patience": 3, "every": 4}
    spec = phase({"ce": 1.0}, steps=80, batch_size=4, learning_rate=3e-3, early_stopping=stopping, warmup=0.3)
    saved = []

    def counting(self, *args, **kwargs):
        save(self, *args, **kwargs)
        saved.append(self.state.global_step)
        if self.state.global_step == killed_at:
            raise KilledError

    monkeypatch.setattr(Trainer, "_save_checkpoint", counting)

    def run(folder):
        student = learner(tiny_models, "classifier", dropout=True, scale=3)
        history = trained(student, toy(12), spec, folder, validation=validation)
        return history, student.model.state_dict()

    killed_at = None
    history, weights = run(tmp_path / "unbroken")
    unbroken = saved.copy()
    assert unbroken[-1] < 80
    for killed_at in unbroken[-2:]:
        folder = tmp_path / str(killed_at)
        with pytest.raises(KilledError):
            run(folder)
        saved.clear()
        resumed, resumed_weights = run(folder)
        assert saved == [step for step in unbroken if step > killed_at]
        pd.testing.assert_frame_equal(resumed, history)
        assert all(torch.equal(weights[name], resumed_weights[name]) for name in weights)


def test_agreement_is_with_the_label_of_the_mixed_teachers():
    frame = toy(4)
    frame["probabilities_one"] = [[0.6, 0.4, 0.0], [0.1, 0.2, 0.7], None, None]
    frame["probabilities_two"] = [[0.0, 0.9, 0.1], None, [0.5, 0.3, 0.2], None]
    spec = phase({"kl": 1.0}, teachers=["one", "two"], early_stopping={"metric": "agreement"})
    assert teacher_targets(frame, spec, LABELS).tolist() == [1, 2, 0, -1]  # .3, .65, .05 in the first row
    sure = spec.model_copy(update={"pseudo_labels": PseudoLabelFilter(min_confidence=0.9)})
    assert teacher_targets(frame, sure, LABELS).tolist() == [1, 2, 0, -1]  # which rows teach is another question
    by_score = spec.model_copy(update={"mix": "validation"})
    assert teacher_targets(frame, by_score, LABELS, {"one": 0.9, "two": 0.1}).tolist() == [0, 2, 0, -1]
    predictions = [LABELS[1], LABELS[0], LABELS[0], LABELS[2]]
    assert validation_module.agreement(predictions, np.array([1, 2, 0, -1]), LABELS) == pytest.approx(2 / 3)


def test_early_stopping_by_agreement_sees_no_gold_label(tiny_models, tmp_path):
    """Other gold labels of the validation rows change neither where it stops nor a weight; other teachers do."""
    spec = phase(
        {"kl": 1.0},
        steps=60,
        batch_size=4,
        learning_rate=3e-3,
        early_stopping={"metric": "agreement", "patience": 3, "every": 4},
    )
    held_out = toy(12, seed=2)
    shuffled = held_out.assign(label=held_out["label"].sample(frac=1, random_state=1).to_list())
    taught = held_out.assign(probabilities_one=held_out["probabilities_one"].tolist()[::-1])

    def ended(validation: pd.DataFrame, name: str):
        student = learner(tiny_models, "classifier", scale=3)
        history, _ = train_phases(
            student,
            toy(12),
            StudentConfig(model="m", arch="classifier", phases=[spec]),
            folder=tmp_path / name,
            seed=0,
            validation=validation,
            test=validation.head(1),
        )
        predictions = predict_rows(student, validation)["prediction"]
        labels = [LABELS[int(np.argmax(p))] for p in validation["probabilities_one"]]
        return history, student.model.state_dict(), (predictions == labels).mean()

    (history, weights, agreement), (shuffled_history, same, _), (_, other, _) = (
        ended(validation, name) for validation, name in ((held_out, "gold"), (shuffled, "shuffled"), (taught, "taught"))
    )
    looks = history["validation_agreement"].dropna()
    assert 3 < len(looks) < 15 and agreement == looks.max()  # it stopped, and went back to its best look
    assert looks.tolist() == shuffled_history["validation_agreement"].dropna().tolist()
    assert history["validation_accuracy"].dropna().tolist() != shuffled_history["validation_accuracy"].dropna().tolist()
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert any(not torch.equal(weights[name], other[name]) for name in weights)


def test_agreement_needs_teachers():
    with pytest.raises(ValueError, match=r"`early_stopping: \{metric: agreement\}` needs `teachers`"):
        phase({"ce": 1.0}, early_stopping={"metric": "agreement"})
    with pytest.raises(ValueError, match="`metric: agreement` is for students, which have teachers"):
        FinetuneConfig(on="a/train", steps=1, learning_rate=1.0, early_stopping={"metric": "agreement"})


def test_a_stopped_run_without_a_score_that_is_a_number_keeps_its_last_weights(tiny_models, tmp_path, monkeypatch):
    """As it ends by itself, and as it continues when it was killed after it had stopped."""
    validation = validation_rows(toy(6, seed=1), TASK)
    stopping = {"metric": "loss", "patience": 1, "every": 2}
    spec = phase({"ce": 1.0}, steps=20, batch_size=4, early_stopping=stopping)
    monkeypatch.setattr(validation_module, "score_predictions", lambda *_: dict.fromkeys(SCORES, math.nan))
    unkilled = run.end_sentence

    def killed(*_):
        raise KilledError

    def weights(folder):
        student = learner(tiny_models, "classifier", scale=3)
        trained(student, toy(12), spec, folder, validation=validation)
        return student.model.state_dict()

    unbroken = weights(tmp_path / "unbroken")
    monkeypatch.setattr(run, "end_sentence", killed)
    with pytest.raises(KilledError):
        weights(tmp_path / "killed")
    monkeypatch.setattr(run, "end_sentence", unkilled)
    resumed = weights(tmp_path / "killed")
    assert unbroken.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in unbroken.items())


# ------------------------------------------------------------------------------- rare labels


def test_weights_of_rows_with_one_label_are_those_of_scikit_learn():
    labels = np.array([0] * 7 + [1] * 2 + [3])
    expected = compute_class_weight("balanced", classes=np.unique(labels), y=labels)
    weights = losses.balanced_weights(torch.nn.functional.one_hot(torch.from_numpy(labels)))
    np.testing.assert_allclose(weights, expected[np.searchsorted(np.unique(labels), labels)], rtol=1e-6)
    with pytest.raises(ValueError, match=r"labels must be \[n > 0, K\], not \[0, 3\]"):
        losses.balanced_weights(torch.zeros(0, 3))


def test_weights_of_distributions_are_expectations_and_traces_count_as_one_row():
    q = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.1, 0.9]]).double()
    n = q.sum(0)  # 2.5 and 1.5
    expected = (q / n).sum(-1)
    torch.testing.assert_close(losses.balanced_weights(q).double(), expected / expected.mean(), rtol=1e-6, atol=0)
    traces = torch.cat([torch.tensor([[1e-6], [0.0], [0.0], [0.0]]), q], 1)
    assert losses.balanced_weights(traces).max() < 3


def test_rows_without_a_gold_label_weigh_by_their_teachers():
    frame = toy(6)
    frame.loc[3:, "split_ref"], frame.loc[3:, "label"] = "toy/pool", None
    both = phase({"kl": 1.0}, data=["toy/train", "toy/pool"], teachers=["one"])
    rows = phase_rows(frame, both, LABELS)
    one_hot, one = np.eye(3), np.stack(frame["probabilities_one"].to_list())
    np.testing.assert_allclose(rows.label_distributions(), np.concatenate([one_hot, one[3:]]), atol=1e-6)
    gold = phase_rows(frame, phase({"ce": 1.0}), LABELS)
    np.testing.assert_allclose(gold.label_distributions(), one_hot)


def test_class_weights_weigh_each_term_over_labels_row_by_row():
    rng = np.random.default_rng(0)
    logits, p = torch.from_numpy(rng.normal(size=(5, 3))), torch.from_numpy(rng.dirichlet(np.ones(3), 5))
    rows = TrainingRows(list("abcde"), np.array([0, 0, 0, 1, 2]), logprobs=p.log())
    spec = phase({"ce": 0.3, "kl": 0.7}, temperature=2.0, balance="class_weights")
    student = type("Student", (), {"arch": "classifier", "model": None})()
    loss = PhaseLoss(spec, rows, PhaseCompletions(student, rows, spec), TeacherSignals(spec, rows, {}, student, 0))
    batches = [MicroBatch([0, 3]), MicroBatch([1, 2, 4])]
    counts = StepCounts.of(batches)
    values = [loss(ModelOutput(logits[batch.rows]), batch, counts)[0].item() for batch in batches]
    weights = torch.tensor([5 / 9, 5 / 9, 5 / 9, 5 / 3, 5 / 3])
    ce = -logits.log_softmax(-1)[range(5), rows.targets]
    q, t = (logits / 2).log_softmax(-1), p.sqrt() / p.sqrt().sum(-1, keepdim=True)
    kl = 4 * (t * (t.log() - q)).sum(-1)
    assert sum(values) == pytest.approx((weights * (0.3 * ce + 0.7 * kl)).mean().item(), rel=1e-6)


@pytest.mark.parametrize("term", ["ce", "kl", "uld"])
def test_class_weights_weigh_every_token_of_a_row(term):
    rng = np.random.default_rng(0)
    logits, stored = (torch.from_numpy(rng.normal(size=(4, 4))).log_softmax(-1) for _ in range(2))
    teachers = [] if term == "ce" else ["one"]
    ones = {"one": torch.ones(3).double()}
    rows = TrainingRows(list("abc"), np.array([0, 1, 1]), teacher_weights=ones)
    space = {"space": "vocabulary"} if term == "kl" else {}
    spec = phase({term: 1.0}, teachers=teachers, balance="class_weights", **space)
    by_row = [[([5, 6], 0)], [([7], 0)], [([8], 0)]]
    completions = type("Completions", (), {"by_row": by_row, "offsets": np.arange(4)})()
    signals = TeacherSignals.__new__(TeacherSignals)
    signals.phase, signals.rows = spec, rows
    outputs = {"completion_lengths": [2, 1, 1], "logprobs": lambda self, rows: stored}
    signals.outputs = {"one": type("Outputs", (), outputs)()}
    batch = MicroBatch([0, 1, 2], by_row)
    nll = -logits[range(4), [0, 1, 2, 3]]
    output = ModelOutput(completion_logits=logits, completion_nll=nll)
    loss, _ = PhaseLoss(spec, rows, completions, signals)(output, batch, StepCounts.of([batch]))
    values = {"kl": losses.kl, "uld": losses.universal_logit_distance}[term](logits, stored) if teachers else nll
    weights = torch.tensor([3 / 2, 3 / 2, 3 / 4, 3 / 4])  # of labels with one row and with two
    assert loss.item() == pytest.approx((weights * values).sum().item() / 4, rel=1e-6)


def test_free_answers_have_no_labels_to_balance():
    rows = TrainingRows(["a"], np.array([0]), answers=["x"])
    for balance in ("class_weights", "batches"):
        with pytest.raises(UserError, match="^balance: answers are free text, not labels; leave it out$"):
            PhaseLoss(phase({"ce": 1.0}, balance=balance), rows, None, None)


@pytest.mark.parametrize("batch", [3, 4, 16])
def test_a_balanced_batch_holds_as_many_rows_of_each_label(batch):
    labels = np.array([0] * 90 + [1] * 8 + [4] * 3)
    lengths = np.random.default_rng(0).integers(5, 60, len(labels)).tolist()
    sampler, rows = BalancedSampler(lengths, batch, 0, labels), []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        drawn = list(sampler)
        assert drawn == list(sampler) and len(drawn) == len(sampler) == 101
        for start in range(0, 101 - batch, batch):
            counts = [(labels[drawn[start : start + batch]] == label).sum() for label in (0, 1, 4)]
            assert max(counts) - min(counts) <= 1
        assert set(drawn) >= set(range(90, 101))  # every row of the rare labels
        rows.append(drawn)
    assert rows[0] != rows[1] and len({i for drawn in rows for i in drawn if i < 90}) > 70
    assert list(BalancedSampler(lengths, batch, 1, labels)) != rows[0]


def test_a_teacher_is_tuned_with_balanced_batches_until_it_stops_improving(tiny_models, tmp_path, capsys, monkeypatch):
    finetune = {"on": "toy/train", "steps": "auto", "max_steps": 20, "learning_rate": 1e-3, "balance": "batches"}
    spec = TeacherConfig(kind="classifier", model="small", finetune=FinetuneConfig(**finetune))
    origin = ModelConfig(folder=str(tiny_models / "tiny-bert"))
    params = Params.model_construct(teachers={"small": spec}, models={"small": origin})
    micro_batch = PhaseCompletions.micro_batch
    rows, rare, batches = toy(9).assign(label=[LABELS[0]] * 8 + [LABELS[1]]), 8, []

    def recorded_batch(self, drawn, *args):
        batches.append(drawn)
        return micro_batch(self, drawn, *args)

    monkeypatch.setattr(PhaseCompletions, "micro_batch", recorded_batch)
    for watched in (toy(6, 1), toy(6, 2)):
        teacher, history = finetune_teacher("small", params, TASK, rows, folder=tmp_path, validation=watched)
        assert history["step"].tolist() == [10, 20]
    assert len(batches) == 2 * 20 and all(drawn.count(rare) in (4, 5) for drawn in batches)  # of the 9 of an epoch
    assert teacher.predict(["profit"]).shape == (1, 3)
    assert capsys.readouterr().out.count("macro_f1 on 6 validation rows is looked at every 20 steps") == 2
    assert len(list(tmp_path.iterdir())) == 2  # other validation rows are another training
    assert validate_section(TeacherConfig, spec.model_dump(), "x") == spec
