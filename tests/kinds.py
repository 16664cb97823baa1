"""Tiny models with random weights of every architecture that the project builds or names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny

ARCHS = {
    "classifier": ("bert", "roberta", "distilbert", "albert", "mpnet", "electra", "deberta-v2"),
    "causal": (*tiny.CAUSAL_KINDS, "mistral", "gemma", "phi", "gpt_neox"),
    "seq2seq": ("t5", "bart"),
}
WORDS = {"classifier": "bert", "causal": "llama", "seq2seq": "t5"}  # the tokenizer of each

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 514,
}
SHAPES = {  # of the kinds that name their sizes in another way
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 514},
    "albert": SHAPE | {"embedding_size": 16},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 514},
    "opt": SHAPE | {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "gemma": SHAPE | {"head_dim": 8, "num_key_value_heads": 1},
    "qwen2": SHAPE | {"num_key_value_heads": 2},
    "mistral": SHAPE | {"num_key_value_heads": 2},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    "bart": {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
    | {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": 0},
}


def build(kind: str, tokenizer: Any, auto: Any, folder: Path, **config: Any) -> Any:
    """Write a model of the type `kind` and its `tokenizer` to `folder`, and return the model.

    auto: its class of `transformers`, such as AutoModel. The weights are large enough for predictions to differ.
    """
    import torch
    import transformers

    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = SHAPES.get(kind, SHAPE) | {"vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    model = auto.from_config(transformers.AutoConfig.for_model(kind, **sizes | special | config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.dim() > 1 else 1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model
