"""A model and data hub on this machine: what `huggingface_hub` and `datasets` ask a real one, answered from memory."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

LARGE = (".safetensors", ".bin", ".parquet")  # kept outside of git there: told by their sha256, served elsewhere
TOKEN = "hf_let_me_in"


@dataclass
class Repo:
    """files: path -> content. branches: names that stand for its one commit.

    fault: `gated` (401 without token, 403 with one that was not let in), `private` (looks as if it were not there),
    `truncated` (a large file ends early), `altered` (a large file's content is not what its checksum says).
    """

    files: dict[str, bytes]
    fault: str = ""
    branches: tuple[str, ...] = ("main",)
    commit: str = field(init=False)

    def __post_init__(self) -> None:
        told = json.dumps({path: hashlib.sha256(content).hexdigest() for path, content in sorted(self.files.items())})
        self.commit = hashlib.sha1(told.encode()).hexdigest()

    def entry(self, path: str) -> dict[str, Any]:
        content = self.files[path]
        out = {"type": "file", "path": path, "size": len(content), "oid": blob(content)}
        if path.endswith(LARGE):
            digest = hashlib.sha256(content).hexdigest()
            out["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
        return out


def blob(content: bytes) -> str:
    """git's name for a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def folder(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@contextmanager
def serving(repos: dict[str, Repo]) -> Iterator[tuple[str, list[str]]]:
    """The address of a hub that holds `repos` (`owner/name`, a data set as `datasets/owner/name`), and its log."""
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked.append(f"{self.command} {self.path}")
            path, _, query = self.path.partition("?")
            path = unquote(path)
            try:
                self.answer(path, parse_qs(query))
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        do_HEAD = do_POST = do_GET

        def answer(self, path: str, query: dict[str, list[str]]) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) if self.command == "POST" else b""
            if path.startswith("/storage/"):
                name, _, file = path.removeprefix("/storage/").partition("/-/")
                return self.content(repos[name], file)
            api = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/(.+))?", path)
            file = re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+|refs/[^/]+/[^/]+)/(.+)", path)
            if not api and not file:
                return self.say(404, {"error": "not found"})
            name = file[1] if file else ("datasets/" if api[1] == "datasets" else "") + api[2]
            repo = repos.get(name)
            if repo is None or (repo.fault == "private" and not self.trusted()):
                return self.say(401 if repo is None else 404, {"error": "Repository not found"}, "RepoNotFound")
            revision = file[2] if file else re.match(r"refs/[^/]+/[^/]+|[^/]+", api[4] or "main")[0]
            if revision not in (repo.commit, *repo.branches):
                return self.say(404, {"error": f"Invalid rev id: {revision}"}, "RevisionNotFound")
            if repo.fault == "gated" and (file or api[3]):
                status = 403 if self.headers.get("Authorization") else 401
                return self.say(status, {"error": f"Access to {name} is restricted"}, "GatedRepo")
            if file:
                return self.resolve(name, repo, file[3])
            if api[3] == "tree":
                below = api[4].removeprefix(revision).strip("/")
                paths = [p for p in repo.files if p.startswith(below + "/" if below else "")]
                if below and not paths:
                    return self.say(404, {"error": "no such folder"}, "EntryNotFound")
                entries = [repo.entry(p) for p in paths]
                folders = {p.rsplit("/", 1)[0] for p in paths if "/" in p}
                entries += [{"type": "directory", "path": p, "size": 0, "oid": "0" * 40} for p in sorted(folders)]
                if "recursive" not in query or query["recursive"] == ["False"]:
                    depth = below.count("/") + 1 if below else 0
                    entries = [e for e in entries if e["path"].count("/") == depth]
                return self.say(200, entries)
            if api[3] == "paths-info":
                try:
                    wanted = json.loads(body)["paths"]
                except ValueError:
                    wanted = parse_qs(body.decode())["paths"]
                return self.say(200, [repo.entry(p) for p in wanted if p in repo.files])
            siblings = [{"rfilename": p} for p in repo.files]
            about = {"id": name.removeprefix("datasets/"), "sha": repo.commit, "siblings": siblings}
            self.say(200, about | {"private": False, "gated": False, "disabled": False, "tags": [], "downloads": 0})

        def trusted(self) -> bool:
            return self.headers.get("Authorization") == f"Bearer {TOKEN}"

        def resolve(self, name: str, repo: Repo, file: str) -> None:
            if file not in repo.files:
                return self.say(404, {"error": "Entry not found"}, "EntryNotFound")
            entry = repo.entry(file)
            if "lfs" not in entry:
                return self.content(repo, file)
            linked = {"X-Linked-Size": str(entry["size"]), "X-Linked-Etag": f'"{entry["lfs"]["oid"]}"'}
            more = {"Location": f"/storage/{name}/-/{file}", "X-Repo-Commit": repo.commit, **linked}
            self.say(302, {}, **more)

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

        def say(self, status: int, body: Any, error: str = "", **headers: str) -> None:
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

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
