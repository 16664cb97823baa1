"""The second step of a filter: the rows without a gold label that the teachers of a phase are sure of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from distillery.config.schema import Params, PhaseConfig, PseudoLabelFilter, SplitRef
from distillery.data.storage import read_split
from distillery.evaluation.reading import read_result_file
from distillery.files import Paths
from distillery.training.pseudo_labels import select_pseudo_labels


def confidence_funnels(root: Path, params: Params) -> list[dict[str, Any]]:
    """What `pseudo_labels` leaves, an entry for each different one among the phases of all students.

    phases: whose it is. teachers, min_confidence, agreement: its settings. counts: `part` (None: all; else theme or
    language), `value`, and `rows` and `left`, the rows without a gold label before and after. Themes and languages are
    those of the columns that the filter of the source names.
    Raises UserError when a file is missing.
    """
    funnels: dict[tuple, dict[str, Any]] = {}
    for name, spec in params.students.items():
        for k, phase in enumerate(spec.phases, 1):
            if not phase.teachers or phase.pseudo_labels == PseudoLabelFilter():
                continue
            settings = phase.pseudo_labels.model_dump()
            key = (*phase.data, *phase.teachers, *settings.values())
            if key not in funnels:
                counts = _count_rows(root, params, name, phase)
                funnels[key] = {"phases": [], "teachers": phase.teachers, **settings, "counts": counts}
            funnels[key]["phases"].append(f"{name}, phase {k}")
    return list(funnels.values())


def _count_rows(root: Path, params: Params, student: str, phase: PhaseConfig) -> list[dict[str, Any]]:
    """`counts` of :func:`confidence_funnels` for one phase of `student`."""
    rows = read_result_file(Paths(root).inputs(student) / "rows.parquet", root)
    rows = rows[rows["split_ref"].isin(phase.data) & rows["label"].isna()].reset_index(drop=True)
    left = select_pseudo_labels(rows, phase)
    counts: list[dict[str, Any]] = [{"part": None, "value": None, "rows": len(rows), "left": int(left.sum())}]
    for part, values in _parts_of_rows(root, params, phase, rows).items():
        for value in sorted(values.dropna().unique()):
            of_value = (values == value).to_numpy()
            number = {"rows": int(of_value.sum()), "left": int(np.sum(of_value & left))}
            counts.append({"part": part, "value": value, **number})
    return counts


def _parts_of_rows(root: Path, params: Params, phase: PhaseConfig, rows: pd.DataFrame) -> dict[str, pd.Series]:
    """The theme and the language of each of `rows` as text, as far as their sources have such columns."""
    parts = {part: pd.Series(None, index=rows.index, dtype=object) for part in ("theme", "language")}
    for ref in map(SplitRef.parse, phase.data):
        row_filter = params.data[ref.source].filter
        if row_filter is None or ref.split == "augmented":
            continue
        written = read_split(Paths(root).processed(ref.source), ref.split).set_index("id")
        of_split = rows["split_ref"] == str(ref)
        for part, column in (("theme", row_filter.theme), ("language", row_filter.language)):
            if column in written:
                parts[part][of_split] = rows["id"][of_split].map(written[column].dropna().astype(str))
    return parts
