"""How much a prompt matters: SmolLM2 without any training on the finance corpus, with several prompts.

    PYTHONPATH=src python benchmarks/prompts.py [validation and test rows, 100 by default]

Every prompt of the task file, with solved examples of the task file, fixed gold rows or the gold rows most similar to
each sentence, as it is and calibrated, is compared on validation rows. The best by macro-F1 is then scored on test
rows, beside the task file's first prompt as it is. Intervals are 95 %, by bootstrap over groups.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pandas as pd

from distillery import metrics
from distillery.config.load import load_params, validate_section
from distillery.config.schema import Params, TeacherConfig
from distillery.data.prepare import prepare_source
from distillery.data.storage import write_source
from distillery.files import repository_root
from distillery.tasks.schema import Task, load_task
from distillery.teachers.base import Teacher, gather_rows, open_teacher
from distillery.teachers.prompt_search import PRIOR_ROWS, compare_prompts, estimate_calibration
from distillery.teachers.signals import signal_table

SHOTS = (("task", 0), ("task", 3), ("gold", 6), ("similar", 4))


def with_prompt(params: Params, task: Task, shots: str, n: int) -> Params:
    """`P` with a teacher `smollm2` that is only prompted, with `n` solved examples from `shots`."""
    spec = {"kind": "lm", "model": "smollm2", "dtype": "bfloat16", "prompts": [*task.prompts], "few_shot": n}
    spec |= {"examples_from": shots, "embeddings": "minilm-l6" if shots == "similar" else None}
    return params.model_copy(update={"teachers": {"smollm2": validate_section(TeacherConfig, spec, "benchmark")}})


def line(teacher: Teacher, rows: pd.DataFrame, labels: list[str]) -> dict[str, float]:
    predictions = signal_table(rows, teacher.predict(rows), labels, -1)["label"].tolist()
    drawn = metrics.bootstrap_scores(rows["label"].tolist(), predictions, labels, rows["group"].tolist())
    scores = metrics.mean_scores(rows["label"].tolist(), predictions, labels)
    low, high = metrics.interval(drawn["accuracy"])
    return {"accuracy": scores["accuracy"], "low": low, "high": high, "macro_f1": scores["macro_f1"]}


def main(rows: int = 100) -> None:
    params, root = load_params(), repository_root()
    task = load_task(params.data["finance"].task, root / "tasks")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_source(prepare_source("finance", params.data["finance"], task, root), folder / "data/processed/finance")
        every = gather_rows(folder, with_prompt(params, task, "task", 0), "smollm2")
        few = every[every["split"].isin(["validation", "test"])].groupby("split").head(rows)
        every = pd.concat([every[every["split"].isin(["train", "pool"])], few], ignore_index=True)
        tables = []
        for shots, n in SHOTS:
            table, _ = compare_prompts(folder, "smollm2", with_prompt(params, task, shots, n), task, every)
            tables.append(table.drop(columns="unparsable").assign(examples=n, of=shots))
            print(tables[-1].round(3).to_string(index=False), flush=True)
        best = pd.concat(tables, ignore_index=True).sort_values("macro_f1", kind="stable").iloc[-1]
        test = every[every["split"] == "test"].reset_index(drop=True)
        plain = {"prompt": None, "prior": None}
        before = open_teacher(folder, "smollm2", with_prompt(params, task, "task", 0), task, prompting=plain)
        prompting = plain | {"prompt": None if best["prompt"] == "prompt" else best["prompt"]}
        best_params = with_prompt(params, task, best["of"], int(best["examples"]))
        after = open_teacher(folder, "smollm2", best_params, task, prompting=prompting)
        unlabelled = every[every["split"] == "pool"].head(PRIOR_ROWS).reset_index(drop=True)
        after.calibration = estimate_calibration(after, best["calibrate"], unlabelled)
        lines = {"before": line(before, test, task.names), "after": line(after, test, task.names)}
        print(f"\n{len(test)} test rows, before: the first prompt as it is; after: the best on validation rows,")
        print(f"`{best['prompt']}` with {best['examples']} examples ({best['of']}), calibration {best['calibrate']}")
        print(pd.DataFrame(lines).T.round(3).to_string())


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
