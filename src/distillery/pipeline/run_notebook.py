"""Run one notebook as a stage of the pipeline: ``distillery run 04_distill -p student tiny-kd -p seed 0``.

Papermill runs the notebook from ``build/notebooks/`` in the root folder, on the Python that runs this module. Printed
lines appear at once. The executed copy appears in ``reports/notebooks/`` only when the notebook ended without error.
"""

from __future__ import annotations

import ast
import fcntl
import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from distillery.config.load import load_params
from distillery.config.schema import Params
from distillery.errors import UserError
from distillery.files import atomic_write, raise_if_disk_full, repository_root
from distillery.pipeline.environment import set_environment
from distillery.pipeline.stage_times import timed_stage

# an optional part of jsonschema, which papermill loads: building its grammar of web addresses takes a second
sys.modules.setdefault("rfc3987_syntax", None)

SHELLS = {"sh", "bash", "dash", "zsh", "fish", "ksh"}


def notebook_parameters(notebook: Path) -> dict[str, Any]:
    """Names and defaults in the notebook's cell tagged `parameters`; empty when it has none."""
    defaults = {}
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if "parameters" in cell["metadata"].get("tags", []):
            for line in ast.parse("".join(cell["source"])).body:
                if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
                    defaults[line.targets[0].id] = ast.literal_eval(line.value)
    return defaults


def convert_parameters(notebook: str, defaults: dict[str, Any], pairs: Sequence[Sequence[str]]) -> dict[str, Any]:
    """The `-p` pairs, converted to the types of the notebook's defaults.

    Raises UserError for a name that the notebook lacks, and for a value of another type.
    """
    values = {}
    for key, text in pairs:
        if key not in defaults:
            raise UserError(f"-p {key}: {notebook} has no such parameter; it has: {', '.join(defaults) or 'none'}")
        kind = type(defaults[key])
        try:
            values[key] = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError):
            expected = "true or false" if kind is bool else kind.__name__
            raise UserError(f"-p {key}: must be {expected}, not {text!r}") from None
    return values


def parse_selectors(
    notebook: str, defaults: dict[str, Any], selectors: Sequence[Sequence[str]], params: Params
) -> dict[str, Any]:
    """The values of a stage's selectors, see :func:`convert_parameters`.

    Raises UserError for a name without a value, and for a value that params.yaml does not hold: papermill would run the
    notebook with its default instead.
    """
    known = {
        "source": list(params.data),
        "teacher": list(params.teachers),
        "student": list(params.students),
        "seed": params.seeds,
    }
    values = convert_parameters(notebook, defaults, selectors)
    for key, text in selectors:
        if key in known and values[key] not in known[key]:
            allowed = ", ".join(map(str, known[key]))
            raise UserError(f"-p {key}: params.yaml has no {key} {text!r}; it has: {allowed or 'none'}")
    for key in defaults:
        if key not in values:
            raise UserError(f"{notebook} needs -p {key}")
    return values


@contextmanager
def single_process(lock: Path, patience: float = 5.0) -> Iterator[None]:
    """Hold the file `lock` during this block, so that one process at a time runs it.

    Raises UserError when another process still holds it after `patience` seconds: the notebook of a killed process may
    need seconds to end.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a+") as file:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    file.seek(0)
                    raise UserError(f"{lock.stem} runs already (process {file.read().strip()})") from None
                time.sleep(0.2)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def kill_children() -> None:
    """End the notebook's kernel and all processes that it started."""
    for child in psutil.Process().children(recursive=True):
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue


def end_with_dvc() -> None:
    """End this process soon after the `dvc` that started it: after a killed `dvc repro` nothing may go on training."""
    watched = []  # DVC, and the shell that may stand between
    for process in psutil.Process().parents():
        watched.append(process)
        if process.name() not in SHELLS:
            break

    def watch() -> None:
        while all(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in watched):
            time.sleep(0.5)
        kill_children()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def publish_notebook(running: Path, output: Path) -> None:
    """Move an executed notebook to `output`, without the folders of this machine: git tracks the copy."""
    text = running.read_text(encoding="utf-8")
    for folder in (Path.cwd(), Path(sys.prefix)):
        text = text.replace(f"{folder}{os.sep}", "")
    text = text.replace(running.as_posix(), output.as_posix())
    with atomic_write(output) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def redirect_stderr_to(path: Path) -> Iterator[None]:
    """Processes started in this block write their standard error to `path`.

    A kernel that is ended while it sends would otherwise print a traceback of its transport. The output of cells does
    not pass here: it arrives as messages.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    with open(path, "w") as log:
        os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(stderr, 2)
        os.close(stderr)


def isolate_kernel() -> None:
    """Let notebooks run on this Python with the variables of :mod:`distillery.pipeline.environment`.

    The kernel named python3 is that of this Python, whatever kernel of that name the user's account has. No start-up
    file of the account runs before a notebook.
    """
    set_environment()
    os.environ["JUPYTER_PATH"] = str(Path(sys.prefix) / "share/jupyter")
    os.environ["IPYTHONDIR"] = str(Path(".cache/ipython").resolve())


def run_papermill(notebook: Path, running: Path, values: dict[str, Any]) -> None:
    """Run `notebook` with the parameters `values`; its executed copy grows at `running`."""
    import papermill

    papermill.execute_notebook(
        str(notebook),
        str(running),
        parameters=values,
        kernel_name="python3",
        language="python",
        progress_bar=False,
        stdout_file=sys.stdout,
        start_timeout=180,
        iopub_timeout=60,  # seconds that a busy machine may need to deliver a cell's last output
        extra_arguments=["--log-level=50"],  # no warnings of the kernel about its transport and its end
    )


def execute_notebook(notebook: Path, output: Path, values: dict[str, Any], failed: Path) -> None:
    """Run `notebook` (paths relative to the working folder) and move its executed copy to `output`.

    Raises UserError for a user's mistake inside the notebook, for a kernel that died, and for a full disk. Any other
    exception of the notebook ends the process with its traceback. The incomplete notebook is then at `failed`.
    """
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    running = Path(".cache/running") / output.name
    stderr = running.with_suffix(".stderr")
    for folder in (running.parent, failed.parent, output.parent):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with redirect_stderr_to(stderr):
            run_papermill(notebook, running, values)
        publish_notebook(running, output)
        failed.unlink(missing_ok=True)  # of an earlier attempt
    except PapermillExecutionError as error:
        if error.ename == "UserError":
            raise UserError(" ".join(str(error.evalue).split())) from None
        os.replace(running, failed)
        text = str(error)
        print(text if sys.stderr.isatty() else re.sub(r"\x1b\[[0-9;]*m", "", text), file=sys.stderr)
        sys.exit(f"error: {output.stem} failed; the notebook as far as it came: {failed}")
    except DeadKernelError:
        os.replace(running, failed)
        raise UserError(
            f"{output.stem}: its Python process was killed (out of memory?); the notebook as far as it came: {failed}"
        ) from None
    except OSError as error:
        raise_if_disk_full(error, output)
        raise
    finally:
        running.unlink(missing_ok=True)
        kill_children()
        stderr.unlink(missing_ok=True)


def run_stage(name: str, selectors: Sequence[Sequence[str]] = ()) -> None:
    """Run the notebook `name` with the pairs (parameter, value) of `selectors`.

    Raises UserError for a notebook, a parameter or a value that does not exist, and as :func:`execute_notebook` does.
    """
    params = load_params()
    os.chdir(repository_root())
    notebook = Path("build/notebooks") / f"{name}.ipynb"
    if not notebook.exists():
        known = ", ".join(sorted(path.stem for path in notebook.parent.glob("*.ipynb")))
        raise UserError(f"{notebook}: no such file; there is: {known or 'none (run: dvc repro strip)'}")
    values = parse_selectors(name, notebook_parameters(notebook), selectors, params)
    stem = "-".join([name, *(text for _, text in selectors)])
    output = Path("reports/notebooks") / f"{stem}.ipynb"

    isolate_kernel()
    if "DVC_STAGE" in os.environ:
        end_with_dvc()
    with single_process(Path(".cache/running") / f"{stem}.lock"):
        output.unlink(missing_ok=True)
        with timed_stage(Path(), stem):
            execute_notebook(notebook, output, values, Path(".cache/failed") / output.name)
