"""What a paraphrase must keep of a text: its numbers, tickers and direction words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


def numbers(text: str) -> list[str]:
    """The numbers in `text`, sorted, without thousands separators."""
    return sorted(
        n.replace(",", "") if re.fullmatch(r"\d{1,3}(,\d{3})+(\.\d+)?", n) else n for n in NUMBER.findall(text)
    )


def tickers(text: str, pattern: str | None) -> set[str]:
    """What matches `pattern` (`perturbations.tickers` of a task) in `text`: tickers, currencies, names in capitals."""
    return {match.group() for match in re.finditer(pattern, text)} if pattern else set()


def directions(text: str, families: Mapping[str, Sequence[str]]) -> set[str]:
    """The names of those `families` of direction words (`perturbations.directions` of a task) that occur in `text`."""
    words = set(re.findall(r"[^\W\d_]+", text.lower()))
    return {family for family, members in families.items() if not words.isdisjoint(members)}
