"""What all sections of `params.yaml` share: the base class, patterns, number ranges, and names of loss terms."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

SPLITS = ("train", "pool", "validation", "test")


@dataclass(frozen=True)
class SplitRef:
    """A split of a source, written `source/split`. The split `augmented` holds paraphrases of `train`."""

    source: str
    split: str

    @classmethod
    def parse(cls, text: str, splits: Collection[str] = (*SPLITS, "augmented")) -> SplitRef:
        """The split that `text` names. Raises ValueError when it is no `source/split` with one of `splits`."""
        source, _, split = text.partition("/")
        if not source or split not in splits:
            raise ValueError(f"`{text}` must be `source/split` with split one of {', '.join(splits)}")
        return cls(source, split)

    def __str__(self) -> str:
        return f"{self.source}/{self.split}"


WRITING_KINDS = ("lm", "seq2seq", "api")  # kinds of teacher that write rationales and paraphrases


DIVERGENCES = ("kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd")  # in the phase's `space`


HIDDEN_STATE_TERMS = ("hidden", "pkd", "attention", "cosine")


LOSS_TERMS = ("ce", *DIVERGENCES, "uld", *HIDDEN_STATE_TERMS, "rationale", "label_prior")


class Section(BaseModel):
    """A section of keys and values. The string below a field is its meaning in docs/parameters.md."""

    # strict: a number in quotes is a slip, and coercing it here would hide it from the tools that do not
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"


SOURCE_NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"


WHEEL = r"^[A-Za-z0-9._-]+(\{[0-9]+\.\.[0-9]+\}[A-Za-z0-9._-]*)?==[A-Za-z0-9._+!-]+$"  # with at most one range


SHA256 = r"^[0-9a-f]{64}$"


URL = r"^https?://[^@\s]+$"


VARIABLE = r"^[A-Za-z_][A-Za-z0-9_]*$"


LAYERS = r"^(all|(first|last|every)-[1-9][0-9]*)$"


FROZEN = r"^(nothing|embeddings|first-[1-9][0-9]*)$"


TRIMMED_TEXT = r"^\S(.*\S)?$"


PATTERNS = {
    TRIMMED_TEXT: "text without white space around it",
    NAME: "a name of letters, digits, `_`, `.` and `-` that starts with a letter or digit",
    SOURCE_NAME: "a name of letters, digits, `_` and `-`, without a dot, which DVC reads as a key inside a key",
    WHEEL: "name==version",
    SHA256: "64 digits of 0-9 and a-f",
    URL: "http://… or https://…, without a user name or password",
    VARIABLE: "the name of an environment variable, never the key itself",
    LAYERS: "`all`, `first-N`, `last-N` or `every-N`",
    FROZEN: "`nothing`, `embeddings` or `first-N`",
}


Name = Annotated[str, Field(pattern=NAME)]


SourceName = Annotated[str, Field(pattern=SOURCE_NAME)]


PinnedWheel = Annotated[str, Field(pattern=WHEEL)]


RANGE = re.compile(r"\{([0-9]+)\.\.([0-9]+)\}")


def expand_ranges(text: str) -> list[str]:
    """`text` once for each number of its ranges `{first..last}`, which count together; [text] without one.

    `a{9..10}/b{09..10}` is a9/b09, a10/b10. Raises ValueError for an empty range, and for ranges of different lengths.
    """
    parts = RANGE.split(text)  # text, first, last, text, first, last, text ...
    bounds = list(zip(parts[1::3], parts[2::3], strict=True))
    lengths = {int(last) - int(first) + 1 for first, last in bounds} or {1}
    if len(lengths) > 1 or min(lengths) < 1:
        raise ValueError(f"`{text}`: its ranges must have one length, of at least 1")
    expanded = []
    for i in range(lengths.pop()):
        numbers = [str(int(first) + i).zfill(len(first)) for first, _ in bounds]
        expanded.append("".join(a + b for a, b in zip(parts[::3], [*numbers, ""], strict=True)))
    return expanded


Digest = Annotated[str, Field(pattern=SHA256)]


Fraction = Annotated[float, Field(ge=0, le=1)]


Positive = Annotated[float, Field(gt=0)]


Count = Annotated[int, Field(ge=0)]
