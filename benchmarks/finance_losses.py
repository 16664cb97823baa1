"""What helps a small student: losses, temperatures, hidden states, several teachers, its own answers. Three seeds.

    PYTHONPATH=src python benchmarks/finance_losses.py [seeds, 3 by default] [how the names of students begin]

Needs the teachers smollm2 and minilm-l6 of a finished `dvc repro` (recipes/finance-full.yaml in place of params.yaml
has them). Every student is the 3-layer MiniLM (17 M, 360 optimizer steps of 16 rows) or SmolLM2's first 15 layers (81
M, LoRA, 120 steps of 8 rows), on the same rows unless its name states otherwise. Scored on the test rows; each is
compared with its control by a bootstrap over groups and seeds, paired by rows. Finished runs are kept in
`.cache/finance_losses/`; a killed one continues. Writes `benchmarks/finance_losses.csv`, where rows of other students
stay.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
from keep import commit
from transformers.utils import logging

from distillery import metrics
from distillery.config.load import load_params
from distillery.config.schema import Params, StudentConfig
from distillery.files import atomic_write, repository_root
from distillery.models.fetch import fetch_model
from distillery.models.predictions import predict_rows
from distillery.pipeline.inputs import StageTables, experiment_record, student_rows
from distillery.tasks.schema import Task, load_task
from distillery.training.openable_teachers import openable_teacher
from distillery.training.run import run_key, train_phases
from distillery.training.student import build_student

logging.set_verbosity_error()
POOL, GOLD = ["finance/pool", "finance/augmented"], ["finance/train"]
TINY = {"model": "minilm-l6", "arch": "classifier", "init": {"layers": [0, 2, 5]}, "dtype": "bfloat16"}
HALF = {
    "model": "smollm2",
    "arch": "causal",
    "prompt": "plain",
    "dtype": "bfloat16",
    "init": {"layers": "first-15"},
    "adapter": {"kind": "lora", "r": 16},
}


def two_phases(first: dict, second: dict, **settings) -> list[dict]:
    """Pool and paraphrases for 320 steps, then gold rows for 40, as the default experiment's headline student."""
    return [
        {"data": POOL, "steps": 320, "learning_rate": 2.0e-4, "loss": first, **settings},
        {"data": GOLD, "steps": 40, "learning_rate": 5.0e-5, "loss": second, **settings},
    ]


def kd(temperature: float, teachers: list[str], **settings) -> list[dict]:
    return two_phases({"kl": 1.0}, {"ce": 0.5, "kl": 0.5}, teachers=teachers, temperature=temperature, **settings)


def gold(loss: dict) -> list[dict]:
    return [{"data": GOLD, "steps": 120, "batch_size": 8, "learning_rate": 2.0e-3, "loss": loss}]


def gkd(**settings) -> list[dict]:
    return [
        {"data": POOL, "teachers": ["smollm2"], "steps": 120, "batch_size": 8, "learning_rate": 1.0e-3}
        | {"loss": {"jsd": 1.0}, **settings}
    ]


def warm(**settings) -> list[dict]:
    """GKD for half of the steps, from where gold labels led: Agarwal et al. (2024) start from a tuned student, too."""
    return [phase | {"steps": 60} for phase in (*gold({"ce": 1.0}), *gkd(**settings))]


# name -> (student, phases, control)
STUDIES = {
    "CE, gold alone": (TINY, [{"data": GOLD, "steps": 360, "learning_rate": 2.0e-4, "loss": {"ce": 1.0}}], None),
    "CE on the teacher's labels": (TINY, two_phases({"ce": 1.0}, {"ce": 1.0}, teachers=["smollm2"]), "CE, gold alone"),
    "KD, T = 2": (TINY, kd(2.0, ["smollm2"]), "CE on the teacher's labels"),
    "KD, T = 5": (TINY, kd(5.0, ["smollm2"]), "KD, T = 2"),
    "KD, T = 9": (TINY, kd(9.0, ["smollm2"]), "KD, T = 2"),
    "KD from MiniLM-L6, T = 2": (TINY, kd(2.0, ["minilm-l6"]), "CE, gold alone"),
    "PKD from MiniLM-L6, T = 2": (
        TINY,
        two_phases(
            {"kl": 1.0, "pkd": 1.0}, {"ce": 0.5, "kl": 0.5, "pkd": 1.0}, teachers=["minilm-l6"], temperature=2.0
        ),
        "KD from MiniLM-L6, T = 2",
    ),
    "two teachers, by validation score, T = 2": (
        TINY,
        kd(2.0, ["smollm2", "minilm-l6"], mix="validation"),
        "KD, T = 2",
    ),
    "KD, T = 2, without paraphrases": (
        TINY,
        [{**phase, "data": ["finance/pool"]} if phase["data"] == POOL else phase for phase in kd(2.0, ["smollm2"])],
        "KD, T = 2",
    ),
    "half, gold labels": (HALF, gold({"ce": 1.0}), None),
    "half, gold labels and reasons": (HALF, gold({"ce": 1.0, "rationale": 1.0}), "half, gold labels"),
    "half, label space, T = 2": (HALF, gkd(temperature=2.0), None),
    "half, GKD off-policy": (HALF, gkd(space="vocabulary"), "half, label space, T = 2"),
    "half, gold labels, then GKD off-policy": (HALF, warm(space="vocabulary"), "half, gold labels"),
    "half, gold labels, then GKD on-policy": (
        HALF,
        warm(space="vocabulary", on_policy=1.0, max_new_tokens=4),
        "half, gold labels, then GKD off-policy",
    ),
}


def run(root: Path, params: Params, name: str, seed: int) -> dict:
    """Accuracy and answers of one student and seed on the test rows; from `.cache` if it has been run before."""
    given, phases, _ = STUDIES[name]
    spec = StudentConfig.model_validate(given | {"phases": phases})
    params = params.model_copy(update={"students": {"study": spec}})
    tables = StageTables(root)
    rows, _ = student_rows(tables, params, "study")
    experiment = experiment_record(root, params, "study")
    test, validation = (pd.DataFrame(tables.rows(f"finance/{split}")) for split in ("test", "validation"))
    key = run_key(name, experiment, seed, pd.DataFrame(rows).to_csv())
    folder = root / ".cache" / "finance_losses" / key
    if not (folder / "result.json").exists():
        start = time.perf_counter()
        task = Task.model_validate(experiment["task"])
        student = build_student(spec, fetch_model(spec.model, params.models[spec.model]), task, seed)
        train_phases(
            student,
            pd.DataFrame(rows),
            spec,
            folder=folder / "run",
            seed=seed,
            validation=validation.head(8),  # early stopping is not used here
            test=test.head(8),
            scores={teacher: facts["accuracy"] for teacher, facts in experiment["teachers"].items()},
            teachers={
                teacher: openable_teacher(root, teacher, facts)
                for teacher, facts in experiment["openable_teachers"].items()
            },
        )
        predictions = predict_rows(student, test)["prediction"].tolist()
        with atomic_write(folder / "result.json") as path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"predictions": predictions, "seconds": round(time.perf_counter() - start, 1)}))
    return json.loads((folder / "result.json").read_text())


def main(seeds: int = 3, begins: str = "") -> None:
    root = repository_root()
    params = load_params()
    test = pd.read_parquet(root / "data/processed/finance/test.parquet")
    labels = load_task("finance-sentiment", root / "tasks").names
    code = commit(root)
    path = root / "benchmarks/finance_losses.csv"
    lines = {line["student"]: line for line in pd.read_csv(path).to_dict("records")} if path.exists() else {}
    runs: dict[str, list[dict]] = {}
    for name in (name for name in STUDIES if name.startswith(begins)):
        control = STUDIES[name][2]
        for one in {name, control} - {None, *runs}:
            runs[one] = [run(root, params, one, seed) for seed in range(seeds)]
        predictions = {one: np.array([result["predictions"] for result in runs[one]]) for one in (name, control) if one}
        drawn = metrics.bootstrap_scores(test["label"], predictions[name], labels, test["group"])
        line = {"student": name, "seeds": seeds}
        for score in ("accuracy", "macro_f1"):
            mean = metrics.mean_scores(test["label"], predictions[name], labels)[score]
            low, high = metrics.interval(drawn[score])
            line |= {score: round(mean, 4), f"{score}_low": round(low, 4), f"{score}_high": round(high, 4)}
        if control:
            both = predictions[name], predictions[control]
            gap = metrics.paired_difference(test["label"], *both, labels, test["group"])["accuracy"]
            line |= {"control": control} | {f"difference_{k}": round(gap[k], 4) for k in ("mean", "low", "high", "p")}
        line |= {"seconds_a_run": round(np.mean([result["seconds"] for result in runs[name]]), 1)}
        line |= {"threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())), "commit": code}
        lines[name] = line
        print(
            f"{name}: accuracy {line['accuracy']:.3f} [{line['accuracy_low']:.3f}, {line['accuracy_high']:.3f}]",
            flush=True,
        )
        with atomic_write(path) as new:
            pd.DataFrame([lines[name] for name in STUDIES if name in lines]).to_csv(new, index=False)
    print(pd.DataFrame(lines.values()).to_string(index=False))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]), *sys.argv[2:3])
