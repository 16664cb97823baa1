"""Figures, tables and sentences of 01_data: what a source holds, and whether its split leaks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import CountVectorizer

from distillery.data.near_duplicates import NearDuplicates, nearest_vectors, rows_to_compare
from distillery.data.similar_pairs import SIMILARITY_SLACK
from distillery.label_sets import NO_LABELS, LabelSets, rows_with
from distillery.notebook.style import BLUE, PALETTE, RED
from distillery.wording import percent

if TYPE_CHECKING:
    from distillery.config.schema import SplitShares

WORD = r"(?u)\b[^\W\d]{2,}\b"
MAX_PANELS = 6  # labels whose words are shown
THIS_SPLIT, DEALT_OUT = "this split", "single rows dealt out"


def label_masks(rows: pd.DataFrame, names: Sequence[str]) -> dict[str, pd.Series]:
    """For every label which rows bear it [rows]; rows without a label come last, as `no label`.

    Of label sets a row is in the masks of all its labels, and one without any in that of the empty set.
    """
    unlabelled = rows["label"].isna()
    named = (
        names
        if not isinstance(names, LabelSets)
        else [*names, *([NO_LABELS] if (rows["label"] == NO_LABELS).any() else [])]
    )
    masks = {}
    if not unlabelled.all():
        masks = {label: pd.Series(rows_with(rows["label"], label, names), rows.index) for label in named}
    return masks | ({"no label": unlabelled} if unlabelled.any() else {})


def answer_counts(rows: pd.DataFrame, masks: dict[str, pd.Series], names: Sequence[str]) -> dict[str, int]:
    """Rows of each answer that a constant model could give: of each label, or of each label set.

    Where no row has a label, all of them are of `no label`.
    """
    if isinstance(names, LabelSets) and rows["label"].notna().any():
        return {str(label): int(n) for label, n in rows["label"].dropna().value_counts().items()}
    return {label: int(mask.sum()) for label, mask in masks.items()}


def label_set_table(audit: dict[str, Any], names: Sequence[str]) -> pd.DataFrame:
    """How many rows hold each label, and each two labels together. audit: `label_sets` of the audit."""
    together = [
        {"label": name} | {other: audit["co_occurrence"][name].get(other, 0) for other in names} for name in names
    ]
    return pd.DataFrame(together)


def label_set_sentence(audit: dict[str, Any]) -> str:
    """How many labels a row has, and the commonest sets. audit: `label_sets` of the audit."""
    if not audit["sets"]:
        return "The rows here bring no labels."
    commonest = ", ".join(f"{labels} ({rows:,})" for labels, rows in list(audit["sets"].items())[:5])
    without = audit["without_label"]
    unlabelled = f"{without:,} rows have none" if without else "every row has one at least"
    text = f"A row has {audit['labels_per_row']:.2f} labels on average, and {unlabelled}. "
    return text + f"There are {audit['distinct']:,} different sets; the commonest are {commonest}."


def example_rows(rows: pd.DataFrame, masks: dict[str, pd.Series], seed: int, per_label: int = 3) -> pd.DataFrame:
    """Some rows of each label at random, long texts cut."""
    shuffled = rows.sample(frac=1, random_state=seed).assign(text=rows["text"].str.slice(0, 300))
    return pd.concat([shuffled[mask.loc[shuffled.index]].head(per_label) for mask in masks.values()])


def plot_classes(masks: dict[str, pd.Series], words: pd.Series) -> None:
    """Rows and lengths of each label. words: [rows], words a row."""
    count = pd.Series({label: int(mask.sum()) for label, mask in masks.items()})
    colours = [PALETTE[i % len(PALETTE)] for i in range(len(masks))]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 0.9 + 0.5 * len(masks)), width_ratios=[1, 1.4])
    bars = left.barh(count.index, count, color=colours)
    left.bar_label(bars, [f"{n:,} ({n / len(words):.0%})" for n in count], padding=3)
    left.set(title="rows", xlim=(0, count.max() * 1.35), xticks=[])
    left.spines["bottom"].set_visible(False)
    style = {"orientation": "horizontal", "whis": (5, 95), "showfliers": False, "widths": 0.5, "patch_artist": True}
    lengths = [words[mask] for mask in masks.values()]
    box = right.boxplot(lengths, tick_labels=list(masks), medianprops={"color": "black"}, **style)
    for patch, colour in zip(box["boxes"], colours, strict=True):
        patch.set(facecolor=colour, alpha=0.6)
    right.set(title="words a row (box: middle half, whiskers: 5 % to 95 %)", yticks=[])
    left.invert_yaxis()
    right.invert_yaxis()
    figure.tight_layout()


def word_scores(texts: pd.Series, masks: dict[str, pd.Series]) -> dict[str, pd.Series]:
    """For each of the most frequent labels its words with their scores, highest first; empty when all rows are of one.

    The score is the log-odds of a row of the label holding the word, against all other rows, in standard errors.
    Source: Monroe et al. 2008, "Fightin' Words", with one pseudo-count a word.
    """
    counter = CountVectorizer(token_pattern=WORD, binary=True)
    present = counter.fit_transform(texts)
    counts = pd.Series({label: int(mask.sum()) for label, mask in masks.items()})
    most = [label for label in masks if label in counts[counts > 0].nlargest(MAX_PANELS)]
    scores = {}
    for label in most if len(most) > 1 else []:
        of_label = masks[label].to_numpy()
        with_word = np.array([np.asarray(present[part].sum(axis=0)).ravel() + 1 for part in (of_label, ~of_label)])
        without = np.array([[of_label.sum() + 2], [(~of_label).sum() + 2]]) - with_word
        odds = np.log(with_word / without)
        z = (odds[0] - odds[1]) / np.sqrt((1 / with_word + 1 / without).sum(axis=0))
        scores[label] = pd.Series(z, counter.get_feature_names_out()).sort_values(ascending=False, kind="stable")
    return scores


def plot_words(scores: dict[str, pd.Series], labels: Sequence[str]) -> None:
    """The twelve words that speak most for each label; `labels` decides the colours."""
    if not scores:
        return
    lines, columns = -(-len(scores) // 3), min(3, len(scores))
    figure = plt.figure(figsize=(9, 3.2 * lines), layout="constrained")
    for place, (label, words) in enumerate(scores.items(), 1):
        axes = figure.add_subplot(lines, columns, place)
        axes.barh(words.index[:12], words[:12], color=PALETTE[labels.index(label) % len(PALETTE)])
        axes.invert_yaxis()
        axes.set(title=label, xlabel="standard errors above the rest")


def strongest_words(scores: dict[str, pd.Series], texts: pd.Series, masks: dict[str, pd.Series]) -> list[dict]:
    """For each label its strongest word, and the share of the label's and of the other rows that hold it."""
    strongest = []
    for label, words in scores.items():
        present = texts.str.contains(rf"\b{words.index[0]}\b", case=False)
        inside, outside = present[masks[label]].mean(), present[~masks[label]].mean()
        strongest.append({"label": label, "word": words.index[0], "inside": float(inside), "outside": float(outside)})
    return strongest


def largest_clusters(rows: pd.DataFrame, cluster: np.ndarray, clusters: int = 4) -> pd.DataFrame:
    """Rows of the largest clusters of near-duplicates, at most four of each."""
    sizes = pd.Series(cluster).value_counts()
    largest = sizes[sizes > 1].sort_index().sort_values(ascending=False, kind="stable").index[:clusters]
    parts = [rows[cluster == one].head(4) for one in largest]
    return (pd.concat(parts) if parts else rows.head(0))[["group", "label", "split", "text"]]


def plot_split(rows: pd.DataFrame, masks: dict[str, pd.Series], splits: Sequence[str]) -> None:
    """Rows by split and label."""
    parts = [rows["split"] == split for split in splits]
    _, axes = plt.subplots(figsize=(9, 2.3))
    left = np.zeros(len(splits))
    for i, (label, mask) in enumerate(masks.items()):
        counts = np.array([int((mask & part).sum()) for part in parts])
        bars = axes.barh(list(splits), counts, left=left, color=PALETTE[i % len(PALETTE)], label=label)
        labels = [n or "" for n in counts]
        axes.bar_label(bars, labels, label_type="center", color="white", fontweight="bold")
        left += counts
    axes.invert_yaxis()
    axes.set(title="rows by split and label", xticks=[])
    axes.spines["bottom"].set_visible(False)
    axes.legend(ncols=min(6, len(masks)), loc="upper left", bbox_to_anchor=(0, -0.02))


def split_table(splits: dict[str, dict], wanted: SplitShares | None) -> pd.DataFrame:
    """Rows, shares and groups of each split; `wanted share` only where params.yaml gives one."""
    table = pd.DataFrame(splits).T[["rows", "share", "groups", "groups_of_several_rows"]]
    table = table.rename(columns={"groups_of_several_rows": "groups of several rows"})
    if wanted:
        table.insert(1, "wanted share", [getattr(wanted, split) for split in table.index])
    counts = table.columns.difference(["share", "wanted share"])
    return table.astype(dict.fromkeys(counts, int)).reset_index(names="split")


def nearest_similarities(near: NearDuplicates, split: np.ndarray, seed: int) -> dict[tuple[str, bool], np.ndarray]:
    """Similarity in [0, 1] of each held-out row to the nearest row that is learned from.

    Of very many rows, a sample is compared. near: of the prepared source. Keys: the split at hand or one that deals out
    single rows, and whether digits are masked.
    """
    dealt = np.random.default_rng(seed).permutation(split)
    nearest = {}
    for masked, vectors in near.vectors.items():
        for name, of_row in ((DEALT_OUT, dealt), (THIS_SPLIT, split)):
            is_learned = np.isin(of_row, ("train", "pool"))
            held_out = rows_to_compare(np.flatnonzero(~is_learned), int(is_learned.sum()))
            nearest[name, masked] = nearest_vectors(vectors[held_out], vectors[is_learned])[0]
    return nearest


def plot_leaks(nearest: dict[tuple[str, bool], np.ndarray], near_duplicate: float) -> dict[str, int]:
    """Histograms of :func:`nearest_similarities`; returns how many rows have a near-duplicate, digits masked."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.8), sharey=True, layout="constrained")
    counts = {}
    for panel, masked in zip(axes, (True, False), strict=True):
        for name, colour in ((DEALT_OUT, RED), (THIS_SPLIT, BLUE)):
            values = nearest[name, masked]
            near = int((values >= near_duplicate - SIMILARITY_SLACK).sum())
            counts |= {name: near} if masked else {}
            look = {"histtype": "step", "linewidth": 1.4} if name == DEALT_OUT else {"alpha": 0.55}
            panel.hist(values, np.linspace(0, 1, 51), color=colour, label=f"{name}: {near} near-duplicates", **look)
        panel.axvline(near_duplicate, color="black", linewidth=0.8, linestyle=":")
        panel.set(title="digits masked" if masked else "as written", xlabel="similarity to the nearest learned row")
        panel.set_yscale("symlog", linthresh=10)
        panel.legend(loc="upper left")
    axes[0].set(ylabel="rows of validation and test", ylim=(0, 8 * max(1, *map(len, nearest.values()))))
    return counts


def pair_table(pairs: list[dict[str, Any]]) -> pd.DataFrame:
    """The rows of pairs from the audit, two lines a pair."""
    lines = [
        {"pair": n, "similarity": pair["similarity"], **row} for n, pair in enumerate(pairs, 1) for row in pair["rows"]
    ]
    return pd.DataFrame(lines)


def reading_sentence(read: int, duplicates: int, left: int) -> str:
    """Rows read, dropped as exact duplicates, and left."""
    if not duplicates:
        return f"{read:,} rows were read. None of them repeats another one to the letter."
    return (
        f"{read:,} rows were read. {duplicates:,} repeat another one to the letter and were dropped: {left:,} are left."
    )


def decision_list(decisions: Sequence[str]) -> str:
    """What reading the source decided without a key of params.yaml, one line each."""
    return "\n".join(f"- {decision}" for decision in decisions) or "- The file was read as it stands."


def balance_sentence(counts: dict[str, int], answer: str = "label") -> str:
    """What a constant answer would score. counts: rows of each label. answer: what they are of, `label set` or so."""
    label, total = max(counts, key=counts.get), sum(counts.values())
    share, text = (
        counts[label] / total,
        f"The most frequent {answer}, {label}, has {percent(counts[label] / total)} of the rows",
    )
    if share > 1.25 / len(counts):
        return f"{text}: always predicting it is right that often. Read accuracy against this, and macro-F1 beside it."
    return f"{text}: the labels are balanced, and a constant answer is right as seldom as a random one."


def length_sentence(medians: dict[str, float]) -> str:
    """Whether length gives a label away. medians: words a row, for each label."""
    low, high = min(medians, key=medians.get), max(medians, key=medians.get)
    text = f"Median lengths go from {medians[low]:g} words ({low}) to {medians[high]:g} ({high}): "
    if medians[high] > 1.3 * medians[low]:
        return text + "**length alone** is a hint at the label, a shortcut that a model will find."
    return text + "length is no hint at the label."


def vocabulary_sentence(words: list[dict]) -> str:
    """Whether single words give labels away; see :func:`strongest_words`."""
    if not words:
        return "All rows are of one kind: there are no words to compare."
    best = max(words, key=lambda word: word["inside"] - word["outside"])
    text = (
        f"The word that separates best is *{best['word']}*, in {percent(best['inside'])} of the {best['label']} rows "
    )
    text += f"and {percent(best['outside'])} of the others: "
    if best["inside"] > 0.5 and best["outside"] < 0.1:
        return text + "one word **gives the label away**, a student can learn it without reading."
    return text + "no single word gives a label away."


def cluster_sentence(inside: int, rows: int, conflicts: int) -> str:
    """How many rows have a near-duplicate, and how many pairs of these differ in their label."""
    if not inside:
        return f"None of the {rows:,} rows has a near-duplicate: a split by single rows would do."
    text = f"{inside:,} of {rows:,} rows have a near-duplicate, so the split must keep groups together. "
    if conflicts:
        return text + f"{conflicts} pairs bear different labels: a few words decide, and these pairs test for reading."
    return text + "None of these pairs bears different labels."


def split_sentence(table: pd.DataFrame) -> str:
    """Whether the splits have the wanted shares; see :func:`split_table`."""
    if "wanted share" not in table:
        return "The splits come with the data; `params.yaml` wants no shares."
    distance = (table["share"] - table["wanted share"]).abs()
    text = f"The largest distance from the wanted share is {100 * distance.max():.1f} points"
    if distance.max() <= 0.02:
        return text + ": whole groups fit well."
    return text + f" ({table['split'][distance.idxmax()]}): groups are too large to fit better."


def leak_sentence(here: int, dealt_out: int, compared: int, held_out: int) -> str:
    """Held-out rows with a near-duplicate among the learned rows, in this split and with single rows dealt out.

    compared: how many of the held-out rows were looked at.
    """
    text = f"Of {held_out:,} held-out rows, {compared:,} drawn at random were compared. " if compared < held_out else ""
    text += (
        f"With single rows dealt out, {dealt_out:,} held-out rows would have a near-duplicate among the rows that are "
    )
    text += f"learned from; in this split it is {here:,}. "
    if here == 0:
        return text + ("The split leaks nothing." if dealt_out else "Here no split would leak.")
    return text + "**The split leaks**: test scores are too good by some of these rows."


def across_sentence(pairs: int, threshold: float, highest: float) -> str:
    """Pairs of near-duplicates across splits, and the highest similarity of any pair."""
    if not pairs:
        return f"No pair across splits reaches {threshold:g}. The nearest one has {highest:.2f}."
    return f"**{pairs} pairs** across splits are at {threshold:g} or above; the nearest one has {highest:.2f}."


def few_shot_sentence(near: int, examples: int) -> str:
    """How many of the task file's solved examples are near a row."""
    if not near:
        return f"None of the {examples} solved examples is near a row of the data."
    return f"**{near} of the {examples} solved examples** are near a row: its answer stands in the prompt. Change them."


def overlap_pairs(overlaps: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """The rows of the nearest pairs between the test rows of other sources and the rows here, two lines a pair."""
    pairs = [(name, pair) for name, overlap in overlaps.items() for pair in overlap["pairs"]]
    return pair_table(
        [
            pair
            | {"rows": [{"source": source} | row for source, row in zip((name, "here"), pair["rows"], strict=True)]}
            for name, pair in pairs
        ]
    )


def overlap_sentence(overlaps: dict[str, dict[str, Any]]) -> str:
    """How many test rows of other sources are among the rows here. overlaps: as in the audit, by source."""
    sentences = []
    for name, overlap in overlaps.items():
        same, near, total = overlap["same"], overlap["near"], overlap["test_rows"]
        if same + near:
            sentences.append(
                f"**{same + near:,} of the {total:,} test rows of {name}** are also here ({same} the same, {near} "
                "nearly): models that learn from these rows score too well there. Take them out of this file."
            )
        else:
            sentences.append(f"None of the {total:,} test rows of {name} is here, and none nearly.")
    return " ".join(sentences) or "No other source of this task brings test rows of its own."
