"""Load a model and its tokenizer from a folder."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn
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
from distillery.label_sets import LabelSets
from distillery.models.devices import weight_device
from distillery.models.heads import MULTILABEL, read_config, read_head
from distillery.models.layers import head_layers, keep_layers
from distillery.models.runtime import configure_runtime
from distillery.models.series_adapters import VARIANT, reopen_adapters, stored_adapters

TIED = "tie_word_embeddings"  # key of a config


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, with a padding token. Raises UserError when there is none that can be read."""
    configure_runtime()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ImportError, OSError, ValueError) as error:
        reason = _missing_packages(folder) or str(error).strip().splitlines()[0]
        raise UserError(f"{folder.name}: no tokenizer can be read: {reason}") from None
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers makes one of these alone from no file at all
        raise UserError(f"{folder.name}: no tokenizer can be read: the folder holds no vocabulary")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def _missing_packages(folder: Path) -> str | None:
    """The packages that the tokenizer in `folder` needs and that are not installed, in words; None if there is none."""
    for file in sorted(folder.glob("*.model")):
        with open(file, "rb") as opened:
            is_sentencepiece = opened.read(1) == b"\n"  # the first field of its message; a file of tiktoken is text
        missing = [
            name for name in (("sentencepiece", "protobuf") if is_sentencepiece else ("tiktoken",)) if not _has(name)
        ]
        if missing:
            return f"{file.name} needs {' and '.join(missing)}: pip install '.[tokenizers]' in the project's folder"
    return None


def _has(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def load_model(
    folder: Path,
    arch: str,
    *,
    labels: Sequence[str] | None = None,
    label_map: Mapping[str, str] | None = None,
    layers: list[int] | str = "all",
    dtype: str = "float32",
    seed: int = 0,
    quantize: bool = False,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model in `folder`, with only the `layers` wanted, on its :func:`weight_device`.

    arch: `causal`, `seq2seq`, or `classifier` (then `labels` name the outputs of its head; that of the folder if it is
    for these labels, its outputs in their order, else one drawn with `seed`). label_map: see :func:`read_head`.
    quantize: load the linear layers in 4 bits (NF4 with double quantization; Dettmers et al. 2023, QLoRA).

    Sets torch's seed to `seed`, and the process as :func:`configure_runtime` does. Raises UserError when the folder
    holds no such model or the layers do not exist.
    """
    configure_runtime()
    device = weight_device(quantize)
    if device.type != "meta":
        gc.collect()  # a trainer and its model refer to each other: a model that no name holds goes before the next
    torch.manual_seed(seed)
    adapters = _stored_adapters(folder, quantize)
    if quantize and layers != "all" and device.type != "meta":
        return _load_quantized_layers(
            folder, arch, layers=layers, dtype=dtype, seed=seed, trust_remote_code=trust_remote_code
        )
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "trust_remote_code": trust_remote_code}
    options |= {"variant": VARIANT} if adapters else {}
    if device.type == "meta":
        options, quantize = {"trust_remote_code": trust_remote_code}, False
    elif quantize:  # such weights are placed while they load
        options |= {"quantization_config": nf4_config(dtype), "device_map": {"": device.type}}
    try:
        if arch == "causal":
            model = _load(AutoModelForCausalLM, folder, device, **options)
        elif arch == "seq2seq":
            model = _load(AutoModelForSeq2SeqLM, folder, device, **options)
        else:
            model = _load_classifier(folder, labels, label_map, device, options)
        reopen_adapters(model, adapters, folder)
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
    return model if quantize else model.to(device)


def _stored_adapters(folder: Path, quantize: bool) -> dict[str, Any] | None:
    """The record of the series adapters of the model in `folder`, None without any. Raises UserError in 4 bits."""
    adapters = stored_adapters(folder)
    if adapters and quantize:
        raise UserError(f"{folder.name}: has series adapters, and is not loaded in 4 bits")
    return adapters


def _load(auto_model: Any, folder: Path, device: torch.device, *, trust_remote_code: bool, **options: Any) -> Any:
    """The model of the class `auto_model` in `folder`; on the `meta` device from its config alone, in float32."""
    if device.type != "meta":
        return auto_model.from_pretrained(folder, trust_remote_code=trust_remote_code, **options)
    config = options.get("config") or AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with device:
        model = auto_model.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
        head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
        if head is not None and head.weight is embeddings.weight and not read_config(folder).get(TIED, True):
            # transformers ties T5's head whatever its config has, and takes it apart where the weights' file has both
            head.weight = nn.Parameter(torch.empty_like(head.weight))
    return model


def _load_quantized_layers(
    folder: Path, arch: str, *, layers: list[int] | str, seed: int, **options: Any
) -> PreTrainedModel:
    """Some layers of the model in `folder`, in 4 bits. bitsandbytes quantizes on loading: the others go before that."""
    with tempfile.TemporaryDirectory() as scratch:
        load_model(folder, arch, layers=layers, **options).save_pretrained(scratch)
        model = load_model(Path(scratch), arch, seed=seed, quantize=True, **options)
    model.name_or_path = model.config.name_or_path = str(folder)  # not the scratch folder
    return model


def _load_classifier(
    folder: Path, labels: Sequence[str], label_map: Mapping[str, str] | None, device: torch.device, options: dict
) -> PreTrainedModel:
    """The model in `folder` with a head for `labels`: its own if it has one for them, else one drawn anew."""
    own = read_head(folder, labels, label_map)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=options["trust_remote_code"])
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}
    # one label a text, or sets of them, of which `transformers` then makes probabilities one by one
    config.problem_type = MULTILABEL if isinstance(labels, LabelSets) else None
    options |= {"config": config, "ignore_mismatched_sizes": own.order is None}
    model = _load(AutoModelForSequenceClassification, folder, device, **options)
    if own.order is None and own.names and len(own.names) == len(labels):
        _draw_head(model)
    elif own.order not in (None, list(range(len(labels)))):
        _reorder_head(model, own.order)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = load_tokenizer(folder).pad_token_id
    return model


def _draw_head(model: PreTrainedModel) -> None:
    """Draw the layer of the label logits anew, as a model of this class does: it was read for other labels."""
    name = head_layers(model)[-1]
    old = model.get_submodule(name)
    new = nn.Linear(old.in_features, old.out_features, bias=old.bias is not None, dtype=old.weight.dtype)
    model._init_weights(new)
    model.set_submodule(name, new.to(old.weight.device))
    head = name.rpartition(".")[0]
    if head:  # T5's has a rule of its own, narrower than that of a lone layer; what was read stays as it is
        model._init_weights(model.get_submodule(head))


def _reorder_head(model: PreTrainedModel, order: Sequence[int]) -> None:
    """Put the outputs of the head in the `order` of the labels."""
    layer = model.get_submodule(head_layers(model)[-1])
    for parameter in layer.parameters():
        parameter.data = parameter.data[list(order)]


def nf4_config(dtype: str) -> Any:
    """4-bit NormalFloat with double quantization, computing in `dtype` (Dettmers et al. 2023)."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
