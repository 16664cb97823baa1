"""`dtype: auto`: the faster number format of a machine, measured once and kept."""

from __future__ import annotations

import json

import pytest
import torch

from distillery.config.schema import ModelConfig, StudentConfig, TeacherConfig
from distillery.models import precision
from distillery.models.devices import shapes_alone
from distillery.models.precision import choose_dtype, describe_dtypes, faster_dtypes, resolve_dtype
from distillery.tasks.schema import Task
from distillery.training.student import build_student
from distillery.training.teacher_models import load_teacher_model

SLOW_HALF = {"training": {"float32": 1.0, "bfloat16": 0.8}, "prediction": {"float32": 1.0, "bfloat16": 1.5}}


@pytest.fixture
def timings(monkeypatch):
    """The timings that the next measurement gives, and the number of measurements."""
    state = {"seconds": SLOW_HALF, "measurements": 0}

    def time_dtypes():
        state["measurements"] += 1
        return state["seconds"]

    monkeypatch.setattr(precision, "time_dtypes", time_dtypes)
    return state


@pytest.mark.parametrize(
    ("float32", "bfloat16", "chosen"),
    [(1.0, 0.5, "bfloat16"), (1.1, 1.0, "bfloat16"), (1.09, 1.0, "float32"), (1.0, 1.0, "float32"), (1, 9, "float32")],
)
def test_half_precision_is_taken_where_it_is_clearly_faster(float32, bfloat16, chosen):
    assert choose_dtype({"float32": float32, "bfloat16": bfloat16}) == chosen


def test_training_and_prediction_have_their_own_and_are_measured_once(timings, tmp_path):
    path = tmp_path / "dtype.json"
    expected = {"training": "bfloat16", "prediction": "float32"}
    assert faster_dtypes(path) == expected
    timings["seconds"] = {use: {"float32": 1, "bfloat16": 1} for use in expected}
    assert faster_dtypes(path) == expected and timings["measurements"] == 1
    assert next(iter(json.loads(path.read_text()).values()))["seconds"] == SLOW_HALF


def test_another_number_of_threads_is_another_machine(timings, tmp_path, monkeypatch):
    faster_dtypes(tmp_path / "dtype.json")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    timings["seconds"] = {use: {"float32": 1, "bfloat16": 3} for use in SLOW_HALF}
    assert set(faster_dtypes(tmp_path / "dtype.json").values()) == {"float32"}
    assert len(json.loads((tmp_path / "dtype.json").read_text())) == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_named_format_is_taken_without_a_measurement(dtype, timings):
    assert resolve_dtype(dtype, "training") == resolve_dtype(dtype, "prediction") == dtype
    assert timings["measurements"] == 0
    assert describe_dtypes(dtype) == f"Products: training in {dtype} and prediction in {dtype}."


def test_nothing_is_timed_for_models_without_weights(timings):
    with shapes_alone():
        assert [resolve_dtype("auto", use) for use in precision.USES] == ["bfloat16", "bfloat16"]
    assert timings["measurements"] == 0


def test_the_sentence_names_what_auto_means(timings, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "repository_root", lambda: tmp_path)
    assert describe_dtypes("auto") == (
        "Products: training in bfloat16 and prediction in float32; `dtype: auto` takes what is faster on this machine."
    )
    assert (tmp_path / ".cache/dtype.json").exists()


def test_students_and_teachers_are_opened_in_the_format_of_their_use(timings, tmp_path, tiny_models, monkeypatch):
    monkeypatch.setattr(precision, "repository_root", lambda: tmp_path)
    task = Task(
        kind="classification",
        labels={"down": "bad", "up": "good"},
        prompt={"instruction": "Up or down?", "template": "{text}"},
    )
    origin = ModelConfig(folder=str(tiny_models / "tiny-llama"))
    student = StudentConfig(model="m", arch="causal", prompt="plain", dtype="auto", phases=[])
    assert build_student(student, tiny_models / "tiny-llama", task, 0).dtype == torch.bfloat16
    lora = {"on": "a/train", "epochs": 1, "learning_rate": 1.0e-3, "lora": {"r": 2}}
    spec = TeacherConfig(kind="lm", model="m", prompt="plain", data=["a"], dtype="auto", finetune=lora)
    opened = {use: load_teacher_model("t", spec, origin, task, use=use) for use in ("training", "prediction")}
    assert opened["training"].dtype == next(opened["training"].model.parameters()).dtype == torch.bfloat16
    assert opened["prediction"].dtype == next(opened["prediction"].model.parameters()).dtype == torch.float32
    assert timings["measurements"] == 1


def test_both_formats_are_timed_and_no_random_number_is_used(monkeypatch):
    monkeypatch.setattr(precision, "LAYERS", 1)
    before = torch.get_rng_state()
    seconds = precision.time_dtypes()
    assert torch.equal(torch.get_rng_state(), before)
    assert {use: set(times) for use, times in seconds.items()} == {
        use: {"float32", "bfloat16"} for use in ("training", "prediction")
    }
    assert all(0 < s < float("inf") for times in seconds.values() for s in times.values())


def test_a_gpu_is_timed_with_a_wider_model():
    """Its small operations take the time of their calls, in any number format."""
    narrow = precision._build_model("float32")
    with shapes_alone():  # stands for a GPU
        wide = precision._build_model("bfloat16")
    assert wide.config.hidden_size == precision.GPU_SCALE * narrow.config.hidden_size
    assert wide.config.head_dim == narrow.config.head_dim
