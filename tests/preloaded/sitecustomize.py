"""A Python that starts with this file on its path lets tests/preloaded/server.py run its program in a fork.

The server has loaded what takes seconds to load (torch, transformers, DVC). This Python waits for the fork, and ends
with its status. If this Python is killed, the server kills the fork.
"""

import contextlib
import json
import os
import socket
import sys


def run_in_fork(server: str) -> None:
    """Let the server at the socket `server` run this program, and exit with its status."""
    program = {"arguments": sys.orig_argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}
    message = json.dumps(program).encode()
    answer = b""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.connect(server)
        socket.send_fds(connection, [len(message).to_bytes(4, "big")], [0, 1, 2])
        connection.sendall(message)
        answer = connection.recv(4)
    if len(answer) < 4:  # after an exception here, Python would run the program itself, from the start
        print("the preloaded process ended early", file=sys.stderr, flush=True)
        os._exit(70)
    status = int.from_bytes(answer, "big", signed=True)
    if status < 0:  # ended by this signal
        os.kill(os.getpid(), -status)
    os._exit(status)


# only these: a program that inherits more than the three standard streams would lose them
if sys.orig_argv[1:3] == ["-m", "ipykernel_launcher"] and "PRELOADED_KERNELS" in os.environ:
    run_in_fork(os.environ["PRELOADED_KERNELS"])
elif "PRELOADED_PROGRAMS" in os.environ and (
    sys.orig_argv[1:3] == ["-m", "distillery"] or sys.orig_argv[1].endswith("/bin/dvc")
):
    run_in_fork(os.environ["PRELOADED_PROGRAMS"])
