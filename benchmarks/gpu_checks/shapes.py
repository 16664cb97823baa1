"""Models with the shapes of Qwen2.5 and random weights: a step beside TRL's, and what a step holds in memory."""

from __future__ import annotations

import gc
from pathlib import Path
from statistics import median
from typing import Any

import distill_step
import torch
from distill_step import EPOCHS, Measured, ModelPair, compare_losses, with_distillery, with_trl
from transformers import AutoModelForCausalLM, Qwen2Config

import tiny
from distillery.config.schema import StudentConfig
from distillery.files import repository_root
from distillery.models.memory import gpu_peak, reset_gpu_peak
from distillery.models.runtime import configure_runtime
from distillery.tasks.schema import Task, load_task
from distillery.training import trainers
from distillery.training.run import train_phase
from distillery.training.student import build_student
from gpu_checks import Place
from gpu_checks.students import largest_difference, phase_of

COMMON = {"num_key_value_heads": 2, "rope_theta": 1e6, "tie_word_embeddings": True, "max_position_embeddings": 32768}
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
WORDS = {"vocab_size": 151936}
SHAPES: dict[str, dict[str, int]] = {
    name: WORDS | dict(zip(SIZES, values, strict=True))
    for name, values in {"1.5B": (1536, 8960, 28, 12), "0.5B": (896, 4864, 24, 14)}.items()
}
TINY = dict(zip(SIZES, (32, 64, 2, 4), strict=True)) | {"initializer_range": 0.2}  # or every loss is about 0
ROUNDS, STEPS = 2, 11
N_WORDS = 4000  # of the tokenizer


def write_model(place: Place, name: str, shape: dict[str, Any]) -> Path:
    """A folder with a random model of Qwen2's architecture, in bfloat16, and a tokenizer of the corpus."""
    folder, tokenizer = place.folder / name, tiny.bpe_tokenizer(tiny.texts(), N_WORDS)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    size = shape if place.is_gpu else TINY | {"vocab_size": len(tokenizer)}
    configure_runtime()
    torch.manual_seed(list(SHAPES).index(name))
    with torch.device(place.device):
        config = Qwen2Config(**COMMON, **size, **ends, pad_token_id=tokenizer.pad_token_id)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model
    gc.collect()
    return folder


def finance_task() -> Task:
    """The task of the corpus, with its prompt."""
    return load_task("finance-sentiment", repository_root() / "tasks")


def beside_trl(place: Place) -> str:
    """A step of JSD over the vocabulary, LoRA, batch of 8: the times and peak memories of both trainers, in turns."""
    folders = {name: write_model(place, name, shape) for name, shape in SHAPES.items()}
    pair, task = (
        ModelPair(folders["1.5B"], folders["0.5B"], "all"),
        load_task("finance-sentiment", repository_root() / "tasks"),
    )
    distill_step.STEPS = {"trl": STEPS, "distillery": STEPS}
    apart = compare_losses(pair, task, False)
    trl, distillery = Measured(), Measured()
    for _ in range(ROUNDS):
        with_trl(pair, task, False, trl, check=False)
        with_distillery(pair, task, False, distillery, check=False)
    step, other, pass_once = median(distillery.seconds), median(trl.seconds), distillery.cache
    ratio, whole = other / step, other / (step + pass_once / EPOCHS)
    times = (
        f"TRL {1000 * other:.0f} ms a step, distillery {1000 * step:.0f} ms and once {1000 * pass_once:.0f} ms a batch"
    )
    times += " for the teacher and what comes before the first step"
    memory = f"peaks {trl.peak / 2**20:.0f} and {distillery.peak / 2**20:.0f} MiB ({distillery.peak / trl.peak:.2f})"
    ratios = f"ratio {ratio:.2f}, {whole:.2f} with a third of the pass before"
    return f"{ratios}; {times}; {memory}; losses {apart['float32']:.0e} apart in float32"


def memory_of_a_student(place: Place) -> str:
    """The peak of a training step of 8 rows, and the loss, with adapters on a whole or a 4-bit model."""
    folder, task = (
        write_model(place, "0.5B", SHAPES["0.5B"]),
        load_task("finance-sentiment", repository_root() / "tasks"),
    )
    rows, _ = distill_step.rows_of(task, False)
    trainers.LOG_EVERY, peaks, losses = 1, [], {}
    for kind in ("lora", "qlora"):
        for checkpointing in (False, True):
            settings = {
                "adapter": {"kind": kind, "r": 16},
                "dtype": "bfloat16",
                "gradient_checkpointing": checkpointing,
            }
            gc.collect()
            if place.device == "cuda":
                torch.cuda.empty_cache()
            reset_gpu_peak()
            spec = StudentConfig.model_validate(
                {"model": "qwen", "arch": "causal", "dtype": "bfloat16", "phases": []} | settings
            )
            student, name = build_student(spec, folder, task, 0), f"{kind}-{checkpointing}"
            phase = phase_of(loss={"ce": 1.0}, teachers=[], learning_rate=1e-4)
            losses[name] = train_phase(student, rows, phase, folder=place.folder / name, seed=0)["loss"].tolist()
            peaks.append(f"{kind}{' with checkpointing' * checkpointing} {(gpu_peak() or 0) / 2**20:.0f}")
            del student
        difference = largest_difference(losses[f"{kind}-True"], losses[f"{kind}-False"])
        assert difference < 5e-2, f"{kind}: losses with and without checkpointing are {difference:.1e} apart"
    return f"peak MiB: {', '.join(peaks)}"
