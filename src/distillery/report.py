"""One page that says whether the gain is real, and the figures, tables and numbers of `reports/`.

:func:`answer` puts what :mod:`distillery.evaluation` found into words, the `figure_…` functions into pictures, and
:func:`write` makes the files.
"""

from __future__ import annotations

import io
import json
import os
import platform
import re
import sys
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter
from matplotlib.transforms import Bbox

from distillery import evaluation, metrics, params
from distillery.evaluation import KINDS, ROLES, TRAINED, Measured, Results

LIBRARIES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "bitsandbytes",
    "datasets",
    "numpy",
    "scipy",
    "dvc",
    "papermill",
)
MAX_ROWS = 1000  # rows of the error browser: keeps the page under 3 MB
MAX_TEXT = 500  # characters of a text or rationale shown there
MIN_BIN = 10  # rows below which a bin's share of right answers says nothing


# ---------------------------------------------------------------- words


def percent(x: float) -> str:
    return f"{100 * x:.1f} %"


def points(x: float, sign: str = "+") -> str:
    """A difference of shares in percentage points; a gain bears `sign`."""
    return f"{100 * x:{sign}.1f}".replace("-", "\N{MINUS SIGN}")


def count(n: float | None) -> str:
    """A number of parameters as people say it: 17.1 M."""
    if n is None or pd.isna(n):
        return "–"
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if n >= size:
            return f"{n / size:.1f}{unit}"
    return str(int(n))


def duration(seconds: float) -> str:
    """As people say it: 41 s, 2 min 5 s, 3 h 20 min."""
    for size, below, unit, smaller in ((3600, 60, "h", "min"), (60, 1, "min", "s")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} {int(seconds % size // below)} {smaller}"
    return f"{seconds:.0f} s"


def _times(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 20 else f"{ratio:.1f}"


def _ms(x: float) -> str:
    return f"{x:.0f} ms" if x >= 10 else f"{x:.1f} ms"


def _range(d: dict[str, float], sign: str = "+") -> str:
    return f"{points(d['low'], sign)} to {points(d['high'], sign)}"


def answer(results: Results, board: pd.DataFrame) -> dict[str, Any]:
    """The result in words: `title`, `sentences`, `tiles` (value, label, note, tone), all of it from the numbers.

    It must read right whatever came out: a student that is worse, one seed, no teacher, no control, no augmentation.
    """
    P, e = results.params, results.params.evaluate
    head = results.headline
    lines = board.set_index("model")
    row, teacher, control = lines.loc[head.name], results.teacher_of(head), results.find(head.control)
    level, n, name = f"{100 * e.confidence:g} %", len(results.tests[head.source]), head.name
    accuracy = f"{percent(row['accuracy'])} ({level} interval {percent(row['accuracy_low'])} to "
    accuracy += f"{percent(row['accuracy_high'])})"
    tiles, sentences, claims = [], [], []

    # What it is, and what it saves.
    if teacher is None:
        sentences.append(f"{name} ({count(head.parameters)} parameters) was trained without a teacher.")
    else:
        what = f"{name} ({count(head.parameters)} parameters) was distilled from {teacher.name} "
        what += f"({count(teacher.parameters)})"
        if head.parameters and teacher.parameters:
            ratio = teacher.parameters / head.parameters
            smaller = f"{_times(ratio)} times smaller" if ratio >= 1.05 else f"{_times(1 / ratio)} times larger"
            smaller = "of the same size" if 1 / 1.05 < ratio < 1.05 else smaller
            what += f" and is {smaller}"
            claims.append(smaller)
            note = f"{count(head.parameters)} against {count(teacher.parameters)} parameters"
            if 1 / 1.05 < ratio < 1.05:
                tiles.append(("same size", "as its teacher", note, ""))
            else:
                value = f"{_times(max(ratio, 1 / ratio))}×"
                tiles.append((value, "smaller" if ratio > 1 else "larger", note, "good" if ratio > 1 else "bad"))
        mine, its = row["sentences_per_second"], lines.loc[teacher.name, "sentences_per_second"]
        if pd.notna(mine) and pd.notna(its):
            ratio = mine / its
            fast = f"{_times(ratio)} times as fast" if ratio >= 1.05 else f"{_times(1 / ratio)} times slower"
            fast = "equally fast" if 1 / 1.05 < ratio < 1.05 else fast
            note = f"{mine:,.0f} against {its:,.0f} sentences a second"
            what += f"; side by side on one machine it is {fast} ({note})"
            alone = row["latency_p50_ms"], lines.loc[teacher.name, "latency_p50_ms"]
            if all(pd.notna(ms) for ms in alone):
                what += f" and answers a single one in {_ms(alone[0])} ({_ms(alone[1])})"
            claims.append(fast)
            value = f"{_times(max(ratio, 1 / ratio))}×"
            tiles.append((value, "faster" if ratio >= 1 else "slower", note, "good" if ratio > 1.05 else "bad"))
        sentences.append(what + ".")

    # What it costs.
    tiles.append((percent(row["accuracy"]), "accuracy", f"{level} interval {100 * row['accuracy_low']:.1f} to "
                  f"{percent(row['accuracy_high'])}", ""))  # fmt: skip
    text = f"On {n:,} test sentences it is right on {accuracy}"
    if teacher is not None:
        verdict, d = row["teacher_verdict"], {k: row[f"teacher_difference_{k}"] for k in ("low", "high")}
        d["mean"] = row["teacher_difference"]
        text += f", its teacher on {percent(lines.loc[teacher.name, 'accuracy'])}"
        if verdict == "worse":
            given = {"low": -d["high"], "high": -d["low"]}
            text += f": it gives up {100 * -d['mean']:.1f} points ({_range(given, sign='')})."
            claims.append(f"{100 * -d['mean']:.1f} points less accurate")
        elif verdict == "better":
            text += f": it is {100 * d['mean']:.1f} points better than its teacher ({_range(d, sign='')})."
            claims.append(f"{100 * d['mean']:.1f} points more accurate")
        else:
            text += f": the difference of {points(d['mean'])} points ({_range(d)}) is within what chance explains; "
            text += f"one of about {100 * row['teacher_detectable']:.1f} would have shown."
            claims.append("no evidence that it is less accurate" if d["mean"] < 0 else "about as accurate")
    else:
        text += "."
    sentences.append(text)

    # Is it real.
    if control is None:
        sentences.append("It names no control, so nothing here shows what its way of training contributed.")
    else:
        verdict, mean = row["verdict"], row["difference"]
        d = {"low": row["difference_low"], "high": row["difference_high"]}
        taught = any(phase.teachers for phase in P.students[control.key].phases)
        text = f"Its control {control.name}{'' if taught else ', which had no teacher,'} reaches "
        text += f"{percent(lines.loc[control.name, 'accuracy'])}. "
        number = evaluation.comparisons(board)
        p = f"p {'= ' + format(row['p'], '.3f') if row['p'] >= 0.0005 else '< 0.001'}" + (
            f" after Holm's correction for {number} comparisons" if number > 1 else ""
        )
        interval = f"{level} interval {_range(d)}; {p}"
        tone = {"better": "good", "worse": "bad"}.get(verdict, "")
        once = len(P.seeds) == 1  # then the runs themselves may have been lucky
        if verdict == "better":
            real = "more than the choice of test rows explains" if once else "real"
            text += f"The gain of {100 * mean:.1f} points is {real} ({interval})."
        elif verdict == "worse":
            text += f"The student is {100 * -mean:.1f} points worse, "
            text += (
                f"{'more than the choice of test rows explains' if once else 'and that is no accident'} ({interval})."
            )
        else:
            text += f"The difference of {points(mean)} points is no evidence of a gain or a loss ({interval}): only a "
            text += f"true difference of about {100 * row['detectable']:.1f} points would have shown here."
        sentences.append(text)
        label = {"better": "a gain" if once else "a real gain", "worse": "worse"}.get(verdict, "no evidence of a gain")
        tiles.append((f"{points(mean)} points", f"{label} over {control.name}", f"{level} interval {_range(d)}", tone))
    if len(P.seeds) == 1:
        sentences.append(
            "Each student was trained once: the intervals speak of other test rows, not of other random seeds."
        )
    else:
        text = f"Scores are means of {len(P.seeds)} training runs a student. "
        sentences.append(text + "The intervals draw near-duplicates together, and training runs with them.")

    # What would have been had for nothing.
    always = [s.name for s in results.scored if s.role == "majority" and s.source == head.source]
    given = [f"{name} is right on {percent(lines.loc[name, 'accuracy'])}" for name in always]
    untrained = [s for s in results.scored if s.role == "untrained" and s.source == head.source]
    same = [s for s in untrained if P.students[s.key].init == P.students[head.key].init]
    same = [s for s in same if P.students[s.key].model == P.students[head.key].model]
    if same:
        before = percent(lines.loc[same[0].name, "accuracy"])
        given.append(f"the untrained student on {before}" if given else f"the untrained student is right on {before}")
    if given:
        nothing = any(row["accuracy"] <= lines.loc[name, "accuracy"] for name in always)
        told = ": the student has learned nothing that beats the commonest answer" if nothing else ""
        sentences.append(f"For comparison, {', '.join(given)}{told}.")
    keys = ("value", "label", "note", "tone")
    title = f"{name} beside {teacher.name}: {', '.join(claims)}" if teacher else f"{name}: {accuracy}"
    return {"title": title, "sentences": sentences, "tiles": [dict(zip(keys, t, strict=True)) for t in tiles]}


# ---------------------------------------------------------------- pictures

INK, MUTED, GRID, PAPER = "#1f2937", "#6b7281", "#e5e7ec", "#fffffe"
COLOURS = {
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
def _drawing():
    """Our style, and no figure left open for a notebook to show twice."""
    with plt.rc_context(STYLE):
        try:
            yield
        finally:
            plt.close("all")


def figure_leaderboard(results: Results, board: pd.DataFrame) -> Figure:
    """Accuracy of every model with its interval, best on top."""
    with _drawing():
        rows = board.iloc[::-1].reset_index(drop=True)
        figure, axes = plt.subplots(figsize=(5.6, 0.9 + 0.29 * len(rows)), layout="constrained")
        for i, row in rows.iterrows():
            colour, head = COLOURS[row["role"]], row["model"] == results.params.evaluate.headline
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
        _roles(axes, board)
    return figure


def _roles(axes: Any, board: pd.DataFrame) -> None:
    """A legend of the roles that occur, above the axes."""
    present = [role for role in ROLES if role in set(board["role"]) and role != "majority"]
    handles = [plt.Line2D([], [], color=COLOURS[role], marker="o", ls="", label=role) for role in present]
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(-0.01, 1), ncols=len(handles), handletextpad=0.1,
                columnspacing=1.0, borderaxespad=0)  # fmt: skip


COSTS = {  # column of the leaderboard -> what stands below the axis, how its ticks are written
    "parameters": ("parameters, logarithmic", lambda x, _: count(x).replace(".0 ", " ")),
    "latency_p50_ms": ("milliseconds for one sentence, logarithmic", lambda x, _: f"{x:g}"),
}


def figure_cost(results: Results, board: pd.DataFrame, cost: str = "parameters") -> Figure:
    """Accuracy against one of `COSTS`, with the line of the models that nothing cheaper beats (Pareto)."""
    with _drawing():
        rows = board[board[cost].notna() & (board["role"] != "untrained")]
        rows = rows.assign(cost=rows[cost].astype(float)).sort_values(["cost", "accuracy"], ascending=[True, False])
        figure, axes = plt.subplots(figsize=(5.6, 3.4), layout="constrained")
        front = rows[rows["accuracy"] > rows["accuracy"].cummax().shift(fill_value=-1)]
        axes.step(front["cost"], front["accuracy"], where="post", color=MUTED, lw=1, ls=(0, (4, 3)))
        for _, row in rows.iterrows():
            at, colour = (row["cost"], row["accuracy"]), COLOURS[row["role"]]
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
        _roles(axes, rows)
        _names(axes, [(row["model"], (row["cost"], row["accuracy"])) for _, row in rows.iterrows()])
    return figure


def _names(axes: Any, dots: list[tuple[str, tuple[float, float]]]) -> None:
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
    with _drawing():
        figure, axes = plt.subplots(figsize=(5.6, 3.2), layout="constrained")
        axes.plot([0, 1], [0, 1], color=MUTED, lw=0.8, ls=":")
        bins = reliability(results)
        for line in results.shown:
            mine, colour = bins[bins["model"] == line.name], COLOURS[line.role]
            axes.plot(mine["confidence"], mine["right"], color=colour, lw=1.2)
            size = 8 + 160 * mine["rows"] / mine["rows"].sum()
            axes.scatter(mine["confidence"], mine["right"], s=size, color=colour, label=line.name)
        axes.set(xlim=(max(0, bins["confidence"].min() - 0.05) if len(bins) else 0, 1.01), ylim=(0, 1.02))
        axes.set(xlabel="probability that it gives its answer", ylabel="share right")
        _percent(axes)
        # a dot of its own: those in the picture are as large as their bins
        handles = [plt.Line2D([], [], color=COLOURS[x.role], marker="o", ms=5, label=x.name) for x in results.shown]
        axes.legend(handles=handles, loc="lower right")
    return figure


def figure_coverage(results: Results) -> Figure:
    """Error rate among the rows that a model is surest of, if it may decline to answer the others."""
    with _drawing():
        figure, axes = plt.subplots(figsize=(5.6, 3.2), layout="constrained")
        for line in results.shown:
            gold = metrics.encode(results.tests[line.source]["label"], results.labels[line.source])
            gold, p = np.tile(gold, len(line.probabilities)), np.concatenate(line.probabilities)
            curve = metrics.risk_coverage(gold, p)
            axes.plot(curve["coverage"], curve["risk"], color=COLOURS[line.role], lw=1.6, label=line.name)
        axes.set(xlim=(0, 1.01), ylim=(0, None))
        axes.set(xlabel="share of rows answered, the surest first", ylabel="share wrong")
        _percent(axes)
        axes.legend(loc="lower right")
    return figure


def _percent(axes: Any) -> None:
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))


def figure_confusion(results: Results) -> Figure:
    """Gold against predicted labels of the headline, its control and its teacher: share of each gold label."""
    with _drawing():
        lines = results.shown
        labels, gold = results.labels[lines[0].source], results.tests[lines[0].source]["label"]
        k, width = len(labels), max(1.6, min(4.0, 0.35 * len(labels)))
        size = (0.8 + width * len(lines), 0.7 + width)
        figure, many = plt.subplots(1, len(lines), figsize=size, layout="constrained", sharey=True, squeeze=False)
        for axes, line in zip(many[0], lines, strict=True):
            counts = np.mean([metrics.confusion(gold, p, labels)[:, :-1] for p in line.predicted], axis=0)
            share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
            for i in range(k):
                for j in range(k):
                    colour = COLOURS["student"] if i == j else COLOURS["teacher"]
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
    with _drawing():
        lines, rows = results.shown, board.set_index("model")
        labels = results.labels[lines[0].source]
        figure, many = plt.subplots(1, 2, figsize=(5.6, 0.9 + 0.22 * len(labels) * (len(lines) + 0.8)), sharey=True,
                                    layout="constrained")  # fmt: skip
        for axes, score in zip(many, ("precision", "recall"), strict=True):
            for j, line in enumerate(lines):
                at = np.arange(len(labels)) * (len(lines) + 0.8) + j
                values = [rows.loc[line.name, f"{score}_{label}"] for label in labels]
                axes.barh(at, values, height=0.8, color=COLOURS[line.role], label=line.name)
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
    with _drawing():
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


def figures(results: Results, board: pd.DataFrame) -> dict[str, Figure]:
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


def svg(figure: Figure) -> str:
    """The figure as SVG text, the same for the same figure."""
    file = io.StringIO()
    with plt.rc_context(STYLE):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def inline(name: str, text: str) -> Markup:
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


# ---------------------------------------------------------------- files


def write(root: Path, results: Results, board: pd.DataFrame, measured: Measured | None = None) -> None:
    """Make `reports/`: leaderboard.csv, metrics.json, timing.json, figures/, plots/ and index.html.

    `metrics.json` holds no wall-clock figure and is the same, byte for byte, for the same runs.
    Raises UserError when the disk is full.
    """
    folder, head, measured = root / "reports", results.headline, measured or Measured()
    pictures = {name: svg(figure) for name, figure in figures(results, board).items()}
    timing = {"models": measured.timing, "rows": results.params.evaluate.throughput_rows}
    timing |= {"latency_rows": evaluation.LATENCY_ROWS, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    gold = results.tests[head.source]["label"]
    first = pd.DataFrame({"actual": gold, "predicted": head.predicted[0]})
    numbers = evaluation.summary(results, board)
    if len(measured.robustness):
        mine = measured.robustness[measured.robustness["model"] == head.name].set_index("change")
        numbers["kept_when_rewritten"] = mine["kept"].round(6).to_dict()
    texts = {
        "leaderboard.csv": board.to_csv(index=False),
        "metrics.json": _json(numbers),
        "timing.json": _json(timing),
        "plots/history.csv": results.history.to_csv(index=False),
        "plots/predictions.csv": first.to_csv(index=False),
        "plots/scores.csv": scores(board).to_csv(index=False),
        "plots/reliability.csv": reliability(results).to_csv(index=False),
        "index.html": page(root, results, board, pictures, measured),
    }
    if results.params.recipe:
        texts["plots/published.csv"] = evaluation.published(results.params, board).to_csv(index=False)
    texts |= {f"figures/{name}.svg": text for name, text in pictures.items()}
    for name, text in texts.items():
        with params.atomic(folder / name) as path:
            path.write_text(text, encoding="utf-8")


def scores(board: pd.DataFrame) -> pd.DataFrame:
    """For `dvc plots`: accuracy and macro-F1 of every model, a row each with its interval: model, score, value, …"""
    parts = [
        board[["model", "role"]].assign(score=s, value=board[s], low=board[f"{s}_low"], high=board[f"{s}_high"])
        for s in metrics.SCORES
    ]
    return pd.concat(parts, ignore_index=True)


def reliability(results: Results) -> pd.DataFrame:
    """For `dvc plots`: confidence, share right and rows of each bin, of the headline, its control and its teacher."""
    parts = []
    for line in results.shown:
        gold = metrics.encode(results.tests[line.source]["label"], results.labels[line.source])
        bins = metrics.calibration(np.tile(gold, len(line.probabilities)), np.concatenate(line.probabilities), bins=10)
        rows = pd.DataFrame({"confidence": bins["confidence"], "right": bins["accuracy"], "rows": bins["rows"]})
        parts.append(rows[rows["rows"] >= MIN_BIN].assign(model=line.name))
    return pd.concat(parts, ignore_index=True)[["model", "confidence", "right", "rows"]]


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def _short(text: Any) -> str:
    text = "" if text is None or text is pd.NA or text != text else str(text)
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"


def page(root: Path, results: Results, board: pd.DataFrame, pictures: dict[str, str], measured: Measured) -> str:
    """The self-contained page: no network, every text of the data escaped."""
    browse = evaluation.disagreements(results)
    errors = browse.head(MAX_ROWS).copy()
    for column in {"text", "rationale", "teacher_rationale", "accepted", "student_written", "teacher_written"} & set(
        errors
    ):
        errors[column] = [_short(text) for text in errors[column]]
    rows = board.astype(object).where(board.notna(), None).to_dict("records")
    span = max(0.0, board["accuracy_low"].min() - 0.03), min(1.0, board["accuracy_high"].max() + 0.03)
    head = results.headline
    speaks_of = {line.name for line in results.shown}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "points": points, "count": count, "ms": _ms, "duration": duration}
    yaml = root / "params.yaml"
    return environment.get_template("report.html").render(
        answer=answer(results, board),
        warnings=[c for c in results.checks if not c.passed and (not c.about or speaks_of & set(c.about))],
        checks=sorted(results.checks, key=lambda check: check.passed),
        board=rows,
        span=span,
        headline=head.name,
        control=head.control,
        teacher=results.teacher_of(head),
        labels=results.labels[head.source],
        free=head.written is not None,
        names=results.labels,
        level=f"{100 * results.params.evaluate.confidence:g} %",
        comparisons=evaluation.comparisons(board),
        trained=[row for row in rows if row["role"] in TRAINED],
        shown=[line.name for line in results.shown],
        timed=bool(measured.timing),
        legs=_nested(evaluation.legs(root, results).astype(object), "model"),
        closeness=_nested(evaluation.closeness(results), "model"),
        recipe=results.params.recipe,
        published=evaluation.published(results.params, board).astype(object).to_dict("records"),
        rewritten=_nested(measured.robustness, "change"),
        examples=_nested(measured.examples, "change"),
        pictures={name: inline(name, text) for name, text in pictures.items()},
        errors=errors.to_dict("records"),
        kinds={kind: int(n) for kind in KINDS if (n := (errors["kind"] == kind).sum())},
        left_out=len(browse) - len(errors),
        audits=results.audits,
        counts=results.counts,
        augmented=results.params.augment,
        params=yaml.read_text(encoding="utf-8") if yaml.exists() else "",
        versions=versions(),
    )


def _nested(rows: pd.DataFrame, key: str) -> dict[str, list[dict[str, Any]]]:
    """The rows of each value of `key`, in their order."""
    return {name: part.to_dict("records") for name, part in rows.groupby(key, sort=False)} if len(rows) else {}


def versions() -> dict[str, str]:
    """Python, the machine and the libraries that decide the numbers."""
    out = {"python": platform.python_version(), "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    for name in LIBRARIES:
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            continue
    return out


def markdown(board: pd.DataFrame) -> str:
    """The leaderboard as the table of a README."""
    lines = [
        "| model | role | parameters | accuracy | macro-F1 | sentences/s | gain in accuracy over its control, points |",
        "|---|---|--:|--:|--:|--:|---|",
    ]
    for row in board.to_dict("records"):
        speed = row["sentences_per_second"]
        cells = [row["model"], row["role"], count(row["parameters"])]
        cells += [
            f"{percent(row[s])} ({100 * row[f'{s}_low']:.1f}–{100 * row[f'{s}_high']:.1f})" for s in metrics.SCORES
        ]
        cells += ["–" if pd.isna(speed) else f"{speed:.0f}"]
        if pd.isna(row["p"]):
            cells.append("")
        else:
            low, high = points(row["difference_low"]), points(row["difference_high"])
            cells.append(f"{points(row['difference'])} ({low} to {high}) over {row['versus']}: {row['verdict']}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    written = params.root() / "reports/leaderboard.csv"
    if not written.exists():
        sys.exit("error: reports/leaderboard.csv: not there yet; run `make repro` first")
    print(markdown(pd.read_csv(written)))
