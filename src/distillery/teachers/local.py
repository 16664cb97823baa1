"""Ask a teacher for label probabilities, answers and texts; keep what was computed."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from distillery.fingerprint import code_digest
from distillery.models.label_model import LabelModel
from distillery.tasks.prompts import chat_turns, render_answer
from distillery.tasks.schema import FewShotExample
from distillery.teachers.cache import STORE_PATH, Answer, AnswerStore, Question
from distillery.teachers.file import FileTeacher

if TYPE_CHECKING:
    from distillery.teachers.api.teacher import ApiTeacher


MIN_SHARED_EXAMPLES = 4  # rows with the same solved examples from which it pays to ask about them by themselves


def predict_labels(teacher: LabelModel | ApiTeacher | FileTeacher, rows: pd.DataFrame) -> np.ndarray:
    """Probabilities over the task's labels [n, labels] for `rows` (id, text, group); NaN where no answer could be read.

    With the solved examples and the calibration of a teacher from :func:`open_prompted_teacher`.
    """
    if isinstance(teacher, FileTeacher):
        return teacher.look_up(rows)
    texts, shots, prior = rows["text"].tolist(), getattr(teacher, "shots", None), getattr(teacher, "prior", None)
    if shots is None:
        out = predict_cached(teacher, texts)
    else:
        chosen = shots.choose(texts, rows["group"].tolist())
        out = np.zeros((len(rows), len(teacher.task.names)), dtype=np.float32)
        often = {which for which, n in Counter(chosen).items() if n >= MIN_SHARED_EXAMPLES}
        together: dict[Any, list[int]] = {}  # rows with the same examples share them as a prefix that is read once
        for i, which in enumerate(chosen):
            together.setdefault(which if which in often else None, []).append(i)
        for where in together.values():
            solved = [[shots.shots[k] for k in chosen[i]] for i in where]
            out[where] = predict_cached(teacher, [texts[i] for i in where], solved)
    if prior is not None:
        out = out / np.maximum(prior, 1e-6)
        out = out / out.sum(-1, keepdims=True)
    return out


@dataclass
class AnswerCache:
    """Where what a local teacher said is kept, row by row. asker: see :func:`model_identity`."""

    store: AnswerStore
    asker: dict[str, Any]

    def questions(self, teacher: LabelModel, prompts: Sequence[str], **what: Any) -> list[Question]:
        """What is asked of each of `prompts`. Rows that are asked about together share batches, and with them the last
        bits of their answers: those of other company, code or threads are answers to another question."""
        about = {
            "max_length": teacher.max_length,
            "weights": str(next(teacher.model.parameters()).dtype),
            "batch_size": teacher.batch_size,
            "together": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest(),
            "code": code_digest("models", "tasks"),
            "machine": [version("torch"), torch.get_num_threads(), teacher.device.type],
        }
        seen: Counter[str] = Counter()
        out = []
        for prompt in prompts:
            out.append(Question(self.asker | about | what, prompt, seen[prompt]))
            seen[prompt] += 1
        return out


def predict_cached(
    teacher: LabelModel | ApiTeacher, texts: Sequence[str], solved: Sequence[Sequence[FewShotExample]] | None = None
) -> np.ndarray:
    """:meth:`LabelModel.predict`, with nothing asked that the teacher's memory has, and every answer kept there."""
    memory: AnswerCache | None = getattr(teacher, "memory", None)
    if memory is None or teacher.task.kind == "qa":
        return teacher.predict(texts, shots=solved) if solved is not None else teacher.predict(texts)
    names = teacher.task.names
    words = [[name, render_answer(teacher.task, name, teacher.prompt)] for name in names]
    prompts = [prompt_text(teacher, text, solved[i] if solved else teacher.few_shot) for i, text in enumerate(texts)]
    questions = memory.questions(teacher, prompts, asks="label", labels=words)
    cached = [[json.loads(a.text)[name] for name in names] if a else None for a in memory.store.get(questions)]

    def on_batch(rows: list[int], said: np.ndarray) -> None:
        answers = (Answer(json.dumps(dict(zip(names, p, strict=True)))) for p in said.astype(float).tolist())
        memory.store.put(zip((questions[i] for i in rows), answers, strict=True))

    return teacher.predict(texts, shots=solved, cached=cached, on_batch=on_batch)


def answer_cached(teacher: LabelModel, texts: Sequence[str], max_new_tokens: int) -> list[str]:
    """:meth:`LabelModel.answer_questions` with a cache: answers in it are not computed again, new ones are added."""
    memory: AnswerCache | None = getattr(teacher, "memory", None)
    if memory is None:
        return teacher.answer_questions(texts, max_new_tokens)
    prompts = [prompt_text(teacher, text, teacher.few_shot) for text in texts]
    questions = memory.questions(teacher, prompts, asks="answer", max_new_tokens=max_new_tokens)

    def on_batch(rows: list[int], said: list[str]) -> None:
        memory.store.put((questions[i], Answer(text)) for i, text in zip(rows, said, strict=True))

    cached = [answer.text if answer else None for answer in memory.store.get(questions)]
    return teacher.answer_questions(texts, max_new_tokens, cached=cached, on_batch=on_batch)


def prompt_text(teacher: LabelModel | ApiTeacher, text: str, solved: Sequence[FewShotExample] | int) -> str:
    """The prompt for `text`, to the letter, with the examples `solved`, or so many of the task file's."""
    if teacher.arch == "classifier":
        return text
    if teacher.arch == "api":
        turns = chat_turns(teacher.task, text, solved)
        return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
    return teacher.prompt_for(text, solved)


def row_prompt(teacher: LabelModel | ApiTeacher | FileTeacher, row: pd.Series) -> str:
    """What `teacher` is shown for one row (id, text, group), to the letter; of a file, what it answered."""
    if isinstance(teacher, FileTeacher):
        (key,) = teacher.keys(pd.DataFrame([row]))
        return f"{row['text']}\n\n{teacher.known[key].drop(columns='key').to_string(index=False)}"
    shots = getattr(teacher, "shots", None)
    solved = [shots.shots[k] for k in shots.choose([row["text"]], [row["group"]])[0]] if shots else teacher.few_shot
    return prompt_text(teacher, row["text"], solved)


def generate_cached(
    root: Path,
    teacher: LabelModel | ApiTeacher,
    asker: dict[str, Any],
    prompts: Sequence[list[dict[str, str]]],
    *,
    max_new_tokens: int,
    batch_size: int,
    temperature: float = 0.0,
    seed: int = 0,
    sample: int = 0,
) -> list[str]:
    """What `teacher` says next in each conversation of `prompts`; every answer is kept, none is written twice.

    asker: see :func:`model_identity`.
    """
    if teacher.arch == "api":
        return teacher.generate(prompts, max_new_tokens=max_new_tokens, temperature=temperature, sample=sample)
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed if temperature else None}
    questions = [Question(asker | sampling, prompt, sample) for prompt in prompts]
    store = AnswerStore(root / STORE_PATH)

    def on_batch(rows: list[int], texts: list[str]) -> None:
        store.put((questions[i], Answer(text)) for i, text in zip(rows, texts, strict=True))

    cached = [answer.text if answer else None for answer in store.get(questions)]
    return teacher.generate(
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=1000 * seed + sample,
        batch_size=batch_size,
        cached=cached,
        on_batch=on_batch,
    )
