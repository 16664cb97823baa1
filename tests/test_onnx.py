"""Exports of a classifier to ONNX: the same predictions, fewer bytes, no torch, and their lines on the leaderboard."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import report_project
import tiny
from deployed import LONG, TASK, rows, write_run, write_student
from distillery.cli import main
from distillery.config.load import load_params
from distillery.config.schema.evaluate import EvaluateConfig
from distillery.deploy import tables
from distillery.deploy.calibrate import write_settings
from distillery.deploy.export import compare_exports, compare_probabilities, write_exports
from distillery.deploy.exports import add_exports
from distillery.deploy.predict import PredictOptions, predict_file
from distillery.deploy.predictors import open_predictor, read_exports
from distillery.deploy.settings import read_settings
from distillery.errors import UserError
from distillery.evaluation.gather import gather_results
from distillery.evaluation.leaderboard import leaderboard
from distillery.evaluation.slices import slice_scores
from distillery.evaluation.speed import Measurements
from distillery.files import write_json
from distillery.label_sets import sets_of
from distillery.metrics import decide
from distillery.notebook.evaluate import comparison_table
from distillery.report.page import leaderboard_markdown, write_report

CONFIG = EvaluateConfig(headline="s", bootstrap=200, throughput_rows=4, export_tolerance=0.5)


@pytest.fixture(scope="module")
def folder(tiny_models, tmp_path_factory):
    """The model folder of a classifier with its exports."""
    path = tmp_path_factory.mktemp("student") / "model"
    settings = write_student(tiny_models / "tiny-bert", path)
    write_exports(path, settings)
    compare_exports(path, settings, rows(80), CONFIG)
    return path


def texts() -> list[str]:
    """Texts of all lengths, the longest of which is cut."""
    return [*(" ".join(text.split()) for text in rows(200)["text"]), LONG, "a"]


def test_float32_predicts_as_torch_does_and_int8_nearly(folder):
    settings = read_settings(folder)
    p = {engine: open_predictor(folder, settings, engine, 1).predict(texts()) for engine in ("torch", *EXPORTED)}
    assert len(set(p["torch"].argmax(1))) > 1
    assert (p["onnx-float32"].argmax(1) == p["torch"].argmax(1)).all()
    assert np.abs(p["onnx-float32"] - p["torch"]).max() <= 1e-4
    assert (p["onnx-int8"].argmax(1) == p["torch"].argmax(1)).mean() > 0.9
    assert 0 < np.abs(p["onnx-int8"] - p["torch"]).max() < 0.2
    for predicted in p.values():
        assert predicted.dtype == np.float32 and np.allclose(predicted.sum(1), 1, atol=1e-5)


EXPORTED = ("onnx-float32", "onnx-int8")


def test_embeddings_and_linear_layers_have_8_bits(folder):
    import onnx

    model = onnx.load(str(folder / "onnx/model_int8.onnx"))
    weights = sum(
        np.prod(tensor.dims) for tensor in model.graph.initializer if tensor.data_type == 3 and len(tensor.dims) > 1
    )
    floats = sum(
        np.prod(tensor.dims) for tensor in model.graph.initializer if tensor.data_type == 1 and len(tensor.dims) > 1
    )
    whole = onnx.load(str(folder / "onnx/model.onnx"))
    matrices = sum(np.prod(tensor.dims) for tensor in whole.graph.initializer if len(tensor.dims) > 1)
    assert weights >= 0.99 * matrices and floats < 0.05 * matrices  # what is left are the scales
    sizes = {name: scores["bytes"] for name, scores in read_exports(folder).items()}
    assert sizes["onnx-int8"] < sizes["onnx-float32"] / 2  # of a model with narrow layers; scales weigh more there


@pytest.mark.parametrize("engine", EXPORTED)
def test_the_graph_that_runs_has_no_slow_nodes(folder, tmp_path, monkeypatch, engine):
    import onnx
    import onnxruntime

    class Kept(onnxruntime.SessionOptions):
        """Options that also write the graph as it runs."""

        def __init__(self):
            super().__init__()
            self.optimized_model_filepath = str(tmp_path / "optimized.onnx")

    monkeypatch.setattr(onnxruntime, "SessionOptions", Kept)
    open_predictor(folder, read_settings(folder), engine, 1)
    nodes = {node.op_type for node in onnx.load(str(tmp_path / "optimized.onnx")).graph.node}
    assert "LayerNormalization" in nodes and not nodes & {"SkipLayerNormalization", "IsNaN"}
    assert ("DynamicQuantizeMatMul" in nodes) == (engine == "onnx-int8")


def test_the_scores_of_an_export_are_those_of_its_probabilities(folder):
    test, settings = rows(80), read_settings(folder)
    p = {
        engine: open_predictor(folder, settings, engine, 1).predict(test["text"].tolist())
        for engine in ("torch", *EXPORTED)
    }
    for name, scores in read_exports(folder).items():
        label = np.array([TASK.names.index(x) for x in test["label"]])
        best, student = p[name].argmax(1), p["torch"].argmax(1)
        assert scores["agreement"] == np.mean(best == student)
        assert scores["largest_difference"] == pytest.approx(np.abs(p[name] - p["torch"]).max(), abs=1e-6)
        assert scores["accuracy"] == np.mean(best == label)
        assert scores["difference"] == pytest.approx(np.mean(best == label) - np.mean(student == label), abs=1e-9)
        assert scores["difference_low"] <= scores["difference"] <= scores["difference_high"]
        assert scores["bytes"] == (folder / "onnx" / scores["file"]).stat().st_size and scores["rows_per_second"] > 0


def test_an_export_of_a_student_of_label_sets_gives_each_label_its_own_probability(folder, tmp_path):
    """The export computes logits, so the same file serves both kinds of task."""
    copy = shutil.copytree(folder, tmp_path / "model")
    config, kept = json.loads((copy / "config.json").read_text()), json.loads((copy / "inference.json").read_text())
    write_json(copy / "config.json", config | {"problem_type": "multi_label_classification"})
    kept["task"] |= {"kind": "multilabel", "few_shot": []}
    write_json(copy / "inference.json", kept | {"temperature": 1.0, "abstention": None, "thresholds": [0.5, 0.4, 0.6]})
    settings, test = read_settings(copy), rows(40)
    p = {engine: open_predictor(copy, settings, engine, 1).predict(texts()) for engine in ("torch", *EXPORTED)}
    assert np.abs(p["onnx-float32"] - p["torch"]).max() <= 1e-4 and np.abs(p["torch"].sum(1) - 1).max() > 0.01
    odds, share = (
        p["torch"] / (1 - p["torch"]),
        open_predictor(folder, read_settings(folder), "torch", 1).predict(texts()),
    )
    np.testing.assert_allclose(odds / odds.sum(1, keepdims=True), share, atol=1e-5)  # the same logits
    gold = sets_of(np.random.default_rng(0).random((40, 3)) < 0.5, settings.task.names)
    probabilities = compare_exports(copy, settings, test.assign(label=gold), CONFIG)
    predictions = decide(probabilities["onnx-int8"], settings.task.names, settings.thresholds)
    assert read_exports(copy)["onnx-int8"]["accuracy"] == np.mean(predictions == gold)


@pytest.mark.parametrize("tolerance, within", [(0.1, True), (0.09, False)])
def test_an_export_is_marked_that_loses_more_than_the_tolerance(tolerance, within):
    test = pd.DataFrame({"label": ["a"] * 20, "group": [f"g{i}" for i in range(20)]})
    expected = np.tile([0.9, 0.1], (20, 1))
    p = expected.copy()
    p[:2] = [0.1, 0.9]  # two of twenty are lost
    config = CONFIG.model_copy(update={"export_tolerance": tolerance})
    scores = compare_probabilities(p, expected, test, ["a", "b"], config)
    assert scores["difference"] == pytest.approx(-0.1) and scores["within_tolerance"] is within


def test_a_marked_export_is_not_chosen(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    path, settings = tmp_path / "model/onnx/exports.json", read_settings(folder)
    content = json.loads(path.read_text())
    for marked, engine in ((("onnx-int8",), "onnx-float32"), (EXPORTED, "torch")):
        for name in EXPORTED:
            content["exports"][name]["within_tolerance"] = name not in marked
        write_json(path, content)
        assert open_predictor(tmp_path / "model", settings, "auto", 1).engine == engine


def test_exports_of_other_weights_are_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    weights = tmp_path / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="exported from other weights than .* has now; run `distillery export` again"):
        open_predictor(tmp_path / "model", read_settings(folder))
    weights.unlink()  # a folder for ONNX Runtime alone
    assert open_predictor(tmp_path / "model", read_settings(folder), threads=1).engine == "onnx-int8"


@pytest.mark.parametrize(
    "arch, model, more, line",
    [
        ("seq2seq", "tiny-t5", {}, "s is seq2seq; classifiers and causal models are exported"),
        ("classifier", "tiny-bert", {"long_texts": {"windows": 2}}, "reads long texts in windows"),
    ],
)
def test_what_cannot_be_exported_is_one_line(tiny_models, tmp_path, arch, model, more, line):
    settings = write_student(tiny_models / model, tmp_path / "model", arch, **more)
    with pytest.raises(UserError, match=line):
        write_exports(tmp_path / "model", settings)


@pytest.mark.parametrize("name", ["onnx/exports.json", "tokenizer.json"])
def test_a_run_does_not_continue_with_other_exports_or_another_tokenizer(folder, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr(tables, "WINDOW_ROWS", 2)
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "i.csv").write_text("text\na\nb\na,b\n")
    options = PredictOptions(str(tmp_path / "i.csv"), str(tmp_path / "o.csv"), threads=1)
    for line in ("predicting", "continuing after 2 rows", "starting anew"):
        with pytest.raises(UserError, match="2 cells, but the header has 1"):
            predict_file(tmp_path / "model", options)
        assert line in capsys.readouterr().err
        if line.startswith("continuing"):
            path = tmp_path / "model" / name
            path.write_text(path.read_text() + "\n")


def run_without(modules: str, command: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run `command` in a Python that cannot import `modules`."""
    code = f"import sys; sys.modules.update(dict.fromkeys({modules!r}.split())); {command}"
    environment = os.environ | {"PYTHONPATH": str(tiny.ROOT / "src")}
    return subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)


MAIN = "from distillery.cli import main; main(sys.argv[1:])"


def test_an_exported_student_predicts_without_torch(folder, tmp_path):
    rows(30).to_csv(tmp_path / "i.csv", index=False)
    names = ["--input", str(tmp_path / "i.csv"), "--output", str(tmp_path / "o.csv")]
    blocked = "torch transformers accelerate peft datasets pandas sklearn onnx"
    done = run_without(blocked, MAIN, "predict", str(folder), *names)
    assert done.returncode == 0, done.stderr
    assert "s: predicting with onnx-int8" in done.stderr
    predict_file(folder, PredictOptions(str(tmp_path / "i.csv"), str(tmp_path / "here.csv")))
    assert (tmp_path / "o.csv").read_text() == (tmp_path / "here.csv").read_text()
    done = run_without("torch", MAIN, "predict", str(folder), *names, "--engine", "torch")
    assert done.returncode == 1 and "has no package `torch`" in done.stderr and "Traceback" not in done.stderr


SERVED = """
import json, re, sys
from importlib.metadata import packages_distributions
from pathlib import Path

packages, start = set(sys.argv[2:]), set(sys.modules)
owners = {
    module: {re.sub("[-_.]+", "-", name.lower()) for name in names}
    for module, names in packages_distributions().items() if module not in start | {"distillery"}
}
sys.modules.update((module, None) for module, names in owners.items() if not names & packages)
import distillery.cli
from distillery.deploy.serve import open_server

with open_server(Path(sys.argv[1]), "127.0.0.1", 0, threads=1) as server:
    (row,) = server.predict(["Profit rose."])
used = set().union(*(names for module, names in owners.items() if sys.modules.get(module)))
print(json.dumps([server.predictor.engine, row["prediction"], sorted(packages - used)]))
"""


def test_the_server_of_the_dockerfile_imports_each_package_in_it_and_no_other(folder):
    dockerfile = (tiny.ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    packages = re.search(r"for name in ([^;]+);", dockerfile)[1].split()
    environment = os.environ | {"PYTHONPATH": str(tiny.ROOT / "src")}
    command = [sys.executable, "-c", SERVED, str(folder), *packages]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    engine, prediction, unused = json.loads(done.stdout)
    assert engine == "onnx-int8" and prediction in TASK.names and unused == []


def test_a_missing_package_is_named_with_the_way_to_install_it(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"no package `onnxscript` is installed; run: pip install '.\[export\]'"):
        write_exports(folder, read_settings(folder))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="needs onnxruntime; run: pip install onnxruntime"):
        open_predictor(folder, read_settings(folder))


KILLED = """
import os, signal, sys
from distillery.cli import main
from distillery.deploy import tables

tables.WINDOW_ROWS = 20
replace, calls, last = os.replace, [], int(sys.argv.pop(1))

def count(source, target):  # every file is written under another name first
    calls.append(target)
    if len(calls) == last:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

os.replace = count
main(sys.argv[1:])
"""


def test_two_kills_lose_and_repeat_nothing(folder, tmp_path, monkeypatch):
    """The first comes while the second of 15 parts is written, the second while the parts are joined."""
    n, parts = 300, tmp_path / ".o.csv.parts"
    rows(n).to_csv(tmp_path / "i.csv", index=False)
    files = ["--input", str(tmp_path / "i.csv"), "--output", str(tmp_path / "o.csv")]
    environment = os.environ | {"PYTHONPATH": str(tiny.ROOT / "src")}
    for last, left in ((3, 1), (15, 15), (0, 0)):
        command = [sys.executable, "-c", KILLED, str(last), "predict", str(folder), "--threads", "1", *files]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == (-signal.SIGKILL if last else 0), done.stderr
        assert len(list(parts.glob("part-*"))) == left and (tmp_path / "o.csv").exists() == (not last)
    assert "continuing after 300 rows" in done.stderr
    monkeypatch.setattr(tables, "WINDOW_ROWS", 20)
    predict_file(folder, PredictOptions(str(tmp_path / "i.csv"), str(tmp_path / "unbroken.csv"), threads=1))
    assert pd.read_csv(tmp_path / "o.csv")["id"].tolist() == rows(n)["id"].tolist()
    assert (tmp_path / "o.csv").read_bytes() == (tmp_path / "unbroken.csv").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["i.csv", "o.csv", "unbroken.csv"]


@pytest.fixture(scope="module")
def project(tiny_models, tmp_path_factory):
    """A finished experiment whose headline is a real model, to be exported."""
    root = tmp_path_factory.mktemp("project")
    spec = report_project.experiment(seeds=[0])
    spec["evaluate"] |= {"export": ["tiny-kd"], "conformal_coverage": 0.8, "bootstrap": 100}
    spec["students"]["tiny-kd"]["max_length"] = 32
    write_run(root, spec, tiny_models / "tiny-bert")
    return root


def test_exports_have_lines_of_their_own_on_leaderboard_and_page(project):
    params = load_params(project / "params.yaml")
    plain = gather_results(project, params)
    write_settings(project, params)
    results, measured = add_exports(project, plain, Measurements())
    label = results.tests["demo"]["label"].to_numpy(dtype=object)
    wrong = np.where(label == "up", "down", "up")[None]  # of the int8 export, which comes last
    exports = {model.name: model for model in results.models[len(plain.models) :]}
    assert list(exports) == ["tiny-kd, ONNX int8", "tiny-kd, ONNX float32"]
    exports["tiny-kd, ONNX int8"] = replace(exports["tiny-kd, ONNX int8"], predictions=wrong)
    results = replace(results, models=[*plain.models, *exports.values()])
    board = leaderboard(results, measured.timing)
    lines = board.set_index("model")
    whole, small = lines.loc["tiny-kd, ONNX float32"], lines.loc["tiny-kd, ONNX int8"]
    assert whole["role"] == "export" and whole["versus"] == "tiny-kd" and whole["verdict"] == "within tolerance"
    assert whole["agreement_with_student"] == 1 and whole["difference"] == 0 and whole["largest_difference"] <= 1e-4
    assert whole["accuracy"] == lines.loc["tiny-kd", "accuracy"] and whole["sentences_per_second"] > 0
    assert small["verdict"] == "loses too much" and small["difference"] == -lines.loc["tiny-kd", "accuracy"]
    assert small["megabytes"] < whole["megabytes"] / 2
    assert not comparison_table(board)["model"].str.contains("ONNX").any() and lines["p"].notna().sum() == 1
    assert "| tiny-kd, ONNX int8 | export | – |" in leaderboard_markdown(board)
    write_report(project, results, board, measured, slice_scores(results))
    page = (project / "reports/index.html").read_text()
    assert page.count("within tolerance") == 1 and page.count("loses too much") == 1 and "over tiny-kd" in page


def test_the_command_exports_a_run_and_prints_its_scores(project, capsys):
    main(["export", str(project / "runs/tiny-kd-0")])
    printed = capsys.readouterr().out
    for word in ("agreement", "largest_difference", "within_tolerance", "rows_per_second", "bytes"):
        assert word in printed
    with pytest.raises(SystemExit, match="no run of an experiment; name one, such as runs/tiny-kd-0"):
        main(["export", str(project)])
