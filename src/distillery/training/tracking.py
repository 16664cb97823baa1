"""`tracking` of params.yaml: a run of each named tracker for a student and seed, from its first phase to its scores."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable, Mapping
from operator import methodcaller
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from distillery.config.schema import Params, StudentConfig
from distillery.config.trackers import check_trackers
from distillery.errors import UserError
from distillery.files import Paths, write_json
from distillery.training.processes import process_rank
from distillery.training.trackers import TRACKERS, TrackedRun, Tracker

RECORD = "tracking.json"  # in the folder of a trained student: the runs that it has


def tracked_run(root: Path, name: str, key: str, settings: Mapping[str, Any]) -> TrackedRun:
    """The run `name` (student and seed), whose files and experiment are those of the repository.

    root: the repository. An experiment that DVC took from its queue runs in a folder that goes away: it counts as run
    in the repository from which it was queued.
    """
    home = Path(os.environ.get("DVC_ROOT") or root)
    return TrackedRun(home / ".cache" / "tracking", home.name, name, key, settings)


class Tracking:
    """The trackers of one run, or of none."""

    def __init__(self, trackers: list[str], run: TrackedRun | None = None):
        """Start or continue `run` in each of `trackers`. Raises UserError when one cannot."""
        self.opened: dict[str, Tracker] = {}
        if run:
            check_trackers(trackers)
        for name in dict.fromkeys(trackers) if run and process_rank() == 0 else ():
            try:
                self.opened[name] = TRACKERS[name](run)
            except Exception as error:  # each tracker has error classes of its own
                raise UserError(f"params.yaml: tracking: {name}: {_one_line(error)}") from None

    def callbacks(self, first_step: int) -> list[TrainerCallback]:
        """The callback of a phase, before which the student made `first_step` steps."""
        return [TrackingCallback(self, first_step)] if self.opened else []

    def each(self, action: Callable[[Tracker], None]) -> None:
        """Call `action` with every tracker. One that fails is left out from then on: it stops no training."""
        for name, tracker in list(self.opened.items()):
            try:
                action(tracker)
            except Exception as error:
                print(f"tracking: {name}: {_one_line(error)}; nothing more is tracked there", flush=True)
                del self.opened[name]

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        """Finish the runs, as failed ones after an exception."""
        self.each(lambda tracker: tracker.finish(complete=kind is None))


class TrackingCallback(TrainerCallback):
    """Hands a trainer's logs on to the trackers, with steps that go on from phase to phase."""

    def __init__(self, tracking: Tracking, first_step: int):
        self.tracking, self.first_step = tracking, first_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and state.is_world_process_zero:
            of_run = copy.copy(state)
            of_run.global_step += self.first_step
            self.tracking.each(lambda tracker: tracker.log(args, of_run, control, logs))


def run_settings(spec: StudentConfig, seed: int) -> dict[str, Any]:
    """The section of a student with defaults filled in, and the seed, as dotted keys: `phases.0.learning_rate`."""
    return {"seed": seed, **_flattened(spec.model_dump(mode="json"))}


def _flattened(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
        items = enumerate(value)
    else:
        return {prefix.removesuffix("."): value}
    return {key: leaf for name, below in items for key, leaf in _flattened(below, f"{prefix}{name}.").items()}


def write_record(folder: Path, trackers: list[str], run: TrackedRun) -> None:
    """Note in the `folder` of a trained student which run it is; nothing without trackers."""
    if trackers:
        write_json(folder / RECORD, {"name": run.name, "key": run.key, "trackers": trackers, "settings": run.settings})


def attach_results(root: Path, params: Params) -> None:
    """Attach to the run of each trained student its scores on test rows and the report page.

    A student that was trained without a tracker has no run there, and a line names it. So does one for a tracker that
    cannot be reached: the evaluation is finished by then, and must not be lost.
    """
    page = Paths(root).reports / "index.html"
    folders = [Paths(root).run(student, seed) for student in params.students for seed in params.seeds]
    for folder in folders if params.tracking else ():
        record = json.loads((folder / RECORD).read_text()) if (folder / RECORD).exists() else {"trackers": []}
        for name in sorted(set(params.tracking) - set(record["trackers"])):
            print(f"tracking: {folder.name} was trained without {name}, so it has no run there", flush=True)
        trackers = [name for name in record["trackers"] if name in params.tracking]
        if not trackers:
            continue
        results = json.loads((folder / "metrics.json").read_text())
        scores = {key: value for key, value in results["test"].items() if isinstance(value, float)}
        run = tracked_run(root, record["name"], record["key"], record["settings"])
        for name in trackers:
            try:
                with Tracking([name], run) as tracking:
                    tracking.each(methodcaller("attach", scores=scores, step=results["steps"], page=page))
            except UserError as error:
                print(f"{error}; {folder.name} has no scores there", flush=True)


def _one_line(error: Exception) -> str:
    """The message of `error` in one line, without the user and password of an address."""
    return re.sub(r"//[^/@\s]+@", "//…@", " ".join(str(error).split()))[:300]
