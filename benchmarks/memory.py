"""What training holds in memory: by formula, and measured on a model at hand.

    python benchmarks/memory.py [--layers first-15] [--batch 8] [--steps 4] [--out benchmarks/memory.csv]

The formula counts weights, gradients, optimizer states and copies, not activations. It is printed for the published
students, LLaMA-2 7B (the claim: 84 GB in 16 bits against 4 GB in 4 bits with adapters), OPT 1.3B and GPT-2, with the
share that adapters save against training every weight in 16 bits, beside the published share; and for SmolLM2 as
params.yaml has it; for the latter each way is also run in a process of its own, whose growth over an idle one is what
was measured.
"""

from __future__ import annotations

import argparse
import csv
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from distillery.config.load import load_params
from distillery.config.schema import PhaseConfig, StudentConfig
from distillery.files import atomic_write, repository_root
from distillery.models.fetch import fetch_model
from distillery.models.layers import count_parameters, transformer_body
from distillery.models.load import load_model
from distillery.pipeline.published_features import read_figures
from distillery.tasks.schema import load_task
from distillery.training.rows import TrainingRows
from distillery.training.run import train_phase
from distillery.training.student import build_student

GB = 1e9
LLAMA = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
OPT = {"hidden_size": 2048, "ffn_dim": 8192, "num_hidden_layers": 24, "num_attention_heads": 32, "vocab_size": 50272}
PUBLISHED = {  # students of a published system; the config of GPT-2 is that of 124 M parameters
    "LLaMA-2 7B": ("llama", LLAMA | {"vocab_size": 32000}),
    "OPT 1.3B": ("opt", OPT | {"word_embed_proj_dim": 2048}),
    "GPT-2 124M": ("gpt2", {}),
}
# bytes of frozen linear layers, of other frozen weights, and of trained weights with gradient and AdamW's two states
BYTES_PER_PARAMETER = {
    "full, 32 bits": (0.0, 0.0, {"weights": 4, "gradients": 4, "optimizer": 8, "copies": 0}),
    "full, 16 bits": (0.0, 0.0, {"weights": 2, "gradients": 2, "optimizer": 8, "copies": 0}),
    "full, mixed": (0.0, 0.0, {"weights": 2, "gradients": 2, "optimizer": 8, "copies": 4}),  # and weights in 32 bits
    "LoRA, 16 bits": (2.0, 2.0, {"weights": 4, "gradients": 4, "optimizer": 8, "copies": 0}),
    # 4 bits, and a scale for each 64 weights that takes 8 bits and 32 / 256 more (Dettmers et al. 2023, section 3)
    "QLoRA, 4 bits": (
        (4 + 8 / 64 + 32 / (64 * 256)) / 8,
        2.0,
        {"weights": 4, "gradients": 4, "optimizer": 8, "copies": 0},
    ),
}
WAYS = {  # what is measured: the kind of the formula, adapter and precision
    "full, 32 bits": ("none", "float32"),
    "LoRA, 16 bits": ("lora", "bfloat16"),
    "QLoRA, 4 bits": ("qlora", "bfloat16"),
}


def predicted_memory(model: nn.Module, kind: str, r: int = 16, adapted: str = "") -> dict[str, float]:
    """Bytes that training `model` holds, without activations: weights, gradients, optimizer, copies and their total.

    kind: of `BYTES_PER_PARAMETER`. r: rank of the adapters in every linear layer but the output head, or in those with
    `adapted` in their full names. Only shapes count, so a model on the `meta` device will do.
    """
    modules = transformer_body(model).named_modules()
    linear = {name: module for name, module in modules if isinstance(module, nn.Linear | Conv1D)}
    linear_weights = sum(module.weight.numel() for module in linear.values())
    other_weights = sum(parameter.numel() for parameter in model.parameters()) - linear_weights
    frozen_linear, frozen_other, trained = BYTES_PER_PARAMETER[kind]
    if kind.startswith("full"):
        n_trained = linear_weights + other_weights
    else:
        n_trained = sum(r * sum(module.weight.shape) for name, module in linear.items() if adapted in name)
    memory = {part: float(size * n_trained) for part, size in trained.items()}
    memory["weights"] += frozen_linear * linear_weights + frozen_other * other_weights
    return memory | {"total": sum(memory.values())}


def measure(kind: str, layers: str, r: int, batch: int, steps: int) -> dict[str, float]:
    """Bytes that a process grows by while it trains this way: at its peak, and what it holds at the end."""
    adapter, dtype = WAYS[kind]
    spec = StudentConfig(
        model="smollm2",
        arch="causal",
        prompt="plain",
        dtype=dtype,
        init={"layers": layers},
        adapter={"kind": adapter, "r": r},
        phases=[],
    )
    folder = fetch_model("smollm2", load_params().models["smollm2"])
    task = load_task("finance-sentiment")
    rows = [f"Operating profit of company {i} rose to EUR 13.1 mn from EUR 8.7 mn in the quarter." for i in range(64)]
    phase = PhaseConfig(data=["finance/train"], loss={"ce": 1.0}, steps=steps, learning_rate=1.0e-5, batch_size=batch)
    before = psutil.Process().memory_info().rss
    student = build_student(spec, folder, task, seed=0)
    with tempfile.TemporaryDirectory() as scratch:
        train_phase(
            student,
            TrainingRows(rows, torch.zeros(len(rows), dtype=torch.long).numpy()),
            phase,
            folder=Path(scratch),
            seed=0,
            checkpoint_every=10 * steps,
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    trainable = count_parameters(student.model)[1]
    return {"held": psutil.Process().memory_info().rss - before, "peak": peak - before, "trainable": trainable}


def line(model: str, kind: str, r: int, measured: dict[str, float]) -> dict[str, object]:
    gigabytes = {f"{name}_gb": round(size / GB, 3) for name, size in measured.items() if name != "trainable"}
    return {"model": model, "training": kind, "r": r or "", **gigabytes, "trainable": measured.get("trainable", "")}


def published_rows() -> list[dict[str, object]]:
    """The formula for the published students: trained whole, and adapters of rank 64 in all layers or in attention.

    saved_percent: of the memory of training every weight in 16 bits; the published share is that of its two totals.
    """
    rows, published = [], published_savings()
    for name, (model_type, shape) in PUBLISHED.items():
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **shape))
        model.tie_weights()  # the embeddings of OPT and GPT-2 are their output head
        for kind in BYTES_PER_PARAMETER:
            r = 0 if kind.startswith("full") else 64
            rows.append(line(name, kind, r, predicted_memory(model, kind, r)))
        attention = predicted_memory(model, "QLoRA, 4 bits", 64, "attn")
        rows.append(line(name, "QLoRA, 4 bits, attention", 64, attention))
        whole = predicted_memory(model, "full, 16 bits")["total"]
        rows[-2]["saved_percent"] = saved_percent(whole, predicted_memory(model, "QLoRA, 4 bits", 64)["total"])
        rows[-1]["saved_percent"] = saved_percent(whole, attention["total"])
        rows[-1]["published_saved_percent"] = published[name]
    return rows


def saved_percent(whole: float, adapted: float) -> float:
    """The share of `whole` bytes, in percent, that `adapted` bytes save."""
    return round(100 * (1 - float(adapted) / float(whole)), 1)


def published_savings() -> dict[str, float]:
    """By student: the share that the published totals of 16 and 4 bits make, in percent."""
    figures = read_figures(repository_root())
    totals = figures[figures["figure"] == "total, GB"].set_index("of")["value"]
    return {name: saved_percent(totals[f"{name}, 16 bits"], totals[f"{name}, 4 bits"]) for name in PUBLISHED}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", default="first-15")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--ranks", type=int, nargs="*", default=[4, 8, 32, 64])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        kind, r = arguments.one
        print(json.dumps(measure(kind, arguments.layers, int(r), arguments.batch, arguments.steps)))
        return

    table = published_rows()
    own = load_model(fetch_model("smollm2", load_params().models["smollm2"]), "causal", layers=arguments.layers)
    for kind in WAYS:
        for r in [0] if kind.startswith("full") else arguments.ranks if kind.startswith("QLoRA") else [64]:
            command = [sys.executable, __file__, "--one", kind, str(r or 1), "--layers", arguments.layers]
            command += ["--batch", str(arguments.batch), "--steps", str(arguments.steps)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            measured = {
                f"measured_{k}" if k != "trainable" else k: v
                for k, v in json.loads(done.stdout.splitlines()[-1]).items()
            }
            row = line(f"SmolLM2 {arguments.layers}", kind, r, predicted_memory(own, kind, r) | measured)
            table.append(row)
            print(row, flush=True)
    names = list(dict.fromkeys(key for row in table for key in row))
    print("\n| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for row in table:
        print("| " + " | ".join(str(row.get(name, "")) for name in names) + " |")
    if arguments.out:
        with atomic_write(arguments.out) as path, path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)


if __name__ == "__main__":
    main()
