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
import signal
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil

PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


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
            process.suspend()  # or it could start another one meanwhile
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
    """Forks for each program that a client sends to `listener`, and tells the client how it ended.

    run_ended: a descriptor that can be read when the test run has ended.
    """

    def __init__(self, listener: socket.socket, run_ended: int) -> None:
        self.listener, self.run_ended, self.forks = listener, run_ended, set()
        self.selector = selectors.DefaultSelector()
        for each in (listener, run_ended):
            self.selector.register(each, selectors.EVENT_READ)

    def serve(self) -> dict | None:
        """Serve until the test run has ended. Returns None then, and in a fork its program."""
        while True:
            for key, _ in self.selector.select():
                if key.fileobj == self.run_ended:
                    return None
                if key.fileobj is self.listener:
                    try:
                        program = self.fork()
                    except OSError:  # too many processes or files: the client learns of it by the end of its connection
                        traceback.print_exc()
                        continue
                    if program:
                        return program
                elif key.data in self.forks:
                    self.finish(key.data, client_was_killed=key.fileobj is key.data.client)

    def fork(self) -> dict | None:
        """Fork for the next client. Returns its program in the fork, None in this process."""
        client, _ = self.listener.accept()
        streams = []
        try:
            program, streams = receive_program(client)
            pid = os.fork() if program else None
            if pid == 0:
                try:
                    self.become_program(client, streams)
                except OSError:
                    traceback.print_exc()
                    os._exit(70)
                return program
            if pid:
                self.forks.add(fork := Fork(pid, os.pidfd_open(pid), client))
                for each in (fork.ended, client):
                    self.selector.register(each, selectors.EVENT_READ, fork)
        except OSError:
            client.close()
            raise
        finally:
            for stream in streams:
                os.close(stream)
        return None

    def become_program(self, client: socket.socket, streams: list[int]) -> None:
        """In a fork: take the streams of `client`, and close what belongs to the server and to other programs."""
        os.setsid()
        for i, stream in enumerate(streams):
            os.dup2(stream, i)
        pid, _, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
        take_disks_and_limits(pid)
        for opened in (self.selector, self.listener, client, *(fork.client for fork in self.forks)):
            opened.close()
        for descriptor in (self.run_ended, *(fork.ended for fork in self.forks)):
            os.close(descriptor)

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


def take_disks_and_limits(client: int) -> None:
    """Join the mount namespace of the process `client`, take its limit on the size of files, end with the server."""
    resource.setrlimit(resource.RLIMIT_FSIZE, resource.prlimit(client, resource.RLIMIT_FSIZE))
    libc = ctypes.CDLL(None, use_errno=True)  # `os.setns` is there from Python 3.12 on
    for kind in ("user", "mnt"):
        if os.readlink(f"/proc/{client}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}"):
            with open(f"/proc/{client}/ns/{kind}") as namespace:
                if libc.setns(namespace.fileno(), 0):
                    raise OSError(ctypes.get_errno(), f"setns: {kind}")
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # the last of all: a change of namespaces takes it away


def run(arguments: list[str], folder: str, environment: dict[str, str], paths: list[str]) -> None:
    """Run `python *arguments`, a module or a file, in `folder`. paths: where packages are installed."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    given = [os.path.abspath(path) for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [*given, *paths]
    sys.orig_argv = [sys.executable, *arguments]
    sys.stdout.reconfigure(line_buffering=arguments[0] == "-u" or bool(environment.get("PYTHONUNBUFFERED")))
    arguments = arguments[arguments[0] == "-u" :]
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
    run_ended, address = os.pidfd_open(int(sys.argv[2])), sys.argv[1]
    preload(sys.argv[3:])
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        if os.fork():  # what remains is nobody's child: some tests kill all children of their process
            os._exit(0)
        server, pid, program = Server(listener, run_ended), os.getpid(), None
        try:
            program = server.serve()
        finally:
            if os.getpid() == pid:
                for fork in server.forks:
                    fork.kill()
    if program:
        exit_after(run, **program, paths=installed)
    shutil.rmtree(os.path.dirname(address), ignore_errors=True)  # another server may do the same


if __name__ == "__main__":
    main()
