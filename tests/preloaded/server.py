"""A process that has loaded the packages of this project, and runs programs of Python in copies of itself.

`python server.py SOCKET MODULE ...` loads these modules and serves at SOCKET until its standard input ends. The file
sitecustomize.py beside this one sends it the programs.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any


def preload(names: list[str]) -> None:
    """Import modules. Those of the package are imported for what they import, and dropped: each program has its own."""
    for name in names:
        importlib.import_module(name)
    for name in [name for name in sys.modules if name.partition(".")[0] == "distillery"]:
        del sys.modules[name]
    gc.collect()
    gc.freeze()  # a search for garbage in a copy leaves these out


def serve(listener: socket.socket) -> dict | None:
    """Run the programs that are asked for, until standard input ends: then None, and in each copy its program."""
    waiting = selectors.DefaultSelector()
    waiting.register(listener, selectors.EVENT_READ, None)
    waiting.register(sys.stdin.fileno(), selectors.EVENT_READ, None)
    processes: dict[int, tuple[int, socket.socket]] = {}  # by the descriptor of the process
    while True:
        for key, _ in waiting.select():
            if key.fileobj is listener:
                connection, _ = listener.accept()
                program, streams = receive_program(connection)
                if not (pid := os.fork()):
                    for i, stream in enumerate(streams):
                        os.dup2(stream, i)
                    for opened in (waiting, listener, connection):
                        opened.close()
                    return program
                ended = os.pidfd_open(pid)
                processes[ended] = pid, connection
                waiting.register(ended, selectors.EVENT_READ, ended)
                waiting.register(connection, selectors.EVENT_READ, ended)
                for stream in streams:
                    os.close(stream)
            elif key.data is None:
                for pid, _ in processes.values():
                    os.kill(pid, signal.SIGKILL)
                return None
            elif key.data in processes:
                pid, connection = processes.pop(key.data)
                waiting.unregister(connection)
                waiting.unregister(key.data)
                if key.fileobj is connection:  # the Python that waited has ended
                    os.kill(pid, signal.SIGKILL)
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with contextlib.suppress(OSError):
                    connection.sendall(status.to_bytes(4, "big", signed=True))
                connection.close()
                os.close(key.data)


def receive_program(connection: socket.socket) -> tuple[dict, list[int]]:
    """The program to run, and the three standard streams of the Python that asks."""
    size, streams, _, _ = socket.recv_fds(connection, 4, 3)
    message = bytearray()
    while len(message) < int.from_bytes(size, "big"):
        message += connection.recv(1 << 20)
    return json.loads(message), streams


def run(arguments: list[str], folder: str, environment: dict[str, str], paths: list[str]) -> None:
    """Run `python *arguments`, a module or a file, in `folder`. paths: where packages are installed."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    given = [os.path.abspath(path) for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [*given, *paths]
    sys.orig_argv = [sys.executable, *arguments]
    importlib.invalidate_caches()
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path.insert(0, folder)
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
        runpy.run_path(arguments[0], run_name="__main__")


def end_process(function: Callable, **arguments: Any) -> None:
    """End as a Python that has run `function`, without the seconds that taking all modules apart would take."""
    status = 0
    try:
        function(**arguments)
    except SystemExit as ending:
        status = ending.code
        if status is not None and not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


def main() -> None:
    installed = [path for path in sys.path if path not in os.environ["PYTHONPATH"].split(os.pathsep)][1:]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(sys.argv[1])
        listener.listen(64)
        preload(sys.argv[2:])
        program = serve(listener)
    if program:
        end_process(run, **program, paths=installed)


if __name__ == "__main__":
    main()
