"""Options, free answers, and GKD with hidden states and the student's own answers: each through all notebooks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest

import stages
import tiny

PROMPTS = r"""
prompts:
  short: {instruction: Which option fits?, template: "{instruction}\n{text}\nAnswer:"}
  bare: {template: "{text}\nAnswer:"}
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> tuple[Path, stages.Counts]:
    """A folder in which `tests/smoke_tasks.yaml` was run to its end, and what `stages.run_experiment` counted."""
    folder = tiny.experiment(tmp_path_factory.mktemp("tasks") / "repo")
    shutil.copy(tiny.ROOT / "tests/smoke_tasks.yaml", folder / "params.yaml")
    for name in ("pronoun", "trivia"):
        shutil.copy(tiny.ROOT / f"data/corpora/{name}.jsonl", folder / f"data/corpora/{name}.jsonl")
    rows = [json.loads(line) for line in (folder / "data/corpora/pronoun.jsonl").read_text().splitlines()]
    for name, part in (("bench", rows[200:212]), ("more", [row | {"answer": None} for row in rows[220:228]])):
        kept = [{key: value for key, value in row.items() if value is not None} for row in part]
        (folder / f"data/corpora/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    with (folder / "tasks/commonsense.yaml").open("a", encoding="utf-8") as file:
        file.write(PROMPTS)
    return folder, stages.run_experiment(folder)


@pytest.fixture
def repo(ran) -> Path:
    return ran[0]


def test_a_stage_holds_one_model_at_a_time(ran):
    """At every load of a model there is no other: of a teacher's prompts, its folds, and the finished student."""
    loads = {name: counts for name, counts in ran[1].items() if name.startswith(("02_", "04_"))}
    del loads["04_distill-gkd-0"]  # its loss needs the teacher's hidden states
    assert {name: max(counts) for name, counts in loads.items()} == dict.fromkeys(loads, 0)
    assert {"02_teach-chooser", "02_teach-prompted", "02_teach-writer", "04_distill-gold-0"} <= set(loads)
    assert (len(loads["02_teach-prompted"]), len(loads["04_distill-gold-0"])) == (5, 2)


def test_every_notebook_shows_its_tables_and_figures(repo):
    for path in (repo / "reports/notebooks").iterdir():
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        kinds = {kind for cell in cells for output in cell.get("outputs", []) for kind in output["data"]}
        assert kinds >= {"text/markdown", "text/html"} and ("image/png" in kinds or "augment" in path.name), path.name


def test_each_student_has_its_scores_and_the_page_in_its_tracked_run(repo):
    folders = {path.parent.name: path.parent for path in (repo / "runs").glob("*/tracking.json")}
    assert len(folders) == len(list((repo / "runs").iterdir()))
    client = mlflow.MlflowClient(f"sqlite:///{repo / '.cache/tracking/mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name(repo.name).experiment_id])
    assert sorted(run.info.run_name for run in runs) == sorted(folders)
    for run in runs:
        folder, page = folders[run.info.run_name], Path(run.info.artifact_uri.removeprefix("file://")) / "index.html"
        facts = json.loads((folder / "metrics.json").read_text())
        assert run.info.status == "FINISHED" and page.read_bytes() == (repo / "reports/index.html").read_bytes()
        assert run.data.metrics["test_accuracy"] == facts["test"]["accuracy"]
        logged = [metric.step for metric in client.get_metric_history(run.info.run_id, "loss")]
        assert logged[-1] == facts["steps"]
    for path in (repo / "reports/notebooks").glob("0[45]*"):
        outputs = [o for cell in json.loads(path.read_text())["cells"] for o in cell.get("outputs", [])]
        assert [output["text"] for output in outputs if output.get("name") == "stderr"] == [], path.name


def test_the_loss_of_gkd_has_all_of_its_terms(repo):
    history = pd.read_csv(repo / "runs/gkd-0/history.csv")
    terms = history[["ce", "jsd", "hidden"]]
    assert np.isfinite(terms.to_numpy()).all() and (terms > 0).all(axis=None)
    np.testing.assert_allclose(history["loss"], 0.5 * terms.sum(axis=1), rtol=1e-3)


def test_a_row_of_two_options_is_never_answered_with_the_third(repo):
    predictions = pd.read_parquet(repo / "runs/gkd-0/predictions.parquet")
    assert set(predictions["prediction"]) <= {"1", "2"}
    assert np.stack(predictions["probabilities"])[:, 2].max() == 0


def test_every_table_of_options_holds_their_number(repo):
    for table in ("processed/pronoun/test", "inputs/gkd/rows"):
        assert set(pd.read_parquet(repo / f"data/{table}.parquet")["n_options"]) == {2}, table


def test_written_answers_are_scored_by_exact_match_and_shared_words(repo):
    predictions = pd.read_parquet(repo / "runs/answers-0/predictions.parquet")
    test = predictions[predictions["split"] == "test"]
    metrics = json.loads((repo / "runs/answers-0/metrics.json").read_text())["test"]
    assert metrics["exact_match"] == pytest.approx((test["prediction"] == "right").mean())
    assert metrics["token_f1"] == pytest.approx(test["token_f1"].mean())


def test_a_pool_alone_teaches_and_a_benchmark_does_not(repo):
    rows = pd.read_parquet(repo / "data/inputs/gkd/rows.parquet")
    assert rows["split_ref"].value_counts()["more/pool"] == 8 and not rows["split_ref"].str.contains("bench").any()
    assert set(pd.read_parquet(repo / "runs/gkd-0/predictions.parquet")["id"]) <= {
        row_id for split in ("validation", "test") for row_id in pd.read_parquet(
            repo / f"data/processed/pronoun/{split}.parquet")["id"]}  # fmt: skip


def test_the_leaderboard_has_every_student_on_its_own_source(repo):
    board = pd.read_csv(repo / "reports/leaderboard.csv").set_index("model")
    assert board.loc[["gkd", "gold", "answers"], "source"].tolist() == ["pronoun", "pronoun", "trivia"]
    assert board.loc["gkd", "versus"] == "gold" and board.loc["answers", "token_f1"] >= 0
    further = board[board["source"] == "bench"]
    always = next(name for name in further.index if name.startswith("always "))
    assert set(further.index) == {"gkd on bench", "gold on bench", "chooser on bench", always}
    assert further["accuracy_low"].notna().all() and board.loc["gkd on bench", "versus"] == "gold on bench"
    # free answers have no most frequent label to compare with
    assert [name for name in board.index if name.startswith("always")] == [
        name for name in board.index[board["role"] == "majority"] if board.loc[name, "source"] != "trivia"
    ]
    page = (repo / "reports/index.html").read_text(encoding="utf-8")
    assert all(name in page for name in ("gkd", "gold", "answers"))
