"""Load a model and its tokenizer from a folder."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from distillery.errors import UserError
from distillery.models.layers import keep_layers
from distillery.models.runtime import configure_runtime


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, with a padding token. Raises UserError when there is none that can be read."""
    configure_runtime()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder.name}: no tokenizer can be read: {str(error).splitlines()[0]}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def load_model(
    folder: Path,
    arch: str,
    *,
    labels: Sequence[str] | None = None,
    layers: list[int] | str = "all",
    dtype: str = "float32",
    seed: int = 0,
    quantize: bool = False,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model in `folder`, with only the `layers` wanted, on the GPU if there is one.

    arch: `causal`, `seq2seq`, or `classifier` (then `labels` name the outputs of its head, drawn anew with `seed`
    unless the folder already has a head of just these labels).
    quantize: load the linear layers in 4 bits (NF4 with double quantization; Dettmers et al. 2023, QLoRA).

    Sets torch's seed to `seed`, and the process as :func:`configure_runtime` does. Raises UserError when the folder
    holds no such model or the layers do not exist.
    """
    configure_runtime()
    torch.manual_seed(seed)
    if quantize and layers != "all":
        return _load_quantized_layers(
            folder, arch, layers=layers, dtype=dtype, seed=seed, trust_remote_code=trust_remote_code
        )
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "trust_remote_code": trust_remote_code}
    if quantize:
        options["quantization_config"] = nf4_config(dtype)
    try:
        if arch == "causal":
            model = AutoModelForCausalLM.from_pretrained(folder, **options)
        elif arch == "seq2seq":
            model = AutoModelForSeq2SeqLM.from_pretrained(folder, **options)
        else:
            model = _load_classifier(folder, labels, options)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        if "trust_remote_code" in str(error):
            reason = "it needs its owner's own code, which runs only with `trust_remote_code: true` in params.yaml"
        raise UserError(f"{folder.name}: cannot be loaded as {arch}: {reason}") from None
    if layers != "all":
        keep_layers(model, layers)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes 0.50.2 repacks weights for a CPU at the first pass without gradients; training, merging and
            # generating after that fail, and so does any layer narrower than one block
            module.support_avx512bf16_for_cpu = False
    return model if quantize else model.to(default_device())  # quantized weights are placed while they load


def _load_quantized_layers(
    folder: Path, arch: str, *, layers: list[int] | str, seed: int, **options: Any
) -> PreTrainedModel:
    """Some layers of the model in `folder`, in 4 bits. bitsandbytes quantizes on loading: the others go before that."""
    with tempfile.TemporaryDirectory() as scratch:
        load_model(folder, arch, layers=layers, **options).save_pretrained(scratch)
        model = load_model(Path(scratch), arch, seed=seed, quantize=True, **options)
    model.name_or_path = model.config.name_or_path = str(folder)  # not the scratch folder
    return model


def _load_classifier(folder: Path, labels: Sequence[str], options: dict[str, Any]) -> PreTrainedModel:
    """The model in `folder` with a head for `labels`: its own if it has just these, else one drawn anew."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=options["trust_remote_code"])
    has_head = "SequenceClassification" in str(config.architectures)
    same_labels = list(config.id2label.values()) == list(labels)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, config=config, ignore_mismatched_sizes=not (has_head and same_labels), **options
    )
    if model.config.pad_token_id is None:
        model.config.pad_token_id = load_tokenizer(folder).pad_token_id
    return model


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def nf4_config(dtype: str) -> Any:
    """4-bit NormalFloat with double quantization, computing in `dtype` (Dettmers et al. 2023)."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
