"""Checks of the models that params.yaml names, as far as their files are on this machine already."""

from __future__ import annotations

from collections.abc import Iterator

from distillery.config.schema import Params, StudentConfig, TeacherConfig
from distillery.errors import UserError
from distillery.models.folders import model_folder
from distillery.models.heads import check_label_map, read_config, read_head
from distillery.tasks.schema import load_task

POSITION_KEYS = ("max_position_embeddings", "n_positions")  # of a config; not every model keeps to them
RESERVED_POSITIONS = 8  # that may be no token's: RoBERTa keeps two


def check_models(params: Params) -> None:
    """Check the heads of classifiers against their tasks, and `max_length` and exports against models.

    A model that has yet to be fetched is checked when it is loaded. Raises UserError with one line that names the key.
    """
    for teacher, model, labels in _classifiers(params):
        spec = params.models[model]
        folder = model_folder(model, spec)
        try:
            if spec.labels:
                check_label_map(spec.labels, labels)
            head = read_head(folder, labels, spec.labels) if (folder / "config.json").is_file() else None
        except ValueError as error:
            raise UserError(f"params.yaml: models.{model}: {error}") from None
        if head and teacher and params.teachers[teacher].finetune is None:
            head.require(teacher, model, labels)
    for name, teacher in params.teachers.items():
        if teacher.max_length:
            _check_length(f"params.yaml: teachers.{name}.max_length", teacher, params)
    for name, student in params.students.items():
        _check_length(f"params.yaml: students.{name}.max_length", student, params)
    for i, name in enumerate(params.evaluate.export):
        _check_export(f"params.yaml: evaluate.export.{i}", name, params)


def _check_length(place: str, spec: StudentConfig | TeacherConfig, params: Params) -> None:
    folder = model_folder(spec.model, params.models[spec.model])
    if not (folder / "config.json").is_file():
        return
    try:
        sizes = read_config(folder)
    except ValueError as error:
        raise UserError(f"params.yaml: models.{spec.model}: {error}") from None
    declared = [sizes[key] for key in POSITION_KEYS if isinstance(sizes.get(key), int)]
    if declared and spec.max_length > min(declared) - RESERVED_POSITIONS:
        from distillery.models.positions import max_positions_in, require_positions  # which load torch: seconds

        require_positions(place, spec.max_length, max_positions_in(folder))


def _check_export(place: str, student: str, params: Params) -> None:
    if load_task(params.data[params.test_source(student)].task).kind == "qa":
        raise UserError(f"{place}: `{student}` writes free answers; only students with labels are exported")
    spec = params.students[student]
    folder = model_folder(spec.model, params.models[spec.model])
    if spec.arch == "causal" and (folder / "config.json").is_file():
        from distillery.deploy.gguf_file import ARCHITECTURES  # which loads torch: seconds

        kind = read_config(folder).get("model_type")
        if kind not in ARCHITECTURES:
            raise UserError(f"{place}: `{student}` is {kind}; GGUF files are written of {', '.join(ARCHITECTURES)}")


def _classifiers(params: Params) -> Iterator[tuple[str | None, str, list[str]]]:
    """The teacher's name (None of a student), model and labels of every classifier."""
    for name, spec in params.teachers.items():
        if spec.kind == "classifier":
            yield name, spec.model, load_task(params.data[params.teacher_sources(name)[0]].task).names
    for name, spec in params.students.items():
        if spec.arch == "classifier":
            yield None, spec.model, load_task(params.data[params.test_source(name)].task).names
