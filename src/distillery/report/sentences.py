"""The result in words: the facts are computed here, `templates/sentences.md.jinja` puts them into sentences."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from distillery.config.effects import control_differences
from distillery.evaluation.costs import PRICED_ROWS
from distillery.evaluation.leaderboard import DOLLARS, count_comparisons
from distillery.evaluation.results import TRAINED_ROLES, ModelResult, Results
from distillery.report.environment import ENVIRONMENT

NOT_HERE = {  # kind of teacher -> why its model has no size and no speed of its own
    "answers": "only its answers are here, in files",
    "api": "it is behind an endpoint",
}


@dataclass(frozen=True)
class Comparison:
    """The headline beside another model on the same test rows; accuracies and differences are shares in [0, 1]."""

    name: str
    teachers: list[str]  # of the other model
    accuracy: float  # of the other model
    verdict: str  # of the headline: better, worse or no evidence
    difference: float  # the headline's accuracy minus the other's
    low: float
    high: float
    p: float
    detectable: float


@dataclass(frozen=True)
class Facts:
    """Everything that the sentences are made of. None: not known, or there is no such model."""

    name: str
    teachers: list[str]  # that the headline learned from
    accuracy: float
    low: float
    high: float
    rows: int  # test rows
    answer: str  # what a row has: a label, or a label set
    unit: str  # of a test row
    level: str  # of the intervals
    seeds: int
    comparisons: int
    control: Comparison | None
    unmatched_control: str | None  # a control that is scored on other test rows
    differences: list[str]  # of student and control besides the teacher's signal, each `name: value and value`
    teacher: Comparison | None
    parameters: int | None
    teacher_parameters: int | None
    size_ratio: float | None  # parameters of the teacher to those of the student
    speed: float | None  # sentences a second
    teacher_speed: float | None
    speed_ratio: float | None  # speed of the student to that of the teacher
    latency: float | None  # milliseconds for one sentence, median
    teacher_latency: float | None
    dollars: float | None  # for 1,000,000 sentences
    teacher_dollars: float | None
    baselines: list[tuple[str, float]]  # accuracy of what needs no training
    beats_majority: bool


def describe_result(results: Results, board: pd.DataFrame) -> dict[str, Any]:
    """The result in words: `title`, `sentences`, `tiles` (value, label, note, tone).

    board: as returned by :func:`leaderboard`.
    """
    return render_facts(result_facts(results, board))


def render_facts(facts: Facts) -> dict[str, Any]:
    """`facts` in words, see :func:`describe_result`."""
    words = ENVIRONMENT.get_template("sentences.md.jinja").make_module(asdict(facts))
    paragraphs = (" ".join(text.split()) for text in words.sentences().split("\n\n"))
    tiles = [line.split(" | ") for line in words.tiles().splitlines() if line]
    return {
        "title": " ".join(words.title().split()),
        "sentences": [text for text in paragraphs if text],
        "tiles": [dict(zip(("value", "label", "note", "tone"), tile, strict=True)) for tile in tiles],
    }


def left_out_sentence(results: Results, board: pd.DataFrame, cost: str) -> str:
    """Which trained models of the headline's source `figure_cost` cannot show, and why; empty when it shows them all.

    board: as returned by :func:`leaderboard`. cost: its column.
    """
    of_source = board[board["source"] == results.headline.source]
    names = of_source.loc[of_source[cost].isna() & of_source["role"].isin([*TRAINED_ROLES, "export"]), "model"]
    keys = {result.name: result.key for result in results.models if result.role == "teacher"}
    reasons = []
    for name in names:
        spec = results.params.teachers.get(keys.get(name, ""))
        reasons.append(f"{name} ({NOT_HERE.get(spec.kind if spec else '', 'it was not measured')})")
    return f"Not in the picture: {', '.join(reasons)}." if reasons else ""


def result_facts(results: Results, board: pd.DataFrame) -> Facts:
    """The facts about the headline in `board`, see :func:`describe_result`."""
    params, head = results.params, results.headline
    rows = board.set_index("model")
    row, teacher, control = rows.loc[head.name], results.teacher_of(head), results.find(head.control, head.source)
    matched, control = control is not None, control or results.find(head.control)
    teacher_row = None if teacher is None else rows.loc[teacher.name]
    majority = [m.name for m in results.models if m.role == "majority" and m.source == head.source]
    baselines = [(name, rows.loc[name, "accuracy"]) for name in majority]
    untrained = _untrained(results)
    if untrained is not None:
        baselines.append(("the untrained student", rows.loc[untrained.name, "accuracy"]))
    return Facts(
        name=head.name,
        teachers=_teachers(results, head),
        accuracy=row["accuracy"],
        low=row["accuracy_low"],
        high=row["accuracy_high"],
        rows=len(results.tests[head.source]),
        answer="label set" if results.are_sets else "label",
        unit="questions" if results.tasks[head.source].kind == "qa" else "sentences",
        level=f"{100 * params.evaluate.confidence:g} %",
        seeds=len(params.seeds),
        comparisons=count_comparisons(board),
        control=_comparison(results, rows, control, "") if matched else None,
        unmatched_control=None if control is None or matched else control.name,
        differences=_differences(results, control) if matched else [],
        teacher=None if teacher is None else _comparison(results, rows, teacher, "teacher_"),
        parameters=head.parameters,
        teacher_parameters=None if teacher is None else teacher.parameters,
        size_ratio=None if teacher is None else _ratio(teacher.parameters, head.parameters),
        speed=_known(row, "sentences_per_second"),
        teacher_speed=_known(teacher_row, "sentences_per_second"),
        speed_ratio=_ratio(_known(row, "sentences_per_second"), _known(teacher_row, "sentences_per_second")),
        latency=_known(row, "latency_p50_ms"),
        teacher_latency=_known(teacher_row, "latency_p50_ms"),
        dollars=_dollars(row),
        teacher_dollars=_dollars(teacher_row),
        baselines=baselines,
        beats_majority=all(row["accuracy"] > rows.loc[name, "accuracy"] for name in majority),
    )


def _comparison(results: Results, rows: pd.DataFrame, other: ModelResult, prefix: str) -> Comparison:
    row = rows.loc[results.headline.name]
    return Comparison(
        name=other.name,
        teachers=_teachers(results, other),
        accuracy=rows.loc[other.name, "accuracy"],
        verdict=row[f"{prefix}verdict"],
        difference=row[f"{prefix}difference"],
        low=row[f"{prefix}difference_low"],
        high=row[f"{prefix}difference_high"],
        p=row[f"{prefix}p"],
        detectable=row[f"{prefix}detectable"],
    )


def _teachers(results: Results, result: ModelResult) -> list[str]:
    """The teachers that `result` learned from, by their names in params."""
    spec = results.params.students.get(result.key) if result.role != "teacher" else None
    return list(dict.fromkeys(name for phase in spec.phases for name in phase.teachers)) if spec else []


def _differences(results: Results, control: ModelResult) -> list[str]:
    """The training rows of headline and control where they differ, then their settings, with phases counted from 1."""
    params, head = results.params, results.headline
    own, others = (
        list(dict.fromkeys(split_ref for phase in params.students[model.key].phases for split_ref in phase.data))
        for model in (head, control)
    )
    differences = []
    if set(own) != set(others):
        differences = [f"training rows: {' + '.join(own)} for the student, {' + '.join(others)} for its control"]
    for setting in control_differences(params, head.key):
        setting = re.sub(r"^phases:", "number of phases:", setting)
        setting = re.sub(r"^phases\.\*\.([^:]+)", r"\1 of the phases", setting)
        differences.append(re.sub(r"^phases\.(\d+)\.([^:]+)", lambda m: f"{m[2]} of phase {int(m[1]) + 1}", setting))
    return differences


def _untrained(results: Results) -> ModelResult | None:
    """The untrained model that the headline starts from."""
    head, students = results.headline, results.params.students
    start = students[head.key].init.layers, students[head.key].model
    untrained = (m for m in results.models if m.role == "untrained" and m.source == head.source)
    return next((m for m in untrained if (students[m.key].init.layers, students[m.key].model) == start), None)


def _dollars(row: pd.Series | None) -> float | None:
    """Dollars for 1,000,000 rows."""
    known = row is not None and DOLLARS in row and not pd.isna(row[DOLLARS])
    return 1e6 / PRICED_ROWS * float(row[DOLLARS]) if known else None


def _known(row: pd.Series | None, column: str) -> float | None:
    return None if row is None or pd.isna(row[column]) else float(row[column])


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    return numerator / denominator if numerator and denominator else None
