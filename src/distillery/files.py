"""Files: the repository root, YAML and JSON, atomic writes, digests, full disks."""

from __future__ import annotations

import copy
import errno
import glob
import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from distillery.errors import UserError


def repository_root(start: Path | str | None = None) -> Path:
    """The repository root: the nearest folder at or above `start` that holds `dvc.yaml`.

    Raises UserError when there is none. Papermill starts in the root, Jupyter in `notebooks/`.
    """
    start = Path(start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / "dvc.yaml").exists():
            return folder
    raise UserError(f"{start}: no dvc.yaml here or in any folder above; run from inside the repository")


def matching_files(root: Path, name: str) -> list[str]:
    """The files that `name`, a path relative to `root`, stands for: itself, or all that fit its `*` and `?`, by name.

    A folder called like that is itself. Raises UserError when no file fits.
    """
    if (root / name).exists() or not set("*?") & set(name):
        return [name]
    files = sorted(file for file in glob.glob(name, root_dir=root, recursive=True) if (root / file).is_file())
    if not files:
        raise UserError(f"{name}: no file fits")
    return [Path(file).as_posix() for file in files]


@dataclass(frozen=True)
class Paths:
    """The files and folders of an experiment below its `root`."""

    root: Path

    @property
    def params(self) -> Path:
        return self.root / "params.yaml"

    @property
    def tasks(self) -> Path:
        return self.root / "tasks"

    @property
    def build(self) -> Path:
        """What the first stage writes for the others to depend on."""
        return self.root / "build"

    @property
    def reports(self) -> Path:
        return self.root / "reports"

    @property
    def cache(self) -> Path:
        """What is computed or fetched once and no stage owns: models, answers, teacher outputs, checkpoints."""
        return self.root / ".cache"

    def task(self, name: str) -> Path:
        return self.tasks / f"{name}.yaml"

    def processed(self, source: str) -> Path:
        """The folder of a source's cleaned and split rows."""
        return self.root / "data" / "processed" / source

    def teacher(self, name: str) -> Path:
        """The folder of a teacher's signals, scores and models."""
        return self.root / "data" / "teacher" / name

    def teacher_tokens(self, name: str) -> Path:
        """The log-probabilities of tokens that a teacher behind an endpoint gave."""
        return self.teacher(name) / "tokens.parquet"

    def augmented(self, source: str) -> Path:
        """The folder of a source's paraphrases and their signals."""
        return self.root / "data" / "augmented" / source

    def inputs(self, student: str) -> Path:
        """The folder of all that decides a student: rows, signals, settings."""
        return self.root / "data" / "inputs" / student

    def run(self, student: str, seed: int) -> Path:
        """The folder of one trained student: its model, predictions, history and scores."""
        return self.root / "runs" / f"{student}-{seed}"


@lru_cache(maxsize=64)
def _parse_yaml(text: str) -> Any:
    return YAML(typ="safe", pure=True).load(text)  # slow: 0.05 s for a hundred lines


def read_yaml(path: Path) -> Any:
    """The content of a YAML 1.2 file, read as DVC reads it (PyYAML's 1.1 takes the key `on` for `True`).

    Raises UserError (file, line) when it is missing or malformed.
    """
    try:
        return copy.deepcopy(_parse_yaml(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}") from None


def raise_if_disk_full(error: Exception, path: Path) -> None:
    """Raise a UserError that names the file if `error` is some library's way to say that there is no space left."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    # Libraries written in Rust or C++ have the cause in their message only, torch just that a write failed.
    messages = (*(os.strerror(code) for code in full), "PytorchStreamWriter failed writing")
    if getattr(error, "errno", None) in full or any(message in str(error) for message in messages):
        raise UserError(f"{path}: the disk is full; free some space and run again") from None


@contextmanager
def atomic_write(path: Path | str):
    """A temporary path beside `path` that takes its place only if the block ends well.

    The block writes a file there or makes a folder; a folder replaces the old one as a whole.
    Raises UserError when the disk is full, naming the file; nothing half-written stays behind.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if temporary.is_dir() and path.is_dir():
            shutil.rmtree(path)  # os.replace takes the place of an empty folder only
        os.replace(temporary, path)
    except Exception as error:
        raise_if_disk_full(error, path)
        raise
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def file_digest(path: Path) -> str:
    """sha256 of a file, or of a folder's file names and contents (hidden files left out)."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    lines = "".join(f"{p.relative_to(path).as_posix()} {file_digest(p)}\n" for p in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON, as a whole or not at all. Raises UserError when the disk is full."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
