"""Assign whole groups to splits, stratified by label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from distillery.config.schema import SPLITS, SplitShares
from distillery.errors import UserError
from distillery.label_sets import LabelSets, membership

NEEDS_EVERY_LABEL = ("train", "validation", "test")


def split_groups(
    groups: Sequence[str],
    labels: Sequence[str],
    names: Sequence[str],
    shares: SplitShares | Mapping[str, float],
    seed: int,
) -> np.ndarray:
    """Assign whole groups to splits so that each split gets its share of the rows of every label.

    Of label sets each row counts for all of its labels, and those without a label are spread as rows of one label are.

    Every label of `names` gets at least one group in train, validation and test (those with a share above 0).
    Large groups go first, each to the split that then has the smallest part of its target for the group's labels,
    so that groups of every size are spread in proportion too. Deterministic in `seed`.
    Returns an array of split names, one per row. Raises UserError when a label has too few groups.
    """
    by_split = shares.model_dump() if isinstance(shares, SplitShares) else shares
    share = {split: by_split[split] for split in SPLITS if by_split.get(split, 0) > 0}
    splits = list(share)
    required = [splits.index(split) for split in NEEDS_EVERY_LABEL if split in share]
    required_names = ", ".join(splits[s] for s in required)
    group_code, _ = pd.factorize(np.asarray(groups, dtype=object))
    counts = np.zeros((group_code.max() + 1, len(names)), dtype=int)
    if isinstance(names, LabelSets):
        members = membership(labels, names).astype(int)
        np.add.at(counts, group_code, members)
        without = np.bincount(group_code, members.sum(1) == 0)[:, None].astype(int)
        counts = np.hstack([counts, without]) if without.any() else counts
    else:
        np.add.at(counts, (group_code, pd.Categorical(labels, categories=list(names)).codes), 1)
    for label, n_groups in zip(names, (counts > 0).sum(axis=0)[: len(names)], strict=True):
        if n_groups < len(required):
            raise UserError(
                f"label `{label}` has {n_groups} group(s) of rows (rows that belong together count once), "
                f"too few to split: needs {len(required)}, one each for {required_names}"
            )
    for attempt in range(50):
        rng = np.random.default_rng([seed, attempt])
        assigned = _assign_groups(counts, len(names), np.array([share[s] for s in splits]), required, rng)
        if assigned is not None:
            return np.array(splits, dtype=object)[assigned[group_code]]
    raise UserError(
        f"no split holds every label in each of {required_names}: the labels share too few groups; add rows"
    )


def _assign_groups(
    counts: np.ndarray, n_labels: int, share: np.ndarray, required: list[int], rng: np.random.Generator
) -> np.ndarray | None:
    """Split index per group [groups], or None when this shuffle leaves a required split without some label.

    counts: rows of each group by label, and of label sets in one more column those without a label.
    """
    target = np.outer(share, counts.sum(axis=0))  # [splits, labels] rows
    current = np.zeros_like(target)
    assigned = np.full(len(counts), -1)
    shuffled = rng.permutation(len(counts))

    def assign(group: int, split: int) -> None:
        assigned[group] = split
        current[split] += counts[group]

    for label in np.argsort((counts > 0).sum(axis=0)[:n_labels], kind="stable"):  # the rarest first
        for split in required:
            if not current[split, label]:
                free = [g for g in shuffled if assigned[g] < 0 and counts[g, label]]
                if not free:
                    return None
                assign(min(free, key=lambda g: ((counts[g] > 0).sum(), counts[g].sum())), split)
    # Sainte-Laguë's rule for seats. The rule "to the emptiest split" would give all large groups to the largest splits,
    # and contrast pairs would be missing from the small ones.
    weight = counts / counts.sum(axis=0)
    for group in sorted((g for g in shuffled if assigned[g] < 0), key=lambda g: -counts[g].sum()):
        assign(group, int(np.argmin(((current + counts[group] / 2) / target) @ weight[group])))
    return assigned
