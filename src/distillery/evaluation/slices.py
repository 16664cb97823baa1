"""Scores of the compared models on parts of the test rows: by the columns of the source, and by length."""

from __future__ import annotations

import numpy as np
import pandas as pd

from distillery import metrics
from distillery.data.cleaning import ROW_COLUMNS
from distillery.evaluation.results import Results
from distillery.tasks.schema import N_OPTIONS

MAX_VALUES = 12  # a column with more values does not name slices
MIN_ROWS = 20  # a slice of fewer rows is left out: its accuracy is noise
LENGTH = "length"


def slices(test: pd.DataFrame) -> list[tuple[str, str, np.ndarray]]:
    """The slices of test rows: column, value, and which rows [n] it has.

    Every column of the source with 2 to `MAX_VALUES` values makes slices; length always does, in thirds of the rows by
    their numbers of words. A slice has at least `MIN_ROWS` rows, and never all of them.
    """
    parts = []
    for column in [c for c in test.columns if c not in (*ROW_COLUMNS, "answers", N_OPTIONS)]:
        values = test[column].astype(object).where(test[column].notna(), None).map(str, na_action="ignore")
        if 2 <= values.nunique() <= MAX_VALUES:
            parts += [(column, value, (values == value).to_numpy()) for value in sorted(values.dropna().unique())]
    words = test["text"].str.split().str.len().to_numpy()
    cuts = np.quantile(words, [1 / 3, 2 / 3], method="lower").astype(int)
    bounds = [(0, cuts[0]), (cuts[0] + 1, cuts[1]), (cuts[1] + 1, int(words.max()))]
    for low, high in bounds:
        name = f"{low} words or more" if high == words.max() else f"{max(low, 1)} to {high} words"
        parts.append((LENGTH, name, (words >= low) & (words <= high)))
    return [(column, value, rows) for column, value, rows in parts if MIN_ROWS <= rows.sum() < len(test)]


def slice_scores(results: Results) -> pd.DataFrame:
    """Accuracy of the headline, its control and its teacher on every slice: column, value, model, rows, accuracy and
    its interval low, high, and `overall`, the accuracy on all rows. Means over the seeds.
    """
    head, config = results.headline, results.params.evaluate
    test = results.tests[head.source]
    label, groups, lines = test["label"].to_numpy(object), test["group"].to_numpy(object), []
    for column, value, rows in slices(test):
        for result in results.compared:
            right = (result.predictions == label).astype(float)
            samples = metrics.cluster_bootstrap(right[:, rows], groups[rows], config.bootstrap, config.seed)
            low, high = metrics.interval(samples, config.confidence)
            line = {"column": column, "value": value, "model": result.name, "rows": int(rows.sum())}
            line |= {"accuracy": right[:, rows].mean(), "low": low, "high": high, "overall": right.mean()}
            lines.append(line)
    return pd.DataFrame(lines, columns=["column", "value", "model", "rows", "accuracy", "low", "high", "overall"])


def slice_sentence(scores: pd.DataFrame, headline: str) -> str:
    """The slice on which the headline is furthest below its accuracy on all rows. scores: see :func:`slice_scores`."""
    own = scores[scores["model"] == headline]
    if own.empty:
        return f"The test rows have no slices of at least {MIN_ROWS} rows."
    worst = own.loc[(own["accuracy"] - own["overall"]).idxmin()]
    worst_slice = f"*{worst['column']}: {worst['value']}*"
    text = f"{headline} is weakest on {worst_slice}: {100 * worst['accuracy']:.1f} % of {worst['rows']} rows "
    text += f"({100 * worst['low']:.1f}–{100 * worst['high']:.1f}), {100 * worst['overall']:.1f} % of all rows. "
    if worst["high"] < worst["overall"]:
        return text + "**It reads these rows worse** than the rest."
    return text + "The interval holds the accuracy on all rows: no slice is clearly worse."
