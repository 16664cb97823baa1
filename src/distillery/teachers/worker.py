"""One of the processes that fine-tune a teacher together; the notebook 02_teach starts them.

    torchrun --nproc-per-node 4 -m distillery.teachers.worker FOLDER

FOLDER is what :meth:`distillery.teachers.finetune.Tuning.train_in_processes` has filled.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

from distillery.config.load import load_params
from distillery.files import atomic_write
from distillery.teachers.finetune import HISTORY, TUNING, WEIGHTS, Tuning, build_teacher
from distillery.training.processes import process_rank, wait_for_all
from distillery.training.run import save_weights
from distillery.training.worker import run_together


def tune_teacher(folder: Path) -> None:
    """Fine-tune the teacher that `folder` describes, and leave its weights and history there."""
    params = load_params()
    tuning: Tuning = pickle.loads((folder / TUNING).read_bytes())
    teacher = build_teacher(tuning.name, params, tuning.task)
    history = tuning.train(teacher, params, folder)
    if process_rank() == 0:
        save_weights(teacher.model, folder / "finished" / WEIGHTS)
        with atomic_write(folder / "finished" / HISTORY) as path:  # last, since it marks the training as finished
            history.to_csv(path, index=False)
    wait_for_all()


if __name__ == "__main__":
    run_together(lambda: tune_teacher(Path(sys.argv[1])))
