"""The loss of a phase: its weighted terms, divided by the counts of the whole optimizer step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from distillery import losses
from distillery.config.schema import DIVERGENCES, HIDDEN_STATE_TERMS, PhaseConfig, TrainingConfig
from distillery.errors import UserError
from distillery.models.fast_cpu import train_used_embeddings, use_bit_dropout
from distillery.models.label_model import Completion, LabelModel, ModelOutput
from distillery.models.predictions import predict_rows, score_predictions
from distillery.training.rows import TrainingRows
from distillery.training.sampler import LengthGroupedSampler
from distillery.training.teacher_models import OpenableTeacher, check_same_tokens
from distillery.training.teacher_outputs import TeacherOutputs, collect_teacher_outputs, teacher_outputs_key

ANSWER, REASON, SAMPLED = range(3)  # what a supervised token belongs to


class PhaseTrainerMixin:
    """What this repository changes in a trainer: which rows make a batch, and the loss."""

    # Trainer would divide by the micro-batches once more; our denominators span the whole optimizer step.
    loss_is_scaled_for_ga = True

    def prepare(
        self,
        student: LabelModel,
        rows: TrainingRows,
        spec: TrainingConfig,
        seed: int,
        validation: TrainingRows | None,
        teachers: dict[str, OpenableTeacher] | None = None,
    ) -> None:
        """Encode the rows and ask the teachers, once, for all that the phase's terms will want of them."""
        self.student, self.rows, self.spec, self.seed, self.validation = student, rows, spec, seed, validation
        self.ids = student.encode(rows.texts)
        self.terms: dict[str, list[float]] = {}
        self.logged: int | None = None
        self.weights = getattr(spec, "loss", {"ce": 1.0})
        self.vocabulary = getattr(spec, "space", "labels") == "vocabulary"
        self.divergences = {term: weight for term, weight in self.weights.items() if term in DIVERGENCES}
        self.told: list[list[Completion]] | None = None
        if student.arch != "classifier" and (self.vocabulary or {"ce", "uld", "rationale"} & set(self.weights)):
            self.told = self.completions(student)
        self.layers: list[int] = []
        self.pairs: dict[str, list[tuple[int, int]]] = {}
        self.signals: dict[str, TeacherOutputs] = {}
        self.teachers = teachers or {}
        if isinstance(spec, PhaseConfig) and (spec.needs_token_logprobs or spec.needs_hidden_states):
            for name in spec.teachers:
                self._ask(name, self.teachers[name])
        use_bit_dropout(self.model)
        if student.arch == "classifier":  # other models' embeddings are also their output head
            train_used_embeddings(self.model, {student.tokenizer.pad_token_id, *(t for ids in self.ids for t in ids)})

    def completions(self, model: LabelModel) -> list[list[Completion]]:
        """What every row's answer (and reason) is, in the tokens of `model`."""
        reasons = self.rows.rationales or [None] * len(self.rows)
        if self.rows.answers is not None:
            model.set_answers(self.rows.answers)
        return [model.row_completions(int(i), reason) for i, reason in zip(self.rows.targets, reasons, strict=True)]

    def open(self, name: str, fold: int) -> LabelModel:
        """The teacher's model for rows of `fold`. Raises UserError when its tokens are not the student's."""
        model = self.teachers[name].open_fold(fold)
        model.model.eval()
        if self.rows.answers is not None:
            model.set_answers(self.rows.answers)
        if self.spec.needs_token_logprobs and "uld" not in self.weights:
            ours, theirs = (
                [one.label_completion(i) for i in range(len(one.label_token_ids))] for one in (self.student, model)
            )
            check_same_tokens(name, model, ours, theirs)
        return model

    def _ask(self, name: str, teacher: OpenableTeacher) -> None:
        spec, student = self.spec, self.student
        layers: list[int] = []
        if spec.needs_hidden_states:
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
                    pairs = losses.pair_layers(depth, teacher.num_layers, rule)
                except ValueError as error:
                    raise UserError(f"phases: layers: {error} (teacher `{name}`)") from None
                if not pairs:
                    raise UserError(
                        f"phases: layers: `{rule}` pairs no layers of {depth} with `{name}`'s {teacher.num_layers}"
                    )
            self.pairs[name] = [*pairs, (depth, teacher.num_layers)]  # the last pair is `cosine`'s
            self.layers = [ours for ours, _ in self.pairs[name]]
            layers = [theirs for _, theirs in self.pairs[name]]
        asks = spec.needs_token_logprobs and spec.on_policy < 1
        fold = self.rows.teacher_folds[name] if self.rows.teacher_folds else [-1] * len(self.rows)
        if not asks and not layers:
            return  # all that it will be asked about has yet to be written
        maps = "attention" in self.weights
        rows = self.rows
        told = [rows.targets.tolist(), rows.rationales, rows.answers, "uld" in self.weights] if asks else None
        what = [rows.texts, told, fold, layers, maps, spec.top_k]
        self.signals[name] = collect_teacher_outputs(
            teacher.cache_dir / teacher_outputs_key(teacher.identity, what),
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

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler:
        entropy = None
        if self.rows.logprobs is not None:
            entropy = (-(self.rows.logprobs.exp() * self.rows.logprobs.clamp_min(-100)).sum(-1)).tolist()
        order = getattr(self.spec, "order", "random")
        return LengthGroupedSampler([len(ids) for ids in self.ids], self.spec.batch_size, self.seed, order, entropy)

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
        labels = student.arch == "classifier" or bool(self.divergences and not self.vocabulary)
        labels = labels or "label_prior" in weights
        asked = self.asked(picked, sampled)
        out = student.forward(
            [self.ids[i] for i in picked],
            asked,
            label_space=labels,
            layers=self.layers,
            activation_maps="attention" in weights,
        )
        rows = self.supervised["rows"]
        values: dict[str, torch.Tensor] = {}
        kinds = torch.tensor(self.kinds(picked, sampled), device=student.device)
        if "ce" in weights:
            if student.arch == "classifier":
                target = torch.as_tensor(self.rows.targets[picked], device=student.device)
                values["ce"] = losses.reduce(losses.cross_entropy(out.label_logits, target), None, rows)
            else:
                values["ce"] = losses.reduce(out.completion_nll, kinds == ANSWER, self.supervised[ANSWER])
        if "rationale" in weights:
            values["rationale"] = losses.reduce(out.completion_nll, kinds == REASON, max(1, self.supervised[REASON]))
        total = sum((weights[term] * value for term, value in values.items()), torch.zeros((), device=student.device))
        if self.divergences:
            if self.vocabulary:
                loss, more = self.compare_tokens(out.completion_logits, kinds, picked, sampled, asked)
            else:
                teacher = self.rows.logprobs[picked].to(student.device)
                loss, more = self.compare(out.label_logits, teacher, rows)
            total, values = total + loss, values | more
        if "uld" in weights:
            values["uld"] = self.compare_sorted(out.completion_logits, picked)
            total = total + weights["uld"] * values["uld"]
        if self.pairs:
            for term, value in self.compare_states(out, picked).items():
                values[term] = value / rows
                total = total + weights[term] * values[term]
        if "label_prior" in weights:
            penalty = losses.shortcut_penalty(out.label_logits, self.rows.label_prior.to(student.device))
            values["label_prior"] = penalty * len(picked) / rows
            total = total + weights["label_prior"] * values["label_prior"]
        for term, value in values.items():
            self.terms.setdefault(term, []).append(value.item())
        return (total, out) if return_outputs else total

    def compare(
        self, logits: torch.Tensor, teacher: torch.Tensor, denominator: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        spec = self.spec
        return losses.combine_terms(
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
        teacher = [logprobs.to(device) for logprobs in self.teacher_logprobs(picked, sampled)]
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
        each = torch.stack(
            [self.rows.teacher_weights[name][picked].repeat_interleave(repeats) for name in spec.teachers]
        )
        return self.compare(told[:, :width], losses.mix_teachers(torch.stack(teacher), each.to(device)), tokens)

    def teacher_logprobs(self, picked: list[int], sampled: list[Completion] | None) -> list[torch.Tensor]:
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
        weights = self.rows.teacher_weights
        return weights[name][picked] / sum(weights[who][picked] for who in self.spec.teachers)

    def compare_states(self, out: ModelOutput, picked: list[int]) -> dict[str, torch.Tensor]:
        """The sums over rows of the terms that compare hidden states, over teachers as `mix` says."""
        values: dict[str, torch.Tensor] = {}
        for name, found in self.signals.items():
            ours, theirs = out.hidden_states, found.hidden(picked).to(out.hidden_states.device)
            held = getattr(self.model, "projections", None)
            projections = held[name] if held is not None and name in held else None
            n = len(self.pairs[name]) - 1
            for term in set(self.weights) & set(HIDDEN_STATE_TERMS):
                try:
                    if term == "hidden":
                        maps = [projections[j] if projections is not None else None for j in range(n)]
                        row = sum(losses.hidden_mse(ours[:, j], theirs[:, j], maps[j]) for j in range(n)) / n
                    elif term == "pkd":
                        row = losses.pkd(ours[:, :n], theirs[:, :n])
                    elif term == "cosine":
                        row = losses.cosine_embedding(ours[:, n], theirs[:, n])
                    else:
                        width = out.activation_maps.shape[-1]
                        lengths = [int(found.at[i + 1] - found.at[i]) for i in picked]
                        if lengths != [len(self.ids[i]) for i in picked]:
                            raise ValueError("attention maps compare token by token: the two tokenizers differ")
                        maps = found.activity(picked, width).to(out.activation_maps.device)
                        row = losses.attention_transfer_maps(out.activation_maps[:, :n], maps[:, :n])
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
        if rows.accepted_answers is not None:
            asked["answers"] = rows.accepted_answers
        report = score_predictions(predict_rows(self.student, asked), names)
        f1 = report.get("token_f1", report["macro_f1"])  # of free answers
        told = {"eval_accuracy": report["accuracy"], "eval_macro_f1": f1, "eval_loss": report["log_loss"]}
        self.log(told)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, told)
        return told
