"""Texts in, probabilities out: by ONNX Runtime where a student was exported, else by torch. Imports torch only then."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from scipy import special

from distillery.config.schema.base import Section
from distillery.deploy.settings import AGAIN, SETTINGS_FILE, InferenceSettings, read_section
from distillery.errors import UserError
from distillery.files import file_digest
from distillery.models.batches import batches_by_length
from distillery.models.heads import read_head

BATCH_SIZE = 32  # as a student predicts in its evaluation
# Of onnxruntime: its one node for a sum with its layer norm is slower on a CPU than the two nodes that it replaces.
SLOW_FUSIONS = ["SkipLayerNormFusion"]
ONNX_FILES = {"onnx-int8": "model_int8.onnx", "onnx-float32": "model.onnx"}  # by engine, the faster one first
GGUF_FILES = {"gguf-q8_0": "model-q8_0.gguf", "gguf-f16": "model-f16.gguf"}  # for other programs, such as llama.cpp
EXPORT_FILES = {"onnx": ONNX_FILES, "gguf": GGUF_FILES}  # by the folder below that of the model
EXPORTS_FILE = "exports.json"  # describes the exports in such a folder
WEIGHTS_FILE, TOKENIZER_FILE, CONFIG_FILE = "model.safetensors", "tokenizer.json", "config.json"
TENSORS = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}  # of an encoded text


class Export(Section):
    """An export of a student, and its scores on the test rows beside the student."""

    file: str
    """Its name in the folder of the exports."""
    bytes: int
    """Its size."""
    agreement: float
    """Share of rows with the student's prediction."""
    largest_difference: float
    """Of a probability from the student's."""
    accuracy: float
    """Of its predictions."""
    difference: float
    """Of its accuracy from the student's."""
    difference_low: float
    """Lower end of the interval of the difference."""
    difference_high: float
    """Upper end."""
    within_tolerance: bool
    """Whether it loses no more than `evaluate.export_tolerance`."""
    rows_per_second: float | None = None
    """None where a program of its own computes it."""


class Exports(Section):
    """`exports.json`: the exports of one kind."""

    weights: str
    """Digest of the weights that were exported."""
    threads: int
    """With which the rows a second were measured."""
    rows: int
    """Test rows."""
    torch_rows_per_second: float | None = None
    """Of the student itself."""
    exports: dict[str, Export]
    """By name."""


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
        self.engine, self._file = engine, file
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads or thread_count(), 1
        options.log_severity_level = 3
        try:
            session = self._session = onnxruntime.InferenceSession(
                str(file), options, providers=["CPUExecutionProvider"], disabled_optimizers=SLOW_FUSIONS
            )
        except Exception as error:  # onnxruntime has classes of its own
            raise UserError(_unusable(file, f"cannot be loaded: {_first_line(error)}")) from None
        inputs, outputs, n_labels = session.get_inputs(), session.get_outputs(), len(settings.task.labels)
        known = all(tensor.name in TENSORS and tensor.type == "tensor(int64)" for tensor in inputs)
        if not (inputs and known and [tensor.shape[1:] for tensor in outputs] == [[n_labels]]):
            raise UserError(_unusable(file, f"not the export of a classifier with {n_labels} labels"))
        self._inputs = [tensor.name for tensor in inputs]
        self._tokenizer = _read_tokenizer(folder / TOKENIZER_FILE, settings.max_length)
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
        for name, tensor in tensors.items():
            for i, row in enumerate(rows):
                tensor[i, : len(row.ids)] = getattr(row, TENSORS[name])
        try:
            return self._session.run(None, tensors)[0].astype(np.float32)
        except Exception as error:  # such as of a graph with another vocabulary
            raise UserError(_unusable(self._file, f"cannot compute: {_first_line(error)}")) from None


def _first_line(error: Exception) -> str:
    return f"{(str(error).strip().splitlines() or [type(error).__name__])[0]:.200}"


def _unusable(file: Path, problem: str) -> str:
    """A message on an export."""
    return f"{file}: {problem}; run `distillery export` again, or delete the folder {file.parent.name} to use torch"


def _read_tokenizer(file: Path, max_length: int):
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises Exception itself
        raise UserError(f"{file}: cannot be read: {_first_line(error)}; copy the student's folder again") from None
    tokenizer.enable_truncation(max_length)
    tokenizer.no_padding()
    return tokenizer


def read_exports(folder: Path, kind: str = "onnx") -> dict[str, dict]:
    """The exports of a `kind` in a model `folder`: name -> file, bytes, scores. Empty where there are none.

    Raises UserError when the file of them is damaged, or they are those of other weights.
    """
    path = folder / kind / EXPORTS_FILE
    if not path.exists():
        return {}
    content = read_section(Exports, path, f"run `distillery export` again, or delete the folder {kind} to use torch")
    weights = folder / WEIGHTS_FILE  # a folder for inference alone may leave it out
    if weights.exists() and content.weights != file_digest(weights):
        raise UserError(f"{path}: exported from other weights than {weights} has now; run `distillery export` again")
    return {name: export.model_dump(exclude_none=True) for name, export in content.exports.items()}


def _check_labels(folder: Path, settings: InferenceSettings) -> None:
    """Raise UserError when the settings are of another model: it has other labels, or gives them in another order."""
    if settings.arch != "classifier" or not (folder / CONFIG_FILE).exists():  # a folder for ONNX may leave it out
        return
    labels = settings.task.names
    try:
        head = read_head(folder, labels)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / CONFIG_FILE}: cannot be read: {_first_line(error)}; {AGAIN}") from None
    if head.order != list(range(len(labels))):
        own = ", ".join(head.names or []) or "none"
        problem = f"has the labels {', '.join(labels)}, but the model beside it gives: {own}"
        raise UserError(f"{folder / SETTINGS_FILE}: {problem}; {AGAIN}")


def open_predictor(
    folder: Path, settings: InferenceSettings, engine: str = "auto", threads: int | None = None
) -> Predictor:
    """The student in a model `folder`, on `engine`.

    auto: the first of int8 and float32 that was exported and is within `evaluate.export_tolerance`, else torch.
    Raises UserError when the engine has no export or its package is not installed, and when a file of the folder is
    damaged or belongs to another student.
    """
    _check_labels(folder, settings)
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
