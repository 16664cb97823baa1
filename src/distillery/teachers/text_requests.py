"""The files `data/texts/<name>.yaml`: which model writes which texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from distillery.config.load import validate_section
from distillery.config.schema import TRIMMED_TEXT, Count, Fraction, ModelConfig, Name, Positive, TeacherConfig
from distillery.config.schema.base import Section
from distillery.errors import UserError
from distillery.files import Paths, read_yaml
from distillery.tasks.schema import Task, load_task

Phrases = Annotated[list[Annotated[str, Field(pattern=TRIMMED_TEXT)]], Field(min_length=1)]


class TextRequest(Section):
    """A file `data/texts/<name>.yaml`: the model and the texts that it writes into `<name>.jsonl`."""

    task: Name
    """The task file, `tasks/<task>.yaml`: its labels, question and solved examples are all that the model is shown."""
    models: Annotated[dict[Name, ModelConfig], Field(max_length=1)] = {}
    """The model of `kind: lm`."""
    teacher: TeacherConfig
    """The model, a `kind: lm` or `api`, which is only prompted: it writes the texts, and labels them again."""
    texts: Annotated[int, Field(gt=0)]
    """Texts to write; those that pass all filters are fewer."""
    shares: dict[str, Positive] | None = None
    """Share of each label among the texts to write; equal when not given."""
    topics: Phrases | dict[str, Phrases] | Annotated[int, Field(gt=0)]
    """What the texts are about: a list, a list for each label, or the number of topics that the model proposes for each
    label from the task file."""
    attributes: dict[Name, Phrases] = {}
    """Further properties, such as `form`: each text gets one of the values at random."""
    examples: Count = 3
    """Largest number of solved examples of the label that the model is shown, drawn for each pass over the topics."""
    temperature: Positive | None = 1.0
    """Sampling temperature; null for an endpoint that takes none."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Draw from the likeliest tokens alone whose probabilities sum to this; 1 draws from all. An endpoint is
    sent it only where the request gives it."""
    max_new_tokens: Annotated[int, Field(gt=0)] = 80
    """Largest length of an answer, in tokens."""
    batch_size: Annotated[int, Field(gt=0)] = 32
    """Texts that are written at a time."""
    min_words: Annotated[int, Field(gt=0)] = 4
    """Shortest text, in words."""
    max_words: Annotated[int, Field(gt=0)] = 45
    """Longest text, in words."""
    near_duplicate: Annotated[float, Field(gt=0, le=1)] = 0.85
    """Similarity from which a text repeats another one, or a solved example."""
    min_confidence: Fraction = 0.5
    """Smallest probability of the label that the model gives a text that it has written."""
    seed: int = 0
    """Seed of the plan and of the sampling."""

    @model_validator(mode="after")
    def _fits(self):
        lists = self.topics.values() if isinstance(self.topics, dict) else [self.topics]
        if any(isinstance(topics, list) and len(set(topics)) < len(topics) for topics in lists):
            raise ValueError("`topics` must be different")
        if self.min_words > self.max_words:
            raise ValueError("`min_words` must not be above `max_words`")
        return self


def read_text_request(root: Path, file: str) -> tuple[TextRequest, Task]:
    """The request in `file`, a path below `root`, and its task. Raises UserError naming the file and the key."""
    request = validate_section(TextRequest, read_yaml(root / file), file)
    teacher = request.teacher
    if teacher.kind not in ("lm", "api") or teacher.finetune:
        raise UserError(f"{file}: teacher: must be a `kind: lm` or `api` without `finetune`")
    if set(request.models) != ({teacher.model} if teacher.model else set()):
        raise UserError(f"{file}: models: must be the `model` of the teacher, and no other")
    if teacher.kind == "lm" and request.temperature is None:
        raise UserError(f"{file}: temperature: must be a number above 0 for `kind: lm`; only an endpoint may need null")
    if teacher.prompts or teacher.examples_from != "task":
        raise UserError(f"{file}: teacher: `prompts` and `examples_from` need gold rows: leave out")
    if teacher.calibrate == "clusters":
        raise UserError(f"{file}: teacher.calibrate: clusters: is for rows of a corpus; `batch` and `contextual` fit")
    task = load_task(request.task, Paths(root).tasks)
    if task.kind != "classification":
        raise UserError(f"{file}: task: texts are written for a task of `kind: classification`, not {task.kind}")
    if teacher.few_shot > len(task.few_shot):
        shown = f"tasks/{request.task}.yaml has {len(task.few_shot)} in `few_shot`"
        raise UserError(f"{file}: teacher.few_shot: {teacher.few_shot} wanted, {shown}")
    _check_labels(request, task, file)
    return request, task


def _check_labels(request: TextRequest, task: Task, file: str) -> None:
    """`shares` and `topics` name labels of `task`, and there are topics for each label that has a share."""
    topics = request.topics if isinstance(request.topics, dict) else {}
    for key, labels in (("shares", request.shares or {}), ("topics", topics)):
        for name in labels:
            if name not in task.names:
                raise UserError(f"{file}: {key}: unknown label {name!r}; known: {', '.join(task.names)}")
    missing = [name for name in request.shares or task.names if topics and name not in topics]
    if missing:
        raise UserError(f"{file}: topics: none for {', '.join(missing)}")
