"""Settings that have no effect, and those in which a student differs from its control."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from distillery.config.schema import DIVERGENCES, HIDDEN_STATE_TERMS, Params, PhaseConfig

# Settings of a phase that only some loss terms use: the key, and those terms.
TERMS_THAT_USE = {
    "temperature": DIVERGENCES,
    "scale_by_t2": DIVERGENCES,
    "space": DIVERGENCES,
    "beta": ("jsd",),
    "alpha": ("skew_kl", "skew_reverse_kl"),
    "layers": HIDDEN_STATE_TERMS,
}
# Settings of a phase that need something else.
USED_IF: dict[str, Callable[[PhaseConfig], bool]] = {
    "sampling_temperature": lambda phase: bool(phase.on_policy),
    "max_new_tokens": lambda phase: bool(phase.on_policy),
    "tail_samples": lambda phase: bool(phase.top_k),
    "mix": lambda phase: len(phase.teachers) > 1,
    **dict.fromkeys(("pseudo_labels", "rationales", "top_k", "on_policy"), lambda phase: bool(phase.teachers)),
}


def _has_effect(phase: PhaseConfig, key: str) -> bool:
    terms, condition = TERMS_THAT_USE.get(key), USED_IF.get(key)
    return (terms is None or any(term in phase.loss for term in terms)) and (condition is None or condition(phase))


def unused_settings(params: Params) -> list[str]:
    """One line for every `temperature`, `beta`, `alpha` or `sampling_temperature` that is set and has no effect.

    Also one for every source that holds a pool alone and is named in no phase.
    """
    lines = []
    for name, student in params.students.items():
        for i, phase in enumerate(student.phases):
            for key in ("temperature", "beta", "alpha", "sampling_temperature"):
                if key in phase.model_fields_set and not _has_effect(phase, key):
                    needed = " or ".join(TERMS_THAT_USE.get(key, ("on_policy",)))
                    lines.append(f"students.{name}.phases.{i}.{key}: has no effect in this phase: it needs {needed}")
    learned = {text for student in params.students.values() for phase in student.phases for text in phase.data}
    for name, source in params.data.items():
        if source.held_splits == ["pool"] and f"{name}/pool" not in learned:
            lines.append(f"data.{name}: has no effect: it holds a pool alone, and no phase names `{name}/pool`")
    return lines


# What a student and its control differ in by design, and what changes no result.
NOT_COMPARED = {
    *("data", "teachers", "loss", "steps", "epochs", "control"),
    *("checkpoint_every", "gradient_checkpointing", "validate_every"),
}


def control_differences(params: Params, name: str) -> list[str]:
    """The settings in which student `name` and its control differ, besides teachers, loss and data of their phases.

    Each entry is `key: value of the student and value of the control`, such as `phases.0.learning_rate: 0.001 and
    0.002`. Students with unlike numbers of phases are compared in the values that a setting takes over all phases
    (`phases.*.learning_rate`). `steps` is the sum over the phases, where all of them give steps. A setting of the loss
    counts where it has an effect in both. Empty without a control.
    """
    student = params.students[name]
    if student.control is None:
        return []
    pair = (student, params.students[student.control])
    differences = _differences(*(one.model_dump(exclude={"phases", *NOT_COMPARED}) for one in pair))
    phases = [[_phase_settings(phase) for phase in one.phases] for one in pair]
    if len(phases[0]) == len(phases[1]):
        for i, (own, other) in enumerate(zip(*phases, strict=True)):
            differences += _differences(own, other, f"phases.{i}.")
    else:
        differences.append(f"phases: {len(phases[0])} and {len(phases[1])}")
        differences += _differences(*(_values_over_phases(of_one) for of_one in phases), "phases.*.")
    return differences + _differences(*(_total_steps(one.phases) for one in pair))


def _total_steps(phases: list[PhaseConfig]) -> dict[str, Any]:
    """The sum of the phases' steps, or `auto` where validation rows decide one; empty where epochs give one."""
    if any(phase.is_auto for phase in phases):
        return {"steps": "auto"}
    steps = [phase.steps for phase in phases]
    return {} if None in steps else {"steps": sum(steps)}


def _phase_settings(phase: PhaseConfig) -> dict[str, Any]:
    """The settings of `phase` that have an effect, but for those in which a control differs by design."""
    excluded: dict[str, Any] = dict.fromkeys(NOT_COMPARED, True)
    if phase.stops_by_agreement:  # which a control without teachers cannot do
        excluded["early_stopping"] = {"metric"}
    return {key: value for key, value in phase.model_dump(exclude=excluded).items() if _has_effect(phase, key)}


def _values_over_phases(phases: list[dict[str, Any]]) -> dict[str, str]:
    """The distinct values of every setting, in the order of the phases."""
    keys = dict.fromkeys(key for phase in phases for key in phase)
    return {key: ", ".join(dict.fromkeys(_text(phase[key]) for phase in phases if key in phase)) for key in keys}


def _differences(student: Mapping[str, Any], control: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`key: value and value` for every key of both with unequal values; sections key by key."""
    lines = []
    for key in student:
        if key not in control or student[key] == control[key]:
            continue
        if isinstance(student[key], dict) and isinstance(control[key], dict):
            lines += _differences(student[key], control[key], f"{prefix}{key}.")
        else:
            lines.append(f"{prefix}{key}: {_text(student[key])} and {_text(control[key])}")
    return lines


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)
