"""Write a classifier as ONNX, in float32 and with weights of 8 bits."""

from __future__ import annotations

import logging
import warnings
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from distillery.deploy.predictors import ONNX_FILES
from distillery.deploy.settings import InferenceSettings
from distillery.errors import UserError
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


def write_onnx(folder: Path, settings: InferenceSettings, target: Path) -> None:
    """Write the classifier in a model `folder` as the files :data:`ONNX_FILES` into the folder `target`.

    Raises UserError without the extra `export`, and when the model cannot be exported.
    """
    try:
        import onnx
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as missing:
        way_out = "run: pip install '.[export]' in the project's folder"
        raise UserError(f"export: no package `{missing.name}` is installed; {way_out}") from None
    whole = target / ONNX_FILES["onnx-float32"]
    _export_float32(folder, settings, whole)
    onnx.checker.check_model(str(whole))
    _quantize(whole, target / ONNX_FILES["onnx-int8"])


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
    student.set_attn_implementation("eager")  # the one of torch also looks for NaN in rows where all is masked: slower
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
