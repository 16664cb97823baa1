"""Is one teacher of a run better than the others? Paired, on its test rows.

    PYTHONPATH=src python benchmarks/teacher_pairs.py FOLDER [TEACHER ...]

FOLDER is that of a finished run, such as `.cache/recipes/qwen-gkd-tuned`. All teachers are compared with each TEACHER;
without one, with the first of its params.yaml.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from distillery.config.load import load_params
from distillery.data.storage import read_task
from distillery.errors import UserError
from distillery.files import Paths
from distillery.metrics import mean_scores
from distillery.metrics.significance import paired_difference


def predicted_labels(root: Path, teacher: str, source: str) -> pd.Series:
    """Row id -> the label that `teacher` predicts, for the test rows of `source`."""
    signals = pd.read_parquet(Paths(root).teacher(teacher) / "signals.parquet")
    signals = signals[(signals["source"] == source) & (signals["split"] == "test")]
    return signals.set_index("id")["label"]


def compare(test: pd.DataFrame, predictions: dict[str, pd.Series], baseline: str, names: Sequence[str]) -> pd.DataFrame:
    """A line for each teacher: its scores on `test` (id, label, group), and its paired gain over `baseline`."""
    lines, labels = [], test["label"].tolist()
    predicted = {teacher: of_row.loc[test["id"]].tolist() for teacher, of_row in predictions.items()}
    for teacher, own in predicted.items():
        scores = mean_scores(labels, own, names)
        line = {"teacher": teacher, "accuracy": f"{scores['accuracy']:.1%}", "macro-F1": f"{scores['macro_f1']:.1%}"}
        for score in ("accuracy", "macro_f1"):
            gain = paired_difference(labels, own, predicted[baseline], names, test["group"])[score]
            mean, low, high = (100 * gain[key] for key in ("mean", "low", "high"))
            line[f"gain in {score.replace('_f1', '-F1')}"] = f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"
        lines.append(line)
    return pd.DataFrame(lines)


def main(folder: str, *baselines: str) -> None:
    root = Path(folder)
    params = load_params(root / "params.yaml")
    for baseline in baselines:
        if baseline not in params.teachers:
            raise UserError(f"{folder}: no teacher `{baseline}`; there are: {', '.join(params.teachers)}")
    for source in params.data:
        processed = Paths(root).processed(source)
        test, task = pd.read_parquet(processed / "test.parquet"), read_task(processed)
        teachers = [teacher for teacher in params.teachers if source in params.teacher_sources(teacher)]
        predictions = {teacher: predicted_labels(root, teacher, source) for teacher in teachers}
        for baseline in baselines or list(params.teachers)[:1]:
            if baseline not in teachers:
                print(f"{source}: {baseline} does not label it\n")
                continue
            print(f"{source}: {len(test)} test rows; gains over {baseline} in points, with 95 % intervals\n")
            print(compare(test, predictions, baseline, task.names).to_string(index=False) + "\n")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except UserError as mistake:
        sys.exit(f"error: {mistake}")
