"""Files: the root and the paths of an experiment, and writes that happen as a whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distillery.errors import UserError
from distillery.files import Paths, atomic_write, repository_root

ROOT = Path(__file__).resolve().parents[1]


def test_paths_of_an_experiment():
    paths = Paths(Path("x"))
    below = [
        *(paths.params, paths.tasks, paths.task("mood"), paths.build, paths.reports, paths.cache),
        *(
            paths.processed("news"),
            paths.teacher("llm"),
            paths.augmented("news"),
            paths.inputs("kd"),
            paths.run("kd", 3),
        ),
    ]
    assert [path.relative_to("x").as_posix() for path in below] == [
        *("params.yaml", "tasks", "tasks/mood.yaml", "build", "reports", ".cache"),
        *("data/processed/news", "data/teacher/llm", "data/augmented/news", "data/inputs/kd", "runs/kd-3"),
    ]


def test_root_is_found_from_below(tmp_path):
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / "notebooks" / "deep").mkdir(parents=True)
    assert repository_root(tmp_path / "notebooks" / "deep") == tmp_path.resolve()


def test_root_outside_of_a_repository(tmp_path):
    with pytest.raises(UserError, match=r"no dvc.yaml here or in any folder above"):
        repository_root(tmp_path)


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_atomic_writes_and_replaces_a_file(tmp_path):
    for text in ("first", "second"):
        with atomic_write(tmp_path / "a" / "b.txt") as new:
            new.write_text(text)
    assert (tmp_path / "a" / "b.txt").read_text() == "second"
    assert names(tmp_path) == ["a", "a/b.txt"]


def test_atomic_replaces_a_folder_as_a_whole(tmp_path):
    for name in ("first", "second"):
        with atomic_write(tmp_path / "out") as new:
            new.mkdir()
            (new / name).touch()
    assert names(tmp_path) == ["out", "out/second"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_atomic_leaves_the_old_when_the_block_fails(tmp_path, kind):
    with atomic_write(tmp_path / "out") as new:
        new.write_text("old")
    with pytest.raises(KeyError), atomic_write(tmp_path / "out") as new:
        if kind == "file":
            new.write_text("half")
        else:
            new.mkdir()
            (new / "half").touch()
        raise KeyError
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out").read_text() == "old"


WRITERS = {
    "text": "new.write_text('x' * 100_000)",
    "parquet": "pd.DataFrame({'x': [str(i) for i in range(50_000)]}).to_parquet(new)",
    "safetensors": "save_file({'x': np.zeros(100_000)}, new)",
    "folder": "new.mkdir(); (new / 'one').touch(); (new / 'two').write_text('x' * 100_000)",
}


@pytest.mark.parametrize("writer", WRITERS)
def test_full_disk_is_one_line_and_leaves_nothing(tmp_path, writer):
    """A limit on the size of files stands in for a full disk; both reach the writer as a failed write."""
    code = f"""
import resource, sys
import numpy as np, pandas as pd
from safetensors.numpy import save_file
from distillery.errors import UserError
from distillery.files import atomic_write
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    with atomic_write("out.bin") as new:
        {WRITERS[writer]}
except UserError as error:
    sys.exit(str(error))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stderr == "out.bin: the disk is full; free some space and run again\n"
    assert done.returncode == 1
    assert names(tmp_path) == []
