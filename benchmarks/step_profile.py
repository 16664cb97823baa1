"""Where a distillation step's milliseconds go, and what each change gave: one student step in five ways.

    PYTHONPATH=src python benchmarks/step_profile.py

SmolLM2's first 15 layers with LoRA r=16 on all linear layers, bfloat16, 8 rows of the finance corpus told their label
and end token, a JSD over the vocabulary with kept teacher log-probabilities (drawn at random here: their values cost
nothing). Each way runs over the same 12 batches of different lengths twice; the second pass counts. Prints seconds a
step, forward and backward, and the operators that took most of the time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from distillery import losses, models, params, tasks, training

BATCH, BATCHES = 8, 12
Step = Callable[[list[list[int]], list[list[int]]], torch.Tensor]


def ways(student: models.LabelModel) -> dict[str, Step]:
    """Name -> logits [tokens told, vocabulary] of rows (prompts, answers), in the order in which we came to them."""
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

    def kept(prompts: list[list[int]], answers: list[list[int]]) -> torch.Tensor:
        batch, at = padded(prompts, answers)
        return model(**batch, logits_to_keep=at.shape[1] + 1).logits[:, :-1].flatten(0, 1)

    def gathered(prompts: list[list[int]], answers: list[list[int]]) -> torch.Tensor:
        batch, at = padded(prompts, answers)
        said = models.inner(model)(**batch, use_cache=False).last_hidden_state
        return models.head(model)(torch.cat([said[i, row] for i, row in enumerate(at)]))

    def trees(prompts: list[list[int]], answers: list[list[int]]) -> torch.Tensor:
        return student.forward(prompts, [[(a, 0)] for a in answers], labels=False).told

    def exact(prompts: list[list[int]], answers: list[list[int]]) -> torch.Tensor:
        rounded, models.ROUND = models.ROUND, (1, 1)
        try:
            return trees(prompts, answers)
        finally:
            models.ROUND = rounded

    return {
        "logits at every position": everywhere,
        "logits_to_keep": kept,
        "positions gathered before the head": gathered,
        "token trees: the shared prompt once, no padding": exact,
        "lengths rounded up, so that kernels are met again": trees,
    }


def main() -> None:
    root = params.root()
    folder = models.fetch("smollm2", params.load().models["smollm2"])
    spec = {"model": "smollm2", "arch": "causal", "init": {"layers": "first-15"}, "adapter": {"kind": "lora", "r": 16}}
    spec = params.Student.model_validate(spec | {"prompt": "plain", "dtype": "bfloat16", "phases": []})
    student = training.build(spec, folder, tasks.load("finance-sentiment", root / "tasks"), 0)
    student.model.train()
    lines = (root / "data/corpora/finance.jsonl").read_text(encoding="utf-8").splitlines()[: BATCH * BATCHES]
    rows = sorted(student.encode([json.loads(line)["text"] for line in lines]), key=len)
    batches = [rows[a : a + BATCH] for a in range(0, len(rows), BATCH)]
    answers = [student.answer(i % 3)[0] for i in range(BATCH)]
    teacher = torch.randn(sum(map(len, answers)), models.head(student.model).weight.shape[0]).log_softmax(-1)
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

        for batch in batches:
            step(batch)
        times = torch.tensor([step(batch) for batch in batches])
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            for batch in batches[::4]:
                step(batch)
        ops = sorted(seen.key_averages(), key=lambda op: -op.self_cpu_time_total)
        whole = sum(op.self_cpu_time_total for op in ops)
        forward, backward = times.mean(0).tolist()
        total = forward + backward
        gain = "" if before is None else f", {before / total:.2f} times as fast as the one above"
        print(f"\n{name}: {total:.3f} s a step (forward {forward:.3f}, backward {backward:.3f}){gain}")
        print("  " + ", ".join(f"{op.key} {op.self_cpu_time_total / whole:.0%}" for op in ops[:6]))
        before = total


if __name__ == "__main__":
    main()
