"""Every Python that finds this file on its path asks the process of tests/preloaded/server.py to run in its place.

That process has loaded what takes seconds to load (torch, transformers, DVC), and runs the program in a copy of itself.
The Python that started waits for its end, and ends in the same way. If it is killed, the copy is killed, too.
"""

import json
import os
import socket
import sys


def run_in_a_copy(server: str) -> None:
    """Let the process at the socket `server` run this program, and end as it ended."""
    program = {"arguments": sys.orig_argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(server)
        message = json.dumps(program).encode()
        socket.send_fds(connection, [len(message).to_bytes(4, "big")], [0, 1, 2])
        connection.sendall(message)
        status = int.from_bytes(connection.recv(4), "big", signed=True)
    if status < 0:  # ended by this signal
        os.kill(os.getpid(), -status)
    os._exit(status)


# what is started with more than the three standard streams runs as it is
PROGRAMS = [["-m", "distillery"], ["-m", "dvc"]]
if sys.orig_argv[1:3] == ["-m", "ipykernel_launcher"] and "PRELOADED_KERNELS" in os.environ:
    run_in_a_copy(os.environ["PRELOADED_KERNELS"])
elif "PRELOADED_PROGRAMS" in os.environ and (sys.orig_argv[1:3] in PROGRAMS or sys.orig_argv[1].endswith("/bin/dvc")):
    run_in_a_copy(os.environ["PRELOADED_PROGRAMS"])
