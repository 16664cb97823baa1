"""What came out: every model's scores side by side, and one page that says whether the gain is real.

:func:`gather` reads what the runs left, :func:`leaderboard` scores it, :func:`answer` puts it into words, and
:func:`write` makes the files of `reports/`. Nothing here is imported by code that trains.
"""

from __future__ import annotations

import io
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter

from distillery import data, metrics, params, teachers, training

KINDS = (
    "only the teacher is right",
    "only the student is right",
    "both wrong",
    "both right",
    "wrong",
    "right",
)
ROLES = ("student", "control", "teacher", "untrained", "majority")
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


# ---------------------------------------------------------------- gathering


@dataclass(frozen=True)
class Scored:
    """One line of the leaderboard: a model's predictions of the test rows of `source`, over its seeds."""

    name: str
    key: str  # its name in params (of the student it starts from, for an untrained one)
    role: str  # one of ROLES
    source: str
    predicted: np.ndarray  # [seeds, rows] labels
    probabilities: np.ndarray | None = None  # [seeds, rows, K]
    parameters: int | None = None
    bytes: int | None = None
    teacher: str | None = None  # key of the teacher it is compared with
    control: str | None = None  # key of the student it is compared with


@dataclass(frozen=True)
class Results:
    """Everything that the report speaks of."""

    params: params.Params
    labels: dict[str, list[str]]  # of each source, in the order of probability vectors
    tests: dict[str, pd.DataFrame]  # of each source
    scored: list[Scored]
    signals: dict[tuple[str, str], pd.DataFrame]  # (teacher, source) -> its test signals, in the order of the rows
    history: pd.DataFrame  # model, seed, phase, step, loss
    audits: dict[str, Any]
    counts: dict[str, Any] | None  # of the augmentation
    warnings: list[str]

    def find(self, key: str, role: str = "") -> Scored | None:
        """The student (or control) called `key`, or what plays `role` for it; None when there is no such line."""
        roles = (role,) if role else ("student", "control")
        return next((s for s in self.scored if s.key == key and s.role in roles), None)

    def teacher_of(self, line: Scored) -> Scored | None:
        """The line of the teacher that `line` is compared with."""
        same = (s for s in self.scored if s.role == "teacher" and (s.key, s.source) == (line.teacher, line.source))
        return next(same, None)


def teacher_of(P: params.Params, student: str) -> str | None:
    """The first teacher of `student`; a control is compared with the teacher of the student it is the control of."""
    named = [t for phase in P.students[student].phases for t in phase.teachers]
    if not named:
        counterparts = [s for s, spec in P.students.items() if spec.control == student]
        named = [t for s in counterparts for phase in P.students[s].phases for t in phase.teachers]
    return named[0] if named else None


def _read(path: Path, root: Path) -> Any:
    """A parquet, csv or JSON file. Raises UserError when it is missing."""
    try:
        if path.suffix == ".parquet":
            return pd.read_parquet(path)
        return pd.read_csv(path) if path.suffix == ".csv" else json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise params.UserError(f"{path.relative_to(root)}: no such file; `dvc repro` makes it") from None


def _aligned(rows: pd.DataFrame, test: pd.DataFrame, path: Path, root: Path) -> pd.DataFrame:
    """`rows` in the order of `test`. Raises UserError when they are not the predictions of exactly those rows."""
    if rows["id"].duplicated().any() or set(rows["id"]) != set(test["id"]):
        raise params.UserError(f"{path.relative_to(root)}: not the test rows of now; `dvc repro` brings it up to date")
    return rows.set_index("id").loc[test["id"]].reset_index()


def _stack(tables: Sequence[pd.DataFrame]) -> dict[str, np.ndarray]:
    probabilities = np.stack([np.stack(t["probabilities"].to_numpy()) for t in tables]).astype(np.float64)
    return {
        "predicted": np.stack([t["prediction"].to_numpy(dtype=object) for t in tables]),
        "probabilities": probabilities,
    }


def gather(root: Path, P: params.Params) -> Results:
    """Read the predictions of everything that params names, and nothing else (a removed student is gone).

    Raises UserError when a run's files are missing or belong to other test rows.
    """
    students = {name: P.tested_on(name) for name in P.students}
    sources = [s for s in P.data if s in students.values()]
    labels = {s: data.read_task(root / f"data/processed/{s}").names for s in sources}
    tests = {s: data.read(root / f"data/processed/{s}", "test") for s in sources}
    controls = {spec.control for spec in P.students.values()}
    scored, history, signals, begun = [], [], {}, {}

    for name, source in students.items():
        spec, folders = P.students[name], [root / f"runs/{name}-{seed}" for seed in P.seeds]
        facts = [_read(folder / "metrics.json", root) for folder in folders]
        common = {"source": source, "teacher": teacher_of(P, name), "parameters": facts[0].get("parameters")}
        tables = []
        for folder in folders:
            rows = _read(folder / "predictions.parquet", root)
            rows = rows[rows["split"] == "test"]
            tables.append(_aligned(rows, tests[source], folder / "predictions.parquet", root))
        role = "control" if name in controls and not any(phase.teachers for phase in spec.phases) else "student"
        size = facts[0].get("bytes_on_disk")
        scored.append(Scored(name, name, role, **common, bytes=size, control=spec.control, **_stack(tables)))
        for seed, folder in zip(P.seeds, folders, strict=True):
            history.append(_history(folder / "history.csv", root).assign(model=name, seed=seed))

        # Students that start from the same model in the same way share their untrained scores: one line is enough.
        start = (spec.model, spec.arch, str(spec.init), spec.prompt, spec.few_shot, spec.dtype, source)
        if start not in begun:
            before = [_read(folder / "phases.parquet", root) for folder in folders]
            before = [rows[(rows["phase"] == 0) & (rows["split"] == "test")] for rows in before]
            if all(len(rows) for rows in before):
                before = [_aligned(rows, tests[source], folders[0] / "phases.parquet", root) for rows in before]
                begun[start] = Scored(f"{name}, untrained", name, "untrained", **common, **_stack(before))

    for teacher in P.teachers:
        for source in [s for s in sources if s in P.sources_of(teacher)]:
            path = root / f"data/teacher/{teacher}/signals.parquet"
            rows = _read(path, root)
            rows = rows[(rows["source"] == source) & (rows["split"] == "test")].rename(columns={"label": "prediction"})
            rows = signals[teacher, source] = _aligned(rows, tests[source], path, root)
            facts = _read(root / f"data/teacher/{teacher}/metrics.json", root)
            name = teacher if teacher not in P.students else f"{teacher}, teacher"
            name = name if len(sources) == 1 else f"{name} on {source}"
            size = {"parameters": facts.get("parameters"), "bytes": facts.get("bytes_on_disk")}
            scored.append(Scored(name, teacher, "teacher", source, **_stack([rows]), **size))

    for source in sources:
        train = data.read(root / f"data/processed/{source}", "train")
        commonest = (train if len(train) else tests[source])["label"].mode()[0]  # the first of equals: deterministic
        name = f"always {commonest}" if len(sources) == 1 else f"always {commonest} on {source}"
        constant = np.full((1, len(tests[source])), commonest, dtype=object)
        scored.append(Scored(name, source, "majority", source, constant))

    counts = root / f"data/augmented/{P.augment.source}/counts.json"
    return Results(
        params=P,
        labels=labels,
        tests=tests,
        scored=scored + list(begun.values()),
        signals=signals,
        history=pd.concat(history, ignore_index=True)[["model", "seed", "phase", "step", "loss"]],
        audits={s: _read(root / f"data/processed/{s}/audit.json", root) for s in sources},
        counts=_read(counts, root) if P.augment.per_row and counts.exists() else None,
        warnings=[line for source in sources for line in leaks(root, P, source, tests[source])],
    )


def _history(path: Path, root: Path) -> pd.DataFrame:
    """Phase, step, loss of one run, the steps counted through its phases."""
    try:
        rows = _read(path, root)[["phase", "step", "loss"]]
    except pd.errors.EmptyDataError:
        return pd.DataFrame({"phase": [], "step": [], "loss": []})
    parts, done = [], 0
    for _, part in rows.groupby("phase", sort=True):
        part = part.assign(step=part["step"] + (done if len(part) and part["step"].min() <= done else 0))
        done = part["step"].max()
        parts.append(part)
    return pd.concat(parts) if parts else rows


def leaks(root: Path, P: params.Params, source: str, test: pd.DataFrame) -> list[str]:
    """One line for each set of rows that was learned from and holds test rows of `source` (same text, id or group)."""
    out = []
    for other in P.data:
        if P.data[other].task != P.data[source].task:
            continue
        for split in ("train", "pool", "validation"):
            rows = data.read(root / f"data/processed/{other}", split)
            shared = test["text"].isin(rows["text"])
            if other == source:  # ids and groups are names inside one source
                shared |= test["id"].isin(rows["id"]) | test["group"].isin(rows["group"])
            if shared.any():
                who = f"the test rows of {source} are also in {other}/{split}"
                out.append(f"{int(shared.sum())} of {who}: every score below is too good to be true.")
    return out


# ---------------------------------------------------------------- speed


def throughput(
    scorers: dict[str, Callable[[list[str]], Any]], texts: list[str], rounds: int = 5, budget: float = 10.0
) -> dict[str, float]:
    """Sentences a second of each scorer on the same texts, side by side: name -> median over its rounds.

    Each is warmed up on a few texts first. Then they take turns, so that whatever else the machine does meets all of
    them; one that has spent its share of `budget` seconds, or had all its rounds, sits out. One round is had by all.
    """
    for score in scorers.values():
        score(texts[:4])
    seconds: dict[str, list[float]] = {name: [] for name in scorers}
    for _ in range(rounds):
        for name, score in scorers.items():
            if sum(seconds[name]) < budget / len(scorers):
                start = time.perf_counter()
                score(texts)
                seconds[name].append(time.perf_counter() - start)
    return {name: len(texts) / float(np.median(taken)) for name, taken in seconds.items()}


def speeds(root: Path, results: Results) -> dict[str, float]:
    """Sentences a second, on test rows of the headline's source, of every trained model that is tested there.

    Students of one shape (a student and its control) are equally fast: the first of them is measured for all.
    """
    P, source = results.params, results.find(results.params.evaluate.headline).source
    task, scorers, measured = data.read_task(root / f"data/processed/{source}"), {}, {}
    for line in (s for s in results.scored if s.source == source):
        if line.role == "teacher":
            tuned = root / f"data/teacher/{line.key}/model" if P.teachers[line.key].finetune else None
            scorers[line.name] = teachers.open_teacher(line.key, P, task, tuned=tuned).predict
            measured[line.name] = line.name
        elif line.role in ("student", "control"):
            spec = P.students[line.key]
            shape = str([spec.model, spec.arch, spec.init, spec.prompt, spec.few_shot, spec.dtype, spec.max_length])
            if shape not in measured.values():
                folder = root / f"runs/{line.key}-{P.seeds[0]}/model"
                scorers[shape] = training.reopen(spec, folder, task, spec.dtype).predict
            measured[line.name] = shape
    rate = throughput(scorers, results.tests[source]["text"].head(P.evaluate.throughput_rows).tolist())
    return {name: rate[key] for name, key in measured.items()}


# ---------------------------------------------------------------- scoring


def _compared(results: Results, a: Scored, b: Scored | None) -> dict[str, dict[str, float]] | None:
    """The paired difference a - b; None when there is no b, or it was tested on other rows."""
    if b is None or a.source != b.source:
        return None
    test, e = results.tests[a.source], results.params.evaluate
    labels = results.labels[a.source]
    return metrics.paired_difference(
        test["label"], a.predicted, b.predicted, labels, test["group"], e.bootstrap, e.confidence, e.seed
    )


def leaderboard(results: Results, speeds: dict[str, float] | None = None) -> pd.DataFrame:
    """One row a model, best accuracy first. Scores are means over seeds, in [0, 1], with percentile intervals.

    speeds: name in the leaderboard -> sentences a second (wall clock).
    verdict: `better` or `worse` than the control when p, corrected for the number of comparisons (Holm), is under
    1 - confidence; `no evidence` otherwise.
    """
    e, rows = results.params.evaluate, []
    for line in results.scored:
        test, labels = results.tests[line.source], results.labels[line.source]
        gold, groups = test["label"].to_numpy(dtype=object), test["group"]
        drawn = metrics.bootstrap_scores(gold, line.predicted, labels, groups, e.bootstrap, e.seed)
        row: dict[str, Any] = {"model": line.name, "role": line.role, "source": line.source}
        row["seeds"] = len(line.predicted)
        row |= {"parameters": line.parameters, "megabytes": None if line.bytes is None else line.bytes / 1e6}
        for score, mean in metrics.mean_scores(gold, line.predicted, labels).items():
            low, high = metrics.interval(drawn[score], e.confidence)
            row |= {score: mean, f"{score}_low": low, f"{score}_high": high}
        reports = [metrics.classification_report(gold, p, None, labels)["labels"] for p in line.predicted]
        for label in labels:
            for score in ("precision", "recall"):
                row[f"{score}_{label}"] = float(np.mean([report[label][score] for report in reports]))
        signal = results.signals.get((line.teacher, line.source))
        if signal is not None:
            taught = np.stack(signal["probabilities"].to_numpy())
            row["kl_to_teacher"] = float(np.mean([metrics.kl(taught, p).mean() for p in line.probabilities]))
            row["agreement_with_teacher"] = float((line.predicted == signal["prediction"].to_numpy(object)).mean())
        row["sentences_per_second"] = (speeds or {}).get(line.name)
        difference = _compared(results, line, results.find(line.control) if line.control else None)
        if difference:
            d = difference["accuracy"]
            row |= {"versus": line.control, "difference": d["mean"], "difference_low": d["low"]}
            row |= {"difference_high": d["high"], "p": d["p"], "detectable": d["detectable"]}
        rows.append(row)

    middle = [f"{score}_{label}" for score in ("precision", "recall") for label in _all_labels(results)]
    columns = ["model", "role", "source", "seeds", "parameters", "megabytes"]
    columns += [f"{score}{end}" for score in metrics.SCORES for end in ("", "_low", "_high")] + middle
    columns += ["kl_to_teacher", "agreement_with_teacher", "sentences_per_second"]
    columns += ["versus", "difference", "difference_low", "difference_high", "p", "detectable", "verdict"]
    board = pd.DataFrame(rows).reindex(columns=columns)
    board["parameters"] = board["parameters"].astype("Int64")
    board["p"] = board["p"].astype(float)
    compared = board["p"].notna()
    board.loc[compared, "p"] = metrics.holm(board.loc[compared, "p"])
    board["verdict"] = [
        None if np.isnan(p) else "no evidence" if p >= 1 - e.confidence else "better" if d > 0 else "worse"
        for p, d in zip(board["p"], board["difference"].astype(float), strict=True)
    ]
    order = [ROLES.index(role) for role in board["role"]]
    board = board.assign(_order=order).sort_values(["accuracy", "_order", "model"], ascending=[False, True, True])
    return board.drop(columns="_order").reset_index(drop=True)


def _all_labels(results: Results) -> list[str]:
    return list(dict.fromkeys(label for labels in results.labels.values() for label in labels))


def summary(results: Results, board: pd.DataFrame) -> dict[str, Any]:
    """What `dvc metrics` shows: the headline with its intervals, then two scores a model. No wall clock in here."""
    head = board.set_index("model").loc[results.params.evaluate.headline]
    keys = [c for c in board.columns if c.startswith(("accuracy", "macro_f1", "difference", "kl_to", "agreement"))]
    out: dict[str, Any] = {"headline": {k: round(float(head[k]), 6) for k in keys if pd.notna(head[k])}}
    trained = board[board["role"].isin(["student", "control", "teacher"])]
    for score in metrics.SCORES:
        out[score] = {m: round(float(v), 6) for m, v in zip(trained["model"], trained[score], strict=True)}
    return out


def disagreements(results: Results) -> pd.DataFrame:
    """The headline's test rows: where it and its teacher differ, then what it got wrong, the most certain first.

    Columns id, text, gold, student, student_probability, rationale (of the corpus), kind (one of KINDS), differs; with
    a teacher also teacher, teacher_probability, teacher_rationale. Of several seeds the first one's predictions.
    """
    head = results.find(results.params.evaluate.headline)
    test = results.tests[head.source]
    rows = pd.DataFrame({"id": test["id"], "text": test["text"], "gold": test["label"], "student": head.predicted[0]})
    rows["student_probability"] = head.probabilities[0].max(1)
    rows["rationale"] = test["rationale"]
    signal = results.signals.get((head.teacher, head.source))
    right = rows["student"] == rows["gold"]
    if signal is not None:
        rows["teacher"] = signal["prediction"]
        rows["teacher_probability"] = np.stack(signal["probabilities"].to_numpy()).max(1)
        rows["teacher_rationale"] = signal["rationale"]
        taught = rows["teacher"] == rows["gold"]
        cases = [right & taught, right, taught]
        rows["kind"] = np.select(
            cases, ["both right", "only the student is right", "only the teacher is right"], "both wrong"
        )
        rows["differs"] = rows["student"] != rows["teacher"]
    else:
        rows["kind"] = np.where(right, "right", "wrong")
        rows["differs"] = False
    rank = np.where(rows["differs"], 0, np.where(right, 2, 1))
    rows = rows.assign(_rank=rank).sort_values(["_rank", "student_probability", "id"], ascending=[True, False, True])
    return rows.drop(columns="_rank").reset_index(drop=True)


def samples(results: Results) -> pd.DataFrame:
    """Some test rows of the headline's source, drawn at random: text, gold, and each trained model's label."""
    e = results.params.evaluate
    source = results.find(e.headline).source
    test = results.tests[source]
    some = np.sort(np.random.default_rng(e.seed).permutation(len(test))[: e.samples])
    rows = test.iloc[some][["text", "label"]].rename(columns={"label": "gold"})
    for line in results.scored:
        if line.source == source and line.role in ("student", "control", "teacher"):
            rows[line.name] = line.predicted[0][some]
    return rows.reset_index(drop=True)


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


def _times(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 20 else f"{ratio:.1f}"


def _range(d: dict[str, float], sign: str = "+") -> str:
    return f"{points(d['low'], sign)} to {points(d['high'], sign)}"


def answer(results: Results, board: pd.DataFrame) -> dict[str, Any]:
    """The result in words: `title`, `sentences`, `tiles` (value, label, note, tone), all of it from the numbers.

    It must read right whatever came out: a student that is worse, one seed, no teacher, no control, no augmentation.
    """
    P, e = results.params, results.params.evaluate
    head = results.find(e.headline)
    lines = board.set_index("model")
    row, teacher, control = lines.loc[head.name], results.teacher_of(head), results.find(head.control or "")
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
            claims.append(fast)
            value = f"{_times(max(ratio, 1 / ratio))}×"
            tiles.append((value, "faster" if ratio >= 1 else "slower", note, "good" if ratio > 1.05 else "bad"))
        sentences.append(what + ".")

    # What it costs.
    tiles.append((percent(row["accuracy"]), "accuracy", f"{level} interval {100 * row['accuracy_low']:.1f} to "
                  f"{percent(row['accuracy_high'])}", ""))  # fmt: skip
    text = f"On {n:,} test sentences it is right on {accuracy}"
    if teacher is not None:
        d = _compared(results, head, teacher)["accuracy"]
        text += f", its teacher on {percent(lines.loc[teacher.name, 'accuracy'])}"
        if d["high"] < 0:
            given = {"low": -d["high"], "high": -d["low"]}
            text += f": it gives up {100 * -d['mean']:.1f} points ({_range(given, sign='')})."
            claims.append(f"{100 * -d['mean']:.1f} points less accurate")
        elif d["low"] > 0:
            text += f": it is {100 * d['mean']:.1f} points better than its teacher ({_range(d, sign='')})."
            claims.append(f"{100 * d['mean']:.1f} points more accurate")
        else:
            text += f": the difference of {points(d['mean'])} points ({_range(d)}) is within what chance explains."
            claims.append("about as accurate")
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
        number = int(board["p"].notna().sum())
        p = f"p {'= ' + format(row['p'], '.3f') if row['p'] >= 0.0005 else '< 0.001'}" + (
            f" after Holm's correction for {number} comparisons" if number > 1 else ""
        )
        interval = f"{level} interval {_range(d)}; {p}"
        tone = {"better": "good", "worse": "bad"}.get(verdict, "")
        if verdict == "better":
            text += f"The gain of {100 * mean:.1f} points is real ({interval})."
        elif verdict == "worse":
            text += f"The student is {100 * -mean:.1f} points worse, and that is no accident ({interval})."
        else:
            text += f"The difference of {points(mean)} points is no evidence of a gain or a loss ({interval}): only a "
            text += f"true difference of about {100 * row['detectable']:.1f} points would have shown here."
        sentences.append(text)
        label = {"better": "a real gain", "worse": "worse"}.get(verdict, "no evidence of a gain")
        tiles.append((f"{points(mean)} points", f"{label} over {control.name}", f"{level} interval {_range(d)}", tone))
    if len(P.seeds) == 1:
        sentences.append("Each student was trained once: the intervals say nothing of other random seeds.")
    else:
        text = f"Scores are means of {len(P.seeds)} training runs a student. "
        sentences.append(text + "The intervals draw near-duplicates together, and training runs with them.")

    # What would have been had for nothing.
    majority = next(s for s in results.scored if s.role == "majority" and s.source == head.source)
    text = f"For comparison, {majority.name} is right on {percent(lines.loc[majority.name, 'accuracy'])}"
    untrained = [s for s in results.scored if s.role == "untrained" and s.source == head.source]
    same = [s for s in untrained if P.students[s.key].init == P.students[head.key].init]
    same = [s for s in same if P.students[s.key].model == P.students[head.key].model]
    if same:
        text += f", the untrained student on {percent(lines.loc[same[0].name, 'accuracy'])}"
    if row["accuracy"] <= lines.loc[majority.name, "accuracy"]:
        text += ": the student has learned nothing that beats the commonest answer"
    sentences.append(text + ".")
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


def figure_cost(results: Results, board: pd.DataFrame) -> Figure:
    """Accuracy against the number of parameters, with the line of those that no smaller model beats (Pareto)."""
    with _drawing():
        rows = board[board["parameters"].notna() & (board["role"] != "untrained")].copy()
        rows["parameters"] = rows["parameters"].astype(float)
        figure, axes = plt.subplots(figsize=(5.6, 3.4), layout="constrained")
        front = rows.sort_values(["parameters", "accuracy"], ascending=[True, False])
        front = front[front["accuracy"] > front["accuracy"].cummax().shift(fill_value=-1)]
        axes.step(front["parameters"], front["accuracy"], where="post", color=MUTED, lw=1, ls=(0, (4, 3)))
        for _, row in rows.iterrows():
            colour = COLOURS[row["role"]]
            axes.plot(
                [row["parameters"]] * 2, [row["accuracy_low"], row["accuracy_high"]], color=colour, lw=2, alpha=0.4
            )
            axes.plot(row["parameters"], row["accuracy"], "o", color=colour, ms=7)
            axes.annotate(row["model"], (row["parameters"], row["accuracy"]), (7, 3), textcoords="offset points",
                          fontsize=8)  # fmt: skip
        axes.set_xscale("log")
        if len(rows):
            axes.set_xlim(rows["parameters"].min() / 1.5, rows["parameters"].max() * 2.2)
        axes.xaxis.set_major_formatter(lambda x, _: count(x).replace(".0 ", " "))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        axes.set_xlabel("parameters, logarithmic")
        axes.set_ylabel("accuracy")
        _roles(axes, rows)
    return figure


def shown(results: Results) -> list[Scored]:
    """The headline, its control and its teacher, as far as they exist."""
    head = results.find(results.params.evaluate.headline)
    lines = [head, results.find(head.control or ""), results.teacher_of(head)]
    return [line for line in lines if line is not None and line.source == head.source]


def figure_confusion(results: Results) -> Figure:
    """Gold against predicted labels of the headline, its control and its teacher: share of each gold label."""
    with _drawing():
        lines = shown(results)
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
        lines, rows = shown(results), board.set_index("model")
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
                smooth = run["loss"].rolling(max(1, len(run) // 60), min_periods=1).mean()
                axes.plot(run["step"], smooth, lw=1.2, color=LABEL_COLOURS[i % len(LABEL_COLOURS)], alpha=0.85)
            starts = rows.groupby("phase")["step"].min().iloc[1:]
            for start in starts:
                axes.axvline(start, color=MUTED, lw=0.8, ls=":")
            axes.set_title(name, fontsize=9)
            axes.set_ylim(bottom=0)
        for axes in many[:, 0]:
            axes.set_ylabel("loss")
        figure.supxlabel("optimizer step; one line a seed, a dotted rule between phases", fontsize=8, color=MUTED)
    return figure


def figures(results: Results, board: pd.DataFrame) -> dict[str, Figure]:
    """Every picture of the report: name -> figure."""
    return {
        "leaderboard": figure_leaderboard(results, board),
        "cost": figure_cost(results, board),
        "confusion": figure_confusion(results),
        "labels": figure_labels(results, board),
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


def write(root: Path, results: Results, board: pd.DataFrame, speeds: dict[str, float] | None = None) -> None:
    """Make `reports/`: leaderboard.csv, metrics.json, timing.json, figures/, plots/ and index.html.

    `metrics.json` holds no wall-clock figure and is the same, byte for byte, for the same runs.
    Raises UserError when the disk is full.
    """
    folder = root / "reports"
    e = results.params.evaluate
    head = results.find(e.headline)
    pictures = {name: svg(figure) for name, figure in figures(results, board).items()}
    timing = {"sentences_per_second": speeds or {}, "rows": e.throughput_rows, "cores": os.cpu_count()}
    first = pd.DataFrame({"actual": results.tests[head.source]["label"], "predicted": head.predicted[0]})
    scores = ["model", "role", "accuracy", "accuracy_low", "accuracy_high", "macro_f1"]
    texts = {
        "leaderboard.csv": board.to_csv(index=False),
        "metrics.json": _json(summary(results, board)),
        "timing.json": _json(timing),
        "plots/history.csv": results.history.to_csv(index=False),
        "plots/predictions.csv": first.to_csv(index=False),
        "plots/accuracy.csv": board[scores].to_csv(index=False),
        "index.html": page(root, results, board, pictures),
    }
    texts |= {f"figures/{name}.svg": text for name, text in pictures.items()}
    for name, text in texts.items():
        with params.atomic(folder / name) as path:
            path.write_text(text, encoding="utf-8")


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def _short(text: Any) -> str:
    text = "" if text is None or text is pd.NA or text != text else str(text)
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"


def page(root: Path, results: Results, board: pd.DataFrame, pictures: dict[str, str]) -> str:
    """The self-contained page: no network, every text of the data escaped."""
    browse = disagreements(results)
    errors = browse.head(MAX_ROWS).copy()
    for column in {"text", "rationale", "teacher_rationale"} & set(errors):
        errors[column] = [_short(text) for text in errors[column]]
    rows = board.astype(object).where(board.notna(), None).to_dict("records")
    span = max(0.0, board["accuracy_low"].min() - 0.03), min(1.0, board["accuracy_high"].max() + 0.03)
    head = results.find(results.params.evaluate.headline)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "points": points, "count": count}
    yaml = root / "params.yaml"
    return environment.get_template("report.html").render(
        answer=answer(results, board),
        warnings=results.warnings,
        board=rows,
        span=span,
        headline=head.name,
        control=head.control,
        teacher=results.teacher_of(head),
        labels=results.labels[head.source],
        names=results.labels,
        level=f"{100 * results.params.evaluate.confidence:g} %",
        comparisons=int(board["p"].notna().sum()),
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
