"""`distillery predict`: tables in and out, the same predictions as were scored, kills, and mistakes of users."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deployed import ABSTENTION, MAX_LENGTH, TASK, rows, softened, write_student
from distillery.cli import main
from distillery.config.schema import StudentConfig
from distillery.deploy import tables
from distillery.deploy.predict import PredictOptions, predict_file
from distillery.errors import UserError
from distillery.files import write_json
from distillery.training.student import load_student

ROWS = 60


@pytest.fixture(scope="module")
def folder(tiny_models, tmp_path_factory):
    """The model folder of a classifier."""
    path = tmp_path_factory.mktemp("student") / "runs/s-0/model"
    write_student(tiny_models / "tiny-bert", path)
    return path


@pytest.fixture(scope="module")
def scored(folder):
    """The calibrated probabilities of `rows(ROWS)`, as the evaluation has them."""
    spec = StudentConfig(model="m", arch="classifier", phases=[], max_length=MAX_LENGTH)
    texts = [" ".join(text.split()) for text in rows(ROWS)["text"]]
    return softened(load_student(spec, folder, TASK).predict(texts), 2.0)


def predict(folder, source, target, **options) -> None:
    predict_file(folder, PredictOptions(input=str(source), output=str(target), threads=1, **options))


def write(frame: pd.DataFrame, path) -> None:
    if path.suffix == ".parquet":
        frame.to_parquet(path, index=False)
    elif ".jsonl" in path.suffixes:
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")


def read(path) -> pd.DataFrame:
    if path.suffix == ".parquet":
        return pd.read_parquet(path)
    if path.suffix == ".jsonl":
        return pd.read_json(path, lines=True)
    return pd.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",")


@pytest.mark.parametrize(
    "source, target",
    [
        ("i.csv", "o.csv"),
        ("i.tsv", "o.jsonl"),
        ("i.jsonl", "o.parquet"),
        ("i.parquet", "o.parquet"),
        ("i.csv.gz", "o.tsv"),
        ("i.jsonl.gz", "o.csv"),
    ],
)
def test_every_format_gives_what_was_scored_and_keeps_the_columns(
    folder, scored, tmp_path, monkeypatch, source, target
):
    monkeypatch.setattr(tables, "WINDOW_ROWS", 25)
    frame = rows(ROWS).assign(price=np.arange(ROWS) / 4)
    frame["text"] = "  " + frame["text"].str.replace(" ", " \n ", n=1)  # cleaned as in training
    write(frame, tmp_path / source)
    predict(folder, tmp_path / source, tmp_path / target, probabilities=True)
    result = read(tmp_path / target)
    names = TASK.names
    assert list(result) == [*frame, "prediction", "confidence", *(f"p_{name}" for name in names)]
    for column in frame:
        assert result[column].astype(str).tolist() == frame[column].astype(str).tolist(), column
    assert result["prediction"].tolist() == [names[i] for i in scored.argmax(1)] and len(set(result["prediction"])) > 1
    assert np.abs(result[[f"p_{name}" for name in names]].to_numpy() - scored).max() < 2e-6
    assert np.abs(result["confidence"] - scored.max(1)).max() < 2e-6
    assert [path.name for path in tmp_path.iterdir() if "parts" in path.name] == []
    if source == "i.parquet" and target == "o.parquet":
        assert result.dtypes[list(frame)].equals(frame.dtypes)


def test_the_folder_in_plain_transformers_gives_the_probabilities_that_predict_calibrates(folder, scored):
    from transformers import pipeline

    classify = pipeline("text-classification", model=str(folder), truncation=True, top_k=None)
    texts = [" ".join(text.split()) for text in rows(ROWS)["text"]]
    given = [{entry["label"]: entry["score"] for entry in entries} for entries in classify(texts, batch_size=8)]
    p = np.array([[entry[name] for name in TASK.names] for entry in given])
    assert np.abs(softened(p, 2.0) - scored).max() < 1e-5


def test_a_causal_student_predicts_too(tiny_models, tmp_path):
    settings = write_student(tiny_models / "tiny-llama", tmp_path / "model", "causal", temperature=1.5)
    rows(9).to_csv(tmp_path / "i.csv", index=False)
    predict(tmp_path, tmp_path / "i.csv", tmp_path / "o.csv", probabilities=True)
    spec = StudentConfig(model="m", arch="causal", phases=[], prompt="plain", max_length=settings.max_length)
    p = load_student(spec, tmp_path / "model", TASK).predict([" ".join(text.split()) for text in rows(9)["text"]])
    result = pd.read_csv(tmp_path / "o.csv")
    assert np.abs(result[[f"p_{name}" for name in TASK.names]].to_numpy() - softened(p, 1.5)).max() < 2e-6


def test_a_student_that_reads_windows_predicts_as_scored(tiny_models, tmp_path):
    write_student(tiny_models / "tiny-bert", tmp_path / "model", long_texts={"windows": 3}, temperature=1.0)
    rows(5).to_csv(tmp_path / "i.csv", index=False)
    predict(tmp_path, tmp_path / "i.csv", tmp_path / "o.csv", probabilities=True)
    spec = StudentConfig(model="m", arch="classifier", phases=[], max_length=MAX_LENGTH, long_texts={"windows": 3})
    p = load_student(spec, tmp_path / "model", TASK).predict([" ".join(text.split()) for text in rows(5)["text"]])
    result = pd.read_csv(tmp_path / "o.csv")[[f"p_{name}" for name in TASK.names]].to_numpy()
    assert np.abs(result - p).max() < 2e-6
    cut = load_student(spec, tmp_path / "model", TASK)
    cut.windows = None  # the long text would be another
    assert np.abs(result - cut.predict([" ".join(text.split()) for text in rows(5)["text"]])).max() > 1e-3


def test_it_abstains_below_the_threshold_and_gives_the_sets_of_the_settings(folder, scored, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    content = json.loads((folder / "inference.json").read_text())
    threshold = float(np.median(scored.max(1)))
    content["abstention"] = ABSTENTION | {"threshold": threshold}
    content["prediction_sets"] = {"coverage": 0.9, "threshold": 0.3}
    write_json(tmp_path / "model/inference.json", content)
    rows(ROWS).to_csv(tmp_path / "i.csv", index=False)
    predict(tmp_path, tmp_path / "i.csv", tmp_path / "o.csv", abstain=True)
    result = pd.read_csv(tmp_path / "o.csv")
    sure = np.abs(scored.max(1) - threshold) > 1e-6
    assert (result["prediction"].notna() == (scored.max(1) >= threshold))[sure].all()
    assert 0 < result["prediction"].isna().sum() < ROWS and result["confidence"].notna().all()
    expected = [" | ".join(name for name, value in zip(TASK.names, p, strict=True) if value >= 0.3) for p in scored]
    assert result["prediction_set"].fillna("").tolist() == expected


def test_an_empty_text_has_no_prediction_and_its_row_stays(folder, tmp_path):
    lines = [{"text": "Profit rose."}, {"text": None}, {"text": " \n"}, {"text": "Profit fell.", "note": {"a": 1}}]
    (tmp_path / "i.jsonl").write_text("\n\n".join(json.dumps(line) for line in lines))
    predict(folder, tmp_path / "i.jsonl", tmp_path / "o.csv")
    result = pd.read_csv(tmp_path / "o.csv")
    assert result["prediction"].isna().tolist() == [False, True, True, False] and result["note"][3] == '{"a": 1}'


def test_standard_input_and_output_and_several_text_columns(folder, tmp_path, monkeypatch, capsys):
    table = "title;body\n".replace(";", ",") + '"Profit, again",rose\nLoss,widened\n'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(table.encode())))
    main(["predict", str(folder), "--text", "title", "body", "--prefix", "s_", "--threads", "1"])
    result = pd.read_csv(io.StringIO(capsys.readouterr().out))
    pd.DataFrame({"text": ["Profit, again rose", "Loss widened"]}).to_csv(tmp_path / "i.csv", index=False)
    predict(folder, tmp_path / "i.csv", tmp_path / "o.csv")
    expected = pd.read_csv(tmp_path / "o.csv")
    assert list(result) == ["title", "body", "s_prediction", "s_confidence"]
    assert result["s_confidence"].tolist() == expected["confidence"].tolist()


def test_another_input_or_option_starts_anew(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tables, "WINDOW_ROWS", 20)
    rows(ROWS).to_csv(tmp_path / "i.csv", index=False)
    (tmp_path / "i.csv").write_text(
        (tmp_path / "i.csv").read_text() + "a,b,c,d,e\n"
    )  # stops the run in the last window
    with pytest.raises(UserError, match="5 cells, but the header has 4"):
        predict(folder, tmp_path / "i.csv", tmp_path / "o.csv")
    assert len(list((tmp_path / ".o.csv.parts").glob("part-*"))) == 3 and not (tmp_path / "o.csv").exists()
    with pytest.raises(UserError, match="5 cells"):
        predict(folder, tmp_path / "i.csv", tmp_path / "o.csv")
    assert "continuing after 60 rows" in capsys.readouterr().err
    rows(ROWS).to_csv(tmp_path / "i.csv", index=False)
    predict(folder, tmp_path / "i.csv", tmp_path / "o.csv")
    assert "starting anew" in capsys.readouterr().err
    assert pd.read_csv(tmp_path / "o.csv")["id"].tolist() == rows(ROWS)["id"].tolist()


def test_the_memory_of_a_run_does_not_grow_with_its_rows(tmp_path, monkeypatch):
    """A window at a time is read, whatever the file holds."""
    monkeypatch.setattr(tables, "WINDOW_ROWS", 10)
    rows(35).to_csv(tmp_path / "i.csv", index=False)
    windows = list(tables.read_windows(str(tmp_path / "i.csv"), "csv"))
    assert [len(window.rows) for window in windows] == [10, 10, 10, 5]
    monkeypatch.setattr(tables, "WINDOW_CHARACTERS", 1)
    assert {len(window.rows) for window in tables.read_windows(str(tmp_path / "i.csv"), "csv")} == {1}
    for kind in ("csv", "parquet"):
        monkeypatch.setattr(tables, "WINDOW_CHARACTERS", 10**6)
        rows(35).to_parquet(tmp_path / "i.parquet")
        skipped = list(tables.read_windows(str(tmp_path / f"i.{kind}"), kind, skip=20))
        assert [row["id"] for window in skipped for row in window.rows] == rows(35)["id"].tolist()[20:]


PACKED = gzip.compress(b"text\na\n")
BAD_BLOCK = PACKED[:10] + b"\x07" + PACKED[11:]  # the header of gzip has 10 bytes; no block of deflate has this type
MISTAKES = {
    "no file": ({}, {"input": "none.csv"}, "none.csv: cannot be read: No such file or directory"),
    "no folder": ({}, {"student": "runs/none"}, "no such folder; name that of a run"),
    "no settings": ({}, {"student": "."}, "no inference.json here or in model/; the evaluation writes it"),
    "suffix": ({"i.doc": b"text\na\n"}, {}, "i.doc: cannot read or write this suffix; allowed: .csv"),
    "no column": ({"i.csv": b"body\na\n"}, {}, "no column `text`; it has: body; --text names another"),
    "taken": ({"i.csv": b"text,prediction\na,b\n"}, {}, "has a column `prediction` already; --prefix renames"),
    "twice": ({"i.csv": b"text,text\na,b\n"}, {}, "two columns have the name `text`"),
    "ragged": ({"i.csv": b"text,b\na,b\na\n"}, {}, "i.csv, line 3: 1 cells, but the header has 2"),
    "bytes": ({"i.csv": b"text\nZ\xfcrich\n"}, {}, "byte 0xfc is not utf-8; --encoding names another"),
    "encoding": ({"i.csv": b"text\na\n"}, {"encoding": "utf-99"}, "utf-99: no such encoding"),
    "json": ({"i.jsonl": b'{"text": "a"}\n{"text": \n'}, {}, "i.jsonl, line 2: no JSON"),
    "no object": ({"i.jsonl": b"[1]\n"}, {}, "i.jsonl, line 1: each line must be an object"),
    "number": ({"i.jsonl": b'{"text": 3}\n'}, {}, "i.jsonl, line 1: `text` must be text, not 3"),
    "surrogate": ({"i.jsonl": b'{"text": "a\\ud800"}\n'}, {}, "i.jsonl, line 1: half of a surrogate pair"),
    "gzip": ({"i.csv.gz": b"text\na\n"}, {}, "i.csv.gz, after line 0: damaged"),
    "gzip, later": ({"i.csv.gz": BAD_BLOCK}, {}, "i.csv.gz, after line 0: damaged"),
    "no mark": (
        {"i.csv": b"text\na\n"},
        {"encoding": "utf-16"},
        "i.csv, after line 0: UTF-16 stream does not start with",
    ),
    "input's encoding": ({}, {"input": "-", "encoding": "utf-99"}, "utf-99: no such encoding"),
    "parquet": ({"i.parquet": b"text\na\n"}, {}, "i.parquet: no Parquet file, or damaged"),
    "empty": ({"i.csv": b""}, {}, "i.csv: no rows in it"),
    "header": ({"i.csv": b"text\n"}, {}, "i.csv: no rows in it"),
    "same": ({"i.csv": b"text\na\n"}, {"output": "i.csv"}, "is the input, too; give --output another name"),
    "target": ({"i.csv": b"text\na\n"}, {"output": "none/o.csv"}, "cannot be written: its folder is missing"),
    "new key": ({"i.jsonl": b'{"text": "a"}\n{"text": "a", "b": 1}\n'}, {"window": 1}, "line 2: a new key `b`"),
    "new key, Parquet": (
        {"i.jsonl": b'{"text": "a"}\n{"text": "a", "b": 1}\n'},
        {"window": 1, "output": "o.parquet"},
        "line 2: a new key `b`",
    ),
    "taken later": (
        {"i.jsonl": b'{"text": "a"}\n{"text": "a", "prediction": "up"}\n'},
        {"window": 1, "output": "o.jsonl"},
        "i.jsonl, line 2: has a column `prediction` already; --prefix renames",
    ),
    "types": (
        {"i.jsonl": f'{{"text": "a", "n": {2**60 + 1}}}\n{{"text": "a", "n": 0.5}}\n'.encode()},
        {"window": 1, "output": "o.parquet"},
        "rows of several types",
    ),
    "no export": ({"i.csv": b"text\na\n"}, {"engine": "onnx-int8"}, "no export `onnx-int8` here"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_ends_in_one_line(folder, tmp_path, monkeypatch, capsys, case):
    files, options, line = MISTAKES[case]
    monkeypatch.chdir(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"text\na\n")))
    monkeypatch.setattr(tables, "WINDOW_ROWS", options.pop("window", 100))
    student, output = options.pop("student", str(folder)), options.pop("output", "o.csv")
    command = ["predict", student, "--input", options.pop("input", next(iter(files), "i.csv")), "--output", output]
    command += [part for key, value in options.items() for part in (f"--{key}", value)]
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert line in stop.value.code and stop.value.code.startswith("error: ") and "\n" not in stop.value.code
    assert output in files or not (tmp_path / output).exists()


def test_a_student_that_no_confidence_makes_right_cannot_abstain(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    content = json.loads((folder / "inference.json").read_text())
    write_json(tmp_path / "model/inference.json", content | {"abstention": ABSTENTION | {"threshold": None}})
    rows(3).to_csv(tmp_path / "i.csv", index=False)
    with pytest.raises(UserError, match="at no confidence were 90% of the validation rows right; lower"):
        predict(tmp_path, tmp_path / "i.csv", tmp_path / "o.csv", abstain=True)


def test_parquet_keeps_types_and_a_column_without_a_value(folder, tmp_path):
    table = pa.table(
        {"text": ["a", "b"], "n": pa.array([1, None], pa.int16()), "tags": [["x"], []], "none": [None, None]}
    )
    pq.write_table(table, tmp_path / "i.parquet")
    predict(folder, tmp_path / "i.parquet", tmp_path / "o.parquet")
    result = pq.read_table(tmp_path / "o.parquet")
    assert result["n"].to_pylist() == [1, None] and result.schema.field("n").type == pa.int16()
    assert result["tags"].to_pylist() == [["x"], []]


def test_a_gzip_file_is_read_as_a_stream(tmp_path):
    with gzip.open(tmp_path / "i.csv.gz", "wt") as file:
        rows(5).to_csv(file, index=False)
    windows = list(tables.read_windows(str(tmp_path / "i.csv.gz"), "csv"))
    assert [row["id"] for window in windows for row in window.rows] == rows(5)["id"].tolist()
