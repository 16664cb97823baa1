"""Run the lessons: ``distillery lesson``, or ``distillery lesson L1_soft_labels`` for one of them."""

from __future__ import annotations

import os
from pathlib import Path

from distillery.errors import UserError
from distillery.files import repository_root
from distillery.pipeline.run_notebook import execute_notebook, isolate_kernel

FOLDER, EXECUTED = Path("notebooks/lessons"), Path("reports/lessons")


def run_lessons(name: str | None = None) -> None:
    """Execute the lesson `name`, or all of them in order, and put the executed copies into `reports/lessons/`.

    Raises UserError for a lesson that does not exist, and as :func:`execute_notebook` does.
    """
    os.chdir(repository_root())
    known = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    if name is not None and name not in known:
        raise UserError(f"{FOLDER}/{name}.ipynb: no such lesson; there is: {', '.join(known) or 'none'}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads slow models of this size down
    isolate_kernel()
    for lesson in known if name is None else [name]:
        file = f"{lesson}.ipynb"
        execute_notebook(FOLDER / file, EXECUTED / file, {}, Path(".cache/failed") / file)
        print(f"{EXECUTED / file}")
