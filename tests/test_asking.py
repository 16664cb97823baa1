"""Files of answers: asked row by row, continued after a stop, and read again as a teacher."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from ruamel.yaml import YAML

from distillery.cli import main
from distillery.config.load import validate_section
from distillery.config.schema import AnswerFilesConfig
from distillery.errors import UserError
from distillery.models.folders import model_folder
from distillery.tasks.schema import load_task
from distillery.teachers import asking, cache
from distillery.teachers.asking import AnswerRequest, open_requested, read_columns, read_request, write_answers
from distillery.teachers.file import FileTeacher, read_answer_files
from tiny import ROOT, load_benchmark

FILE = "data/answers/mine.yaml"
LABELS = ["positive", "neutral", "negative"]
COLUMNS = {"id": "id", "text": None, "probabilities": {label: f"probabilities.{label}" for label in LABELS}}


def gold_rows(n: int) -> pd.DataFrame:
    lines = (ROOT / "data/corpora/finance.jsonl").read_text(encoding="utf-8").splitlines()[:n]
    return pd.DataFrame([json.loads(line) for line in lines])[["id", "text"]]


@pytest.fixture
def request_file(tiny_models, tmp_path):
    """A folder with rows, their task and a request of a tiny model for its answers; the request as written."""
    rows = gold_rows(7)
    (tmp_path / "data/answers").mkdir(parents=True)
    (tmp_path / "tasks").mkdir()
    for task in ("finance-sentiment", "math", "commonsense"):
        shutil.copy(ROOT / f"tasks/{task}.yaml", tmp_path / f"tasks/{task}.yaml")
    rows[["id", "text"]].to_json(tmp_path / "data/rows.jsonl", orient="records", lines=True)
    request = {
        "source": "data/rows.jsonl",
        "task": "finance-sentiment",
        "models": {"tiny": {"folder": str(tiny_models / "tiny-llama")}},
        "teacher": {"kind": "lm", "model": "tiny", "few_shot": 1, "quantize": "int8", "batch_size": 2},
    }
    YAML().dump(request, tmp_path / FILE)
    return request


def read_answers(root, columns=COLUMNS, repeats="drop") -> FileTeacher:
    raw = {"files": ["data/answers/mine.jsonl"], "columns": columns, "repeats": repeats}
    spec = validate_section(AnswerFilesConfig, raw, "x")
    task = load_task("finance-sentiment", root / "tasks")
    return FileTeacher(read_answer_files(spec, task, root), task, "id")


def test_the_verb_takes_one_file_or_all(request_file, tmp_path, monkeypatch, capsys):
    (tmp_path / "dvc.yaml").touch()
    monkeypatch.chdir(tmp_path)
    shutil.copy(tmp_path / FILE, tmp_path / "data/answers/other.yaml")
    main(["answers", "other"])
    assert capsys.readouterr().out.splitlines()[-1] == "data/answers/other.jsonl"
    main(["answers"])
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("data")]
    assert printed == ["data/answers/mine.jsonl", "data/answers/other.jsonl"]
    with pytest.raises(SystemExit, match=r"error: .*data/answers/none.yaml: no such file"):
        main(["answers", "none"])


@pytest.mark.parametrize("stop", ["before a write", "within a write", "after a write"])
def test_answers_go_on_where_they_stopped_and_teach_as_the_model_would(request_file, tmp_path, monkeypatch, stop):
    monkeypatch.setattr(asking, "BLOCK", 4)
    insert, forward, batches = cache._insert_answers, asking.LabelModel.forward, []

    def counted(self, ids, **settings):
        batches.append(len(ids))
        return forward(self, ids, **settings)

    def stopped(connection, answered):
        if len(batches) < 2:  # the second batch of two rows is the one that is lost or kept
            return insert(connection, answered)
        if stop == "within a write":
            insert(connection, answered[:1])
        if stop == "after a write":
            insert(connection, answered)
            connection.commit()
        raise KeyboardInterrupt

    monkeypatch.setattr(asking.LabelModel, "forward", counted)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cache, "_insert_answers", stopped)
        write_answers(tmp_path, FILE)
    assert batches == [2, 2] and not (tmp_path / "data/answers/mine.jsonl").exists()
    kept = 4 if stop == "after a write" else 2
    batches.clear()
    path = write_answers(tmp_path, FILE)
    origin, lines = json.loads(path.with_suffix(".json").read_text()), path.read_text()
    assert batches == ([2, 1] if kept == 4 else [2, 2, 1])
    assert origin["rows"] == 7 and origin["computed_rows"] == 7 - kept
    assert origin["request"] == request_file and "{text}" in origin["prompt"]
    rows = gold_rows(7)
    model = open_requested(tmp_path, read_request(tmp_path, FILE))
    taught = read_answers(tmp_path).predict(rows)
    assert np.allclose(taught, model.predict(rows["text"].tolist()), atol=2e-3)
    assert np.allclose(taught.sum(1), 1)
    (tmp_path / cache.STORE_PATH).unlink()
    assert write_answers(tmp_path, FILE).read_text() == lines  # without a stop


def test_a_model_that_cannot_be_opened_is_a_mistake_in_the_request(request_file, tmp_path):
    YAML().dump(request_file | {"models": {"tiny": {"folder": "nowhere"}}}, tmp_path / FILE)
    with pytest.raises(UserError, match=f"^{FILE}: models.tiny.folder: nowhere holds no config.json"):
        write_answers(tmp_path, FILE)
    YAML().dump(request_file | {"teacher": request_file["teacher"] | {"max_length": 1}}, tmp_path / FILE)
    with pytest.raises(UserError, match=f"^{FILE}: teacher.max_length: "):
        write_answers(tmp_path, FILE)


def test_rationales_and_paraphrases_are_kept_beside_the_labels_and_read_again(request_file, tmp_path):
    YAML().dump(request_file | {"rationales": True, "paraphrases": 2, "max_new_tokens": 6}, tmp_path / FILE)
    path, rows = write_answers(tmp_path, FILE), gold_rows(7)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    ids = rows["id"].tolist()
    assert [line["id"] for line in lines] == ids + [f"{i}#{sample}" for sample in range(2) for i in ids]
    assert all(list(line) == ["id", "probabilities", "rationale"] for line in lines[:7])
    assert all(list(line) == ["id", "paraphrase", "probabilities"] for line in lines[7:])
    columns = COLUMNS | {"explanation": "rationale", "paraphrase": "paraphrase"}
    teacher = read_answers(tmp_path, columns, repeats="keep")  # a random model writes one sentence for all rows
    for sample in range(2):
        assert teacher.paraphrases(rows, sample) == [line["paraphrase"] for line in lines[7 * (sample + 1) :][:7]]
    assert teacher.paraphrases(rows, 2) == [""] * 7
    own = teacher.predict(pd.DataFrame({"id": [line["id"] for line in lines]}))
    assert np.allclose(own, [list(line["probabilities"].values()) for line in lines], atol=1e-3)
    labels = [LABELS[i] for i in own[:7].argmax(1)]
    assert teacher.explanations(rows, labels) == [line["rationale"] or None for line in lines[:7]]
    text = path.read_text()
    assert write_answers(tmp_path, FILE).read_text() == text  # from the store
    (tmp_path / cache.STORE_PATH).unlink()
    assert write_answers(tmp_path, FILE).read_text() == text


def test_only_the_rows_of_a_split_are_requested(request_file, tmp_path):
    shutil.copy(ROOT / "params.yaml", tmp_path / "params.yaml")
    (tmp_path / "data/corpora").symlink_to(ROOT / "data/corpora")
    whole = gold_rows(2020)
    whole.to_json(tmp_path / "data/rows.jsonl", orient="records", lines=True)
    request = request_file | {"rows": "finance/train"}
    YAML().dump(request, tmp_path / FILE)
    ids, texts = read_columns(tmp_path, FILE, read_request(tmp_path, FILE))
    assert len(ids) == len(set(ids)) == 303 and set(ids) < set(whole["id"])
    assert texts == whole.set_index("id")["text"][ids].tolist()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"text": "sentence"}, "data/answers/mine.yaml: data/rows.jsonl has no column `sentence`"),
        ({"source": "none.csv"}, "none.csv: no such file"),
        (
            {"teacher": {"kind": "lm", "model": "other"}},
            "data/answers/mine.yaml: teacher: must be a `kind: lm` with the `model` of `models`, without `finetune`",
        ),
        (
            {"teacher": {"kind": "lm", "model": "tiny", "calibrate": "batch"}},
            "data/answers/mine.yaml: teacher: `prompts`, `examples_from` and `calibrate` need gold rows or a pool",
        ),
        ({"lines": 3}, "data/answers/mine.yaml: lines: unknown key"),
        (
            {"rows": "finance"},
            "data/answers/mine.yaml: rows: `finance` must be `source/split` with split one of train,",
        ),
        ({"rows": "news/train"}, "data/answers/mine.yaml: rows: unknown source `news`; known: finance"),
        ({"task": "math"}, "tasks/math.yaml: `make answers` takes a task of `kind: classification`"),
        ({"task": "commonsense"}, "tasks/commonsense.yaml: `make answers` takes a task of `kind: classification`"),
    ],
)
def test_a_request_that_cannot_be_met_ends_in_one_line(request_file, tmp_path, change, line):
    YAML().dump(request_file | change, tmp_path / FILE)
    shutil.copy(ROOT / "params.yaml", tmp_path / "params.yaml")
    with pytest.raises(UserError) as caught:
        write_answers(tmp_path, FILE)
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize(
    ("row", "columns", "line"),
    [
        (
            [0.5, 0.5, 0.2],
            {},
            "data/answers/mine.jsonl, line 1: probabilities must be numbers from 0 to 1 that sum to 1",
        ),
        ([1.2, -0.2, 0.0], {}, "data/answers/mine.jsonl, line 1: probabilities must be numbers from 0 to 1"),
        (["high", 0, 0], {}, "data/answers/mine.jsonl, line 1: probabilities must be numbers from 0 to 1"),
        (
            [1.0, 0.0, 0.0],
            {"probabilities": {"up": "probabilities.positive"}},
            "params.yaml: teachers: answers.columns.probabilities names up; the labels are positive, neutral, negative",
        ),
    ],
)
def test_probabilities_that_are_none_are_named(request_file, tmp_path, row, columns, line):
    answer = {"id": "a", "probabilities": dict(zip(LABELS, row, strict=True))}
    (tmp_path / "data/answers/mine.jsonl").write_text(json.dumps(answer) + "\n")
    with pytest.raises(UserError) as caught:
        read_answers(tmp_path, COLUMNS | columns)
    assert str(caught.value).startswith(line)


def test_several_answers_to_a_row_are_averaged(request_file, tmp_path):
    lines = [[0.6, 0.4, 0.0], [0.2, 0.0, 0.8]]
    answers = [{"id": "n0", "probabilities": dict(zip(LABELS, row, strict=True))} for row in lines]
    (tmp_path / "data/answers/mine.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    teacher = read_answers(tmp_path)
    rows = gold_rows(1).assign(id="n0")
    assert teacher.predict(rows)[0].tolist() == pytest.approx([0.4, 0.2, 0.4])
    assert teacher.answers["label"].tolist() == ["positive", "negative"]


KEPT = sorted(path.with_suffix(".yaml") for path in (ROOT / "data/answers").glob("*.jsonl"))
every_kept = pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)


def kept_answers(path) -> tuple[AnswerRequest, list[str], list[str], dict[str, dict[str, float]]]:
    """The request in `path`, the ids and texts of its rows, and the kept probabilities by id."""
    file = path.relative_to(ROOT).as_posix()
    request = read_request(ROOT, file)
    lines = map(json.loads, path.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines())
    return request, *read_columns(ROOT, file, request), {line["id"]: line["probabilities"] for line in lines}


@every_kept
def test_kept_answers_are_those_that_were_requested(path):
    request, ids, _, answers = kept_answers(path)
    origin = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    paraphrases = [f"{row_id}#{sample}" for sample in range(request.paraphrases) for row_id in ids]
    assert list(answers) == ids + paraphrases and origin["rows"] == len(ids)
    assert {tuple(answer) for answer in answers.values()} == {tuple(origin["labels"])}
    assert all(abs(sum(answer.values()) - 1) < 1e-3 for answer in answers.values())
    assert origin["request"] == request.model_dump(exclude_defaults=True)


@every_kept
def test_kept_answers_are_those_of_their_model(path):
    request, ids, texts, answers = kept_answers(path)
    ((name, spec),) = request.models.items()
    if not model_folder(name, spec).exists():
        pytest.skip(f"{name} is not fetched here; `make answers` fetches it")
    step = len(ids) // 4
    probabilities = open_requested(ROOT, request).predict(texts[::step])
    kept = [list(answers[row_id].values()) for row_id in ids[::step]]
    assert np.allclose(probabilities, kept, atol=0.1)


def test_how_far_a_paraphrase_moves_the_model():
    """`benchmarks/paraphrases.py` on three paraphrases: one is fine, one has another number, one another label."""
    texts = {"a": "Sales of the mill rose to EUR 5 mn.", "b": "The board will meet on 4 May in Turku."}
    records = [
        {"id": "a", "probabilities": {"positive": 0.7, "neutral": 0.2, "negative": 0.1}},
        {"id": "b", "probabilities": {"positive": 0.3, "neutral": 0.6, "negative": 0.1}},
        {"id": "a#0", "probabilities": {"positive": 0.6, "neutral": 0.3, "negative": 0.1}},
        {"id": "a#1", "probabilities": {"positive": 0.7, "neutral": 0.1, "negative": 0.2}},
        {"id": "b#0", "probabilities": {"positive": 0.5, "neutral": 0.4, "negative": 0.1}},
    ]
    reworded = [None, None, "The mill's sales went up, to EUR 5 mn.", "The mill sold more than EUR 6 mn, a rise.",
                "On 4 May, Turku will host a meeting of directors."]  # fmt: skip
    answers = pd.DataFrame(records).assign(paraphrase=reworded)
    table = load_benchmark("paraphrases").paraphrase_table(answers, texts, load_task("finance-sentiment"))
    assert table["source_text"].tolist() == [texts["a"], texts["a"], texts["b"]]
    assert table["reason"].tolist() == ["kept", "numbers changed", "label changed"]
    assert table["variation"].tolist() == pytest.approx([0.1, 0.1, 0.2])
    assert table["numbers"].tolist() == [True, False, True] and table["same_label"].tolist() == [True, True, False]
