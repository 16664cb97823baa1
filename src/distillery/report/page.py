"""The files of `reports/`: one page with the results and their trustworthiness, and the tables behind it."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from distillery import metrics
from distillery.config.schema import Params
from distillery.evaluation.funnel import confidence_funnels
from distillery.evaluation.leaderboard import (
    GPU_COLUMNS,
    by_source,
    compare_with_published,
    count_comparisons,
    phase_accuracies,
    summarize,
    teacher_closeness,
)
from distillery.evaluation.results import ERROR_KINDS, TRAINED_ROLES, Results
from distillery.evaluation.rows import disagreements
from distillery.evaluation.slices import slice_sentence
from distillery.evaluation.speed import LATENCY_ROWS, WARM_UP_ROWS, Measurements
from distillery.files import Paths, atomic_write
from distillery.models.precision import resolve_dtypes
from distillery.models.predictions import find_alerts
from distillery.report.environment import ENVIRONMENT
from distillery.report.figures import COSTS, all_figures
from distillery.report.sentences import describe_result, left_out_sentence
from distillery.report.svg import figure_svg, inline_svg
from distillery.report.tables import cost_shares, reliability_table, score_table, size_series
from distillery.teachers.label_review import read_label_errors
from distillery.wording import human_count, percent, percentage_points

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

MAX_BROWSER_ROWS = 1000  # rows of the error browser: keeps the page under 3 MB

MAX_ALERTS = 20  # rows that call for an alert

MAX_LABEL_ERRORS = 20  # rows with a label that is probably wrong

MAX_TEXT_CHARACTERS = 500  # characters of a text or rationale shown there

LONG_TEXTS = ("text", "rationale", "teacher_rationale", "accepted", "student_answer", "teacher_answer")


def write_report(
    root: Path, results: Results, board: pd.DataFrame, measured: Measurements, parts: pd.DataFrame
) -> None:
    """Write `reports/`: leaderboard.csv, metrics.json, timing.json, figures/, plots/ and index.html.

    parts: see :func:`distillery.evaluation.slices.slice_scores`.
    `metrics.json` holds no wall-clock figure and is the same, byte for byte, for the same runs.
    Raises UserError when the disk is full.
    """
    folder, head = Paths(root).reports, results.headline
    figures = {name: figure_svg(figure) for name, figure in all_figures(results, board).items()}
    timing = {"models": measured.timing, "rows": results.params.evaluate.throughput_rows}
    timing |= {"latency_rows": LATENCY_ROWS, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    summary = summarize(results, board)
    if len(measured.robustness):
        robustness = measured.robustness[measured.robustness["model"] == head.name].set_index("perturbation")
        summary["consistency"] = robustness["consistency"].round(6).to_dict()
    predictions = pd.DataFrame({"label": results.tests[head.source]["label"], "prediction": head.predictions[0]})
    files = {
        "leaderboard.csv": board.to_csv(index=False),
        "metrics.json": _json(summary),
        "timing.json": _json(timing),
        "plots/history.csv": results.history.to_csv(index=False),
        "plots/predictions.csv": predictions.to_csv(index=False),
        "plots/scores.csv": score_table(board).to_csv(index=False),
        "plots/slices.csv": parts.to_csv(index=False),
        "plots/reliability.csv": reliability_table(results).to_csv(index=False),
        "index.html": render_page(root, results, board, figures, measured, parts),
    }
    if results.params.recipe:
        files["plots/published.csv"] = compare_with_published(results.params, board).to_csv(index=False)
    files |= {f"figures/{name}.svg": text for name, text in figures.items()}
    for name, text in files.items():
        with atomic_write(folder / name) as path:
            path.write_text(text, encoding="utf-8")


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def _training_costs(results: Results, board: pd.DataFrame) -> dict[str, Any]:
    """What the table of costs has of each model beside its row of `board`."""
    return {
        "shares": cost_shares(results, board),
        "controls": {result.name: result.control for result in results.models},
        "gpu_columns": [column for column in GPU_COLUMNS if column in board],
    }


def render_page(
    root: Path,
    results: Results,
    board: pd.DataFrame,
    figures: dict[str, str],
    measured: Measurements,
    parts: pd.DataFrame,
) -> str:
    """The self-contained page: no network, every text of the data escaped.

    figures: name -> SVG text. parts: see :func:`distillery.evaluation.slices.slice_scores`."""
    rows = board.astype(object).where(board.notna(), None).to_dict("records")
    further = {result.name for result in results.models if result.is_further}
    head, compared = results.headline, [result.name for result in results.compared]
    params_file = root / "params.yaml"
    return ENVIRONMENT.get_template("report.html").render(
        description=describe_result(results, board),
        warnings=[c for c in results.checks if not c.passed and (not c.models or {*compared} & {*c.models})],
        checks=sorted(results.checks, key=lambda check: check.passed),
        board=rows,
        sources=list(by_source(board, head.source)),
        span=(max(0.0, board["accuracy_low"].min() - 0.03), min(1.0, board["accuracy_high"].max() + 0.03)),
        headline=head.name,
        control=head.control,
        teacher=results.teacher_of(head),
        labels=results.labels[head.source],
        free=head.answers is not None,
        sets=results.are_sets,
        names=results.labels,
        level=f"{100 * results.params.evaluate.confidence:g} %",
        comparisons=count_comparisons(board),
        trained=[row for row in rows if row["role"] in TRAINED_ROLES and row["model"] not in further],
        **_training_costs(results, board),
        priced=[row for row in rows if row["role"] in (*TRAINED_ROLES, "export")],
        machine_price=results.params.evaluate.machine_price_per_hour,
        compared=compared,
        timed=bool(measured.timing),
        warm_up_rows=WARM_UP_ROWS,
        phases=group_records(phase_accuracies(root, results).astype(object), "model"),
        funnels=confidence_funnels(root, results.params),
        closeness=group_records(teacher_closeness(results), "model"),
        recipe=results.params.recipe,
        published=compare_with_published(results.params, board).astype(object).to_dict("records"),
        robustness=group_records(measured.robustness, "perturbation"),
        examples=group_records(measured.examples, "perturbation"),
        figures={name: inline_svg(name, text) for name, text in figures.items()},
        sizes=bool(size_series(results.params, board)),
        not_drawn={cost: left_out_sentence(results, board, cost) for cost in COSTS},
        slices=group_records(parts, "column"),
        slice_sentence=slice_sentence(parts, head.name).replace("*", ""),
        label_errors=_label_errors(root, results),
        alerts=_alerts(results),
        audits=results.audits,
        cut_texts={result.name: result.cut_texts for result in results.models if result.cut_texts},
        counts=results.counts,
        augmented=results.params.augment,
        params=params_file.read_text(encoding="utf-8") if params_file.exists() else "",
        versions=library_versions() | auto_dtypes(results.params),
        **_browser_rows(results),
    )


def _label_errors(root: Path, results: Results) -> dict[str, Any] | None:
    """The rows whose gold label the headline's teacher contradicts: their number, and the worst ones."""
    teacher = results.teacher_of(results.headline)
    errors = read_label_errors(Paths(root).teacher(teacher.key)) if teacher else None
    if errors is None or not len(errors):
        return None
    rows = errors.head(MAX_LABEL_ERRORS).assign(text=[_shorten(text) for text in errors["text"].head(MAX_LABEL_ERRORS)])
    return {
        "rows": rows.to_dict("records"),
        "number": len(errors),
        "by_split": errors["split"].value_counts().to_dict(),
    }


def _alerts(results: Results) -> dict[str, Any] | None:
    """The alerts among the headline's predictions of its first run: their number by label, and the most severe."""
    head = results.headline
    task = results.tasks[head.source]
    if not task.severity or head.probabilities is None:
        return None
    test = results.tests[head.source]
    predictions = {"id": test["id"], "prediction": head.predictions[0], "probabilities": list(head.probabilities[0])}
    alerts = find_alerts(pd.DataFrame(predictions), task)
    rows = alerts.head(MAX_ALERTS).merge(test[["id", "text", "label"]], on="id", how="left")
    return {
        "rows": rows.assign(text=[_shorten(text) for text in rows["text"]]).to_dict("records"),
        "number": len(alerts),
        "tests": len(test),
        "by_label": alerts["alert"].value_counts().to_dict(),
    }


def _browser_rows(results: Results) -> dict[str, Any]:
    """The test rows of the page, their number by kind, and how many are left out."""
    every = disagreements(results)
    rows = every.head(MAX_BROWSER_ROWS).copy()
    for column in rows.columns.intersection(LONG_TEXTS):
        rows[column] = [_shorten(text) for text in rows[column]]
    counts = {kind: int((rows["kind"] == kind).sum()) for kind in ERROR_KINDS}
    return {
        "rows": rows.to_dict("records"),
        "kinds": {kind: number for kind, number in counts.items() if number},
        "left_out": len(every) - len(rows),
    }


def _shorten(text: Any) -> str:
    text = "" if pd.isna(text) else str(text)
    return text if len(text) <= MAX_TEXT_CHARACTERS else text[: MAX_TEXT_CHARACTERS - 1] + "…"


def group_records(rows: pd.DataFrame, key: str) -> dict[str, list[dict[str, Any]]]:
    """The rows of each value of `key`, in their order."""
    return {name: part.to_dict("records") for name, part in rows.groupby(key, sort=False)} if len(rows) else {}


def library_versions() -> dict[str, str]:
    """Python, the machine and the libraries that decide the numbers."""
    versions = {"python": platform.python_version(), "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def auto_dtypes(params: Params) -> dict[str, str]:
    """What `dtype: auto` means on this machine, if `params` has it."""
    specs = [*params.teachers.values(), *params.students.values()]
    if all(spec.dtype != "auto" for spec in specs):
        return {}
    return {"dtype: auto": ", ".join(f"{use} {dtype}" for use, dtype in resolve_dtypes("auto").items())}


def leaderboard_markdown(board: pd.DataFrame) -> str:
    """The leaderboard as the table of a README; of several sources a table for each."""
    parts = by_source(board) if "source" in board else {}
    if len(parts) > 1:
        titled = [f"On the test rows of {source}:\n\n{leaderboard_markdown(part)}" for source, part in parts.items()]
        return "\n\n".join(titled)
    lines = [
        "| model | role | parameters | accuracy | macro-F1 | sentences/s | gain in accuracy over its control, points |",
        "|---|---|--:|--:|--:|--:|---|",
    ]
    for row in board.to_dict("records"):
        speed = row["sentences_per_second"]
        cells = [row["model"], row["role"], human_count(row["parameters"])]
        cells += [
            f"{percent(row[s])} ({100 * row[f'{s}_low']:.1f}–{100 * row[f'{s}_high']:.1f})" for s in metrics.SCORES
        ]
        cells += ["–" if pd.isna(speed) else f"{speed:.0f}"]
        if not row["verdict"] or pd.isna(row["verdict"]):
            cells.append("")
        else:
            low, high = percentage_points(row["difference_low"]), percentage_points(row["difference_high"])
            cells.append(
                f"{percentage_points(row['difference'])} ({low} to {high}) over {row['versus']}: {row['verdict']}"
            )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
