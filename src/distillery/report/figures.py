"""The figures of the report."""

from __future__ import annotations

import io
import re
from contextlib import contextmanager
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter
from matplotlib.transforms import Bbox

from distillery import metrics
from distillery.evaluation.results import ROLES, Results
from distillery.report.wording import human_count

MIN_BIN_ROWS = 10  # rows below which a bin's share of right answers says nothing


INK, MUTED, GRID, PAPER = "#1f2937", "#6b7281", "#e5e7ec", "#fffffe"


ROLE_COLOURS = {
    "student": "#2f6fde",
    "control": "#8fa3bf",
    "teacher": "#e08a00",
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
    """Our style, and no figure left open for a notebook to show twice."""
    with plt.rc_context(STYLE):
        try:
            yield
        finally:
            plt.close("all")


def figure_leaderboard(results: Results, board: pd.DataFrame) -> Figure:
    """Accuracy of every model with its interval, best on top."""
    with drawing():
        rows = board.iloc[::-1].reset_index(drop=True)
        figure, axes = plt.subplots(figsize=(5.6, 0.9 + 0.29 * len(rows)), layout="constrained")
        for i, row in rows.iterrows():
            colour, head = ROLE_COLOURS[row["role"]], row["model"] == results.params.evaluate.headline
            axes.plot(
                [row["accuracy_low"], row["accuracy_high"]], [i, i], color=colour, lw=5 if head else 3, alpha=0.45
            )
            axes.plot(row["accuracy"], i, "o", color=colour, ms=8 if head else 6)
            axes.annotate(f"{100 * row['accuracy']:.1f}", (row["accuracy"], i), (0, 6), textcoords="offset points",
                          ha="center", fontsize=7.5, color=INK)  # fmt: skip
        axes.set_yticks(range(len(rows)), rows["model"])
        for tick, model in zip(axes.get_yticklabels(), rows["model"], strict=True):
            tick.set_fontweight("bold" if model == results.params.evaluate.headline else "normal")
        axes.set_ylim(-0.6, len(rows) - 0.2)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"accuracy on test rows, {100 * results.params.evaluate.confidence:g} % interval")
        _role_legend(axes, board)
    return figure


def _role_legend(axes: Any, board: pd.DataFrame) -> None:
    """A legend of the roles that occur, above the axes."""
    present = [role for role in ROLES if role in set(board["role"]) and role != "majority"]
    handles = [plt.Line2D([], [], color=ROLE_COLOURS[role], marker="o", ls="", label=role) for role in present]
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(-0.01, 1), ncols=len(handles), handletextpad=0.1,
                columnspacing=1.0, borderaxespad=0)  # fmt: skip


COSTS = {  # column of the leaderboard -> what stands below the axis, how its ticks are written
    "parameters": ("parameters, logarithmic", lambda x, _: human_count(x).replace(".0 ", " ")),
    "latency_p50_ms": ("milliseconds for one sentence, logarithmic", lambda x, _: f"{x:g}"),
}


def figure_cost(results: Results, board: pd.DataFrame, cost: str = "parameters") -> Figure:
    """Accuracy against one of `COSTS`, with the line of the models that nothing cheaper beats (Pareto)."""
    with drawing():
        rows = board[board[cost].notna() & (board["role"] != "untrained")]
        rows = rows.assign(cost=rows[cost].astype(float)).sort_values(["cost", "accuracy"], ascending=[True, False])
        figure, axes = plt.subplots(figsize=(5.6, 3.4), layout="constrained")
        front = rows[rows["accuracy"] > rows["accuracy"].cummax().shift(fill_value=-1)]
        axes.step(front["cost"], front["accuracy"], where="post", color=MUTED, lw=1, ls=(0, (4, 3)))
        for _, row in rows.iterrows():
            at, colour = (row["cost"], row["accuracy"]), ROLE_COLOURS[row["role"]]
            axes.plot([at[0]] * 2, [row["accuracy_low"], row["accuracy_high"]], color=colour, lw=2, alpha=0.4)
            axes.plot(*at, "o", color=colour, ms=7)
        axes.set_xscale("log")
        if len(rows):
            axes.set_xlim(rows["cost"].min() / 1.5, rows["cost"].max() * 2.2)
        axes.xaxis.set_major_formatter(COSTS[cost][1])
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        axes.set_xlabel(COSTS[cost][0])
        axes.set_ylabel("accuracy")
        _role_legend(axes, rows)
        _place_names(axes, [(row["model"], (row["cost"], row["accuracy"])) for _, row in rows.iterrows()])
    return figure


def _place_names(axes: Any, dots: list[tuple[str, tuple[float, float]]]) -> None:
    """Writes each name beside its dot: right or left, above or below, where it first meets no other dot or name."""
    axes.figure.canvas.draw()  # only now it is known where things are
    points = axes.figure.dpi / 72
    taken = [Bbox.from_bounds(*(axes.transData.transform(at) - 4 * points), *[8 * points] * 2) for _, at in dots]
    for name, at in dots:
        places = [((7, 4), "left"), ((7, -11), "left"), ((-7, 4), "right"), ((-7, -11), "right")]
        tried = [
            axes.annotate(name, at, place, textcoords="offset points", ha=side, fontsize=8) for place, side in places
        ]
        boxes = [text.get_window_extent() for text in tried]
        inside = [axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1) for box in boxes]
        free = [i for i, box in enumerate(boxes) if inside[i] and not box.count_overlaps(taken)]
        chosen = free[0] if free else 0
        for text in tried[:chosen] + tried[chosen + 1 :]:
            text.remove()
        taken.append(boxes[chosen])


def figure_reliability(results: Results) -> Figure:
    """Share of right answers by the probability that a model gave its answer; larger dots stand for more rows."""
    with drawing():
        figure, axes = plt.subplots(figsize=(5.6, 3.2), layout="constrained")
        axes.plot([0, 1], [0, 1], color=MUTED, lw=0.8, ls=":")
        bins = reliability_table(results)
        for line in results.compared:
            mine, colour = bins[bins["model"] == line.name], ROLE_COLOURS[line.role]
            axes.plot(mine["confidence"], mine["right"], color=colour, lw=1.2)
            size = 8 + 160 * mine["rows"] / mine["rows"].sum()
            axes.scatter(mine["confidence"], mine["right"], s=size, color=colour, label=line.name)
        axes.set(xlim=(max(0, bins["confidence"].min() - 0.05) if len(bins) else 0, 1.01), ylim=(0, 1.02))
        axes.set(xlabel="probability that it gives its answer", ylabel="share right")
        _percent_axes(axes)
        # a dot of its own: those in the picture are as large as their bins
        handles = [
            plt.Line2D([], [], color=ROLE_COLOURS[x.role], marker="o", ms=5, label=x.name) for x in results.compared
        ]
        axes.legend(handles=handles, loc="lower right")
    return figure


def figure_coverage(results: Results) -> Figure:
    """Error rate among the rows that a model is surest of, if it may decline to answer the others."""
    with drawing():
        figure, axes = plt.subplots(figsize=(5.6, 3.2), layout="constrained")
        for line in results.compared:
            gold = metrics.encode_labels(results.tests[line.source]["label"], results.labels[line.source])
            gold, p = np.tile(gold, len(line.probabilities)), np.concatenate(line.probabilities)
            curve = metrics.risk_coverage(gold, p)
            axes.plot(curve["coverage"], curve["risk"], color=ROLE_COLOURS[line.role], lw=1.6, label=line.name)
        axes.set(xlim=(0, 1.01), ylim=(0, None))
        axes.set(xlabel="share of rows answered, the surest first", ylabel="share wrong")
        _percent_axes(axes)
        axes.legend(loc="lower right")
    return figure


def _percent_axes(axes: Any) -> None:
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))


def figure_confusion(results: Results) -> Figure:
    """Gold against predicted labels of the headline, its control and its teacher: share of each gold label."""
    with drawing():
        lines = results.compared
        labels, gold = results.labels[lines[0].source], results.tests[lines[0].source]["label"]
        k, width = len(labels), max(1.6, min(4.0, 0.35 * len(labels)))
        size = (0.8 + width * len(lines), 0.7 + width)
        figure, many = plt.subplots(1, len(lines), figsize=size, layout="constrained", sharey=True, squeeze=False)
        for axes, line in zip(many[0], lines, strict=True):
            counts = np.mean([metrics.confusion(gold, p, labels)[:, :-1] for p in line.predictions], axis=0)
            share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
            for i in range(k):
                for j in range(k):
                    colour = ROLE_COLOURS["student"] if i == j else ROLE_COLOURS["teacher"]
                    axes.add_patch(plt.Rectangle((j - 0.48, i - 0.48), 0.96, 0.96, color=colour, lw=0,
                                                 alpha=0.04 + 0.6 * share[i, j]))  # fmt: skip
                    if k <= 10:
                        axes.text(j, i, f"{100 * share[i, j]:.0f}", ha="center", va="center", fontsize=9)
            axes.set(xlim=(-0.5, k - 0.5), ylim=(k - 0.5, -0.5), aspect="equal")
            axes.grid(visible=False)
            axes.spines[:].set_visible(False)
            small = 8 if k <= 10 else 4
            axes.set_xticks(range(k), labels, rotation=30 if k <= 4 else 90, ha="right", fontsize=small, color=INK)
            axes.set_yticks(range(k), labels, fontsize=small)
            axes.set_title(line.name, loc="center")
        many[0][0].set_ylabel("gold label")
        figure.supxlabel("predicted; each row of cells adds up to 100 %", fontsize=8, color=MUTED)
    return figure


def figure_labels(results: Results, board: pd.DataFrame) -> Figure:
    """Precision and recall of each label: headline, control and teacher."""
    with drawing():
        lines, rows = results.compared, board.set_index("model")
        labels = results.labels[lines[0].source]
        figure, many = plt.subplots(1, 2, figsize=(5.6, 0.9 + 0.22 * len(labels) * (len(lines) + 0.8)), sharey=True,
                                    layout="constrained")  # fmt: skip
        for axes, score in zip(many, ("precision", "recall"), strict=True):
            for j, line in enumerate(lines):
                at = np.arange(len(labels)) * (len(lines) + 0.8) + j
                values = [rows.loc[line.name, f"{score}_{label}"] for label in labels]
                axes.barh(at, values, height=0.8, color=ROLE_COLOURS[line.role], label=line.name)
                for y, value in zip(at, values, strict=True):
                    axes.text(value + 0.02, y, f"{100 * value:.0f}", va="center", fontsize=7.5)
            axes.set_yticks(np.arange(len(labels)) * (len(lines) + 0.8) + (len(lines) - 1) / 2, labels)
            axes.set(xlim=(0, 1.12), title=score)
            axes.set_xticks([0, 0.5, 1])
            axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
            axes.grid(axis="y", visible=False)
        many[0].invert_yaxis()
        handles, names = many[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=3, handlelength=1)
    return figure


def figure_history(results: Results) -> Figure:
    """Training loss of every student, one line a seed, phases divided by a rule."""
    with drawing():
        names = [name for name in results.params.students if (results.history["model"] == name).any()]
        across = 2 if len(names) > 1 else 1
        down = max(1, -(-len(names) // across))
        figure, many = plt.subplots(down, across, figsize=(5.6, 0.4 + 1.75 * down), layout="constrained", squeeze=False)
        for axes in many.flat[len(names) :]:
            axes.set_visible(False)
        for axes, name in zip(many.flat, names, strict=False):
            rows = results.history[results.history["model"] == name]
            for i, (_, run) in enumerate(rows.groupby("seed", sort=False)):
                colour = LABEL_COLOURS[i % len(LABEL_COLOURS)]
                axes.plot(run["step"], run["loss"], lw=0.7, color=colour, alpha=0.3)
                for _, leg in run.groupby("phase"):
                    smooth = leg["loss"].rolling(max(3, len(leg) // 20), min_periods=1).mean()
                    axes.plot(leg["step"], smooth, lw=1.4, color=colour, alpha=0.9)
            starts = rows.groupby("phase")["step"].min().iloc[1:]
            for start in starts:
                axes.axvline(start, color=MUTED, lw=0.8, ls=":")
            axes.set_title(name, fontsize=9)
            if (rows["loss"] > 0).all():  # one phase's loss may be thirty times another's
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
                axes.yaxis.set_minor_locator(NullLocator())
        for axes in many[:, 0]:
            axes.set_ylabel("loss, logarithmic")
        figure.supxlabel(
            "optimizer step; a line a seed, bold its rolling mean; a dotted rule between phases",
            fontsize=8,
            color=MUTED,
        )
    return figure


def all_figures(results: Results, board: pd.DataFrame) -> dict[str, Figure]:
    """Every picture of the report: name -> figure."""
    timed = {"delay": figure_cost(results, board, "latency_p50_ms")} if board["latency_p50_ms"].notna().any() else {}
    return timed | {
        "leaderboard": figure_leaderboard(results, board),
        "cost": figure_cost(results, board),
        "confusion": figure_confusion(results),
        "labels": figure_labels(results, board),
        "reliability": figure_reliability(results),
        "coverage": figure_coverage(results),
        "history": figure_history(results),
    }


def figure_svg(figure: Figure) -> str:
    """The figure as SVG text, the same for the same figure."""
    file = io.StringIO()
    with plt.rc_context(STYLE):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def inline_svg(name: str, text: str) -> Markup:
    """SVG text for use inside a page: colours follow the page's theme, ids are its own, nothing points outside."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'\b(id="|href="#|url\(#)', rf"\1{name}-", text).replace("xlink:href", "href")
    text = re.sub(r'<svg ([^>]*?)(width|height)="[^"]*"([^>]*?)(width|height)="[^"]*"', r"<svg \1\3", text, count=1)
    for colour, variable in ((INK, "ink"), (MUTED, "muted"), (GRID, "line"), (PAPER, "clear")):
        text = text.replace(colour, f"var(--{variable})")
    text = re.sub(r"font: ((?:\w+ )*)([\d.]+px) [^;\"]*", r"font: \1\2 var(--font)", text)
    return Markup(text)


def score_table(board: pd.DataFrame) -> pd.DataFrame:
    """For `dvc plots`: accuracy and macro-F1 of every model, a row each with its interval: model, score, value, …"""
    parts = [
        board[["model", "role"]].assign(score=s, value=board[s], low=board[f"{s}_low"], high=board[f"{s}_high"])
        for s in metrics.SCORES
    ]
    return pd.concat(parts, ignore_index=True)


def reliability_table(results: Results) -> pd.DataFrame:
    """For `dvc plots`: confidence, share right and rows of each bin, of the headline, its control and its teacher."""
    parts = []
    for line in results.compared:
        gold = metrics.encode_labels(results.tests[line.source]["label"], results.labels[line.source])
        bins = metrics.calibration(np.tile(gold, len(line.probabilities)), np.concatenate(line.probabilities), bins=10)
        rows = pd.DataFrame({"confidence": bins["confidence"], "right": bins["accuracy"], "rows": bins["rows"]})
        parts.append(rows[rows["rows"] >= MIN_BIN_ROWS].assign(model=line.name))
    return pd.concat(parts, ignore_index=True)[["model", "confidence", "right", "rows"]]
