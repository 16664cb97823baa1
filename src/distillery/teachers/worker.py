"""One of the processes that fine-tune a local teacher together, or label its rows; the notebook 02_teach starts them.

    torchrun --nproc-per-node 4 -m distillery.teachers.worker tune FOLDER

FOLDER is what `Tuning` of `distillery.teachers.finetune`, or `Labelling` of `distillery.teachers.labelling`, has left.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

from distillery.config.load import load_params
from distillery.files import atomic_write, repository_root
from distillery.teachers.finetune import HISTORY, TUNING, WEIGHTS, Tuning, build_teacher
from distillery.teachers.labelling import LABELLING, Labelling
from distillery.training.processes import process_rank, wait_for_all
from distillery.training.sharding import build_for_training
from distillery.training.weights import save_weights
from distillery.training.worker import run_together


def tune_teacher(folder: Path) -> None:
    """Fine-tune the teacher that `folder` describes, and leave its weights and history there."""
    params = load_params()
    tuning: Tuning = pickle.loads((folder / TUNING).read_bytes())
    teacher = build_for_training(params.compute, lambda: build_teacher(tuning.name, params, tuning.task))
    history = tuning.train(teacher, params, folder)
    save_weights(teacher.model, folder / "finished" / WEIGHTS)
    if process_rank() == 0:
        with atomic_write(folder / "finished" / HISTORY) as path:  # last, since it marks the training as finished
            history.to_csv(path, index=False)
    wait_for_all()


def label_rows_of_teacher(folder: Path) -> None:
    """Label this process's share of the rows that `folder` holds, and leave the signals there."""
    labelling: Labelling = pickle.loads((folder / LABELLING).read_bytes())
    labelling.label_share(repository_root(), load_params(), folder)
    wait_for_all()


if __name__ == "__main__":
    work = {"tune": tune_teacher, "label": label_rows_of_teacher}[sys.argv[1]]
    run_together(lambda: work(Path(sys.argv[2])))
