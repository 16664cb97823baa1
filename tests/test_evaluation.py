"""Scores, comparisons, checks, rows and speed, on a finished experiment with invented runs."""

import json
import re
import shutil
import sqlite3
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sk

from distillery import metrics
from distillery.config.load import load_params, validate_section
from distillery.config.schema import Params, PublishedScores, TeacherConfig
from distillery.data.storage import read_split, read_task
from distillery.errors import UserError
from distillery.evaluation import speed
from distillery.evaluation.checks import find_shortcuts
from distillery.evaluation.gather import UNPARSABLE, gather_results
from distillery.evaluation.leaderboard import (
    compare_accuracy,
    compare_with_published,
    leaderboard,
    phase_accuracies,
    summarize,
    teacher_closeness,
)
from distillery.evaluation.results import ModelResult
from distillery.evaluation.robustness import paraphrase_test_rows, rewrite_test_rows
from distillery.evaluation.rows import disagreements, sample_rows
from distillery.evaluation.speed import latency, measure_models, peak_memory, student_shape, throughput
from distillery.models.save import save_model
from distillery.report.sentences import describe_result
from distillery.tasks.schema import Task
from distillery.teachers.cache import STORE_PATH
from distillery.training.student import build_student, load_student
from report_project import (
    LABELS,
    SPEEDS,
    evaluate,
    experiment,
    finished_project,
    invented_measurements,
    prediction_table,
    qa_project,
    write_file,
    write_project,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return finished_project(tmp_path_factory.mktemp("project"))


# ------------------------------------------------------------------------------- scores


def test_scores_are_those_of_the_runs(finished):
    root, params, _, board = finished
    test = read_split(root / "data/processed/demo", "test").set_index("id")["label"]
    teacher = pd.read_parquet(root / "data/teacher/big/signals.parquet").set_index("id").loc[test.index]
    for name in params.students:
        runs = [pd.read_parquet(root / f"runs/{name}-{seed}/predictions.parquet") for seed in params.seeds]
        runs = [r.set_index("id").loc[test.index] for r in runs]
        row = board.loc[name]
        divergences = [
            metrics.kl_divergence(np.stack(teacher["probabilities"]), np.stack(r["probabilities"])).mean() for r in runs
        ]
        expected = {
            "accuracy": np.mean([sk.accuracy_score(test, r["prediction"]) for r in runs]),
            "macro_f1": np.mean([sk.f1_score(test, r["prediction"], average="macro") for r in runs]),
            "recall_down": np.mean([sk.recall_score(test == "down", r["prediction"] == "down") for r in runs]),
            "agreement_with_teacher": np.mean([(r["prediction"] == teacher["label"]).mean() for r in runs]),
            "kl_to_teacher": np.mean(divergences),
        }
        for key, value in expected.items():
            assert row[key] == pytest.approx(value), (name, key)
        assert row["accuracy_low"] < row["accuracy"] < row["accuracy_high"]
        assert (row["parameters"], row["megabytes"], row["seeds"]) == (17_000_000, 34.0, 2)
        assert (row["trainable"], row["train_seconds"], row["training_mb"]) == (16_000_000, 61.5, 901)
    assert board.loc["big", "accuracy"] == pytest.approx(sk.accuracy_score(test, teacher["label"]))


def test_a_score_that_a_model_does_not_have_is_not_in_the_summary(finished):
    _, _, results, board = finished
    name = results.headline.name
    mixed = board.reset_index().assign(micro_f1=np.where(board.index == name, 0.5, np.nan))
    assert summarize(results, mixed)["micro_f1"] == {name: 0.5}


@pytest.mark.usefixtures("without_figures")
def test_memory_of_a_gpu_is_in_the_leaderboard_where_there_was_one(tmp_path):
    params = write_project(tmp_path, experiment())
    _, board = evaluate(tmp_path, params, report=True)
    page = tmp_path / "reports/index.html"
    assert not {"gpu_memory_mb", "training_gpu_mb"} & {*board} and "GPU memory" not in page.read_text()
    for seed, peak in ((0, 500), (1, 700)):
        path = tmp_path / f"runs/tiny-kd-{seed}/timing.json"
        write_file(path, json.dumps(json.loads(path.read_text()) | {"peak_gpu_memory_mb": peak}))
    _, board = evaluate(tmp_path, params, report=True)
    assert board.loc["tiny-kd", "training_gpu_mb"] == 700 and board["training_gpu_mb"].count() == 1
    assert "GPU memory, training" in page.read_text() and "700 MB" in page.read_text()


@pytest.mark.usefixtures("without_figures")
def test_predictions_are_priced_where_measure_and_price_are_known(tmp_path):
    """Of local models by an hour of the machine, of an endpoint by the tokens that a row took; nothing is invented."""
    spec = experiment(seeds=[0])
    api = {"model": "m", "key": "K", "price": {"input": 1.0, "output": 10.0}}
    spec["teachers"]["far"] = {"kind": "api", "api": api}
    root, page = tmp_path, tmp_path / "reports/index.html"
    params = write_project(root, spec, accuracy={"far": 0.8})
    _, board = evaluate(root, params, SPEEDS, report=True)
    assert "dollars_per_1000_rows" not in board and "$" not in page.read_text().split('id="cost"')[1].split("Checks")[0]
    facts = root / "data/teacher/far/metrics.json"
    facts.write_text(json.dumps({"tokens_per_row": {"input": 200.0, "output": 3.0}}))
    evaluate_config = params.evaluate.model_copy(update={"machine_price_per_hour": 0.36})
    _, board = evaluate(root, params.model_copy(update={"evaluate": evaluate_config}), SPEEDS, report=True)
    dollars = board["dollars_per_1000_rows"]
    assert dollars["tiny-kd"] == pytest.approx(1000 / 500 / 3600 * 0.36)
    assert dollars["big"] == pytest.approx(1000 / 40 / 3600 * 0.36)
    assert dollars["far"] == pytest.approx((200 * 1.0 + 3 * 10.0) / 1000)  # speed or not
    assert np.isnan(dollars["always " + read_split(root / "data/processed/demo", "train")["label"].mode()[0]])
    rows = re.search(r'aria-label="What predictions take".*?</table>', page.read_text(), flags=re.S)[0]
    cells = {
        name: re.findall(r"<td[^>]*>([^<]*)", row)
        for name, row in re.findall(r"</span>([\w-]+)</th>(.*?)</tr>", rows, re.S)
    }
    assert cells["tiny-kd"][1:] == ["2.0 s", "33 min 20 s", "$0.00020", "$0.20"]
    assert cells["far"][1:] == ["–", "–", "$0.23", "$230.00"]
    facts.write_text("{}")  # no count of tokens: no price
    _, board = evaluate(root, params, SPEEDS, report=True)
    assert "dollars_per_1000_rows" not in board


def test_closeness_to_each_teacher(tmp_path):
    spec = experiment()
    spec["teachers"]["second"] = spec["teachers"]["big"]
    results, board = evaluate(tmp_path, write_project(tmp_path, spec, accuracy={"second": 0.6}))
    close = teacher_closeness(results).set_index(["model", "teacher"])
    students = results.params.students
    assert len(close) == 2 * (len(students) + 2)  # three students, two of them untrained
    for name in students:
        assert close.loc[(name, "big"), "agreement"] == pytest.approx(board.loc[name, "agreement_with_teacher"])
        assert close.loc[(name, "big"), "kl"] == pytest.approx(board.loc[name, "kl_to_teacher"])
    second = results.signals["second", "demo"]["prediction"].to_numpy(object)
    assert close.loc[("other", "second"), "agreement"] == (results.find("other").predictions == second).mean()


def test_every_role_has_its_row(finished):
    _, _, _, board = finished
    # tiny-kd and tiny-gold start from one model: one untrained row for both
    roles = {"tiny-kd": "student", "tiny-gold": "control", "other": "student", "big": "teacher"}
    roles |= {"tiny-kd, untrained": "untrained", "other, untrained": "untrained"}
    majority = [m for m in board.index if m.startswith("always ")]
    assert len(majority) == 1
    assert board["role"].to_dict() == roles | {majority[0]: "majority"}
    assert board["accuracy"].is_monotonic_decreasing


def test_students_that_differ_in_what_they_train_start_alike(tmp_path):
    spec = experiment(seeds=[0])
    students = spec["students"]
    frozen = students["tiny-gold"] | {"init": {"layers": [0, 2], "freeze": "first-1"}}
    params = write_project(tmp_path, spec | {"students": {"tiny-gold": frozen} | students | {"tiny-gold": frozen}})
    results, board = evaluate(tmp_path, params)
    untrained = board[board["role"] == "untrained"]
    assert set(untrained.index) == {"tiny-gold, untrained", "other, untrained"}
    start = f"the untrained student on {untrained.loc['tiny-gold, untrained', 'accuracy']:.1%}".replace("%", " %")
    assert start in " ".join(describe_result(results, board.reset_index())["sentences"])
    assert student_shape(params.students["tiny-kd"]) == student_shape(params.students["tiny-gold"])


@pytest.mark.usefixtures("without_figures")
def test_a_teacher_with_the_name_of_a_student(tmp_path):
    spec = experiment()
    spec["teachers"] = {"other": spec["teachers"]["big"]}
    spec["augment"]["teacher"] = "other"
    for name in ("tiny-kd", "other"):
        spec["students"][name]["phases"][0]["teachers"] = ["other"]
    _, board = evaluate(tmp_path, write_project(tmp_path, spec), report=True)
    assert board.index.is_unique
    assert board.loc["other", "role"] == "student" and board.loc["other, teacher", "role"] == "teacher"


@pytest.mark.usefixtures("without_figures")
def test_free_answers_have_no_majority_label(tmp_path):
    """Their labels are verdicts, right or wrong: no model can always answer "right"."""
    results, board = evaluate(tmp_path, qa_project(tmp_path), report=True)
    assert "majority" not in set(board["role"]) and not failed_checks(results, "shortcut")
    assert board.loc["tiny-kd", "verdict"] == "no evidence" and board["difference"].notna().sum() == 1


def test_accuracy_after_each_phase(finished):
    root, params, results, _ = finished
    label = read_split(root / "data/processed/demo", "validation").set_index("id")["label"]
    table = phase_accuracies(root, results).set_index(["model", "after phase"])
    for name in params.students:
        runs = [pd.read_parquet(root / f"runs/{name}-{seed}/phases.parquet") for seed in params.seeds]
        for phase in (0, 1):
            rows = [run[(run["split"] == "validation") & (run["phase"] == phase)].set_index("id") for run in runs]
            accuracy = np.mean([(run["prediction"] == label.loc[run.index]).mean() for run in rows])
            assert table.loc[(name, phase), "accuracy"] == pytest.approx(accuracy)
        gain = table.loc[(name, 1), "accuracy"] - table.loc[(name, 0), "accuracy"]
        assert table.loc[(name, 1), "gain"] == pytest.approx(gain) and np.isnan(table.loc[(name, 0), "gain"])
        runs_by_phase = [[run[(run["split"] == "validation") & (run["phase"] == p)] for run in runs] for p in (0, 1)]
        before, after = (
            np.mean([r.set_index("id")["prediction"].eq(label)[label.index] for r in part], 0) for part in runs_by_phase
        )
        error = np.std(after - before, ddof=1) / np.sqrt(len(label))
        assert table.loc[(name, 1), "gain_error"] == pytest.approx(error)


def test_a_removed_student_vanishes(finished, tmp_path):
    params = write_project(tmp_path)
    spec = experiment()
    del spec["students"]["other"]
    write_file(tmp_path / "params.yaml", json.dumps(spec))
    assert (tmp_path / "runs/other-0").exists()
    _, board = evaluate(tmp_path, load_params(tmp_path / "params.yaml"))
    assert not [m for m in board.index if "other" in m]
    assert "other" in params.students and "other" in finished[3].index


def test_a_missing_or_stale_run_is_an_error_of_one_line(tmp_path):
    params = write_project(tmp_path)
    path = tmp_path / "runs/other-1/predictions.parquet"
    rows = pd.read_parquet(path)
    rows.head(5).to_parquet(path)
    with pytest.raises(UserError, match=r"^runs/other-1/predictions.parquet: other test rows than data/processed has"):
        gather_results(tmp_path, params)
    path.unlink()
    with pytest.raises(UserError, match=r"^runs/other-1/predictions.parquet: no such file"):
        gather_results(tmp_path, params)


@pytest.mark.usefixtures("without_figures")
def test_published_scores_beside_those_of_the_run(finished, tmp_path):
    published = [
        {
            "model": "tiny-kd",
            "scores": {"accuracy": 0.9, "macro_f1": 0.8},
            "split": "test",
            "place": "table 2",
            "note": "one seed",
        },
        {"model": "gone", "scores": {"accuracy": 0.7}},
    ]
    recipe = {"source": "a paper & its code.", "published": published, "differences": {"data.demo": "other <rows>"}}
    params = write_project(tmp_path, experiment(recipe=recipe))
    _, board = evaluate(tmp_path, params, report=True)
    table = pd.read_csv(tmp_path / "reports/plots/published.csv")
    assert table["published"].tolist() == [0.9, 0.8, 0.7]
    assert table["split"].tolist() == ["test", "test", "not given"]
    assert table["place"].fillna("").tolist() == ["table 2", "table 2", ""]
    scores = board.loc["tiny-kd", ["accuracy", "accuracy_low", "accuracy_high"]].tolist()
    assert table.loc[0, ["this run", "low", "high"]].tolist() == pytest.approx(scores)
    assert table.loc[1, "this run"] == pytest.approx(board.loc["tiny-kd", "macro_f1"])
    assert pd.isna(table.loc[2, "this run"])
    page = (tmp_path / "reports/index.html").read_text(encoding="utf-8")
    part = page[page.index('<h2 id="published">') : page.index('<h2 id="figures">')]
    assert "a paper &amp; its code. A dash" in part and "one seed" in part
    assert "<code>data.demo</code>: other &lt;rows&gt;" in part
    row = f'<td class="left">test</td><td class="left">table 2</td><td>{board.loc["tiny-kd", "accuracy"]:.4f}<small>'
    assert row in part and '<td class="left">–</td><td>–</td>' in part
    # a teacher has a row for each of several sources: the headline's counts
    recipe = params.recipe.model_copy(update={"published": [PublishedScores(model="big", scores={"accuracy": 0.9})]})
    rows = pd.DataFrame({"model": ["big on demo", "big on other"], "accuracy": [0.5, 0.1]})
    assert compare_with_published(params.model_copy(update={"recipe": recipe}), rows)["this run"].tolist() == [0.5]
    # no recipe, no table
    assert not (finished[0] / "reports/plots/published.csv").exists()
    assert 'id="published"' not in (finished[0] / "reports/index.html").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------- comparisons


def test_verdict_of_a_real_gain(finished):
    _, _, _, board = finished
    row = board.loc["tiny-kd"]
    assert row["versus"] == "tiny-gold" and row["verdict"] == "better" and row["p"] < 0.05
    assert 0 < row["difference_low"] < row["difference"] < row["difference_high"]
    assert row["difference"] == pytest.approx(row["accuracy"] - board.loc["tiny-gold", "accuracy"])
    assert board["verdict"].notna().sum() == 1


def test_verdict_against_the_teacher(finished):
    _, _, _, board = finished
    assert board["teacher_verdict"].dropna().to_dict() == {"tiny-kd": "worse", "other": "worse"}
    row = board.loc["other"]
    assert row["teacher_versus"] == "big" and row["teacher_difference_high"] < 0
    assert row["teacher_difference"] == pytest.approx(row["accuracy"] - board.loc["big", "accuracy"])


def test_shuffled_predictions_are_not_better(tmp_path):
    params = write_project(tmp_path)
    for seed in params.seeds:
        path = tmp_path / f"runs/tiny-kd-{seed}/predictions.parquet"
        rows = pd.read_parquet(path)
        order = np.random.default_rng(seed).permutation(len(rows))
        rows[["prediction", "probabilities"]] = rows[["prediction", "probabilities"]].iloc[order].to_numpy()
        rows.to_parquet(path)
    _, board = evaluate(tmp_path, params)
    assert board.loc["tiny-kd", "verdict"] == "worse"
    assert board.loc["tiny-kd", "accuracy_low"] < 1 / 3 < board.loc["tiny-kd", "accuracy_high"]


def test_many_comparisons_need_more(tmp_path):
    """Each of ten copies of the control is compared with it: chance gains do not become verdicts."""
    spec = experiment()
    gold = spec["students"]["tiny-gold"]
    spec["students"] |= {f"copy-{i}": gold | {"control": "tiny-gold"} for i in range(10)}
    spec["evaluate"]["bootstrap"] = 2000  # p cannot fall below 2 / 2001, and eleven comparisons multiply it
    params = write_project(tmp_path, spec, accuracy={f"copy-{i}": 0.55 for i in range(10)})
    results = gather_results(tmp_path, params)
    board = leaderboard(results).set_index("model")
    compared = board[board["verdict"].notna()]
    test = results.tests["demo"]
    predictions = {name: results.find(name).predictions for name in params.students}
    label, control, groups = test["label"].to_numpy(object), predictions["tiny-gold"], test["group"]
    alone = [
        max(
            metrics.paired_difference(label, predictions[name], control, LABELS, groups)["accuracy"]["p"],
            metrics.permutation_test(predictions[name] == label, control == label, groups),
        )
        for name in compared.index
    ]
    teacher = [compare_accuracy(results, results.find(n), results.teacher_of(results.find(n)))["p"]
               for n in ("tiny-kd", "other")]  # fmt: skip
    assert len(alone) == 11 and compared["p"].tolist() == pytest.approx(metrics.holm(alone + teacher)[:11].tolist())
    verdicts = board.loc[[f"copy-{i}" for i in range(10)], "verdict"]
    assert set(verdicts) == {"no evidence"}
    assert board.loc["tiny-kd", "verdict"] == "better"


# ------------------------------------------------------------------------------- checks


def failed_checks(results, kind: str) -> list[str]:
    return [check.text for check in results.checks if check.kind == kind and not check.passed]


def test_checks_of_a_clean_project_pass(finished):
    _, _, results, _ = finished
    assert [c.text for c in results.checks if not c.passed] == []
    assert [c.kind for c in results.checks] == ["leak", "contamination"] + 4 * ["shortcut"]


def test_a_leak_fails_the_check(tmp_path):
    """Rows copied into train, and one with other numbers."""
    spec = experiment()
    spec["teachers"]["big"]["finetune"] = {"on": "demo/train", "steps": 1, "learning_rate": 1e-3}
    spec["data"]["demo"]["near_duplicate"] = 0.97
    params = write_project(tmp_path, spec)
    folder = tmp_path / "data/processed/demo"
    test = read_split(folder, "test")
    test.loc[20, "text"] += " at 100"
    test.to_parquet(folder / "test.parquet")
    copied = test.head(7).assign(id=[f"leak{i}" for i in range(7)], group="another")
    masked = test[20:21].assign(id="leak7", group="a third", text=lambda rows: rows["text"].str.replace("100", "2,345"))
    pd.concat([read_split(folder, "train"), copied, masked]).to_parquet(folder / "train.parquet")
    results, first = gather_results(tmp_path, params), test["id"][0]
    assert failed_checks(results, "leak") == [
        f"8 of the {len(test)} test rows of demo are also in demo/train (7 the same, 1 nearly; the first is {first}), "
        "which big, tiny-kd, tiny-gold, other learned from: every score that depends on these rows is too high."
    ]
    assert failed_checks(results, "contamination") == [
        f"big was fine-tuned on 7 of the {len(test)} test rows that it is scored on."
    ]


def finetuned_project(tmp_path, **scores) -> Params:
    """A project whose teacher was fine-tuned on its train rows, in two folds, and recorded these accuracies."""
    spec = experiment()
    spec["teachers"]["big"]["finetune"] = {"on": "demo/train", "steps": 1, "learning_rate": 1e-3}
    params = write_project(tmp_path, spec)
    train = read_split(tmp_path / "data/processed/demo", "train")
    path, rng = tmp_path / "data/teacher/big/signals.parquet", np.random.default_rng(0)
    rows = prediction_table(rng, train, 0.7, LABELS, source="demo", split="train", fold=1, rationale=None)
    pd.concat([pd.read_parquet(path), rows.rename(columns={"prediction": "label"})]).to_parquet(path)
    write_metadata(tmp_path, scores)
    return params


def write_metadata(tmp_path, scores: dict[str, float]) -> None:
    metadata = {name: {"accuracy": value} for name, value in scores.items()} | {"parameters": 134_500_000}
    write_file(tmp_path / "data/teacher/big/metrics.json", metadata)


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize(("test", "passed"), [(0.97, False), (0.75, True)])
def test_a_teacher_scored_on_its_training_rows_shows_by_its_scores(tmp_path, test, passed):
    """Whatever the files record of the rows that it was fine-tuned on."""
    params = finetuned_project(tmp_path, memorised=0.98, train=0.66, test=test)
    results, _ = evaluate(tmp_path, params, report=True)
    (check,) = [c for c in results.checks if c.kind == "contamination"]
    assert check.passed == passed and check.models == ("big",)
    assert ("has seen them" in check.text) != passed and "98 % of the rows it was fine-tuned on" in check.text
    assert ('role="alert"' in (tmp_path / "reports/index.html").read_text()) != passed


def test_signals_from_memory_fail_the_check(tmp_path):
    params = finetuned_project(tmp_path, memorised=0.98, train=0.66, test=0.75)
    path = tmp_path / "data/teacher/big/signals.parquet"
    rows = pd.read_parquet(path)
    rows.assign(fold=-1).to_parquet(path)
    (text,) = failed_checks(gather_results(tmp_path, params), "contamination")
    number = (rows["split"] == "train").sum()
    assert text.startswith(f"The signals of big for {number} of the {number} rows of demo/train come from a model that")


@pytest.mark.parametrize(("test", "passed"), [(0.97, False), (0.75, True)])
def test_a_teacher_without_folds_is_checked_on_validation_rows(tmp_path, test, passed):
    spec = experiment()
    spec["teachers"]["big"]["finetune"] = {"on": "demo/train", "steps": 1, "learning_rate": 1e-3, "folds": 0}
    for student in spec["students"].values():
        student["phases"] = [
            phase | ({"data": ["demo/pool"]} if "teachers" in phase else {}) for phase in student["phases"]
        ]
    params = write_project(tmp_path, spec)
    write_metadata(tmp_path, {"memorised": 0.98, "validation": 0.7, "test": test})
    (check,) = [c for c in gather_results(tmp_path, params).checks if c.kind == "contamination"]
    assert check.passed == passed and "on 70 % of the validation rows" in check.text


def test_a_model_pretrained_on_the_source_fails_the_check(tmp_path):
    spec = experiment()
    spec["evaluate"]["pretrained_on"] = {"large": ["demo"]}
    results = gather_results(tmp_path, write_project(tmp_path, spec))
    (text,) = failed_checks(results, "contamination")
    assert text.startswith("large had learned from demo before") and "the scores of big are no test" in text


def predicting_the_majority(tmp_path, share: float) -> Params:
    """A project whose headline predicts the most frequent label for a share of the rows, and as ever for others."""
    params = write_project(tmp_path)
    majority = read_split(tmp_path / "data/processed/demo", "train")["label"].mode()[0]
    change_predictions(
        tmp_path,
        params,
        lambda seed, rows: rows["prediction"].mask(np.random.default_rng(seed).random(len(rows)) < share, majority),
    )
    return params


def change_predictions(tmp_path, params, change) -> None:
    """Replace the predictions of every run of the headline by `change(seed, rows)`."""
    for seed in params.seeds:
        path = tmp_path / f"runs/tiny-kd-{seed}/predictions.parquet"
        rows = pd.read_parquet(path)
        rows.assign(prediction=change(seed, rows)).to_parquet(path)


@pytest.mark.usefixtures("without_figures")
def test_a_student_that_always_predicts_one_label_fails_the_check(tmp_path):
    """And its verdict is no "better"."""
    results, board = evaluate(tmp_path, predicting_the_majority(tmp_path, 1.0), report=True)
    (text,) = failed_checks(results, "shortcut")
    assert re.match(r'tiny-kd predicts "\w+" for 100 % of the test rows \(3\d % are\)', text)
    assert "not to read the text" in text
    row = board.loc["tiny-kd"]
    assert row["verdict"] == "worse" and row["commonest_answer"] == 1
    assert row["balanced_accuracy"] == pytest.approx(1 / 3)


def test_a_student_with_biased_predictions_fails_the_check(tmp_path):
    results = gather_results(tmp_path, predicting_the_majority(tmp_path, 0.6))
    (text,) = failed_checks(results, "shortcut")
    assert text.endswith("its predictions are biased.")


def test_a_label_that_a_student_never_predicts_fails_the_check(tmp_path):
    """Even if it is rare, so that the predictions are hardly biased, and in one run only."""
    params = write_project(tmp_path)
    path = tmp_path / "data/processed/demo/test.parquet"
    test = pd.read_parquet(path)
    rare = test["label"] == "down"
    test.loc[rare & (rare.cumsum() > 5), "label"] = "flat"
    test.to_parquet(path)
    label = test.set_index("id")["label"]

    def right_but(seed, rows):
        right = rows["id"].map(label).fillna(rows["prediction"])
        return right.mask(right == "down", "flat") if seed == 1 else right

    change_predictions(tmp_path, params, right_but)
    results, _ = evaluate(tmp_path, params)
    checks = [c for c in results.checks if c.kind == "shortcut" and "tiny-kd" in c.models]
    text = f'tiny-kd never predicts "down" (5 of the {len(test)} test rows; in 1 of 2 training runs).'
    assert [(c.passed, c.text) for c in checks] == [(False, text)]


def test_many_labels_that_are_never_predicted_are_counted():
    label = pd.Series([f"l{i}" for i in range(20)] * 4)
    predictions = label.replace({f"l{i}": "l9" for i in range(7)}).to_numpy(object)[None]
    checks = find_shortcuts(ModelResult("m", "m", "student", "s", predictions), label)
    assert [check.passed for check in checks] == [False, False]  # biased, too
    assert checks[1].text.startswith('m never predicts "l0" (4 of the 80 test rows), "l1"')
    assert checks[1].text.endswith('"l4" (4 of the 80 test rows) and 2 other labels.')


# ------------------------------------------------------------------------------- single rows


def test_rows_where_they_differ_come_first(finished):
    root, _, results, _ = finished
    rows = disagreements(results)
    test = read_split(root / "data/processed/demo", "test")
    assert set(rows["id"]) == set(test["id"])
    number = int(rows["differs"].sum())
    assert 0 < number < len(rows) and rows["differs"].head(number).all()
    assert rows["differs"].equals(rows["student_prediction"] != rows["teacher_prediction"])
    assert rows["student_probability"].head(number).is_monotonic_decreasing
    right = {role: rows[f"{role}_prediction"] == rows["label"] for role in ("student", "teacher")}
    assert (rows["kind"] == "only the teacher is right").equals(right["teacher"] & ~right["student"])


def test_random_rows_with_the_prediction_of_every_trained_model(finished):
    root, params, results, _ = finished
    rows = sample_rows(results)
    assert list(rows) == ["text", "label", "tiny-kd", "tiny-gold", "other", "big"]
    assert len(rows) == params.evaluate.samples
    test = read_split(root / "data/processed/demo", "test").set_index("text").loc[rows["text"]]
    assert rows["label"].tolist() == test["label"].tolist()
    predictions = pd.read_parquet(root / "runs/other-0/predictions.parquet").set_index("id")["prediction"]
    assert rows["other"].tolist() == predictions.loc[test["id"]].tolist()


@pytest.mark.usefixtures("without_figures")
def test_an_unreadable_answer_is_wrong_and_shown_as_unreadable(tmp_path):
    params = write_project(tmp_path, accuracy={"big": 1.0})
    path = tmp_path / "data/teacher/big/signals.parquet"
    rows = pd.read_parquet(path)
    unreadable = rows.index[rows["split"] == "test"][:30]
    rows.loc[unreadable, "label"] = None
    rows.to_parquet(path)
    results, board = evaluate(tmp_path, params, report=True)
    assert board.loc["big", "accuracy"] == pytest.approx(1 - 30 / len(results.tests["demo"]))
    shown = disagreements(results).set_index("id").loc[rows.loc[unreadable, "id"]]
    assert set(shown["teacher_prediction"]) == {UNPARSABLE} and shown["differs"].all()
    assert f"teacher: {UNPARSABLE}" in (tmp_path / "reports/index.html").read_text()
    assert not failed_checks(results, "shortcut")


# ------------------------------------------------------------------------------- robustness and speed


def test_robustness_of_a_known_model(finished):
    """It predicts by one word of the text, which only a rewritten name could change."""
    _, _, results, _ = finished
    table = invented_measurements(results).robustness
    rewritten = rewrite_test_rows(results)
    assert list(rewritten) == ["names"]  # tickers; there are no amounts and no units
    rows = rewritten["names"]
    assert len(rows) == results.params.evaluate.rewritten_rows
    predictions = {column: [LABELS["ship" in text] for text in rows[column]] for column in ("text", "new")}
    for row in table.to_dict("records"):
        assert row["rows"] == len(rows) and row["consistency"] == np.mean(
            [a == b for a, b in zip(*predictions.values(), strict=True)]
        )
        assert row["accuracy_before"] == pytest.approx((rows["label"] == predictions["text"]).mean())
        assert row["accuracy_after"] == pytest.approx((rows["label"] == predictions["new"]).mean())
    assert table["model"].tolist() == ["tiny-kd", "big"]


class Clock:
    """A clock that moves only when a model predicts: `seconds` for each text."""

    def __init__(self, monkeypatch):
        self.now, self.calls = 0.0, []
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def predictor(self, name: str, seconds: float):
        def predict(rows):
            self.calls.append((name, len(rows)))
            self.now += seconds * len(rows)

        return predict


def timed_rows(n: int) -> pd.DataFrame:
    return pd.DataFrame({"text": ["text"] * n})


def test_throughput_lets_the_models_take_turns(monkeypatch):
    clock = Clock(monkeypatch)
    predictors = {"a": clock.predictor("a", 0.01), "b": clock.predictor("b", 0.04)}
    speeds = throughput(predictors, timed_rows(8), rounds=2)
    assert clock.calls == [("a", 4), ("b", 4), ("a", 8), ("b", 8), ("a", 8), ("b", 8)]
    assert speeds == {"a": pytest.approx(100), "b": pytest.approx(25)}


def test_throughput_stops_when_its_time_is_spent(monkeypatch):
    clock = Clock(monkeypatch)
    throughput({"a": clock.predictor("a", 0.125)}, timed_rows(8), rounds=50, budget=12)
    assert clock.calls == [("a", 4)] + 12 * [("a", 8)]  # the warm-up, then rounds that take a second each


def test_latency_is_that_of_single_sentences(monkeypatch):
    clock = Clock(monkeypatch)
    predictors = {"a": clock.predictor("a", 0.002), "b": clock.predictor("b", 0.03)}
    assert latency(predictors, timed_rows(5)) == {"a": pytest.approx((2, 2)), "b": pytest.approx((30, 30))}
    assert clock.calls == 5 * [("a", 1), ("b", 1)]


def test_peak_memory_is_that_of_the_work():
    result, megabytes = peak_memory(lambda: np.ones(8_000_000).sum())  # 64 MB, freed at once
    assert result == 8_000_000 and 50 < megabytes < 120


@pytest.fixture
def real_models(tmp_path, tiny_models, monkeypatch):
    """A project whose models are there: students of random weights, and a fine-tuned teacher that writes."""
    monkeypatch.chdir(tmp_path)
    spec = experiment(models={"small": {"folder": "small"}, "large": {"folder": "large"}})
    spec["teachers"]["big"]["finetune"] = {"on": "demo/train", "steps": 1, "learning_rate": 1e-3}
    spec["evaluate"]["paraphrased_rows"] = 4
    spec["augment"] |= {"max_new_tokens": 4, "keep": {"min_similarity": 0.0, "max_similarity": 1.0}}
    params = write_project(tmp_path, spec)
    task = read_task(tmp_path / "data/processed/demo")
    for name, student in params.students.items():
        model = build_student(student, tiny_models / "tiny-bert", task, seed=0)
        save_model(model.model, model.tokenizer, tmp_path / f"runs/{name}-0/model")
    for folder in ("data/teacher/big/model", "large"):  # fine-tuned, and as it was fetched: the one that writes
        shutil.copytree(tiny_models / "tiny-llama", tmp_path / folder)
    return params, task


def test_measurements_of_real_models(tmp_path, real_models, monkeypatch):
    """Students of one shape are measured once; what is timed and rewritten is what the saved models predict."""
    (params, task), timed = real_models, {}

    def fixed_throughput(predictors, rows):
        timed.update(predictors)
        assert len(rows) == params.evaluate.throughput_rows
        return {name: 100.0 * (i + 1) for i, name in enumerate(predictors)}

    monkeypatch.setattr(speed, "throughput", fixed_throughput)
    monkeypatch.setattr(speed, "latency", lambda predictors, rows: dict.fromkeys(predictors, (len(rows), 99.0)))
    monkeypatch.setattr(speed, "peak_memory", lambda work: (work(), 7.0))
    results = gather_results(tmp_path, params)
    measured = measure_models(tmp_path, results)
    expected = {"tiny-kd": 100.0, "tiny-gold": 100.0, "other": 200.0, "big": 300.0}
    assert measured.timing == {
        name: {"sentences_per_second": rate, "latency_p50_ms": 8, "latency_p95_ms": 99.0, "memory_mb": 7.0}
        for name, rate in expected.items()
    }
    students = {name: load_student(params.students[name], tmp_path / f"runs/{name}-0/model", task, "float32")
                for name in ("tiny-kd", "tiny-gold", "other")}  # fmt: skip
    rows = results.tests["demo"].head(5)
    for predict, name in zip(timed.values(), ("tiny-kd", "other"), strict=False):
        np.testing.assert_allclose(predict(rows), students[name].predict(rows["text"].tolist()), rtol=1e-5)
    table = measured.robustness.set_index(["perturbation", "model"])
    assert set(table.index) == {(p, m) for p in ("names", "other words") for m in ("tiny-kd", "tiny-gold", "big")}
    rows = rewrite_test_rows(results)["names"]
    for name in ("tiny-kd", "tiny-gold"):
        before, after = (students[name].predict(rows[column].tolist()).argmax(-1) for column in ("text", "new"))
        assert table.loc[("names", name), "consistency"] == (before == after).mean()


def test_no_large_model_is_loaded_twice_to_measure_memory(tmp_path, real_models, monkeypatch):
    """What stays loaded beside the measured models is the smallest of each architecture."""
    params, _ = real_models
    results = gather_results(tmp_path, params)
    sizes = {"tiny-kd": 5, "tiny-gold": 5, "other": 9, "big": 100}
    models = [replace(result, parameters=sizes.get(result.name)) for result in results.models]
    loaded, load = [], speed._load_model
    monkeypatch.setattr(speed, "_load_model", lambda *args: loaded.append(args[-1].name) or load(*args))
    monkeypatch.setattr(speed, "peak_memory", lambda work: loaded.append("measured") or (work(), 7.0))
    measure_models(tmp_path, replace(results, models=sorted(models, key=lambda result: -(result.parameters or 0))))
    assert loaded[: loaded.index("measured")] == ["tiny-kd", "big"]  # a classifier, and the only causal model


def test_each_test_row_is_paraphrased_once_however_many_training_paraphrases_there_are(tmp_path, real_models):
    params, _ = real_models
    results, tables = gather_results(tmp_path, params), []
    for per_row in (1, 0, 2):
        augment = params.augment.model_copy(update={"per_row": per_row})
        changed = replace(results, params=params.model_copy(update={"augment": augment}))
        tables.append(paraphrase_test_rows(tmp_path, changed))
    assert 0 < len(tables[0]) <= 4 and tables[0]["new"].notna().all()  # some paraphrases are no use
    assert tables[0].equals(tables[1]) and tables[0].equals(tables[2])
    with sqlite3.connect(tmp_path / STORE_PATH) as store:
        assert store.execute("SELECT COUNT(*) FROM answers").fetchone() == (4,)
    free = replace(results, tasks={"demo": Task(kind="qa", prompt={"instruction": "Answer.", "template": "{text}"})})
    assert paraphrase_test_rows(tmp_path, free).empty


def test_paraphrases_of_test_rows_may_be_in_a_file(tmp_path, real_models):
    params, task = real_models
    results = gather_results(tmp_path, params)
    first, second, *_ = results.tests["demo"].itertuples()
    texts = {first.id: f"{first.text} So it is.", second.id: ""}  # of the others the file has none
    lines = [json.dumps({"id": f"{i}#0", "label": task.names[0], "paraphrase": text}) for i, text in texts.items()]
    (tmp_path / "written.jsonl").write_text("\n".join(lines))
    columns = {"id": "id", "text": None, "label": "label", "paraphrase": "paraphrase"}
    writer = {"kind": "answers", "answers": {"files": ["written.jsonl"], "columns": columns}}
    evaluate = params.evaluate.model_copy(update={"paraphrased_rows": len(results.tests["demo"])})
    changed = params.model_copy(
        update={
            "teachers": params.teachers | {"writer": validate_section(TeacherConfig, writer, "x")},
            "augment": params.augment.model_copy(update={"teacher": "writer"}),
            "evaluate": evaluate,
        }
    )
    table = paraphrase_test_rows(tmp_path, replace(results, params=changed))
    assert table[["id", "new"]].values.tolist() == [[first.id, texts[first.id]]]
