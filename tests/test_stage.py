"""One notebook as a stage: what a user sees when it ends well, badly, or not at all. And the first stage of all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from distillery.files import file_digest
from forked import preloaded_python

ROOT = Path(__file__).resolve().parents[1]
PARAMETERS = 'student = "tiny-kd"\nseed = 0'
NAME = "04_toy-tiny-gold-0"


def write_notebook(path: Path, *cells: str, parameters: str = PARAMETERS) -> None:
    """A notebook of a title, a parameters cell and `cells`."""
    book = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    book.cells = [
        nbformat.v4.new_markdown_cell("# Toy"),
        nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        *(nbformat.v4.new_code_cell(cell) for cell in cells),
    ]
    nbformat.write(book, path)


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """The least that a stage needs of a repository."""
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / "notebooks").mkdir()
    shutil.copy(ROOT / "tests/smoke.yaml", tmp_path / "params.yaml")
    shutil.copytree(ROOT / "tasks", tmp_path / "tasks")
    (tmp_path / "data/corpora").mkdir(parents=True)
    (tmp_path / "data/corpora/finance.jsonl").write_text('{"text": "a", "label": "neutral"}\n', encoding="utf-8")
    return tmp_path


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", *arguments]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT / "src")} | more


def run(repo: Path, *arguments: str, forked: bool = True, **env: str) -> subprocess.CompletedProcess:
    """Run the command in a fork of a process that has loaded its packages, or not; a kernel is always a new process."""
    env = environment(**(preloaded_python(with_torch=False) if forked else {}), **env)
    return subprocess.run(command(*arguments), capture_output=True, text=True, cwd=repo, env=env, timeout=120)


def run_toy(repo: Path, *cells: str, given: tuple[str, ...] = ("-p", "student", "tiny-gold", "-p", "seed", "0"), **env):
    write_notebook(repo / "notebooks/04_toy.ipynb", *cells)
    assert run(repo, "distillery", "strip").returncode == 0
    return run(repo, "distillery", "run", "04_toy", *given, **env)


def executed(repo: Path) -> Path:
    return repo / f"reports/notebooks/{NAME}.ipynb"


def test_a_stage_prints_as_it_runs_and_leaves_its_executed_copy(repo):
    done = run_toy(
        repo, "print('learning', student, seed + 1)", "import os; print(os.getcwd())\nos.path.abspath('a b')"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["learning tiny-gold 1", str(repo)]
    book = nbformat.read(executed(repo), as_version=4)
    assert book.cells[-1].outputs[-1].data["text/plain"] == "'a b'"  # no folder of this machine
    assert not list((repo / ".cache").rglob("*.ipynb"))


def test_the_kernel_is_this_environments_own(repo, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    for kernels in (home / ".local/share/jupyter/kernels", home / "elsewhere/kernels"):
        (kernels / "python3").mkdir(parents=True)
        spec = {"argv": ["/bin/false"], "display_name": "another environment", "language": "python"}
        (kernels / "python3/kernel.json").write_text(json.dumps(spec))
    (home / ".ipython/profile_default/startup").mkdir(parents=True)
    (home / ".ipython/profile_default/startup/00.py").write_text("startup = True")
    taken = {"JUPYTER_PATH": str(home / "elsewhere"), "JUPYTER_PREFER_ENV_PATH": "0", "HOME": str(home)}
    done = run_toy(repo, "import sys; print(sys.executable, 'startup' in globals())", forked=False, **taken)
    assert (done.returncode, done.stdout) == (0, f"{sys.executable} False\n")


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("-p studnt tiny-gold -p seed 0", "error: -p studnt: 04_toy has no such parameter; it has: student, seed"),
        ("-p student tiny-gold", "error: 04_toy needs -p seed"),
        ("-p student tiny-gold -p seed x", "error: -p seed: must be int, not 'x'"),
        ("-p student tiny-gold -p seed 7", "error: -p seed: params.yaml has no seed '7'; it has: 0"),
        (
            "-p student tiny -p seed 0",
            "error: -p student: params.yaml has no student 'tiny'; it has: tiny-kd, tiny-gold, half-gkd",
        ),
    ],
)
def test_wrong_selectors_end_in_one_line(repo, given, line):
    done = run_toy(repo, "1 / 0", given=tuple(given.split()))
    assert (done.returncode, done.stdout, done.stderr) == (1, "", line + "\n")
    assert not (repo / "reports").exists()


def test_params_are_checked_before_a_stage_runs(repo):
    write_notebook(repo / "notebooks/04_toy.ipynb")
    assert run(repo, "distillery", "strip").returncode == 0
    text = (repo / "params.yaml").read_text(encoding="utf-8")
    (repo / "params.yaml").write_text(text.replace("temperature: 2.0", "temprature: 2.0"), encoding="utf-8")
    for arguments in (
        ("distillery", "run", "04_toy", "-p", "student", "tiny-kd", "-p", "seed", "0"),
        (
            "distillery",
            "strip",
        ),
    ):
        done = run(repo, *arguments)
        assert done.returncode == 1
        assert "did you mean `temperature`?" in done.stderr and done.stderr.count("\n") == 1


def test_an_unknown_notebook_is_named_beside_the_known(repo):
    done = run(repo, "distillery", "run", "04_toy")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "dvc repro strip" in done.stderr


def test_a_users_mistake_is_one_line_and_leaves_no_notebook(repo):
    executed(repo).parent.mkdir(parents=True)
    executed(repo).write_text("of an earlier run")
    done = run_toy(repo, "from distillery.errors import UserError\nraise UserError('my.csv: row 3: no text')")
    assert (done.returncode, done.stderr) == (1, "error: my.csv: row 3: no text\n")
    assert not list(repo.glob("reports/**/*.ipynb")) and not list((repo / ".cache").rglob("*.ipynb"))


def test_any_other_exception_keeps_its_traceback_and_the_notebook(repo):
    done = run_toy(repo, "def half(x):\n    return x / 0\nhalf(seed)")
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr and "return x / 0" in done.stderr and "\x1b" not in done.stderr
    assert done.stderr.splitlines()[-1].endswith(f".cache/failed/{NAME}.ipynb")
    assert (repo / f".cache/failed/{NAME}.ipynb").exists() and not executed(repo).exists()
    assert run_toy(repo, "seed").returncode == 0
    assert not (repo / f".cache/failed/{NAME}.ipynb").exists() and executed(repo).exists()


def test_a_killed_kernel_ends_in_one_line(repo):
    done = run_toy(repo, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert done.returncode == 1 and not executed(repo).exists()
    assert done.stderr.splitlines()[-1].startswith(f"error: {NAME}: its Python process was killed (out of memory?)")
    assert "Traceback" not in done.stderr


def start_sleeper(repo: Path, launcher: list[str], **env: str) -> tuple[subprocess.Popen, psutil.Process]:
    """Start, through `launcher`, a stage whose kernel writes its id and sleeps; both processes when it does."""
    write_notebook(
        repo / "notebooks/04_toy.ipynb", "import os, time; open('pid', 'w').write(str(os.getpid()))", "time.sleep(60)"
    )
    assert run(repo, "distillery", "strip").returncode == 0
    stage = command("distillery", "run", "04_toy", "-p", "student", "tiny-gold", "-p", "seed", "0")
    process = subprocess.Popen(launcher + stage, cwd=repo, env=environment(**env))
    deadline = time.monotonic() + 60
    while not ((repo / "pid").exists() and (repo / "pid").read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return process, psutil.Process(int((repo / "pid").read_text()))


@pytest.mark.parametrize("through_a_shell", [False, True])
def test_a_killed_stage_takes_its_kernel_along_and_can_run_again(repo, through_a_shell):
    # DVC starts a stage from a shell, which may stay between the two; killing DVC must end what it started.
    launcher = [
        sys.executable,
        "-c",
        "import subprocess, sys; subprocess.run(['sh', '-c', '\"$@\"; exit $?', 'sh'] + sys.argv[1:])",
    ]
    if through_a_shell:
        process, kernel = start_sleeper(repo, launcher, DVC_STAGE="distill")
    else:
        process, kernel = start_sleeper(repo, [])
    process.send_signal(signal.SIGKILL)
    process.wait()
    kernel.wait(timeout=20)
    assert not executed(repo).exists()
    done = run_toy(repo, "print('again')")
    assert (done.returncode, done.stdout) == (0, "again\n")


def test_a_stage_runs_once_at_a_time(repo):
    process, kernel = start_sleeper(repo, [])
    try:
        second = run(repo, "distillery", "run", "04_toy", "-p", "student", "tiny-gold", "-p", "seed", "0")
        assert (second.returncode, second.stderr) == (1, f"error: {NAME} runs already (process {process.pid})\n")
        assert process.poll() is None and kernel.is_running()
    finally:
        process.kill()
        process.wait()


def built(repo: Path) -> dict[str, str]:
    """What the first stage writes for `repo`, file by file."""
    done = run(repo, "distillery", "strip")
    assert done.returncode == 0, done.stderr
    files = sorted(p for p in (repo / "build").rglob("*") if p.is_file())
    return {str(p.relative_to(repo)): p.read_text(encoding="utf-8") for p in files}


def test_running_and_saving_a_notebook_in_jupyter_changes_nothing_downstream(repo):
    path = repo / "notebooks/04_toy.ipynb"
    write_notebook(path, "print(1)")
    before = built(repo)
    book = nbformat.read(path, as_version=4)
    book.metadata = {"kernelspec": {"name": "other"}, "language_info": {"name": "python", "version": "3.14"}, "x": 1}
    for i, cell in enumerate(book.cells):
        cell.id = f"other-{i}"
        cell.metadata["collapsed"] = True
        if cell.cell_type == "code":
            cell.execution_count = 7 + i
            cell.outputs = [nbformat.v4.new_output("stream", text="1\n")]
    nbformat.write(book, path)
    assert built(repo) == before
    book.cells[-1].source = "print(2)"
    nbformat.write(book, path)
    assert [name for name, text in built(repo).items() if before[name] != text] == ["build/notebooks/04_toy.ipynb"]


def test_an_edited_source_or_model_folder_is_noted(repo):
    (repo / "models/tiny-bert").mkdir(parents=True)
    (repo / "models/tiny-bert/config.json").write_text("{}")
    before = built(repo)
    (repo / "models/tiny-bert/config.json").write_text("{ }")
    middle = built(repo)
    assert [name for name in before if before[name] != middle[name]] == ["build/models/tiny-bert.json"]
    with (repo / "data/corpora/finance.jsonl").open("a") as file:
        file.write("\n")
    after = built(repo)
    assert [name for name in after if after[name] != middle[name]] == ["build/sources/finance.json"]


def test_a_missing_source_and_a_broken_notebook_are_named(repo):
    (repo / "notebooks/01_data.ipynb").write_text("<<<<<<< HEAD\n{}")
    done = run(repo, "distillery", "strip")
    assert done.returncode == 1 and done.stderr.startswith("error: notebooks/01_data.ipynb: not a notebook")
    (repo / "notebooks/01_data.ipynb").unlink()
    (repo / "data/corpora/finance.jsonl").unlink()
    done = run(repo, "distillery", "strip")
    assert (done.returncode, done.stderr) == (
        1,
        "error: params.yaml: data.finance.source: data/corpora/finance.jsonl: no such file\n",
    )


def test_a_python_without_the_packages_explains_how_to_get_them(repo):
    bare = subprocess.run(
        [sys.executable, "-S", "-m", "distillery", "strip"], capture_output=True, text=True, cwd=repo, env=environment()
    )
    assert bare.returncode == 1 and "source .venv/bin/activate" in bare.stderr and bare.stderr.count("\n") == 1


def test_digest_follows_names_and_contents(tmp_path):
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("2")
    digests = {file_digest(tmp_path)}
    (tmp_path / "b").rename(tmp_path / "c")
    digests.add(file_digest(tmp_path))
    (tmp_path / "c").write_text("3")
    digests.add(file_digest(tmp_path))
    assert len(digests) == 3
    (tmp_path / ".DS_Store").write_text("x")
    assert file_digest(tmp_path) in digests
