"""The lesson on one GPU: its experiment is one of the pipeline, and its sentences follow the figures."""

from __future__ import annotations

import pytest
import torch

from distillery.errors import UserError
from distillery.models.devices import shapes_alone
from distillery.models.load import load_model
from distillery.notebook import one_gpu

GIB = one_gpu.GIB


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), "float16"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")])
def test_the_full_experiment_is_one_of_the_pipeline(monkeypatch, capability, dtype):
    """A free GPU has no products in bfloat16."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    params = one_gpu.validated(one_gpu.experiment("full", epochs=2, steps=100, batch_size=4, seed=3))
    assert params.seeds == [3] and params.models["teacher"].hub == "Qwen/Qwen2.5-7B-Instruct"
    assert params.teachers["tuned"].quantize == "nf4" and params.teachers["tuned"].finetune.lora.r == 16
    assert {params.teachers["tuned"].dtype, *(student.dtype for student in params.students.values())} == {dtype}
    phases = [student.phases[0] for student in params.students.values()]
    assert [phase.steps for phase in phases] == [100, 100] and [list(phase.loss) for phase in phases] == [
        ["kl"],
        ["ce"],
    ]


def test_zero_is_what_fits_the_size():
    assert one_gpu.fill_in("tiny", 0, 3, 0) == (240, 3, 20) and one_gpu.fill_in("full", 0, 0, 0) == (10**6, 2, 200)
    assert one_gpu.fill_in("full", 500, 1, 10) == (500, 1, 10)


def test_the_size_is_that_of_the_machine(monkeypatch):
    assert one_gpu.choose_size("auto") == one_gpu.choose_size("tiny") == "tiny"
    monkeypatch.setattr(one_gpu, "default_device", lambda: torch.device("cuda"))
    assert [one_gpu.choose_size(size) for size in one_gpu.SIZES] == ["full", "full", "tiny"]


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("full", "size: `full` needs a CUDA GPU; take `tiny` here"),
        ("7B", "size: '7B': no such size; there are: auto, full, tiny"),
    ],
)
def test_a_size_that_cannot_run_is_a_mistake_of_one_line(size, message):
    with pytest.raises(UserError) as mistake:
        one_gpu.choose_size(size)
    assert str(mistake.value) == message


def test_only_linear_layers_are_counted_in_4_bits(tiny_models):
    with shapes_alone():
        model = load_model(tiny_models / "tiny-llama", "causal")
    sizes = one_gpu.weight_bytes(model)
    linear = 4 * (4 * 32 * 32 + 3 * 32 * 64)  # of 4 layers: attention and MLP; the tied head is the embedding
    total = sum(parameter.numel() for parameter in model.parameters())
    assert sizes == {"16 bits": 2 * total, "4 bits": 2 * (total - linear) + linear / 2}
