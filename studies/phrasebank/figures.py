"""The figures of the study."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd

from distillery.notebook.style import BLUE, GREEN, GREY, PALETTE, RED
from studies.phrasebank.data import SUBSETS

ROLE_COLOURS = {"student": BLUE, "teacher": PALETTE[4], "published": RED, "transfer": GREEN}  # others are grey


def plot_results(results: pd.DataFrame) -> None:
    """Accuracy of every trained model with its interval, where it has one; a panel for each subset."""
    trained = ~results["role"].isin(["majority", "untrained"])
    shown = results[trained].sort_values("accuracy", kind="stable")
    _, panels = plt.subplots(1, len(SUBSETS), figsize=(11, 3.2), layout="constrained")
    for axes, subset in zip(panels, SUBSETS, strict=True):
        rows = shown[shown["subset"] == subset].reset_index(drop=True)
        for i, row in rows.iterrows():
            colour = ROLE_COLOURS.get(row["role"], GREY)
            axes.plot([row["accuracy_low"], row["accuracy_high"]], [i, i], color=colour, linewidth=4, alpha=0.4)
            axes.plot(row["accuracy"], i, "o", color=colour)
            axes.annotate(
                f"{row['accuracy']:.3f}", (row["accuracy"], i), (0, 5), textcoords="offset points", fontsize=7
            )
        axes.set_yticks(range(len(rows)), rows["model"] + " (" + rows["role"] + ")")
        axes.set(title=subset, xlabel="accuracy, 95 % interval")


def plot_gains(gains: pd.DataFrame) -> None:
    """Difference in accuracy between each student and its controls, with its interval, in points."""
    rows = gains[gains["score"] == "accuracy"].reset_index(drop=True)
    _, axes = plt.subplots(figsize=(8, 0.8 + 0.35 * len(rows)), layout="constrained")
    for i, row in rows.iterrows():
        colour = BLUE if row["low"] > 0 else RED if row["high"] < 0 else GREY
        axes.plot([100 * row["low"], 100 * row["high"]], [i, i], color=colour, linewidth=4, alpha=0.4)
        axes.plot(100 * row["difference"], i, "o", color=colour)
    axes.axvline(0, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(rows)), rows["student"] + " − " + rows["control"] + ", " + rows["subset"])
    axes.invert_yaxis()
    axes.set(title="gain in accuracy, 95 % interval", xlabel="points")
