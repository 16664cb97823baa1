"""The same sentence with other names, other amounts or other spelling: the label must stay.

Rules, not models, so that every change is known exactly. The words of the rules come from the section `perturbations`
of the task file; a rule that cannot be sure leaves the text as it is.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np

from distillery.tasks.schema import Perturbations

WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
SENTENCE = re.compile(r"[.!?:][\"'”’)]?\s+$")
FIGURE = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?"
JOINED = r"\s?(?:-|–|to|and)\s?"


def _any_of(words: Iterable[str]) -> str:
    """A pattern that matches any of `words`, and nothing when there are none."""
    return "|".join(map(re.escape, words)) or "(?!)"


def _money_pattern(rules: Perturbations) -> str:
    """Amounts of money: figures with a currency before or after, or with a unit that only money has."""
    amounts = rules.amounts
    currencies, words = _any_of(amounts.currencies), _any_of(amounts.currency_words)
    units, money_units = _any_of(amounts.units), _any_of(amounts.money_units)
    return (
        rf"(?:{currencies})\s?(?:{FIGURE})(?:{JOINED}(?:{FIGURE})(?=\s?(?:{units})\b))?"
        rf"|(?<![\w.,])(?:{FIGURE})(?:{JOINED}(?:{FIGURE}))?(?=\s?(?:(?:{units})\s)?(?:{words})\b)"
        rf"|(?<![\w.,])(?:{FIGURE})(?=\s?(?:{money_units})\b)"
    )


def _harmless_pattern(rules: Perturbations) -> str:
    """Numbers that stay right whatever the amounts are: shares, years, dates, quarters, numbers in names."""
    calendar = _any_of(rules.calendar)
    return (
        rf"(?:{FIGURE})\s?(?:%|percent|per cent|percentage|pp|pct|basis points|bps)|\b(?:19|20)\d\d\b"
        rf"|\b\d{{1,2}}(?:st|nd|rd|th)?\s(?:{calendar})\b|\b(?:{calendar})\s\d{{1,2}}\b"
        r"|[^\W\d_]-?\d+|\d+(?:st|nd|rd|th)\b|\d+-(?:year|month|week|day)|\d+ (?:years?|months?|weeks?|days?|hours?)\b"
    )


def known_words(texts: Sequence[str]) -> set[str]:
    """Words that `texts` write in lower case somewhere: with a capital they are still no names."""
    return {word for text in texts for word in WORD.findall(text) if word.islower()}


def replace_names(text: str, known: Collection[str], rules: Perturbations) -> str:
    """`text` with every ticker and every name replaced by an invented one; the same name always in the same way.

    A name is a word with one capital that `known` (see :func:`known_words`) has not in lower case. A name that opens a
    sentence alone could be any word, and stays.
    """
    invented, tickers = rules.names.invented, rules.names.tickers
    no_names = {*rules.calendar, *rules.names.unchanged}
    words = [(match.start(), match.end(), match.group()) for match in WORD.finditer(text)]
    is_name = [_is_name(word, known, no_names) for _, _, word in words]
    parts, end_of_last, replacements = [], 0, {}
    for i, (start, end, word) in enumerate(words):
        opens = start == 0 or bool(SENTENCE.search(text[:start])) or text[:start].strip("\"'“‘ ") == ""
        beside = (i + 1 < len(words) and is_name[i + 1] and text[end : words[i + 1][0]] == " ") or word.endswith("'s")
        if is_name[i] and (not opens or beside) and text[max(0, start - 1) : start] != "$":
            stem, apostrophe, ending = word.partition("'")
            if stem not in replacements:
                first = zlib.crc32(stem.encode()) % len(invented)
                unused = [n for n in (*invented[first:], *invented[:first]) if n not in replacements.values()]
                replacements[stem] = (unused or invented)[0]
            parts += [text[end_of_last:start], replacements[stem], apostrophe, ending]
            end_of_last = end
    replaced = "".join([*parts, text[end_of_last:]])
    return re.sub(tickers, lambda match: _shift_capitals(match.group()), replaced) if tickers else replaced


def _shift_capitals(ticker: str) -> str:
    return "".join(chr(65 + (ord(c) - 65 + 7) % 26) if "A" <= c <= "Z" else c for c in ticker)


def _is_name(word: str, known: Collection[str], no_names: Collection[str]) -> bool:
    """Whether `word` can only be a name: a capital first, and no part a word of `no_names` or `known`."""
    stem = word.split("'")[0]
    parts = re.split("[-’]", stem)
    return word[:1].isupper() and not stem.isupper() and not any(p in no_names or p.lower() in known for p in parts)


def double_amounts(text: str, rules: Perturbations) -> str:
    """`text` with every amount of money doubled, which keeps every order and every ratio between them.

    A text stays as it is when it holds a number that is neither money nor a share, a date or a time: that number may
    count something that is compared with the money.
    """
    money = re.compile(_money_pattern(rules))
    if re.search(r"\d", re.sub(_harmless_pattern(rules), " ", money.sub(" ", text))):
        return text
    return money.sub(lambda amount: re.sub(FIGURE, lambda figure: _doubled(figure.group()), amount.group()), text)


def _doubled(figure: str) -> str:
    plain = figure.replace(",", "")
    decimals = len(plain.partition(".")[2])
    return f"{2 * int(plain.replace('.', '')) / 10**decimals:{',' if ',' in figure else ''}.{decimals}f}"


def respell(text: str, spelling: Mapping[str, str]) -> str:
    """`text` after each pattern of `spelling` was replaced, in order: "EUR 9 mn" and "€9 million" are the same."""
    for pattern, replacement in spelling.items():
        text = re.sub(pattern, replacement, text)
    return text


def perturbations(texts: Sequence[str], rules: Perturbations) -> dict[str, Callable[[str], str]]:
    """Every rule that the task declares, by name: `names`, `amounts`, `spelling`.

    texts: all texts of the source, for the rule that must know which words are no names.
    """
    known = known_words(texts)
    functions: dict[str, Callable[[str], str]] = {}
    if rules.names:
        functions["names"] = lambda text: replace_names(text, known, rules)
    if rules.amounts:
        functions["amounts"] = lambda text: double_amounts(text, rules)
    if rules.spelling:
        functions["spelling"] = lambda text: respell(text, rules.spelling)
    return functions


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
