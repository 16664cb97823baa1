"""Files that people have: each is read right or refused in one line, and the kept table says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from field_files import FILES, HEADER, FieldFile, Rows, listing

ROOT = Path(__file__).resolve().parents[1]
EVERY_FILE = [(group, file) for group, files in FILES.items() for file in files]
outcomes: dict[tuple[str, str], tuple[Rows | None, str]] = {}


def outcome(folder: Path, group: str, file: FieldFile) -> tuple[Rows | None, str]:
    """What becomes of `file`, written once."""
    if (group, file.kind, file.tool) not in outcomes:
        file.write(folder)
        before = sorted(folder.rglob("*"))
        outcomes[group, file.kind, file.tool] = file.outcome(folder)
        assert sorted(folder.rglob("*")) == before, "reading writes nothing"
    return outcomes[group, file.kind, file.tool]


@pytest.mark.parametrize(("group", "file"), EVERY_FILE, ids=[f"{g}-{f.kind}-{f.tool}" for g, f in EVERY_FILE])
def test_a_file_is_read_right_or_refused_in_one_line(tmp_path, monkeypatch, group, file):
    monkeypatch.chdir(tmp_path)  # where a pickle that is opened would leave a file
    rows, text = outcome(tmp_path, group, file)
    if file.line is None:
        assert rows == list(file.rows), text
    else:
        assert rows is None and text.startswith(file.line) and "\n" not in text, text


def test_the_kept_table_is_that_of_these_files(tmp_path_factory):
    kept = (ROOT / "benchmarks/results/files_read.txt").read_text(encoding="utf-8").partition("\n\n")[2]
    lines = [listing(g, f, outcome(tmp_path_factory.mktemp("file"), g, f)) for g, f in EVERY_FILE]
    assert kept.splitlines() == [HEADER, *lines], "PYTHONPATH=src python benchmarks/keep.py files_read"
