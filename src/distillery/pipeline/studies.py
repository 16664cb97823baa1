"""Run a study: ``distillery study phrasebank``, or with other parameters than its own: ``-p seeds 1``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from distillery.errors import UserError
from distillery.files import repository_root
from distillery.pipeline.run_notebook import convert_parameters, execute_notebook, isolate_kernel, notebook_parameters

FOLDER, EXECUTED = Path("studies"), Path("reports/studies")


def run_study(name: str, parameters: Sequence[Sequence[str]] = ()) -> None:
    """Execute the notebook `studies/<name>/<name>.ipynb` with the pairs (parameter, value).

    The executed copy appears in `reports/studies/`, but with parameters in `.cache/studies/`: it may show rows of data
    that must not be published.
    Raises UserError for a study, a parameter or a value that does not exist, and as :func:`execute_notebook` does.
    """
    os.chdir(repository_root())
    notebooks = {path.stem: path for path in sorted(FOLDER.glob("*/*.ipynb"))}
    if name not in notebooks:
        raise UserError(f"{FOLDER}/{name}: no such study; there is: {', '.join(notebooks) or 'none'}")
    values = convert_parameters(name, notebook_parameters(notebooks[name]), parameters)
    output = (Path(".cache/studies") if values else EXECUTED) / f"{name}.ipynb"
    isolate_kernel()
    execute_notebook(notebooks[name], output, values, Path(".cache/failed") / output.name)
    print(output)
