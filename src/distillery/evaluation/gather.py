"""Read the predictions and signals of all that params.yaml names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from distillery.config.schema import Params
from distillery.data.storage import read_split, read_task
from distillery.errors import UserError
from distillery.evaluation.checks import find_contamination, find_leaks, find_shortcut
from distillery.evaluation.reading import read_result_file
from distillery.evaluation.results import TRAINED_ROLES, ModelResult, Results, main_teacher

UNPARSABLE = "no readable answer"


def _align_rows(rows: pd.DataFrame, split: str, wanted: pd.DataFrame, path: Path, root: Path) -> pd.DataFrame:
    """`rows` of `split` in the order of `wanted`. Raises UserError when they are not about exactly those rows."""
    rows = rows[rows["split"] == split]
    if rows["id"].duplicated().any() or set(rows["id"]) != set(wanted["id"]):
        name = path.relative_to(root)
        raise UserError(f"{name}: not the {split} rows of now; `dvc repro` brings it up to date")
    return rows.set_index("id").loc[wanted["id"]].reset_index()


def _stack_probabilities(tables: Sequence[pd.DataFrame]) -> np.ndarray:
    return np.stack([np.stack(t["probabilities"].to_numpy()) for t in tables]).astype(np.float64)


def _stack_predictions(tables: Sequence[pd.DataFrame]) -> dict[str, np.ndarray]:
    predicted = np.stack([t["prediction"].to_numpy(dtype=object) for t in tables])
    tokens = {
        k: float(np.mean([t[k].mean() for t in tables])) for k in TOKEN_SCORES if k in tables[0]
    }  # of free answers
    written = tables[0]["answer"].to_numpy(dtype=object) if "answer" in tables[0] else None
    return {"predicted": predicted, "probabilities": _stack_probabilities(tables), "tokens": tokens, "written": written}


def _read_timing(folders: Sequence[Path], key: str) -> dict[str, float | None]:
    """Training time (mean) and peak memory (largest) as the runs in `folders` noted them; None where they did not."""
    found = [json.loads(path.read_text()) for f in folders if (path := f / "timing.json").exists()]
    seconds, memory = ([t[k] for t in found if k in t] for k in (key, "peak_memory_mb"))
    return {"seconds": float(np.mean(seconds)) if seconds else None, "training_mb": max(memory, default=None)}


def gather_results(root: Path, params: Params) -> Results:
    """Read the predictions of everything that params names, and nothing else (a removed student is gone).

    Raises UserError when a run's files are missing or belong to other rows.
    """
    students = {name: params.test_source(name) for name in params.students}
    sources = [s for s in params.data if s in students.values()]
    asked = {s: read_task(root / f"data/processed/{s}") for s in sources}
    labels = {s: task.names for s, task in asked.items()}
    # Free answers are right or wrong: there is no answer to be given always, and none to lean on.
    closed = [s for s in sources if asked[s].kind != "qa"]
    tests = {s: read_split(root / f"data/processed/{s}", "test") for s in sources}
    validations = {s: read_split(root / f"data/processed/{s}", "validation") for s in sources}
    controls = {spec.control for spec in params.students.values()}
    scored, history, signals, begun = [], [], {}, {}

    for name, source in students.items():
        spec, folders = params.students[name], [root / f"runs/{name}-{seed}" for seed in params.seeds]
        facts = [read_result_file(folder / "metrics.json", root) for folder in folders]
        common = {"source": source, "teacher": main_teacher(params, name), "parameters": facts[0].get("parameters")}
        paths = [folder / "predictions.parquet" for folder in folders]
        said = [read_result_file(path, root) for path in paths]
        test, validation = (
            [_align_rows(rows, split, wanted, path, root) for rows, path in zip(said, paths, strict=True)]
            for split, wanted in (("test", tests[source]), ("validation", validations[source]))
        )
        role = "control" if name in controls and not any(phase.teachers for phase in spec.phases) else "student"
        size = {"bytes": facts[0].get("bytes_on_disk"), "trainable": facts[0].get("trainable_parameters")}
        more = size | _read_timing(folders, "train_seconds") | {"validation": _stack_probabilities(validation)}
        scored.append(ModelResult(name, name, role, **common, control=spec.control, **more, **_stack_predictions(test)))
        for seed, folder in zip(params.seeds, folders, strict=True):
            history.append(_read_history(folder / "history.csv", root).assign(model=name, seed=seed))

        # Students that start from the same model in the same way share their untrained scores: one line is enough.
        start = (spec.model, spec.arch, str(spec.init), spec.prompt, spec.few_shot, spec.dtype, source)
        if start not in begun:
            before = [read_result_file(folder / "phases.parquet", root) for folder in folders]
            before = [rows[rows["phase"] == 0] for rows in before]
            if all((rows["split"] == "test").any() for rows in before):
                path = folders[0] / "phases.parquet"
                before = [_align_rows(rows, "test", tests[source], path, root) for rows in before]
                begun[start] = ModelResult(
                    f"{name}, untrained", name, "untrained", **common, **_stack_predictions(before)
                )

    for teacher in params.teachers:
        for source in [s for s in sources if s in params.teacher_sources(teacher)]:
            folder = root / f"data/teacher/{teacher}"
            rows = read_result_file(folder / "signals.parquet", root).rename(columns={"label": "prediction"})
            rows, path = rows[rows["source"] == source], folder / "signals.parquet"
            wanted = {*tests[source]["id"], *validations[source]["id"]}
            if params.teachers[teacher].kind == "answers" and not wanted <= set(rows["id"]):
                continue  # a file that answers some of the rows cannot be compared with models that answer all
            test = signals[teacher, source] = _align_rows(rows, "test", tests[source], path, root)
            validation = _align_rows(rows, "validation", validations[source], path, root)
            facts = read_result_file(folder / "metrics.json", root)
            name = teacher if teacher not in params.students else f"{teacher}, teacher"
            name = name if len(sources) == 1 else f"{name} on {source}"
            size = {"parameters": facts.get("parameters"), "bytes": facts.get("bytes_on_disk")}
            more = size | _read_timing([folder], "seconds") | {"validation": _stack_probabilities([validation])}
            scored.append(ModelResult(name, teacher, "teacher", source, **_stack_predictions([test]), **more))

    for source in closed:
        train = read_split(root / f"data/processed/{source}", "train")
        commonest = (train if len(train) else tests[source])["label"].mode()[0]  # the first of equals: deterministic
        name = f"always {commonest}" if len(sources) == 1 else f"always {commonest} on {source}"
        constant = np.full((1, len(tests[source])), commonest, dtype=object)
        scored.append(ModelResult(name, source, "majority", source, constant))

    counts = root / f"data/augmented/{params.augment.source}/counts.json"
    checks = [check for source in sources for check in find_leaks(root, params, source, tests[source])]
    checks += [
        check for line in scored if line.role == "teacher" for check in find_contamination(root, params, line, tests)
    ]
    checks += [find_shortcut(line, tests[line.source]["label"]) for line in scored
               if line.role in TRAINED_ROLES and line.source in closed]  # fmt: skip
    return Results(
        params=params,
        tasks=asked,
        labels=labels,
        tests=tests,
        validations=validations,
        scored=scored + list(begun.values()),
        signals=signals,
        history=pd.concat(history, ignore_index=True)[["model", "seed", "phase", "step", "loss"]],
        audits={s: read_result_file(root / f"data/processed/{s}/audit.json", root) for s in sources},
        counts=read_result_file(counts, root) if params.augment.per_row and counts.exists() else None,
        checks=checks,
    )


def _read_history(path: Path, root: Path) -> pd.DataFrame:
    """Phase, step, loss of one run, the steps counted through its phases."""
    try:
        rows = read_result_file(path, root)[["phase", "step", "loss"]]
    except pd.errors.EmptyDataError:
        return pd.DataFrame({"phase": [], "step": [], "loss": []})
    parts, done = [], 0
    for _, part in rows.groupby("phase", sort=True):
        part = part.assign(step=part["step"] + (done if len(part) and part["step"].min() <= done else 0))
        done = part["step"].max()
        parts.append(part)
    return pd.concat(parts) if parts else rows


TOKEN_SCORES = ("token_f1", "token_precision", "token_recall")
