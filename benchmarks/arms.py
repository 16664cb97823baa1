"""The arms of `gkd_arms.py`: how each trains the student, and the settings that are tried for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

TEACHER, CONTROL = "qwen-1.5b", "SFT on gold"
ON_POLICY_RATE = 0.2  # learning rate on the student's own answers, as a share of the one before
POOL = {"data": ["finance/pool"], "teachers": [TEACHER], "batch_size": 8}
GOLD = {"data": ["finance/train"], "loss": {"ce": 1.0}, "batch_size": 8}
OWN_ANSWERS = {"max_new_tokens": 4}

Setting = dict[str, Any]
Phases = list[dict[str, Any]]


def gold_phases(setting: Setting, steps: int) -> Phases:
    """SFT on the gold rows."""
    return [GOLD | setting | {"steps": steps}]


def label_phases(setting: Setting, steps: int) -> Phases:
    """One phase on the teacher's labels, or on its distributions over labels."""
    return [POOL | setting | {"steps": steps}]


def reason_phases(setting: Setting, steps: int) -> Phases:
    """Off-policy GKD at the tokens of labels and reasons, which are also learned as texts."""
    return [POOL | setting | {"space": "vocabulary", "rationales": True, "steps": steps}]


def gkd_phases(setting: Setting, steps: int) -> Phases:
    """GKD off-policy, then on the student's own answers for a share `sampled` of the steps."""
    common = {"space": "vocabulary"} | {k: v for k, v in setting.items() if k != "sampled"}
    sampled = max(1, round(setting["sampled"] * steps))
    slower = {"learning_rate": ON_POLICY_RATE * setting["learning_rate"]}
    return [
        POOL | common | {"steps": steps - sampled},
        POOL | common | OWN_ANSWERS | slower | {"on_policy": 1.0, "steps": sampled},
    ]


def gold_then_gkd_phases(setting: Setting, steps: int) -> Phases:
    """SFT on the gold rows for half of the steps, then GKD from there; a share `on_policy` of it on own answers."""
    gold = GOLD | {"learning_rate": setting["gold_rate"], "steps": steps // 2}
    rest = {k: v for k, v in setting.items() if k != "gold_rate"}
    return [gold, POOL | OWN_ANSWERS | rest | {"space": "vocabulary", "steps": steps - steps // 2}]


@dataclass(frozen=True)
class Arm:
    """A way to train the student: its phases for a setting and a number of optimizer steps, and its 6 settings."""

    phases: Callable[[Setting, int], Phases]
    settings: Sequence[Setting]


def divergence(name: str, learning_rate: float, **settings: Any) -> Setting:
    """The setting of a phase whose loss is one divergence from the teacher."""
    return {"loss": {name: 1.0}, "learning_rate": learning_rate, **settings}


def with_reasons(name: str, learning_rate: float, weight: float, **settings: Any) -> Setting:
    """A :func:`divergence`, and the cross-entropy of the reasons' tokens."""
    return {"loss": {name: 1.0, "rationale": weight}, "learning_rate": learning_rate, **settings}


def teacher_labels(learning_rate: float, min_confidence: float = 0.0) -> Setting:
    """Cross-entropy with the teacher's labels, of rows where it is sure enough."""
    sure = {"pseudo_labels": {"min_confidence": min_confidence}}
    return {"loss": {"ce": 1.0}, "learning_rate": learning_rate, **sure}


ARMS = {
    CONTROL: Arm(gold_phases, [{"learning_rate": rate} for rate in (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 4e-3)]),
    "GKD": Arm(
        gkd_phases,
        [
            divergence("kl", 1e-3, sampled=0.2),
            divergence("kl", 2e-3, sampled=0.2),
            divergence("kl", 5e-4, sampled=0.5),
            divergence("kl", 1e-3, sampled=0.2, temperature=2.0),
            divergence("reverse_kl", 1e-3, sampled=0.2),
            divergence("jsd", 2e-3, sampled=0.2, beta=0.5),
        ],
    ),
    "GKD with reasons": Arm(
        reason_phases,
        [
            with_reasons("kl", 1e-3, 0.2),
            with_reasons("kl", 2e-3, 0.2),
            with_reasons("kl", 5e-4, 0.2),
            with_reasons("kl", 1e-3, 0.05),
            with_reasons("kl", 1e-3, 0.2, temperature=2.0),
            with_reasons("jsd", 2e-3, 0.2, beta=0.5),
        ],
    ),
    "label-space KD": Arm(
        label_phases,
        [
            divergence("kl", 1e-3),
            divergence("kl", 2e-3),
            divergence("kl", 5e-4),
            divergence("kl", 1e-3, temperature=2.0),
            divergence("reverse_kl", 1e-3),
            divergence("jsd", 2e-3, beta=0.5),
        ],
    ),
    "sequence-level KD": Arm(
        label_phases,
        [*map(teacher_labels, (2e-4, 5e-4, 1e-3, 2e-3)), teacher_labels(5e-4, 0.6), teacher_labels(1e-3, 0.6)],
    ),
    "SFT on gold, then GKD": Arm(
        gold_then_gkd_phases,
        [
            divergence("kl", 1e-3, gold_rate=1e-3, on_policy=0.0),
            divergence("kl", 5e-4, gold_rate=1e-3, on_policy=0.5),
            divergence("kl", 2e-4, gold_rate=1e-3, on_policy=1.0),
            divergence("kl", 5e-4, gold_rate=1e-3, on_policy=0.0, temperature=2.0),
            divergence("reverse_kl", 5e-4, gold_rate=1e-3, on_policy=1.0),
            divergence("jsd", 1e-3, gold_rate=1e-3, on_policy=0.5, beta=0.5),
        ],
    ),
}
