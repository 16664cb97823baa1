"""The device of the models: which one is taken, what each lacks, one GPU of several, and memory.

No GPU is needed: torch's answers about devices are replaced. The tests of `real_device` train where there is one:
`DISTILLERY_DEVICE=mps python -m pytest tests/test_devices.py`.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import sys
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from distillery.config.schema import PhaseConfig, StudentConfig
from distillery.errors import UserError
from distillery.models import devices, memory
from distillery.models.devices import default_device, move_tensor, weight_device, working_dtype
from distillery.models.load import load_model
from distillery.models.precision import resolve_dtype
from distillery.models.runtime import configure_runtime
from distillery.tasks.schema import Task, TaskPrompt
from distillery.training.keys import result_key
from distillery.training.machine import machine_name
from distillery.training.rows import TrainingRows
from distillery.training.run import train_phase
from distillery.training.student import build_student
from distillery.training.trainers import build_trainer, training_arguments, use_one_gpu

TASK = Task(kind="classification", labels={"up": "it rises", "down": "it falls"}, prompt=TaskPrompt(template="{text}"))
PHASE = PhaseConfig(data=["demo/train"], loss={"ce": 1.0}, steps=2, batch_size=2, learning_rate=1e-3)
ROWS = TrainingRows(["profit rose", "profit fell", "sales rose", "sales fell"], np.array([0, 1, 0, 1]))


@pytest.fixture
def machine(monkeypatch):
    """Makes torch report the given devices; `broken` (device, dtype) pairs have no products."""

    def report(*available: str, broken: tuple = (), named: str = "") -> None:
        monkeypatch.setenv(devices.VARIABLE, named)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in available)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in available)
        monkeypatch.setattr(devices, "_multiplies", lambda device, dtype: (device, dtype) not in broken)

    return report


@pytest.mark.parametrize(
    ("available", "broken", "named", "expected"),
    [
        ((), (), "", "cpu"),
        (("cuda",), (), "", "cuda"),
        (("mps",), (), "", "mps"),
        (("cuda", "mps"), (), "", "cuda"),
        (("cuda",), (), "cpu", "cpu"),
        (("mps",), (), "mps", "mps"),
        (("mps",), (("mps", torch.float32),), "", "cpu"),  # there, and out of order: a virtual machine of macOS
        (("cuda",), (("cuda", torch.float32),), "", "cpu"),
    ],
)
def test_the_first_device_that_works_or_the_named_one(machine, available, broken, named, expected):
    machine(*available, broken=broken, named=named)
    assert default_device() == torch.device(expected)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("gpu", "DISTILLERY_DEVICE=gpu: no such device; there are: cuda, mps, cpu"),
        ("mps", f"DISTILLERY_DEVICE=mps: torch {torch.__version__} cannot use it here; it can use: cuda, cpu"),
    ],
)
def test_a_device_that_is_not_there_is_a_mistake_of_one_line(machine, named, message):
    machine("cuda", named=named)
    with pytest.raises(UserError) as mistake:
        default_device()
    assert str(mistake.value) == message


def test_a_product_is_computed_to_see_whether_a_device_works(capsys):
    """Of `meta` torch has no values: what is true of a device that is there and cannot compute."""
    devices._multiplies.cache_clear()
    assert devices._multiplies("cpu", torch.bfloat16) and not devices._multiplies("meta", torch.bfloat16)
    assert not devices._multiplies("meta", torch.bfloat16)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and lines[0].startswith("meta: products in bfloat16 do not work here: ")


def test_a_number_format_without_products_becomes_float32(machine):
    machine("mps", broken=(("mps", torch.bfloat16),))
    assert [working_dtype(dtype) for dtype in ("bfloat16", "float16", "float32")] == ["float32", "float16", "float32"]
    assert resolve_dtype("bfloat16", "training") == "float32"
    machine("mps")
    assert resolve_dtype("bfloat16", "training") == "bfloat16"


def test_weights_in_4_bits_stay_off_a_gpu_without_kernels_for_them(machine, tiny_models, capsys):
    devices._print_once.cache_clear()
    machine("mps")
    assert weight_device(False) == torch.device("mps")
    model = load_model(tiny_models / "tiny-llama", "causal", quantize=True)
    assert {weight.device.type for weight in model.parameters()} == {"cpu"}
    assert capsys.readouterr().out == "mps: no kernels for weights in 4 bits; such a model runs on the CPU\n"
    machine("cuda")
    assert weight_device(True) == torch.device("cuda")


@pytest.mark.parametrize(("device", "warns"), [("mps", True), ("cuda", False), ("cpu", False)])
def test_only_a_device_without_deterministic_algorithms_warns(machine, device, warns):
    machine(device)
    try:
        configure_runtime()
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled() == warns
    finally:
        machine()
        configure_runtime()


def test_no_float64_reaches_a_device_without_it(monkeypatch):
    tensor, meta = torch.ones(2, dtype=torch.float64), torch.device("meta")
    assert move_tensor(tensor, meta).dtype == torch.float64
    monkeypatch.setattr(devices, "NO_FLOAT64", ("meta",))
    assert move_tensor(tensor, meta).dtype == torch.float32
    assert move_tensor(tensor, torch.device("cpu")).dtype == torch.float64
    assert move_tensor(torch.ones(2, dtype=torch.int64), meta).dtype == torch.int64


def test_a_result_of_a_gpu_is_not_that_of_a_cpu(machine):
    keys = set()
    for device in devices.DEVICES:
        machine(device)
        keys.add(result_key("code", 1))
    assert len(keys) == 3


# ------------------------------------------------------------------------------- one GPU of several


@pytest.fixture
def student(tiny_models, monkeypatch):
    """A classifier on the CPU."""
    monkeypatch.setenv(devices.VARIABLE, "cpu")
    spec = StudentConfig(model="tiny", arch="classifier", phases=[PHASE])
    return build_student(spec, tiny_models / "tiny-bert", TASK, seed=0)


@pytest.mark.parametrize("arch", ["classifier", "causal", "on-policy"])
def test_several_gpus_do_not_multiply_the_batch(tiny_models, tmp_path, monkeypatch, capsys, arch):
    """`Trainer` would give each visible GPU a whole batch."""
    monkeypatch.setenv(devices.VARIABLE, "cpu")
    kind = "causal" if arch == "on-policy" else arch
    folder = tiny_models / ("tiny-bert" if kind == "classifier" else "tiny-llama")
    student = build_student(StudentConfig(model="tiny", arch=kind, phases=[PHASE]), folder, TASK, seed=0)
    setup = TrainingArguments._setup_devices.func

    def four_gpus(arguments):
        device, arguments._n_gpu = setup(arguments), 4
        return device

    devices_of_arguments = cached_property(four_gpus)
    devices_of_arguments.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", devices_of_arguments)
    phase = PHASE.model_copy(update={"on_policy": 0.5 * (arch == "on-policy")})
    trainer = build_trainer(student, ROWS, phase, folder=tmp_path, seed=0, title="", checkpoint_every=1)
    assert trainer.args.n_gpu == 1 and trainer.args.train_batch_size == PHASE.batch_size
    line = "4 GPUs are visible; training uses one, cpu; name another with CUDA_VISIBLE_DEVICES"
    assert line in capsys.readouterr().out.splitlines()


def test_one_gpu_is_no_line(capsys):
    assert use_one_gpu(SimpleNamespace(n_gpu=1, device="cuda:0")).n_gpu == 1 and not capsys.readouterr().out


def test_a_student_on_the_cpu_is_trained_there(student, tmp_path):
    """Also on a machine with a GPU, where `Trainer` would move its model there."""
    trainer = build_trainer(student, ROWS, PHASE, folder=tmp_path, seed=0, title="", checkpoint_every=1)
    assert trainer.args.use_cpu and trainer.args.device == torch.device("cpu")
    assert not training_arguments(PHASE, 2, tmp_path, 0, 1, float16=False, on_cpu=False)["use_cpu"]


# ------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(("platform", "unit"), [("darwin", 1), ("linux", 1024)])
def test_the_peak_of_a_process_is_in_the_unit_of_its_system(monkeypatch, platform, unit):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda whose: SimpleNamespace(ru_maxrss=3 * 2**20))
    assert memory.process_peak() == 3 * 2**20 * unit
    assert memory.peak_record()["peak_memory_mb"] == 3 * unit


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_memory_between_blocks_that_stay_is_given_back():
    def held() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    blocks = [bytearray(2**16) for _ in range(1000)]
    staying = blocks[::2]
    del blocks
    before = held()
    memory.release_free_memory()
    assert before - held() > len(staying) * 2**15  # the half of what is free, at least


def test_the_machine_of_a_training_is_named_with_its_gpu(machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    names = {}
    for device in ("cpu", "mps", "cuda"):
        machine(device)
        names[device] = machine_name()
    assert re.fullmatch(rf".*\S.*, {os.cpu_count()} cores, {torch.get_num_threads()} threads", names["cpu"])
    assert names["mps"] == f"mps; {names['cpu']}" and names["cuda"] == f"NVIDIA H100; {names['cpu']}"


def test_the_memory_of_a_gpu_is_recorded_beside_that_of_the_process(machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5 * 2**20)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 2**20)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 7 * 2**20)
    for device, peak, held in (("cuda", 5, 1), ("mps", 7, 7), ("cpu", None, 0)):
        machine(device)
        assert memory.gpu_peak() == (None if peak is None else peak * 2**20) and memory.reset_gpu_peak() == held * 2**20
        assert memory.peak_record().get("peak_gpu_memory_mb") == peak


# ------------------------------------------------------------------------------- where there is a GPU


@pytest.fixture
def real_device():
    """The GPU of this machine."""
    device = default_device()
    if device.type == "cpu":
        pytest.skip("no GPU, or DISTILLERY_DEVICE=cpu")
    return device


@pytest.mark.parametrize("arch", ["classifier", "causal"])
def test_a_student_trains_and_predicts_on_a_gpu(real_device, tiny_models, tmp_path, monkeypatch, arch):
    """Two steps with a prior of labels in float64; the loss is that of the CPU up to rounding."""
    folder = tiny_models / ("tiny-bert" if arch == "classifier" else "tiny-llama")
    phase = PHASE.model_copy(update={"loss": {"ce": 1.0, "label_prior": 0.1}})
    rows = TrainingRows(ROWS.texts, ROWS.targets, label_prior=torch.ones(2, dtype=torch.float64))
    losses = {}
    for name in (real_device.type, "cpu"):
        monkeypatch.setenv(devices.VARIABLE, name)
        student = build_student(StudentConfig(model="tiny", arch=arch, phases=[phase]), folder, TASK, seed=0)
        student.model.eval()
        history = train_phase(student, rows, phase, folder=tmp_path / name, seed=0)
        assert student.device.type == name and student.predict(ROWS.texts).sum(1) == pytest.approx(1, abs=1e-5)
        losses[name] = history["loss"].tolist()
    assert losses[real_device.type] == pytest.approx(losses["cpu"], rel=0.05)
