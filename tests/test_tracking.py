"""Trackers on real stores: an MLflow database and TensorBoard event files of a training that was killed."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sqlite3
import struct
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pandas as pd
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distillery.config.schema import Params, StudentConfig
from distillery.errors import UserError
from distillery.tasks.schema import Task, TaskPrompt
from distillery.training import tracking
from distillery.training.run import train_phases
from distillery.training.student import build_student
from distillery.training.trackers import TRACKERS, TrackedRun
from distillery.training.tracking import RECORD, Tracking, attach_results, run_settings, tracked_run, write_record
from forked import fork_context

TASK = Task(
    kind="classification", labels={"up": "profit rose", "down": "it fell"}, prompt=TaskPrompt(template="{text}")
)
PHASE = {"data": ["toy/train"], "loss": {"ce": 1.0}, "steps": 25, "batch_size": 4, "learning_rate": 1e-3}
SPEC = StudentConfig(
    model="m",
    arch="classifier",
    init={"layers": [0]},
    phases=[PHASE, PHASE | {"learning_rate": 5e-4, "validate_every": 10}],
)
LOCAL = ["tensorboard", "mlflow"]


def rows(n: int) -> pd.DataFrame:
    texts = [f"{'Operating profit rose' if i % 2 else 'Sales fell'} in quarter {i}." for i in range(n)]
    frame = pd.DataFrame({"split_ref": "toy/train", "id": [str(i) for i in range(n)], "text": texts})
    return frame.assign(label=[TASK.names[(i + 1) % 2] for i in range(n)])


def train(models: str, out: str, run: TrackedRun | None, trackers: list[str], spec: StudentConfig = SPEC) -> None:
    """The training of all phases, with its weights at its end; runs in a process of its own, as a stage does."""
    student = build_student(spec, Path(models) / "tiny-bert", TASK, 0)
    with Tracking(trackers, run) as opened:
        settings = {"validation": rows(6), "test": rows(6), "checkpoint_every": 10, "tracking": opened}
        train_phases(student, rows(22), spec, folder=Path(out), seed=3, **settings)
    torch.save(student.model.state_dict(), Path(out) / "weights")


def start(models: Path, out: Path, run: TrackedRun | None, trackers: list[str]) -> Any:
    process = fork_context().Process(target=train, args=(str(models), str(out), run, trackers))
    process.start()
    return process


def kill_in_second_phase(process: Any, out: Path) -> None:
    end = time.monotonic() + 120
    while not list((out / "checkpoints-2").glob("checkpoint-*/trainer_state.json")):
        assert process.is_alive() and time.monotonic() < end
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL


def finish(process: Any) -> None:
    process.join(120)
    assert process.exitcode == 0


@pytest.fixture(scope="module")
def repo(tiny_models, tmp_path_factory) -> SimpleNamespace:
    """A repository with two runs: one that was killed in its second phase and went on, and one that was never."""
    root = tmp_path_factory.mktemp("tracked") / "my-domain"
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("MLFLOW_", "TENSORBOARD_", "DVC_"))]:
            patch.delenv(name)
        run = tracked_run(root, "small-3", "abcdef", run_settings(SPEC, 3))
        plain = start(tiny_models, root / "plain", None, [])
        kill_in_second_phase(start(tiny_models, root / "killed", run, LOCAL), root / "killed")
        unbroken = tracked_run(root, "small-4", "123456", run_settings(SPEC, 4))
        for process in (
            start(tiny_models, root / "killed", run, LOCAL),
            start(tiny_models, root / "unbroken", unbroken, LOCAL),
            plain,
        ):
            finish(process)
    return SimpleNamespace(root=root, run=run, unbroken=unbroken)


def mlflow_run(run: TrackedRun) -> tuple[Any, dict[str, list[tuple[int, float]]]]:
    client = mlflow.MlflowClient(f"sqlite:///{run.folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(run.experiment)
    (found,) = client.search_runs([experiment.experiment_id], f"tags.`distillery.key` = '{run.key}'")
    history = {key: client.get_metric_history(found.info.run_id, key) for key in found.data.metrics}
    return found, {key: [(metric.step, metric.value) for metric in logged] for key, logged in history.items()}


def tensorboard_run(run: TrackedRun) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run.folder / "tensorboard" / run.identifier), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_killed_training_goes_on_in_its_run_and_logs_no_step_twice(repo):
    steps = [10, 20, 25, 35, 45, 50]  # twice 10, 20 and the last one of 25
    found, logged = mlflow_run(repo.run)
    assert (found.info.run_name, found.info.status) == ("small-3", "FINISHED")
    assert found.data.params["phases.1.learning_rate"] == "0.0005" and found.data.params["seed"] == "3"
    events = tensorboard_run(repo.run)
    for of_run, prefix in ((logged, ""), (events, "train/")):
        assert [step for step, _ in of_run[f"{prefix}loss"]] == steps
        assert [step for step, _ in of_run[f"{prefix}learning_rate"]] == steps
        assert all(len({step for step, _ in values}) == len(values) for values in of_run.values())
    other = mlflow_run(repo.unbroken)[1]
    assert {key for key in logged if "runtime" not in key} == {key for key in other if "runtime" not in key}
    for key in ("loss", "learning_rate", "eval_accuracy", "epoch", "term_ce"):
        assert logged[key] == other[key], key
    assert dict(events["train/loss"]) == pytest.approx(dict(logged["loss"]), rel=1e-6)
    assert [step for step, _ in events["eval/accuracy"]] == [35, 45, 50]
    assert [step for step, _ in logged["eval_accuracy"]] == [35, 45, 50]


def test_all_runs_of_a_repository_are_in_one_experiment_and_in_its_folder(repo):
    with sqlite3.connect(repo.run.folder / "mlflow.db") as database:
        names = {name for (name,) in database.execute("select name from experiments")}
        runs = database.execute("select name from runs order by name").fetchall()
    assert names == {"Default", "my-domain"} and runs == [("small-3",), ("small-4",)]
    folders = sorted(path.name for path in (repo.run.folder / "tensorboard").iterdir())
    assert folders == ["small-3-abcdef", "small-4-123456"]
    assert sorted(path.name for path in repo.root.iterdir()) == [".cache", "killed", "plain", "unbroken"]


def test_tracking_changes_no_weight(repo):
    plain, *others = (torch.load(repo.root / name / "weights") for name in ("plain", "killed", "unbroken"))
    assert all(torch.equal(plain[name], other[name]) for other in others for name in plain)


def test_an_experiment_from_the_queue_is_tracked_in_the_repository_that_queued_it(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "mine"))
    run = tracked_run(tmp_path / "mine/.dvc/tmp/exps/tmp1", "a-0", "k", {})
    assert (run.folder, run.experiment) == (tmp_path / "mine/.cache/tracking", "mine")


def test_the_evaluation_attaches_scores_and_the_page_once(repo, capsys, monkeypatch):
    monkeypatch.delenv("DVC_ROOT", raising=False)
    (repo.root / "reports").mkdir()
    (repo.root / "reports/index.html").write_text("<p>the page</p>")
    folder = repo.root / "runs/small-3"
    folder.mkdir(parents=True)
    scores = {"accuracy": 0.75, "macro_f1": 0.7, "confusion": [[1]]}
    (folder / "metrics.json").write_text(json.dumps({"steps": 50, "test": scores}))
    write_record(folder, [], repo.run)
    assert not (folder / RECORD).exists()
    params = Params.model_construct(tracking=LOCAL, students={"small": SPEC}, seeds=[3, 5])
    attach_results(repo.root, params)
    assert "small-3 was trained without mlflow" in capsys.readouterr().out
    write_record(folder, LOCAL, repo.run)
    for _ in range(2):  # an evaluation that runs again adds nothing
        attach_results(repo.root, params)
        found, logged = mlflow_run(repo.run)
        assert logged["test_accuracy"] == [(50, 0.75)] and logged["test_macro_f1"] == [(50, 0.7)]
        assert tensorboard_run(repo.run)["test/accuracy"] == [(50, 0.75)]
        assert found.info.status == "FINISHED"
    assert "small-5 was trained without tensorboard" in capsys.readouterr().out
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://at.all")
    attach_results(repo.root, params)  # the evaluation ends well all the same
    assert "tracking: mlflow: " in (printed := capsys.readouterr().out) and "small-3 has no scores there" in printed
    page = Path(found.info.artifact_uri.removeprefix("file://")) / "index.html"
    assert page.read_text() == "<p>the page</p>" and repo.run.folder in page.parents
    assert (repo.run.folder / "tensorboard/small-3-abcdef/report.html").read_text() == "<p>the page</p>"


def wandb_records(folder: Path) -> list[Any]:
    """The protocol buffers of the offline file of Weights & Biases in `folder`, which has LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("*.wandb")
    content, at, parts, records = file.read_bytes(), 7, b"", []  # after the header
    while at + 7 < len(content):
        if 2**15 - at % 2**15 < 7:  # the rest of a block holds no header
            at += 2**15 - at % 2**15
        size, kind = struct.unpack("<4xHB", content[at : at + 7])
        parts, at = parts + content[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(parts))
            parts = b""
    return records


def wandb_run(run: TrackedRun) -> tuple[dict[str, list[tuple[int, float]]], dict[str, Any], Any]:
    """Logged values by step, the summary, and the first record of the run, of all its offline files by their time."""
    logged, summary, started = defaultdict(list), {}, None
    for folder in sorted((run.folder / "wandb").glob(f"offline-run-*-{run.identifier}"), key=os.path.getmtime):
        for record in wandb_records(folder):
            if record.HasField("run"):
                started = started or record.run
                assert (record.run.run_id, record.run.project) == (run.identifier, run.experiment)
            if record.HasField("history"):
                items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                for key, value in items.items():
                    logged[key].append((items["train/global_step"], value))
            if record.HasField("summary"):
                updates = record.summary.update
                summary |= {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in updates}
    return logged, summary, started


def dvclive_run(run: TrackedRun) -> dict[str, list[tuple[int, float]]]:
    root = run.folder / "dvclive" / run.identifier / "plots/metrics"
    tables = {path.relative_to(root).with_suffix("").as_posix(): path for path in root.rglob("*.tsv")}
    return {key: list(pd.read_csv(path, sep="\t").itertuples(index=False, name=None)) for key, path in tables.items()}


@pytest.fixture(scope="module")
def others(tiny_models, tmp_path_factory) -> SimpleNamespace:
    """A run by the trackers that are no dependency here: of one phase, then begun anew, and scored twice."""
    names = [name for name in ("wandb", "dvclive") if importlib.util.find_spec(name)]
    if not names:
        pytest.skip("neither wandb nor dvclive is installed")
    root = tmp_path_factory.mktemp("others") / "my-domain"
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("WANDB_", "DVC_"))]:
            patch.delenv(name)
        run = tracked_run(root, "small-3", "abcdef", run_settings(SPEC, 3))
        first = SPEC.model_copy(update={"phases": SPEC.phases[:1]})
        train(str(tiny_models), str(root / "first"), run, names, first)
        train(str(tiny_models), str(root / "anew"), run, names)
        (root / "reports").mkdir()
        (root / "reports/index.html").write_text("<p>the page</p>")
        folder = root / "runs/small-3"
        folder.mkdir(parents=True)
        scores = {"accuracy": 0.75, "macro_f1": 0.7, "confusion": [[1]]}
        (folder / "metrics.json").write_text(json.dumps({"steps": 50, "test": scores}))
        write_record(folder, names, run)
        for _ in range(2):
            attach_results(root, Params.model_construct(tracking=names, students={"small": SPEC}, seeds=[3]))
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)  # set by the tracker
    return SimpleNamespace(root=root, run=run, names=names)


def test_wandb_has_the_run_its_scores_and_the_page_in_local_files(others):
    pytest.importorskip("wandb")
    logged, summary, started = wandb_run(others.run)
    assert [step for step, _ in logged["train/loss"]] == [10, 20, 25, 35, 45, 50]
    assert [step for step, _ in logged["eval/accuracy"]] == [35, 45, 50]
    settings = {item.key: json.loads(item.value_json) for item in started.config.update}
    assert started.display_name == "small-3" and settings["phases.1.learning_rate"] == 0.0005
    assert (summary["test/accuracy"], summary["test/macro_f1"]) == (0.75, 0.7)
    pages = [path.read_text() for path in (others.run.folder / "wandb").glob("offline-run-*/files/index.html")]
    assert pages and set(pages) == {"<p>the page</p>"}


def test_dvclive_has_the_run_its_scores_and_the_page_in_its_folder(others):
    pytest.importorskip("dvclive")
    logged, folder = dvclive_run(others.run), others.run.folder / "dvclive/small-3-abcdef"
    assert [step for step, _ in logged["loss"]] == [10, 20, 25, 35, 45, 50]
    assert [step for step, _ in logged["eval/accuracy"]] == [35, 45, 50]
    settings = (folder / "params.yaml").read_text()
    assert "phases.1.learning_rate: '0.0005'" in settings and "seed: '3'" in settings
    scores = json.loads((folder / "metrics.json").read_text())
    assert (scores["test_accuracy"], scores["test_macro_f1"], scores["step"]) == (0.75, 0.7, 50)
    assert (folder / "report.html").read_text() == "<p>the page</p>"


def test_other_trackers_leave_no_file_elsewhere(others):
    created = {path.name for path in others.root.iterdir()}
    assert created == {".cache", "first", "anew", "reports", "runs"}
    in_cache = {path.name for path in others.run.folder.iterdir()}
    assert in_cache == {*others.names, *(["wandb-steps"] if "wandb" in others.names else [])}


def test_a_tracker_that_fails_stops_no_training_and_shows_no_password(tiny_models, tmp_path, capsys, monkeypatch):
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("cannot reach http://me:secret@host/api\nmore")

    run = tracked_run(tmp_path, "small-3", "fails", {})
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setattr(TRACKERS["tensorboard"], "log", fail)
    train(str(tiny_models), str(tmp_path / "out"), run, ["tensorboard"])
    out = capsys.readouterr().out
    assert out.count("tracking:") == 1 and "secret" not in out
    assert "tracking: tensorboard: cannot reach http://…@host/api more; nothing more is tracked there" in out
    assert (tmp_path / "out/weights").exists()


def test_a_tracker_that_cannot_start_ends_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nosuch://me:secret@host")
    with pytest.raises(UserError, match=r"^params\.yaml: tracking: mlflow: [^\n]+$") as caught:
        Tracking(["mlflow"], tracked_run(tmp_path, "a", "b", {}))
    assert "secret" not in str(caught.value)


def test_a_tracker_that_is_not_installed_has_a_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    run = tracked_run(tmp_path, "a", "b", {})
    for name, way_out in {"mlflow": "'.[tracking]'", "tensorboard": "'.[tracking]'", "wandb": "wandb"}.items():
        with pytest.raises(UserError) as caught:
            Tracking([name], run)
        assert str(caught.value).startswith(
            f"params.yaml: tracking: `{name}` is not installed; run: pip install {way_out}"
        )


def test_a_new_store_prints_nothing(tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with Tracking(["mlflow"], tracked_run(tmp_path, "a", "b", {"seed": 1})):
        pass
    assert (tmp_path / ".cache/tracking/mlflow.db").exists() and capfd.readouterr() == ("", "")


def open_new_store(run: TrackedRun, started: Any) -> None:
    """Runs in a process of its own."""
    importlib.import_module("mlflow")
    started.wait(120)
    with Tracking(["mlflow"], run):
        pass


def test_two_workers_open_a_new_store_at_the_same_time(tmp_path, monkeypatch):
    """As those of `dvc queue start --jobs 2` did."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "mine"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    runs = [tracked_run(tmp_path / folder, "a-0", folder, {}) for folder in ("tmp1", "tmp2")]
    started = fork_context().Barrier(len(runs))
    processes = [fork_context().Process(target=open_new_store, args=(run, started)) for run in runs]
    for process in processes:
        process.start()
    for process in processes:
        finish(process)
    found = [mlflow_run(run)[0].info for run in runs]
    assert len({info.run_id for info in found}) == 2 and len({info.experiment_id for info in found}) == 1


def test_only_the_first_of_several_processes_tracks(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "process_rank", lambda: 1)
    assert Tracking(LOCAL, tracked_run(tmp_path, "a", "b", {})).callbacks(0) == []


def test_settings_are_dotted_keys():
    settings = run_settings(SPEC, 7)
    assert settings["phases.0.loss.ce"] == 1.0 and settings["init.layers"] == [0] and settings["seed"] == 7
    assert tracking._flattened({"a": [], "b": [{"c": 1}, {"c": 2}]}) == {"a": [], "b.0.c": 1, "b.1.c": 2}
