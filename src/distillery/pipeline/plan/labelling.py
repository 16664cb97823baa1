"""`distillery plan <teacher>`: what it takes to let a teacher label a source, before the first row is labelled."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

from distillery.config.load import load_params
from distillery.config.schema import SPLITS, Params
from distillery.data.overlaps import prepare_without_leaks
from distillery.data.storage import read_split
from distillery.errors import UserError
from distillery.files import Paths, repository_root
from distillery.models.runtime import configure_runtime
from distillery.pipeline.plan.command import text_table
from distillery.pipeline.plan.requests import Figure, RequestedRows, Requests, total_tokens
from distillery.pipeline.plan.rows import without_word_vectors
from distillery.tasks.schema import load_task
from distillery.teachers.base import open_teacher
from distillery.teachers.cache import STORE_PATH, AnswerStore
from distillery.teachers.prompted import NO_FREE_ANSWERS

CLIENT_RATE = 74.0  # answers a second that one process sends, reads and stores: measured on two busy cores
TIMED, TIMED_REASONS = 32, 8  # rows that a local teacher labels, and gives a rationale for, to be timed


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
    if spec.kind == "api" and task.kind == "qa":
        raise UserError(NO_FREE_ANSWERS)
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
        prepared = prepare_without_leaks(source, without_word_vectors(params), task, root)
        frame = prepared.rows.assign(split=prepared.split)
    return frame.assign(source=source)


class Labelling(RequestedRows):
    """The rows that a teacher is to label, and what it takes."""

    def plan(self, rows: Figure, rate: float | None, workers: int | None) -> LabellingPlan:
        """See :func:`plan_labelling`."""
        requests, note = self.requests(rows)
        input_tokens, output_tokens = total_tokens(requests, "input"), total_tokens(requests, "output")
        if self.spec.api is None:
            return self._plan_local(rows, requests, input_tokens, output_tokens, rate, workers)
        texts = [f"{request.count:,} {request.purpose}" for request in requests if request.count]
        total = sum(request.count for request in requests)
        calls = Figure(total, ", ".join([*texts, *filter(None, [note])]) or "all answers are kept")
        speed, price = self._endpoint_rate(rate, workers), self.spec.api.price
        dollars = Figure(None, f"teachers.{self.name}.api has no `price`")
        if price:
            cost = (input_tokens.value * price.input + output_tokens.value * price.output) / 1e6
            dollars = Figure(cost, f"{price.input:g} and {price.output:g} dollars for a million tokens in and out")
        return LabellingPlan(rows, calls, input_tokens, output_tokens, speed, _hours(total, speed), dollars)

    def _plan_local(
        self,
        rows: Figure,
        requests: Sequence[Requests],
        input_tokens: Figure,
        output_tokens: Figure,
        rate: float | None,
        workers: int | None,
    ) -> LabellingPlan:
        count, reasons = workers or 1, sum(request.count for request in requests if not request.is_label)
        teacher = None if rate else self._open()
        one = Figure(rate, "given") if rate else self._label_rate(teacher)
        speed = Figure(count * one.value, f"{count} × {one.value:,.2f} rows/s, {one.origin}")
        questions = round(requests[0].count / rows.value) if rows.value else 1  # about each row
        labels = sum(request.count for request in requests if request.is_label) / questions
        hours = _hours(labels, speed)
        if reasons and rate:
            hours = Figure(hours.value, f"{hours.origin}, without the time of {reasons:,} rationales")
        elif reasons:
            seconds = reasons / count * self._seconds_of_reason(teacher)
            hours = Figure(hours.value + seconds / 3600, f"{hours.origin}, and {seconds / 3600:,.2f} for rationales")
        hourly = self.params.evaluate.machine_price_per_hour
        dollars = Figure(None, "params.yaml has no `evaluate.machine_price_per_hour`")
        if hourly:
            dollars = Figure(hours.value * count * hourly, f"{hourly:g} dollars for an hour of a machine")
        return LabellingPlan(rows, Figure(0, "a local model"), input_tokens, output_tokens, speed, hours, dollars)

    def _endpoint_rate(self, rate: float | None, workers: int | None) -> Figure:
        """Calls a second of all endpoints, as far as one client can make use of them."""
        speed = self._rate_of_endpoints(rate, workers)
        if speed.value is None or speed.value <= CLIENT_RATE:
            return speed
        limit = f"the client's limit, of {CLIENT_RATE:g} answers/s on a machine with two cores"
        return Figure(CLIENT_RATE, f"{limit}, is below {speed.value:,.2f} ({speed.origin})")

    def _rate_of_endpoints(self, rate: float | None, workers: int | None) -> Figure:
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

    def _open(self) -> Any:
        """The local teacher, untuned, which keeps no answers."""
        prompting = {"prompt": self.prompt, "prior": None}
        few_shot = min(self.spec.few_shot, len(self.task.few_shot))
        spec = self.spec.model_copy(update={"examples_from": "task", "embeddings": None, "few_shot": few_shot})
        params = self.params.model_copy(update={"teachers": self.params.teachers | {self.name: spec}})
        teacher = cast("Any", open_teacher(self.root, self.name, params, self.task, prompting=prompting))
        teacher.cache = None  # computed, not looked up
        return teacher

    def _longest_first(self, n: int) -> pd.DataFrame:
        """The first `n` rows of the sample, those with the longest texts first."""
        return self.sample.head(n).sort_values("text", key=lambda texts: -texts.str.len(), kind="stable")

    def _label_rate(self, teacher: Any) -> Figure:
        """Rows a second that `teacher` labels."""
        rows = self._longest_first(TIMED)

        def label(part: pd.DataFrame) -> None:
            _ = teacher.answer(part, self.spec.max_new_tokens) if self.task.kind == "qa" else teacher.predict(part)

        label(rows.head(2))  # the longest: methods are compared once for rows of their length, whatever the number
        started = time.perf_counter()
        label(rows)
        return Figure(len(rows) / (time.perf_counter() - started), f"measured on {len(rows)} rows here")

    def _seconds_of_reason(self, teacher: Any) -> float:
        """Mean seconds in which `teacher` writes a rationale."""
        turns = self.rationale_turns(self._longest_first(TIMED_REASONS))
        teacher.generate(turns[:1], max_new_tokens=self.spec.max_new_tokens)
        started = time.perf_counter()
        teacher.generate(turns, max_new_tokens=self.spec.max_new_tokens)
        return (time.perf_counter() - started) / len(turns)


def _hours(calls: float, speed: Figure) -> Figure:
    if speed.value is None:
        return Figure(None, "no rate")
    return Figure(calls / speed.value / 3600, "at this rate")
