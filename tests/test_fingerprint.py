"""Fingerprints: what changes them, and what does not."""

from __future__ import annotations

import importlib
import shutil

import pytest

from distillery import fingerprint

CODE = '''"""What it is for."""
from dataclasses import dataclass

LIMIT: int = 3  # rows


@dataclass
class Row:
    """A row."""

    text: str
    """Its text."""
    size: int = 0


def double(x: int, *more: int, by: float = 2.0, **rest: object) -> float:
    """Twice `x`."""
    result: float = x * by  # the product
    return result
'''

SAME = {
    "a comment": ("# the product", "# of both"),
    "a docstring": ("Twice `x`.", "`x`, two times."),
    "the docstring of a class": ("A row.", "One row."),
    "the description of a field": ("Its text.", "The text of it."),
    "a field without description": ('    """Its text."""\n', ""),
    "the docstring of the module": ("What it is for.", "What else it is for."),
    "the annotation of an argument": ("x: int", "x: float"),
    "the annotation of a returned value": ("-> float", "-> object"),
    "the annotation of a local variable": ("result: float", "result: object"),
    "white space": ("x * by", "x  *  by"),
}
OTHER = {
    "a value": ("LIMIT: int = 3", "LIMIT: int = 4"),
    "a default": ("by: float = 2.0", "by: float = 3.0"),
    "an expression": ("x * by", "x + by"),
    "the annotation of a field, on which a dataclass acts": ("text: str", "text: bytes"),
    "a decorator": ("@dataclass\n", "@dataclass(frozen=True)\n"),
    "a name": ("double", "twice"),
}


@pytest.mark.parametrize("change", SAME)
def test_prose_and_layout_change_nothing(change):
    old, new = SAME[change]
    assert old in CODE
    assert fingerprint.normalized(CODE.replace(old, new)) == fingerprint.normalized(CODE)


@pytest.mark.parametrize("change", OTHER)
def test_other_code_changes_it(change):
    old, new = OTHER[change]
    assert old in CODE
    assert fingerprint.normalized(CODE.replace(old, new)) != fingerprint.normalized(CODE)


def test_a_function_of_a_docstring_alone_still_is_one():
    code = fingerprint.normalized('def f():\n    """Nothing."""\n')
    compile(code, "f", "exec")
    assert code == fingerprint.normalized("def f():\n    pass\n")


def test_normalized_code_computes_the_same():
    original, normalized = {}, {}
    exec(compile(CODE, "original", "exec"), original)
    exec(compile(fingerprint.normalized(CODE), "normalized", "exec"), normalized)
    assert normalized["double"](3) == original["double"](3) == 6
    assert normalized["Row"]("a") == normalized["Row"]("a", 0)


@pytest.fixture
def package(tmp_path):
    files = {
        "__init__.py": "",
        "low.py": "A = 1",
        "near/__init__.py": "",
        "near/one.py": "from toy import low",
        "near/two.py": "def f():\n    from toy.near.one import x\n",
        "typed.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from toy.near import two\n",
    }
    for name, text in files.items():
        (tmp_path / "toy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "toy" / name).write_text(text)
    return tmp_path / "toy"


def test_imports_count_wherever_they_stand(package):
    code = "import toy.low as l\nimport json\ndef f():\n    from toy.near import two, other\n"
    assert fingerprint.imported(code, package) == {"toy.low", "toy.near", "toy.near.two"}


def test_imports_for_type_checkers_alone_do_not_count(package):
    assert fingerprint.imported((package / "typed.py").read_text(), package) == set()


def test_a_closure_follows_imports_and_stops_at_what_is_left_out(package):
    everything = ["toy.low", "toy.near", "toy.near.one", "toy.near.two"]
    assert fingerprint.closure({"toy.near.two"}, package) == sorted([*everything[1:], "toy.low"])
    assert fingerprint.closure({"toy.near.two", "toy.near"}, package, without=["toy.near.one"]) == [
        "toy.near",
        "toy.near.two",
    ]


def test_one_digest_for_a_module_or_all_of_a_package(package, monkeypatch):
    monkeypatch.setattr(fingerprint, "PACKAGE", package)
    fingerprint.code_digest.cache_clear()
    near, low = fingerprint.code_digest("near"), fingerprint.code_digest("low")
    (package / "near/one.py").write_text("from toy import low  # more")
    (package / "low.py").write_text("A = 2")
    fingerprint.code_digest.cache_clear()
    assert fingerprint.code_digest("near") == near and fingerprint.code_digest("low") != low
    fingerprint.code_digest.cache_clear()


@pytest.mark.parametrize("content", [None, "", "[]", "{", '{"key": 1}', '{"key": null}'])
def test_what_is_known_of_a_text_is_remembered_and_a_broken_file_does_no_harm(tmp_path, monkeypatch, content):
    def read(text: str) -> tuple[str, list[str]]:
        """Read `text` as another process would, with nothing but the file."""
        fingerprint._read_module.cache_clear()
        monkeypatch.setattr(fingerprint, "_known", {})
        with fingerprint.remembered(file):
            return fingerprint._read_module(text)

    file = tmp_path / "cache/known.json"
    if content is not None:
        file.parent.mkdir()
        file.write_text(content)
    first = read(CODE)
    written = file.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(fingerprint.ast, "parse", None)  # all that is left is reading the file
        assert tuple(read(CODE)) == first and file.read_bytes() == written
        with pytest.raises(TypeError):
            read(CODE.replace("LIMIT: int = 3", "LIMIT: int = 4"))
    other = read(CODE.replace("LIMIT: int = 3", "LIMIT: int = 4").replace("from dataclasses", "from other"))
    assert other[0] != first[0] and (first[1], other[1]) == (
        ["dataclasses", "dataclasses.dataclass"],
        ["other", "other.dataclass"],
    )
    fingerprint._read_module.cache_clear()


def test_an_unknown_module_is_named():
    with pytest.raises(ValueError, match="no module distillery.nothing"):
        fingerprint.digest("distillery.nothing")


@pytest.mark.parametrize("name", ["run.run_key", "teacher_outputs.teacher_outputs_key"])
def test_a_key_changes_with_the_code_of_its_result_and_not_with_comments(name, tmp_path, monkeypatch):
    """Keys name checkpoints and cached results: old code's must not be taken for the new code's."""
    module_name, function = name.split(".")
    key_of = getattr(importlib.import_module(f"distillery.training.{module_name}"), function)

    def key() -> str:
        fingerprint.code_digest.cache_clear()
        return key_of({"student": "tiny"}, 0)

    copy = shutil.copytree(fingerprint.PACKAGE, tmp_path / "distillery", ignore=shutil.ignore_patterns("__pycache__"))
    module, before = copy / "losses/divergences.py", key()
    code = module.read_text(encoding="utf-8")
    try:
        monkeypatch.setattr(fingerprint, "PACKAGE", copy)
        assert key() == before and key_of({"student": "tiny"}, 1) != before
        module.write_text(code + "\n# another remark\n", encoding="utf-8")
        assert key() == before
        module.write_text(code + "\nLIMIT = 1\n", encoding="utf-8")
        assert key() != before
        module.write_text(code, encoding="utf-8")
        (copy / "report/svg.py").write_text("LIMIT = 1\n", encoding="utf-8")  # computes nothing of a run
        assert key() == before
    finally:
        fingerprint.code_digest.cache_clear()
