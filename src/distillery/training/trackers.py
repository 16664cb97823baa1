"""The experiment trackers that transformers knows, each opened on the run of one student and seed.

A tracker here starts or continues its run and attaches results to it. Logging is that of transformers' own callback.
Files are local, and nothing is sent, unless the user's environment wants it (`MLFLOW_TRACKING_URI`, `WANDB_MODE`).

The packages are loaded by name when they are used: a project without tracking installs none of them.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd
from transformers.integrations import integration_utils as integrations

from distillery.files import write_json

LONGEST_SETTING = 500  # characters; an older MLflow server takes no more


@dataclass(frozen=True)
class TrackedRun:
    """The run of one student and seed: the same training, also one that continues, has the same `key`."""

    folder: Path  # of all local files
    experiment: str
    name: str
    key: str
    settings: Mapping[str, Any]

    @property
    def identifier(self) -> str:
        return f"{self.name}-{self.key}"


class Tracker(ABC):
    """One tracker on one run. `callback`: transformers' own. `last_steps`: the last step that the run holds, by tag."""

    callback: Any
    last_steps: dict[str, int]

    @abstractmethod
    def __init__(self, run: TrackedRun):
        """Start `run`, or continue it if the tracker has it."""

    @staticmethod
    def tag(key: str) -> str:
        """The name under which the callback logs the trainer's value `key`."""
        return next(iter(integrations.rewrite_logs({key: 0.0})))

    def log(self, args: Any, state: Any, control: Any, logs: dict[str, Any]) -> None:
        """Log the values of a step, but for those that the run has of this step or a later one."""
        step = state.global_step
        new = {key: value for key, value in logs.items() if step > self.last_steps.get(self.tag(key), -1)}
        if new:
            self.callback.on_log(args, state, control, logs=new)
            self.last_steps |= {self.tag(key): step for key in new}

    @abstractmethod
    def attach(self, scores: dict[str, float], step: int, page: Path) -> None:
        """Add the scores on test rows and the report page to the run."""

    @abstractmethod
    def finish(self, complete: bool = True) -> None:
        """End the run, or leave it as one that failed."""


class TensorBoard(Tracker):
    """Event files in a folder for each run, below `TENSORBOARD_LOGGING_DIR` where it is set."""

    def __init__(self, run: TrackedRun):
        base = os.environ.get("TENSORBOARD_LOGGING_DIR") or run.folder / "tensorboard"
        self.folder = Path(base).expanduser() / run.identifier
        self.folder.mkdir(parents=True, exist_ok=True)
        self.callback = integrations.TensorBoardCallback()
        self.callback.logging_dir = str(self.folder)
        reader = import_module("tensorboard.backend.event_processing.event_accumulator")
        events = reader.EventAccumulator(str(self.folder), size_guidance={"scalars": 0})
        events.Reload()
        scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
        self.last_steps = {tag: max(event.step for event in logged) for tag, logged in scalars.items()}
        self.last_values = {tag: logged[-1].value for tag, logged in scalars.items()}
        if "settings/text_summary" not in events.Tags()["tensors"]:
            self._write(lambda writer: writer.add_text("settings", _as_markdown(run.settings)))

    def _write(self, write: Any) -> None:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(self.folder)) as writer:
            write(writer)

    def attach(self, scores: dict[str, float], step: int, page: Path) -> None:
        def write(writer: Any) -> None:
            for name, score in scores.items():
                last = self.last_values.get(f"test/{name}")
                if last is None or abs(last - score) > 1e-6:  # event files have float32
                    writer.add_scalar(f"test/{name}", score, step)

        self._write(write)
        shutil.copy(page, self.folder / "report.html")  # TensorBoard shows no pages

    def finish(self, complete: bool = True) -> None:
        if self.callback.tb_writer:
            self.callback.tb_writer.close()


def _as_markdown(settings: Mapping[str, Any]) -> str:
    return "\n".join(["| setting | value |", "|---|---|", *(f"| {key} | {value} |" for key, value in settings.items())])


@contextmanager
def _one_process_at_a_time(lock: Path) -> Iterator[None]:
    """Two that make the tables of one new SQLite file at the same time, as workers of DVC's queue do, both fail."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        yield


class MLflow(Tracker):
    """A run in a SQLite file, or in the store of `MLFLOW_TRACKING_URI`; found again by a tag with its key."""

    def __init__(self, run: TrackedRun):
        # by default MLflow sends statistics of its use
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        mlflow = import_module("mlflow")
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)  # no lines about the tables of a new file
        self.mlflow, self.run_is_active = mlflow, False
        artifacts = None
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            run.folder.mkdir(parents=True, exist_ok=True)
            artifacts = (run.folder / "mlflow").as_uri()
        mlflow.set_tracking_uri(uri or f"sqlite:///{run.folder / 'mlflow.db'}")
        if not uri:
            os.environ.pop("MLFLOW_TRACKING_URI", None)  # MLflow wrote it there, where it would look like the user's
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or run.experiment
        with nullcontext() if uri else _one_process_at_a_time(run.folder / "mlflow.lock"):
            self.client = mlflow.MlflowClient()
            experiment = self._experiment(name, artifacts)
        matching = self.client.search_runs([experiment], f"tags.`distillery.key` = '{run.key}'", max_results=1)
        if not matching:
            tags = {"distillery.key": run.key, "distillery.run": run.name}
            created = self.client.create_run(experiment, run_name=run.name, tags=tags)
            for key, value in run.settings.items():
                self.client.log_param(created.info.run_id, key, str(value)[:LONGEST_SETTING])
            matching = [created]
        self.run_id = matching[0].info.run_id
        self.last_values = matching[0].data.metrics
        self.last_steps = {
            key: max(metric.step for metric in self.client.get_metric_history(self.run_id, key))
            for key in self.last_values
        }
        self.callback = integrations.MLflowCallback()
        # its own set-up logs the settings of a phase as those of the run, and a killed process loses what it queued
        self.callback._initialized, self.callback._async_log = True, False

    def _experiment(self, name: str, artifacts: str | None) -> str:
        """The id of experiment `name`, which another process may create at the same time."""
        for attempt in range(2):
            experiment = self.client.get_experiment_by_name(name)
            if experiment is not None:
                return experiment.experiment_id
            try:
                return self.client.create_experiment(name, artifacts)
            except self.mlflow.MlflowException:
                if attempt:
                    raise
        raise AssertionError

    @staticmethod
    def tag(key: str) -> str:
        return key

    def log(self, args: Any, state: Any, control: Any, logs: dict[str, Any]) -> None:
        if not self.run_is_active:
            self.mlflow.start_run(run_id=self.run_id)
            self.run_is_active = True
        super().log(args, state, control, logs)

    def attach(self, scores: dict[str, float], step: int, page: Path) -> None:
        for name, score in scores.items():
            if self.last_values.get(f"test_{name}") != score:
                self.client.log_metric(self.run_id, f"test_{name}", score, step=step)
        self.client.log_artifact(self.run_id, str(page))

    def finish(self, complete: bool = True) -> None:
        if self.run_is_active:
            self.mlflow.end_run()
        self.client.set_terminated(self.run_id, "FINISHED" if complete else "FAILED")


class WandB(Tracker):
    """A run of Weights & Biases: offline in local files, until `wandb sync` or `WANDB_MODE=online` sends it."""

    def __init__(self, run: TrackedRun):
        run.folder.mkdir(parents=True, exist_ok=True)
        defaults = {"MODE": "offline", "DIR": str(run.folder), "SILENT": "true", "ERROR_REPORTING": "false"}
        for name, value in defaults.items():
            os.environ.setdefault(f"WANDB_{name}", value)
        wandb = import_module("wandb")
        self.steps_file = run.folder / "wandb-steps" / f"{run.identifier}.json"  # offline files are not read back
        self.last_steps = json.loads(self.steps_file.read_text()) if self.steps_file.exists() else {}
        project = os.environ.get("WANDB_PROJECT") or run.experiment
        settings = {"config": dict(run.settings), "resume": "allow"}
        self.run = wandb.init(project=project, id=run.identifier, name=run.name, **settings)
        self.run.define_metric("train/global_step")
        self.run.define_metric("*", step_metric="train/global_step", step_sync=True)
        self.callback = integrations.WandbCallback()
        self.callback._initialized = True

    def log(self, args: Any, state: Any, control: Any, logs: dict[str, Any]) -> None:
        super().log(args, state, control, logs)
        self.steps_file.parent.mkdir(exist_ok=True)
        write_json(self.steps_file, self.last_steps)

    def attach(self, scores: dict[str, float], step: int, page: Path) -> None:
        for name, score in scores.items():
            self.run.summary[f"test/{name}"] = score
        self.run.save(str(page), base_path=str(page.parent), policy="now")

    def finish(self, complete: bool = True) -> None:
        self.run.finish(exit_code=0 if complete else 1)


class DVCLive(Tracker):
    """A folder of tables for each run, which `dvc plots show` draws."""

    def __init__(self, run: TrackedRun):
        self.folder = run.folder / "dvclive" / run.identifier
        self.live = import_module("dvclive").Live(str(self.folder), resume=True, save_dvc_exp=False, dvcyaml=None)
        self.live.log_params({key: str(value) for key, value in run.settings.items()})
        tables = (self.folder / "plots" / "metrics").rglob("*.tsv")
        steps = {path: pd.read_csv(path, sep="\t")["step"].max() for path in tables}
        root = self.folder / "plots" / "metrics"
        self.last_steps = {path.relative_to(root).with_suffix("").as_posix(): int(step) for path, step in steps.items()}
        self.callback = integrations.DVCLiveCallback(live=self.live)
        self.callback._initialized = True

    @staticmethod
    def tag(key: str) -> str:
        return import_module("dvclive.utils").standardize_metric_name(key, "dvclive.huggingface")

    def log(self, args: Any, state: Any, control: Any, logs: dict[str, Any]) -> None:
        self.live.step = state.global_step  # it counts calls
        super().log(args, state, control, logs)

    def attach(self, scores: dict[str, float], step: int, page: Path) -> None:
        self.live.step = step
        for name, score in scores.items():
            self.live.summary[f"test_{name}"] = score
        self.live.make_summary()
        shutil.copy(page, self.folder / "report.html")

    def finish(self, complete: bool = True) -> None:
        self.live.end()


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WandB, "dvclive": DVCLive}
