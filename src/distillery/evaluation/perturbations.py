"""The same sentence with other names, other amounts or other spelling: the label must stay.

Rules, not models, so that what is changed is known exactly. A rule that cannot be sure leaves the text alone.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence

import numpy as np

# Invented, like those of the corpora, and none of a word that speaks for a label.
INVENTED_NAMES = (
    *("Veltora", "Kambrit", "Osterly", "Quandel", "Marvik", "Tessolin", "Brunhald", "Ilvestad", "Norrecke", "Palvanti"),
    *(
        "Sorrendel",
        "Udemark",
        "Wexholm",
        "Yttervik",
        "Zandrell",
        "Corvano",
        "Dalmerin",
        "Eskeby",
        "Fenwara",
        "Gostrand",
    ),
)


CALENDAR = (
    *("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November"),
    *("December", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday", "Christmas", "Easter"),
)


KEPT_WORDS = {*CALENDAR, "Inc", "Ltd", "Plc", "Corp", "Oyj", "Abp", "Group", "Holding", "Holdings", "Bank"}


WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")


DOLLAR_TICKER = re.compile(r"\$[A-Z]{1,6}\b")


SENTENCE = re.compile(r"[.!?:][\"'”’)]?\s+$")


CURRENCY = r"EUR|USD|GBP|CHF|NOK|SEK|DKK|JPY|CNY|HKD|INR|AUD|CAD|NZD|SGD|PLN|CZK|BRL|MXN|ZAR|KRW|[€$£¥₹]"


UNIT = r"mn|mln|bn|tn|[kKmMbB]|million|billion|trillion|crore|lakh"


FIGURE = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?"


JOINED = r"\s?(?:-|–|to|and)\s?"


MONEY = re.compile(
    rf"(?:{CURRENCY})\s?(?:{FIGURE})(?:{JOINED}(?:{FIGURE})(?=\s?(?:{UNIT})\b))?"
    rf"|(?<![\w.,])(?:{FIGURE})(?:{JOINED}(?:{FIGURE}))?(?=\s?(?:(?:{UNIT})\s)?(?:euros?|dollars?|pounds|francs|kronor|kroner|yen)\b)"
    rf"|(?<![\w.,])(?:{FIGURE})(?=\s?(?:mn|mln|bn|tn)\b)"
)


# Numbers that stand for themselves whatever money does: shares, years, dates, quarters, names of things.
HARMLESS = re.compile(
    rf"(?:{FIGURE})\s?(?:%|percent|per cent|percentage|pp|pct|basis points|bps)|\b(?:19|20)\d\d\b"
    rf"|\b\d{{1,2}}(?:st|nd|rd|th)?\s(?:{'|'.join(CALENDAR)})\b|\b(?:{'|'.join(CALENDAR)})\s\d{{1,2}}\b"
    r"|[^\W\d_]-?\d+|\d+(?:st|nd|rd|th)\b|\d+-(?:year|month|week|day)|\d+ (?:years?|months?|weeks?|days?|hours?)\b"
)


def known_words(texts: Sequence[str]) -> set[str]:
    """Words that `texts` write in lower case somewhere: with a capital they are still no names."""
    return {word for text in texts for word in WORD.findall(text) if word.islower()}


def replace_names(text: str, known: set[str]) -> str:
    """`text` with every ticker and every name of it replaced by an invented one; the same name, the same way.

    A name is a word with one capital that `known` (see :func:`known_words`) has not in lower case. One that opens a
    sentence alone could be any word, and is left.
    """
    found = [(m.start(), m.end(), m.group()) for m in WORD.finditer(text)]
    named = [_is_name(word, known) for _, _, word in found]
    out, at, given = [], 0, {}
    for i, (start, end, word) in enumerate(found):
        opens = start == 0 or bool(SENTENCE.search(text[:start])) or text[:start].strip("\"'“‘ ") == ""
        beside = (i + 1 < len(found) and named[i + 1] and text[end : found[i + 1][0]] == " ") or word.endswith("'s")
        if named[i] and (not opens or beside) and text[max(0, start - 1) : start] != "$":
            stem, apostrophe, tail = word.partition("'")
            if stem not in given:
                at_name = zlib.crc32(stem.encode()) % len(INVENTED_NAMES)
                free = [n for n in (*INVENTED_NAMES[at_name:], *INVENTED_NAMES[:at_name]) if n not in given.values()]
                given[stem] = (free or INVENTED_NAMES)[0]
            out += [text[at:start], given[stem], apostrophe, tail]
            at = end
    changed = "".join([*out, text[at:]])
    return DOLLAR_TICKER.sub(lambda m: "$" + "".join(chr(65 + (ord(c) - 65 + 7) % 26) for c in m.group()[1:]), changed)


def _is_name(word: str, known: set[str]) -> bool:
    """Whether `word` can only be a name: a capital first, and no part a month, a day, a company's form or known."""
    stem = word.split("'")[0]
    parts = re.split("[-’]", stem)
    return word[:1].isupper() and not stem.isupper() and not any(p in KEPT_WORDS or p.lower() in known for p in parts)


def double_amounts(text: str) -> str:
    """`text` with every amount of money doubled, which keeps every order and every ratio between them.

    Left alone when it holds a number that is neither money nor a share, a date or a time: what that number counts may
    be compared with the money.
    """
    if re.search(r"\d", HARMLESS.sub(" ", MONEY.sub(" ", text))):
        return text
    return MONEY.sub(lambda money: re.sub(FIGURE, lambda figure: _doubled(figure.group()), money.group()), text)


def _doubled(figure: str) -> str:
    plain = figure.replace(",", "")
    decimals = len(plain.partition(".")[2])
    return f"{2 * int(plain.replace('.', '')) / 10**decimals:{',' if ',' in figure else ''}.{decimals}f}"


SPELLINGS: tuple[tuple[str, str], ...] = (
    (r"(?<=\d)\s?(?:mn|mln)\b", " million"),
    (r"(?<=\d)\s?bn\b", " billion"),
    (r"(?<=\d)\s?%", " percent"),
    (r"\bEUR\s?(?=\d)", "€"),
    (r"\bUSD\s?(?=\d)", "$"),
    (r"\bGBP\s?(?=\d)", "£"),
    (r"(?<=\w)n['’]t\b", " not"),
    (r"(?<=\w) & (?=\w)", " and "),
    (r"\bper cent\b", "percent"),
    (r"[“”]", '"'),
    (r"[‘’]", "'"),
)


def respell(text: str) -> str:
    """`text` with units, currencies and short forms written otherwise: "EUR 9 mn" and "€9 million" are the same."""
    text = re.sub(r"\b([Cc]an)['’]t\b", r"\1not", re.sub(r"\b([Ww])on['’]t\b", r"\1ill not", text))
    for pattern, other in SPELLINGS:
        text = re.sub(pattern, other, text)
    return text


def perturbations(texts: Sequence[str]) -> dict[str, Callable[[str], str]]:
    """Every rule by name, with the words of `texts` for the one that needs to know what is no name."""
    known = known_words(texts)
    return {
        "names": lambda text: replace_names(text, known),
        "amounts": double_amounts,
        "spelling": respell,
    }


def contrast_pairs_right(right: np.ndarray, label: Sequence[str], groups: Sequence[str]) -> tuple[np.ndarray, int]:
    """Contrast pairs: share of the groups whose rows have different labels of which every row is right -> [seeds], n.

    right [seeds, rows] of right or wrong; label, groups [rows]. n is the number of such groups; with none the shares
    are NaN. A model that does not see what differs in a pair is right on one half of it at most.
    """
    _, unit = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    _, code = np.unique(np.asarray(label, dtype=str), return_inverse=True)
    low = np.full(unit.max() + 1, code.max() + 1)
    high = np.full(unit.max() + 1, -1)
    np.minimum.at(low, unit, code)
    np.maximum.at(high, unit, code)
    contrast = low < high
    wrong = np.stack([np.bincount(unit, ~np.asarray(row, dtype=bool)) for row in np.atleast_2d(right)])
    if not contrast.any():
        return np.full(len(wrong), np.nan), 0
    return (wrong[:, contrast] == 0).mean(1), int(contrast.sum())
