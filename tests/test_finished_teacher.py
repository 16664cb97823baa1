"""A classifier that was fine-tuned elsewhere teaches as it is, through all notebooks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from ruamel.yaml import YAML

import stages
import tiny
from distillery.files import read_yaml

NAMES = ["NEGATIVE", "Positive", "neutral"]  # of the model's head; the task's are positive, neutral, negative
IN_TASK_ORDER = [1, 2, 0]


def change(repo: Path, edit) -> None:
    tree = json.loads(json.dumps(read_yaml(repo / "params.yaml")))
    edit(tree)
    with (repo / "params.yaml").open("w", encoding="utf-8") as file:
        YAML().dump(tree, file)


@pytest.fixture(scope="module")
def ran(tiny_models, tmp_path_factory) -> Path:
    """The small experiment with one teacher, which is not tuned, and one student of it and of its hidden states."""
    from transformers import AutoModelForSequenceClassification

    repo = tiny.experiment(tmp_path_factory.mktemp("finished") / "repo", tiny_models)
    folder = repo / "models/tiny-bert"
    torch.manual_seed(1)
    options = {"num_labels": 3, "id2label": dict(enumerate(NAMES))}
    model = AutoModelForSequenceClassification.from_pretrained(folder, **options)
    with torch.no_grad():
        for parameter in model.parameters():  # so that the predictions differ
            parameter.mul_(6 if parameter.dim() > 1 else 1)
    shutil.copytree(folder, repo / "models/finished")
    model.save_pretrained(repo / "models/finished")

    def edit(tree):
        tree["models"]["finished"] = {"folder": "models/finished"}
        tree["teachers"] = {"encoder": {"kind": "classifier", "model": "finished"}}
        tree["augment"] |= {"teacher": "encoder", "per_row": 0}
        kd, gold = tree["students"]["tiny-kd"], tree["students"]["tiny-gold"]
        phase = {"steps": 2, "batch_size": 4, "learning_rate": 1.0e-3, "teachers": ["encoder"]}
        kd["phases"] = [
            phase | {"data": ["finance/pool"], "loss": {"kl": 0.5, "pkd": 0.5}},
            phase | {"data": ["finance/train"], "loss": {"ce": 0.5, "kl": 0.5}},  # without folds: it saw no row
        ]
        tree["students"] = {"tiny-kd": kd, "tiny-gold": gold}

    change(repo, edit)
    stages.run_experiment(repo)
    return repo


def test_its_signals_are_the_predictions_of_the_model_as_it_is(ran):
    from transformers import pipeline

    signals = pd.read_parquet(ran / "data/teacher/encoder/signals.parquet")
    assert set(signals["split"]) == {"train", "pool", "validation", "test"} and set(signals["fold"]) == {-1}
    rows = pd.read_parquet(ran / "data/processed/finance/train.parquet").merge(signals, on="id")
    classify = pipeline("text-classification", model=str(ran / "models/finished"), top_k=None)
    for text, probabilities in zip(rows["text"][:6], rows["probabilities"][:6], strict=True):
        score = {entry["label"]: entry["score"] for entry in classify([text])[0]}
        assert np.abs(probabilities - [score[NAMES[i]] for i in IN_TASK_ORDER]).max() < 1e-4
    assert np.stack(rows["probabilities"].to_list()).std(0).max() > 0.005


def test_no_copy_of_it_is_written_and_its_head_is_on_record(ran):
    folder = ran / "data/teacher/encoder"
    assert {path.name for path in folder.iterdir()} >= {"signals.parquet", "metrics.json"}
    assert not list(folder.rglob("*.safetensors"))
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["head"] == "own" and metrics["memorised"] is None
    assert metrics["bytes_on_disk"] == (ran / "models/finished/model.safetensors").stat().st_size
    assert json.loads((ran / "runs/tiny-kd-0/metrics.json").read_text())["head"] == "drawn"
    notebook = (ran / "reports/notebooks/02_teach-encoder.ipynb").read_text()
    assert "Positive is positive, neutral is neutral, NEGATIVE is negative" in notebook


def test_the_report_shows_it_beside_its_student(ran):
    board = pd.read_csv(ran / "reports/leaderboard.csv")
    teacher = board[board["role"] == "teacher"]
    assert teacher["model"].tolist() == ["encoder"] and teacher["sentences_per_second"].notna().all()
    assert (ran / "reports/index.html").exists()


def test_another_meaning_of_its_labels_makes_other_signals(ran, tmp_path):
    repo = shutil.copytree(ran, tmp_path / "repo", symlinks=True)
    other = {"NEGATIVE": "positive", "Positive": "negative", "neutral": "neutral"}
    change(repo, lambda tree: tree["models"]["finished"].update({"labels": other}))
    stages.run_notebook(repo, "02_teach", teacher="encoder")
    before, after = (
        np.stack(pd.read_parquet(root / "data/teacher/encoder/signals.parquet")["probabilities"].to_list())
        for root in (ran, repo)
    )
    assert np.abs(after - before[:, [2, 1, 0]]).max() < 1e-5
