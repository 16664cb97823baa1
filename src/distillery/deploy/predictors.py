"""Texts in, probabilities out: by ONNX Runtime where a student was exported, else by torch. Imports torch only then."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from scipy import special

from distillery.deploy.settings import InferenceSettings
from distillery.errors import UserError
from distillery.files import file_digest
from distillery.models.batches import batches_by_length

BATCH_SIZE = 32  # as a student predicts in its evaluation
# Of onnxruntime: its one node for a sum with its layer norm takes eight times as long on a CPU as two nodes do.
SLOW_FUSIONS = ["SkipLayerNormFusion"]
ONNX_FILES = {"onnx-int8": "model_int8.onnx", "onnx-float32": "model.onnx"}  # by engine, the faster one first
GGUF_FILES = {"gguf-q8_0": "model-q8_0.gguf", "gguf-f16": "model-f16.gguf"}  # for other programs, such as llama.cpp
EXPORT_FILES = {"onnx": ONNX_FILES, "gguf": GGUF_FILES}  # by the folder below that of the model
EXPORTS_FILE = "exports.json"  # describes the exports in such a folder
WEIGHTS_FILE, TOKENIZER_FILE = "model.safetensors", "tokenizer.json"


class Predictor(Protocol):
    """A model that is ready to predict."""

    engine: str  # a name of `ONNX_FILES`, or torch

    def predict(self, texts: Sequence[str]) -> np.ndarray:
        """Probabilities of the labels [n, labels], float32, not calibrated."""
        ...


def thread_count() -> int:
    """Threads to compute with: OMP_NUM_THREADS if it is set, else the cores that this process may use."""
    value = os.environ.get("OMP_NUM_THREADS", "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(value) if value.isdigit() and int(value) else cores


class OnnxPredictor:
    """A classifier as ONNX Runtime computes it, with the tokenizer of its folder."""

    def __init__(self, folder: Path, settings: InferenceSettings, engine: str, file: Path, threads: int | None = None):
        try:
            import onnxruntime
        except ModuleNotFoundError:
            raise UserError(f"{file}: needs onnxruntime; run: pip install onnxruntime") from None
        from tokenizers import Tokenizer

        self.engine = engine
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads or thread_count(), 1
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(
                str(file), options, providers=["CPUExecutionProvider"], disabled_optimizers=SLOW_FUSIONS
            )
            self._tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
        except Exception as error:  # both libraries raise errors of their own classes, or Exception itself
            raise UserError(f"{file}: cannot be loaded: {str(error).splitlines()[0]:.200}") from None
        self._inputs = [tensor.name for tensor in self._session.get_inputs()]
        self._tokenizer.enable_truncation(settings.max_length)
        self._tokenizer.no_padding()
        self._is_multilabel = settings.task.kind == "multilabel"

    def predict(self, texts: Sequence[str]) -> np.ndarray:
        """Probabilities of the labels [n, labels], float32, not calibrated."""
        rows = self._tokenizer.encode_batch(list(texts))
        probabilities: np.ndarray | None = None
        for batch in batches_by_length([row.ids for row in rows], BATCH_SIZE):
            logits = self._logits([rows[i] for i in batch])
            if probabilities is None:
                probabilities = np.zeros((len(rows), logits.shape[-1]), dtype=np.float32)
            probabilities[batch] = special.expit(logits) if self._is_multilabel else special.softmax(logits, axis=-1)
        return np.zeros((0, 0), dtype=np.float32) if probabilities is None else probabilities

    def _logits(self, rows: list) -> np.ndarray:
        shape = len(rows), max(len(row.ids) for row in rows)
        tensors = {name: np.zeros(shape, dtype=np.int64) for name in self._inputs}
        values = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
        for name, tensor in tensors.items():
            for i, row in enumerate(rows):
                tensor[i, : len(row.ids)] = getattr(row, values[name])
        return self._session.run(None, tensors)[0].astype(np.float32)


def read_exports(folder: Path, kind: str = "onnx") -> dict[str, dict]:
    """The exports of a `kind` in a model `folder`: name -> file, bytes, scores. Empty where there are none.

    Raises UserError when they are those of other weights.
    """
    path = folder / kind / EXPORTS_FILE
    if not path.exists():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    weights = folder / WEIGHTS_FILE  # a folder for inference alone may leave it out
    if weights.exists() and content["weights"] != file_digest(weights):
        raise UserError(f"{path}: exported from other weights than {weights} has now; run `distillery export` again")
    return content["exports"]


def open_predictor(
    folder: Path, settings: InferenceSettings, engine: str = "auto", threads: int | None = None
) -> Predictor:
    """The student in a model `folder`, on `engine`.

    auto: the first of int8 and float32 that was exported and is within `evaluate.export_tolerance`, else torch.
    Raises UserError when the engine has no export, or its package is not installed.
    """
    exports = read_exports(folder) if engine != "torch" else {}
    if engine == "auto":
        usable = [name for name in ONNX_FILES if exports.get(name, {}).get("within_tolerance")]
        engine = usable[0] if usable else "torch"
    if engine == "torch":
        from distillery.deploy.torch_predictor import TorchPredictor

        return TorchPredictor(folder, settings, threads)
    if engine not in exports:
        raise UserError(f"{folder}: no export `{engine}` here; run: distillery export {folder}")
    return OnnxPredictor(folder, settings, engine, folder / "onnx" / ONNX_FILES[engine], threads)
