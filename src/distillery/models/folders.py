"""The folder of a model, whether it is there already or not."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from distillery.config.schema import ModelConfig
from distillery.errors import UserError
from distillery.files import Paths, repository_root


def read_words_file(name: str, file: str) -> Path:
    """The path of `file`, whose words model `name` is to know. Raises UserError when it does not exist."""
    path = repository_root() / file
    if not path.is_file():
        raise UserError(f"params.yaml: models.{name}.random.words: {file}: no such file")
    return path


def model_folder(name: str, spec: ModelConfig, cache: Path | None = None) -> Path:
    """The folder in which model `name` lies, or will lie once it is fetched.

    cache: `.cache/models` when not given; a folder in it is called by `name` and a hash of all that decides the files.
    Raises UserError when a file of words does not exist.
    """
    if spec.folder and not spec.wheel:
        return repository_root() / spec.folder
    without = {"labels", "size"} if spec.random else {"labels", "size", "random"}
    identity = json.dumps(spec.model_dump(exclude=without), sort_keys=True).encode()
    if spec.random:
        identity += b"".join(read_words_file(name, file).read_bytes() for file in spec.random.words)
    cache = cache or Paths(repository_root()).cache / "models"
    return cache / f"{name}-{hashlib.sha256(identity).hexdigest()[:12]}"
