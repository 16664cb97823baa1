"""`distillery push`: upload the model folder of a student, with its card, to a model hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from distillery.deploy.predictors import EXPORT_FILES, EXPORTS_FILE, read_exports
from distillery.deploy.settings import SETTINGS_FILE, model_folder, read_settings
from distillery.errors import UserError

CARD_FILE = "README.md"
MODEL_FILES = (  # as `transformers` names them
    *("config.json", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors"),
    *("model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    *("model.series.safetensors", "model.series-*-of-*.safetensors"),
    *("model.safetensors.index.series.json", "series_adapters.safetensors"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.model"),
)
OWN_FILES = (CARD_FILE, SETTINGS_FILE)
HUB_FILE = ".gitattributes"  # which a hub makes
TOKEN_VARIABLE = "HF_TOKEN"
TOKEN_PAGE = "https://huggingface.co/settings/tokens"


def push_student(student: Path, repo: str, public: bool = False) -> list[str]:
    """Upload the model folder of `student` to the repository `repo` (`user/name`) of a hub, as one commit.

    The token is that of the variable HF_TOKEN, the hub that of HF_ENDPOINT. The repository is made if it is not there:
    private, unless `public`. Files of an earlier student that the folder no longer has are deleted in it.
    Returns lines that say what was uploaded where. Raises UserError with one line, before anything is uploaded: for a
    folder that is not whole, or holds other files; and for what the hub refuses.
    """
    folder = model_folder(student)
    files = student_files(folder)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"{repo}: no name of a repository; it has the form user/name")
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    if not token:
        raise UserError(f"{TOKEN_VARIABLE} is not set: make a token that may write at {TOKEN_PAGE}, and export it")
    if not token.isascii() or re.search(r"\s", token):
        raise UserError(f"{TOKEN_VARIABLE}: no token: it has a space or a letter that no token has")
    try:
        return _upload(folder, files, repo, public, token)
    except UserError:
        raise
    except Exception as error:  # the client has many classes of errors, and wraps some in others
        raise UserError(f"{repo}: {_reason(error, repo).replace(token, '…')}") from None


def student_files(folder: Path) -> list[str]:
    """The paths of all files in a model `folder`, which are those of a student.

    Raises UserError for a folder without card or weights, with a file that belongs to no student, or with exports of
    other weights.
    """
    read_settings(folder)
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    if CARD_FILE not in paths:
        raise UserError(f"{folder}: no model card ({CARD_FILE}); the evaluation writes it: run `dvc repro`")
    if not any(path.endswith(".safetensors") for path in paths):
        raise UserError(f"{folder}: no weights in it")
    if others := [path for path in paths if not _belongs(path)]:
        number = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise UserError(f"{folder}: {others[0]}{number}: no file of a model; move it out of the folder")
    for kind in EXPORT_FILES:
        read_exports(folder, kind)
    return paths


def _belongs(path: str) -> bool:
    """Whether a student's folder may have the file `path`."""
    kind, _, name = path.rpartition("/")
    if kind:
        return kind in EXPORT_FILES and name in (EXPORTS_FILE, *EXPORT_FILES[kind].values())
    return any(fnmatch(path, pattern) for pattern in (*MODEL_FILES, *OWN_FILES))


def _upload(folder: Path, files: list[str], repo: str, public: bool, token: str) -> list[str]:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=token)
    api.create_repo(repo, private=not public, exist_ok=True)
    info = api.model_info(repo)
    if not info.private and not public:
        raise UserError(f"{repo} is public already: give --public to upload there, or another name")
    there = [file.rfilename for file in info.siblings or [] if file.rfilename != HUB_FILE]
    outdated = [path for path in there if path not in files and _belongs(path)]
    operations: list[Any] = [CommitOperationAdd(path, folder / path) for path in files]
    operations += [CommitOperationDelete(path) for path in outdated]
    name = folder.parent.name if folder.name == "model" else folder.name
    commit = api.create_commit(repo, operations, commit_message=f"Upload {name}")
    sizes = {path: (folder / path).stat().st_size for path in files}
    return [
        *(f"{size / 1e6:10.3f} MB  {path}" for path, size in sizes.items()),
        *(f"     deleted   {path}" for path in outdated),
        *(f"    kept there {path}" for path in there if path not in files and path not in outdated),
        f"{len(files)} files, {sum(sizes.values()) / 1e6:.1f} MB, {'public' if not info.private else 'private'}: "
        f"{commit.commit_url}",
    ]


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _reason(error: Exception, repo: str) -> str:
    """Why the hub or the network refused, in one line."""
    import httpx2
    from huggingface_hub import errors

    for cause in _causes(error):
        if isinstance(cause, errors.OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set: nothing is uploaded"
        if isinstance(cause, errors.HfHubHTTPError) and cause.response is not None:
            status = cause.response.status_code
            if status == 401:
                return f"the hub does not know the token in {TOKEN_VARIABLE} (401); make another at {TOKEN_PAGE}"
            if status == 403:
                return f"the token in {TOKEN_VARIABLE} may not write there (403); it needs the right to write to {repo}"
        if isinstance(cause, httpx2.TransportError):
            from huggingface_hub import constants

            return f"no network: {constants.ENDPOINT} cannot be reached"
    return (str(error).strip() or type(error).__name__).splitlines()[0]
