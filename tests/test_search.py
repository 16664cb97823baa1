"""Search: settings proposed by Optuna, cross-validated, resumed after a kill, written where the phase reads them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pandas as pd
import pytest

import tiny
from distillery.config.load import load_params
from distillery.config.schema import SearchConfig
from distillery.errors import UserError
from distillery.pipeline import search
from distillery.pipeline.environment import ENVIRONMENT
from distillery.pipeline.search import load_inputs, run_search, sample_groups, score_fold, search_settings

SPEC = SearchConfig(
    student="tiny-gold", trials=3, share=0.5, folds=2, learning_rate=[1.0e-4, 1.0e-2], choices={"batch_size": [4, 8]}
)


@pytest.fixture
def repository(tiny_models, tmp_path, monkeypatch):
    """The tiny experiment with a search, and the rows that the stages before would have written."""
    repo = tiny.experiment(tmp_path / "repo", tiny_models)
    text = (repo / "params.yaml").read_text().replace("steps: 6,", "steps: 2,")
    (repo / "params.yaml").write_text(f"{text}search: {SPEC.model_dump_json()}\n")
    params = load_params(repo / "params.yaml")
    lines = [json.loads(line) for line in (repo / "data/corpora/finance.jsonl").read_text().splitlines()[:40]]
    rows = pd.DataFrame(lines)[["id", "text", "label", "group"]]
    inputs = repo / "data/inputs/tiny-gold"
    inputs.mkdir(parents=True)
    rows.assign(split_ref="finance/train", rationale=None, answers=None).to_parquet(inputs / "rows.parquet")
    task = {"kind": "classification", "labels": {"positive": "", "neutral": "", "negative": ""}}
    experiment = {"task": task, "teachers": {}, "model": params.models["tiny-bert"].model_dump()}
    (inputs / "experiment.json").write_text(json.dumps(experiment))
    monkeypatch.chdir(repo)
    return repo, params


def with_search(params, **changes):
    return params.model_copy(update={"search": params.search.model_copy(update=changes)})


def rate_score(inputs, settings, rows, held_out, checkpoints):
    """Stands in for training: the score of a fold is a function of the settings, highest at a rate of 1e-3."""
    return 1 / (1 + abs(settings["learning_rate"] - 1.0e-3) * 1e3) + len(held_out) / 1e4


def test_settings_are_proposed_within_their_bounds(repository, monkeypatch):
    repo, params = repository
    monkeypatch.setattr(search, "score_fold", rate_score)
    trials = search_settings(repo, with_search(params, trials=30))
    assert len(trials) == 30 and trials["learning_rate"].between(1.0e-4, 1.0e-2).all()
    assert (trials["learning_rate"] < 1.0e-3).sum() == pytest.approx(15, abs=8)  # even over the logarithm
    assert set(trials["batch_size"]) == {4, 8}
    assert trials["accuracy"].is_monotonic_decreasing


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_killed_search_proposes_what_an_undisturbed_one_does(repository, monkeypatch, sampler):
    repo, params = repository
    params, folds = with_search(params, trials=12, sampler=sampler), []

    def killed(*arguments):
        folds.append(arguments[1])
        if len(folds) in (4, 22, 23):
            raise KeyboardInterrupt
        return rate_score(*arguments)

    monkeypatch.setattr(search, "score_fold", killed)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            search_settings(repo, params)
    resumed = search_settings(repo, params)
    assert len(folds) == 2 * 12 + 3  # only the fold that was cut short runs again
    monkeypatch.setattr(search, "score_fold", rate_score)
    (database,) = (repo / ".cache/search").glob("*.db")
    database.unlink()
    pd.testing.assert_frame_equal(resumed, search_settings(repo, params))


def test_the_two_samplers_propose_other_settings_once_there_is_something_to_learn_from(repository, monkeypatch):
    repo, params = repository
    monkeypatch.setattr(search, "score_fold", rate_score)
    rates = {
        sampler: set(search_settings(repo, with_search(params, trials=12, sampler=sampler))["learning_rate"])
        for sampler in ("random", "tpe")
    }
    assert rates["random"] != rates["tpe"]


def test_settings_that_were_run_before_cost_nothing(repository, monkeypatch):
    repo, params = repository
    folds = []
    monkeypatch.setattr(search, "score_fold", lambda *arguments: folds.append(arguments[1]) or 0.5)
    losses = [{"ce": 1.0}, {"ce": 0.5, "label_prior": 0.5}]
    trials = search_settings(repo, with_search(params, trials=8, learning_rate=None, choices={"loss": losses}))
    assert len(trials) == 8 and len(folds) == 2 * 2
    assert all(loss in losses for loss in trials["loss"])


def test_another_option_is_another_study_and_more_trials_are_not(repository):
    _, params = repository
    root = search.repository_root()
    key = load_inputs(root, params).key()
    assert load_inputs(root, with_search(params, trials=9)).key() == key
    assert load_inputs(root, with_search(params, seed=1)).key() != key
    student = params.students["tiny-gold"]

    def key_with(**changes):
        phases = [student.phases[0].model_copy(update=changes)]
        changed = {"tiny-gold": student.model_copy(update={"phases": phases})}
        return load_inputs(root, params.model_copy(update={"students": params.students | changed})).key()

    assert key_with(learning_rate=0.5) == key  # it is searched, so the value in params.yaml decides nothing
    assert key_with(steps=5) != key


def test_a_share_is_made_of_whole_groups():
    rows = pd.DataFrame({"id": range(12), "group": [i // 2 for i in range(12)]})
    sample = sample_groups(rows, 0.5, seed=0)
    assert len(sample) == 6 and sample["group"].value_counts().eq(2).all()


def test_the_best_settings_of_a_killed_search_are_read_by_the_phase(repository, monkeypatch, capsys):
    repo, _ = repository
    folds = []

    def killed(*arguments):
        folds.append(arguments[1])
        if len(folds) == 4:
            raise KeyboardInterrupt
        return score_fold(*arguments)

    monkeypatch.setattr(search, "score_fold", killed)
    with pytest.raises(KeyboardInterrupt):
        run_search(write=True)
    run_search(write=True)
    assert len(folds) == 7  # 3 trials of 2 folds, and the one that was cut short
    trials = json.loads((repo / ".cache/search/tiny-gold.json").read_text())
    assert [one["accuracy"] for one in trials] == sorted((one["accuracy"] for one in trials), reverse=True)
    phase = load_params(repo / "params.yaml").students["tiny-gold"].phases[0]
    assert (phase.learning_rate, phase.batch_size) == (trials[0]["learning_rate"], trials[0]["batch_size"])
    assert phase.steps == 2  # a key that is not searched stays
    run_search()
    assert len(folds) == 7
    assert "best: " in capsys.readouterr().out
    assert not [path for path in (repo / ".cache/search").iterdir() if path.is_dir()]  # no checkpoint stays


def test_a_phase_that_looks_at_validation_rows_can_be_searched(repository, tmp_path):
    repo, params = repository
    student = params.students["tiny-gold"]
    phases = [student.phases[0].model_copy(update={"validate_every": 1})]
    students = params.students | {"tiny-gold": student.model_copy(update={"phases": phases})}
    inputs = load_inputs(repo, params.model_copy(update={"students": students}))
    gold = inputs.gold
    assert 0 <= score_fold(inputs, {"batch_size": 4}, gold.iloc[4:], gold.iloc[:4], tmp_path / "checkpoints") <= 1


def test_a_search_starts_anew_with_the_environment_of_a_stage():
    code = (
        "import json, os, sys; from distillery.pipeline.environment import restart_with_environment;"
        "restart_with_environment(); print(json.dumps([dict(os.environ), sys.argv, sys.flags.hash_randomization]))"
    )
    env = {key: value for key, value in os.environ.items() if key not in ENVIRONMENT}
    env |= {"PYTHONPATH": str(tiny.ROOT / "src"), "MKL_DYNAMIC": "TRUE"}
    done = subprocess.run([sys.executable, "-c", code, "--write"], env=env, capture_output=True, text=True, check=True)
    variables, arguments, randomization = json.loads(done.stdout)
    assert {name: variables[name] for name in ENVIRONMENT} == ENVIRONMENT | {"MKL_DYNAMIC": "TRUE"}
    assert arguments == ["-c", "--write"] and randomization == 0


def test_missing_inputs_of_a_search_end_in_one_line(repository):
    repo, params = repository
    with pytest.raises(UserError, match=r"^params.yaml: search: there is none"):
        search_settings(repo, params.model_copy(update={"search": None}))
    with pytest.raises(UserError, match=r"^params.yaml: search.share: \d gold rows are too few for 3 folds"):
        search_settings(repo, with_search(params, share=0.01, folds=3))
    (repo / "data/inputs/tiny-gold/rows.parquet").unlink()
    with pytest.raises(UserError, match=r"rows.parquet: not there yet; run `dvc repro inputs` first"):
        search_settings(repo, params)
