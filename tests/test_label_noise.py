"""Labels that are probably wrong, rows to label next, and scores on parts of the test rows."""

import numpy as np
import pandas as pd
import pytest

from distillery import metrics
from distillery.evaluation.gather import gather_results
from distillery.evaluation.slices import slice_scores, slice_sentence, slices
from distillery.tasks.schema import Task
from distillery.teachers.label_review import (
    find_label_errors,
    find_rows_to_label,
    read_label_errors,
    write_review,
)
from report_project import invented_corpus, write_project

TASK = Task.model_validate({"kind": "classification", "labels": {"up": "it rises", "down": "it falls"}})


def test_suspect_labels_by_hand():
    """Thresholds .7 (mean of .9, .8, .4) and .6 (of .2, .7, .9); only rows 2 and 3 stand against their labels."""
    labels = [0, 0, 0, 1, 1, 1]
    p = [[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.8, 0.2], [0.3, 0.7], [0.1, 0.9]]
    assert list(metrics.suspect_labels(labels, p)) == [False, False, True, True, False, False]
    # the other label is the more probable one, but does not reach its threshold .6
    p[2] = [0.45, 0.55]
    assert list(metrics.suspect_labels(labels, p)) == [False, False, False, True, False, False]
    assert list(metrics.label_margin(labels, p)) == pytest.approx([0.8, 0.6, -0.1, -0.6, 0.4, 0.8])


def test_suspect_labels_are_those_of_cleanlab():
    """Row numbers of cleanlab 2.9.0: find_label_issues with "confident_learning", ranked by "normalized_margin"."""
    rng = np.random.default_rng(7)
    true = rng.integers(3, size=60)
    p = 0.6 * rng.dirichlet(np.ones(3) / 2, 60)
    p[np.arange(60), true] += 0.4
    labels = np.where(rng.random(60) < 0.15, rng.integers(3, size=60), true)
    suspect = np.flatnonzero(metrics.suspect_labels(labels, p))
    ranked = suspect[np.argsort(metrics.label_margin(labels, p)[suspect], kind="stable")]
    assert list(ranked) == [10, 6, 19]


def test_a_label_without_rows_is_never_suggested_as_an_error():
    assert not metrics.suspect_labels([0, 0], [[0.6, 0.4], [0.1, 0.9]]).any()


def test_margins_and_entropies_by_hand():
    p = [[0.5, 0.3, 0.2], [1, 0, 0], [1 / 3, 1 / 3, 1 / 3]]
    assert list(metrics.prediction_margin(p)) == pytest.approx([0.2, 1, 0])
    expected = [-(0.5 * np.log(0.5) + 0.3 * np.log(0.3) + 0.2 * np.log(0.2)), 0, np.log(3)]
    assert list(metrics.entropy(p)) == pytest.approx(expected)


def signal_rows():
    """Rows of three splits with signals: a wrong label in train and in test, an unknown one in the pool."""
    probability_up = [0.9, 0.8, 0.1, 0.2, 0.1, 0.95, 0.55, 0.5, 0.99, 0.52]
    labels = ["up", "up", "up", "down", "down", "down", "up", "up", "up", "up"]
    split = ["train"] * 5 + ["test"] + ["pool"] * 4
    rows = pd.DataFrame({"source": "s", "split": split, "id": list("abcdefghij"), "label": labels})
    rows["text"], rows["group"] = "text " + rows["id"], list("abcdefgghh")
    signals = rows[["source", "split", "id"]].assign(probabilities=[np.array([p, 1 - p]) for p in probability_up])
    return rows, signals


def test_label_errors_are_gold_rows_and_the_worst_come_first(tmp_path):
    rows, signals = signal_rows()
    errors = find_label_errors(rows, signals, TASK)
    assert errors[["id", "label", "suggestion"]].to_numpy().tolist() == [["f", "down", "up"], ["c", "up", "down"]]
    assert list(errors["probability"]) == pytest.approx([0.95, 0.9])
    assert list(errors["label_probability"]) == pytest.approx([0.05, 0.1])
    texts = ['a "quoted", text\nof two lines', "NA"]
    write_review(tmp_path, errors.assign(text=texts), find_rows_to_label(rows, signals, TASK))
    read = read_label_errors(tmp_path)
    assert list(read["text"]) == texts
    assert list(read["id"]) == ["f", "c"]
    assert (tmp_path / "to_label.csv").read_text().splitlines()[0].startswith("source,split,id,text,suggestion")
    assert read_label_errors(tmp_path / "nothing") is None


def test_the_least_sure_pool_row_of_each_group_comes_first():
    rows, signals = signal_rows()
    to_label = find_rows_to_label(rows, signals, TASK)
    assert list(to_label["id"]) == ["h", "j"]  # of the groups g and h
    assert list(to_label["margin"]) == pytest.approx([0, 0.04])
    assert "label" not in to_label


def test_other_kinds_of_task_have_no_such_rows():
    rows, signals = signal_rows()
    task = TASK.model_copy(update={"kind": "choice"})
    assert find_label_errors(rows, signals, task).empty
    assert find_rows_to_label(rows, signals, task).empty


def test_slices_by_hand():
    test = pd.DataFrame({"id": range(90), "text": ["a b"] * 30 + ["a b c"] * 30 + ["a b c d"] * 30, "label": "up"})
    test["style"] = ["news"] * 65 + ["post"] * 25
    test["constant"], test["many"], test["few"] = "x", range(90), [None] * 71 + ["y"] * 10 + ["z"] * 9
    n_rows = {(column, value): int(rows.sum()) for column, value, rows in slices(test)}
    assert n_rows == {
        ("style", "news"): 65,
        ("style", "post"): 25,
        ("length", "1 to 2 words"): 30,
        ("length", "3 to 3 words"): 30,
        ("length", "4 words or more"): 30,
    }


def test_slices_are_scored_for_the_compared_models(tmp_path):
    """A headline that is always wrong on one style; the rest is as the runs have it."""
    corpus = invented_corpus(np.random.default_rng(0))
    for i, row in enumerate(corpus):
        row["style"] = "post" if i % 4 == 0 else "news"
    params = write_project(tmp_path, corpus=corpus)
    for run in (tmp_path / "runs").glob("tiny-kd-*"):
        table, rows = (
            pd.read_parquet(run / "predictions.parquet"),
            pd.read_json(tmp_path / "data/demo.jsonl", lines=True),
        )
        post = table["id"].isin(rows.loc[rows["style"] == "post", "id"]) & (table["split"] == "test")
        table.loc[post, "prediction"] = "no label"
        table.to_parquet(run / "predictions.parquet")
    results = gather_results(tmp_path, params)
    scores = slice_scores(results)
    assert list(dict.fromkeys(scores["model"])) == ["tiny-kd", "tiny-gold", "big"]
    own = scores[(scores["model"] == "tiny-kd") & (scores["column"] == "style")].set_index("value")
    right = results.headline.predictions == results.tests["demo"]["label"].to_numpy(object)
    news = (results.tests["demo"]["style"] == "news").to_numpy()
    assert own.loc["news", "accuracy"] == pytest.approx(right[:, news].mean())
    assert own.loc["news", "low"] < own.loc["news", "accuracy"] < own.loc["news", "high"]
    assert own.loc["post", "accuracy"] == 0
    assert "weakest on *style: post*: 0.0 % of" in slice_sentence(scores, "tiny-kd")
    assert "**It reads these rows worse**" in slice_sentence(scores, "tiny-kd")
    same = scores.assign(high=1.0)
    assert "no slice is clearly worse" in slice_sentence(same, "tiny-kd")
    assert "no slices" in slice_sentence(scores.head(0), "tiny-kd")
