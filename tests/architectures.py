"""Tiny causal models of many architectures, with random weights, and a plain forward pass to compare with.

Nothing of `src` is used here, so that tests and `benchmarks/architectures.py` have a reference of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

PAD, END, WINDOW = 1, 3, 16  # ids of the tiny tokenizer; tokens that a layer with a sliding window sees
LAYERS = {"num_hidden_layers": 2}
SHAPE = LAYERS | {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 512}
GROUPED = SHAPE | {"num_key_value_heads": 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SLIDING_FIRST = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
BY_HEAD = {"head_dim": 8}

# name: (type of the config, its keys)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", GROUPED),
    "qwen2": ("qwen2", GROUPED),
    "qwen3": ("qwen3", GROUPED | BY_HEAD),
    "mistral": ("mistral", GROUPED | {"sliding_window": None}),
    "mistral, sliding window": ("mistral", GROUPED | {"sliding_window": WINDOW}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}),
    "opt": ("opt", SHAPE | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "gpt_neox": ("gpt_neox", SHAPE),
    "gptj": ("gptj", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "rotary_dim": 4}),
    "falcon": ("falcon", SHAPE | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon, ALiBi": ("falcon", SHAPE | {"alibi": True, "multi_query": False, "new_decoder_architecture": False}),
    "mpt": ("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 512}),
    "phi": ("phi", SHAPE),
    "phi3": ("phi3", GROUPED | {"sliding_window": None, "original_max_position_embeddings": 512}),
    "stablelm": ("stablelm", GROUPED),
    "starcoder2": ("starcoder2", GROUPED | {"sliding_window": None}),
    "olmo2": ("olmo2", GROUPED),
    "mixtral": ("mixtral", GROUPED | EXPERTS | {"sliding_window": None}),
    "gemma": ("gemma", GROUPED | BY_HEAD),
    "gemma2": ("gemma2", GROUPED | BY_HEAD | SLIDING_FIRST),
    "gemma3_text": ("gemma3_text", GROUPED | BY_HEAD | SLIDING_FIRST),
    "gemma3n_text": (
        "gemma3n_text",
        GROUPED
        | BY_HEAD
        | SLIDING_FIRST
        | {
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
            "intermediate_size": [48, 48],
            "activation_sparsity_pattern": [0.0, 0.0],
        },
    ),
    "granite": ("granite", GROUPED | {"logits_scaling": 4.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3}),
    "cohere": ("cohere", GROUPED | {"logit_scale": 0.0625}),
    "cohere2": ("cohere2", GROUPED | SLIDING_FIRST | {"logit_scale": 0.0625}),
    "gpt_oss": ("gpt_oss", GROUPED | BY_HEAD | EXPERTS | SLIDING_FIRST),
    "smollm3": ("smollm3", GROUPED),
    "lfm2": ("lfm2", GROUPED | {"layer_types": ["conv", "full_attention"], "block_ff_dim": 48}),
    "granitemoehybrid": (
        "granitemoehybrid",
        GROUPED
        | EXPERTS
        | MAMBA
        | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 48, "logits_scaling": 4.0},
    ),
    "bamba": ("bamba", GROUPED | MAMBA | {"attn_layer_indices": [1], "attn_rotary_emb": 8}),
    "falcon_h1": (
        "falcon_h1",
        GROUPED | BY_HEAD | MAMBA | {"mamba_d_ssm": 64, "lm_head_multiplier": 0.25, "attention_dropout": 0.0},
    ),
    "mamba": ("mamba", LAYERS | {"hidden_size": 32, "state_size": 8}),
    "mamba2": (
        "mamba2",
        LAYERS | {"hidden_size": 32, "num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    ),
    "recurrent_gemma": (
        "recurrent_gemma",
        GROUPED | {"lru_width": 32, "attention_window_size": WINDOW, "block_types": ["recurrent", "attention"]},
    ),
    "rwkv": ("rwkv", LAYERS | {"hidden_size": 32, "attention_hidden_size": 32, "context_length": 512}),
    "jamba": (
        "jamba",
        GROUPED
        | {"num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1}
        | {"expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False, "mamba_d_state": 8},
    ),
}


def random_model(name: str, vocab_size: int) -> Any:
    """The model of `ARCHITECTURES[name]`, with weights large enough that a wrong mask or position shows."""
    kind, keys = ARCHITECTURES[name]
    ends = {"pad_token_id": PAD, "bos_token_id": 2, "eos_token_id": END}
    config = transformers.AutoConfig.for_model(kind, vocab_size=vocab_size, **ends, **keys)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(0, 0.3)
    return model


def drawn_rows(vocab_size: int, *lengths: int) -> list[list[int]]:
    """Rows of drawn tokens, no special ones, of which the first three are the same."""
    drawn = torch.randint(4, vocab_size, (sum(lengths),), generator=torch.Generator().manual_seed(3)).tolist()
    return [drawn[:3] + drawn[sum(lengths[:i]) + 3 : sum(lengths[: i + 1])] for i in range(len(lengths))]


def plain_log_probabilities(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
    """[tokens, vocabulary] where the tokens of `completion` are predicted: one row, one forward pass, no mask."""
    logits = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1].float().log_softmax(-1)


@torch.no_grad()
def plain_greedy(model: Any, prompt: Sequence[int], n_tokens: int) -> list[int]:
    """The likeliest next token, `n_tokens` times or up to the end token, by a whole forward pass a token."""
    tokens: list[int] = []
    while len(tokens) < n_tokens and tokens[-1:] != [END]:
        tokens.append(int(plain_log_probabilities(model, [*prompt, *tokens], [0]).argmax()))
    return tokens
