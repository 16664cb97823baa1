"""A task whose rows have any number of labels, through all notebooks; and what such a task cannot have."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from ruamel.yaml import YAML

import label_sets
import stages
import tiny
from distillery import metrics
from distillery.config.load import load_params
from distillery.deploy.decisions import check_usable, decide
from distillery.deploy.predict import PredictOptions, predict_file
from distillery.deploy.settings import read_settings
from distillery.errors import UserError
from distillery.evaluation.gather import gather_results
from distillery.label_sets import NO_LABELS, split_labels
from distillery.pipeline.task_checks import check_task_kinds
from distillery.tasks.prompts import label_question
from distillery.tasks.schema import load_task
from distillery.teachers.base import open_teacher
from distillery.training.teacher_models import load_teacher_model

NAMES = list(label_sets.SHARES)


@pytest.fixture(scope="module")
def repo(tmp_path_factory) -> Path:
    """A folder in which `tests/smoke_multilabel.yaml` was run to its end."""
    folder = tiny.experiment(tmp_path_factory.mktemp("sets") / "repo")
    shutil.copy(tiny.ROOT / "tests/smoke_multilabel.yaml", folder / "params.yaml")
    label_sets.write_corpus(folder, 100)
    answers = [{"id": row["id"], "topics": ";".join(row["label"]) or "[]"} for row in label_sets.corpus(100)]
    (folder / "data/answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers), encoding="utf-8")
    stages.run_experiment(folder)
    return folder


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_signals_are_a_probability_of_each_label_by_itself(repo):
    for teacher in ("encoder", "answers", "prompted"):
        signals = pd.read_parquet(repo / f"data/teacher/{teacher}/signals.parquet")
        p = np.stack(signals["probabilities"].to_list())
        assert p.shape == (len(signals), 4) and p.min() >= 0 and p.max() <= 1
        assert np.abs(p.sum(1) - 1).max() > 0.5  # no distribution
    encoder = pd.read_parquet(repo / "data/teacher/encoder/signals.parquet")
    assert set(encoder.loc[encoder["split"] == "train", "fold"]) == {0, 1}


def test_a_language_model_gets_a_question_about_each_label(repo, monkeypatch):
    """Its probability of a label is that of `yes` in a task of its own, whatever is cached."""
    monkeypatch.chdir(repo)
    params, task = load_params(repo / "params.yaml"), load_task("shop", repo / "tasks")
    rows = pd.read_parquet(repo / "data/processed/shop/test.parquet").head(3).assign(group=None)
    teacher = open_teacher(repo, "prompted", params, task)
    instruction = "You read messages to a shop, and answer yes or no.\n"
    prompt = instruction + "Does the label price (what it costs) fit this text? Answer yes or no.\n\nText: {}\nAnswer:"
    assert teacher.prompt(rows.iloc[0]) == prompt.format(rows["text"].iloc[0])
    p = teacher.predict(rows)
    for k, label in enumerate(task.names):
        alone = load_teacher_model(
            "prompted", params.teachers["prompted"], params.models["tiny-lm"], label_question(task, label)
        )
        np.testing.assert_allclose(p[:, k], alone.predict(rows["text"].tolist())[:, 1], atol=1e-6)
    signals = pd.read_parquet(repo / "data/teacher/prompted/signals.parquet").set_index("id")
    np.testing.assert_allclose(p, np.stack(signals.loc[rows["id"], "probabilities"].to_list()), atol=1e-5)


def test_thresholds_are_those_of_the_validation_rows_everywhere(repo):
    """In the predictions of the test rows, the metrics, the settings beside the model, and a teacher's signals."""
    predictions, task = pd.read_parquet(repo / "runs/kd-0/predictions.parquet"), load_task("shop", repo / "tasks")
    validation, test = (predictions[predictions["split"] == split] for split in ("validation", "test"))
    p, of_test = (np.stack(part["probabilities"].to_list()) for part in (validation, test))
    thresholds = metrics.choose_thresholds(validation["label"], p, task.names)
    assert test["prediction"].tolist() == metrics.decide(of_test, task.names, thresholds).tolist()
    assert read_json(repo / "runs/kd-0/metrics.json")["thresholds"] == thresholds.tolist()
    assert read_settings(repo / "runs/kd-0/model").thresholds == thresholds.tolist()
    signals = pd.read_parquet(repo / "data/teacher/encoder/signals.parquet")
    chosen = read_json(repo / "data/teacher/encoder/metrics.json")["thresholds"]
    decided = metrics.decide(np.stack(signals["probabilities"].to_list()), task.names, chosen)
    assert signals["label"].tolist() == decided.tolist()  # of the models of the folds, too


def test_both_terms_of_a_loss_are_the_binary_ones(repo):
    history = pd.read_csv(repo / "runs/kd-0/history.csv")
    gold = pd.read_csv(repo / "runs/gold-0/history.csv")
    assert gold["ce"].iloc[0] == pytest.approx(np.log(2), abs=0.05)  # of an untrained model, for each label
    second = history[history["phase"] == 2]
    np.testing.assert_allclose(second["loss"], 0.5 * (second["ce"] + second["kl"]), rtol=1e-3)


def test_the_leaderboard_scores_sets_and_labels(repo):
    board = pd.read_csv(repo / "reports/leaderboard.csv").set_index("model")
    metadata = read_json(repo / "runs/kd-0/metrics.json")["test"]
    for score in ("accuracy", "micro_f1", "macro_f1", "hamming_loss"):
        line = board.loc["kd"]
        assert line[score] == pytest.approx(metadata[score]) and line[f"{score}_low"] <= line[f"{score}_high"]
    for score in ("precision", "recall", "f1", "average_precision"):
        assert board.loc["kd", f"{score}_quality"] == pytest.approx(metadata["labels"]["quality"][score])
    assert board.loc["answers", "micro_f1"] == 1 and board.loc["kd", "versus"] == "gold"
    assert {"micro_f1", "hamming_loss"} <= read_json(repo / "reports/metrics.json").keys()


def test_a_student_is_compared_with_its_control_on_whole_sets_and_on_decisions(repo, monkeypatch):
    monkeypatch.chdir(repo)
    board = pd.read_csv(repo / "reports/leaderboard.csv").set_index("model")
    params, task = load_params(repo / "params.yaml"), load_task("shop", repo / "tasks")
    results = gather_results(repo, params)
    kd, control = (results.find(name) for name in ("kd", "gold"))
    # what robustness, exports and further sources are predicted with
    assert results.thresholds(kd).tolist() == read_json(repo / "runs/kd-0/metrics.json")["thresholds"]
    test = pd.read_parquet(repo / "data/processed/shop/test.parquet")
    rows = (test["label"].to_numpy(object), kd.predictions, control.predictions, task.names, test["group"])
    paired = metrics.paired_difference(*rows, 100, params.evaluate.confidence, params.evaluate.seed)
    for score, start in (("accuracy", ""), ("micro_f1", "micro_f1_")):
        columns = [f"{start}difference{end}" for end in ("", "_low", "_high")]
        expected = [paired[score][key] for key in ("mean", "low", "high")]
        assert board.loc["kd", columns].tolist() == pytest.approx(expected), score


def test_page_and_card_leave_out_what_sets_do_not_have(repo):
    drawn = {path.stem for path in (repo / "reports/figures").iterdir()}
    assert drawn == {"cost", "history", "labels", "latency", "leaderboard"}
    page = (repo / "reports/index.html").read_text(encoding="utf-8")
    assert all(text in page for text in ("Exact match", "Micro-F1", "Hamming loss", "average precision"))
    assert "Confusion matrices" not in page and "Reliability" not in page
    card = (repo / "reports/cards/kd-0.md").read_text(encoding="utf-8")
    assert "any number of labels" in card and "| micro-F1 |" in card and "balanced" not in card


def test_the_code_of_the_card_predicts_the_first_test_row_as_the_run_did(repo, monkeypatch, capsys):
    card = (repo / "runs/kd-0/model/README.md").read_text(encoding="utf-8")
    code = card.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(repo / "runs/kd-0/model")
    exec(code, {})
    printed = capsys.readouterr().out.splitlines()[-1]
    predictions = pd.read_parquet(repo / "runs/kd-0/predictions.parquet")
    first = predictions.loc[predictions["split"] == "test", "prediction"].iloc[0]
    assert set(json.loads(printed.replace("'", '"'))) == set(split_labels(first))


def test_every_notebook_shows_its_tables_and_figures(repo):
    for path in (repo / "reports/notebooks").iterdir():
        cells = read_json(path)["cells"]
        kinds = {kind for cell in cells for output in cell.get("outputs", []) for kind in output.get("data", {})}
        assert kinds >= {"text/markdown", "text/html"} and ("image/png" in kinds or "augment" in path.name), path.name


def test_predict_writes_the_labels_of_the_run(repo, tmp_path):
    predictions = pd.read_parquet(repo / "runs/kd-0/predictions.parquet").set_index("id")
    test = pd.read_parquet(repo / "data/processed/shop/test.parquet")
    test[["id", "text"]].to_csv(tmp_path / "new.csv", index=False)
    options = PredictOptions(str(tmp_path / "new.csv"), str(tmp_path / "out.csv"), probabilities=True, threads=1)
    assert predict_file(repo / "runs/kd-0", options) == len(test)
    written = pd.read_csv(tmp_path / "out.csv", dtype={"prediction": str}, keep_default_na=False)
    assert written["prediction"].tolist() == predictions.loc[test["id"], "prediction"].tolist()
    p = np.stack(predictions.loc[test["id"], "probabilities"].to_list())
    assert written[[f"p_{name}" for name in NAMES]].to_numpy() == pytest.approx(p, abs=2e-6)


class Probabilities:
    """A predictor that gives the probabilities that it was made with."""

    engine = "none"

    def __init__(self, p: list[list[float]]):
        self.p = np.array(p)

    def predict(self, texts: list[str]) -> np.ndarray:
        return self.p


def test_decisions_are_sets_with_the_probability_of_the_set(repo):
    settings = read_settings(repo / "runs/kd-0/model").model_copy(update={"thresholds": [0.5, 0.9, 0.2, 0.5]})
    predictor = Probabilities([[0.6, 0.8, 0.3, 0.1], [0.1, 0.1, 0.1, 0.1]])
    first, empty, second = decide(predictor, settings, ["a", "", "b"], abstain=False, probabilities=False)
    assert first == {"prediction": "price | quality", "confidence": pytest.approx(0.6 * 0.2 * 0.3 * 0.9, abs=1e-6)}
    assert second["prediction"] == NO_LABELS and empty == {"prediction": None, "confidence": None}
    with pytest.raises(UserError, match="kd: label sets have thresholds: it cannot abstain"):
        check_usable(settings, abstain=True)


KD = "students.kd"


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("teachers.answers.kind", "api", "teachers.answers.api.labels: logprobs is for one label a row"),
        ("teachers.encoder.kind", "lm", "teachers.encoder.finetune: a language model is only prompted in a task"),
        ("teachers.prompted.few_shot", 2, "teachers.prompted.few_shot: a question about one label has no solved"),
        ("teachers.prompted.calibrate", "batch", "teachers.prompted.calibrate: corrects a distribution over labels"),
        ("teachers.encoder.finetune.balance", "batches", "teachers.encoder.finetune.balance: weighs rows of one label"),
        (f"{KD}.arch", "causal", f"{KD}.arch: a student in a task of `kind: multilabel` is a classifier, not causal"),
        (f"{KD}.phases.1.loss.label_prior", 1.0, f"{KD}.phases.1.loss.label_prior: is for one label a row; allowed"),
        ("evaluate.conformal_coverage", 0.9, "evaluate.conformal_coverage: is for one label a row; leave it out"),
        ("evaluate.confusion", ["kd"], "evaluate.confusion: label sets have no confusion matrix; leave it out"),
        (f"{KD}.phases.0.mix", "validation", f"{KD}.phases.0.mix: is decided by the one label of a row"),
        (f"{KD}.phases.0.balance", "class_weights", f"{KD}.phases.0.balance: is decided by the one label of a row"),
        (f"{KD}.phases.0.pseudo_labels", {"agreement": True}, f"{KD}.phases.0.pseudo_labels: is decided by the one"),
        (
            f"{KD}.phases.0.early_stopping",
            {"metric": "agreement"},
            f"{KD}.phases.0.early_stopping.metric: agreement: is of one label for a row, and the task is of",
        ),
    ],
)
def test_what_sets_cannot_have_is_refused_in_one_line(tmp_path, monkeypatch, key, value, line):
    raw = YAML(typ="safe", pure=True).load((tiny.ROOT / "tests/smoke_multilabel.yaml").read_text(encoding="utf-8"))
    *path, last = [int(part) if part.isdigit() else part for part in key.split(".")]
    node = raw
    for part in path:
        node = node[part]
    node[last] = value
    if value == "api":
        del node["answers"]
        node["api"] = {"model": "m", "base_url": "http://127.0.0.1:9", "labels": "logprobs"}
    message = refusal(tmp_path, monkeypatch, raw)
    assert message.startswith(f"params.yaml: {line}") and "\n" not in message


def test_a_label_that_no_text_could_give_is_refused(tmp_path, monkeypatch):
    raw = YAML(typ="safe", pure=True).load((tiny.ROOT / "tests/smoke_multilabel.yaml").read_text(encoding="utf-8"))
    del raw["teachers"]["answers"]["answers"]
    raw["teachers"]["answers"] |= {"kind": "api", "api": {"model": "m", "base_url": "http://127.0.0.1:9"}}
    message = refusal(tmp_path, monkeypatch, raw, "verbalizer: {price: 'price, or cost'}\n")
    assert message.startswith("params.yaml: teachers.answers.api.labels: the label 'price, or cost' holds what divides")
    assert "\n" not in message


def refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raw: dict, task: str = "") -> str:
    """The message that refuses the experiment `raw`; task: further lines of its task file."""
    label_sets.write_corpus(tmp_path, 2)
    with (tmp_path / "tasks/shop.yaml").open("a") as file:
        file.write(task)
    (tmp_path / "dvc.yaml").touch()
    with (tmp_path / "params.yaml").open("w") as file:
        YAML().dump(raw, file)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as mistake:
        check_task_kinds(load_params(tmp_path / "params.yaml"))
    return str(mistake.value)
