"""Random settings for a phase: drawn, tried across folds, kept on the way, and written where the phase reads them."""

from __future__ import annotations

import json

import pandas as pd
import pytest

import tiny
from distillery.config.load import load_params
from distillery.config.schema import SearchConfig
from distillery.errors import UserError
from distillery.pipeline.search import draw_settings, run_search, run_trial, sample_groups, search_settings

SPEC = SearchConfig(
    student="tiny-gold", trials=3, share=0.5, folds=2, learning_rate=[1.0e-4, 1.0e-2], choices={"batch_size": [4, 8]}
)


@pytest.fixture
def repository(tiny_models, tmp_path, monkeypatch):
    """The tiny experiment with a search, and the rows that the stages before would have written."""
    repo = tiny.experiment(tmp_path / "repo", tiny_models)
    text = (repo / "params.yaml").read_text().replace("steps: 6,", "steps: 2,")
    found = json.dumps(SPEC.model_dump())
    (repo / "params.yaml").write_text(f"{text}search: {found}\n")
    params = load_params(repo / "params.yaml")
    lines = [json.loads(line) for line in (repo / "data/corpora/finance.jsonl").read_text().splitlines()[:40]]
    rows = pd.DataFrame(lines)[["id", "text", "label", "group"]].assign(
        where="finance/train", rationale=None, answers=None
    )
    inputs = repo / "data/inputs/tiny-gold"
    inputs.mkdir(parents=True)
    rows.to_parquet(inputs / "rows.parquet")
    labels = {"positive": "", "neutral": "", "negative": ""}
    told = {"task": {"kind": "classification", "labels": labels}, "teachers": {}}
    (inputs / "experiment.json").write_text(json.dumps(told | {"model": params.models["tiny-bert"].model_dump()}))
    monkeypatch.chdir(repo)
    return repo, params, rows


def test_settings_are_drawn_within_their_bounds_and_always_the_same():
    drawn = draw_settings(SPEC.model_copy(update={"trials": 200}))
    assert all(1.0e-4 <= one["learning_rate"] <= 1.0e-2 for one in drawn)
    assert sum(one["learning_rate"] < 1.0e-3 for one in drawn) == pytest.approx(100, abs=25)  # even over the logarithm
    assert {one["batch_size"] for one in drawn} == {4, 8}
    assert draw_settings(SPEC) == drawn[:3]


def test_a_share_is_made_of_whole_groups():
    rows = pd.DataFrame({"id": range(12), "group": [i // 2 for i in range(12)]})
    taken = sample_groups(rows, 0.5, seed=0)
    assert len(taken) == 6 and taken["group"].value_counts().eq(2).all()


def test_a_killed_search_goes_on_and_its_best_set_is_read_by_the_phase(repository, monkeypatch, capsys):
    repo, params, _ = repository
    asked, real = [], run_trial

    def trial(*arguments):
        asked.append(arguments[2])
        if len(asked) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr("distillery.pipeline.search.run_trial", trial)
    with pytest.raises(KeyboardInterrupt):
        run_search(write=True)
    run_search(write=True)
    assert len(asked) == 7  # 3 sets of 2 folds, and the one that was cut short
    tried = json.loads((repo / ".cache/search/tiny-gold.json").read_text())
    assert [one["accuracy"] for one in tried] == sorted((one["accuracy"] for one in tried), reverse=True)
    phase = load_params(repo / "params.yaml").students["tiny-gold"].phases[0]
    assert (phase.learning_rate, phase.batch_size) == (tried[0]["learning_rate"], tried[0]["batch_size"])
    assert phase.steps == 2  # what was not chosen stays
    run_search()
    assert len(asked) == 7
    assert "best: " in capsys.readouterr().out


def test_what_a_search_needs_is_told_in_one_line(repository):
    repo, params, rows = repository
    with pytest.raises(UserError, match=r"^params.yaml: search: there is none"):
        search_settings(repo, params.model_copy(update={"search": None}))
    few = params.search.model_copy(update={"share": 0.01, "folds": 3})
    with pytest.raises(UserError, match=r"^params.yaml: search.share: \d gold rows are too few for 3 folds"):
        search_settings(repo, params.model_copy(update={"search": few}))
    (repo / "data/inputs/tiny-gold/rows.parquet").unlink()
    with pytest.raises(UserError, match=r"rows.parquet: not there yet; run `dvc repro inputs` first"):
        search_settings(repo, params)
