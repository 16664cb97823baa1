"""The computed sentences of the notebooks: other facts give the opposite sentence."""

from __future__ import annotations

import importlib
import math
import pkgutil

import numpy as np
import pandas as pd
import pytest

import distillery.notebook
from distillery.data.label_sets import audit_label_sets
from distillery.evaluation.results import Check
from distillery.label_sets import LabelSets
from distillery.models.heads import OwnHead
from distillery.notebook import augment, data, distill, evaluate, heads, labels, one_gpu, teach, texts
from distillery.notebook import lesson_sentences as lesson
from distillery.notebook.one_gpu import GIB
from distillery.notebook.style import join_words

FALLING, RISING = (pd.DataFrame({"loss": values}) for values in ([1.0, 0.2], [0.2, 1.0]))
BOARD = pd.DataFrame(
    {
        "model": ["teacher", "student", "control"],
        "role": ["teacher", "student", "control"],
        "accuracy": [0.8, 0.7, 0.6],
        "parameters": [100.0, 10.0, 10.0],
    }
)
SIZES = pd.DataFrame({"model": ["s1", "s3", "s6"], "parameters": [1e6, 3e6, 6e6], "accuracy": [0.5, 0.6, 0.7]})
SIZES = SIZES.assign(accuracy_low=SIZES["accuracy"] - 0.05, accuracy_high=SIZES["accuracy"] + 0.05)
SPLITS = pd.DataFrame({"split": ["train", "test"], "share": [0.5, 0.5], "wanted share": [0.5, 0.5]})
WORD = {"label": "negative", "word": "loss", "inside": 0.3, "outside": 0.05}
GAINS = pd.DataFrame({"model": "s", "after phase": [0, 1, 2], "accuracy": [0.3, 0.6, 0.7], "gain": [None, 0.3, 0.1]})
GAINS["gain_error"] = [None, 0.02, 0.02]
LOST = GAINS.assign(accuracy=[0.3, 0.6, 0.59], gain=[None, 0.3, -0.01])
LEAK, BIAS = Check("leak", False, "", ("other",)), Check("shortcut", False, "", ("s", "c"))
CLOSE = pd.DataFrame({"model": ["s", "s, untrained"], "teacher": "t", "agreement": [0.8, 0.3], "kl": [0.1, 0.9]})
GOLD = pd.Series(["a", "a", "b"])
SIGNALS = pd.DataFrame({"source": "s", "split": "pool", "id": ["a", "b"]})
TOKENS = SIGNALS[:1].assign(tokens='[["yes", -0.1, [["yes", -0.1], ["no", -2.5]]]]')
STABLE = pd.DataFrame({"model": "s", "perturbation": ["names", "amounts"], "consistency": [0.99, 0.95]})

# function, facts and a part of their sentence, other facts and a part of the opposite sentence
CASES = [
    (data.reading_sentence, (10, 0, 10), "None of them repeats", (10, 2, 8), "2 repeat another one"),
    (data.balance_sentence, ({"a": 80, "b": 20},), "right that often", ({"a": 50, "b": 50},), "balanced"),
    (data.length_sentence, ({"a": 10.0, "b": 20.0},), "length alone", ({"a": 10.0, "b": 11.0},), "no hint"),
    (data.vocabulary_sentence, ([WORD],), "no single word", ([WORD | {"inside": 0.9}],), "gives the label away"),
    (data.cluster_sentence, (0, 9, 0), "single rows would do", (4, 9, 2), "2 pairs bear different labels"),
    (data.split_sentence, (SPLITS,), "fit well", (SPLITS.assign(share=[0.7, 0.3]),), "too large"),
    (data.leak_sentence, (0, 45, 90, 90), "leaks nothing", (3, 45, 90, 90), "**The split leaks**"),
    (data.across_sentence, (0, 0.85, 0.6), "No pair", (2, 0.85, 0.9), "**2 pairs**"),
    (
        data.overlap_sentence,
        ({"bench": {"test_rows": 9, "same": 0, "near": 0}},),
        "None of the 9 test rows of bench",
        ({"bench": {"test_rows": 9, "same": 1, "near": 2}},),
        "**3 of the 9 test rows of bench**",
    ),
    (data.few_shot_sentence, (0, 3), "None of the 3", (1, 3), "**1 of the 3"),
    (
        heads.head_sentence,
        (OwnHead(["bad", "good"], [1, 0]), ["up", "down"]),
        "good is up, bad is down",
        (OwnHead(["bad", "good"], None), ["up", "down"]),
        "one is drawn at random",
    ),
    (
        labels.coverage_sentence,
        ("m", GOLD, GOLD, True),
        "each of the 2 labels",
        ("m", GOLD, pd.Series(list("aaa")), True),
        "**m never predicts** b (1 of 3)",
    ),
    (
        labels.constant_sentence,
        ("m", GOLD, GOLD, True),
        "m is right on 100.0 % of 3",
        ("m", GOLD, pd.Series(list("aaa")), True),
        "**m is not better than a constant answer**",
    ),
    (
        texts.cut_sentence,
        ("m", {"rows": 9, "cut": 0, "tokens": 256}),
        "none of 9 texts is cut",
        ("m", {"rows": 9, "cut": 3, "tokens": 256}),
        "the ends of 3 of 9 texts (33.3 %) are cut",
    ),
    (
        texts.long_texts_sentence,
        ({"128": 0, "256": 0}, 9),
        "No row has more than 128 words",
        ({"128": 5, "256": 2}, 9),
        "5 more than 128, 2 more than 256",
    ),
    (
        labels.coverage_sentence,
        ("m", pd.Series(["a | b", "(none)"]), pd.Series(["b | a", "a"]), True, LabelSets("ab")),
        "predicts each of the 2 labels",
        ("m", pd.Series(["a | b", "(none)"]), pd.Series(["b", "(none)"]), True, LabelSets("ab")),
        "**m never predicts** a (1 of 2) on the validation rows: more gold rows",
    ),
    (
        data.label_set_sentence,
        ({"labels_per_row": 0.5, "without_label": 2, "distinct": 2, "sets": {"a": 2, "(none)": 2}},),
        "2 rows have none",
        ({"labels_per_row": 1.0, "without_label": 0, "distinct": 1, "sets": {"a": 2}},),
        "every row has one at least",
    ),
    (teach.untrained_sentence, (0.6, 0.4, True), "knows something", (0.3, 0.4, True), "does **not** know"),
    (teach.untrained_sentence, (0.6, 0.4, False), "Untuned, the teacher", (0.6, 0.4, True), "before it sees gold rows"),
    (teach.loss_sentence, ({"all": FALLING},), "fits these rows better", ({"all": RISING},), "did **not** fit"),
    (teach.memory_sentence, (0.83, 0.73, 0.62), "the difference is memory", (0.73, 0.73, 0.62), "no sign"),
    (teach.memory_sentence, (0.83, 0.73, 0.62), "learned from fewer rows", (0.83, 0.73, 0.73), "(73.0 %)."),
    (teach.memory_sentence, (0.83, 0.73, None), "Without folds", (0.83, None, 0.62), "students see signals of models"),
    (teach.knowledge_sentence, (0.7, 0.4, 9), "it can teach", (0.4, 0.4, 9), "**nothing** to teach"),
    (teach.knowledge_sentence, (0.7, 0.4, 9), "held-out rows", (math.nan, 0.4, 0), "**nothing** to score it on"),
    (teach.calibration_sentence, (0.9, 0.7), "overconfident", (0.6, 0.7), "underconfident"),
    (teach.selection_sentence, (0.9, 0.7), "gives cleaner", (0.7, 0.7), "**not** give cleaner"),
    (teach.label_error_sentence, (0, 200), "none of the 200", (10, 200), "5.0 %"),
    (teach.labelling_sentence, (0, 0.0), "no pool rows", (20, 0.2), "would teach it something"),
    (teach.labelling_sentence, (20, 0.2), "decides none", (20, 0.9), "the last ones are clear"),
    (teach.tokens_sentence, (TOKENS[:0], SIGNALS), "No row has", (TOKENS, SIGNALS), "1 rows have none: `b`"),
    (teach.rationale_sentence, (64, 0), "None of the 64", (64, 5), "5 of the 64"),
    (teach.rationale_sentence, (64, 1), "1 of the 64 rationales names", (64, 2), "2 of the 64 rationales name another"),
    (augment.plan_sentence, (9, 0, "t"), "nothing is paraphrased", (9, 2, "t"), "t writes 2 paraphrases"),
    (augment.filter_sentence, ({"kept": 9, "copy": 1},), "can be used", ({"kept": 1, "copy": 9},), "changes too much"),
    (augment.agreement_sentence, ({"a": 0.9},), "still mean", ({"a": 0.9, "b": 0.5},), "b often disagrees"),
    (augment.vote_sentence, (0.7, 0.9, 0.8, 0.5), "agreement finds", (0.7, 0.8, 0.9, 0.5), "confidence finds"),
    (augment.vote_sentence, (0.7, 0.9, 0.9, 0.5), "equally well", (0.7, 0.7, 0.7, 0.5), "neither agreement"),
    (distill.rows_sentence, (5, 0, 0), "needs no teacher", (5, 0, 20), "5 gold rows and 20 rows without a label"),
    (distill.rows_sentence, (5, 3, 20), "3 paraphrases that inherit a label", (5, 0, 20), "are 5 gold rows and 20"),
    (distill.rows_sentence, (5, 3, 0), "less sure than a gold one", (8, 0, 0), "All 8 training rows"),
    (distill.size_sentence, (3, 10, 10, "none"), "all of them", (3, 10, 4, "lora"), "moves none of these"),
    (
        distill.size_sentence,
        (3, 10, 4, "none"),
        "moves 4 of them, 40.0 %.",
        (3, 10, 4, "series"),
        "of its adapters and",
    ),
    (distill.equality_sentence, (0.5, 0.5, "kl"), "nats: the same number", (0.5, 0.6, "kl"), "**not** the same number"),
    (
        distill.softening_sentence,
        (np.array([0.9]), np.array([0.6]), 2),
        "lowers",
        (np.eye(2), np.eye(2), 2),
        "nothing to soften",
    ),
    (
        distill.softening_sentence,
        (np.array([0.75]), np.array([0.75]), 1),
        "leaves the target as it is",
        (np.array([0.75]), np.array([0.90]), 0.5),
        "raises",
    ),
    (
        distill.softening_sentence,
        (np.array([0.34]), np.array([0.337]), 2),
        "next to nothing",
        (np.eye(2)[0], np.eye(2)[0], 1),
        "A hard label has nothing",
    ),
    (distill.movement_sentence, (0.4, 0.1), "towards its target", (0.1, 0.4), "**away**"),
    (distill.progress_sentence, (pd.Series([0.3, 0.6]),), "In sum: +30.0", (pd.Series([0.6, 0.6]),), "gave nothing"),
    (
        distill.progress_sentence,
        (pd.Series([0.2673, 0.6584, 0.6486]),),
        "65.8 % after phase 1 (+39.1 points) and on 64.9 % after phase 2 (\N{MINUS SIGN}0.9 points). In sum: +38.2",
        (pd.Series([0.6, 0.7, 0.5]),),
        "**worse**",
    ),
    (distill.result_sentence, (0.7, 0.5, 99), "learned to read", (0.52, 0.5, 99), "learned **nothing**"),
    (distill.confidence_sentence, ([0.9], [0.5]), "confidence helps to find", ([0.5], [0.9]), "does **not** help"),
    (distill.confidence_sentence, ([0.9, 0.5], [0.5]), "in 75.0 % of", ([0.4, 0.6] * 10, [0.5] * 9), "in 50.0 %"),
    (
        distill.confidence_sentence,
        ([0.9] * 6 + [0.5] * 5, [0.6]),
        "hardly helps",
        ([0.60, 0.60], [0.59]),
        "confidence helps to find",
    ),
    (evaluate.leader_sentence, (BOARD, "student"), "10.0 points below", (BOARD[1:], "student"), "is the best model"),
    (evaluate.verdict_sentence, (["better"],), "Every one", (["no evidence"],), "1 show no evidence"),
    (
        evaluate.check_sentence,
        ([Check("leak", True, "")], "s", "c"),
        "All 1 checks passed",
        ([LEAK], "s", "c"),
        "(1 of leak): other. The headline student s is not among them, nor is its control c.",
    ),
    (
        evaluate.check_sentence,
        ([LEAK, BIAS], "s", "c"),
        "other, s and c. Among them are the headline student s and c, the control of s.",
        ([LEAK, BIAS], "x", "c"),
        "Among them is c, the control of x.",
    ),
    (
        evaluate.check_sentence,
        ([LEAK], "s", None),
        "not among them. Read",
        ([Check("leak", False, "")], "s", "c"),
        "all models",
    ),
    (evaluate.pair_sentence, (0.2, 9, 0.8), "often misses", (0.7, 9, 0.8), "as well as the rest"),
    (evaluate.robustness_sentence, (STABLE, "s"), "hardly", (STABLE.assign(consistency=0.5), "s"), "**what must not"),
    (evaluate.front_sentence, (BOARD, "student"), "on the dashed line", (BOARD, "control"), "student is no larger"),
    (
        evaluate.size_sentence,
        (SIZES,),
        "s1, s3 and s6 differ in size alone: 1.0 M to 6.0 M parameters, 50.0 % to 70.0 %. The intervals of the "
        "smallest and the largest are apart: more parameters help.",
        (SIZES[:2],),
        "**no evidence** that size matters",
    ),
    (evaluate.size_sentence, (SIZES,), "more parameters help", (SIZES[::-1],), "more parameters **harm**"),
    (evaluate.confusion_sentence, ("aab", "bba"), "leans towards b", ("ab", "ba"), "leans to neither"),
    (evaluate.calibration_sentence, (0.1, 1.5), "overconfident", (0.1, 0.7), "underconfident"),
    (
        evaluate.phase_sentence,
        (GAINS, "s", 202),
        "phase 1 gave +30.0 points and phase 2 gave +10.0 points. Each phase helped.",
        (LOST, "s", 202),
        "202 validation rows cannot show a change by phase 2",
    ),
    (
        evaluate.phase_sentence,
        (LOST, "s", 202),
        "two standard errors",
        (LOST.assign(gain_error=0.001), "s", 202),
        "Phase 2 made it **worse**: try the list of phases without it.",
    ),
    (evaluate.closeness_sentence, (CLOSE, "s", "t"), "came nearer", (CLOSE.assign(kl=0.5), "s", "t"), "did **not**"),
    (
        evaluate.disagreement_sentence,
        ({"only the student is right": 5, "only the teacher is right": 3},),
        "loses no row in sum, and wins 2",
        ({"only the student is right": 59, "only the teacher is right": 117},),
        "the student loses 58 rows in sum",
    ),
    (lesson.soft_rows_sentence, (0.5, 0.2), "throw this away", (0.05, 0.2), "almost hard"),
    (lesson.entropy_sentence, (0.5, 0.9, 4), "softer", (0.5, 0.3, 0.5), "**harder**"),
    (
        lesson.neighbour_sentence,
        ("a", {"b": 0.3, "c": 0.1}),
        "closer to b",
        ("a", {"b": 0.2, "c": 0.2}),
        "no closer one",
    ),
    (lesson.gradient_sentence, (0.02, 1.2, 8), "keeps the learning rate", (0.9, 3.0, 2), "does **not** bring"),
    (lesson.soft_against_hard_sentence, (0.6, 0.5, 0.02), "points better", (0.5, 0.5, 0.02), "no winner"),
    (lesson.divergence_sentence, (0.5, 0.3), "misses", (0.3, 0.5), "invents"),
    (lesson.denominator_sentence, (0.8, 0.8, 0.5), "0.8000: equal", (0.8, 0.7, 0.5), "**not** equal"),
    (lesson.steps_sentence, (1e-9, 1.0, 0.5), "are the same training", (0.1, 1.0, 0.5), "**not** the same training"),
    (lesson.memory_gap_sentence, (0.99, 0.6, 0.61), "were memory", (0.62, 0.5, 0.61), "memorised nothing"),
    (lesson.confidence_gap_sentence, (0.95, 0.6), "claim more than it knows", (0.6, 0.6), "no more than it knows"),
    (lesson.folds_sentence, (2, 0.5, 10, 0.6), "saw more rows", (2, 0.6, 10, 0.5), "gave nothing"),
    (lesson.group_sentence, (0.8, 0.5), "look better", (0.2, 0.5), "look **worse**"),
    (lesson.student_signal_sentence, (0.5, 0.6, 0.02), "points better", (0.5, 0.51, 0.02), "within one standard"),
    (lesson.exposure_sentence, (0.2, 0.4), "does not correct", (0.4, 0.2), "not further"),
    (lesson.policy_sentence, (0.3, 0.2), "On-policy training comes", (0.2, 0.3), "Off-policy training comes"),
    (lesson.modes_sentence, (0.3, 0.01), "chooses one", (0.1, 0.3), "does **not** choose"),
    (lesson.beta_sentence, (0.001, 0.003, 0.5), "vanishes", (0.3, 0.3, 0.5), "still large enough"),
    (lesson.interval_sentence, (0.08, 0.09), "fewer independent rows", (0.08, 0.08), "change nothing"),
    (lesson.paired_sentence, (0.05, 0.02, 0.08, 0.01), "the gain is real", (0.01, -0.02, 0.04, 0.5), "**no evidence**"),
    (lesson.pairing_sentence, (0.01, 0.02), "4.0 times as many", (0.02, 0.02), "gives nothing"),
    (lesson.power_sentence, (600, 0.05, 0.06), "above that", (600, 0.05, 0.01), "larger test set"),
    (lesson.two_tests_sentence, (0.2, 0.3), "the same decision", (0.06, 0.04), "**different** decisions"),
    (lesson.swap_sentence, (0.01,), "rarely", (0.3,), "too often"),
    (lesson.correction_sentence, (0.01, 0.03), "the gain stands", (0.01, 0.2), "**does not stand**"),
    (lesson.calibration_gap_sentence, (0.05, 0.2), "better calibrated than it is", (0.3, 0.2), "worse calibrated"),
    (lesson.path_sentence, ({"a": 2.0, "b": 1.0}, 0.0), "they agree on", ({"a": 2.0}, 0.5), "**not** agree"),
    (lesson.learning_sentence, (6.0, 2.0, 400), "learned to predict", (6.0, 5.9, 400), "**hardly**"),
    (lesson.token_sentence, (["a", "b"], [0.1, 0.5]), "most before `b`", (["a", "b"], [0.05, 0.01]), "Nowhere"),
    (lesson.seeds_sentence, (0.01, 0.05), "more than the choice", (0.01, 0.015), "may be luck"),
    (
        one_gpu.size_sentence,
        ("tiny", "a CPU", None),
        "its scores mean nothing",
        ("full", "a GPU", 16 * GIB),
        "a GPU with 16 GiB: a 7B model",
    ),
    (
        one_gpu.weights_sentence,
        ({"16 bits": 15 * GIB, "4 bits": 5 * GIB}, 14 * GIB),
        "33% of their size in 16 bits. On this GPU, before anything is trained, it does **not** fit in 16 bits and",
        ({"16 bits": 15 * GIB, "4 bits": 5 * GIB}, None),
        "There is no GPU",
    ),
    (one_gpu.tuning_sentence, (1.0, 0.5, 90), "falls, from 1.00 to 0.50 nats, in 1.5 m", (0.5, 1.0, 90), "not** fall,"),
    (
        one_gpu.divergence_sentence,
        (0.5, 0.2),
        "0.5 nats from its teacher, at last 0.2. It comes",
        (0.004, 0.005),
        "**noth",
    ),
    (one_gpu.divergence_sentence, (0.2, 0.3), "does **not** come closer", (0.011, 0.01), "It comes closer"),
    (one_gpu.teacher_sentence, (0.8, 0.5), "something to teach.", (0.52, 0.5), "**nothing** to teach"),
    (
        one_gpu.memory_sentence,
        ({"a": 2 * GIB, "b": 9 * GIB},),
        "held by b: 9.0 GiB. That fits",
        ({"a": 15 * GIB, "b": None},),
        "held by a: 15.0 GiB. That does **not** fit",
    ),
    (
        one_gpu.comparison_sentence,
        ({"mean": 0.05, "low": 0.01, "high": 0.09},),
        "+5.0 points (95 % interval +1.0 to +9.0): the student is better",
        ({"mean": -0.05, "low": -0.09, "high": -0.01},),
        "the student is **worse**",
    ),
    (
        one_gpu.speed_sentence,
        (10, 99, 15, 1),
        "15.0 times smaller than its teacher and labels 9.9",
        (9, 1, 1, 1),
        "no m",
    ),
]


@pytest.mark.parametrize(
    ("function", "facts", "part", "others", "opposite"), CASES, ids=lambda x: getattr(x, "__name__", "")
)
def test_other_facts_give_the_opposite_sentence(function, facts, part, others, opposite):
    first, second = function(*facts), function(*others)
    assert part in first and part not in second
    assert opposite in second and opposite not in first


def test_a_gain_that_may_be_chance_and_a_machine_without_a_gpu_are_called_so():
    assert "show no difference" in one_gpu.comparison_sentence({"mean": 0.01, "low": -0.02, "high": 0.04})
    assert "no GPU memory to measure" in one_gpu.memory_sentence({"a": None})


def test_every_sentence_is_tested():
    modules = [module.name for module in pkgutil.iter_modules(distillery.notebook.__path__)]
    loaded = [importlib.import_module(f"distillery.notebook.{name}") for name in modules]
    names = {f"{m.__name__}.{name}" for m in loaded for name in vars(m) if name.endswith("_sentence")}
    assert names == {f"{case[0].__module__}.{case[0].__name__}" for case in CASES}


def test_what_beats_a_constant_answer_to_rows_of_label_sets_is_called_so():
    sets = labels.answer_name(LabelSets(["up", "down"]))
    assert labels.answer_name(["up", "down"]) == "label"
    for sentence in (
        teach.untrained_sentence(0.6, 0.4, True, sets),
        teach.knowledge_sentence(0.7, 0.4, 9, sets),
        teach.knowledge_sentence(0.4, 0.4, 9, sets),
        distill.result_sentence(0.7, 0.5, 99, sets),
    ):
        assert "most frequent label set" in sentence


def test_no_setting_that_label_sets_cannot_have_is_advised():
    gold, constant, names = pd.Series(["up", "up | down"]), pd.Series(["down", "down"]), LabelSets(["up", "down"])
    for sentence in (labels.coverage_sentence, labels.constant_sentence):
        for tuned in (True, False):
            text = sentence("m", gold, constant, tuned, names)
            assert "may help" in text and not any(key in text for key in ("few_shot", "calibrate", "balance"))


def test_a_source_of_label_sets_without_any_label_is_described():
    rows, names = pd.DataFrame({"label": [None, None]}), LabelSets(["up", "down"])
    counts = data.answer_counts(rows, data.label_masks(rows, names), names)
    assert counts == {"no label": 2} and "100.0 % of the rows" in data.balance_sentence(counts, "label set")
    assert data.label_set_sentence(audit_label_sets(rows, names)) == "The rows here bring no labels."


def test_edge_cases_have_a_sentence_of_their_own():
    assert "needs no" not in distill.rows_sentence(0, 0, 5)
    assert distill.progress_sentence(pd.Series([0.5])).endswith("It has no phase.")
    assert distill.result_sentence(0.5, None, 20) == "50.0 % of its answers to 20 test questions are accepted."
    assert "no row on which all teachers agree" in augment.vote_sentence(0.4, np.nan, np.nan, 0.0)
    assert "memor" not in teach.memory_sentence(0.9, None, None)
    assert teach.rationale_sentence(0, 0) == "There are no rationales."
    assert evaluate.verdict_sentence([]) == "No student has a control or a teacher to be compared with."
    assert [join_words(words) for words in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == [
        "",
        "a",
        "a and b",
        "a, b and c",
    ]


def test_warnings_for_the_terminal_are_the_bold_sentences_with_a_way_out():
    label, constant = pd.Series(list("abcdefgg")), pd.Series(["g"] * 8)
    sentences = [labels.coverage_sentence("m", label, prediction, False) for prediction in (label, constant)]
    (line,) = labels.warning_lines(sentences)
    assert line.startswith("warning: m never predicts a (1 of 8), b (1 of 8), c (1 of 8), d (1 of 8), e (1 of 8) and 1")
    assert labels.PROMPTED in line and labels.TUNED not in line
    assert labels.TUNED in labels.constant_sentence("m", label, constant, True)


def test_as_many_confident_rows_are_compared_as_all_teachers_agree_on():
    pseudo = pd.DataFrame({"confidence": [0.6, 0.9, 0.8, 0.7], "agree": [True, False, True, False]})
    right = pd.Series([True, True, False, True])
    assert augment.confident_precision(pseudo, right) == 0.5
    assert np.isnan(augment.confident_precision(pseudo.assign(agree=False), right))


def test_a_rationale_stands_beside_the_label_that_it_was_written_for():
    rows = pd.DataFrame({"source": "s", "split": ["train", "pool"], "id": ["1", "2"], "text": "t", "label": "gold"})
    signals = rows.drop(columns="text").assign(label="own", rationale="why", contradicts=False, probabilities=None)
    assert teach.rationale_table(rows, signals, from_file=False)["label"].tolist() == ["gold", "own"]
    assert teach.rationale_table(rows, signals, from_file=True)["label"].tolist() == ["own", "own"]


def test_a_sample_of_held_out_rows_is_named():
    assert data.leak_sentence(0, 45, 90, 90).startswith("With single rows")
    assert data.leak_sentence(0, 45, 90, 5000).startswith("Of 5,000 held-out rows, 90 drawn at random")
