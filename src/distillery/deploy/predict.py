"""`distillery predict`: predictions for the rows of a file, in windows; a killed run continues where it stood."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from distillery.deploy.decisions import check_usable, decide, output_columns
from distillery.deploy.predictors import (
    EXPORTS_FILE,
    ONNX_FILES,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    Predictor,
    open_predictor,
)
from distillery.deploy.settings import InferenceSettings, clean_text, model_folder, read_settings
from distillery.deploy.tables import (
    STANDARD,
    Window,
    join_parts,
    read_windows,
    table_format,
    write_header,
    write_part,
    write_rows,
)
from distillery.errors import UserError
from distillery.files import write_json

RUN_FILE, JOINED_FILE = "run.json", "joined"


@dataclass(frozen=True)
class PredictOptions:
    """What the command line of `distillery predict` takes; see there."""

    input: str = STANDARD
    output: str = STANDARD
    format: str | None = None
    text_columns: tuple[str, ...] = ()
    encoding: str = "utf-8-sig"
    engine: str = "auto"
    threads: int | None = None
    abstain: bool = False
    probabilities: bool = False
    prefix: str = ""


def predict_file(student: Path, options: PredictOptions) -> int:
    """Predict the rows of `options.input` into `options.output`; returns their number.

    Every column of the input stays, and those of :func:`output_columns` are added. Raises UserError with one line; rows
    that were predicted before it stay, so that a run with the same options and files continues after them.
    """
    folder = model_folder(student)
    settings = read_settings(folder)
    check_usable(settings, options.abstain)
    kinds = table_format(options.input, options.format), table_format(options.output, options.format)
    if options.input != STANDARD and not Path(options.input).is_file():
        raise UserError(f"{options.input}: cannot be read: No such file or directory")
    if options.output == STANDARD:
        if kinds[1] == "parquet":
            raise UserError("standard output: Parquet is written to a file only; give --output a name")
        return _predict_to_standard_output(_Job(folder, settings, options), kinds)
    if options.output.endswith(".gz"):
        raise UserError(f"{options.output}: no compressed output; leave out .gz")
    if Path(options.output).is_dir() or not Path(options.output).absolute().parent.is_dir():
        raise UserError(f"{options.output}: cannot be written: its folder is missing, or it is one")
    if options.input != STANDARD and Path(options.input).resolve() == Path(options.output).resolve():
        raise UserError(f"{options.output}: is the input, too; give --output another name")
    return _predict_to_file(_Job(folder, settings, options), kinds)


class _Job:
    """A student with the options of a run; it opens its model at the first window."""

    def __init__(self, folder: Path, settings: InferenceSettings, options: PredictOptions):
        self.folder, self.settings, self.options = folder, settings, options
        self.text_columns = list(options.text_columns) or settings.text_columns
        added = output_columns(settings, options.probabilities)
        self.added = {name: options.prefix + name for name in added}
        self._predictor: Predictor | None = None

    def columns(self, window: Window) -> list[str]:
        """The columns of the output: those of the input, then the added ones. Raises UserError where no text is."""
        names = list(dict.fromkeys(name for row in window.rows for name in row))
        for name in self.text_columns:
            if name not in names:
                known = ", ".join(names) or "none"
                raise UserError(f"{self.options.input}: no column `{name}`; it has: {known}; --text names another")
        return [*names, *self.added.values()]

    def complete(self, window: Window) -> None:
        """Add the output columns to the rows of `window`."""
        if self._predictor is None:
            self._predictor = open_predictor(self.folder, self.settings, self.options.engine, self.options.threads)
            tqdm.write(f"{self.settings.student}: predicting with {self._predictor.engine}", file=sys.stderr)
        texts = [
            clean_text(row, self.text_columns, place) for row, place in zip(window.rows, window.places, strict=True)
        ]
        decisions = decide(
            self._predictor,
            self.settings,
            texts,
            abstain=self.options.abstain,
            probabilities=self.options.probabilities,
        )
        for row, decision in zip(window.rows, decisions, strict=True):
            row |= {self.added[name]: value for name, value in decision.items()}

    def windows(self, kind: str, skip: int) -> Iterator[Window]:
        """The windows of the input after its first `skip` rows. Raises UserError for a row with an added column."""
        added = set(self.added.values())
        for window in read_windows(self.options.input, kind, skip, self.options.encoding):
            for row, place in zip(window.rows, window.places, strict=True):
                if taken := row.keys() & added:
                    raise UserError(f"{place}: has a column `{min(taken)}` already; --prefix renames the new ones")
            yield window

    def key(self) -> dict[str, Any]:
        """All that decides the output, as far as a glance at the files shows it: another key starts anew."""
        files = [Path(self.options.input)] if self.options.input != STANDARD else []
        files += [self.folder / name for name in (WEIGHTS_FILE, TOKENIZER_FILE)]
        files += [self.folder / "onnx" / name for name in (EXPORTS_FILE, *ONNX_FILES.values())]
        stamps = [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.exists()]
        options = asdict(self.options) | {"text_columns": self.text_columns, "threads": None}
        return {"options": options, "files": stamps, "settings": self.settings.model_dump()}


def _progress(done: int) -> tqdm:
    seconds = 1 if sys.stderr.isatty() else 30
    return tqdm(initial=done, unit=" rows", mininterval=seconds, file=sys.stderr, dynamic_ncols=True)


def _predict_to_standard_output(job: _Job, kinds: tuple[str, str]) -> int:
    columns: list[str] | None = None
    with _progress(0) as progress:
        for window in job.windows(kinds[0], 0):
            if columns is None:
                columns = job.columns(window)
                write_header(sys.stdout, kinds[1], columns)
            job.complete(window)
            write_rows(sys.stdout, kinds[1], columns, window)
            sys.stdout.flush()
            progress.update(len(window.rows))
        if columns is None:
            raise UserError(f"{_shown(job.options.input)}: no rows in it")
        return int(progress.n)


def _shown(name: str) -> str:
    return "standard input" if name == STANDARD else name


def _predict_to_file(job: _Job, kinds: tuple[str, str]) -> int:
    """Each window becomes a file of its own in a folder beside the output; at the end they are joined."""
    output = Path(job.options.output)
    folder = output.with_name(f".{output.name}.parts")
    columns, done = _continue(job, folder)
    with _progress(done) as progress:
        for window in job.windows(kinds[0], done):
            columns = columns or job.columns(window)
            job.complete(window)
            if not done:  # a student that cannot be opened leaves nothing
                write_json(folder / RUN_FILE, {"key": job.key(), "columns": columns})
            end = done + len(window.rows)
            write_part(folder / f"part-{done:012d}-{end:012d}", kinds[1], columns, window)
            done = end
            progress.update(len(window.rows))
    if columns is None:
        raise UserError(f"{_shown(job.options.input)}: no rows in it")
    join_parts(_parts(folder), folder / JOINED_FILE, kinds[1], columns)  # a kill leaves nothing outside the folder
    os.replace(folder / JOINED_FILE, output)
    shutil.rmtree(folder)
    return done


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*"))


def _continue(job: _Job, folder: Path) -> tuple[list[str] | None, int]:
    """The columns and the number of rows that an unfinished run left in `folder`; None and 0 where a new run begins."""
    try:
        run = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        run = {}
    if job.options.input == STANDARD or run.get("key") != json.loads(json.dumps(job.key())):
        if run:
            print("the unfinished run had another input, model or options: starting anew", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        return None, 0
    for leftover in folder.glob(".*.tmp"):  # of the part that was being written
        leftover.unlink()
    parts = _parts(folder)
    done = int(parts[-1].name.rpartition("-")[2]) if parts else 0
    if done:
        print(f"continuing after {done:,} rows", file=sys.stderr)
    return run["columns"], done
