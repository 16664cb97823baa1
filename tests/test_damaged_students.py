"""A student's folder with a file that is damaged or belongs to another student: one line each, whoever reads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deployed import rows, write_student
from distillery.cli import main
from distillery.config.schema.evaluate import EvaluateConfig
from distillery.deploy.export import compare_exports
from distillery.deploy.predictors import open_predictor, read_exports
from distillery.deploy.settings import read_settings
from distillery.errors import UserError
from distillery.files import write_json

EXPORTS, SETTINGS, INT8, FLOAT32 = "onnx/exports.json", "inference.json", "onnx/model_int8.onnx", "onnx/model.onnx"
CONFIG = EvaluateConfig(headline="s", bootstrap=100, throughput_rows=2, export_tolerance=1.0)


def write_graph(
    path: Path, labels: int = 3, name="input_ids", kind=TensorProto.INT64, shape=("rows", "tokens")
) -> None:
    """The mean of a vector for each token, in place of what torch takes half a minute to export."""
    vectors = numpy_helper.from_array(
        np.random.default_rng(0).normal(size=(20_000, labels)).astype(np.float32), "vectors"
    )
    axis = numpy_helper.from_array(np.array([1]), "axis")
    whole = helper.make_node("Cast", [name], ["ids"], to=TensorProto.INT64)
    nodes = [whole, helper.make_node("Gather", ["vectors", "ids"], ["tokens"])]
    nodes += [helper.make_node("ReduceMean", ["tokens", "axis"], ["logits"], keepdims=0)]
    inputs = [helper.make_tensor_value_info(name, kind, shape)]
    output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["rows", labels])
    graph = helper.make_graph(nodes, "g", inputs, [output], [vectors, axis])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(path))


@pytest.fixture(scope="module")
def folder(tiny_models, tmp_path_factory):
    """The model folder of a classifier that predicts by an ONNX file."""
    path = tmp_path_factory.mktemp("student") / "model"
    settings = write_student(tiny_models / "tiny-bert", path)
    (path / "onnx").mkdir()
    for file in (INT8, FLOAT32):
        write_graph(path / file)
    compare_exports(path, settings, rows(20), CONFIG)
    assert open_predictor(path, settings, threads=1).engine == "onnx-int8"
    return path


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "model")


def predict(copy: Path, engine: str = "auto") -> str:
    """The line with which `distillery predict` ends, and no file that it left."""
    rows(8).to_csv(copy.parent / "i.csv", index=False)
    files = ["--input", str(copy.parent / "i.csv"), "--output", str(copy.parent / "o.csv"), "--engine", engine]
    with pytest.raises(SystemExit) as stop:
        main(["predict", str(copy), "--threads", "1", *files])
    assert sorted(path.name for path in copy.parent.iterdir()) == ["i.csv", "model"]
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
    return stop.value.code


NOT_JSON = [b"", b"{", b'{"weights": "a', b"\xff\xfe", b"[" * 100_000]
OTHER_JSON = [b"[]", b"[1]", b'"text"', b"3", b"null"]


@pytest.mark.parametrize(
    "name, way_out", [(EXPORTS, "delete the folder onnx"), (SETTINGS, "copy the student's folder")]
)
def test_what_is_no_object_is_one_line(copy, name, way_out):
    for content, problem in [(c, "no JSON") for c in NOT_JSON] + [
        (c, "section of keys and values") for c in OTHER_JSON
    ]:
        (copy / name).write_bytes(content)
        line = predict(copy)
        assert line.startswith(f"error: {copy / name}: ") and problem in line and way_out in line


def paths_of(value, path=()):
    """Every key below `value`, as a path."""
    for key in value if isinstance(value, dict) else []:
        yield (*path, key)
        yield from paths_of(value[key], (*path, key))


def changed(content: dict, path: tuple, change) -> dict:
    """A copy of `content` in which `change` was done to the section and the key at the end of `path`."""
    content = json.loads(json.dumps(content))
    section = content
    for key in path[:-1]:
        section = section[key]
    change(section, path[-1])
    return content


def test_every_key_of_exports_that_is_missing_or_of_another_type_is_one_line(copy):
    whole = json.loads((copy / EXPORTS).read_text())
    optional = {("torch_rows_per_second",), *((("exports", name, "rows_per_second")) for name in whole["exports"])}
    optional |= {("exports", name) for name in whole["exports"]}
    paths = list(paths_of(whole))
    assert len(paths) == 27
    for path in paths:
        for value in ([], "text", {"a": None}):
            write_json(
                copy / EXPORTS, changed(whole, path, lambda section, key, value=value: section.update({key: value}))
            )
            if isinstance(value, str) and path[-1] in ("weights", "file"):
                continue
            with pytest.raises(UserError, match=f"exports.json: {'.'.join(path)}.*run `distillery export` again"):
                read_exports(copy)
        write_json(copy / EXPORTS, changed(whole, path, lambda section, key: section.pop(key)))
        if path not in optional:
            with pytest.raises(UserError, match=f"exports.json: {'.'.join(path)}: missing; run `distillery export`"):
                read_exports(copy)


@pytest.mark.parametrize(
    "change, line",
    [
        ({"temperature": 0}, "temperature: must be greater than 0, not 0"),
        ({"temperature": "1"}, "temperature: must be a number"),
        ({"max_length": 0}, "max_length: "),
        ({"text_columns": []}, "text_columns: "),
        ({"task": []}, "task: must be a section of keys and values"),
        ({"thresholds": [0.5]}, "`thresholds` has 1 values; this task has 0"),
        ({"other": 1}, "other: unknown key"),
        ({"student": None}, "student: must be text"),
    ],
)
def test_settings_that_say_what_cannot_be_are_one_line(copy, change, line):
    write_json(copy / SETTINGS, json.loads((copy / SETTINGS).read_text()) | change)
    assert line in predict(copy)


@pytest.mark.parametrize("engine", ["auto", "torch", "onnx-float32"])
@pytest.mark.parametrize("labels", [["up", "down"], ["a", "b", "c"], ["negative", "neutral", "positive"]])
def test_settings_of_another_student_are_one_line(copy, engine, labels):
    """Torch would draw a head anew for labels that the model does not have."""
    content = json.loads((copy / SETTINGS).read_text())
    content["task"] |= {"labels": dict.fromkeys(labels, "x"), "few_shot": [], "verbalizer": {}}
    write_json(copy / SETTINGS, content)
    line = predict(copy, engine)
    assert f"has the labels {', '.join(labels)}, but the model beside it gives: positive, neutral, negative" in line


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\x00" * 64, b"version https://git-lfs.github.com/spec/v1\noid sha256:0"]
)
@pytest.mark.parametrize("engine, name", [("auto", INT8), ("onnx-float32", FLOAT32)])
def test_an_onnx_file_that_is_none_is_one_line(copy, engine, name, content):
    (copy / name).write_bytes(content)
    line = predict(copy, engine)
    assert line.startswith(f"error: {copy / name}: cannot be loaded: ")
    assert line.endswith("run `distillery export` again, or delete the folder onnx to use torch")


def test_an_onnx_file_that_is_cut_or_missing_is_one_line(copy):
    whole = (copy / INT8).read_bytes()
    (copy / INT8).write_bytes(whole[: len(whole) // 2])
    assert f"{INT8}: cannot be loaded: " in predict(copy)
    (copy / INT8).unlink()
    assert f"{INT8}: cannot be loaded: " in predict(copy)
    shutil.rmtree(copy / "onnx")
    assert open_predictor(copy, read_settings(copy), threads=1).engine == "torch"  # the way out


@pytest.mark.parametrize(
    "change, line",
    [
        ({"name": "x"}, "not the export of a classifier with 3 labels"),
        ({"kind": TensorProto.FLOAT}, "not the export of a classifier with 3 labels"),
        ({"labels": 4}, "not the export of a classifier with 3 labels"),
        ({"shape": ("rows", 7)}, "cannot compute: "),
    ],
)
def test_a_graph_of_something_else_is_one_line(copy, change, line):
    write_graph(copy / INT8, **change)
    assert f"{INT8}: {line}" in predict(copy)


def test_a_damaged_tokenizer_or_config_is_one_line(copy):
    for name, line in (("tokenizer.json", "cannot be read: "), ("config.json", "cannot be read: ")):
        whole = (copy / name).read_bytes()
        (copy / name).write_bytes(whole[: len(whole) // 2])
        assert predict(copy).startswith(f"error: {copy / name}: {line}")
        (copy / name).write_bytes(whole)
