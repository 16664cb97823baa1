"""Files: the repository root, YAML and JSON, atomic writes, digests, full disks."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from distillery.errors import UserError


def repository_root(start: Path | str | None = None) -> Path:
    """The repository root: the nearest folder at or above `start` that holds `dvc.yaml`.

    Raises UserError when there is none. Papermill starts in the root, Jupyter in `notebooks/`.
    """
    here = Path(start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        if (folder / "dvc.yaml").exists():
            return folder
    raise UserError(f"{here}: no dvc.yaml here or in any folder above; run from inside the repository")


def read_yaml(path: Path) -> Any:
    """The content of a YAML 1.2 file, read as DVC reads it (PyYAML's 1.1 takes the key `on` for `True`).

    Raises UserError (file, line) when it is missing or malformed.
    """
    try:
        return YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: not valid YAML: {getattr(error, 'problem', error)}") from None


def raise_if_disk_full(error: Exception, path: Path) -> None:
    """Raise a UserError that names the file if `error` is some library's way to say that there is no space left."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    # Libraries written in Rust or C++ tell it in their message only, torch just that a write failed.
    told = (*(os.strerror(code) for code in full), "PytorchStreamWriter failed writing")
    if getattr(error, "errno", None) in full or any(words in str(error) for words in told):
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
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
