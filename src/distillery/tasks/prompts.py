"""Prompts made from a task: chat turns, rendered text, and what follows as the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distillery.errors import UserError
from distillery.tasks.schema import FewShotExample, Task

PLAIN_SEPARATOR = "\n\n"


RATIONALE_CUE = "\nReason:"  # after an answer it asks for the rationale


def with_options(task: Task, text: str, options: Sequence[str]) -> str:
    """`text` (one line) with one more line for each of `options`, after the word of its label."""
    lines = [f"{task.word(label)}) {option}" for label, option in zip(task.names, options, strict=False)]
    return "\n".join([text, *lines])


def count_options(task: Task, text: str) -> int:
    """How many of the task's labels, from the first, can be right for `text`: a row may have fewer options."""
    options = text.count("\n") if task.kind == "choice" else 0
    return options or len(task.names)


def user_turn(task: Task, text: str) -> str:
    """The user's turn that asks for the label of `text`."""
    prompt = task.prompt
    return prompt.template.format(instruction=prompt.instruction, response=prompt.response, text=text)


def chat_turns(task: Task, text: str, few_shot: int | Sequence[FewShotExample] = 0) -> list[dict[str, str]]:
    """Chat turns that ask for the label of `text`, after `few_shot` solved examples of the task file, or these ones.

    Raises UserError when the task file holds fewer examples.
    """
    if isinstance(few_shot, int):
        if few_shot > len(task.few_shot):
            raise UserError(f"few_shot: {few_shot} examples asked for, the task file holds {len(task.few_shot)}")
        few_shot = task.few_shot[:few_shot]
    out = [{"role": "system", "content": task.prompt.system}] if task.prompt.system else []
    for shot in few_shot:
        out += [
            {"role": "user", "content": user_turn(task, shot.text)},
            {"role": "assistant", "content": task.word(shot.label)},
        ]
    return [*out, {"role": "user", "content": user_turn(task, text)}]


def render_prompt(messages: list[dict[str, str]], tokenizer: Any, style: str = "chat") -> str:
    """The prompt text up to where the answer starts.

    style: `chat` uses the tokenizer's chat template (UserError when it has none), `plain` joins the turns.
    """
    if style == "chat":
        if not tokenizer.chat_template:
            raise UserError(f"{tokenizer.name_or_path}: no chat template; set `prompt: plain`")
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    text = ""
    for turn in messages:
        text += turn["content"] + (PLAIN_SEPARATOR if turn["role"] != "user" else " ")
    return text.rstrip(" ")


def render_answer(task: Task, label: str, style: str = "chat") -> str:
    """What follows :func:`render_prompt` when the answer is `label`."""
    return task.word(label) if style == "chat" else f" {task.word(label)}"
