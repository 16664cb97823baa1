"""What the notebooks on teachers and students state about a classifier's head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distillery.models.heads import OwnHead

SHOWN_LABELS = 12


def head_sentence(head: OwnHead | None, labels: Sequence[str]) -> str:
    """Whether the head for `labels` is the model's own, and which of its labels stand for them; None: no classifier."""
    if head is None:
        return "The model writes the labels: it needs no head for them."
    if head.names is None:
        return "The model brings no classification head: one is drawn at random."
    if head.order is None:
        text = f"The model's own head is for other labels ({_list(head.names)}): one is drawn at random."
        if sorted(head.names) == sorted(labels):
            text = "The model's own head gives one of these labels to a text, not a set: one is drawn at random."
        way_out = " If they mean the same, name them under `labels` of the model in `params.yaml`."
        return text + (way_out if len(head.names) == len(labels) else "")
    pairs = [f"{head.names[i]} is {label}" for i, label in zip(head.order, labels, strict=True)]
    return f"The head is the model's own: {_list(pairs)}."


def _list(texts: Sequence[str]) -> str:
    return ", ".join([*texts[:SHOWN_LABELS], *(["…"] if len(texts) > SHOWN_LABELS else [])])
