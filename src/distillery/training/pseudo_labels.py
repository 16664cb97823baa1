"""Which labels of teachers are sure enough to learn from."""

from __future__ import annotations

import numpy as np
import pandas as pd

from distillery.config.schema import PhaseConfig


def select_pseudo_labels(rows: pd.DataFrame, phase: PhaseConfig) -> np.ndarray:
    """Which of `rows` (label, `probabilities_<teacher>`) pass `phase.pseudo_labels` [n]: all with a gold label, and of
    the others those whose teachers are sure enough of one label, or agree on it."""
    selected = rows["label"].notna().to_numpy(copy=True)
    for i in np.flatnonzero(~selected):
        by_teacher = [rows[f"probabilities_{teacher}"][i] for teacher in phase.teachers]
        probabilities = np.stack([p for p in by_teacher if p is not None] or [[0.0]])
        mean = probabilities.mean(0)
        agree = (probabilities.argmax(-1) == mean.argmax()).all()
        sure = mean.max() >= phase.pseudo_labels.min_confidence
        selected[i] = sure and (agree or not phase.pseudo_labels.agreement)
    return selected
