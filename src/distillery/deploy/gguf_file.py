"""Write a causal student as a GGUF file, the format of llama.cpp, and read its weights back."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedModel

from distillery.deploy.gguf_tokenizer import tokenizer_fields
from distillery.deploy.prompt_parts import prompt_parts
from distillery.deploy.settings import InferenceSettings
from distillery.errors import UserError
from distillery.files import atomic_write
from distillery.models.load import load_model, load_tokenizer
from distillery.models.runtime import configure_runtime

ARCHITECTURES = {  # model_type of transformers -> that of GGUF
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
}
FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
Q8_0 = gguf.GGMLQuantizationType.Q8_0
Q8_0_BLOCK = gguf.GGML_QUANT_SIZES[Q8_0][0]  # weights that share a scale
INFERENCE_FIELD = "distillery.inference"  # JSON: how a text becomes a prompt, and the answers that are scored


def write_gguf(folder: Path, settings: InferenceSettings, path: Path, precision: str) -> None:
    """Write the causal student in a model `folder` to `path`, as a whole or not at all.

    precision: of the matrices, `f32`, `f16` or `q8_0` (8 bits with a scale for each 32; rows that are no multiple of 32
    long stay in 16 bits). Vectors, and matrices with values beyond float16, are written in float32.
    Raises UserError for a model or tokenizer that the format, or this writer, does not know.
    """
    model = load_model(folder, "causal").cpu()
    architecture = _check_architecture(folder, model)
    fields = _model_fields(model, settings, precision) | tokenizer_fields(folder, model.config.vocab_size)
    fields[INFERENCE_FIELD] = json.dumps(_inference(folder, settings), ensure_ascii=False)
    with atomic_write(path) as scratch:
        writer = gguf.GGUFWriter(scratch, gguf.MODEL_ARCH_NAMES[architecture])
        for name, value in fields.items():
            _add_field(writer, name, value)
        for name, tensor in gguf_tensors(model, architecture).items():
            values, kind = encode_tensor(tensor, precision)
            writer.add_tensor(name, values, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read_gguf(path: Path) -> PreTrainedModel:
    """The model in a GGUF file as `transformers` reads it: its config, and its weights dequantized to float32."""
    configure_runtime()
    with redirect_stderr(io.StringIO()):  # a progress bar
        return AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )


def _check_architecture(folder: Path, model: PreTrainedModel) -> gguf.MODEL_ARCH:
    """The architecture of `model` in GGUF. Raises UserError where the file could not say all that the model does."""
    config = model.config
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"{folder}: the architecture {config.model_type} is not written as GGUF; known: {known}")
    windowed = getattr(config, "sliding_window", None) and "sliding_attention" in (
        getattr(config, "layer_types", None) or ["sliding_attention"]
    )
    special = {
        "rope_type": config.rope_parameters["rope_type"] != "default",
        "sliding_window": bool(windowed),
        "attention_bias": getattr(config, "attention_bias", False),
        "mlp_bias": getattr(config, "mlp_bias", False),
        "hidden_act": config.hidden_act != "silu",
    }
    if unknown := [name for name, differs in special.items() if differs]:
        raise UserError(f"{folder}: {config.model_type} with another `{unknown[0]}` than usual is not written as GGUF")
    return ARCHITECTURES[config.model_type]


def _head_width(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _model_fields(model: PreTrainedModel, settings: InferenceSettings, precision: str) -> dict[str, Any]:
    config = model.config
    name, width = gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type]], _head_width(config)
    return {
        "general.name": settings.student,
        "general.file_type": int(FILE_TYPES[precision]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        f"{name}.block_count": config.num_hidden_layers,
        f"{name}.context_length": config.max_position_embeddings,
        f"{name}.embedding_length": config.hidden_size,
        f"{name}.feed_forward_length": config.intermediate_size,
        f"{name}.vocab_size": config.vocab_size,
        f"{name}.attention.head_count": config.num_attention_heads,
        f"{name}.attention.head_count_kv": config.num_key_value_heads,
        f"{name}.attention.key_length": width,
        f"{name}.attention.value_length": width,
        f"{name}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{name}.rope.dimension_count": width,
        f"{name}.rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }


def _inference(folder: Path, settings: InferenceSettings) -> dict[str, Any]:
    parts = prompt_parts(settings.task, load_tokenizer(folder), "causal", settings.prompt, settings.few_shot)
    fields = {"student", "max_length", "temperature", "cleaning"}
    return settings.model_dump(include=fields) | {"labels": settings.task.names} | asdict(parts)


def _add_field(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)


def gguf_tensors(model: PreTrainedModel, architecture: gguf.MODEL_ARCH) -> dict[str, np.ndarray]:
    """The weights of `model` in float32 under their names in GGUF; an output head that is tied is left out.

    Rows of queries and keys of the llama architecture are reordered: llama.cpp rotates neighbours there, `transformers`
    the halves of a head.
    """
    config = model.config
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    tensors = {}
    for key, parameter in model.named_parameters():  # each tied weight once
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UserError(f"{model.name_or_path}: the weight {key} has no name in GGUF")
        values = parameter.detach().float().numpy()
        part = name.split(".")[-2]
        if architecture is gguf.MODEL_ARCH.LLAMA and part in heads:
            values = values.reshape(heads[part], 2, -1, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)
        tensors[name] = np.ascontiguousarray(values)
    return tensors


def encode_tensor(values: np.ndarray, precision: str) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
    """`values` (float32) as the file holds them, and their type there; see :func:`write_gguf`."""
    beyond = np.abs(values).max(initial=0) > np.finfo(np.float16).max
    if precision == "f32" or values.ndim == 1 or beyond:
        return values, gguf.GGMLQuantizationType.F32
    if precision == "q8_0" and values.shape[-1] % Q8_0_BLOCK == 0:
        return gguf.quants.quantize(values, Q8_0), Q8_0
    return values.astype(np.float16), gguf.GGMLQuantizationType.F16
