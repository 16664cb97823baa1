"""The first stage: check the experiment, and write the dependencies of all other stages into ``build/``.

``build/notebooks/``           every notebook without outputs, ids and editor metadata: running one in Jupyter and
                               saving it changes nothing here
``build/sources/<name>.json``  the sha256 of a source's file, wherever the file lies
``build/models/<name>.json``   the sha256 of a model's local folder
``build/recipe.json``          the published scores that the report shows beside those of this run, if params.yaml is a
                               recipe
``build/answers/<name>.json``  the sha256 of each file of a teacher with `kind: answers`
``build/code/stages/<stage>.json``  the modules that a stage imports, directly or not, with their fingerprints

It runs at every `dvc repro` and takes half a second. The stages after it depend on these files.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

from distillery import fingerprint
from distillery.config.effects import unused_settings
from distillery.config.load import load_params
from distillery.config.schema import ModelConfig, Params, SourceConfig
from distillery.config.trackers import check_trackers
from distillery.errors import UserError
from distillery.files import Paths, file_digest, matching_files, repository_root, write_json
from distillery.pipeline.model_checks import check_models
from distillery.pipeline.task_checks import check_task_kinds
from distillery.tasks.schema import load_task

MODULES_OF_KIND = {"api": "distillery.teachers.api"}  # modules that only a teacher of this kind needs
WORD_VECTORS = "distillery.data.word_vectors"


def strip_notebook(notebook: Path) -> dict[str, Any]:
    """The notebook's sources and tags, and nothing that Jupyter or another Python version would change.

    Raises UserError when the file is no notebook (after a merge conflict, for example).
    """
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        stripped = []
        for i, cell in enumerate(cells):
            source = cell["source"]
            clean = {"cell_type": cell["cell_type"], "id": f"cell-{i}"}
            clean["source"] = source if isinstance(source, str) else "".join(source)
            clean["metadata"] = {"tags": tags} if (tags := cell.get("metadata", {}).get("tags")) else {}
            if clean["cell_type"] == "code":
                clean |= {"execution_count": None, "outputs": []}
            stripped.append(clean)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{notebook.parent.name}/{notebook.name}: not a notebook that can be read: {error}") from None
    return {"cells": stripped, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


def notebook_code(notebook: dict[str, Any]) -> str:
    """The Python code of a stripped notebook, without the lines that are IPython's own."""
    code = "\n".join(cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "code")
    return re.sub(r"^[ \t]*[%!].*$", "", code, flags=re.M)


def stage_modules(
    notebooks: dict[str, dict[str, Any]], kinds: dict[str, str], word_vectors: bool = False
) -> dict[str, dict[str, str]]:
    """What every stage depends on in code: stage -> module -> fingerprint.

    notebooks: name -> stripped notebook.  kinds: teacher -> kind; a stage depends on a package of `MODULES_OF_KIND`
    only if a teacher of that kind takes part in it. word_vectors: whether the filter of a source compares words by
    their vectors; no stage depends on the module `WORD_VECTORS` otherwise.
    """
    all_kinds = set(kinds.values())
    inputs = fingerprint.imported("import distillery.pipeline.inputs")
    stages = {f"inputs-{role}": (inputs, all_kinds) for role in ("teachers", "students")}
    for name, notebook in notebooks.items():
        imported = fingerprint.imported(notebook_code(notebook))
        if name.startswith("02_"):
            stages |= {f"{name}-{teacher}": (imported, {kind}) for teacher, kind in kinds.items()}
        else:
            stages[name] = (imported, all_kinds)

    @cache  # many teachers share one
    def closure(imported: frozenset[str], without: tuple[str, ...]) -> dict[str, str]:
        modules = fingerprint.closure(imported, without=without)
        return {module: fingerprint.digest(module) for module in modules}

    return {
        stage: closure(
            frozenset(imported),
            (
                *(module for kind, module in MODULES_OF_KIND.items() if kind not in stage_kinds),
                *(() if word_vectors else (WORD_VECTORS,)),
            ),
        )
        for stage, (imported, stage_kinds) in stages.items()
    }


def write_fingerprints(build: Path, notebooks: dict[str, dict[str, Any]], params: Params) -> None:
    """Write `build/code`: the modules of every stage, with their fingerprints."""
    kinds = {name: teacher.kind for name, teacher in params.teachers.items()}
    word_vectors = any(spec.filter and spec.filter.embeddings for spec in params.data.values())
    for stage, modules in stage_modules(notebooks, kinds, word_vectors).items():
        write_json(build / "code" / "stages" / f"{stage}.json", modules)


def check_augmentation(params: Params) -> None:
    """Raises UserError when a teacher shall reword rows of a task for which a reworded row is another row."""
    augment = params.augment
    if augment.per_row and load_task(params.data[augment.source].task).kind != "classification":
        raise UserError(
            f"params.yaml: augment.source: `{augment.source}` is no classification: a reworded question is another "
            "question; set `per_row: 0`"
        )


def write_sources(root: Path, params: Params) -> None:
    """Write `build/sources`. Raises UserError when the file of a source is missing."""
    for name, source in params.data.items():
        record: dict[str, Any] = {"source": source.origin} | _source_digests(root, name, source)
        held_out = params.sources_with_held_out_rows(name) if source.drop_leaks else {}
        compared = params.sources_with_own_tests(name) | held_out  # with the rows of this source
        others = {
            other: {"section": spec.model_dump(mode="json"), "files": _source_digests(root, other, spec)}
            for other, spec in compared.items()
        }
        record |= {"tests_of_others": others} if others else {}
        filters = [spec.filter for spec in (source, *compared.values()) if spec.filter]
        encoders = sorted({each.embeddings for each in filters if each.embeddings})
        record |= {"embeddings": {each: _model_section(root, params, each) for each in encoders}} if encoders else {}
        write_json(Paths(root).build / "sources" / f"{name}.json", record)


def _model_section(root: Path, params: Params, name: str) -> dict[str, Any]:
    """The section of model `name`, and a digest of its local folder."""
    return params.models[name].model_dump(mode="json") | _model_digest(root, params.models[name])


def _model_digest(root: Path, model: ModelConfig) -> dict[str, str]:
    local = root / model.folder if model.folder and not model.wheel else None
    return {"sha256": file_digest(local)} if local else {"pinned": "params.yaml"}


def _source_digests(root: Path, name: str, source: SourceConfig) -> dict[str, Any]:
    """The sha256 of each file of a source, by split. Raises UserError when one is missing."""
    record: dict[str, Any] = {}
    for split, file in source.files.items():  # an absolute path stays what it is
        matching = matching_files(root, file)
        if not (root / matching[0]).exists():
            key = "source" if source.source else f"splits.{split}"
            raise UserError(f"params.yaml: data.{name}.{key}: {file}: no such file")
        digests = {one: file_digest(root / one) for one in matching}
        record |= {"sha256" if source.source else split: digests if matching != [file] else digests[file]}
    return record


def write_models(root: Path, params: Params) -> None:
    """Write `build/models`.

    A missing folder is no error here: the stage that needs the model reports it, and an experiment may name models that
    it does not use.
    """
    for name, model in params.models.items():
        write_json(Paths(root).build / "models" / f"{name}.json", _model_digest(root, model))


def write_answers(root: Path, params: Params) -> None:
    """Write `build/answers`. Raises UserError when a file of answers is missing."""
    for name, teacher in params.teachers.items():
        files = teacher.answers.files if teacher.answers else []
        for i, file in enumerate(files):
            if not (root / file).exists():
                raise UserError(f"params.yaml: teachers.{name}.answers.files.{i}: {file}: no such file")
        if files:
            record = {file: file_digest(root / file) for file in files}
            write_json(Paths(root).build / "answers" / f"{name}.json", record)


def run_strip() -> None:
    """Check params.yaml and the task files that it names, then write `build/`. Raises UserError."""
    root, params = repository_root(), load_params()
    for line in unused_settings(params):
        print(f"warning: params.yaml: {line}", file=sys.stderr)
    for source in params.data.values():
        load_task(source.task)
    check_augmentation(params)
    check_task_kinds(params)
    check_models(params)
    check_trackers(params.tracking)
    build = Paths(root).build
    for name in ("notebooks", "sources", "models", "answers", "code"):
        shutil.rmtree(build / name, ignore_errors=True)
        (build / name).mkdir(parents=True)
    notebooks = {path.stem: strip_notebook(path) for path in sorted((root / "notebooks").glob("*.ipynb"))}
    for name, notebook in notebooks.items():
        write_json(build / "notebooks" / f"{name}.ipynb", notebook)
    with fingerprint.remembered(Paths(root).cache / "fingerprints.json"):
        write_fingerprints(build, notebooks, params)
    write_sources(root, params)
    write_models(root, params)
    write_json(build / "recipe.json", params.recipe.model_dump() if params.recipe else {})
    write_answers(root, params)
