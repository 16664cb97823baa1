"""The audit of a source: label conflicts, leaks across splits, few-shot examples in the data, and counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from distillery.config.schema import SPLITS
from distillery.data.cleaning import ROW_COLUMNS
from distillery.data.near_duplicates import (
    SIMILARITY_SLACK,
    near_duplicate_pairs,
    nearest_texts,
    ngram_vectors,
    similarity_blocks,
)
from distillery.data.records import normalize_text
from distillery.tasks.schema import N_OPTIONS, Task

AUDIT_EXAMPLES = 10  # rows shown per finding of the audit


def audit_source(
    rows: pd.DataFrame, split: np.ndarray, cluster: np.ndarray, file_groups: pd.Series, task: Task, threshold: float
) -> dict[str, Any]:
    """The findings that `audit.json` holds about the rows of a source.

    split, cluster: one entry per row. file_groups: the group of each row in the file. threshold: the similarity, in
    [0, 1], from which two texts are near-duplicates.
    """
    label, text = rows["label"], rows["text"]
    cluster_sizes = np.bincount(cluster)
    group_sizes = rows["group"].groupby(rows["group"]).size()
    return {
        "columns_left_out_of_pool": columns_revealing_label(rows, task),
        "rows": len(rows),
        "groups": len(group_sizes),
        "splits": {name: _split_counts(rows, split == name, task) for name in SPLITS},
        "clusters": {
            "near_duplicate_clusters": int((cluster_sizes > 1).sum()),
            "rows_in_them": int(cluster_sizes[cluster_sizes > 1].sum()),
            "largest_cluster": int(cluster_sizes.max()),
            "groups_in_the_file": int(file_groups.nunique()),
            "groups_of_several_rows": int((group_sizes > 1).sum()),
            "largest_group": int(group_sizes.max()),
        },
        "label_conflicts": label_conflicts(rows, split, threshold),
        "across_splits": {
            "digits_masked": split_leaks(rows, split, threshold, masked=True),
            "as_written": split_leaks(rows, split, threshold, masked=False),
        },
        "few_shot_near_duplicates": few_shot_near_duplicates(rows, split, task, threshold),
        "lengths": {
            "all": length_summary(text),
            "by_label": {name: length_summary(text[label == name]) for name in task.names if (label == name).any()},
        },
    }


def _split_counts(rows: pd.DataFrame, in_split: np.ndarray, task: Task) -> dict[str, Any]:
    groups = rows["group"][in_split]
    return {
        "rows": int(in_split.sum()),
        "share": round(float(in_split.mean()), 4),
        "groups": int(groups.nunique()),
        "groups_of_several_rows": int((groups.value_counts() > 1).sum()),
        "labels": {label: int(((rows["label"] == label) & in_split).sum()) for label in task.names},
    }


def _row_summary(rows: pd.DataFrame, split: np.ndarray, i: int) -> dict[str, str]:
    return {"id": rows["id"][i], "split": split[i], "label": rows["label"][i], "text": rows["text"][i]}


def label_conflicts(rows: pd.DataFrame, split: np.ndarray, threshold: float) -> dict[str, Any]:
    """Near-duplicates with different labels: contrast pairs, or annotation errors."""
    label, text = rows["label"].to_numpy(), rows["text"].to_numpy()
    pairs, identical, most_similar = 0, 0, []
    for i, j, similarity in near_duplicate_pairs(list(text), threshold):
        differs = (label[i] != label[j]) & ~(pd.isna(label[i]) | pd.isna(label[j]))
        i, j, similarity = i[differs], j[differs], similarity[differs]
        pairs += len(i)
        identical += int((text[i] == text[j]).sum())
        top = np.argsort(-similarity.round(4), kind="stable")[:AUDIT_EXAMPLES]
        block = zip(-similarity[top].round(4), i[top], j[top], strict=True)
        most_similar = sorted([*most_similar, *block])[:AUDIT_EXAMPLES]
    examples = [
        {
            "similarity": round(-float(s), 4),
            "rows": [_row_summary(rows, split, int(i)), _row_summary(rows, split, int(j))],
        }
        for s, i, j in most_similar
    ]
    return {"pairs": pairs, "identical_texts": identical, "examples": examples}


def split_leaks(rows: pd.DataFrame, split: np.ndarray, threshold: float, masked: bool) -> dict[str, Any]:
    """Pairs of near-duplicates in different splits, and the most similar pairs whether near-duplicates or not.

    masked: whether all numbers count as equal. `nearest` describes the similarity of the rows of validation and test
    to the nearest row of another split.
    """
    vectors = ngram_vectors(list(rows["text"]), masked)
    code = pd.Categorical(split, categories=SPLITS).codes
    above = np.zeros((len(SPLITS), len(SPLITS)), dtype=int)  # pairs by the splits of their two rows
    highest, nearest = np.zeros(len(rows)), np.zeros(len(rows), dtype=int)
    for start, block in similarity_blocks(vectors, vectors):
        block_rows = slice(start, start + len(block))
        block[code[block_rows, None] == code[None, :]] = 0
        nearest[block_rows], highest[block_rows] = block.argmax(axis=1), block.max(axis=1)
        i, j = np.nonzero(block >= threshold - SIMILARITY_SLACK)
        np.add.at(above, (code[block_rows][i], code[j]), 1)
    highest = np.minimum(highest, 1.0).round(4)
    by_similarity = np.argsort(-highest, kind="stable")
    nearest_pairs = {(min(i, nearest[i]), max(i, nearest[i])): highest[i] for i in by_similarity}
    worst = [
        {"similarity": float(s), "rows": [_row_summary(rows, split, int(i)), _row_summary(rows, split, int(j))]}
        for (i, j), s in list(nearest_pairs.items())[:AUDIT_EXAMPLES]
        if s > 0
    ]
    evaluated = highest[np.isin(split, ("validation", "test"))]
    return {
        "pairs_above": int(above.sum()) // 2,  # each pair is counted from both of its rows
        "pairs_above_by_splits": {
            f"{SPLITS[a]}-{SPLITS[b]}": int(above[a, b]) for a in range(4) for b in range(a + 1, 4) if above[a, b]
        },
        "nearest": {
            "highest": float(highest.max()),
            **{f"p{p}": round(float(np.percentile(evaluated, p)), 4) for p in (50, 90, 99) if len(evaluated)},
        },
        "worst": worst,
    }


def few_shot_near_duplicates(
    rows: pd.DataFrame, split: np.ndarray, task: Task, threshold: float
) -> list[dict[str, Any]]:
    """The few-shot examples of the task file that are near-duplicates of a row, with the nearest row of each split."""
    shots = [normalize_text(shot.text) for shot in task.few_shot]
    findings = []
    for name in SPLITS:
        index = np.flatnonzero(split == name)
        texts = list(rows["text"].iloc[index])
        nearest = [nearest_texts(shots, texts, masked) for masked in (True, False)]
        for n, shot in enumerate(shots):
            similarity, i = max(((float(s[n]), int(i[n])) for s, i in nearest), key=lambda pair: pair[0])
            if similarity >= threshold - SIMILARITY_SLACK:
                row = _row_summary(rows, split, int(index[i]))
                finding = {"few_shot": n, "text": shot, "split": name, "similarity": round(similarity, 4), "row": row}
                findings.append(finding)
    return findings


def length_summary(texts: pd.Series) -> dict[str, dict[str, float]]:
    """Mean, maximum and percentiles of the lengths of `texts`, in words and in characters."""
    summary = {}
    for unit, lengths in (("words", texts.str.split().str.len()), ("characters", texts.str.len())):
        lengths = lengths.to_numpy(dtype=float)
        summary[unit] = {
            "mean": round(float(lengths.mean()), 1),
            **{f"p{p}": round(float(np.percentile(lengths, p)), 1) for p in (5, 50, 95)},
            "max": float(lengths.max()),
        }
    return summary


def columns_revealing_label(rows: pd.DataFrame, task: Task) -> list[str]:
    """Extra columns whose value determines the label (an integer code of it, for example)."""
    extras = [c for c in rows.columns if c not in (*ROW_COLUMNS, N_OPTIONS)]
    labelled = rows["label"].notna()  # some rows of a pool may have none
    if not labelled.any():
        return []
    filled = {c: rows[c].fillna("") if rows[c].isna().any() else rows[c] for c in extras}
    return [
        column
        for column, values in filled.items()
        if values[labelled].nunique() <= len(task.names)
        and rows["label"][labelled].groupby(values[labelled]).nunique().max() == 1
    ]
