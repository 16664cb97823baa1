"""The schema of task files, `tasks/<name>.yaml`."""

from __future__ import annotations

import re
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from distillery.config.load import validate_section
from distillery.config.schema import TRIMMED_TEXT, Section
from distillery.files import Paths, read_yaml, repository_root
from distillery.label_sets import NO_LABELS, SET_SEPARATOR, LabelSets, split_labels

Verbalization = Annotated[str, Field(pattern=TRIMMED_TEXT)]


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"must be a regular expression: {error}") from None
    return pattern


Pattern = Annotated[str, Field(min_length=1), AfterValidator(_compiles)]


ANSWER_LABELS = {"right": "it is one of the accepted answers", "wrong": "it is not"}  # the labels of a `qa` task


ANSWER_SEPARATOR = " | "  # two accepted answers of a question
N_OPTIONS = "n_options"  # column of the rows of a `choice` task: how many labels, from the first, have an option


class TaskPrompt(Section):
    """Texts of a prompt, with `{…}` fields."""

    system: str = ""
    """System turn."""
    instruction: str = ""
    """Instruction, for `{instruction}` in the template. For a question about each label of a `multilabel` task it may
    hold `{label}` and `{meaning}`; without `{label}` a question is added to it."""
    response: str = ""
    """Form of the answer, for `{response}` in the template."""
    template: str = "{instruction}\n\nText: {text}\nLabel:"
    """User turn that requests the label of `{text}`."""
    rationale: str = "Explain in one short sentence why the answer is {label}."
    """User turn that requests an explanation of `{label}`."""
    paraphrase: str = "Rewrite the text in other words. Keep every number and name. Reply with the new text only."
    """User turn that requests a paraphrase."""

    @model_validator(mode="after")
    def _fields_are_known(self):
        fields = {"template": {"instruction", "response", "text"}, "rationale": {"label"}, "paraphrase": set()}
        for name, allowed in fields.items():
            used = {field for _, field, _, _ in Formatter().parse(getattr(self, name)) if field is not None}
            if used - allowed:
                known = ", ".join(f"{{{field}}}" for field in sorted(allowed)) or "none"
                raise ValueError(f"`{name}` knows no field {{{min(used - allowed)}}}; allowed: {known}")
        if "{text}" not in self.template:
            raise ValueError("`template` must hold {text}")
        if self.response and "{response}" not in self.template:
            raise ValueError("`template` must hold {response} when there is a `response`")
        return self


class FewShotExample(Section):
    """A solved example for prompts."""

    text: Annotated[str, Field(min_length=1)]
    """The text."""
    label: str
    """Its label; of a `qa` task the answer."""
    rationale: str = ""
    """Explanation of the label, for prompts that request rationales."""
    paraphrase: str = ""
    """Paraphrase of the text, for prompts that request paraphrases."""


class NamePerturbation(Section):
    """Other names: every name and ticker of a text is replaced by an invented one."""

    invented: Annotated[list[str], Field(min_length=1)]
    """Names to put in place of those of a text; none may hint at a label."""
    unchanged: list[str] = []
    """Words with a capital that are no names, beside `calendar`, such as `Ltd`."""
    tickers: Pattern | None = None
    """Regular expression of tickers; their capitals are shifted by seven letters."""


class AmountPerturbation(Section):
    """Other amounts: all amounts of money in a text are doubled."""

    currencies: list[str]
    """Codes and signs that stand before a figure."""
    currency_words: list[str] = []
    """Words that stand after a figure, such as `euros`."""
    units: list[str] = []
    """Units between a figure and its currency, such as `million`."""
    money_units: list[str] = []
    """Units that mark money even without a currency, such as `mn`."""


class Perturbations(Section):
    """Words that a change of wording must keep, and rules that reword a text without a change of its label.

    A paraphrase is rejected when it loses `tickers` or other `directions` occur in it. The evaluation rewrites test
    rows by `names`, `amounts` and `spelling`. Whatever is left out is neither checked nor rewritten.
    """

    directions: dict[str, Annotated[list[str], Field(min_length=1)]] = {}
    """Families of direction words in lower case: the same families must occur in a text and in its paraphrase."""
    tickers: Pattern | None = None
    """Regular expression of the tickers, currencies and names in capitals that a paraphrase must keep."""
    calendar: list[str] = []
    """Months, days and holidays: words with a capital that are no names; a number beside one is a date."""
    names: NamePerturbation | None = None
    """Rewrites test rows with other names."""
    amounts: AmountPerturbation | None = None
    """Rewrites test rows with doubled amounts of money."""
    spelling: dict[Pattern, str] = {}
    """Rewrites test rows in another spelling: regular expressions and their replacements, applied in order."""

    @model_validator(mode="after")
    def _one_family_a_word(self):
        family_of: dict[str, str] = {}
        for family, words in self.directions.items():
            for word in words:
                if word != word.lower():
                    raise ValueError(f"`directions.{family}`: {word!r} must be in lower case")
                if family_of.setdefault(word, family) != family:
                    raise ValueError(f"`directions`: {word!r} is in two families, {family_of[word]} and {family}")
        return self

    @model_validator(mode="after")
    def _replacements_fit(self):
        for pattern, replacement in self.spelling.items():
            try:
                re.sub(pattern, replacement, "")
            except (re.error, IndexError) as error:
                raise ValueError(f"`spelling`: {pattern!r}: {replacement!r} does not fit: {error}") from None
        return self


class Task(Section):
    """A task file, `tasks/<name>.yaml`: what is predicted, and the prompts for language models."""

    kind: Literal["classification", "multilabel", "choice", "qa"]
    """`classification`: one of the labels. `multilabel`: any number of the labels, none too. `choice`: the n-th label
    stands for the n-th option that the row's text ends with. `qa`: free text, compared with the accepted answers."""
    labels: Annotated[dict[Verbalization, str], Field(min_length=2)]
    """Labels and their meaning, in the order of probability vectors; not for a `qa` task."""
    prompt: TaskPrompt = TaskPrompt()
    """The prompt."""
    prompts: dict[Verbalization, TaskPrompt] = {}
    """Other prompts by name, for a teacher that tries them."""
    severity: dict[str, Annotated[float, Field(ge=0, le=1)]] = {}
    """Severity of labels that call for an alert."""
    verbalizer: dict[str, Verbalization] = {}
    """Words for labels in prompts and answers; the label itself when not given."""
    few_shot: list[FewShotExample] = []
    """Solved examples for prompts."""
    perturbations: Perturbations = Perturbations()
    """Words that a paraphrase must keep, and rules that reword test rows."""

    @model_validator(mode="before")
    @classmethod
    def _labels_of_answers(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("kind") == "qa":
            if raw.get("labels", ANSWER_LABELS) != ANSWER_LABELS:
                raise ValueError("`kind: qa` has no labels of its own: leave `labels` out")
            raw = raw | {"labels": ANSWER_LABELS}
        return raw

    @model_validator(mode="after")
    def _labels_fit(self):
        examples = [] if self.kind == "qa" else [example.label for example in self.few_shot]
        for key, names in (("severity", self.severity), ("verbalizer", self.verbalizer), ("few_shot", examples)):
            for name in names:
                if name not in self.labels:
                    raise ValueError(f"`{key}` names the unknown label {name!r}; known: {', '.join(self.labels)}")
        if len(set(self.words)) < len(self.words):
            raise ValueError("two labels have the same word in `verbalizer`")
        return self

    @model_validator(mode="after")
    def _labels_make_sets(self):
        if self.kind != "multilabel":
            return self
        for name in self.labels:
            if SET_SEPARATOR.strip() in name or name == NO_LABELS:
                raise ValueError(f"label {name!r}: `|` divides the labels of a row, and {NO_LABELS} stands for none")
        for key in ("severity", "few_shot"):
            if getattr(self, key):
                raise ValueError(f"`{key}` is not for `kind: multilabel`: leave it out")
        return self

    @property
    def names(self) -> list[str]:
        """The labels, as label sets for a `multilabel` task."""
        return LabelSets(self.labels) if self.kind == "multilabel" else list(self.labels)

    @property
    def words(self) -> list[str]:
        """:meth:`word` of every label, in their order."""
        return [self.word(label) for label in self.labels]

    def word(self, label: str) -> str:
        """The text that stands for `label` in a prompt or an answer; of a label set the words of its labels."""
        if self.kind == "multilabel":
            return SET_SEPARATOR.join(self.verbalizer.get(one, one) for one in split_labels(label)) or NO_LABELS
        return self.verbalizer.get(label, label)


def load_task(name: str, folder: Path | None = None) -> Task:
    """The task `tasks/<name>.yaml`. Raises UserError naming the file and the key."""
    path = folder / f"{name}.yaml" if folder else Paths(repository_root()).task(name)
    return validate_section(Task, read_yaml(path), f"tasks/{name}.yaml")


def accepted_answers(answers: str) -> list[str]:
    """The accepted answers of a question; training uses the first."""
    return answers.split(ANSWER_SEPARATOR)
