"""Prompts of a task: chat turns, rendered text, and the answer that follows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from distillery.errors import UserError
from distillery.tasks.schema import FewShotExample, Task, TaskPrompt

PLAIN_SEPARATOR = "\n\n"
EXPLANATION_REQUEST = "Write the label first, and on the next line one short sentence on why it holds."
RATIONALE_CUE = "\nReason:"  # between an answer and its rationale
LABEL_QUESTION = "Does the label {label} ({meaning}) fit this text? Answer yes or no."
QUESTION_TEMPLATE = "{instruction}\n\nText: {text}\nAnswer:"  # in place of the default one, which ends with `Label:`


def with_options(task: Task, text: str, options: Sequence[str]) -> str:
    """`text` (one line) and a line for each of `options`, with the word of its label before it."""
    lines = [f"{task.word(label)}) {option}" for label, option in zip(task.names, options, strict=False)]
    return "\n".join([text, *lines])


def user_turn(task: Task, text: str) -> str:
    """The user turn that requests the label of `text`."""
    prompt = task.prompt
    return prompt.template.format(instruction=prompt.instruction, response=prompt.response, text=text)


def label_question(task: Task, label: str) -> Task:
    """Whether `label` fits a text, as a task of its own with the labels `no` and `yes`.

    The instruction of `task` holds the question where it has the field `{label}`; else one is added to it. It stands
    before a template without `{instruction}`, which would be the same for all labels.
    """
    prompt, named = task.prompt, {"{label}": task.word(label), "{meaning}": task.labels[label]}
    instruction = prompt.instruction
    if "{label}" not in instruction:
        instruction = f"{instruction}\n{LABEL_QUESTION}".lstrip()
    for field, value in named.items():
        instruction = instruction.replace(field, value)
    template = prompt.template if prompt.template != TaskPrompt().template else QUESTION_TEMPLATE
    if "{instruction}" not in template:
        template = f"{{instruction}}\n\n{template}"
    prompt = prompt.model_copy(update={"instruction": instruction, "template": template})
    return Task(kind="classification", labels={"no": "", "yes": ""}, prompt=prompt)


def chat_turns(task: Task, text: str, few_shot: int | Sequence[FewShotExample] = 0) -> list[dict[str, str]]:
    """Chat turns that request the label of `text`, after solved examples.

    few_shot: the number of examples from the task file, or the examples. Raises UserError when the task file has fewer.
    """
    if isinstance(few_shot, int):
        if few_shot > len(task.few_shot):
            raise UserError(f"few_shot: {few_shot} examples wanted, the task file has {len(task.few_shot)}")
        few_shot = task.few_shot[:few_shot]
    turns = [{"role": "system", "content": task.prompt.system}] if task.prompt.system else []
    for example in few_shot:
        turns += [
            {"role": "user", "content": user_turn(task, example.text)},
            {"role": "assistant", "content": task.word(example.label)},
        ]
    return [*turns, {"role": "user", "content": user_turn(task, text)}]


def explained_turns(task: Task, text: str, few_shot: int | Sequence[FewShotExample] = 0) -> list[dict[str, str]]:
    """As :func:`chat_turns`, for the label of `text` and on the next line its explanation."""
    turns = chat_turns(task, text, few_shot)
    examples = iter(task.few_shot[:few_shot] if isinstance(few_shot, int) else few_shot)
    for i, turn in enumerate(turns):
        if turn["role"] == "user":
            turns[i] = turn | {"content": f"{turn['content']}\n\n{EXPLANATION_REQUEST}"}
        elif turn["role"] == "assistant":
            turns[i] = turn | {"content": f"{turn['content']}\n{next(examples).rationale}".rstrip()}
    return turns


def without_system_turn(turns: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """`turns` with the text of the system turn, if there is one, before that of the first user turn."""
    if not turns or turns[0]["role"] != "system":
        return list(turns)
    system, first, *rest = turns
    return [first | {"content": f"{system['content']}\n\n{first['content']}"}, *rest]


def render_prompt(messages: list[dict[str, str]], tokenizer: Any, style: str = "chat") -> str:
    """The text of the prompt, up to the start of the answer.

    style: `chat` uses the tokenizer's chat template, `plain` joins the turns. A template that refuses a system turn, or
    leaves it out, gets its text in the first user turn. Raises UserError when there is no template, or when it refuses
    the conversation even so.
    """
    if style == "chat":
        if not tokenizer.chat_template:
            raise UserError(f"{tokenizer.name_or_path}: no chat template; set `prompt: plain`")
        system = messages[0]["content"].strip() if messages[0]["role"] == "system" else ""
        try:
            text = _apply_chat_template(messages, tokenizer)
            if system in text:
                return text
        except TemplateError:
            pass
        try:
            return _apply_chat_template(without_system_turn(messages), tokenizer)
        except TemplateError as error:
            raise UserError(
                f"{tokenizer.name_or_path}: the chat template refuses the prompt ({error}); set `prompt: plain`"
            ) from None
    text = ""
    for turn in messages:
        text += turn["content"] + (PLAIN_SEPARATOR if turn["role"] != "user" else " ")
    return text.rstrip(" ")


def _apply_chat_template(messages: list[dict[str, str]], tokenizer: Any) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def render_answer(task: Task, label: str, style: str = "chat") -> str:
    """The text after :func:`render_prompt` when the answer is `label`."""
    return task.word(label) if style == "chat" else f" {task.word(label)}"
