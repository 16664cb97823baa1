"""In how many of its last layers a teacher needs adapters: accuracy and time of fine-tuning, over seeds.

    PYTHONPATH=src python benchmarks/adapter_layers.py [--adapters all last-15 ...] [--seeds 3] [--teacher smollm2]

SmolLM2, or a teacher of `params.yaml`, is fine-tuned on gold rows, with adapters in all layers or in the last N alone
(`last-N/all-linear`: on every linear layer of these). Each finished run is a line of `adapter_layers.csv` beside this
file: a stopped benchmark goes on. Prints for each choice seconds and operations of a training run, accuracy on the
validation rows (on which the choice is made), and on the test rows the difference from adapters in all layers: same
seeds, same rows, 95 % interval over groups of rows.
The kept operations were counted without those of attention on a CPU, which the counter knows since.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from keep import commit
from operations import count_operations
from smollm2 import TUNED_TEACHER

from distillery import metrics
from distillery.config.load import load_params
from distillery.config.schema import TeacherConfig
from distillery.data.prepare import prepare_source
from distillery.files import atomic_write, repository_root
from distillery.tasks.schema import load_task
from distillery.teachers.finetune import finetune_teacher

CHOICES = ["all", "last-20", "last-15", "last-10", "last-6"]
COLUMNS = ["teacher", "adapters", "seed", "seconds", "tflop", "validation", "test_right", "commit"]


def teacher_config(name: str) -> TeacherConfig:
    """The teacher `name` of params.yaml, or SmolLM2 tuned on the gold rows."""
    teachers = load_params().teachers | {"smollm2": TeacherConfig.model_validate(TUNED_TEACHER)}
    return teachers[name]


def run(name: str, adapters: str, seed: int, root: Path) -> dict:
    """Fine-tune teacher `name` once and score it."""
    params, spec = load_params(), teacher_config(name)
    layers, _, targets = adapters.partition("/")
    lora = spec.finetune.lora.model_copy(update={"layers": layers} | ({"targets": targets} if targets else {}))
    spec = spec.model_copy(update={"seed": seed, "finetune": spec.finetune.model_copy(update={"lora": lora})})
    params = params.model_copy(update={"teachers": {name: spec}})
    source, _, split = spec.finetune.on.partition("/")
    task = load_task(params.data[source].task, root / "tasks")
    prepared = prepare_source(source, params.data[source], task, root)
    parts = {part: prepared.rows[prepared.split == part] for part in (split, "validation", "test")}
    gold = parts[split].assign(source=source, split=split).reset_index(drop=True)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, count_operations() as counter:
        teacher, _ = finetune_teacher(name, params, task, gold, folder=Path(folder))
    seconds = time.perf_counter() - start
    right = {}
    for part in ("validation", "test"):
        prediction = np.array(task.names)[teacher.predict(parts[part]["text"].tolist()).argmax(-1)]
        right[part] = (prediction == parts[part]["label"].to_numpy()).astype(int)
    return {
        "teacher": name,
        "adapters": adapters,
        "seed": seed,
        "seconds": round(seconds, 1),
        "tflop": round(counter.get_total_flops() / 1e12, 3),
        "validation": round(float(right["validation"].mean()), 4),
        "test_right": json.dumps(right["test"].tolist(), separators=(",", ":")),
        "commit": commit(root),
    }


def report(table: pd.DataFrame, groups: np.ndarray) -> None:
    """Print a line for each choice."""
    seeds = {adapters: rows.set_index("seed") for adapters, rows in table.groupby("adapters", sort=False)}
    print(
        "       adapters in | seconds | TFLOP | validation accuracy (mean of seeds) | test accuracy minus that of `all`"
    )
    for adapters, rows in seeds.items():
        shared = [seed for seed in rows.index if "all" in seeds and seed in seeds["all"].index]
        line = f"{adapters:>18} | {rows['seconds'].mean():7.0f} | {rows['tflop'].mean():5.2f} | "
        line += f"{rows['validation'].mean():.3f} ({', '.join(f'{v:.3f}' for v in rows['validation'])})"
        if adapters != "all" and shared:
            right = [
                np.mean([json.loads(seeds[choice]["test_right"][seed]) for seed in shared], 0)
                for choice in (adapters, "all")
            ]
            low, high = metrics.interval(metrics.cluster_bootstrap(right[0] - right[1], groups))
            line += f" | {100 * (right[0] - right[1]).mean():+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", nargs="*", default=CHOICES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--teacher", default="smollm2")
    settings = parser.parse_args()
    root, path = repository_root(), Path(__file__).with_suffix(".csv")
    table = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=COLUMNS)
    for seed in range(settings.seeds):
        for adapters in settings.adapters:
            key = (table["teacher"] == settings.teacher) & (table["adapters"] == adapters) & (table["seed"] == seed)
            if not key.any():
                record = run(settings.teacher, adapters, seed, root)
                table = pd.concat([table, pd.DataFrame([record], columns=COLUMNS)], ignore_index=True)
                with atomic_write(path) as scratch:
                    table.to_csv(scratch, index=False)
    source = teacher_config(settings.teacher).finetune.on.partition("/")[0]
    spec = load_params().data[source]
    prepared = prepare_source(source, spec, load_task(spec.task, root / "tasks"), root)
    table = table[table["teacher"] == settings.teacher]
    report(table, prepared.rows["group"][prepared.split == "test"].to_numpy())


if __name__ == "__main__":
    main()
