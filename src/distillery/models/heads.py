"""The classification head that a model brings, and which of its outputs stands for which label of a task."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distillery.errors import UserError
from distillery.label_sets import LabelSets

MULTILABEL = "multi_label_classification"  # the `problem_type` of a head that gives label sets, in a config


@dataclass(frozen=True)
class OwnHead:
    """The head that a model brings for the labels of a task.

    names: the labels of its outputs, None when the model brings no head. order: the output for each label of the task,
    None when that is not known, or when the head gives one label and the task has sets: the head is then drawn anew.
    """

    names: list[str] | None
    order: list[int] | None

    @property
    def origin(self) -> str:
        """`own` or `drawn`."""
        return "drawn" if self.order is None else "own"

    def require(self, teacher: str, model: str, labels: Sequence[str]) -> None:
        """Raise UserError when `teacher`, which is not fine-tuned, has no head for `labels` from its `model`."""
        if self.order is None:
            wanted, names = ", ".join(labels), ", ".join(self.names or [])
            one = ", one for each text" if isinstance(labels, LabelSets) else ""
            name_them = f"its labels are {names}{one}; name them under models.{model}.labels, or"
            way_out = name_them if names else "it has none;"
            raise UserError(
                f"params.yaml: teachers.{teacher}: its model has no head for the labels {wanted}: {way_out} give "
                "`finetune`"
            )


def read_head(folder: Path, labels: Sequence[str], label_map: Mapping[str, str] | None = None) -> OwnHead:
    """The head of the model in `folder` for the `labels` of a task.

    label_map: the label of the task for each label of the model (`models.<name>.labels` in params.yaml). Without it
    labels match by their names; capitals and spaces count nothing, and label sets need a head for sets.
    Raises ValueError when `label_map` does not name each label of the head and each label of the task once, and OSError
    or ValueError when the folder has no config.
    """
    config = read_config(folder)
    names = None
    if "SequenceClassification" in str(config.get("architectures")):
        named = config.get("id2label") or {i: f"LABEL_{i}" for i in range(2)}  # what transformers takes then
        names = [named[key] for key in sorted(named, key=int)]
    if label_map is None:
        keys = [_key(name) for name in names or []]
        wanted = [_key(label) for label in labels]
        known = len(set(wanted)) == len(wanted) and sorted(keys) == sorted(wanted)
        known &= config.get("problem_type") == MULTILABEL or not isinstance(labels, LabelSets)
        return OwnHead(names, [keys.index(key) for key in wanted] if known else None)
    check_label_map(label_map, labels)
    if names is None:
        raise ValueError("`labels` names those of a classification head, and the model has none")
    if sorted(label_map) != sorted(names):
        raise ValueError(f"`labels` must name each label of the model's head once: {', '.join(names)}")
    model_label = {label: name for name, label in label_map.items()}
    return OwnHead(names, [names.index(model_label[label]) for label in labels])


def read_config(folder: Path) -> dict[str, Any]:
    """The config of the model in `folder`. Raises ValueError when it is not valid JSON, and OSError without one."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"its config.json is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError("its config.json holds no keys and values")
    return config


def check_label_map(label_map: Mapping[str, str], labels: Sequence[str]) -> None:
    """Raise ValueError when `label_map` does not give each of `labels` once."""
    if sorted(label_map.values()) != sorted(labels):
        raise ValueError(f"`labels` must give each label of the task once: {', '.join(labels)}")


def _key(name: str) -> str:
    """`name` as it is compared."""
    return "".join(str(name).split()).casefold()
