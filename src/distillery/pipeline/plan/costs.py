"""What a resolved recipe takes: memory by stage, disk, hours, and the cost of API calls."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from distillery.config.schema import PhaseConfig, SearchConfig
from distillery.evaluation.speed import student_shape
from distillery.models.label_model import LabelModel
from distillery.models.layers import count_parameters
from distillery.pipeline.plan.resolve import MEASURED_ROWS, Finding, PhasePlan, RecipePlan
from distillery.pipeline.plan.resources import (
    FULL_BYTES,
    GPUS,
    HALF_BYTES,
    Memory,
    dense_bytes,
    frozen_format,
    memory_of_process,
    merged_parameters,
    optimizer_bytes,
    prediction_bytes,
    training_memory,
)
from distillery.pipeline.plan.tokenizers import PIECE
from distillery.tasks.prompts import chat_turns, explained_turns
from distillery.training.disk import disk_need

PIECES = re.compile(rf"[^\W\d_]{{1,{PIECE}}}|\d|[^\w\s]")  # of a text, as stand-in tokenizers cut it
SEARCH = "search"  # all trials of the section `search`
STORED_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class ApiCost:
    """Requests to an endpoint. dollars: None without a price; tokens are upper bounds."""

    requests: int | None
    input_tokens: int | None
    output_tokens: int | None
    dollars: float | None


def stage_memory(plan: RecipePlan) -> dict[str, Memory]:
    """Memory of one GPU in each stage that holds a local model, by `<notebook>, <owner>`."""
    stages: dict[str, Memory] = {}
    for name, spec in plan.params.teachers.items():
        model = plan.models.get(f"teachers.{name}")
        if model is None:
            continue
        stages[f"02_teach, {name}"] = Memory(prediction_bytes(model.model, spec))
        if spec.finetune:
            frozen = spec.dtype if spec.finetune.lora and spec.kind != "classifier" else "float32"
            frozen = "nf4" if spec.quantize == "nf4" else frozen
            tuning = training_memory(
                model.model, frozen, optimizer_bytes([spec.finetune]), _activations(plan, f"teachers.{name}")
            )
            stages[f"02_teach, {name}, fine-tuning"] = memory_of_process(
                tuning, model.model, plan.params.compute, spec.dtype
            )
    for name, spec in plan.params.students.items():
        model = plan.models.get(f"students.{name}")
        if model is None:
            continue
        activations = _activations(plan, f"students.{name}")
        training = training_memory(model.model, frozen_format(spec), optimizer_bytes(spec.phases), activations)
        training = memory_of_process(training, model.model, plan.params.compute, spec.dtype)
        beside = max((_teacher_beside(plan, phase) for phase in spec.phases), default=0.0)
        stages[f"04_distill, {name}, training"] = Memory(
            training.weights + beside, training.gradients, training.optimizer, training.activations
        )
        stages[f"04_distill, {name}, scoring"] = Memory(dense_bytes(model.model, "float32"))
    stages["05_evaluate"] = Memory(_evaluation_bytes(plan))
    return stages


def _activations(plan: RecipePlan, owner: str) -> float:
    steps = [phase.step for phase in plan.phases if phase.model == owner and phase.step]
    return float(max((step.activations for step in steps), default=0))


def _teacher_beside(plan: RecipePlan, phase: object) -> float:
    """Bytes of the largest teacher that is opened beside the student, for its tokens or hidden states."""
    if not (phase.needs_token_logprobs or phase.needs_hidden_states):
        return 0.0
    opened = [(plan.models.get(f"teachers.{name}"), plan.params.teachers[name]) for name in phase.teachers]
    return max((prediction_bytes(model.model, spec) for model, spec in opened if model), default=0.0)


def _evaluation_bytes(plan: RecipePlan) -> float:
    """Bytes of what 05_evaluate holds at once: each shape of the headline's source once, and its first model again."""
    params, held = plan.params, {}
    source = params.test_source(params.evaluate.headline)
    names = [params.evaluate.headline, *params.students]
    for name in dict.fromkeys(names):
        spec, model = params.students[name], plan.models.get(f"students.{name}")
        if model and params.test_source(name) == source:
            dtype = "float32" if spec.arch == "classifier" else spec.dtype
            held.setdefault(student_shape(spec), dense_bytes(model.model, dtype))
    first = next(iter(held.values()), 0.0)
    teachers = [
        prediction_bytes(model.model, params.teachers[name])
        for name in params.teachers
        if source in params.teacher_sources(name) and (model := plan.models.get(f"teachers.{name}"))
    ]
    return first + sum(held.values()) + sum(teachers)


def disk_bytes(plan: RecipePlan) -> dict[str, float | None]:
    """Bytes on the disk at most, by kind; None where a number of rows or a stored precision is not known."""
    params, stored = plan.params, 0.0
    for name, facts in plan.facts.items():
        owners = [f"teachers.{t}" for t, spec in params.teachers.items() if spec.model == name]
        owners += [f"students.{s}" for s, spec in params.students.items() if spec.model == name]
        model = next((plan.models[owner] for owner in owners if owner in plan.models), None)
        dtype = facts.facts["stored_dtype"].value if "stored_dtype" in facts.facts else None
        known = facts.facts["parameters"].value if "parameters" in facts.facts else model and _parameters(model)
        stored = None if stored is None or dtype is None or not known else stored + known * STORED_BYTES[dtype]
    runs = checkpoints = tuned = 0.0
    for name, spec in params.students.items():
        if model := plan.models.get(f"students.{name}"):
            half = spec.arch == "causal" and spec.dtype == "bfloat16"
            runs += len(params.seeds) * _parameters(model) * (HALF_BYTES if half else FULL_BYTES)
            checkpoints = max(checkpoints, disk_need(model, model.model).total)
    for name, spec in params.teachers.items():
        if spec.finetune and (model := plan.models.get(f"teachers.{name}")):
            total, trained = count_parameters(model.model)
            tuned += (1 + spec.finetune.folds) * FULL_BYTES * (trained if spec.finetune.lora else total)
            checkpoints = max(checkpoints, disk_need(model, model.model).total)
    signals = sum(phase.step.signal_bytes * (phase.rows or 0) for phase in plan.phases if phase.step)
    return {
        "fetched models": stored,
        "students and tuned teachers, twice (DVC's cache)": 2 * (runs + tuned),
        "one training's checkpoints": checkpoints,
        "stored outputs of teachers": float(signals),
    }


def _parameters(model: LabelModel) -> int:
    return merged_parameters(model.model)


def training_hours(plan: RecipePlan, gpu: str) -> dict[str, float | None]:
    """Hours of each training, all seeds and folds, and of a search's trials; None where rows are not known.

    On one `gpu` for each process of `compute`, which share the rows of a step: so many times as fast is assumed. A
    search has one process.
    """
    processes = plan.params.compute.processes
    hours: dict[str, float | None] = {}
    for phase in plan.phases:
        section, _, name = phase.model.partition(".")
        spec = plan.params.teachers[name] if section == "teachers" else plan.params.students[name]
        repeats = 1 + spec.finetune.folds if section == "teachers" else len(plan.params.seeds)
        if phase.step is None or phase.steps is None:
            hours[phase.owner] = None
            continue
        seconds = phase.steps * phase.phase.accumulate * _mean_flops(phase) / GPUS[gpu].speed(spec.dtype)
        hours[phase.owner] = repeats * seconds / processes / 3600
    if search := plan.params.search:
        hours[SEARCH] = None
        phase = next((phase for phase in plan.phases if phase.owner == searched_phase(search)), None)
        if phase and phase.step and phase.rows is not None:
            speed = GPUS[gpu].speed(plan.params.students[search.student].dtype)
            row_flops = _mean_flops(phase) / phase.phase.batch_size
            hours[SEARCH] = search_rows(search, phase) * row_flops / speed / 3600
    return hours


def searched_phase(search: SearchConfig) -> str:
    """The phase that `search` is for, as :attr:`PhasePlan.owner` has it."""
    return f"students.{search.student}.phases.{search.phase - 1}"


def search_rows(search: SearchConfig, phase: PhasePlan) -> float:
    """Rows that all trainings of `search` read, each as often as it is read: the largest of its choices are taken."""
    settings = {key: max(search.choices.get(key, [value or 0])) for key, value in _sizes(phase.phase).items()}
    if settings["steps"]:
        n_rows = settings["steps"] * settings["batch_size"] * phase.phase.accumulate
    else:
        n_rows = settings["epochs"] * phase.rows * search.share * (search.folds - 1) / search.folds
    return search.trials * search.folds * n_rows


def _sizes(phase: PhaseConfig) -> dict[str, float | None]:
    return {"steps": phase.steps, "epochs": phase.epochs, "batch_size": phase.batch_size}


def _mean_flops(phase: PhasePlan) -> float:
    """Of a batch of rows of mean length; the step was counted for the longest rows."""
    mean, longest = phase.tokens
    return phase.step.flops * mean / longest


def api_costs(plan: RecipePlan) -> dict[str, ApiCost]:
    """Requests, tokens and dollars of each teacher behind an endpoint, at most; a finding where its limit is lower."""
    costs = {}
    for name, spec in plan.params.teachers.items():
        if spec.api is None:
            continue
        sources = [plan.sources[source] for source in plan.params.teacher_sources(name)]
        counts = [rows for source in sources for rows in source.counts.values()]
        if None in counts or any(source.texts is None for source in sources):
            costs[name] = ApiCost(None, None, None, None)
            continue
        texts = sources[0].texts["text"].head(MEASURED_ROWS)
        turns = explained_turns if spec.api.labels == "explained" else chat_turns
        prompts = [_prompt_tokens(turns(sources[0].task, text, spec.few_shot)) for text in texts]
        labels = sum(counts) * spec.api.samples
        rationales = 0 if spec.api.labels == "explained" else spec.rationales
        requests = labels + rationales
        input_tokens = round(requests * sum(prompts) / len(prompts))
        output_tokens = labels * spec.api.max_tokens + rationales * spec.max_new_tokens
        price, dollars = spec.api.price, None
        if price:
            dollars = (input_tokens * price.input + output_tokens * price.output) / 1e6
        costs[name] = ApiCost(requests, input_tokens, output_tokens, dollars)
        limit = spec.api.max_cost
        if dollars is not None and limit is not None:
            status, relation = ("ok", "within") if dollars <= limit else ("failed", "above")
            text = f"up to {dollars:.2f} dollars, {relation} max_cost {limit:.2f}"
            plan.findings.append(Finding(status, f"teachers.{name}.api", text))
    return costs


def _prompt_tokens(turns: Sequence[dict[str, str]]) -> int:
    return sum(len(PIECES.findall(turn["content"])) for turn in turns)


def check_gpu(plan: RecipePlan, stages: dict[str, Memory], gpu: str) -> None:
    """Add a finding for each stage that needs more than the memory of `gpu`."""
    room = GPUS[gpu].memory
    for stage, memory in stages.items():
        if memory.certain > room:
            text = f"{memory.certain / 1e9:.1f} GB without activations, above the {room / 1e9:.0f} GB of {gpu}"
            plan.findings.append(Finding("failed", stage, text))
        elif memory.total > room:
            text = f"{memory.total / 1e9:.1f} GB with activations in float32, above the {room / 1e9:.0f} GB of {gpu}"
            plan.findings.append(Finding("unknown", stage, text))
