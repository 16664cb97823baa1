"""Programs that run in forks of a preloaded process end, print and are killed as those of a Python of their own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

import forked
import tiny

Start = Callable[..., subprocess.Popen]


@pytest.fixture
def start(tmp_path) -> Start:
    """Starts `python -m distillery`, where that package is the given code, in a fork."""
    package = tmp_path / "src/distillery"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (tmp_path / ".git/info").mkdir(parents=True)
    (tmp_path / ".git/info/exclude").touch()
    environment = os.environ | forked.preloaded_python(tmp_path, with_torch=False)
    if "PRELOADED_DVC" not in environment:
        pytest.skip("needs descriptors of processes, which Linux has")

    def start(code: str, *arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
        (package / "__main__.py").write_text(code)
        command = [*launcher, sys.executable, "-m", "distillery", *arguments]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=tmp_path, env=environment, **streams)

    return start


def wait_for_the_end_of(process: psutil.Process) -> None:
    end = time.monotonic() + 30
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_program_prints_and_exits_in_a_fork(start, tmp_path):
    code = """if 1:
        import os, sys
        print("papermill" in sys.modules, sys.argv[1:], os.getcwd())
        print("wrong", file=sys.stderr)
        sys.exit(3)
    """
    process = start(code, "a", "b c")
    assert process.communicate(timeout=60) == (f"True ['a', 'b c'] {tmp_path}\n", "wrong\n")
    assert process.returncode == 3


@pytest.mark.parametrize(
    ("code", "status", "line"),
    [
        ("import sys; sys.exit('a mistake')", 1, "a mistake"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("pass", 0, ""),
    ],
)
def test_it_ends_with_the_status_of_its_program(start, code, status, line):
    process = start(code)
    assert process.communicate(timeout=60)[1].strip().endswith(line)
    assert process.returncode == status


def test_a_program_writes_files_as_large_as_its_client_may(start):
    code = "import resource; print(resource.getrlimit(resource.RLIMIT_FSIZE)[0])"
    process = start(code, launcher=("bash", "-c", 'ulimit -f 8; exec "$@"', "bash"))
    assert process.communicate(timeout=60)[0] == f"{8 * 1024}\n"


def test_a_program_sees_the_disks_of_its_client(start, tmp_path):
    if not tiny.can_mount():
        pytest.skip("needs a system that lets a user mount disks")
    (tmp_path / "disk").mkdir()
    script = 'mount -t tmpfs -o size=16k none disk; "$@"'
    process = start(
        "import pathlib; pathlib.Path('disk/file').write_text('x' * 20000)",
        launcher=("unshare", "-rm", "sh", "-c", script, "sh"),
    )
    assert "No space left on device" in process.communicate(timeout=60)[1]
    assert process.returncode == 1 and not list((tmp_path / "disk").iterdir())


def test_a_killed_program_takes_along_what_it_started(start):
    process = start("import subprocess as s\np = s.Popen(['sleep', '99'])\nprint(p.pid, flush=True)\np.wait()")
    sleeper = psutil.Process(int(process.stdout.readline()))
    process.kill()
    process.wait()
    wait_for_the_end_of(sleeper)


def test_a_client_that_ends_before_it_has_sent_its_program_stops_nothing(start, tmp_path):
    address = forked.preloaded_python(tmp_path, with_torch=False)["PRELOADED_DVC"]
    for sent in (b"", (1000).to_bytes(4, "big") + b"{"):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(address)
            client.sendall(sent)
    process = start("print('still here')")
    assert process.communicate(timeout=60)[0] == "still here\n"


def own_server() -> str:
    """The variable of a server that no other test uses, with nothing loaded."""
    return f"PRELOADED_DVC={forked.preloaded_server('own', 'json')}"


def test_a_killed_server_takes_its_programs_along_and_is_replaced(start):
    code = "import os, time\nprint(os.getpid(), os.getppid(), flush=True)\ntime.sleep(99)"
    process = start(code, launcher=("env", own_server()))
    program, server = (psutil.Process(int(pid)) for pid in process.stdout.readline().split())
    server.kill()
    wait_for_the_end_of(program)
    assert process.wait(timeout=60) == 70
    wait_for_the_end_of(server)
    process = start("print('another one')", launcher=("env", own_server()))
    assert process.communicate(timeout=60)[0] == "another one\n"


def test_a_server_ends_with_the_run_that_started_it():
    paths = os.pathsep.join(str(forked.ROOT / folder) for folder in ("src", "tests"))
    environment = os.environ | {"PYTHONPATH": paths}
    environment.pop("PYTEST_XDIST_WORKER", None)
    code = "import forked; print(forked.preloaded_server('own', 'json'))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    folder, end = Path(done.stdout.strip()).parent, time.monotonic() + 30
    while folder.exists():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_program_prints_as_soon_as_it_writes_where_python_would(start):
    for value, output in (("1", "written\n"), ("", "")):
        launcher = ("env", own_server(), f"PYTHONUNBUFFERED={value}")
        process = start("import os\nprint('written')\nos._exit(0)", launcher=launcher)
        assert process.communicate(timeout=60)[0] == output


def test_a_lost_server_is_no_success(tmp_path):
    lost = tmp_path / "lost"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(lost))
        listener.listen()
        environment = os.environ | {"PRELOADED_DVC": str(lost), "PYTHONPATH": str(forked.PRELOADED)}
        command = [sys.executable, "-m", "distillery"]
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        listener.accept()[0].close()
        assert process.communicate(timeout=60)[1] == "the preloaded process ended early\n"
    assert process.returncode == 70
