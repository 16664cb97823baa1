"""`distillery plan <teacher>`: what it takes to let a teacher label a source, before the first row is labelled."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd

from distillery.config.load import load_params
from distillery.config.schema import SPLITS, Params, TeacherConfig
from distillery.data.overlaps import prepare_without_leaks
from distillery.data.storage import read_split
from distillery.errors import UserError
from distillery.files import Paths, repository_root
from distillery.models.folders import model_folder
from distillery.models.load import load_tokenizer
from distillery.models.runtime import configure_runtime
from distillery.pipeline.plan.command import text_table
from distillery.tasks.prompts import chat_turns, explained_turns, label_question, render_prompt
from distillery.tasks.schema import Task, load_task
from distillery.teachers.base import open_teacher
from distillery.teachers.cache import STORE_PATH, AnswerStore, Question
from distillery.teachers.few_shot import GoldExamples
from distillery.teachers.prompt_search import PRIOR_ROWS

SAMPLE, TIMED = 200, 32  # rows whose tokens are counted; rows that a local teacher labels to be timed
BYTES_PER_TOKEN = 4  # of English text
MIN_STORED = 20  # kept answers to the sample from which their token counts are taken
BLOCK = 5_000  # rows whose answers are looked up at a time


@dataclass(frozen=True)
class Figure:
    """A figure of the plan. value: None where it is not known. origin: where it comes from, or what is missing."""

    value: float | None
    origin: str


@dataclass(frozen=True)
class LabellingPlan:
    """What it takes that a teacher labels rows: numbers of the whole, `dollars` in US dollars, `rate` in calls a second
    of all workers."""

    rows: Figure
    calls: Figure
    input_tokens: Figure
    output_tokens: Figure
    rate: Figure
    hours: Figure
    dollars: Figure


def run_labelling_plan(
    teacher: str, source: str | None, rows: int | None, rate: float | None, workers: int | None
) -> None:
    """Print the plan of `teacher` of params.yaml; see :func:`plan_labelling`. Raises UserError."""
    configure_runtime()
    root = repository_root()
    plan = plan_labelling(root, load_params(), teacher, source, rows, rate, workers)
    lines = [
        (name.replace("_", " "), "unknown" if figure.value is None else _rounded(name, figure.value), figure.origin)
        for name, figure in vars(plan).items()
    ]
    print(text_table(("labels by " + teacher, "", "origin"), lines))


def _rounded(name: str, value: float) -> str:
    return f"{value:,.2f}" if name in ("rate", "hours", "dollars") else f"{round(value):,}"


def plan_labelling(
    root: Path,
    params: Params,
    name: str,
    source: str | None = None,
    rows: int | None = None,
    rate: float | None = None,
    workers: int | None = None,
) -> LabellingPlan:
    """The plan for the labels of teacher `name` on `source`, or on all its sources.

    rows: in place of the number in the source, as many like them. rate: calls a second of one worker; measured when
    not given: at an endpoint in the calls that were made, of a local model by labelling a few rows now. workers:
    endpoints, or machines with a local model; those of params.yaml when not given. Nothing is written, no endpoint is
    called. Raises UserError for an unknown name or a wrong rate, and when rows or the local model cannot be read.
    """
    spec = params.teachers.get(name)
    if rate is not None and not 0 < rate < np.inf:
        raise UserError(f"--rate: must be above 0, not {rate:g}")
    if spec is None:
        raise UserError(f"teacher: `{name}` is not in params.yaml; there are: {', '.join(params.teachers)}")
    if spec.kind == "answers":
        raise UserError(f"params.yaml: teachers.{name}: its labels are in files; there is nothing to plan")
    sources = params.teacher_sources(name)
    if source is not None and source not in sources:
        raise UserError(f"source: teacher `{name}` labels {', '.join(sources)}, not `{source}`")
    frames = [read_rows_to_label(root, params, one) for one in ([source] if source else sources)]
    frame = pd.concat(frames, ignore_index=True)
    task = load_task(params.data[source or sources[0]].task, Paths(root).tasks)
    wanted = Figure(len(frame), f"of {source or ', '.join(sources)}")
    if rows is not None:
        wanted = Figure(rows, f"given; {wanted.origin} there are {len(frame):,}")
    labelling = Labelling(root, params, name, spec, task, frame)
    return labelling.plan(wanted, rate, workers)


def read_rows_to_label(root: Path, params: Params, source: str) -> pd.DataFrame:
    """The rows (id, text, group, label, split) of `source` as 01_data has written them, else as it would."""
    folder = Paths(root).processed(source)
    if (folder / "task.json").exists():
        frame = pd.concat([read_split(folder, split).assign(split=split) for split in SPLITS], ignore_index=True)
    else:
        task = load_task(params.data[source].task, Paths(root).tasks)
        prepared = prepare_without_leaks(source, params, task, root)
        frame = prepared.rows.assign(split=prepared.split)
    return frame.assign(source=source)


@dataclass(frozen=True)
class Labelling:
    """The rows `frame` (source, split, id, text, group, label), which teacher `name` is to label."""

    root: Path
    params: Params
    name: str
    spec: TeacherConfig
    task: Task
    frame: pd.DataFrame

    def plan(self, rows: Figure, rate: float | None, workers: int | None) -> LabellingPlan:
        """See :func:`plan_labelling`."""
        sample = self.frame.sample(min(SAMPLE, len(self.frame)), random_state=0).reset_index(drop=True)
        turns = self.turns(sample)
        if self.spec.api is None:
            return self._plan_local(rows, sample, turns, rate, workers)
        stored, usage = self._stored_answers(sample)
        calls = self._calls(rows, stored)
        prompt, answer = self._tokens_of_call(turns, usage)
        speed = self._endpoint_rate(rate, workers)
        price, total = self.spec.api.price, calls.value or 0
        dollars = Figure(None, f"teachers.{self.name}.api has no `price`")
        if price:
            cost = total * (prompt.value * price.input + answer.value * price.output) / 1e6
            dollars = Figure(cost, f"{price.input:g} and {price.output:g} dollars for a million tokens in and out")
        return LabellingPlan(
            rows,
            calls,
            Figure(total * prompt.value, f"{prompt.value:,.1f} a call, {prompt.origin}"),
            Figure(total * answer.value, f"{answer.value:,.1f} a call, {answer.origin}"),
            speed,
            _hours(total, speed),
            dollars,
        )

    def _plan_local(
        self, rows: Figure, sample: pd.DataFrame, turns: list[Any], rate: float | None, workers: int | None
    ) -> LabellingPlan:
        labels = len(self.task.names) if self.task.kind == "multilabel" and self.spec.kind != "classifier" else 1
        tokens = self._count_tokens(turns, self.spec.model, self.spec.prompt)
        count = workers or 1
        one = Figure(rate, "given") if rate else self._measure(sample)
        speed = Figure(count * one.value, f"{count} × {one.value:,.2f} rows/s, {one.origin}")
        hours, hourly = _hours(rows.value or 0, speed), self.params.evaluate.machine_price_per_hour
        dollars = Figure(None, "params.yaml has no `evaluate.machine_price_per_hour`")
        if hourly:
            dollars = Figure(hours.value * count * hourly, f"{hourly:g} dollars for an hour of a machine")
        return LabellingPlan(
            rows,
            Figure(0, "a local model"),
            Figure((rows.value or 0) * labels * tokens.value, f"{labels * tokens.value:,.1f} a row, {tokens.origin}"),
            Figure(None, "none: labels are scored, not written"),
            speed,
            hours,
            dollars,
        )

    def turns(self, sample: pd.DataFrame) -> list[list[dict[str, str]]]:
        """The prompts for the rows of `sample`: of a classifier their texts alone.

        Any gold rows stand for similar ones, since only the numbers of tokens count."""
        spec, task = self.spec, self.task
        if spec.kind == "classifier":
            return [[{"role": "user", "content": text}] for text in sample["text"]]
        if task.kind == "multilabel" and spec.api is None:
            task = label_question(task, task.names[0])
        write = explained_turns if spec.api and spec.api.labels == "explained" else chat_turns
        solved: Sequence[Any] = [spec.few_shot] * len(sample)
        if (examples := self._examples()) is not None:
            chosen = examples.choose(sample["text"].tolist(), sample["group"].tolist())
            solved = [examples.at(positions) for positions in chosen]
        return [write(task, text, shots) for text, shots in zip(sample["text"], solved, strict=True)]

    def _examples(self) -> GoldExamples | None:
        gold = self.frame[self.frame["split"] == "train"]
        if self.spec.examples_from == "task" or not self.spec.few_shot or gold.empty:
            return None
        return GoldExamples(gold, self.spec.few_shot, None, self.spec.seed)

    def _stored_answers(self, sample: pd.DataFrame) -> tuple[int | None, list[list[int]]]:
        """How many answers to all rows are in the store, None where that is not looked up, and the (input, output)
        tokens of those to `sample`."""
        path = self.root / STORE_PATH
        if not path.exists():
            return 0, []
        if self.spec.examples_from == "similar":  # which ones: only the encoder knows
            return None, []
        store = AnswerStore(path)
        usages = [answer.metadata.get("usage") for answer in self._stored(store, sample) if answer]
        blocks = range(0, len(self.frame), BLOCK)
        answers = [self._stored(store, self.frame.iloc[start : start + BLOCK]) for start in blocks]
        answered = sum(answer is not None for block in answers for answer in block)
        return answered, [usage for usage in usages if usage and any(usage)]

    def _stored(self, store: AnswerStore, rows: pd.DataFrame) -> list[Any]:
        """The kept answer to each question about `rows`, None where there is none."""
        from distillery.teachers.api.teacher import ApiTeacher
        from distillery.teachers.api.transport import DEFAULT_URLS

        api, examples, solved = self.spec.api, self._examples(), None
        if examples is not None:
            chosen = examples.choose(rows["text"].tolist(), rows["group"].tolist())
            solved = [examples.at(positions) for positions in chosen]
        urls = [None, *(server.base_url for server in api.servers)] if api.endpoints else [api.base_url]
        answers: list[Any] = []
        for url in urls:
            address = url or (None if api.endpoints else DEFAULT_URLS[api.client])
            # without a key: nothing is sent
            endpoint = cast("Any", SimpleNamespace(spec=api, base_url=address))
            teacher = ApiTeacher(endpoint, self.task, self.spec.few_shot)
            questions: list[Question] = teacher.questions(rows["text"].tolist(), solved)
            of_url = store.get(questions)
            answers = [old or new for old, new in zip(answers or of_url, of_url, strict=True)]
        return answers

    def _calls(self, rows: Figure, stored: int | None) -> Figure:
        """Calls for labels, rationales, tokens of given text and the comparison of prompts, without kept answers."""
        spec, api, splits = self.spec, self.spec.api, self.frame["split"].value_counts()
        trainable = int(splits.get("train", 0) + splits.get("pool", 0))
        scale = rows.value / max(1, len(self.frame))
        labels = round(rows.value * api.samples)
        known = round(min(labels, (stored or 0) * min(1.0, scale)))
        parts = {"for labels": labels - known}
        parts["for rationales"] = 0 if api.labels == "explained" else min(spec.rationales, round(trainable * scale))
        parts["for tokens of labels"] = round(trainable * scale) if api.scores_given_tokens else 0
        compared = int(splits.get("validation", 0))
        if spec.choose_prompt_by == "mutual_information":
            compared += min(PRIOR_ROWS, int(splits.get("pool" if splits.get("pool") else "train", 0)))
        parts["to compare prompts"] = len(spec.prompts) * compared * api.samples
        texts = [f"{count:,} {purpose}" for purpose, count in parts.items() if count]
        note = "kept answers not looked up" if stored is None else f"{known:,} answers kept" if known else ""
        return Figure(sum(parts.values()), ", ".join([*texts, *filter(None, [note])]) or "all answers are kept")

    def _tokens_of_call(self, turns: list[Any], usage: list[list[int]]) -> tuple[Figure, Figure]:
        """Mean tokens of a prompt, and of an answer at most or as kept ones have them."""
        if len(usage) >= MIN_STORED:
            means = np.mean(usage, axis=0)
            origin = f"as the endpoint counted them in {len(usage)} kept answers"
            return Figure(float(means[0]), origin), Figure(float(means[1]), origin)
        prompt = self._count_tokens(turns, self.spec.api.tokenizer, "chat")
        return prompt, Figure(self.spec.api.max_tokens, "at most (`max_tokens`)")

    def _count_tokens(self, turns: list[Any], model: str | None, style: str) -> Figure:
        """Mean tokens of a prompt: of the tokenizer of `model` where it is here, else a rule of thumb."""
        folder = model_folder(model, self.params.models[model]) if model else None
        if folder is not None and folder.exists():
            tokenizer = load_tokenizer(folder, self.params.models[model].trust_remote_code)
            if self.spec.kind == "classifier":
                texts = [prompt[0]["content"] for prompt in turns]
            else:
                texts = [render_prompt(prompt, tokenizer, style) for prompt in turns]
            lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
            cut = min(self.spec.max_length or max(lengths), max(lengths))
            return Figure(float(np.minimum(lengths, cut).mean()), f"by the tokenizer of `{model}` on {len(turns)} rows")
        sizes = [sum(len(turn["content"].encode()) for turn in prompt) for prompt in turns]
        origin = f"{BYTES_PER_TOKEN} bytes a token, a rule of thumb, on {len(turns)} rows: no tokenizer is here"
        return Figure(float(np.mean(sizes)) / BYTES_PER_TOKEN, origin)

    def _endpoint_rate(self, rate: float | None, workers: int | None) -> Figure:
        """Calls a second of all endpoints."""
        servers = self.spec.api.servers
        count = workers or len(servers)
        if rate:
            return Figure(count * rate, f"{count} × {rate:g} calls/s, given")
        path = self.root / STORE_PATH
        calls, seconds = (
            AnswerStore(path).call_seconds(self.spec.api.client, self.spec.api.model) if path.exists() else (0, 0.0)
        )
        if not calls:
            return Figure(None, "no call was made yet: give --rate, calls a second of one endpoint")
        limits = [np.inf if one.requests_per_minute is None else one.requests_per_minute / 60 for one in servers]
        speeds = [min(one.concurrency / seconds, limit) for one, limit in zip(servers, limits, strict=True)]
        origin = f"{count} endpoint(s), {seconds:.3f} s a call in {calls:,} calls, `concurrency` of them at a time"
        return Figure(count * float(np.mean(speeds)), origin)

    def _measure(self, sample: pd.DataFrame) -> Figure:
        """Rows a second of the local model, untuned, on rows of `sample`."""
        prompting = {"prompt": None, "prior": None}
        few_shot = min(self.spec.few_shot, len(self.task.few_shot))
        spec = self.spec.model_copy(update={"examples_from": "task", "embeddings": None, "few_shot": few_shot})
        params = self.params.model_copy(update={"teachers": self.params.teachers | {self.name: spec}})
        teacher = cast("Any", open_teacher(self.root, self.name, params, self.task, prompting=prompting))
        teacher.cache = None  # computed, not looked up
        rows = sample.head(TIMED)

        def label(part: pd.DataFrame) -> None:
            _ = teacher.answer(part, self.spec.max_new_tokens) if self.task.kind == "qa" else teacher.predict(part)

        label(rows.head(2))  # the first batch also prepares
        started = time.perf_counter()
        label(rows)
        return Figure(len(rows) / (time.perf_counter() - started), f"measured on {len(rows)} rows here")


def _hours(calls: float, speed: Figure) -> Figure:
    if speed.value is None:
        return Figure(None, "no rate")
    return Figure(calls / speed.value / 3600, "at this rate")
