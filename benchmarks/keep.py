"""Run a benchmark and keep what it printed, with what produced it.

    PYTHONPATH=src python benchmarks/keep.py distill_step [its arguments]

Writes `benchmarks/results/<name>.txt`: command, commit, machine, threads, date, seconds, whether the machine had other
work when it started, then the output as printed.
Left out are library warnings, which go to the other stream, and the progress lines of training. Nothing is written when
the benchmark fails. Paths of this machine, in arguments and output, are shortened to `FOLDER/` and a name.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

from distillery.errors import UserError
from distillery.files import atomic_write, repository_root


def commit(root: Path) -> str:
    """The commit of the code, with a `+` when it has been changed since."""
    git = ["git", "-C", str(root)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    code = [
        "src",
        "benchmarks/*.py",
        "studies/*.py",
        "studies/*.yaml",
        "recipes/*.yaml",
        "notebooks",
        "tasks",
        "dvc.yaml",
    ]
    changed = subprocess.run([*git, "status", "--porcelain", *code], capture_output=True).stdout
    return head + ("+" if changed else "")


def shortened(text: str) -> str:
    """`text` without what only this machine has: folders of absolute paths, all but their last part."""
    return re.sub(r"(?<![\w:/.~-])/(?:[\w.+-]+/)+([\w.+-]+)", r"FOLDER/\1", text)


def without_progress(text: str) -> str:
    """`text` without the lines in which training reports its progress: they fall inside tables."""
    return re.sub(r"^.*: step \d+/\d+, loss .*\n?", "", text, flags=re.M)


def other_work() -> str:
    """A remark for the case that other programs keep the machine busy."""
    return ", beside other work" if os.getloadavg()[0] > 0.5 else ""


def main(name: str, *arguments: str) -> None:
    root = repository_root()
    script = root / "benchmarks" / f"{name}.py"
    if not script.exists():
        known = ", ".join(sorted(path.stem for path in script.parent.glob("*.py")))
        raise UserError(f"no benchmark `{name}`; there are: {known}")
    start, remark = time.perf_counter(), other_work()
    done = subprocess.run([sys.executable, str(script), *arguments], cwd=root, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    cpu = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.*)", cpu.read_text()) if cpu.exists() else None
    threads = os.environ.get("OMP_NUM_THREADS", os.cpu_count())
    shown = [shortened(argument) for argument in arguments]
    lines = [
        f"command  PYTHONPATH=src python benchmarks/{name}.py {' '.join(shown)}".rstrip(),
        f"commit   {commit(root)}",
        f"machine  {model[1] if model else platform.processor()}, {os.cpu_count()} cores, {threads} threads",
        f"date     {date.today()}, {time.perf_counter() - start:.0f} s{remark}",
    ]
    path = script.parent / "results" / f"{name}.txt"
    with atomic_write(path) as new:
        new.write_text(
            "\n".join([*lines, "", shortened(without_progress(done.stdout).rstrip())]) + "\n", encoding="utf-8"
        )
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except UserError as mistake:
        sys.exit(f"error: {mistake}")
