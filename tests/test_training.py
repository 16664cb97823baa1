"""Training: rows and their order, the loss by hand, accumulation, resuming after a kill, and the finished folder."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import tiny
from distillery import metrics, models, params, tasks, training
from distillery.params import UserError

TASK = tasks.load("finance-sentiment", tiny.ROOT / "tasks")
LABELS = TASK.names
SHORT = TASK.model_copy(update={"prompt": tasks.Prompt(template="{text}")})  # a tiny model learns it in seconds
# answers of different lengths, so that a mean over tokens is no mean over rows
WORDS = SHORT.model_copy(
    update={"verbalizer": {"positive": "profit", "neutral": "profit rose", "negative": "net loss"}}
)
SAID = ("Operating profit rose.", "The meeting will be held in May.", "Sales fell and the loss grew.")


def toy(n: int, seed: int = 0) -> pd.DataFrame:
    """Rows that a student can tell apart, with two teachers that say different things of them."""
    rng = np.random.default_rng(seed)
    fillers = ["in", "the", "quarter", "of", "year", "this", "last", "company", "group", "said", "on", "Monday"]
    texts = [f"{SAID[i % 3]} {' '.join(rng.choice(fillers, rng.integers(0, 6)))}" for i in range(n)]
    frame = pd.DataFrame({"where": "toy/train", "id": [f"t{i}" for i in range(n)], "text": texts})
    frame["label"] = [LABELS[i % 3] for i in range(n)]
    for name in ("one", "two"):
        frame[f"p_{name}"] = list(rng.dirichlet(np.ones(3), n))
    return frame


def phase(loss: dict[str, float], **more) -> params.Phase:
    given = {"data": ["toy/train"], "loss": loss, "learning_rate": 1e-3, "warmup": 0.0}
    if set(loss) - {"ce"} and "teachers" not in more:
        given["teachers"] = ["one"]
    if "epochs" not in more:
        given["steps"] = 1
    return params.Phase(**given | more)


def learner(folder: Path, arch: str, task: tasks.Task = TASK, *, dropout=False, scale=1, **more) -> models.LabelModel:
    """An untrained student; with `scale` it tells texts apart from the start, as random weights hardly do."""
    kind = {"classifier": "bert", "causal": "llama"}[arch]
    spec = params.Student(model="m", arch=arch, phases=[], **more)
    student = training.build(spec, folder / f"tiny-{kind}", task, 0)
    for module in student.model.modules():
        if isinstance(module, torch.nn.Dropout) and not dropout:
            module.p = 0.0
    for parameter in student.model.parameters():
        parameter.data.mul_(scale if parameter.dim() > 1 else 1)
    return student


def trained(student, frame, spec, folder, **more) -> pd.DataFrame:
    return training.run_phase(student, training.phase_rows(frame, spec, LABELS), spec, folder=folder, seed=0, **more)


# ------------------------------------------------------------------------------- rows and their order


@pytest.mark.parametrize("order", ["random", "length", "confidence"])
@pytest.mark.parametrize("n, batch", [(1, 4), (7, 2), (40, 8), (300, 4)])
def test_every_row_comes_once_an_epoch(order, n, batch):
    lengths = np.random.default_rng(n).integers(1, 50, n).tolist()
    batches = training.Batches(lengths, batch, 3, order, [-length for length in lengths])
    for epoch in range(3):
        batches.set_epoch(epoch)
        assert len(batches) == n and sorted(batches) == list(range(n))


def test_the_order_is_a_function_of_seed_and_epoch():
    def rows(seed, epoch, before=0):
        batches = training.Batches(list(range(50)), 4, seed)
        for _ in range(before):
            list(batches)
        batches.set_epoch(epoch)
        return list(batches)

    assert rows(1, 2) == rows(1, 2, before=3)
    assert rows(1, 2) != rows(1, 3) and rows(1, 2) != rows(2, 2)


def test_orders_follow_length_and_confidence_and_batches_hold_rows_of_like_length():
    lengths, entropy = [5, 3, 9, 3], [0.1, 0.9, 0.5, 0.2]
    assert list(training.Batches(lengths, 2, 0, "length")) == [1, 3, 0, 2]
    assert list(training.Batches(lengths, 2, 0, "confidence", entropy)) == [0, 3, 2, 1]
    lengths = np.random.default_rng(0).integers(5, 60, 400)
    rows = list(training.Batches(lengths.tolist(), 8, 0))
    spread = np.mean([np.ptp(lengths[rows[a : a + 8]]) for a in range(0, 400, 8)])
    assert spread < 0.3 * np.mean([np.ptp(part) for part in lengths.reshape(-1, 8)])


def test_a_phase_finds_its_rows_and_mixes_its_teachers():
    frame = toy(6)
    frame.loc[3:, "where"], frame.loc[3:, "label"] = "toy/pool", None
    one, two = (np.stack(frame[f"p_{name}"].to_list()) for name in ("one", "two"))
    gold = training.phase_rows(frame, phase({"ce": 1.0}), LABELS)
    assert gold.texts == frame["text"][:3].tolist() and gold.targets.tolist() == [0, 1, 2] and gold.logprobs is None

    everything = {"data": ["toy/train", "toy/pool"], "teachers": ["one", "two"]}
    rows = training.phase_rows(frame, phase({"kl": 1.0}, **everything), LABELS)
    np.testing.assert_allclose(rows.logprobs.exp(), (one + two) / 2, atol=1e-6)
    assert rows.targets.tolist() == [0, 1, 2, *((one + two) / 2).argmax(1)[3:]]  # gold, else what the teachers say

    weighed = training.phase_rows(
        frame, phase({"kl": 1.0}, mix="validation", **everything), LABELS, {"one": 0.9, "two": 0.3}
    )
    np.testing.assert_allclose(weighed.logprobs.exp(), 0.75 * one + 0.25 * two, atol=1e-6)

    sure = training.phase_rows(frame, phase({"kl": 1.0}, mix="confidence", **everything), LABELS)
    entropies = np.stack([-(p * np.log(p)).sum(1) for p in (one, two)])
    doubt = np.where(np.arange(6) < 3, -np.log([[p[i, i % 3] for i in range(6)] for p in (one, two)]), entropies)
    weights = 1 - np.exp(doubt) / np.exp(doubt).sum(0)
    np.testing.assert_allclose(sure.logprobs.exp(), weights[0][:, None] * one + weights[1][:, None] * two, atol=1e-6)

    with pytest.raises(UserError, match="^phases: no row in toy/augmented$"):
        training.phase_rows(frame, phase({"ce": 1.0}, data=["toy/augmented"]), LABELS)


def test_a_row_is_taught_by_those_who_answered_and_by_nobody_if_none_did():
    frame = toy(6)
    one, two = (np.stack(frame[f"p_{name}"].to_list()) for name in ("one", "two"))
    frame["p_one"] = [None if i in (1, 4) else p for i, p in enumerate(one)]
    frame["p_two"] = [None if i in (2, 4) else p for i, p in enumerate(two)]
    for mix in ("uniform", "validation", "confidence"):
        both = phase({"kl": 1.0}, teachers=["one", "two"], mix=mix)
        rows = training.phase_rows(frame, both, LABELS, {"one": 0.5, "two": 0.5})
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
    assert training.optimizer_steps(n, spec) == steps
    assert trained(learner(tiny_models, "classifier"), toy(n), spec, tmp_path)["step"].max() <= steps


# ------------------------------------------------------------------------------- the loss, by hand


def by_hand(student: models.LabelModel, frame: pd.DataFrame, temperature: float) -> dict[str, float]:
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
            rendered = tasks.render(tasks.turns(student.task, text), student.tokenizer)
            prompt = student.tokenizer(rendered, add_special_tokens=False)["input_ids"]

            def told(answer, prompt=prompt, text=text):
                ids = torch.tensor([prompt + answer])
                logprobs = student.model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1).detach().numpy()
                return [logprobs[i, token] for i, token in enumerate(answer)]

            answers = [student.tokenizer(student.task.word(name))["input_ids"] for name in LABELS]
            nested = [student.tokenizer.eos_token_id]  # `profit` is where `profit rose` begins
            logits.append([sum(told(answer + nested)) for answer in answers])
            nll.append([-x for x in told(answers[gold] + nested)])
    student.model.train()
    z, p = np.asarray(logits), np.stack(frame["p_one"].to_list())
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


@pytest.mark.parametrize("arch", ["classifier", "causal"])
def test_a_student_learns_what_can_be_learned(tiny_models, tmp_path, arch):
    student = learner(tiny_models, arch, SHORT, dropout=True, scale=4)
    frame = toy(24)
    spec = phase({"ce": 1.0}, steps=60, batch_size=8, learning_rate=3e-3, schedule="cosine", warmup=0.1)
    history = trained(student, frame, spec, tmp_path)
    assert history["loss"].iloc[-1] < 0.5 * history["loss"].iloc[0]
    fresh = toy(30, seed=1)
    said = training.predicted(student, fresh)
    assert said.columns.tolist() == ["id", "label", "prediction", "probabilities"]
    assert training.scores(said, LABELS)["accuracy"] > 0.9
    assert history["step"].tolist() == [10, 20, 30, 40, 50, 60] and history["learning_rate"].iloc[-1] < 1e-3


def test_a_teacher_is_followed_even_where_it_is_wrong(tiny_models, tmp_path):
    frame = toy(24)
    frame["p_one"] = [np.roll([0.9, 0.05, 0.05], (i + 1) % 3) for i in range(24)]  # never the gold label
    student = learner(tiny_models, "classifier", scale=4)
    trained(student, frame, phase({"kl": 1.0}, steps=60, batch_size=8, learning_rate=3e-3, temperature=2.0), tmp_path)
    said = student.predict(toy(30, seed=1)["text"])
    assert (said.argmax(1) == (np.arange(30) + 1) % 3).mean() > 0.9
    assert np.abs(np.sort(said, 1)[:, -1] - 0.9).mean() < 0.1


# ------------------------------------------------------------------------------- early stopping


@pytest.mark.parametrize("arch", ["classifier", "causal"])
def test_early_stopping_returns_to_the_best_checkpoint(tiny_models, tmp_path, arch, monkeypatch):
    seen, evaluate = [], training._Phase.evaluate

    def listening(self, *args, **kwargs):
        seen.append(evaluate(self, *args, **kwargs)["eval_loss"])
        return {"eval_loss": seen[-1]}

    monkeypatch.setattr(training._Phase, "evaluate", listening)
    frame, other = toy(12), toy(12, seed=2)
    other["label"] = other["label"].sample(frac=1, random_state=1).to_list()  # fitting the rows makes these worse
    validation = training.Rows(other["text"].tolist(), np.array([LABELS.index(label) for label in other["label"]]))
    adapter = {"kind": "lora", "r": 4} if arch == "causal" else {}
    student = learner(tiny_models, arch, scale=3, adapter=adapter)
    stopping = {"metric": "loss", "patience": 2, "every": 2}
    spec = phase({"ce": 1.0}, steps=60, batch_size=4, learning_rate=1e-2, early_stopping=stopping, warmup=0.3)
    trained(student, frame, spec, tmp_path, validation=validation)
    assert len(seen) < 30 and np.argmin(seen) == len(seen) - 3  # two looks in vain, then it stopped
    best = training.scores(training.predicted(student, other), LABELS)["log_loss"]
    assert best == pytest.approx(min(seen), rel=1e-5) and best < seen[-1] - 1e-3


# ------------------------------------------------------------------------------- killed and resumed

SPECS = {
    "classifier": {"model": "m", "arch": "classifier", "init": {"layers": [0, 2]}},
    "causal": {"model": "m", "arch": "causal", "init": {"layers": "first-2"}, "adapter": {"kind": "lora", "r": 4}},
}


def run(arch: str, folder: str, out: str) -> None:
    """A whole training, as the notebook does it; runs in a process of its own."""
    phases = [
        phase({"kl": 1.0}, teachers=["one", "two"], steps=40, batch_size=4).model_dump(),
        phase({"ce": 0.5, "kl": 0.5}, temperature=2.0, steps=40, batch_size=2, accumulate=2).model_dump(),
    ]
    spec = params.Student(**SPECS[arch], phases=phases, checkpoint_every=10)
    student = training.build(spec, Path(folder) / f"tiny-{'bert' if arch == 'classifier' else 'llama'}", SHORT, 0)
    history, watched = training.run_phases(
        student, toy(22), spec, folder=Path(out), seed=3, validation=toy(6, 1), test=toy(6, 2)
    )
    models.save(student.model, student.tokenizer, Path(out) / "model")
    history.to_csv(Path(out) / "history.csv", index=False)
    watched.to_parquet(Path(out) / "watched.parquet")


@pytest.fixture(scope="module")
def start():
    """Starts :func:`run` in a fresh process that need not import anything any more."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distillery.training", "tiny"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # or Python 3.11 preloads nothing, and does not say so
        forkserver.ensure_running()

    def start(*args) -> multiprocessing.Process:
        process = context.Process(target=run, args=tuple(map(str, args)))
        process.start()
        return process

    return start


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
def test_a_killed_training_ends_like_an_unbroken_one(start, tiny_models, tmp_path, arch):
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
    assert history["phase"].tolist() == [1] * 4 + [2] * 4 and history["ce"].isna().tolist() == [True] * 4 + [False] * 4


def test_a_half_written_checkpoint_is_left_out(start, tiny_models, tmp_path):
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
            assert training._last_checkpoint(out) == str(out / "checkpoint-6")
            student = learner(tiny_models, "classifier", dropout=True)
            trained(student, frame, spec, out, checkpoint_every=3)
        weights.append(student.model.state_dict())
    for other in weights[1:]:
        assert all(torch.equal(weights[0][name], other[name]) for name in other)
    assert training._last_checkpoint(tmp_path / "nothing") is None


def test_checkpoints_have_a_key_of_all_that_decides_the_run():
    frame = toy(3).to_csv()
    key = training.run_key({"a": 1}, frame)
    assert key == training.run_key({"a": 1}, frame) and re.fullmatch("[0-9a-f]{16}", key)
    assert len({key, training.run_key({"a": 2}, frame), training.run_key({"a": 1}, toy(3, 1).to_csv())}) == 3


# ------------------------------------------------------------------------------- the finished folder

CARDS = {
    "classifier": ({}, TASK),
    "causal": ({"few_shot": 1}, TASK),
    "plain": ({"prompt": "plain"}, WORDS),  # nested answers of several tokens
}
READ = """
import contextlib, io, json, os, re, sys
sys.modules["distillery"] = None  # not to be had
texts, out = json.loads(sys.argv[1]), {}
for folder in sys.argv[2:]:
    os.chdir(folder)
    card, here = open("README.md").read(), {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(re.search(r"```python\\n(.*?)```", card, re.S)[1], here)
    assert printed.getvalue().strip()
    ask = lambda text: here["classify"](text, **({"top_k": None} if "pipeline" in here else {}))
    out[folder] = [ask(text) for text in texts]
print(json.dumps(out))
"""


def test_the_cards_code_says_what_was_scored_without_this_package(tiny_models, tmp_path):
    frame, expected = toy(5), {}
    gold = frame["label"].fillna("neutral").tolist()
    said = frame.assign(label=gold, prediction=["neutral"] * 4 + [gold[4]], group=list("aabcd"))
    test = metrics.classification_report(gold, said["prediction"], np.full((5, 3), 1 / 3), LABELS)
    about = {"student": "s", "seed": 0, "parameters": 1, "bytes_on_disk": 1, "test": test}
    for name, (more, task) in CARDS.items():
        arch = "classifier" if name == "classifier" else "causal"
        spec = params.Student(model="m", arch=arch, phases=[phase({"kl": 1.0})], **more)
        student = training.build(spec, tiny_models / f"tiny-{'bert' if arch == 'classifier' else 'llama'}", task, 0)
        for parameter in student.model.parameters():  # freshly drawn weights tell nothing apart
            parameter.data.mul_(6 if parameter.dim() > 1 else 1)
        folder = tmp_path / name
        models.save(student.model, student.tokenizer, folder)
        training.write_card(folder, spec, task, about, said)
        card = (folder / "README.md").read_text()
        low, high = metrics.interval(
            metrics.bootstrap_scores(gold, said["prediction"], LABELS, said["group"])["accuracy"]
        )
        assert f"| accuracy | {100 * test['accuracy']:.1f} % ({100 * low:.1f} to {100 * high:.1f}) |" in card
        assert f"classify({frame['text'].iloc[0]!r})" in card and "EUR 13.1" not in card
        assert "distilled from one." in card and "positive, neutral, negative" in card
        expected[str(folder)] = training.predicted(training.reopen(spec, folder, task), frame)["probabilities"]
    done = subprocess.run(
        [sys.executable, "-c", READ, json.dumps(frame["text"].tolist()), *expected],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for folder, answers in json.loads(done.stdout.splitlines()[-1]).items():
        for answer, row in zip(answers, expected[folder], strict=True):
            given = {a["label"]: a["score"] for a in answer} if isinstance(answer, list) else answer
            assert [given[label] for label in LABELS] == pytest.approx(row.tolist(), rel=1e-3), folder


def test_all_kinds_of_adapter_train_the_adapter_alone(tiny_models):
    for arch, kind in (("classifier", "lora"), ("causal", "lora"), ("causal", "qlora")):
        student = learner(tiny_models, arch, adapter={"kind": kind, "r": 2})
        moving = {name for name, p in student.model.named_parameters() if p.requires_grad}
        allowed = ("lora_", "modules_to_save") if arch == "classifier" else ("lora_",)
        assert moving and all(any(word in name for word in allowed) for name in moving)
        assert math.isfinite(student.predict(list(SAID)).sum())
