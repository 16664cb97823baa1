"""Recorded passes of a causal model: the values of the plain pass, whatever the sequences and their order.

A graph of CUDA needs a GPU: `benchmarks/gpu_check.py` tries it there. Here a stand-in computes anew, in place, as a
replayed graph does; what surrounds the graphs is the same.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

import tiny
from distillery.config.schema import LoraSettings, PhaseConfig, StudentConfig
from distillery.models.layers import transformer_body
from distillery.models.packed import attention, frozen_layers, recorded_passes
from distillery.models.packed.hidden import completion_hidden_states
from distillery.tasks.schema import load_task
from distillery.training import trainers
from distillery.training.rows import TrainingRows
from distillery.training.run import train_phase
from distillery.training.student import attach_adapters, build_student
from tiny import END, causal_config

TASK = load_task("finance-sentiment", tiny.ROOT / "tasks")

ROWS = [
    ([[1, 2, 9, 4], [1, 2, 7]], [[[5, END]], [[6, 8, END]]]),
    ([[1, 2, 3, 3, 4, 5, 8], [1, 2, 8, 9, 9]], [[[7, END], [5]], [[5, 5, 5, END]]]),
    ([[1, 2, *range(3, 30), *range(3, 30)] * 2, [1, 2, *range(5, 30)] * 3], [[[5, END]], [[6, END]]]),
]


def rerun(compute, pool):
    """In place of a graph: what `compute` returns, and a function that writes what it returns anew into the same."""
    results = compute()

    @torch.enable_grad()
    def replay() -> None:
        for old, new in zip(results, compute(), strict=True):
            old.copy_(new)

    return results, replay, pool


@pytest.fixture
def recording(monkeypatch) -> None:
    """Let a CPU record passes."""
    monkeypatch.setattr(attention, "FUSED_DEVICES", ("cpu",))
    monkeypatch.setattr(recorded_passes, "RECORDING_DEVICES", ("cpu",))
    monkeypatch.setattr(recorded_passes, "capture", rerun)
    monkeypatch.setattr(recorded_passes, "on_side_stream", lambda compute: compute())


def student(adapted: bool = True) -> torch.nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(causal_config("qwen2")).eval()
    model = attach_adapters(model, LoraSettings(r=4), "causal", 0) if adapted else model
    with torch.no_grad():
        for weight in model.parameters():  # adapters, too, which begin at zero
            if weight.dim() > 1:
                weight.normal_(0, 0.3)
    return model


def loss_of(model, rows, recorded=None, frozen=None) -> torch.Tensor:
    states = completion_hidden_states(model, *rows, recorded=recorded, frozen=frozen)
    return states.hidden[states.index].float()[:, ::3].sigmoid().mean()


def gradients(model, batches, recorded=None, frozen=None) -> tuple[list[float], list[torch.Tensor]]:
    """The losses of `batches` and the weights' gradients summed over them, as steps of several micro-batches have."""
    model.zero_grad(set_to_none=True)
    values = []
    for rows in batches:
        loss = loss_of(model, rows, recorded, frozen)
        loss.backward()
        values.append(loss.item())
    return values, [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]


@pytest.mark.parametrize("adapted", [True, False], ids=["adapters", "all weights"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_losses_and_summed_gradients_are_those_of_plain_passes(recording, adapted, dtype):
    model = student(adapted=adapted)
    batches = [ROWS[0], ROWS[1], ROWS[2], ROWS[0]]  # two lengths, one of them again and again
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        plain, expected = gradients(model, batches)
        recorded = recorded_passes.recorded_passes(model)
        losses, summed = gradients(model, batches, recorded)
    assert recorded.usable and len(recorded._passes) == 2
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.03}
    assert losses == pytest.approx(plain, rel=tolerance["rtol"])
    scale = max(float(weight.abs().max()) for weight in expected)
    for weight, reference in zip(summed, expected, strict=True):
        torch.testing.assert_close(weight / scale, reference / scale, **tolerance)


def test_trained_weights_are_read_anew_at_every_step(recording):
    model = student()
    recorded = recorded_passes.recorded_passes(model)
    before = loss_of(model, ROWS[0], recorded).item()
    with torch.no_grad():
        for weight in recorded.parameters:
            weight.add_(0.3)
    after = loss_of(model, ROWS[0], recorded).item()
    assert after != pytest.approx(before, rel=1e-2)
    assert after == pytest.approx(loss_of(model, ROWS[0]).item(), rel=1e-4)


def test_a_pass_begins_at_the_states_of_frozen_layers(recording):
    model = student()
    body = transformer_body(model)
    depth = len(body.layers) // 2
    for layer in body.layers[:depth]:
        layer.requires_grad_(False)
    prompts, completions = (sum(parts, []) for parts in zip(ROWS[0], ROWS[1], strict=True))
    scored = [[(tokens, 0) for tokens in row] for row in completions]
    frozen = frozen_layers.compute_frozen_states(model, prompts, scored)
    assert frozen.depth == depth
    recorded = recorded_passes.recorded_passes(model, frozen)
    plain, expected = gradients(model, ROWS[:2])
    calls: list[int] = []
    body.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    losses, summed = gradients(model, ROWS[:2], recorded, frozen)
    assert not calls, "the frozen layers ran"
    assert len(recorded._passes) == 1 and losses == pytest.approx(plain, rel=1e-4)
    for weight, reference in zip(summed, expected, strict=True):
        torch.testing.assert_close(weight, reference, rtol=1e-3, atol=1e-4 * float(reference.abs().max()))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_training_takes_recorded_steps_and_forgets_them(recording, monkeypatch, tiny_models, tmp_path, accumulate):
    spec = StudentConfig(model="m", arch="causal", prompt="plain", phases=[], adapter={"kind": "lora", "r": 4})
    rows = TrainingRows(tiny.texts()[:8], np.arange(8) % 3)
    common = {"data": ["a/train"], "loss": {"ce": 1.0}, "learning_rate": 1e-2, "steps": 4, "batch_size": 2}
    phase = PhaseConfig(**common, accumulate=accumulate)

    def losses_of_training(name: str) -> list[float]:
        model = build_student(spec, tiny_models / "tiny-llama", TASK, 0)
        history = train_phase(model, rows, phase, folder=tmp_path / name, seed=0)
        assert model.recorded is None
        return history["loss"].tolist()

    monkeypatch.setattr(trainers, "LOG_EVERY", 1)
    calls: list[int] = []
    monkeypatch.setattr(recorded_passes, "capture", lambda *given: calls.append(1) or rerun(*given))
    recorded = losses_of_training("recorded")
    assert len(calls) >= 2, "a forward and a backward pass"
    monkeypatch.setattr(recorded_passes, "RECORDING_DEVICES", ())
    assert recorded == pytest.approx(losses_of_training("plain"), rel=1e-4)


def test_nothing_is_recorded_without_gradients_or_for_long_sequences(recording, monkeypatch):
    model = student()
    recorded = recorded_passes.recorded_passes(model)
    monkeypatch.setattr(recorded_passes, "FUSED_TOKENS", 64)
    losses, _ = gradients(model, [ROWS[0]], recorded)
    assert not recorded._passes and losses == pytest.approx([loss_of(model, ROWS[0]).item()], rel=1e-5)


@pytest.mark.parametrize("fault", ["raises", "differs"])
def test_a_model_that_cannot_be_recorded_is_trained_plainly_with_a_line(recording, monkeypatch, capsys, fault):
    def broken(compute, pool):
        if fault == "raises":
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        results, replay, _ = rerun(compute, pool)
        return results, lambda: (replay(), [result.mul_(1.5) for result in results]), None

    monkeypatch.setattr(recorded_passes, "capture", broken)
    model = student()
    recorded = recorded_passes.recorded_passes(model)
    plain, expected = gradients(model, ROWS)
    losses, summed = gradients(model, ROWS, recorded)
    reason = "operation not permitted when stream is capturing" if fault == "raises" else "their hidden states are"
    (line,) = capsys.readouterr().out.strip().splitlines()
    assert line.startswith(f"steps are not recorded as CUDA graphs: {reason}")
    assert not recorded.usable and losses == pytest.approx(plain, rel=1e-4)
    for weight, reference in zip(summed, expected, strict=True):
        torch.testing.assert_close(weight, reference, rtol=1e-3, atol=1e-4 * float(reference.abs().max()))


def test_what_is_not_recorded(recording, monkeypatch):
    def trained(change=lambda model: None) -> object:
        model = student()
        change(model)
        return recorded_passes.recorded_passes(model)

    def drop_out(model) -> None:
        next(layer for layer in transformer_body(model).layers).mlp = torch.nn.Sequential(torch.nn.Dropout(0.1))

    assert trained() is not None
    assert trained(drop_out) is None
    assert trained(lambda model: model.gradient_checkpointing_enable()) is None
    assert trained(lambda model: model.requires_grad_(False)) is None
    monkeypatch.setattr(recorded_passes, "MAX_GRADIENT_BYTES", 8)
    assert trained() is None
    monkeypatch.undo()
    assert trained() is None, "a CPU records nothing"
