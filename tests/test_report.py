"""The sentences and the page of a finished experiment with invented runs."""

import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from distillery.data.storage import read_split
from distillery.evaluation.funnel import confidence_funnels
from distillery.evaluation.rows import disagreements
from distillery.evaluation.slices import slice_scores
from distillery.evaluation.speed import Measurements
from distillery.report.page import MAX_BROWSER_ROWS, render_page, write_report
from distillery.report.sentences import Comparison, Facts, describe_result, render_facts, result_facts
from distillery.report.tables import MIN_BIN_ROWS, cost_shares
from report_project import (
    LABELS,
    SPEEDS,
    TASK,
    WORDS,
    evaluate,
    experiment,
    finished_project,
    invented_corpus,
    qa_project,
    write_file,
    write_project,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return finished_project(tmp_path_factory.mktemp("project"))


# ------------------------------------------------------------------------------- sentences

CONTROL = Comparison("gold", [], 0.55, "better", 0.2, 0.12, 0.28, 0.0001, 0.08)
TEACHER = Comparison("big", [], 0.9, "worse", -0.15, -0.2, -0.1, 0.02, 0.07)
FACTS = Facts(
    name="kd",
    teachers=["big"],
    accuracy=0.75,
    low=0.7,
    high=0.8,
    rows=1234,
    answer="label",
    unit="sentences",
    level="95 %",
    seeds=3,
    comparisons=3,
    control=CONTROL,
    unmatched_control=None,
    differences=[],
    teacher=TEACHER,
    parameters=17_000_000,
    teacher_parameters=134_500_000,
    size_ratio=134.5 / 17,
    speed=500.0,
    teacher_speed=40.0,
    speed_ratio=12.5,
    latency=1.8,
    teacher_latency=22.0,
    dollars=None,
    teacher_dollars=None,
    baselines=[("always up", 0.4), ("the untrained student", 0.3)],
    beats_majority=True,
)


def words_of(**changes) -> tuple[str, str]:
    """The title and the sentences of FACTS with these changes; every tile has four parts, and no sentence a gap."""
    result = render_facts(replace(FACTS, **changes))
    for text in (result["title"], *result["sentences"]):
        assert not re.search(r"None|nan|  | [.,:;]|\(\)", text), text
        assert text[-1] == "." or text == result["title"]
    for tile in result["tiles"]:
        assert list(tile) == ["value", "label", "note", "tone"] and tile["tone"] in ("", "good", "bad")
    return result["title"], "\n".join(result["sentences"])


def test_every_sentence_of_a_gain():
    title, text = words_of()
    assert title == (
        "kd: 20.0 points more accurate than its control gold; 15.0 points less accurate than its teacher big, "
        "7.9 times smaller, 12.5 times as fast"
    )
    assert text.splitlines() == [
        "kd is more accurate than its control gold, which had no teacher: it is right on 75.0 % (95 % interval 70.0 % "
        "to 80.0 %) of 1,234 test sentences, the control on 55.0 %. The gain of 20.0 points is real (95 % interval "
        "+12.0 to +28.0; p < 0.001 after Holm's correction for 3 comparisons).",
        "Student and control differ in the teacher's signal alone.",
        "kd was distilled from big, which is right on 90.0 %: it gives up 15.0 points (10.0 to 20.0).",
        "kd has 17.0 M parameters against 134.5 M and is 7.9 times smaller; side by side on one machine it is 12.5 "
        "times as fast (500 against 40 sentences a second) and answers a single one in 1.8 ms (22 ms).",
        "For 1,000,000 sentences kd takes 33 min 20 s, its teacher big 6 h 56 min.",
        "Scores are means of 3 training runs a student. The intervals resample training runs, and near-duplicate rows "
        "together.",
        "For comparison, always up is right on 40.0 %, the untrained student on 30.0 %.",
    ]
    tiles = [tile["value"] for tile in render_facts(FACTS)["tiles"]]
    assert tiles == ["+20.0 points", "75.0 %", "7.9×", "12.5×"]


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"dollars": 0.0552, "teacher_dollars": 12.5},
            "takes 33 min 20 s and $0.055, its teacher big 6 h 56 min and $12.50.",
        ),
        ({"dollars": 0.0552, "speed_ratio": None, "teacher_speed": None}, "takes 33 min 20 s and $0.055."),
        (
            {"speed_ratio": None, "teacher_speed": None, "teacher_dollars": 1234.5},
            "takes 33 min 20 s, its teacher big $1,234.50.",
        ),
        ({"teacher": None, "dollars": 3.0}, "takes 33 min 20 s and $3.00."),
        ({"speed_ratio": None, "speed": None, "teacher_speed": None}, None),
    ],
)
def test_what_a_million_rows_take_as_far_as_it_is_known(changes, words):
    text = words_of(**changes)[1]
    assert f"\nFor 1,000,000 sentences kd {words}\n" in text if words else "1,000,000" not in text


@pytest.mark.parametrize("teacher", [None, TEACHER, replace(TEACHER, verdict="better", difference=0.1)])
@pytest.mark.parametrize("seeds", [1, 3])
def test_a_loss_to_the_control_comes_first(teacher, seeds):
    """Whatever the teacher's accuracy: in the title, in the first sentence and in the first tile."""
    control = replace(CONTROL, verdict="worse", difference=-0.2, low=-0.28, high=-0.12)
    title, text = words_of(control=control, teacher=teacher, seeds=seeds)
    assert title.startswith("kd: 20.0 points less accurate than its control gold; ")
    assert text.startswith("kd is less accurate than its control gold, which had no teacher: ")
    real = "more than the choice of test rows explains" if seeds == 1 else "real"
    assert f"The loss of 20.0 points is {real} (" in text and "a gain" not in text
    tile = render_facts(replace(FACTS, control=control))["tiles"][0]
    assert (tile["value"], tile["label"], tile["tone"]) == ("−20.0 points", "worse than gold", "bad")


@pytest.mark.parametrize("difference", [-0.01, 0.01])
def test_no_evidence_is_neither_a_gain_nor_a_loss(difference):
    control = replace(CONTROL, verdict="no evidence", difference=difference, low=-0.05, high=0.05, p=0.4)
    title, text = words_of(control=control, comparisons=1)
    assert title.startswith("kd: no evidence of a gain or a loss against its control gold; ")
    assert text.startswith("There is no evidence that kd is more or less accurate than its control gold")
    assert "may be chance (95 % interval −5.0 to +5.0; p = 0.400): only a true difference of about 8.0" in text
    assert "real" not in text and "Holm" not in text
    tile = render_facts(replace(FACTS, control=control))["tiles"][0]
    assert tile["label"] == "no evidence of a gain over gold" and tile["tone"] == ""


def test_a_gain_of_single_runs_is_not_called_real():
    title, text = words_of(seeds=1)
    assert "The gain of 20.0 points is more than the choice of test rows explains" in text and "real" not in text
    assert "not other random seeds" in text
    assert "a gain over gold" in [tile["label"] for tile in render_facts(replace(FACTS, seeds=1))["tiles"]]


def test_differences_between_student_and_control():
    assert "\nStudent and control differ in the teacher's signal alone.\n" in words_of()[1]
    text = words_of(differences=["training rows: a and b", "steps: 360 and 40"])[1]
    sentence = "Besides the teacher's signal, these settings of student and control differ: training rows: a and b; "
    assert f"\n{sentence}steps: 360 and 40.\n" in text
    distilled = replace(CONTROL, teachers=["small"])
    text = words_of(control=distilled, differences=["steps: 3 and 4"])[1]
    assert (
        "its control gold: it" in text and "\nThese settings of student and control differ: steps: 3 and 4.\n" in text
    )
    assert "differ in nothing but the teachers." in words_of(control=distilled, differences=[])[1]
    assert "differ" not in words_of(control=None, differences=["steps: 3 and 4"])[1]


def test_without_a_control():
    title, text = words_of(control=None)
    assert title.startswith("kd: no control to compare it with; 15.0 points less accurate than its teacher big")
    assert text.startswith(
        "kd names no control, so nothing here shows what its way of training contributed. kd is right"
    )
    text = words_of(control=None, unmatched_control="gold")[1]
    assert text.startswith("Its control gold is scored on other test rows, so nothing here shows")


def test_teachers():
    size = {"size_ratio": None, "speed_ratio": None}
    title, text = words_of(teachers=[], teacher=None, **size)
    assert title.endswith("; trained without a teacher") and "\nkd was trained without a teacher.\n" in text
    assert "\nkd has 17.0 M parameters.\n" in text
    # a student whose teacher answers too few rows to be compared
    title, text = words_of(teacher=None, **size)
    assert title.endswith("; distilled from big") and "was distilled from big, which was not scored on these" in text
    text = words_of(teachers=["big", "second"])[1]
    assert "kd was distilled from big, second and is compared with big, which is right on 90.0 %: it gives up" in text
    # a control as the headline has the teacher of its student to compare with
    text = words_of(teachers=[])[1]
    assert "kd was trained without a teacher and is compared with big, which is right on 90.0 %" in text
    better = replace(TEACHER, verdict="better", accuracy=0.6, difference=0.15, low=0.1, high=0.2)
    title, text = words_of(teacher=better)
    assert "; 15.0 points more accurate than its teacher big, " in title
    assert "which is right on 60.0 %: it is 15.0 points better than its teacher (10.0 to 20.0)." in text
    unclear = replace(TEACHER, verdict="no evidence", difference=-0.01, low=-0.05, high=0.05)
    title, text = words_of(teacher=unclear)
    assert "; no evidence of a gain or a loss against its teacher big, " in title
    assert "the difference of −1.0 points (−5.0 to +5.0) may be chance; one of about 7.0" in text


@pytest.mark.parametrize(
    ("ratio", "size", "pace", "tile", "tone"),
    [
        (2.0, "2.0 times smaller", "2.0 times as fast", "2.0×", "good"),
        (0.5, "2.0 times larger", "2.0 times slower", "2.0×", "bad"),
        (1.04, "of the same size", "equally fast", "same s", ""),
        (0.97, "of the same size", "equally fast", "same s", ""),
        (25.3, "25 times smaller", "25 times as fast", "25×", "good"),
    ],
)
def test_size_and_speed(ratio, size, pace, tile, tone):
    title, text = words_of(size_ratio=ratio, speed_ratio=ratio)
    assert f", {size}, {pace}" in title and f"is {size};" in text and f"it is {pace} (" in text
    tiles = render_facts(replace(FACTS, size_ratio=ratio, speed_ratio=ratio))["tiles"][2:]
    assert [t["value"].startswith(tile) for t in tiles] == [True, True] and [t["tone"] for t in tiles] == [tone] * 2
    assert "Side by side on one machine, kd is" in words_of(size_ratio=None)[1]


def test_a_student_below_the_majority():
    text = words_of(beats_majority=False)[1]
    assert (
        "the untrained student on 30.0 %: the student has learned nothing that beats the most frequent label." in text
    )
    assert "For comparison" not in words_of(baselines=[])[1]


def test_facts_are_those_of_the_leaderboard(finished):
    _, _, results, board = finished
    result = describe_result(results, board.reset_index())
    text = " ".join(result["sentences"])
    row = board.loc["tiny-kd"]
    assert f"it is right on {100 * row['accuracy']:.1f} % (95 % interval {100 * row['accuracy_low']:.1f} % to " in text
    assert f"the control on {100 * board.loc['tiny-gold', 'accuracy']:.1f} %" in text
    assert f"it gives up {-100 * row['teacher_difference']:.1f} points" in text
    assert f"({100 * row['difference_low']:+.1f} to {100 * row['difference_high']:+.1f};" in text.replace(
        "(95 % interval +", "(+"
    )
    assert "7.9 times smaller" in text and "12.5 times as fast (500 against 40 sentences a second)" in text
    assert "in 1.8 ms (22 ms)" in text and "means of 2 training runs" in text and "correction for 3 comp" in text
    assert f"the untrained student on {100 * board.loc['tiny-kd, untrained', 'accuracy']:.1f} %" in text


@pytest.mark.usefixtures("without_figures")
def test_differences_from_the_control_count_phases_from_1(finished, tmp_path):
    _, _, results, board = finished
    differences = ["number of phases: 2 and 1", "steps: 8 and 4"]
    assert result_facts(results, board.reset_index()).differences == differences
    spec = experiment(seeds=[0])
    student = spec["students"]["tiny-kd"]
    student["phases"] = [student["phases"][0] | {"data": ["demo/pool", "demo/train"], "learning_rate": 0.002}]
    student["max_length"] = 64
    results, board = evaluate(tmp_path, write_project(tmp_path, spec), report=True)
    differences = [
        "training rows: demo/pool + demo/train for the student, demo/train for its control",
        "max_length: 64 and 256",
    ]
    differences.append("learning_rate of phase 1: 0.002 and 0.001")
    assert result_facts(results, board.reset_index()).differences == differences
    html = unescape((tmp_path / "reports/index.html").read_text(encoding="utf-8"))
    assert f"these settings of student and control differ: {'; '.join(differences)}." in html


@pytest.mark.usefixtures("without_figures")
def test_a_headline_that_is_a_control_has_no_teacher(tmp_path):
    spec = experiment(seeds=[0])
    spec["evaluate"]["headline"] = "tiny-gold"
    results, board = evaluate(tmp_path, write_project(tmp_path, spec), report=True)
    text = " ".join(describe_result(results, board.reset_index())["sentences"])
    assert "tiny-gold names no control" in text and "was trained without a teacher" in text


@pytest.mark.usefixtures("without_figures")
def test_alerts_are_in_the_report_the_most_severe_first(tmp_path, finished):
    """Where the task has severities: as many as predictions of its labels, with text, label and severity."""
    task = TASK + "severity: {down: 1.0, flat: 0.25}\n"
    results, _ = evaluate(tmp_path, write_project(tmp_path, experiment(seeds=[0]), task=task), report=True)
    html = unescape((tmp_path / "reports/index.html").read_text(encoding="utf-8"))
    predicted = pd.Series(results.headline.predictions[0]).value_counts()
    by_label = ", ".join(f"{n} {label}" for label, n in predicted.drop("up").sort_values(ascending=False).items())
    n_rows = len(results.tests["demo"])
    assert f"tiny-kd raises {predicted.drop('up').sum()} alerts on {n_rows} test rows: {by_label}. The" in html
    severities = [float(text) for text in re.findall(r'<span class="chip">severity ([0-9.]+)</span>', html)]
    assert len(severities) == 20 and severities == sorted(severities, reverse=True)
    p = results.headline.probabilities[0]
    is_alert = np.isin(results.headline.predictions[0], ["down", "flat"])
    assert severities[0] == pytest.approx((p @ [0.0, 0.25, 1.0])[is_alert].max(), abs=0.005)
    assert 'id="alerts"' not in (finished[0] / "reports/index.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("without_figures")
def test_the_report_counts_what_a_filter_leaves_of_each_theme(tmp_path, finished):
    spec, rng = experiment(seeds=[0]), np.random.default_rng(0)
    keywords = {"keywords": [WORDS[0]], "expand_keywords": 2}
    spec["data"]["demo"]["filter"] = {"theme": "theme", "languages": ["en", "de"], **keywords}
    corpus = [row | {"theme": "ab"[i % 2], "language": "en"} for i, row in enumerate(invented_corpus(rng))]
    for row in corpus[:400]:
        row["text"] += f" {WORDS[0]} <b>"
    results, _ = evaluate(tmp_path, write_project(tmp_path, spec, corpus=corpus), report=True)
    themes = results.audits["demo"]["filter"]["themes"]
    assert [row["rows"] for row in themes] == [300, 300, 600] and 400 <= themes[2]["left"] < 600
    html = (tmp_path / "reports/index.html").read_text(encoding="utf-8")
    for row, name in zip(themes, ("a", "b", "all"), strict=True):
        cells = (
            f'<th scope="row">{name}</th><td>{row["rows"]}</td><td>1</td><td>{row["rows"]}</td><td>{row["left"]}</td>'
        )
        assert cells in html
    assert f'<th scope="row">en</th><td>600</td><td>600</td><td>{themes[2]["left"]}</td>' in html
    assert f"Filter: 600 rows after cleaning, 600 rows by language, {themes[2]['left']} rows by keywords." in html
    assert "Rows that the teachers are sure of" not in html
    assert "Filter:" not in (finished[0] / "reports/index.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("without_figures")
def test_the_report_counts_the_rows_that_the_teachers_are_sure_of(tmp_path):
    """By hand: of the pool's first 40 rows every fourth is unsure; alike phases of two students are counted once."""
    spec = experiment(seeds=[0])
    spec["data"]["demo"]["filter"] = {"theme": "theme"}
    sure = {"pseudo_labels": {"min_confidence": 0.6}}
    kd = spec["students"]["tiny-kd"]["phases"]
    kd[0] |= sure | {"data": ["demo/pool", "demo/train"], "teachers": ["big"]}
    spec["students"]["other"]["phases"] = [kd[0]]
    corpus = [
        row | {"theme": "ab"[i % 2], "language": "en"}
        for i, row in enumerate(invented_corpus(np.random.default_rng(0)))
    ]
    params = write_project(tmp_path, spec, corpus=corpus)
    pool = read_split(tmp_path / "data/processed/demo", "pool").head(40)
    train = read_split(tmp_path / "data/processed/demo", "train").head(5)
    rows = pd.concat([pool.assign(split_ref="demo/pool", label=None), train.assign(split_ref="demo/train")])
    unsure = np.arange(len(rows)) % 4 == 0
    p = np.where(unsure[:, None], [[0.55, 0.45, 0.0]], [[0.1, 0.1, 0.8]])
    for student in ("tiny-kd", "other"):
        table = rows[["split_ref", "id", "label"]].assign(probabilities_big=list(p))
        write_file(tmp_path / f"data/inputs/{student}/rows.parquet", table)
    (funnel,) = confidence_funnels(tmp_path, params)
    assert funnel["phases"] == ["tiny-kd, phase 1", "other, phase 1"] and funnel["min_confidence"] == 0.6
    of_a = (pool["theme"] == "a").to_numpy()
    left_of_a = int((of_a & ~unsure[:40]).sum())
    assert funnel["counts"] == [
        {"part": None, "value": None, "rows": 40, "left": 30},
        {"part": "theme", "value": "a", "rows": int(of_a.sum()), "left": left_of_a},
        {"part": "theme", "value": "b", "rows": 40 - int(of_a.sum()), "left": 30 - left_of_a},
        {"part": "language", "value": "en", "rows": 40, "left": 30},
    ]
    results, board = evaluate(tmp_path, params, report=True)
    results.audits["demo"]["filter"] |= {"added_keywords": ["<b>", "river"], "similarities": [0.91, 0.5]}
    write_report(tmp_path, results, board.reset_index(), Measurements(), slice_scores(results))
    html = (tmp_path / "reports/index.html").read_text(encoding="utf-8")
    assert f'<th scope="row">theme a</th><td>{of_a.sum()}</td><td>{left_of_a}</td>' in html
    assert "tiny-kd, phase 1; other, phase 1: left are the rows whose label has a probability of at least 0.6" in html
    assert "with the cosine to the nearest keyword: &lt;b&gt; 0.91, river 0.50." in html


# ------------------------------------------------------------------------------- the page


class Page(HTMLParser):
    """Collects what a browser would load, the ids and the text; notes tags that are closed in the wrong order."""

    VOID = {"meta", "link", "br", "input", "img", "hr", "path", "use", "rect"}

    def __init__(self, text):
        super().__init__()
        self.open, self.wrong, self.loads, self.ids, self.tags, self.texts = [], [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for key, value in attributes:
            if key in ("src", "href", "action", "data", "xlink:href") and not value.startswith("#"):
                self.loads.append(value)
            if key == "id":
                self.ids.append(value)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID and (not self.open or self.open.pop() != tag):
            self.wrong.append(tag)

    def handle_data(self, text):
        self.texts.append(text)


def test_page_stands_alone(finished):
    html = (finished[0] / "reports/index.html").read_text(encoding="utf-8")
    page = Page(html)
    assert not page.wrong and not page.open
    assert not page.loads and not re.search(r"https?://|url\((?!#)|@import", html)
    assert len(page.ids) == len(set(page.ids))
    used = set(re.findall(r"""(?:href="#|url\(#)([^")]+)""", html))
    assert used <= set(page.ids)
    assert len(html.encode()) < 1_000_000


def test_metrics_are_the_same_bytes_on_a_second_run(finished):
    root, params, _, _ = finished
    names = ["metrics.json", "leaderboard.csv", "index.html", *(f"figures/{n}.svg" for n in ("cost", "confusion"))]
    before = [(root / "reports" / name).read_bytes() for name in names]
    evaluate(root, params, SPEEDS, report=True)
    assert [(root / "reports" / name).read_bytes() for name in names] == before
    evaluate(root, params, {name: 2 * speed for name, speed in SPEEDS.items()}, report=True)
    assert (root / "reports/metrics.json").read_bytes() == before[0]
    assert (root / "reports/leaderboard.csv").read_bytes() != before[1]
    evaluate(root, params, SPEEDS, report=True)


def test_files_for_dvc(finished):
    root, _, results, board = finished
    summary = json.loads((root / "reports/metrics.json").read_text())
    assert set(summary) == {"headline", "accuracy", "macro_f1", "consistency"}
    assert summary["accuracy"] == {
        m: round(float(v), 6) for m, v in board["accuracy"].items() if m in {"tiny-kd", "tiny-gold", "other", "big"}
    }
    assert summary["headline"]["difference_low"] == pytest.approx(board.loc["tiny-kd", "difference_low"], abs=1e-6)
    assert "second" not in (root / "reports/metrics.json").read_text()
    timing = json.loads((root / "reports/timing.json").read_text())
    assert {name: values["sentences_per_second"] for name, values in timing["models"].items()} == SPEEDS
    assert timing["rows"] == 8 and timing["threads"] >= 1
    history = pd.read_csv(root / "reports/plots/history.csv")
    assert list(history) == ["model", "seed", "phase", "step", "loss"]
    run = history[(history["model"] == "tiny-kd") & (history["seed"] == 0)]
    assert run["step"].tolist() == [1, 2, 3, 4]  # counted through the phases
    assert run["phase"].tolist() == [1, 1, 2, 2]
    predictions = pd.read_csv(root / "reports/plots/predictions.csv")
    assert list(predictions) == ["label", "prediction"]
    assert predictions["label"].tolist() == read_split(root / "data/processed/demo", "test")["label"].tolist()
    assert predictions["prediction"].tolist() == results.headline.predictions[0].tolist()
    scores = pd.read_csv(root / "reports/plots/scores.csv").set_index(["model", "score"])
    assert scores.loc[("tiny-kd", "macro_f1"), "low"] == pytest.approx(board.loc["tiny-kd", "macro_f1_low"])
    bins = pd.read_csv(root / "reports/plots/reliability.csv")
    assert list(bins) == ["model", "confidence", "accuracy", "rows"] and bins["rows"].min() >= MIN_BIN_ROWS
    figures = {"leaderboard", "cost", "confusion", "labels", "latency", "reliability", "coverage", "history"}
    assert {path.stem for path in (root / "reports/figures").iterdir()} == figures


def test_the_page_shows_title_tiles_and_phases(finished):
    root, params, results, board = finished
    html = unescape((root / "reports/index.html").read_text(encoding="utf-8"))
    result = describe_result(results, board.reset_index())
    assert f"<h1>{result['title']}</h1>" in html
    for tile in result["tiles"]:
        assert f"<b>{tile['value']}</b><span>{tile['label']}</span>" in html
    assert all(f"<p>{sentence}</p>" in html for sentence in result["sentences"])
    assert "teacher's words" in html and "The 49 paraphrases that <code>big</code> wrote" in html
    assert '<th scope="row">kept</th><td>40</td>' in html and '<th scope="row">label changed</th><td>9</td>' in html
    part = html[html.index("Accuracy after each phase") :]
    assert part.count(">untrained</td>") == part.count(">phase 1</td>") == len(params.students)


def test_the_page_has_the_shares_of_the_teacher_beside_the_counts(finished):
    """17 of 134.5 million parameters, 34 of 269 megabytes, and what is trained of a model's own parameters."""
    root, _, results, board = finished
    shares = cost_shares(results, board.reset_index())["tiny-kd"]
    expected = {"parameters": 17 / 134.5, "megabytes": 34 / 269, "trainable": 16 / 17}
    assert {name: shares[name] for name in expected} == pytest.approx(expected)
    html = unescape((root / "reports/index.html").read_text(encoding="utf-8"))
    row = next(part for part in html[html.index("Trained parameters") :].split("<tr")[1:] if ">tiny-kd</th>" in part)
    assert row.count("<small>12.6 % of its teacher's</small>") == 2 and "<small>94.1 % of its own</small>" in row
    (teacher,) = (result.name for result in results.models if result.role == "teacher")
    assert "parameters" not in cost_shares(results, board.reset_index())[teacher]


@pytest.mark.usefixtures("without_figures")
def test_the_memory_of_a_training_is_a_share_of_its_controls(tmp_path):
    """700 of 14,000 MB on the GPU, 901 of 4,505 of the process; no share where one side was not measured."""
    params, page = write_project(tmp_path, experiment()), tmp_path / "reports/index.html"
    peaks = {"tiny-kd": {"peak_gpu_memory_mb": 700}, "tiny-gold": {"peak_memory_mb": 4505}}
    for name, record in peaks.items():
        for seed in (0, 1):
            path = tmp_path / f"runs/{name}-{seed}/timing.json"
            write_file(path, json.dumps(json.loads(path.read_text()) | record))
    results, board = evaluate(tmp_path, params, report=True)
    shares = cost_shares(results, board.reset_index())
    assert shares["tiny-kd"]["training_mb"] == pytest.approx(0.2) and "training_gpu_mb" not in shares["tiny-kd"]
    assert "<small>20.0 % of tiny-gold's</small>" in unescape(page.read_text())
    assert not any({"training_mb", "training_gpu_mb"} & {*shares[name]} for name in shares if name != "tiny-kd")
    for seed in (0, 1):
        path = tmp_path / f"runs/tiny-gold-{seed}/timing.json"
        write_file(path, json.dumps(json.loads(path.read_text()) | {"peak_gpu_memory_mb": 14_000}))
    results, board = evaluate(tmp_path, params, report=True)
    assert cost_shares(results, board.reset_index())["tiny-kd"]["training_gpu_mb"] == pytest.approx(0.05)
    assert "700 MB<small>5.0 % of tiny-gold" in page.read_text()


@pytest.mark.usefixtures("without_figures")
def test_the_checks_are_on_the_page(finished, tmp_path):
    """Failed ones of the headline, its control and its teacher also above everything else."""
    root, _, _, _ = finished
    html = (root / "reports/index.html").read_text(encoding="utf-8")
    assert 'role="alert"' not in html and html.count("✓ shortcut") == 4
    params = write_project(tmp_path, experiment(seeds=[0]))
    for name in ("tiny-gold", "other"):
        path = tmp_path / f"runs/{name}-0/predictions.parquet"
        rows = pd.read_parquet(path)
        rows.assign(prediction=rows["prediction"].replace("down", "flat")).to_parquet(path)
    evaluate(tmp_path, params, report=True)
    html = unescape((tmp_path / "reports/index.html").read_text(encoding="utf-8"))
    top = html[: html.index('class="tiles"')]
    assert '<b>Shortcut.</b> tiny-gold never predicts "down" (' in top and "other never" not in top
    assert '✗ shortcut</b> other never predicts "down" (' in html and html.count("✓ shortcut") == 2


CLICKS = """<script>
const board = document.querySelector("table.sortable").tBodies[0];
const cells = column => [...board.rows].map(row => row.cells[column].dataset.value);
const heading = document.querySelectorAll("table.sortable th button")[1], result = {};
for (const way of ["descending", "ascending"]) {
  heading.click();
  result[way] = cells(1).map(Number);
}
const shown = () => [...document.querySelectorAll("#browser .row")].filter(row => row.checkVisibility());
const set = (id, value) => {
  document.getElementById(id).value = value;
  document.getElementById(id).dispatchEvent(new Event("input"));
};
result.differ = shown().map(row => "differs" in row.dataset);
set("kind", "both right"); set("label", "down");
result.kinds = shown().map(row => row.dataset.kind + ", " + row.dataset.label);
set("kind", ""); set("label", ""); document.querySelector(".more").click();
result.more = shown().length;
set("find", "teacher's words");
result.matches = shown().length;
result.wide = document.documentElement.scrollWidth - innerWidth;
document.title = JSON.stringify(result);
</script></body>"""


BROWSER = next(filter(shutil.which, ("chromium", "chromium-browser", "google-chrome")), None)
ON_GITHUB = os.environ.get("GITHUB_ACTIONS") == "true"  # where a browser is installed: its lack is an error


@pytest.mark.skipif(not BROWSER and not ON_GITHUB, reason="needs chromium or google-chrome")
def test_page_in_a_browser(finished, tmp_path):
    assert BROWSER, "no chromium and no google-chrome"
    page = (finished[0] / "reports/index.html").read_text(encoding="utf-8").replace("</body>", CLICKS)
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--dump-dom"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=390,800"]
    done = subprocess.run([BROWSER, *options, "page.html"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    result = json.loads(unescape(re.search(r"<title>(.*?)</title>", done.stdout).group(1)))
    assert len(result["descending"]) == len(finished[3])
    assert result["descending"] == sorted(result["descending"], reverse=True)
    assert result["ascending"] == result["descending"][::-1]
    assert len(result["differ"]) == 20 and all(result["differ"])
    assert result["kinds"] and set(result["kinds"]) == {"both right, down"}
    assert result["more"] == 40 and result["matches"] == 1
    assert result["wide"] <= 0  # a phone scrolls down, never sideways


def test_a_small_p_is_shown_as_a_bound(finished):
    root, _, results, board = finished
    figures = dict.fromkeys(
        ("leaderboard", "labels", "cost", "confusion", "reliability", "coverage", "history"), "<svg/>"
    )
    board, parts = board.reset_index().assign(p=1e-5), slice_scores(results)
    html = unescape(render_page(root, results, board, figures, Measurements(), parts))
    assert 'title="p < 0.001 after correction;' in html and "p 0.000" not in html and "p = 0.000" not in html


def test_a_model_that_a_picture_of_costs_lacks_is_named_below_it(finished):
    root, _, results, board = finished
    figures = dict.fromkeys(
        ("leaderboard", "labels", "cost", "latency", "confusion", "reliability", "coverage", "history"), "<svg/>"
    )
    board = board.reset_index()
    for column in ("parameters", "latency_p50_ms"):
        board[column] = board[column].where(board["model"] != "big")
    html = unescape(render_page(root, results, board, figures, Measurements(), slice_scores(results)))
    assert html.count("on the dashed line") == 2 and html.count("Not in the picture: big (it was not measured).") == 2
    assert "Not in the picture" not in (root / "reports/index.html").read_text(encoding="utf-8")


EVIL = "<script>alert('pwned')</script> & \"quoted\" $x_1$ </script>"


def test_everything_is_escaped(tmp_path):
    rng = np.random.default_rng(1)
    labels = ["up", "<b>flat</b>", "$down$"]
    corpus = [
        {
            "id": f"<i>{i}",
            "text": f"{EVIL} {' '.join(rng.choice(WORDS, 9))}",
            "label": labels[i % 3],
            "rationale": f"{EVIL} why",
        }
        for i in range(200)
    ]
    task = "kind: classification\nlabels: {up: a, <b>flat</b>: b, $down$: c}\n"
    spec = experiment()
    spec["data"]["demo"]["near_duplicate"] = 1.0
    params = write_project(tmp_path, spec, corpus=corpus, task=task)
    signals = tmp_path / "data/teacher/big/signals.parquet"
    pd.read_parquet(signals).assign(rationale=EVIL).to_parquet(signals)
    evaluate(tmp_path, params, report=True)
    html = (tmp_path / "reports/index.html").read_text(encoding="utf-8")
    page = Page(html)
    assert not page.wrong and not page.open
    assert page.tags.count("script") == 1 and "b" in page.tags and "<b>flat" not in html and "<i>0" not in html
    assert ">$down$<" in (tmp_path / "reports/figures/confusion.svg").read_text()  # not taken for a formula
    assert sum("alert('pwned')" in text for text in page.texts) > 50  # shown as text


@pytest.mark.usefixtures("without_figures")
def test_one_seed_no_teacher_no_control_no_augmentation(tmp_path):
    spec = experiment(seeds=[3], teachers={}, augment={"source": "demo", "teacher": "none", "per_row": 0})
    spec["students"] = {"alone": spec["students"]["tiny-gold"]}
    spec["evaluate"]["headline"] = "alone"
    results, board = evaluate(tmp_path, write_project(tmp_path, spec, accuracy={"alone": 0.2}), report=True)
    result = describe_result(results, board.reset_index())
    assert result["title"] == "alone: no control to compare it with; trained without a teacher"
    text = " ".join(result["sentences"])
    assert "was trained without a teacher" in text and "names no control" in text and "trained once" in text
    assert "nothing that beats the most frequent label" in text and "teacher:" not in text
    assert board["verdict"].isna().all() and board["kl_to_teacher"].isna().all()
    html = (tmp_path / "reports/index.html").read_text()
    assert "nothing was augmented" in html and "None" not in re.sub(r"<p>None: nothing|None of the", "", html)
    assert set(disagreements(results)["kind"]) == {"right", "wrong"}


@pytest.mark.usefixtures("without_figures")
def test_the_page_shows_the_answers_where_they_are_free(tmp_path):
    params = qa_project(tmp_path, answers=2, token_f1=0.5, token_precision=0.4, token_recall=0.6)
    results, board = evaluate(tmp_path, params, report=True)
    text = " ".join(describe_result(results, board.reset_index())["sentences"])
    assert " of 100 test questions" in text and "For comparison, the untrained student is right on" in text
    html = (tmp_path / "reports/index.html").read_text()
    row = disagreements(results).iloc[0]
    assert row["accepted"] == f"answer {row['id'][1:]} or {row['id'][1:]}"
    for text in (
        f"accepted: {row['accepted']}",
        f"student: &lt;tiny-kd-0 answers {row['id']}&gt;",
        f"teacher: &lt;big answers {row['id']}&gt;",
        "Exact match",
        "P 40.0",
    ):
        assert text in html
    for text in ("Macro-F1", "Confusion matrices", "specificity of each label", "label: right", "Agreement with"):
        assert text not in html


def test_long_texts_and_many_rows_keep_the_page_small(tmp_path):
    rng = np.random.default_rng(0)
    corpus = [
        {"id": f"r{i}", "text": " ".join(rng.choice(WORDS, 150)), "label": LABELS[i % 3], "rationale": "so " * 300}
        for i in range(1300)
    ]
    spec = experiment(seeds=[0])
    spec["data"]["demo"]["split"] = {"train": 0.05, "pool": 0.05, "validation": 0.05, "test": 0.85}
    spec["data"]["demo"]["near_duplicate"] = 1.0
    evaluate(tmp_path, write_project(tmp_path, spec, corpus=corpus), report=True)
    html = (tmp_path / "reports/index.html").read_bytes()
    assert len(html) < 3_000_000 and html.count(b'<article class="row"') == MAX_BROWSER_ROWS
    assert b"further rows are left out" in html


# ------------------------------------------------------------------------------- parts of the rows, and labels to read


def test_the_page_shows_the_parts_of_the_test_rows(finished):
    root, _, results, _ = finished
    page = (root / "reports/index.html").read_text(encoding="utf-8")
    table = pd.read_csv(root / "reports/plots/slices.csv")
    assert set(table["column"]) == {"length"} and set(table["model"]) == {"tiny-kd", "tiny-gold", "big"}
    assert "Parts of the test rows" in page and "tiny-kd is weakest on length: " in page
    rows = results.tests["demo"]["text"].str.split().str.len()
    assert table.loc[table["model"] == "big", "rows"].sum() == len(rows)


def test_the_page_shows_labels_that_are_probably_wrong(finished):
    root, *_ = finished
    errors = pd.read_csv(root / "data/teacher/big/label_errors.csv")
    page = (root / "reports/index.html").read_text(encoding="utf-8")
    assert 0 < len(errors) < 60  # one label in ten is another than the teacher's, most of these confidently
    assert f"contradicts the label of {len(errors)} rows with confidence" in page
    worst = errors.iloc[0]
    assert f"{worst['split']}, {worst['id']}</span>" in page
