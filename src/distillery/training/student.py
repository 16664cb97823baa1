"""Build a student before its first step, and load a finished one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from distillery.config.schema import AdapterSettings, LoraSettings, ModelConfig, StudentConfig
from distillery.errors import UserError
from distillery.models.label_model import LabelModel
from distillery.models.layers import chosen_layers, freeze_lower_layers, head_layers
from distillery.models.load import load_model, load_tokenizer
from distillery.models.positions import max_positions, require_positions
from distillery.models.precision import resolve_dtype
from distillery.models.series_adapters import add_series_adapters, has_series_adapters, sublayer_outputs
from distillery.models.windows import build_windows, store_windows, stored_windows
from distillery.tasks.schema import Task
from distillery.training.adapters import scale_low_rank

LINEAR = (nn.Linear, Conv1D)  # GPT-2's layers are of the second kind


def attach_adapters(model: Any, lora: LoraSettings | None, arch: str, seed: int) -> Any:
    """`model` with LoRA adapters in linear layers (Hu et al. 2022), or as it is when `lora` is None.

    Raises UserError when `lora` names a layer, or a name of linear layers, that does not exist, and for a model that
    has series adapters.
    """
    if lora is None:
        return model
    _refuse_more_adapters(model)
    _check_targets(model, lora)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha or 2 * lora.r,
        lora_dropout=lora.dropout,
        target_modules=lora.targets if lora.layers == "all" else _linear_layers(model, lora),
        task_type={"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}.get(arch, "SEQ_CLS"),
        exclude_modules=_trained_whole(model) if arch == "classifier" else None,
    )
    model = get_peft_model(model, config)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            # peft would widen every input to the adapter's float32, for autocast to narrow it again
            module.cast_input_dtype_enabled = False
            scale_low_rank(module)
    return model


def attach_series_adapters(model: Any, adapter: AdapterSettings, arch: str, seed: int) -> Any:
    """`model` with adapters behind attention and MLP (Houlsby et al. 2019); they and a classifier's head are trained.

    Raises UserError when a layer does not exist, for a model whose layers are not known, and for one that has such
    adapters.
    """
    _refuse_more_adapters(model)
    names = sublayer_outputs(model, adapter.layers)
    model.requires_grad_(False)
    torch.manual_seed(seed)
    add_series_adapters(model, names, adapter.size, adapter.activation)
    for name in head_layers(model) if arch == "classifier" else []:
        model.get_submodule(name).requires_grad_()
    return model


def _refuse_more_adapters(model: Any) -> None:
    """Raise UserError for a model with series adapters: an adapter on top of them could not be merged."""
    if has_series_adapters(model):
        raise UserError(f"adapter: {model.name_or_path} has series adapters already; train all its weights instead")


def _check_targets(model: Any, lora: LoraSettings) -> None:
    """Raise UserError for a name in `lora.targets` that no linear layer has: peft would leave it out."""
    linear = [name for name, module in model.named_modules() if isinstance(module, LINEAR)]
    wanted = [] if lora.targets == "all-linear" else lora.targets
    for target in wanted:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear))
            raise UserError(f"targets: no linear layer is called `{target}`; there are: {known}")


def _linear_layers(model: Any, lora: LoraSettings) -> list[str]:
    """The full names of the linear layers that `lora` names, in the layers that it names."""
    layers = chosen_layers(model, lora.layers)
    linear = {id(module) for layer in layers for module in layer.modules() if isinstance(module, LINEAR)}
    return [
        name
        for name, module in model.named_modules()
        if id(module) in linear and (lora.targets == "all-linear" or name.rpartition(".")[2] in lora.targets)
    ]


def _trained_whole(model: Any) -> list[str]:
    """The layers of a classifier's head that peft trains whole, by their names: it fails on one with an adapter."""
    return [name for name in head_layers(model) if name.endswith(("classifier", "score"))]


def build_student(
    spec: StudentConfig, folder: Path, task: Task, seed: int, origin: ModelConfig | None = None
) -> LabelModel:
    """The student before its first step: the layers `spec.init` names of the model in `folder`, and its adapter.

    origin: the section of that model in params.yaml: the labels of its head, and whether its own code runs.
    Trained weights are in float32 whatever `spec.dtype` is, which is the precision of the matrix products.
    Raises UserError when the folder holds no such model, a layer does not exist or the model reads no text so long.
    """
    adapted, dtype = spec.adapter.kind != "none", resolve_dtype(spec.dtype, "training")
    remote_code = origin is not None and origin.trust_remote_code
    model = load_model(
        folder,
        spec.arch,
        labels=task.names,
        label_map=origin.labels if origin else None,
        layers=spec.init.layers,
        dtype=dtype if adapted and spec.arch != "classifier" else "float32",
        seed=seed,
        quantize=spec.adapter.kind == "qlora",
        trust_remote_code=remote_code,
    )
    if spec.adapter.kind == "series":
        model = attach_series_adapters(model, spec.adapter, spec.arch, seed)
    else:
        model = attach_adapters(model, spec.adapter if adapted else None, spec.arch, seed)
    if spec.init.freeze == "embeddings":
        model.get_input_embeddings().requires_grad_(False)
    elif spec.init.freeze != "nothing":
        freeze_lower_layers(model, int(spec.init.freeze.removeprefix("first-")))
    if spec.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    tokenizer = load_tokenizer(folder, remote_code)
    if spec.arch == "classifier":
        tokenizer.model_max_length = spec.max_length  # where plain transformers code cuts a text, too
    windows = build_windows(f"params.yaml: student of `{spec.model}`", spec.long_texts, tokenizer, spec.max_length)
    store_windows(model, windows)
    settings = {"prompt": spec.prompt, "few_shot": spec.few_shot, "max_length": spec.max_length}
    student = LabelModel(model, tokenizer, task, spec.arch, dtype=dtype, windows=windows, **settings)
    place = f"params.yaml: max_length of a student of `{spec.model}`"
    require_positions(place, spec.max_length, max_positions(model), student.longest_answer)
    return student


def load_student(spec: StudentConfig, folder: Path, task: Task, dtype: str = "float32") -> LabelModel:
    """Load a finished student from its folder.

    In float32 it predicts what any program that loads the folder computes, row by row or in batches. Half precision is
    faster, and its roundings depend on the batch.
    """
    model = load_model(folder, spec.arch, labels=task.names, dtype=dtype)
    tokenizer = load_tokenizer(folder)
    settings = {"prompt": spec.prompt, "few_shot": spec.few_shot, "max_length": spec.max_length}
    return LabelModel(model, tokenizer, task, spec.arch, dtype=dtype, windows=stored_windows(model), **settings)
