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


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        (one_gpu.size_sentence("tiny", "a CPU", None), "its scores mean nothing"),
        (one_gpu.size_sentence("full", "a GPU", 16 * GIB), "a GPU with 16 GiB: a 7B model"),
        (
            one_gpu.weights_sentence({"16 bits": 15 * GIB, "4 bits": 5 * GIB}, 14 * GIB),
            "does **not** fit in 16 bits and fits in 4",
        ),
        (
            one_gpu.weights_sentence({"16 bits": 15 * GIB, "4 bits": 5 * GIB}, None),
            "33% of their size in 16 bits. There is no GPU",
        ),
        (one_gpu.tuning_sentence(1.0, 0.5, 90), "The loss falls, from 1.00 to 0.50 nats, in 1.5 minutes."),
        (one_gpu.tuning_sentence(0.5, 1.0, 90), "does **not** fall"),
        (one_gpu.teacher_sentence(0.8, 0.5), "It has something to teach."),
        (one_gpu.teacher_sentence(0.52, 0.5), "It has **nothing** to teach"),
        (one_gpu.memory_sentence({"a": None}), "no GPU memory to measure"),
        (one_gpu.memory_sentence({"a": 2 * GIB, "b": 9 * GIB}), "held by b: 9.0 GiB. That fits"),
        (one_gpu.memory_sentence({"a": 15 * GIB, "b": None}), "held by a: 15.0 GiB. That does **not** fit"),
        (
            one_gpu.comparison_sentence({"mean": 0.05, "low": 0.01, "high": 0.09}),
            "+5.0 points (95 % interval +1.0 to +9.0): the student is better",
        ),
        (one_gpu.comparison_sentence({"mean": -0.05, "low": -0.09, "high": -0.01}), "the student is **worse**"),
        (one_gpu.comparison_sentence({"mean": 0.01, "low": -0.02, "high": 0.04}), "show no difference"),
        (
            one_gpu.speed_sentence(10.0, 100.0, 15.0, 1.0),
            "15.0 times smaller than its teacher and labels 10.0 times as many",
        ),
    ],
)
def test_a_sentence_follows_the_figures(sentence, expected):
    assert expected in sentence
