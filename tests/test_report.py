"""The whole report on a made-up project whose right answers are known."""

import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sk

from distillery import metrics
from distillery.config.load import load_params
from distillery.config.schema import Params, PublishedScores
from distillery.data.prepare import prepare_source
from distillery.data.storage import read_split, read_task, write_source
from distillery.errors import UserError
from distillery.evaluation.gather import UNPARSABLE, gather_results
from distillery.evaluation.leaderboard import (
    compare_accuracy,
    compare_with_published,
    leaderboard,
    phase_accuracies,
    teacher_closeness,
)
from distillery.evaluation.robustness import measure_robustness
from distillery.evaluation.rows import disagreements
from distillery.evaluation.speed import Measurements, measure_models, throughput
from distillery.models.save import save_model
from distillery.report.figures import INK, MIN_BIN_ROWS, figure_cost, figure_svg, inline_svg
from distillery.report.page import MAX_BROWSER_ROWS, write_report
from distillery.report.sentences import describe_result
from distillery.tasks.schema import load_task
from distillery.training.student import build_student

LABELS = ["up", "flat", "down"]
TASK = "kind: classification\nlabels: {up: it rises, flat: it stays, down: it falls}\n"
TASK += "perturbations: {names: {invented: [Veltora], tickers: '\\$[A-Z]+'}}\n"
WORDS = [
    a + b for a in ("pro", "ship", "order", "paper", "loan", "steel") for b in ("fit", "ment", "yard", "ing", "ers")
]


def experiment(**changes) -> dict:
    """A params.yaml as a dict: a distilled student, its control, and a second student without one."""
    phase = {"data": ["demo/train"], "loss": {"ce": 1.0}, "steps": 4, "learning_rate": 1e-3}
    taught = phase | {"teachers": ["big"], "loss": {"kl": 1.0}}
    student = {"model": "small", "arch": "classifier", "init": {"layers": [0, 2]}}
    return {
        "seeds": [0, 1],
        "data": {
            "demo": {
                "source": "data/demo.jsonl",
                "task": "demo",
                "split": {"train": 0.2, "pool": 0.2, "validation": 0.1, "test": 0.5},
            }
        },
        "models": {"small": {"folder": "models/small"}, "large": {"folder": "models/large"}},
        "teachers": {"big": {"kind": "lm", "model": "large"}},
        "augment": {"source": "demo", "teacher": "big", "per_row": 1},
        "students": {
            "tiny-kd": student | {"phases": [taught, phase], "control": "tiny-gold"},
            "tiny-gold": student | {"phases": [phase]},
            "other": student | {"phases": [taught], "init": {"layers": "all"}},
        },
        "evaluate": {"headline": "tiny-kd", "bootstrap": 300, "throughput_rows": 8},
    } | changes


RIGHT = {"tiny-kd": 0.75, "tiny-gold": 0.55, "other": 0.7, "big": 0.9, "untrained": 0.33}


def predictions(rng, gold, right: float, labels: list[str]) -> tuple[list[str], list[np.ndarray]]:
    """Labels that are right for a share `right` of the rows, and probabilities whose largest is that label's."""
    codes, k = metrics.encode_labels(gold, labels), len(labels)
    codes = np.where(rng.random(len(gold)) < right, codes, (codes + rng.integers(1, k, len(gold))) % k)
    p = rng.dirichlet([1] * k, len(gold))
    p = 0.4 * p + 0.6 * np.eye(k)[codes]
    return [labels[c] for c in codes], list(p.astype(np.float32))


def table(rng, rows: pd.DataFrame, right: float, labels: list[str], **columns) -> pd.DataFrame:
    label, p = predictions(rng, rows["label"], right, labels)
    return pd.DataFrame({"id": rows["id"], "prediction": label, "probabilities": p}).assign(**columns)


def put(path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(value, pd.DataFrame):
        value.to_parquet(path)
    else:
        path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def project(root, spec: dict | None = None, right: dict | None = None, corpus: list[dict] | None = None, task=TASK):
    """Write a finished project to `root`: real splits, made-up runs; returns its params."""
    spec, right = spec or experiment(), RIGHT | (right or {})
    rng = np.random.default_rng(0)
    if corpus is None:
        corpus = [
            {"id": f"r{i}", "text": " ".join(rng.choice(WORDS, 9)), "label": str(rng.choice(LABELS)), "rationale": "so"}
            for i in range(600)
        ]
        for row in corpus[::2]:
            row["text"] += " $" + "".join(rng.choice(list("ABCDEFGH"), 4))  # a ticker: a name that can be changed
    put(root / "dvc.yaml", "")
    put(root / "tasks/demo.yaml", task)
    put(root / "params.yaml", json.dumps(spec))  # JSON is YAML
    put(root / "data/demo.jsonl", "".join(json.dumps(row) + "\n" for row in corpus))
    params = load_params(root / "params.yaml")
    made = load_task("demo", root / "tasks")
    prepared = prepare_source("demo", params.data["demo"], made, root)
    write_source(prepared, root / "data/processed/demo")
    held_out = {split: read_split(root / "data/processed/demo", split) for split in ("validation", "test")}

    def said(right, **columns):
        return pd.concat([table(rng, rows, right, made.names, split=s, **columns) for s, rows in held_out.items()])

    for teacher in params.teachers:
        signals = said(right[teacher], source="demo", fold=-1, rationale=None).rename(columns={"prediction": "label"})
        signals = signals.reset_index(drop=True)
        signals.loc[len(signals) - 1, "rationale"] = "teacher's words"  # of a test row
        put(root / f"data/teacher/{teacher}/signals.parquet", signals)
        put(root / f"data/teacher/{teacher}/metrics.json", {"parameters": 134_500_000, "bytes_on_disk": 269_000_000})
    put(root / "data/augmented/demo/counts.json", {"kept": 40, "label changed": 9})
    for name in params.students:
        for seed in params.seeds:
            run = root / f"runs/{name}-{seed}"
            put(run / "predictions.parquet", said(right[name]))
            put(run / "phases.parquet", pd.concat([said(right["untrained"], phase=0), said(right[name], phase=1)]))
            facts = {"parameters": 17_000_000, "trainable_parameters": 16_000_000, "bytes_on_disk": 34_000_000}
            put(run / "metrics.json", facts)
            put(run / "timing.json", {"train_seconds": 61.0 + seed, "peak_memory_mb": 900 + seed})
            steps = pd.DataFrame({"phase": [1, 1, 2, 2], "step": [1, 2, 1, 2], "loss": [1.0, 0.8, 0.6, 0.5]})
            (run / "history.csv").write_text(steps.to_csv(index=False))
    return params


SPEEDS = {"tiny-kd": 500.0, "tiny-gold": 500.0, "other": 100.0, "big": 40.0}


def measured(results, speeds=SPEEDS) -> Measurements:
    """Made-up clocks, and what a model that looks for the word "ship" says of rewritten rows."""
    timing = {
        name: {"sentences_per_second": speed, "latency_p50_ms": 900 / speed, "latency_p95_ms": 2000 / speed}
        for name, speed in speeds.items()
    }

    def predict(texts):
        return np.eye(3)[[("ship" in text) + 0 for text in texts]]

    return Measurements(timing, *measure_robustness(results, {"tiny-kd": predict, "big": predict}))


def run(root, params, speeds=None):
    results = gather_results(root, params)
    found = measured(results, speeds) if speeds else Measurements()
    board = leaderboard(results, found.timing)
    write_report(root, results, board, found)
    return results, board.set_index("model")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("project")
    params = project(root)
    return root, params, *run(root, params, SPEEDS)


def test_scores_are_those_of_the_runs(finished):
    root, params, _, board = finished
    test = read_split(root / "data/processed/demo", "test").set_index("id")["label"]
    teacher = pd.read_parquet(root / "data/teacher/big/signals.parquet").set_index("id").loc[test.index]
    for name in params.students:
        runs = [pd.read_parquet(root / f"runs/{name}-{seed}/predictions.parquet") for seed in params.seeds]
        runs = [r.set_index("id").loc[test.index] for r in runs]
        row = board.loc[name]
        expected = {
            "accuracy": np.mean([sk.accuracy_score(test, r["prediction"]) for r in runs]),
            "macro_f1": np.mean([sk.f1_score(test, r["prediction"], average="macro") for r in runs]),
            "recall_down": np.mean([sk.recall_score(test == "down", r["prediction"] == "down") for r in runs]),
            "agreement_with_teacher": np.mean([(r["prediction"] == teacher["label"]).mean() for r in runs]),
            "kl_to_teacher": np.mean(
                [
                    metrics.kl_divergence(np.stack(teacher["probabilities"]), np.stack(r["probabilities"])).mean()
                    for r in runs
                ]
            ),
        }
        for key, value in expected.items():
            assert row[key] == pytest.approx(value), (name, key)
        assert row["accuracy_low"] < row["accuracy"] < row["accuracy_high"]
        assert (row["parameters"], row["megabytes"], row["seeds"]) == (17_000_000, 34.0, 2)
        assert (row["trainable"], row["train_seconds"], row["training_mb"]) == (16_000_000, 61.5, 901)
    assert board.loc["big", "accuracy"] == pytest.approx(sk.accuracy_score(test, teacher["label"]))


def test_closeness_to_each_teacher(tmp_path):
    spec = experiment()
    spec["teachers"]["second"] = spec["teachers"]["big"]
    params = project(tmp_path, spec, right={"second": 0.6})
    results, board = run(tmp_path, params)
    close = teacher_closeness(results).set_index(["model", "teacher"])
    assert len(close) == 2 * (len(params.students) + 2)  # three students, two of them untrained
    for name in params.students:
        assert close.loc[(name, "big"), "agreement"] == pytest.approx(board.loc[name, "agreement_with_teacher"])
        assert close.loc[(name, "big"), "kl"] == pytest.approx(board.loc[name, "kl_to_teacher"])
    second = results.signals["second", "demo"]["prediction"].to_numpy(object)
    assert close.loc[("other", "second"), "agreement"] == (results.find("other").predicted == second).mean()


def test_every_role_has_its_line(finished):
    _, _, _, board = finished
    # tiny-kd and tiny-gold start from one model: one untrained line for both
    roles = {"tiny-kd": "student", "tiny-gold": "control", "other": "student", "big": "teacher"}
    roles |= {"tiny-kd, untrained": "untrained", "other, untrained": "untrained"}
    majority = [m for m in board.index if m.startswith("always ")]
    assert len(majority) == 1
    assert board["role"].to_dict() == roles | {majority[0]: "majority"}
    assert board["accuracy"].is_monotonic_decreasing


def test_verdict_of_a_real_gain(finished):
    _, _, _, board = finished
    row = board.loc["tiny-kd"]
    assert row["versus"] == "tiny-gold" and row["verdict"] == "better" and row["p"] < 0.05
    assert 0 < row["difference_low"] < row["difference"] < row["difference_high"]
    assert row["difference"] == pytest.approx(row["accuracy"] - board.loc["tiny-gold", "accuracy"])
    assert board["verdict"].notna().sum() == 1


def test_verdict_beside_the_teacher(finished):
    _, _, _, board = finished
    assert board["teacher_verdict"].dropna().to_dict() == {"tiny-kd": "worse", "other": "worse"}
    row = board.loc["other"]
    assert row["teacher_versus"] == "big" and row["teacher_difference_high"] < 0
    assert row["teacher_difference"] == pytest.approx(row["accuracy"] - board.loc["big", "accuracy"])


@pytest.mark.parametrize(("right", "verdict"), [(0.55, "no evidence"), (0.33, "worse")])
def test_verdict_can_say_no(tmp_path, right, verdict):
    params = project(tmp_path, right={"tiny-kd": right})
    results, board = run(tmp_path, params)
    assert board.loc["tiny-kd", "verdict"] == verdict
    text = " ".join(describe_result(results, board.reset_index())["sentences"])
    assert ("no evidence of a gain or a loss" if verdict == "no evidence" else "points worse, and that is no") in text
    assert "is real" not in text


def test_a_gain_of_single_runs_is_not_called_real(tmp_path):
    results, board = run(tmp_path, project(tmp_path, experiment(seeds=[0])))
    said = describe_result(results, board.reset_index())
    text = " ".join(said["sentences"]) + " ".join(tile["label"] for tile in said["tiles"])
    assert board.loc["tiny-kd", "verdict"] == "better" and "more than the choice of test rows explains" in text
    assert "real" not in text and "not of other random seeds" in text


def test_shuffled_predictions_are_not_better(tmp_path):
    params = project(tmp_path)
    for seed in params.seeds:
        path = tmp_path / f"runs/tiny-kd-{seed}/predictions.parquet"
        rows = pd.read_parquet(path)
        order = np.random.default_rng(seed).permutation(len(rows))
        rows[["prediction", "probabilities"]] = rows[["prediction", "probabilities"]].iloc[order].to_numpy()
        rows.to_parquet(path)
    results, board = run(tmp_path, params)
    assert board.loc["tiny-kd", "verdict"] == "worse"
    assert board.loc["tiny-kd", "accuracy_low"] < 1 / 3 < board.loc["tiny-kd", "accuracy_high"]


def test_many_comparisons_need_more(tmp_path):
    """Each of ten copies of the control is compared with it: chance gains do not become verdicts."""
    spec = experiment()
    gold = spec["students"]["tiny-gold"]
    spec["students"] |= {f"copy-{i}": gold | {"control": "tiny-gold"} for i in range(10)}
    spec["evaluate"]["bootstrap"] = 2000  # p cannot fall below 2 / 2001, and eleven comparisons multiply it
    params = project(tmp_path, spec, right={f"copy-{i}": 0.55 for i in range(10)})
    results = gather_results(tmp_path, params)
    board = leaderboard(results).set_index("model")
    compared = board[board["verdict"].notna()]
    test = results.tests["demo"]
    gold, predicted = test["label"], {name: results.find(name).predicted for name in params.students}
    gold, control, groups = gold.to_numpy(object), predicted["tiny-gold"], test["group"]
    alone = [
        max(
            metrics.paired_difference(gold, predicted[name], control, LABELS, groups)["accuracy"]["p"],
            metrics.permutation_test(predicted[name] == gold, control == gold, groups),
        )
        for name in compared.index
    ]
    teacher = [compare_accuracy(results, results.find(n), results.teacher_of(results.find(n)))["p"]
               for n in ("tiny-kd", "other")]  # fmt: skip
    assert len(alone) == 11 and compared["p"].tolist() == pytest.approx(metrics.holm(alone + teacher)[:11].tolist())
    verdicts = board.loc[[f"copy-{i}" for i in range(10)], "verdict"]
    assert set(verdicts) == {"no evidence"}
    assert board.loc["tiny-kd", "verdict"] == "better"


def test_a_removed_student_vanishes(finished, tmp_path):
    params = project(tmp_path)
    spec = experiment()
    del spec["students"]["other"]
    put(tmp_path / "params.yaml", json.dumps(spec))
    assert (tmp_path / "runs/other-0").exists()
    _, board = run(tmp_path, load_params(tmp_path / "params.yaml"))
    assert not [m for m in board.index if "other" in m]
    assert "other" in params.students and "other" in finished[3].index


def test_metrics_are_the_same_bytes_on_a_second_run(finished):
    root, params, results, _ = finished
    names = ["metrics.json", "leaderboard.csv", "index.html", *(f"figures/{n}.svg" for n in ("cost", "confusion"))]
    before = [(root / "reports" / name).read_bytes() for name in names]
    run(root, params, SPEEDS)
    assert [(root / "reports" / name).read_bytes() for name in names] == before
    metrics_json = before[0]
    run(root, params, {name: 2 * speed for name, speed in SPEEDS.items()})
    assert (root / "reports/metrics.json").read_bytes() == metrics_json
    assert (root / "reports/leaderboard.csv").read_bytes() != before[1]
    run(root, params, SPEEDS)


def test_files_for_dvc(finished):
    root, _, _, board = finished
    summary = json.loads((root / "reports/metrics.json").read_text())
    assert set(summary) == {"headline", "accuracy", "macro_f1", "kept_when_rewritten"}
    assert summary["accuracy"] == {
        m: round(float(v), 6) for m, v in board["accuracy"].items() if m in {"tiny-kd", "tiny-gold", "other", "big"}
    }
    assert summary["headline"]["difference_low"] == pytest.approx(board.loc["tiny-kd", "difference_low"], abs=1e-6)
    assert "second" not in (root / "reports/metrics.json").read_text()
    timing = json.loads((root / "reports/timing.json").read_text())
    assert {name: found["sentences_per_second"] for name, found in timing["models"].items()} == SPEEDS
    assert timing["rows"] == 8 and timing["threads"] >= 1
    history = pd.read_csv(root / "reports/plots/history.csv")
    assert list(history) == ["model", "seed", "phase", "step", "loss"]
    one = history[(history["model"] == "tiny-kd") & (history["seed"] == 0)]
    assert one["step"].tolist() == [1, 2, 3, 4]  # counted through the phases
    shown = pd.read_csv(root / "reports/plots/predictions.csv")
    assert list(shown) == ["actual", "predicted"] and set(shown["actual"]) == set(LABELS)
    scores = pd.read_csv(root / "reports/plots/scores.csv").set_index(["model", "score"])
    assert scores.loc[("tiny-kd", "macro_f1"), "low"] == pytest.approx(board.loc["tiny-kd", "macro_f1_low"])
    bins = pd.read_csv(root / "reports/plots/reliability.csv")
    assert list(bins) == ["model", "confidence", "right", "rows"] and bins["rows"].min() >= MIN_BIN_ROWS
    for name in ("leaderboard", "cost", "confusion", "labels", "delay", "reliability", "coverage", "history"):
        assert (root / f"reports/figures/{name}.svg").read_text().startswith("<?xml")


class Page(HTMLParser):
    """Collects what a browser would load, the ids and the text; notes tags that are closed in the wrong order."""

    VOID = {"meta", "link", "br", "input", "img", "hr", "path", "use", "rect"}

    def __init__(self, text):
        super().__init__()
        self.open, self.wrong, self.loads, self.ids, self.tags, self.words = [], [], [], [], [], []
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
        self.words.append(text)


def test_page_stands_alone(finished):
    html = (finished[0] / "reports/index.html").read_text(encoding="utf-8")
    page = Page(html)
    assert not page.wrong and not page.open
    assert not page.loads and not re.search(r"https?://|url\((?!#)|@import", html)
    assert len(page.ids) == len(set(page.ids))
    used = set(re.findall(r"""(?:href="#|url\(#)([^")]+)""", html))
    assert used <= set(page.ids)
    assert len(html.encode()) < 1_000_000


def test_page_says_what_came_out(finished):
    root, _, results, board = finished
    said = describe_result(results, board.reset_index())
    text = " ".join(said["sentences"])
    assert "7.9 times smaller" in text and "12.5 times as fast (500 against 40 sentences a second)" in text
    assert "answers a single one in 1.8 ms (22 ms)" in text
    assert "it gives up" in text and "is real" in text and "means of 2 training runs" in text
    assert said["title"].startswith("tiny-kd beside big: 7.9 times smaller, 12.5 times as fast, ")
    html = (root / "reports/index.html").read_text(encoding="utf-8")
    for tile in said["tiles"]:
        assert tile["value"] in html
    assert "teacher&#39;s words" in html and "label changed" in html


CLICKS = """<script>
const board = document.querySelector("table.sortable").tBodies[0];
const cells = column => [...board.rows].map(row => row.cells[column].dataset.value);
const heading = document.querySelectorAll("table.sortable th button")[1], out = {};
for (const way of ["descending", "ascending"]) {
  heading.click();
  out[way] = cells(1).map(Number);
}
const shown = () => [...document.querySelectorAll("#browser .row")].filter(row => row.checkVisibility());
const set = (id, value) => {
  document.getElementById(id).value = value;
  document.getElementById(id).dispatchEvent(new Event("input"));
};
out.differ = shown().map(row => "differs" in row.dataset);
set("kind", "both right"); set("gold", "down");
out.kinds = shown().map(row => row.dataset.kind + ", " + row.dataset.gold);
set("kind", ""); set("gold", ""); document.querySelector(".more").click();
out.more = shown().length;
set("find", "teacher's words");
out.found = shown().length;
out.wide = document.documentElement.scrollWidth - innerWidth;
document.title = JSON.stringify(out);
</script></body>"""


BROWSER = next(filter(shutil.which, ("chromium", "chromium-browser", "google-chrome")), None)


@pytest.mark.skipif(not BROWSER, reason="needs chromium or google-chrome")
def test_page_in_a_browser(finished, tmp_path):
    page = (finished[0] / "reports/index.html").read_text(encoding="utf-8").replace("</body>", CLICKS)
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--dump-dom"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=390,800"]
    got = subprocess.run([BROWSER, *options, "page.html"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    out = json.loads(unescape(re.search(r"<title>(.*?)</title>", got.stdout).group(1)))
    assert len(out["descending"]) == len(finished[3]) and out["descending"] == sorted(out["descending"], reverse=True)
    assert out["ascending"] == out["descending"][::-1]
    assert len(out["differ"]) == 20 and all(out["differ"])
    assert out["kinds"] and set(out["kinds"]) == {"both right, down"}
    assert out["more"] == 40 and out["found"] == 1
    assert out["wide"] <= 0  # a phone scrolls down, never sideways


EVIL = "<script>alert('pwned')</script> & \"quoted\" $x_1$ </script>"


def test_what_each_phase_gave(finished):
    root, params, results, _ = finished
    found = phase_accuracies(root, results).set_index(["model", "after phase"])
    for name in params.students:
        assert found.loc[(name, 1), "accuracy"] == pytest.approx(
            np.mean([table_["right"].mean() for table_ in phases_of(root, name, params.seeds)])
        )
        gain = found.loc[(name, 1), "accuracy"] - found.loc[(name, 0), "accuracy"]
        assert found.loc[(name, 1), "gain"] == pytest.approx(gain) and np.isnan(found.loc[(name, 0), "gain"])
    page = (root / "reports/index.html").read_text(encoding="utf-8")
    assert "What each phase gave" in page and page.count("no training") == len(params.students)


def phases_of(root, name, seeds):
    """Each run's answers on the validation rows after its first phase, and whether they are right."""
    for seed in seeds:
        rows = pd.read_parquet(root / f"runs/{name}-{seed}/phases.parquet")
        rows = rows[(rows["split"] == "validation") & (rows["phase"] == 1)].set_index("id")
        yield rows.assign(
            right=rows["prediction"] == read_split(root / "data/processed/demo", "validation").set_index("id")["label"]
        )


def test_figures_of_a_published_system_beside_the_runs(finished, tmp_path):
    """Each of its scores beside this run's with its interval, in the table, the file and the page; none is made up."""
    said = {
        "source": "a paper & its code.",
        "published": [
            {"model": "tiny-kd", "scores": {"accuracy": 0.9, "macro_f1": 0.8}, "note": "one seed"},
            {"model": "gone", "scores": {"accuracy": 0.7}},
        ],
        "differences": ["other <rows>"],
    }
    params = project(tmp_path, experiment(recipe=said))
    results, board = run(tmp_path, params)
    table = pd.read_csv(tmp_path / "reports/plots/published.csv")
    assert table["published"].tolist() == [0.9, 0.8, 0.7]
    assert table.loc[0, ["this run", "low", "high"]].tolist() == pytest.approx(
        board.loc["tiny-kd", ["accuracy", "accuracy_low", "accuracy_high"]].tolist()
    )
    assert table.loc[1, "this run"] == pytest.approx(board.loc["tiny-kd", "macro_f1"]) and pd.isna(
        table.loc[2, "this run"]
    )
    page = (tmp_path / "reports/index.html").read_text(encoding="utf-8")
    part = page[page.index('<h2 id="published">') : page.index('<h2 id="pictures">')]
    assert "a paper &amp; its code. A dash" in part and "other &lt;rows&gt;" in part and "one seed" in part
    assert f"<td>0.9000</td><td>{board.loc['tiny-kd', 'accuracy']:.4f}<small>" in part and "<td>–</td>" in part
    # a teacher has a line for each of several sources: the headline's counts
    told = params.recipe.model_copy(update={"published": [PublishedScores(model="big", scores={"accuracy": 0.9})]})
    lines = pd.DataFrame({"model": ["big on demo", "big on other"], "accuracy": [0.5, 0.1]})
    assert compare_with_published(params.model_copy(update={"recipe": told}), lines)["this run"].tolist() == [0.5]
    # no recipe, no table
    assert not (finished[0] / "reports/plots/published.csv").exists()
    assert 'id="published"' not in (finished[0] / "reports/index.html").read_text(encoding="utf-8")


def test_everything_is_escaped(tmp_path):
    words = np.random.default_rng(1)
    labels = ["up", "<b>flat</b>", "$down$"]
    corpus = [
        {
            "id": f"<i>{i}",
            "text": f"{EVIL} {' '.join(words.choice(WORDS, 9))}",
            "label": labels[i % 3],
            "rationale": f"{EVIL} why",
        }
        for i in range(200)
    ]
    task = "kind: classification\nlabels: {up: a, <b>flat</b>: b, $down$: c}\n"
    spec = experiment()
    spec["data"]["demo"]["near_duplicate"] = 1.0
    params = project(tmp_path, spec, corpus=corpus, task=task)
    signals = tmp_path / "data/teacher/big/signals.parquet"
    pd.read_parquet(signals).assign(rationale=EVIL).to_parquet(signals)
    run(tmp_path, params)
    html = (tmp_path / "reports/index.html").read_text(encoding="utf-8")
    page = Page(html)
    assert not page.wrong and not page.open
    assert page.tags.count("script") == 1 and "b" in page.tags and "<b>flat" not in html and "<i>0" not in html
    assert ">$down$<" in (tmp_path / "reports/figures/confusion.svg").read_text()  # not taken for a formula
    assert sum("alert('pwned')" in words for words in page.words) > 50  # shown as text


def said_by_the_checks(results, kind: str) -> list[str]:
    return [check.text for check in results.checks if check.kind == kind and not check.passed]


def test_checks_of_a_clean_project_pass(finished):
    root, _, results, _ = finished
    assert [c.text for c in results.checks if not c.passed] == []
    assert {c.kind for c in results.checks} == {"leak", "contamination", "shortcut"}
    html = (root / "reports/index.html").read_text(encoding="utf-8")
    assert 'role="alert"' not in html and html.count("✓ short cut") == 4


def test_a_leak_is_told(tmp_path):
    """Rows copied into train, and one with other numbers: the page says so before it says anything else."""
    spec = experiment()
    spec["teachers"]["big"]["finetune"] = {"on": "demo/train", "steps": 1, "learning_rate": 1e-3}
    spec["data"]["demo"]["near_duplicate"] = 0.97
    params = project(tmp_path, spec)
    folder = tmp_path / "data/processed/demo"
    test = read_split(folder, "test")
    test.loc[20, "text"] += " at 100"
    test.to_parquet(folder / "test.parquet")
    copied = test.head(7).assign(id=[f"leak{i}" for i in range(7)], group="another")
    masked = test[20:21].assign(id="leak7", group="a third", text=lambda rows: rows["text"].str.replace("100", "2,345"))
    pd.concat([read_split(folder, "train"), copied, masked]).to_parquet(folder / "train.parquet")
    results, _ = run(tmp_path, params)
    assert said_by_the_checks(results, "leak") == [
        f"8 of the {len(test)} test rows of demo are also in demo/train (7 the same, 1 nearly), which big, tiny-kd, "
        "tiny-gold, other learned from: every score that hangs on it is too good to be true."
    ]
    told = f"big was tuned on 7 of the {len(test)} test rows that it is scored on."
    assert said_by_the_checks(results, "contamination") == [told]
    html = unescape((tmp_path / "reports/index.html").read_text(encoding="utf-8"))
    assert html.index("<b>Leak.</b> 8 of the") < html.index(told) < html.index('class="tiles"')


def tuned(tmp_path, **scores) -> Params:
    """A project whose teacher was tuned on its train rows, in two folds, and noted these accuracies."""
    spec = experiment()
    spec["teachers"]["big"]["finetune"] = {"on": "demo/train", "steps": 1, "learning_rate": 1e-3}
    params = project(tmp_path, spec)
    train = read_split(tmp_path / "data/processed/demo", "train")
    path, rng = tmp_path / "data/teacher/big/signals.parquet", np.random.default_rng(0)
    rows = table(rng, train, 0.7, LABELS, source="demo", split="train", fold=1, rationale=None)
    pd.concat([pd.read_parquet(path), rows.rename(columns={"prediction": "label"})]).to_parquet(path)
    facts = {name: {"accuracy": value} for name, value in scores.items()} | {"parameters": 134_500_000}
    put(tmp_path / "data/teacher/big/metrics.json", facts)
    return params


@pytest.mark.parametrize(("test", "passed"), [(0.97, False), (0.75, True)])
def test_a_teacher_scored_on_rows_it_was_tuned_on_is_caught_by_its_scores(tmp_path, test, passed):
    """Whatever the files say of who was tuned on what."""
    params = tuned(tmp_path, memorised=0.98, train=0.66, test=test)
    results, _ = run(tmp_path, params)
    (check,) = [c for c in results.checks if c.kind == "contamination"]
    assert check.passed == passed and check.about == ("big",)
    assert ("has seen them" in check.text) != passed and "98 % of the rows it was tuned on" in check.text
    assert ('role="alert"' in (tmp_path / "reports/index.html").read_text()) != passed


def test_signals_from_memory_are_told(tmp_path):
    params = tuned(tmp_path, memorised=0.98, train=0.66, test=0.75)
    path = tmp_path / "data/teacher/big/signals.parquet"
    rows = pd.read_parquet(path)
    rows.assign(fold=-1).to_parquet(path)
    (text,) = said_by_the_checks(gather_results(tmp_path, params), "contamination")
    number = (rows["split"] == "train").sum()
    assert text.startswith(f"What big says of {number} of the {number} rows of demo/train comes from a model that was")


@pytest.mark.parametrize(("test", "passed"), [(0.97, False), (0.75, True)])
def test_a_teacher_without_folds_is_judged_by_validation_rows(tmp_path, test, passed):
    spec = experiment()
    spec["teachers"]["big"]["finetune"] = {"on": "demo/train", "steps": 1, "learning_rate": 1e-3, "folds": 0}
    for student in spec["students"].values():
        student["phases"] = [
            phase | ({"data": ["demo/pool"]} if "teachers" in phase else {}) for phase in student["phases"]
        ]
    params = project(tmp_path, spec)
    scores = {"memorised": 0.98, "validation": 0.7, "test": test}
    facts = {name: {"accuracy": value} for name, value in scores.items()} | {"parameters": 134_500_000}
    put(tmp_path / "data/teacher/big/metrics.json", facts)
    (check,) = [c for c in gather_results(tmp_path, params).checks if c.kind == "contamination"]
    assert check.passed == passed and "on 70 % of validation" in check.text


def test_a_model_that_knew_the_source_before_is_told(tmp_path):
    spec = experiment()
    spec["evaluate"]["pretrained_on"] = {"large": ["demo"]}
    results, _ = run(tmp_path, project(tmp_path, spec))
    (text,) = said_by_the_checks(results, "contamination")
    assert text.startswith("large had learned from demo before") and "the scores of big are no test" in text


def answering(tmp_path, share: float) -> Params:
    """A project whose headline gives the commonest answer to a share of the rows, and is as good as ever on others."""
    params = project(tmp_path)
    train = read_split(tmp_path / "data/processed/demo", "train")
    answer = train["label"].mode()[0]
    for seed in params.seeds:
        path = tmp_path / f"runs/tiny-kd-{seed}/predictions.parquet"
        rows = pd.read_parquet(path)
        rows.loc[np.random.default_rng(seed).random(len(rows)) < share, "prediction"] = answer
        rows.to_parquet(path)
    return params


def test_a_short_cut_is_called_one(tmp_path):
    """A student that always gives the commonest answer: named on top of the page, and its verdict is no "better"."""
    results, board = run(tmp_path, answering(tmp_path, 1.0))
    (text,) = said_by_the_checks(results, "shortcut")
    assert re.match(r'tiny-kd answers "\w+" for 100 % of the test rows \(3\d % are\)', text) and "not to read" in text
    html = unescape((tmp_path / "reports/index.html").read_text(encoding="utf-8"))
    assert f"<b>Short cut.</b> {text}" in html
    row = board.loc["tiny-kd"]
    assert (
        row["verdict"] == "worse" and row["commonest_answer"] == 1 and row["balanced_accuracy"] == pytest.approx(1 / 3)
    )
    assert "nothing that beats the commonest answer" in " ".join(
        describe_result(results, board.reset_index())["sentences"]
    )


def test_a_student_that_leans_on_one_answer_is_told(tmp_path):
    results = gather_results(tmp_path, answering(tmp_path, 0.6))
    (text,) = said_by_the_checks(results, "shortcut")
    assert text.endswith("it leans.")


def test_one_seed_no_teacher_no_control_no_augmentation(tmp_path):
    spec = experiment(seeds=[3], teachers={}, augment={"source": "demo", "teacher": "none", "per_row": 0})
    spec["students"] = {"alone": spec["students"]["tiny-gold"]}
    spec["evaluate"]["headline"] = "alone"
    params = project(tmp_path, spec, right={"alone": 0.2})
    results, board = run(tmp_path, params)
    text = " ".join(describe_result(results, board.reset_index())["sentences"])
    assert "was trained without a teacher" in text and "names no control" in text and "trained once" in text
    assert "nothing that beats the commonest answer" in text and "teacher:" not in text
    assert board["verdict"].isna().all() and board["kl_to_teacher"].isna().all()
    html = (tmp_path / "reports/index.html").read_text()
    assert "nothing was augmented" in html and "None" not in re.sub(r"<p>None: nothing", "", html)
    assert set(disagreements(results)["kind"]) == {"right", "wrong"}


def test_free_answers_have_no_commonest_one(tmp_path):
    """Their labels are verdicts, right or wrong: nobody could always answer "right"."""
    rng = np.random.default_rng(0)
    corpus = [{"id": f"r{i}", "text": " ".join(rng.choice(WORDS, 9)), "label": f"answer {i}"} for i in range(200)]
    params = project(tmp_path, experiment(seeds=[0]), corpus=corpus, task="kind: qa\n")
    results, board = run(tmp_path, params)
    assert "majority" not in set(board["role"]) and not said_by_the_checks(results, "shortcut")
    assert board.loc["tiny-kd", "verdict"] in ("better", "no evidence") and board["difference"].notna().sum() == 1
    assert "For comparison, the untrained student is right on" in (tmp_path / "reports/index.html").read_text()


def test_the_page_shows_what_was_written_where_answers_are_free(tmp_path):
    rng = np.random.default_rng(0)
    corpus = [
        {"id": f"r{i}", "text": " ".join(rng.choice(WORDS, 9)), "label": [f"answer {i}", f"{i}"]} for i in range(200)
    ]
    params = project(tmp_path, experiment(seeds=[0]), corpus=corpus, task="kind: qa\n")
    for path in [*tmp_path.glob("runs/*/predictions.parquet"), *tmp_path.glob("data/teacher/*/signals.parquet")]:
        rows = pd.read_parquet(path)
        rows["answer"] = [f"<{path.parent.name} says {i}>" for i in rows["id"]]
        rows.assign(token_f1=0.5, token_precision=0.4, token_recall=0.6).to_parquet(path)
    results, _ = run(tmp_path, params)
    html = (tmp_path / "reports/index.html").read_text()
    row = disagreements(results).iloc[0]
    assert row["accepted"] == f"answer {row['id'][1:]} or {row['id'][1:]}"
    for text in (
        f"accepted: {row['accepted']}",
        f"student: &lt;tiny-kd-0 says {row['id']}&gt;",
        "Exact match",
        "P 40.0",
    ):
        assert text in html
    assert f"teacher: &lt;big says {row['id']}&gt;" in html
    for text in ("Macro-F1", "What is taken for what", "specificity of each label", "gold: right", "Like its teacher"):
        assert text not in html


def test_a_student_that_beats_its_teacher(tmp_path):
    params = project(tmp_path, right={"big": 0.4})
    results, board = run(tmp_path, params, SPEEDS | {"tiny-kd": 20.0})
    said = describe_result(results, board.reset_index())
    assert "points better than its teacher" in said["sentences"][1]
    assert "2.0 times slower" in said["sentences"][0]
    assert "less accurate" not in said["title"]


def test_teacher_that_bears_a_students_name(tmp_path):
    spec = experiment()
    spec["teachers"] = {"other": spec["teachers"]["big"]}
    spec["augment"]["teacher"] = "other"
    for name in ("tiny-kd", "other"):
        spec["students"][name]["phases"][0]["teachers"] = ["other"]
    _, board = run(tmp_path, project(tmp_path, spec))
    assert board.index.is_unique
    assert board.loc["other", "role"] == "student" and board.loc["other, teacher", "role"] == "teacher"


def test_an_unreadable_answer_is_wrong_and_said_to_be_unreadable(tmp_path):
    params = project(tmp_path, right={"big": 1.0})
    path = tmp_path / "data/teacher/big/signals.parquet"
    rows = pd.read_parquet(path)
    lost = rows.index[rows["split"] == "test"][:30]
    rows.loc[lost, "label"] = None
    rows.to_parquet(path)
    results, board = run(tmp_path, params)
    assert board.loc["big", "accuracy"] == pytest.approx(1 - 30 / len(results.tests["demo"]))
    said = disagreements(results).set_index("id").loc[rows.loc[lost, "id"]]
    assert set(said["teacher"]) == {UNPARSABLE} and said["differs"].all()
    assert f"teacher: {UNPARSABLE}" in (tmp_path / "reports/index.html").read_text()
    assert not said_by_the_checks(results, "shortcut")


def test_rows_where_they_differ_come_first(finished):
    root, _, results, _ = finished
    rows = disagreements(results)
    test = read_split(root / "data/processed/demo", "test")
    assert set(rows["id"]) == set(test["id"])
    number = int(rows["differs"].sum())
    assert 0 < number < len(rows) and rows["differs"].head(number).all()
    assert (rows.loc[rows["differs"], "student"] != rows.loc[rows["differs"], "teacher"]).all()
    assert rows["student_probability"].head(number).is_monotonic_decreasing
    assert (rows.loc[rows["kind"] == "only the teacher is right", "teacher"] == rows["gold"].loc[
        rows["kind"] == "only the teacher is right"
    ]).all()  # fmt: skip


def test_a_missing_or_stale_run_is_an_error_of_one_line(tmp_path):
    params = project(tmp_path)
    path = tmp_path / "runs/other-1/predictions.parquet"
    rows = pd.read_parquet(path)
    rows.head(5).to_parquet(path)
    with pytest.raises(UserError, match=r"^runs/other-1/predictions.parquet: not the test rows of now"):
        gather_results(tmp_path, params)
    path.unlink()
    with pytest.raises(UserError, match=r"^runs/other-1/predictions.parquet: no such file"):
        gather_results(tmp_path, params)


def test_long_texts_and_many_rows_keep_the_page_small(tmp_path):
    rng = np.random.default_rng(0)
    corpus = [
        {"id": f"r{i}", "text": " ".join(rng.choice(WORDS, 150)), "label": LABELS[i % 3], "rationale": "so " * 300}
        for i in range(1300)
    ]
    spec = experiment(seeds=[0])
    spec["data"]["demo"]["split"] = {"train": 0.05, "pool": 0.05, "validation": 0.05, "test": 0.85}
    spec["data"]["demo"]["near_duplicate"] = 1.0
    params = project(tmp_path, spec, corpus=corpus)
    run(tmp_path, params)
    html = (tmp_path / "reports/index.html").read_bytes()
    assert len(html) < 3_000_000 and html.count(b'<article class="row"') == MAX_BROWSER_ROWS
    assert b"further rows are left out" in html


def test_throughput_lets_the_models_take_turns():
    calls = []
    scorers = {name: (lambda texts, name=name: calls.append((name, len(texts)))) for name in "ab"}
    speeds = throughput(scorers, ["text"] * 8, rounds=2)
    assert calls == [("a", 4), ("b", 4), ("a", 8), ("b", 8), ("a", 8), ("b", 8)]
    assert set(speeds) == {"a", "b"} and min(speeds.values()) > 0


def test_throughput_stops_when_its_time_is_spent(monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr("distillery.evaluation.speed.time.perf_counter", lambda: next(now))
    calls = []
    throughput({"a": lambda texts: calls.append(len(texts))}, ["text"] * 8, rounds=50, budget=12)
    assert len(calls) == 1 + 12  # the warm-up, then rounds that take a second each


def test_speeds_of_real_models(tmp_path, tiny_models, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = experiment(models={"small": {"folder": "small"}, "large": {"folder": "large"}})
    tuned = {"on": "demo/train", "steps": 1, "learning_rate": 1e-3}
    spec["teachers"]["big"]["finetune"] = tuned
    spec["evaluate"]["paraphrased_rows"] = 4
    spec["augment"] |= {"max_new_tokens": 4, "keep": {"min_similarity": 0.0, "max_similarity": 1.0}}
    params = project(tmp_path, spec)
    task = read_task(tmp_path / "data/processed/demo")
    for name, student in params.students.items():
        model = build_student(student, tiny_models / "tiny-bert", task, seed=0)
        save_model(model.model, model.tokenizer, tmp_path / f"runs/{name}-0/model")
    for folder in ("data/teacher/big/model", "large"):  # tuned, and as it was fetched: the one that writes
        shutil.copytree(tiny_models / "tiny-llama", tmp_path / folder)
    measured = measure_models(tmp_path, gather_results(tmp_path, params))
    speeds = measured.timing
    assert set(speeds) == {"tiny-kd", "tiny-gold", "other", "big"}
    assert min(found["sentences_per_second"] for found in speeds.values()) > 0
    assert speeds["tiny-kd"] == speeds["tiny-gold"]
    assert all(0 < found["latency_p50_ms"] <= found["latency_p95_ms"] for found in speeds.values())
    assert all(found["memory_mb"] >= 0 for found in speeds.values())
    table = measured.robustness
    assert "other words" in set(table["change"])
    assert set(table["model"]) == {"tiny-kd", "tiny-gold", "big"} and table["kept"].between(0, 1).all()


def test_pictures_are_deterministic_and_follow_the_theme(finished):
    _, _, results, board = finished
    board = board.reset_index()
    one, two = (figure_svg(figure_cost(results, board)) for _ in range(2))
    assert one == two
    page = str(inline_svg("cost", one))
    assert "var(--ink)" in page and INK not in page and "<metadata" not in page and "xmlns" not in page


@pytest.mark.parametrize(
    "dots",
    [
        [(17.4, 0.657), (17.4, 0.589), (22.7, 0.609), (81.4, 0.655), (134.5, 0.739)],
        [(20, 0.6), (21, 0.6), (20, 0.61), (130, 0.62)],
        [(20, 0.6)],
    ],
)
def test_names_of_dots_run_into_no_other_dot_or_name(dots):
    board = pd.DataFrame(dots, columns=["parameters", "accuracy"])
    board = board.assign(model=[f"student-{i}" for i in range(len(dots))], role="student")
    board = board.assign(accuracy_low=board["accuracy"] - 0.04, accuracy_high=board["accuracy"] + 0.04)
    figure = figure_cost(None, board)
    figure.canvas.draw()
    axes = figure.axes[0]
    names = [text.get_window_extent() for text in axes.texts]
    assert sorted(text.get_text() for text in axes.texts) == board["model"].tolist()
    for i, box in enumerate(names):
        assert not box.count_overlaps(names[:i] + names[i + 1 :]), board["model"][i]
        assert not any(box.contains(*axes.transData.transform(dot)) for dot in dots), board["model"][i]
