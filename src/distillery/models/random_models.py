"""Small models with random weights, to try an experiment without the real one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from distillery.config.schema import ModelConfig, RandomModelConfig
from distillery.models.folders import read_words_file

ENCODERS = ("bert", "albert")  # of the types that can be built
MAX_TOKENS = 512  # that a model built here reads


def build_random_model(name: str, model_config: ModelConfig, scratch: Path) -> Path:
    """A folder in `scratch` with a model of random weights and a word tokenizer; see :class:`RandomModelConfig`.

    Raises UserError when a file of words does not exist.
    """
    spec, folder = model_config.random, scratch / "model"
    tokenizer = _word_tokenizer(name, spec)
    encoder = spec.type in ENCODERS
    ends = {} if encoder else {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model(spec.type, vocab_size=len(tokenizer), pad_token_id=0, **ends, **_shape(spec))
    auto_model = AutoModel if encoder else AutoModelForSeq2SeqLM if spec.type == "t5" else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        model = auto_model.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _word_tokenizer(name: str, spec: RandomModelConfig) -> PreTrainedTokenizerBase:
    """A tokenizer with a token for every word in the files `spec.words`."""
    from tokenizers import Tokenizer, pre_tokenizers, processors, trainers
    from tokenizers.models import WordLevel

    encoder = spec.type in ENCODERS
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] if encoder else ["<pad>", "<unk>", "</s>"]
    tokenizer = Tokenizer(WordLevel(unk_token=special[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    lines = (
        line for file in spec.words for line in read_words_file(name, file).read_text(encoding="utf-8").splitlines()
    )
    tokenizer.train_from_iterator(lines, trainers.WordLevelTrainer(special_tokens=special))
    names = {"pad_token": special[0], "unk_token": special[1], "model_max_length": MAX_TOKENS}
    if encoder:
        template, names = "[CLS] $A [SEP]", names | {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    else:
        template, names = "$A </s>" if spec.type == "t5" else "$A", names | {"eos_token": "</s>"}
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(token, i) for i, token in enumerate(special)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def _shape(spec: RandomModelConfig) -> dict[str, Any]:
    """Sizes of the model, under the keys that configs of its type have."""
    if spec.type == "t5":
        return {
            "d_model": spec.hidden,
            "d_kv": spec.hidden // spec.heads,
            "d_ff": 2 * spec.hidden,
            "num_layers": spec.layers,
            "num_decoder_layers": spec.layers,
            "num_heads": spec.heads,
            "decoder_start_token_id": 0,
        }
    if spec.type == "gpt2":
        return {"n_embd": spec.hidden, "n_layer": spec.layers, "n_head": spec.heads, "n_positions": MAX_TOKENS}
    return {
        "hidden_size": spec.hidden,
        "intermediate_size": 2 * spec.hidden,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "max_position_embeddings": MAX_TOKENS,
    }
