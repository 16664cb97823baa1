"""Keys of `params.yaml` that have a new name. The old one is read for one version, with a line on stderr."""

from __future__ import annotations

import sys
from typing import Any

from distillery.errors import UserError

LAST_VERSION = "0.3"  # the first version that no longer reads the old keys

# Old path -> new name of its last key; `*` stands for any one key or position. A key inside a section that has a new
# name itself comes first, under the section's old name.
RENAMED_KEYS = {
    "students.*.phases.*.take.confidence": "min_confidence",
    "students.*.phases.*.take.agree": "agreement",
    "students.*.phases.*.take": "pseudo_labels",
    "students.*.phases.*.loss.prior": "label_prior",
    "data.*.filter.least": "min_keywords",
    "data.*.hub_splits": "splits",
    "models.*.built": "random",
    "search.sets": "trials",
    "search.choose": "choices",
    "search.choices.loss.*.prior": "label_prior",
    "teachers.*.shots": "examples_from",
    "teachers.*.api.attempts": "max_attempts",
}


def rename_old_keys(raw: Any, file: str) -> Any:
    """`raw`, the content of a YAML file, with the new names of `RENAMED_KEYS`; the order of keys stays, `raw` too.

    Prints one line on stderr for every old key. Raises UserError when the old and the new key stand side by side.
    """
    for pattern, new in RENAMED_KEYS.items():
        *parents, old = pattern.split(".")
        raw = _rename(raw, parents, old, new, file, ())
    return raw


def _rename(node: Any, parents: list[str], old: str, new: str, file: str, path: tuple[str, ...]) -> Any:
    """`node`, which lies at `path`, with `old` named `new` in all that `parents` lead to below it."""
    if parents:
        first, *rest = parents
        if isinstance(node, dict):
            return {
                key: _rename(value, rest, old, new, file, (*path, str(key))) if first in ("*", key) else value
                for key, value in node.items()
            }
        if isinstance(node, list) and first == "*":
            return [_rename(value, rest, old, new, file, (*path, str(i))) for i, value in enumerate(node)]
        return node
    if not isinstance(node, dict) or old not in node:
        return node
    key = ".".join((*path, old))
    if new in node:
        raise UserError(f"{file}: {key}: renamed to `{new}`, which stands there too; leave `{old}` out")
    print(f"{file}: {key}: renamed to {new}; the old key is read until version {LAST_VERSION}", file=sys.stderr)
    return {new if k == old else k: value for k, value in node.items()}
