"""Read, clean, cluster, split and audit a source. All of it happens in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from distillery.config.schema import SPLITS, SourceConfig
from distillery.data.audit import (
    columns_that_give_the_label,
    few_shot_near_duplicates,
    label_conflicts,
    length_summary,
    split_leaks,
)
from distillery.data.cleaning import HUB_SPLIT_COLUMN, clean_rows, filter_rows
from distillery.data.near_duplicates import cluster_near_duplicates, name_groups
from distillery.data.readers import read_source
from distillery.data.splitting import split_groups
from distillery.errors import UserError
from distillery.tasks.schema import Task


@dataclass(frozen=True)
class PreparedSource:
    """A source ready to be written.

    rows: id, text, label, rationale (str or None), group, extra columns.  split, cluster: one entry per row;
    `cluster` counts near-duplicates alone, `group` unites them with the groups of the file.
    """

    rows: pd.DataFrame
    split: np.ndarray
    cluster: np.ndarray
    task: Task
    audit: dict[str, Any]


def prepare_source(name: str, spec: SourceConfig, task: Task, base: Path) -> PreparedSource:
    """Read, clean, cluster, split and audit the source `name`; writes nothing.

    Deterministic in the file, the task and `spec`. Raises UserError (see :func:`read_source`, :func:`clean_rows` and
    :func:`split_groups`), with one line that names the file.
    """
    raw = read_source(spec, base)
    rows, also, counts = clean_rows(raw, spec, task)
    rows, also, unfit = filter_rows(raw, rows, also, spec)
    before = len(rows)
    if spec.limit:
        units = [group if group is not None else (i,) for i, group in enumerate(rows["group"])]
        code, known = pd.factorize(pd.Series(units, dtype=object))
        chosen = np.random.default_rng([spec.seed, len(SPLITS)]).permutation(len(known))[: spec.limit]
        stay = np.flatnonzero(np.isin(code, chosen))
        position = {int(old): new for new, old in enumerate(stay)}
        also = [(position[i], group) for i, group in also if i in position]
        rows = rows.iloc[stay].reset_index(drop=True)
    own = rows.pop(HUB_SPLIT_COLUMN) if HUB_SPLIT_COLUMN in rows else None
    user_groups = rows["group"].copy()
    cluster = cluster_near_duplicates(list(rows["text"]), spec.near_duplicate)
    rows["group"] = pd.Series(name_groups(rows, cluster, also), dtype=object)
    # of a choice's labels those that are right somewhere: no row may have as many options as the task allows
    names = task.names if task.kind == "classification" else [n for n in task.names if (rows["label"] == n).any()]
    try:
        if own is not None:
            split = own.to_numpy(dtype=object)
        elif spec.split is None:
            split = np.full(len(rows), "pool", dtype=object)
        else:
            split = split_groups(rows["group"], rows["label"], names, spec.split, spec.seed)
    except UserError as error:
        raise UserError(f"{raw.name}: {error}") from None

    sizes = np.bincount(cluster)
    merged = rows["group"].groupby(rows["group"]).size()
    audit = {
        "name": name,
        "source": spec.source,
        "seed": spec.seed,
        "near_duplicate": spec.near_duplicate,
        "dropped": {
            "blank": counts["blank"],
            "duplicates": counts["duplicates"],
            "over_limit": before - len(rows),
            **unfit,
        },
        "columns_left_out": counts["columns_left_out"],
        "columns_left_out_of_pool": columns_that_give_the_label(rows, task),
        "rows_read": counts["read"],
        "rows": len(rows),
        "groups": len(merged),
        "splits": {
            part: {
                "rows": int((split == part).sum()),
                "share": round(float((split == part).mean()), 4),
                "groups": int(rows["group"][split == part].nunique()),
                "groups_of_several_rows": int((rows["group"][split == part].value_counts() > 1).sum()),
                "labels": {label: int(((rows["label"] == label) & (split == part)).sum()) for label in task.names},
            }
            for part in SPLITS
        },
        "clusters": {
            "near_duplicate_clusters": int((sizes > 1).sum()),
            "rows_in_them": int(sizes[sizes > 1].sum()),
            "largest_cluster": int(sizes.max()),
            "groups_in_the_file": int(user_groups.nunique()),
            "groups_of_several_rows": int((merged > 1).sum()),
            "largest_group": int(merged.max()),
        },
        "label_conflicts": label_conflicts(rows, split, spec.near_duplicate),
        "across_splits": {
            "digits_masked": split_leaks(rows, split, spec.near_duplicate, masked=True),
            "as_written": split_leaks(rows, split, spec.near_duplicate, masked=False),
        },
        "few_shot_near_duplicates": few_shot_near_duplicates(rows, split, task, spec.near_duplicate),
        "lengths": {
            "all": length_summary(rows["text"]),
            "by_label": {
                n: length_summary(rows["text"][rows["label"] == n]) for n in task.names if (rows["label"] == n).any()
            },
        },
    }
    return PreparedSource(rows, split, cluster, task, audit)
