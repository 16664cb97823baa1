"""One small experiment through the five notebooks, killed on the way. tests/test_lessons.py checks their form."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
from ruamel.yaml import YAML

import stages
import tiny
from distillery.config.load import load_params
from distillery.config.schema import SPLITS
from distillery.files import read_yaml
from distillery.pipeline.inputs import write_student_inputs
from forked import preloaded_python

LABELS = ["positive", "neutral", "negative"]

# ------------------------------------------------------------------------------- run


def dvc(repo: Path, *arguments: str, preloaded: bool = True) -> list[str]:
    """Run `dvc`; the stages that ran. Fails with what it printed when it fails."""
    environment = os.environ | (preloaded_python(repo) if preloaded else {})
    done = subprocess.run(["dvc", *arguments], cwd=repo, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return re.findall(r"^Running stage '(.*)':", done.stdout, flags=re.M)


def edit(repo: Path, change) -> None:
    """Let `change` alter the tree of params.yaml."""
    tree = json.loads(json.dumps(read_yaml(repo / "params.yaml")))
    change(tree)
    with (repo / "params.yaml").open("w", encoding="utf-8") as file:
        YAML().dump(tree, file)


def killed_while_it_distils(repo: Path) -> None:
    """Start `dvc repro` and kill it, and nothing else, once `tiny-kd` has a checkpoint in its first phase."""
    with (repo / ".cache.log").open("w") as log:
        process = subprocess.Popen(["dvc", "repro"], cwd=repo, stdout=log, stderr=log)
    deadline = time.monotonic() + 600
    while not list(repo.glob(".cache/checkpoints/tiny-kd-0-*/checkpoints-1/checkpoint-*/trainer_state.json")):
        assert process.poll() is None and time.monotonic() < deadline, (repo / ".cache.log").read_text()
        time.sleep(0.02)
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not psutil.wait_procs(started, timeout=30)[1], "what a killed `dvc repro` started has to end with it"
    (repo / ".cache.log").unlink()


@pytest.fixture(scope="module")
def ran(tiny_models, tmp_path_factory) -> Path:
    """A repository in which the whole small experiment was run, but `dvc repro` was killed once while it distilled."""
    repo = tiny.experiment(tmp_path_factory.mktemp("ran") / "repo", tiny_models)

    def longer(tree):
        student = tree["students"]["tiny-kd"]
        student["checkpoint_every"], student["phases"][0]["steps"] = 10, 120

    edit(repo, longer)
    dvc(repo, "repro", "augment")
    killed_while_it_distils(repo)
    assert not (repo / "runs/tiny-kd-0/metrics.json").exists()
    assert not (repo / "reports/notebooks/04_distill-tiny-kd-0.ipynb").exists()
    again = dvc(repo, "repro", "distill")
    assert "distill@tiny-kd-0" in again and not {"inputs", "teach@lm"} & {*again}
    dvc(repo, "repro", preloaded=False)  # a kernel that loads its packages itself shows what they print
    return repo


def test_a_second_run_has_nothing_to_do(ran):
    assert dvc(ran, "repro") == ["strip"]


def test_the_killed_student_is_the_one_of_an_unbroken_run(ran, tmp_path):
    repo = shutil.copytree(ran, tmp_path / "repo", symlinks=True)
    assert not list((repo / ".cache/checkpoints").glob("tiny-kd-0-*"))
    for of_evaluation in ("README.md", "inference.json"):
        (repo / "runs/tiny-kd-0/model" / of_evaluation).unlink()
    before = {p.relative_to(repo): p.read_bytes() for p in (repo / "runs/tiny-kd-0").rglob("*") if p.is_file()}
    shutil.rmtree(repo / "runs/tiny-kd-0")
    stages.run_notebook(repo, "04_distill", student="tiny-kd", seed=0)
    after = {p.relative_to(repo): p.read_bytes() for p in (repo / "runs/tiny-kd-0").rglob("*") if p.is_file()}
    differing = [path.name for path in before if before[path] != after.get(path)]
    assert before.keys() == after.keys() and set(differing) <= {"timing.json"}


def test_executed_notebooks_ran_to_their_end(ran):
    found = sorted((ran / "reports/notebooks").glob("*.ipynb"))
    assert [path.stem for path in found] == [
        *("01_data-finance", "02_teach-encoder", "02_teach-lm", "03_augment"),
        *("04_distill-half-gkd-0", "04_distill-tiny-gold-0", "04_distill-tiny-kd-0", "05_evaluate"),
    ]
    for path in found:
        code = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        assert all(cell["execution_count"] for cell in code if "".join(cell["source"]).strip()), path.stem
        kinds = [output["output_type"] for cell in code for output in cell["outputs"]]
        assert "error" not in kinds and "display_data" in kinds, path.stem
        assert any("image/png" in output.get("data", {}) for cell in code for output in cell["outputs"]), path.stem
        stderr = [o for cell in code for o in cell["outputs"] if o.get("name") == "stderr"]
        assert not stderr, (path.stem, stderr)


def read(repo: Path, path: str, columns: str, min_rows: int = 1) -> pd.DataFrame:
    frame = pd.read_parquet(repo / path)
    assert frame.columns.tolist() == columns.split() and len(frame) >= min_rows, path
    return frame


def sums_to_one(frame: pd.DataFrame) -> None:
    probabilities = np.stack(frame["probabilities"].to_list())
    assert probabilities.shape[1] == 3 and np.abs(probabilities.sum(1) - 1).max() < 1e-5


def test_the_data_stage_writes_splits_and_hides_the_pools_labels(ran):
    folder = "data/processed/finance"
    for split in ("train", "validation", "test"):
        frame = pd.read_parquet(ran / f"{folder}/{split}.parquet")
        assert frame.columns.tolist()[:5] == ["id", "text", "label", "rationale", "group"] and len(frame)
    pool = pd.read_parquet(ran / f"{folder}/pool.parquet")
    assert not {"label", "rationale"} & set(pool.columns)
    assert read(ran, f"{folder}/pool_labels.parquet", "id label rationale")["id"].tolist() == pool["id"].tolist()
    assert json.loads((ran / f"{folder}/task.json").read_text())["kind"] == "classification"


@pytest.mark.parametrize("teacher", ["lm", "encoder"])
def test_a_teacher_signals_every_row_and_gold_rows_out_of_fold(ran, teacher):
    folder = f"data/teacher/{teacher}"
    signals = read(ran, f"{folder}/signals.parquet", "source split id label probabilities fold rationale contradicts")
    sums_to_one(signals)
    for split in SPLITS:
        part, rows = (
            signals[signals["split"] == split],
            pd.read_parquet(ran / f"data/processed/finance/{split}.parquet"),
        )
        assert part["id"].tolist() == rows["id"].tolist()
        assert set(part["fold"]) == ({0, 1} if split == "train" else {-1})
    assert all(row.label == LABELS[int(np.argmax(row.probabilities))] for row in signals.itertuples())
    assert signals["rationale"].notna().sum() == (2 if teacher == "lm" else 0)
    found = json.loads((ran / folder / "metrics.json").read_text())
    assert {"train", "pool", "validation", "test", "memorised", "parameters", "bytes_on_disk"} <= set(found)
    gold = pd.read_parquet(ran / "data/processed/finance/train.parquet").set_index("id")["label"]
    train = signals[signals["split"] == "train"]
    assert found["train"]["accuracy"] == pytest.approx((train["label"] == train["id"].map(gold)).mean())
    assert list((ran / folder / "model").glob("*.safetensors")) and (ran / folder / "timing.json").exists()


def test_a_teacher_without_folds_has_no_signals_of_gold_rows(ran, tmp_path):
    repo = shutil.copytree(ran, tmp_path / "repo", symlinks=True)

    def without(tree):
        tree["teachers"]["lm"]["finetune"]["folds"] = 0
        for phase in (phase for student in tree["students"].values() for phase in student["phases"]):
            if "lm" in phase.get("teachers", []):
                phase["data"] = ["finance/pool"]

    edit(repo, without)
    shutil.rmtree(repo / "data/teacher/lm")
    stages.run_notebook(repo, "02_teach", teacher="lm")
    signals = pd.read_parquet(repo / "data/teacher/lm/signals.parquet")
    before = pd.read_parquet(ran / "data/teacher/lm/signals.parquet").query("split != 'train'")
    assert signals["id"].tolist() == before["id"].tolist() and signals["label"].tolist() == before["label"].tolist()
    assert signals["rationale"].notna().sum() == 2 and set(signals["split"][signals["rationale"].notna()]) == {"pool"}
    assert not (repo / "data/teacher/lm/folds").exists()


def test_paraphrases_are_kept_or_dropped_for_a_reason_and_signalled(ran):
    folder = "data/augmented/finance"
    gold = pd.read_parquet(ran / "data/processed/finance/train.parquet").set_index("id")
    candidates = read(ran, f"{folder}/candidates.parquet", "id text label group source_id source_text reason")
    assert candidates["source_id"].tolist() == gold.index.tolist()  # one of each
    rows = read(ran, f"{folder}/rows.parquet", "id text label group source_id", min_rows=0)
    assert rows["id"].tolist() == candidates.loc[candidates["reason"] == "kept", "id"].tolist()
    assert rows["group"].tolist() == gold.loc[rows["source_id"], "group"].tolist()
    signals = read(
        ran, f"{folder}/signals.parquet", "teacher source split id label probabilities fold rationale", min_rows=0
    )
    for teacher in ("lm", "encoder"):
        part = signals[signals["teacher"] == teacher]
        known = pd.read_parquet(ran / f"data/teacher/{teacher}/signals.parquet").set_index("id")["fold"]
        assert part["id"].tolist() == rows["id"].tolist()
        assert part["fold"].tolist() == known[rows["source_id"]].tolist()
    counts = json.loads((ran / folder / "counts.json").read_text())
    assert counts == {"candidates": len(candidates), "reasons": candidates["reason"].value_counts().to_dict()}


@pytest.mark.parametrize("student", ["tiny-kd", "tiny-gold", "half-gkd"])
def test_a_student_leaves_its_model_predictions_history_and_scores(ran, student):
    folder = f"runs/{student}-0"
    predictions = read(ran, f"{folder}/predictions.parquet", "split id label prediction probabilities")
    phases = read(ran, f"{folder}/phases.parquet", "phase split id label prediction probabilities")
    sums_to_one(predictions)
    splits = {
        split: pd.read_parquet(ran / f"data/processed/finance/{split}.parquet") for split in ("validation", "test")
    }
    for part in (predictions, *(part for _, part in phases.groupby("phase"))):
        for split, rows in part.groupby("split"):
            assert rows[["id", "label"]].to_numpy().tolist() == splits[split][["id", "label"]].to_numpy().tolist()
    spec = load_params(ran / "params.yaml").students[student]
    last = len(spec.phases)
    assert set(predictions["split"]) == {"validation", "test"}
    # in between, nobody looks at test rows
    assert set(zip(phases["phase"], phases["split"], strict=True)) == {
        *((k, "validation") for k in range(last + 1)),
        *((k, "test") for k in (0, last)),
    }
    history = pd.read_csv(ran / folder / "history.csv")
    terms = list(dict.fromkeys(term for phase in spec.phases for term in phase.loss))
    assert history.columns.tolist() == ["phase", "step", "epoch", "loss", "learning_rate", *terms]
    found = json.loads((ran / folder / "metrics.json").read_text())
    assert (found["student"], found["seed"]) == (student, 0)
    assert found["steps"] == sum(phase.steps for phase in spec.phases)
    part = predictions[predictions["split"] == "test"]
    assert found["test"]["accuracy"] == pytest.approx((part["label"] == part["prediction"]).mean())
    model = ran / folder / "model"
    assert found["bytes_on_disk"] == (model / "model.safetensors").stat().st_size
    assert (model / "README.md").exists() and {"train_seconds", "machine", "peak_memory_mb"} <= set(
        json.loads((ran / folder / "timing.json").read_text())
    )


def test_one_student_learns_token_by_token_from_the_models_of_the_folds(ran):
    """From the words of the data, and from what it writes itself."""
    experiment = json.loads((ran / "data/inputs/half-gkd/experiment.json").read_text())
    on_policy = [phase["on_policy"] for phase in experiment["spec"]["phases"] if phase["space"] == "vocabulary"]
    assert on_policy == [0.5]
    weights = experiment["openable_teachers"]["lm"]["weights"]
    assert {Path(file).parent.name for file in weights} == {"model", "0", "1"}
    assert list((ran / ".cache/signals").iterdir())


def test_a_student_that_params_no_longer_name_leaves_the_leaderboard(ran, tmp_path):
    assert set(models_in(ran)) >= {"tiny-kd", "tiny-gold", "half-gkd"}
    assert {"index.html", "metrics.json", "timing.json"} <= {path.name for path in (ran / "reports").iterdir()}
    repo = shutil.copytree(ran, tmp_path / "repo", symlinks=True)
    edit(repo, lambda tree: tree["students"].pop("half-gkd"))
    write_student_inputs(repo, load_params(repo / "params.yaml"))
    stages.run_notebook(repo, "05_evaluate")
    assert "half-gkd" not in models_in(repo) and {"tiny-kd", "tiny-gold"} <= set(models_in(repo))
    assert "half-gkd" not in (repo / "reports/index.html").read_text()


def models_in(repo: Path) -> list[str]:
    return pd.read_csv(repo / "reports/leaderboard.csv")["model"].tolist()
