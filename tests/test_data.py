"""Sources: reading and cleaning, the messages for wrong files and rows, and splits that do not leak."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel, AutoTokenizer

from distillery.config.load import load_params
from distillery.config.schema import SPLITS, ColumnNames, ModelConfig, RowFilter, SourceConfig, SplitShares
from distillery.data.audit import split_leaks
from distillery.data.cleaning import ROW_COLUMNS, clean_rows
from distillery.data.columnar import read_dataset_folder
from distillery.data.filtering import nearest_words, related_words
from distillery.data.near_duplicates import (
    cluster_near_duplicates,
    find_near_duplicates,
    mask_digits,
    nearest_texts,
    ngram_vectors,
)
from distillery.data.prepare import PreparedSource, prepare_source
from distillery.data.readers import read_source
from distillery.data.records import RawRows, normalize_text, without_punctuation
from distillery.data.similar_pairs import SIMILARITY_SLACK, similar_pairs
from distillery.data.splitting import split_groups
from distillery.data.storage import read_split, read_task, write_source
from distillery.errors import UserError
from distillery.notebook.data import decision_list
from distillery.tasks.schema import Task, accepted_answers, load_task

ROOT = Path(__file__).resolve().parents[1]
TASK = Task(kind="classification", labels={"up": "rises", "down": "falls"})
QUARTERS = SplitShares(train=0.25, pool=0.25, validation=0.25, test=0.25)
FILES = {f"{name}.parquet" for name in (*SPLITS, "pool_labels")} | {"task.json", "audit.json"}


def texts(n: int) -> list[str]:
    """n texts of random words, so that no two are alike."""
    rng = np.random.default_rng(0)
    letters = list("abcdefghijklmnopqrstuvwxyz")
    return [" ".join("".join(rng.choice(letters, 7)) for _ in range(4)) for _ in range(n)]


def records(n: int = 24) -> list[dict]:
    return [{"id": f"x{i}", "text": text, "label": ("up", "down")[i % 2]} for i, text in enumerate(texts(n))]


def source(file: str, **settings) -> SourceConfig:
    return SourceConfig(**{"source": file, "task": "mood", "split": QUARTERS} | settings)


def jsonl(folder: Path, rows: list) -> str:
    """Write rows (objects, or lines as they are) and return the file's name."""
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "a.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return "a.jsonl"


def prepare(folder: Path, rows: list, task: Task = TASK, **settings) -> PreparedSource:
    return prepare_source("a", source(jsonl(folder, rows), **settings), task, folder)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ------------------------------------------------------------------------------------------------- reading


def test_the_four_kinds_of_file_read_alike(tmp_path):
    rows = [
        {"id": "1", "text": 'He said "up", twice\nand left', "label": "up", "note": "ä"},
        {"id": "2", "text": "Down;\tdown\u2028, down", "label": "down", "note": "b"},
    ]
    frame = pd.DataFrame(rows)
    jsonl(tmp_path, rows)
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_csv(tmp_path / "a.TSV", index=False, sep="\t")
    frame.to_parquet(tmp_path / "a.parquet")
    read = {name: read_source(source(name), tmp_path) for name in ("a.jsonl", "a.csv", "a.TSV", "a.parquet")}
    assert all(raw.rows == rows for raw in read.values())
    # the line on which a record starts: the first record of the CSV file takes two lines, below the header
    assert {name: raw.numbers for name, raw in read.items()} == {
        "a.jsonl": [1, 2],
        "a.csv": [2, 4],
        "a.TSV": [2, 4],
        "a.parquet": [1, 2],
    }


def test_byte_order_mark_line_ends_of_windows_and_blank_lines(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext,label\r\n\r\nrose,up\r\n,\r\n , \r\nfell,down\r\n")
    raw = read_source(source("a.csv"), tmp_path)
    assert raw.rows == [{"text": "rose", "label": "up"}, {"text": "fell", "label": "down"}]
    assert (raw.numbers, raw.blank) == ([3, 6], 3)
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "rose"}\r\n\r\n{"text": "fell"}')
    raw = read_source(source("a.jsonl"), tmp_path)
    assert (raw.rows, raw.numbers, raw.blank) == ([{"text": "rose"}, {"text": "fell"}], [1, 3], 1)


CSV = b"text,label\n"
UNREADABLE = [  # file, content, the line
    ("a.jsonl", None, "a.jsonl: no such file"),
    (
        "a.ods",
        b"x",
        "a.ods: cannot read `.ods`; allowed: .jsonl, .json, .csv, .tsv, .parquet, .xlsx, each also in .gz or .zip, or",
    ),
    ("a", b"x", "a: cannot read `a name without suffix`; allowed: .jsonl"),
    ("a.jsonl", b"", "a.jsonl: empty, there are no rows in it"),
    ("a.jsonl", b"\n\n", "a.jsonl: empty, there are no rows in it"),
    ("a.csv", b"", "a.csv: empty, there are no rows in it"),
    ("a.csv", CSV, "a.csv: empty, there are no rows in it"),
    ("a.parquet", b"", "a.parquet: empty, there are no rows in it"),
    ("a.parquet", b"PAR1 not really PAR1", "a.parquet: not a Parquet file, or damaged"),
    ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl, line 2, column 10: not valid JSON: Expecting value"),
    ("a.jsonl", b'{"text": "a"} {}\n', "a.jsonl, line 1, column 15: not valid JSON: Extra data"),
    ("a.jsonl", b'\n["a"]\n', 'a.jsonl, line 2: must be a JSON object like {"text": …}, not a list'),
    ("a.jsonl", b"3\n", 'a.jsonl, line 1: must be a JSON object like {"text": …}, not a number'),
    ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1: not valid JSON: a number too long or brackets too deep"),
    ("a.jsonl", b'{"text": "\\ud83d"}\n', "a.jsonl, line 1: half of a surrogate pair"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xcf\xf0\xe8\xe2"}\n', "a.jsonl, line 2: byte 0xcf at offset 24 is not"),
    ("a.csv", b"\xef\xbb\xbftext,label\ncaf\xe9,up\n", "a.csv, line 2: byte 0xe9 at offset 17 is not UTF-8;"),
    ("a.csv", "text,label\n".encode("utf-16"), "a.csv: empty, there are no rows in it"),
    ("a.csv", CSV + b"a,up\nb,up,c\n", "a.csv, line 3: 3 fields, but the header has 2"),
    ("a.csv", CSV + b'"a\nb",up\nc\n', "a.csv, line 4: 1 fields, but the header has 2"),
    (
        "a.csv",
        CSV + b'a,up\n"b,up\nc,up\n',
        "a.csv, line 3: not a valid table: unexpected end of data (is a quote left open? `quotes: none` reads",
    ),
    ("a.csv", b"text,label,text\na,up,b\n", "a.csv, line 1: the column `text` is there twice"),
    ("a.tsv", b"text\tlabel\na,up\n", "a.tsv, line 2: 1 fields, but the header has 2"),
]


@pytest.mark.parametrize(("file", "content", "line"), UNREADABLE, ids=[line[:60] for *_, line in UNREADABLE])
def test_unreadable_files_are_reported_in_one_line(tmp_path, file, content, line):
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_source(source(file), tmp_path)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_a_folder_in_place_of_a_file(tmp_path):
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(UserError, match=r"^a.jsonl: a folder without text files; needs a folder for each label"):
        read_source(source("a.jsonl"), tmp_path)


@settings(max_examples=100)
@given(st.sampled_from([".jsonl", ".csv", ".tsv", ".parquet"]), st.binary(max_size=60))
def test_any_bytes_are_read_or_reported(tmp_path_factory, suffix, content):
    folder = tmp_path_factory.getbasetemp()
    (folder / f"any{suffix}").write_bytes(content)
    try:
        assert read_source(source(f"any{suffix}"), folder).rows
    except UserError as error:
        assert str(error).startswith(f"any{suffix}")
        assert len(str(error).splitlines()) == 1


# ------------------------------------------------------------------------------------------------- the hub


def run_hub(folder: Path, name: str) -> subprocess.CompletedProcess:
    """Load a hub data set in a process of its own, offline and with an empty cache."""
    code = f"""
import sys
from pathlib import Path
from distillery.config.schema import SourceConfig, SplitShares
from distillery.data.readers import read_source
from distillery.errors import UserError
split = SplitShares(train=0.5, validation=0.25, test=0.25)
try:
    print(read_source(SourceConfig(source={name!r}, task="mood", split=split), Path(".")))
except UserError as error:
    sys.exit(f"error: {{error}}")
"""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT / "src"),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "cache"),
    }
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)


def test_hub_out_of_reach_is_one_line(tmp_path):
    done = run_hub(tmp_path, "hub:owner/name@main")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "error: hub:owner/name@main: no network (or HF_HUB_OFFLINE is set), unknown data set or revision, "
        "or no right to read it\n"
    )


def test_hub_labels_get_their_names(tmp_path):
    """`datasets` prefers a folder with the name of the data set to the hub."""
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["up", "down"])})
    (tmp_path / "owner" / "name").mkdir(parents=True)
    dataset = datasets.Dataset.from_dict({"text": ["rose", "fell"], "label": [0, 1]}, features=features)
    dataset.to_parquet(tmp_path / "owner" / "name" / "train.parquet")
    done = run_hub(tmp_path, "hub:owner/name")
    assert "labels=['up', 'down']" in done.stdout, done.stderr
    assert "{'text': 'fell', 'label': 1}" in done.stdout


def test_names_of_the_hub_replace_integers():
    raw = RawRows(
        "hub:a/b", "row", [{"text": "rose", "label": 0}, {"text": "fell", "label": 1}], [1, 2], 0, ["up", "down"]
    )
    frame, _, _ = clean_rows(raw, source("hub:a/b"), TASK)
    assert list(frame["label"]) == ["up", "down"]


def themed_rows() -> list[dict]:
    """Floods, which come with rivers, in two languages over three years; sports in one."""
    rows = []
    for i, row in enumerate(records(48)):
        flood, seeded = i < 24, i % 4 < 2
        words = ("river", "flood" if seeded else "levee") if flood else ("match", "said")
        extra = {"theme": "water" if flood else "sport", "language": "en" if i % 4 or not flood else "de"}
        rows.append(
            row | extra | {"text": f"{row['text']} {' '.join(words)} said", "date": f"20{20 + i % 3}-01-{i:02}"}
        )
    return rows


def test_keywords_are_expanded_by_the_words_that_come_with_them(tmp_path):
    """`river` stands in texts with `flood` and seldom elsewhere; `said` is everywhere, the names in one text each."""
    seeds = {"keywords": ["flood"]}
    alone, more = (prepare(tmp_path, themed_rows(), filter=seeds | {"expand_keywords": n}) for n in (0, 5))
    assert (len(alone.rows), alone.audit["filter"]["added_keywords"]) == (12, [])
    assert (len(more.rows), more.audit["filter"]["added_keywords"]) == (24, ["river"])
    assert more.audit["filter"]["steps"] == [{"step": "cleaned", "rows": 48}, {"step": "keywords", "rows": 24}]
    with pytest.raises(ValueError, match="`expand_keywords` starts from `keywords`, and there are none"):
        RowFilter(expand_keywords=3)


@torch.no_grad()
def word_cosine(folder: Path, word: str, keyword: str) -> float:
    """The cosine of the mean last states of two words, each alone in the encoder."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    states = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in (word, keyword)]
    return torch.cosine_similarity(*states, dim=0).item()


def test_keywords_are_expanded_by_the_words_with_the_nearest_vectors(tmp_path, tiny_models, monkeypatch):
    """Of the words that three texts hold, by the nearest of two keywords, with the cosine; two runs are alike."""
    (tmp_path / "dvc.yaml").touch()
    monkeypatch.chdir(tmp_path)
    models = {"encoder": ModelConfig(folder=str(tiny_models / "tiny-bert"))}
    words = {"profit": 9, "sales": 5, "company": 4, "market": 3, "share": 2}  # the last one in too few texts
    rows = [row | {"text": f"{row['text']} quarter Price"} for row in records(12)]
    for word, number in words.items():
        for row in rows[:number]:
            row["text"] += f" {word}"
    row_filter = {"keywords": ["Price", "quarter"], "expand_keywords": 3, "expand_by": "embeddings"}
    spec = source(jsonl(tmp_path, rows), filter=row_filter | {"embeddings": "encoder"})
    prepared = [prepare_source("a", spec, TASK, tmp_path, models=models) for _ in range(2)]
    (report, _) = filters = [each.audit["filter"] for each in prepared]
    assert filters[0] == filters[1]
    folder = tiny_models / "tiny-bert"
    cosines = {word: max(word_cosine(folder, word, key) for key in ("price", "quarter")) for word in [*words][:4]}
    expected = sorted(cosines, key=cosines.get, reverse=True)[:3]
    assert report["added_keywords"] == expected
    assert report["similarities"] == pytest.approx([cosines[word] for word in expected], abs=2e-4)
    shown = ", ".join(f"{word} ({cosines[word]:.2f})" for word in expected)
    assert f"(cosine): {shown}." in decision_list(prepared[0].audit["decisions"])
    assert nearest_words(pd.Series(["a b", "c d"]), ["e"], 3, pytest.fail) == {}


@pytest.mark.parametrize(
    "more, message",
    [
        ({"expand_by": "embeddings", "expand_keywords": 2}, "`expand_by: embeddings` and `embeddings` "),
        ({"embeddings": "encoder", "expand_keywords": 2}, "`expand_by: embeddings` and `embeddings` "),
        ({"expand_by": "embeddings", "embeddings": "encoder"}, "adds no word: set `expand_keywords`"),
    ],
)
def test_an_expansion_by_vectors_needs_an_encoder_and_a_number(more, message):
    with pytest.raises(ValueError, match=message):
        RowFilter(keywords=["flood"], **more)


def test_related_words_are_those_with_the_highest_likelihood_ratio():
    """By hand: of 4 texts with the seed 3 hold `b` and 1 of 4 others; `c` 3 and none, `d` only 2; `e` 3 and 4."""
    rows = ["seed bbb ccc ddd eee", "seed bbb ccc ddd eee", "Seed bbb CCC eee", "seed", "bbb eee", "eee", "eee", "eee"]
    assert related_words(pd.Series(rows), ["SEED"], 9) == ["ccc", "bbb"]
    assert related_words(pd.Series(rows), ["SEED"], 1) == ["ccc"]
    assert related_words(pd.Series(["up 1", "no 2"]), ["up"], 9) == []  # no text has a word of three letters
    assert related_words(pd.Series(rows), ["none"], 9) == [] == related_words(pd.Series(rows[:4]), ["seed"], 9)


def test_the_audit_counts_what_a_filter_leaves_of_each_theme(tmp_path):
    settings = {"languages": ["en"], "keywords": ["flood", "match"], "theme": "theme", "date": "date"}
    audit = prepare(tmp_path, themed_rows(), filter=settings).audit["filter"]
    assert [step["rows"] for step in audit["steps"]] == [48, 42, 30]
    dates = {"first": "2020-01-00", "last": "2022-01-47"}
    assert audit["themes"] == [
        {"theme": "sport", "rows": 24, "by_step": {"language": 24, "keywords": 24}, "left": 24, "languages": 1}
        | dates
        | {"first": "2020-01-24"},
        {"theme": "water", "rows": 24, "by_step": {"language": 18, "keywords": 6}, "left": 6, "languages": 2}
        | dates
        | {"last": "2022-01-23"},
        {"theme": None, "rows": 48, "by_step": {"language": 42, "keywords": 30}, "left": 30, "languages": 2} | dates,
    ]
    assert audit["languages"] == [
        {"language": "de", "rows": 6, "by_step": {"language": 0, "keywords": 0}, "left": 0},
        {"language": "en", "rows": 42, "by_step": {"language": 42, "keywords": 30}, "left": 30},
    ]
    assert "filter" not in prepare(tmp_path, themed_rows()).audit
    with pytest.raises(UserError, match="no column `topic`, which filter.theme names"):
        prepare(tmp_path, themed_rows(), filter={"theme": "topic"})


@pytest.mark.parametrize("name", ["hub:", "hub:a/b/c", "hub:a/b@", "hub:../a"])
def test_malformed_hub_names(tmp_path, name):
    with pytest.raises(UserError, match=r"not a hub data set; write hub:owner/name or hub:owner/name@revision"):
        read_source(source(name), tmp_path)


# ------------------------------------------------------------------------------------------ options, no labels

CHOICE = Task(kind="choice", labels={"1": "", "2": "", "3": ""})
LETTERS = Task(kind="choice", labels={"A": "", "B": ""})


def chosen(rows: list[dict], task: Task = CHOICE, **columns) -> pd.DataFrame:
    raw = RawRows("a.jsonl", "line", rows, list(range(1, len(rows) + 1)))
    return clean_rows(raw, source("a.jsonl", columns=ColumnNames(**columns)), task)[0]


def test_options_are_shuffled_and_the_answer_moves_with_them():
    rows = [{"text": text, "options": ["red", "blue", "green"], "label": 1} for text in texts(60)]
    frame = chosen(rows)
    for text, label in zip(frame["text"], frame["label"], strict=True):
        lines = text.split("\n")
        assert sorted(line[3:] for line in lines[1:]) == ["blue", "green", "red"]
        assert lines[int(label)] == f"{label}) blue"
    assert min(Counter(frame["label"]).values()) > 10  # the position of the right option holds no information
    pd.testing.assert_frame_equal(frame, chosen(rows))  # and is always the same


def test_options_may_keep_their_order():
    rows = [{"text": text, "options": ["red", "blue", "green"], "label": i % 3} for i, text in enumerate(texts(9))]
    frame = chosen(rows, shuffle_options=False)
    assert {text.partition("\n")[2] for text in frame["text"]} == {"1) red\n2) blue\n3) green"}
    assert frame["label"].tolist() == ["1", "2", "3"] * 3


def test_a_question_may_lose_wrong_options():
    """The right one stays, at any position; each wrong one goes about as often; more options than labels then fit."""
    rows = [{"text": text, "options": ["red", "blue", "green"], "label": 1} for text in texts(90)]
    frame = chosen(rows, LETTERS, max_options=2)
    lines = [text.split("\n")[1:] for text in frame["text"]]
    assert all(line["AB".index(label)] == f"{label}) blue" for line, label in zip(lines, frame["label"], strict=True))
    wrong = Counter(option[3:] for line in lines for option in line if "blue" not in option)
    assert sum(wrong.values()) == 90 and min(wrong["red"], wrong["green"]) > 25
    assert frame["n_options"].tolist() == [2] * 90 and min(Counter(frame["label"]).values()) > 25
    other = [row | {"options": ["green", "red", "blue"], "label": 2} for row in rows]
    pd.testing.assert_frame_equal(chosen(other, LETTERS, max_options=2), frame)
    two = [{"text": "x", "options": ["no", "yes"], "label": 0}]
    pd.testing.assert_frame_equal(chosen(two, max_options=2), chosen(two))  # nothing to take away
    with pytest.raises(ValueError, match=r"`max_options` keeps the right option, and `label: null` names none"):
        ColumnNames(max_options=2, label=None)


def test_the_same_question_in_another_order_is_the_same_row():
    rows = [
        {"text": "which", "options": order, "label": order.index("b")} for order in (["a", "b", "c"], ["c", "b", "a"])
    ]
    assert len(chosen(rows)) == 1


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"q": "x", "options": ["no", "yes"], "label": 1}, {"text": "q"}),
        ({"q": "x", "o1": "no", "o2": "yes", "label": "2"}, {"text": "q", "options": ["o1", "o2"], "first": 1}),
        ({"q": "x", "options": ["A)no", "B) yes"], "label": "B"}, {"text": "q", "first": "A"}),
        ({"s": "x", "t": "y", "options": ["no", "yes"], "label": 1}, {"text": ["s", "t"]}),
    ],
    ids=["a list and an index", "columns and numbers", "letters", "a text of two columns"],
)
def test_the_public_ways_to_write_a_choice(row, columns):
    frame = chosen([row], **columns)
    lines = frame["text"][0].split("\n")
    assert lines[0] == "x" + (" y" if "s" in row else "")
    assert lines[int(frame["label"][0])].endswith(") yes")
    assert set(frame) == {*ROW_COLUMNS, "n_options"} and frame["n_options"].tolist() == [2]


def test_the_number_of_options_is_that_of_the_row_whatever_its_text_and_source_hold():
    """A source's own column of this name does not count; neither do the lines of a text."""
    rows = [
        {"text": "a\nb\nwhich", "options": ["red", "blue", "green"], "label": 1, "n_options": 9},
        {"text": "or\nthis", "options": ["red", "blue"], "label": 0, "n_options": 9},
    ]
    assert chosen(rows)["n_options"].tolist() == [3, 2]


@pytest.mark.parametrize(
    ("row", "line"),
    [
        (
            {"text": "x", "options": ["a", "b", "c"], "label": 0},
            "a.jsonl, line 1: `options` holds 3 options; allowed: 2 to 2",
        ),
        ({"text": "x", "options": ["a"], "label": 0}, "a.jsonl, line 1: `options` holds 1 options; allowed: 2 to 2"),
        ({"text": "x", "options": "ab", "label": 0}, "a.jsonl, line 1: `options` must be a list of texts"),
        ({"text": "x", "options": ["a", ""], "label": 0}, "a.jsonl, line 1: `options` must be a list of texts"),
        ({"text": "x", "options": ["a", "b"], "label": 2}, "a.jsonl, line 1: unknown answer '2'; allowed: 0, 1"),
        ({"text": "x", "options": ["a", "b"], "label": None}, "a.jsonl, line 1: `label` is empty; allowed: 0, 1"),
        ({"text": "x", "label": 0}, "a.jsonl: no column `options` for the options; there are: `text`, `label`"),
    ],
)
def test_options_that_do_not_fit_are_reported_in_one_line(row, line):
    with pytest.raises(UserError) as caught:
        chosen([row], LETTERS)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_rows_with_fewer_options_are_split_by_the_labels_they_have(tmp_path):
    rows = [{"text": text, "options": ["no", "yes"], "label": i % 2} for i, text in enumerate(texts(40))]
    prepared = prepare(tmp_path, rows, CHOICE)
    assert set(prepared.rows["label"]) == {"1", "2"}
    assert prepared.audit["splits"]["train"]["labels"]["3"] == 0
    write_source(prepared, tmp_path / "out")


def test_rows_without_labels_are_all_pool(tmp_path):
    rows = [{"text": text, "label": "up"} for text in texts(8)]
    prepared = prepare(tmp_path, rows, split=None, columns=ColumnNames(label=None))
    write_source(prepared, tmp_path / "out")
    assert {name: len(read_split(tmp_path / "out", name)) for name in SPLITS} == {
        "train": 0,
        "pool": 8,
        "validation": 0,
        "test": 0,
    }
    assert read_split(tmp_path / "out", "pool_labels")["label"].isna().all()
    assert "label" not in read_split(tmp_path / "out", "pool")


def test_a_filter_keeps_rows_of_its_languages_and_keywords(tmp_path):
    by_language = [("en", "The flood rose"), ("en", "A quiet day"), ("de", "Die Flut stieg"), ("fr", "La crue monte")]
    rows = [
        {"text": f"{text} {suffix}", "label": ("up", "down")[i % 2], "language": language}
        for i, suffix in enumerate(texts(24))
        for language, text in by_language
    ]
    prepared = prepare(tmp_path, rows, filter={"languages": ["en", "de"], "keywords": ["flood", "Flut"]})
    assert set(prepared.rows["language"]) == {"en", "de"} and len(prepared.rows) == 48
    assert prepared.audit["dropped"]["other_language"] == 24
    assert prepared.audit["dropped"]["without_keyword"] == 24
    for wrong, line in (
        ({"languages": ["pl"]}, "the filter leaves no row"),
        ({"language": "x", "languages": ["en"]}, "no"),
    ):
        with pytest.raises(UserError, match=f"a.jsonl: {line}"):
            prepare(tmp_path, rows, filter=wrong)


QA = Task(kind="qa")


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("ohm", "ohm"),
        (["ohm", " ohms", "ohm"], "ohm | ohms"),
        ({"value": "ohm", "aliases": ["ohm", "a | b"], "type": "x"}, "ohm | a / b"),
        (7, "7"),
    ],
)
def test_accepted_answers_in_the_public_ways(label, expected):
    frame = chosen([{"text": "which unit?", "label": label}], QA)
    assert frame["answers"].tolist() == [expected]
    assert frame["label"].tolist() == ["right"]
    assert accepted_answers(expected)[0] == str(label["value"] if isinstance(label, dict) else expected.split(" | ")[0])


@pytest.mark.parametrize("label", [None, [], [None], ["a", ""], {"aliases": []}, 1.5])
def test_a_question_without_an_answer_is_reported_in_one_line(label):
    with pytest.raises(UserError, match=r"^a.jsonl, line 1: `label` must be an answer or a list of accepted answers"):
        chosen([{"text": "which unit?", "label": label}], QA)


def test_the_pool_of_questions_holds_no_answer(tmp_path):
    rows = [{"text": text, "label": [text[:5], text[:3]]} for text in texts(40)]
    prepared = prepare(tmp_path, rows, QA)
    write_source(prepared, tmp_path / "out")
    assert not {"label", "answers", "rationale"} & set(read_split(tmp_path / "out", "pool"))
    assert read_split(tmp_path / "out", "pool_labels")["answers"].notna().all()
    assert read_split(tmp_path / "out", "train")["answers"].str.contains(" | ", regex=False).all()


# ------------------------------------------------------------------------------------------------ cleaning


def test_punctuation_goes_and_letters_of_all_scripts_stay():
    assert without_punctuation("Up 5.2 % - says «Firma_X», (Q3)!") == "Up 5 2 says Firma X Q3"
    hindi = "\u0939\u093f\u0928\u094d\u0926\u0940"  # vowel signs are marks, no letters
    assert without_punctuation(f"{hindi}, café; 日本。") == f"{hindi} café 日本"


def test_a_source_may_lose_its_punctuation(tmp_path):
    rows = [row | {"text": f"“{row['text']}” – no. {i}!"} for i, row in enumerate(records())]
    plain, bare = prepare(tmp_path, rows), prepare(tmp_path, rows, remove_punctuation=True)
    assert plain.rows["text"][0].startswith("“") and bare.rows["text"][0] == f"{records()[0]['text']} no 0"
    with pytest.raises(UserError, match="empty"):
        prepare(tmp_path, [row | {"text": "?!"} for row in rows], remove_punctuation=True)


def test_clean_by_hand():
    assert normalize_text("  Cafe\u0301\u00a0opened \n\t today ") == "Café opened today"


@given(st.text())
def test_clean_twice_is_clean_once(text):
    once = normalize_text(text)
    assert normalize_text(once) == once
    assert once == once.strip()


def change(index: int, **values) -> list[dict]:
    """Good rows with one of them changed; `...` takes a key away."""
    rows = records()
    rows[index] = {k: v for k, v in (rows[index] | values).items() if v is not ...}
    return rows


WRONG_ROWS = [  # rows, what the line says after the file
    (change(4, label="sideways"), ", line 5: unknown label 'sideways'; allowed: up, down"),
    (change(4, label=2), ", line 5: unknown label '2'; allowed: up, down"),
    (change(4, label=None), ", line 5: `label` is empty; allowed: up, down"),
    (change(4, label=...), ", line 5: `label` is empty; allowed: up, down"),
    (
        change(4, label=["up", "down"]),
        ", line 5: `label` must be one label, not a list (['up', 'down']); allowed: ",
    ),
    (change(4, label={"up": 1}), ", line 5: `label` must be one label, not an object ({'up': 1}); allowed: up, down"),
    (change(4, label=[]), ", line 5: `label` is empty; allowed: up, down"),
    (change(4, label=True), ", line 5: unknown label 'true'; allowed: up, down"),
    (change(0, text="")[:10], ", line 1: `text` is empty; every row needs a text, and 1 of 10 have none (max_empty: "),
    (change(0, text=" \u200b\n")[:10], ", line 1: `text` is empty; every row needs a text"),
    (change(0, text=None)[:10], ", line 1: `text` is empty; every row needs a text"),
    (change(0, text=...)[:10], ", line 1: `text` is empty; every row needs a text"),
    (change(0, text=12.5), ", line 1: `text` must be text, not a number (12.5)"),
    (change(0, text={"en": "a"}), ", line 1: `text` must be text, not an object ({'en': 'a'})"),
    (change(3, rationale=7), ", line 4: `rationale` must be text, not a number (7)"),
    (change(3, id="x1"), ", line 4: the id 'x1' is already that of line 2"),
    (change(3, id=None), ", line 4: `id` is empty; every row needs an id of its own (or none has one)"),
    (change(3, id=0.5), ", line 4: `id` must be text or a whole number, not a number (0.5)"),
    (change(3, group=[1]), ", line 4: `group` must be text or a whole number, not a list ([1])"),
    ([{"sentence": "a", "label": "up"}], ": no column `text` for the text; there are: `sentence`, `label`"),
    ([{"text;label": "a;up"}], ": no column `text` for the text; there are: `text;label`"),
    ([{"text": "a", "labels": "up"}], ": no column `label` for the label; there are: `text`, `labels`"),
    (
        [row | {"label": "up"} for row in records()] + change(0, id="y", text="one more", label="down")[:1],
        ": label `down` has 1 group(s) of rows (rows that belong together count once), too few to split: needs 3, "
        "one each for train, validation, test",
    ),
    ([row | {"label": "up"} for row in records()], ": label `down` has 0 group(s) of rows"),
    ([row | {"group": "one"} for row in records()], ": label `up` has 1 group(s) of rows"),
]


@pytest.mark.parametrize(("rows", "line"), WRONG_ROWS, ids=[line[:60] for _, line in WRONG_ROWS])
def test_wrong_rows_are_reported_in_one_line(tmp_path, rows, line):
    with pytest.raises(UserError) as caught:
        prepare(tmp_path, rows)
    assert str(caught.value).startswith(f"a.jsonl{line}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("role", ["id", "group", "rationale"])
def test_a_column_that_params_name_must_be_there(tmp_path, role):
    with pytest.raises(UserError, match=rf"^a.jsonl: no column `no` for the {role}; there are: `id`, `text`, `label`$"):
        prepare(tmp_path, records(), columns=ColumnNames(**{role: "no"}))


def test_column_names_whole_numbers_and_other_columns(tmp_path):
    task = Task(kind="classification", labels={"1": "rises", "0": "falls"})
    rows = [
        {"key": i, "sentence": text, "y": i % 2, "topic": {"a": i}, "code": ["zero", "one"][i % 2], "label": "secret"}
        for i, text in enumerate(texts(24))
    ]
    prepared = prepare(tmp_path, rows, task, columns=ColumnNames(id="key", text="sentence", label="y"))
    assert list(prepared.rows["label"][:2]) == ["0", "1"]
    assert list(prepared.rows["id"][:2]) == ["0", "1"]
    assert prepared.rows["topic"][1] == '{"a": 1}'
    # a second column named `label` is dropped; one that reveals the label does not get into the pool
    assert prepared.audit["columns_left_out"] == ["label"]
    assert prepared.audit["columns_left_out_of_pool"] == ["code"]
    write_source(prepared, tmp_path / "out")
    assert list(read_split(tmp_path / "out", "pool")) == ["id", "text", "group", "topic"]
    assert list(read_split(tmp_path / "out", "train")) == [*ROW_COLUMNS, "topic", "code"]


def test_duplicates_are_dropped_and_counted_and_missing_ids_are_numbered(tmp_path):
    rows = [{"text": row["text"], "label": row["label"]} for row in records()]
    copied = {"text": f"  {rows[0]['text'].replace(' ', '  ')}\n", "label": rows[0]["label"]}
    other_label = {"text": rows[0]["text"], "label": "down"}
    prepared = prepare(tmp_path, [*rows, copied, "", other_label])
    assert prepared.audit["dropped"] == {"blank": 1, "not_kept": 0, "empty": 0, "duplicates": 1, "over_limit": 0}
    assert list(prepared.rows["id"]) == [*(f"r{i:06d}" for i in range(1, 25)), "r000027"]  # the number of the line
    assert prepared.rows["group"].iloc[-1] == prepared.rows["group"].iloc[0]
    assert prepared.audit["label_conflicts"]["pairs"] == prepared.audit["label_conflicts"]["identical_texts"] == 1


def test_a_dropped_duplicate_leaves_its_group_behind(tmp_path):
    """Rows 0 and 1 are of one event, rows 2 and 3 of another; a copy of row 0 names the second."""
    rows = [row | {"group": None} for row in records()]
    for i, group in enumerate(["one", "one", "two", "two"]):
        rows[i]["group"] = group
    groups = prepare(tmp_path, rows).rows["group"]
    assert [len(set(groups[:2])), len(set(groups[:4]))] == [1, 2]
    groups = prepare(tmp_path, [*rows, rows[0] | {"id": "copy", "group": "two"}]).rows["group"]
    assert set(groups[:4]) == {"one"}


def test_a_group_may_be_called_like_an_id(tmp_path):
    rows = records()
    rows[0]["group"] = "x5"
    groups = prepare(tmp_path, rows).rows["group"]
    assert groups[0] == "x5"
    assert groups.nunique() == len(rows)


# ---------------------------------------------------------------------------------------------- similarity


def test_similarity_by_hand():
    # " up " and " on " are one run of four characters each; "up" and "up on" share one of one and two: 1/sqrt(2)
    similarity, nearest = nearest_texts(["up", "up on", "xx"], ["down", "up on"])
    assert similarity == pytest.approx([1 / math.sqrt(2), 1, 0], abs=1e-6)
    assert list(nearest[:2]) == [1, 1]
    # " abc" and "abc " against " abc" and "abcd", "bcd ": one in common, norms sqrt(2) and sqrt(3)
    assert nearest_texts(["abc"], ["abcd"])[0] == pytest.approx([1 / math.sqrt(6)], abs=1e-6)


def test_similarity_with_and_without_digits():
    left, right = ["Sales of 1,204.5 units"], ["Sales of 87 units"]
    assert mask_digits(left[0]) == mask_digits(right[0]) == "Sales of 0 units"
    assert nearest_texts(left, right)[0] == pytest.approx([1], abs=1e-6)
    assert nearest_texts(left, right, masked=False)[0][0] < 0.85


def test_nothing_to_compare_to():
    assert [list(array) for array in nearest_texts(["a"], [])] == [[0], [-1]]
    assert [list(array) for array in nearest_texts([], ["a"])] == [[], []]


@settings(max_examples=40)
@given(st.lists(st.text("ab 1", min_size=1).filter(str.strip), min_size=1, max_size=12), st.floats(0.3, 1))
def test_blocks_do_not_change_the_result(lines, threshold):
    """Pairs found block by block are those of the whole matrix, and clusters are its connected parts."""
    vectors = ngram_vectors(lines, True).toarray().astype(float)
    whole = vectors @ vectors.T
    n = len(lines)
    expected = {(i, j) for i in range(n) for j in range(i + 1, n) if whole[i, j] >= threshold - SIMILARITY_SLACK}
    margin = np.abs(whole - (threshold - SIMILARITY_SLACK)).min()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distillery.data.near_duplicates.MAX_SIMILARITIES", 2 * n)  # two rows at a time
        pairs, unmasked = (
            [
                (int(a), int(b))
                for i, j, _ in similar_pairs(ngram_vectors(lines, masked), threshold)
                for a, b in zip(i, j, strict=True)
            ]
            for masked in (True, False)
        )
        cluster = cluster_near_duplicates(lines, threshold)
    if margin > 1e-6:  # else float32 may fall on either side
        assert set(pairs) == expected
    assert len(pairs) == len(set(pairs))
    component = list(range(n))
    for _ in range(n):  # the smallest number of a neighbour, until no number changes
        for i, j in (*pairs, *unmasked):
            component[i] = component[j] = min(component[i], component[j])
    assert [list(cluster).index(c) for c in cluster] == component


def test_planted_near_duplicates_stay_together(tmp_path):
    """Rows that differ in numbers, in case or in one short word get one group, and so does a chain of them."""
    a = "Operating profit of the Talvikoski group rose to EUR 12.4 mn in the first quarter of the financial year"
    twins = [a, a.replace("12.4", "9"), a.upper(), a.replace(" in the", " during"), a.replace("rose", "fell")]
    other = "Operating profit is what remains of sales once running costs have been paid"
    rows = records() + [
        {"id": f"twin{i}", "text": text, "label": "up" if i < 4 else "down"} for i, text in enumerate([*twins, other])
    ]
    prepared = prepare(tmp_path, rows)
    groups = prepared.rows.set_index("id")["group"]
    assert len({groups[f"twin{i}"] for i in range(5)}) == 1
    assert groups["twin5"] == "twin5"
    assert prepared.audit["clusters"]["near_duplicate_clusters"] == 1
    assert prepared.audit["clusters"]["largest_cluster"] == 5
    assert prepared.audit["label_conflicts"]["pairs"] == 4
    assert {row["id"] for pair in prepared.audit["label_conflicts"]["examples"] for row in pair["rows"]} == {
        f"twin{i}" for i in range(5)
    }


# ----------------------------------------------------------------------------------------------- splitting


@st.composite
def grouped(draw):
    """Groups and labels per row, with groups of several rows and labels, and shares."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=30, max_size=60))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    groups = np.repeat([f"g{i}" for i in range(len(sizes))], sizes)
    labels = rng.choice(["up", "down", "rest"], len(groups), p=[0.5, 0.3, 0.2])
    raw = draw(st.lists(st.integers(1, 5), min_size=4, max_size=4)) if draw(st.booleans()) else [4, 0, 1, 2]
    train, pool, validation, test = (value / sum(raw) for value in raw)
    return list(groups), list(labels), SplitShares(train=train, pool=pool, validation=validation, test=test)


@settings(max_examples=60)
@given(grouped(), st.integers(0, 5))
def test_split_properties(case, seed):
    groups, labels, shares = case
    names = ["up", "down", "rest"]
    split = split_groups(groups, labels, names, shares, seed)
    assert list(split) == list(split_groups(groups, labels, names, shares, seed))
    frame = pd.DataFrame({"group": groups, "label": labels, "split": split})
    assert set(split) <= set(SPLITS)
    assert (frame.groupby("group")["split"].nunique() == 1).all()
    for name in ("train", "validation", "test"):
        assert set(frame["label"][frame["split"] == name]) == set(names)
    for name in SPLITS:
        if getattr(shares, name) == 0:
            assert name not in set(split)
        for label, total in Counter(labels).items():
            n_rows = ((frame["split"] == name) & (frame["label"] == label)).sum()
            assert abs(n_rows - getattr(shares, name) * total) <= 6, (name, label)  # a group and a half of rows


def test_exact_shares_when_rows_stand_alone():
    labels = ["up"] * 200 + ["down"] * 100
    shares = SplitShares(train=0.15, pool=0.45, validation=0.10, test=0.30)
    split = split_groups(list(map(str, range(300))), labels, ["up", "down"], shares, 0)
    assert Counter(split[:200]) == {"train": 30, "pool": 90, "validation": 20, "test": 60}
    assert Counter(split[200:]) == {"train": 15, "pool": 45, "validation": 10, "test": 30}


def test_large_groups_are_spread_in_proportion():
    """100 pairs and 200 single rows: every split has its share of the pairs, not only of the rows."""
    groups = [f"pair{i // 2}" for i in range(200)] + [f"one{i}" for i in range(200)]
    labels = ["up", "down"] * 200
    shares = SplitShares(train=0.2, pool=0.4, validation=0.1, test=0.3)
    split = split_groups(groups, labels, ["up", "down"], shares, 0)
    pairs = Counter(split[:200:2])
    assert all(abs(pairs[name] - 100 * getattr(shares, name)) <= 1 for name in SPLITS)


def test_another_seed_is_another_split():
    labels = ["up", "down"] * 50
    splits = [tuple(split_groups(list(map(str, range(100))), labels, ["up", "down"], QUARTERS, s)) for s in (0, 1)]
    assert splits[0] != splits[1]


def test_labels_that_share_their_groups():
    """`rest` stands only beside `up`: whichever way the groups are drawn, all three labels must be everywhere."""
    groups = ["a", "a", "b", "b", "c", "c", "d", "e", "f"]
    labels = ["up", "rest"] * 3 + ["down"] * 3
    for seed in range(10):
        split = split_groups(groups, labels, ["up", "down", "rest"], QUARTERS, seed)
        for name in ("train", "validation", "test"):
            assert {label for label, s in zip(labels, split, strict=True) if s == name} == {"up", "down", "rest"}


def test_limit_takes_whole_groups(tmp_path):
    rows = [row | {"group": f"g{i // 3}"} for i, row in enumerate(records(90))]
    prepared = prepare(tmp_path, rows, limit=12)
    assert prepared.rows["group"].nunique() == 12
    assert (prepared.rows["group"].value_counts() == 3).all()
    assert prepared.audit["dropped"]["over_limit"] == 90 - 36
    assert list(prepare(tmp_path, rows, limit=12).rows["id"]) == list(prepared.rows["id"])
    assert list(prepare(tmp_path, rows, limit=12, seed=1).rows["id"]) != list(prepared.rows["id"])


# ------------------------------------------------------------------------------------------- audit and files


def test_the_audit_reports_planted_leaks(tmp_path):
    """Near-duplicates that are moved to different splits afterwards are reported, with digits masked."""
    prepared = prepare(tmp_path, records())
    assert prepared.audit["across_splits"]["digits_masked"]["pairs_above"] == 0
    rows, split = prepared.rows.copy(), prepared.split
    in_train, in_test = np.flatnonzero(split == "train")[0], np.flatnonzero(split == "test")[0]
    rows.loc[in_train, "text"] = "Net sales of the third quarter amounted to 412,500 euros after 398,100"
    rows.loc[in_test, "text"] = "Net sales of the third quarter amounted to 77 euros after 1,200,345"
    near = find_near_duplicates(list(rows["text"]), 0.85)
    masked = split_leaks(rows, split, near, masked=True)
    assert masked["pairs_above"] == 1
    assert masked["pairs_above_by_splits"] == {"train-test": 1}
    assert masked["worst"][0]["similarity"] == masked["nearest"]["highest"] == 1
    assert {row["id"] for row in masked["worst"][0]["rows"]} == {rows["id"][in_train], rows["id"][in_test]}
    written = split_leaks(rows, split, near, masked=False)
    assert written["pairs_above"] == 0
    assert 0.5 < written["nearest"]["highest"] < 0.85


def test_few_shot_examples_that_stand_in_the_data_are_named(tmp_path):
    prepared = prepare(tmp_path, records())
    shown = {name: prepared.rows["text"][prepared.split == name].iloc[0] for name in ("test", "pool")}
    shots = [{"text": text, "label": "up"} for text in ("Nothing like it stands anywhere", *shown.values())]
    task = Task.model_validate(TASK.model_dump() | {"few_shot": shots})
    findings = prepare(tmp_path, records(), task).audit["few_shot_near_duplicates"]
    assert [(f["few_shot"], f["split"], f["row"]["text"]) for f in findings] == [
        (2, "pool", shown["pool"]),
        (1, "test", shown["test"]),
    ]


def test_the_written_files(tmp_path):
    rows = [row | {"rationale": "because" if i % 3 else None, "n": i} for i, row in enumerate(records())]
    prepared = prepare(tmp_path, rows)
    write_source(prepared, tmp_path / "out")
    assert set(bytes_of(tmp_path / "out")) == FILES
    frames = {name: read_split(tmp_path / "out", name) for name in (*SPLITS, "pool_labels")}
    assert list(frames["pool"]) == ["id", "text", "group", "n"]
    assert list(frames["pool_labels"]) == ["id", "label", "rationale"]
    assert list(frames["pool_labels"]["id"]) == list(frames["pool"]["id"])
    for name in ("train", "validation", "test"):
        assert list(frames[name]) == [*ROW_COLUMNS, "n"]
    whole = pd.concat([frames[name] for name in SPLITS])
    assert sorted(whole["id"]) == sorted(row["id"] for row in rows)
    given_rows = {row["id"]: row for row in rows}
    for name in ("train", "validation", "test", "pool_labels"):
        for row in frames[name].to_dict("records"):
            assert (row["label"], row["rationale"]) == tuple(given_rows[row["id"]][k] for k in ("label", "rationale"))
    assert read_task(tmp_path / "out") == TASK
    assert list(json.loads((tmp_path / "out" / "task.json").read_text())["labels"]) == ["up", "down"]
    audit = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert {name: counts["rows"] for name, counts in audit["splits"].items()} == {p: len(frames[p]) for p in SPLITS}
    assert audit["lengths"]["all"]["words"] == {"mean": 4, "p5": 4, "p50": 4, "p95": 4, "max": 4}


def test_an_empty_pool_is_a_file_with_the_same_columns(tmp_path):
    prepared = prepare(tmp_path, records(), split=SplitShares(train=0.5, validation=0.25, test=0.25))
    write_source(prepared, tmp_path / "out")
    assert list(read_split(tmp_path / "out", "pool")) == ["id", "text", "group"]
    assert len(read_split(tmp_path / "out", "pool_labels")) == 0


def test_same_seed_same_bytes(tmp_path):
    for seed, name in ((0, "one"), (0, "two"), (1, "three")):
        write_source(prepare(tmp_path, records(), seed=seed), tmp_path / name)
    one, two, three = (bytes_of(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two
    assert one["train.parquet"] != three["train.parquet"]


def test_writing_replaces_the_folder(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stale.parquet").touch()
    write_source(prepare(tmp_path, records()), tmp_path / "out")
    assert set(bytes_of(tmp_path / "out")) == FILES


def test_a_full_disk_leaves_what_was_there(tmp_path):
    rows = [row | {"n": "x" * i} for i, row in enumerate(records(200))]
    write_source(prepare(tmp_path, rows), tmp_path / "out")
    before = bytes_of(tmp_path / "out")
    code = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_data import TASK, Path, source
from distillery.data.prepare import prepare_source
from distillery.data.storage import write_source
from distillery.errors import UserError
prepared = prepare_source("a", source("a.jsonl", seed=1), TASK, Path("."))
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_source(prepared, Path("out"))
except UserError as error:
    sys.exit(str(error))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "out: the disk is full; free some space and run again\n")
    assert bytes_of(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out"]


def test_reading_what_is_not_there(tmp_path):
    with pytest.raises(UserError, match="train.parquet: not there yet; run `dvc repro` first"):
        read_split(tmp_path, "train")


@pytest.fixture(scope="module")
def finance() -> PreparedSource:
    spec = load_params(ROOT / "params.yaml").data["finance"]
    return prepare_source("finance", spec, load_task(spec.task, ROOT / "tasks"), ROOT)


def test_the_real_corpus_is_split_without_leaks(finance):
    assert {name: counts["rows"] for name, counts in finance.audit["splits"].items()} == {
        "train": 303,
        "pool": 909,
        "validation": 202,
        "test": 606,
    }
    frame = finance.rows.assign(split=finance.split)
    assert (frame.groupby("group")["split"].nunique() == 1).all()
    lines = (ROOT / "data/corpora/finance.jsonl").read_text(encoding="utf-8").splitlines()
    own = frame["id"].map({row["id"]: row["group"] for row in map(json.loads, lines)})
    assert (frame.groupby(own)["split"].nunique() == 1).all()
    assert frame["style"].notna().all()
    for leaks in finance.audit["across_splits"].values():
        assert leaks["pairs_above"] == 0
        assert leaks["nearest"]["highest"] < 0.85
    assert finance.audit["few_shot_near_duplicates"] == []


def test_the_real_corpus_split_by_row_would_leak(finance):
    """The control of the test above: the same rows dealt out one by one do have twins across splits."""
    split = np.random.default_rng(0).permutation(finance.split)
    assert split_leaks(finance.rows, split, finance.near, masked=True)["pairs_above"] > 20


def test_the_corpora_are_as_their_page_states():
    page = (ROOT / "data/corpora/README.md").read_text(encoding="utf-8")
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if ".jsonl |" in line]
    assert sorted(file for file, *_ in table) == sorted(p.name for p in (ROOT / "data/corpora").glob("*.jsonl"))
    for file, count, groups, columns in table:
        raw = read_source(source(f"data/corpora/{file}"), ROOT)
        assert len(raw.rows) == len({row["id"] for row in raw.rows}) == int(count)
        assert len({row.get("group", row["id"]) for row in raw.rows}) == int(groups)
        assert all(list(row) == columns.split(", ") for row in raw.rows)
        for label, n in Counter(row.get("label") for row in raw.rows).items():
            assert label is None or f"| {label} | {n} |" in page


@pytest.mark.parametrize("damage", ["{", "[]", '{"features": {"label": {"_type": "ClassLabel"}}}'])
def test_a_damaged_folder_of_datasets_is_one_line(tmp_path, damage):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text('{"_data_files": []}')
    (tmp_path / "saved" / "dataset_info.json").write_text(damage)
    with pytest.raises(UserError, match="^saved: not a folder that `Dataset.save_to_disk` wrote, or damaged$"):
        read_dataset_folder("saved", tmp_path / "saved")
