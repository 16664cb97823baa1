"""The share of on-policy batches that follows the validation loss (Ko et al. 2024, DistiLLM, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distillery.config.schema import PhaseConfig

SHARE_STEP = 0.1  # what a rise of the validation loss adds to the share
LOSS_RISE = 0.1  # nats that count as a rise, as in the scripts of the authors


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
