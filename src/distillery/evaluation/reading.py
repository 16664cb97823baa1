"""Read a file of an earlier stage, with an error of one line when it is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from distillery.errors import UserError


def read_result_file(path: Path, root: Path) -> Any:
    """A parquet or csv file as a table, a JSON file as an object. Raises UserError when it is missing."""
    try:
        if path.suffix == ".parquet":
            return pd.read_parquet(path)
        return pd.read_csv(path) if path.suffix == ".csv" else json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.relative_to(root)}: no such file; `dvc repro` makes it") from None
