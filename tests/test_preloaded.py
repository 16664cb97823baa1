"""Programs that run in forks of a preloaded process end, print and are killed as those of a Python of their own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

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
    end = time.monotonic() + 30
    while sleeper.is_running() and sleeper.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.01)


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
    return f"PRELOADED_DVC={forked._server('own', 'json')}"


def test_a_server_that_was_killed_is_replaced(start):
    def server_of_a_program() -> psutil.Process:
        process = start("import os; print(os.getppid())", launcher=("env", own_server()))
        return psutil.Process(int(process.communicate(timeout=60)[0]))

    server = server_of_a_program()
    server.kill()
    end = time.monotonic() + 30
    while server.is_running() and server.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert server_of_a_program() != server


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
