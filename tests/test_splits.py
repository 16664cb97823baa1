"""Splits that a source brings: a file for each, or a column; validation cut from train; leaks across the files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distillery.config.load import validate_section
from distillery.config.schema import Params, SourceConfig
from distillery.data.prepare import PreparedSource, prepare_source
from distillery.data.readers import read_source
from distillery.data.storage import read_split, write_source
from distillery.errors import UserError
from distillery.pipeline.recipe import _corpora
from distillery.pipeline.strip import write_sources
from distillery.tasks.schema import Task
from experiments import changed

CASES = Path(__file__).parent / "cases"
TASK = Task(kind="classification", labels={"up": "rises", "down": "falls", "flat": "neither"})
SHARES = dict.fromkeys(("train", "pool", "validation", "test"), 0.25)
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def prepare(folder: Path, **settings: Any) -> PreparedSource:
    spec = validate_section(SourceConfig, {"task": "x", "near_duplicate": 1.0} | settings, "params.yaml")
    return prepare_source("x", spec, TASK, folder)


def rows(start: int, n: int, **values: Any) -> list[dict]:
    """n rows whose texts are unlike those of other numbers."""
    return [
        {"text": f"{LETTERS[i % 26] * 9} {LETTERS[i // 26] * 9} {i * i}", "label": TASK.names[i % 3]} | values
        for i in range(start, start + n)
    ]


def write(folder: Path, **files: list[dict]) -> dict[str, str]:
    for name, records in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return {name: f"{name}.jsonl" for name in files}


def sizes(prepared: PreparedSource) -> dict[str, int]:
    return {name: counts["rows"] for name, counts in prepared.audit["splits"].items()}


def test_a_file_for_each_split_and_validation_cut_from_train(tmp_path):
    for validation_share, n in ((0.1, 4), (0.25, 10)):
        splits = {"train": "own_train.csv", "test": "own_test.csv"}
        prepared = prepare(CASES, splits=splits, validation_share=validation_share)
        assert abs(sizes(prepared)["validation"] - n) <= 1
        assert sizes(prepared)["test"] == 20 and sizes(prepared)["train"] == 40 - sizes(prepared)["validation"]
        assert all(prepared.audit["splits"]["validation"]["labels"].values())
        cut = f"{sizes(prepared)['validation']} rows of `train` became validation rows, since there are none; "
        assert cut + "see `validation_share`." in prepared.audit["decisions"]
    write_source(prepared, tmp_path / "out")
    lines = (CASES / "own_test.csv").read_text().splitlines()
    assert all(f'"{text}",' in "\n".join(lines) for text in read_split(tmp_path / "out", "test")["text"])


def test_a_column_names_the_split():
    prepared = prepare(CASES, source="split_column.csv", split_column="split")
    assert sizes(prepared) == {"train": 36, "pool": 0, "validation": 12, "test": 12}
    assert prepared.audit["columns_left_out"] == ["split"]


@pytest.mark.parametrize(
    "names",
    [
        ("train", "pool", "validation", "test"),
        ("Train", "unlabelled", "dev", "TEST"),
        ("training", "pool", "val", "test"),
    ],
)
def test_the_public_names_of_splits_in_a_column(tmp_path, names):
    records = [row | {"part": names[i // 6]} for i, row in enumerate(rows(0, 24))]
    write(tmp_path, a=records)
    prepared = prepare(tmp_path, source="a.jsonl", split_column="part")
    assert list(prepared.split) == [name for name in ("train", "pool", "validation", "test") for _ in range(6)]


def test_validation_is_cut_by_whole_groups(tmp_path):
    train = [row | {"group": f"g{i // 4}"} for i, row in enumerate(rows(0, 80))]
    splits = write(tmp_path, train=train, test=rows(100, 9))
    prepared = prepare(tmp_path, splits=splits, validation_share=0.3)
    frame = prepared.rows.assign(split=prepared.split)
    assert (frame[frame["split"] != "test"].groupby("group")["split"].nunique() == 1).all()
    assert abs((frame["split"] == "validation").mean() * 89 / 80 - 0.3) < 0.06
    again = prepare(tmp_path, splits=splits, validation_share=0.3)
    assert list(again.split) == list(prepared.split)
    assert list(prepare(tmp_path, splits=splits, validation_share=0.3, seed=1).split) != list(prepared.split)


def test_leaks_across_the_files_are_audited_and_exact_copies_are_counted(tmp_path):
    train, test = rows(0, 30), rows(100, 9)
    twin = {"text": "Net sales of the third quarter were 412 euros after 398 a year ago", "label": "up"}
    train.append(twin)
    test += [twin | {"text": twin["text"].replace("412", "77")}, *train[:2]]
    splits = write(tmp_path, train=train, validation=rows(60, 9), test=test)
    prepared = prepare(tmp_path, splits=splits, near_duplicate=0.85)
    assert prepared.audit["across_splits"]["digits_masked"]["pairs_above_by_splits"]["train-test"] >= 1
    assert "2 rows of `test` repeat rows of `train` and were left out of `test`." in prepared.audit["decisions"]
    assert sizes(prepared)["test"] == 10


def test_ids_that_the_files_share_get_their_split_in_front(tmp_path):
    with_ids = {
        name: [row | {"id": i} for i, row in enumerate(part)]
        for name, part in {"train": rows(0, 30), "validation": rows(40, 6), "test": rows(60, 6)}.items()
    }
    prepared = prepare(tmp_path, splits=write(tmp_path, **with_ids))
    assert prepared.rows["id"].is_unique and list(prepared.rows["id"][-6:]) == [f"test-{i}" for i in range(6)]
    assert any(line.startswith("Two splits share ids") for line in prepared.audit["decisions"])
    unlike = {name: [row | {"id": f"{name[:2]}{row['id']}"} for row in part] for name, part in with_ids.items()}
    assert list(prepare(tmp_path, splits=write(tmp_path, **unlike)).rows["id"][-1:]) == ["te5"]


def test_a_pool_needs_no_labels(tmp_path):
    pool = [{"text": row["text"], "source_id": TASK.names.index(row["label"])} for row in rows(200, 20)]
    train = [row | {"source_id": TASK.names.index(row["label"])} for row in rows(0, 30)]
    test = [row | {"source_id": TASK.names.index(row["label"])} for row in rows(100, 9)]
    splits = write(tmp_path, train=train, pool=pool, test=test)
    prepared = prepare(tmp_path, splits=splits)
    write_source(prepared, tmp_path / "out")
    assert len(read_split(tmp_path / "out", "pool")) == 20
    assert read_split(tmp_path / "out", "pool_labels")["label"].isna().all()
    assert "source_id" not in read_split(tmp_path / "out", "pool")  # it reveals the label in the rows that have one
    labelled = [row | {"label": "up"} for row in pool[:5]] + pool[5:]
    prepared = prepare(tmp_path, splits=write(tmp_path, pool=labelled) | splits)
    assert prepared.rows["label"][prepared.split == "pool"].notna().sum() == 5


def test_mistakes_in_splits_are_one_line(tmp_path):
    splits = write(tmp_path, train=rows(0, 30), validation=rows(60, 9), test=rows(100, 9))

    def line(**settings: Any) -> str:
        with pytest.raises(UserError) as caught:
            prepare(tmp_path, **settings)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert line(splits=splits | {"test": "tst.jsonl"}) == "tst.jsonl: no such file"
    write(tmp_path, bad=[{"sentence": "a", "label": "up"}], empty=rows(100, 9)[:8] + [{"text": "z", "label": None}])
    assert line(splits=splits | {"test": "bad.jsonl"}).startswith(
        "bad.jsonl: no column `text`, which other files have; "
    )
    assert line(splits=splits | {"test": "empty.jsonl"}).startswith(
        "empty.jsonl, line 9: `label` is empty; allowed: up"
    )
    write(tmp_path, col=[row | {"part": "train" if i else "trial"} for i, row in enumerate(rows(0, 9))])
    assert line(source="col.jsonl", split_column="part") == (
        "col.jsonl, line 1: `part` must be train, validation, test or pool, not 'trial'"
    )
    write(tmp_path, col=[row | {"part": "train"} for row in rows(0, 9)])
    assert line(source="col.jsonl", split_column="part") == "col.jsonl: no row is in the split `test`"
    write(tmp_path, col=[row | {"part": "test" if i > 2 else "train"} for i, row in enumerate(rows(0, 9))])
    assert line(source="col.jsonl", split_column="part").startswith("col.jsonl: label `up` has 1 group(s) of rows")


def test_the_digests_of_all_files_are_dependencies(tmp_path):
    splits = write(tmp_path, train=rows(0, 30), test=rows(100, 9))
    raw = changed("data.bare", {"task": "mood", "splits": splits})
    raw["data"] = {"bare": raw["data"]["bare"]}
    params = Params.model_validate(raw)
    write_sources(tmp_path, params)
    record = tmp_path / "build/sources/bare.json"
    before = json.loads(record.read_text())
    assert set(before) == {"source", "train", "test"} and before["source"] == "train.jsonl, test.jsonl"
    write(tmp_path, test=rows(100, 8))
    write_sources(tmp_path, params)
    after = json.loads(record.read_text())
    assert after["test"] != before["test"] and after["train"] == before["train"]
    assert {*splits.values()} <= set(_corpora(raw))
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(UserError, match=r"^params.yaml: data.bare.splits.test: test.jsonl: no such file$"):
        write_sources(tmp_path, params)


@settings(max_examples=40)
@given(st.lists(st.sampled_from(["train", "pool", "test", "validation"]), min_size=12, max_size=40))
def test_rows_stay_in_the_split_that_their_column_names(tmp_path_factory, parts):
    folder = tmp_path_factory.getbasetemp()
    if "test" not in parts or "validation" not in parts:
        parts = [*parts, "test", "validation"]
    write(folder, fuzz=[row | {"part": part} for row, part in zip(rows(0, len(parts)), parts, strict=True)])
    assert list(prepare(folder, source="fuzz.jsonl", split_column="part").split) == parts


def test_files_of_several_kinds_are_one_source(tmp_path):
    shutil.copy(CASES / "own_train.csv", tmp_path / "a.csv")
    write(tmp_path, pool=[{"text": row["text"]} for row in rows(200, 6)])
    (tmp_path / "c.tsv").write_text("text;label\n" + "".join(f"{r['text']};{r['label']}\n" for r in rows(0, 6)))
    prepared = prepare(tmp_path, splits={"train": "a.csv", "pool": "pool.jsonl", "test": "c.tsv"})
    assert sizes(prepared)["pool"] == sizes(prepared)["test"] == 6
    assert "c.tsv: The delimiter of the file is `;`; `delimiter:` names another." in prepared.audit["decisions"]


# ----------------------------------------------------------------------------------------- several files by a pattern


def source(pattern: str) -> SourceConfig:
    return validate_section(SourceConfig, {"source": pattern, "task": "x", "split": SHARES}, "params.yaml")


def write_parts(folder: Path, texts_a: list[str], texts_b: list[str]) -> None:
    (folder / "parts/more").mkdir(parents=True)
    for file, texts in (("parts/b.csv", texts_b), ("parts/a.csv", texts_a)):
        (folder / file).write_text("text,label\n" + "".join(f"{text},up\n" for text in texts), encoding="utf-8")
    (folder / "parts/c.json").write_text("[]")


def test_files_that_fit_a_pattern_are_read_in_the_order_of_their_names(tmp_path):
    write_parts(tmp_path, ["one", "two"], ["three"])
    raw = read_source(source("parts/*.csv"), tmp_path)
    assert [row["text"] for row in raw.rows] == ["one", "two", "three"]
    assert raw.numbers == [1, 2, 3]  # ids are made of them
    assert raw.at(2) == "parts/b.csv, line 2"
    assert raw.decisions == ["2 files were read: parts/a.csv to parts/b.csv."]
    (tmp_path / "parts/more/d.csv").write_text("text,label\nfour,up\n")
    assert len(read_source(source("parts/**/*.csv"), tmp_path).rows) == 4
    (tmp_path / "parts/x[1]?.csv").write_text("text,label\nfive,up\n")  # a file that is called like a pattern
    assert [row["text"] for row in read_source(source("parts/x[1]?.csv"), tmp_path).rows] == ["five"]


def test_a_pattern_in_splits_and_files_with_other_columns(tmp_path):
    write_parts(tmp_path, ["one", "two"], ["three"])
    spec = {"splits": {"train": "parts/*.csv", "test": "parts/a.csv"}, "task": "x"}
    raw = read_source(validate_section(SourceConfig, spec, "params.yaml"), tmp_path)
    assert raw.splits == ["train"] * 3 + ["test"] * 2
    assert raw.at(2) == "parts/b.csv, line 2"
    (tmp_path / "parts/b.csv").write_text("message,label\nthree,up\n")
    with pytest.raises(
        UserError, match="parts/b.csv: no column `text`, which other files have; there are: `message`, `label`"
    ):
        read_source(source("parts/*.csv"), tmp_path)
    with pytest.raises(UserError, match=r"parts/\*.txt: no file fits"):
        read_source(source("parts/*.txt"), tmp_path)


def test_a_change_of_any_file_of_a_pattern_is_noticed(tmp_path):
    write_parts(tmp_path, ["one"], ["two"])
    raw = changed("data.s", {"source": "parts/*.csv", "task": "mood", "split": SHARES})
    params = Params.model_validate(raw | {"data": {"s": raw["data"]["s"]}})
    records = []
    for text in ("two", "three", None):
        if text:
            (tmp_path / "parts/b.csv").write_text(f"text,label\n{text},up\n")
        else:
            (tmp_path / "parts/c.csv").write_text("text,label\nfour,up\n")
        write_sources(tmp_path, params)
        records.append((tmp_path / "build/sources/s.json").read_text())
    assert len(set(records)) == 3
