"""How the distributions of a prompted teacher are corrected without a gold label: by a label prior, or by clusters."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

MIN_PRIOR = 1e-6  # a label that is never predicted would divide by zero
MIN_PROBABILITY = 1e-4  # below which probabilities from files are rounded to 0
MIN_VARIANCE = 0.01  # of a log-probability: number formats such as int8 move it by about 0.1 nats
ROWS_PER_LABEL = 30  # at least, to find the cluster of a label
STARTS = 10  # of the fit, of which the best is taken


class TooFewRowsError(ValueError):
    """There are too few rows to find the clusters of the labels."""


@dataclass(frozen=True)
class LabelPrior:
    """Probabilities are divided by `prior` [labels], the distribution that the prompt alone brings about."""

    prior: np.ndarray

    def apply(self, probabilities: np.ndarray) -> np.ndarray:
        """The calibrated `probabilities` [n, labels]; NaN stays."""
        scaled = probabilities / np.maximum(self.prior, MIN_PRIOR)
        return scaled / scaled.sum(-1, keepdims=True)


@dataclass(frozen=True)
class LabelClusters:
    """Prototypical calibration: probabilities of clusters of log-probabilities (Han et al. 2023, section 3).

    Cluster k is that of label k: a Gaussian with its share `weights` [labels], `means` [labels, labels] and
    `covariances` [labels, labels, labels]. The paper takes the most probable cluster. A student learns probabilities,
    and those of clusters are near 0 and 1: the `temperature` makes them on average as confident as those that a prior
    divides.
    """

    weights: np.ndarray
    means: np.ndarray
    covariances: np.ndarray
    temperature: float = 1.0

    def apply(self, probabilities: np.ndarray) -> np.ndarray:
        """The calibrated `probabilities` [n, labels]; NaN stays."""
        scores = self._log_densities(probabilities) / self.temperature
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        return shares / shares.sum(-1, keepdims=True)

    def _log_densities(self, probabilities: np.ndarray) -> np.ndarray:
        """[n, labels]: log of weight times density of each cluster, without the constant that all have."""
        away = log_probabilities(probabilities)[:, None] - self.means
        distance = np.einsum("nki,kij,nkj->nk", away, np.linalg.inv(self.covariances), away)
        return np.log(self.weights) - 0.5 * (distance + np.linalg.slogdet(self.covariances)[1])


Calibration = LabelPrior | LabelClusters


def log_probabilities(probabilities: np.ndarray) -> np.ndarray:
    """The logarithms of `probabilities`, floored."""
    return np.log(np.maximum(probabilities, MIN_PROBABILITY))


def calibrated(probabilities: np.ndarray, calibration: Calibration | None) -> np.ndarray:
    """`probabilities` [n, labels] after `calibration`; as they are when it is None."""
    return probabilities if calibration is None else calibration.apply(probabilities)


def fit_clusters(probabilities: np.ndarray) -> LabelClusters:
    """The clusters of uncalibrated `probabilities` [n, labels]; rows of NaN do not count.

    As many Gaussians as labels are fitted by expectation maximization. Each becomes the cluster of one label: of all
    ways to pair them, the one in which the clusters' rows have most probability of their label, divided by the mean.
    Raises TooFewRowsError with fewer than `ROWS_PER_LABEL` different distributions a label.
    """
    from scipy.optimize import brentq, linear_sum_assignment
    from sklearn.mixture import GaussianMixture

    read = np.maximum(probabilities[~np.isnan(probabilities).any(1)].astype(np.float64), MIN_PROBABILITY)
    labels = probabilities.shape[1]
    if (different := len(np.unique(read, axis=0))) < ROWS_PER_LABEL * labels:
        needed = f"needs rows with {ROWS_PER_LABEL * labels} different distributions over the labels"
        raise TooFewRowsError(f"{needed}, and there are {different}")
    mixture = GaussianMixture(labels, n_init=STARTS, reg_covar=MIN_VARIANCE, random_state=0)
    shares = mixture.fit(log_probabilities(read)).predict_proba(log_probabilities(read))
    divided = LabelPrior(read.mean(0)).apply(read)
    of_label = linear_sum_assignment(-shares.T @ divided)[1].argsort()
    parts = mixture.weights_[of_label], mixture.means_[of_label], mixture.covariances_[of_label]

    def too_confident(log_temperature: float) -> float:
        tempered = LabelClusters(*parts, float(np.exp(log_temperature)))
        return tempered.apply(read).max(-1).mean() - divided.max(-1).mean()

    lowest, highest = np.log(1e-2), np.log(1e6)  # all rows sure; all rows even
    if too_confident(lowest) <= 0 or too_confident(highest) >= 0:
        nearest = lowest if too_confident(lowest) <= 0 else highest
        return LabelClusters(*parts, float(np.exp(nearest)))
    return LabelClusters(*parts, float(np.exp(brentq(too_confident, lowest, highest))))


def calibration_record(calibration: Calibration | None) -> dict[str, Any]:
    """`calibration` for `prompting.json`: `prior`, rounded to six digits, and of clusters also `clusters`.

    :func:`read_calibration` reads it.
    """
    if isinstance(calibration, LabelClusters):
        parts = asdict(calibration)
        return {"prior": None, "clusters": {key: np.asarray(value).tolist() for key, value in parts.items()}}
    return {"prior": None if calibration is None else [round(float(share), 6) for share in calibration.prior]}


def read_calibration(prompting: dict[str, Any]) -> Calibration | None:
    """The calibration in the content of a `prompting.json`."""
    if clusters := prompting.get("clusters"):
        arrays = {key: np.array(value) for key, value in clusters.items() if key != "temperature"}
        return LabelClusters(**arrays, temperature=clusters["temperature"])
    return None if prompting["prior"] is None else LabelPrior(np.array(prompting["prior"]))
