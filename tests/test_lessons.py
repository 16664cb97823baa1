"""The form of every notebook in git, each lesson executed with tiny parameters, and each study as it is."""

from __future__ import annotations

import ast
import json
import statistics
import sys
from pathlib import Path

import pytest

import stages
import tiny
from distillery.errors import UserError
from distillery.pipeline.lessons import run_lessons
from distillery.pipeline.run_notebook import execute_notebook, isolate_kernel, notebook_parameters
from distillery.pipeline.strip import notebook_code, strip_notebook
from distillery.pipeline.studies import run_study
from forked import preloaded_python

STAGES = sorted((tiny.ROOT / "notebooks").glob("*.ipynb"))
LESSONS = sorted((tiny.ROOT / "notebooks/lessons").glob("*.ipynb"))
STUDIES = sorted((tiny.ROOT / "studies").glob("*/*.ipynb"))
TINY = {
    "L1_soft_labels": {"rows": 200, "words": 50},
    "L2_losses_by_hand": {"rows": 60, "steps": 3},
    "L3_cross_fitting": {"rows": 200, "folds": 2},
    "L4_gkd": {"rows": 40, "teacher_steps": 4, "student_steps": 2},
    "L5_is_the_gain_real": {"rows": 200, "resamples": 50, "runs": 2},
    "L6_one_gpu": {"size": "tiny", "rows": 120, "epochs": 1, "steps": 4},
}


def cells_of(path: Path) -> list[dict]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in cells]


def test_these_are_all_notebooks():
    assert [path.stem for path in STAGES] == ["01_data", "02_teach", "03_augment", "04_distill", "05_evaluate"]
    assert [path.stem for path in LESSONS] == sorted(TINY)
    assert [path.stem for path in STUDIES] == [path.parent.name for path in STUDIES] == ["phrasebank"]


@pytest.mark.parametrize("path", STAGES + LESSONS + STUDIES, ids=lambda path: path.stem)
def test_a_notebook_opens_with_a_question_and_its_parameters(path):
    first, *_ = cells = cells_of(path)
    assert first["cell_type"] == "markdown"
    assert first["source"].startswith("# ") and "?" in first["source"].splitlines()[0]
    assert "**Question.**" in first["source"]
    needed = ("**Reads**", "**Writes**") if path not in LESSONS else ("**Needs**",)
    assert all(word in first["source"] for word in needed)
    assert ["parameters" in cell["metadata"].get("tags", []) for cell in cells] == [i == 1 for i in range(len(cells))]


@pytest.mark.parametrize("path", STAGES + LESSONS + STUDIES, ids=lambda path: path.stem)
def test_a_notebook_has_few_short_cells_with_prose_before_each(path):
    cells = cells_of(path)
    assert len(cells) <= (45 if path in STAGES else 40)
    code = [cell["source"] for cell in cells if cell["cell_type"] == "code"]
    assert statistics.median(len(source.splitlines()) for source in code) <= 6
    pairs = zip(cells[1:], cells[2:], strict=False)
    assert all(before["cell_type"] == "markdown" for before, cell in pairs if cell["cell_type"] == "code")
    for before, after in zip(cells, cells[1:], strict=False):
        assert {before["cell_type"], after["cell_type"]} != {"markdown"}, after["source"]


@pytest.mark.parametrize("path", STAGES + LESSONS + STUDIES, ids=lambda path: path.stem)
def test_a_notebook_is_stripped_and_defines_nothing(path):
    assert all(
        cell["outputs"] == [] and cell["execution_count"] is None for cell in cells_of(path) if "outputs" in cell
    )
    kernel = json.loads(path.read_text(encoding="utf-8"))["metadata"].get("kernelspec", {})
    assert kernel.get("name", "python3") == "python3"
    nodes = ast.walk(ast.parse(notebook_code(strip_notebook(path))))
    assert not [node for node in nodes if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)]


@pytest.fixture
def kernel(monkeypatch):
    """Notebooks run in the root folder, on this Python."""
    monkeypatch.chdir(tiny.ROOT)
    for name in ("JUPYTER_PATH", "IPYTHONDIR"):
        monkeypatch.setenv(name, "")
    for name, value in preloaded_python().items():
        monkeypatch.setenv(name, value)
    isolate_kernel()


def checked_outputs(path: Path) -> list[str]:
    """The kinds of outputs of an executed notebook, which must hold no error and no folder of this machine."""
    outputs = [output for cell in cells_of(path) for output in cell.get("outputs", [])]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"], outputs
    text = path.read_text(encoding="utf-8")
    assert str(tiny.ROOT) not in text and sys.prefix not in text
    return [kind for o in outputs for kind in o.get("data", {})]


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_runs_with_tiny_parameters(path, tmp_path):
    assert set(TINY[path.stem]) <= set(notebook_parameters(path))
    output = tmp_path / path.name
    stages.run_lesson(path, output, TINY[path.stem])
    kinds = checked_outputs(output)
    assert kinds.count("image/png") >= 2 and kinds.count("text/markdown") >= 5 and kinds.count("text/html") >= 2


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_shows_its_committed_tables(path, tmp_path, kernel):
    output = tmp_path / path.name
    execute_notebook(path.relative_to(tiny.ROOT), output, {}, tmp_path / "failed.ipynb")
    kinds = checked_outputs(output)
    assert kinds.count("image/png") >= 1 and kinds.count("text/markdown") >= 4 and kinds.count("text/html") >= 2


@pytest.mark.parametrize("path", LESSONS + STUDIES, ids=lambda path: path.stem)
def test_the_executed_copy_is_of_the_notebook_in_git(path):
    """A lesson or study that was changed has to be executed again: `make lessons`, `make study NAME=...`."""
    copy = tiny.ROOT / "reports" / ("lessons" if path in LESSONS else "studies") / path.name
    assert [cell["source"] for cell in cells_of(copy)] == [cell["source"] for cell in cells_of(path)]
    text = copy.read_text(encoding="utf-8")
    assert not [folder for folder in ("/home/", "/root/", "/tmp/", "/work/", "/Users/") if folder in text]


def test_an_unknown_lesson_is_named_with_the_known_ones(monkeypatch):
    monkeypatch.chdir(tiny.ROOT)
    with pytest.raises(UserError, match="L9.ipynb: no such lesson; there is: L1_soft_labels, "):
        run_lessons("L9")


@pytest.mark.parametrize(
    ("name", "pair", "message"),
    [
        ("news", ("seeds", "1"), "studies/news: no such study; there is: phrasebank"),
        (
            "phrasebank",
            ("sedes", "1"),
            "-p sedes: phrasebank has no such parameter; it has: data, headlines, seeds, train",
        ),
        ("phrasebank", ("seeds", "one"), "-p seeds: must be int, not 'one'"),
        ("phrasebank", ("train", "yes"), "-p train: must be true or false, not 'yes'"),
    ],
)
def test_a_wrong_study_or_parameter_ends_in_one_line(monkeypatch, name, pair, message):
    monkeypatch.chdir(tiny.ROOT)
    with pytest.raises(UserError) as caught:
        run_study(name, [pair])
    assert str(caught.value) == message
