"""One of the processes that train a student together.

A launcher starts it, on one machine or on several that share the repository's folder:

    torchrun --nproc-per-node 4 -m distillery.training.worker tiny-kd 0

The notebook 04_distill starts it in this way where `compute.processes` is more than 1, and goes on with the files that
it leaves. Each finished phase has a folder, so the stage continues after processes that a scheduler started.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import psutil

from distillery.config.load import load_params
from distillery.errors import UserError
from distillery.files import repository_root
from distillery.training.launch import MISTAKE, PROCESSES, STARTED_BY
from distillery.training.processes import join_processes, process_count, process_rank
from distillery.training.sharding import build_for_training
from distillery.training.student_inputs import StudentInputs

SHARDING = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")  # of the environment, set by `accelerate launch`
RESULTS = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS")  # also by it


def end_with(pid: int) -> None:
    """End this process soon after the process `pid`: when the notebook is killed, nothing may go on training."""
    try:
        starter = psutil.Process(pid)
    except psutil.NoSuchProcess:
        os._exit(1)

    def watch() -> None:
        while starter.is_running() and starter.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def take_no_settings_of_launcher() -> None:
    """Remove from the environment what `accelerate launch` sets there and what would change the results.

    Its file states where processes run; params.yaml states how they train. Raises UserError when it shards the model.
    """
    if any(os.environ.get(name, "").lower() in ("true", "1") for name in SHARDING):
        raise UserError(
            "compute.config: it shards the model (FSDP or DeepSpeed) in a way of its own; take a file that does "
            "not, and set `compute.strategy: fsdp`"
        )
    for name in [name for name in os.environ if name.startswith(RESULTS)]:
        del os.environ[name]


def check_process_count() -> None:
    """Raises UserError when fewer or more processes have come together than `compute.processes` names.

    For a file of type MULTI_CPU without `mpirun_hostfile` accelerate starts one process, without a warning.
    """
    count, expected = process_count(), int(os.environ.get(PROCESSES, process_count()))
    if count != expected:
        raise UserError(
            f"compute.config: it starts {count} of the {expected} `processes`; on CPUs of one machine take no `config`"
            ", else a file with the same `num_processes`"
        )


def run_together(train: Callable[[], None]) -> None:
    """Run `train` in this process and the others that its launcher started; the first one alone prints.

    A user's mistake, such as a launcher that shards the model, ends all of them; its message is left for the process
    that started them, or printed.
    """
    if STARTED_BY in os.environ:
        end_with(int(os.environ[STARTED_BY]))
    try:
        take_no_settings_of_launcher()
        with (
            join_processes(),
            open(os.devnull, "w") as nowhere,
            redirect_stdout(nowhere if process_rank() else sys.stdout),
        ):
            check_process_count()
            train()
    except UserError as mistake:
        if MISTAKE in os.environ:
            Path(os.environ[MISTAKE]).write_text(str(mistake), encoding="utf-8")
        else:
            print(f"error: {mistake}", file=sys.stderr)
        sys.stdout.flush()
        os._exit(1)  # the others wait in an exchange, and would hold up an orderly end


def train_student(student: str, seed: int, folder: Path | None) -> None:
    """Train `student` with `seed` through all its phases; what each leaves behind is in `folder`.

    None: in the folder where the notebook looks for it.
    """
    inputs, params = StudentInputs(repository_root(), student), load_params()
    learner = build_for_training(params.compute, lambda: inputs.build(seed))
    folder = folder or inputs.checkpoints(learner, seed, process_count())
    inputs.train(learner, seed, folder, params.tracking)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m distillery.training.worker", description=__doc__.splitlines()[0])
    parser.add_argument("student")
    parser.add_argument("seed", type=int)
    parser.add_argument("--folder", type=Path, help="where checkpoints and finished phases are")
    arguments = parser.parse_args()
    run_together(lambda: train_student(arguments.student, arguments.seed, arguments.folder))


if __name__ == "__main__":
    main()
