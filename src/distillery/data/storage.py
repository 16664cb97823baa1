"""The files of a prepared source: written as one folder, read split by split."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from distillery.config.schema import SPLITS
from distillery.data.cleaning import ROW_COLUMNS
from distillery.data.prepare import PreparedSource
from distillery.errors import UserError
from distillery.files import atomic_write
from distillery.tasks.schema import Task


def _write_parquet(frame: pd.DataFrame, schema: pa.Schema, path: Path) -> None:
    table = pa.table({column: frame[column].tolist() for column in frame}, pa.schema([schema.field(c) for c in frame]))
    with open(path, "wb") as file:
        pq.write_table(table, file)


def write_source(prepared: PreparedSource, folder: Path) -> None:
    """Write the splits, `pool_labels.parquet`, `task.json` and `audit.json` into `folder`, replacing it as a whole.

    The pool carries no label, no rationale and no column that reveals the label.
    Raises UserError when the disk is full; `folder` is then as it was before.
    """
    rows, split = prepared.rows, prepared.split
    gold = ["label", "rationale", *(["answers"] if "answers" in rows and prepared.task.kind == "qa" else [])]
    hidden = [*gold, *prepared.audit["columns_left_out_of_pool"]]
    # Types come from the whole column: a split may be empty, or without any rationale.
    types = {c: pa.string() if c in (*ROW_COLUMNS, "answers") else pa.array(rows[c].tolist()).type for c in rows}
    schema = pa.schema(list(types.items()))
    with atomic_write(folder) as new:
        new.mkdir()
        for name in SPLITS:
            frame = rows[split == name]
            _write_parquet(frame.drop(columns=hidden) if name == "pool" else frame, schema, new / f"{name}.parquet")
        _write_parquet(rows.loc[split == "pool", ["id", *gold]], schema, new / "pool_labels.parquet")
        # The order of the labels is the order of probability vectors: keys stay as they are.
        task = json.dumps(prepared.task.model_dump(), ensure_ascii=False, indent=2)
        (new / "task.json").write_text(task + "\n", encoding="utf-8")
        audit = json.dumps(prepared.audit, ensure_ascii=False, indent=2, sort_keys=True)
        (new / "audit.json").write_text(audit + "\n", encoding="utf-8")


def read_split(folder: Path, name: str) -> pd.DataFrame:
    """The rows of one written file: train, pool, validation, test or pool_labels. Missing values are None.

    Raises UserError when the file does not exist yet.
    """
    path = folder / f"{name}.parquet"
    if not path.exists():
        raise UserError(f"{path}: not there yet; run `dvc repro` first")
    frame = pq.read_table(path).to_pandas(strings_to_categorical=False)
    for column in frame.columns.intersection(ROW_COLUMNS):
        frame[column] = frame[column].astype(object).where(frame[column].notna(), None)
    return frame


def read_task(folder: Path) -> Task:
    """The task a source was prepared with."""
    return Task.model_validate_json((folder / "task.json").read_text(encoding="utf-8"))
