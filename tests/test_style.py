"""Limits that ruff does not check: the length of modules and functions, and the words of the code."""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from distillery.pipeline.strip import notebook_code

ROOT = Path(__file__).resolve().parents[1]
CODE_FOLDERS = ("src/distillery", "studies", "benchmarks")
MODULES = sorted(path for folder in CODE_FOLDERS for path in (ROOT / folder).rglob("*.py"))
NOTEBOOKS = sorted(path for folder in ("notebooks", "studies") for path in (ROOT / folder).rglob("*.ipynb"))
TESTS = sorted((ROOT / "tests").glob("*.py"))
MAX_MODULE, MAX_FUNCTION = 350, 60  # lines

# Words for which the field has a term: predict, score, query, teacher, student, phase, ...
PRIVATE = {"told", "tells", "said", "says", "asked", "asks", "who", "judge", "judges", "judged", "leg", "legs"}
PRIVATE |= {"ours", "theirs", "mine", "yours"}
# Names of variables that say nothing of their content
VAGUE = {"what", "where", "how", "about", "more", "least", "found", "made", "kept", "seen", "out"}


def name(path: Path) -> str:
    """The path below the repository."""
    return path.relative_to(ROOT).as_posix()


def function_lengths(path: Path) -> dict[str, int]:
    """Each function of a module with its number of lines, decorators and docstring included."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    starts = [min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) for node in functions]
    return {node.name: node.end_lineno - start + 1 for node, start in zip(functions, starts, strict=True)}


def bound_names(code: str) -> Iterator[str]:
    """Every name that `code` gives: to functions, classes, arguments, variables, attributes and imports."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.alias | ast.ExceptHandler):
            yield getattr(node, "asname", None) or node.name or ""


def words(text: str) -> list[str]:
    """The words of prose, of snake_case and of camelCase, in small letters."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", text)]


def prose(code: str) -> str:
    """Comments and strings of `code`, docstrings and the constant parts of f-strings among them."""
    comments = [
        token.string for token in tokenize.generate_tokens(io.StringIO(code).readline) if token.type == tokenize.COMMENT
    ]
    nodes = ast.walk(ast.parse(code))
    return "\n".join(comments + [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)])


def source(path: Path) -> tuple[str, str]:
    """The code of a module or notebook, and the text around it."""
    if path.suffix == ".py":
        return path.read_text(encoding="utf-8"), ""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    cells = [cell | {"source": "".join(cell["source"])} for cell in cells]
    text = "\n".join(cell["source"] for cell in cells if cell["cell_type"] == "markdown")
    return notebook_code({"cells": cells}), text


def private_words(path: Path) -> set[str]:
    """The private words and vague names of a file."""
    code, text = source(path)
    bound = set(bound_names(code))
    used = set(words(" ".join(bound))) | set(words(prose(code) + "\n" + text))
    return (used & PRIVATE) | (bound & VAGUE)


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_no_module_is_longer_than_the_limit(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_MODULE


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_no_function_is_longer_than_the_limit(path):
    assert {function: lines for function, lines in function_lengths(path).items() if lines > MAX_FUNCTION} == {}


@pytest.mark.parametrize("path", MODULES + NOTEBOOKS, ids=name)
def test_names_and_prose_use_the_words_of_the_field(path):
    assert private_words(path) == set()


@pytest.mark.parametrize("path", TESTS, ids=name)
def test_names_in_tests_use_the_words_of_the_field(path):
    names = set(bound_names(path.read_text(encoding="utf-8")))
    assert {bound for bound in names if set(words(bound)) & PRIVATE} == set()


def test_private_words_are_seen_inside_identifiers_comments_and_strings():
    code = 'def said_by(x):\n    x.toldAll = f"{x} who"  # judged\n    where = df.where(x)\n'
    bound = set(bound_names(code))
    assert bound == {"said_by", "x", "toldAll", "where"}
    assert set(words(" ".join(bound))) >= {"said", "told"} and set(words(prose(code))) == {"who", "judged"}


def test_makefile_names_tools_by_their_path():
    """GNU make 3.81 does not look for the program of a simple line in the exported PATH."""
    recipes = re.findall(r"^\t@?(\w[\w-]*)", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)
    assert {"git", "rm"} <= set(recipes)
    assert not set(recipes) & {"python", "dvc", "ruff", "pytest", "jupyter", "nbstripout", "lint-imports", "distillery"}


def test_make_unit_leaves_out_every_test_that_runs_the_pipeline():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", "")
    listed = re.search(r"^PIPELINE_TESTS := \$\(addprefix tests/test_,(.*)\)$", makefile, flags=re.M)[1].split()
    running = [path for path in (ROOT / "tests").glob("test_*.py") if path != Path(__file__)]
    running = {path.name for path in running if '"dvc"' in path.read_text(encoding="utf-8")}
    assert running and running <= {f"test_{file}" for file in listed}
