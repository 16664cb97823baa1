"""What of a local model decides its answers: a part of the key under which they are kept."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from distillery.config.schema import Params
from distillery.models.fetch import fetch_model
from distillery.models.label_model import LabelModel

if TYPE_CHECKING:
    from distillery.teachers.api.teacher import ApiTeacher


def model_identity(params: Params, model: str | None, teacher: LabelModel | ApiTeacher) -> dict[str, Any]:
    """All of an untuned local model that decides what it writes, but for prompt and sampling; for the key of an answer.

    An endpoint has a key of its own: see :class:`ApiTeacher`.
    """
    if teacher.arch == "api":
        return {}
    spec, folder = params.models[model], fetch_model(model, params.models[model])
    content = None
    if spec.folder and not spec.wheel:  # a wheel or a revision says what is in it, a folder does not
        files = sorted(file for file in folder.iterdir() if file.suffix in (".json", ".safetensors", ".model"))
        content = [[file.name, hashlib.file_digest(file.open("rb"), "sha256").hexdigest()] for file in files]
    template = teacher.tokenizer.chat_template or "plain"
    dtype = str(teacher.dtype).removeprefix("torch.")
    return {
        "model": spec.model_dump() | {"content": content},
        "adapter": None,
        "template": hashlib.sha256(str(template).encode()).hexdigest(),
        "dtype": dtype,
        "quantization": "nf4" if getattr(teacher.model, "is_loaded_in_4bit", False) else None,
        "writer": version("transformers"),
    }
