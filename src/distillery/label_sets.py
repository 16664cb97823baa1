"""Label sets: what a row of a `multilabel` task has in place of one label, as one text and as columns of true or false.

The text joins the labels in the order of the task, so equal sets are equal texts: `up | guidance`. It stands in every
column `label` and `prediction`, and whatever compares these two compares sets.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike

SET_SEPARATOR = " | "  # between two labels of a set
NO_LABELS = "(none)"  # the set without any label


class LabelSets(list[str]):
    """The labels of a task whose rows have any number of them, in the order of probability vectors.

    Functions that take the labels of a task and values of rows take these values for label sets where they get this.
    """

    def text(self, value: object) -> str:
        """The set `value` in the order of these labels, without labels that are none of them."""
        return SET_SEPARATOR.join(name for name in self if name in split_labels(value)) or NO_LABELS


def join_labels(labels: Collection[str], names: Sequence[str]) -> str:
    """The set of `labels` as one text, in the order of `names`. Raises ValueError for a label that is none of them."""
    unknown = [label for label in labels if label not in names]
    if unknown:
        raise ValueError(f"label {unknown[0]!r} is not among {names}")
    return SET_SEPARATOR.join(name for name in names if name in labels) or NO_LABELS


def split_labels(value: object) -> list[str]:
    """The labels of the set `value`; none of a value that is no text, such as an answer that could not be read."""
    return value.split(SET_SEPARATOR) if isinstance(value, str) and value != NO_LABELS else []


def membership(values: ArrayLike, names: Sequence[str]) -> np.ndarray:
    """Which labels the sets `values` [...] hold: [..., labels] bool. What is none of `names` counts as no label."""
    values = np.asarray(values, dtype=object)
    distinct = {value: [name in labels for name in names] for value in set(values.ravel())
                for labels in [set(split_labels(value))]}  # fmt: skip
    rows = [distinct[value] for value in values.ravel()]
    return np.array(rows, dtype=bool).reshape(*values.shape, len(names))


def sets_of(members: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """The sets whose labels `members` [..., labels] marks: [...] of text; undoes :func:`membership`."""
    flat = members.reshape(-1, members.shape[-1])
    texts = [SET_SEPARATOR.join(name for name, held in zip(names, row, strict=True) if held) for row in flat]
    return np.array([text or NO_LABELS for text in texts], dtype=object).reshape(members.shape[:-1])


def rows_with(values: ArrayLike, label: str, names: Sequence[str]) -> np.ndarray:
    """Which of `values` [n] hold `label`, or are the empty set if it is that: [n] bool.

    Where `names` are no label sets, which of them are `label`.
    """
    values = np.asarray(values, dtype=object)
    if not isinstance(names, LabelSets):
        return np.array([value == label for value in values], dtype=bool)
    if label == NO_LABELS:
        return np.array([value == NO_LABELS for value in values], dtype=bool)
    return membership(values, [label])[..., 0]


def rarest_labels(values: ArrayLike, names: Sequence[str]) -> np.ndarray:
    """For each of the sets `values` [n] the label of it that the fewest of them hold; the empty set stays: [n]."""
    members = membership(values, names)
    counts = np.where(members, members.sum(0), len(members) + 1)
    labels = np.array([*names, NO_LABELS], dtype=object)
    return labels[np.where(members.any(1), counts.argmin(1), len(names))]


def single_labels(values: Iterable[object], names: Sequence[str]) -> list[object]:
    """The labels of all `values`, one after the other; `values` themselves where `names` are no label sets."""
    if not isinstance(names, LabelSets):
        return list(values)
    return [label for value in values for label in split_labels(value)]
