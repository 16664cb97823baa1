"""Colours and layout of the report's figures."""

from __future__ import annotations

from contextlib import contextmanager

import matplotlib.pyplot as plt

INK, MUTED, GRID, PAPER = "#1f2937", "#6b7281", "#e5e7ec", "#fffffe"

ROLE_COLOURS = {
    "student": "#2f6fde",
    "control": "#8fa3bf",
    "teacher": "#e08a00",
    "export": "#2a9d6f",
    "untrained": "#b9c0ca",
    "majority": "#b9c0cb",
}

LABEL_COLOURS = ("#2f6fde", "#8fa3bf", "#e08a00", "#2a9d6f", "#b0529c", "#c8553d", "#7a6ff0", "#5f7470")

STYLE = {
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "savefig.facecolor": PAPER,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "xtick.color": MUTED,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": GRID,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "text.parse_math": False,  # a label may hold a dollar sign
    "svg.fonttype": "none",
    "svg.hashsalt": "distillery",
    "figure.dpi": 110,
}


@contextmanager
def drawing():
    """Figures in the style of the report; closed at the end, so that a notebook does not show them twice."""
    with plt.rc_context(STYLE):
        try:
            yield
        finally:
            plt.close("all")
