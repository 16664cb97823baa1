"""The figures of the report."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter
from matplotlib.transforms import Bbox

from distillery import metrics
from distillery.evaluation.results import ROLES, Results
from distillery.report.style import INK, LABEL_COLOURS, MUTED, ROLE_COLOURS, drawing
from distillery.report.tables import pooled_predictions, reliability_table, size_series
from distillery.wording import human_count


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


COSTS = {  # column of the leaderboard -> label of the axis, format of its ticks
    "parameters": ("parameters, logarithmic", lambda x, _: human_count(x).replace(".0 ", " ")),
    "latency_p50_ms": ("milliseconds for one sentence, logarithmic", lambda x, _: f"{x:g}"),
}


def figure_cost(results: Results, board: pd.DataFrame, cost: str = "parameters") -> Figure:
    """Accuracy against one of `COSTS`, with the Pareto front: the models that no cheaper one beats.

    A line joins students that differ in size alone, see :func:`distillery.report.tables.size_series`.
    """
    with drawing():
        rows = board[board[cost].notna() & (board["role"] != "untrained")]
        rows = rows.assign(cost=rows[cost].astype(float)).sort_values(["cost", "accuracy"], ascending=[True, False])
        figure, axes = plt.subplots(figsize=(5.6, 3.4), layout="constrained")
        front = rows[rows["accuracy"] > rows["accuracy"].cummax().shift(fill_value=-1)]
        axes.step(front["cost"], front["accuracy"], where="post", color=MUTED, lw=1, ls=(0, (4, 3)))
        for series in size_series(results.params, rows):
            axes.plot(series["cost"], series["accuracy"], color=ROLE_COLOURS[series["role"].iloc[0]], lw=1, alpha=0.6)
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
    """Write each name beside its dot: right or left, above or below, at the first place free of dots and names."""
    axes.figure.canvas.draw()  # sets the positions of everything
    points = axes.figure.dpi / 72
    occupied = [Bbox.from_bounds(*(axes.transData.transform(at) - 4 * points), *[8 * points] * 2) for _, at in dots]
    for name, at in dots:
        places = [((7, 4), "left"), ((7, -11), "left"), ((-7, 4), "right"), ((-7, -11), "right")]
        candidates = [
            axes.annotate(name, at, place, textcoords="offset points", ha=side, fontsize=8) for place, side in places
        ]
        boxes = [text.get_window_extent() for text in candidates]
        inside = [axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1) for box in boxes]
        free = [i for i, box in enumerate(boxes) if inside[i] and not box.count_overlaps(occupied)]
        chosen = free[0] if free else 0
        for text in candidates[:chosen] + candidates[chosen + 1 :]:
            text.remove()
        occupied.append(boxes[chosen])


def figure_reliability(results: Results) -> Figure:
    """Accuracy by the probability of the prediction; a dot's area grows with the rows of its bin."""
    with drawing():
        figure, axes = plt.subplots(figsize=(5.6, 3.2), layout="constrained")
        axes.plot([0, 1], [0, 1], color=MUTED, lw=0.8, ls=":")
        table = reliability_table(results)
        for result in results.compared:
            bins, colour = table[table["model"] == result.name], ROLE_COLOURS[result.role]
            axes.plot(bins["confidence"], bins["accuracy"], color=colour, lw=1.2)
            size = 8 + 160 * bins["rows"] / bins["rows"].sum()
            axes.scatter(bins["confidence"], bins["accuracy"], s=size, color=colour, label=result.name)
        axes.set(xlim=(max(0, table["confidence"].min() - 0.05) if len(table) else 0, 1.01), ylim=(0, 1.02))
        axes.set(xlabel="probability of the prediction", ylabel="accuracy")
        _percent_axes(axes)
        # dots of one size: those in the figure are as large as their bins
        handles = [
            plt.Line2D([], [], color=ROLE_COLOURS[x.role], marker="o", ms=5, label=x.name) for x in results.compared
        ]
        axes.legend(handles=handles, loc="lower right")
    return figure


def figure_coverage(results: Results) -> Figure:
    """Error rate among the rows with the most confident predictions, by the share of rows that is predicted."""
    with drawing():
        figure, axes = plt.subplots(figsize=(5.6, 3.2), layout="constrained")
        for result in results.compared:
            curve = metrics.risk_coverage(*pooled_predictions(results, result))
            axes.plot(curve["coverage"], curve["risk"], color=ROLE_COLOURS[result.role], lw=1.6, label=result.name)
        axes.set(xlim=(0, 1.01), ylim=(0, None))
        axes.set(xlabel="share of rows predicted, the most confident first", ylabel="error rate")
        _percent_axes(axes)
        axes.legend(loc="lower right")
    return figure


def _percent_axes(axes: Any) -> None:
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))


def figure_confusion(results: Results) -> Figure:
    """Confusion matrices of `evaluate.confusion`, or headline, control and teacher: shares of each label's rows."""
    with drawing():
        compared = results.of_confusion
        labels, label = results.labels[compared[0].source], results.tests[compared[0].source]["label"]
        k, width = len(labels), max(1.6, min(4.0, 0.35 * len(labels)))
        size = (0.8 + width * len(compared), 0.7 + width)
        figure, panels = plt.subplots(1, len(compared), figsize=size, layout="constrained", sharey=True, squeeze=False)
        for axes, result in zip(panels[0], compared, strict=True):
            counts = np.mean([metrics.confusion(label, p, labels)[:, :-1] for p in result.predictions], axis=0)
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
            axes.set_title(result.name, loc="center")
        panels[0][0].set_ylabel("label")
        figure.supxlabel("prediction; each row of cells adds up to 100 %", fontsize=8, color=MUTED)
    return figure


def figure_labels(results: Results, board: pd.DataFrame) -> Figure:
    """Precision and recall of each label: headline, control and teacher."""
    with drawing():
        compared, rows = results.compared, board.set_index("model")
        labels = results.labels[results.headline.source]
        size = (5.6, 0.9 + 0.22 * len(labels) * (len(compared) + 0.8))
        figure, panels = plt.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
        for axes, score in zip(panels, ("precision", "recall"), strict=True):
            for j, result in enumerate(compared):
                at = np.arange(len(labels)) * (len(compared) + 0.8) + j
                values = [rows.loc[result.name, f"{score}_{label}"] for label in labels]
                axes.barh(at, values, height=0.8, color=ROLE_COLOURS[result.role], label=result.name)
                for y, value in zip(at, values, strict=True):
                    axes.text(value + 0.02, y, f"{100 * value:.0f}", va="center", fontsize=7.5)
            axes.set_yticks(np.arange(len(labels)) * (len(compared) + 0.8) + (len(compared) - 1) / 2, labels)
            axes.set(xlim=(0, 1.12), title=score)
            axes.set_xticks([0, 0.5, 1])
            axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
            axes.grid(axis="y", visible=False)
        panels[0].invert_yaxis()
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=3, handlelength=1)
    return figure


def figure_history(results: Results) -> Figure:
    """Training loss of every student, one line a seed; a dotted rule begins each phase after the first.

    Where validation rows were looked at during a training, their loss is a dashed line.
    """
    with drawing():
        names = [name for name in results.params.students if (results.history["model"] == name).any()]
        across = 2 if len(names) > 1 else 1
        down = max(1, -(-len(names) // across))
        size = (5.6, 0.4 + 1.75 * down)
        figure, panels = plt.subplots(down, across, figsize=size, layout="constrained", squeeze=False)
        for axes in panels.flat[len(names) :]:
            axes.set_visible(False)
        for axes, name in zip(panels.flat, names, strict=False):
            _draw_history(axes, results.history[results.history["model"] == name])
            axes.set_title(name, fontsize=9)
        for axes in panels[:, 0]:
            axes.set_ylabel("loss, logarithmic")
        text = "optimizer step; one line a seed, bold its rolling mean; a dotted rule begins a phase"
        text += "; dashed: loss on validation rows" if "validation_loss" in results.history else ""
        figure.supxlabel(text, fontsize=8, color=MUTED)
    return figure


def _draw_history(axes: Any, rows: pd.DataFrame) -> None:
    """The loss of one student in `rows` (seed, phase, step, loss)."""
    for i, (_, run) in enumerate(rows.groupby("seed", sort=False)):
        colour = LABEL_COLOURS[i % len(LABEL_COLOURS)]
        axes.plot(run["step"], run["loss"], lw=0.7, color=colour, alpha=0.3)
        for _, phase in run.groupby("phase"):
            smooth = phase["loss"].rolling(max(3, len(phase) // 20), min_periods=1).mean()
            axes.plot(phase["step"], smooth, lw=1.4, color=colour, alpha=0.9)
            if "validation_loss" in phase:
                looks = phase.dropna(subset="validation_loss")
                axes.plot(looks["step"], looks["validation_loss"], lw=1.2, color=colour, ls="--")
    for phase, start in rows.groupby("phase")["step"].min().iloc[1:].items():
        axes.axvline(start, color=MUTED, lw=0.8, ls=":")
        axes.annotate(f"phase {int(phase)}", (start, 1), (2, -2), xycoords=("data", "axes fraction"),
                      textcoords="offset points", va="top", fontsize=7, color=MUTED)  # fmt: skip
    if (rows["loss"] > 0).all():  # one phase's loss may be thirty times another's
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
        axes.yaxis.set_minor_locator(NullLocator())


def all_figures(results: Results, board: pd.DataFrame) -> dict[str, Figure]:
    """Every figure of the report: name -> figure. Those of `board` show the models on the source of the headline.

    Label sets have no confusion matrix, and no likeliest label whose confidence two of the figures are about.
    """
    board = board[board["source"] == results.headline.source].reset_index(drop=True)
    latency = (
        {"latency": figure_cost(results, board, "latency_p50_ms")} if board["latency_p50_ms"].notna().any() else {}
    )
    of_labels = {} if results.are_sets else {"confusion": figure_confusion(results)}
    of_confidence = (
        {} if results.are_sets else {"reliability": figure_reliability(results), "coverage": figure_coverage(results)}
    )
    return latency | {
        "leaderboard": figure_leaderboard(results, board),
        "cost": figure_cost(results, board),
        **of_labels,
        "labels": figure_labels(results, board),
        **of_confidence,
        "history": figure_history(results),
    }
