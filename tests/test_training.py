"""Training: rows and their order, the loss by hand, accumulation, resuming after a kill, and the finished folder."""

from __future__ import annotations

import gc
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

import tiny
from distillery import losses, metrics
from distillery.config.schema import FinetuneConfig, PhaseConfig, StudentConfig
from distillery.errors import UserError
from distillery.models import last_layer
from distillery.models.fast_cpu import BitDropout, restore_full_embedding
from distillery.models.label_model import LabelModel, ModelOutput
from distillery.models.load import load_model, load_tokenizer
from distillery.models.predictions import predict_rows, score_predictions
from distillery.models.save import save_model
from distillery.report.model_card import render_card
from distillery.tasks.prompts import chat_turns, render_prompt
from distillery.tasks.schema import Task, TaskPrompt, load_task
from distillery.training import on_policy, trainers
from distillery.training.completions import ANSWER, RATIONALE, SAMPLED, MicroBatch, PhaseCompletions, StepCounts
from distillery.training.disk import disk_need, size_text
from distillery.training.on_policy import (
    EarlierAnswers,
    on_policy_share,
    uses_earlier_answers,
)
from distillery.training.openable_teachers import OpenableTeacher
from distillery.training.phase_loss import PhaseLoss
from distillery.training.rows import TrainingRows, phase_rows
from distillery.training.run import last_whole_checkpoint, run_key, train_phase, train_phases
from distillery.training.sampler import LengthGroupedSampler
from distillery.training.stopping import count_optimizer_steps
from distillery.training.student import build_student, load_student
from distillery.training.teacher_outputs import teacher_outputs_key
from distillery.training.teacher_signals import TeacherSignals
from distillery.training.trainers import OnPolicyTrainer, PhaseTrainerMixin, build_trainer
from forked import fork_context

TASK = load_task("finance-sentiment", tiny.ROOT / "tasks")
LABELS = TASK.names
SHORT = TASK.model_copy(update={"prompt": TaskPrompt(template="{text}")})  # a tiny model learns it in seconds
# answers of different lengths, so that a mean over tokens is no mean over rows
WORDS = SHORT.model_copy(
    update={"verbalizer": {"positive": "profit", "neutral": "profit rose", "negative": "net loss"}}
)
SENTENCES = ("Operating profit rose.", "The meeting will be held in May.", "Sales fell and the loss grew.")


def toy(n: int, seed: int = 0) -> pd.DataFrame:
    """Rows that a student can tell apart, with two teachers with different distributions for them."""
    rng = np.random.default_rng(seed)
    fillers = ["in", "the", "quarter", "of", "year", "this", "last", "company", "group", "said", "on", "Monday"]
    texts = [f"{SENTENCES[i % 3]} {' '.join(rng.choice(fillers, rng.integers(0, 6)))}" for i in range(n)]
    frame = pd.DataFrame({"split_ref": "toy/train", "id": [f"t{i}" for i in range(n)], "text": texts})
    frame["label"] = [LABELS[i % 3] for i in range(n)]
    for name in ("one", "two"):
        frame[f"probabilities_{name}"] = list(rng.dirichlet(np.ones(3), n))
    return frame


def phase(loss: dict[str, float], **more) -> PhaseConfig:
    given = {"data": ["toy/train"], "loss": loss, "learning_rate": 1e-3, "warmup": 0.0}
    if set(loss) - {"ce"} and "teachers" not in more:
        given["teachers"] = ["one"]
    if "epochs" not in more:
        given["steps"] = 1
    return PhaseConfig(**given | more)


KINDS = {"classifier": "bert", "causal": "llama", "seq2seq": "t5"}


def teacher(folder: Path, arch: str, task: Task = TASK, seed: int = 1, prompt: str = "plain") -> LabelModel:
    """A model of the student's shape with other weights, large enough to have an opinion."""
    model = load_model(folder / f"tiny-{KINDS[arch]}", arch, labels=LABELS)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.15
        elif "LayerNorm.weight" in name:  # or all states have the same length
            parameter.data = torch.rand(parameter.shape, generator=generator) * 2
    tokenizer = load_tokenizer(folder / f"tiny-{KINDS[arch]}")
    return LabelModel(model.eval(), tokenizer, task, arch, prompt=prompt)


def openable_teachers(folder: Path, cache: Path, **archs: str) -> dict[str, OpenableTeacher]:
    def openable(name: str, arch: str, seed: int) -> OpenableTeacher:
        return OpenableTeacher(lambda fold: teacher(folder, arch, SHORT, seed), [name, arch], 4, cache)

    return {name: openable(name, arch, seed) for seed, (name, arch) in enumerate(archs.items(), 1)}


def learner(folder: Path, arch: str, task: Task = TASK, *, dropout=False, scale=1, **more) -> LabelModel:
    """An untrained student; with `scale` it tells texts apart from the start, as random weights hardly do."""
    spec = StudentConfig(model="m", arch=arch, phases=[], **more)
    student = build_student(spec, folder / f"tiny-{KINDS[arch]}", task, 0)
    for module in student.model.modules():
        if isinstance(module, torch.nn.Dropout) and not dropout:
            module.p = 0.0
    for parameter in student.model.parameters():
        parameter.data.mul_(scale if parameter.dim() > 1 else 1)
    return student


def trained(student, frame, spec, folder, **more) -> pd.DataFrame:
    return train_phase(student, phase_rows(frame, spec, LABELS), spec, folder=folder, seed=0, **more)


@pytest.mark.parametrize(
    ("arch", "adapter", "dtype"),
    [("classifier", "none", "bfloat16"), ("classifier", "lora", "float32"), ("causal", "none", "bfloat16")]
    + [("causal", "lora", "bfloat16"), ("causal", "qlora", "float32"), ("seq2seq", "none", "float32")],
)
def test_the_size_of_a_checkpoint_is_foretold(tiny_models, tmp_path, capsys, arch, adapter, dtype):
    """From the model's weights: as large as the files are, but for the random states and lists of a few kilobytes."""
    student = learner(tiny_models, arch, adapter={"kind": adapter, "r": 32}, dtype=dtype, prompt="plain")
    rows = phase_rows(toy(12), spec := phase({"ce": 1.0}, steps=2), LABELS)
    settings = {"folder": tmp_path / "run", "seed": 0, "title": "t", "checkpoint_every": 1}
    need = disk_need(student, build_trainer(student, rows, spec, **settings).model)
    restore_full_embedding(student.model)
    train_phase(student, rows, spec, **settings)
    line = capsys.readouterr().out.splitlines()[0]
    assert line == (
        f"t: a checkpoint takes {size_text(need.checkpoint)}, and the run up to {size_text(need.total)} of disk"
    )
    for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
        sizes = [path.stat().st_size for path in checkpoint.iterdir() if path.suffix in (".safetensors", ".pt")]
        written = sum(sizes) - (checkpoint / "scheduler.pt").stat().st_size
        assert need.checkpoint <= written <= 1.02 * need.checkpoint + 60_000
    save_model(student.model, student.tokenizer, tmp_path / "model", torch.bfloat16 if arch == "causal" else None)
    whole = (tmp_path / "model" / "model.safetensors").stat().st_size
    assert 3 * need.checkpoint + whole <= need.total + 20_000  # the file's header


def test_a_training_that_the_disk_cannot_hold_does_not_start(tiny_models, tmp_path, monkeypatch):
    """What an interrupted run has written there counts as free: it is continued, not written again."""
    student, spec = learner(tiny_models, "causal"), phase({"ce": 1.0}, steps=2)
    need = disk_need(student, student.model)
    free = SimpleNamespace(free=need.total - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(UserError) as raised:
        trained(student, toy(6), spec, tmp_path / "run")
    sizes = f"up to {size_text(need.total)} of disk, and {size_text(need.total - 1)} are free"
    assert str(raised.value) == f"{tmp_path / 'run'}: the training needs {sizes}; free some space and run again"
    assert not list(tmp_path.rglob("checkpoint-*"))
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "part").write_bytes(b"1")
    trained(student, toy(6), spec, tmp_path / "run")


def test_a_classifier_keeps_the_embeddings_of_words_it_has_not_seen(tiny_models, tmp_path):
    """No gradient reaches them, and none is kept for them; for all else the student ends as it began."""
    student = learner(tiny_models, "classifier", dropout=True)
    before = student.model.get_input_embeddings()
    weight = before.weight.detach().clone()
    frame = toy(12)
    used = sorted({token for ids in student.encode(frame["text"].tolist()) for token in ids})
    trained(student, frame, phase({"ce": 1.0}, epochs=2, weight_decay=0.1), tmp_path)
    after = student.model.get_input_embeddings()
    assert after is before and after.weight.requires_grad
    others = np.setdiff1d(np.arange(len(weight)), used)
    assert len(others) > 10 and torch.equal(after.weight[others], weight[others])
    moved = (after.weight != weight).any(-1)[used]
    assert moved.all()
    assert not any("rows" in name for name in student.model.state_dict())
    dropouts = [module for module in student.model.modules() if isinstance(module, torch.nn.Dropout)]
    assert dropouts and all(type(module) is BitDropout and module.p > 0 for module in dropouts)


# ------------------------------------------------------------------------------- rows and their order


@pytest.mark.parametrize("order", ["random", "length", "confidence"])
@pytest.mark.parametrize("n, batch", [(1, 4), (7, 2), (40, 8), (300, 4)])
def test_every_row_comes_once_an_epoch(order, n, batch):
    lengths = np.random.default_rng(n).integers(1, 50, n).tolist()
    batches = LengthGroupedSampler(lengths, batch, 3, order, [-length for length in lengths])
    for epoch in range(3):
        batches.set_epoch(epoch)
        assert len(batches) == n and sorted(batches) == list(range(n))


def test_the_order_is_a_function_of_seed_and_epoch():
    def rows(seed, epoch, before=0):
        batches = LengthGroupedSampler(list(range(50)), 4, seed)
        for _ in range(before):
            list(batches)
        batches.set_epoch(epoch)
        return list(batches)

    assert rows(1, 2) == rows(1, 2, before=3)
    assert rows(1, 2) != rows(1, 3) and rows(1, 2) != rows(2, 2)


def test_orders_follow_length_and_confidence_and_batches_hold_rows_of_like_length():
    lengths, entropy = [5, 3, 9, 3], [0.1, 0.9, 0.5, 0.2]
    assert list(LengthGroupedSampler(lengths, 2, 0, "length")) == [1, 3, 0, 2]
    assert list(LengthGroupedSampler(lengths, 2, 0, "confidence", entropy)) == [0, 3, 2, 1]
    lengths = np.random.default_rng(0).integers(5, 60, 400)
    rows = list(LengthGroupedSampler(lengths.tolist(), 8, 0))
    spread = np.mean([np.ptp(lengths[rows[a : a + 8]]) for a in range(0, 400, 8)])
    assert spread < 0.3 * np.mean([np.ptp(part) for part in lengths.reshape(-1, 8)])


def test_a_phase_finds_its_rows_and_mixes_its_teachers():
    frame = toy(6)
    frame.loc[3:, "split_ref"], frame.loc[3:, "label"] = "toy/pool", None
    one, two = (np.stack(frame[f"probabilities_{name}"].to_list()) for name in ("one", "two"))
    gold = phase_rows(frame, phase({"ce": 1.0}), LABELS)
    assert gold.texts == frame["text"][:3].tolist() and gold.targets.tolist() == [0, 1, 2] and gold.logprobs is None

    everything = {"data": ["toy/train", "toy/pool"], "teachers": ["one", "two"]}
    rows = phase_rows(frame, phase({"kl": 1.0}, **everything), LABELS)
    np.testing.assert_allclose(rows.logprobs.exp(), (one + two) / 2, atol=1e-6)
    assert rows.targets.tolist() == [0, 1, 2, *((one + two) / 2).argmax(1)[3:]]  # gold, else what the teachers say

    weighed = phase_rows(frame, phase({"kl": 1.0}, mix="validation", **everything), LABELS, {"one": 0.9, "two": 0.3})
    np.testing.assert_allclose(weighed.logprobs.exp(), 0.75 * one + 0.25 * two, atol=1e-6)

    sure = phase_rows(frame, phase({"kl": 1.0}, mix="confidence", **everything), LABELS)
    entropies = np.stack([-(p * np.log(p)).sum(1) for p in (one, two)])
    doubt = np.where(np.arange(6) < 3, -np.log([[p[i, i % 3] for i in range(6)] for p in (one, two)]), entropies)
    weights = 1 - np.exp(doubt) / np.exp(doubt).sum(0)
    np.testing.assert_allclose(sure.logprobs.exp(), weights[0][:, None] * one + weights[1][:, None] * two, atol=1e-6)

    with pytest.raises(UserError, match="^phases: no row in toy/augmented$"):
        phase_rows(frame, phase({"ce": 1.0}, data=["toy/augmented"]), LABELS)


def test_of_the_pool_only_sure_or_agreed_labels_are_taken():
    frame = toy(6)
    frame.loc[2:, "split_ref"], frame.loc[2:, "label"] = "toy/pool", None
    one = [[0.9, 0.1, 0.0], [0.9, 0.1, 0.0], [0.9, 0.1, 0.0], [0.4, 0.3, 0.3], [0.9, 0.1, 0.0], [0.5, 0.3, 0.2]]
    two = [[0.1, 0.9, 0.0], [0.1, 0.9, 0.0], [0.1, 0.9, 0.0], [0.4, 0.3, 0.3], [0.8, 0.1, 0.1], [0.9, 0.1, 0.0]]
    frame["probabilities_one"], frame["probabilities_two"] = one, two

    def texts(**pseudo_labels) -> list[str]:
        spec = phase({"kl": 1.0}, data=["toy/train", "toy/pool"], teachers=["one", "two"], pseudo_labels=pseudo_labels)
        return phase_rows(frame, spec, LABELS).texts

    def texts_of(*rows: int) -> list[str]:
        return frame["text"].iloc[list(rows)].tolist()

    assert texts() == texts_of(0, 1, 2, 3, 4, 5)  # rows with a gold label stay whatever the teachers predict
    assert texts(agreement=True) == texts_of(0, 1, 3, 4, 5)
    assert texts(min_confidence=0.6) == texts(min_confidence=0.6, agreement=True) == texts_of(0, 1, 4, 5)
    assert texts(min_confidence=0.8) == texts_of(0, 1, 4)


def test_a_row_is_taught_by_the_teachers_with_a_signal_and_left_out_without():
    frame = toy(6)
    one, two = (np.stack(frame[f"probabilities_{name}"].to_list()) for name in ("one", "two"))
    frame["probabilities_one"] = [None if i in (1, 4) else p for i, p in enumerate(one)]
    frame["probabilities_two"] = [None if i in (2, 4) else p for i, p in enumerate(two)]
    for mix in ("uniform", "validation", "confidence"):
        both = phase({"kl": 1.0}, teachers=["one", "two"], mix=mix)
        rows = phase_rows(frame, both, LABELS, {"one": 0.5, "two": 0.5})
        assert rows.texts == frame["text"].drop(index=4).tolist()
        np.testing.assert_allclose(rows.logprobs.exp()[1], two[1], atol=1e-6)
        np.testing.assert_allclose(rows.logprobs.exp()[2], one[2], atol=1e-6)


@pytest.mark.parametrize(
    "more, n, steps",
    [
        ({"epochs": 2.0, "batch_size": 4}, 9, 6),
        ({"epochs": 2.0, "batch_size": 4, "accumulate": 2}, 9, 4),
        ({"epochs": 0.5, "batch_size": 4}, 9, 2),
        ({"steps": 7, "batch_size": 4}, 9, 7),
        ({"epochs": 0.01, "batch_size": 4}, 9, 1),
    ],
)
def test_optimizer_steps_are_those_that_are_run(tiny_models, tmp_path, more, n, steps):
    spec = phase({"ce": 1.0}, **more)
    assert count_optimizer_steps(n, spec) == steps
    assert trained(learner(tiny_models, "classifier"), toy(n), spec, tmp_path)["step"].max() <= steps


def test_free_memory_is_given_back_now_and_then(tiny_models, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(trainers, "release_free_memory", lambda: calls.append("called"))
    trained(learner(tiny_models, "classifier"), toy(9), phase({"ce": 1.0}, steps=21, batch_size=4), tmp_path)
    assert len(calls) == 2  # before the steps 1 and 21


# ------------------------------------------------------------------------------- the loss, by hand


def by_hand(student: LabelModel, frame: pd.DataFrame, temperature: float) -> dict[str, float]:
    """ce, kl and jsd of `student` on `frame` from plain forward passes, in numpy."""
    index = [LABELS.index(label) for label in frame["label"]]
    student.model.eval()
    if student.arch == "classifier":
        logits, nll = [], []
        for text, gold in zip(frame["text"], index, strict=True):
            logits.append(student.model(**student.tokenizer(text, return_tensors="pt")).logits[0].detach().numpy())
            nll.append([-(logits[-1] - np.log(np.exp(logits[-1]).sum()))[gold]])
    else:
        logits, nll = [], []
        for text, gold in zip(frame["text"], index, strict=True):
            rendered = render_prompt(chat_turns(student.task, text), student.tokenizer)
            prompt = student.tokenizer(rendered, add_special_tokens=False)["input_ids"]

            def token_logprobs(answer, prompt=prompt, text=text):
                ids = torch.tensor([prompt + answer])
                logprobs = student.model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1).detach().numpy()
                return [logprobs[i, token] for i, token in enumerate(answer)]

            answers = [student.tokenizer(student.task.word(name))["input_ids"] for name in LABELS]
            nested = [student.tokenizer.eos_token_id]  # `profit` is where `profit rose` begins
            logits.append([sum(token_logprobs(answer + nested)) for answer in answers])
            nll.append([-x for x in token_logprobs(answers[gold] + nested)])
    student.model.train()
    z, p = np.asarray(logits), np.stack(frame["probabilities_one"].to_list())
    log_s = z / temperature - np.log(np.exp(z / temperature).sum(1, keepdims=True))
    p = p ** (1 / temperature) / (p ** (1 / temperature)).sum(1, keepdims=True)
    s, m = np.exp(log_s), (np.exp(log_s) + p) / 2
    return {
        "ce": np.concatenate(nll).mean(),
        "kl": temperature**2 * (p * (np.log(p) - log_s)).sum(1).mean(),
        "jsd": temperature**2 * ((p * np.log(p / m)).sum(1) + (s * np.log(s / m)).sum(1)).mean() / 2,
    }


@pytest.mark.parametrize("arch", ["classifier", "causal"])
def test_the_logged_loss_is_the_one_worked_out_by_hand(tiny_models, tmp_path, arch):
    frame = toy(7)
    for temperature, loss in [
        (1.0, {"ce": 1.0}),
        (3.0, {"kl": 1.0}),
        (2.0, {"jsd": 1.0}),
        (4.0, {"ce": 0.3, "kl": 0.7}),
    ]:
        student = learner(tiny_models, arch, WORDS, scale=3)
        expected = by_hand(student, frame, temperature)
        for batch, accumulate in ((8, 1), (2, 4)) if len(loss) > 1 else ((2, 4),):
            spec = phase(loss, temperature=temperature, batch_size=batch, accumulate=accumulate, learning_rate=1e-9)
            history = trained(student, frame, spec, tmp_path / f"{temperature}-{batch}")
            assert history.columns.tolist() == ["step", "epoch", "loss", "learning_rate", *loss]
            for term in loss:
                assert history[term][0] == pytest.approx(expected[term], rel=1e-4), (term, batch)
            total = sum(weight * expected[term] for term, weight in loss.items())
            assert history["loss"][0] == pytest.approx(total, rel=1e-4)


def test_the_terms_of_micro_batches_add_up_to_those_of_the_step():
    """Without a trainer: outputs and counts in, the weighted terms out."""
    rng = np.random.default_rng(0)
    logits, p = torch.from_numpy(rng.normal(size=(5, 3))), torch.from_numpy(rng.dirichlet(np.ones(3), 5))
    prior = torch.tensor([2.0, 2.0, 1.0])
    rows = TrainingRows(list("abcde"), np.array([0, 1, 2, 0, 1]), logprobs=p.log(), label_prior=prior)
    spec = phase({"ce": 0.3, "kl": 0.7, "label_prior": 0.2}, temperature=2.0)
    student = SimpleNamespace(arch="classifier", model=None)
    loss = PhaseLoss(spec, rows, PhaseCompletions(student, rows, spec), TeacherSignals(spec, rows, {}, student, 0))
    batches = [MicroBatch([0, 3]), MicroBatch([1, 2, 4])]
    counts = StepCounts.of(batches)
    assert counts == StepCounts(rows=5, answer_tokens=0, rationale_tokens=0, compared_tokens=0)
    parts = [loss(ModelOutput(logits[batch.rows]), batch, counts) for batch in batches]
    ce = -logits.log_softmax(-1)[range(5), rows.targets].mean()
    q, t = (logits / 2).log_softmax(-1), p.sqrt() / p.sqrt().sum(-1, keepdim=True)
    kl = 4 * (t * (t.log() - q)).sum(-1).mean()
    # the penalty is no sum over rows: each micro-batch counts by its share of them
    penalty = sum(len(b.rows) / 5 * losses.shortcut_penalty(logits[b.rows], prior) for b in batches)
    for term, expected in {"ce": ce, "kl": kl, "label_prior": penalty}.items():
        assert sum(values[term] for _, values in parts).item() == pytest.approx(expected.item(), rel=1e-6)
    total = 0.3 * ce + 0.7 * kl + 0.2 * penalty
    assert sum(total for total, _ in parts).item() == pytest.approx(total.item(), rel=1e-6)


@pytest.mark.parametrize("term", ["kl", "uld"])
def test_each_row_is_compared_with_its_own_mix_of_teachers_at_every_token(term):
    """The first row follows teacher `one` alone, the second teacher `two`."""
    rng = np.random.default_rng(0)
    logits, one, two = (torch.from_numpy(rng.normal(size=(3, 4))).log_softmax(-1) for _ in range(3))
    weights = {"one": torch.tensor([2.0, 0.0]).double(), "two": torch.tensor([0.0, 3.0]).double()}
    rows = TrainingRows(["a", "b"], np.array([0, 1]), teacher_weights=weights)
    spec = phase({term: 1.0}, teachers=["one", "two"], **({} if term == "uld" else {"space": "vocabulary"}))
    completions = SimpleNamespace(by_row=[[([5, 6], 0)], [([7], 0)]], offsets=np.array([0, 1, 2]))
    signals = TeacherSignals.__new__(TeacherSignals)
    signals.phase, signals.rows = spec, rows
    signals.outputs = {
        name: SimpleNamespace(completion_lengths=[2, 1], logprobs=lambda rows, stored=stored: stored)
        for name, stored in (("one", one), ("two", two))
    }
    batch = MicroBatch([0, 1], completions.by_row)
    loss, _ = PhaseLoss(spec, rows, completions, signals)(
        ModelOutput(completion_logits=logits), batch, StepCounts.of([batch])
    )
    function = losses.kl if term == "kl" else losses.universal_logit_distance
    expected = function(logits, torch.cat([one[:2], two[2:]])).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_every_supervised_token_has_a_kind_and_a_denominator():
    answer, rationale, sampled = ([5, 6], 0), ([5, 6, 7, 8, 9], 2), ([4, 3, 2, 1], 0)
    data = MicroBatch([0, 1], [[answer, rationale], [answer]])
    assert data.token_kinds == [ANSWER] * 2 + [RATIONALE] * 3 + [ANSWER] * 2 and data.compared_tokens == [5, 2]
    own = MicroBatch([2], [[answer, sampled]], [sampled])
    assert own.token_kinds == [ANSWER] * 2 + [SAMPLED] * 4 and own.compared_tokens == [4]
    assert StepCounts.of([data, own]) == StepCounts(3, answer_tokens=6, rationale_tokens=3, compared_tokens=11)


def test_fine_tuning_is_a_phase_on_gold_labels():
    spec = FinetuneConfig(on="toy/train", steps=7, learning_rate=1e-3, warmup=0.2, lora={"r": 4})
    expected = phase({"ce": 1.0}, steps=7, warmup=0.2)
    assert spec.as_phase() == expected


# ------------------------------------------------------------------------------- tokens and hidden states, by hand

REASONS = ["profit rose", None, "sales fell and the loss grew", "it was held", None, "operating profit"]


def one_step(student, spec, frame, folder, teachers) -> pd.Series:
    """The logged values of a step too small to move anything."""
    rows = phase_rows(frame, spec, LABELS)
    history = train_phase(student, rows, spec, folder=folder, seed=0, teachers=teachers)
    assert len(history) == 1
    return history.iloc[0]


def forward_row(model: LabelModel, text: str, tokens: list[int], **more):
    """One forward pass of a whole row, answer and all: logits where `tokens` are supervised, and the whole output."""
    ids = model.encode([text])[0]
    if model.arch == "seq2seq":
        start = [model.model.config.decoder_start_token_id]
        decoder_inputs = {"input_ids": torch.tensor([ids]), "decoder_input_ids": torch.tensor([start + tokens[:-1]])}
        out = model.model(**decoder_inputs, **more)
        return out.logits[0], out
    out = model.model(input_ids=torch.tensor([ids + tokens]), **more)
    return out.logits[0, len(ids) - 1 : -1], out


@pytest.mark.parametrize("arch", ["causal", "seq2seq"])
def test_divergences_over_the_vocabulary_are_those_at_the_supervised_tokens(tiny_models, tmp_path, arch):
    frame = toy(6).assign(rationale=REASONS, fold_one=-1)
    student = learner(tiny_models, arch, SHORT, scale=3, prompt="plain")
    teacher_model = teacher(tiny_models, arch, SHORT)
    kl, answers, reasons, n = 0.0, [], [], 0
    with torch.no_grad():
        for text, label, reason in zip(frame["text"], frame["label"], REASONS, strict=True):
            for k, (tokens, skip) in enumerate(student.row_completions(LABELS.index(label), reason)):
                student_logits, teacher_logits = (
                    forward_row(m, text, tokens)[0][skip:].double() for m in (student, teacher_model)
                )
                p, q = (teacher_logits / 2).softmax(-1), (student_logits / 2).softmax(-1)
                kl, n = kl + (p * (p.log() - q.log())).sum().item(), n + len(tokens) - skip
                nll = -student_logits.log_softmax(-1)[range(len(tokens) - skip), tokens[skip:]]
                (reasons if k else answers).extend(nll.tolist())
    loss = {"ce": 0.4, "kl": 0.5, "rationale": 0.1}
    for batch, accumulate in ((6, 1), (2, 3)):
        spec = phase(
            loss, space="vocabulary", temperature=2.0, batch_size=batch, accumulate=accumulate, learning_rate=1e-9
        )
        logged = one_step(
            student, spec, frame, tmp_path / str(batch), openable_teachers(tiny_models, tmp_path, one=arch)
        )
        assert logged["kl"] == pytest.approx(4 * kl / n, rel=5e-3)  # stored in float16, and far from sure
        assert logged["ce"] == pytest.approx(np.mean(answers), rel=1e-4)
        assert logged["rationale"] == pytest.approx(np.mean(reasons), rel=1e-4)
        assert logged["loss"] == pytest.approx(sum(loss[term] * logged[term] for term in loss), rel=1e-5)
    kept = list(tmp_path.glob("*/token_logprobs.npy"))
    assert len(kept) == 1 and np.load(kept[0]).shape[0] == n  # computed once for both


KEPT_LINE = (
    r"teacher one: ([\d,]+) bits a token for its (\d+) likeliest ones(?: and (\d+) drawn from the rest)?; "
    r"outside of these ([\d.]+) % of the probability"
)


def test_top_k_keeps_less_and_loses_little(tiny_models, tmp_path, capsys):
    frame, logged = toy(6).assign(fold_one=-1), {}
    terms = {"kl": 0.4, "jsd": 0.3, "reverse_kl": 0.1, "skew_kl": 0.1, "tvd": 0.1}
    for k in (None, 10_000, 5):
        student = learner(tiny_models, "causal", SHORT, scale=3, prompt="plain")
        spec = phase(terms, space="vocabulary", top_k=k, batch_size=6, learning_rate=1e-9)
        teachers = openable_teachers(tiny_models, tmp_path / str(k), one="causal")
        logged[k] = one_step(student, spec, frame, tmp_path / f"run-{k}", teachers)
    student = learner(tiny_models, "causal", SHORT, scale=3, prompt="plain")
    kept = {"top_k": 5, "tail_samples": 60, "batch_size": 6, "learning_rate": 1e-9}
    teachers = openable_teachers(tiny_models, tmp_path / "drawn", one="causal")
    drawn = one_step(student, phase({"kl": 1.0}, space="vocabulary", **kept), frame, tmp_path / "run-drawn", teachers)
    assert drawn["kl"] == pytest.approx(logged[None]["kl"], rel=0.1)
    lines = [line for line in capsys.readouterr().out.splitlines() if " bits a token for its " in line]
    many, plain, sampled = (re.fullmatch(KEPT_LINE, line) for line in lines)  # none without `top_k`
    assert (many[2], plain[2], many[3], plain[3], sampled[3]) == ("10000", "5", None, None, "60")
    assert 0 < float(many[4]) < float(plain[4]) == float(sampled[4]) < 100
    assert int(plain[1].replace(",", "")) + 8 * (60 * 2 + 2) == int(sampled[1].replace(",", ""))
    for term in terms:
        assert logged[10_000][term] == pytest.approx(logged[None][term], rel=5e-2), term
        assert 0 < logged[5][term] < logged[None][term], term


def test_another_tokenizer_is_compared_by_sorted_probabilities(tiny_models, tmp_path):
    frame = toy(6).assign(fold_one=-1)
    student, teacher_model = (
        learner(tiny_models, "causal", WORDS, scale=3, prompt="plain"),
        teacher(tiny_models, "seq2seq", WORDS),
    )
    expected, n = 0.0, 0
    with torch.no_grad():
        for text, label in zip(frame["text"], frame["label"], strict=True):
            student_ids, teacher_ids = (
                model.row_completions(LABELS.index(label))[0][0] for model in (student, teacher_model)
            )
            student_p, teacher_p = (
                forward_row(student, text, student_ids)[0].softmax(-1),
                forward_row(teacher_model, text, teacher_ids)[0].softmax(-1),
            )
            shared, n = min(len(student_ids), len(teacher_ids)), n + len(student_ids)
            for a, b in zip(
                student_p[:shared].sort(descending=True).values,
                teacher_p[:shared].sort(descending=True).values,
                strict=True,
            ):
                width = max(len(a), len(b))
                a, b = (torch.nn.functional.pad(x, (0, width - len(x))) for x in (a, b))
                expected += (a - b).abs().sum().item()
    spec = phase({"uld": 1.0}, batch_size=3, accumulate=2, learning_rate=1e-9)
    openable = OpenableTeacher(lambda fold: teacher(tiny_models, "seq2seq", WORDS), "t5", 4, tmp_path)
    logged = one_step(student, spec, frame, tmp_path / "run", {"one": openable})
    assert logged["uld"] == pytest.approx(expected / n, rel=1e-3)
    wrong = phase({"kl": 1.0}, space="vocabulary", batch_size=3)
    with pytest.raises(UserError, match="^teachers.one: its vocabulary does not fit: it writes an answer as"):
        one_step(student, wrong, frame, tmp_path / "wrong", {"one": openable})


@pytest.mark.parametrize("arch", ["classifier", "causal", "seq2seq"])
def test_terms_over_hidden_states_are_those_of_the_paired_layers(tiny_models, tmp_path, arch):
    frame = toy(6).assign(fold_one=-1, fold_two=-1)
    student = learner(tiny_models, arch, SHORT, scale=3, init={"layers": [0, 2]}, prompt="plain")
    terms = ["hidden", "pkd", "cosine", *(["attention"] if arch == "classifier" else [])]
    alone = {seed: dict.fromkeys(terms, 0.0) for seed in (1, 2)}
    position = -2 if arch == "causal" else 0  # the prompt's last token: one of the answer is fed after it
    with torch.no_grad():
        for seed, expected in alone.items():
            teacher_model = teacher(tiny_models, arch, SHORT, seed)
            for text, label in zip(frame["text"], frame["label"], strict=True):
                if arch == "classifier":
                    ids = {"input_ids": torch.tensor(student.encode([text]))}
                    student_states, teacher_states = (
                        m.model(**ids, output_hidden_states=True).hidden_states for m in (student, teacher_model)
                    )
                else:
                    tokens = student.row_completions(LABELS.index(label))[0][0]
                    outs = (
                        forward_row(m, text, tokens[:1] * 2, output_hidden_states=True)[1]
                        for m in (student, teacher_model)
                    )
                    name = "decoder_hidden_states" if arch == "seq2seq" else "hidden_states"
                    student_states, teacher_states = (out[name] for out in outs)
                    position = {"causal": len(student.encode([text])[0]) - 1, "seq2seq": 0}[arch]
                a, b = student_states[1][0, position], teacher_states[2][0, position]
                expected["hidden"] += (a - b).square().mean().item() / 6
                unit = torch.nn.functional.normalize
                expected["pkd"] += (unit(a, dim=0) - unit(b, dim=0)).square().sum().item() / 6
                last = torch.cosine_similarity(student_states[2][0, position], teacher_states[4][0, position], dim=0)
                expected["cosine"] += (1 - last).item() / 6
                if arch == "classifier":
                    maps = (unit(h[0].square().sum(-1), dim=0) for h in (student_states[1], teacher_states[2]))
                    expected["attention"] += (next(maps) - next(maps)).norm().item() / 2 / 6
    spec = phase(dict.fromkeys(terms, 0.25), teachers=["one", "two"], batch_size=3, accumulate=2, learning_rate=1e-9)
    teachers = openable_teachers(tiny_models, tmp_path, one=arch, two=arch)
    logged = one_step(student, spec, frame, tmp_path / "run", teachers)
    for term in terms:
        assert logged[term] == pytest.approx((alone[1][term] + alone[2][term]) / 2, rel=1e-3), term
    better = spec.model_copy(update={"mix": "validation"})
    rows = phase_rows(frame, better, LABELS, {"one": 0.9, "two": 0.3})
    one, two = (float(rows.teacher_weights[name][0]) for name in ("one", "two"))
    assert one > 2 * two > 0
    weighted = train_phase(student, rows, better, folder=tmp_path / "more", seed=0, teachers=teachers).iloc[0]
    for term in terms:
        mixed = (one * alone[1][term] + two * alone[2][term]) / (one + two)
        assert weighted[term] == pytest.approx(mixed, rel=1e-3), term
    wrong = spec.model_copy(update={"layers": [[1, 9]]})
    with pytest.raises(UserError, match=r"^phases: layers: layer pair \(1, 9\) outside student 0..2, teacher 0..4"):
        one_step(student, wrong, frame, tmp_path / "wrong", teachers)


def narrow_teachers(folder: Path, cache: Path, *names: str) -> dict[str, OpenableTeacher]:
    """Classifiers with states of half the student's width."""
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = load_tokenizer(folder / "tiny-bert")
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16
    )

    def narrow(fold: int) -> LabelModel:
        torch.manual_seed(5)
        return LabelModel(BertForSequenceClassification(config).eval(), tokenizer, SHORT, "classifier")

    return {name: OpenableTeacher(narrow, "narrow", 4, cache) for name in names}


def test_states_of_another_width_are_projected_and_the_projection_learns_and_goes(tiny_models, tmp_path):
    student = learner(tiny_models, "classifier", SHORT, scale=3)
    openable = narrow_teachers(tiny_models, tmp_path, "one", "one-1.5")
    frame = toy(12).assign(fold_one=-1)
    frame = frame.rename(columns={f"{column}_one": f"{column}_one-1.5" for column in ("probabilities", "fold")})
    spec = phase({"hidden": 1.0}, teachers=["one-1.5"], batch_size=6, steps=60, learning_rate=1e-2)
    rows = phase_rows(frame, spec, LABELS)
    history = train_phase(student, rows, spec, folder=tmp_path / "run", seed=0, teachers=openable)
    assert history["hidden"].iloc[-1] < 0.5 * history["hidden"].iloc[0]
    assert not any("projections" in name for name, _ in student.model.named_parameters())
    frame = toy(12).assign(fold_one=-1)
    with pytest.raises(UserError, match="^phases: loss.pkd: teacher `one`: student and teacher must be two equal"):
        one_step(student, phase({"pkd": 1.0}), frame, tmp_path / "wrong", openable)


def test_a_resumed_phase_continues_with_the_projections_of_its_checkpoint(tiny_models, tmp_path):
    spec, weights = phase({"hidden": 1.0}, batch_size=4, steps=8, learning_rate=1e-2), []
    rows, teachers = (
        phase_rows(toy(12).assign(fold_one=-1), spec, LABELS),
        narrow_teachers(tiny_models, tmp_path, "one"),
    )
    for resumed in (False, True):
        if resumed:
            shutil.rmtree(tmp_path / "run/checkpoint-8")
        student = learner(tiny_models, "classifier", SHORT, scale=3, adapter={"kind": "lora", "r": 2})
        settings = {"folder": tmp_path / "run", "seed": 0, "checkpoint_every": 4, "teachers": teachers}
        train_phase(student, rows, spec, **settings)
        weights.append({name: p.detach() for name, p in student.model.named_parameters() if p.requires_grad})
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_activation_maps_of_other_tokens_are_refused(tiny_models, tmp_path):
    def cut(fold: int) -> LabelModel:
        model = teacher(tiny_models, "classifier", SHORT)
        model.max_length = 5
        return model

    student, spec = learner(tiny_models, "classifier", SHORT), phase({"attention": 1.0}, batch_size=6)
    message = (
        "^phases: loss.attention: teacher `one`: attention maps compare token by token: the two tokenizers differ$"
    )
    with pytest.raises(UserError, match=message):
        openable = {"one": OpenableTeacher(cut, "cut", 4, tmp_path)}
        one_step(student, spec, toy(6).assign(fold_one=-1), tmp_path / "run", openable)


def test_a_student_does_not_depend_on_whether_teacher_outputs_are_cached(tiny_models, tmp_path):
    """Loading a teacher seeds the global generator, from which dropout draws."""
    frame, spec, weights = toy(12).assign(fold_one=-1), phase({"pkd": 1.0}, batch_size=6), []
    for k in range(2):  # the second student finds the outputs that were stored for the first
        student = learner(tiny_models, "classifier", SHORT, dropout=True)
        teachers = openable_teachers(tiny_models, tmp_path / "signals", one="classifier")
        one_step(student, spec, frame, tmp_path / str(k), teachers)
        weights.append(student.model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_gold_rows_are_given_to_the_fold_that_did_not_learn_from_them(tiny_models, tmp_path):
    opened = []

    def open_fold(fold: int) -> LabelModel:
        opened.append(fold)
        return teacher(tiny_models, "classifier", SHORT, seed=10 + fold)

    frame = toy(6).assign(fold_one=[0, 1, -1, 1, 0, -1])
    spec = phase({"pkd": 1.0}, batch_size=6)
    trainer = build_trainer(
        learner(tiny_models, "classifier", SHORT),
        phase_rows(frame, spec, LABELS),
        spec,
        folder=tmp_path / "run",
        seed=0,
        title="",
        checkpoint_every=9,
        teachers={"one": OpenableTeacher(open_fold, "folds", 4, tmp_path)},
    )
    assert sorted(opened) == [-1, 0, 1]
    for i, fold in enumerate(frame["fold_one"]):
        model = teacher(tiny_models, "classifier", SHORT, seed=10 + fold)
        with torch.no_grad():
            states = model.forward(model.encode([frame["text"][i]]), layers=[1, 2, 3, 4]).hidden_states
        assert torch.allclose(trainer.signals.outputs["one"].hidden_states([i])[0], states[0], atol=1e-5)


@pytest.mark.parametrize("longest", [2, 9])
def test_on_policy_the_loss_is_a_mean_over_the_tokens_that_were_written(tiny_models, tmp_path, monkeypatch, longest):
    written, sample = [], OnPolicyTrainer.sample_answers

    def listening(self, picked, k):
        written.append((picked, sample(self, picked, k)))
        return written[-1][1]

    monkeypatch.setattr(OnPolicyTrainer, "sample_answers", listening)
    frame = toy(6).assign(fold_one=-1)
    student = learner(tiny_models, "causal", SHORT, scale=3, prompt="plain")
    teacher_model = teacher(tiny_models, "causal", SHORT)
    for batch, accumulate in ((6, 1), (2, 3)):
        more = {"space": "vocabulary", "on_policy": 1.0, "max_new_tokens": longest, "temperature": 2.0}
        spec = phase({"jsd": 1.0}, batch_size=batch, accumulate=accumulate, learning_rate=1e-9, **more)
        written.clear()
        teachers = openable_teachers(tiny_models, tmp_path, one="causal")
        logged = one_step(student, spec, frame, tmp_path / str(batch), teachers)
        total, n = 0.0, 0
        with torch.no_grad():
            for picked, answers in written:
                for i, (tokens, _) in zip(picked, answers, strict=True):
                    student_logits, teacher_logits = (
                        forward_row(m, frame["text"][i], tokens)[0] / 2 for m in (student, teacher_model)
                    )
                    p, q = teacher_logits.softmax(-1).double(), student_logits.softmax(-1).double()
                    m = (p + q) / 2
                    total += ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()).item() / 2
                    n += len(tokens)
        assert len(written) == accumulate and 6 <= n <= 6 * longest
        assert logged["jsd"] == pytest.approx(4 * total / n, rel=1e-3)
    assert {path.name for path in tmp_path.iterdir()} == {
        "6",
        "2",
    }  # nothing is stored of a teacher that scores sampled answers


def test_on_policy_answers_are_drawn_at_the_sampling_temperature_of_the_phase():
    trainer, calls = OnPolicyTrainer.__new__(OnPolicyTrainer), []
    trainer.phase = phase({"kl": 1.0}, space="vocabulary", on_policy=1.0, sampling_temperature=0.5, temperature=3.0)
    trainer.seed, trainer.token_ids, trainer.state = 0, [[1]], SimpleNamespace(global_step=0)
    trainer.student = SimpleNamespace(generate_tokens=lambda ids, **settings: calls.append(settings) or [[2]])
    assert trainer.sample_answers([0], 0) == [([2], 0)]
    assert calls[0]["temperature"] == 0.5
    assert PhaseConfig.model_fields["sampling_temperature"].default == 1.0


def looks(*losses: float) -> list[dict]:
    """The log of a trainer with these validation losses, and a training loss after each."""
    return [entry for loss in losses for entry in ({"eval_loss": loss}, {"loss": 9.0})]


@pytest.mark.parametrize(
    ("losses", "share"),
    [
        ((), 0.0),
        ((1.0,), 0.0),
        ((1.0, 0.5, 1.09), 0.0),  # compared with the first look, and it rose by less than 0.1
        ((1.0, 1.125), 0.1),
        ((1.0, 1.125, 1.2), 0.1),  # compared with the look that had risen
        ((1.0, 1.125, 1.25), 0.2),
        (tuple(range(14)), 1.0),
    ],
)
def test_the_adaptive_share_of_on_policy_batches_rises_with_the_validation_loss(losses, share):
    spec = phase({"kl": 1.0}, space="vocabulary", on_policy="adaptive", validate_every=2)
    assert on_policy_share(spec, looks(*losses)) == pytest.approx(share)
    assert on_policy_share(spec.model_copy(update={"on_policy": 0.25}), looks(*losses)) == 0.25


def test_an_adaptive_student_learns_from_the_data_until_the_validation_loss_rises(tiny_models, tmp_path, monkeypatch):
    """A teacher with random weights is no help on validation rows: their loss rises. A look each second step."""
    sampled, evaluated, sample, evaluate = [], [], OnPolicyTrainer.sample_answers, OnPolicyTrainer.evaluate

    def listening(self, picked, k):
        sampled.append(self.state.global_step)
        return sample(self, picked, k)

    def scored(self, *args, **kwargs):
        scores = evaluate(self, *args, **kwargs)
        evaluated.append((self.state.global_step, scores["eval_loss"]))
        return scores

    monkeypatch.setattr(OnPolicyTrainer, "sample_answers", listening)
    monkeypatch.setattr(OnPolicyTrainer, "evaluate", scored)
    monkeypatch.setattr("distillery.training.on_policy.SHARE_STEP", 1.0)
    monkeypatch.setattr("distillery.training.on_policy.LOSS_RISE", 0.0)
    student = learner(tiny_models, "causal", SHORT, scale=3, prompt="plain")
    more = {"steps": 8, "batch_size": 4, "learning_rate": 1e-2, "max_new_tokens": 2, "validate_every": 2}
    spec = phase({"kl": 1.0}, space="vocabulary", on_policy="adaptive", **more)
    frame = toy(12).assign(fold_one=-1)
    teachers = openable_teachers(tiny_models, tmp_path, one="causal")
    trained(student, frame, spec, tmp_path / "run", validation=phase_rows(toy(6, 1), spec, LABELS), teachers=teachers)
    first = evaluated[0][1]
    rose = [step for step, loss in evaluated[1:] if loss >= first]
    assert rose and sampled == list(range(rose[0], 8))


def test_an_adaptive_student_uses_its_answers_again_the_later_the_more(tmp_path, monkeypatch):
    """With the share of the steps taken as probability, and only where every row has one; a checkpoint holds them."""

    def trainer_at(step: int) -> OnPolicyTrainer:
        trainer = OnPolicyTrainer.__new__(OnPolicyTrainer)
        trainer.phase = phase({"kl": 1.0}, space="vocabulary", on_policy="adaptive", validate_every=2)
        trainer.seed, trainer.token_ids, trainer.earlier = 0, [[1]] * 3, EarlierAnswers()
        trainer.state = SimpleNamespace(global_step=step, max_steps=100)
        trainer.student = SimpleNamespace(generate_tokens=lambda ids, **_: calls.append(len(ids)) or [[7]] * len(ids))
        trainer.args = SimpleNamespace(should_save=True)
        return trainer

    calls: list[int] = []
    trainer = trainer_at(0)
    for _ in range(20):  # at the start every answer is new
        trainer.sample_answers([0, 1], 0)
        trainer.earlier.share()
    assert calls == [2] * 20
    monkeypatch.setattr(PhaseTrainerMixin, "_save", lambda *_: None)
    monkeypatch.setattr(PhaseTrainerMixin, "_load_from_checkpoint", lambda *_: None)
    trainer._save(str(tmp_path))
    resumed = trainer_at(100)
    resumed._load_from_checkpoint(str(tmp_path))
    calls.clear()
    assert resumed.sample_answers([1, 0], 0) == [([7], 0), ([7], 0)] and not calls
    resumed.sample_answers([1, 2], 0)
    assert calls == [2]  # row 2 has no answer yet
    draws = [uses_earlier_answers(0.3, [0, step, k]) for step in range(100) for k in range(10)]
    assert 0.25 < np.mean(draws) < 0.35


def test_on_policy_a_teacher_of_another_tokenizer_is_refused(tiny_models, tmp_path):
    student = learner(tiny_models, "causal", WORDS, prompt="plain")
    spec = phase({"kl": 1.0}, space="vocabulary", on_policy=1.0)
    openable = OpenableTeacher(lambda fold: teacher(tiny_models, "seq2seq", WORDS), "t5", 4, tmp_path)
    with pytest.raises(UserError, match="^teachers.one: its vocabulary does not fit"):
        one_step(student, spec, toy(6).assign(fold_one=-1), tmp_path / "run", {"one": openable})


def test_on_policy_gold_rows_are_given_to_the_fold_that_did_not_learn_from_them(tiny_models, tmp_path):
    opened = []

    def open_fold(fold: int) -> LabelModel:
        opened.append(fold)
        return teacher(tiny_models, "causal", SHORT, seed=10 + fold)

    student = learner(tiny_models, "causal", SHORT, scale=3, prompt="plain")
    spec = phase({"kl": 1.0}, space="vocabulary", on_policy=1.0, batch_size=6, max_new_tokens=3)
    rows = phase_rows(toy(6).assign(fold_one=[0, 1, -1, 1, 0, -1]), spec, LABELS)
    openable = {"one": OpenableTeacher(open_fold, "folds", 4, tmp_path)}
    more = {"folder": tmp_path / "run", "seed": 0, "title": "", "checkpoint_every": 9, "teachers": openable}
    trainer = build_trainer(student, rows, spec, **more)
    assert not opened  # nobody has written anything yet
    picked = [0, 1, 2, 3, 4, 5]
    written = [([5 + i, 6], 0) for i in picked]
    (logprobs,) = trainer.signals.token_logprobs(trainer.completions.micro_batch(picked, written))
    assert sorted(opened) == [-1, 0, 1]
    for i, fold in enumerate([0, 1, -1, 1, 0, -1]):
        model = teacher(tiny_models, "causal", SHORT, seed=10 + fold)
        with torch.no_grad():
            expected = forward_row(model, rows.texts[i], written[i][0])[0].log_softmax(-1)
        assert torch.allclose(logprobs[2 * i : 2 * i + 2], expected, atol=1e-4)


def test_the_shortcut_penalty_pulls_the_mean_prediction_to_the_gold_shares(tiny_models, tmp_path):
    frame = toy(24)
    frame.loc[frame.index % 4 != 0, "label"] = "positive"
    student = learner(tiny_models, "classifier", scale=4)
    spec = phase({"label_prior": 1.0}, steps=60, batch_size=8, learning_rate=3e-3)
    trained(student, frame, spec, tmp_path)
    shares = [(frame["label"] == label).mean() for label in LABELS]
    np.testing.assert_allclose(student.predict(frame["text"]).mean(0), shares, atol=0.05)


def test_activations_computed_again_change_no_weight(tiny_models, tmp_path, monkeypatch):
    """To the bit where the last layer computes the same tokens: computed again, it computes all, not those read."""
    frame, weights = toy(8), []
    for name, again in (("read tokens", False), ("again", True), ("all tokens", False)):
        if name == "all tokens":
            monkeypatch.setattr(last_layer, "_token_wise_parts", lambda body: [])
        adapter = {"kind": "lora", "r": 2}
        student = learner(tiny_models, "causal", SHORT, scale=3, adapter=adapter, gradient_checkpointing=again)
        trained(student, frame, phase({"kl": 1.0}, steps=3, batch_size=4, learning_rate=1e-2), tmp_path / name)
        weights.append([p.detach().clone() for p in student.model.parameters() if p.requires_grad])
    read_tokens, again, all_tokens = weights
    assert all(torch.equal(a, b) for a, b in zip(again, all_tokens, strict=True))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(again, read_tokens, strict=True))


@pytest.mark.parametrize("arch", ["classifier", "causal"])
def test_accumulated_steps_are_the_steps_of_the_whole_batch(tiny_models, tmp_path, arch):
    """11 rows: steps of 8, 3 and 8; the second one is uneven however it is cut."""
    frame, results = toy(11), []
    for batch, accumulate in ((8, 1), (4, 2), (2, 4)):
        adapter = {"kind": "lora", "r": 4} if arch == "causal" else {}
        student = learner(tiny_models, arch, WORDS, scale=3, adapter=adapter)
        spec = phase({"ce": 0.5, "kl": 0.5}, temperature=2.0, order="length", steps=3, batch_size=batch)
        trained(student, frame, spec.model_copy(update={"accumulate": accumulate}), tmp_path / str(batch))
        weights = {name: p.detach().clone() for name, p in student.model.named_parameters() if p.requires_grad}
        results.append((weights, student.predict(frame["text"])))
    start = learner(tiny_models, arch, WORDS, scale=3).predict(frame["text"])
    assert np.abs(results[0][1] - start).max() > 1e-4
    for weights, predicted in results[1:]:
        assert np.abs(predicted - results[0][1]).max() < 1e-6
        for name, weight in weights.items():
            if not name.endswith("key.bias"):  # the softmax takes it out: its gradient is rounding alone
                assert torch.allclose(weight, results[0][0][name], atol=1e-6 if arch == "causal" else 1e-5), name


@pytest.mark.parametrize(
    ("optimizer", "atol"), [("paged_adamw_32bit", 1e-6), ("adamw_8bit", 2e-3), ("paged_adamw_8bit", 2e-3)]
)
def test_every_optimizer_takes_the_steps_of_adamw(tiny_models, tmp_path, optimizer, atol):
    """To rounding with states in 32 bits; with those in 8 bits near it, as far as three steps of 1e-3 go."""
    frame, results = toy(8), []
    for name in ("adamw", optimizer):
        student = learner(tiny_models, "classifier", SHORT, scale=3)
        spec = phase({"ce": 1.0}, steps=3, batch_size=4, weight_decay=0.1, optimizer=name)
        trained(student, frame, spec, tmp_path / name)
        results.append({key: p.detach().clone() for key, p in student.model.named_parameters()})
    start = dict(learner(tiny_models, "classifier", SHORT, scale=3).model.named_parameters())
    moved = [key for key in start if (results[0][key] - start[key]).abs().max() > 1e-3]
    assert len(moved) > 10
    for key in moved:
        if not key.endswith("key.bias"):  # the softmax takes it out: its gradient is rounding alone
            assert torch.allclose(results[0][key], results[1][key], atol=atol), key


def test_an_optimizer_is_the_one_that_params_yaml_names(tiny_models, tmp_path):
    student = learner(tiny_models, "classifier", SHORT)
    for name in ("adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"):
        spec = phase({"ce": 1.0}, optimizer=name)
        settings = {"folder": tmp_path / name, "seed": 0, "title": "t", "checkpoint_every": 50}
        optimizer = build_trainer(student, phase_rows(toy(4), spec, LABELS), spec, **settings).create_optimizer()
        assert isinstance(optimizer, torch.optim.AdamW) == (name == "adamw")
        assert getattr(optimizer, "is_paged", False) == name.startswith("paged")
        assert name == "adamw" or optimizer.args.optim_bits == (8 if "8bit" in name else 32)


@pytest.mark.parametrize("arch", ["classifier", "causal"])
def test_a_student_learns_what_can_be_learned(tiny_models, tmp_path, arch):
    student = learner(tiny_models, arch, SHORT, dropout=True, scale=4)
    frame = toy(24)
    spec = phase({"ce": 1.0}, steps=60, batch_size=8, learning_rate=3e-3, schedule="cosine", warmup=0.1)
    history = trained(student, frame, spec, tmp_path)
    assert history["loss"].iloc[-1] < 0.5 * history["loss"].iloc[0]
    fresh = toy(30, seed=1)
    predictions = predict_rows(student, fresh)
    assert predictions.columns.tolist() == ["id", "label", "prediction", "probabilities"]
    assert score_predictions(predictions, LABELS)["accuracy"] > 0.9
    assert history["step"].tolist() == [10, 20, 30, 40, 50, 60] and history["learning_rate"].iloc[-1] < 1e-3


def test_a_teacher_is_followed_even_where_it_is_wrong(tiny_models, tmp_path):
    frame = toy(24)
    frame["probabilities_one"] = [np.roll([0.9, 0.05, 0.05], (i + 1) % 3) for i in range(24)]  # never the gold label
    student = learner(tiny_models, "classifier", scale=4)
    trained(student, frame, phase({"kl": 1.0}, steps=60, batch_size=8, learning_rate=3e-3, temperature=2.0), tmp_path)
    predictions = student.predict(toy(30, seed=1)["text"])
    assert (predictions.argmax(1) == (np.arange(30) + 1) % 3).mean() > 0.9
    assert np.abs(np.sort(predictions, 1)[:, -1] - 0.9).mean() < 0.1


# ------------------------------------------------------------------------------- early stopping


@pytest.mark.parametrize("arch", ["classifier", "causal"])
def test_early_stopping_returns_to_the_best_checkpoint(tiny_models, tmp_path, arch, monkeypatch):
    eval_losses, evaluate = [], PhaseTrainerMixin.evaluate

    def listening(self, *args, **kwargs):
        eval_losses.append(evaluate(self, *args, **kwargs)["eval_loss"])
        return {"eval_loss": eval_losses[-1]}

    monkeypatch.setattr(PhaseTrainerMixin, "evaluate", listening)
    frame, other = toy(12), toy(12, seed=2)
    other["label"] = other["label"].sample(frac=1, random_state=1).to_list()  # fitting the rows makes these worse
    validation = TrainingRows(other["text"].tolist(), np.array([LABELS.index(label) for label in other["label"]]))
    adapter = {"kind": "lora", "r": 4} if arch == "causal" else {}
    student = learner(tiny_models, arch, scale=3, adapter=adapter)
    stopping = {"metric": "loss", "patience": 2, "every": 2}
    spec = phase({"ce": 1.0}, steps=60, batch_size=4, learning_rate=1e-2, early_stopping=stopping, warmup=0.3)
    trained(student, frame, spec, tmp_path, validation=validation)
    assert (
        len(eval_losses) < 30 and np.argmin(eval_losses) == len(eval_losses) - 3
    )  # two looks in vain, then it stopped
    best = score_predictions(predict_rows(student, other), LABELS)["log_loss"]
    assert best == pytest.approx(min(eval_losses), rel=1e-5) and best < eval_losses[-1]


# ------------------------------------------------------------------------------- killed and resumed

LORA = {"adapter": {"kind": "lora", "r": 4}, "init": {"layers": "first-2"}}
SPECS = {
    "classifier": {"model": "m", "arch": "classifier", "init": {"layers": [0, 2]}},
    "causal": {"model": "m", "arch": "causal", **LORA},
    "on-policy": {"model": "m", "arch": "causal", "prompt": "plain", **LORA},
}
PHASES = {
    "on-policy": [
        {
            "loss": {"jsd": 1.0},
            "space": "vocabulary",
            "on_policy": "adaptive",
            "validate_every": 4,
            "max_new_tokens": 3,
        },
        {"loss": {"ce": 0.5, "hidden": 0.5}},
    ]
}


def run(kind: str, folder: str, out: str) -> None:
    """A whole training, as the notebook does it; runs in a process of its own."""
    gc.freeze()  # see tests/conftest.py
    label_space = [
        {"loss": {"kl": 1.0}, "teachers": ["one", "two"]},
        {"loss": {"ce": 0.5, "kl": 0.5}, "temperature": 2.0},
    ]
    lengths = [{"steps": 40, "batch_size": 4}, {"steps": 40, "batch_size": 2, "accumulate": 2}]
    phases = [phase(**more, **n).model_dump() for more, n in zip(PHASES.get(kind, label_space), lengths, strict=True)]
    spec = StudentConfig(**SPECS[kind], phases=phases)
    student = build_student(spec, Path(folder) / f"tiny-{KINDS[spec.arch]}", SHORT, 0)
    teachers = openable_teachers(Path(folder), Path(out) / "signals", one="causal")
    history, watched = train_phases(
        student,
        toy(22).assign(fold_one=-1, fold_two=-1),
        spec,
        folder=Path(out),
        seed=3,
        validation=toy(6, 1),
        test=toy(6, 2),
        teachers=teachers,
        checkpoint_every=10,
    )
    save_model(student.model, student.tokenizer, Path(out) / "model")
    history.to_csv(Path(out) / "history.csv", index=False)
    watched.to_parquet(Path(out) / "watched.parquet")


def start(*args) -> multiprocessing.Process:
    """Start :func:`run` in a process of its own."""
    process = fork_context().Process(target=run, args=tuple(map(str, args)))
    process.start()
    return process


def finished(process: multiprocessing.Process) -> None:
    process.join(120)
    assert process.exitcode == 0


def killed_at_a_checkpoint(process: multiprocessing.Process, folder: Path) -> None:
    """SIGKILL as soon as `folder` holds a whole checkpoint."""
    end = time.monotonic() + 120
    while not list(folder.glob("checkpoint-*/trainer_state.json")):
        assert process.is_alive() and time.monotonic() < end
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("arch", SPECS)
def test_a_killed_training_ends_like_an_unbroken_one(tiny_models, tmp_path, arch, monkeypatch):
    """On-policy, each look after the first raises the share, so that answers are written, kept and used again."""
    monkeypatch.setattr(on_policy, "SHARE_STEP", 0.5)
    monkeypatch.setattr(on_policy, "LOSS_RISE", -9.0)
    unbroken = start(arch, tiny_models, tmp_path / "unbroken")
    out = tmp_path / "killed"
    killed_at_a_checkpoint(start(arch, tiny_models, out), out / "checkpoints-1")
    assert (out / "phase-0/history.csv").exists() and not (out / "phase-1/history.csv").exists()
    killed_at_a_checkpoint(start(arch, tiny_models, out), out / "checkpoints-2")
    assert (out / "phase-1/history.csv").exists() and not (out / "phase-2/history.csv").exists()
    finished(start(arch, tiny_models, out))
    finished(unbroken)
    for name in ("model/model.safetensors", "history.csv", "watched.parquet"):
        assert (out / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes(), name
    assert not list(out.glob("checkpoints-*"))
    history = pd.read_csv(out / "history.csv")
    first = 20 if arch == "on-policy" else 4  # logged steps: every second one, as looks fall on these, or every tenth
    assert history["phase"].tolist() == [1] * first + [2] * 4
    assert history["ce"].isna().tolist() == [True] * first + [False] * 4 and history["loss"].nunique() == first + 4


@pytest.mark.parametrize("kind", ["classifier", "causal"])
def test_a_phase_that_was_killed_after_its_last_step_takes_no_further_one(tiny_models, tmp_path, kind):
    """`Trainer` would: it looks at the number of steps only after the first one."""
    spec = phase({"ce": 1.0}, steps=5, batch_size=4, schedule="constant", warmup=0.0, learning_rate=1e-2)
    settings = {"classifier": {"dropout": True}, "causal": {"adapter": {"kind": "lora", "r": 2}, "prompt": "plain"}}
    students = [learner(tiny_models, kind, **settings[kind]) for _ in range(2)]
    histories = [trained(student, toy(12), spec, tmp_path, checkpoint_every=3) for student in students]
    assert histories[0]["step"].tolist() == [1, 2, 3, 4, 5]
    pd.testing.assert_frame_equal(*histories)
    weights = [student.model.state_dict() for student in students]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-5"]


def test_a_half_written_checkpoint_is_left_out(tiny_models, tmp_path):
    spec = phase({"ce": 1.0}, steps=8, batch_size=4)
    frame, weights = toy(12), []
    for cut in (None, "trainer_state.json", "missing"):
        out = tmp_path / str(cut)
        student = learner(tiny_models, "classifier", dropout=True)
        trained(student, frame, spec, out, checkpoint_every=3)
        assert sorted(p.name for p in out.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]
        if cut:  # only whole steps up to the sixth are there; run the rest once more
            state = out / "checkpoint-8/trainer_state.json"
            state.write_text(state.read_text()[:-40]) if cut != "missing" else state.unlink()
            assert last_whole_checkpoint(out) == str(out / "checkpoint-6")
            student = learner(tiny_models, "classifier", dropout=True)
            trained(student, frame, spec, out, checkpoint_every=3)
        weights.append(student.model.state_dict())
    for other in weights[1:]:
        assert all(torch.equal(weights[0][name], other[name]) for name in other)
    assert last_whole_checkpoint(tmp_path / "nothing") is None


def test_checkpoints_have_a_key_of_all_that_decides_the_run():
    frame = toy(3).to_csv()
    key = run_key({"a": 1}, frame)
    assert key == run_key({"a": 1}, frame) and re.fullmatch("[0-9a-f]{16}", key)
    assert len({key, run_key({"a": 2}, frame), run_key({"a": 1}, toy(3, 1).to_csv())}) == 3


@pytest.mark.parametrize("key", [run_key, teacher_outputs_key])
def test_a_result_of_other_libraries_or_threads_is_not_used_again(key, monkeypatch):
    before = key("inputs")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 1000)
        assert key("inputs") != before
    with monkeypatch.context() as patch:
        patch.setattr("distillery.training.keys.version", lambda name: "0.0")
        assert key("inputs") != before
    assert key("inputs") == before


# ------------------------------------------------------------------------------- the finished folder

CARDS = {
    "classifier": ({}, TASK),
    "windows": ({"arch": "classifier", "max_length": 64, "long_texts": {"windows": 4, "stride": 40}}, TASK),
    "causal": ({"few_shot": 1}, TASK),
    "plain": ({"prompt": "plain"}, WORDS),  # nested answers of several tokens
    "seq2seq": ({"prompt": "plain"}, WORDS),
}
READ = """
import contextlib, io, json, os, re, sys
sys.modules["distillery"] = None  # cannot be imported
texts, out = json.loads(sys.argv[1]), {}
for folder in sys.argv[2:]:
    os.chdir(folder)
    card, here = open("README.md").read(), {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(re.search(r"```python\\n(.*?)```", card, re.S)[1], here)
    assert printed.getvalue().strip()
    predict = lambda text: here["classify"](text, **({"top_k": None} if "pipeline" in here else {}))
    out[folder] = [predict(text) for text in texts]
print(json.dumps(out))
"""


def test_the_code_of_a_card_predicts_as_scored_without_this_package(tiny_models, tmp_path):
    frame, expected = toy(5), {}
    texts = [*frame["text"], " ".join(" ".join(tiny.texts()[:400]).split()[:3000])]  # the last one is cut
    gold = frame["label"].fillna("neutral").tolist()
    predictions = frame.assign(label=gold, prediction=["neutral"] * 4 + [gold[4]], group=list("aabcd"))
    test = metrics.classification_report(gold, predictions["prediction"], np.full((5, 3), 1 / 3), LABELS)
    metadata = {"student": "s", "seed": 0, "parameters": 1, "bytes_on_disk": 1, "test": test}
    for name, (more, task) in CARDS.items():
        arch = more.get("arch", name if name in ("classifier", "seq2seq") else "causal")
        kind = {"classifier": "bert", "seq2seq": "t5"}.get(arch, "llama")
        spec = StudentConfig(**{"model": "m", "arch": arch, "phases": [phase({"kl": 1.0})], **more})
        student = build_student(spec, tiny_models / f"tiny-{kind}", task, 0)
        for parameter in student.model.parameters():  # so that the predictions differ
            parameter.data.mul_(6 if parameter.dim() > 1 else 1)
        folder = tmp_path / name
        save_model(student.model, student.tokenizer, folder)
        page = render_card(folder, spec, task, metadata, predictions)
        (folder / "README.md").write_text(page)
        low, high = metrics.interval(
            metrics.bootstrap_scores(gold, predictions["prediction"], LABELS, predictions["group"])["accuracy"]
        )
        assert f"| accuracy | {100 * test['accuracy']:.1f} % ({100 * low:.1f} to {100 * high:.1f}) |" in page
        assert f"classify({frame['text'].iloc[0]!r})" in page and "EUR 13.1" not in page
        assert "distilled from one." in page and "positive, neutral, negative" in page
        expected[str(folder)] = load_student(spec, folder, task).predict(texts)
    done = subprocess.run(
        [sys.executable, "-c", READ, json.dumps(texts), *expected],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for folder, answers in json.loads(done.stdout.splitlines()[-1]).items():
        for answer, row in zip(answers, expected[folder], strict=True):
            given = {a["label"]: a["score"] for a in answer} if isinstance(answer, list) else answer
            assert [given[label] for label in LABELS] == pytest.approx(row.tolist(), rel=1e-3, abs=1e-6), folder


WRITES = """
import contextlib, io, json, os, re, sys
sys.modules["distillery"] = None
os.chdir(sys.argv[1])
card, here = open("README.md").read(), {}
with contextlib.redirect_stdout(io.StringIO()):
    exec(re.search(r"```python\\n(.*?)```", card, re.S)[1], here)
print(json.dumps([here["answer"](text) for text in json.loads(sys.argv[2])]))
"""


@pytest.mark.parametrize("arch", ["causal", "seq2seq"])
def test_the_card_of_a_student_that_writes_answers(tiny_models, tmp_path, arch):
    """Its code writes what was scored; its scores are those of answers, not of labels."""
    task = Task(kind="qa", prompt={"instruction": "Answer.", "template": "{text}"})
    spec = StudentConfig(model="m", arch=arch, prompt="plain", phases=[phase({"ce": 1.0})])
    student = build_student(spec, tiny_models / f"tiny-{KINDS[arch]}", task, 0)
    rng = torch.Generator().manual_seed(5)  # no two best tokens within 0.005: rounding changes no answer
    for parameter in student.model.parameters():
        if parameter.dim() > 1:
            parameter.data = torch.randn(parameter.shape, generator=rng) * 0.3
    save_model(student.model, student.tokenizer, tmp_path / "model")
    rows = toy(3).assign(label="right", answers=["a | b", "c", "d"], group=list("abc"))
    rows.loc[2, "text"] = " ".join(tiny.texts()[:200])  # too long: it is cut
    predictions = predict_rows(load_student(spec, tmp_path / "model", task), rows)
    metadata = {
        "student": "s",
        "seed": 0,
        "parameters": 1,
        "bytes_on_disk": 1,
        "test": score_predictions(predictions, task.names),
    }
    predictions = predictions.assign(text=rows["text"], group=rows["group"])
    page = render_card(tmp_path / "model", spec, task, metadata, predictions)
    (tmp_path / "model/README.md").write_text(page)
    assert "that writes answers to questions" in page and "| exact match | " in page and "| token f1 | " in page
    assert not re.search("right, wrong|Brier|macro|precision \\| sens", page)
    done = subprocess.run(
        [sys.executable, "-c", WRITES, str(tmp_path / "model"), json.dumps(rows["text"].tolist())],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    firsts = [
        " ".join(text.splitlines()[0].split()) if text else "" for text in json.loads(done.stdout.splitlines()[-1])
    ]
    assert firsts == predictions["answer"].tolist()


def test_all_kinds_of_adapter_train_the_adapter_alone(tiny_models):
    for arch, kind in (("classifier", "lora"), ("causal", "lora"), ("causal", "qlora")):
        student = learner(tiny_models, arch, adapter={"kind": kind, "r": 2})
        moving = {name for name, p in student.model.named_parameters() if p.requires_grad}
        allowed = ("lora_", "modules_to_save") if arch == "classifier" else ("lora_",)
        assert moving and all(any(word in name for word in allowed) for name in moving)
        assert math.isfinite(student.predict(list(SENTENCES)).sum())
