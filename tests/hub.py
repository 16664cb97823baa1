"""A model and data hub on this machine: it answers the requests of `huggingface_hub` and `datasets` from memory."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import tiny

OWNER = "me"  # whose token `TOKEN` is
LARGE = (
    ".safetensors",
    ".bin",
    ".parquet",
    ".onnx",
    ".gguf",
)  # stored outside of git there: named by their sha256, served elsewhere
TOKEN = "hf_let_me_in"


@dataclass
class Repo:
    """files: path -> content. branches: names that stand for its one commit. others: its other commits.

    fault: `gated` (401 without token, 403 with one that was not let in), `private` (looks as if it did not exist),
    `truncated` (a large file ends early), `altered` (a large file's content differs from its checksum).
    """

    files: dict[str, bytes]
    fault: str = ""
    branches: tuple[str, ...] = ("main",)
    others: tuple[Repo, ...] = ()
    private: bool = False
    commit: str = field(init=False)

    def __post_init__(self) -> None:
        listing = json.dumps(
            {path: hashlib.sha256(content).hexdigest() for path, content in sorted(self.files.items())}
        )
        self.commit = hashlib.sha1(listing.encode()).hexdigest()

    def at(self, revision: str) -> Repo | None:
        commits = (self, *self.others)
        return next((one for one in commits if revision in (one.commit, *one.branches)), None)

    def entry(self, path: str) -> dict[str, Any]:
        content = self.files[path]
        entry = {"type": "file", "path": path, "size": len(content), "oid": blob(content)}
        if path.endswith(LARGE):
            digest = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
        return entry


def blob(content: bytes) -> str:
    """git's name for a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def folder(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


class Hub(BaseHTTPRequestHandler):
    """repos: what the hub holds, by name. requests: a line for each that it got. stored: large files, by sha256."""

    protocol_version = "HTTP/1.1"
    repos: dict[str, Repo]
    requests: list[str]
    stored: dict[str, bytes]

    def do_GET(self) -> None:
        self.requests.append(f"{self.command} {self.path}")
        path, _, query = self.path.partition("?")
        path = unquote(path)
        try:
            self.answer(path, parse_qs(query))
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self, path: str, query: dict[str, list[str]]) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) if self.command in ("POST", "PUT") else b""
        if self.receives(path, body):
            return
        if path.startswith("/storage/"):
            name, _, file = path.removeprefix("/storage/").partition("/-/")
            name, _, commit = name.partition("@")
            return self.content(self.repos[name].at(commit), file)
        api = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/(.+))?", path)
        file = re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+|refs/[^/]+/[^/]+)/(.+)", path)
        if not api and not file:
            return self.send_json(404, {"error": "not found"})
        name = file[1] if file else ("datasets/" if api[1] == "datasets" else "") + api[2]
        repo = self.repos.get(name)
        if repo is None or ((repo.private or repo.fault == "private") and not self.is_authorized()):
            return self.send_json(401 if repo is None else 404, {"error": "Repository not found"}, "RepoNotFound")
        revision = file[2] if file else re.match(r"refs/[^/]+/[^/]+|[^/]+", api[4] or "main")[0]
        repo = repo.at(revision)
        if repo is None:
            return self.send_json(404, {"error": f"Invalid rev id: {revision}"}, "RevisionNotFound")
        if repo.fault == "gated" and (file or api[3]):
            status = 403 if self.headers.get("Authorization") else 401
            return self.send_json(status, {"error": f"Access to {name} is restricted"}, "GatedRepo")
        if file:
            return self.resolve(name, repo, file[3])
        if api[3] == "tree":
            return self.list_files(repo, api[4].removeprefix(revision).strip("/"), query)
        if api[3] == "paths-info":
            try:
                wanted = json.loads(body)["paths"]
            except ValueError:
                wanted = parse_qs(body.decode())["paths"]
            return self.send_json(200, [repo.entry(p) for p in wanted if p in repo.files])
        siblings = [{"rfilename": p} for p in repo.files]
        info = {"id": name.removeprefix("datasets/"), "sha": repo.commit, "siblings": siblings}
        self.send_json(
            200, info | {"private": repo.private, "gated": False, "disabled": False, "tags": [], "downloads": 0}
        )

    def receives(self, path: str, body: bytes) -> bool:
        """Answer a request of an upload; False where it is none. A private repository's owner alone sees it."""
        upload = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main|/([^/]+/[^/]+)\.git/.*/batch", path)
        if path == "/api/validate-yaml":
            self.send_json(200, {"errors": [], "warnings": []})
        elif path.startswith("/lfs/"):
            if self.command == "PUT":  # as at the storage of a hub, the address alone lets in
                self.stored[path.removeprefix("/lfs/")] = body
            self.send_json(200, {})
        elif not upload and path != "/api/repos/create":
            return False
        elif not self.is_authorized():
            self.send_json(401, {"error": "Invalid credentials in Authorization header"}, "Unauthorized")
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif (name := upload[1] or upload[3]).partition("/")[0] != OWNER:
            self.send_json(403, {"error": "Forbidden: you must use a write token"}, "Forbidden")
        elif upload[3]:
            self.send_json(200, {"objects": [self.storage(entry) for entry in json.loads(body)["objects"]]})
        elif upload[2] == "preupload":
            sent = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith(LARGE) else "regular" for path in sent}
            files = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
            self.send_json(200, {"files": files})
        else:
            self.commit(name, [json.loads(line) for line in body.splitlines()])
        return True

    def create(self, request: dict[str, Any]) -> None:
        name = f"{request['organization']}/{request['name']}"
        if request["organization"] != OWNER:
            return self.send_json(403, {"error": "You don't have the rights to create a model there"}, "Forbidden")
        if name in self.repos:
            return self.send_json(409, {"error": "You already created this model repo", "url": f"/{name}"})
        self.repos[name] = Repo({".gitattributes": b""}, private=request["visibility"] == "private")
        self.send_json(200, {"url": f"http://{self.headers['Host']}/{name}"})

    def storage(self, entry: dict[str, Any]) -> dict[str, Any]:
        """What a client does to store a large file: nothing if it is there."""
        if entry["oid"] in self.stored:
            return entry
        address = f"http://{self.headers['Host']}/lfs/{entry['oid']}"
        return entry | {"actions": {"upload": {"href": address}, "verify": {"href": address}}}

    def commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        old = self.repos[name]
        files = dict(old.files)
        for line in lines[1:]:  # after the header
            path = line["value"]["path"]
            if line["key"] == "deletedFile":
                del files[path]
            elif line["key"] == "lfsFile":
                files[path] = self.stored[line["value"]["oid"]]
            else:
                files[path] = base64.b64decode(line["value"]["content"])
        self.repos[name] = new = Repo(files, private=old.private)
        address = f"http://{self.headers['Host']}/{name}/commit/{new.commit}"
        self.send_json(200, {"success": True, "commitOid": new.commit, "commitUrl": address})

    def list_files(self, repo: Repo, below: str, query: dict[str, list[str]]) -> None:
        paths = [p for p in repo.files if p.startswith(below + "/" if below else "")]
        if below and not paths:
            return self.send_json(404, {"error": "no such folder"}, "EntryNotFound")
        entries = [repo.entry(p) for p in paths]
        folders = {p.rsplit("/", 1)[0] for p in paths if "/" in p}
        entries += [{"type": "directory", "path": p, "size": 0, "oid": "0" * 40} for p in sorted(folders)]
        if "recursive" not in query or query["recursive"] == ["False"]:
            depth = below.count("/") + 1 if below else 0
            entries = [e for e in entries if e["path"].count("/") == depth]
        self.send_json(200, entries)

    def is_authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def resolve(self, name: str, repo: Repo, file: str) -> None:
        if file not in repo.files:
            return self.send_json(404, {"error": "Entry not found"}, "EntryNotFound")
        entry = repo.entry(file)
        if "lfs" not in entry:
            return self.content(repo, file)
        linked = {"X-Linked-Size": str(entry["size"]), "X-Linked-Etag": f'"{entry["lfs"]["oid"]}"'}
        headers = {"Location": f"/storage/{name}@{repo.commit}/-/{file}", "X-Repo-Commit": repo.commit, **linked}
        self.send_json(302, {}, **headers)

    def content(self, repo: Repo, file: str) -> None:
        body = repo.files[file]
        large = file.endswith(LARGE)
        if large and repo.fault == "altered":
            body = body[:-1] + bytes([body[-1] ^ 1])
        etag = hashlib.sha256(repo.files[file]).hexdigest() if large else blob(body)
        start = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(start[1]) if start else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": repo.commit, "Content-Length": str(len(body) - start)}
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if large and repo.fault == "truncated":
            self.wfile.write(body[start : start + (len(body) - start) // 2])
            self.close_connection = True
        else:
            self.wfile.write(body[start:])

    def send_json(self, status: int, body: Any, error: str = "", **headers: str) -> None:
        content = json.dumps(body).encode()
        if error:
            headers |= {"X-Error-Code": error, "X-Error-Message": body["error"]}
        self.send_response(status)
        for key, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
            **headers,
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(repos: dict[str, Repo]) -> Iterator[tuple[str, list[str]]]:
    """The address of a hub that holds `repos` (`owner/name` or `datasets/owner/name`), and the requests that it got."""
    requests: list[str] = []
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), type("Hub", (Hub,), {"repos": repos, "requests": requests, "stored": {}})
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()


# Fetches every job (kind, name, section, options) that it reads as JSON, and prints the results as JSON.
SCRIPT = """
import json, os, sys, time
from pathlib import Path
from distillery.config.schema import ModelConfig, SourceConfig
from distillery.errors import UserError
given = json.loads(sys.stdin.read())
cache, results = Path(given["cache"]), []
time.sleep = lambda seconds: None  # the client waits before it tries again
for kind, name, spec, options in given["jobs"]:
    os.environ.pop("HF_TOKEN", None)
    if options and "token" in options:
        os.environ["HF_TOKEN"] = options.pop("token")
    try:
        if kind == "model":
            from distillery.models.fetch import fetch_model
            from distillery.models.load import load_model, load_tokenizer
            folder = fetch_model(name, ModelConfig(**spec), cache)
            result = {"files": sorted(path.name for path in folder.iterdir())}
            if options:
                model = load_model(folder, options["arch"], labels=["a", "b"])
                result |= {"class": type(model).__name__, "pad": load_tokenizer(folder).pad_token}
        else:
            from distillery.data.prepare import prepare_source
            from distillery.tasks.schema import load_task
            prepared = prepare_source(name, SourceConfig(**spec), load_task(spec["task"]), Path("."))
            counts = {split: counts["rows"] for split, counts in prepared.audit["splits"].items()}
            result = {"rows": counts, "labels": sorted({*prepared.rows["label"]} - {None})}
        results.append(result)
    except UserError as error:
        results.append({"error": str(error)})
print("\\n" + json.dumps(results))
"""


def fetch(url: str, home: Path, jobs: list[tuple]) -> list[dict[str, Any]]:
    """The result of each job (kind, name, section, options), all in one process whose hub is at `url`."""
    given = {"cache": str(home / "models"), "jobs": jobs}
    return json.loads(run_with_hub(url, home, SCRIPT, given, tiny.ROOT).splitlines()[-1])


def run_with_hub(url: str, home: Path, script: str, given: Any, folder: Path) -> str:
    """What `script` prints in a process whose hub is at `url`; it reads `given` as JSON."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    clean |= {"HF_ENDPOINT": url, "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    clean |= {"HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(tiny.ROOT / "src"), "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(given),
        cwd=folder,
        env=clean,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def parquet(rows: list[dict], labels: dict[str, list[str]] | None = None) -> bytes:
    """A table as a hub stores it; `labels` names the integers of a column."""
    import datasets

    table = datasets.Dataset.from_list(rows)
    for column, names in (labels or {}).items():
        table = table.cast_column(column, datasets.ClassLabel(names=names))
    buffer = io.BytesIO()
    table.to_parquet(buffer)
    return buffer.getvalue()
