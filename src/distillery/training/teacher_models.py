"""Teachers whose weights are available: load them, and open the model of a fold for its rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distillery.config.schema import ModelConfig, TeacherConfig
from distillery.errors import UserError
from distillery.models.fetch import fetch_model
from distillery.models.heads import read_head
from distillery.models.int8 import load_int8_model
from distillery.models.label_model import Completion, LabelModel
from distillery.models.load import load_model, load_tokenizer
from distillery.models.positions import max_positions, require_positions
from distillery.models.precision import Use, resolve_dtype
from distillery.models.save import dequantize, merge_adapters
from distillery.models.windows import build_windows, store_windows
from distillery.tasks.schema import Task

DEFAULT_MAX_LENGTH = 256  # tokens of a text and its prompt to another teacher
MAX_PROMPT_TOKENS = 4096  # tokens of a prompt to a teacher that is only prompted


def load_teacher_model(
    name: str,
    spec: TeacherConfig,
    origin: ModelConfig,
    task: Task,
    *,
    tuned: Path | None = None,
    use: Use = "prediction",
) -> LabelModel:
    """The teacher `name` as fetched from `origin`, or, with `tuned`, from that folder (a whole model, or adapters).

    One that was tuned in 4 bits is opened dequantized: merged into 4 bits its adapters would be rounded away.
    use: what it is opened for, which decides what `dtype: auto` means.
    Raises UserError when it is a classifier without `finetune` whose model has no head for the labels, and when it does
    not read `max_length` tokens.
    """
    arch = {"lm": "causal"}.get(spec.kind, spec.kind)
    adapters = tuned is not None and (tuned / "adapter_config.json").exists()
    folder = tuned if tuned and not adapters else fetch_model(spec.model, origin)
    label_map = origin.labels if folder != tuned else None
    # weights that will be trained stay in float32; others are loaded in the precision of their use
    trained = spec.finetune is not None and spec.finetune.lora is None and tuned is None
    dtype = resolve_dtype(spec.dtype, use)
    options = {
        "labels": task.names,
        "label_map": label_map,
        "dtype": dtype if arch != "classifier" and not trained else "float32",
        "seed": spec.seed,
        "trust_remote_code": origin.trust_remote_code,
    }
    if spec.quantize == "int8":
        model = load_int8_model(folder, arch, **options)
    else:
        model = load_model(folder, arch, quantize=spec.quantize == "nf4" and folder != tuned, **options)
    if arch == "classifier" and spec.finetune is None:
        read_head(folder, task.names, label_map).require(name, spec.model, task.names)
    if adapters:
        model = merge_adapters(dequantize(model) if spec.quantize == "nf4" else model, tuned)
    tokenizer = load_tokenizer(folder, origin.trust_remote_code)
    settings = {"prompt": spec.prompt, "few_shot": spec.few_shot, "batch_size": spec.batch_size}
    limit, place = max_positions(model), f"params.yaml: teachers.{name}"
    max_length = spec.max_length or min(DEFAULT_MAX_LENGTH, limit or DEFAULT_MAX_LENGTH)
    windows = build_windows(place, spec.long_texts, tokenizer, max_length)
    if arch == "classifier":
        store_windows(model, windows)
    teacher = LabelModel(model, tokenizer, task, arch, dtype=dtype, max_length=max_length, windows=windows, **settings)
    if spec.max_length:
        require_positions(f"{place}.max_length", max_length, limit, teacher.longest_answer)
    elif arch != "classifier" and spec.finetune is None:
        teacher.max_length = max_prompt_tokens(teacher)
    return teacher


def max_prompt_tokens(model: LabelModel) -> int:
    """Tokens that the prompt of a `model` that is only prompted may have: solved examples make it long."""
    return min(MAX_PROMPT_TOKENS, getattr(model.model.config, "max_position_embeddings", None) or MAX_PROMPT_TOKENS)


def check_same_tokens(
    name: str, teacher: LabelModel, student_answers: Sequence[Completion], teacher_answers: Sequence[Completion]
) -> None:
    """Raise UserError if `teacher` writes an answer in other tokens than its student: logits cannot be compared."""
    for (student_ids, _), (teacher_ids, _) in zip(student_answers, teacher_answers, strict=True):
        if list(student_ids) != list(teacher_ids):
            raise UserError(
                f"teachers.{name}: its vocabulary does not fit: it writes an answer as "
                f"{teacher.tokenizer.convert_ids_to_tokens(list(teacher_ids))}, which is not the student's "
                f"{list(student_ids)}; use a model of the student's family and the same `prompt`, `space: labels`, "
                "or the loss term `uld`"
            )
