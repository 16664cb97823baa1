"""Try every path of this project that differs on a GPU, one after the other, and print one table.

    PYTHONPATH=src python benchmarks/gpu_check.py [--minutes 10] [--device cpu] [--only WORD ...] [--dry-run]

Models are tiny and random, or have the shape of Qwen2.5-1.5B and 0.5B with random weights: nothing is downloaded. The
checks run in a process of their own; one that fails leaves the others alone, and after one that hangs, dies or breaks
CUDA there is a new process. A check that would start after the budget is skipped. `--device cpu` runs what a CPU can,
with the smallest shapes, to try the checks themselves. `--log` gets what the checks print, with the traceback of each
that fails.

Prints a line for each check: its result (ok, failed, skipped, not here), seconds, the peak of GPU memory, and a figure;
then the versions. The exit code is 1 when a check failed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import importlib.util
import multiprocessing
import os
import platform
import signal
import sys
import tempfile
import time
import traceback
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src"), str(Path(__file__).parent)]

from gpu_checks import CHECKS, Check, Place, use_device  # noqa: E402 - its folder is on the path from here on

# CUDA may start in the processes of the checks alone: a copy of a process in which it runs cannot use it
OFFLINE = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes")
ANEW = "GPU_CHECK_ANEW"  # of the environment: let each process load everything anew
LONGEST_DETAIL = 400  # characters
START_SECONDS = 300  # that a process may take to load everything
DEVICES = ("cuda", "mps", "cpu")


class Worker:
    """Runs functions in a process of its own, one after the other; all that they print goes to the file `log`.

    After one that died, hung or broke CUDA it is a new process.
    """

    def __init__(self, log: Path):
        self.log, self.process, self.connection = log, None, None

    def run(self, function: Any, *arguments: Any, seconds: float) -> tuple[Any, str, int]:
        """What `function` returns, its error in one line, and the peak of GPU memory in bytes.

        seconds: after these, beside the start of a process, it is ended.
        """
        try:
            if self.process is None:
                self._start()
            self.connection.send((function, arguments))
            if not self.connection.poll(seconds):
                self.end()
                return None, f"ended after {seconds:.0f} s", 0
            answer, error, peak = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join(10)
            code = self.process.exitcode
            self.end()
            return None, f"its process ended with code {code}", 0
        if "CUDA error" in error:  # every later call would fail, too
            self.end()
        return answer, error, peak

    def _start(self) -> None:
        context = multiprocessing.get_context(start_method())
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, self.log))
        self.process.start()
        other.close()
        if not self.connection.poll(START_SECONDS):
            raise ConnectionError
        self.connection.recv()

    def end(self) -> None:
        """End the process and all that it has started."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.join()
            self.connection.close()
            self.process = None


def start_method() -> str:
    """How a process starts: a copy of this one saves seconds; where CUDA runs here, or on macOS, GPUs fail in it."""
    torch = sys.modules.get("torch")
    if os.environ.get(ANEW) or sys.platform == "darwin" or (torch and torch.cuda.is_initialized()):
        return "spawn"
    return "fork"


def _serve(connection: Connection, log: Path) -> None:
    """Runs in the process of a :class:`Worker`."""
    os.setsid()
    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    preload()
    connection.send("ready")
    folder, environment, script = Path.cwd(), dict(os.environ), sys.modules["__main__"]
    while True:
        function, arguments = connection.recv()
        _reset_gpu()
        try:
            answer, error = function(*arguments), ""
        except BaseException as problem:
            traceback.print_exc()
            lines = str(problem).strip().splitlines() or [""]
            answer, error = None, f"{type(problem).__name__}: {lines[0]}"
        sys.modules["__main__"] = script  # a notebook's shell takes its place
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.stdout.flush()
        sys.stderr.flush()
        connection.send((answer, error, _gpu_peak()))


def _reset_gpu() -> None:
    """Free what an earlier check has left on the GPU, and count its memory from here on."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _gpu_peak() -> int:
    torch = sys.modules.get("torch")
    return torch.cuda.max_memory_allocated() if torch and torch.cuda.is_initialized() else 0


def find_device() -> str:
    """The device that is chosen where none is named. Runs in a process of its own."""
    from distillery.models.devices import default_device

    return default_device().type


def has_cuda() -> bool:
    """Whether torch sees a CUDA GPU."""
    torch = sys.modules.get("torch")
    return bool(torch and torch.cuda.is_available())


def prepare(models: Path) -> str:
    """Write the tiny models to `models`. Runs in a process of its own."""
    import tiny

    use_device("cpu")
    tiny.build_models(models)
    return ""


def run_check(check: Check, place: Place) -> str:
    """The figure of `check`. Runs in a process of its own."""
    use_device(place.device)
    place.folder.mkdir(parents=True)
    print(f"\n==== {check.name}", flush=True)
    return getattr(importlib.import_module(f"gpu_checks.{check.module}"), check.function)(place)


def missing_packages(check: Check) -> list[str]:
    """The packages that `check` needs and that are not installed."""

    def is_missing(name: str) -> bool:
        try:
            return importlib.util.find_spec(name) is None
        except ModuleNotFoundError:  # the package around it
            return True

    return [name for name in check.packages if is_missing(name)]


def print_row(*cells: Any) -> None:
    """One line of the table."""
    print("| " + " | ".join(str(cell).replace("|", "/").replace("\n", " ") for cell in cells) + " |", flush=True)


def print_header(*names: str) -> None:
    """The first two lines of the table."""
    print_row(*names)
    print_row(*("---" for _ in names))


def print_versions(worker: Worker) -> None:
    """The versions of the libraries, and the GPU."""
    for name in LIBRARIES:
        try:
            print(f"{name} {version(name)}", end=", ")
        except PackageNotFoundError:
            print(f"no {name}", end=", ")
    machine, error, _ = worker.run(_machine, seconds=60)
    print(f"Python {platform.python_version()}; {machine or error}", flush=True)


def _machine() -> str:
    import torch

    from distillery.training.machine import machine_name

    memory = f", {torch.cuda.mem_get_info()[1] / 2**30:.0f} GiB" if torch.cuda.is_available() else ""
    return f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}; {machine_name()}{memory}"


def preload() -> None:
    """Import what most checks import: the process of a check is a copy of this one. A check reports what is missing."""
    for module in ("torch", "distillery.training.run", "distillery.teachers.local", "distillery.evaluation.speed"):
        try:
            importlib.import_module(module)
        except ImportError:
            return


def prepare_run(worker: Worker, device: str, models: Path) -> str:
    """The device of the checks, `device` if it is named, after the tiny models are written to `models`.

    Raises RuntimeError in one line when one of both fails.
    """
    preload()
    if not device:
        device, error, _ = worker.run(find_device, seconds=120)
        if device in (None, "cpu") and start_method() == "fork" and has_cuda():
            os.environ[ANEW] = "1"  # a library has started CUDA here without torch's knowing
            worker.end()
            device, error, _ = worker.run(find_device, seconds=120)
        if error:
            raise RuntimeError(f"no device: {error}")
    _, error, _ = worker.run(prepare, models, seconds=120)
    if error:
        raise RuntimeError(f"the tiny models cannot be written: {error}")
    return device


def run_checks(worker: Worker, checks: list[Check], device: str, scratch: Path, budget: float) -> int:
    """Print the table of `checks`; how many failed. budget: seconds."""
    start, failed, models = time.perf_counter(), 0, scratch / "models"
    device = prepare_run(worker, device, models)
    if device == "cpu":
        print("The checks run on the CPU, with the smallest shapes: they say nothing of a GPU.")
    print_header("check", "result", "seconds", "peak GPU memory, MiB", "detail")
    for number, check in enumerate(checks):
        began = time.perf_counter()
        missing = missing_packages(check)
        if missing or (check.cuda and device != "cuda"):
            print_row(check.name, "not here", "", "", f"needs {', '.join(missing) or 'a CUDA GPU'}")
            continue
        left = budget - (began - start)
        if left <= 0:
            print_row(check.name, "skipped", "", "", f"the budget of {budget / 60:g} minutes is spent")
            continue
        place = Place(device, models, scratch / str(number))
        detail, error, peak = worker.run(run_check, check, place, seconds=check.seconds)
        failed += bool(error)
        took, memory = f"{time.perf_counter() - began:.1f}", f"{peak / 2**20:.0f}" if peak else ""
        print_row(check.name, "failed" if error else "ok", took, memory, (error or detail)[:LONGEST_DETAIL])
    return failed


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run the checks; the exit code."""
    parser = argparse.ArgumentParser(prog="gpu_check.py", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="after these no check starts")
    parser.add_argument("--device", choices=DEVICES, default="", help="in place of the first that works")
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="parts of the names of checks to run")
    parser.add_argument("--log", type=Path, help="the file for what the checks print")
    parser.add_argument("--dry-run", action="store_true", help="list the checks and what each needs")
    options = parser.parse_args(arguments)
    checks = [check for check in CHECKS if any(word in check.name for word in options.only)]
    if options.dry_run:
        print_header("check", "needs")
        for check in checks:
            print_row(check.name, check.needs)
        return 0
    for name, value in OFFLINE.items():
        os.environ.setdefault(name, value)
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch:
        log = (options.log or Path(scratch) / "log").absolute()
        worker = Worker(log)
        try:
            failed = run_checks(worker, checks, options.device, Path(scratch), 60 * options.minutes)
            print_versions(worker)
        except RuntimeError as problem:
            print(f"error: {problem}", file=sys.stderr)
            return 1
        finally:
            worker.end()
    print(f"{len(checks)} checks, {failed} failed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
