"""The first stage: check the experiment, and note what the others depend on in a form that changes only when it must.

``build/notebooks/``           every notebook without outputs, ids and editor metadata: running one in Jupyter and
                               saving it changes nothing here
``build/sources/<name>.json``  what a source's file holds, wherever the file lies
``build/models/<name>.json``   what a model's local folder holds
``build/recipe.json``          the published figures to be shown beside this run's, if params.yaml is a recipe
``build/answers/<name>.json``  what the files of a teacher with `kind: answers` hold
``build/code/<module>``        the fingerprint of every module: its code without comments, docstrings and layout
``build/code/stages/<stage>.json``  the modules that a stage imports, directly or not, with their fingerprints

It runs at every `dvc repro` and takes a second; the stages behind it look at what it wrote.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from distillery import fingerprint
from distillery.config.load import load_params
from distillery.config.references import unused_settings
from distillery.errors import UserError
from distillery.files import file_digest, repository_root, write_json
from distillery.tasks.schema import load_task


def strip_notebook(notebook: Path) -> dict[str, Any]:
    """The notebook's sources and tags, and nothing that Jupyter or another Python version would change.

    Raises UserError when the file is no notebook (after a merge conflict, say).
    """
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        out = []
        for i, cell in enumerate(cells):
            source = cell["source"]
            kept = {"cell_type": cell["cell_type"], "id": f"cell-{i}"}
            kept["source"] = source if isinstance(source, str) else "".join(source)
            kept["metadata"] = {"tags": tags} if (tags := cell.get("metadata", {}).get("tags")) else {}
            if kept["cell_type"] == "code":
                kept |= {"execution_count": None, "outputs": []}
            out.append(kept)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{notebook.parent.name}/{notebook.name}: not a notebook that can be read: {error}") from None
    return {"cells": out, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


MODULES_OF_KIND = {"api": "distillery.teachers.api"}  # modules that only a teacher of this kind needs


def notebook_code(notebook: dict[str, Any]) -> str:
    """The Python code of a stripped notebook, without the lines that are IPython's own."""
    code = "\n".join(cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "code")
    return re.sub(r"^[ \t]*[%!].*$", "", code, flags=re.M)


def stage_modules(notebooks: dict[str, dict[str, Any]], kinds: dict[str, str]) -> dict[str, dict[str, str]]:
    """What every stage depends on in code: stage -> module -> fingerprint.

    notebooks: name -> stripped notebook. kinds: teacher -> kind; only a stage in which a teacher of its kind takes part
    depends on a package of `MODULES_OF_KIND`.
    """
    used = set(kinds.values())
    entries = {f"inputs-{what}": ({"distillery.pipeline.inputs"}, used) for what in ("teachers", "students")}
    for name, notebook in notebooks.items():
        imported = fingerprint.imported(notebook_code(notebook))
        if name.startswith("02_"):
            entries |= {f"{name}-{teacher}": (imported, {kind}) for teacher, kind in kinds.items()}
        else:
            entries[name] = (imported, used)
    out = {}
    for stage, (modules, wanted) in entries.items():
        without = [module for kind, module in MODULES_OF_KIND.items() if kind not in wanted]
        out[stage] = {module: fingerprint.digest(module) for module in fingerprint.closure(modules, without=without)}
    return out


def write_fingerprints(build: Path, notebooks: dict[str, dict[str, Any]], kinds: dict[str, str]) -> None:
    """Write `build/code`: every module's fingerprint, and the modules of every stage."""
    for file in sorted(fingerprint.PACKAGE.rglob("*.py")):
        target = build / "code" / file.relative_to(fingerprint.PACKAGE)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(fingerprint.normalized(file.read_text(encoding="utf-8")), encoding="utf-8")
    for stage, modules in stage_modules(notebooks, kinds).items():
        write_json(build / "code" / "stages" / f"{stage}.json", modules)


def run_strip() -> None:
    """Check params.yaml and the task files it names, then write `build/`. Raises UserError."""
    root = repository_root()
    experiment = load_params()
    for line in unused_settings(experiment):
        print(f"warning: params.yaml: {line}", file=sys.stderr)
    kinds = {task: load_task(task).kind for task in sorted({source.task for source in experiment.data.values()})}
    augmented = experiment.augment.source
    if experiment.augment.per_row and kinds[experiment.data[augmented].task] != "classification":
        raise UserError(
            f"params.yaml: augment.source: `{augmented}` is no classification: rewritten, a question would be "
            "another one; set `per_row: 0`"
        )
    build = root / "build"
    for name in ("notebooks", "sources", "models", "answers", "code"):
        shutil.rmtree(build / name, ignore_errors=True)
        (build / name).mkdir(parents=True)
    notebooks = {path.stem: strip_notebook(path) for path in sorted((root / "notebooks").glob("*.ipynb"))}
    for name, notebook in notebooks.items():
        write_json(build / "notebooks" / f"{name}.ipynb", notebook)
    write_fingerprints(build, notebooks, {name: teacher.kind for name, teacher in experiment.teachers.items()})
    for name, source in experiment.data.items():
        file = root / source.source  # an absolute path stays what it is
        if source.source.startswith("hub:"):
            note = {"source": source.source}
        elif file.is_file():
            note = {"source": source.source, "sha256": file_digest(file)}
        else:
            raise UserError(f"params.yaml: data.{name}.source: {source.source}: no such file")
        write_json(build / "sources" / f"{name}.json", note)
    for name, model in experiment.models.items():
        # a missing folder is told of by the stage that needs it: an experiment may name models that it does not use
        local = root / model.folder if model.folder and not model.wheel else None
        write_json(
            build / "models" / f"{name}.json", {"sha256": file_digest(local)} if local else {"pinned": "params.yaml"}
        )
    write_json(build / "recipe.json", experiment.recipe.model_dump() if experiment.recipe else {})
    for name, teacher in experiment.teachers.items():
        files = teacher.answers.files if teacher.answers else []
        for i, file in enumerate(files):
            if not (root / file).is_file():
                raise UserError(f"params.yaml: teachers.{name}.answers.files.{i}: {file}: no such file")
        if files:
            write_json(build / "answers" / f"{name}.json", {file: file_digest(root / file) for file in files})
