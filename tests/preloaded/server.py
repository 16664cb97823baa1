"""A process that has loaded packages, and runs Python programs in forks of itself.

`python server.py SOCKET PID MODULE ...` loads these modules and ends; what it leaves behind serves at SOCKET until the
process PID has ended. The file sitecustomize.py beside this one sends it the programs.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import resource
import runpy
import selectors
import shutil
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil


@dataclass(eq=False)
class Fork:
    """A running program. ended: a descriptor that can be read when it has ended. client: of the Python that waits."""

    pid: int
    ended: int
    client: socket.socket

    def kill(self) -> None:
        """End it with all that it started: the clients among these have forks of their own, which end with them."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            for each in [*process.children(recursive=True), process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()

    def send_status(self) -> None:
        """Tell its client how it ended."""
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        with contextlib.suppress(OSError):
            self.client.sendall(status.to_bytes(4, "big", signed=True))
        self.client.close()
        os.close(self.ended)


def preload(names: list[str]) -> None:
    """Import modules. Those of the package are imported for what they import, and dropped: each program has its own."""
    for name in names:
        importlib.import_module(name)
    for name in [name for name in sys.modules if name.partition(".")[0] == "distillery"]:
        del sys.modules[name]
    gc.collect()
    gc.freeze()  # the garbage collector of a fork skips these


class Server:
    """Forks for each program that a client sends to `listener`, and tells the client how it ended."""

    def __init__(self, listener: socket.socket, owner: int) -> None:
        self.listener, self.owner, self.forks = listener, os.pidfd_open(owner), set()
        self.selector = selectors.DefaultSelector()
        for each in (listener, self.owner):
            self.selector.register(each, selectors.EVENT_READ)

    def serve(self) -> dict | None:
        """Serve until the process `owner` has ended. Returns None then, and in a fork its program."""
        while True:
            for key, _ in self.selector.select():
                if key.fileobj == self.owner:
                    for fork in self.forks:
                        fork.kill()
                    return None
                if key.fileobj is self.listener:
                    if program := self.fork():
                        return program
                elif key.data in self.forks:
                    self.finish(key.data, client_was_killed=key.fileobj is key.data.client)

    def fork(self) -> dict | None:
        """Fork for the next client. Returns its program in the fork, None in this process."""
        client, _ = self.listener.accept()
        program, streams = receive_program(client)
        pid = os.fork() if program else None
        if pid == 0:
            for i, stream in enumerate(streams):
                os.dup2(stream, i)
            share_disks(struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])
            for opened in (self.selector, self.listener, client):
                opened.close()
            os.close(self.owner)
            return program
        for stream in streams:
            os.close(stream)
        if pid:
            self.forks.add(fork := Fork(pid, os.pidfd_open(pid), client))
            for each in (fork.ended, client):
                self.selector.register(each, selectors.EVENT_READ, fork)
        return None

    def finish(self, fork: Fork, client_was_killed: bool) -> None:
        """Forget a fork that has ended or shall end."""
        self.forks.remove(fork)
        for each in (fork.ended, fork.client):
            self.selector.unregister(each)
        if client_was_killed:
            fork.kill()
        fork.send_status()


def receive_program(client: socket.socket) -> tuple[dict | None, list[int]]:
    """The program to run, None if `client` ended before it was sent, and the client's three standard streams."""
    size, streams, _, _ = socket.recv_fds(client, 4, 3)
    message = bytearray()
    while len(message) < int.from_bytes(size, "big") and (part := client.recv(1 << 20)):
        message += part
    if not message or len(message) < int.from_bytes(size, "big"):
        client.close()
        return None, streams
    return json.loads(message), streams


def share_disks(client: int) -> None:
    """Let this process see the file systems that the process `client` sees, and write files as large as it may."""
    resource.setrlimit(resource.RLIMIT_FSIZE, resource.prlimit(client, resource.RLIMIT_FSIZE))
    libc = ctypes.CDLL(None, use_errno=True)
    for kind in ("user", "mnt"):
        if os.readlink(f"/proc/{client}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}"):
            with open(f"/proc/{client}/ns/{kind}") as namespace:
                if libc.setns(namespace.fileno(), 0):
                    raise OSError(ctypes.get_errno(), f"setns: {kind}")


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


def exit_after(function: Callable, **arguments: Any) -> None:
    """Call `function` and exit as Python does, without the seconds that it takes to destroy all modules."""
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
    preload(sys.argv[3:])
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(sys.argv[1])
        listener.listen(64)
        if os.fork():  # what remains is nobody's child: some tests kill all children of their process
            os._exit(0)
        program = Server(listener, int(sys.argv[2])).serve()
    if program:
        exit_after(run, **program, paths=installed)
    shutil.rmtree(os.path.dirname(sys.argv[1]), ignore_errors=True)  # the other server may do the same


if __name__ == "__main__":
    main()
