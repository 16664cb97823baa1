"""Small models with random weights, to try an experiment without the real one."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
)

from distillery.config.schema import ModelConfig
from distillery.errors import UserError
from distillery.files import repository_root


def read_words_file(name: str, file: str) -> Path:
    path = repository_root() / file
    if not path.is_file():
        raise UserError(f"params.yaml: models.{name}.random.words: {file}: no such file")
    return path


def build_random_model(name: str, spec: ModelConfig, scratch: Path) -> Path:
    """A model of random weights with a tokenizer of whole words; see :class:`RandomModelConfig`."""
    from tokenizers import Tokenizer, pre_tokenizers, processors, trainers
    from tokenizers.models import WordLevel
    from transformers import AutoModel, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

    built = spec.random
    encoder = built.type in ("bert", "albert")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] if encoder else ["<pad>", "<unk>", "</s>"]
    words = Tokenizer(WordLevel(unk_token=special[1]))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    lines = (
        line for file in built.words for line in read_words_file(name, file).read_text(encoding="utf-8").splitlines()
    )
    words.train_from_iterator(lines, trainers.WordLevelTrainer(special_tokens=special))
    names = {"pad_token": special[0], "unk_token": special[1], "model_max_length": 512}
    if encoder:
        around, names = "[CLS] $A [SEP]", names | {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    else:
        around, names = "$A </s>" if built.type == "t5" else "$A", names | {"eos_token": "</s>"}
    words.post_processor = processors.TemplateProcessing(
        single=around, special_tokens=[(token, i) for i, token in enumerate(special)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **names)

    shape = {
        "t5": {
            "d_model": built.hidden,
            "d_kv": built.hidden // built.heads,
            "d_ff": 2 * built.hidden,
            "num_layers": built.layers,
            "num_decoder_layers": built.layers,
            "num_heads": built.heads,
            "decoder_start_token_id": 0,
        },
        "gpt2": {"n_embd": built.hidden, "n_layer": built.layers, "n_head": built.heads, "n_positions": 512},
    }.get(
        built.type,
        {
            "hidden_size": built.hidden,
            "intermediate_size": 2 * built.hidden,
            "num_hidden_layers": built.layers,
            "num_attention_heads": built.heads,
            "max_position_embeddings": 512,
        },
    )
    ends = {} if encoder else {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model(built.type, vocab_size=len(tokenizer), pad_token_id=0, **ends, **shape)
    kind = AutoModel if encoder else AutoModelForSeq2SeqLM if built.type == "t5" else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(built.seed)
        model = kind.from_config(config)
    model.save_pretrained(scratch / "made")
    tokenizer.save_pretrained(scratch / "made")
    return scratch / "made"
