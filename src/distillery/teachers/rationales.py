"""Rationales: one sentence on why a label holds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from distillery.config.schema import Params
from distillery.label_sets import split_labels
from distillery.tasks.parsing import first_sentence
from distillery.tasks.schema import Task
from distillery.teachers.base import open_file_teacher, open_teacher
from distillery.teachers.signals import KEYS


def add_rationales(
    root: Path, name: str, params: Params, task: Task, rows: pd.DataFrame, signals: pd.DataFrame
) -> pd.DataFrame:
    """`signals` with rationales for a sample of training and pool rows, and whether each contradicts its label.

    The rationale is for the gold label of a training row and for the teacher's label of a pool row. A teacher of
    `kind: answers` brings its own explanations, for all of these rows, and with `api.labels: explained` a rationale is
    what followed the label in the teacher's answer: where that is another label, there is none.

    rows: source, split, id, text, gold label of all rows of `signals`, in any order; further rows are ignored.
    """
    spec, signals = params.teachers[name], signals.reset_index(drop=True)
    gold = rows[[*KEYS, "text", "label"]].rename(columns={"label": "gold"})
    rows = signals[[*KEYS, "label"]].merge(gold, on=KEYS, how="left", validate="1:1")
    trainable = rows[rows["split"].isin(["train", "pool"])]
    explained = trainable["label"].where(trainable["split"] == "pool", trainable["gold"])
    if spec.kind == "answers":
        teacher = open_file_teacher(root, name, params, task)
        signals.loc[trainable.index, "rationale"] = teacher.explanations(trainable, explained.tolist())
        return _flag_contradictions(task, signals, [explained.get(i) for i in signals.index])
    sample = np.random.default_rng(spec.seed).permutation(trainable.index)[: spec.rationales]
    sample = [i for i in sample if isinstance(explained[i], str)]  # an unreadable answer has no reason
    teacher = open_teacher(root, name, params, task)
    if spec.api and spec.api.labels == "explained":
        signals.loc[sample, "rationale"] = teacher.explanations(rows.loc[sample], explained[sample].tolist())
    else:
        prompts = rationale_prompts(task, rows["text"][sample].tolist(), explained[sample].tolist())
        texts = teacher.generate(prompts, max_new_tokens=spec.max_new_tokens)
        signals.loc[sample, "rationale"] = [first_sentence(text) for text in texts]
    return _flag_contradictions(task, signals, [explained.get(i) for i in signals.index])


def _flag_contradictions(task: Task, signals: pd.DataFrame, labels: Sequence[str | None]) -> pd.DataFrame:
    """`signals` with `contradicts`: whether the rationale argues for another label than `labels`; None without one."""
    flags = [
        contradicts(task, rationale, label) if isinstance(rationale, str) and isinstance(label, str) else None
        for rationale, label in zip(signals["rationale"], labels, strict=True)
    ]
    return signals.assign(contradicts=pd.Series(flags, index=signals.index, dtype=object))


def rationale_prompts(task: Task, texts: Sequence[str], labels: Sequence[str]) -> list[list[dict[str, str]]]:
    """Conversations that request one sentence on why each label holds, after the task's solved examples."""
    system = [{"role": "system", "content": task.prompt.system}] if task.prompt.system else []
    examples = []
    for example in task.few_shot:
        if example.rationale:
            examples += [_request(task, example.text, example.label)]
            examples += [{"role": "assistant", "content": example.rationale}]
    return [[*system, *examples, _request(task, text, label)] for text, label in zip(texts, labels, strict=True)]


def _request(task: Task, text: str, label: str) -> dict[str, str]:
    return {"role": "user", "content": f"{text}\n\n{task.prompt.rationale.format(label=task.word(label))}"}


def contradicts(task: Task, rationale: str, label: str) -> bool:
    """Whether `rationale` names another label of the task and not `label`: then it argues for another answer.

    Of a label set: whether it names a label that is not in it.
    """
    words = set(re.findall(r"\w+", rationale.casefold()))
    named = {name for name in task.names if words & {name.casefold(), task.word(name).casefold()}}
    if task.kind == "multilabel":
        return not named <= set(split_labels(label))
    return bool(named) and label not in named
