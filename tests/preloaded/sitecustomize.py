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


# Only these, by their modules: a program that inherits more than the three standard streams would lose them.
WITH_TORCH = ("ipykernel_launcher", "torch.distributed.run", "accelerate.commands.launch")
WITH_TORCH += ("distillery.training.worker", "distillery.teachers.worker")
SERVERS = {"dvc": "PRELOADED_DVC", "distillery": "PRELOADED_DVC", "pip": "PRELOADED_DVC"}
SERVERS |= dict.fromkeys(WITH_TORCH, "PRELOADED_TORCH")

arguments = [argument for argument in sys.orig_argv[1:3] if argument != "-u"] + sys.orig_argv[3:]
module = arguments[1] if arguments[:1] == ["-m"] else "dvc" if arguments and arguments[0].endswith("/bin/dvc") else ""
if module in SERVERS and SERVERS[module] in os.environ:
    run_in_fork(os.environ[SERVERS[module]])
