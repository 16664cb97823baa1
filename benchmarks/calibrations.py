"""What does calibration without a gold label give a prompted LLM, and how many rows does it take?

    PYTHONPATH=src python benchmarks/calibrations.py

The teacher is Qwen2.5-Coder-1.5B by its kept answers, `data/answers/finance-qwen.jsonl`. Each calibration sees its
probabilities for the pool, or for a random part of it, and no label. Prints scores on the test rows, with paired gains.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from gkd_arms import ANSWERS, kept_probabilities

from distillery.config.load import validate_section
from distillery.config.schema import SourceConfig
from distillery.data.prepare import prepare_source
from distillery.files import read_yaml, repository_root
from distillery.metrics import mean_scores
from distillery.metrics.calibration import log_loss
from distillery.metrics.significance import paired_difference
from distillery.tasks.schema import load_task
from distillery.teachers.calibration import LabelPrior, calibrated, fit_clusters

RECIPE = "recipes/qwen-label-free.yaml"
FITS = {"none": lambda p: None, "batch": lambda p: LabelPrior(p.mean(0)), "clusters": fit_clusters}
PARTS, DRAWS = (100, 200, 400, 800), 10


def main() -> None:
    root = repository_root()
    source = validate_section(SourceConfig, read_yaml(root / RECIPE)["data"]["finance"], RECIPE)
    task = load_task(source.task, root / "tasks")
    prepared = prepare_source("finance", source, task, root)
    rows, answers = prepared.rows.assign(split=prepared.split), kept_probabilities(root / ANSWERS, task)
    probabilities = np.array([answers[row_id] for row_id in rows["id"]])
    pool, test = probabilities[rows["split"] == "pool"], rows[rows["split"] == "test"]
    p, labels, names = probabilities[rows["split"] == "test"], test["label"].tolist(), task.names
    gold = np.array([names.index(label) for label in labels])
    results = {kind: calibrated(p, fit(pool)) for kind, fit in FITS.items()}
    predictions = {kind: [names[i] for i in q.argmax(1)] for kind, q in results.items()}
    lines = []
    for kind, q in results.items():
        scores = mean_scores(labels, predictions[kind], names)
        gain = paired_difference(labels, predictions[kind], predictions["batch"], names, test["group"])["accuracy"]
        mean, low, high = (100 * gain[key] for key in ("mean", "low", "high"))
        lines.append(
            {
                "calibrate": kind,
                "accuracy": f"{scores['accuracy']:.1%}",
                "macro-F1": f"{scores['macro_f1']:.1%}",
                "log loss": f"{log_loss(gold, q):.3f}",
                "confidence": f"{q.max(1).mean():.3f}",
                "gain over batch, points": "" if kind == "batch" else f"{mean:+.1f} ({low:+.1f} to {high:+.1f})",
            }
        )
    print(f"{len(test)} test rows; calibrated on {len(pool)} rows of the pool\n")
    print(pd.DataFrame(lines).to_string(index=False))
    print(f"\naccuracy after {DRAWS} random parts of the pool: mean (lowest)\n")
    rng, table = np.random.default_rng(0), []
    for size in PARTS:
        drawn = [pool[rng.choice(len(pool), size, replace=False)] for _ in range(DRAWS)]
        accuracies = {
            kind: [float((FITS[kind](part).apply(p).argmax(1) == gold).mean()) for part in drawn]
            for kind in ("batch", "clusters")
        }
        cells = {kind: f"{np.mean(values):.1%} ({min(values):.1%})" for kind, values in accuracies.items()}
        table.append({"rows": size} | cells)
    print(pd.DataFrame(table).to_string(index=False))


if __name__ == "__main__":
    main()
