"""Every score against scikit-learn, SciPy or a slow computation of the definition, edge cases included."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk

from distillery import metrics

LABELS = ["positive", "neutral", "negative"]


@st.composite
def cases(draw):
    """Gold, predicted, probabilities [n, 3]: classes absent, all predictions equal and zero probabilities included."""
    rows = draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    present = LABELS[: draw(st.integers(1, 3))]
    answered = LABELS[draw(st.integers(0, 2)) :]
    p = rng.dirichlet([draw(st.sampled_from([0.02, 0.3, 3.0]))] * 3, rows)
    if draw(st.booleans()):  # certain predictions
        p = np.eye(3)[p.argmax(1)]
    return rng.choice(present, rows), rng.choice(answered, rows), p.astype(np.float32)


def specificity_by_scikit_learn(gold, predicted) -> float:
    """Recall of "is not this label", averaged over the labels that some row is not of."""
    others = [label for label in LABELS if (gold != label).any()]
    return float(np.mean([sk.recall_score(gold != label, predicted != label) for label in others]))


@settings(max_examples=150)
@given(cases())
@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # scikit-learn warns of classes that are absent
def test_report_agrees_with_scikit_learn(case):
    gold, predicted, p = case
    report = metrics.classification_report(gold, predicted, p, LABELS)
    precision, recall, f1, support = sk.precision_recall_fscore_support(gold, predicted, labels=LABELS, zero_division=0)
    true = metrics.encode_labels(gold, LABELS)
    exact = p.astype(np.float64)  # scikit-learn computes in the precision that it is given
    exact /= exact.sum(1, keepdims=True)
    expected = {
        "accuracy": sk.accuracy_score(gold, predicted),
        "balanced_accuracy": sk.balanced_accuracy_score(gold, predicted),
        "macro_f1": sk.f1_score(gold, predicted, average="macro", zero_division=0),
        "weighted_f1": sk.f1_score(gold, predicted, average="weighted", zero_division=0),
        "macro_specificity": specificity_by_scikit_learn(gold, predicted),
        "mcc": sk.matthews_corrcoef(gold, predicted),
        "log_loss": sk.log_loss(true, np.maximum(exact, metrics.PROBABILITY_FLOOR), labels=[0, 1, 2]),
        "brier": sk.brier_score_loss(true, exact, labels=[0, 1, 2], scale_by_half=False),
    }
    for name, value in expected.items():
        assert report[name] == pytest.approx(value, rel=1e-9, abs=1e-9), name
    for i, label in enumerate(LABELS):
        row = report["labels"][label]
        got = [row["precision"], row["recall"], row["f1"], row["support"]]
        assert got == pytest.approx([precision[i], recall[i], f1[i], support[i]])
        negatives = gold != label
        specificity = sk.recall_score(negatives, predicted != label, zero_division=0)
        assert row["specificity"] == pytest.approx(specificity)


def test_report_holds_plain_numbers_only():
    report = metrics.classification_report(["positive"], ["neutral"], [[0.2, 0.5, 0.3]], LABELS)
    values = [v for k, v in report.items() if k != "labels"] + [
        v for r in report["labels"].values() for v in r.values()
    ]
    assert {type(v) for v in values} == {int, float}
    without = metrics.classification_report(["positive"], ["neutral"], None, LABELS)
    assert set(report) - set(without) == {"log_loss", "brier", "ece", "risk_coverage_area"}


def test_an_unparsable_answer_is_wrong_and_no_label():
    gold = ["neutral", "neutral", "positive", "negative"]
    report = metrics.classification_report(gold, ["neutral", None, "positive", "maybe"], None, LABELS)
    assert report["accuracy"] == 0.5
    assert report["labels"]["neutral"]["precision"] == 1 and report["labels"]["neutral"]["recall"] == 0.5
    assert report["answer_bias"] == 0.5
    assert metrics.confusion(gold, ["neutral", None, "positive", "maybe"], LABELS)[:, 3].tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("gold", "predicted", "p", "message"),
    [
        ([], [], None, "non-empty"),
        (["neutral"], ["neutral", "neutral"], None, "2 predictions for 1"),
        (["maybe"], ["neutral"], None, "'maybe'"),
        (["neutral"], ["neutral"], [[0.5, 0.5]], "shape"),
        (["neutral"], ["neutral"], [[0.5, 0.5, 0.5]], "add up to 1"),
        (["neutral"], ["neutral"], [[np.nan, 0.5, 0.5]], "finite"),
        (["neutral"], ["neutral"], [[-0.5, 0.5, 1.0]], ">= 0"),
    ],
)
def test_wrong_input_is_refused(gold, predicted, p, message):
    with pytest.raises(ValueError, match=message):
        metrics.classification_report(gold, predicted, p, LABELS)


@settings(max_examples=100)
@given(cases())
def test_answer_bias_is_half_the_difference_of_shares(case):
    gold, predicted, _ = case
    by_hand = sum(abs((gold == label).mean() - (predicted == label).mean()) for label in LABELS) / 2
    report = metrics.classification_report(gold, predicted, None, LABELS)
    assert report["answer_bias"] == pytest.approx(by_hand)
    assert report["commonest_answer"] == pytest.approx(max((predicted == label).mean() for label in LABELS))


@settings(max_examples=100)
@given(cases(), st.integers(1, 20))
def test_calibration_by_its_definition(case, bins):
    gold, _, p = case
    true, p = metrics.encode_labels(gold, LABELS), p.astype(np.float64)
    table = metrics.calibration(true, p, bins)
    confidence, right = p.max(1), p.argmax(1) == true
    error = 0.0
    for i, (low, high) in enumerate(pairwise(np.linspace(0, 1, bins + 1))):
        inside = (confidence > low) & (confidence <= high)
        if i == bins - 1:  # float32 sums: 1.0000001 is still certain
            inside |= confidence > 1
        assert table["rows"][i] == inside.sum()
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert table["ece"] == pytest.approx(error, abs=1e-9)


def test_a_confidence_on_an_edge_belongs_to_the_bin_below():
    table = metrics.calibration(np.array([0, 0]), np.array([[0.5, 0.5], [1.0, 0.0]]), bins=2)
    assert table["rows"].tolist() == [1, 1]


def test_calibration_of_a_model_that_knows_its_errors():
    rng = np.random.default_rng(0)
    p = rng.dirichlet([1, 1, 1], 20_000)
    true = (rng.random((20_000, 1)) > p.cumsum(1)).sum(1)
    assert metrics.calibration(true, p)["ece"] < 0.02
    assert metrics.calibration(true, np.eye(3)[p.argmax(1)])["ece"] > 0.3


@settings(max_examples=100)
@given(cases(), st.integers(0, 99))
def test_risk_coverage_by_its_definition(case, seed):
    gold, _, p = case
    true, p = metrics.encode_labels(gold, LABELS), p.astype(np.float64)
    table = metrics.risk_coverage(true, p)
    confidence, wrong = p.max(1), p.argmax(1) != true
    for threshold in np.unique(confidence):
        inside = confidence >= threshold
        at = inside.sum() - 1
        assert table["coverage"][at] == pytest.approx(inside.mean())
        assert table["risk"][at] == pytest.approx(wrong[inside].mean())
    order = np.random.default_rng(seed).permutation(len(true))
    assert metrics.risk_coverage(true[order], p[order])["area"] == pytest.approx(table["area"])


@settings(max_examples=150)
@given(cases(), st.integers(0, 2**32))
def test_kl_agrees_with_scipy(case, seed):
    p = case[2].astype(np.float64)
    q = np.random.default_rng(seed).dirichlet([1.0] * 3, len(p))
    expected = [stats.entropy(a, b) for a, b in zip(p, q, strict=True)]
    np.testing.assert_allclose(metrics.kl_divergence(p, q), expected, rtol=1e-4, atol=1e-5)
    assert metrics.kl_divergence(p, p).max() < 1e-6


def test_kl_to_a_student_that_excludes_the_answer_is_finite():
    value = metrics.kl_divergence([[1.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]])
    assert value[0] == pytest.approx(-np.log(metrics.PROBABILITY_FLOOR), rel=1e-6)
    with pytest.raises(ValueError, match="shape"):
        metrics.kl_divergence([[1.0, 0.0]], [[0.5, 0.2, 0.3]])


@settings(max_examples=60)
@given(cases())
def test_no_temperature_on_a_grid_is_better_than_the_fitted_one(case):
    true, p = metrics.encode_labels(case[0], LABELS), case[2]
    fitted = metrics.log_loss(true, metrics.apply_temperature(p, metrics.fit_temperature(true, p)))
    grid = [metrics.log_loss(true, metrics.apply_temperature(p, t)) for t in np.geomspace(0.05, 20, 60)]
    assert fitted <= min(grid) + 1e-4
    assert (metrics.apply_temperature(p, 3.0).argmax(1) == p.argmax(1)).all()


def test_temperature_is_that_of_an_overconfident_model():
    """For logits three times too large the temperature is three, and calibration comes back."""
    rng = np.random.default_rng(0)
    right = rng.dirichlet([1, 1, 1], 8000)
    true = (rng.random((8000, 1)) > right.cumsum(1)).sum(1)
    loud = metrics.apply_temperature(right, 1 / 3)
    temperature = metrics.fit_temperature(true[:4000], loud[:4000])
    assert temperature == pytest.approx(3, rel=0.06)
    before, after = (metrics.calibration(true[4000:], p)["ece"] for p in (loud[4000:], right[4000:]))
    assert (
        metrics.calibration(true[4000:], metrics.apply_temperature(loud[4000:], temperature))["ece"]
        < (before + after) / 2
    )


# ---------------------------------------------------------------- free answers


@pytest.mark.parametrize(
    ("prediction", "aliases", "exact", "f1"),
    [
        ("The Beatles!", ["beatles"], 1, 1),
        ("in Paris, France", ["Paris"], 0, 0.5),
        ("Paris", ["Lyon", "city of Paris"], 0, 0.5),
        ("a the an", ["The"], 1, 1),  # nothing is left on either side
        ("", ["Paris"], 0, 0),
        ("Paris", ["?!"], 0, 0),
        ("new new york", ["new york york"], 0, 2 / 3),  # words count as often as they occur
        (None, ["Paris"], 0, 0),
        ("Zürich  Airport", ["zürich airport"], 1, 1),
    ],
)
def test_free_answers_by_hand(prediction, aliases, exact, f1):
    assert metrics.exact_match(prediction, aliases) == exact
    assert metrics.token_overlap(prediction, aliases)[0] == pytest.approx(f1)


def squad(prediction: str, gold: str) -> tuple[float, float]:
    """Exact match and F1 as the evaluation script of SQuAD 2.0 computes them."""
    import collections
    import re
    import string

    def tokens(text):
        text = "".join(ch for ch in text.lower() if ch not in set(string.punctuation))
        return re.sub(re.compile(r"\b(a|an|the)\b", re.UNICODE), " ", text).split()

    gold_toks, pred_toks = tokens(gold), tokens(prediction)
    common = collections.Counter(gold_toks) & collections.Counter(pred_toks)
    num_same = sum(common.values())
    exact = float(" ".join(gold_toks) == " ".join(pred_toks))
    if not gold_toks or not pred_toks:
        return exact, float(gold_toks == pred_toks)
    if num_same == 0:
        return exact, 0.0
    precision, recall = num_same / len(pred_toks), num_same / len(gold_toks)
    return exact, 2 * precision * recall / (precision + recall)


ANSWERS = st.lists(st.sampled_from(["the", "A", "Paris", "paris.", "of", "1,204", "-", "éa", "an", ""]), max_size=6)


@settings(max_examples=150)
@given(ANSWERS.map(" ".join), st.lists(ANSWERS.map(" ".join), min_size=1, max_size=3))
def test_free_answers_agree_with_squad(prediction, aliases):
    scores = [squad(prediction, alias) for alias in aliases]
    assert metrics.exact_match(prediction, aliases) == max(exact for exact, _ in scores)
    assert metrics.token_overlap(prediction, aliases)[0] == pytest.approx(max(f1 for _, f1 in scores))


def test_an_answer_with_nothing_to_compare_it_to_is_refused():
    for score in (metrics.exact_match, metrics.token_overlap):
        with pytest.raises(ValueError, match="at least one alias"):
            score("Paris", [])


# ---------------------------------------------------------------- statistics


def slow_resamples(values, groups, n, seed):
    """The definition: draw groups, take all their rows, average."""
    rng = np.random.default_rng([seed, 0])
    names = np.unique(groups)
    for row in rng.integers(0, len(names), (n, len(names))):
        yield np.concatenate([np.flatnonzero(groups == names[g]) for g in row])


@settings(max_examples=30)
@given(cases(), st.integers(0, 99), st.integers(1, 12))
def test_bootstrap_is_what_a_loop_over_groups_gives(case, seed, kinds):
    gold, predicted, p = case
    groups = np.random.default_rng(seed).integers(0, kinds, len(gold)).astype(str)
    drawn = metrics.bootstrap_scores(gold, predicted, LABELS, groups, 20, seed)
    means = metrics.cluster_bootstrap(p[:, 0], groups, 20, seed)
    for i, rows in enumerate(slow_resamples(None, groups, 20, seed)):
        assert drawn["accuracy"][i] == pytest.approx(sk.accuracy_score(gold[rows], predicted[rows]))
        f1 = sk.f1_score(gold[rows], predicted[rows], average="macro", zero_division=0)
        assert drawn["macro_f1"][i] == pytest.approx(f1)
        assert means[i] == pytest.approx(p[rows, 0].mean(), rel=1e-5, abs=1e-7)


def test_bootstrap_of_single_rows_agrees_with_scipy():
    values = np.random.default_rng(1).exponential(size=200)
    interval = metrics.interval(metrics.cluster_bootstrap(values, np.arange(200), 4000))
    scipy = stats.bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=0).confidence_interval
    assert interval == pytest.approx((scipy.low, scipy.high), abs=0.02)


def test_blocks_of_resamples_change_nothing(monkeypatch):
    values, groups = np.random.default_rng(1).random((2, 30)), np.arange(30) // 2
    whole = metrics.cluster_bootstrap(values, groups, 50, 3)
    monkeypatch.setattr("distillery.metrics.significance.BLOCK", 40)
    np.testing.assert_array_equal(metrics.cluster_bootstrap(values, groups, 50, 3), whole)


def test_copies_of_a_row_do_not_narrow_the_interval():
    rng = np.random.default_rng(0)
    values = (rng.random(100) < 0.7).astype(float)
    once = metrics.cluster_bootstrap(values, np.arange(100), 4000)
    copied = metrics.cluster_bootstrap(np.repeat(values, 5), np.repeat(np.arange(100), 5), 4000)
    as_rows = metrics.cluster_bootstrap(np.repeat(values, 5), np.arange(500), 4000)
    assert copied.std() == pytest.approx(once.std(), rel=0.1)
    assert as_rows.std() < 0.6 * once.std()


def test_seeds_that_differ_widen_the_interval():
    rows, groups = np.ones(50), np.arange(50)
    assert metrics.cluster_bootstrap([rows, rows], groups, 200).std() == 0
    # two runs of 0 and 1 have a standard deviation of sqrt(1/2) between runs: sqrt(1/4) for the mean of two
    assert metrics.cluster_bootstrap([rows, 0 * rows], groups, 2000).std() == pytest.approx(np.sqrt(1 / 4), rel=0.1)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_over_few_seeds_are_as_wide_as_the_truth(seeds):
    """The standard error from a handful of runs is right on average, not too small by the factor (S - 1) / S."""
    rng = np.random.default_rng(0)
    runs = rng.normal(0, 1, (300, seeds))
    variances = [
        metrics.cluster_bootstrap(np.repeat(r[:, None], 4, 1), np.arange(4), 400, i).var() for i, r in enumerate(runs)
    ]
    assert np.mean(variances) == pytest.approx(1 / seeds, rel=0.15)


def planted(rng, rows, right):
    """Gold labels and predictions that are right for about the share `right` of the rows."""
    gold = rng.choice(LABELS, rows)
    wrong = np.array(LABELS)[(metrics.encode_labels(gold, LABELS) + rng.integers(1, 3, rows)) % 3]
    return gold, lambda share=right: np.where(rng.random(rows) < share, gold, wrong)


def test_paired_difference_of_a_model_with_itself_is_nothing():
    gold, predict = planted(np.random.default_rng(0), 100, 0.6)
    predicted = predict()
    for score in metrics.paired_difference(gold, predicted, predicted, LABELS, np.arange(100), 200).values():
        assert (score["mean"], score["low"], score["high"], score["p"], score["detectable"]) == (0, 0, 0, 1, 0)


def test_runs_of_two_models_are_drawn_apart():
    """Seed 0 of one model has nothing to do with seed 0 of another: their luck does not cancel."""
    gold = ["positive"] * 8
    runs = [gold, ["neutral"] * 8]
    score = metrics.paired_difference(gold, runs, runs, LABELS, list("abcdefgh"), 500)["accuracy"]
    assert (score["mean"], score["low"], score["high"]) == (0, -1, 1)


def test_paired_difference_by_hand():
    gold = ["positive"] * 4
    a, b = gold, ["positive", "positive", "neutral", "neutral"]
    got = metrics.paired_difference(gold, [a, b], b, LABELS, list("wxyz"), 500)["accuracy"]
    assert got["mean"] == pytest.approx(0.25)  # (1 + 0.5) / 2 - 0.5
    assert got["low"] < 0 and got["high"] >= 0.5  # one of the two runs is no better


def test_paired_difference_separates_a_gain_from_noise():
    rng = np.random.default_rng(0)
    gold, predict = planted(rng, 600, 0.6)
    groups = np.arange(600) // 2
    base = [predict(), predict()]
    gain = metrics.paired_difference(gold, [predict(0.75), predict(0.75)], base, LABELS, groups, 500)
    none = metrics.paired_difference(gold, [predict(), predict()], base, LABELS, groups, 500)
    for score in metrics.SCORES:
        assert gain[score]["low"] > 0.05 and 0 < gain[score]["p"] < 0.01
        assert none[score]["low"] < 0 < none[score]["high"] and none[score]["p"] > 0.05
        assert 0.02 < none[score]["detectable"] < 0.15


def test_paired_interval_holds_what_it_promises():
    """Under no difference, about 5 % of the 95 % intervals may leave out 0, groups of three copied rows included."""
    rng = np.random.default_rng(0)
    misses = 0
    for trial in range(300):
        gold, predict = planted(rng, 80, 0.6)
        rows = np.repeat(np.arange(80), 3)
        a, b = predict()[rows], predict()[rows]
        score = metrics.paired_difference(gold[rows], a, b, LABELS, rows, 300, seed=trial)["accuracy"]
        misses += score["low"] > 0 or score["high"] < 0
    assert 4 <= misses <= 30


@settings(max_examples=25)
@given(st.integers(0, 2**32), st.integers(2, 9), st.integers(1, 2))
def test_permutation_test_agrees_with_scipy(seed, kinds, seeds):
    """SciPy tries all sign flips of the groups' summed differences; this test draws some."""
    rng = np.random.default_rng(seed)
    a, b = rng.random((2, seeds, 30)) < [[[0.5]], [[0.7]]]
    groups = rng.integers(0, kinds, 30)
    sums = np.bincount(groups, a.mean(0) - b.mean(0))[np.unique(groups)]
    exact = stats.permutation_test((sums, 0 * sums), lambda x, y, axis: (x - y).sum(axis), vectorized=True,
                                   permutation_type="samples", n_resamples=np.inf).pvalue  # fmt: skip
    p = metrics.permutation_test(a, b, groups, 4000, seed % 1000)
    assert p == pytest.approx(min(1.0, exact), abs=0.035)
    assert metrics.permutation_test(b, a, groups, 4000, seed % 1000) == p


def test_permutation_test_of_single_rows_is_mcnemars():
    rng = np.random.default_rng(3)
    a, b = rng.random(200) < 0.75, rng.random(200) < 0.65
    exact = stats.binomtest(int((a & ~b).sum()), int((a != b).sum())).pvalue  # McNemar's, of the discordant rows
    assert metrics.permutation_test(a, b, np.arange(200), 20_000) == pytest.approx(exact, abs=0.01)
    assert metrics.permutation_test(a, a, np.arange(200)) == 1
    with pytest.raises(ValueError, match="same rows"):
        metrics.permutation_test(a, b[:5], np.arange(200))


def test_permutation_test_knows_that_copies_are_no_evidence():
    rng = np.random.default_rng(1)
    a, b = rng.random(40) < 0.75, rng.random(40) < 0.6
    once = metrics.permutation_test(a, b, np.arange(40), 4000)
    copied, groups = [np.repeat(x, 5) for x in (a, b)], np.repeat(np.arange(40), 5)
    assert metrics.permutation_test(*copied, groups, 4000) == pytest.approx(once, abs=0.03)
    assert metrics.permutation_test(*copied, np.arange(200), 4000) < once / 2


@settings(max_examples=100)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_by_its_definition(p):
    adjusted = metrics.holm(p)
    order = np.argsort(p, kind="stable")
    for level in (0.01, 0.05, 0.2):  # step down: stop at the first p above level / (m - i)
        rejected = set()
        for i, at in enumerate(order):
            if p[at] * (len(p) - i) > level:
                break
            rejected.add(at)
        assert set(np.flatnonzero(adjusted <= level)) == rejected


def test_smallest_detectable_difference_is_detected_four_times_in_five():
    se = 0.02
    effect = metrics.smallest_detectable_difference(se)
    assert effect == pytest.approx(2.8016 * se, rel=1e-3)
    observed = np.random.default_rng(0).normal(effect, se, 20_000)
    assert (observed > 1.959964 * se).mean() == pytest.approx(0.8, abs=0.01)
