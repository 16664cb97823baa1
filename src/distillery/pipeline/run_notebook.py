"""Run one notebook as a stage of the pipeline: ``distillery run 04_distill -p student tiny-kd -p seed 0``.

The notebook runs from ``build/notebooks/`` through papermill, in the root folder, on this very Python. Its printed
lines appear as it runs. Its executed copy is put into ``reports/notebooks/`` when it has ended well, not before.
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
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from distillery.config.load import load_params
from distillery.config.schema import Params
from distillery.errors import UserError
from distillery.files import atomic_write, raise_if_disk_full, repository_root

# What makes two runs on one machine agree to the last bit: no thread count that follows the load, no kernel choice that
# follows memory alignment, no hash order. A sum's rounding still depends on the number of threads, that is, on the
# machine; set OMP_NUM_THREADS to compare machines. What the user has set stays.
ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MKL_CBWR": "AUTO",
    "MKL_DYNAMIC": "FALSE",
    "OMP_DYNAMIC": "FALSE",
    "PYTHONHASHSEED": "0",
    # the libraries' own remarks, with the folders of this machine in them
    "PYTHONWARNINGS": "ignore::FutureWarning,ignore::UserWarning,ignore:IProgress not found",
    "TOKENIZERS_PARALLELISM": "false",
}


SHELLS = {"sh", "bash", "dash", "zsh", "fish", "ksh"}


def notebook_parameters(notebook: Path) -> dict[str, Any]:
    """Names and defaults in the notebook's cell tagged `parameters`; empty when it has none."""
    found = {}
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if "parameters" in cell["metadata"].get("tags", []):
            for line in ast.parse("".join(cell["source"])).body:
                if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
                    found[line.targets[0].id] = ast.literal_eval(line.value)
    return found


def parse_selectors(name: str, defaults: dict[str, Any], given: Sequence[Sequence[str]], experiment: Params) -> dict:
    """The `-p` pairs with the type of the notebook's defaults.

    Raises UserError for a name that the notebook lacks, for one that is not given, and for a value that params.yaml
    does not hold: papermill would run the notebook with its default instead.
    """
    known = {
        "source": list(experiment.data),
        "teacher": list(experiment.teachers),
        "student": list(experiment.students),
        "seed": experiment.seeds,
    }
    values = {}
    for key, text in given:
        if key not in defaults:
            raise UserError(f"-p {key}: {name} has no such parameter; it has: {', '.join(defaults) or 'none'}")
        try:
            values[key] = type(defaults[key])(text)
        except ValueError:
            raise UserError(f"-p {key}: must be {type(defaults[key]).__name__}, not {text!r}") from None
        if key in known and values[key] not in known[key]:
            allowed = ", ".join(map(str, known[key]))
            raise UserError(f"-p {key}: params.yaml has no {key} {text!r}; it has: {allowed or 'none'}")
    for key in defaults:
        if key not in values:
            raise UserError(f"{name} needs -p {key}")
    return values


@contextmanager
def single_process(lock: Path, patience: float = 5.0):
    """Let one process at a time run a stage; a killed one's notebook may need seconds to end.

    Raises UserError when another still runs after `patience` seconds.
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
    """End the notebook's kernel and whatever it started."""
    for child in psutil.Process().children(recursive=True):
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue


def end_with_dvc() -> None:
    """End this process soon after the `dvc` that started it: a killed `dvc repro` must not train on in the dark."""
    watched = []
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
    """Move an executed notebook to its place, without the folders of this machine: it is committed."""
    text = running.read_text(encoding="utf-8")
    for folder in (Path.cwd(), Path(sys.prefix)):
        text = text.replace(f"{folder}{os.sep}", "")
    text = text.replace(running.as_posix(), output.as_posix())
    with atomic_write(output) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def redirect_stderr_to(path: Path):
    """Processes started in this block write their standard error to `path`: a kernel that is ended while it talks
    would leave its transport's traceback on the console. What a cell prints reaches us by another way."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(path, "w") as log:
        os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


def execute_notebook(notebook: Path, output: Path, values: dict[str, Any], failed: Path) -> None:
    """Run `notebook` (paths relative to the working folder) and move its executed copy to `output`.

    Raises UserError for a user's mistake that the notebook met, for a kernel that died, and for a full disk. Any other
    exception of the notebook's ends the process with its traceback; the notebook as far as it came is at `failed`.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    running = Path(".cache/running") / output.name
    remarks = running.with_suffix(".stderr")
    for folder in (running.parent, failed.parent, output.parent):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with redirect_stderr_to(remarks):
            papermill.execute_notebook(
                str(notebook),
                str(running),
                parameters=values,
                kernel_name="python3",
                language="python",
                progress_bar=False,
                stdout_file=sys.stdout,
                start_timeout=180,
                iopub_timeout=60,  # seconds that a busy machine may need to hand over a cell's last output
                extra_arguments=["--log-level=50"],  # the kernel's own remarks, on its transport and on being ended
            )
        publish_notebook(running, output)
        failed.unlink(missing_ok=True)  # an earlier attempt's
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
        remarks.unlink(missing_ok=True)


def run_stage(name: str, given: Sequence[Sequence[str]] = ()) -> None:
    """Run the notebook `name` with the selectors `given` (name, value). Raises UserError for what params.yaml lacks."""
    experiment = load_params()
    os.chdir(repository_root())
    notebook = Path("build/notebooks") / f"{name}.ipynb"
    if not notebook.exists():
        here = ", ".join(sorted(p.stem for p in notebook.parent.glob("*.ipynb")))
        raise UserError(f"{notebook}: no such file; there is: {here or 'none (run: dvc repro strip)'}")
    values = parse_selectors(name, notebook_parameters(notebook), given, experiment)
    stem = "-".join([name, *(text for _, text in given)])
    output = Path("reports/notebooks") / f"{stem}.ipynb"

    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    # The kernel named python3 is this Python's, whatever the user's account holds under that name; and no start-up file
    # of the account's runs before a notebook.
    os.environ["JUPYTER_PATH"] = str(Path(sys.prefix) / "share/jupyter")
    os.environ["IPYTHONDIR"] = str(Path(".cache/ipython").resolve())
    if "DVC_STAGE" in os.environ:
        end_with_dvc()
    with single_process(Path(".cache/running") / f"{stem}.lock"):
        output.unlink(missing_ok=True)
        execute_notebook(notebook, output, values, Path(".cache/failed") / output.name)
