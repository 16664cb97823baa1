"""Several processes that train together: they equal one, decide alike, and continue after one of them was killed."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig

import stages
import tiny
from distillery.config.load import load_params
from distillery.config.schema import ComputeConfig
from distillery.data.storage import read_task
from distillery.errors import UserError
from distillery.models.label_model import LabelModel
from distillery.pipeline.environment import ENVIRONMENT
from distillery.pipeline.inputs import write_student_inputs
from distillery.pipeline.strip import run_strip
from distillery.tasks.schema import load_task
from distillery.teachers import finetune, labelling
from distillery.teachers.base import gather_rows, open_teacher
from distillery.teachers.signals import label_rows
from distillery.teachers.worker import label_rows_of_teacher, tune_teacher
from distillery.training import shared_steps, trainers
from distillery.training.launch import MISTAKE, PROCESSES, describe_failure, run_processes
from distillery.training.processes import join_processes, process_count, process_rank
from distillery.training.rows import phase_rows
from distillery.training.run import train_phase, validation_rows
from distillery.training.shared_steps import share_rows
from distillery.training.student_inputs import StudentInputs
from distillery.training.worker import SHARDING, run_together, train_student
from forked import fork_context, preloaded_python
from test_training import LABELS, SHORT, WORDS, learner, openable_teachers, phase, toy

LORA = {"adapter": {"kind": "lora", "r": 4}}
PATIENCE = 1800  # seconds, for what takes a few on an idle machine
STOPPED = {"early_stopping": {"every": 1, "patience": 2, "metric": "accuracy"}, "steps": 12}


@dataclass(frozen=True)
class Case:
    """A training: of which student, on what loss, with what settings of its phase."""

    arch: str
    loss: dict[str, float]
    settings: dict[str, Any]
    student: dict[str, Any] = field(default_factory=dict)
    task: Any = WORDS


# 22 rows in steps of 8: the third step of an epoch has 6, and is uneven however it is cut
CASES = {
    "classifier": Case("classifier", {"ce": 0.5, "kl": 0.5}, {"batch_size": 4, "accumulate": 2, "temperature": 2.0}),
    "causal": Case("causal", {"jsd": 1.0}, {"batch_size": 4, "accumulate": 2, "space": "vocabulary"}, LORA, SHORT),
    "one row a micro-batch": Case("causal", {"ce": 1.0}, {"batch_size": 1, "accumulate": 3}, LORA),
    "more processes than rows": Case("classifier", {"ce": 1.0}, {"batch_size": 3}),
    "hidden states": Case("classifier", {"ce": 0.5, "pkd": 0.5}, {"batch_size": 6, "layers": "skip"}, task=SHORT),
    "early stopping": Case("classifier", {"ce": 1.0}, {"batch_size": 8} | STOPPED),
}


def train_on_case(
    student: LabelModel, case: Case, models: Path, folder: Path, frame: pd.DataFrame, steps: int, **more: Any
) -> pd.DataFrame:
    """Train `student` on `frame` as `case` has it, with a checkpoint in the middle; its history."""
    archs = {"one": "causal"} if case.arch == "causal" else {"one": "classifier"}
    spec = phase(case.loss, **{"steps": steps} | case.settings)
    given = {"teachers": openable_teachers(models, folder.parent / "signals", **archs)}
    if spec.stopping or spec.validate_every:
        given["validation"] = validation_rows(toy(9, 1), student.task)
    frame, every = frame.assign(fold_one=-1, fold_two=-1), (steps + 1) // 2
    rows = phase_rows(frame, spec, LABELS)
    return train_phase(student, rows, spec, folder=folder, seed=0, checkpoint_every=every, **given | more)


def train_case(case: Case, models: Path, folder: Path, rows: int = 22, **more: Any) -> dict[str, Any]:
    """Train the student of `case`; its history, its predictions and its weights."""
    student, frame = learner(models, case.arch, case.task, scale=3, **case.student), toy(rows)
    history = train_on_case(student, case, models, folder, frame, 6, **more)
    weights = {name: p.detach().clone() for name, p in student.model.named_parameters() if p.requires_grad}
    return {"history": history, "predictions": student.predict(frame["text"].tolist()), "weights": weights}


def rows_of(name: str) -> int:
    return 7 if name == "more processes than rows" else 22  # steps of 3, 3 and 1 rows


def train_all(models: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """All of `CASES`; each step is logged."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainers, "LOG_EVERY", 1)
        return {name: train_case(case, models, folder / name, rows_of(name)) for name, case in CASES.items()}


def in_processes(count: int, function: Callable[..., Any], *arguments: Any, folder: Path) -> list[Any]:
    """What `function` returns in each of `count` processes that train together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    processes = [
        fork_context().Process(target=take_part, args=(rank, count, port, folder, function, arguments))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
    assert [process.exitcode for process in processes] == [0] * count
    return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(count)]


def take_part(rank: int, count: int, port: int, folder: Path, function: Callable[..., Any], arguments: tuple) -> None:
    """Runs in a process of its own: see :func:`in_processes`."""
    gc.freeze()  # see tests/conftest.py
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ |= {name: str(value) for name, value in here.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with join_processes():
        assert (process_rank(), process_count()) == (rank, count)
        (folder / f"result-{rank}").write_bytes(pickle.dumps(function(*arguments)))


def continue_from(checkpoint: Path, models: Path, folder: Path) -> dict[str, Any]:
    """Go on with the training of the case `causal` from `checkpoint`."""
    if process_rank() == 0:
        shutil.copytree(checkpoint, folder / checkpoint.name)
    return train_case(CASES["causal"], models, folder)


def shared_work(models: Path, folder: Path, alone: Path) -> dict[str, dict[str, Any]]:
    """What the two processes of this file do."""
    results = train_all(models, folder)
    results["continued"] = continue_from(alone / "causal/checkpoint-3", models, folder / "continued")
    return results


@pytest.fixture(scope="module")
def one(tiny_models, tmp_path_factory) -> tuple[dict[str, dict[str, Any]], Path]:
    """The results of one process, and its folder."""
    folder = tmp_path_factory.mktemp("one")
    return train_all(tiny_models, folder), folder


@pytest.fixture(scope="module")
def two(one, tiny_models, tmp_path_factory) -> tuple[list[dict[str, dict[str, Any]]], Path]:
    """The results of each of two processes, and their folder."""
    folder = tmp_path_factory.mktemp("two")
    return in_processes(2, shared_work, tiny_models, folder, one[1], folder=folder), folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(one, two, name):
    """The loss and its terms to 1e-6 at each step, and the label of each row."""
    alone, (first, second) = one[0][name], [results[name] for results in two[0]]
    assert first["history"].equals(second["history"])
    assert all(torch.equal(weight, second["weights"][key]) for key, weight in first["weights"].items())
    pd.testing.assert_frame_equal(first["history"], alone["history"], rtol=1e-6, atol=0)
    assert first["history"]["loss"].nunique() == len(first["history"])
    assert (len(first["history"]) < CASES[name].settings.get("steps", 6)) == (name == "early stopping")
    np.testing.assert_allclose(first["predictions"], alone["predictions"], atol=1e-5)
    assert (first["predictions"].argmax(-1) == alone["predictions"].argmax(-1)).all()


def test_a_run_continues_on_another_number_of_processes(one, two, tiny_models, tmp_path):
    """From a checkpoint of one process in two, and from one of two processes in one: as if nothing had happened."""
    back = continue_from(two[1] / "causal/checkpoint-3", tiny_models, tmp_path / "run")
    for continued in (two[0][0]["continued"], back):
        np.testing.assert_allclose(continued["predictions"], one[0]["causal"]["predictions"], atol=1e-6)


def test_only_the_first_process_writes_checkpoints(two):
    files = {path.name for path in (two[1] / "causal/checkpoint-6").iterdir()}
    assert "trainer_state.json" in files and not [name for name in files if name.startswith("rng_state")]


@pytest.mark.parametrize(("count", "batch_size"), [(1, 4), (2, 4), (3, 2), (4, 1), (5, 8)])
def test_the_shares_of_a_step_are_its_rows(count, batch_size):
    lengths = np.random.default_rng(0).integers(1, 50, 40).tolist()
    micro_batches = [list(range(k * batch_size, (k + 1) * batch_size)) for k in range(4)]
    micro_batches[-1] = micro_batches[-1][: max(1, batch_size // 2)]
    sampled = [False, True, True, False]
    shares = [
        share_rows(micro_batches, sampled, lengths, batch_size=batch_size, rank=rank, count=count)
        for rank in range(count)
    ]
    for kind in (True, False):
        rows = [i for batch, own in zip(micro_batches, sampled, strict=True) if own == kind for i in batch]
        assert sorted(i for share in shares for own, of in share if of == kind for i in own) == sorted(rows)
    for share in shares:
        assert len(share) == len(micro_batches) and max(len(rows) for rows, _ in share) <= batch_size
    sizes = [sum(len(rows) for rows, _ in share) for share in shares]
    assert max(sizes) - min(sizes) <= 2  # one row of each kind


# ------------------------------------------------------------------------- the stage, and a process that is killed


@pytest.fixture(scope="module")
def built(tiny_models, tmp_path_factory) -> Path:
    """An experiment whose teachers are about to be tuned, and its student `tiny-gold` trained, by two processes."""
    repo = tiny.experiment(tmp_path_factory.mktemp("together") / "repo", tiny_models)
    text = (repo / "params.yaml").read_text(encoding="utf-8")
    text = text.replace("  tiny-gold:\n", "  tiny-gold:\n    checkpoint_every: 3\n").replace("steps: 6", "steps: 30")
    (repo / "params.yaml").write_text(f"{text}\ncompute: {{processes: 2}}\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(repo)
        run_strip()
        tiny.prepare_data(repo)
        params = load_params()
        write_student_inputs(repo, params.model_copy(update={"students": {"tiny-gold": params.students["tiny-gold"]}}))
    return repo


@pytest.fixture
def repo(built, monkeypatch) -> Path:
    """The folder of that experiment, in which this process then is, in the environment of a stage."""
    monkeypatch.chdir(built)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, os.environ.get(name, value))
    for name, value in preloaded_python(built).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DISTILLERY_DTYPES", '{"training": "float32", "prediction": "float32"}')
    return built


def kill_at_a_checkpoint(folder: Path, rank: int) -> None:
    """SIGKILL the process of this `rank` as soon as `folder` holds a whole checkpoint."""
    end, processes = time.monotonic() + PATIENCE, []
    while not processes or not list(folder.glob("checkpoints-1/checkpoint-*/trainer_state.json")):
        assert time.monotonic() < end
        processes = processes or find_processes(rank)
        time.sleep(0.001)
    (killed,) = processes
    killed.kill()


def find_processes(rank: int) -> list[psutil.Process]:
    """The processes of this `rank` that this process has started."""
    of_rank = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended
            of_rank += [process] if process.environ().get("RANK") == str(rank) else []
    return of_rank


def go_on_and_begin_anew(repo: Path) -> None:
    """What two processes of a scheduler do: continue the training of the student, and train it in another folder."""
    os.chdir(repo)
    train_student("tiny-gold", 0, None)
    train_student("tiny-gold", 0, repo / "unbroken")


def test_a_killed_process_is_named_and_the_run_continues(repo, capsys, monkeypatch):
    """To the bit, with dropout. Then the notebook goes on with what the processes have left."""
    monkeypatch.delenv("PRELOADED_TORCH", raising=False)  # what is killed has to be the process that trains
    inputs, params = StudentInputs(repo, "tiny-gold"), load_params()
    folder = inputs.checkpoints(inputs.build(0), 0, processes=2)
    watch = threading.Thread(target=kill_at_a_checkpoint, args=(folder, 1))
    watch.start()
    with pytest.raises(UserError) as error:
        inputs.train_in_processes(params.compute, 0, folder)
    watch.join()
    assert str(error.value) == (
        "tiny-gold, seed 0: process 1 of 2, counted from 0, was ended by SIGKILL (out of memory?); run again: it "
        "continues from the last checkpoint"
    )
    lines = re.findall(r"phase 1 of 1: a checkpoint takes", capsys.readouterr().out)
    assert len(lines) == 1  # the first process alone prints
    assert {path.name for path in folder.iterdir()} == {"phase-0", "checkpoints-1"}
    in_processes(2, go_on_and_begin_anew, repo, folder=repo / "results")
    names = ["phase-0", "phase-1"]
    assert sorted(path.name for path in folder.iterdir()) == names
    for file in [f"{name}/{file}" for name in names for file in ("weights.safetensors", "history.csv")]:
        assert (folder / file).read_bytes() == (repo / "unbroken" / file).read_bytes(), file
    expected = pd.read_csv(folder / "phase-1/history.csv")
    inputs.train_in_processes(params.compute, 0, folder)  # nothing is left to do
    stages.run_notebook(repo, "04_distill", student="tiny-gold", seed=0)
    pd.testing.assert_frame_equal(pd.read_csv("runs/tiny-gold-0/history.csv").drop(columns="phase"), expected)
    assert not folder.exists()

    # one process never finds what several left, unless it is the only thing there
    learner = inputs.build(0)
    alone = inputs.checkpoints(learner, 0, processes=1)
    assert alone != folder == inputs.checkpoints(learner, 0, processes=3)
    folder.mkdir()
    assert inputs.checkpoints(learner, 0, processes=1) == folder
    alone.mkdir()
    assert [inputs.checkpoints(learner, 0, count) for count in (1, 2)] == [alone, folder]


def accelerate_config(path: Path, kind: str, **settings: Any) -> ComputeConfig:
    """Two processes as a file in the form of `accelerate config` has them."""
    common = {"compute_environment": "LOCAL_MACHINE", "use_cpu": False, "debug": False, "main_process_port": 0}
    given = {"mixed_precision": "no"} | settings
    ClusterConfig(distributed_type=kind, num_processes=2, **common | given).to_yaml_file(path)
    return ComputeConfig(processes=2, config=str(path))


def train_in(repo: Path, folder: Path) -> None:
    """What each process that 04_distill starts does."""
    os.chdir(repo)
    train_student("tiny-gold", 0, folder)


def test_accelerate_launches_the_processes_of_a_file(repo, tmp_path):
    """They train as those of torchrun, to the bit; the number format of the file is not taken."""
    compute = accelerate_config(tmp_path / "cluster.yaml", "MULTI_GPU", mixed_precision="bf16")
    StudentInputs(repo, "tiny-gold").train_in_processes(compute, 0, tmp_path / "launched")
    in_processes(2, train_in, repo, tmp_path / "forked", folder=tmp_path)
    for file in ("history.csv", "weights.safetensors"):
        launched, forked = (tmp_path / folder / "phase-1" / file for folder in ("launched", "forked"))
        assert launched.read_bytes() == forked.read_bytes(), file


FAILING = """
import os, pathlib, signal, sys, time
if os.environ["RANK"] == "1" and sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if os.environ["RANK"] == "1":
    pathlib.Path(os.environ["DISTILLERY_MISTAKE"]).write_text("shards: " + os.environ[sys.argv[1]])
    sys.exit(1)
time.sleep(1800)  # until the launcher ends it
"""


@pytest.mark.parametrize(
    ("kind", "argument", "message"),
    [
        ("MULTI_GPU", "killed", "t: process 1 of 2, counted from 0, was ended by SIGKILL …"),
        ("FSDP", SHARDING[0], "shards: true"),
    ],
)
def test_a_process_of_accelerate_that_fails_is_one_line(repo, tmp_path, monkeypatch, kind, argument, message):
    """Killed, or with a user's mistake. The other one ends."""
    (tmp_path / "failing.py").write_text(FAILING, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UserError) as error:
        run_processes(accelerate_config(tmp_path / "cluster.yaml", kind), "failing", [argument], "t")
    assert str(error.value).startswith(message.removesuffix("…")) and "\n" not in str(error.value)


def tune_in(repo: Path, folder: Path) -> None:
    """What each process that 02_teach starts does."""
    os.chdir(repo)
    tune_teacher(folder)


def test_a_teacher_is_tuned_as_by_one_process(repo, monkeypatch):
    params, rows = load_params(), pd.read_parquet("data/processed/finance/train.parquet")
    task, trained = read_task(repo / "data/processed/finance"), []
    monkeypatch.setattr(  # the launcher has its test above
        finetune,
        "run_processes",
        lambda compute, module, arguments, title: in_processes(
            compute.processes, tune_in, repo, Path(arguments[1]), folder=repo / "results"
        ),
    )
    written, qlora = (repo / "params.yaml").read_text(encoding="utf-8"), "kind: qlora"
    for processes, strategy in ((1, "ddp"), (2, "ddp"), (2, "fsdp")):
        if strategy == "fsdp":  # the processes read it from the file
            text = written.replace("{processes: 2}", "{processes: 2, strategy: fsdp}").replace(qlora, "kind: lora")
            (repo / "params.yaml").write_text(text, encoding="utf-8")
        settings = params.model_copy(update={"compute": ComputeConfig(processes=processes, strategy=strategy)})
        teacher, history = finetune.finetune_teacher("lm", settings, task, rows, folder=repo / f"tuned-{strategy}")
        weights = {name: p.detach() for name, p in teacher.model.named_parameters() if p.requires_grad}
        trained.append((history, weights, teacher.predict(rows["text"].tolist())))
    (repo / "params.yaml").write_text(written, encoding="utf-8")
    history, weights, predictions = trained[0]
    assert [name for name, weight in weights.items() if ".lora_B." in name and weight.abs().max() > 1e-4]
    for other_history, other_weights, other_predictions in trained[1:]:
        pd.testing.assert_frame_equal(other_history, history, rtol=1e-6)
        np.testing.assert_allclose(other_predictions, predictions, atol=1e-6)
        assert other_weights.keys() == weights.keys()
        for name, weight in weights.items():
            assert torch.allclose(other_weights[name], weight, atol=1e-5), name


def label_in(repo: Path, folder: Path) -> None:
    """What each process that 02_teach starts for the labels does."""
    os.chdir(repo)
    label_rows_of_teacher(folder)


def test_a_teacher_labels_as_in_one_process(repo, monkeypatch):
    """Part by part: those that are there are not computed again."""
    params, task = load_params(), read_task(repo / "data/processed/finance")
    rows = gather_rows(repo, params, "lm").iloc[:20].reset_index(drop=True)
    prompting = {"prompt": None, "prior": [0.2, 0.3, 0.5]}
    starts = []

    def start(compute, module, arguments, title):  # the launcher has its test above
        starts.append(arguments)
        in_processes(compute.processes, label_in, repo, Path(arguments[1]), folder=repo / "results")

    monkeypatch.setattr(labelling, "run_processes", start)
    expected = label_rows(open_teacher(repo, "lm", params, task, prompting=prompting), rows, -1, 8)
    shared = labelling.Labelling("lm", task, rows, None, prompting, rows_per_part=6)
    signals = shared.label_in_processes(params, repo / "scratch")
    for both in (expected, signals):
        both["values"] = [p.tolist() for p in both.pop("probabilities")]
    np.testing.assert_allclose(signals.pop("values").tolist(), expected.pop("values").tolist(), atol=1e-6)
    pd.testing.assert_frame_equal(signals, expected)
    (folder,) = (repo / "scratch").iterdir()
    assert len(parts := shared.parts(folder)) == 4 and all(part.exists() for part in parts)
    assert len(starts) == 1
    assert shared.label_in_processes(params, repo / "scratch")["label"].equals(signals["label"])
    assert len(starts) == 1, "nothing is missing, so no process starts"
    parts[2].unlink()
    before = [part.stat().st_mtime_ns for part in (*parts[:2], parts[3])]
    assert shared.label_in_processes(params, repo / "scratch")["label"].equals(signals["label"])
    assert parts[2].exists() and before == [part.stat().st_mtime_ns for part in (*parts[:2], parts[3])]


def test_a_process_that_comes_later_labels_its_own_parts_alone(tmp_path, monkeypatch):
    """Whatever the other process has finished by then."""
    labelled = []
    monkeypatch.setattr(labelling, "open_teacher", lambda *_, **__: "teacher")
    monkeypatch.setattr(labelling, "label_rows", lambda _, part, *__: labelled.extend(part["id"]) or part)
    monkeypatch.setattr(labelling, "process_count", lambda: 2)
    task = load_task("finance-sentiment", tiny.ROOT / "tasks")
    work = labelling.Labelling("lm", task, pd.DataFrame({"id": range(5)}), None, {}, rows_per_part=1)
    params = load_params(tiny.ROOT / "params.yaml")
    params = params.model_copy(update={"teachers": {"lm": next(iter(params.teachers.values()))}})
    for rank, parts in ((0, [0, 2, 4]), (1, [1, 3])):
        labelled.clear()
        monkeypatch.setattr(labelling, "process_rank", lambda rank=rank: rank)
        work.label_share(tmp_path, params, tmp_path)
        assert labelled == parts


def make_a_mistake() -> None:
    raise UserError("phases: not so")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "phases: not so"),
        (
            {"ACCELERATE_USE_FSDP": "true"},
            "compute.config: it shards the model (FSDP or DeepSpeed) in a way of its own; take a file that does not, "
            "and set `compute.strategy: fsdp`",
        ),
        (
            {PROCESSES: "2"},
            "compute.config: it starts 1 of the 2 `processes`; on CPUs of one machine take no `config`, else a file "
            "with the same `num_processes`",
        ),
    ],
)
def test_a_mistake_in_a_process_is_left_for_the_one_that_started_it(tmp_path, environment, message):
    here = environment | {MISTAKE: str(tmp_path / "mistake")}
    process = fork_context().Process(target=fail_in_a_process, args=(here,))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == 1 and (tmp_path / "mistake").read_text().startswith(message.removesuffix("…"))


def fail_in_a_process(environment: dict[str, str]) -> None:
    """Runs in a process of its own."""
    os.environ |= environment
    run_together(make_a_mistake)


REPORT = """
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
Failures:
[1]:
  time      : 2026-01-01_00:00:00
  host      : localhost
  rank      : {other} (local_rank: 0)
  exitcode  : {code} (pid: 11)
  error_file: <N/A>
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-01-01_00:00:00
  host      : localhost
  rank      : 2 (local_rank: 2)
  exitcode  : 1 (pid: 12)
  error_file: <N/A>
"""


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (-9, "t: process 3 of 4, counted from 0, was ended by SIGKILL (out of memory?); run again: …"),
        (-11, "t: process 3 of 4, counted from 0, was ended by SIGSEGV; run again: …"),
        (-15, "t: a process failed:…"),
        (1, "t: a process failed:…"),
    ],
)
def test_a_killed_process_is_named_whichever_failed_first(code, message):
    """The others fail in their next exchange with it, often before the launcher looks."""
    failure = describe_failure(REPORT.format(other=3, code=code), 4, "t")
    assert str(failure).startswith(message.removesuffix("…"))
    assert isinstance(failure, UserError) == (code in (-9, -11))


def test_a_term_that_does_not_add_up_is_refused_in_the_processes_too(monkeypatch):
    """A scheduler may start them where params.yaml has one process."""
    monkeypatch.setattr(shared_steps, "process_count", lambda: 2)
    trainer = SimpleNamespace(phase=SimpleNamespace(loss={"ce": 1.0, "label_prior": 0.1}))
    with pytest.raises(UserError, match=r"^loss.label_prior: .* set `compute.processes: 1`$"):
        shared_steps.SharedStepsMixin.share_model(trainer)
