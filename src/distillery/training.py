"""A student's training: phases of gradient descent on cached signals, resumable to the bit.

One engine for all of it: a causal model runs through TRL's `SFTTrainer` (on-policy through its `GKDTrainer`), the
others through `transformers.Trainer`, all with the loss replaced. A teacher's fine-tuning is a phase too.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
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
from trl.experimental.gkd import GKDConfig, GKDTrainer

from distillery import losses, metrics, models, params, signals, tasks
from distillery.fingerprint import code_digest
from distillery.models import Completion, LabelModel
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
    rationales [n]: text, or None where there is none. weights {teacher: [n]}: of each teacher in a mix, row by row.
    folds {teacher: [n]}: which of its models may answer a row. prior [labels]: shares of the gold labels.
    answers: of a `qa` task, what targets are indices of. accepted [n]: what is right, to score by.
    """

    texts: list[str]
    targets: np.ndarray
    logprobs: torch.Tensor | None = None
    rationales: list[str | None] | None = None
    weights: dict[str, torch.Tensor] | None = None
    folds: dict[str, list[int]] | None = None
    prior: torch.Tensor | None = None
    answers: list[str] | None = None
    accepted: list[str] | None = None

    def __len__(self) -> int:
        return len(self.texts)


@dataclass
class WhiteBox:
    """A teacher that can be opened, to be asked about tokens and hidden states.

    open: gives its model for rows of a fold (-1: tuned on all gold rows). decides: all that decides what it says.
    depth: its number of layers. cache: the folder in which its signals are kept.
    """

    open: Callable[[int], LabelModel]
    decides: Any
    depth: int
    cache: Path


def white_box(root: Path, name: str, found: dict[str, Any]) -> WhiteBox:
    """The teacher `name` that `experiment.json` describes in `open`, its models in `data/teacher/<name>/`."""
    spec = params.Teacher.model_validate(found["spec"])
    origin = params.Model.model_validate({k: v for k, v in found["model"].items() if k != "content"})
    task, folder = tasks.Task.model_validate(found["task"]), root / "data" / "teacher" / name

    def open_model(fold: int) -> LabelModel:
        tuned = (folder / "model" if fold < 0 else folder / "folds" / str(fold)) if spec.finetune else None
        return signals.open_teacher(name, spec, origin, task, tuned=tuned)

    at = folder / "model" if spec.finetune else models.fetch(spec.model, origin)
    return WhiteBox(open_model, found, models.depth(at), root / ".cache" / "signals")


def taken(rows: pd.DataFrame, phase: params.Phase) -> np.ndarray:
    """Which of `rows` (label, `p_<teacher>`) `phase.take` leaves [n]: all with a gold label, and of the others those
    whose teachers are sure enough of one label, or agree on it."""
    keep = rows["label"].notna().to_numpy(copy=True)
    for i in np.flatnonzero(~keep):
        said = [rows[f"p_{teacher}"][i] for teacher in phase.teachers]
        said = np.stack([p for p in said if p is not None] or [[0.0]])
        mean = said.mean(0)
        agree = (said.argmax(-1) == mean.argmax()).all()
        keep[i] = mean.max() >= phase.take.confidence and (agree or not phase.take.agree)
    return keep


def phase_rows(
    frame: pd.DataFrame, phase: params.Phase, labels: Sequence[str], scores: dict[str, float] | None = None
) -> Rows:
    """The rows of `phase` out of a student's `rows.parquet`, with its teachers' distributions mixed.

    frame: columns where, text, label, `p_<teacher>` (probabilities over `labels`), and where they are wanted
    `fold_<teacher>` and rationale. scores: each teacher's validation accuracy, for `mix: validation`.
    A row that no teacher of the phase has a signal for is left out; of several teachers, those that have one count.
    Raises UserError when a phase finds no row, or no rationale that it should learn from.
    """
    rows = frame[frame["where"].isin(phase.data)].reset_index(drop=True)
    if list(labels) == list(tasks.VERDICTS) and len(rows):
        return question_rows(rows, phase)
    if phase.teachers and phase.take != params.Take():
        rows = rows[taken(rows, phase)].reset_index(drop=True)
    told = np.stack([rows[f"p_{teacher}"].notna() for teacher in phase.teachers]) if phase.teachers else None
    if told is not None and not told.all():
        rows, told = rows[told.any(0)].reset_index(drop=True), told[:, told.any(0)]
    if rows.empty:
        raise UserError(f"phases: no row in {', '.join(phase.data)}")
    index = {label: i for i, label in enumerate(labels)}
    targets = np.array([index.get(label, -1) for label in rows["label"]])
    out = Rows(rows["text"].tolist(), targets)
    if phase.tells_reasons:
        reasons = rows["rationale"].tolist() if "rationale" in rows else []
        out.rationales = [reason if isinstance(reason, str) else None for reason in reasons]  # pandas says nan for none
        if not any(out.rationales):
            raise UserError(
                f"phases: no row in {', '.join(phase.data)} has a rationale; set the teacher's `rationales`"
            )
    if "prior" in phase.loss:
        gold = torch.bincount(
            torch.from_numpy(frame["label"].map(index).dropna().to_numpy(int, copy=True)), minlength=len(labels)
        )
        out.prior = gold.double() if gold.sum() else torch.ones(len(labels))
    if not phase.teachers:
        return out
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
    out.logprobs = losses.mix_teachers(logprobs, weights).float()
    out.targets = np.where(targets < 0, out.logprobs.argmax(-1).numpy(), targets)
    each = weights if weights.dim() == 2 else weights[:, None].expand(-1, len(rows))
    out.weights = dict(zip(phase.teachers, each, strict=True))
    if f"fold_{phase.teachers[0]}" in rows:
        folds = {teacher: rows[f"fold_{teacher}"] for teacher in phase.teachers}
        out.folds = {teacher: found.fillna(-1).astype(int).tolist() for teacher, found in folds.items()}
    return out


def gold_rows(rows: pd.DataFrame, task: tasks.Task) -> Rows:
    """Gold `rows` (text, label; accepted `answers` of a `qa` task) for a teacher to be tuned on."""
    if task.kind != "qa":
        return Rows(rows["text"].tolist(), np.array([task.names.index(label) for label in rows["label"]]))
    told = [tasks.accepted(answers)[0] for answers in rows["answers"]]
    answers = list(dict.fromkeys(told))
    return Rows(rows["text"].tolist(), np.array([answers.index(answer) for answer in told]), answers=answers)


def question_rows(rows: pd.DataFrame, phase: params.Phase) -> Rows:
    """As :func:`phase_rows` for a `qa` task: gold answers, and where there are none the first that a teacher gave.

    Raises UserError for a loss or an order that needs a distribution over labels, and for a row without an answer.
    """
    barred = {"prior", "rationale", *(params.DIVERGENCES if phase.space == "labels" else ())}
    wrong = [f"loss.{term}" for term in phase.loss if term in barred]
    wrong += ["order: confidence"] if phase.order == "confidence" else []
    wrong += ["rationales"] if phase.rationales else []
    wrong += [key for key in ("take", "mix") if getattr(phase, key) != params.Phase.model_fields[key].default]
    if wrong:
        what = wrong[0]
        raise UserError(f"phases: {what}: answers are free text, not labels; use `ce`, or `space: vocabulary`")
    known = rows["answers"] if "answers" in rows else [None] * len(rows)  # a pool's are hidden
    told = [tasks.accepted(gold)[0] if isinstance(gold, str) else None for gold in known]
    for teacher in phase.teachers:
        told = [ours or theirs for ours, theirs in zip(told, rows[f"answer_{teacher}"], strict=True)]
    if not all(told):
        raise UserError(f"phases: {told.count(None) + told.count('')} rows of {', '.join(phase.data)} have no answer")
    answers = list(dict.fromkeys(told))
    index = {answer: i for i, answer in enumerate(answers)}
    out = Rows(rows["text"].tolist(), np.array([index[answer] for answer in told]), answers=answers)
    if phase.teachers:
        out.weights = {teacher: torch.ones(len(rows), dtype=torch.double) for teacher in phase.teachers}
        out.folds = {teacher: rows[f"fold_{teacher}"].astype(int).tolist() for teacher in phase.teachers}
    return out


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


ANSWER, REASON, SAMPLED = range(3)  # what a supervised token belongs to


class _Phase:
    """What this repository changes in a trainer: which rows make a batch, and the loss."""

    # Trainer would divide by the micro-batches once more; our denominators span the whole optimizer step.
    loss_is_scaled_for_ga = True

    def prepare(
        self,
        student: LabelModel,
        rows: Rows,
        spec: params.Training,
        seed: int,
        validation: Rows | None,
        teachers: dict[str, WhiteBox] | None = None,
    ) -> None:
        """Encode the rows and ask the teachers, once, for all that the phase's terms will want of them."""
        self.student, self.rows, self.spec, self.seed, self.validation = student, rows, spec, seed, validation
        self.ids = student.encode(rows.texts)
        self.terms: dict[str, list[float]] = {}
        self.logged: int | None = None
        self.weights = getattr(spec, "loss", {"ce": 1.0})
        self.vocabulary = getattr(spec, "space", "labels") == "vocabulary"
        self.divergences = {term: weight for term, weight in self.weights.items() if term in params.DIVERGENCES}
        self.told: list[list[Completion]] | None = None
        if student.arch != "classifier" and (self.vocabulary or {"ce", "uld", "rationale"} & set(self.weights)):
            self.told = self.completions(student)
        self.layers: list[int] = []
        self.pairs: dict[str, list[tuple[int, int]]] = {}
        self.signals: dict[str, signals.Signals] = {}
        self.teachers = teachers or {}
        if isinstance(spec, params.Phase) and (spec.asks_tokens or spec.asks_states):
            for name in spec.teachers:
                self._ask(name, self.teachers[name])
        models.drop_by_bits(self.model)
        if student.arch == "classifier":  # other models' embeddings are also their output head
            models.train_seen_rows(self.model, {student.tokenizer.pad_token_id, *(t for ids in self.ids for t in ids)})

    def completions(self, model: LabelModel) -> list[list[Completion]]:
        """What every row's answer (and reason) is, in the tokens of `model`."""
        reasons = self.rows.rationales or [None] * len(self.rows)
        if self.rows.answers is not None:
            model.learn(self.rows.answers)
        return [model.completions(int(i), reason) for i, reason in zip(self.rows.targets, reasons, strict=True)]

    def open(self, name: str, fold: int) -> LabelModel:
        """The teacher's model for rows of `fold`. Raises UserError when its tokens are not the student's."""
        model = self.teachers[name].open(fold)
        model.model.eval()
        if self.rows.answers is not None:
            model.learn(self.rows.answers)
        if self.spec.asks_tokens and "uld" not in self.weights:
            ours, theirs = ([one.answer(i) for i in range(len(one.labels))] for one in (self.student, model))
            signals.same_tokens(name, model, ours, theirs)
        return model

    def _ask(self, name: str, teacher: WhiteBox) -> None:
        spec, student = self.spec, self.student
        layers: list[int] = []
        if spec.asks_states:
            config = student.model.config
            depth = getattr(config, "num_decoder_layers", None) or config.num_hidden_layers
            pairs = []
            if set(self.weights) & {"hidden", "pkd", "attention"}:
                rule = (
                    spec.layers
                    if isinstance(spec.layers, str)
                    else [tuple(p) if isinstance(p, list) else p for p in spec.layers]
                )
                try:
                    pairs = losses.layer_map(depth, teacher.depth, rule)
                except ValueError as error:
                    raise UserError(f"phases: layers: {error} (teacher `{name}`)") from None
                if not pairs:
                    raise UserError(
                        f"phases: layers: `{rule}` pairs no layers of {depth} with `{name}`'s {teacher.depth}"
                    )
            self.pairs[name] = [*pairs, (depth, teacher.depth)]  # the last pair is `cosine`'s
            self.layers = [ours for ours, _ in self.pairs[name]]
            layers = [theirs for _, theirs in self.pairs[name]]
        asks = spec.asks_tokens and spec.on_policy < 1
        fold = self.rows.folds[name] if self.rows.folds else [-1] * len(self.rows)
        if not asks and not layers:
            return  # all that it will be asked about has yet to be written
        maps = "attention" in self.weights
        rows = self.rows
        told = [rows.targets.tolist(), rows.rationales, rows.answers, "uld" in self.weights] if asks else None
        what = [rows.texts, told, fold, layers, maps, spec.top_k]
        self.signals[name] = signals.collect(
            teacher.cache / signals.key(teacher.decides, what),
            lambda k: self.open(name, k),
            rows.texts,
            fold=fold,
            completions=self.completions if asks else None,
            top_k=spec.top_k,
            layers=layers,
            maps=maps,
        )
        if "hidden" in self.weights:
            wide, width = self.signals[name].states.shape[-1], student.model.config.hidden_size
            if wide != width:
                torch.manual_seed(self.seed)
                maps_ = [torch.nn.Linear(width, wide, bias=False) for _ in pairs]
                held = getattr(self.model, "projections", None) or torch.nn.ModuleDict()
                held[name] = torch.nn.ModuleList(maps_).to(student.device)
                self.model.projections = held

    def _get_train_sampler(self, train_dataset: Any = None) -> Batches:
        entropy = None
        if self.rows.logprobs is not None:
            entropy = (-(self.rows.logprobs.exp() * self.rows.logprobs.clamp_min(-100)).sum(-1)).tolist()
        order = getattr(self.spec, "order", "random")
        return Batches([len(ids) for ids in self.ids], self.spec.batch_size, self.seed, order, entropy)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """The micro-batches of one optimizer step, and what the whole step will be divided by."""
        if self.logged is None:
            self.logged = self.state.global_step  # not 0 in a run that continues from a checkpoint
        batches, _ = super().get_batch_samples(*args, **kwargs)
        self.supervised = dict.fromkeys(("rows", "compared", ANSWER, REASON, SAMPLED), 0)
        for k, batch in enumerate(batches):
            picked = batch["index"].tolist()
            batch["sampled"] = self.sample(picked, k)
            kinds = self.kinds(picked, batch["sampled"])
            self.supervised["rows"] += len(picked)
            self.supervised["compared"] += kinds.count(SAMPLED) if batch["sampled"] else len(kinds)
            for kind in (ANSWER, REASON, SAMPLED):
                self.supervised[kind] += kinds.count(kind)
        return batches, None

    def sample(self, picked: list[int], micro_batch: int) -> list[Completion] | None:
        """Answers that the student writes itself, for a trainer that learns on-policy."""
        return None

    def asked(self, picked: list[int], sampled: list[Completion] | None) -> list[list[Completion]] | None:
        """The completions asked about: what the rows say, or what the student said."""
        if self.told is None:
            return None
        if sampled is None:
            return [self.told[i] for i in picked]
        own = [self.told[i] if {"ce", "rationale"} & set(self.weights) else [] for i in picked]
        return [[*told, said] for told, said in zip(own, sampled, strict=True)]

    def kinds(self, picked: list[int], sampled: list[Completion] | None) -> list[int]:
        """What each supervised token of :meth:`asked` belongs to, in order."""
        out = []
        for row in self.asked(picked, sampled) or []:
            for j, (tokens, skip) in enumerate(row):
                kind = SAMPLED if sampled is not None and j == len(row) - 1 else ANSWER if j == 0 else REASON
                out += [kind] * (len(tokens) - skip)
        return out

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The phase's weighted terms, each divided by what the whole optimizer step has of its kind: label-space terms
        and those of hidden states by rows, the others by the tokens they supervise. No term sees a prompt's logits."""
        picked, sampled = inputs["index"].tolist(), inputs["sampled"]
        student, weights = self.student, self.weights
        labels = student.arch == "classifier" or bool(self.divergences and not self.vocabulary) or "prior" in weights
        asked = self.asked(picked, sampled)
        out = student.forward(
            [self.ids[i] for i in picked], asked, labels=labels, layers=self.layers, maps="attention" in weights
        )
        rows = self.supervised["rows"]
        values: dict[str, torch.Tensor] = {}
        kinds = torch.tensor(self.kinds(picked, sampled), device=student.device)
        if "ce" in weights:
            if student.arch == "classifier":
                target = torch.as_tensor(self.rows.targets[picked], device=student.device)
                values["ce"] = losses.reduce(losses.cross_entropy(out.logits, target), None, rows)
            else:
                values["ce"] = losses.reduce(out.nll, kinds == ANSWER, self.supervised[ANSWER])
        if "rationale" in weights:
            values["rationale"] = losses.reduce(out.nll, kinds == REASON, max(1, self.supervised[REASON]))
        total = sum((weights[term] * value for term, value in values.items()), torch.zeros((), device=student.device))
        if self.divergences:
            if self.vocabulary:
                loss, more = self.compare_tokens(out.told, kinds, picked, sampled, asked)
            else:
                teacher = self.rows.logprobs[picked].to(student.device)
                loss, more = self.compare(out.logits, teacher, rows)
            total, values = total + loss, values | more
        if "uld" in weights:
            values["uld"] = self.compare_sorted(out.told, picked)
            total = total + weights["uld"] * values["uld"]
        if self.pairs:
            for term, value in self.compare_states(out, picked).items():
                values[term] = value / rows
                total = total + weights[term] * values[term]
        if "prior" in weights:
            penalty = losses.shortcut_penalty(out.logits, self.rows.prior.to(student.device))
            values["prior"] = penalty * len(picked) / rows
            total = total + weights["prior"] * values["prior"]
        for term, value in values.items():
            self.terms.setdefault(term, []).append(value.item())
        return (total, out) if return_outputs else total

    def compare(
        self, logits: torch.Tensor, teacher: torch.Tensor, denominator: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        spec = self.spec
        return losses.mixed(
            self.divergences,
            logits,
            teacher_logprobs=teacher,
            temperature=spec.temperature,
            scale_by_t2=spec.scale_by_t2,
            beta=spec.beta,
            alpha=spec.alpha,
            denominator=denominator,
        )

    def compare_tokens(
        self,
        told: torch.Tensor,
        kinds: torch.Tensor,
        picked: list[int],
        sampled: list[Completion] | None,
        asked: list[list[Completion]],
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The divergences at every supervised token, or on-policy at every token that the student wrote."""
        spec, device, tokens = self.spec, told.device, self.supervised["compared"]
        if spec.top_k:
            top = (part.to(device) for part in self.signals[spec.teachers[0]].top(picked))
            value = losses.reduce(losses.kl_top_k(told, *top), None, tokens)
            return self.weights["kl"] * value, {"kl": value.detach()}
        if sampled is not None:
            told = told[kinds == SAMPLED]
        teacher = [logprobs.to(device) for logprobs in self.said_of(picked, sampled)]
        try:
            cut = [losses.shared_vocabulary(told, one) for one in teacher]
        except ValueError as error:
            raise UserError(f"phases: teachers: {error}") from None
        width = min(logits.shape[1] for logits, _ in cut)
        teacher = [one[:, :width] for _, one in cut]
        if len(teacher) == 1:
            return self.compare(told[:, :width], teacher[0], tokens)
        lengths = (
            [sum(len(t) - skip for t, skip in row) for row in asked]
            if sampled is None
            else [len(t) for t, _ in sampled]
        )
        repeats = torch.tensor(lengths)
        each = torch.stack([self.rows.weights[name][picked].repeat_interleave(repeats) for name in spec.teachers])
        return self.compare(told[:, :width], losses.mix_teachers(torch.stack(teacher), each.to(device)), tokens)

    def said_of(self, picked: list[int], sampled: list[Completion] | None) -> list[torch.Tensor]:
        """Each teacher's log-probabilities at the tokens that are compared."""
        return [self.signals[name].logprobs(picked) for name in self.spec.teachers]

    def compare_sorted(self, told: torch.Tensor, picked: list[int]) -> torch.Tensor:
        """Universal logit distance at the tokens that both tokenizations have; over teachers as `mix` says."""
        counts = np.cumsum([0, *(len(row) for row in self.told)])
        total = torch.zeros((), device=told.device)
        for name in self.spec.teachers:
            lengths, mine, theirs, at, begin = self.signals[name].lengths, [], [], 0, 0
            shares, each = self.share(name, picked).tolist(), []
            for i, share in zip(picked, shares, strict=True):
                for j, (tokens, skip) in enumerate(self.told[i]):
                    own, other = len(tokens) - skip, int(lengths[counts[i] + j])
                    mine += range(at, at + min(own, other))
                    theirs += range(begin, begin + min(own, other))
                    each += [share] * min(own, other)
                    at, begin = at + own, begin + other
            teacher = self.signals[name].logprobs(picked)[theirs].to(told.device)
            far = losses.universal_logit_distance(told[mine], teacher)
            total = total + (far * torch.tensor(each, dtype=far.dtype, device=far.device)).sum()
        return total / self.supervised["compared"]

    def share(self, name: str, picked: list[int]) -> torch.Tensor:
        """What teacher `name` counts for each row in `picked` [rows], of 1 for all teachers together."""
        weights = self.rows.weights
        return weights[name][picked] / sum(weights[who][picked] for who in self.spec.teachers)

    def compare_states(self, out: models.Forward, picked: list[int]) -> dict[str, torch.Tensor]:
        """The sums over rows of the terms that compare hidden states, over teachers as `mix` says."""
        values: dict[str, torch.Tensor] = {}
        for name, found in self.signals.items():
            ours, theirs = out.states, found.hidden(picked).to(out.states.device)
            held = getattr(self.model, "projections", None)
            projections = held[name] if held is not None and name in held else None
            n = len(self.pairs[name]) - 1
            for term in set(self.weights) & set(params.STATE_TERMS):
                try:
                    if term == "hidden":
                        maps = [projections[j] if projections is not None else None for j in range(n)]
                        row = sum(losses.hidden_mse(ours[:, j], theirs[:, j], maps[j]) for j in range(n)) / n
                    elif term == "pkd":
                        row = losses.pkd(ours[:, :n], theirs[:, :n])
                    elif term == "cosine":
                        row = losses.cosine_embedding(ours[:, n], theirs[:, n])
                    else:
                        width = out.maps.shape[-1]
                        lengths = [int(found.at[i + 1] - found.at[i]) for i in picked]
                        if lengths != [len(self.ids[i]) for i in picked]:
                            raise ValueError("attention maps compare token by token: the two tokenizers differ")
                        maps = found.activity(picked, width).to(out.maps.device)
                        row = losses.attention_transfer_maps(out.maps[:, :n], maps[:, :n])
                except ValueError as error:
                    raise UserError(f"phases: loss.{term}: teacher `{name}`: {error}") from None
                values[term] = values.get(term, 0) + (row * self.share(name, picked).to(row)).sum()
        return values

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        held = getattr(self.model, "projections", None)
        if held is not None:  # adapters alone are saved of a model that has some
            save_file(held.state_dict(), Path(output_dir) / "projections.safetensors")

    def _load_from_checkpoint(self, checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(checkpoint, model)
        held = getattr(self.model, "projections", None)
        if held is not None:
            held.load_state_dict(load_file(Path(checkpoint) / "projections.safetensors"))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            steps = max(1, self.state.global_step - (self.logged or 0))
            logs |= {f"term_{term}": sum(values) / steps for term, values in self.terms.items()}
            self.logged, self.terms = self.state.global_step, {}
        super().log(logs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Scores on the validation split, for early stopping."""
        rows, names = self.validation, self.student.task.names
        asked = pd.DataFrame({"id": "", "text": rows.texts, "label": [names[i] for i in rows.targets]})
        if rows.accepted is not None:
            asked["answers"] = rows.accepted
        report = scores(predicted(self.student, asked), names)
        f1 = report.get("token_f1", report["macro_f1"])  # of free answers
        told = {"eval_accuracy": report["accuracy"], "eval_macro_f1": f1, "eval_loss": report["log_loss"]}
        self.log(told)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, told)
        return told


class PlainTrainer(_Phase, Trainer):
    """Distillation of an encoder, or of an encoder and decoder (TRL has no trainer for those)."""


class CausalTrainer(_Phase, SFTTrainer):
    """Supervised and distilled fine-tuning of a causal model on kept signals.

    `compute_loss` replaces TRL's, which knows no teacher and runs the output head over every position.
    """


class OnPolicyTrainer(_Phase, GKDTrainer):
    """Distillation on answers that the student writes itself (Agarwal et al. 2024, GKD), the teacher asked about each.

    What is overridden, and the fault of TRL 1.16.0 that it mends:
    `__init__`: knows one teacher and refuses vocabularies that are padded differently; here teachers are opened when
    they are asked, each fold's its own, and the ids that both know are compared.
    `get_batch_samples` (in `_Phase`): divides by the data set's labels, not by the tokens that were written; here all
    answers of an optimizer step are written before its first backward pass, and counted.
    `training_step`: draws from Python's global random state and writes one micro-batch at a time.
    `compute_loss` (in `_Phase`): drops the temperature, has no cross-entropy, jumps at the ends of beta, and runs both
    models over every position with full-vocabulary logits for the prompt.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        # the student stands in for the teacher, which is opened when it is asked: for each fold its own
        super().__init__(*args, teacher_model=kwargs["model"], **kwargs)
        self.live: dict[str, LabelModel] = {}

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return Trainer.training_step(self, *args, **kwargs)

    def sample(self, picked: list[int], micro_batch: int) -> list[Completion] | None:
        # a function of the step alone, so that a resumed run writes what it would have written
        draw = np.random.default_rng([self.seed, self.state.global_step, micro_batch])
        if draw.random() >= self.spec.on_policy:
            return None
        written = self.student.continue_(
            [self.ids[i] for i in picked],
            max_new_tokens=self.spec.max_new_tokens,
            temperature=1.0,
            seed=int(draw.integers(2**31)),
            batch_size=len(picked),
        )
        return [(tokens, 0) for tokens in written]

    @torch.no_grad()
    def said_of(self, picked: list[int], sampled: list[Completion] | None) -> list[torch.Tensor]:
        """As above, for tokens that the student wrote; gold rows go to the model that did not learn from them."""
        if sampled is None:
            return super().said_of(picked, sampled)
        out = []
        for name in self.spec.teachers:
            parts: list[torch.Tensor] = [torch.empty(0)] * len(picked)
            folds = [self.rows.folds[name][i] if self.rows.folds else -1 for i in picked]
            for k in sorted(set(folds)):
                key = f"{name}/{k}"
                if key not in self.live:
                    self.live[key] = self.open(name, k)
                mine = [j for j, fold in enumerate(folds) if fold == k]
                ids = self.live[key].encode([self.rows.texts[picked[j]] for j in mine])
                told = self.live[key].forward(ids, [[sampled[j]] for j in mine], labels=False).told
                lengths = [len(sampled[j][0]) for j in mine]
                for j, part in zip(mine, told.log_softmax(-1).split(lengths), strict=True):
                    parts[j] = part
            out.append(torch.cat(parts))
        return out


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
    teachers: dict[str, WhiteBox] | None = None,
) -> pd.DataFrame:
    """Train `student` in place on `rows` as `spec` says; continue from the last checkpoint in `folder`, if any.

    Returns the history, a row a logged step: step, epoch, loss, learning_rate and the terms' values.
    Raises UserError when the disk is full.
    """
    try:
        trainer = make_trainer(
            student,
            rows,
            spec,
            folder=folder,
            seed=seed,
            title=title,
            checkpoint_every=checkpoint_every,
            validation=validation,
            teachers=teachers,
        )
        trainer.train(resume_from_checkpoint=_last_checkpoint(folder))
    except Exception as error:  # torch and safetensors have error classes of their own
        params.raise_if_disk_full(error, folder)
        raise
    finally:
        if hasattr(student.model, "projections"):  # they have served; the student goes without them
            del student.model.projections
        models.train_all_rows(student.model)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    history = pd.DataFrame(logged, columns=list(dict.fromkeys([*HISTORY, *(k for entry in logged for k in entry)])))
    terms = [k for k in history if k.startswith("term_")]
    return history[[*HISTORY, *terms]].rename(columns=lambda k: k.removeprefix("term_"))


def make_trainer(
    student: LabelModel,
    rows: Rows,
    spec: params.Training,
    *,
    folder: Path,
    seed: int,
    title: str,
    checkpoint_every: int,
    validation: Rows | None = None,
    teachers: dict[str, WhiteBox] | None = None,
) -> _Phase:
    """The trainer of a phase, its teachers already asked; see :func:`run_phase`."""
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
        # LabelModel.autocast decides; float16's small gradients also need to be scaled up, which CPUs cannot do
        "bf16": False,
        "fp16": student.dtype == torch.float16 and student.device.type == "cuda",
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
        wiring["processing_class"] = student.tokenizer
        common |= {"max_length": None, "packing": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
        if getattr(spec, "on_policy", 0):
            trainer = OnPolicyTrainer(args=GKDConfig(**common, disable_dropout=False), **wiring)
        else:
            trainer = CausalTrainer(args=SFTConfig(**common), **wiring)
        for weight in trainer.model.parameters():
            if weight.requires_grad:
                # TRL narrows the adapters of a 4-bit model to bfloat16, where a small update rounds to none
                weight.data = weight.data.float()
    else:
        trainer = PlainTrainer(args=TrainingArguments(**common), **wiring)
    trainer.remove_callback(PrinterCallback)
    trainer.prepare(student, rows, spec, seed, validation, teachers)
    return trainer


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
        task_type={"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}.get(arch, "SEQ_CLS"),
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
        dtype=spec.dtype if adapted and spec.arch != "classifier" else "float32",
        seed=seed,
        quantize=spec.adapter.kind == "qlora",
        trust_remote_code=remote_code,
    )
    model = attach(model, spec.adapter if adapted else None, spec.arch, seed)
    if spec.init.freeze == "embeddings":
        model.get_input_embeddings().requires_grad_(False)
    if spec.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
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
    code = code_digest("losses", "metrics", "models", "params", "signals", "tasks", "training")
    digest = hashlib.sha256(code.encode())
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
    teachers: dict[str, WhiteBox] | None = None,
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
    if student.task.kind == "qa":
        held_out.accepted = validation["answers"].tolist()
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
                    teachers=teachers,
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
    """`rows` (id, text, label) with what `student` says of them: id, label, prediction, probabilities.

    Of a `qa` task (rows with accepted `answers`) the prediction is `right` or `wrong`, with more columns: answer
    (what was written), token_f1, token_precision, token_recall.
    """
    names, told = student.task.names, rows["text"].tolist()
    if student.task.kind == "qa":
        return judged(rows, student.respond(told))
    probabilities = student.predict(told)
    return pd.DataFrame(
        {
            "id": rows["id"].tolist(),
            "label": rows["label"].tolist(),
            "prediction": [names[i] for i in probabilities.argmax(-1)],
            "probabilities": list(probabilities),
        }
    )


def alerts(said: pd.DataFrame, task: tasks.Task) -> pd.DataFrame:
    """Which of the predictions `said` call for an alert, the gravest first: id, alert (the label), confidence (its
    probability) and severity, the task's severities weighted by the probabilities, both in [0, 1]."""
    p = np.stack(said["probabilities"].to_list()) if len(said) else np.zeros((0, len(task.names)))
    grave = np.array([task.severity.get(name, 0.0) for name in task.names])
    out = pd.DataFrame({"id": said["id"], "alert": said["prediction"], "confidence": p.max(-1), "severity": p @ grave})
    out = out[np.array([task.severity.get(label, 0) > 0 for label in out["alert"]], dtype=bool)]
    return out.sort_values(["severity", "id"], ascending=[False, True], ignore_index=True)


def judged(rows: pd.DataFrame, said: Sequence[str]) -> pd.DataFrame:
    """The answers `said` to the questions `rows` (id, label, accepted `answers`), as :func:`predicted` tells them."""
    # a question whose answer nobody knows has none that is right
    pairs = [
        (text, tasks.accepted(known)) if isinstance(known, str) else (None, [""])
        for text, known in zip(said, rows["answers"], strict=True)
    ]
    right = np.array([metrics.exact_match(*pair) for pair in pairs])
    shared = [metrics.token_overlap(*pair) for pair in pairs]
    out = pd.DataFrame(shared, columns=["token_f1", "token_precision", "token_recall"]).astype(float)
    out.insert(0, "answer", list(said))
    out.insert(0, "probabilities", list(np.stack([right, 1 - right], 1).astype(np.float32)))
    out.insert(0, "prediction", np.where(right == 1, *tasks.VERDICTS))
    out.insert(0, "label", rows["label"].tolist())
    out.insert(0, "id", rows["id"].tolist())
    return out


def answers(student: LabelModel, asked: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """What `student` says of the rows of every split in `asked`: split, and the columns of :func:`predicted`."""
    columns = ["split", "id", "label", "prediction", "probabilities"]
    parts = [predicted(student, rows) for rows in asked.values()]
    parts = [part.assign(split=split)[["split", *part]] for split, part in zip(asked, parts, strict=True)]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)


def scores(rows: pd.DataFrame, names: Sequence[str]) -> dict[str, Any]:
    """Every score of the predictions in `rows` (label, prediction, probabilities); of free answers also exact_match
    and the mean token scores."""
    report = metrics.classification_report(
        rows["label"].tolist(), rows["prediction"].tolist(), np.stack(rows["probabilities"].to_list()), names
    )
    if "token_f1" in rows:
        report["exact_match"] = report["accuracy"]
        report |= {key: float(rows[key].mean()) for key in ("token_f1", "token_precision", "token_recall")}
    return report
