"""A published system run as a recipe: ``distillery recipe pkd-albert --scale small``.

A recipe runs in a folder of its own, `.cache/recipes/<name>` (or `<name>-<scale>`): a copy of the code, notebooks,
tasks and corpora as they are now, with the recipe as its params.yaml and with its own DVC cache. So the experiment in
force and what it wrote stay as they are, and recipes may run side by side. Shared are fetched models, and the
store of answers: what one recipe has paid for, another one does not buy again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from distillery.config.load import load_params
from distillery.config.renamed import rename_old_keys
from distillery.errors import UserError
from distillery.files import atomic_write, read_yaml, repository_root

COPIED_PATHS = ("dvc.yaml", ".dvc/config", ".dvc/.gitignore", ".dvc/plots", ".dvcignore", "notebooks", "src", "tasks")


PUBLISHED_TABLE = "reports/plots/published.csv"


def merge_overlay(base: Any, over: Any) -> Any:
    """`base` with what `over` says instead: sections key by key, null takes a key away, a list is replaced as a whole
    unless `over` is a section whose keys are positions in it."""
    if isinstance(over, dict) and isinstance(base, dict):
        out = {key: value for key, value in base.items() if over.get(key, value) is not None or key not in over}
        return out | {key: merge_overlay(base.get(key), value) for key, value in over.items() if value is not None}
    if isinstance(over, dict) and isinstance(base, list) and over and all(isinstance(key, int) for key in over):
        return [merge_overlay(item, over[i]) if i in over else item for i, item in enumerate(base)]
    return over


def load_recipe(root: Path, name: str, scale: str | None = None) -> dict[str, Any]:
    """The content of `recipes/<name>.yaml`, with its overlay `scale` laid over it.

    Raises UserError naming the recipes or scales there are.
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
    """The recipe's own folder, brought up to date; what it wrote before stays. Raises UserError."""
    folder = root / ".cache" / "recipes" / (f"{name}-{scale}" if scale else name)
    return prepare_folder(root, load_recipe(root, name, scale), folder, name)


def prepare_folder(root: Path, raw: dict[str, Any], folder: Path, name: str) -> Path:
    """`folder` with all that the experiment `raw` needs. Raises UserError naming the recipe and the key."""
    for part in (*COPIED_PATHS, *_corpora(raw)):
        source, target = root / part, folder / part
        if source.is_dir():
            wanted = {p.relative_to(source) for p in source.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
            for old in [p for p in target.rglob("*") if p.is_file() and p.relative_to(target) not in wanted]:
                old.unlink()
            for file in wanted:
                _copy_changed(source / file, target / file)
        elif source.exists():
            _copy_changed(source, target)
    # no git in there: DVC works without, and the repository's own history is not concerned
    (folder / ".dvc" / "config.local").write_text("[core]\n    no_scm = true\n")
    for shared in (".cache/models", ".cache/answers"):
        if not (folder / shared).exists():
            (folder / shared).parent.mkdir(exist_ok=True)
            (root / shared).mkdir(parents=True, exist_ok=True)
            (folder / shared).symlink_to(root / shared)
    with atomic_write(folder / "params.yaml") as path, path.open("w", encoding="utf-8") as file:
        YAML(typ="safe", pure=True).dump(raw, file)
    try:
        load_params(folder / "params.yaml")
    except UserError as mistake:
        raise UserError(str(mistake).replace("params.yaml", f"recipes/{name}.yaml", 1)) from None
    return folder


def _corpora(raw: dict[str, Any]) -> list[str]:
    """The files in the repository that the recipe reads."""
    named = [source.get("source", "") for source in raw.get("data", {}).values() if isinstance(source, dict)]
    named += [file for model in raw.get("models", {}).values() for file in (model.get("random") or {}).get("words", [])]
    return [file for file in dict.fromkeys(named) if not file.startswith("hub:") and not Path(file).is_absolute()]


def _copy_changed(source: Path, target: Path) -> None:
    """Only what differs, so that a file's time says when it changed."""
    if not target.exists() or target.read_bytes() != source.read_bytes():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def run_recipe(folder: Path) -> int:
    """`dvc repro` in the recipe's folder, on this Python; its exit status."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    environment.pop("DVC_STAGE", None)
    return subprocess.run([sys.executable, "-m", "dvc", "repro"], cwd=folder, env=environment).returncode


def run_recipe_command(name: str, scale: str | None = None) -> None:
    """Prepare the recipe's folder, run it, and show the source's table. Raises UserError."""
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
    for line in recipe.differences if recipe else []:
        print(f"differs from the source: {line}")
