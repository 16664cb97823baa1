"""Test rows of other sources among the rows that a source gives to learn from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from distillery.config.schema import Params, SourceConfig
from distillery.data.cleaning import OWN_SPLIT_COLUMN, clean_rows
from distillery.data.filtering import filter_rows
from distillery.data.near_duplicates import has_near_duplicate, nearest_texts
from distillery.data.prepare import PreparedSource, prepare_source
from distillery.data.readers import read_source
from distillery.tasks.schema import Task

MAX_OVERLAPS = 10  # pairs shown per source


def add_overlaps(prepared: PreparedSource, source: str, params: Params, base: Path) -> PreparedSource:
    """`prepared` with the key `test_rows_of_others` in its audit, where other sources bring test rows of their own.

    By source: test_rows, same (found here to the letter), near (near-duplicates of a row here, digits masked or as
    written), and the nearest pairs: a test row and a row here that is learned from or chosen on. Nothing is left out.
    Raises UserError when a file of the other source cannot be read.
    """
    others = params.sources_with_own_tests(source)
    if not others:
        return prepared
    used = prepared.rows.assign(split=prepared.split)[prepared.split != "test"].reset_index(drop=True)
    findings = {
        name: _overlap(_test_rows(spec, prepared.task, base, params), used, params.data[source].near_duplicate)
        for name, spec in others.items()
    }
    return replace(prepared, audit=prepared.audit | {"test_rows_of_others": findings})


def held_out_texts(source: str, params: Params, task: Task, base: Path) -> list[str]:
    """The validation and test texts of all other sources of the task, however split, if `source` has `drop_leaks`.

    Raises UserError when a file of another source cannot be read.
    """
    texts: list[str] = []
    for name, spec in params.sources_with_held_out_rows(source).items() if params.data[source].drop_leaks else ():
        prepared = prepare_source(name, spec, task, base, models=params.models)
        texts += prepared.rows["text"][np.isin(prepared.split, ("validation", "test"))].tolist()
    return texts


def prepare_without_leaks(source: str, params: Params, task: Task, base: Path) -> PreparedSource:
    """:func:`distillery.data.prepare.prepare_source` for a source of `params`, whose `drop_leaks` looks at the others.

    Raises UserError when a file cannot be read.
    """
    held_out = held_out_texts(source, params, task, base)
    return prepare_source(source, params.data[source], task, base, held_out, params.models)


def _test_rows(spec: SourceConfig, task: Task, base: Path, params: Params) -> pd.DataFrame:
    raw = read_source(spec, base)
    rows, duplicate_groups, _ = clean_rows(raw, spec, task)
    rows, _, _, _ = filter_rows(raw, rows, duplicate_groups, spec, params.models)
    return rows[rows[OWN_SPLIT_COLUMN] == "test"].drop(columns=OWN_SPLIT_COLUMN).reset_index(drop=True)


def _overlap(test: pd.DataFrame, used: pd.DataFrame, threshold: float) -> dict[str, Any]:
    texts = used["text"].tolist()
    same = test["text"].isin(texts).to_numpy()
    near = has_near_duplicate(test["text"].tolist(), texts, threshold) & ~same
    shown = np.concatenate([np.flatnonzero(same), np.flatnonzero(near)])[:MAX_OVERLAPS]
    similarity, nearest = nearest_texts(test["text"].iloc[shown].tolist(), texts)
    columns = ["id", "split", "label", "text"]
    pairs = [
        {
            "similarity": round(float(s), 4),
            "rows": [test.assign(split="test")[columns].iloc[i].to_dict(), used[columns].iloc[j].to_dict()],
        }
        for s, i, j in zip(similarity, shown, nearest, strict=True)
    ]
    return {"test_rows": len(test), "same": int(same.sum()), "near": int(near.sum()), "pairs": pairs}
