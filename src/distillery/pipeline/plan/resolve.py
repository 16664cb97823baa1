"""Resolve a recipe without weights: what fits together, and what it takes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer

from distillery.config.load import validate_section
from distillery.config.schema import Params, PhaseConfig, StudentConfig, TeacherConfig
from distillery.errors import UserError
from distillery.models.label_model import LabelModel
from distillery.models.layers import configured_layers, count_parameters
from distillery.models.series_adapters import adapted_layers, adapter_parameters
from distillery.pipeline.plan import shapes
from distillery.pipeline.plan.facts import NEEDED_FILES, ModelFacts, missing_files, read_model_facts
from distillery.pipeline.plan.resources import merged_parameters
from distillery.pipeline.plan.rows import (
    SourceRows,
    count_phase_rows,
    read_all_rows,
    sample_phase_frame,
    sample_phase_texts,
)
from distillery.pipeline.plan.shapes import StepShapes
from distillery.pipeline.plan.tokenizers import write_stand_in
from distillery.pipeline.recipe import load_recipe
from distillery.tasks.schema import Task
from distillery.training.trainers import count_optimizer_steps

MEASURED_ROWS = 200  # whose tokens are counted


@dataclass(frozen=True)
class Finding:
    """The result of a check. status: `ok`, `failed` or `unknown`; place: a key of the recipe."""

    status: str
    place: str
    text: str


@dataclass
class PhasePlan:
    """A phase, or the fine-tuning of a teacher. rows, steps: None where not known.

    owner: `students.<name>.phases.<position>` or `teachers.<name>.finetune`; names may hold dots. step: of one
    micro-batch of its longest rows. tokens: of a row, mean and longest, prompt included.
    """

    owner: str
    phase: PhaseConfig
    rows: int | None
    steps: int | None
    step: StepShapes | None = None
    tokens: tuple[float, int] | None = None

    @property
    def model(self) -> str:
        """The student or teacher that it trains, as in :attr:`RecipePlan.models`."""
        return self.owner.rpartition(".phases.")[0] or self.owner.removesuffix(".finetune")


@dataclass
class RecipePlan:
    """What is known of a recipe without its weights. models: opened students and teachers, by `students.<name>`.

    title: name and scale.
    """

    name: str
    params: Params
    facts: dict[str, ModelFacts]
    sources: dict[str, SourceRows]
    findings: list[Finding] = field(default_factory=list)
    models: dict[str, LabelModel] = field(default_factory=dict)
    phases: list[PhasePlan] = field(default_factory=list)
    scale: str | None = None

    @property
    def title(self) -> str:
        return f"{self.name}, {self.scale}" if self.scale else self.name

    @property
    def failed(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.status == "failed"]

    def check(self, place: str, action: Callable[[], Any], text: Callable[[Any], str]) -> Any:
        """The result of `action`, None where it fails as the run would; a finding has the reason."""
        try:
            result = action()
        except (UserError, ValueError, RuntimeError, IndexError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.findings.append(Finding("failed", place, reason))
            return None
        self.findings.append(Finding("ok", place, text(result)))
        return result


def resolve_recipe(root: Path, name: str, raw: dict[str, Any] | None = None, scale: str | None = None) -> RecipePlan:
    """The plan of recipe `name` at `scale`. raw: its content, where it is not that of its file.

    Raises UserError for a file that is no recipe, and for a data file that cannot be read.
    """
    params = validate_section(Params, raw or load_recipe(root, name, scale), f"recipes/{name}.yaml")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        facts = {model: read_model_facts(root, model, spec, scratch / "hub") for model, spec in params.models.items()}
        plan = RecipePlan(name, params, facts, read_all_rows(root, name, params), scale=scale)
        folders = {model: known for model, fact in facts.items() if (known := _check_model(plan, fact, scratch))}
        for teacher in params.teachers:
            _check_teacher(plan, teacher, folders)
        steps: dict[str, StepShapes] = {}
        for student in params.students:
            _check_student(plan, student, folders, scratch, steps)
    return plan


def _check_model(plan: RecipePlan, facts: ModelFacts, scratch: Path) -> Path | None:
    """A folder with the model's config and a tokenizer, its own or a stand-in; None where the config is not known."""
    place, files = f"models.{facts.name}", facts.files
    if facts.problem:
        plan.findings.append(Finding("failed", place, facts.problem))
    elif files is not None and (missing := missing_files(files)):
        plan.findings.append(Finding("failed", place, f"{facts.origin} holds no {', no '.join(missing)}"))
    elif files is not None:
        plan.findings.append(Finding("ok", place, f"{facts.origin} holds all files that a run reads"))
    elif facts.spec.hub:
        plan.findings.append(
            Finding("unknown", place, f"the files of {facts.origin} are not known; a run reads {NEEDED_FILES}")
        )
    if facts.folder:
        return facts.folder
    if "config" not in facts.facts:
        plan.findings.append(Finding("unknown", place, f"the config of {facts.origin} is not known"))
        return None
    family = facts.facts["tokenizer"].value["family"] if "tokenizer" in facts.facts else facts.name
    folder = scratch / "models" / facts.name
    write_stand_in(folder, facts.facts["config"].value, family, _words(plan))
    return folder


def _words(plan: RecipePlan) -> list[str]:
    """Texts whose pieces a stand-in for a tokenizer must know."""
    texts: list[str] = []
    for source in plan.sources.values():
        task = source.task
        answers = [task.word(name) for name in task.names]
        texts += [before + answer for answer in answers for before in ("", " ")]
        texts += [task.prompt.system, task.prompt.instruction, task.prompt.response, task.prompt.template]
        texts += [text for shot in task.few_shot for text in (shot.text, shot.label)]
        texts += [] if source.texts is None else source.texts["text"].tolist()
    return texts


def _task_of(plan: RecipePlan, owner: StudentConfig | TeacherConfig, name: str) -> Task:
    if isinstance(owner, StudentConfig):
        return plan.sources[plan.params.test_source(name)].task
    return plan.sources[plan.params.teacher_sources(name)[0]].task


def _check_teacher(plan: RecipePlan, name: str, folders: dict[str, Path]) -> None:
    spec, place = plan.params.teachers[name], f"teachers.{name}"
    if spec.model is None:
        return
    if spec.model not in folders:
        plan.findings.append(Finding("unknown", place, f"the config of `{spec.model}` is not known"))
        return
    origin, task = plan.params.models[spec.model], _task_of(plan, spec, name)

    def open_it() -> LabelModel:
        return shapes.open_teacher_shapes(name, spec, origin, folders[spec.model], task)

    teacher = plan.check(place, open_it, lambda model: f"opens as {type(model.model).__name__}")
    if teacher is None:
        return
    plan.models[place] = teacher
    if spec.finetune is None:
        return
    adapted = plan.check(
        f"{place}.finetune",
        lambda: shapes.adapt_teacher(teacher, spec),
        lambda model: _adapters_text(model, spec.finetune.lora),
    )
    if adapted is None:
        return
    phase = spec.finetune.as_phase()
    _check_phase(plan, f"{place}.finetune", teacher, phase, {}, {})


def _check_student(
    plan: RecipePlan, name: str, folders: dict[str, Path], scratch: Path, steps: dict[str, StepShapes]
) -> None:
    spec, place = plan.params.students[name], f"students.{name}"
    if spec.model not in folders:
        plan.findings.append(Finding("unknown", place, f"the config of `{spec.model}` is not known"))
        return
    origin, task = plan.params.models[spec.model], _task_of(plan, spec, name)

    def open_it(wanted: StudentConfig = spec) -> LabelModel:
        return shapes.open_student(wanted, origin, folders[spec.model], task)

    student = plan.check(
        place, open_it, lambda model: _adapters_text(model.model, spec.adapter if spec.adapter.kind != "none" else None)
    )
    if student is None:
        return
    plan.models[place] = student
    _compare_parameters(plan, place, student, spec)
    shape = spec.model_dump_json(exclude={"phases", "control"})
    for number, phase in enumerate(spec.phases):
        teachers = {
            teacher: shapes.openable(
                teacher, record, plan.params.models[record.model], folders[record.model], task, scratch / "signals"
            )
            for teacher in phase.teachers
            if (record := plan.params.teachers[teacher]).model in folders
        }
        _check_phase(plan, f"{place}.phases.{number}", student, phase, teachers, steps, shape)
        last = plan.phases[-1]
        if spec.gradient_checkpointing and last.step:
            key = f"{shape} kept {_step_key(phase)}"
            frame = sample_phase_frame(phase, plan.sources, phase.batch_size)
            if key not in steps:
                steps[key] = shapes.run_step(open_it(shapes.without_checkpointing(spec)), phase, frame, teachers)
            last.step = shapes.with_checkpointing(steps[key], last.step, configured_layers(student.model.config))


def _compare_parameters(plan: RecipePlan, place: str, student: LabelModel, spec: StudentConfig) -> None:
    """Whether the model has as many weights as its publisher counts."""
    facts = plan.facts[spec.model].facts
    whole = spec.init.layers == "all" and spec.arch != "classifier"
    if not whole or "parameters" not in facts:
        return
    own = merged_parameters(student.model) - adapter_parameters(student.model)
    published = facts["parameters"].value
    status = "ok" if own == published else "failed"
    plan.findings.append(Finding(status, place, f"{own:,} parameters; published: {published:,}"))


def _adapters_text(model: Any, lora: Any) -> str:
    total, trained = count_parameters(model)
    text = f"{total:,} parameters, {trained:,} of them trained"
    if lora is None:
        return text
    names = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    names += adapted_layers(model)
    kinds = dict.fromkeys(name.rpartition(".")[2] for name in names)
    return f"{text}: adapters in {len(names)} layers ({', '.join(kinds)})"


def _step_key(phase: PhaseConfig) -> str:
    decisive = {"loss", "data", "teachers", "batch_size", "space", "layers", "top_k", "on_policy", "rationales"}
    return phase.model_dump_json(include=decisive)


def _check_phase(
    plan: RecipePlan,
    place: str,
    model: LabelModel,
    phase: PhaseConfig,
    teachers: dict[str, Any],
    steps: dict[str, StepShapes],
    shape: str = "",
) -> None:
    """Count the rows and steps of a phase, and run one micro-batch of it forward and backward."""
    rows = count_phase_rows(phase, plan.sources, plan.params.augment.per_row)
    planned = PhasePlan(
        place, phase, rows, None if rows is None and not phase.steps else count_optimizer_steps(rows or 0, phase)
    )
    plan.phases.append(planned)
    frame = sample_phase_frame(phase, plan.sources, phase.batch_size)
    needs_models = phase.needs_token_logprobs or phase.needs_hidden_states
    if frame is None or (needs_models and set(phase.teachers) - set(teachers)):
        plan.findings.append(Finding("unknown", place, "no text or no model is at hand to run a batch"))
        return
    key = f"{shape} {_step_key(phase)}"
    if shape and key in steps:
        planned.step = steps[key]
        plan.findings.append(Finding("ok", place, "as the same batch of another student"))
    else:
        planned.step = plan.check(place, lambda: shapes.run_step(model, phase, frame, teachers), _step_text)
    if planned.step:
        steps[key] = planned.step
        lengths = [len(ids) for ids in model.encode(sample_phase_texts(phase, plan.sources, MEASURED_ROWS))]
        longest = [len(ids) for ids in model.encode(frame["text"])]
        planned.tokens = sum(lengths) / len(lengths), max(lengths + longest)


def _step_text(step: StepShapes) -> str:
    maps = ", ".join(f"{width} to {teacher_width}" for width, teacher_width in step.projections)
    return "a batch runs forward and backward" + (f"; hidden states projected from {maps}" if maps else "")
