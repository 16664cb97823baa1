"""Read and validate `params.yaml`.

A wrong key or value raises UserError with one line that names the file, the key and what is allowed, before any stage
has run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from distillery.config.messages import validation_message
from distillery.config.references import check_references
from distillery.config.renamed import rename_old_keys
from distillery.config.schema import Params, Section
from distillery.errors import UserError
from distillery.files import Paths, read_yaml, repository_root


def load_params(path: Path | str | None = None) -> Params:
    """Read and validate `params.yaml` (of the repository root when no path is given).

    Raises UserError with one line naming the first wrong key and what is allowed there.
    """
    path = Path(path) if path else Paths(repository_root()).params
    params = validate_section(Params, rename_old_keys(read_yaml(path), path.name), path.name)
    check_references(params, path.name, path.parent)
    return params


def validate_section(kind: type[Section], raw: Any, file: str) -> Any:
    """`raw` as an object of `kind`. Raises UserError with one line naming `file`, the key and what is allowed."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise UserError(validation_message(error, kind, raw, file)) from None
