"""What is predicted: one `tasks/<name>.yaml` per task, and the prompts made from it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from distillery.params import WORD, Section, UserError, read_yaml, root, validate

Word = Annotated[str, Field(pattern=WORD)]
PLAIN_SEPARATOR = "\n\n"
VERDICTS = {"right": "it is one of the accepted answers", "wrong": "it is not"}  # the labels of a `qa` task
BETWEEN = " | "  # two accepted answers of a question
REASON = "\nReason:"  # after an answer it asks for the rationale


class Prompt(Section):
    """Texts with `{…}` fields. `template` asks for the label; `rationale` and `paraphrase` ask for free text.

    `response` says in what form the answer is wanted; it stands where the template has `{response}`.
    """

    system: str = ""
    instruction: str = ""
    response: str = ""
    template: str = "{instruction}\n\nText: {text}\nLabel:"
    rationale: str = "Explain in one short sentence why the answer is {label}."
    paraphrase: str = "Rewrite the text in other words. Keep every number and name. Reply with the new text only."

    @model_validator(mode="after")
    def _fields(self):
        fields = {"template": {"instruction", "response", "text"}, "rationale": {"label"}, "paraphrase": set()}
        for name, allowed in fields.items():
            found = {field for _, field, _, _ in Formatter().parse(getattr(self, name)) if field is not None}
            if found - allowed:
                known = ", ".join(f"{{{field}}}" for field in sorted(allowed)) or "none"
                raise ValueError(f"`{name}` knows no field {{{min(found - allowed)}}}; allowed: {known}")
        if "{text}" not in self.template:
            raise ValueError("`template` must hold {text}")
        if self.response and "{response}" not in self.template:
            raise ValueError("`template` must hold {response} when there is a `response`")
        return self


class Shot(Section):
    text: Annotated[str, Field(min_length=1)]
    label: str
    rationale: str = ""
    paraphrase: str = ""


class Task(Section):
    """A task file. `labels` maps each label to its meaning; their order is the order of probability vectors.

    kind: `classification`; or `choice`, where the n-th label stands for the n-th option that a row's text ends with; or
    `qa`, whose answers are free text, and whose labels are what a score makes of one: right or wrong.
    `prompts` are other ways to ask, which a teacher may be told to compare with `prompt`.
    """

    kind: Literal["classification", "choice", "qa"]
    labels: Annotated[dict[Word, str], Field(min_length=2)]
    prompt: Prompt = Prompt()
    prompts: dict[Word, Prompt] = {}
    severity: dict[str, Annotated[float, Field(ge=0, le=1)]] = {}  # of labels that call for an alert
    verbalizer: dict[str, Word] = {}
    few_shot: list[Shot] = []

    @model_validator(mode="before")
    @classmethod
    def _verdicts(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("kind") == "qa":
            if raw.get("labels", VERDICTS) != VERDICTS:
                raise ValueError("`kind: qa` has no labels of its own: leave `labels` out")
            raw = raw | {"labels": VERDICTS}
        return raw

    @model_validator(mode="after")
    def _labels_fit(self):
        shots = [] if self.kind == "qa" else [shot.label for shot in self.few_shot]
        for key, names in (("severity", self.severity), ("verbalizer", self.verbalizer), ("few_shot", shots)):
            for name in names:
                if name not in self.labels:
                    raise ValueError(f"`{key}` names the unknown label {name!r}; known: {', '.join(self.labels)}")
        if len(set(self.words)) < len(self.words):
            raise ValueError("two labels have the same word in `verbalizer`")
        return self

    @property
    def names(self) -> list[str]:
        return list(self.labels)

    @property
    def words(self) -> list[str]:
        """:meth:`word` of every label, in their order."""
        return [self.word(label) for label in self.labels]

    def word(self, label: str) -> str:
        """The text that stands for `label` in a prompt or an answer."""
        return self.verbalizer.get(label, label)


def load(name: str, folder: Path | None = None) -> Task:
    """The task `tasks/<name>.yaml`. Raises UserError naming the file and the key."""
    path = (folder or root() / "tasks") / f"{name}.yaml"
    return validate(Task, read_yaml(path), f"tasks/{name}.yaml")


def with_options(task: Task, text: str, options: Sequence[str]) -> str:
    """`text` (one line) with one more line for each of `options`, after the word of its label."""
    lines = [f"{task.word(label)}) {option}" for label, option in zip(task.names, options, strict=False)]
    return "\n".join([text, *lines])


def possible(task: Task, text: str) -> int:
    """How many of the task's labels, from the first, can be right for `text`: a row may have fewer options."""
    options = text.count("\n") if task.kind == "choice" else 0
    return options or len(task.names)


def accepted(answers: str) -> list[str]:
    """The accepted answers of a question, the one to learn first."""
    return answers.split(BETWEEN)


def question(task: Task, text: str) -> str:
    """The user's turn that asks for the label of `text`."""
    prompt = task.prompt
    return prompt.template.format(instruction=prompt.instruction, response=prompt.response, text=text)


def turns(task: Task, text: str, few_shot: int | Sequence[Shot] = 0) -> list[dict[str, str]]:
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
            {"role": "user", "content": question(task, shot.text)},
            {"role": "assistant", "content": task.word(shot.label)},
        ]
    return [*out, {"role": "user", "content": question(task, text)}]


def render(messages: list[dict[str, str]], tokenizer: Any, style: str = "chat") -> str:
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


def answer(task: Task, label: str, style: str = "chat") -> str:
    """What follows :func:`render` when the answer is `label`."""
    return task.word(label) if style == "chat" else f" {task.word(label)}"


AROUND = " \t\r\n\"'`*_.,:;!()[]{}<>“”‘’«»"  # quotes, brackets, emphasis and a full stop are no part of a label
ENDS = re.compile(r"[.:](?=\s|$)| [-–—] |\n")  # what may stand between a label and what follows it


def explained(task: Task, text: str) -> tuple[str | None, str]:
    """The label that `text` gives as its answer, and what it says after it. The label is None when there is any doubt.

    A label's word must come first, whatever its case, alone on its line or with a full stop, a colon or a dash after
    it; the name that the template gives the answer ("Sentiment: positive") may stand before it. An answer that gives
    another label on a line of its own takes the first one back.
    """
    text = text.strip()
    asked = task.prompt.template.splitlines()[-1].rpartition("}")[2].strip(AROUND)
    if asked and text.lstrip(AROUND).casefold().startswith(asked.casefold()):
        text = text.lstrip(AROUND)[len(asked) :].lstrip(AROUND + "-–—")
    words = {task.word(label).strip(AROUND).casefold(): label for label in task.labels}
    end = ENDS.search(text)
    first, rest = (text[: end.start()], text[end.end() :]) if end else (text, "")
    label = words.get(first.strip(AROUND).casefold())
    others = {words.get(line.strip(AROUND).casefold(), label) for line in rest.splitlines()}
    return (label if others <= {label} else None), rest.strip()


def parse(task: Task, text: str) -> str | None:
    """The label that `text` gives as its answer, or None: nothing is guessed. See :func:`explained`."""
    return explained(task, text)[0]
