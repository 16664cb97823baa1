"""What class weights, balanced batches and `auto` give on skewed gold rows, over seeds.

    PYTHONPATH=src python benchmarks/imbalanced.py [--seeds 3] [--report-only]

The 3-layer MiniLM of `params.yaml` (student `tiny-gold`, its word vectors frozen) learns 300 gold rows of the finance
corpus, drawn so that 80 % are neutral, 15 % positive and 5 % negative: for 120 optimizer steps of 8 rows, or until the
score on the validation rows stops improving (`steps: auto`, at most 360). Draw, seeds and rows are the same for all.
Each finished run is a line of `imbalanced.csv` beside this file: a stopped benchmark goes on. Prints the optimizer
steps that were run and the scores on the test rows, whose labels are not skewed, as differences from `none` with 95 %
intervals over groups and seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pandas as pd
from keep import commit

from distillery import metrics
from distillery.config.load import load_params
from distillery.config.schema import PhaseConfig
from distillery.data.prepare import PreparedSource, prepare_source
from distillery.files import atomic_write, repository_root
from distillery.models.fetch import fetch_model
from distillery.tasks.schema import Task, load_task
from distillery.training.rows import gold_rows
from distillery.training.run import train_phase, validation_rows
from distillery.training.student import build_student

SHARES, ROWS, STUDENT = {"neutral": 0.8, "positive": 0.15, "negative": 0.05}, 300, "tiny-gold"
PHASE = {"data": ["finance/train"], "loss": {"ce": 1.0}, "learning_rate": 2.0e-4, "batch_size": 8}
FIXED, AUTO = {"steps": 120}, {"steps": "auto", "max_steps": 360}
CHOICES = {
    "none": FIXED,
    "class_weights": FIXED | {"balance": "class_weights"},
    "batches": FIXED | {"balance": "batches"},
    "batches, auto": AUTO | {"balance": "batches"},
}
COLUMNS = ["choice", "seed", "steps", "seconds", "predictions", "commit"]


def skewed_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """`ROWS` of `rows` with the shares of labels of `SHARES`; the same in every run."""
    parts = [
        rows[rows["label"] == label].sample(round(share * ROWS), random_state=0) for label, share in SHARES.items()
    ]
    return pd.concat(parts).reset_index(drop=True)


def run(choice: str, seed: int, prepared: PreparedSource, task: Task, root: Path) -> dict:
    """Train the student once and predict the test rows."""
    params = load_params(root / "params.yaml")
    spec = params.students[STUDENT]
    spec = spec.model_copy(update={"init": spec.init.model_copy(update={"freeze": "embeddings"})})
    split = {part: prepared.rows[prepared.split == part].reset_index(drop=True) for part in ("validation", "test")}
    gold = skewed_rows(prepared.rows[np.isin(prepared.split, ("train", "pool"))])
    origin = params.models[spec.model]
    student = build_student(spec, fetch_model(spec.model, origin), task, seed, origin)
    phase = PhaseConfig(**PHASE | CHOICES[choice])
    watched = validation_rows(split["validation"], task) if phase.stopping else None
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):  # not between the table's lines
        history = train_phase(
            student, gold_rows(gold, task), phase, folder=Path(folder), seed=seed, title=choice, validation=watched
        )
    steps = int(history["step"].max())
    predictions = student.predict(split["test"]["text"].tolist()).argmax(-1)
    return {
        "choice": choice,
        "seed": seed,
        "steps": steps,
        "seconds": round(time.perf_counter() - start, 1),
        "predictions": json.dumps(predictions.tolist(), separators=(",", ":")),
        "commit": commit(root),
    }


def report(table: pd.DataFrame, test: pd.DataFrame, names: list[str]) -> None:
    """Print a line for each choice."""
    shares = test["label"].value_counts(normalize=True)
    print("labels of the test rows: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))
    rows = {choice: part.sort_values("seed") for choice, part in table.groupby("choice", sort=False)}
    predictions = {
        choice: np.array(names, dtype=object)[np.array([json.loads(text) for text in part["predictions"]])]
        for choice, part in rows.items()
    }
    print(f"{'balance':>14} | {'steps':>13} | accuracy, and minus that of `none`  | macro-F1, and minus that of `none`")
    for choice, predicted in predictions.items():
        means = metrics.mean_scores(test["label"], predicted, names)
        same_seeds = rows["none"]["seed"].isin(rows[choice]["seed"]).to_numpy()
        pair = (predicted, predictions["none"][same_seeds])
        difference = metrics.paired_difference(test["label"], *pair, labels=names, groups=test["group"].to_numpy())
        cells = [f"{choice:>14}", f"{', '.join(map(str, rows[choice]['steps'])):>13}"]
        for score, mean in means.items():
            low, high = (f"{100 * difference[score][end]:+.1f}" for end in ("low", "high"))
            change = f", {100 * difference[score]['mean']:+.1f} ({low} to {high}) points" if choice != "none" else ""
            cells.append(f"{mean:.1%}{change}".ljust(35))
        print(" | ".join(cells).rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--report-only", action="store_true", help="print the runs that the table has, train nothing")
    settings = parser.parse_args()
    seeds = range(settings.seeds)
    root, path = repository_root(), Path(__file__).with_suffix(".csv")
    spec = load_params().data["finance"]
    task = load_task(spec.task, root / "tasks")
    prepared = prepare_source("finance", spec, task, root)
    table = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=COLUMNS)
    for seed in seeds:
        for choice in CHOICES:
            done = ((table["choice"] == choice) & (table["seed"] == seed)).any()
            if not done and not settings.report_only:
                record = run(choice, seed, prepared, task, root)
                table = pd.concat([table, pd.DataFrame([record], columns=COLUMNS)], ignore_index=True)
                with atomic_write(path) as scratch:
                    table.to_csv(scratch, index=False)
    table = table[table["seed"].isin(seeds)]
    report(table, prepared.rows[prepared.split == "test"].reset_index(drop=True), task.names)


if __name__ == "__main__":
    main()
