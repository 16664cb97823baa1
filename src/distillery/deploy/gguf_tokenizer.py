"""The tokenizer of a student as fields of a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
from transformers import PreTrainedTokenizerBase

from distillery.errors import UserError
from distillery.models.load import load_tokenizer

_GPT2 = {"type": "ByteLevel", "use_regex": True}
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(digits: str) -> list[dict]:
    pattern = {"type": "Split", "pattern": {"Regex": _WORDS % digits}, "behavior": "Isolated", "invert": False}
    return [pattern, {"type": "ByteLevel", "use_regex": False}]


# How a text is cut before merges, as `tokenizer.json` has it (without what changes no cut) -> llama.cpp's name for it,
# from `llama-vocab.cpp`. A wrong name would give other tokens without an error.
PRE_TOKENIZERS = {
    "gpt-2": [_GPT2],
    "smollm": [{"type": "Digits", "individual_digits": True}, _GPT2],
    "qwen2": _split(r"\p{N}"),
    "llama-bpe": _split(r"\p{N}{1,3}"),
}
IGNORE_MERGES = ("llama-bpe",)  # llama.cpp takes a word that is a token whole there, and nowhere else


def tokenizer_fields(folder: Path, vocabulary: int) -> dict[str, Any]:
    """The fields `tokenizer.*` for the tokenizer in a model `folder` whose model has `vocabulary` embeddings.

    Raises UserError for one that is no byte-level BPE of the kinds in :data:`PRE_TOKENIZERS`.
    """
    tokenizer = load_tokenizer(folder)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens, types = _tokens(tokenizer, content, vocabulary)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in content["model"].get("merges", [])]
    empty, one = tokenizer("")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _pre_tokenizer(folder, content),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": tokenizer.bos_token_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.unknown_token_id": tokenizer.unk_token_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
        "tokenizer.ggml.add_bos_token": whole != one and whole[:1] == [tokenizer.bos_token_id],
        "tokenizer.ggml.add_eos_token": whole != one and whole[-1:] == [tokenizer.eos_token_id],
        "tokenizer.chat_template": tokenizer.chat_template or None,
    }
    if len(empty) != fields["tokenizer.ggml.add_bos_token"] + fields["tokenizer.ggml.add_eos_token"]:
        raise UserError(f"{folder}: its tokenizer adds special tokens that GGUF has no fields for: {empty}")
    return {name: value for name, value in fields.items() if value is not None}


def _pre_tokenizer(folder: Path, content: dict[str, Any]) -> str:
    """llama.cpp's name for how the tokenizer of `content` (a `tokenizer.json`) cuts texts."""
    model, normalizer = content["model"], content["normalizer"] or {"type": "NFC"}  # texts are in NFC: see `clean_text`
    cutting = content["pre_tokenizer"] or {}
    steps = cutting.get("pretokenizers", [cutting])
    keys = ("type", "use_regex", "individual_digits", "pattern", "behavior", "invert")
    plain = [{key: step[key] for key in keys if key in step} for step in steps]
    prefixed = any(step.get("add_prefix_space") for step in steps)
    names = [name for name, known in PRE_TOKENIZERS.items() if plain == known]
    whole_words = bool(model.get("ignore_merges"))
    names = [name for name in names if whole_words == (name in IGNORE_MERGES)]
    if model["type"] == "BPE" and normalizer == {"type": "NFC"} and names and not prefixed:
        return names[0]
    known = ", ".join(PRE_TOKENIZERS)
    raise UserError(f"{folder}: its tokenizer cannot be written as GGUF; known: byte-level BPE that cuts as {known}")


def _tokens(
    tokenizer: PreTrainedTokenizerBase, content: dict[str, Any], vocabulary: int
) -> tuple[list[str], list[int]]:
    """The texts and types of all tokens; embeddings that no token has are unused tokens."""
    added = {token["id"]: token for token in content["added_tokens"]}
    texts = {number: text for text, number in tokenizer.get_vocab().items()}
    tokens, types = [], []
    for number in range(max(vocabulary, max(texts) + 1)):
        tokens.append(texts.get(number, f"[PAD{number}]"))
        if number not in texts:
            types.append(gguf.TokenType.UNUSED)
        elif number in added:
            types.append(gguf.TokenType.CONTROL if added[number]["special"] else gguf.TokenType.USER_DEFINED)
        else:
            types.append(gguf.TokenType.NORMAL)
    return tokens, [int(kind) for kind in types]
