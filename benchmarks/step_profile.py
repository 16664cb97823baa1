"""Where a distillation step's milliseconds go, and what each change gave: a step of a causal and of an encoder student.

    PYTHONPATH=src python benchmarks/step_profile.py

SmolLM2's first 15 layers with LoRA r=16 on all linear layers, bfloat16, 8 rows of the finance corpus with their label
and end token, a JSD over the vocabulary with kept teacher log-probabilities (drawn at random here: their values cost
nothing). Each way runs over the same 12 batches of different lengths twice; the second pass counts. Prints seconds a
step, forward and backward, and the operators that took most of the time.

Then MiniLM's layers 0, 2 and 5, all weights trained by AdamW, batches of 16, cross-entropy: forward, and backward with
the optimizer's step.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from distillery import losses
from distillery.config.load import load_params
from distillery.config.schema import StudentConfig
from distillery.files import repository_root
from distillery.models.fast_cpu import train_used_embeddings, use_bit_dropout
from distillery.models.fetch import fetch_model
from distillery.models.label_model import LabelModel
from distillery.models.layers import output_head, transformer_body
from distillery.models.packed import token_tree
from distillery.tasks.schema import load_task
from distillery.training.student import build_student

BATCH, BATCHES = 8, 12
Step = Callable[[list[list[int]], list[list[int]]], torch.Tensor]


def ways(student: LabelModel) -> dict[str, Step]:
    """Name -> logits [answer tokens, vocabulary] of rows (prompts, answers), in the order of the changes."""
    model = student.model

    def padded(prompts: list[list[int]], answers: list[list[int]]) -> tuple[dict, torch.Tensor]:
        rows = [p + a for p, a in zip(prompts, answers, strict=True)]
        batch = student.tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
        width = batch["input_ids"].shape[1]
        at = torch.tensor([[width - len(a) - 1 + k for k in range(len(a))] for a in answers])
        return batch, at

    def everywhere(prompts: list[list[int]], answers: list[list[int]]) -> torch.Tensor:
        batch, at = padded(prompts, answers)
        logits = model(**batch).logits
        return torch.cat([logits[i, row] for i, row in enumerate(at)])

    def sliced(prompts: list[list[int]], answers: list[list[int]]) -> torch.Tensor:
        batch, at = padded(prompts, answers)
        return model(**batch, logits_to_keep=at.shape[1] + 1).logits[:, :-1].flatten(0, 1)

    def gathered(prompts: list[list[int]], answers: list[list[int]]) -> torch.Tensor:
        batch, at = padded(prompts, answers)
        states = transformer_body(model)(**batch, use_cache=False).last_hidden_state
        return output_head(model)(torch.cat([states[i, row] for i, row in enumerate(at)]))

    def trees(prompts: list[list[int]], answers: list[list[int]]) -> torch.Tensor:
        return student.forward(prompts, [[(a, 0)] for a in answers], label_space=False).completion_logits

    def exact(prompts: list[list[int]], answers: list[list[int]]) -> torch.Tensor:
        rounded, token_tree.LENGTH_MULTIPLES = token_tree.LENGTH_MULTIPLES, (1, 1)
        try:
            return trees(prompts, answers)
        finally:
            token_tree.LENGTH_MULTIPLES = rounded

    return {
        "logits at every position": everywhere,
        "logits_to_keep": sliced,
        "positions gathered before the head": gathered,
        "token trees: the shared prompt once, no padding": exact,
        "lengths rounded up, so that kernels are met again": trees,
    }


def encoder_step(
    by_length: bool, profiled: bool, bits: bool
) -> tuple[list[list[int]], Callable[[list[int]], tuple[float, float]]]:
    """Batches of row numbers, and a step of the encoder student on one of them: seconds forward, seconds after it."""
    root, size = repository_root(), 16
    folder = fetch_model("minilm-l6", load_params().models["minilm-l6"])
    task = load_task("finance-sentiment", root / "tasks")
    spec = {
        "model": "minilm-l6",
        "arch": "classifier",
        "init": {"layers": [0, 2, 5]},
        "dtype": "bfloat16",
        "phases": [],
    }
    student = build_student(StudentConfig.model_validate(spec), folder, task, 0)
    lines = (root / "data/corpora/finance.jsonl").read_text(encoding="utf-8").splitlines()[: size * BATCHES]
    ids = student.encode([json.loads(line)["text"] for line in lines])
    target = torch.tensor([task.names.index(json.loads(line)["label"]) for line in lines])
    order = sorted(range(len(ids)), key=lambda i: len(ids[i])) if by_length else list(range(len(ids)))
    if profiled:
        train_used_embeddings(student.model, {student.tokenizer.pad_token_id, *(t for row in ids for t in row)})
    if bits:
        use_bit_dropout(student.model)
    student.model.train()
    trained = [parameter for parameter in student.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def step(rows: list[int]) -> tuple[float, float]:
        start = time.perf_counter()
        loss = losses.cross_entropy(student.forward([ids[i] for i in rows]).label_logits, target[rows]).mean()
        middle = time.perf_counter()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return middle - start, time.perf_counter() - middle

    return [order[a : a + size] for a in range(0, len(order), size)], step


def measure(name: str, batches: list, step: Callable[..., tuple[float, float]], before: float | None) -> float:
    """Print and return the mean seconds of `step` over `batches`, the second time that they are met."""
    for batch in batches:
        step(batch)
    times = torch.tensor([step(batch) for batch in batches])
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for batch in batches[::4]:
            step(batch)
    ops = sorted(profiled.key_averages(), key=lambda op: -op.self_cpu_time_total)
    whole = sum(op.self_cpu_time_total for op in ops)
    forward, backward = times.mean(0).tolist()
    total = forward + backward
    gain = "" if before is None else f", {before / total:.2f} times as fast as the one above"
    print(f"\n{name}: {total:.3f} s a step (forward {forward:.3f}, after it {backward:.3f}){gain}")
    print("  " + ", ".join(f"{op.key} {op.self_cpu_time_total / whole:.0%}" for op in ops[:6]))
    return total


def main() -> None:
    root = repository_root()
    folder = fetch_model("smollm2", load_params().models["smollm2"])
    spec = {"model": "smollm2", "arch": "causal", "init": {"layers": "first-15"}, "adapter": {"kind": "lora", "r": 16}}
    spec = StudentConfig.model_validate(spec | {"prompt": "plain", "dtype": "bfloat16", "phases": []})
    student = build_student(spec, folder, load_task("finance-sentiment", root / "tasks"), 0)
    student.model.train()
    lines = (root / "data/corpora/finance.jsonl").read_text(encoding="utf-8").splitlines()[: BATCH * BATCHES]
    rows = sorted(student.encode([json.loads(line)["text"] for line in lines]), key=len)
    batches = [rows[a : a + BATCH] for a in range(0, len(rows), BATCH)]
    answers = [student.label_completion(i % 3)[0] for i in range(BATCH)]
    teacher = torch.randn(sum(map(len, answers)), output_head(student.model).weight.shape[0]).log_softmax(-1)
    before = None
    for name, way in ways(student).items():

        def step(prompts: list[list[int]], way: Step = way) -> tuple[float, float]:
            start = time.perf_counter()
            with student.autocast():
                logits = way(prompts, answers)
            loss = losses.jsd(logits, teacher).mean()
            middle = time.perf_counter()
            loss.backward()
            end = time.perf_counter()
            student.model.zero_grad()
            return middle - start, end - middle

        before = measure(name, batches, step, before)
    before = None
    for name, settings in {
        "encoder, batches as they come": (False, False, False),
        "batches of like length": (True, False, False),
        "only embeddings of words that occur are trained": (True, True, False),
        "16 random bits an element for dropout": (True, True, True),
    }.items():
        before = measure(name, *encoder_step(*settings), before)


if __name__ == "__main__":
    main()
