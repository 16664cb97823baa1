"""The benchmark of arms with an equal budget, on tiny models: equal steps, one budget, and no line computed twice."""

from __future__ import annotations

import json
from types import ModuleType

import numpy as np
import pandas as pd
import pytest

import tiny
from distillery.config.schema import StudentConfig
from distillery.pipeline.recipe import load_recipe


@pytest.fixture(scope="module")
def gkd_arms() -> ModuleType:
    return tiny.load_benchmark("gkd_arms")


@pytest.fixture(scope="module")
def recipe(tiny_models) -> dict:
    """The recipe with one tiny model as teacher and student."""
    recipe = load_recipe(tiny.ROOT, "qwen-gkd", "small")
    recipe["data"]["finance"] |= {"limit": 40}
    model = {"folder": str(tiny_models / "tiny-llama")}
    recipe["models"] |= {"qwen-1.5b": model, "qwen-0.5b": model}
    recipe["teachers"]["qwen-1.5b"] |= {"few_shot": 1, "quantize": "none", "max_new_tokens": 8}
    for student in recipe["students"].values():
        student |= {"dtype": "float32", "adapter": {"kind": "lora", "r": 2, "layers": "last-2"}}
    return recipe


@pytest.fixture(scope="module")
def setup(gkd_arms, recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("arms")
    return gkd_arms.build_setup(recipe, *gkd_arms.teacher_rows(tiny.ROOT, recipe), folder, reasons=2)


def test_every_arm_has_as_many_settings_and_steps(gkd_arms, setup):
    for arm in gkd_arms.ARMS.values():
        assert len(arm.settings) == 6 and len({json.dumps(setting) for setting in arm.settings}) == 6
        for setting in arm.settings:
            spec = StudentConfig.model_validate(setup.student | {"phases": arm.phases(setting, 150)})
            assert sum(phase.steps for phase in spec.phases) == 150
            assert {phase.batch_size for phase in spec.phases} == {8}


def test_only_arms_with_gold_in_their_name_see_gold_labels(gkd_arms, setup):
    assert setup.rows.loc[setup.rows["split_ref"] == "finance/pool", "label"].isna().all()
    for name, arm in gkd_arms.ARMS.items():
        sources = {ref for setting in arm.settings for phase in arm.phases(setting, 10) for ref in phase["data"]}
        assert ("finance/train" in sources) == ("gold" in name)
    held_out = set(setup.validation["id"]) | set(setup.test["id"])
    assert not held_out & set(setup.rows["id"]) and setup.rows["id"].is_unique


@pytest.mark.parametrize("arm", ["GKD", "GKD with reasons"])
def test_an_arm_runs_and_a_restart_computes_nothing(arm, gkd_arms, setup, tmp_path, monkeypatch):
    table = tmp_path / "arms.csv"
    lines = gkd_arms.run_arm(setup, arm, "quick", steps=2, trials=1, seeds=1, table=table)
    kept = pd.read_csv(table)
    assert kept["kind"].tolist() == ["trial", "run"] and kept["steps"].tolist() == [2, 2]
    assert len(json.loads(lines[0]["predictions"])) == len(setup.test)
    gkd_arms.report(pd.DataFrame(lines), setup.test, setup.task.names)
    monkeypatch.setattr(gkd_arms, "train_and_score", None)
    again = gkd_arms.run_arm(setup, arm, "quick", steps=2, trials=1, seeds=1, table=table)
    assert again[0]["predictions"] == lines[0]["predictions"] and len(pd.read_csv(table)) == 2
    with pytest.raises(TypeError):  # another number of steps is another run
        gkd_arms.run_arm(setup, arm, "quick", steps=4, trials=1, seeds=1, table=table)


def test_a_kept_teacher_scores_as_its_model_does_and_once(setup):
    teacher = setup.teachers["qwen-1.5b"].open_fold(-1)
    ids = teacher.encode(setup.validation["text"].head(5).tolist())
    completions = [[teacher.label_completion(i % 3)] for i in range(5)]
    expected = teacher.model_at_work.forward(ids, completions, label_space=False).completion_logits.log_softmax(-1)
    before = teacher.computed
    for _ in range(2):
        scored = teacher.forward(ids, completions).completion_logits
        assert np.allclose(scored.numpy(), expected.detach().numpy(), atol=0.01)
        assert teacher.computed == before + 5


def test_a_difference_is_named_by_its_interval(gkd_arms):
    ends = {"better": (0.01, 0.2), "worse": (-0.2, -0.01), "not distinguishable": (-0.1, 0.1)}
    assert {gkd_arms.verdict({"low": low, "high": high}) for low, high in ends.values()} == set(ends)
    for words, (low, high) in ends.items():
        assert gkd_arms.verdict({"low": low, "high": high}) == words
