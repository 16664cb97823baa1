"""Paraphrases of gold rows: generated, filtered, labelled."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from distillery.config.schema import Params, ParaphraseFilter
from distillery.data.near_duplicates import has_near_duplicate
from distillery.files import Paths
from distillery.tasks.schema import N_OPTIONS, Perturbations, Task
from distillery.teachers.base import open_teacher
from distillery.teachers.directions import directions, numbers, tickers
from distillery.teachers.file import FileTeacher
from distillery.teachers.signals import signal_table


def paraphrase_prompts(task: Task, texts: Sequence[str], instruction: str | None = None) -> list[list[dict[str, str]]]:
    """Conversations that request one paraphrase of each text, after the task's solved examples.

    instruction: in place of the task's, and then without its examples, which follow that one.
    """

    def request(text: str) -> dict[str, str]:
        return {"role": "user", "content": f"{instruction or task.prompt.paraphrase}\n\n{text}"}

    examples = []
    for example in () if instruction else task.few_shot:
        if example.paraphrase:
            examples += [request(example.text), {"role": "assistant", "content": example.paraphrase}]
    return [[*examples, request(text)] for text in texts]


def clean_paraphrase(text: str) -> str:
    """`text` without white space and quotes around it."""
    return text.strip().strip('"').strip()


def text_similarity(a: str, b: str) -> float:
    """Similarity of two texts by characters, 0 to 1 (Ratcliff and Obershelp)."""
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
    overlap: whether `text` is a near-duplicate of a validation or test row. Whether the label still holds, a teacher
    predicts: see :func:`filter_paraphrases`.
    """
    if not text:
        return "empty"
    similarity = text_similarity(source, text)
    if similarity > keep.max_similarity:
        return "copy"
    if similarity < keep.min_similarity:
        return "off topic"
    if keep.same_facts and (change := changed_fact(source, text, perturbations)):
        return change
    if overlap:
        return "near-duplicate of a held-out row"
    return "kept"


def changed_fact(source: str, text: str, perturbations: Perturbations) -> str:
    """Which fact of `source` the paraphrase `text` changes, or an empty text."""
    if numbers(source) != numbers(text):
        return "numbers changed"
    if tickers(source, perturbations.tickers) - tickers(text, perturbations.tickers):
        return "tickers lost"
    if directions(source, perturbations.directions) != directions(text, perturbations.directions):
        return "direction changed"
    return ""


def generate_paraphrases(root: Path, params: Params, task: Task, gold: pd.DataFrame) -> pd.DataFrame:
    """`augment.per_row` paraphrases of every row of `gold`: by the untuned teacher, which keeps them, or from files.

    gold: id, text, label, group; of a `choice` task n_options. Returns these and source_id, source_text; all but id and
    text are those of the row.
    """
    spec = params.augment
    columns = ["id", "text", "label", "group", "source_id", "source_text", *gold.columns.intersection([N_OPTIONS])]
    if not spec.per_row:
        return pd.DataFrame(columns=columns, dtype=str)
    teacher = open_teacher(root, spec.teacher, params, task)
    if isinstance(teacher, FileTeacher):
        written = [teacher.paraphrases(gold, sample) for sample in range(spec.per_row)]
    else:
        prompts = paraphrase_prompts(task, gold["text"].tolist(), spec.instruction)
        settings = {key: getattr(spec, key) for key in ("temperature", "max_new_tokens", "batch_size", "seed")}
        written = [teacher.generate(prompts, sample=sample, **settings) for sample in range(spec.per_row)]
    samples = []
    for sample, texts in enumerate(written):
        samples.append(gold.assign(paraphrase=[clean_paraphrase(text) for text in texts], sample=sample))
    rows = pd.concat(samples, ignore_index=True)
    return rows.assign(
        id=rows["id"] + "#" + rows["sample"].astype(str),
        text=rows["paraphrase"],
        source_id=rows["id"],
        source_text=rows["text"],
    )[columns]


def filter_paraphrases(
    root: Path, params: Params, task: Task, candidates: pd.DataFrame, held_out: Sequence[str], near: float
) -> pd.DataFrame:
    """`candidates` with a `reason` each: `kept`, or why not; see :func:`rejection_reason`.

    held_out: validation and test texts; a candidate at similarity `near` or above to one of them is dropped. With
    `keep.same_label` the teacher must predict the row's label for what the other filters left.
    """
    spec = params.augment
    if candidates.empty:
        return candidates.assign(reason=pd.Series(dtype=str))
    texts = candidates["text"].tolist()
    reasons = [
        rejection_reason(
            source,
            text,
            keep=spec.keep,
            perturbations=task.perturbations,
            overlap=bool(overlap),
        )
        for source, text, overlap in zip(
            candidates["source_text"], texts, has_near_duplicate(texts, held_out, near), strict=True
        )
    ]
    candidates = candidates.assign(reason=reasons)
    remaining = candidates.index[candidates["reason"] == "kept"]
    repeated = remaining[candidates.loc[remaining, "text"].duplicated()]
    candidates.loc[repeated, "reason"] = "written twice"
    remaining = remaining.difference(repeated)
    if spec.keep.same_label and len(remaining):
        tuned = Paths(root).teacher(spec.teacher) / "model" if params.teachers[spec.teacher].finetune else None
        teacher = open_teacher(root, spec.teacher, params, task, tuned=tuned)
        rows = candidates.loc[remaining].assign(source=spec.source, split="augmented")
        predicted = signal_table(rows, teacher.predict(rows), task.names, -1)["label"].to_numpy(object)
        changed = remaining[predicted != rows["label"].to_numpy(object)]
        candidates.loc[changed, "reason"] = "label changed"
    return candidates


def label_paraphrases(root: Path, params: Params, task: Task, paraphrases: pd.DataFrame) -> pd.DataFrame:
    """The signals of every teacher for the rows `paraphrases`, by its model that was not tuned on the source row.

    A teacher without such a model gives none. Returns teacher, source, split, id, label, probabilities, fold and
    rationale (None).
    """
    source, signals = params.augment.source, []
    rows = paraphrases.assign(source=source, split="augmented")
    for name, spec in params.teachers.items():
        if source not in params.teacher_sources(name) or rows.empty:
            continue
        if spec.answers and name != params.augment.teacher:
            continue  # its answers are for other texts, also where their ids are the same
        folder = Paths(root).teacher(name)
        fold = pd.Series(-1, index=rows.index)
        if spec.finetune:
            known = pd.read_parquet(folder / "signals.parquet", columns=["source", "split", "id", "fold"])
            known = known[(known["source"] == source) & (known["split"] == "train")].set_index("id")["fold"]
            fold = rows["source_id"].map(known)
        for k in sorted(map(int, fold.dropna().unique())):
            part = rows[fold == k]
            weights = folder / "folds" / str(k) if k >= 0 else folder / "model"
            teacher = open_teacher(root, name, params, task, tuned=weights if spec.finetune else None)
            table = signal_table(part, teacher.predict(part), task.names, k)
            signals.append(table.assign(teacher=name, order=part.index))
            del teacher  # one is held at a time
    columns = ["teacher", "source", "split", "id", "label", "probabilities", "fold", "rationale"]
    if not signals:
        return pd.DataFrame(columns=columns)
    return pd.concat(signals).sort_values(["teacher", "order"], kind="stable")[columns].reset_index(drop=True)
