"""The tokens of a vocabulary by what they write: all that two programs with the same model have in common.

A token in a string is one of five:

``positive``           what it writes
``bytes:\\xf0\\x9f``     what it writes, where that is no whole UTF-8 (as OpenAI writes it) or looks like a stored form
``Ġpositive``          its name in the tokenizer's file; some servers send that
``token_id:30487``     its number (vLLM with `return_tokens_as_token_ids`)
``special_id:151645``  the number of a token that writes nothing, such as the end of an answer (llama.cpp)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from transformers import PreTrainedTokenizerBase

BYTES, TOKEN_ID, SPECIAL_ID = "bytes:", "token_id:", "special_id:"
STORED_CHARACTERS = "Ġ▁Ċĉ"  # white space in the names of tokens
REPLACEMENT = "\ufffd"  # what a server writes for bytes that are no whole character: it names no token
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")  # of sentencepiece


def token_string(token: str, written: Iterable[int] | None, token_id: int | None = None) -> str:
    """The string for a token that a server calls `token`, and that writes the bytes `written` (None: not known).

    token_id: its number there, which only identifies a token that writes nothing.
    """
    data = bytes(written or ())
    if not data and not token and token_id is not None:
        return f"{SPECIAL_ID}{token_id}"
    if not data or token.startswith(TOKEN_ID):
        return token
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = ""
    if text and not any(character in text for character in STORED_CHARACTERS):
        return text
    return BYTES + "".join(f"\\x{byte:02x}" for byte in data)


class TokenStrings:
    """The ids of the tokens of `tokenizer` by their strings."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.names: dict[str, int] = tokenizer.get_vocab()
        self.size = len(tokenizer)
        added = {name for name in tokenizer.added_tokens_encoder if not BYTE_TOKEN.fullmatch(name)}
        self.added_ids = {self.names[name] for name in added}
        write = _byte_writer(tokenizer)
        self.ids: dict[bytes, int] = {}
        # of two tokens that write the same, the tokenizer uses the one that is no single byte and was not added
        for name, token_id in sorted(self.names.items(), key=lambda item: (bool(BYTE_TOKEN.fullmatch(item[0])), item)):
            if name not in added:
                self.ids.setdefault(write(name), token_id)
        for name in sorted(added):
            self.ids.setdefault(name.encode(), self.names[name])

    def find(self, token: str) -> int | None:
        """The id of `token`, None where the vocabulary has no token that writes exactly this."""
        if token.startswith(TOKEN_ID):
            token_id = int(token.removeprefix(TOKEN_ID))
            return token_id if token_id < self.size else None
        if token.startswith(SPECIAL_ID):  # a number alone is no proof; that it is a special token here, too, is enough
            token_id = int(token.removeprefix(SPECIAL_ID))
            return token_id if token_id in self.added_ids else None
        if re.fullmatch(rf"{BYTES}(\\x[0-9a-f]{{2}})+", token):
            return self.ids.get(bytes.fromhex(token.removeprefix(BYTES).replace("\\x", "")))
        if REPLACEMENT in token or not token:
            return None
        if any(character in token for character in STORED_CHARACTERS) and token in self.names:
            return self.names[token]
        token_id = self.ids.get(token.encode())
        return self.names.get(token) if token_id is None else token_id


def _byte_writer(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], bytes]:
    """The function from the name of a token in `tokenizer` to the bytes that it writes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # the only place where a tokenizer shows how the names of its tokens are written
    decoder = "Metaspace" if backend is None else str(backend.decoder)
    if "ByteLevel" in decoder:
        byte_of = {character: byte for byte, character in _byte_characters().items()}
        return lambda name: bytes(byte_of[c] for c in name) if all(c in byte_of for c in name) else name.encode()
    if "Metaspace" in decoder or "ByteFallback" in decoder or "▁" in decoder:
        return lambda name: (
            bytes.fromhex(byte[1]) if (byte := BYTE_TOKEN.fullmatch(name)) else name.replace("▁", " ").encode()
        )
    return str.encode


def _byte_characters() -> dict[int, str]:
    """The character for each byte in the names of byte-level tokens (Radford et al. 2019, GPT-2): itself where it is
    visible, else the next of those from U+0100."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}
