"""The look of tables and plots, and numbers as text."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from pandas.io.formats.style import Styler

from distillery.wording import percentage_points

BLUE, GREY, RED, GREEN = "#3b6fb6", "#a3acb5", "#c8553d", "#6a994e"
PALETTE = (BLUE, GREY, RED, GREEN, "#d9a441", "#7d6b91", "#4a4a4a", "#8fb8de")


def use_style() -> None:
    """Set the look of all plots and tables of a notebook. A dollar sign in a table is money, not mathematics."""
    plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left", "font.size": 9}
    plt.rcParams |= {"legend.frameon": False}
    pd.options.styler.html.mathjax, pd.options.styler.format.escape = False, "html"
    pd.options.display.html.use_mathjax = False


def show_table(frame: pd.DataFrame, precision: int = 3, index: bool = False) -> Styler:
    """`frame` with its texts wrapped and aligned to the left; arrays of probabilities are rounded to two digits."""
    rounded = frame.map(lambda value: np.round(value, 2) if isinstance(value, np.ndarray) else value)
    looks = [{"selector": "th, td", "props": "text-align: left; white-space: normal; max-width: 46em"}]
    styler = rounded.style.format(precision=precision, na_rep="–").set_table_styles(looks)
    return styler if index else styler.hide()


def plot_distributions(names: list[str], distributions: dict[str, np.ndarray], title: str = "") -> None:
    """Bars of several distributions over the same labels, side by side.

    names: [labels]. distributions: legend entry -> [labels], probabilities in [0, 1]; in the order of the legend.
    """
    _, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
    width, at = 0.8 / len(distributions), np.arange(len(names))
    for i, ((label, values), colour) in enumerate(zip(distributions.items(), PALETTE, strict=False)):
        bars = axes.bar(
            at + (i - (len(distributions) - 1) / 2) * width, values, width * 0.92, label=label, color=colour
        )
        axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=1)
    axes.set(title=title, ylim=(0, 1.12), ylabel="probability")
    axes.set_xticks(at, names)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


def shown_change(before: float, after: float) -> str:
    """The change between two shares in percentage points, as a reader computes it from their percentages: +39.1."""
    return percentage_points((round(100 * after, 1) - round(100 * before, 1)) / 100)


def join_words(words: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
