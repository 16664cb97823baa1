"""The audit of a source: label conflicts, leaks across splits, few-shot examples in the data, and counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_array

from distillery.config.schema import SPLITS
from distillery.data.cleaning import ROW_COLUMNS
from distillery.data.label_sets import audit_label_sets, label_counts
from distillery.data.near_duplicates import NearDuplicates, rows_to_compare, similarity_blocks
from distillery.data.records import normalize_text
from distillery.data.similar_pairs import SIMILARITY_SLACK
from distillery.label_sets import LabelSets, rows_with
from distillery.tasks.schema import N_OPTIONS, Task

AUDIT_EXAMPLES = 10  # rows shown per finding of the audit
MANY_WORDS = (128, 256, 512, 1024, 4096)  # as many tokens as models commonly read; a word is a token at least


def audit_source(
    rows: pd.DataFrame, split: np.ndarray, cluster: np.ndarray, file_groups: pd.Series, task: Task, near: NearDuplicates
) -> dict[str, Any]:
    """The findings that `audit.json` holds about the rows of a source.

    split, cluster: one entry per row. file_groups: the group of each row in the file. near: the near-duplicates among
    the texts of the rows.
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
        "label_conflicts": label_conflicts(rows, split, near),
        "across_splits": {
            "digits_masked": split_leaks(rows, split, near, masked=True),
            "as_written": split_leaks(rows, split, near, masked=False),
        },
        "few_shot_near_duplicates": few_shot_near_duplicates(rows, split, task, near),
        "lengths": {
            "all": length_summary(text),
            "by_label": {
                name: length_summary(text[held])
                for name in task.names
                if (held := rows_with(label, name, task.names)).any()
            },
            "longer_than": rows_longer_than(text),
        },
    } | ({"label_sets": audit_label_sets(rows, task.names)} if isinstance(task.names, LabelSets) else {})


def _split_counts(rows: pd.DataFrame, in_split: np.ndarray, task: Task) -> dict[str, Any]:
    groups = rows["group"][in_split]
    return {
        "rows": int(in_split.sum()),
        "share": round(float(in_split.mean()), 4),
        "groups": int(groups.nunique()),
        "groups_of_several_rows": int((groups.value_counts() > 1).sum()),
        "labels": label_counts(rows["label"][in_split], task.names),
    }


def _row_summary(rows: pd.DataFrame, split: np.ndarray, i: int) -> dict[str, str]:
    return {"id": rows["id"][i], "split": split[i], "label": rows["label"][i], "text": rows["text"][i]}


def label_conflicts(rows: pd.DataFrame, split: np.ndarray, near: NearDuplicates) -> dict[str, Any]:
    """Near-duplicates with different labels: contrast pairs, or annotation errors."""
    label, text = rows["label"].to_numpy(), rows["text"].to_numpy()
    i, j, similarity = near.pairs[True]
    differs = (label[i] != label[j]) & ~(pd.isna(label[i]) | pd.isna(label[j]))
    i, j, similarity = i[differs], j[differs], similarity[differs].round(4)
    top = np.argsort(-similarity, kind="stable")[:AUDIT_EXAMPLES]
    examples = [
        {
            "similarity": round(float(s), 4),
            "rows": [_row_summary(rows, split, int(a)), _row_summary(rows, split, int(b))],
        }
        for s, a, b in zip(similarity[top], i[top], j[top], strict=True)
    ]
    return {"pairs": len(i), "identical_texts": int((text[i] == text[j]).sum()), "examples": examples}


def split_leaks(rows: pd.DataFrame, split: np.ndarray, near: NearDuplicates, masked: bool) -> dict[str, Any]:
    """Pairs of near-duplicates in different splits, and the most similar pairs whether near-duplicates or not.

    masked: whether all numbers count as equal. `nearest` describes the similarity of the rows of validation and test
    to the nearest row of another split; of many rows, that of a sample.
    """
    code = pd.Categorical(split, categories=SPLITS).codes
    above = np.zeros((len(SPLITS), len(SPLITS)), dtype=int)  # pairs by the splits of their two rows
    i, j, similarity = near.pairs[masked]
    across = code[i] != code[j]
    i, j, similarity = i[across], j[across], similarity[across].round(4)
    np.add.at(above, (np.minimum(code[i], code[j]), np.maximum(code[i], code[j])), 1)
    evaluated = np.isin(split, ("validation", "test"))
    n, compared = len(rows), np.arange(len(rows))
    if len(rows_to_compare(compared, n)) < n:
        compared = rows_to_compare(compared[evaluated] if evaluated.any() else compared, n)
    highest, nearest = _nearest_in_other_splits(near.vectors[masked], code, compared)
    by_similarity = np.argsort(-highest, kind="stable")
    nearest_pairs = {(min(compared[k], nearest[k]), max(compared[k], nearest[k])): highest[k] for k in by_similarity}
    if len(compared) < n:  # the rows of the most similar pairs need not be in the sample
        top = np.argsort(-similarity, kind="stable")[:AUDIT_EXAMPLES]
        nearest_pairs |= {(a, b): s for a, b, s in zip(i[top], j[top], similarity[top], strict=True)}
        nearest_pairs = dict(sorted(nearest_pairs.items(), key=lambda pair: -pair[1]))
    worst = [
        {
            "similarity": round(float(s), 4),
            "rows": [_row_summary(rows, split, int(a)), _row_summary(rows, split, int(b))],
        }
        for (a, b), s in list(nearest_pairs.items())[:AUDIT_EXAMPLES]
        if s > 0
    ]
    of_evaluated = highest[evaluated[compared]]
    return {
        "pairs_above": int(above.sum()),
        "pairs_above_by_splits": {
            f"{SPLITS[a]}-{SPLITS[b]}": int(above[a, b]) for a in range(4) for b in range(a + 1, 4) if above[a, b]
        },
        "nearest": {
            "highest": max(worst[0]["similarity"] if worst else 0.0, float(highest.max())),
            **{f"p{p}": round(float(np.percentile(of_evaluated, p)), 4) for p in (50, 90, 99) if len(of_evaluated)},
            **({"rows_compared": len(compared)} if len(compared) < n else {}),
        },
        "worst": worst,
    }


def _nearest_in_other_splits(
    vectors: csr_array, code: np.ndarray, compared: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The highest similarity of each row of `compared` to a row of another split, to 4 decimals, and that row."""
    highest, nearest = np.zeros(len(compared)), np.zeros(len(compared), dtype=int)
    for start, block in similarity_blocks(vectors[compared], vectors):
        part = slice(start, start + len(block))
        block[code[compared[part], None] == code[None, :]] = 0
        nearest[part], highest[part] = block.argmax(axis=1), block.max(axis=1)
    return np.minimum(highest, 1.0).round(4), nearest


def few_shot_near_duplicates(
    rows: pd.DataFrame, split: np.ndarray, task: Task, near: NearDuplicates
) -> list[dict[str, Any]]:
    """The few-shot examples of the task file that are near-duplicates of a row, with the nearest row of each split."""
    similarities = {
        masked: np.minimum((shots @ near.vectors[masked].T).toarray(), 1.0) for masked, shots in near.shots.items()
    }
    findings = []
    for name in SPLITS:
        index = np.flatnonzero(split == name)
        for n, shot in enumerate(few_shot_texts(task) if len(index) else []):
            nearest = [
                (float(of_shots[n, index].max()), int(of_shots[n, index].argmax()))
                for of_shots in similarities.values()
            ]
            similarity, i = max(nearest, key=lambda pair: pair[0])
            if similarity >= near.threshold - SIMILARITY_SLACK:
                row = _row_summary(rows, split, int(index[i]))
                finding = {"few_shot": n, "text": shot, "split": name, "similarity": round(similarity, 4), "row": row}
                findings.append(finding)
    return findings


def few_shot_texts(task: Task) -> list[str]:
    """The texts of the few-shot examples of `task`, as the texts of rows are."""
    return [normalize_text(shot.text) for shot in task.few_shot]


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


def rows_longer_than(texts: pd.Series) -> dict[str, int]:
    """For each of `MANY_WORDS`: how many of `texts` have more words. A model that reads so many tokens cuts them."""
    words = texts.str.split().str.len()
    return {str(number): int((words > number).sum()) for number in MANY_WORDS}


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
