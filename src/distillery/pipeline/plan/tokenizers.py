"""Stand-ins for tokenizers that are not here: another family gives other ids, and texts are about as long."""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PIECE = 6  # letters of a token at most: 0.8 to 1.1 times as many tokens as SmolLM2 has in the corpora of this project
ENCODERS = ("bert", "roberta", "distilbert", "albert", "mpnet", "electra", "deberta-v2")
CHAT = "{% for turn in messages %}<|{{ turn.role }}|>\n{{ turn.content }}\n{% endfor %}<|assistant|>\n"


def write_stand_in(folder: Path, config: dict[str, Any], family: str, texts: Sequence[str]) -> None:
    """Write `config` and a tokenizer for `texts` into `folder`. Tokenizers of one `family` give the same ids.

    A token is a piece of a word of at most `PIECE` letters, a digit or a sign.
    """
    from tokenizers import Regex, Tokenizer, pre_tokenizers, processors
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    split = pre_tokenizers.Split(Regex(rf" ?\p{{L}}{{1,{PIECE}}}| ?\p{{N}}| ?[^\s\p{{L}}\p{{N}}]|\s"), "isolated")
    signs = [space + sign for sign in string.printable for space in ("", " ")]
    pieces = {piece for text in [*dict.fromkeys(texts), *signs] for piece, _ in split.pre_tokenize_str(text)}
    ordered = sorted(pieces, key=lambda piece: hashlib.sha256(f"{family} {piece}".encode()).digest())
    encoder, seq2seq = config["model_type"] in ENCODERS, config["model_type"] == "t5"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] if encoder else ["<pad>", "<unk>", "</s>", "<s>"]
    size = config.get("vocab_size", len(ordered) + len(special))
    vocabulary = {piece: i for i, piece in enumerate([*special, *ordered][:size])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=special[1]))
    tokenizer.pre_tokenizer = split
    names = {"pad_token": special[0], "unk_token": special[1]}
    if encoder:
        template, names = "[CLS] $A [SEP]", names | {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    else:
        template, names = "$A </s>" if seq2seq else "<s> $A", names | {"bos_token": "<s>", "eos_token": "</s>"}
    known = [(token, i) for i, token in enumerate(special) if token in template]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=known)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT, **names).save_pretrained(folder)
