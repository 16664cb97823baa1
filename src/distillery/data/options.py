"""The options of a `choice` row: as the file has them, and in the order in which a model reads them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from distillery.config.schema import ColumnNames
from distillery.data.records import normalize_text
from distillery.errors import UserError


def read_options(at: str, record: dict[str, Any], columns: Sequence[str], first: Literal[0, 1, "A"]) -> list[str]:
    """The options of `record` in the order of the file: of one column with a list, or a column each.

    at: the file and line of the record, for messages. Letters such as `A)` before options are taken away where `first`
    is A. Raises UserError for anything but texts that are not empty.
    """
    raw_options = [record.get(column) for column in columns]
    raw_options = raw_options[0] if len(columns) == 1 else raw_options
    if not isinstance(raw_options, list) or not all(
        isinstance(option, str) and normalize_text(option) for option in raw_options
    ):
        shown = "`, `".join(columns)
        raise UserError(f"{at}: `{shown}` must be a list of texts, none of them empty, not {raw_options!r:.60}")
    options = [normalize_text(option) for option in raw_options]
    if first == "A" and all(re.match(rf"\(?{chr(65 + n)}\)", option) for n, option in enumerate(options)):
        # "A)21": `with_options` writes its own letters
        options = [re.sub(r"^\(?[A-Z]\)\s*", "", option) for option in options]
    return options


def order_options(text: str, options: Sequence[str], right: int | None, columns: ColumnNames) -> list[int]:
    """The positions of the options that a model reads, in their order: shuffled, at most `columns.max_options`.

    right: the position of the right one, which is always kept. The text and the options alone decide the order. So the
    position of an option holds no information, and two copies of a question read the same.
    """
    seed = hashlib.sha256("\n".join([text, *sorted(options)]).encode()).digest()
    # equal options keep the order of the file among themselves
    by_option = sorted(range(len(options)), key=lambda n: (options[n], n))
    rng = np.random.default_rng(list(seed))
    shuffled = rng.permutation(by_option).tolist()
    order = shuffled if columns.shuffle_options else list(range(len(options)))
    if columns.max_options is None:
        return order
    wrong = rng.permutation([n for n in by_option if n != right]).tolist()[: columns.max_options - 1]
    return [n for n in order if n in (right, *wrong)]
