"""What could make a score unfair: label conflicts, leaks across splits, few-shot examples in the data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from distillery.config.schema import SPLITS
from distillery.data.cleaning import ROW_COLUMNS, normalize_text
from distillery.data.near_duplicates import (
    SIMILARITY_SLACK,
    near_duplicate_pairs,
    nearest_texts,
    ngram_vectors,
    similarity_blocks,
)
from distillery.tasks.schema import Task

AUDIT_EXAMPLES = 10  # rows shown per finding of the audit


def _row_summary(rows: pd.DataFrame, split: np.ndarray, i: int) -> dict[str, str]:
    return {"id": rows["id"][i], "split": split[i], "label": rows["label"][i], "text": rows["text"][i]}


def label_conflicts(rows: pd.DataFrame, split: np.ndarray, threshold: float) -> dict[str, Any]:
    """Near-duplicates with different labels: contrast pairs, or slips of the annotator."""
    label, text = rows["label"].to_numpy(), rows["text"].to_numpy()
    pairs, identical, worst = 0, 0, []
    for i, j, similarity in near_duplicate_pairs(list(text), threshold):
        differs = label[i] != label[j]
        i, j, similarity = i[differs], j[differs], similarity[differs]
        pairs += len(i)
        identical += int((text[i] == text[j]).sum())
        top = np.argsort(-similarity.round(4), kind="stable")[:AUDIT_EXAMPLES]
        worst = sorted([*worst, *zip(-similarity[top].round(4), i[top], j[top], strict=True)])[:AUDIT_EXAMPLES]
    examples = [
        {
            "similarity": round(-float(s), 4),
            "rows": [_row_summary(rows, split, int(i)), _row_summary(rows, split, int(j))],
        }
        for s, i, j in worst
    ]
    return {"pairs": pairs, "identical_texts": identical, "examples": examples}


def split_leaks(rows: pd.DataFrame, split: np.ndarray, threshold: float, masked: bool) -> dict[str, Any]:
    """Pairs of rows in different splits that are nearly the same text, and the nearest ones there are."""
    vectors = ngram_vectors(list(rows["text"]), masked)
    code = pd.Categorical(split, categories=SPLITS).codes
    above = np.zeros((len(SPLITS), len(SPLITS)), dtype=int)
    best, where = np.zeros(len(rows)), np.zeros(len(rows), dtype=int)
    for start, block in similarity_blocks(vectors, vectors):
        mine = slice(start, start + len(block))
        block[code[mine, None] == code[None, :]] = 0
        where[mine], best[mine] = block.argmax(axis=1), block.max(axis=1)
        i, j = np.nonzero(block >= threshold - SIMILARITY_SLACK)
        np.add.at(above, (code[mine][i], code[j]), 1)
    best = np.minimum(best, 1.0).round(4)
    nearest_pairs = {(min(i, where[i]), max(i, where[i])): best[i] for i in np.argsort(-best, kind="stable")}
    worst = [
        {"similarity": float(s), "rows": [_row_summary(rows, split, int(i)), _row_summary(rows, split, int(j))]}
        for (i, j), s in list(nearest_pairs.items())[:AUDIT_EXAMPLES]
        if s > 0
    ]
    evaluated = best[np.isin(split, ("validation", "test"))]
    return {
        "pairs_above": int(above.sum()) // 2,  # each pair was seen from both ends
        "pairs_above_by_splits": {
            f"{SPLITS[a]}-{SPLITS[b]}": int(above[a, b]) for a in range(4) for b in range(a + 1, 4) if above[a, b]
        },
        "nearest": {
            "highest": float(best.max()),
            **{f"p{p}": round(float(np.percentile(evaluated, p)), 4) for p in (50, 90, 99) if len(evaluated)},
        },
        "worst": worst,
    }


def few_shot_near_duplicates(
    rows: pd.DataFrame, split: np.ndarray, task: Task, threshold: float
) -> list[dict[str, Any]]:
    """Few-shot examples of the task file that are near-duplicates of a row, the nearest row of each split named."""
    shots = [normalize_text(shot.text) for shot in task.few_shot]
    found = []
    for part in SPLITS:
        there = np.flatnonzero(split == part)
        texts = list(rows["text"].iloc[there])
        ways = [nearest_texts(shots, texts, masked) for masked in (True, False)]
        for n, shot in enumerate(shots):
            best, where = max(((float(b[n]), int(w[n])) for b, w in ways), key=lambda way: way[0])
            if best >= threshold - SIMILARITY_SLACK:
                row = _row_summary(rows, split, int(there[where]))
                found.append({"few_shot": n, "text": shot, "split": part, "similarity": round(best, 4), "row": row})
    return found


def length_summary(texts: pd.Series) -> dict[str, dict[str, float]]:
    out = {}
    for unit, values in (("words", texts.str.split().str.len()), ("characters", texts.str.len())):
        values = values.to_numpy(dtype=float)
        out[unit] = {
            "mean": round(float(values.mean()), 1),
            **{f"p{p}": round(float(np.percentile(values, p)), 1) for p in (5, 50, 95)},
            "max": float(values.max()),
        }
    return out


def columns_that_give_the_label(rows: pd.DataFrame, task: Task) -> list[str]:
    """Extra columns that are the label under another name (an integer code, say)."""
    extras = [c for c in rows.columns if c not in ROW_COLUMNS]
    named = {c: rows[c].fillna("") if rows[c].isna().any() else rows[c] for c in extras}
    return [
        column
        for column, values in named.items()
        if values.nunique() <= len(task.names)
        and rows["label"].notna().all()
        and rows["label"].groupby(values).nunique().max() == 1
    ]
