"""The labels of a local teacher for all its rows, computed by several processes."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from distillery import metrics
from distillery.config.schema import Params
from distillery.files import atomic_write, file_digest
from distillery.fingerprint import code_digest
from distillery.label_sets import LabelSets
from distillery.tasks.schema import Task
from distillery.teachers.base import open_teacher
from distillery.teachers.signals import decide_signals, label_rows
from distillery.training.launch import run_processes
from distillery.training.processes import process_count, process_rank
from distillery.training.run import run_key

ROWS_PER_PART = 512
LABELLING = "labelling.pickle"


@dataclass
class Labelling:
    """The `rows` that teacher `name` labels, with its weights in the folder `tuned`, or prompted as `prompting` has it.

    The rows are cut into parts, the same ones for any number of processes; each part is a file as soon as it is there.
    rows_per_part: a part's rows are predicted in batches of their own, which decides the last bits.
    """

    name: str
    task: Task
    rows: pd.DataFrame
    tuned: Path | None
    prompting: dict[str, Any]
    rows_per_part: int = ROWS_PER_PART

    def parts(self, folder: Path) -> list[Path]:
        """The files of all parts, in the order of the rows."""
        return [folder / f"part-{start}.pickle" for start in range(0, len(self.rows), self.rows_per_part)]

    def label_share(self, root: Path, params: Params, folder: Path) -> None:
        """Label those of this process's parts that are not in `folder` yet.

        A part belongs to a process by its number: processes that look at different times share none.
        """
        rank, count = process_rank(), process_count()
        missing = [(k, path) for k, path in enumerate(self.parts(folder)) if k % count == rank and not path.exists()]
        teacher, spec = None, params.teachers[self.name]
        thresholds = None
        if isinstance(self.task.names, LabelSets):  # those of all validation rows come when all parts are there
            thresholds = np.full(len(self.task.names), metrics.DEFAULT_THRESHOLD)
        for k, path in missing:
            teacher = teacher or open_teacher(
                root, self.name, params, self.task, tuned=self.tuned, prompting=self.prompting
            )
            part = self.rows.iloc[k * self.rows_per_part : (k + 1) * self.rows_per_part].reset_index(drop=True)
            signals = label_rows(teacher, part, -1, spec.max_new_tokens, thresholds)
            with atomic_write(path) as temporary:
                temporary.write_bytes(pickle.dumps(signals))

    def label_in_processes(self, params: Params, scratch: Path) -> pd.DataFrame:
        """The signals of all rows, as :func:`label_rows` returns them, by the processes of `params.compute`.

        The parts are in a folder below `scratch`, under a key of everything that decides them; a killed run continues
        with those that are missing. When none is, no process starts.
        """
        spec = params.teachers[self.name]
        key = run_key(
            code_digest("teachers"),
            spec.model_dump(),
            params.models[spec.model].model_dump(),
            self.task.model_dump(),
            self.rows.to_csv(),
            file_digest(self.tuned) if self.tuned else None,
            self.prompting,
            self.rows_per_part,
            threads=0,
        )
        folder = scratch / f"labels-{key}"
        folder.mkdir(parents=True, exist_ok=True)
        parts = self.parts(folder)
        if not all(path.exists() for path in parts):
            (folder / LABELLING).write_bytes(pickle.dumps(self))
            title = f"labels of {self.name}"
            run_processes(params.compute, "distillery.teachers.worker", ["label", str(folder)], title)
        signals = pd.concat([pickle.loads(path.read_bytes()) for path in parts], ignore_index=True)
        return decide_signals(self.rows, signals, self.task.names)
