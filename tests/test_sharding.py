"""`strategy: fsdp`: two processes that hold a half of each weight equal one, and go on with what it began."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForSequenceClassification

import tiny
from distillery.config.schema import StudentConfig
from distillery.errors import UserError
from distillery.models.forward_check import ForwardMethods
from distillery.models.label_model import LabelModel
from distillery.models.load import load_model, load_tokenizer
from distillery.models.save import save_model
from distillery.training import trainers
from distillery.training import weights as weights_module
from distillery.training.openable_teachers import OpenableTeacher
from distillery.training.processes import process_count, process_rank, wait_for_all
from distillery.training.run import train_phases
from distillery.training.sharding import choose_methods, predict_in_step, shard_model, whole_weights
from distillery.training.shared_predictions import predict_together
from distillery.training.weights import load_weights, save_weights
from test_processes import CASES as DDP_CASES
from test_processes import LORA, Case, in_processes, rows_of, train_on_case
from test_training import LABELS, SHORT, WORDS, learner, phase, toy

WITHOUT_CHANGE = ("classifier", "causal", "more processes than rows")
ON_POLICY = {"space": "vocabulary", "on_policy": 0.5, "max_new_tokens": 4, "batch_size": 4, "accumulate": 2}
STOPPED = {"early_stopping": {"every": 1, "patience": 1, "metric": "accuracy"}, "steps": 6}
CASES = {name: DDP_CASES[name] for name in WITHOUT_CHANGE} | {
    "early stopping": Case("classifier", {"ce": 1.0}, {"batch_size": 8} | STOPPED),
    "all weights": Case(
        "causal", {"ce": 1.0}, {"batch_size": 1, "accumulate": 3}, {"gradient_checkpointing": True}, WORDS
    ),
    "frozen layers": Case(
        "causal", {"ce": 1.0}, {"batch_size": 8}, {"adapter": {"kind": "lora", "r": 4, "layers": "last-2"}}, SHORT
    ),
    "encoder and decoder": Case("seq2seq", {"ce": 1.0}, {"batch_size": 8}, {"prompt": "plain"}, WORDS),
    "series adapters": Case("classifier", {"ce": 1.0}, {"batch_size": 8}, {"adapter": {"kind": "series", "size": 4}}),
    "projections": Case(
        "classifier", {"ce": 0.5, "hidden": 0.5}, {"batch_size": 8, "layers": "skip", "validate_every": 2}, task=SHORT
    ),
}
CONTINUED = ("classifier", "causal", "projections")
StepClock = tiny.load_benchmark("processes").StepClock  # what a process holds of weights, gradients and states


def narrow_teacher(models: Path, cache: Path) -> dict[str, OpenableTeacher]:
    """A teacher of another width than the students."""
    folder = models / "tiny-bert"

    def open_fold(_fold: int) -> LabelModel:
        torch.manual_seed(1)
        config = AutoConfig.from_pretrained(folder, hidden_size=16, num_labels=3)
        model = AutoModelForSequenceClassification.from_config(config)
        return LabelModel(model.eval(), load_tokenizer(folder), SHORT, "classifier")

    return {"one": OpenableTeacher(open_fold, ["narrow"], 4, cache)}


def train_case(case: Case, models: Path, folder: Path, rows: int, sharded: bool) -> dict[str, Any]:
    """Train the student of `case`: its history, predictions and held bytes; its weights are in `folder`."""
    scale = 1 if case.arch == "seq2seq" else 3  # T5 does not scale attention: large weights amplify rounding
    student = learner(models, case.arch, case.task, scale=scale, **case.student)
    if sharded:
        shard_model(student)
    frame, held = toy(rows), StepClock()
    more = {"teachers": narrow_teacher(models, folder.parent / "signals")} if "hidden" in case.loss else {}
    history = train_on_case(student, case, models, folder, frame, 3, callbacks=[held], **more)
    predictions = predict_together(student, {"test": frame})
    save_weights(student.model, folder / "weights.safetensors")
    in_shards = {isinstance(weight, DTensor) for weight in student.model.parameters()}
    return {"history": history, "predictions": predictions, "held": held.held, "in shards": in_shards}


def train_all(models: Path, folder: Path, sharded: bool = False, alone: Path | None = None) -> dict[str, Any]:
    """All of `CASES`, each step logged; and those that go on from the checkpoints of one process in `alone`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainers, "LOG_EVERY", 1)
        results = {
            name: train_case(case, models, folder / name, rows_of(name), sharded) for name, case in CASES.items()
        }
        if process_count() > 1:
            on_policy = Case("causal", {"jsd": 1.0}, ON_POLICY, LORA, SHORT)
            for own in (False, True):
                results["on-policy", own] = train_case(on_policy, models, folder / f"on-policy-{own}", 22, own)
        results["phases"] = train_two_phases(models, folder / "phases", sharded)
        for name in CONTINUED if alone else ():
            results[f"{name}, continued"] = continue_from(alone / name, models, folder / f"{name}-continued", sharded)
    return results


def train_two_phases(models: Path, folder: Path, sharded: bool) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A student's history and predictions; the second phase is done anew on the weights that the first one left."""
    select = {"by": "doubt", "share": 0.5}
    phases = [phase({"ce": 1.0}, steps=2, batch_size=8, **more).model_dump() for more in ({}, {"select": select})]
    spec = StudentConfig(model="m", arch="classifier", phases=phases)
    for _ in range(2):
        student = learner(models, "classifier", SHORT, scale=3)
        if sharded:
            shard_model(student)
        given = {"validation": toy(5, 1), "test": toy(5, 2)}
        history, predictions = train_phases(student, toy(22), spec, folder=folder, seed=0, **given)
        wait_for_all()
        if process_rank() == 0:
            shutil.rmtree(folder / "phase-2", ignore_errors=True)
        wait_for_all()
    return history, predictions


def try_in_bfloat16(models: Path) -> dict[str, Any]:
    """Of an untrained causal student, whole and in shards: probabilities, generated tokens, types of weights."""
    student = learner(models, "causal", WORDS, scale=3, dtype="bfloat16", prompt="plain")
    texts = toy(6)["text"].tolist()
    ids, gathered = student.encode(texts), set()

    def outputs() -> tuple[np.ndarray, list[list[int]]]:
        return student.predict(texts), student.generate_tokens(ids[: process_rank() + 1], max_new_tokens=3)

    whole = outputs()
    shard_model(student)
    layer = student.model.model.layers[1]
    layer.mlp.register_forward_pre_hook(lambda mlp, _: gathered.add(mlp.up_proj.weight.dtype))
    with whole_weights(student):  # the processes generate for unequally many rows
        cut = outputs()
    step = predict_in_step(student, lambda: student.predict(texts))
    kept = {weight.dtype for weight in student.model.parameters()}
    return {"whole": whole, "cut": cut, "step": step, "gathered": gathered, "kept": kept}


def continue_from(begun: Path, models: Path, folder: Path, sharded: bool) -> dict[str, Any]:
    """Go on with the training of a case from the checkpoint of its second step."""
    if process_rank() == 0:
        shutil.copytree(begun / "checkpoint-2", folder / "checkpoint-2")
    return train_case(CASES[begun.name], models, folder, 22, sharded)


def refused_models(models: Path) -> dict[str, str]:
    """The lines that refuse a model in float16, and one that computes each row alone."""
    lines = {}
    with pytest.raises(UserError) as error:
        shard_model(learner(models, "classifier", SHORT, dtype="float16"))
    lines["float16"] = str(error.value)
    student = learner(models, "causal", SHORT)
    shard_model(student)
    ids = student.encode(toy(4)["text"].tolist())
    choose_methods(student, ids)
    student.forward_methods = lambda *_: ForwardMethods("plain", "plain", True, 64)
    with pytest.raises(UserError) as error:
        choose_methods(student, ids)
    lines["row by row"] = str(error.value)
    return lines


def shared_work(models: Path, folder: Path, alone: Path) -> dict[str, Any]:
    """What the two processes of this file do."""
    tried = {"bfloat16": try_in_bfloat16(models), "refused": refused_models(models)}
    return train_all(models, folder, True, alone) | tried


@pytest.fixture(scope="module")
def one(tiny_models, tmp_path_factory) -> tuple[dict[str, Any], Path]:
    """The results of one process, and its folder."""
    folder = tmp_path_factory.mktemp("one")
    return train_all(tiny_models, folder), folder


@pytest.fixture(scope="module")
def two(one, tiny_models, tmp_path_factory) -> tuple[list[dict[str, Any]], Path]:
    """The results of each of two processes, and their folder."""
    folder = tmp_path_factory.mktemp("two")
    return in_processes(2, shared_work, tiny_models, folder, one[1], folder=folder), folder


def assert_same(result: dict[str, Any], other: dict[str, Any]) -> None:
    pd.testing.assert_frame_equal(result["history"], other["history"], rtol=1e-6, atol=0)
    assert_close(result["predictions"], other["predictions"])


def assert_close(predictions: pd.DataFrame, others: pd.DataFrame) -> None:
    """The same labels, and probabilities but for rounding."""
    assert predictions["prediction"].tolist() == others["prediction"].tolist()
    p, q = (np.stack(table["probabilities"].to_list()) for table in (predictions, others))
    np.testing.assert_allclose(p, q, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(one, two, name):
    """The loss and its terms to 1e-6 at each step, the label of each row, and the weights in the file."""
    alone, (first, second) = one[0][name], [results[name] for results in two[0]]
    assert first["history"].equals(second["history"])
    assert first["history"]["loss"].nunique() == len(first["history"])
    assert_same(first, alone)
    assert first["in shards"] == {True} and alone["in shards"] == {False}
    files = [load_file(folder / name / "weights.safetensors") for folder in (two[1], one[1])]
    assert files[0].keys() == files[1].keys()
    for key, weight in files[1].items():
        assert torch.allclose(files[0][key], weight, atol=2e-5), key


@pytest.mark.parametrize("name", CASES)
def test_each_process_holds_its_part(two, name):
    """Of weights, gradients and optimizer states; what cannot be cut evenly, as the rows of a small head, is little."""
    for kind, parts in enumerate(zip(*(results[name]["held"] for results in two[0]), strict=True)):
        (first, whole), (second, _) = parts
        assert first + second == whole > 0, kind
        assert abs(first - second) <= 0.1 * whole, kind


def test_a_run_continues_with_and_without_shards(one, two, tiny_models, tmp_path):
    """From a checkpoint of one process in shards, and from one in shards in one process: as if nothing had happened."""
    for name in CONTINUED:
        back = continue_from(two[1] / name, tiny_models, tmp_path / name, sharded=False)
        for continued in (two[0][0][f"{name}, continued"], back):
            assert_same(continued, one[0][name])


def test_on_policy_shards_generate_what_whole_models_do(two):
    """Of as many processes: the answers are drawn with a seed of step and process."""
    first, second = (results["on-policy", True] for results in two[0])
    assert first["history"].equals(second["history"])
    assert first["history"]["loss"].nunique() == len(first["history"])
    assert_same(first, two[0][0]["on-policy", False])


def test_the_phases_of_a_student_in_shards(one, two):
    """The untrained student's predictions too, and a second phase on weights that are read from a file."""
    for table, other in zip(two[0][0]["phases"], one[0]["phases"], strict=True):
        if "loss" in table:
            pd.testing.assert_frame_equal(table, other, rtol=1e-6, atol=0)
        else:
            assert_close(table, other)


@pytest.mark.parametrize("name", ["classifier", "causal"])
def test_a_student_that_was_in_shards_is_saved_as_a_whole(two, tiny_models, tmp_path, name):
    """As 04_distill does it: its weights are read into a whole model, whose folder reopens with the same labels."""
    case = CASES[name]
    student = learner(tiny_models, case.arch, case.task, scale=3, **case.student)
    load_weights(student.model, two[1] / name / "weights.safetensors")
    save_model(student.model, student.tokenizer, tmp_path / "model")
    model = load_model(tmp_path / "model", case.arch, labels=LABELS)
    reopened = LabelModel(model.eval(), student.tokenizer, case.task, case.arch)
    predictions = predict_together(reopened, {"test": toy(22)})
    assert_close(predictions, two[0][0][name]["predictions"])


def test_a_model_in_shards_shares_no_prefix(tiny_models):
    """A process whose rows begin alike would call the layers once more than one whose rows do not."""
    student, ids = learner(tiny_models, "causal", SHORT), [[5, 6, 7], [5, 6, 8]]
    assert student._prefix_kv(ids, "packed") is not None
    student.sharded = object()
    assert student._prefix_kv(ids, "packed") is None


def test_weights_of_another_model_are_no_shards(tiny_models, tmp_path, monkeypatch):
    """Shards are read by name, and a name that nothing has would leave the model as it was."""
    student = learner(tiny_models, "classifier", SHORT)
    save_weights(student.model, tmp_path / "weights.safetensors")
    monkeypatch.setattr(weights_module, "is_sharded", lambda _: True)
    monkeypatch.setattr(weights_module, "shard_weights", lambda _, weights: weights)
    load_weights(student.model, tmp_path / "weights.safetensors")
    weights = load_file(tmp_path / "weights.safetensors")
    name, weight = weights.popitem()
    save_file(weights | {f"{name}.other": weight}, tmp_path / "other.safetensors")
    with pytest.raises(RuntimeError, match=rf"of another model: it lacks \['{name}'\], and has \['{name}.other'\]"):
        load_weights(student.model, tmp_path / "other.safetensors")


def test_what_cannot_be_in_shards_is_refused_by_each_process(two):
    """Before it waits for the other one."""
    for results in two[0]:
        refused = results["refused"]
        assert "not in float16, whose small gradients vanish; set `dtype: bfloat16`" in refused["float16"]
        assert "llama is computed row by row, which takes `strategy: ddp`" in refused["row by row"]


def test_in_bfloat16_layers_are_gathered_narrow(two):
    """And keep their weights in float32; with all weights gathered a process computes what a whole model does."""
    for rank, results in enumerate(two[0]):
        result = results["bfloat16"]
        assert result["gathered"] == {torch.bfloat16} and result["kept"] == {torch.float32}
        (p, tokens), (q, others) = result["whole"], result["cut"]
        assert len(tokens) == rank + 1 and tokens == others
        np.testing.assert_allclose(p, q, atol=0.02)
        np.testing.assert_allclose(result["step"], q, atol=0.02)
