"""A published system run as a recipe: ``distillery recipe pkd-albert --scale small``.

A recipe runs in a folder of its own, `.cache/recipes/<name>` (or `<name>-<scale>`): a copy of the code, notebooks,
tasks and corpora as they are now, with the recipe as its params.yaml and with its own DVC cache. So the repository's
experiment and its results stay as they are, and recipes may run side by side. They share the fetched models and the
store of answers: an answer that one recipe has paid for is not bought again.

A recipe with a section `search` is run in three steps: the stages up to `inputs`, the search, which writes the best
settings into the recipe's params.yaml, and all stages.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from ruamel.yaml import YAML

from distillery.config.load import load_params
from distillery.config.renamed import rename_old_keys
from distillery.config.schema import Params
from distillery.errors import UserError
from distillery.files import Paths, atomic_write, matching_files, read_yaml, repository_root
from distillery.pipeline.environment import set_environment

COPIED_PATHS = ("dvc.yaml", ".dvc/config", ".dvc/.gitignore", ".dvc/plots", ".dvcignore", "notebooks", "src", "tasks")
PUBLISHED_TABLE = "reports/plots/published.csv"


def merge_overlay(base: Any, overlay: Any) -> Any:
    """`base` with the values of `overlay` laid over it.

    Sections are merged key by key, and null removes a key. A list is replaced as a whole, unless the overlay is a
    section whose keys are positions in the list.
    """
    if isinstance(overlay, dict) and isinstance(base, dict):
        merged = {
            key: value for key, value in base.items() if overlay.get(key, value) is not None or key not in overlay
        }
        changed = {key: merge_overlay(base.get(key), value) for key, value in overlay.items() if value is not None}
        return merged | changed
    positions = isinstance(overlay, dict) and overlay and all(isinstance(key, int) for key in overlay)
    if positions and isinstance(base, list):
        return [merge_overlay(item, overlay[i]) if i in overlay else item for i, item in enumerate(base)]
    return overlay


def load_recipe(root: Path, name: str, scale: str | None = None) -> dict[str, Any]:
    """The content of `recipes/<name>.yaml`, with its overlay `scale` laid over it.

    Raises UserError for an unknown recipe or scale, with the names of the existing ones.
    """
    path = root / "recipes" / f"{name}.yaml"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
        raise UserError(f"recipes/{name}.yaml: no such recipe; there are: {known or 'none'}")
    raw = rename_old_keys(read_yaml(path), f"recipes/{name}.yaml")
    scales = raw.pop("scale", None) or {}
    if scale is None:
        return raw
    if scale not in scales:
        raise UserError(f"recipes/{name}.yaml: no scale `{scale}`; there are: {', '.join(scales) or 'none'}")
    return merge_overlay(raw, rename_old_keys(scales[scale], f"recipes/{name}.yaml, scale {scale}"))


def prepare_recipe(root: Path, name: str, scale: str | None = None) -> Path:
    """The recipe's own folder, brought up to date; results of an earlier run stay.

    Raises UserError, also for a file that the user has to bring and that is not there.
    """
    folder, raw = Paths(root).cache / "recipes" / (f"{name}-{scale}" if scale else name), load_recipe(root, name, scale)
    for file in _corpora(raw):
        if not any((root / path).exists() for path in matching_files(root, file)):
            raise UserError(f"recipes/{name}.yaml: {file}: no such file; the recipe needs: {_needs(raw)}")
    return prepare_folder(root, raw, folder, name)


def _needs(raw: dict[str, Any]) -> str:
    return (raw.get("recipe") or {}).get("needs") or "this file"


def prepare_folder(
    root: Path, raw: dict[str, Any], folder: Path, name: str, added: Mapping[str, bytes] | None = None
) -> Path:
    """`folder` with all files that the experiment `raw` needs. Raises UserError naming the recipe and the key.

    added: content of files that the repository does not have, by their path in `folder`.
    """
    for part in (*COPIED_PATHS, *(file for name in _corpora(raw) for file in matching_files(root, name))):
        _copy_changed(root / part, folder / part)
    for path, content in (added or {}).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    # DVC works without git in there, and the history of the repository is not concerned
    (folder / ".dvc" / "config.local").write_text("[core]\n    no_scm = true\n")
    for shared in (".cache/models", ".cache/answers"):
        if not (folder / shared).exists():
            (folder / shared).parent.mkdir(exist_ok=True)
            (root / shared).mkdir(parents=True, exist_ok=True)
            (folder / shared).symlink_to(root / shared)
    yaml = YAML(typ="safe", pure=True)
    yaml.width = 10_000  # a key with spaces that is divided into two lines cannot be read
    yaml.sort_base_mapping_type_on_output = False  # an untrained model is named after the first student
    with atomic_write(folder / "params.yaml") as path, path.open("w", encoding="utf-8") as file:
        yaml.dump(raw, file)
    try:
        load_params(folder / "params.yaml")
    except UserError as mistake:
        raise UserError(str(mistake).replace("params.yaml", f"recipes/{name}.yaml", 1)) from None
    return folder


def _corpora(raw: dict[str, Any]) -> list[str]:
    """The files in the repository that the recipe reads."""
    sources = [source for source in raw.get("data", {}).values() if isinstance(source, dict)]
    files = [source["source"] for source in sources if source.get("source")]
    files += [file for source in sources if not source.get("source") for file in (source.get("splits") or {}).values()]
    files += [file for model in raw.get("models", {}).values() for file in (model.get("random") or {}).get("words", [])]
    files += [
        file for spec in raw.get("teachers", {}).values() for file in (spec.get("answers") or {}).get("files", [])
    ]
    return [file for file in dict.fromkeys(files) if not file.startswith("hub:") and not Path(file).is_absolute()]


def _copy_changed(source: Path, target: Path) -> None:
    """Copy the file or folder `source`: only files that differ, so that a file's time shows when it changed."""
    if source.is_dir():
        files = {p.relative_to(source) for p in source.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
        for stale in [p for p in target.rglob("*") if p.is_file() and p.relative_to(target) not in files]:
            stale.unlink()
        for file in files:
            _copy_changed(source / file, target / file)
    elif source.exists() and (not target.exists() or target.read_bytes() != source.read_bytes()):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def recipe_steps(params: Params) -> list[list[str]]:
    """The commands that run the recipe, as arguments of Python."""
    repro = ["-m", "dvc", "repro"]
    return [[*repro, "inputs"], ["-m", "distillery", "search", "--write"], repro] if params.search else [repro]


def run_recipe(folder: Path, output: TextIO | None = None, stages: Sequence[str] = ()) -> int:
    """Run the recipe prepared in `folder` on this Python; returns the exit status of the first failed step, or 0.

    output: where its steps print, standard output when not given. stages: those to run, with all that they need; all
    stages when empty.
    """
    set_environment()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(folder / "src")}
    environment.pop("DVC_STAGE", None)
    steps = recipe_steps(load_params(folder / "params.yaml"))
    for step in [*steps[:-1], [*steps[-1], *stages]]:
        if status := subprocess.run([sys.executable, *step], cwd=folder, env=environment, stdout=output).returncode:
            return status
    return 0


def run_recipe_command(name: str, scale: str | None = None) -> None:
    """Prepare the recipe's folder, run the recipe, and print the published scores beside its own. Raises UserError."""
    root = repository_root()
    folder, started = prepare_recipe(root, name, scale), time.perf_counter()
    print(f"{name}: runs in {folder.relative_to(root)}; params.yaml and its results stay as they are", flush=True)
    if status := run_recipe(folder):
        sys.exit(status)
    print(f"{name}: {time.perf_counter() - started:.0f} s; {folder.relative_to(root)}/reports/index.html")
    if (folder / PUBLISHED_TABLE).exists():
        import pandas as pd

        print(pd.read_csv(folder / PUBLISHED_TABLE).to_string(index=False, na_rep="", float_format="{:.4f}".format))
    recipe = load_params(folder / "params.yaml").recipe
    for setting, text in recipe.differences.items() if recipe else ():
        print(f"differs from the source: {setting}: {text}")
