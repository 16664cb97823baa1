"""Several teachers together: votes, pseudo-labels and their precision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from distillery import metrics
from distillery.config.schema import Params
from distillery.data.storage import read_split


def teacher_votes(root: Path, params: Params, source: str, split: str = "pool") -> tuple[pd.DataFrame, np.ndarray]:
    """What every teacher of `source` says of the rows of `split` that all of them have a signal for.

    Returns the rows (id, text, a column of labels for each teacher; None where its answer could not be read) and the
    probabilities [teachers, n, labels].
    """
    rows, stack = read_split(root / "data" / "processed" / source, split)[["id", "text"]], {}
    for name in params.teachers:
        if source in params.teacher_sources(name):
            said = pd.read_parquet(root / "data" / "teacher" / name / "signals.parquet")
            said = said[(said["source"] == source) & (said["split"] == split)].set_index("id")
            rows = rows[rows["id"].isin(said.index)]
            stack[name] = said
    said = {name: of_one.loc[rows["id"]] for name, of_one in stack.items()}
    out = rows.reset_index(drop=True).assign(**{name: s["label"].to_numpy(object) for name, s in said.items()})
    if out.empty:
        return out, np.zeros((len(said), 0, 0))
    return out, np.stack([np.stack(s["probabilities"].to_list()) for s in said.values()]).astype(np.float64)


def combine_votes(voted: pd.DataFrame, probabilities: np.ndarray, labels: Sequence[str]) -> pd.DataFrame:
    """What several teachers together say: label and confidence (of the mean distribution), agree (all give that label).

    voted, probabilities: see :func:`teacher_votes`.
    """
    mean = probabilities.mean(0)
    label = np.array(labels, dtype=object)[mean.argmax(-1)]
    agree = (voted[voted.columns.drop(["id", "text"])].to_numpy(object) == label[:, None]).all(1)
    return pd.DataFrame({"id": voted["id"], "label": label, "confidence": mean.max(-1), "agree": agree})


def pseudo_label_precision(pseudo: pd.DataFrame, gold: Sequence[str], confidences: Sequence[float]) -> pd.DataFrame:
    """How good the pseudo-labels are that each way of choosing leaves: rows, coverage, precision with a 95 % interval.

    gold: the true labels, for scoring alone. A line for each least confidence, without and with agreement.
    """
    right, out = pseudo["label"].to_numpy(object) == np.asarray(gold, dtype=object), []
    for agree in (False, True):
        for least in confidences:
            kept = (pseudo["confidence"] >= least).to_numpy() & (pseudo["agree"].to_numpy() | (not agree))
            line = {"all teachers agree": agree, "confidence from": least, "rows": int(kept.sum())}
            line |= {"coverage": kept.mean(), "precision": right[kept].mean() if kept.any() else np.nan}
            if kept.any():
                drawn = metrics.cluster_bootstrap(right[kept], pseudo["id"][kept])
                line["low"], line["high"] = metrics.interval(drawn)
            out.append(line)
    return pd.DataFrame(out)
