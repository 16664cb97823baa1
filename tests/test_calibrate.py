"""The temperature, the abstention and the prediction sets that a model folder carries."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import report_project
from deployed import softened
from distillery import metrics
from distillery.config.load import load_params
from distillery.config.schema.evaluate import EvaluateConfig
from distillery.data.storage import read_split
from distillery.deploy.calibrate import calibrated, fit_abstention, wilson_low, write_settings
from distillery.deploy.settings import read_settings
from distillery.errors import UserError
from distillery.tasks.schema import Task

TASK = Task(kind="classification", labels={"a": "", "b": "", "c": ""})


def drawn(n: int, seed: int, sharpness: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """n gold labels drawn from probabilities [n, 3], and these, sharpened to be overconfident."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet([0.5] * 3, n)
    true = np.array([rng.choice(3, p=row) for row in p])
    return true, softened(np.maximum(p, 1e-6), 1 / sharpness)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("accuracy", [0.7, 0.9, 1.0])
def test_the_abstention_threshold_is_the_lowest_that_reaches_the_accuracy(seed, accuracy):
    true, p = drawn(80, seed)
    p = np.round(p, 1)  # rows share confidences
    threshold = metrics.selective_threshold(true, p, accuracy)
    confidence, correct = p.max(1), p.argmax(1) == true
    reaching = [
        level
        for level in np.unique(confidence)
        if (confidence >= level).sum() >= 10 and correct[confidence >= level].mean() >= accuracy
    ]
    assert threshold == (min(reaching) if reaching else None)


def test_no_threshold_where_too_few_rows_reach_the_accuracy():
    true, p = np.zeros(12, dtype=int), np.tile([0.6, 0.4], (12, 1))
    assert metrics.selective_threshold(true, p, 0.9) == 0.6
    assert metrics.selective_threshold(true, p, 0.9, min_rows=13) is None
    assert metrics.selective_threshold(1 - true, p, 0.1) is None
    abstention = fit_abstention(1 - true, p, 0.9)
    assert abstention.threshold is None and abstention.answered == 0 and abstention.accuracy_low is None


@pytest.mark.parametrize("coverage", [0.5, 0.8, 0.95])
def test_prediction_sets_hold_the_gold_label_as_often_as_wanted(coverage):
    shares = []
    for seed in range(200):
        true, p = drawn(59, seed, sharpness=2.0)
        threshold = metrics.conformal_threshold(true[:19], p[:19], coverage)
        shares.append((p[np.arange(19, 59), true[19:]] >= threshold).mean())
    assert coverage - 0.02 < np.mean(shares) < coverage + 0.05 + 0.02  # at most 1 / (n + 1) above, in the mean
    assert metrics.conformal_threshold(true[:9], p[:9], 0.95) == 0.0  # too few rows: all labels


@pytest.mark.parametrize("right, n", [(0, 5), (9, 10), (10, 10), (150, 202)])
def test_the_lower_end_is_that_of_scipy(right, n):
    expected = stats.binomtest(right, n).proportion_ci(method="wilson").low
    assert wilson_low(right, n) == pytest.approx(expected, abs=1e-6)


def test_an_overconfident_student_is_calibrated():
    true, p = drawn(2000, 0, sharpness=3.0)
    rows = pd.DataFrame({"label": [TASK.names[i] for i in true], "probabilities": list(p)})
    config = EvaluateConfig(headline="s", selective_accuracy=0.8, conformal_coverage=0.9)
    fields = calibrated(TASK, rows, config)
    assert fields["temperature"] == pytest.approx(3.0, rel=0.1)
    scaled = metrics.apply_temperature(p, fields["temperature"])
    answered = scaled.max(1) >= fields["abstention"].threshold
    assert (scaled.argmax(1) == true)[answered].mean() >= 0.8 and answered.mean() == fields["abstention"].answered
    assert (scaled[np.arange(2000), true] >= fields["prediction_sets"].threshold).mean() == pytest.approx(
        0.9, abs=0.002
    )


def test_free_answers_and_no_rows_leave_nothing_to_fit():
    config, nothing = EvaluateConfig(headline="s"), {"temperature": 1.0, "abstention": None}
    rows = pd.DataFrame({"label": ["right"], "probabilities": [np.array([1.0, 0.0])]})
    assert calibrated(Task(kind="qa"), rows, config) == nothing
    assert calibrated(TASK, rows.head(0), config) == nothing


def test_every_model_folder_gets_the_settings_of_its_run(tmp_path):
    spec = report_project.experiment()
    spec["students"]["other"]["max_length"] = 40
    spec["data"]["demo"]["columns"] = {"text": ["text"]}
    params = report_project.write_project(tmp_path, spec)
    label = pd.concat([read_split(tmp_path / "data/processed/demo", s) for s in ("validation", "test")])
    label = label.set_index("id")["label"]
    for path in tmp_path.glob("runs/*/predictions.parquet"):
        table = pd.read_parquet(path)
        table.assign(label=table["id"].map(label)).to_parquet(path)
    write_settings(tmp_path, params)
    for name in params.students:
        for seed in params.seeds:
            run = tmp_path / f"runs/{name}-{seed}"
            settings, rows = read_settings(run / "model"), pd.read_parquet(run / "predictions.parquet")
            rows = rows[rows["split"] == "validation"]
            true = [report_project.LABELS.index(x) for x in rows["id"].map(label)]
            expected = metrics.fit_temperature(np.array(true), np.stack(rows["probabilities"]))
            assert settings.temperature == expected and settings.student == name and settings.arch == "classifier"
            assert settings.max_length == (40 if name == "other" else 256) and settings.text_columns == ["text"]
            assert settings.task.names == report_project.LABELS and settings.abstention.accuracy == 0.9
            assert "perturbations" not in json.loads((run / "model/inference.json").read_text())["task"]


def test_damaged_settings_are_one_line(tmp_path):
    for content, line in (("{", "no JSON; copy the student.s folder again"), ("{}", "student")):
        (tmp_path / "inference.json").write_text(content)
        with pytest.raises(UserError, match=line):
            read_settings(tmp_path)


def test_only_students_that_can_be_exported_are_named_for_it(tmp_path):
    spec = report_project.experiment()
    report_project.write_project(tmp_path, spec)
    spec["students"]["long"] = spec["students"]["other"] | {"long_texts": {"windows": 2}}
    spec["students"]["series"] = spec["students"]["other"] | {"adapter": {"kind": "series"}}
    lines = {
        "none": "evaluate.export.0: unknown student `none`",
        "s": "`s` is seq2seq; classifiers and causal models are exported",
        "long": "has `long_texts`",
        "series": "`series` has series adapters; it is not exported",
    }
    for student, line in lines.items():
        spec["students"]["s"] = spec["students"]["other"] | {"arch": "seq2seq", "model": "large"}
        spec["evaluate"]["export"] = [student]
        (tmp_path / "params.yaml").write_text(json.dumps(spec))
        with pytest.raises(UserError, match=line):
            load_params(tmp_path / "params.yaml")
