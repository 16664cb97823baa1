"""Filters by language and by keywords, and what each step leaves of every theme."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import xlogy
from sklearn.feature_extraction.text import CountVectorizer

from distillery.config.schema import ModelConfig, RowFilter, SourceConfig
from distillery.data.records import RawRows
from distillery.data.selection import DuplicateGroup, take_rows
from distillery.errors import UserError

WORD = r"(?u)\b[^\W\d_]{3,}\b"
MIN_TEXTS = 3  # that hold a word, before the word may become a keyword
MAX_CANDIDATES = 20_000  # words whose vectors are computed, the most frequent ones


def filter_rows(
    raw: RawRows,
    rows: pd.DataFrame,
    duplicate_groups: list[DuplicateGroup],
    spec: SourceConfig,
    models: Mapping[str, ModelConfig],
) -> tuple[pd.DataFrame, list[DuplicateGroup], dict[str, int], dict[str, Any]]:
    """The rows that pass `spec.filter`, how many rows each step drops, and what `audit.json` holds about the filter.

    models: those of params.yaml, for `filter.embeddings`.
    Raises UserError when a column is missing, a model cannot be fetched or no row is left.
    """
    row_filter, counts = spec.filter, {}
    if row_filter is None:
        return rows, duplicate_groups, counts, {}
    for key in ("theme", "date"):
        column = getattr(row_filter, key)
        if column is not None and column not in rows:
            raise UserError(f"{raw.name}: no column `{column}`, which filter.{key} names")
    passes = pd.Series(True, index=rows.index)
    passed: dict[str, pd.Series] = {}  # of each step
    if row_filter.languages:
        if row_filter.language not in rows:
            raise UserError(f"{raw.name}: no column `{row_filter.language}` to filter languages by")
        passes &= rows[row_filter.language].isin(row_filter.languages)
        counts["other_language"] = int((~passes).sum())
        passed["language"] = passes.copy()
    keywords = list(row_filter.keywords)
    added: dict[str, float | None] = {}
    if keywords:
        added = _added_keywords(rows["text"][passes], row_filter, models)
        keywords += added
        n_keywords = count_keywords(rows["text"], keywords)
        counts["without_keyword"] = int((passes & (n_keywords < row_filter.min_keywords)).sum())
        passes &= n_keywords >= row_filter.min_keywords
        passed["keywords"] = passes.copy()
    if not passes.any():
        raise UserError(f"{raw.name}: the filter leaves no row: {counts}")
    steps = [{"step": name, "rows": int(mask.sum())} for name, mask in passed.items()]
    report = {"steps": [{"step": "cleaned", "rows": len(rows)}, *steps], "added_keywords": list(added)}
    if row_filter.expand_by == "embeddings":
        report["similarities"] = list(added.values())
    report["themes"] = theme_counts(rows, passed, row_filter)
    if row_filter.language in rows:
        report["languages"] = language_counts(rows, passed, row_filter.language)
    return *take_rows(rows, duplicate_groups, np.flatnonzero(passes)), counts, report


def count_keywords(texts: pd.Series, keywords: Sequence[str]) -> pd.Series:
    """How many different ones of `keywords` each text holds, in any case, as whole words."""
    pattern = re.compile("|".join(rf"\b{re.escape(word.casefold())}\b" for word in keywords))
    return texts.map(lambda text: len(set(pattern.findall(text.casefold()))))


def keyword_decisions(report: dict[str, Any]) -> list[str]:
    """A sentence about the words that the filter of `report`, see :func:`filter_rows`, added to its keywords."""
    words, similarities = report.get("added_keywords"), report.get("similarities")
    if not words:
        return []
    way = "stand in texts with a keyword more often than in others"
    if similarities:
        words = [f"{word} ({cosine:.2f})" for word, cosine in zip(words, similarities, strict=True)]
        way = "are near a keyword as vectors (cosine)"
    return [f"Words were added to the keywords, since they {way}: {', '.join(words)}."]


def _added_keywords(
    texts: pd.Series, row_filter: RowFilter, models: Mapping[str, ModelConfig]
) -> dict[str, float | None]:
    """The words that `expand_keywords` adds to the keywords, each with its cosine where `expand_by` has one."""
    number, keywords = row_filter.expand_keywords, row_filter.keywords
    if row_filter.expand_by == "likelihood":
        return dict.fromkeys(related_words(texts, keywords, number))
    from distillery.data.word_vectors import embed_words  # imports torch

    name = row_filter.embeddings
    return nearest_words(texts, keywords, number, lambda words: embed_words(name, models[name], words))


def nearest_words(
    texts: pd.Series, keywords: Sequence[str], number: int, embed: Callable[[Sequence[str]], np.ndarray]
) -> dict[str, float]:
    """At most `number` words of `texts` whose vectors are nearest to one of `keywords`: word -> cosine, the highest
    first.

    embed: unit vectors [n, d] of n words. Compared are the words that at least `MIN_TEXTS` texts hold, and of those
    the `MAX_CANDIDATES` most frequent ones.
    """
    words, present = _words_of_texts(texts)
    frequency = np.asarray(present.sum(axis=0)).ravel()
    usable = np.flatnonzero((frequency >= MIN_TEXTS) & ~np.isin(words, _parts(keywords)))
    frequent = sorted(usable, key=lambda i: (-frequency[i], words[i]))[:MAX_CANDIDATES]
    candidates = sorted(str(words[i]) for i in frequent)
    if not candidates:
        return {}
    vectors = embed([*candidates, *(keyword.casefold() for keyword in keywords)])
    # rounded, so that words of the same vector keep their order whatever the batch
    cosines = (vectors[: len(candidates)] @ vectors[len(candidates) :].T).max(1).astype(float).round(4)
    nearest = sorted(zip(candidates, cosines.tolist(), strict=True), key=lambda pair: (-pair[1], pair[0]))
    return dict(nearest[:number])


def _words_of_texts(texts: pd.Series) -> tuple[np.ndarray, Any]:
    """The words of `texts` in lower case [w], and which text holds which [n, w], sparse."""
    if not any(re.search(WORD, text.casefold()) for text in texts):  # of which scikit-learn makes an error
        return np.array([], dtype=str), np.zeros((len(texts), 0))
    counter = CountVectorizer(token_pattern=WORD, binary=True, lowercase=False, preprocessor=str.casefold)
    present = counter.fit_transform(texts)
    return counter.get_feature_names_out(), present


def _parts(keywords: Sequence[str]) -> list[str]:
    """The words of `keywords`, which may be phrases."""
    return sorted({part for keyword in keywords for part in keyword.casefold().split()})


def related_words(texts: pd.Series, keywords: Sequence[str], number: int) -> list[str]:
    """At most `number` words that most distinguish the `texts` with one of `keywords` from the other texts.

    By the log-likelihood ratio of the numbers of texts that hold a word (Dunning 1993), the highest first; a word must
    be more frequent in the texts with a keyword, and in at least `MIN_TEXTS` of them.
    """
    seeded = count_keywords(texts, keywords).to_numpy() > 0
    if not number or not seeded.any() or seeded.all():
        return []
    words, present = _words_of_texts(texts)
    n = np.array([[seeded.sum()], [(~seeded).sum()]])
    holding = np.array([np.asarray(present[part].sum(axis=0)).ravel() for part in (seeded, ~seeded)])
    cells = np.stack([holding, n - holding])  # with the word and without it
    expected = cells.sum(1, keepdims=True) * n / n.sum()
    ratio = 2 * (xlogy(cells, cells) - xlogy(cells, expected)).sum((0, 1))
    usable = (holding[0] / n[0] > holding[1] / n[1]) & (holding[0] >= MIN_TEXTS) & ~np.isin(words, _parts(keywords))
    best = sorted(np.flatnonzero(usable), key=lambda i: (-ratio[i], words[i]))
    return [str(words[i]) for i in best[:number]]


def theme_counts(rows: pd.DataFrame, passed: dict[str, pd.Series], row_filter: RowFilter) -> list[dict[str, Any]]:
    """For each theme, and for all, see :func:`_part_counts`, also languages, first and last date; [] without a theme.

    passed: which rows have passed each step and those before it.
    """
    if row_filter.theme is None:
        return []
    themes = rows[row_filter.theme].astype(str)
    counts = []
    for theme in [*sorted(themes.unique()), None]:
        of_theme = pd.Series(True, index=rows.index) if theme is None else themes == theme
        entry = {"theme": theme, **_part_counts(of_theme, passed)}
        if row_filter.language in rows:
            entry["languages"] = int(rows[row_filter.language][of_theme].nunique())
        if row_filter.date is not None:
            dates = rows[row_filter.date][of_theme].dropna().astype(str)
            entry |= {"first": min(dates, default=None), "last": max(dates, default=None)}
        counts.append(entry)
    return counts


def language_counts(rows: pd.DataFrame, passed: dict[str, pd.Series], column: str) -> list[dict[str, Any]]:
    """For each language in `column`, see :func:`_part_counts`."""
    languages = rows[column].dropna().astype(str)
    return [
        {"language": language, **_part_counts(languages.eq(language).reindex(rows.index, fill_value=False), passed)}
        for language in sorted(languages.unique())
    ]


def _part_counts(of_part: pd.Series, passed: dict[str, pd.Series]) -> dict[str, Any]:
    """rows: of a part of all rows; by_step: how many of them each step leaves; left: the last step."""
    by_step = {step: int((of_part & mask).sum()) for step, mask in passed.items()}
    total = int(of_part.sum())
    return {"rows": total, "by_step": by_step, "left": [total, *by_step.values()][-1]}
