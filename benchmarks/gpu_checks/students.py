"""Training steps of tiny students on the device, beside the CPU, beside themselves, and after a break."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from distillery.config.schema import PhaseConfig, StudentConfig
from distillery.files import repository_root
from distillery.models.label_model import LabelModel
from distillery.models.load import load_model, load_tokenizer
from distillery.models.memory import gpu_peak, reset_gpu_peak
from distillery.models.save import save_model
from distillery.tasks.schema import Task, TaskPrompt
from distillery.training import trainers
from distillery.training.openable_teachers import OpenableTeacher
from distillery.training.rows import TrainingRows
from distillery.training.run import train_phase
from distillery.training.student import build_student, load_student
from gpu_checks import Place, use_device

LABELS = {"positive": "good news", "neutral": "no news", "negative": "bad news"}
TASK = Task(kind="classification", labels=LABELS, prompt=TaskPrompt(template="{text}"))
KINDS = {"classifier": "bert", "causal": "llama", "seq2seq": "t5"}
PROMPTS = {"classifier": "chat", "causal": "chat", "seq2seq": "plain"}
PLAIN = {"prompt": "plain"}
HALF = {"init": {"layers": "first-2"}}  # or student and teacher would be the same model
LORA = HALF | {"adapter": {"kind": "lora", "r": 4}}
CE_KL = {"loss": {"ce": 0.5, "kl": 0.5}, "temperature": 2.0}
JSD = {"loss": {"jsd": 1.0}, "space": "vocabulary"}
ROWS, BATCH, STEPS = 24, 8, 6
# relative, of the loss of a step: two devices sum in another order, and Adam turns a small gradient's sign into a step
TOLERANCE, HALF_TOLERANCE = 2e-3, 5e-2


class KilledError(Exception):
    """Ends a training as a kill does."""


class KillAfter(TrainerCallback):
    """Raises :class:`KilledError` at the end of a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KilledError


def corpus_rows(n: int = ROWS, task: Task = TASK) -> TrainingRows:
    """Rows of the finance corpus with drawn distributions of a teacher."""
    lines = (repository_root() / "data/corpora/finance.jsonl").read_text(encoding="utf-8").splitlines()[:n]
    examples = [json.loads(line) for line in lines]
    targets = np.array([task.names.index(row["label"]) for row in examples])
    rows = TrainingRows([row["text"] for row in examples], targets)
    rows.logprobs = torch.from_numpy(np.random.default_rng(0).dirichlet(np.ones(len(task.names)), n)).log().float()
    rows.teacher_weights = {"teacher": torch.ones(n, dtype=torch.double)}
    return rows


def student_of(place: Place, arch: str, dropout: bool = False, **settings: Any) -> LabelModel:
    """An untrained tiny student on the device that is in use."""
    spec = StudentConfig.model_validate({"model": "tiny", "arch": arch, "phases": []} | settings)
    student = build_student(spec, place.models / f"tiny-{KINDS[arch]}", TASK, seed=0)
    for module in student.model.modules():
        if isinstance(module, torch.nn.Dropout) and not dropout:
            module.p = 0.0
    return student


def teacher_of(place: Place, arch: str, cache: Path) -> dict[str, OpenableTeacher]:
    """The whole tiny model of the architecture as a teacher, with weights that have an opinion."""
    folder = place.models / f"tiny-{KINDS[arch]}"

    def open_teacher(fold: int) -> LabelModel:
        model = load_model(folder, arch, labels=TASK.names, seed=1)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(3 if weight.dim() > 1 else 1)
        return LabelModel(model.eval(), load_tokenizer(folder), TASK, arch, prompt=PROMPTS[arch])

    return {"teacher": OpenableTeacher(open_teacher, [arch], 4, cache)}


def phase_of(**settings: Any) -> PhaseConfig:
    """A phase of a few steps."""
    common = {"data": ["finance/train"], "steps": STEPS, "batch_size": BATCH, "learning_rate": 1e-3, "warmup": 0.0}
    return PhaseConfig.model_validate(common | {"teachers": ["teacher"]} | settings)


def train(
    place: Place, student: LabelModel, phase: PhaseConfig, name: str, *, run: str = "run", **options: Any
) -> list[float]:
    """Train `student` in place; the loss of every step. name: of the folder; run: of checkpoints that are shared."""
    trainers.LOG_EVERY = 1
    folder = place.folder / name
    teachers = teacher_of(place, student.arch, folder / "signals") if student.arch != "classifier" else None
    options = {"seed": 0, "checkpoint_every": 3, "teachers": teachers} | options
    return train_phase(student, corpus_rows(), phase, folder=folder / run, **options)["loss"].tolist()


def trained_weights(student: LabelModel) -> dict[str, torch.Tensor]:
    """Copies of the trained weights, on the CPU."""
    return {k: p.detach().cpu().clone() for k, p in student.model.named_parameters() if p.requires_grad}


def require_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], title: str) -> None:
    """Raise AssertionError when two trainings ended with other weights."""
    differences = {k: float((one[k].float() - other[k].float()).abs().max()) for k in one}
    worst = max(differences, key=differences.get)
    assert all(torch.equal(one[k], other[k]) for k in one), f"{title}: {worst} differs by {differences[worst]:.1e}"


def largest_difference(values: list[float], references: list[float]) -> float:
    """The largest relative difference."""
    return max(abs(a / b - 1) for a, b in zip(values, references, strict=True))


def _like_the_cpu(place: Place, arch: str, settings: dict[str, Any], phase: dict[str, Any]) -> str:
    """Train on the device and on the CPU; in float32, and on the device in bfloat16."""
    losses = {}
    for device, dtype in ((place.device, "float32"), ("cpu", "float32"), (place.device, "bfloat16")):
        use_device(device)
        student = student_of(place, arch, **settings, dtype=dtype)
        losses[device, dtype] = train(place, student, phase_of(**phase), f"{device}-{dtype}")
        assert student.device.type == device
        assert np.allclose(student.predict(corpus_rows(4).texts).sum(1), 1, atol=1e-4)
    reference = losses["cpu", "float32"]
    differences = [largest_difference(losses[place.device, dtype], reference) for dtype in ("float32", "bfloat16")]
    figure = (
        f"largest relative difference of a step's loss: float32 {differences[0]:.1e}, bfloat16 {differences[1]:.1e}"
    )
    assert differences[0] <= TOLERANCE and differences[1] <= HALF_TOLERANCE, figure
    return figure


def classifier_like_the_cpu(place: Place) -> str:
    """An encoder with cross-entropy and KL over the labels."""
    return _like_the_cpu(place, "classifier", {}, CE_KL)


def causal_like_the_cpu(place: Place) -> str:
    """Half a language model with adapters and JSD over the vocabulary."""
    return _like_the_cpu(place, "causal", LORA, JSD)


def seq2seq_like_the_cpu(place: Place) -> str:
    """An encoder-decoder with cross-entropy and KL over the labels."""
    return _like_the_cpu(place, "seq2seq", PLAIN, CE_KL)


def same_bits(place: Place) -> str:
    """Two trainings of each architecture, with dropout, end with the same bits."""
    cases = {
        "classifier": ("classifier", {}, CE_KL),
        "causal, JSD": ("causal", LORA, JSD),
        "causal, bfloat16": ("causal", LORA | {"dtype": "bfloat16"}, CE_KL),
        "encoder-decoder": ("seq2seq", PLAIN, CE_KL),
    }
    for name, (arch, settings, phase) in cases.items():
        weights = []
        for run in range(2):
            student = student_of(place, arch, dropout=True, **settings)
            train(place, student, phase_of(**phase), f"{name}-{run}")
            weights.append(trained_weights(student))
        require_same_bits(*weights, name)
    return f"equal to the bit: {', '.join(cases)}"


def continued_run(place: Place) -> str:
    """A training that is killed after its checkpoint and continued, with dropout, beside one without a break."""
    lora = {"adapter": {"kind": "lora", "r": 4, "dropout": 0.1}}
    cases = {"classifier": ("classifier", {}, CE_KL), "causal": ("causal", HALF | lora, JSD)}
    if place.is_gpu:
        cases["float16"] = ("causal", HALF | lora | {"dtype": "float16"}, CE_KL)
    for name, (arch, settings, spec) in cases.items():
        phase, weights = phase_of(**spec), []
        for run, kill in (("whole", None), ("broken", KillAfter(4)), ("broken", None)):
            student = student_of(place, arch, dropout=True, **settings)
            try:
                losses = train(place, student, phase, name, run=run, callbacks=[kill] if kill else [])
                weights.append((trained_weights(student), losses))
            except KilledError:
                checkpoints = [path.name for path in (place.folder / name / run).glob("checkpoint-*")]
                assert checkpoints == ["checkpoint-3"], checkpoints
        require_same_bits(weights[0][0], weights[1][0], name)
        assert weights[0][1] == weights[1][1], f"{name}: the history has other losses"
    return f"equal to the bit: {', '.join(cases)}"


def qlora(place: Place) -> str:
    """A student in 4 bits: two trainings are equal, and the merged model predicts what the adapters did."""
    figures = []
    for dtype in ("float32", "bfloat16"):
        settings = {"adapter": {"kind": "qlora", "r": 4}, "dtype": dtype}
        weights = []
        for run in range(2):
            student = student_of(place, "causal", **settings)
            losses = train(place, student, phase_of(**CE_KL), f"{dtype}-{run}")
            weights.append(trained_weights(student))
        require_same_bits(*weights, dtype)
        assert np.isfinite(losses).all(), losses
        assert student.device.type == place.device
        texts = corpus_rows(64).texts
        before = student.predict(texts)
        save_model(student.model, student.tokenizer, place.folder / dtype / "model")
        spec = StudentConfig.model_validate({"model": "tiny", "arch": "causal", "phases": []} | settings)
        after = load_student(spec, place.folder / dtype / "model", TASK, dtype).predict(texts)
        same, difference = int((before.argmax(1) == after.argmax(1)).sum()), float(np.abs(before - after).max())
        limit = 1e-3 if dtype == "float32" else 2e-2
        figures.append(f"{dtype}: {same} of {len(texts)} labels, probabilities within {difference:.1e}")
        clear = np.sort(before, 1)[:, -1] - np.sort(before, 1)[:, -2] > 2 * limit
        assert (before.argmax(1) == after.argmax(1))[clear].all() and difference <= limit, figures[-1]
    return "; ".join(figures)


def float16(place: Place) -> str:
    """Products in float16, with scaled gradients on CUDA, beside float32 on the same device."""
    trainers.LOG_EVERY, figures = 1, []
    for arch, settings, spec in (("classifier", {}, CE_KL), ("causal", LORA, JSD)):
        losses = {}
        for dtype in ("float32", "float16"):
            student, folder = student_of(place, arch, **settings, dtype=dtype), place.folder / f"{arch}-{dtype}"
            trainer = trainers.build_trainer(
                student,
                corpus_rows(),
                phase_of(**spec),
                folder=folder / "run",
                seed=0,
                title=arch,
                checkpoint_every=10**6,
                teachers=teacher_of(place, arch, folder / "signals"),
            )
            trainer.train()
            losses[dtype] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        scaler = trainer.accelerator.scaler
        assert (scaler is not None) == (place.device == "cuda"), f"{arch}: gradients are scaled: {scaler is not None}"
        difference = largest_difference(losses["float16"], losses["float32"])
        scale = f", scale {scaler.get_scale():g}" if scaler else ", no scaling"
        figures.append(f"{arch}: {difference:.1e} from float32{scale}")
        assert difference <= HALF_TOLERANCE, figures[-1]
    return "; ".join(figures)


def on_policy(place: Place) -> str:
    """Answers that the student generates: the CPU's when greedy, and two trainings on drawn ones are equal."""
    generated = []
    for device in (place.device, "cpu"):
        use_device(device)
        model = teacher_of(place, "causal", place.folder)["teacher"].open_fold(-1)
        generated.append(model.generate_tokens(model.encode(corpus_rows(16).texts), max_new_tokens=8))
    use_device(place.device)
    equal, weights = sum(a == b for a, b in zip(*generated, strict=True)), []
    for run in range(2):
        student = student_of(place, "causal", **LORA)
        train(place, student, phase_of(**JSD, on_policy=1.0, max_new_tokens=6), f"run-{run}")
        weights.append(trained_weights(student))
    require_same_bits(*weights, "two runs")
    figure = f"greedy answers of the CPU: {equal} of 16; two trainings on drawn answers equal to the bit"
    assert equal >= 14, figure  # where two tokens are almost equally likely, rounding decides
    return figure


def gradient_checkpointing(place: Place) -> str:
    """The losses with and without, and the memory of the step."""
    figures = []
    for arch, settings, spec in (("classifier", {}, CE_KL), ("causal", LORA, JSD)):
        losses, peaks = [], []
        for checkpointing in (False, True):
            student = student_of(place, arch, **settings, gradient_checkpointing=checkpointing)
            held = reset_gpu_peak()
            losses.append(train(place, student, phase_of(**spec), f"{arch}-{checkpointing}"))
            peaks.append(((gpu_peak() or 0) - held) / 2**20)
        difference = largest_difference(*losses)
        figures.append(f"{arch}: losses {difference:.1e} apart, {peaks[0]:.0f} and {peaks[1]:.0f} MiB")
        assert difference <= TOLERANCE, figures[-1]
    return "; ".join(figures)
