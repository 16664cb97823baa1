from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A busy machine is no fault of a test: no example has a time limit.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

# before anything imports torch; the environment's own tools (dvc, git hooks) come first in subprocesses too
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DISTILLERY_DEVICE", "cpu")  # references are computed there
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DVC_NO_ANALYTICS": "1"}
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


# The files that take longest, the longest first. Each process of `make test` runs whole files: one of these that starts
# last runs on alone.
LONGEST_FILES = [
    f"test_{name}.py"
    for name in (
        *("pipeline", "errors", "notebooks", "processes", "api", "training", "stage", "evaluation", "hub_recipes"),
        *("report", "smoke_tasks", "reopen", "lessons", "phrasebank", "sharding", "onnx", "served_tokens", "readme"),
    )
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {name: rank for rank, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


def pytest_collection_finish() -> None:
    freeze_garbage_collector()


@pytest.hookimpl(trylast=True)  # when the fixtures of the test are gone
def pytest_runtest_teardown() -> None:
    freeze_garbage_collector()


def freeze_garbage_collector() -> None:
    """Let the garbage collector skip all objects that exist now.

    A full collection over all modules takes 0.3 s, and each training and each load of a model starts one.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_kept_checks(monkeypatch):
    """A command that a test runs in this process sets the variable; kept comparisons would then serve other tests."""
    monkeypatch.delenv("DISTILLERY_KEEP_CHECKS", raising=False)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory) -> Path:
    """A folder with `tiny-llama` and `tiny-bert`: hidden 32, 4 layers, word-level tokenizers."""
    import tiny

    folder = tmp_path_factory.mktemp("models")
    tiny.build_models(folder)
    return folder


@pytest.fixture
def without_figures(monkeypatch) -> None:
    """Reports that are written get empty figures: to draw them takes longer than all the rest."""
    from distillery.report import page

    monkeypatch.setattr(page, "figure_svg", lambda figure: "<svg></svg>")
