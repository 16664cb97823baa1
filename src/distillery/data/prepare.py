"""Read, clean, cluster, split and audit a source. All of it happens in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd

from distillery.config.schema import SPLITS, ModelConfig, SourceConfig
from distillery.data.audit import audit_source, few_shot_texts
from distillery.data.cleaning import OWN_SPLIT_COLUMN, clean_rows
from distillery.data.filtering import filter_rows, keyword_decisions
from distillery.data.near_duplicates import (
    NearDuplicates,
    cluster_pairs,
    find_near_duplicates,
    has_near_duplicate,
    name_groups,
)
from distillery.data.readers import read_source
from distillery.data.selection import DuplicateGroup, take_rows
from distillery.data.similar_pairs import MAX_EXACT
from distillery.data.splits import complete_splits
from distillery.data.splitting import split_groups
from distillery.errors import UserError
from distillery.tasks.schema import Task


@dataclass(frozen=True)
class PreparedSource:
    """A source ready to be written.

    rows: id, text, label, rationale (str or None), group, extra columns.  split, cluster: one entry per row;
    `cluster` numbers the clusters of near-duplicates, `group` joins them with the groups of the file.
    near: the pairs of near-duplicates, and the texts as vectors.
    """

    rows: pd.DataFrame
    split: np.ndarray
    cluster: np.ndarray
    task: Task
    audit: dict[str, Any]
    near: NearDuplicates


def prepare_source(
    name: str,
    spec: SourceConfig,
    task: Task,
    base: Path,
    held_out: Sequence[str] = (),
    models: Mapping[str, ModelConfig] = MappingProxyType({}),
) -> PreparedSource:
    """Read, clean, cluster, split and audit the source `name`; writes nothing.

    models: those of params.yaml, for `filter.embeddings`.
    held_out: texts that no row to learn from may repeat, see :func:`distillery.data.overlaps.held_out_texts`.
    Deterministic in the file, the task and `spec`. Raises UserError (see :func:`read_source`, :func:`clean_rows` and
    :func:`split_groups`), with one line that names the file.
    """
    raw = read_source(spec, base)
    rows, duplicate_groups, counts = clean_rows(raw, spec, task)
    rows, duplicate_groups, filtered, filter_report = filter_rows(raw, rows, duplicate_groups, spec, models)
    rows, duplicate_groups, leaks = _drop_leaks(rows, duplicate_groups, held_out, spec.near_duplicate)
    n_filtered, file = len(rows), raw.name
    del raw  # of a million rows, the records of the file have half a gigabyte
    if spec.limit:
        rows, duplicate_groups = _limit_groups(rows, duplicate_groups, spec.limit, spec.seed)
    own_split = rows.pop(OWN_SPLIT_COLUMN) if OWN_SPLIT_COLUMN in rows else None
    file_groups = rows["group"].copy()
    near = find_near_duplicates(list(rows["text"]), spec.near_duplicate, few_shot_texts(task))
    cluster = cluster_pairs(near, len(rows))
    rows["group"] = pd.Series(name_groups(rows, cluster, duplicate_groups), dtype=object)
    try:
        split, decisions = _assign_splits(rows, own_split, spec, task)
    except UserError as error:
        by_name = "group" not in spec.columns.model_fields_set and file_groups.notna().any()
        hint = " (the column `group` was taken for its name; columns: {group: null} takes none)" if by_name else ""
        raise UserError(f"{file}: {error}{hint}") from None
    dropped = {key: counts[key] for key in ("blank", "not_kept", "empty", "duplicates")}
    dropped["over_limit"] = n_filtered - len(rows)
    dropped |= {"leaks": leaks} if spec.drop_leaks else {}
    audit = {
        "name": name,
        "source": spec.origin,
        "seed": spec.seed,
        "near_duplicate": spec.near_duplicate,
        "dropped": dropped | filtered,
        **({"filter": filter_report} if filter_report else {}),
        "columns_left_out": counts["columns_left_out"],
        "mapped_labels": counts["mapped_labels"],
        "decisions": [
            *counts["decisions"],
            *keyword_decisions(filter_report),
            *_leak_decision(leaks),
            *decisions,
            *_search_decision(len(rows)),
        ],
        "rows_read": counts["read"],
    } | audit_source(rows, split, cluster, file_groups, task, near)
    return PreparedSource(rows, split, cluster, task, audit, near)


def _drop_leaks(
    rows: pd.DataFrame, duplicate_groups: list[DuplicateGroup], held_out: Sequence[str], threshold: float
) -> tuple[pd.DataFrame, list[DuplicateGroup], int]:
    """The rows without those to learn from that are near-duplicates of `held_out`, and how many those were."""
    if not held_out:
        return rows, duplicate_groups, 0
    leaks = has_near_duplicate(rows["text"].tolist(), held_out, threshold)
    if OWN_SPLIT_COLUMN in rows:
        leaks &= ~rows[OWN_SPLIT_COLUMN].isin(("validation", "test")).to_numpy()
    return *take_rows(rows, duplicate_groups, np.flatnonzero(~leaks)), int(leaks.sum())


def _leak_decision(leaks: int) -> list[str]:
    """A sentence where rows were left out."""
    return [f"{leaks} rows that repeat a validation or test row of another source were left out."] if leaks else []


def _search_decision(n_texts: int) -> list[str]:
    """A sentence where there may be too many texts to compare all of them."""
    if n_texts <= MAX_EXACT:
        return []
    return [
        f"Near-duplicates among more than {MAX_EXACT:,} different texts are found by MinHash, which leaves out a few "
        "pairs near the threshold; a sample of rows stands for all where the nearest rows are shown."
    ]


def _limit_groups(
    rows: pd.DataFrame, duplicate_groups: list[DuplicateGroup], limit: int, seed: int
) -> tuple[pd.DataFrame, list[DuplicateGroup]]:
    """The rows of `limit` random groups of the file; a row without a group counts as one."""
    units = [group if group is not None else (i,) for i, group in enumerate(rows["group"])]
    unit, unique_units = pd.factorize(pd.Series(units, dtype=object))
    chosen = np.random.default_rng([seed, len(SPLITS)]).permutation(len(unique_units))[:limit]
    return take_rows(rows, duplicate_groups, np.flatnonzero(np.isin(unit, chosen)))


def _assign_splits(
    rows: pd.DataFrame, own_split: pd.Series | None, spec: SourceConfig, task: Task
) -> tuple[np.ndarray, list[str]]:
    """The split of each row, and what was decided: the source's own, by the shares of `spec`, or the pool."""
    # The last labels of a `choice` task may be right nowhere: the rows may have fewer options than the task allows.
    labels = task.names
    if task.kind not in ("classification", "multilabel"):
        labels = [name for name in labels if (rows["label"] == name).any()]
    if own_split is not None:
        return complete_splits(own_split, rows, labels, spec.validation_share, spec.seed)
    if spec.split is None:
        return np.full(len(rows), "pool", dtype=object), []
    return split_groups(rows["group"], rows["label"], labels, spec.split, spec.seed), []
