"""Tiny models with random weights and a small experiment on them: everything real but the size."""

from __future__ import annotations

import functools
import importlib
import json
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# what an experiment needs of the repository
COPIED = (
    "dvc.yaml",
    "notebooks",
    "src",
    "tasks",
    ".dvcignore",
    ".gitignore",
    ".dvc/config",
    ".dvc/.gitignore",
    ".dvc/plots",
)
ROLES = "<|im_start|>", "<|im_end|>"
CHAT = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

VOCABULARY, END = 61, 2  # of the configs below
SMALL = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": END}
SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
CAUSAL_KINDS = ("llama", "qwen2", "gpt2", "opt", "bloom")


def causal_config(kind: str, layers: int = 2) -> Any:
    """The config of a causal model of `layers` layers, of one of `CAUSAL_KINDS`."""
    import transformers

    deep = SHAPE | {"num_hidden_layers": layers}
    shape = {
        "llama": deep | {"num_key_value_heads": 2, "intermediate_size": 24},
        "qwen2": deep | {"num_key_value_heads": 1, "intermediate_size": 24},
        "gpt2": {"n_embd": 16, "n_layer": layers, "n_head": 4, "n_positions": 64},
        "opt": deep | {"ffn_dim": 24, "word_embed_proj_dim": 16, "dropout": 0.0},
        "bloom": {"hidden_size": 16, "n_layer": layers, "n_head": 4},
    }[kind]
    return transformers.AutoConfig.for_model(kind, **SMALL, **shape)


def load_benchmark(name: str) -> ModuleType:
    """The script `name` of `benchmarks/`, which may import others there."""
    import pytest  # the checks of a GPU build these models where it may be missing

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(ROOT / "benchmarks")
        return importlib.import_module(name)


@contextmanager
def limit_file_size(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def texts(root: Path = ROOT) -> list[str]:
    """Texts with the words of a tiny model: the finance corpus with its rationales, and the task files.

    Of the task files `vocabulary.txt` has a copy: a word more in one of them would draw every random model anew.
    """
    lines = (root / "data/corpora/finance.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    prompts = (ROOT / "tests/vocabulary.txt").read_text(encoding="utf-8")
    return [*(row[key] for row in rows for key in ("text", "rationale")), prompts]


def word_tokenizer(corpus: list[str], kind: str):
    """A word-level tokenizer of `corpus`: `bert` adds [CLS] and [SEP], `t5` ends with </s>, `llama` has a chat template
    and adds nothing."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = {
        "bert": ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]"],
        "llama": ["[UNK]", "[PAD]", *ROLES],
        "t5": ["[PAD]", "</s>", "[UNK]"],
    }[kind]
    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator([*corpus, "system user assistant"], trainers.WordLevelTrainer(special_tokens=special))
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "model_max_length": 512}
    if kind == "bert":
        ends = [(name, words.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
        words.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
        names |= {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    elif kind == "t5":
        words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
        names |= {"eos_token": "</s>"}
    else:
        names |= {"bos_token": ROLES[0], "eos_token": ROLES[1]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **names)
    if kind == "llama":
        tokenizer.chat_template = CHAT
    return tokenizer


def bpe_tokenizer(corpus: list[str], vocab_size: int = 500):
    """A byte-level BPE tokenizer of `corpus` that cuts texts as GPT-2 does, with the special tokens of SmolLM2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<|endoftext|>", *ROLES]
    trainer = trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, vocab_size=vocab_size)
    words.train_from_iterator(corpus, trainer)
    names = {"bos_token": ROLES[0], "eos_token": ROLES[1], "pad_token": ROLES[1], "unk_token": special[0]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **names)
    tokenizer.chat_template = CHAT
    return tokenizer


def build_models(folder: Path) -> None:
    """Write `tiny-llama`, `tiny-bert` and `tiny-t5` (hidden 32, 4 layers, fixed random weights) and tokenizers."""
    import torch
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    corpus = texts()
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for kind in ("llama", "bert", "t5"):
            tokenizer = word_tokenizer(corpus, kind)
            common = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
            long = shape | common | {"max_position_embeddings": 512}
            if kind == "llama":
                ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
                model = LlamaForCausalLM(LlamaConfig(**long, **ends, tie_word_embeddings=True))
            elif kind == "bert":
                model = BertModel(BertConfig(**long))
            else:
                small = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 4, "num_heads": 4, "dropout_rate": 0.0}
                ends = {"eos_token_id": tokenizer.eos_token_id, "decoder_start_token_id": tokenizer.pad_token_id}
                model = T5ForConditionalGeneration(T5Config(**common, **small, **ends))
            model.save_pretrained(folder / f"tiny-{kind}")
            tokenizer.save_pretrained(folder / f"tiny-{kind}")


def copy_experiment(folder: Path, models: Path | None = None) -> Path:
    """The files of an experiment in `folder` that runs `tests/smoke.yaml`; returns `folder`.

    models: a folder that :func:`build_models` wrote; empty model folders stand in when nothing shall be trained.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        source, target = ROOT / name, folder / name
        target.parent.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
        else:
            shutil.copy(source, target)
    (folder / "data/corpora").mkdir(parents=True)
    shutil.copy(ROOT / "data/corpora/finance.jsonl", folder / "data/corpora/finance.jsonl")
    shutil.copy(ROOT / "tests/smoke.yaml", folder / "params.yaml")
    for kind in ("llama", "bert"):
        target = folder / f"models/tiny-{kind}"
        if models:
            shutil.copytree(models / f"tiny-{kind}", target)
        else:
            target.mkdir(parents=True)
            (target / "config.json").write_text("{}\n")
    return folder


def experiment(folder: Path, models: Path | None = None) -> Path:
    """A git repository with DVC in `folder`; see :func:`copy_experiment`."""
    copy_experiment(folder, models)
    for command in (
        ["git", "init", "-q"],
        ["git", "add", "-A"],
        ["git", "-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "-q", "-m", "start"],
    ):
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder


def prepare_data(repo: Path) -> None:
    """Write the rows of every source of an experiment, as its stages `data` do."""
    from distillery.config.load import load_params
    from distillery.data.prepare import prepare_source
    from distillery.data.storage import write_source
    from distillery.files import Paths
    from distillery.tasks.schema import load_task

    for name, spec in load_params(repo / "params.yaml").data.items():
        task = load_task(spec.task, repo / "tasks")
        write_source(prepare_source(name, spec, task, repo), Paths(repo).processed(name))


@functools.cache
def can_mount() -> bool:
    """Whether a process of this user may mount a disk that it alone sees."""
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "-o", "size=16k", "none", tempfile.gettempdir()]
    return bool(shutil.which("unshare")) and not subprocess.run(command, capture_output=True).returncode
