"""Teachers: models that produce signals - label probabilities, rationales, paraphrases - for a student to learn from."""

from __future__ import annotations

import difflib
import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold

from distillery import models, params, tasks, training
from distillery.models import LabelModel
from distillery.params import UserError

DIRECTIONS = {  # a paraphrase that trades one of these families for the other says the opposite
    "up": "up rise rises rose risen rising increase increases increased increasing grow grows grew grown growing growth "
    "gain gains gained climb climbs climbed climbing jump jumps jumped higher above exceed exceeds exceeded beat beats "
    "improve improves improved improving improvement more raise raises raised profit profits surge surged soar soared",
    "down": "down fall falls fell fallen falling decrease decreases decreased decreasing decline declines declined "
    "declining drop drops dropped dropping shrink shrinks shrank lower below miss missed misses worsen worsened "
    "reduce reduces reduced reduction less cut cuts loss losses slump slumped slide slid sliding plunge plunged",
}
_FAMILY = {word: family for family, words in DIRECTIONS.items() for word in words.split()}
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
TICKER = re.compile(r"\$[A-Za-z]{1,6}\b|\b[A-Z]{2,6}\b")


def open_teacher(
    name: str, P: params.Params, task: tasks.Task, *, tuned: bool = False, folder: Path | None = None
) -> LabelModel:
    """The teacher `name`: as it was fetched, or with `tuned` as it lies in `folder`."""
    spec = P.teachers[name]
    origin = P.models[spec.model]
    arch = "causal" if spec.kind == "lm" else "classifier"
    where = folder if tuned else models.fetch(spec.model, origin)
    adapted = spec.finetune is not None and spec.finetune.lora is not None
    model = models.load(
        where,
        arch,
        labels=task.names,
        # weights that will be trained stay in float32; the rest may lie in the precision it is used in
        dtype=spec.dtype if arch == "causal" and (adapted or not spec.finetune or tuned) else "float32",
        seed=spec.seed,
        trust_remote_code=origin.trust_remote_code,
    )
    tokenizer = models.load_tokenizer(where, origin.trust_remote_code)
    return LabelModel(model, tokenizer, task, arch, prompt=spec.prompt, few_shot=spec.few_shot, dtype=spec.dtype)


def finetune(
    name: str, P: params.Params, task: tasks.Task, rows: pd.DataFrame, *, folder: Path, part: str = "all"
) -> tuple[LabelModel, pd.DataFrame]:
    """The teacher fine-tuned on gold `rows` (id, text, label), and its training history.

    Checkpoints lie in `folder` under a key of everything that decides the result; a killed run continues there.
    """
    spec = P.teachers[name]
    teacher = open_teacher(name, P, task)
    teacher.model = training.attach(teacher.model, spec.finetune.lora, teacher.arch, spec.seed)
    key = training.run_key(
        spec.model_dump(),
        P.models[spec.model].model_dump(),
        task.model_dump(),
        part,
        rows[["id", "text", "label"]].to_csv(),
    )
    targets = np.array([task.names.index(label) for label in rows["label"]])
    history = training.run_phase(
        teacher,
        training.Rows(rows["text"].tolist(), targets),
        spec.finetune,
        folder=folder / key,
        seed=spec.seed,
        title=f"{name} on {part}",
    )
    return teacher, pd.DataFrame(history)


def folds(rows: pd.DataFrame, k: int, seed: int) -> np.ndarray:
    """Fold of every row [n], 0 to k - 1: whole groups, labels spread evenly.

    Raises UserError when there are fewer groups than folds.
    """
    if rows["group"].nunique() < k:
        raise UserError(f"teachers: finetune.folds: {k} folds need {k} groups, there are {rows['group'].nunique()}")
    splitter = StratifiedGroupKFold(k, shuffle=True, random_state=seed)
    out = np.empty(len(rows), dtype=int)
    for fold, (_, held_out) in enumerate(splitter.split(rows, rows["label"], rows["group"])):
        out[held_out] = fold
    return out


def signals(
    rows: pd.DataFrame, probabilities: np.ndarray, names: Sequence[str], fold: np.ndarray | int
) -> pd.DataFrame:
    """One signal a row: source, split, id (from `rows`), label, probabilities, fold (-1: the teacher on all gold)."""
    return pd.DataFrame(
        {
            "source": rows["source"].tolist(),
            "split": rows["split"].tolist(),
            "id": rows["id"].tolist(),
            "label": [names[i] for i in probabilities.argmax(-1)],
            "probabilities": list(probabilities.astype(np.float32)),
            "fold": np.broadcast_to(np.asarray(fold), len(rows)).astype(int),
            "rationale": None,
        }
    )


def rationales(
    teacher: LabelModel, texts: Sequence[str], labels: Sequence[str], *, max_new_tokens: int, batch_size: int
) -> list[str]:
    """One sentence a row on why its label holds, written greedily after the task's solved examples."""
    task, prompts = teacher.task, []
    for text, label in zip(texts, labels, strict=True):
        turns = [{"role": "system", "content": task.prompt.system}] if task.prompt.system else []
        for shot in [*(s for s in task.few_shot if s.rationale), None]:
            says, which = (shot.text, shot.label) if shot else (text, label)
            ask = f"{says}\n\n{task.prompt.rationale.format(label=task.word(which))}"
            turns += [{"role": "user", "content": ask}]
            turns += [{"role": "assistant", "content": shot.rationale}] if shot else []
        prompts.append(tasks.render(turns, teacher.tokenizer, teacher.prompt))
    return [
        first_sentence(answer)
        for answer in teacher.generate(prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    ]


def first_sentence(text: str) -> str:
    """`text` up to the first full stop that ends a sentence (a dot within a number does not)."""
    found = re.search(r"[.!?](?=\s|$)", text)
    return text[: found.end()] if found else text


def paraphrases(
    teacher: LabelModel, texts: Sequence[str], *, temperature: float, max_new_tokens: int, batch_size: int, seed: int
) -> list[str]:
    """One rewording a row, sampled at `temperature` after the task's solved examples."""
    task, prompts = teacher.task, []
    for text in texts:
        turns = []
        for shot in [*(s for s in task.few_shot if s.paraphrase), None]:
            turns += [{"role": "user", "content": f"{task.prompt.paraphrase}\n\n{shot.text if shot else text}"}]
            turns += [{"role": "assistant", "content": shot.paraphrase}] if shot else []
        prompts.append(tasks.render(turns, teacher.tokenizer, teacher.prompt))
    made = teacher.generate(
        prompts, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, batch_size=batch_size
    )
    return [text.strip().strip('"').strip() for text in made]


def numbers(text: str) -> list[str]:
    """The numbers in `text`, sorted, thousands separators taken out."""
    return sorted(
        n.replace(",", "") if re.fullmatch(r"\d{1,3}(,\d{3})+(\.\d+)?", n) else n for n in NUMBER.findall(text)
    )


def tickers(text: str) -> set[str]:
    """What looks like a ticker, a currency or another name in capitals."""
    return set(TICKER.findall(text))


def directions(text: str) -> set[str]:
    """Which families of direction words (`up`, `down`) occur in `text`."""
    return {_FAMILY[word] for word in re.findall(r"[a-z]+", text.lower()) if word in _FAMILY}


def similarity(a: str, b: str) -> float:
    """Likeness of two texts in characters, 0 to 1 (Ratcliff and Obershelp)."""
    return difflib.SequenceMatcher(None, a.lower(), b.lower(), autojunk=False).ratio()


def why_dropped(
    source: str,
    text: str,
    *,
    keep: params.Keep,
    overlap: Callable[[str], bool] = lambda text: False,
) -> str:
    """`kept`, or the first reason why the paraphrase `text` of `source` cannot be used.

    overlap: whether a text is a near-duplicate of a validation or test row. The label's survival is judged apart,
    by a teacher: see :func:`judge`.
    """
    if not text:
        return "empty"
    if similarity(source, text) > keep.max_similarity:
        return "copy"
    if similarity(source, text) < keep.min_similarity:
        return "off topic"
    if numbers(source) != numbers(text):
        return "numbers changed"
    if tickers(source) - tickers(text):
        return "tickers lost"
    if directions(source) != directions(text):
        return "direction changed"
    if overlap(text):
        return "near-duplicate of a held-out row"
    return "kept"


def row_seed(seed: int, name: str) -> int:
    """A seed of its own for `name`, the same in every process."""
    return zlib.crc32(f"{seed}/{name}".encode())
