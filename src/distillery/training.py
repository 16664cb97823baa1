"""A student's training: phases of gradient descent on cached signals, resumable to the bit.

One engine for all of it: a classifier runs through `transformers.Trainer`, a causal model through TRL's `SFTTrainer`,
both with the loss replaced. A teacher's fine-tuning is a phase too.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, load_model, save_file, save_model
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from distillery import losses, metrics, models, params, tasks
from distillery.models import LabelModel
from distillery.params import UserError

torch.use_deterministic_algorithms(True)  # same inputs, same seed, same machine: same result, to the bit
torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that writes every buffer twice

LOG_EVERY = 10  # optimizer steps
HISTORY = ("step", "epoch", "loss", "learning_rate")
LENGTH_POOL = 16  # batches drawn together and sorted by length, so that rows of one batch need little padding


@dataclass
class Rows:
    """What a phase learns from. targets [n]: label indices (gold, or the teachers' where there is no gold).

    logprobs [n, labels]: the teachers' mixed distribution at T = 1, None when the phase has no teacher.
    """

    texts: list[str]
    targets: np.ndarray
    logprobs: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.texts)


def phase_rows(
    frame: pd.DataFrame, phase: params.Phase, labels: Sequence[str], scores: dict[str, float] | None = None
) -> Rows:
    """The rows of `phase` out of a student's `rows.parquet`, with its teachers' distributions mixed.

    frame: columns where, text, label and `p_<teacher>` (probabilities over `labels`).
    scores: each teacher's validation accuracy, for `mix: validation`.
    A row that no teacher of the phase has a signal for is left out; of several teachers, those that have one count.
    Raises UserError when a phase finds no row.
    """
    rows = frame[frame["where"].isin(phase.data)].reset_index(drop=True)
    told = np.stack([rows[f"p_{teacher}"].notna() for teacher in phase.teachers]) if phase.teachers else None
    if told is not None and not told.all():
        rows, told = rows[told.any(0)].reset_index(drop=True), told[:, told.any(0)]
    if rows.empty:
        raise UserError(f"phases: no row in {', '.join(phase.data)}")
    index = {label: i for i, label in enumerate(labels)}
    targets = np.array([index.get(label, -1) for label in rows["label"]])
    if not phase.teachers:
        return Rows(rows["text"].tolist(), targets)
    equally = np.full(len(labels), 1 / len(labels))
    said = [[equally if p is None else p for p in rows[f"p_{teacher}"]] for teacher in phase.teachers]
    stack = np.stack([np.stack(of_one) for of_one in said])
    logprobs = torch.from_numpy(stack).double().log()
    if phase.mix == "confidence":
        gold = torch.from_numpy(targets)
        weights = torch.where(
            gold >= 0,
            losses.confidence_weights(logprobs, gold.clamp_min(0)),
            losses.confidence_weights(logprobs),
        )
    elif phase.mix == "validation":
        weights = torch.tensor([scores[teacher] for teacher in phase.teachers], dtype=torch.double)
    else:
        weights = torch.ones(len(phase.teachers), dtype=torch.double)
    if not told.all():
        weights = weights.reshape(len(weights), -1) * torch.from_numpy(told)
    mixed = losses.mix_teachers(logprobs, weights).float()
    return Rows(rows["text"].tolist(), np.where(targets < 0, mixed.argmax(-1).numpy(), targets), mixed)


class Batches(torch.utils.data.Sampler):
    """Row order of an epoch, a pure function of (seed, epoch), so that a resumed run sees the rows it would have seen.

    order: `random` draws batches of similar length; `length` goes from short to long; `confidence` from the rows the
    teachers are sure of to those they are not.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int, order: str = "random", entropy: Any = None):
        self.lengths, self.batch, self.seed, self.order, self.entropy = lengths, batch, seed, order, entropy
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        if self.order != "random":
            key = self.lengths if self.order == "length" else self.entropy
            return iter(sorted(range(len(self)), key=lambda i: (key[i], i)))
        rng = np.random.default_rng([self.seed, self.epoch])
        rows = rng.permutation(len(self)).tolist()
        pool = self.batch * LENGTH_POOL
        rows = [i for a in range(0, len(rows), pool) for i in sorted(rows[a : a + pool], key=self.lengths.__getitem__)]
        full = len(rows) // self.batch
        batches = [rows[k * self.batch : (k + 1) * self.batch] for k in range(full)]
        return iter([i for k in rng.permutation(full) for i in batches[k]] + rows[full * self.batch :])


class _Phase:
    """What this repository changes in a trainer: which rows make a batch, and the loss."""

    # Trainer would divide by the micro-batches once more; our denominators span the whole optimizer step.
    loss_is_scaled_for_ga = True

    def prepare(
        self, student: LabelModel, rows: Rows, spec: params.Training, seed: int, validation: Rows | None
    ) -> None:
        self.student, self.rows, self.spec, self.seed, self.validation = student, rows, spec, seed, validation
        self.ids = student.encode(rows.texts)
        self.terms: dict[str, list[float]] = {}
        self.logged: int | None = None
        self.supervised = (0, 0)

    def _get_train_sampler(self, train_dataset: Any = None) -> Batches:
        entropy = None
        if self.rows.logprobs is not None:
            entropy = (-(self.rows.logprobs.exp() * self.rows.logprobs.clamp_min(-100)).sum(-1)).tolist()
        order = getattr(self.spec, "order", "random")
        return Batches([len(ids) for ids in self.ids], self.spec.batch_size, self.seed, order, entropy)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        if self.logged is None:
            self.logged = self.state.global_step  # not 0 in a run that continues from a checkpoint
        batches, _ = super().get_batch_samples(*args, **kwargs)
        rows = [i for batch in batches for i in batch["index"].tolist()]
        self.supervised = (len(rows), sum(self.student.answer_tokens(self.rows.targets[i]) for i in rows))
        return batches, None

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The phase's weighted terms. Label-space terms are means over the rows of the optimizer step, a causal
        model's cross-entropy a mean over its answer tokens; no term ever sees a prompt's logits."""
        picked = inputs["index"].tolist()
        weights = getattr(self.spec, "loss", {"ce": 1.0})
        gold = self.rows.targets[picked] if "ce" in weights else None
        out = self.student.forward([self.ids[i] for i in picked], gold)
        total, values = torch.zeros((), device=out.logits.device), {}
        if "ce" in weights:
            values["ce"] = out.nll / self.supervised[1]
            total = total + weights["ce"] * values["ce"]
        others = {term: weight for term, weight in weights.items() if term != "ce"}
        if others:
            phase = self.spec
            loss, more = losses.mixed(
                others,
                out.logits,
                teacher_logprobs=self.rows.logprobs[picked].to(out.logits.device),
                temperature=phase.temperature,
                scale_by_t2=phase.scale_by_t2,
                beta=phase.beta,
                alpha=phase.alpha,
                denominator=self.supervised[0],
            )
            total, values = total + loss, values | more
        for term, value in values.items():
            self.terms.setdefault(term, []).append(value.item())
        return (total, out) if return_outputs else total

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            steps = max(1, self.state.global_step - (self.logged or 0))
            logs |= {f"term_{term}": sum(values) / steps for term, values in self.terms.items()}
            self.logged, self.terms = self.state.global_step, {}
        super().log(logs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Scores on the validation split, for early stopping."""
        rows = self.validation
        probabilities = self.student.predict(rows.texts)
        names = self.student.task.names
        gold = [names[i] for i in rows.targets]
        report = metrics.classification_report(gold, [names[i] for i in probabilities.argmax(-1)], probabilities, names)
        scores = {f"eval_{k}": report[k] for k in ("accuracy", "macro_f1")} | {"eval_loss": report["log_loss"]}
        self.log(scores)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, scores)
        return scores


class ClassifierTrainer(_Phase, Trainer):
    """Label-space distillation of an encoder."""


class CausalTrainer(_Phase, SFTTrainer):
    """Supervised and distilled fine-tuning of a causal model.

    `compute_loss` replaces TRL's: its SFT loss knows no teacher; its GKD loss drops the temperature, divides by the
    data set's label count and runs both models over every position of prompt and answer.
    """


class Progress(TrainerCallback):
    """A line now and then: under papermill every redraw of a bar would become a line of the notebook."""

    def __init__(self, title: str):
        self.title = title

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs and state.global_step % max(LOG_EVERY, state.max_steps // 80 * 10) == 0:
            print(f"{self.title}: step {state.global_step}/{state.max_steps}, loss {logs['loss']:.4f}", flush=True)


def _last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint; one that a kill left half-written is removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    while found:
        state = found[-1] / "trainer_state.json"  # the trainer writes this file last
        try:
            json.loads(state.read_text())
            return str(found[-1])
        except (OSError, ValueError):
            shutil.rmtree(found.pop())
    return None


def optimizer_steps(rows: int, spec: params.Training) -> int:
    """Optimizer steps of a phase on `rows` rows; the last, smaller batch of an epoch counts."""
    if spec.steps:
        return spec.steps
    return max(1, math.ceil(spec.epochs * math.ceil(math.ceil(rows / spec.batch_size) / spec.accumulate)))


def run_phase(
    student: LabelModel,
    rows: Rows,
    spec: params.Training,
    *,
    folder: Path,
    seed: int,
    title: str = "training",
    checkpoint_every: int = 50,
    validation: Rows | None = None,
) -> pd.DataFrame:
    """Train `student` in place on `rows` as `spec` says; continue from the last checkpoint in `folder`, if any.

    Returns the history, a row a logged step: step, epoch, loss, learning_rate and the terms' values.
    Raises UserError when the disk is full.
    """
    stopping = getattr(spec, "early_stopping", None)
    steps = optimizer_steps(len(rows), spec)
    every = stopping.every if stopping else checkpoint_every
    common: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": spec.batch_size,
        "gradient_accumulation_steps": spec.accumulate,
        "learning_rate": spec.learning_rate,
        "lr_scheduler_type": "constant_with_warmup" if spec.schedule == "constant" else spec.schedule,
        "warmup_steps": int(spec.warmup * steps),
        "weight_decay": spec.weight_decay,
        "max_grad_norm": spec.max_grad_norm,
        "seed": seed,
        "data_seed": seed,
        # a checkpoint falls on a logged step, or a resumed run would average the loss over fewer steps
        "logging_steps": math.gcd(min(LOG_EVERY, steps), every),
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": every,
        "save_total_limit": 2,
        "eval_strategy": "steps" if stopping else "no",
        "eval_steps": every if stopping else None,
        "load_best_model_at_end": bool(stopping),
        "metric_for_best_model": stopping.metric if stopping else None,
        "greater_is_better": stopping.metric != "loss" if stopping else None,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "bf16": False,  # LabelModel.autocast decides
        "gradient_checkpointing": False,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
    }
    data = Dataset.from_dict({"index": list(range(len(rows)))})
    wiring: dict[str, Any] = {
        "model": student.model,
        "train_dataset": data,
        "eval_dataset": data if stopping else None,
        "data_collator": lambda batch: {"index": torch.tensor([row["index"] for row in batch])},
        "callbacks": [Progress(title)] + ([EarlyStoppingCallback(stopping.patience)] if stopping else []),
    }
    if student.arch == "causal":
        arguments = SFTConfig(**common, max_length=None, packing=False, dataset_kwargs={"skip_prepare_dataset": True})
        trainer = CausalTrainer(args=arguments, processing_class=student.tokenizer, **wiring)
        for weight in trainer.model.parameters():
            if weight.requires_grad:
                # TRL narrows the adapters of a 4-bit model to bfloat16, where a small update rounds to none
                weight.data = weight.data.float()
    else:
        trainer = ClassifierTrainer(args=TrainingArguments(**common), **wiring)
    trainer.remove_callback(PrinterCallback)
    trainer.prepare(student, rows, spec, seed, validation)
    try:
        trainer.train(resume_from_checkpoint=_last_checkpoint(folder))
    except Exception as error:  # torch and safetensors have error classes of their own
        params.raise_if_disk_full(error, folder)
        raise
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    history = pd.DataFrame(logged, columns=list(dict.fromkeys([*HISTORY, *(k for entry in logged for k in entry)])))
    terms = [k for k in history if k.startswith("term_")]
    return history[[*HISTORY, *terms]].rename(columns=lambda k: k.removeprefix("term_"))


def attach(model: Any, lora: params.Lora | None, arch: str, seed: int) -> Any:
    """`model` with LoRA adapters in its linear layers (Hu et al. 2022), or as it is when `lora` is None."""
    if lora is None:
        return model
    torch.manual_seed(seed)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha or 2 * lora.r,
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        task_type="CAUSAL_LM" if arch == "causal" else "SEQ_CLS",
    )
    model = get_peft_model(model, config)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            # peft would widen every input to the adapter's float32, for autocast to narrow it again
            module.cast_input_dtype_enabled = False
    return model


def build(spec: params.Student, folder: Path, task: tasks.Task, seed: int, remote_code: bool = False) -> LabelModel:
    """The student before its first step: the wanted layers of the model in `folder`, with its adapter, if any.

    Weights that are trained are kept in float32 whatever `spec.dtype` says; that is the precision of the products.
    """
    adapted = spec.adapter.kind != "none"
    model = models.load(
        folder,
        spec.arch,
        labels=task.names,
        layers=spec.init.layers,
        dtype=spec.dtype if adapted and spec.arch == "causal" else "float32",
        seed=seed,
        quantize=spec.adapter.kind == "qlora",
        trust_remote_code=remote_code,
    )
    model = attach(model, spec.adapter if adapted else None, spec.arch, seed)
    if spec.init.freeze == "embeddings":
        model.get_input_embeddings().requires_grad_(False)
    return LabelModel(
        model,
        models.load_tokenizer(folder, remote_code),
        task,
        spec.arch,
        prompt=spec.prompt,
        few_shot=spec.few_shot,
        max_length=spec.max_length,
        dtype=spec.dtype,
    )


def reopen(spec: params.Student, folder: Path, task: tasks.Task, dtype: str = "float32") -> LabelModel:
    """A finished student from its folder. In float32 it says what anyone who loads the folder computes, row by row or
    in batches; half precision is faster, and its roundings depend on the batch."""
    model = models.load(folder, spec.arch, labels=task.names, dtype=dtype)
    tokenizer = models.load_tokenizer(folder)
    extras = {"prompt": spec.prompt, "few_shot": spec.few_shot, "max_length": spec.max_length}
    return LabelModel(model, tokenizer, task, spec.arch, dtype=dtype, **extras)


def run_key(*parts: Any) -> str:
    """A name for a run's checkpoints: a hash of `parts` and of the code and libraries that compute the run."""
    digest = hashlib.sha256()
    for module in (losses, metrics, models, params, tasks):
        digest.update(Path(module.__file__).read_bytes())
    digest.update(Path(__file__).read_bytes())
    versions = {name: version(name) for name in ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")}
    digest.update(json.dumps([versions, torch.get_num_threads()]).encode())
    for part in parts:
        digest.update(part if isinstance(part, bytes) else json.dumps(part, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def run_phases(
    student: LabelModel,
    frame: pd.DataFrame,
    spec: params.Student,
    *,
    folder: Path,
    seed: int,
    validation: pd.DataFrame,
    test: pd.DataFrame,
    scores: dict[str, float] | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Train `student` in place through all phases of `spec`, continuing where an earlier, killed run stood.

    frame: the rows of `rows.parquet`. validation: rows (id, text, label) for early stopping, predicted before the
    first phase and after each but the last. test: predicted before the first phase.
    Returns the history (phase, step, epoch, loss, learning_rate, one column per loss term) and these predictions
    (phase, split, id, label, prediction, probabilities), phase 0 being the untrained student.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = student.task.names
    held_out = Rows(validation["text"].tolist(), np.array([names.index(label) for label in validation["label"]]))
    histories, said = [], []
    for k in range(len(spec.phases) + 1):
        done = folder / f"phase-{k}"
        if not (done / "history.csv").exists():  # written last
            history = pd.DataFrame(columns=list(HISTORY))
            if k:
                phase = spec.phases[k - 1]
                rows = phase_rows(frame, phase, names, scores)
                history = run_phase(
                    student,
                    rows,
                    phase,
                    folder=folder / f"checkpoints-{k}",
                    seed=1000 * seed + k,
                    title=f"phase {k} of {len(spec.phases)}",
                    checkpoint_every=spec.checkpoint_every,
                    validation=held_out,
                )
            _keep(student.model, done / "weights.safetensors")
            asked = {"validation": validation, "test": test} if k == 0 else {"validation": validation}
            answers(student, asked if k == 0 or k < len(spec.phases) else {}).to_parquet(done / "answers.parquet")
            with params.atomic(done / "history.csv") as path:
                history.to_csv(path, index=False)
            shutil.rmtree(folder / f"checkpoints-{k}", ignore_errors=True)
        elif not (folder / f"phase-{k + 1}" / "history.csv").exists():
            _restore(student.model, done / "weights.safetensors")
        histories.append(pd.read_csv(done / "history.csv").assign(phase=k))
        said.append(pd.read_parquet(done / "answers.parquet").assign(phase=k))
    history = pd.concat([h for h in histories if len(h)] or histories, ignore_index=True)
    told = pd.concat([part for part in said if len(part)], ignore_index=True)
    return history[["phase", *history.columns.drop("phase")]], told[["phase", *told.columns.drop("phase")]]


def _keep(model: Any, path: Path) -> None:
    with params.atomic(path) as scratch:
        if hasattr(model, "peft_config"):
            save_file({k: v.contiguous() for k, v in get_peft_model_state_dict(model).items()}, scratch)
        else:
            save_model(model, str(scratch))


def _restore(model: Any, path: Path) -> None:
    if hasattr(model, "peft_config"):
        set_peft_model_state_dict(model, load_file(path))
    else:
        load_model(model, str(path))


def predicted(student: LabelModel, rows: pd.DataFrame) -> pd.DataFrame:
    """`rows` (id, text, label) with what `student` says of them: id, label, prediction, probabilities."""
    probabilities = student.predict(rows["text"].tolist())
    names = student.task.names
    return pd.DataFrame(
        {
            "id": rows["id"].tolist(),
            "label": rows["label"].tolist(),
            "prediction": [names[i] for i in probabilities.argmax(-1)],
            "probabilities": list(probabilities),
        }
    )


def answers(student: LabelModel, asked: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """What `student` says of the rows of every split in `asked`: split, id, label, prediction, probabilities."""
    columns = ["split", "id", "label", "prediction", "probabilities"]
    parts = [predicted(student, rows).assign(split=split) for split, rows in asked.items()]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def scores(rows: pd.DataFrame, names: Sequence[str]) -> dict[str, Any]:
    """Every score of the predictions in `rows` (label, prediction, probabilities)."""
    return metrics.classification_report(
        rows["label"].tolist(), rows["prediction"].tolist(), np.stack(rows["probabilities"].to_list()), names
    )


CARD = """---
library_name: transformers
pipeline_tag: {pipeline}
---
# {student}

{what} for the labels {labels}, distilled from {teachers}. {parameters:,} parameters, {megabytes:.0f} MB, seed {seed}.

## Use

```python
{snippet}
```

## How good it is

On {rows} test rows that it never saw; intervals (95 %) draw rows of one group together:

| score | value |
|---|---|
{scores}

| label | precision | sensitivity | specificity | F1 | rows |
|---|--:|--:|--:|--:|--:|
{per_label}

## How it learned

{phases}

Other texts than those of its test rows may come out otherwise; nothing here says how it treats groups of people.
"""
CARD_SCORES = {
    "mcc": "Matthews correlation",
    "log_loss": "log loss",
    "brier": "Brier score",
    "ece": "calibration error",
}
CLASSIFIER_SNIPPET = """from transformers import pipeline

classify = pipeline("text-classification", model=".")
print(classify({example!r}))"""
CAUSAL_SNIPPET = """import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".", dtype=torch.float32).eval()


def classify(text, before={before!r}, after={after!r}, answers={answers!r}):
    prompt = tokenizer(before + text + after, add_special_tokens={special})["input_ids"]
    scores = []
    for answer in answers:  # the log-probability of every answer after the prompt
        tokens = tokenizer(answer, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        scores.append(logits.log_softmax(-1)[range(len(tokens)), tokens].sum())
    return dict(zip({labels!r}, torch.stack(scores).softmax(-1).tolist()))


print(classify({example!r}))"""


def _leg(phase: params.Phase) -> str:
    """One phase in words."""
    length = f"{phase.steps} steps" if phase.steps else f"{phase.epochs:g} epochs"
    source = f"taught by {', '.join(phase.teachers)}" if phase.teachers else "by gold labels alone"
    terms = ", ".join(f"{weight:g} {term}" for term, weight in phase.loss.items())
    return f"{length} on {', '.join(phase.data)}, {source} ({terms})"


def write_card(folder: Path, spec: params.Student, task: tasks.Task, about: dict[str, Any], said: pd.DataFrame) -> None:
    """The model folder's README.md: what it is, how good, and code that uses it with `transformers` alone.

    said: test rows (text, label, prediction, group); the first is the example. about["test"]: their scores. The
    intervals are those of the report for one seed.
    """
    example = said["text"].iloc[0]
    snippet = CLASSIFIER_SNIPPET.format(example=example)
    if spec.arch == "causal":
        mark = "\x00"
        tokenizer = models.load_tokenizer(folder)
        rendered = tasks.render(tasks.turns(task, mark, spec.few_shot), tokenizer, spec.prompt)
        before, _, after = rendered.partition(mark)
        answers = [tasks.answer(task, name, spec.prompt) for name in task.names]
        if all(ids[-1] == tokenizer.eos_token_id for ids in models.label_tokens(tokenizer, answers)):
            answers = [answer + tokenizer.eos_token for answer in answers]
        snippet = CAUSAL_SNIPPET.format(
            before=before,
            after=after,
            answers=answers,
            labels=task.names,
            special=spec.prompt == "plain",
            example=example,
        )
    teachers = dict.fromkeys(name for phase in spec.phases for name in phase.teachers)
    test = about["test"]
    drawn = metrics.bootstrap_scores(said["label"].tolist(), said["prediction"].tolist(), task.names, said["group"])
    lines = []
    for name, samples in drawn.items():
        low, high = metrics.interval(samples)
        title = name.replace("_f1", "-F1")
        lines.append(f"| {title} | {100 * test[name]:.1f} % ({100 * low:.1f} to {100 * high:.1f}) |")
    lines += [
        f"| {name.replace('_', ' ')} | {100 * test[name]:.1f} % |" for name in ("balanced_accuracy", "commonest_answer")
    ]
    lines += [f"| {title} | {test[name]:.3f} |" for name, title in CARD_SCORES.items()]
    per_label = [
        f"| {label} | {' | '.join(f'{100 * row[k]:.1f} %' for k in ('precision', 'recall', 'specificity', 'f1'))} "
        f"| {row['support']} |"
        for label, row in test["labels"].items()
    ]
    phases = [f"{i}. {_leg(phase)}" for i, phase in enumerate(spec.phases, 1)]
    text = CARD.format(
        pipeline="text-generation" if spec.arch == "causal" else "text-classification",
        student=about["student"],
        what="A causal language model" if spec.arch == "causal" else "A classifier",
        labels=", ".join(task.names),
        teachers=", ".join(teachers) or "nobody: it learned from gold labels alone",
        parameters=about["parameters"],
        megabytes=about["bytes_on_disk"] / 1e6,
        scores="\n".join(lines),
        per_label="\n".join(per_label),
        phases="\n".join(phases) or "Not at all: it is as it was built.",
        rows=test["rows"],
        seed=about["seed"],
        snippet=snippet,
    )
    with params.atomic(folder / "README.md") as path:
        path.write_text(text, encoding="utf-8")
