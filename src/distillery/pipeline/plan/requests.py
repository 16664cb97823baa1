"""What is requested of a teacher so that it labels rows: how many requests for each purpose, and the tokens of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd

from distillery.config.schema import Params, TeacherConfig
from distillery.label_sets import LabelSets
from distillery.models.folders import model_folder
from distillery.models.load import load_tokenizer
from distillery.tasks.chosen_prompt import check_prompt, read_prompting, with_prompt
from distillery.tasks.prompts import chat_turns, explained_turns, label_question, render_prompt
from distillery.tasks.schema import Task
from distillery.teachers.cache import STORE_PATH, AnswerStore, Question
from distillery.teachers.few_shot import GoldExamples
from distillery.teachers.prompt_search import CALIBRATIONS, NO_CONTENT, OF_UNLABELLED, unlabelled_limit
from distillery.teachers.rationales import rationale_prompts

SAMPLE = 200  # rows whose tokens are counted
BYTES_PER_TOKEN = 4  # of English text
MIN_STORED = 20  # kept answers to the sample from which their token counts are taken
BLOCK = 5_000  # rows whose answers are looked up at a time
TRAINED_SPLITS = ("train", "pool")

Turns = list[dict[str, str]]


@dataclass(frozen=True)
class Figure:
    """A figure of the plan. value: None where it is not known. origin: where it comes from, or what is missing."""

    value: float | None
    origin: str


@dataclass(frozen=True)
class Requests:
    """`count` requests for one purpose. input, output: mean tokens of one. is_label: whether they label rows, as fast
    as the rows that are timed."""

    purpose: str
    count: int
    input: Figure
    output: Figure
    is_label: bool = True


def total_tokens(requests: Sequence[Requests], side: str) -> Figure:
    """The tokens of all `requests`. side: `input` or `output`."""
    ones = [(request.purpose, request.count, getattr(request, side)) for request in requests if request.count]
    origins, texts = set[str](), []
    for purpose, _, one in ones:
        same = one.origin in origins
        texts.append(f"{one.value:,.1f} {purpose}" + ("" if same or not one.origin else f", {one.origin}"))
        origins.add(one.origin)
    return Figure(sum(count * one.value for _, count, one in ones), "; ".join(texts) or "no request is left")


@dataclass(frozen=True)
class RequestedRows:
    """The rows `frame` (source, split, id, text, group, label), which teacher `name` is to label."""

    root: Path
    params: Params
    name: str
    spec: TeacherConfig
    task: Task
    frame: pd.DataFrame

    @cached_property
    def prompt(self) -> str | None:
        """The name of the prompt that the teacher's comparison has chosen; None: the task's own."""
        return read_prompting(self.root, self.name, self.task)["prompt"] if self._is_compared else None

    @property
    def _is_compared(self) -> bool:
        """Whether 02_teach compares prompts and calibrations; see :func:`compare_prompts`."""
        spec = self.spec
        return spec.finetune is None and spec.kind != "classifier" and self.task.kind != "qa"

    @cached_property
    def sample(self) -> pd.DataFrame:
        """The rows whose tokens are counted."""
        return self.frame.sample(min(SAMPLE, len(self.frame)), random_state=0).reset_index(drop=True)

    def requests(self, rows: Figure) -> tuple[list[Requests], str]:
        """All requests for the labels of `rows` rows, without the answers that are kept, and a note on those."""
        scale = rows.value / max(1, len(self.frame))
        trainable = round(self.frame["split"].isin(TRAINED_SPLITS).sum() * scale)
        reasons = self._reasons(min(self.spec.rationales, trainable))
        if self.spec.api is not None:
            return self._of_endpoint(rows, trainable, reasons)
        questions = 1
        if self.task.kind == "multilabel" and self.spec.kind != "classifier":
            questions = len(self.task.names)
        scored = Figure(0, "labels are scored, not written")
        output = self._longest_text if self.task.kind == "qa" else scored
        labels = Requests("for labels", questions * round(rows.value), self._prompt_tokens(self.prompt), output)
        compared = [
            Requests(f"to compare `{prompt or 'prompt'}`", questions * count, self._prompt_tokens(prompt), scored)
            for prompt, count in self._compared_rows().items()
        ]
        return [labels, *compared, reasons], ""

    def _of_endpoint(self, rows: Figure, trainable: int, reasons: Requests) -> tuple[list[Requests], str]:
        api = self.spec.api
        stored, usage = self._stored_answers()
        wanted = round(rows.value * api.samples)
        stored_labels = round(min(wanted, (stored or 0) * min(1.0, rows.value / max(1, len(self.frame)))))
        counted = self._prompt_tokens(self.prompt)
        tokens, output = counted, Figure(api.max_tokens, "at most (`max_tokens`)")
        if len(usage) >= MIN_STORED:
            origin = f"as the endpoint counted them in {len(usage)} kept answers"
            tokens, output = (Figure(float(mean), origin) for mean in np.mean(usage, axis=0))
        requests = [Requests("for labels", wanted - stored_labels, tokens, output)]
        for prompt, count in self._compared_rows().items():
            missing = max(0, count * api.samples - (self._kept_of_prompt(prompt) if count else 0))
            purpose = f"to compare `{prompt or 'prompt'}`"
            requests.append(Requests(purpose, missing, self._prompt_tokens(prompt), output))
        if api.labels != "explained":
            requests.append(reasons)
        if api.scores_given_tokens:
            one = Figure(1, "the server scores the prompt")
            requests.append(Requests("for tokens of labels", trainable, counted, one))
            longest = Figure(counted.value + self.spec.max_new_tokens, "with the rationale at most")
            requests.append(Requests("for tokens of rationales", reasons.count, longest, one))
        note = f"{stored_labels:,} answers kept" if stored_labels else ""
        return requests, "kept answers not looked up" if stored is None else note

    @property
    def _longest_text(self) -> Figure:
        """The tokens of a text that the teacher writes."""
        return Figure(self.spec.max_new_tokens, "at most (`max_new_tokens`)")

    def _reasons(self, count: int) -> Requests:
        """The requests for `count` rationales: always of the task's own prompt."""
        if not count:
            return Requests("for rationales", 0, Figure(0, ""), self._longest_text, is_label=False)
        turns = self.rationale_turns(self.sample[self.sample["split"].isin(TRAINED_SPLITS)])
        return Requests("for rationales", count, self._count_tokens(turns, None), self._longest_text, is_label=False)

    def rationale_turns(self, rows: pd.DataFrame) -> list[Turns]:
        """The prompts for rationales of `rows`; a row without a gold label gets the first label."""
        labels = [label if isinstance(label, str) else self.task.names[0] for label in rows["label"]]
        return rationale_prompts(self.task, rows["text"].tolist(), labels)

    def _compared_rows(self) -> dict[str | None, int]:
        """How many rows each prompt labels to be compared and calibrated, beside the rows that are labelled anyway.

        The answers of a local model to other batches are not used again. See :func:`compare_prompts`.
        """
        if not self._is_compared:
            return {}
        spec, splits = self.spec, self.frame["split"].value_counts()
        validation = int(splits.get("validation", 0))
        limit = unlabelled_limit(spec, len(self.task.names))
        unlabelled = min(limit, int(splits.get("pool", 0) or splits.get("train", 0)))
        calibrations = CALIBRATIONS if spec.api is None and validation else [spec.calibrate]
        if isinstance(self.task.names, LabelSets):
            calibrations = ["none"]
        no_content = len(NO_CONTENT) if "contextual" in calibrations else 0
        if not {*OF_UNLABELLED} & {*calibrations} and spec.choose_prompt_by != "mutual_information":
            unlabelled = 0
        labelled_anyway = self.prompt if spec.api else ""
        return {
            prompt: no_content + (0 if prompt == labelled_anyway else validation + unlabelled)
            for prompt in (None, *spec.prompts)
        }

    def _prompt_tokens(self, prompt: str | None) -> Figure:
        """Mean tokens of a request for a label by the prompt of that name."""
        return self._count_tokens(self.turns(self.sample, prompt), "chat" if self.spec.api else self.spec.prompt)

    def task_of(self, prompt: str | None) -> Task:
        """The task with the prompt of that name; None: with its own."""
        check_prompt(self.task, prompt, f"params.yaml: teachers.{self.name}.prompts")
        return with_prompt(self.task, prompt)

    def turns(self, rows: pd.DataFrame, prompt: str | None = None) -> list[Turns]:
        """The requests for the labels of `rows` by the prompt of that name: of a classifier their texts alone.

        Any gold rows stand for similar ones, since only the numbers of tokens count."""
        spec, task = self.spec, self.task_of(prompt)
        if spec.kind == "classifier":
            return [[{"role": "user", "content": text}] for text in rows["text"]]
        if task.kind == "multilabel" and spec.api is None:
            task = label_question(task, task.names[0])
        write = explained_turns if spec.api and spec.api.labels == "explained" else chat_turns
        solved: Sequence[Any] = [spec.few_shot] * len(rows)
        if (examples := self._solved(rows)) is not None:
            solved = examples
        return [write(task, text, shots) for text, shots in zip(rows["text"], solved, strict=True)]

    def _solved(self, rows: pd.DataFrame) -> list[Any] | None:
        """The gold rows that are solved examples of each of `rows`; None where they are those of the task file."""
        gold = self.frame[self.frame["split"] == "train"]
        if self.spec.examples_from == "task" or not self.spec.few_shot or gold.empty:
            return None
        examples = GoldExamples(gold, self.spec.few_shot, None, self.spec.seed)
        return [examples.at(chosen) for chosen in examples.choose(rows["text"].tolist(), rows["group"].tolist())]

    def _count_tokens(self, turns: Sequence[Turns], style: str | None) -> Figure:
        """Mean tokens of a prompt: of the teacher's tokenizer where it is here, else by a rule of thumb.

        style: of a label prompt; None of a text that the teacher writes: by the chat template, if there is one.
        """
        model = self.spec.api.tokenizer if self.spec.api else self.spec.model
        folder = model_folder(model, self.params.models[model]) if model else None
        if folder is not None and folder.exists():
            tokenizer = load_tokenizer(folder, self.params.models[model].trust_remote_code)
            if self.spec.kind == "classifier":
                texts = [prompt[0]["content"] for prompt in turns]
            else:
                known = style or ("chat" if tokenizer.chat_template else "plain")
                texts = [render_prompt(prompt, tokenizer, known) for prompt in turns]
            lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
            cut = min(self.spec.max_length if style and self.spec.max_length else max(lengths), max(lengths))
            return Figure(float(np.minimum(lengths, cut).mean()), f"by the tokenizer of `{model}` on {len(turns)} rows")
        sizes = [sum(len(turn["content"].encode()) for turn in prompt) for prompt in turns]
        origin = f"{BYTES_PER_TOKEN} bytes a token, a rule of thumb, on {len(turns)} rows: no tokenizer is here"
        return Figure(float(np.mean(sizes)) / BYTES_PER_TOKEN, origin)

    def _stored_answers(self) -> tuple[int | None, list[list[int]]]:
        """How many answers to all rows are in the store, None where that is not looked up, and the (input, output)
        tokens of those to the sample."""
        if not (self.root / STORE_PATH).exists():
            return 0, []
        if self.spec.examples_from == "similar":  # which ones: only the encoder knows
            return None, []
        usages = [answer.metadata.get("usage") for answer in self._stored(self.sample, self.prompt) if answer]
        blocks = range(0, len(self.frame), BLOCK)
        answers = [self._stored(self.frame.iloc[start : start + BLOCK], self.prompt) for start in blocks]
        answered = sum(answer is not None for block in answers for answer in block)
        return answered, [usage for usage in usages if usage and any(usage)]

    def _kept_of_prompt(self, prompt: str | None) -> int:
        """How many answers to the validation rows by this prompt are in the store, if it is not the teacher's own."""
        if prompt == self.prompt or self.spec.examples_from == "similar" or not (self.root / STORE_PATH).exists():
            return 0
        answers = self._stored(self.frame[self.frame["split"] == "validation"], prompt)
        return sum(answer is not None for answer in answers)

    def _stored(self, rows: pd.DataFrame, prompt: str | None) -> list[Any]:
        """The kept answer to each request about `rows` by the prompt of that name, None where there is none."""
        from distillery.teachers.api.teacher import ApiTeacher
        from distillery.teachers.api.transport import DEFAULT_URLS

        api, solved, store = self.spec.api, self._solved(rows), AnswerStore(self.root / STORE_PATH)
        urls = [None, *(server.base_url for server in api.servers)] if api.endpoints else [api.base_url]
        answers: list[Any] = []
        for url in urls:
            address = url or (None if api.endpoints else DEFAULT_URLS[api.client])
            # without a key: nothing is sent
            endpoint = cast("Any", SimpleNamespace(spec=api, base_url=address))
            teacher = ApiTeacher(endpoint, self.task_of(prompt), self.spec.few_shot)
            questions: list[Question] = teacher.questions(rows["text"].tolist(), solved)
            of_url = store.get(questions)
            answers = [old or new for old, new in zip(answers or of_url, of_url, strict=True)]
        return answers
