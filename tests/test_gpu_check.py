"""The checks of `benchmarks/gpu_check.py` on the CPU; one that fails, hangs or dies leaves the others alone."""

from __future__ import annotations

import importlib
import os
import re
import signal
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import stages
import tiny

sys.path.insert(0, str(tiny.ROOT / "benchmarks"))  # stays: processes of the checks import from there, too
import gpu_check
from gpu_checks import CHECKS, Check


def fail(place: Any) -> str:
    raise ValueError("no such\nkernel")


def die(place: Any) -> str:
    os.kill(os.getpid(), signal.SIGKILL)
    return ""


def wait(place: Any) -> str:
    time.sleep(600)
    return ""


def count_files(place: Any) -> str:
    files, main = len(list(place.folder.iterdir())), sys.modules["__main__"].__name__
    return f"{files} files | on {os.environ['DISTILLERY_DEVICE']} | in {main}"


def replace_main(place: Any) -> str:
    """As a notebook's shell does, which is the main module of what it runs."""
    sys.modules["__main__"] = ModuleType("notebook")
    return "replaced"


FAULTS = [
    Check("fails", "faults", "fail", ()),
    Check("dies", "faults", "die", ()),
    Check("hangs", "faults", "wait", (), seconds=0.5),
    Check("a package is missing", "faults", "fail", ("no_such_package", "no_such.module")),
    Check("only on CUDA", "faults", "fail", (), cuda=True),
    Check("runs a notebook", "faults", "replace_main", ()),
    Check("goes on", "faults", "count_files", ()),
]


def table(checks: list[Check], folder: Path, *arguments: str) -> tuple[int, str]:
    """The exit code of the command for `checks`, and what it prints. Runs in a process of its own."""
    faults = ModuleType("gpu_checks.faults")
    vars(faults).update({function.__name__: function for function in (fail, die, wait, replace_main, count_files)})
    sys.modules["gpu_checks.faults"] = faults
    gpu_check.CHECKS[:] = checks
    output = folder / "output"
    with output.open("w") as file, redirect_stdout(file):
        code = gpu_check.main(["--device", "cpu", "--log", str(folder / "log"), *arguments])
    return code, output.read_text()


def cells(printed: str) -> dict[str, list[str]]:
    """The cells of each line of the table, by the name of the check."""
    rows = [re.split(r" ?\| ?", line)[1:-1] for line in printed.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows[2:]}


def test_a_check_that_fails_leaves_the_others_alone(tmp_path):
    code, printed = stages._in_a_process(table, FAULTS, tmp_path)
    rows = cells(printed)
    assert code == 1 and printed.endswith("7 checks, 3 failed\n")
    assert rows["fails"][0] == "failed" and rows["fails"][3] == "ValueError: no such"
    assert rows["dies"][0] == "failed" and rows["dies"][3] == "its process ended with code -9"
    assert rows["hangs"][0] == "failed" and rows["hangs"][3].startswith("ended after")
    assert rows["a package is missing"] == ["not here", "", "", "needs no_such_package, no_such.module"]
    assert rows["only on CUDA"] == ["not here", "", "", "needs a CUDA GPU"]
    assert rows["goes on"][0] == "ok" and rows["goes on"][3] == "0 files / on cpu / in __main__"
    assert "in fail" in (tmp_path / "log").read_text()  # the traceback


def test_no_check_starts_after_the_budget(tmp_path):
    code, printed = stages._in_a_process(table, FAULTS[-1:], tmp_path, "--minutes", "0")
    assert code == 0 and cells(printed)["goes on"] == ["skipped", "", "", "the budget of 0 minutes is spent"]


def test_cheap_checks_run_on_a_cpu(tmp_path):
    """Token trees, sampling and int8; those that train need more time than a test has."""
    words = ("top_p", "plain forward pass", "int8")
    code, printed = stages._in_a_process(table, CHECKS, tmp_path, "--only", *words)
    rows = cells(printed)
    assert code == 0 and len(rows) == 3 and {row[0] for row in rows.values()} == {"ok"}, printed
    assert re.search(r"^torch .*, transformers .*, peft .*, trl .*, bitsandbytes .*CUDA ", printed, flags=re.M)


def test_the_dry_run_lists_every_check(capsys):
    assert gpu_check.main(["--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.startswith("| ")][2:] == [
        f"| {check.name} | {check.needs} |" for check in CHECKS
    ]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_every_check_is_a_function_with_a_docstring(check):
    assert callable(function := getattr(importlib.import_module(f"gpu_checks.{check.module}"), check.function))
    assert function.__doc__
