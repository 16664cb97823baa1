"""On-policy batches that follow the validation loss: their share, and answers that are used again.

`on_policy: adaptive` is the adaptive off-policy approach of Ko et al. 2024, DistiLLM, section 3.2, with the constants
of the authors' scripts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distillery.config.schema import PhaseConfig
from distillery.files import write_json
from distillery.models.label_model import Completion, LabelModel
from distillery.training.processes import gather, process_count
from distillery.training.rows import TrainingRows

SHARE_STEP = 0.1  # what a rise of the validation loss adds to the share
LOSS_RISE = 0.1  # nats that count as a rise
FILE = "own_answers.json"  # in a checkpoint


def on_policy_share(phase: PhaseConfig, history: Sequence[dict[str, Any]]) -> float:
    """The probability in [0, 1] that a batch is on-policy now: `phase.on_policy`, or as `adaptive` has it.

    history: the log of the trainer, which a checkpoint holds. `adaptive` starts at 0, and the loss at the first look is
    what later ones are compared with. A look at `LOSS_RISE` or more above it adds `SHARE_STEP`, and is compared with
    from then on.
    """
    if phase.on_policy != "adaptive":
        return phase.on_policy
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    rises, reference = 0, losses[0] if losses else 0.0
    for loss in losses[1:]:
        if loss >= reference + LOSS_RISE:
            rises, reference = rises + 1, loss
    return min(1.0, rises * SHARE_STEP)


def uses_earlier_answers(progress: float, seed: Sequence[int]) -> bool:
    """Whether an on-policy batch uses earlier answers, with probability `progress`: the share of the steps taken."""
    return np.random.default_rng([*seed, 1]).random() < progress


class EarlierAnswers:
    """The last answer of the student to each row, by its index: the same ones in every process, and in a checkpoint."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.added: dict[int, list[int]] = {}  # since the last :meth:`share`

    def add(self, rows: Sequence[int], answers: Sequence[list[int]]) -> None:
        """Keep the `answers`, token ids, to `rows`."""
        self.added |= dict(zip(rows, answers, strict=True))

    def share(self) -> None:
        """Give every process the answers that each has added; all processes call it in every step."""
        for added in gather(self.added) if process_count() > 1 else [self.added]:
            self.tokens |= added
        self.added = {}

    def completions(self, rows: Sequence[int]) -> list[Completion] | None:
        """The answers to `rows`; None unless there is one to each."""
        return [(self.tokens[i], 0) for i in rows] if all(i in self.tokens for i in rows) else None

    def save(self, folder: Path) -> None:
        write_json(folder / FILE, {str(i): tokens for i, tokens in self.tokens.items()})

    def load(self, folder: Path) -> None:
        read = json.loads((folder / FILE).read_text(encoding="utf-8"))
        self.tokens = {int(i): tokens for i, tokens in read.items()}


class EarlierAnswersMixin:
    """What a trainer with `on_policy: adaptive` does with the answers of its student: it uses them again.

    The later the step, the likelier: its probability is the share of the steps taken. Other phases stay as they are.
    """

    earlier: EarlierAnswers | None = None

    def prepare(self, student: LabelModel, rows: TrainingRows, phase: PhaseConfig, *args: Any) -> None:
        """See :class:`distillery.training.trainers.PhaseTrainerMixin`."""
        super().prepare(student, rows, phase, *args)
        self.earlier = EarlierAnswers() if phase.on_policy == "adaptive" else None

    def earlier_answers(self, rows: Sequence[int], micro_batch: int) -> list[Completion] | None:
        """The student's earlier answers to `rows`, where this micro-batch uses them and each row has one."""
        if self.earlier is None:
            return None
        place = [self.seed, self.state.global_step, micro_batch]
        again = uses_earlier_answers(self.state.global_step / self.state.max_steps, place)
        return self.earlier.completions(rows) if again else None

    def keep_answers(self, rows: Sequence[int], answers: Sequence[list[int]]) -> None:
        """Keep new `answers`, token ids, to `rows`."""
        if self.earlier is not None:
            self.earlier.add(rows, answers)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches = super().get_batch_samples(*args, **kwargs)
        if self.earlier is not None:
            self.earlier.share()
        return batches

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.earlier is not None and self.args.should_save:
            self.earlier.save(Path(output_dir))

    def _load_from_checkpoint(self, checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(checkpoint, model)
        if self.earlier is not None:
            self.earlier.load(Path(checkpoint))
