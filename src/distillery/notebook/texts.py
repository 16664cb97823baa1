"""Sentences on texts that are longer than a model reads."""

from __future__ import annotations

from collections.abc import Mapping

from distillery.wording import percent

WAY_OUT = "Raise `max_length`, or let a classifier read them in windows (`long_texts`)."


def cut_sentence(model: str, counts: Mapping[str, int]) -> str:
    """How many texts `model` does not read to their end; counts: see :func:`distillery.models.cut_texts`."""
    text = f"{model} reads {counts['tokens']:,} tokens of a text with its prompt: "
    if not counts["cut"]:
        return text + f"none of {counts['rows']:,} texts is cut."
    share = percent(counts["cut"] / counts["rows"])
    return text + f"**the ends of {counts['cut']:,} of {counts['rows']:,} texts ({share}) are cut**. {WAY_OUT}"


def long_texts_sentence(longer_than: Mapping[str, int], rows: int) -> str:
    """How many of `rows` rows have more words than some numbers; a word is a token at least.

    longer_than: number of words -> rows with more, rising.
    """
    some = {words: count for words, count in longer_than.items() if count}
    if not some:
        return f"No row has more than {next(iter(longer_than))} words: models of common lengths read all of it."
    named = ", ".join(f"{count:,} more than {int(words):,}" for words, count in some.items())
    return (
        f"Of {rows:,} rows some are long; by words: {named}. A word is at least one token: a model that reads so many "
        "tokens **cuts these rows**. 02_teach and 04_distill count them for each model."
    )
