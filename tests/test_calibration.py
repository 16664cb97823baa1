"""Calibration of a prompted teacher without a gold label: by a prior, and by clusters of log-probabilities."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from scipy.stats import multivariate_normal

from distillery.config.schema import TeacherConfig
from distillery.teachers.calibration import (
    MIN_PROBABILITY,
    ROWS_PER_LABEL,
    LabelClusters,
    LabelPrior,
    TooFewRowsError,
    calibrated,
    calibration_record,
    fit_clusters,
    log_probabilities,
    read_calibration,
)
from distillery.teachers.prompt_search import PRIOR_ROWS, unlabelled_limit


def answers(n: int, labels: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(distributions [n, labels] of a teacher that prefers the first label, the rows' labels [n]).

    The first label is three times as frequent, and its rows spread further: no prior separates the labels well.
    """
    rng = np.random.default_rng(seed)
    gold = rng.choice(labels, n, p=np.array([3, *[1] * (labels - 1)]) / (labels + 2))
    spread = np.where(gold == 0, 0.8, 0.3)[:, None]
    bias = np.linspace(1.5, 0, labels)
    return softmax(1.2 * np.eye(labels)[gold] + bias + spread * rng.normal(size=(n, labels)), axis=1), gold


def test_a_prior_divides():
    p = np.array([[0.6, 0.3, 0.1], [np.nan] * 3])
    expected = np.array([0.6 / 0.5, 0.3 / 0.3, 0.1 / 0.2])
    result = LabelPrior(np.array([0.5, 0.3, 0.2])).apply(p)
    np.testing.assert_allclose(result[0], expected / expected.sum())
    assert np.isnan(result[1]).all() and calibrated(p, None) is p
    assert np.isfinite(LabelPrior(np.array([0.5, 0.5, 0.0])).apply(p[:1])).all()


def test_probabilities_of_clusters_are_those_of_gaussians():
    """Against scipy, with three clusters of which two overlap."""
    rng = np.random.default_rng(0)
    spreads = rng.normal(size=(3, 3, 3))
    clusters = LabelClusters(
        weights=np.array([0.5, 0.3, 0.2]),
        means=np.log([[0.7, 0.2, 0.1], [0.5, 0.4, 0.1], [0.2, 0.2, 0.6]]),
        covariances=spreads @ spreads.transpose(0, 2, 1) + 0.1 * np.eye(3),
        temperature=2.0,
    )
    p = rng.dirichlet(np.ones(3), 20)
    density = np.stack(
        [
            weight * multivariate_normal(mean, covariance).pdf(np.log(p))
            for weight, mean, covariance in zip(clusters.weights, clusters.means, clusters.covariances, strict=True)
        ],
        axis=1,
    )
    expected = np.sqrt(density) / np.sqrt(density).sum(1, keepdims=True)  # a temperature of 2
    np.testing.assert_allclose(clusters.apply(p), expected, rtol=1e-9)
    assert np.isnan(clusters.apply(np.full((1, 3), np.nan))).all()
    assert log_probabilities(np.array([0.0, 1.0])).tolist() == [np.log(MIN_PROBABILITY), 0.0]


@pytest.mark.parametrize("labels", [2, 3, 5])
def test_clusters_find_the_labels_that_a_biased_teacher_mixes_up(labels):
    p, gold = answers(400, labels)
    clusters = fit_clusters(p)
    raw, divided, clustered = (
        (q.argmax(1) == gold).mean() for q in (p, LabelPrior(p.mean(0)).apply(p), clusters.apply(p))
    )
    assert raw < divided - 0.05 and clustered > divided + 0.02, (raw, divided, clustered)
    confidence = LabelPrior(p.mean(0)).apply(p).max(1).mean()
    assert clusters.apply(p).max(1).mean() == pytest.approx(confidence, abs=1e-6)  # on average
    np.testing.assert_allclose(clusters.apply(p).sum(1), 1)
    again = read_calibration(json.loads(json.dumps({"prompt": None} | calibration_record(clusters))))
    np.testing.assert_array_equal(again.apply(p), clusters.apply(p))
    unread = np.concatenate([p, np.full((50, labels), np.nan)])
    np.testing.assert_array_equal(fit_clusters(unread).apply(p), clusters.apply(p))


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(3)), seed=st.integers(0, 100))
def test_clusters_do_not_depend_on_the_order_of_the_labels(order, seed):
    p, _ = answers(300, seed=seed)
    there = fit_clusters(p[:, order]).apply(p[:, order])
    np.testing.assert_allclose(there, fit_clusters(p).apply(p)[:, order], atol=0.02)


def test_too_few_rows_for_clusters_are_refused():
    p, _ = answers(95)
    p[:10] = np.nan
    message = "^needs rows with 90 different distributions over the labels, and there are 85$"
    with pytest.raises(TooFewRowsError, match=message):
        fit_clusters(p)
    with pytest.raises(TooFewRowsError, match="and there are 1$"):  # a teacher with one answer to all
        fit_clusters(np.full((200, 3), 1 / 3))


@pytest.mark.parametrize("spread", [1e-9, 1e-5, 1e-2, 30.0])
def test_clusters_of_a_teacher_that_hardly_differs_or_is_always_sure_are_finite(spread):
    p = softmax(spread * np.random.default_rng(0).normal(size=(200, 3)), axis=1)
    try:
        q = fit_clusters(p).apply(p)
    except TooFewRowsError:
        return
    assert np.isfinite(q).all() and np.allclose(q.sum(1), 1)
    assert np.isfinite(fit_clusters(p).apply(np.eye(3))).all()


@pytest.mark.parametrize(("labels", "rows"), [(2, 128), (3, 180), (10, 600)])
def test_a_teacher_labels_more_rows_for_clusters_than_these_need(labels, rows):
    """Twice as many, since rows may have the same distribution, and with more the worst of several fits is better."""
    by_clusters = TeacherConfig(kind="lm", model="m", calibrate="clusters")
    assert unlabelled_limit(by_clusters, labels) == rows >= 2 * labels * ROWS_PER_LABEL
    assert unlabelled_limit(by_clusters.model_copy(update={"calibrate": "batch"}), labels) == PRIOR_ROWS


def test_a_prior_is_kept_rounded_and_read_again():
    record = calibration_record(LabelPrior(np.array([1 / 3, 2 / 3])))
    assert record == {"prior": [0.333333, 0.666667]} and read_calibration(record).prior.tolist() == record["prior"]
    assert calibration_record(None) == {"prior": None} and read_calibration({"prior": None}) is None
