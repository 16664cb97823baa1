"""Every stage of a small experiment in one process: most of a stage's time goes into starting Python and loading torch.

The notebooks are those of the pipeline, in their order, in a shell that shows tables and figures as a kernel does. DVC,
papermill and a process for each stage have their tests in tests/test_notebooks.py and tests/test_stage.py.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import traceback
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import tiny
from forked import fork_context

Counts = dict[str, list[int]]


def run_experiment(repo: Path) -> Counts:
    """Run all stages of `params.yaml` in the folder `repo`. Fails with the traceback of a stage that fails.

    Returns, by the name of the executed notebook, how many other models were in memory at each load of a model.
    """
    return _in_a_process(execute_all, repo)


def run_notebook(repo: Path, name: str, **selectors: Any) -> None:
    """Run one notebook in the folder `repo`. Fails with its traceback."""
    (mistake,) = users_mistakes([Attempt(repo, name, selectors)])
    assert not mistake, mistake


def run_lesson(notebook: Path, executed: Path, parameters: dict[str, Any]) -> None:
    """Run the cells of `notebook` with `parameters` and write them to `executed`. Fails with its traceback."""
    _in_a_process(execute_in_root, notebook, executed, parameters)


@dataclass(frozen=True)
class Attempt:
    """To run a notebook in the folder `repo` with these `selectors`, in an environment with `env`."""

    repo: Path
    notebook: str
    selectors: dict[str, Any]
    env: dict[str, str] = field(default_factory=dict)


def users_mistakes(attempts: list[Attempt]) -> list[str]:
    """Run the notebooks one after the other; the message of the `UserError` in which each ends, or "".

    Fails with the traceback when a notebook ends in another exception.
    """
    return _in_a_process(attempt_all, attempts)


def _in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` returns in a process of its own. Fails with its traceback."""
    receiver, sender = fork_context().Pipe(duplex=False)
    process = fork_context().Process(target=_send_result, args=(sender, dict(os.environ), function, arguments))
    process.start()
    sender.close()
    try:
        result, error = receiver.recv()
    except EOFError:
        result, error = None, "the process ended early"
    process.join()
    assert not error, error
    return result


# ------------------------------------------------------------------------------- in the process of the stages


def _send_result(sender: Connection, environment: dict[str, str], function: Callable, arguments: tuple) -> None:
    os.environ |= {name: value for name, value in environment.items() if name not in os.environ}
    gc.freeze()  # see tests/conftest.py
    try:
        sender.send((function(*arguments), ""))
    except Exception:
        sender.send((None, traceback.format_exc()))


class ModelCount:
    """Counts, at each load of a model, those that are still in memory."""

    def __init__(self) -> None:
        from transformers import PreTrainedModel

        self.at_load: list[int] = []
        loaded, original = weakref.WeakSet(), PreTrainedModel.from_pretrained.__func__

        def from_pretrained(cls: type, *arguments: Any, **options: Any) -> Any:
            self.at_load.append(len(loaded))
            model = original(cls, *arguments, **options)
            loaded.add(model)
            return model

        PreTrainedModel.from_pretrained = classmethod(from_pretrained)


def run_stage(name: str, selectors: dict[str, Any]) -> None:
    """Run notebook `name` of an experiment, in whose folder this process is, and write its executed copy."""
    executed = Path("reports/notebooks") / f"{'-'.join([name, *map(str, selectors.values())])}.ipynb"
    execute(Path("build/notebooks") / f"{name}.ipynb", executed, selectors)


def execute(notebook: Path, executed: Path, parameters: dict[str, Any]) -> None:
    """Run the cells of `notebook` and write them with what they show to `executed`."""
    import matplotlib
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output

    shell = InteractiveShell.instance()
    shell.reset()
    # that of a kernel; a server of processes that had to start again lacks the variable for it
    matplotlib.use("module://matplotlib_inline.backend_inline")
    book = json.loads(notebook.read_text(encoding="utf-8"))
    for cell in (cell for cell in book["cells"] if cell["cell_type"] == "code"):
        with capture_output() as captured:
            result = shell.run_cell("".join(cell["source"]))
        result.raise_error()
        shown = [output.data for output in captured.outputs]
        if result.result is not None:  # the value of the last line
            shown.append(shell.display_formatter.format(result.result)[0])
        cell["outputs"] = [{"output_type": "display_data", "data": data} for data in shown]
        if captured.stderr:
            cell["outputs"].append({"output_type": "stream", "name": "stderr", "text": captured.stderr})
        if "parameters" in cell["metadata"].get("tags", []):
            shell.push(parameters)
    executed.parent.mkdir(parents=True, exist_ok=True)
    executed.write_text(json.dumps(book), encoding="utf-8")


def execute_in_root(notebook: Path, executed: Path, parameters: dict[str, Any]) -> None:
    """See :func:`run_lesson`."""
    os.chdir(tiny.ROOT)
    execute(notebook, executed, parameters)


def execute_all(repo: Path) -> Counts:
    """See :func:`run_experiment`."""
    from distillery.cli import inputs, strip
    from distillery.config.load import load_params

    os.chdir(repo)
    counts, models, params = {}, ModelCount(), load_params()

    def stage(name: str, **selectors: Any) -> None:
        run_stage(name, selectors)
        counts["-".join([name, *map(str, selectors.values())])] = models.at_load.copy()
        models.at_load.clear()

    strip()
    for source in params.data:
        stage("01_data", source=source)
    inputs("teachers")
    for teacher in params.teachers:
        stage("02_teach", teacher=teacher)
    stage("03_augment")
    inputs("students")
    for student in params.students:
        for seed in params.seeds:
            stage("04_distill", student=student, seed=seed)
    stage("05_evaluate")
    return counts


def attempt_all(attempts: list[Attempt]) -> list[str]:
    """See :func:`users_mistakes`."""
    from huggingface_hub import constants

    from distillery.errors import UserError

    messages = []
    for attempt in attempts:
        os.chdir(attempt.repo)
        before = os.environ.copy()
        os.environ |= attempt.env
        importlib.reload(constants)  # it reads the environment when it is imported
        try:
            run_stage(attempt.notebook, attempt.selectors)
            messages.append("")
        except UserError as mistake:
            messages.append(str(mistake))
        finally:
            for name in attempt.env:
                del os.environ[name]
            os.environ |= before
    return messages
