"""The prompt that a prompted teacher chose among those of its task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distillery.errors import UserError
from distillery.files import Paths
from distillery.tasks.schema import Task


def read_prompting(root: Path, teacher: str, task: Task) -> dict[str, Any]:
    """What `teacher` chose: `prompt`, a name in the task's `prompts` or None for its `prompt`, and its calibration.

    Without its `prompting.json` the task's prompt, not calibrated. Raises UserError when the task has no such prompt.
    """
    path = Paths(root).teacher(teacher) / "prompting.json"
    if not path.exists():
        return {"prompt": None, "prior": None}
    prompting = json.loads(path.read_text(encoding="utf-8"))
    check_prompt(task, prompting["prompt"], f"data/teacher/{teacher}/prompting.json")
    return prompting


def check_prompt(task: Task, prompt: str | None, place: str) -> None:
    """Raise UserError, which begins with `place`, when `task` has no prompt of this name; None is its own."""
    if prompt not in (None, *task.prompts):
        known = ", ".join(task.prompts) or "none"
        raise UserError(f"{place}: the task has no prompt `{prompt}`; it has: {known}")


def with_prompt(task: Task, prompt: str | None) -> Task:
    """`task` with the prompt of this name as its `prompt`; None: as it is."""
    return task if prompt is None else task.model_copy(update={"prompt": task.prompts[prompt]})


def student_task(root: Path, task: Task, prompt_of: str | None) -> Task:
    """`task` as a student reads it: with the prompt that the teacher `prompt_of` chose; None: with its own."""
    return task if prompt_of is None else with_prompt(task, read_prompting(root, prompt_of, task)["prompt"])
