"""What a phase's loss needs of its teachers: token log-probabilities, hidden states, layer pairs, projections."""

from __future__ import annotations

import torch
from torch import Tensor

from distillery import losses
from distillery.config.schema import PhaseConfig
from distillery.errors import UserError
from distillery.models.label_model import Completion, LabelModel
from distillery.models.layers import configured_layers
from distillery.training.completions import MicroBatch, row_completions
from distillery.training.openable_teachers import OpenableTeacher
from distillery.training.processes import process_rank
from distillery.training.rows import TrainingRows
from distillery.training.served_teacher import ServedTeacher, served_outputs
from distillery.training.teacher_models import check_same_tokens
from distillery.training.teacher_outputs import TeacherOutputs, collect_teacher_outputs, teacher_outputs_key


def pair_with_teacher(phase: PhaseConfig, name: str, student_depth: int, teacher_depth: int) -> list[tuple[int, int]]:
    """Pairs (student layer, teacher layer) for the teacher `name`; the last pair, both last layers, is `cosine`'s.

    Raises UserError when `phase.layers` names layers that do not exist, or no layers at all.
    """
    pairs = []
    if set(phase.loss) & {"hidden", "pkd", "attention"}:
        rule = phase.layers
        if not isinstance(rule, str):
            rule = [tuple(entry) if isinstance(entry, list) else entry for entry in rule]
        try:
            pairs = losses.pair_layers(student_depth, teacher_depth, rule)
        except ValueError as error:
            raise UserError(f"phases: layers: {error} (teacher `{name}`)") from None
        if not pairs:
            raise UserError(
                f"phases: layers: `{rule}` pairs no layers of {student_depth} with `{name}`'s {teacher_depth}"
            )
    return [*pairs, (student_depth, teacher_depth)]


class TeacherSignals:
    """Token log-probabilities and hidden states of a phase's teachers for its rows.

    outputs {teacher}: computed once for all rows, empty where nothing is known before the student has sampled.
    layer_pairs {teacher}: see :func:`pair_with_teacher`; empty when the loss has no term over hidden states.
    student_layers: the student's side of these pairs, the same for all teachers.
    generated [n]: the own answers of a teacher behind an endpoint, at whose tokens it is compared; None without one.
    projections {teacher}: for each pair but the last a linear map from the student's width to the teacher's, where
    `hidden` compares two widths. Whoever trains the student has to train them, too.

    Raises UserError when a teacher does not fit: its layers, its tokens, or the lengths of its texts.
    """

    def __init__(
        self,
        phase: PhaseConfig,
        rows: TrainingRows,
        teachers: dict[str, OpenableTeacher | ServedTeacher],
        student: LabelModel,
        seed: int,
    ):
        self.phase, self.rows, self.teachers, self.student, self.seed = phase, rows, teachers, student, seed
        self.outputs: dict[str, TeacherOutputs] = {}
        self.generated: list[Completion] | None = None
        self.layer_pairs: dict[str, list[tuple[int, int]]] = {}
        self.student_layers: list[int] = []
        self.projections: dict[str, torch.nn.ModuleList] = {}
        self.opened: dict[tuple[str, int], LabelModel] = {}  # models that score sampled answers
        self.folds = {name: (rows.teacher_folds or {}).get(name, [-1] * len(rows)) for name in phase.teachers}
        if phase.needs_token_logprobs or phase.needs_hidden_states:
            for name in phase.teachers:
                self._collect(name)

    def _collect(self, name: str) -> None:
        """Compute the outputs of teacher `name` for all rows, or read them from the cache."""
        phase, rows, teacher = self.phase, self.rows, self.teachers[name]
        if isinstance(teacher, ServedTeacher):
            self.outputs[name], self.generated = served_outputs(teacher, rows, self.student, phase.top_k)
            self._print_top_k(name)
            return
        layers: list[int] = []
        if phase.needs_hidden_states:
            depth = configured_layers(self.student.model.config)
            self.layer_pairs[name] = pair_with_teacher(phase, name, depth, teacher.num_layers)
            self.student_layers, layers = (list(side) for side in zip(*self.layer_pairs[name], strict=True))
        from_data = phase.compares_given_answers
        if not from_data and not layers:
            return  # all that it will score has yet to be sampled
        maps = "attention" in phase.loss
        supervised = [rows.targets.tolist(), rows.rationales, rows.answers, "uld" in phase.loss] if from_data else None
        identity = [rows.texts, supervised, self.folds[name], layers, maps, phase.top_k, phase.tail_samples]
        self.outputs[name] = collect_teacher_outputs(
            teacher.cache_dir / teacher_outputs_key(teacher.identity, identity),
            lambda fold: self._open(name, fold),
            rows.texts,
            fold=self.folds[name],
            completions=(lambda model: row_completions(model, rows)) if from_data else None,
            top_k=phase.top_k,
            tail_samples=phase.tail_samples,
            has_labels=rows.answers is None,
            layers=layers,
            maps=maps,
        )
        self._print_top_k(name)
        if maps:
            self._check_text_lengths(name)
        if "hidden" in phase.loss:
            self._add_projections(name)

    def _print_top_k(self, name: str) -> None:
        """Print what `top_k` keeps of teacher `name` and what it leaves out; nothing where everything is kept."""
        phase, outputs = self.phase, self.outputs[name]
        if not phase.top_k or outputs.tail_logprobs is None or not len(outputs.tail_logprobs) or process_rank():
            return
        size = f"{8 * outputs.bytes_a_token:,.0f} bits a token for its {phase.top_k} likeliest ones"
        drawn = f" and {phase.tail_samples} drawn from the rest" if phase.tail_samples else ""
        print(f"teacher {name}: {size}{drawn}; outside of these {100 * outputs.mean_tail:.2f} % of the probability")

    def _open(self, name: str, fold: int) -> LabelModel:
        """The model of teacher `name` for rows of `fold`. Raises UserError when its tokens are not the student's."""
        with torch.random.fork_rng():  # loading seeds it, and dropout shall not depend on what the cache holds
            model = self.teachers[name].open_fold(fold)
        model.model.eval()
        if self.rows.answers is not None:
            model.set_answers(self.rows.answers)
        if self.phase.needs_token_logprobs and "uld" not in self.phase.loss:
            student, teacher = (
                [one.label_completion(i) for i in range(len(one.label_token_ids))] for one in (self.student, model)
            )
            check_same_tokens(name, model, student, teacher)
        return model

    def _check_text_lengths(self, name: str) -> None:
        if self.outputs[name].text_lengths != [len(ids) for ids in self.student.encode(self.rows.texts)]:
            raise UserError(
                f"phases: loss.attention: teacher `{name}`: attention maps compare token by token: the two tokenizers "
                "differ"
            )

    def _add_projections(self, name: str) -> None:
        width, teacher_width = self.student.model.config.hidden_size, self.outputs[name].states.shape[-1]
        if width != teacher_width:
            torch.manual_seed(self.seed)
            maps = [torch.nn.Linear(width, teacher_width, bias=False) for _ in self.layer_pairs[name][:-1]]
            self.projections[name] = torch.nn.ModuleList(maps).to(self.student.device)

    def token_logprobs(self, batch: MicroBatch) -> list[Tensor]:
        """Log-probabilities at T = 1 [m, vocabulary] of each teacher at the m tokens of `batch` that are compared."""
        if batch.sampled is None:
            return [self.outputs[name].logprobs(batch.rows) for name in self.phase.teachers]
        return [self._score_sampled(name, batch) for name in self.phase.teachers]

    @torch.no_grad()
    def _score_sampled(self, name: str, batch: MicroBatch) -> Tensor:
        """[m, vocabulary] of teacher `name` at the sampled tokens; each row by the model of its fold."""
        folds, tokens = [self.folds[name][i] for i in batch.rows], batch.compared_tokens
        parts: list[Tensor] = [torch.empty(0)] * len(batch.rows)
        for fold in sorted(set(folds)):
            if (name, fold) not in self.opened:
                self.opened[name, fold] = self._open(name, fold)
            model, members = self.opened[name, fold], [j for j, other in enumerate(folds) if other == fold]
            ids = model.encode([self.rows.texts[batch.rows[j]] for j in members])
            output = model.forward(ids, [[batch.sampled[j]] for j in members], label_space=False)
            lengths = [tokens[j] for j in members]
            logprobs = output.completion_logits.log_softmax(-1).split(lengths)
            for j, part in zip(members, logprobs, strict=True):
                parts[j] = part
        return torch.cat(parts)

    def teacher_shares(self, name: str, rows: list[int]) -> Tensor:
        """[rows]: the weight of teacher `name` in each row's mix; the weights of all teachers sum to 1."""
        weights = self.rows.teacher_weights
        return weights[name][rows] / sum(weights[teacher][rows] for teacher in self.phase.teachers)
