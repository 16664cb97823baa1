"""Label sets of real news: what a teacher on unlabelled headlines gives a small student, beside gold label sets alone.

    PYTHONPATH=src python benchmarks/multilabel.py FILE [--seeds 1] [--rows 3000] [--steps 500]

FILE is `gold-dataset-sinha-khandait.csv`, the gold news of Sinha and Khandait (2021): headlines with a column of 1 and
0 for each of six labels. It is no part of this repository. A random part of its rows is split by groups of
near-duplicates. MiniLM with 6 layers is tuned on the gold rows and labels the pool; its layers 0, 2 and 5 learn from
it, and as the control, for as many steps, from the gold rows alone. All of it is an experiment of its own in
`.cache/benchmarks/multilabel`, whose stages run as those of any other; a run that was stopped goes on. Prints the
scores on the test rows with 95 % intervals over groups (and seeds) beside those of a constant answer, the commonest
gold set, and the verdict of the leaderboard.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from distillery import metrics
from distillery.config.load import load_params
from distillery.data.label_sets import label_counts
from distillery.data.storage import read_split
from distillery.evaluation.gather import gather_results
from distillery.evaluation.leaderboard import leaderboard
from distillery.files import Paths, read_yaml, repository_root
from distillery.label_sets import LabelSets
from distillery.pipeline.recipe import prepare_folder, run_recipe

LABELS = {  # of the task, by column
    "Price Direction Up": "up",
    "Price Direction Constant": "constant",
    "Price Direction Down": "down",
    "Asset Comparision": "comparison",
    "Past Information": "past",
    "Future Information": "future",
}
TASK = """kind: multilabel
labels:
  up: the price rose or will rise
  constant: the price stayed or will stay as it is
  down: the price fell or will fall
  comparison: gold is compared with another asset
  past: it is about the past
  future: it is about the future
"""
DATA, MODEL = "data/news.csv", {"model": "minilm-l6", "max_length": 48}
SHARES = {"train": 0.15, "pool": 0.5, "validation": 0.1, "test": 0.25}


def experiment(root: Path, seeds: int, rows: int, steps: int) -> dict:
    """The params.yaml of the benchmark."""
    student = MODEL | {"arch": "classifier", "init": {"layers": [0, 2, 5]}}
    last = max(1, steps // 10)
    taught = {"teachers": ["encoder"], "temperature": 2.0, "batch_size": 16}
    phases = [
        {"data": ["news/pool"], "loss": {"kl": 1.0}, "steps": steps - last, "learning_rate": 4.0e-4} | taught,
        {"data": ["news/train"], "loss": {"ce": 0.5, "kl": 0.5}, "steps": last, "learning_rate": 1.0e-4} | taught,
    ]
    gold = {"data": ["news/train"], "loss": {"ce": 1.0}, "steps": steps, "learning_rate": 4.0e-4, "batch_size": 16}
    tuned = {"on": "news/train", "epochs": 12, "learning_rate": 3.0e-4, "batch_size": 16}
    columns = {"text": "News", "label_columns": list(LABELS), "values": LABELS}
    return {
        "seeds": list(range(seeds)),
        "data": {"news": {"source": DATA, "task": "news", "limit": rows, "split": SHARES, "columns": columns}},
        "models": {"minilm-l6": read_yaml(root / "params.yaml")["models"]["minilm-l6"]},
        "teachers": {"encoder": MODEL | {"kind": "classifier", "finetune": tuned}},
        "augment": {"source": "news", "teacher": "encoder", "per_row": 0},
        "students": {
            "taught": student | {"control": "gold-only", "phases": phases},
            "gold-only": student | {"phases": [gold]},
        },
        "evaluate": {"headline": "taught"},
    }


def run(root: Path, file: Path, raw: dict) -> Path:
    """Run the experiment `raw` on `file`; returns its folder. Exits when a stage fails."""
    folder = Paths(root).cache / "benchmarks/multilabel"
    prepare_folder(root, raw, folder, "multilabel", {DATA: file.read_bytes(), "tasks/news.yaml": TASK.encode()})
    if status := run_recipe(folder, sys.stderr):
        sys.exit(status)
    return folder


def score_cells(label: ArrayLike, predictions: np.ndarray, labels: LabelSets, groups: ArrayLike) -> dict[str, str]:
    """The scores of predictions [seeds, rows], and F1 of each label, with their intervals."""
    columns = {f"F1 {name}": ("macro_f1", LabelSets([name])) for name in labels}
    columns = {name: (name, labels) for name in ("accuracy", "micro_f1", "macro_f1")} | columns
    cells = {}
    for column, (score, names) in columns.items():
        of_names = [[names.text(value) for value in values] for values in (label, *predictions)]
        gold, predicted = np.array(of_names[0], dtype=object), np.array(of_names[1:], dtype=object)
        mean = metrics.mean_scores(gold, predicted, names)[score]
        low, high = metrics.interval(metrics.bootstrap_scores(gold, predicted, names, groups)[score])
        cells[column] = f"{mean:.1%} ({100 * low:.1f}–{100 * high:.1f})"
    return cells


def report(folder: Path) -> None:
    """Print the scores of teacher, students and the constant answer, and the verdict of the leaderboard."""
    params = load_params(folder / "params.yaml")
    results, processed = gather_results(folder, params), Paths(folder).processed("news")
    test, labels = results.tests["news"], LabelSets(LABELS.values())
    sizes = {split: len(read_split(processed, split)) for split in SHARES}
    constant = Counter(read_split(processed, "train")["label"]).most_common(1)[0][0]
    print(f"rows: {', '.join(f'{split} {n:,}' for split, n in sizes.items())}; {test['group'].nunique():,} test groups")
    counts = label_counts(test["label"], labels)
    print(f"test rows with each label: {', '.join(f'{name} {n:,}' for name, n in counts.items())}")
    print(f"constant answer: {constant}\n")
    label, groups = test["label"].to_numpy(dtype=object), test["group"].to_numpy()
    rows = {model.name: score_cells(label, model.predictions, labels, groups) for model in results.models}
    rows["constant"] = score_cells(label, np.full((1, len(label)), constant, dtype=object), labels, groups)
    names = list(rows)
    print("| | " + " | ".join(name.replace(" | ", " and ") for name in names) + " |\n|---|" + "--:|" * len(names))
    for column in rows["constant"]:
        print(f"| {column} | " + " | ".join(rows[name][column] for name in names) + " |")
    board = leaderboard(results).set_index("model").loc["taught"]
    for score, prefix in (("sets that are right", "difference"), ("micro-F1", "micro_f1_difference")):
        mean, low, high = (100 * board[f"{prefix}{end}"] for end in ("", "_low", "_high"))
        print(f"\n{score}, taught minus {board['versus']}: {mean:+.1f} ({low:+.1f} to {high:+.1f}) points", end="")
    print(f"\np {board['p']:.3f}, verdict: {board['verdict']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=500)
    arguments = parser.parse_args()
    root = repository_root()
    raw = experiment(root, arguments.seeds, arguments.rows, arguments.steps)
    report(run(root, arguments.file, raw))


if __name__ == "__main__":
    main()
