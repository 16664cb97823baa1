"""Sources with test rows alone (a benchmark) or a pool alone: read, audited, scored, and refused in one line."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from distillery.config.effects import unused_settings
from distillery.config.load import load_params, validate_section
from distillery.config.schema import ModelConfig, OwnSplits, Params, RowFilter
from distillery.data.overlaps import add_overlaps, prepare_without_leaks
from distillery.data.prepare import PreparedSource, prepare_source
from distillery.data.storage import read_split, write_source
from distillery.errors import UserError
from distillery.evaluation.checks import find_leaks
from distillery.evaluation.further_sources import add_further_sources
from distillery.evaluation.gather import gather_results
from distillery.evaluation.leaderboard import leaderboard
from distillery.evaluation.slices import slice_scores
from distillery.evaluation.speed import Measurements
from distillery.models.save import save_model
from distillery.notebook.data import overlap_pairs, overlap_sentence
from distillery.pipeline.inputs import StageTables, student_rows, write_teacher_records
from distillery.pipeline.plan.rows import read_source_rows
from distillery.pipeline.strip import write_sources
from distillery.report.page import leaderboard_markdown, write_report
from distillery.tasks.schema import load_task
from distillery.teachers.asking import AnswerRequest, read_columns
from distillery.training.student import build_student, load_student
from experiments import changed, load
from experiments import prepare as prepare_folder
from report_project import experiment, prediction_table, write_file, write_project

# ------------------------------------------------------------------------------------------------- reading and auditing


def write_rows(path: Path, texts: list[str], labels: list[str] | None = None) -> list[str]:
    """Write a CSV file with a text and, unless `labels` is empty, a label in each row; the texts."""
    labels = ["up", "down", "flat"] if labels is None else labels
    rows = {"text": texts} | ({"label": [labels[i % len(labels)] for i in range(len(texts))]} if labels else {})
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(path, index=False)
    return texts


def texts(seed: int, n: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join("".join(rng.choice(list("abcdefghijklmnop"), 7)) for _ in range(9)) for _ in range(n)]


def three_sources(folder: Path, bench: list[str], **settings: Any) -> Params:
    """An experiment of a source in one file, a benchmark and a pool; `settings` are those of the benchmark."""
    spec = experiment()
    write_rows(folder / "data/demo.csv", texts(0, 90))
    write_rows(folder / "data/bench.csv", bench)
    write_rows(folder / "data/news.csv", texts(2, 20), labels=[])
    spec["data"]["demo"]["source"] = "data/demo.csv"
    spec["data"]["bench"] = {"splits": {"test": "data/bench.csv"}, "task": "demo"} | settings
    spec["data"]["news"] = {"splits": {"pool": "data/news.csv"}, "task": "demo"}
    (folder / "tasks").mkdir(exist_ok=True)
    (folder / "tasks/demo.yaml").write_text("kind: classification\nlabels: {up: a, flat: b, down: c}\n")
    (folder / "dvc.yaml").touch()
    (folder / "params.yaml").write_text(json.dumps(spec))
    return load_params(folder / "params.yaml")


def prepare(folder: Path, params: Params, source: str) -> PreparedSource:
    task = load_task("demo", folder / "tasks")
    return add_overlaps(prepare_without_leaks(source, params, task, folder), source, params, folder)


def test_a_benchmark_is_all_test_and_a_pool_without_labels_all_pool(tmp_path):
    params = three_sources(tmp_path, texts(1, 15))
    for source, split, n in (("bench", "test", 15), ("news", "pool", 20)):
        prepared = prepare(tmp_path, params, source)
        assert set(prepared.split) == {split} and len(prepared.split) == n
        assert not [line for line in prepared.audit["decisions"] if "validation" in line]
        write_source(prepared, tmp_path / "out" / source)
        assert len(read_split(tmp_path / "out" / source, split)) == n
    assert read_split(tmp_path / "out/news", "pool_labels")["label"].isna().all()
    assert list(read_split(tmp_path / "out/bench", "test")["label"][:3]) == ["up", "down", "flat"]


def test_a_pool_whose_label_column_is_named_must_have_it(tmp_path):
    params = three_sources(tmp_path, texts(1, 15))
    named = params.data["news"].model_copy(update={"columns": type(params.data["news"].columns)(label="mood")})
    with pytest.raises(UserError, match="no column `mood` for the label; there are: `text`"):
        prepare_source("news", named, load_task("demo", tmp_path / "tasks"), tmp_path)


def test_a_file_with_a_column_of_splits_may_hold_test_rows_alone(tmp_path):
    params = three_sources(tmp_path, [], splits=None, source="data/bench.csv", split_column="part")
    rows = pd.DataFrame({"text": texts(1, 9), "label": "up", "part": "test"})
    rows.to_csv(tmp_path / "data/bench.csv", index=False)
    assert set(prepare(tmp_path, params, "bench").split) == {"test"}
    rows.assign(part="train").to_csv(tmp_path / "data/bench.csv", index=False)
    with pytest.raises(UserError, match=r"^data/bench.csv: no row is in the split `test`$"):
        prepare(tmp_path, params, "bench")


def test_test_rows_of_a_benchmark_among_the_rows_of_another_source_are_counted_and_named(tmp_path):
    learned, alone = texts(0, 90), texts(1, 12)
    params = three_sources(tmp_path, [*alone, *learned])
    demo = prepare(tmp_path, params, "demo")
    used = demo.rows[demo.split != "test"]
    copied, long = used["text"].tolist()[:4], used["text"].tolist()[5] + " now"
    params = three_sources(tmp_path, [*alone, *copied, long])
    audit = prepare(tmp_path, params, "demo").audit["test_rows_of_others"]
    assert list(audit) == ["bench"]
    assert {key: audit["bench"][key] for key in ("test_rows", "same", "near")} == {
        "test_rows": 17,
        "same": 4,
        "near": 1,
    }
    shown = overlap_pairs(audit)
    assert [*shown["text"][shown["source"] == "bench"]] == [*copied, long]
    assert [*shown["text"][shown["source"] == "here"]] == [*copied, long.removesuffix(" now")]
    assert set(shown["split"][shown["source"] == "here"]) <= {"train", "pool", "validation"}
    assert "**5 of the 17 test rows of bench** are also here (4 the same, 1 nearly)" in overlap_sentence(audit)
    clean = prepare(tmp_path, three_sources(tmp_path, alone), "demo").audit["test_rows_of_others"]
    assert overlap_sentence(clean) == "None of the 12 test rows of bench is here, and none nearly."
    assert overlap_pairs(clean).empty and overlap_pairs({}).empty
    assert "test_rows_of_others" not in prepare(tmp_path, params, "bench").audit  # no other names its test rows


@pytest.mark.parametrize("drop", [False, True])
def test_rows_of_a_pool_that_repeat_held_out_rows_of_another_source_are_left_out_of_the_training(tmp_path, drop):
    """Also where the other source draws its splits by shares: its rows stay."""
    params = three_sources(tmp_path, texts(1, 15))
    demo = prepare(tmp_path, params, "demo")
    parts = {
        split: demo.rows["text"][demo.split == split].tolist() for split in ("train", "pool", "validation", "test")
    }
    leaks = [parts["test"][0], parts["test"][1] + " now", parts["validation"][0], texts(1, 15)[3]]
    own = [*texts(3, 8), parts["train"][0], parts["pool"][0]]
    lines = [json.dumps({"text": text, "label": "up", "probabilities": {"up": 1.0}}) for text in [*leaks, *own]]
    (tmp_path / "data/news.jsonl").write_text("\n".join(lines))
    news = params.data["news"].model_copy(update={"splits": OwnSplits(pool="data/news.jsonl"), "drop_leaks": drop})
    params = params.model_copy(update={"data": params.data | {"news": news}})
    prepared = prepare(tmp_path, params, "news")
    assert prepared.rows["text"].tolist() == (own if drop else [*leaks, *own])
    assert prepared.audit["dropped"].get("leaks") == (4 if drop else None)
    sentence = "4 rows that repeat a validation or test row of another source were left out."
    assert (sentence in prepared.audit["decisions"]) == drop
    for source, part in (("demo", demo), ("bench", prepare(tmp_path, params, "bench")), ("news", prepared)):
        write_source(part, tmp_path / "data/processed" / source)
    again = prepare(tmp_path, params, "demo")
    assert again.rows.equals(demo.rows) and (again.split == demo.split).all()
    found = {
        source: [check.passed for check in find_leaks(tmp_path, params, source, read_split(tmp_path / folder, "test"))]
        for source, folder in (("demo", "data/processed/demo"), ("bench", "data/processed/bench"))
    }
    assert found == {"demo": [drop], "bench": [drop]}


def test_requests_and_plans_have_the_splits_of_the_stage(tmp_path):
    """Of a source whose leaks go before its splits are drawn."""
    leaks = texts(1, 9)
    three_sources(tmp_path, leaks)
    rows = pd.DataFrame({"text": [*leaks, *texts(5, 45)], "label": ["up", "down", "flat"] * 18})
    rows.reset_index(names="id").astype(str).to_csv(tmp_path / "data/demo.csv", index=False)
    spec = json.loads((tmp_path / "params.yaml").read_text())
    spec["data"]["demo"]["drop_leaks"] = True
    (tmp_path / "params.yaml").write_text(json.dumps(spec))
    params = load_params(tmp_path / "params.yaml")
    prepared = prepare(tmp_path, params, "demo")
    assert prepared.audit["dropped"]["leaks"] == 9
    planned = read_source_rows(tmp_path, "none", "demo", params)
    assert planned.texts["split"].tolist() == prepared.split.tolist()
    raw = {"source": "data/demo.csv", "task": "demo", "rows": "demo/train"}
    raw |= {"models": {"m": {"folder": "m"}}, "teacher": {"kind": "lm", "model": "m"}}
    request = validate_section(AnswerRequest, raw, "x")
    ids, _ = read_columns(tmp_path, "x", request)
    assert set(ids) == set(prepared.rows["id"][prepared.split == "train"])


def test_two_sources_with_drawn_splits_cannot_both_drop_leaks(tmp_path):
    three_sources(tmp_path, texts(1, 9))
    spec = json.loads((tmp_path / "params.yaml").read_text())
    for name in ("demo", "news"):
        spec["data"][name]["drop_leaks"] = True
    (tmp_path / "params.yaml").write_text(json.dumps(spec))
    message = r"params.yaml: data.news.drop_leaks: the splits of `demo` are drawn after its own `drop_leaks`"
    with pytest.raises(UserError, match=message):
        load_params(tmp_path / "params.yaml")
    del spec["data"]["demo"]["drop_leaks"]
    spec["data"]["bench"]["drop_leaks"] = True
    (tmp_path / "params.yaml").write_text(json.dumps(spec))
    assert load_params(tmp_path / "params.yaml").data["bench"].drop_leaks  # its splits are those of its file


def test_a_source_without_leaks_depends_on_the_rows_of_all_others_of_its_task(tmp_path):
    params = three_sources(tmp_path, texts(1, 9))
    news = params.data["news"].model_copy(update={"drop_leaks": True})
    write_sources(tmp_path, params.model_copy(update={"data": params.data | {"news": news}}))
    record = json.loads((tmp_path / "build/sources/news.json").read_text())
    assert set(record["tests_of_others"]) == {"demo", "bench"}


def test_a_filter_by_vectors_depends_on_the_encoder(tmp_path):
    """On its section and on what its folder holds; a source that is compared with the filtered one, too."""
    params = three_sources(tmp_path, texts(1, 9))
    folder = tmp_path / "encoder"
    folder.mkdir()
    row_filter = RowFilter(keywords=["a"], expand_keywords=2, expand_by="embeddings", embeddings="encoder")
    params = params.model_copy(
        update={
            "models": params.models | {"encoder": ModelConfig(folder=str(folder))},
            "data": params.data | {"bench": params.data["bench"].model_copy(update={"filter": row_filter})},
        }
    )

    def encoders(content: str) -> dict[str, Any]:
        (folder / "config.json").write_text(content)
        write_sources(tmp_path, params)
        files = (tmp_path / "build/sources").iterdir()
        return {path.stem: json.loads(path.read_text()).get("embeddings") for path in files}

    before, after = encoders("{}"), encoders("[]")
    assert before == encoders("{}") and before["bench"]["encoder"]["folder"] == str(folder)
    assert {name for name in before if before[name] != after[name]} == {"bench", "demo", "news"}
    write_sources(tmp_path, three_sources(tmp_path, texts(1, 9)))
    assert "embeddings" not in json.loads((tmp_path / "build/sources/bench.json").read_text())


def test_the_audit_of_a_source_depends_on_the_test_rows_of_the_others(tmp_path):
    def records(**settings: Any) -> dict[str, str]:
        write_sources(tmp_path, three_sources(tmp_path, bench, **settings))
        return {path.stem: path.read_text() for path in (tmp_path / "build/sources").iterdir()}

    bench = texts(1, 9)
    before = records()
    assert "tests_of_others" in before["demo"] and "tests_of_others" not in before["bench"]
    assert records() == before
    assert records(columns={"text": "text", "label": "label"})["demo"] == before["demo"]
    assert records(encoding="utf-8")["demo"] != before["demo"]
    bench = texts(1, 8)
    after = records()
    assert after["demo"] != before["demo"] and after["news"] != before["news"]


# --------------------------------------------------------------------------------------------------- mistakes, one line

BENCH = {"splits": {"test": "b.csv"}, "task": "mood"}
POOL = {"splits": {"pool": "p.jsonl"}, "task": "mood"}


@pytest.mark.parametrize(
    ("added", "data", "line"),
    [
        (
            BENCH,
            "extra/train",
            "`extra/train` is empty: data.extra holds test rows only; they score every student of its task, and none "
            "learns from it",
        ),
        (BENCH, "extra/test", "`extra/test` must be `source/split` with split one of train, pool, augmented"),
        (
            POOL,
            "extra/train",
            "`extra/train` is empty: data.extra holds rows without labels only: name `extra/pool`, and teachers for it",
        ),
        (POOL, "extra/pool", "`extra/pool`: no teacher labels these rows; see teachers.llm.data"),
        (
            {"splits": {"train": "t.csv", "test": "b.csv"}, "task": "mood"},
            "extra/pool",
            "`extra/pool` is empty: data.extra.splits has no `pool`",
        ),
    ],
)
def test_a_phase_that_names_rows_nobody_can_learn_from(tmp_path, added, data, line):
    folder = prepare_folder(tmp_path)
    raw = changed("data.extra", added)
    raw["students"]["kd"]["phases"][0]["data"] = [data]
    with pytest.raises(UserError) as caught:
        load(folder, raw)
    assert str(caught.value) == f"params.yaml: students.kd.phases.0.data: {line}"


def test_a_pool_alone_that_no_phase_names_is_pointed_out(tmp_path):
    folder = prepare_folder(tmp_path)
    raw = changed("data.extra", POOL)
    line = "data.extra: has no effect: it holds a pool alone, and no phase names `extra/pool`"
    assert line in unused_settings(load(folder, raw))
    raw["teachers"]["llm"]["data"].append("extra")
    raw["students"]["kd"]["phases"][0]["data"] = ["extra/pool"]
    params = load(folder, raw)
    assert line not in unused_settings(params)
    assert params.test_source("kd") == "news" and params.other_test_sources("kd") == ["bare"]


def test_a_split_without_rows_that_a_phase_or_a_teacher_names(tmp_path):
    spec = experiment()
    spec["students"]["tiny-gold"]["phases"][0]["data"] = ["demo/train"]
    params = write_project(tmp_path, spec)
    train = tmp_path / "data/processed/demo/train.parquet"
    read_split(train.parent, "train").head(0).to_parquet(train)
    with pytest.raises(UserError, match=r"^students.tiny-gold: `demo/train`, which a phase names, has no rows$"):
        student_rows(StageTables(tmp_path), params, "tiny-gold")
    spec["teachers"]["big"]["finetune"] = {"on": "demo/train", "steps": 1, "learning_rate": 1e-3}
    (tmp_path / "params.yaml").write_text(json.dumps(spec))
    with pytest.raises(UserError, match=r"^teachers.big: `demo/train`, which finetune.on names, has no rows$"):
        write_teacher_records(tmp_path, load_params(tmp_path / "params.yaml"))


def test_servers_of_a_teacher_in_place_of_the_vendor_change_its_record(tmp_path):
    """Which servers there are changes nothing; whether there are some, or one `base_url`, or the vendor's own, does."""
    spec = experiment()
    write_project(tmp_path, spec)
    for model in spec["models"]:
        write_file(tmp_path / f"build/models/{model}.json", "null")

    def record(**api) -> str:
        spec["teachers"]["far"] = {"kind": "api", "api": {"model": "m"} | api}
        (tmp_path / "params.yaml").write_text(json.dumps(spec))
        write_teacher_records(tmp_path, load_params(tmp_path / "params.yaml"))
        return (tmp_path / "build/teachers/far.json").read_text()

    one, two = {"base_url": "http://one/v1"}, {"base_url": "http://two/v1", "concurrency": 4}
    assert record(endpoints=[one]) == record(endpoints=[two, one])
    assert len({record(endpoints=[one]), record(**one), record()}) == 3


# -------------------------------------------------------------------------------------------------------------- scoring


@pytest.fixture(scope="module")
def scored(tmp_path_factory, tiny_models):
    """A project with a benchmark that no phase names, its students on disk, and its results."""
    folder = tmp_path_factory.mktemp("scored")
    spec = experiment(models={"small": {"folder": "small"}, "large": {"folder": "large"}}, seeds=[0, 1])
    spec["evaluate"]["bootstrap"] = 100
    write_project(folder, spec)
    train = read_split(folder / "data/processed/demo", "train")["text"].tolist()
    write_rows(folder / "data/bench.csv", [*texts(1, 23), train[3]], labels=["up", "flat"])
    spec["data"]["bench"] = {"splits": {"test": "data/bench.csv"}, "task": "demo"}
    (folder / "params.yaml").write_text(json.dumps(spec))
    params, task = load_params(folder / "params.yaml"), load_task("demo", folder / "tasks")
    write_source(prepare_source("bench", params.data["bench"], task, folder), folder / "data/processed/bench")
    bench = read_split(folder / "data/processed/bench", "test")
    signals = prediction_table(
        np.random.default_rng(0), bench, 0.9, task.names, split="test", source="bench", fold=-1, rationale=None
    )
    path = folder / "data/teacher/big/signals.parquet"
    pd.concat([pd.read_parquet(path), signals.rename(columns={"prediction": "label"})]).to_parquet(path)
    for name, student in params.students.items():
        for seed in params.seeds:
            model = build_student(student, tiny_models / "tiny-bert", task, seed=seed)
            save_model(model.model, model.tokenizer, folder / f"runs/{name}-{seed}/model")
    results = add_further_sources(folder, gather_results(folder, params))
    return folder, params, results, leaderboard(results).set_index("model")


def test_every_student_and_teacher_has_a_line_with_intervals_on_the_benchmark(scored):
    folder, params, results, board = scored
    on_bench = board[board["source"] == "bench"]
    assert set(on_bench.index) == {
        *(f"{name} on bench" for name in params.students),
        "big on bench",
        "always flat on bench",
    }
    assert board.loc["tiny-kd", "source"] == "demo" and results.headline.name == "tiny-kd"
    assert (on_bench["accuracy_low"] <= on_bench["accuracy"]).all() and on_bench["accuracy_high"].notna().all()
    assert on_bench.loc["tiny-kd on bench", "versus"] == "tiny-gold on bench"
    assert on_bench.loc["tiny-kd on bench", "teacher_versus"] == "big on bench"
    bench = results.tests["bench"]
    for seed, predictions in zip(params.seeds, results.find("other", "bench").predictions, strict=True):
        model = load_student(params.students["other"], folder / f"runs/other-{seed}/model", results.tasks["bench"])
        names = np.array(results.labels["bench"], dtype=object)
        assert (names[model.predict(bench["text"].tolist()).argmax(-1)] == predictions).all()


def test_the_report_has_a_table_for_each_source_and_names_the_leak(scored):
    folder, _, results, board = scored
    write_report(folder, results, board.reset_index(), Measurements(), slice_scores(results))
    page = (folder / "reports/index.html").read_text(encoding="utf-8")
    titles = re.findall(r"<h3>Test rows of (\w+)</h3>", page)
    assert titles == ["demo", "bench"]
    tables = re.findall(r'aria-label="Leaderboard of \w+">(.*?)</table>', page, flags=re.S)
    assert ["tiny-kd on bench" in table for table in tables] == [False, True]
    row_id = results.tests["bench"]["id"].iloc[-1]
    leak = f"1 of the 24 test rows of bench are also in demo/train (1 the same; the first is {row_id}), which tiny-kd,"
    assert [check for check in results.checks if not check.passed and check.text.startswith(leak)]
    assert leak in page
    markdown = leaderboard_markdown(board.reset_index())
    assert "On the test rows of bench:\n\n| model |" in markdown
    assert markdown.index("| tiny-kd on bench | student |") > markdown.index("On the test rows of bench:")
    summary = json.loads((folder / "reports/metrics.json").read_text())
    assert summary["accuracy"]["tiny-kd on bench"] == pytest.approx(board.loc["tiny-kd on bench", "accuracy"], abs=1e-6)


def test_an_experiment_with_one_source_has_nothing_to_add(scored):
    folder, params, results, _ = scored
    alone = params.model_copy(update={"data": {"demo": params.data["demo"]}})
    only = replace(results, params=alone)
    assert add_further_sources(folder, only) is only


def test_further_sources_can_be_left_out(scored):
    folder, params, _, _ = scored
    assert params.other_test_sources("tiny-kd") == ["bench"]
    evaluate = params.evaluate.model_copy(update={"further_sources": False})
    own = params.model_copy(update={"evaluate": evaluate})
    results = gather_results(folder, own)
    assert set(results.tests) == {"demo"} and add_further_sources(folder, results) is results
