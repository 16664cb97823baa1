"""A language model writes labelled texts from a task file alone: `data/texts/<name>.yaml` to `<name>.jsonl`."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from distillery.errors import UserError
from distillery.files import atomic_write, write_json
from distillery.fingerprint import code_digest
from distillery.tasks.schema import Task
from distillery.teachers.asking import (
    Progress,
    counting_teacher,
    mistakes_in,
    predict_in_blocks,
    rounded_probabilities,
    run_record,
)
from distillery.teachers.cache import STORE_PATH, AnswerStore, canonical_json
from distillery.teachers.calibration import LabelPrior, calibrated
from distillery.teachers.identity import model_identity
from distillery.teachers.prompt_search import estimate_calibration
from distillery.teachers.prompted import PromptedTeacher
from distillery.teachers.text_cleaning import clean_text, label_reasons, rejection_reason, repeat_reasons
from distillery.teachers.text_plan import (
    PlannedText,
    label_counts,
    parse_topics,
    plan_texts,
    shown_examples,
    topic_turns,
    writing_turns,
)
from distillery.teachers.text_requests import TextRequest, read_text_request
from distillery.training.teacher_models import load_teacher_model

STAGES = ("written", "parsed", "unique", "agreed")  # of the funnel: texts that are left after each
MAX_TOPIC_REQUESTS = 8
TOPIC_TOKENS = 16  # that a topic in a list may take

Conversation = list[dict[str, str]]


def write_texts(root: Path, file: str) -> Path:
    """Let the model that `file` (below `root`) requests write its texts; the file that holds those that pass.

    `<name>.jsonl` gets a line {id, text, label, topic, attributes, probabilities: {label: p}} for each text whose label
    the same model confirms, `<name>.json` its origin and the numbers of texts after each filter. Every batch is kept
    in the answer store of `root`: a stopped run goes on with the next one, and ends as if it had not been stopped.
    Raises UserError for a wrong request and for a full disk.
    """
    request, task = read_text_request(root, file)
    with mistakes_in(file, request.teacher.model or Path(file).stem):
        return _write(root, file, request, task)


def _write(root: Path, file: str, request: TextRequest, task: Task) -> Path:
    started, path = time.monotonic(), (root / file).with_suffix(".jsonl")
    model = Writer(root, file, request, task)
    counts = label_counts(request.texts, task.names, request.shares)
    topics = {label: topics_of(model, label) for label, n in counts.items() if n}
    planned = plan_texts(counts, topics, request.attributes, request.seed)
    examples = [shown_examples(task, text, request.examples, request.seed) for text in planned]
    conversations = [writing_turns(task, *one) for one in zip(planned, examples, strict=True)]
    answers = model.write(conversations, [text.cycle * len(counts) + task.names.index(text.label) for text in planned])
    rows, prior = filter_texts(model, planned, answers)
    left = funnel(rows, task.names)
    if not left[STAGES[-1]]["all"]:
        numbers = ", ".join(f"{stage}: {counts['all']}" for stage, counts in left.items())
        raise UserError(f"{file}: texts: none is left ({numbers}); nothing was written")
    with atomic_write(path) as temporary:
        lines = [json.dumps(line, ensure_ascii=False) for line in _lines(rows, task.names)]
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    origin = {
        "request": request.model_dump(exclude_defaults=True),
        "model": model.identity,
        "prompts": {text.label: turns for text, turns in zip(planned[::-1], conversations[::-1], strict=True)},
        "label_prompt": model.labeller().render("{text}", None),
        "topics": topics,
        "label_prior": None if prior is None else dict(zip(task.names, prior.round(4).tolist(), strict=True)),
        "funnel": left,
        "rejected": _rejected(rows),
        **({} if request.teacher.api else {"computed_texts": model.progress.computed}),
    }
    write_json(path.with_suffix(".json"), origin | run_record(root, time.monotonic() - started))
    return path


@dataclass
class Writer:
    """The model of the request in `file`. identity: all that decides its answers but prompt and sampling."""

    root: Path
    file: str
    request: TextRequest
    task: Task
    identity: dict[str, Any] = field(init=False)
    progress: Progress = field(init=False)

    @property
    def name(self) -> str:
        """The name of the file, without its ending."""
        return Path(self.file).stem

    def __post_init__(self) -> None:
        spec, store = self.request.teacher, AnswerStore(self.root / STORE_PATH)
        self.progress, self.store = Progress(f"{self.name}, texts", self.request.texts), store
        if spec.api:
            # imported here, as in open_teacher: other requests do not need the API client
            from distillery.teachers.api.client import Endpoint
            from distillery.teachers.api.teacher import ApiTeacher

            self.endpoint = ApiTeacher(Endpoint(self.name, spec.api, store), self.task, spec.few_shot)
            self.identity = {"client": spec.api.client, "base_url": spec.api.base_url, "model": spec.api.model}
            return
        ((name, origin),) = self.request.models.items()
        self.local = load_teacher_model(name, spec, origin, self.task)
        self.identity = model_identity(name, origin, self.local) | {"seed": spec.seed}

    def generate(
        self, conversations: Sequence[Conversation], sample: int, max_new_tokens: int, progress: Progress
    ) -> list[str]:
        """The next turn of each of `conversations`, which are decoded together; see :meth:`Teacher.generate`."""
        request, writer = self.request, self._teacher(progress, conversations)
        sampling = {"temperature": request.temperature, "batch_size": request.batch_size}
        if not request.teacher.api or "top_p" in request.model_fields_set:  # not every endpoint takes it
            sampling["top_p"] = request.top_p
        sampling |= {"max_new_tokens": max_new_tokens, "seed": request.seed, "sample": sample}
        return writer.generate(conversations, **sampling)

    def write(self, conversations: Sequence[Conversation], groups: Sequence[int]) -> list[str]:
        """The answers to `conversations`, group after group. groups: [n], ascending; a group has none of them twice."""
        answers = []
        for group in dict.fromkeys(groups):
            part = [turns for turns, k in zip(conversations, groups, strict=True) if k == group]
            answers += self.generate(part, group, self.request.max_new_tokens, self.progress)
        return answers

    def labeller(self, n: int = 0) -> PromptedTeacher:
        """The same model as a teacher of the task's labels, for `n` texts."""
        return self._teacher(Progress(f"{self.name}, labels", n))

    def _teacher(self, progress: Progress, together: Sequence[Conversation] = ()) -> Any:
        """The model, which keeps its answers. together: the conversations that share batches, and so decide answers."""
        if self.request.teacher.api:
            return self.endpoint
        computation = {
            "batches": [self.request.batch_size, hashlib.sha256(canonical_json(list(together)).encode()).hexdigest()],
            "code": code_digest("models", "tasks"),
            "machine": [torch.__version__, torch.get_num_threads(), self.local.device.type],
        }
        identity = self.identity | (computation if together else {})
        return counting_teacher(self.local, self.store, identity, progress)


def topics_of(model: Writer, label: str) -> list[str]:
    """The topics of texts with `label`: those of the request, or those that the model proposes from its task file.

    Of the number that is wanted it may propose fewer. Raises UserError when it proposes none.
    """
    wanted = model.request.topics
    if not isinstance(wanted, int):
        return wanted[label] if isinstance(wanted, dict) else wanted
    topics: dict[str, str] = {}
    for sample in range(MAX_TOPIC_REQUESTS):
        turns = topic_turns(model.task, label, wanted)
        progress = Progress(f"{model.name}, topics for {label}", 1)
        (answer,) = model.generate([turns], sample, TOPIC_TOKENS * wanted, progress)
        for topic in parse_topics(answer):
            topics.setdefault(topic.casefold(), topic)
        if len(topics) >= wanted:
            break
    if not topics:
        raise UserError(f"{model.file}: topics: the model proposes none in a numbered list; write a list of topics")
    return list(topics.values())[:wanted]


def filter_texts(
    model: Writer, planned: Sequence[PlannedText], answers: Sequence[str]
) -> tuple[pd.DataFrame, np.ndarray | None]:
    """A row for each of `answers` and the label prior [labels] by which probabilities were divided, if any.

    Columns: id, text, label (the one that was wanted), topic, attributes, answer, probabilities (None of a text that
    was not labelled), stage (the last of `STAGES` that it passed) and reason (why it went no further, or empty).
    """
    request, names = model.request, model.task.names
    rows = pd.DataFrame(
        {
            "id": [f"written-{i}" for i in range(len(planned))],
            "text": [clean_text(model.task, answer) for answer in answers],
            "label": [text.label for text in planned],
            "topic": [text.topic for text in planned],
            "attributes": [dict(text.attributes) for text in planned],
            "answer": list(answers),
            "probabilities": None,
            "stage": STAGES[0],
        }
    )
    rows["reason"] = [rejection_reason(text, request.min_words, request.max_words) for text in rows["text"]]
    left = _advance(rows, STAGES[1])
    examples = [example.text for example in model.task.few_shot]
    rows.loc[left, "reason"] = repeat_reasons(rows["text"][left].tolist(), examples, request.near_duplicate)
    left = _advance(rows, STAGES[2])
    labelled = rows.loc[left].reset_index(drop=True)
    probabilities, prior = label_texts(model, labelled)
    rows.loc[left, "probabilities"] = pd.Series(probabilities.tolist(), index=left, dtype=object)
    rows.loc[left, "reason"] = label_reasons(probabilities, labelled["label"].tolist(), names, request.min_confidence)
    _advance(rows, STAGES[3])
    return rows, prior


def _advance(rows: pd.DataFrame, stage: str) -> pd.Index:
    """The rows without a reason against them, which have passed `stage`."""
    left = rows.index[rows["reason"] == ""]
    rows.loc[left, "stage"] = stage
    return left


def label_texts(model: Writer, rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray | None]:
    """The model's label probabilities [n, labels] for the texts of `rows` (id, text, label), and their label prior.

    `calibrate: batch` takes the mean over the texts of each wanted label, and then over the labels: with any `shares`
    every label counts the same.
    """
    names, kind = model.task.names, model.request.teacher.calibrate
    if rows.empty:
        return np.zeros((0, len(names))), None
    teacher, rows = model.labeller(len(rows)), rows.assign(group=None)
    probabilities, calibration = predict_in_blocks(teacher, rows), None
    if kind == "contextual":
        calibration = estimate_calibration(teacher, kind, rows)
    elif kind == "batch":
        readable = pd.DataFrame(probabilities).groupby(rows["label"].to_numpy()).mean().dropna()
        calibration = LabelPrior(readable.mean().to_numpy())
    prior = calibration.prior if isinstance(calibration, LabelPrior) else None
    return calibrated(probabilities, calibration), prior


def funnel(rows: pd.DataFrame, names: Sequence[str]) -> dict[str, dict[str, int]]:
    """For each of `STAGES` how many texts are left, by wanted label and in all."""
    counts = {}
    for i, stage in enumerate(STAGES):
        left = rows["label"][rows["stage"].isin(STAGES[i:])]
        counts[stage] = {"all": len(left), **{name: int((left == name).sum()) for name in names}}
    return counts


def _rejected(rows: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """For each reason against a text how many have it, and the first of them."""
    parts = rows[rows["reason"] != ""].groupby("reason")
    columns = ["label", "topic", "answer"]
    return {str(reason): {"texts": len(part), "first": part[columns].iloc[0].to_dict()} for reason, part in parts}


def _lines(rows: pd.DataFrame, names: list[str]) -> list[dict[str, Any]]:
    """What the file holds of the texts in `rows` that passed all filters."""
    lines = []
    for row in rows[rows["stage"] == STAGES[-1]].to_dict("records"):
        line = {key: row[key] for key in ("id", "text", "label", "topic")}
        line |= {"attributes": row["attributes"]} if row["attributes"] else {}
        lines.append(line | {"probabilities": rounded_probabilities(names, row["probabilities"])})
    return lines
