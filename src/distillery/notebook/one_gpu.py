"""The lesson on one GPU: its experiment, and its computed sentences. Shares are in [0, 1], memory in bytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from distillery.config.load import validate_section
from distillery.config.schema import Params
from distillery.errors import UserError
from distillery.models.devices import default_device
from distillery.models.layers import output_head
from distillery.wording import percent

SIZES = ("auto", "full", "tiny")
TEACHER, STUDENT = "teacher", "student"  # names of the models
GIB = 2**30
FREE_GPU = 16 * GIB  # of a hosted notebook that costs nothing
SAME_DISTRIBUTION = 0.01  # nats: a divergence below is too small to see

FITTING = {"full": (10**6, 2, 200), "tiny": (240, 1, 20)}  # rows (at most), epochs, steps

MODELS: dict[str, dict[str, Any]] = {
    "full": {
        TEACHER: {"hub": "Qwen/Qwen2.5-7B-Instruct", "revision": "a09a35458c702b33eeacc393d103063234e8bc28"},
        STUDENT: {"hub": "Qwen/Qwen2.5-0.5B-Instruct", "revision": "7ae557604adf67be50417f59c2c2f167def9a775"},
    },
    "tiny": {
        name: {"random": {"type": "llama", "words": ["data/corpora/finance.jsonl"], "hidden": hidden, "layers": layers}}
        for name, hidden, layers in ((TEACHER, 64, 4), (STUDENT, 32, 2))
    },
}


def choose_size(size: str) -> str:
    """`size`, or what `auto` means here: `full` on a CUDA GPU, else `tiny`.

    Raises UserError for another word, and for `full` where there is no CUDA GPU.
    """
    if size not in SIZES:
        raise UserError(f"size: {size!r}: no such size; there are: {', '.join(SIZES)}")
    on_cuda = default_device().type == "cuda"
    if size == "full" and not on_cuda:
        raise UserError("size: `full` needs a CUDA GPU; take `tiny` here")
    return ("full" if on_cuda else "tiny") if size == "auto" else size


def fill_in(size: str, rows: int, epochs: int, steps: int) -> tuple[int, int, int]:
    """Rows of the corpus, epochs of the teacher and steps of a student; for each 0 what fits `size`."""
    return tuple(given or fitting for given, fitting in zip((rows, epochs, steps), FITTING[size], strict=True))


def half_precision(size: str) -> str:
    """The number format of the products: bfloat16 where the GPU has it, float16 on an older one."""
    if size == "tiny":
        return "float32"
    return "bfloat16" if torch.cuda.get_device_capability()[0] >= 8 else "float16"


def experiment(size: str, epochs: int, steps: int, batch_size: int, seed: int) -> dict[str, Any]:
    """The sections of params.yaml: a teacher that QLoRA tunes, its student, and the student's control."""
    common = {"dtype": half_precision(size), "prompt": "chat" if size == "full" else "plain"}
    student = common | {"model": STUDENT, "arch": "causal"}
    training = {"steps": steps, "batch_size": batch_size, "learning_rate": 2e-4}
    finetune = {"on": "finance/train", "epochs": epochs, "batch_size": batch_size, "learning_rate": 2e-4, "folds": 0}
    shares = {"train": 0.15, "pool": 0.45, "validation": 0.1, "test": 0.3}
    return {
        "seeds": [seed],
        "data": {"finance": {"source": "data/corpora/finance.jsonl", "task": "finance-sentiment", "split": shares}},
        "models": MODELS[size],
        "teachers": {
            "tuned": common
            | {"kind": "lm", "model": TEACHER, "quantize": "nf4", "seed": seed, "batch_size": batch_size}
            | {"finetune": finetune | {"lora": {"r": 16}}}
        },
        "augment": {"source": "finance", "teacher": "tuned", "per_row": 0},
        "students": {
            "kd": student
            | {"adapter": {"kind": "lora", "r": 16}, "control": "gold"}
            | {"phases": [training | {"data": ["finance/pool"], "teachers": ["tuned"], "loss": {"kl": 1.0}}]},
            "gold": student
            | {"adapter": {"kind": "lora", "r": 16}}
            | {"phases": [training | {"data": ["finance/train"], "loss": {"ce": 1.0}}]},
        },
        "evaluate": {"headline": "kd"},
    }


def validated(sections: dict[str, Any]) -> Params:
    """The sections as the pipeline reads them; raises UserError for a key or value that it does not know."""
    return validate_section(Params, sections, "the experiment")


def weight_bytes(model: nn.Module) -> dict[str, float]:
    """Bytes of the weights of `model` in 16 bits, and with its linear layers but the output head in 4 bits."""
    head = output_head(model)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    quantized = sum(module.weight.numel() for module in linear)
    total = sum(parameter.numel() for parameter in model.parameters())
    return {"16 bits": 2.0 * total, "4 bits": 2.0 * (total - quantized) + quantized / 2}


def size_sentence(size: str, machine: str, memory: int | None) -> str:
    """machine: its name. memory: of its GPU, or None."""
    if size == "tiny":
        text = f"This run is on {machine}, with tiny models of random weights: "
        return text + "it shows each step, and its scores mean nothing."
    return f"This run is on {machine} with {memory / GIB:.0f} GiB: a 7B model teaches a 0.5B model."


def weights_sentence(teacher: dict[str, float], memory: int | None) -> str:
    """teacher: see :func:`weight_bytes`. memory: of the GPU, or None."""
    whole, small = teacher["16 bits"], teacher["4 bits"]
    text = f"In 4 bits the teacher's weights take {small / whole:.0%} of their size in 16 bits. "
    if memory is None:
        return text + "There is no GPU here that they would have to fit."
    fits = {True: "fits", False: "does **not** fit"}
    text += f"On this GPU, before anything is trained, it {fits[whole < memory]} in 16 bits "
    return text + f"and {fits[small < memory]} in 4 bits."


def tuning_sentence(first: float, last: float, seconds: float) -> str:
    """The loss of the first and last logged steps, in nats, and the time of the training."""
    verb = "falls" if last < first else "does **not** fall"
    return f"The loss {verb}, from {first:.2f} to {last:.2f} nats, in {seconds / 60:.1f} minutes."


def teacher_sentence(accuracy: float, majority: float) -> str:
    """Accuracy on validation rows, and that of the commonest label for all rows."""
    text = f"The teacher's accuracy on validation rows is {percent(accuracy)}; "
    text += f"one label for all rows has {percent(majority)}. "
    if accuracy > majority + 0.05:
        return text + "It has something to teach."
    return text + "It has **nothing** to teach: a student can only copy its errors."


def divergence_sentence(first: float, last: float) -> str:
    """The student's divergence from its teacher in the first and the last logged steps, in nats."""
    text = f"At first the student is {first:.2g} nats from its teacher, at last {last:.2g}. "
    if first < SAME_DISTRIBUTION:
        text += "Both predict nearly the same distribution from the start, as models of random weights do: "
        return text + "there is **nothing** to learn."
    return text + ("It comes closer." if last < first else "It does **not** come closer.")


def memory_sentence(peaks: dict[str, int | None]) -> str:
    """peaks: GPU memory held at most in each step; None without a GPU."""
    known = {step: peak for step, peak in peaks.items() if peak is not None}
    if not known:
        return "Without a GPU there is no GPU memory to measure."
    step = max(known, key=known.get)
    fits = "fits" if known[step] < 0.9 * FREE_GPU else "does **not** fit"
    text = f"The most memory is held by {step}: {known[step] / GIB:.1f} GiB. "
    return text + f"That {fits} on a GPU of 16 GB, with a tenth to spare."


def comparison_sentence(gain: dict[str, float]) -> str:
    """gain: the student minus its control in accuracy: mean, low and high."""
    points = {key: f"{100 * gain[key]:+.1f}" for key in ("mean", "low", "high")}
    text = f"The teacher's labels change the accuracy by {points['mean']} points "
    text += f"(95 % interval {points['low']} to {points['high']}): "
    if gain["low"] > 0:
        return text + "the student is better than one of gold rows alone."
    return text + ("the student is **worse**." if gain["high"] < 0 else "these test rows show no difference.")


def speed_sentence(teacher: float, student: float, teacher_bytes: float, student_bytes: float) -> str:
    """Rows a second of each, and the bytes of their weights in 16 bits."""
    smaller, faster = teacher_bytes / student_bytes, student / teacher
    text = f"The student is {smaller:.1f} times smaller than its teacher and labels "
    return text + (f"{faster:.1f} times as many rows a second." if faster > 1 else "**no more** rows a second.")
