"""A student uploaded to a hub through the real client, fetched from there, and used; what is refused, in one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hub
import tiny
from deployed import rows, write_student
from distillery.deploy.predict import PredictOptions, predict_file
from distillery.deploy.push import push_student, student_files
from distillery.errors import UserError

CARD = "---\nlibrary_name: transformers\n---\n# s\n"
LATER = "# another card"

# Runs the command for every job (name, arguments, token) that it reads as JSON, with every library's log; between them,
# `fetch` brings a repository into a folder and `touch` writes a file.
SCRIPT = """
import contextlib, io, json, logging, os, sys
from pathlib import Path
from distillery.cli import main
given, results, log = json.loads(sys.stdin.read()), {}, io.StringIO()
logging.basicConfig(level=logging.DEBUG, stream=log)
os.environ["HF_DEBUG"] = "1"
for name, arguments, token in given:
    os.environ.pop("HF_TOKEN", None)
    if token is not None:
        os.environ["HF_TOKEN"] = token
    if arguments[0] == "fetch":
        from huggingface_hub import snapshot_download
        snapshot_download(arguments[1], local_dir=arguments[2])
        continue
    if arguments[0] == "touch":
        Path(arguments[1]).write_text(arguments[2])
        continue
    if arguments[0] == "remove":
        Path(arguments[1]).unlink()
        continue
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(log):
        try:
            main(arguments)
            results[name] = output.getvalue()
        except SystemExit as end:
            results[name] = str(end.code)
print("\\n" + json.dumps(results | {"log": log.getvalue()}))
"""


@pytest.fixture(scope="module")
def folder(tiny_models, tmp_path_factory) -> Path:
    """The model folder of a finished student, as the evaluation leaves it."""
    path = tmp_path_factory.mktemp("runs") / "s-0/model"
    write_student(tiny_models / "tiny-bert", path)
    (path / "README.md").write_text(CARD)
    (path / "merges.txt").write_text("a file that a later student does not have")
    return path


def repos() -> dict[str, hub.Repo]:
    return {
        "me/shown": hub.Repo({"README.md": b"", "notes.md": b"mine"}),
        "them/shown": hub.Repo({"README.md": b""}),
    }


@pytest.fixture(scope="module")
def pushed(folder, tmp_path_factory):
    """The output of each command below, the folder as fetched, the repositories and the requests; in one process."""
    home, held, student = tmp_path_factory.mktemp("home"), repos(), str(folder.parent)
    fetched = home / "fetched"
    card, merges = str(folder / "README.md"), str(folder / "merges.txt")
    jobs = [
        ("first", ["push", student, "me/s"], hub.TOKEN),
        ("fetch", ["fetch", "me/s", str(fetched)], hub.TOKEN),
        ("change", ["touch", card, CARD + LATER], None),
        ("leave out", ["remove", merges], None),
        ("second", ["push", str(folder), "me/s"], f" {hub.TOKEN}\n"),
        ("same", ["push", student, "me/s"], hub.TOKEN),
        ("no token", ["push", student, "me/t"], None),
        ("empty token", ["push", student, "me/t"], " "),
        ("no such letter", ["push", student, "me/t"], "hf_é"),
        ("wrong token", ["push", student, "me/t"], "hf_wrong"),
        ("no rights", ["push", student, "them/t"], hub.TOKEN),
        ("no rights there", ["push", student, "them/shown", "--public"], hub.TOKEN),
        ("public already", ["push", student, "me/shown"], hub.TOKEN),
        ("public", ["push", student, "me/shown", "--public"], hub.TOKEN),
        ("no name", ["push", student, "me"], hub.TOKEN),
        ("not allowed as a name", ["push", student, "me/a--b"], hub.TOKEN),
    ]
    with hub.serving(held) as (url, requests):
        results = json.loads(hub.run_with_hub(url, home, SCRIPT, jobs, tiny.ROOT).splitlines()[-1])
        results = {name: text.replace(url, "URL") for name, text in results.items()}
    return results, fetched, held, requests


def test_a_pushed_student_is_fetched_whole_and_predicts_the_same(pushed, folder, tmp_path):
    fetched = pushed[1]
    sent = {path: content for path, content in hub.folder(fetched).items() if not path.startswith(".")}
    assert sent["README.md"] == CARD.encode() and "merges.txt" in sent
    here = hub.folder(folder)
    assert {p: sent[p] for p in sent if p not in ("README.md", "merges.txt")} == {
        p: here[p] for p in here if p != "README.md"
    }
    rows(12).to_csv(tmp_path / "i.csv", index=False)
    for student, name in ((folder, "here.csv"), (fetched, "there.csv")):
        predict_file(student, PredictOptions(str(tmp_path / "i.csv"), str(tmp_path / name), threads=1))
    assert (tmp_path / "here.csv").read_bytes() == (tmp_path / "there.csv").read_bytes()


def test_it_is_private_and_every_file_is_listed_with_the_address(pushed, folder):
    results, _, held, _ = pushed
    assert held["me/s"].private and not held["me/shown"].private
    lines = results["first"].splitlines()
    assert [line.split()[-1] for line in lines[:-1]] == sorted([*hub.folder(folder), "merges.txt"])
    number = len(lines) - 1
    assert lines[-1].startswith(f"{number} files, ") and " MB, private: URL/me/s/commit/" in lines[-1]


def test_a_second_push_is_one_commit_that_deletes_what_the_folder_no_longer_has(pushed, folder):
    results, _, held, requests = pushed
    assert "     deleted   merges.txt" in results["second"].splitlines()
    assert set(held["me/s"].files) == {*hub.folder(folder), ".gitattributes"}
    assert held["me/s"].files["README.md"].decode() == CARD + LATER
    commits = [line for line in requests if "/me/s/commit/" in line]
    assert len(commits) == 3 and sum(line.startswith("PUT /lfs/") for line in requests) == 1  # one weights file, once
    assert ".gitattributes" not in results["same"]  # the hub's own


def test_files_of_others_stay_in_a_repository_that_was_there(pushed):
    results, _, held, _ = pushed
    assert held["me/shown"].files["notes.md"] == b"mine" and "    kept there notes.md" in results["public"].splitlines()
    assert " MB, public: URL/me/shown/commit/" in results["public"]


NOT_SET = "HF_TOKEN is not set: make a token that may write at https://huggingface.co/settings/tokens, and export it"
NO_RIGHTS = "the token in HF_TOKEN may not write there (403); it needs the right to write to"
LINES = {
    "no token": f"error: {NOT_SET}",
    "empty token": f"error: {NOT_SET}",
    "no such letter": "error: HF_TOKEN: no token: it has a space or a letter that no token has",
    "wrong token": "error: me/t: the hub does not know the token in HF_TOKEN (401); make another at "
    "https://huggingface.co/settings/tokens",
    "no rights": f"error: them/t: {NO_RIGHTS} them/t",
    "no rights there": f"error: them/shown: {NO_RIGHTS} them/shown",
    "public already": "error: me/shown is public already: give --public to upload there, or another name",
    "no name": "error: me: no name of a repository; it has the form user/name",
}


@pytest.mark.parametrize("case", LINES)
def test_what_a_hub_refuses_is_one_line(pushed, case):
    assert pushed[0][case] == LINES[case]


def test_a_refused_push_uploads_nothing(pushed):
    results, _, held, requests = pushed
    assert (
        results["not allowed as a name"].startswith("error: me/a--b: ") and "\n" not in results["not allowed as a name"]
    )
    assert set(held) == {"me/s", "me/shown", "them/shown"} and set(held["them/shown"].files) == {"README.md"}
    assert not [line for line in requests if "/me/t/" in line]


def test_the_token_is_in_no_log(pushed):
    results = pushed[0]
    assert "me/s" in results["log"]  # the libraries' log is there
    for text in results.values():
        assert hub.TOKEN not in text and "hf_wrong" not in text


@pytest.mark.parametrize(
    "more, line",
    [
        ({}, "error: me/s: no network: http://127.0.0.1:9 cannot be reached\n"),
        ({"HF_HUB_OFFLINE": "1"}, "error: me/s: HF_HUB_OFFLINE is set: nothing is uploaded\n"),
    ],
)
def test_no_network_is_one_line(folder, more, line):
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_TOKEN": hub.TOKEN}
    environment |= {"PYTHONPATH": str(tiny.ROOT / "src")} | more
    command = [sys.executable, "-m", "distillery", "push", str(folder), "me/s"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, line)


def test_a_folder_that_is_not_that_of_a_student_is_one_line(folder, tmp_path):
    for missing, line in (
        ("inference.json", "no inference.json here or in model/; the evaluation writes it"),
        ("README.md", r"no model card \(README.md\); the evaluation writes it: run `dvc repro`"),
        ("model.safetensors", "no weights in it"),
    ):
        shutil.copytree(folder, tmp_path / missing)
        (tmp_path / missing / missing).unlink()
        with pytest.raises(UserError, match=line):
            push_student(tmp_path / missing, "me/s")
    for added in (
        "train.csv",
        ".env",
        "onnx/notes.txt",
        "checkpoint/model.safetensors",
        "pytorch_model.bin",
        "code.py",
    ):
        other = tmp_path / added.replace("/", "-")
        shutil.copytree(folder, other)
        (other / added).parent.mkdir(exist_ok=True)
        (other / added).touch()
        with pytest.raises(UserError, match=rf"{added}: no file of a model; move it out of the folder"):
            student_files(other)
    (other / "second").touch()
    with pytest.raises(UserError, match="code.py and 1 more: no file of a model"):
        student_files(other)


def test_exports_go_with_the_student_unless_they_are_those_of_other_weights(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    for name in ("onnx/model.onnx", "onnx/model_int8.onnx", "gguf/model-f16.gguf", "gguf/model-q8_0.gguf"):
        (tmp_path / "model" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "model" / name).touch()
    assert "gguf/model-f16.gguf" in student_files(tmp_path / "model")
    (tmp_path / "model/gguf/exports.json").write_text(
        json.dumps({"weights": "others", "threads": 1, "rows": 1, "exports": {}})
    )
    with pytest.raises(UserError, match="exported from other weights"):
        student_files(tmp_path / "model")
