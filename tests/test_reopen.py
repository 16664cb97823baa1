"""A saved model predicts as it did before it was saved, whatever its architecture and its adapters."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import kinds
import tiny
from distillery.config.schema import ModelConfig, StudentConfig, TeacherConfig
from distillery.models.label_model import LabelModel
from distillery.models.save import save_model, save_trained_weights
from distillery.models.series_adapters import ADAPTER
from distillery.tasks.schema import load_task
from distillery.training.student import attach_adapters, build_student, load_student
from distillery.training.teacher_models import load_teacher_model

TASK = load_task("finance-sentiment", tiny.ROOT / "tasks")
# what params.yaml lets each be trained with
ADAPTERS = {
    "classifier": ("none", "lora", "series"),
    "causal": ("none", "lora", "qlora", "series"),
    "seq2seq": ("none", "lora", "series"),
}
SIZES = {"none": {}, "lora": {"r": 4}, "qlora": {"r": 4}, "series": {"size": 4}}
CASES = [(arch, kind, adapter) for arch, names in kinds.ARCHS.items() for kind in names for adapter in ADAPTERS[arch]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each kind of model."""
    corpus, base = tiny.texts(), tmp_path_factory.mktemp("kinds")
    autos = {
        "classifier": transformers.AutoModel,
        "causal": transformers.AutoModelForCausalLM,
        "seq2seq": transformers.AutoModelForSeq2SeqLM,
    }
    for arch, names in kinds.ARCHS.items():
        tokenizer = tiny.word_tokenizer(corpus, kinds.WORDS[arch])
        for kind in names:
            kinds.build(kind, tokenizer, autos[arch], base / kind)
    return base


def train(model: LabelModel, steps: int = 4) -> None:
    """A few steps of gradient descent, so that no trained weight is what it was drawn or read as."""
    texts = tiny.texts()[:6]
    ids, targets = model.encode(texts), torch.tensor([i % 3 for i in range(6)])
    optimizer = torch.optim.Adam([p for p in model.model.parameters() if p.requires_grad], lr=0.02)
    model.model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model.forward(ids).label_logits, targets)
        loss.backward()
        optimizer.step()
    model.model.eval()


@cache
def original_names(arch: str, folder: Path) -> set[str]:
    """The names of all weights of the model in `folder`."""
    spec = StudentConfig(model="m", arch=arch, phases=[], prompt="plain")
    return {name for name, _ in load_student(spec, folder, TASK).model.named_parameters()}


@pytest.mark.parametrize("arch, kind, adapter", CASES)
def test_a_student_predicts_the_same_after_it_was_saved(folders, tmp_path, arch, kind, adapter):
    spec = StudentConfig(model=kind, arch=arch, adapter={"kind": adapter, **SIZES[adapter]}, phases=[], prompt="plain")
    student = build_student(spec, folders / kind, TASK, seed=0)
    texts = tiny.texts()[:8]
    before = student.predict(texts)
    train(student, 12 if adapter == "series" else 4)  # which begins at nearly the identity
    trained = student.predict(texts)
    assert np.abs(trained - before).max() > 0.02
    save_model(student.model, student.tokenizer, tmp_path / "model")
    reopened = load_student(spec, tmp_path / "model", TASK)
    assert np.abs(reopened.predict(texts) - trained).max() < (1e-4 if "lora" in adapter else 1e-6)
    names = {name for name, _ in reopened.model.named_parameters() if ADAPTER not in name}
    assert names == original_names(arch, folders / kind)  # of the same classes, layer by layer


TUNED = [
    (arch, kind, adapter)
    for arch, names in kinds.ARCHS.items()
    for kind in names
    for adapter in ("none", "lora", "qlora")[: 2 if arch == "classifier" else 3]
]


@pytest.mark.parametrize("arch, kind, adapter", TUNED)
def test_a_tuned_teacher_predicts_the_same_after_it_was_saved(folders, tmp_path, arch, kind, adapter):
    lora = None if adapter == "none" else {"r": 4}
    spec = TeacherConfig(
        kind={"causal": "lm"}.get(arch, arch),
        model=kind,
        prompt="plain",
        quantize="nf4" if adapter == "qlora" else "none",
        finetune={"on": "finance/train", "steps": 4, "learning_rate": 0.02, "lora": lora},
    )
    origin = ModelConfig(folder=str(folders / kind))
    teacher = load_teacher_model(kind, spec, origin, TASK)
    teacher.model = attach_adapters(teacher.model, spec.finetune.lora, arch, spec.seed)
    assert (adapter == "qlora") == any("Linear4bit" in type(module).__name__ for module in teacher.model.modules())
    train(teacher)
    texts = tiny.texts()[:8]
    trained = teacher.predict(texts)
    save_trained_weights(teacher.model, teacher.tokenizer, tmp_path / "fold")  # that of a fold: adapters alone
    save_model(teacher.model, teacher.tokenizer, tmp_path / "model")
    for name in ("fold", "model"):
        reopened = load_teacher_model(kind, spec, origin, TASK, tuned=tmp_path / name)
        assert np.abs(reopened.predict(texts) - trained).max() < (1e-4 if lora else 1e-6), name
