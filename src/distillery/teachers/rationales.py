"""Rationales: one sentence on why a label holds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from distillery.config.schema import Params
from distillery.tasks.parsing import first_sentence
from distillery.tasks.schema import Task
from distillery.teachers.base import open_teacher
from distillery.teachers.identity import model_identity
from distillery.teachers.local import generate_cached


def add_rationales(
    root: Path, name: str, params: Params, task: Task, rows: pd.DataFrame, said: pd.DataFrame
) -> pd.DataFrame:
    """`said` with a rationale for a sample of gold and pool rows: of the gold label if there is one, else its own.

    Answers that were read from a file bring their own explanations, for all of these rows. rows, said: row by row the
    same ones.
    """
    spec = params.teachers[name]
    open_rows = rows.index[rows["split"].isin(["train", "pool"])]
    chosen = np.random.default_rng(spec.seed).permutation(open_rows)[: spec.rationales]
    labels = [rows["label"][i] if rows["split"][i] == "train" else said["label"][i] for i in chosen]
    read = [isinstance(label, str) for label in labels]  # nobody can say why an unreadable answer holds
    chosen, labels = chosen[read], [label for label, ok in zip(labels, read, strict=True) if ok]
    said = said.copy()
    if spec.kind == "answers":
        open_rows = said.index[said["split"].isin(["train", "pool"])]
        texts = said.loc[open_rows, ["source", "split", "id", "label"]].merge(rows.drop(columns="label"))
        said.loc[open_rows, "rationale"] = open_teacher(name, params, task).explanations(texts, texts["label"].tolist())
        return _flag_contradictions(task, said, said["label"].tolist())
    teacher = open_teacher(name, params, task)
    prompts = rationale_prompts(task, rows["text"][chosen].tolist(), labels)
    asker = model_identity(params, spec.model, teacher)
    told = generate_cached(
        root, teacher, asker, prompts, max_new_tokens=spec.max_new_tokens, batch_size=spec.batch_size
    )
    said.loc[chosen, "rationale"] = [first_sentence(text) for text in told]
    return _flag_contradictions(task, said, [dict(zip(chosen, labels, strict=True)).get(i) for i in said.index])


def _flag_contradictions(task: Task, said: pd.DataFrame, labels: Sequence[str | None]) -> pd.DataFrame:
    """`said` with a column `contradicts`: whether the rationale argues for another label, None where there is none."""
    flags = [
        contradicts(task, why, label) if isinstance(why, str) and isinstance(label, str) else None
        for why, label in zip(said["rationale"], labels, strict=True)
    ]
    return said.assign(contradicts=pd.Series(flags, index=said.index, dtype=object))


def rationale_prompts(task: Task, texts: Sequence[str], labels: Sequence[str]) -> list[list[dict[str, str]]]:
    """Conversations that ask for one sentence on why each label holds, after the task's solved examples."""
    prompts = []
    for text, label in zip(texts, labels, strict=True):
        turns = [{"role": "system", "content": task.prompt.system}] if task.prompt.system else []
        for shot in [*(s for s in task.few_shot if s.rationale), None]:
            says, which = (shot.text, shot.label) if shot else (text, label)
            ask = f"{says}\n\n{task.prompt.rationale.format(label=task.word(which))}"
            turns += [{"role": "user", "content": ask}]
            turns += [{"role": "assistant", "content": shot.rationale}] if shot else []
        prompts.append(turns)
    return prompts


def contradicts(task: Task, rationale: str, label: str) -> bool:
    """Whether `rationale` names another label of the task and not `label`: then it argues for another answer."""
    said = set(re.findall(r"\w+", rationale.casefold()))
    named = {name for name in task.names if said & {name.casefold(), task.word(name).casefold()}}
    return bool(named) and label not in named
