"""Figures, tables and sentences of 03_augment: paraphrases, filters and pseudo-labels."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd

from distillery.notebook.style import BLUE, GREY, join_words
from distillery.wording import percent

PASSED = "kept"  # the reason of a paraphrase that every filter let pass
CLOSE = 0.02  # a difference of shares below this is called none


def plot_reasons(counts: pd.Series) -> None:
    """How many candidates passed, and how many each filter took. counts: reason -> candidates."""
    _, axes = plt.subplots(figsize=(9, 0.5 + 0.32 * max(1, len(counts))))
    if len(counts):
        bars = axes.barh(counts.index, counts, color=[BLUE if reason == PASSED else GREY for reason in counts.index])
        axes.bar_label(bars, padding=3)
    axes.invert_yaxis()
    axes.set(title="candidates by reason", xticks=[])
    axes.spines["bottom"].set_visible(False)


def label_agreement(signals: pd.DataFrame, passed: pd.DataFrame) -> pd.Series:
    """For each teacher the share of the rows `passed` whose label its signal gives. signals: rows in the same order."""
    labels = passed["label"].to_numpy()
    shares = {name: (part["label"].to_numpy() == labels).mean() for name, part in signals.groupby("teacher")}
    return pd.Series(shares, dtype=float).rename_axis("teacher")


def plot_precision(pseudo: pd.DataFrame, right: pd.Series) -> None:
    """Precision of the pseudo-labels by the share of the pool taken. pseudo: confidence, agree. right: [rows], bool."""
    _, axes = plt.subplots(figsize=(9, 2.8), layout="constrained")
    orders = {"confidence": ["confidence"], "agreement, then confidence": ["agree", "confidence"]}
    for (name, keys), colour in zip(orders.items(), (GREY, BLUE), strict=True):
        ranked = right[pseudo.sort_values(keys, ascending=False, kind="stable").index]
        axes.plot((1 + pd.RangeIndex(len(ranked))) / len(ranked), ranked.expanding().mean(), label=name, color=colour)
    axes.set(title="precision of the pseudo-labels", xlabel="share of the pool taken", ylim=(None, 1.02))
    axes.legend()


def plan_sentence(rows: int, per_row: int, teacher: str) -> str:
    """How many paraphrases are written."""
    if not per_row:
        return f"There are {rows:,} gold rows. `augment.per_row` is 0: nothing is paraphrased."
    return f"There are {rows:,} gold rows. {teacher} writes {per_row} paraphrase{'s' * (per_row > 1)} of each."


def filter_sentence(counts: dict[str, int]) -> str:
    """How many candidates passed, and the filter that took most. counts: reason -> candidates."""
    total, passed = sum(counts.values()), counts.get(PASSED, 0)
    if not total:
        return "There are no candidates."
    text = f"{passed:,} of {total:,} paraphrases pass ({percent(passed / total)}). "
    rest = {reason: n for reason, n in counts.items() if reason != PASSED}
    if not rest:
        return text + "No filter took any."
    reason = max(rest, key=rest.get)
    text += f"The most frequent reason against one is *{reason}* ({rest[reason]:,}). "
    if passed < total / 2:
        return text + "This model changes too much to be used without filters."
    return text + "Most of what this model writes can be used."


def agreement_sentence(shares: dict[str, float]) -> str:
    """How far the teachers' signals for the paraphrases agree with the inherited labels. shares: teacher -> share."""
    if not shares:
        return "No teacher gives a signal for these rows."
    low = min(shares, key=shares.get)
    text = (
        join_words([f"{name} gives the inherited label on {percent(share)}" for name, share in shares.items()]) + ": "
    )
    if shares[low] >= 0.8:
        return text + "the paraphrases still mean what their rows mean, as far as the teachers can see."
    return text + f"{low} often disagrees. Either it errs on these rows, or some paraphrases changed the meaning."


def confident_precision(pseudo: pd.DataFrame, right: pd.Series) -> float:
    """Precision of the most confident pseudo-labels, as many as all teachers agree on; NaN where they agree on none.

    pseudo: confidence, agree. right: [rows], bool.
    """
    ranked = right[pseudo.sort_values("confidence", ascending=False, kind="stable").index]
    return float(ranked.head(int(pseudo["agree"].sum())).mean())


def vote_sentence(all_rows: float, agreed: float, confident: float, share: float) -> str:
    """Precision of all pseudo-labels, of those that all teachers agree on, of equally many confident ones.

    share: of the rows that all teachers agree on.
    """
    if share == 0:
        return f"There is no row on which all teachers agree. {percent(all_rows)} of the pseudo-labels are right."
    if share == 1:
        return f"The teachers agree on every row, and {percent(all_rows)} of their labels are right."
    text = (
        f"All teachers agree on {percent(share)} of the pool. There {percent(agreed)} of the pseudo-labels are right, "
    )
    text += f"on equally many most confident rows {percent(confident)}, on all rows {percent(all_rows)}: "
    if max(agreed, confident) <= all_rows + CLOSE:
        return text + "neither agreement nor confidence is a sign of a right label."
    if abs(agreed - confident) <= CLOSE:
        return text + "agreement and confidence find right labels equally well."
    return text + f"{'agreement finds' if agreed > confident else 'confidence finds'} right labels better."
