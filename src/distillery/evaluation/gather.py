"""Read the predictions and signals of everything that params.yaml names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from distillery.config.schema import Params
from distillery.data.storage import read_split, read_task
from distillery.errors import UserError
from distillery.evaluation.checks import run_checks
from distillery.evaluation.reading import read_result_file
from distillery.evaluation.results import ModelResult, Results, main_teacher
from distillery.files import Paths

UNPARSABLE = "no readable answer"

VALIDATION_COLUMNS = ("validation_loss", "validation_accuracy")  # of a history, where a training looked at them

TOKEN_SCORES = ("token_f1", "token_precision", "token_recall")  # of free answers

HELD_OUT = ("test", "validation")


def gather_results(root: Path, params: Params) -> Results:
    """Read the predictions of everything that params names, and nothing else (a removed student is gone).

    A student's predictions are those of its own source; :func:`add_further_sources` adds those of others.

    Raises UserError when a run's files are missing or belong to other rows.
    """
    own = {params.test_source(name) for name in params.students}
    further = {source for name in params.students for source in params.other_test_sources(name)}
    sources = [source for source in params.data if source in own | further]
    held_out = {split: {s: read_split(Paths(root).processed(s), split) for s in sources} for split in HELD_OUT}
    sources = [source for source in sources if source in own or len(held_out["test"][source])]
    held_out = {split: {source: rows[source] for source in sources} for split, rows in held_out.items()}
    tasks, tests = {source: read_task(Paths(root).processed(source)) for source in sources}, held_out["test"]
    # Free answers are right or wrong: a model cannot always give one of them, nor prefer it.
    labelled = [source for source in sources if tasks[source].kind != "qa"]
    names = {source: tasks[source].names for source in labelled}
    students = [_student_result(root, params, name, held_out) for name in params.students]
    teachers = _teacher_results(root, params, held_out)
    models = [*students, *(result for result, _ in teachers)]
    models += [_majority_result(root, source, tests) for source in labelled]
    counts = Paths(root).augmented(params.augment.source) / "counts.json"
    return Results(
        params=params,
        tasks=tasks,
        labels={source: task.names for source, task in tasks.items()},
        tests=tests,
        validations=held_out["validation"],
        models=models + _untrained_results(root, params, students, tests),
        signals={(result.key, result.source): signals for result, signals in teachers},
        history=_read_histories(root, params),
        audits={s: read_result_file(Paths(root).processed(s) / "audit.json", root) for s in sources},
        counts=read_result_file(counts, root) if params.augment.per_row and counts.exists() else None,
        checks=run_checks(root, params, models, tests, names),
    )


def _student_result(root: Path, params: Params, name: str, held_out: dict[str, dict[str, pd.DataFrame]]) -> ModelResult:
    spec, source = params.students[name], params.test_source(name)
    folders = _run_folders(root, params, name)
    metadata = [read_result_file(folder / "metrics.json", root) for folder in folders][0]
    paths = [folder / "predictions.parquet" for folder in folders]
    tables = [read_result_file(path, root) for path in paths]
    test, validation = (
        [
            _align_rows(rows, split, held_out[split][source], path, root)
            for rows, path in zip(tables, paths, strict=True)
        ]
        for split in HELD_OUT
    )
    is_control = name in {other.control for other in params.students.values()}
    return ModelResult(
        name,
        name,
        "control" if is_control and not any(phase.teachers for phase in spec.phases) else "student",
        source,
        **stack_predictions(test),
        validation=_stack_probabilities(validation),
        parameters=metadata.get("parameters"),
        trainable=metadata.get("trainable_parameters"),
        size_bytes=metadata.get("bytes_on_disk"),
        cut_texts=metadata.get("cut_texts"),
        **_read_timing(folders, "train_seconds"),
        teacher=main_teacher(params, name),
        control=spec.control,
    )


def _untrained_results(
    root: Path, params: Params, students: list[ModelResult], tests: dict[str, pd.DataFrame]
) -> list[ModelResult]:
    """One result for all the students that start from the same model in the same way: their scores are equal."""
    results = {}
    for student in students:
        spec, name, source = params.students[student.key], student.name, student.source
        start = (spec.model, spec.arch, str(spec.init.layers), spec.prompt, spec.few_shot, spec.dtype, source)
        if start in results:
            continue
        paths = [folder / "phases.parquet" for folder in _run_folders(root, params, name)]
        tables = [rows[rows["phase"] == 0] for rows in (read_result_file(path, root) for path in paths)]
        if all((rows["split"] == "test").any() for rows in tables):
            aligned = [_align_rows(rows, "test", tests[source], paths[0], root) for rows in tables]
            origin = {"parameters": student.parameters, "teacher": student.teacher}
            results[start] = ModelResult(
                f"{name}, untrained", name, "untrained", source, **stack_predictions(aligned), **origin
            )
    return list(results.values())


def _teacher_results(
    root: Path, params: Params, held_out: dict[str, dict[str, pd.DataFrame]]
) -> list[tuple[ModelResult, pd.DataFrame]]:
    """Each teacher on each source that it labels, and its signals for the test rows, in their order."""
    results, sources = [], list(held_out["test"])
    for teacher in params.teachers:
        folder = Paths(root).teacher(teacher)
        path = folder / "signals.parquet"
        for source in [s for s in sources if s in params.teacher_sources(teacher)]:
            rows = read_result_file(path, root).rename(columns={"label": "prediction"})
            rows = rows[rows["source"] == source]
            needed = {row_id for split in HELD_OUT for row_id in held_out[split][source]["id"]}
            if params.teachers[teacher].kind == "answers" and not needed <= set(rows["id"]):
                continue  # a file that answers some of the rows cannot be compared with models that answer all
            test, validation = (_align_rows(rows, split, held_out[split][source], path, root) for split in HELD_OUT)
            metadata = read_result_file(folder / "metrics.json", root)
            name = teacher if teacher not in params.students else f"{teacher}, teacher"
            result = ModelResult(
                name if len(sources) == 1 else f"{name} on {source}",
                teacher,
                "teacher",
                source,
                **stack_predictions([test]),
                validation=_stack_probabilities([validation]),
                parameters=metadata.get("parameters"),
                size_bytes=metadata.get("bytes_on_disk"),
                cut_texts=metadata.get("cut_texts"),
                tokens_per_row=metadata.get("tokens_per_row"),
                **_read_timing([folder], "seconds"),
            )
            results.append((result, test))
    return results


def _majority_result(root: Path, source: str, tests: dict[str, pd.DataFrame]) -> ModelResult:
    """The most frequent label of the train rows for every test row; the first of equally frequent ones."""
    train = read_split(Paths(root).processed(source), "train")
    label = (train if len(train) else tests[source])["label"].mode()[0]
    name = f"always {label}" if len(tests) == 1 else f"always {label} on {source}"
    return ModelResult(name, source, "majority", source, np.full((1, len(tests[source])), label, dtype=object))


def _run_folders(root: Path, params: Params, student: str) -> list[Path]:
    return [Paths(root).run(student, seed) for seed in params.seeds]


def _align_rows(rows: pd.DataFrame, split: str, expected: pd.DataFrame, path: Path, root: Path) -> pd.DataFrame:
    """`rows` of `split` in the order of `expected`. Raises UserError when their ids are not exactly those."""
    rows = rows[rows["split"] == split]
    if rows["id"].duplicated().any() or set(rows["id"]) != set(expected["id"]):
        raise UserError(f"{path.relative_to(root)}: other {split} rows than data/processed has now; run `dvc repro`")
    return rows.set_index("id").loc[expected["id"]].reset_index()


def _stack_probabilities(tables: Sequence[pd.DataFrame]) -> np.ndarray | None:
    """The probabilities [seeds, rows, K]; None where there are no rows, as in a source without validation rows."""
    if not len(tables[0]):
        return None
    return np.stack([np.stack(t["probabilities"].to_numpy()) for t in tables]).astype(np.float64)


def stack_predictions(tables: Sequence[pd.DataFrame]) -> dict[str, Any]:
    """The fields of a :class:`ModelResult` that the tables of its seeds hold."""
    present = [score for score in TOKEN_SCORES if score in tables[0]]
    return {
        "predictions": np.stack([t["prediction"].to_numpy(dtype=object) for t in tables]),
        "probabilities": _stack_probabilities(tables),
        "token_scores": {score: float(np.mean([t[score].mean() for t in tables])) for score in present},
        "answers": tables[0]["answer"].to_numpy(dtype=object) if "answer" in tables[0] else None,
    }


def _read_timing(folders: Sequence[Path], key: str) -> dict[str, float | None]:
    """Training time (mean) and peak memories (largest) that the runs in `folders` recorded; None where none did."""
    records = [json.loads(path.read_text()) for f in folders if (path := f / "timing.json").exists()]
    keys = (key, "peak_memory_mb", "peak_gpu_memory_mb")
    seconds, memory, on_gpu = ([record[k] for record in records if k in record] for k in keys)
    return {
        "seconds": float(np.mean(seconds)) if seconds else None,
        "training_mb": max(memory, default=None),
        "training_gpu_mb": max(on_gpu, default=None),
    }


def _read_histories(root: Path, params: Params) -> pd.DataFrame:
    """Model, seed, phase, step, loss of every run; validation_loss and validation_accuracy where a run has them."""
    tables = [
        _read_history(folder / "history.csv", root).assign(model=name, seed=seed)
        for name in params.students
        for seed, folder in zip(params.seeds, _run_folders(root, params, name), strict=True)
    ]
    columns = [name for name in VALIDATION_COLUMNS if any(name in table for table in tables)]
    return pd.concat(tables, ignore_index=True)[["model", "seed", "phase", "step", "loss", *columns]]


def _read_history(path: Path, root: Path) -> pd.DataFrame:
    """Phase (from 1), step, loss and any validation scores of one run, the steps counted through its phases."""
    try:
        rows = read_result_file(path, root)
        rows = rows[["phase", "step", "loss", *(name for name in VALIDATION_COLUMNS if name in rows)]]
    except pd.errors.EmptyDataError:
        return pd.DataFrame({"phase": [], "step": [], "loss": []})
    parts, done = [], 0
    for _, part in rows.groupby("phase", sort=True):
        part = part.assign(step=part["step"] + (done if len(part) and part["step"].min() <= done else 0))
        done = part["step"].max()
        parts.append(part)
    return pd.concat(parts) if parts else rows
