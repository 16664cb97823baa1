"""How many rows each split of a recipe has, and texts to stand for those that are not here."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from distillery.config.load import validate_section
from distillery.config.schema import SPLITS, Params, PhaseConfig, SourceConfig, SplitRef
from distillery.data.overlaps import prepare_without_leaks
from distillery.files import read_yaml
from distillery.pipeline.plan.facts import read_data_facts
from distillery.pipeline.recipe import load_recipe
from distillery.tasks.schema import Task, load_task

HUB_SPLIT = re.compile(r"(\w+)(?:\[(?P<start>\d+%?)?:(?P<end>\d+%?)?\])?")


@dataclass(frozen=True)
class SourceRows:
    """The rows of a source. counts: split -> number, None where it is not known. origin: of these numbers.

    texts: rows (text, label, split and what the task adds) of the source, or of the corpus that stands for it in the
    recipe's small scale; None where there is neither. texts_origin: which of the two.
    """

    counts: dict[str, int | None]
    origin: str
    task: Task
    texts: pd.DataFrame | None
    texts_origin: str


def read_source_rows(root: Path, recipe: str, name: str, params: Params) -> SourceRows:
    """The rows of source `name` of the recipe. Raises UserError when its own file cannot be read."""
    spec = params.data[name]
    task = load_task(spec.task, root / "tasks")
    if not spec.origin.startswith("hub:"):
        texts = _prepare(name, params, task, root)
        counts = {split: int((texts["split"] == split).sum()) for split in SPLITS}
        origin = "counted; words by their vectors are known only in the run" if _by_vectors(spec) else "counted"
        return SourceRows(counts, origin, task, texts, "its own rows")
    repo = spec.origin.removeprefix("hub:").partition("@")[0]
    fact = read_data_facts(root, repo)
    counts = count_hub_rows(spec, fact.value if fact else {})
    small = _small_params(root, recipe, name)
    texts = _prepare(name, small, task, root) if small else None
    origin = fact.source if fact else "the recipe's own limits"
    return SourceRows(counts, origin, task, texts, f"{small.data[name].origin} stands for it" if small else "unknown")


def read_all_rows(root: Path, recipe: str, params: Params) -> dict[str, SourceRows]:
    """The rows of each source; one without any text takes those of another source of its task."""
    sources = {name: read_source_rows(root, recipe, name, params) for name in params.data}
    for name, rows in sources.items():
        others = [other for other in sources.values() if other.texts is not None and other.task == rows.task]
        if rows.texts is None and others:
            sources[name] = replace(rows, texts=others[0].texts, texts_origin=others[0].texts_origin)
    return sources


def count_hub_rows(spec: SourceConfig, sizes: dict[str, int]) -> dict[str, int | None]:
    """Rows of each split, at most: cleaning may drop some. sizes: of the hub's splits, as far as they are known."""
    if spec.own_splits:
        counts = {split: count_slice(expression, sizes) for split, expression in spec.own_splits.items()}
        return {split: counts.get(split, 0) for split in SPLITS}
    total = count_slice(spec.hub_split, sizes)
    total = min(total, spec.limit) if total and spec.limit else total
    if spec.columns.label is None:
        return {split: total if split == "pool" else 0 for split in SPLITS}
    return {split: None if total is None else round(total * getattr(spec.split, split)) for split in SPLITS}


def count_slice(expression: str, sizes: dict[str, int]) -> int | None:
    """Rows of a split in the hub's notation (`train[2000:20000]`, `train[:12%]`); None where its size is not known.

    A slice with an end that is no percentage is taken to be full where the size is not known.
    """
    match = HUB_SPLIT.fullmatch(expression)
    if not match:
        return None
    size, (start, end) = sizes.get(match[1]), match.group("start", "end")
    if size is None:
        full = end and not end.endswith("%") and not (start or "").endswith("%")
        return int(end) - int(start or 0) if full else None

    def position(bound: str | None, default: int) -> int:
        if not bound:
            return default
        return round(size * int(bound[:-1]) / 100) if bound.endswith("%") else min(int(bound), size)

    return max(0, position(end, size) - position(start, 0))


def _prepare(name: str, params: Params, task: Task, root: Path) -> pd.DataFrame:
    """The rows of a source as 01_data splits them, but for leaks of sources that would have to be downloaded."""
    local = {other: spec for other, spec in params.data.items() if other == name or not spec.is_on_hub}
    prepared = prepare_without_leaks(name, without_word_vectors(params.model_copy(update={"data": local})), task, root)
    return prepared.rows.assign(split=prepared.split)


def _by_vectors(spec: SourceConfig) -> bool:
    return spec.filter is not None and spec.filter.embeddings is not None


def without_word_vectors(params: Params) -> Params:
    """`params` whose filters add keywords by the likelihood ratio in place of vectors: a plan has no weights."""
    way = {"expand_by": "likelihood", "embeddings": None}
    data = {
        name: spec.model_copy(update={"filter": spec.filter.model_copy(update=way)}) if _by_vectors(spec) else spec
        for name, spec in params.data.items()
    }
    return params.model_copy(update={"data": data})


def _small_params(root: Path, recipe: str, name: str) -> Params | None:
    """The recipe's small scale, if source `name` reads a file of the repository there."""
    if "small" not in load_recipe_scales(root, recipe):
        return None
    small = validate_section(Params, load_recipe(root, recipe, "small"), f"recipes/{recipe}.yaml")
    return None if name not in small.data or small.data[name].is_on_hub else small


def load_recipe_scales(root: Path, recipe: str) -> list[str]:
    """The names of the recipe's scales."""
    return list(read_yaml(root / "recipes" / f"{recipe}.yaml").get("scale") or {})


def count_phase_rows(phase: PhaseConfig, sources: dict[str, SourceRows], per_row: int) -> int | None:
    """Rows of a phase at most; None where one is not known. per_row: paraphrases of each row of `train`."""
    total = 0
    for split_ref in map(SplitRef.parse, phase.data):
        counts = sources[split_ref.source].counts
        rows = counts["train" if split_ref.split == "augmented" else split_ref.split]
        if rows is None:
            return None
        total += rows * per_row if split_ref.split == "augmented" else rows
    return math.ceil(phase.select.share * total) if phase.select else total


def sample_phase_frame(phase: PhaseConfig, sources: dict[str, SourceRows], limit: int) -> pd.DataFrame | None:
    """At most `limit` rows as a student's `rows.parquet` has them, for `phase`; None where no text is at hand.

    The rows are the longest of the source with the longest text, so that what they need is an upper bound. Teachers
    are uniform.
    """
    parts = [(ref, sources[SplitRef.parse(ref).source]) for ref in phase.data]
    if any(part.texts is None for _, part in parts):
        return None
    split_ref, source = max(parts, key=lambda part: part[1].texts["text"].str.len().max())
    rows = source.texts.loc[source.texts["text"].str.len().sort_values(ascending=False).index[:limit]]
    frame = rows.reset_index(drop=True).assign(split_ref=split_ref, rationale="It moves the price, as it is news.")
    names = source.task.names
    for teacher in phase.teachers:
        frame[f"probabilities_{teacher}"] = [[1 / len(names)] * len(names)] * len(frame)
        frame[f"fold_{teacher}"] = -1
        frame[f"answer_{teacher}"] = "an answer"
    return frame


def sample_phase_texts(phase: PhaseConfig, sources: dict[str, SourceRows], limit: int) -> list[str]:
    """At most `limit` texts of the phase's sources, drawn at random and the same each time; all must be at hand."""
    texts = pd.concat([sources[SplitRef.parse(ref).source].texts["text"] for ref in phase.data], ignore_index=True)
    return texts.sample(min(limit, len(texts)), random_state=0).tolist()
