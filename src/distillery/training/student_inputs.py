"""What decides a student, read from `data/inputs/<student>/`: its rows, its settings, its teachers."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path

import pandas as pd

from distillery.config.load import load_params
from distillery.config.schema import ComputeConfig, ModelConfig, StudentConfig
from distillery.files import Paths
from distillery.models.fetch import fetch_model
from distillery.models.label_model import LabelModel
from distillery.tasks.schema import Task
from distillery.training.launch import run_processes
from distillery.training.openable_teachers import openable_teacher
from distillery.training.run import count_finished, run_key, train_phases
from distillery.training.student import build_student
from distillery.training.trackers import TrackedRun
from distillery.training.tracking import Tracking, run_settings, tracked_run

PARTS = ("rows", "validation", "test")


class StudentInputs:
    """The folder `data/inputs/<student>/` below `root`; `experiment.json` there is a dict `experiment`.

    rows, validation, test: the tables of the stage `inputs`. scores {teacher}: its accuracy on validation rows.
    """

    def __init__(self, root: Path, student: str):
        self.root, self.student, self.folder = root, student, Paths(root).inputs(student)
        self.experiment = json.loads((self.folder / "experiment.json").read_text())
        self.spec = StudentConfig.model_validate(self.experiment["spec"])
        self.task = Task.model_validate(self.experiment["task"])
        model = {k: v for k, v in self.experiment["model"].items() if k != "content"}
        self.origin = ModelConfig.model_validate(model)
        self.rows, self.validation, self.test = (pd.read_parquet(self.folder / f"{part}.parquet") for part in PARTS)
        self.scores = {name: facts["accuracy"] for name, facts in self.experiment["teachers"].items()}

    @cached_property
    def model_folder(self) -> Path:
        """The folder of the model that the student begins as; it is fetched where it is not there yet."""
        return fetch_model(self.spec.model, self.origin)

    def build(self, seed: int) -> LabelModel:
        """The student before its first step."""
        return build_student(self.spec, self.model_folder, self.task, seed, self.origin)

    def checkpoints(self, learner: LabelModel, seed: int, processes: int) -> Path:
        """The folder of the checkpoints and finished phases of the run of `seed` on so many processes.

        One process has a folder of its own for each number of threads, which decides its last bits. Several share one,
        whatever their number. Where only the other one exists, that run is continued.
        """
        tables = [(self.folder / f"{part}.parquet").read_bytes() for part in PARTS]
        parts = [self.experiment, seed, str(learner.dtype), *tables]
        names = [run_key(*parts), f"together-{run_key(*parts, threads=0)}"]
        place = Paths(self.root).cache / "checkpoints"
        alone, together = (place / f"{self.student}-{seed}-{name}" for name in names)
        chosen, other = (alone, together) if processes == 1 else (together, alone)
        return other if other.exists() and not chosen.exists() else chosen

    def tracked_run(self, seed: int, folder: Path) -> TrackedRun:
        """The run that trackers have of the training with `seed`, whose checkpoints are in `folder`."""
        key = folder.name.rpartition("-")[2]
        return tracked_run(self.root, f"{self.student}-{seed}", key, run_settings(self.spec, seed))

    def train(
        self, learner: LabelModel, seed: int, folder: Path, trackers: list[str]
    ) -> tuple[pd.DataFrame, pd.DataFrame]:
        """:func:`train_phases` of `learner` in place, with checkpoints and finished phases in `folder`.

        trackers: as in params.yaml; the first process of several tracks.
        """
        records = self.experiment["openable_teachers"]
        with Tracking(trackers, self.tracked_run(seed, folder)) as tracking:
            return train_phases(
                learner,
                self.rows,
                self.spec,
                folder=folder,
                seed=seed,
                validation=self.validation,
                test=self.test,
                scores=self.scores,
                teachers={name: openable_teacher(self.root, name, record) for name, record in records.items()},
                checkpoint_every=load_params().students[self.student].checkpoint_every,  # decides no weight
                tracking=tracking,
            )

    def train_in_processes(self, compute: ComputeConfig, seed: int, folder: Path) -> None:
        """:meth:`train` in the processes of `compute`; then all phases are finished in `folder`.

        Starts none where they are already, by processes that a scheduler started.
        """
        if count_finished(folder, len(self.spec.phases)) > len(self.spec.phases):
            return
        arguments = [self.student, str(seed), "--folder", str(folder)]
        run_processes(compute, "distillery.training.worker", arguments, f"{self.student}, seed {seed}")
