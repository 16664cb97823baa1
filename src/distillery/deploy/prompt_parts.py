"""The fixed parts of a generative student's prompt, for programs that have a tokenizer but not this package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distillery.models.encoding import tokenize_labels
from distillery.tasks.prompts import chat_turns, render_answer, render_prompt
from distillery.tasks.schema import Task

_MARK = "\x00"  # stands for the text


@dataclass(frozen=True)
class PromptParts:
    """What stands before and after a text, and the answers that are scored behind it, in the order of the labels.

    special_tokens: whether the tokenizer adds those of its own. answers: empty for free answers.
    """

    before: str
    after: str
    special_tokens: bool
    answers: list[str]


def prompt_parts(task: Task, tokenizer: Any, arch: str, style: str, few_shot: int) -> PromptParts:
    """The parts of the prompt of a causal student or an encoder-decoder; style, few_shot: as in `params.yaml`."""
    before, _, after = render_prompt(chat_turns(task, _MARK, few_shot), tokenizer, style).partition(_MARK)
    special_tokens = style == "plain" or arch == "seq2seq"
    if task.kind == "qa":
        return PromptParts(before, after, special_tokens, [])
    answers = [render_answer(task, name, style) for name in task.names]
    if all(tokens[-1] == tokenizer.eos_token_id for tokens in tokenize_labels(tokenizer, answers)):
        answers = [answer + tokenizer.eos_token for answer in answers]
    return PromptParts(before, after, special_tokens, answers)
