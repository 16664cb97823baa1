"""Write a classifier as ONNX, in float32 and with weights of 8 bits, and compare both with the student."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from distillery import metrics
from distillery.config.schema.evaluate import EvaluateConfig
from distillery.deploy.predictors import (
    EXPORT_NAMES,
    EXPORTS,
    EXPORTS_FILE,
    WEIGHTS_FILE,
    OnnxPredictor,
    Predictor,
)
from distillery.deploy.settings import InferenceSettings
from distillery.deploy.torch_predictor import TorchPredictor
from distillery.errors import UserError
from distillery.evaluation.speed import throughput
from distillery.files import atomic_write, file_digest, write_json
from distillery.models.load import load_model, load_tokenizer
from distillery.models.windows import stored_windows

MIN_TABLE_ROWS = 256  # of an embedding that is stored in 8 bits
QUANTIZED = ("MatMul", "Gemm")


class _Logits(nn.Module):
    """A classifier as a function of two tensors [n, tokens] that returns its logits [n, labels]."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def write_exports(folder: Path, settings: InferenceSettings) -> None:
    """Write the exports of the student in a model `folder` to its folder `onnx`, as a whole or not at all.

    Raises UserError for another architecture, without the extra `export`, and when the model cannot be exported.
    """
    if settings.arch != "classifier":
        raise UserError(f"{folder}: {settings.student} is {settings.arch}; only a classifier is exported")
    try:
        import onnx
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as missing:
        way_out = "run: pip install '.[export]' in the project's folder"
        raise UserError(f"export: no package `{missing.name}` is installed; {way_out}") from None
    with atomic_write(folder / EXPORTS) as scratch:
        scratch.mkdir()
        whole = scratch / EXPORT_NAMES["onnx-float32"]
        _export_float32(folder, settings, whole)
        onnx.checker.check_model(str(whole))
        _quantize(whole, scratch / EXPORT_NAMES["onnx-int8"])


@contextmanager
def _quiet():
    """Without the remarks that torch's exporter and onnxruntime's quantization make on every model."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _export_float32(folder: Path, settings: InferenceSettings, path: Path) -> None:
    student = load_model(folder, settings.arch, labels=settings.task.names)
    if stored_windows(student):
        raise UserError(f"{folder}: {settings.student} reads long texts in windows (`long_texts`): it is not exported")
    model = _Logits(student.cpu().eval())
    batch = load_tokenizer(folder)(["one text", "another, longer text"], padding=True, return_tensors="pt")
    shape = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    try:
        with _quiet():
            program = torch.onnx.export(
                model,
                (batch["input_ids"], batch["attention_mask"]),
                dynamo=True,
                verbose=False,
                external_data=False,
                input_names=["input_ids", "attention_mask"],
                output_names=["logits"],
                dynamic_shapes=(shape, shape),
            )
            program.save(str(path))
    except Exception as error:  # of the exporter; it has no class of its own for every step
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{folder}: torch cannot export this model to ONNX: {reason[0]:.200}") from None


def _quantize(whole: Path, path: Path) -> None:
    """Write the model `whole` with 8-bit weights: linear layers per output channel, embeddings per row.

    Activations are quantized when the model runs (dynamic quantization). `quantize_dynamic` alone would give the whole
    embedding one scale, which is coarser.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(str(whole))
    _quantize_embeddings(model.graph)
    with _quiet():
        quantize_dynamic(
            model, path, op_types_to_quantize=list(QUANTIZED), per_channel=True, weight_type=QuantType.QInt8
        )


def _quantize_embeddings(graph: Any) -> None:
    """Replace each look-up in a table of floats by one in 8 bits, times the scale of the row."""
    from onnx import TensorProto, helper, numpy_helper

    tables = {tensor.name: tensor for tensor in graph.initializer}
    for node in [node for node in graph.node if node.op_type == "Gather" and node.input[0] in tables]:
        name, indices = node.input
        table = tables[name]
        uses = sum(name in other.input for other in graph.node)
        if table.data_type != TensorProto.FLOAT or len(table.dims) != 2 or table.dims[0] < MIN_TABLE_ROWS or uses > 1:
            continue
        values = numpy_helper.to_array(table)
        scales = np.maximum(np.abs(values).max(1, keepdims=True) / 127, np.finfo(np.float32).tiny).astype(np.float32)
        graph.initializer.remove(table)
        graph.initializer.append(numpy_helper.from_array(np.rint(values / scales).astype(np.int8), f"{name}_int8"))
        graph.initializer.append(numpy_helper.from_array(scales, f"{name}_scale"))
        result, position = node.output[0], list(graph.node).index(node)
        steps = [
            helper.make_node("Gather", [f"{name}_int8", indices], [f"{result}_int8"]),
            helper.make_node("Cast", [f"{result}_int8"], [f"{result}_float"], to=TensorProto.FLOAT),
            helper.make_node("Gather", [f"{name}_scale", indices], [f"{result}_scale"]),
            helper.make_node("Mul", [f"{result}_float", f"{result}_scale"], [result]),
        ]
        graph.node.remove(node)
        for offset, step in enumerate(steps):
            graph.node.insert(position + offset, step)


def compare_exports(
    folder: Path, settings: InferenceSettings, test: pd.DataFrame, config: EvaluateConfig
) -> dict[str, np.ndarray]:
    """Score the exports in a model `folder` beside the torch student on `test` rows (text, label, group).

    Writes `onnx/exports.json`: of each export file, bytes, agreement (share of rows with the student's prediction),
    largest_difference (of a probability), accuracy, its difference from the student's with an interval, rows a second
    of both, and whether it is within `config.export_tolerance`. Returns its probabilities [rows, labels] by name.
    """
    threads, texts = torch.get_num_threads(), test["text"].tolist()
    student = TorchPredictor(folder, settings, threads)
    exported = {
        name: OnnxPredictor(folder, settings, name, folder / EXPORTS / file, threads)
        for name, file in EXPORT_NAMES.items()
    }
    expected = student.predict(texts)
    probabilities = {name: predictor.predict(texts) for name, predictor in exported.items()}
    rates = throughput(
        {name: _row_function(predictor) for name, predictor in {"torch": student, **exported}.items()},
        test.head(config.throughput_rows),
    )
    scores = {
        name: {"file": EXPORT_NAMES[name], "bytes": (folder / EXPORTS / EXPORT_NAMES[name]).stat().st_size}
        | compare_probabilities(p, expected, test, settings.task.names, config)
        | {"rows_per_second": round(rates[name], 1)}
        for name, p in probabilities.items()
    }
    content = {"weights": file_digest(folder / WEIGHTS_FILE), "threads": threads, "rows": len(test)}
    write_json(folder / EXPORTS / EXPORTS_FILE, content | {"torch_rows_per_second": rates["torch"], "exports": scores})
    return probabilities


def _row_function(predictor: Predictor) -> Callable[[pd.DataFrame], np.ndarray]:
    return lambda rows: predictor.predict(rows["text"].tolist())


def compare_probabilities(
    p: np.ndarray, expected: np.ndarray, test: pd.DataFrame, labels: Sequence[str], config: EvaluateConfig
) -> dict[str, Any]:
    """The scores of an export's probabilities `p` against the student's, both [rows, labels]."""
    label, groups = test["label"].to_numpy(dtype=object), test["group"]
    names = np.array(labels, dtype=object)
    predictions, students = names[p.argmax(-1)], names[expected.argmax(-1)]
    difference = metrics.paired_difference(
        label, predictions, students, labels, groups, config.bootstrap, config.confidence, config.seed
    )["accuracy"]
    return {
        "agreement": float((predictions == students).mean()),
        "largest_difference": float(np.abs(p - expected).max()),
        "accuracy": float((predictions == label).mean()),
        "difference": difference["mean"],
        "difference_low": difference["low"],
        "difference_high": difference["high"],
        "within_tolerance": bool(-difference["mean"] <= config.export_tolerance),
    }
