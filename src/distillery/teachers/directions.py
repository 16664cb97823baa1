"""Numbers, tickers and direction words of a text."""

from __future__ import annotations

import re

# A paraphrase that trades one of these families for the other says the opposite.
DIRECTIONS = {
    "up": "up rise rises rose risen rising increase increases increased increasing grow grows grew grown "
    "growing growth gain gains gained climb climbs climbed climbing jump jumps jumped higher above "
    "exceed exceeds exceeded beat beats improve improves improved improving improvement more raise "
    "raises raised profit profits surge surged soar soared",
    "down": "down fall falls fell fallen falling decrease decreases decreased decreasing decline declines "
    "declined drop declining drops dropped dropping shrink shrinks shrank lower below miss missed "
    "misses worsen worsened reduce less reduces reduced reduction cut cuts loss losses slump slumped "
    "slide slid sliding plunge plunged",
}


_FAMILY = {word: family for family, words in DIRECTIONS.items() for word in words.split()}


NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


TICKER = re.compile(r"\$[A-Za-z]{1,6}\b|\b[A-Z]{2,6}\b")


def numbers(text: str) -> list[str]:
    """The numbers in `text`, sorted, thousands separators taken out."""
    return sorted(
        n.replace(",", "") if re.fullmatch(r"\d{1,3}(,\d{3})+(\.\d+)?", n) else n for n in NUMBER.findall(text)
    )


def tickers(text: str) -> set[str]:
    """What looks like a ticker, a currency or another name in capitals."""
    return set(TICKER.findall(text))


def directions(text: str) -> set[str]:
    """Which families of direction words (`up`, `down`) occur in `text`."""
    return {_FAMILY[word] for word in re.findall(r"[a-z]+", text.lower()) if word in _FAMILY}
