"""A finished student of random weights with everything that its users need, in a folder of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch

import report_project
import tiny
from distillery.config.schema import StudentConfig
from distillery.data.storage import read_split, read_task
from distillery.deploy.predictors import open_predictor
from distillery.deploy.settings import SETTINGS_FILE, InferenceSettings
from distillery.files import write_json
from distillery.models.save import save_model
from distillery.tasks.schema import Task, load_task
from distillery.training.student import build_student

TASK = load_task("finance-sentiment", tiny.ROOT / "tasks")
MAX_LENGTH = 32
LONG = " ".join(tiny.texts()[:20])  # more words than a student of `MAX_LENGTH` tokens reads


def rows(n: int) -> pd.DataFrame:
    """Rows (id, text, label, group) of the finance corpus, as often as needed, then one that is cut."""
    corpus = pd.read_json(tiny.ROOT / "data/corpora/finance.jsonl", lines=True)[["id", "text", "label"]]
    taken = pd.concat([corpus] * (n // len(corpus) + 1), ignore_index=True).head(n - 1)
    taken = pd.concat([taken, pd.DataFrame({"id": ["long"], "text": [LONG], "label": ["neutral"]})], ignore_index=True)
    return taken.assign(group=[f"g{i}" for i in range(n)])


def write_student(
    base: Path, folder: Path, arch: str = "classifier", task: Task = TASK, long_texts: dict | None = None, **changes
) -> InferenceSettings:
    """Save a student of the tiny model in `base` to `folder`, with its settings; returns these."""
    length = MAX_LENGTH if arch == "classifier" else 256  # a prompt takes more
    spec = StudentConfig(model="m", arch=arch, phases=[], prompt="plain", max_length=length, long_texts=long_texts)
    student = build_student(spec, base, task, seed=0)
    for parameter in student.model.parameters():  # so that its predictions differ from row to row
        parameter.data.mul_(6 if parameter.dim() > 1 else 1)
    if arch == "classifier":  # whatever words the tokenizer has, each label is predicted for some rows
        mean = np.log(np.maximum(student.predict(rows(60)["text"].tolist()), 1e-12)).mean(0)
        student.model.classifier.bias.data -= torch.from_numpy(mean)
    save_model(student.model, student.tokenizer, folder)
    values = {"student": "s", "arch": arch, "task": task, "text_columns": ["text"], "max_length": spec.max_length}
    values |= {"temperature": 2.0, "abstention": ABSTENTION}
    settings = InferenceSettings(**values | changes)
    write_json(folder / SETTINGS_FILE, settings.model_dump())
    return settings


def write_run(root: Path, spec: dict, base: Path) -> None:
    """A finished experiment in `root` whose headline `tiny-kd` is a real model of the one in `base`; see
    :mod:`report_project`."""
    report_project.write_project(root, spec)
    data, run = root / "data/processed/demo", root / "runs/tiny-kd-0"
    settings = write_student(base, run / "model", spec["students"]["tiny-kd"]["arch"], task=read_task(data))
    (root / "data/inputs/tiny-kd").mkdir(parents=True, exist_ok=True)
    read_split(data, "test").to_parquet(root / "data/inputs/tiny-kd/test.parquet")
    student, parts = open_predictor(run / "model", settings, "torch", 1), []
    for split in ("validation", "test"):
        table = read_split(data, split)
        p = student.predict(table["text"].tolist())
        columns = {"split": split, "id": table["id"], "label": table["label"], "probabilities": list(p)}
        parts.append(pd.DataFrame(columns | {"prediction": [settings.task.names[i] for i in p.argmax(1)]}))
    pd.concat(parts).to_parquet(run / "predictions.parquet")
    label = pd.concat(parts).set_index("id")["label"]
    for name in ("tiny-gold", "other"):  # invented predictions have no label
        path = root / f"runs/{name}-0/predictions.parquet"
        table = pd.read_parquet(path)
        table.assign(label=table["id"].map(label)).to_parquet(path)
        (path.parent / "model").mkdir()


ABSTENTION = {"accuracy": 0.9, "threshold": 0.5, "answered": 0.5, "accuracy_low": 0.8, "rows": 100}


def softened(p: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities after temperature scaling."""
    powers = np.asarray(p, dtype=float) ** (1 / temperature)
    return powers / powers.sum(-1, keepdims=True)
