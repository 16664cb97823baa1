"""Paraphrases of gold rows: generated, filtered, labelled."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from distillery.config.schema import Params, ParaphraseFilter
from distillery.data.near_duplicates import SIMILARITY_SLACK, nearest_texts
from distillery.tasks.schema import Perturbations, Task
from distillery.teachers.base import open_prompted_teacher, open_teacher
from distillery.teachers.directions import directions, numbers, tickers
from distillery.teachers.identity import model_identity
from distillery.teachers.local import generate_cached, predict_labels
from distillery.teachers.signals import signal_table


def paraphrase_prompts(task: Task, texts: Sequence[str]) -> list[list[dict[str, str]]]:
    """Conversations that ask for one rewording of each text, after the task's solved examples."""
    prompts = []
    for text in texts:
        turns = []
        for shot in [*(s for s in task.few_shot if s.paraphrase), None]:
            turns += [{"role": "user", "content": f"{task.prompt.paraphrase}\n\n{shot.text if shot else text}"}]
            turns += [{"role": "assistant", "content": shot.paraphrase}] if shot else []
        prompts.append(turns)
    return prompts


def text_similarity(a: str, b: str) -> float:
    """Likeness of two texts in characters, 0 to 1 (Ratcliff and Obershelp)."""
    return difflib.SequenceMatcher(None, a.lower(), b.lower(), autojunk=False).ratio()


def rejection_reason(
    source: str,
    text: str,
    *,
    keep: ParaphraseFilter,
    perturbations: Perturbations,
    overlap: bool = False,
) -> str:
    """`kept`, or the first reason why the paraphrase `text` of `source` cannot be used.

    perturbations: the task's, whose tickers and directions must be kept.
    overlap: whether `text` is a near-duplicate of a validation or test row. The label's survival is for a teacher to
    judge: see :func:`filter_paraphrases`.
    """
    if not text:
        return "empty"
    if text_similarity(source, text) > keep.max_similarity:
        return "copy"
    if text_similarity(source, text) < keep.min_similarity:
        return "off topic"
    if numbers(source) != numbers(text):
        return "numbers changed"
    if tickers(source, perturbations.tickers) - tickers(text, perturbations.tickers):
        return "tickers lost"
    if directions(source, perturbations.directions) != directions(text, perturbations.directions):
        return "direction changed"
    if overlap:
        return "near-duplicate of a held-out row"
    return "kept"


def generate_paraphrases(root: Path, params: Params, task: Task, gold: pd.DataFrame) -> pd.DataFrame:
    """`augment.per_row` paraphrases of every row of `gold` by the untuned teacher; what it has written is kept.

    Returns id, text, label, group, source_id, source_text; label and group are those of the row.
    """
    spec, frames = params.augment, []
    columns = ["id", "text", "label", "group", "source_id", "source_text"]
    if not spec.per_row:
        return pd.DataFrame(columns=columns, dtype=str)
    teacher = open_teacher(spec.teacher, params, task)
    asker, prompts = (
        model_identity(params, params.teachers[spec.teacher].model, teacher),
        paraphrase_prompts(task, gold["text"].tolist()),
    )
    settings = {key: getattr(spec, key) for key in ("temperature", "max_new_tokens", "batch_size", "seed")}
    for n in range(spec.per_row):
        made = generate_cached(root, teacher, asker, prompts, sample=n, **settings)
        frames.append(gold.assign(made=[text.strip().strip('"').strip() for text in made], n=n))
    rows = pd.concat(frames, ignore_index=True)
    rows = rows.assign(source_id=rows["id"], source_text=rows["text"], text=rows["made"])
    return rows.assign(id=rows["id"] + "#" + rows["n"].astype(str))[columns]


def filter_paraphrases(
    root: Path, params: Params, task: Task, candidates: pd.DataFrame, held_out: Sequence[str], near: float
) -> pd.DataFrame:
    """`candidates` with a `reason` each: `kept`, or why not; see :func:`rejection_reason`.

    held_out: validation and test texts; a candidate at similarity `near` or above to one of them is dropped. With
    `keep.same_label` the tuned teacher must read the row's label in what the filters left.
    """
    spec = params.augment
    if candidates.empty:
        return candidates.assign(reason=pd.Series(dtype=str))
    closest = np.maximum(*(nearest_texts(candidates["text"].tolist(), held_out, masked)[0] for masked in (True, False)))
    reasons = [
        rejection_reason(
            source,
            text,
            keep=spec.keep,
            perturbations=task.perturbations,
            overlap=bool(nearness >= near - SIMILARITY_SLACK),
        )
        for source, text, nearness in zip(candidates["source_text"], candidates["text"], closest, strict=True)
    ]
    candidates = candidates.assign(reason=reasons)
    left = candidates.index[candidates["reason"] == "kept"]
    twice = left[candidates.loc[left, "text"].duplicated()]
    candidates.loc[twice, "reason"] = "written twice"
    left = left.difference(twice)
    if spec.keep.same_label and len(left):
        tuned = root / "data" / "teacher" / spec.teacher / "model"
        tuned_too = params.teachers[spec.teacher].finetune is not None
        model = (
            open_teacher(spec.teacher, params, task, tuned=tuned)
            if tuned_too
            else open_prompted_teacher(root, spec.teacher, params, task)
        )
        read = candidates.loc[left].assign(source=spec.source, split="augmented")
        said = signal_table(read, predict_labels(model, read), task.names, -1)["label"]
        changed = left[said.to_numpy(object) != candidates.loc[left, "label"].to_numpy(object)]
        candidates.loc[changed, "reason"] = "label changed"
    return candidates


def label_paraphrases(root: Path, params: Params, task: Task, kept: pd.DataFrame, gold: pd.DataFrame) -> pd.DataFrame:
    """Every teacher's signal for every kept paraphrase, by the model that was not tuned on the row it was made of; none
    of a teacher that has no such model."""
    source, out = params.augment.source, []
    rows = kept[["id", "text", "group", "source_id"]].assign(source=source, split="augmented")
    for name, spec in params.teachers.items():
        if source not in params.teacher_sources(name) or rows.empty or spec.kind == "answers":
            continue  # answers from a file are about other texts
        folder = root / "data" / "teacher" / name
        fold = pd.Series(-1, index=rows.index)
        if spec.finetune:
            known = pd.read_parquet(folder / "signals.parquet", columns=["source", "split", "id", "fold"])
            known = known[(known["source"] == source) & (known["split"] == "train")].set_index("id")["fold"]
            fold = rows["source_id"].map(known)
        for k in sorted(map(int, fold.dropna().unique())):
            where = folder / "folds" / str(k) if k >= 0 else folder / "model"
            part = rows[fold == k]
            model = (
                open_teacher(name, params, task, tuned=where)
                if spec.finetune
                else open_prompted_teacher(root, name, params, task)
            )
            said = signal_table(part, predict_labels(model, part), task.names, k)
            out.append(said.assign(teacher=name, order=part.index))
    columns = ["teacher", "source", "split", "id", "label", "probabilities", "fold", "rationale"]
    if not out:
        return pd.DataFrame(columns=columns)
    return pd.concat(out).sort_values(["teacher", "order"], kind="stable")[columns].reset_index(drop=True)
