"""Teachers: models that give signals - label probabilities, rationales, paraphrases - for a student to learn from."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from sklearn.model_selection import StratifiedGroupKFold

from distillery import data, metrics, models, params, tasks, training
from distillery import signals as signals_of
from distillery.fingerprint import code_digest
from distillery.models import LabelModel
from distillery.params import UserError
from distillery.store import Answer, Question, Store

if TYPE_CHECKING:
    from distillery.api import ApiTeacher

# A paraphrase that trades one of these families for the other says the opposite.
DIRECTIONS = {
    "up": "up rise rises rose risen rising increase increases increased increasing grow grows grew grown "
    "growing growth gain gains gained climb climbs climbed climbing jump jumps jumped higher above "
    "exceed exceeds exceeded beat beats improve improves improved improving improvement more raise "
    "raises raised profit profits surge surged soar soared",
    "down": "down fall falls fell fallen falling decrease decreases decreased decreasing decline declines "
    "declined drop declining drops dropped dropping shrink shrinks shrank lower below miss missed "
    "misses worsen worsened reduce less reduces reduced reduction cut cuts loss losses slump slumped "
    "slide slid sliding plunge plunged",
}
_FAMILY = {word: family for family, words in DIRECTIONS.items() for word in words.split()}
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
TICKER = re.compile(r"\$[A-Za-z]{1,6}\b|\b[A-Z]{2,6}\b")


def gather(root: Path, P: params.Params, name: str) -> pd.DataFrame:
    """Every row that teacher `name` labels: source, split, id, text, group, and the gold label (for scoring only; of a
    `qa` task also the accepted answers).

    Of answers from files, the rows that they are about. Raises UserError when there is none.
    """
    parts = []
    for source in P.sources_of(name):
        folder = root / "data" / "processed" / source
        for split in params.SPLITS:
            rows = data.read(folder, split)
            if split == "pool":
                rows = rows.merge(data.read(folder, "pool_labels").drop(columns="rationale"), on="id", validate="1:1")
            columns = ["source", "split", "id", "text", "group", "label"]
            columns += ["answers"] if data.read_task(folder).kind == "qa" else []
            parts.append(rows.assign(source=source, split=split)[columns])
    out = pd.concat([part for part in parts if len(part)], ignore_index=True)
    if P.teachers[name].kind == "answers":
        task = data.read_task(root / "data" / "processed" / P.sources_of(name)[0])
        out = out[open_teacher(name, P, task).covered(out)].reset_index(drop=True)
        if out.empty:
            raise UserError(f"params.yaml: teachers.{name}.answers: no answer is about a row of its sources")
    return out


NO_CONTENT = ["N/A", "[MASK]", ""]  # Zhao et al. 2021
CALIBRATIONS = ("none", "contextual", "batch")
FOR_PRIOR = 128  # rows over which `calibrate: batch` takes its mean
SAME_SHOTS = 4  # rows with the same solved examples from which it pays to ask about them by themselves
STORE = Path(".cache/answers/answers.sqlite")  # below the root: all that endpoints and prompted models have said


def open_teacher(
    name: str, P: params.Params, task: tasks.Task, *, tuned: Path | None = None
) -> LabelModel | ApiTeacher | FileTeacher:
    """The teacher `name` as it was fetched, or `tuned`: as it lies in that folder (whole, or as adapters)."""
    spec = P.teachers[name]
    if spec.kind == "api":
        from distillery.api import ApiTeacher, Endpoint  # here: other teachers do not depend on it

        return ApiTeacher(Endpoint(name, spec.api, Store(params.root() / STORE)), task, spec.few_shot)
    if spec.kind == "answers":
        by = "id" if spec.answers.columns.id else "text"
        return FileTeacher(read_answers(spec.answers, task, params.root()), task, by)
    return signals_of.open_teacher(name, spec, P.models[spec.model], task, tuned=tuned)


def read_answers(spec: params.Answers, task: tasks.Task, base: Path) -> pd.DataFrame:
    """Answers of an external LLM out of files below `base`, a row each, in their order.

    Returns at (file and line), key (id, or the text as :func:`data.clean` leaves it), label (None if it cannot be
    read), explanation, fate: `kept`, `repeats the answer before`, or `cannot be read`.
    Raises UserError naming the file, and the line or the column, when something is missing there.
    """
    columns, out = spec.columns, []
    for file in spec.files:
        raw, before = data.load_file(file, base), None
        for name in filter(None, vars(columns).values()):
            if name not in raw.rows[0]:
                raise UserError(f"{file}: no column `{name}`; there are: {', '.join(raw.rows[0])}")
        for i, row in enumerate(raw.rows):
            key = row.get(columns.id or columns.text)
            if key in (None, ""):
                raise UserError(f"{raw.at(i)}: `{columns.id or columns.text}` is empty")
            if columns.answer:
                label, explanation = tasks.explained(task, str(row.get(columns.answer) or ""))
            else:
                label = tasks.parse(task, str(row.get(columns.label) or ""))
                explanation = str(row.get(columns.explanation) or "").strip() if columns.explanation else ""
            said = (label, explanation)
            repeated = explanation and before is not None and before[0] != key and before[1] == said
            before = (key, said)
            fate = "kept" if label else "cannot be read"
            if repeated and spec.repeats == "drop":
                fate = "repeats the answer before"
            out.append((raw.at(i), data.clean(str(key)), label, explanation, fate))
    return pd.DataFrame(out, columns=["at", "key", "label", "explanation", "fate"])


class FileTeacher:
    """Answers that were read from files, as a teacher. answers: see :func:`read_answers`."""

    arch, model = "answers", None

    def __init__(self, answers: pd.DataFrame, task: tasks.Task, by: str = "text"):
        self.answers, self.task, self.by = answers, task, by
        usable = answers[answers["fate"] != "repeats the answer before"]
        self.known = dict(list(usable.groupby("key")))

    def keys(self, rows: pd.DataFrame) -> list[str]:
        return [data.clean(value) for value in rows[self.by]]

    def covered(self, rows: pd.DataFrame) -> np.ndarray:
        """Which of `rows` (id, text) it has an answer for: [n] bool."""
        return np.array([key in self.known for key in self.keys(rows)], dtype=bool)

    def look_up(self, rows: pd.DataFrame) -> np.ndarray:
        """Share of the answers to each of `rows` that gave each label [n, labels]; NaN where none could be read."""
        out = np.full((len(rows), len(self.task.names)), np.nan)
        for i, key in enumerate(self.keys(rows)):
            said = self.known[key]["label"].dropna() if key in self.known else ()
            if len(said):
                out[i] = [(said == name).mean() for name in self.task.names]
        return out

    def explanations(self, rows: pd.DataFrame, labels: Sequence[str]) -> list[str | None]:
        """What it gave as the reason for `labels`, one of each of `rows`; None where it did not answer so."""
        out = []
        for key, label in zip(self.keys(rows), labels, strict=True):
            found = self.known.get(key)
            reasons = [] if found is None else found["explanation"][found["label"] == label].tolist()
            out.append(first_sentence(" ".join(reasons[0].split())) or None if reasons else None)
        return out


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
        rows[["id", "text", "label", *(["answers"] if task.kind == "qa" else [])]].to_csv(),
    )
    history = training.run_phase(
        teacher,
        training.gold_rows(rows, task),
        spec.finetune,
        folder=folder / key,
        seed=spec.seed,
        title=f"{name} on {part}",
    )
    return teacher, history


def folds(rows: pd.DataFrame, k: int, seed: int) -> np.ndarray:
    """Fold of every row [n], 0 to k - 1: whole groups, labels spread evenly; -1, of none, when k is 0.

    Raises UserError when there are fewer groups than folds.
    """
    if not k:
        return np.full(len(rows), -1)
    if rows["group"].nunique() < k:
        raise UserError(f"teachers: finetune.folds: {k} folds need {k} groups, there are {rows['group'].nunique()}")
    splitter = StratifiedGroupKFold(k, shuffle=True, random_state=seed)
    out = np.empty(len(rows), dtype=int)
    for fold, (_, held_out) in enumerate(splitter.split(rows, rows["label"], rows["group"])):
        out[held_out] = fold
    return out


class GoldShots:
    """Gold rows as solved examples: the same `n` for every row, labels taking turns, or for each the `n` most similar.

    gold: text, label, group of training rows. encoder: the folder of the model whose embeddings tell similarity; the
    most similar example stands last. A row never sees an example of its own group.
    """

    def __init__(self, gold: pd.DataFrame, n: int, encoder: Path | None = None, seed: int = 0):
        gold = gold.sample(frac=1, random_state=seed)
        turn = gold.groupby("label").cumcount()
        self.gold = gold.iloc[np.lexsort([gold["label"], turn])].reset_index(drop=True)
        self.n, self.encoder = n, encoder
        self.shots = [tasks.Shot(text=t, label=y) for t, y in zip(self.gold["text"], self.gold["label"], strict=True)]
        self.vectors = models.embeddings(encoder, self.gold["text"].tolist()) if encoder else None

    def choose(self, texts: Sequence[str], groups: Sequence[str | None]) -> list[tuple[int, ...]]:
        """For each text the positions in `gold` of its examples, in the order in which they are shown."""
        own = [self.gold["group"].to_numpy() == group for group in groups]
        if self.encoder is None:
            return [tuple(np.flatnonzero(~mine)[: self.n].tolist()) for mine in own]
        likeness = models.embeddings(self.encoder, list(texts)) @ self.vectors.T
        likeness[np.stack(own)] = -np.inf
        order = np.argsort(-likeness, axis=1, kind="stable")[:, : self.n]
        return [tuple(i for i in row[::-1].tolist() if not mine[i]) for row, mine in zip(order, own, strict=True)]


def ask(teacher: LabelModel | ApiTeacher | FileTeacher, rows: pd.DataFrame) -> np.ndarray:
    """Probabilities over the task's labels [n, labels] for `rows` (id, text, group); NaN where no answer could be read.

    With the solved examples and the calibration of a teacher from :func:`open_asked`.
    """
    if isinstance(teacher, FileTeacher):
        return teacher.look_up(rows)
    texts, shots, prior = rows["text"].tolist(), getattr(teacher, "shots", None), getattr(teacher, "prior", None)
    if shots is None:
        out = label(teacher, texts)
    else:
        chosen = shots.choose(texts, rows["group"].tolist())
        out = np.zeros((len(rows), len(teacher.task.names)), dtype=np.float32)
        often = {which for which, n in Counter(chosen).items() if n >= SAME_SHOTS}
        together: dict[Any, list[int]] = {}  # rows with the same examples share them as a prefix that is read once
        for i, which in enumerate(chosen):
            together.setdefault(which if which in often else None, []).append(i)
        for where in together.values():
            solved = [[shots.shots[k] for k in chosen[i]] for i in where]
            out[where] = label(teacher, [texts[i] for i in where], solved)
    if prior is not None:
        out = out / np.maximum(prior, 1e-6)
        out = out / out.sum(-1, keepdims=True)
    return out


@dataclass
class Memory:
    """Where what a local teacher said is kept, row by row. asker: see :func:`who`."""

    store: Store
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


def label(
    teacher: LabelModel | ApiTeacher, texts: Sequence[str], solved: Sequence[Sequence[tasks.Shot]] | None = None
) -> np.ndarray:
    """:meth:`LabelModel.predict`, with nothing asked that the teacher's memory has, and every answer kept there."""
    memory: Memory | None = getattr(teacher, "memory", None)
    if memory is None or teacher.task.kind == "qa":
        return teacher.predict(texts, shots=solved) if solved is not None else teacher.predict(texts)
    names = teacher.task.names
    words = [[name, tasks.answer(teacher.task, name, teacher.prompt)] for name in names]
    prompts = [shown(teacher, text, solved[i] if solved else teacher.few_shot) for i, text in enumerate(texts)]
    questions = memory.questions(teacher, prompts, asks="label", labels=words)
    known = [[json.loads(a.text)[name] for name in names] if a else None for a in memory.store.get(questions)]

    def keep(rows: list[int], said: np.ndarray) -> None:
        answers = (Answer(json.dumps(dict(zip(names, p, strict=True)))) for p in said.astype(float).tolist())
        memory.store.put(zip((questions[i] for i in rows), answers, strict=True))

    return teacher.predict(texts, shots=solved, known=known, keep=keep)


def respond(teacher: LabelModel, texts: Sequence[str], max_new_tokens: int) -> list[str]:
    """:meth:`LabelModel.respond`, with nothing asked that the teacher's memory has, and every answer kept there."""
    memory: Memory | None = getattr(teacher, "memory", None)
    if memory is None:
        return teacher.respond(texts, max_new_tokens)
    prompts = [shown(teacher, text, teacher.few_shot) for text in texts]
    questions = memory.questions(teacher, prompts, asks="answer", max_new_tokens=max_new_tokens)

    def keep(rows: list[int], said: list[str]) -> None:
        memory.store.put((questions[i], Answer(text)) for i, text in zip(rows, said, strict=True))

    known = [answer.text if answer else None for answer in memory.store.get(questions)]
    return teacher.respond(texts, max_new_tokens, known=known, keep=keep)


def shown(teacher: LabelModel | ApiTeacher, text: str, solved: Sequence[tasks.Shot] | int) -> str:
    """The prompt for `text`, to the letter, with the examples `solved`, or so many of the task file's."""
    if teacher.arch == "classifier":
        return text
    if teacher.arch == "api":
        turns = tasks.turns(teacher.task, text, solved)
        return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
    return teacher.rendered(text, solved)


def rendered(teacher: LabelModel | ApiTeacher | FileTeacher, row: pd.Series) -> str:
    """What `teacher` is shown for one row (id, text, group), to the letter; of a file, what it answered."""
    if isinstance(teacher, FileTeacher):
        (key,) = teacher.keys(pd.DataFrame([row]))
        return f"{row['text']}\n\n{teacher.known[key].drop(columns='key').to_string(index=False)}"
    shots = getattr(teacher, "shots", None)
    solved = [shots.shots[k] for k in shots.choose([row["text"]], [row["group"]])[0]] if shots else teacher.few_shot
    return shown(teacher, row["text"], solved)


def prior_of(teacher: LabelModel | ApiTeacher, how: str, unlabelled: pd.DataFrame) -> np.ndarray | None:
    """What `teacher` says of the labels [labels] before it reads anything, to divide its answers by.

    how: `contextual`, the mean over texts without content (Zhao et al. 2021, Calibrate Before Use, section 5); `batch`,
    the mean over the rows `unlabelled` (Zhou et al. 2023, Batch Calibration, eq. 4); `none`.
    """
    if how == "none":
        return None
    empty = pd.DataFrame({"id": "", "text": NO_CONTENT, "group": None})
    said = ask(teacher, empty if how == "contextual" else unlabelled)
    return np.nanmean(said, 0)


def open_asked(
    root: Path, name: str, P: params.Params, task: tasks.Task, how: dict[str, Any] | None = None
) -> LabelModel | ApiTeacher | FileTeacher:
    """The teacher `name`, which is only prompted, with its prompt, solved examples and calibration.

    how: `prompt` (a name in the task's `prompts`, None for its `prompt`) and `prior` (see :func:`prior_of`); as the
    teacher's own `asked.json` says when not given.
    """
    spec = P.teachers[name]
    if how is None:
        path = root / "data" / "teacher" / name / "asked.json"
        how = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"prompt": None, "prior": None}
    if how["prompt"] is not None:
        task = task.model_copy(update={"prompt": task.prompts[how["prompt"]]})
    teacher = open_teacher(name, P, task)
    if spec.shots != "task" and spec.few_shot:
        rows = gather(root, P, name)
        encoder = models.fetch(spec.embeddings, P.models[spec.embeddings]) if spec.embeddings else None
        teacher.shots = GoldShots(rows[rows["split"] == "train"], spec.few_shot, encoder, spec.seed)
    teacher.prior = None if how["prior"] is None else np.array(how["prior"])
    if isinstance(teacher, LabelModel):
        if teacher.arch != "classifier":  # also one that is yet to be tuned, on shorter prompts
            teacher.max_length = signals_of.room(teacher)
        teacher.memory = Memory(Store(root / STORE), who(P, spec.model, teacher) | {"seed": spec.seed})
    return teacher


def try_prompts(
    root: Path, name: str, P: params.Params, task: tasks.Task, rows: pd.DataFrame
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The teacher's prompts compared on validation rows, and the best of them: by macro-F1 as `calibrate` says.

    rows: see :func:`gather`. Returns a line for each prompt and calibration (accuracy with its 95 % interval, macro_f1,
    unparsable), and how the teacher is to be asked: see :func:`open_asked`.
    """
    spec, lines, hows = P.teachers[name], [], []
    validation = rows[rows["split"] == "validation"].reset_index(drop=True)
    unlabelled = rows[rows["split"] == ("pool" if (rows["split"] == "pool").any() else "train")]
    unlabelled = unlabelled.head(FOR_PRIOR).reset_index(drop=True)
    for prompt in [None, *spec.prompts]:
        if prompt is not None and prompt not in task.prompts:
            known = ", ".join(task.prompts) or "none"
            raise UserError(f"params.yaml: teachers.{name}.prompts: the task has no `{prompt}`; it has: {known}")
        teacher = open_asked(root, name, P, task, {"prompt": prompt, "prior": None})
        plain = ask(teacher, validation)
        for calibrate in dict.fromkeys(["none", spec.calibrate] if spec.kind == "api" else CALIBRATIONS):
            prior = prior_of(teacher, calibrate, unlabelled)
            p = plain if prior is None else plain / np.maximum(prior, 1e-6)
            said = signals(validation, p / p.sum(-1, keepdims=True), task.names, -1)
            gold, answered = validation["label"].tolist(), said["label"].tolist()
            drawn = metrics.bootstrap_scores(gold, answered, task.names, validation["group"].tolist())
            low, high = metrics.interval(drawn["accuracy"])
            scores = metrics.mean_scores(gold, answered, task.names)
            line = {"prompt": prompt or "prompt", "calibrate": calibrate, "accuracy": scores["accuracy"]}
            line |= {"low": low, "high": high, "macro_f1": scores["macro_f1"]}
            lines.append(line | {"unparsable": int(said["label"].isna().sum())})
            if calibrate == spec.calibrate:
                prior = None if prior is None else [round(float(x), 6) for x in prior]
                hows.append((scores["macro_f1"], {"prompt": prompt, "prior": prior}))
    return pd.DataFrame(lines), max(hows, key=lambda pair: pair[0])[1]


def signals(
    rows: pd.DataFrame, probabilities: np.ndarray, names: Sequence[str], fold: np.ndarray | int
) -> pd.DataFrame:
    """One signal a row: source, split, id (from `rows`), label, probabilities, fold (-1: the teacher on all gold).

    Where no answer could be read (NaN) the label is None: scored as wrong, taught to nobody; all labels are then
    equally likely.
    """
    unread = np.isnan(probabilities).any(-1)
    probabilities = np.where(unread[:, None], 1 / len(names), probabilities)
    return pd.DataFrame(
        {
            "source": rows["source"].tolist(),
            "split": rows["split"].tolist(),
            "id": rows["id"].tolist(),
            "label": pd.Series(np.where(unread, None, np.array(names, object)[probabilities.argmax(-1)]), dtype=object),
            "probabilities": list(probabilities.astype(np.float32)),
            "fold": np.broadcast_to(np.asarray(fold), len(rows)).astype(int),
            "rationale": None,
            "contradicts": None,  # whether the rationale argues for another label
        }
    )


def said_by(
    teacher: LabelModel | ApiTeacher | FileTeacher, rows: pd.DataFrame, fold: np.ndarray | int, max_new_tokens: int
) -> pd.DataFrame:
    """What `teacher` says of `rows`, as :func:`signals` tells it.

    Of a `qa` task the label is whether its answer is accepted, and there are the columns `answer` and its scores.
    """
    if teacher.task.kind != "qa":
        return signals(rows, ask(teacher, rows), teacher.task.names, fold)
    if not isinstance(teacher, LabelModel):
        raise UserError("params.yaml: teachers: free answers are asked of `kind: lm` and `seq2seq` only, so far")
    judged = training.judged(rows, respond(teacher, rows["text"].tolist(), max_new_tokens))
    out = signals(rows, np.stack(judged["probabilities"].to_list()), teacher.task.names, fold)
    return out.join(judged.drop(columns=["id", "label", "prediction", "probabilities"]))


def cross_fit(
    name: str,
    P: params.Params,
    task: tasks.Task,
    gold: pd.DataFrame,
    fold: np.ndarray,
    folder: Path,
    said: pd.DataFrame,
) -> pd.DataFrame:
    """`said`, with the gold rows answered by the fold models in `folder` that were tuned without them; without those of
    no fold.

    gold: rows (source, split, id, text). fold: [len(gold)], see :func:`folds`.
    """
    keys = ["source", "split", "id"]
    said = said.set_index(keys)
    said = said.drop(pd.MultiIndex.from_frame(gold.loc[fold < 0, keys]))
    for k in sorted(set(fold[fold >= 0])):
        rows = gold[fold == k]
        model = open_teacher(name, P, task, tuned=folder / str(k))
        new = said_by(model, rows, k, P.teachers[name].max_new_tokens).set_index(keys)
        plain = new.columns.drop("probabilities")
        said.loc[new.index, plain] = new[plain]
        for key, value in new["probabilities"].items():
            said.at[key, "probabilities"] = value
    return said.reset_index()


def evaluate(rows: pd.DataFrame, said: pd.DataFrame, names: Sequence[str]) -> dict[str, dict]:
    """Scores of the signals `said` against the gold labels of `rows` that have one, per split; and how many answers
    could not be read."""
    keys = ["source", "split", "id"]
    wanted = [*keys, "label", "probabilities", *(column for column in said if column.startswith("token_"))]
    both = rows[[*keys, "label"]].dropna(subset="label").merge(said[wanted].rename(columns={"label": "prediction"}))
    return {
        split: training.scores(part, names) | {"unparsable": int(part["prediction"].isna().sum())}
        for split, part in both.groupby("split", sort=False)
    }


def votes(root: Path, P: params.Params, source: str, split: str = "pool") -> tuple[pd.DataFrame, np.ndarray]:
    """What every teacher of `source` says of the rows of `split` that all of them have a signal for.

    Returns the rows (id, text, a column of labels for each teacher; None where its answer could not be read) and the
    probabilities [teachers, n, labels].
    """
    rows, stack = data.read(root / "data" / "processed" / source, split)[["id", "text"]], {}
    for name in P.teachers:
        if source in P.sources_of(name):
            said = pd.read_parquet(root / "data" / "teacher" / name / "signals.parquet")
            said = said[(said["source"] == source) & (said["split"] == split)].set_index("id")
            rows = rows[rows["id"].isin(said.index)]
            stack[name] = said
    said = {name: of_one.loc[rows["id"]] for name, of_one in stack.items()}
    out = rows.reset_index(drop=True).assign(**{name: s["label"].to_numpy(object) for name, s in said.items()})
    if out.empty:
        return out, np.zeros((len(said), 0, 0))
    return out, np.stack([np.stack(s["probabilities"].to_list()) for s in said.values()]).astype(np.float64)


def pseudo_labels(voted: pd.DataFrame, probabilities: np.ndarray, labels: Sequence[str]) -> pd.DataFrame:
    """What several teachers together say: label and confidence (of the mean distribution), agree (all give that label).

    voted, probabilities: see :func:`votes`.
    """
    mean = probabilities.mean(0)
    label = np.array(labels, dtype=object)[mean.argmax(-1)]
    agree = (voted[voted.columns.drop(["id", "text"])].to_numpy(object) == label[:, None]).all(1)
    return pd.DataFrame({"id": voted["id"], "label": label, "confidence": mean.max(-1), "agree": agree})


def selected(pseudo: pd.DataFrame, gold: Sequence[str], confidences: Sequence[float]) -> pd.DataFrame:
    """How good the pseudo-labels are that each way of choosing leaves: rows, coverage, precision with a 95 % interval.

    gold: the true labels, for scoring alone. A line for each least confidence, without and with agreement.
    """
    right, out = pseudo["label"].to_numpy(object) == np.asarray(gold, dtype=object), []
    for agree in (False, True):
        for least in confidences:
            kept = (pseudo["confidence"] >= least).to_numpy() & (pseudo["agree"].to_numpy() | (not agree))
            line = {"all teachers agree": agree, "confidence from": least, "rows": int(kept.sum())}
            line |= {"coverage": kept.mean(), "precision": right[kept].mean() if kept.any() else np.nan}
            if kept.any():
                drawn = metrics.cluster_bootstrap(right[kept], pseudo["id"][kept])
                line["low"], line["high"] = metrics.interval(drawn)
            out.append(line)
    return pd.DataFrame(out)


def add_rationales(
    root: Path, name: str, P: params.Params, task: tasks.Task, rows: pd.DataFrame, said: pd.DataFrame
) -> pd.DataFrame:
    """`said` with a rationale for a sample of gold and pool rows: of the gold label if there is one, else its own.

    Answers that were read from a file bring their own explanations, for all of these rows. rows, said: row by row the
    same ones.
    """
    spec = P.teachers[name]
    open_rows = rows.index[rows["split"].isin(["train", "pool"])]
    chosen = np.random.default_rng(spec.seed).permutation(open_rows)[: spec.rationales]
    labels = [rows["label"][i] if rows["split"][i] == "train" else said["label"][i] for i in chosen]
    read = [isinstance(label, str) for label in labels]  # nobody can say why an unreadable answer holds
    chosen, labels = chosen[read], [label for label, ok in zip(labels, read, strict=True) if ok]
    said = said.copy()
    if spec.kind == "answers":
        open_rows = said.index[said["split"].isin(["train", "pool"])]
        texts = said.loc[open_rows, ["source", "split", "id", "label"]].merge(rows.drop(columns="label"))
        said.loc[open_rows, "rationale"] = open_teacher(name, P, task).explanations(texts, texts["label"].tolist())
        return _flagged(task, said, said["label"].tolist())
    teacher = open_teacher(name, P, task)
    prompts = ask_why(task, rows["text"][chosen].tolist(), labels)
    asker = who(P, spec.model, teacher)
    told = write(root, teacher, asker, prompts, max_new_tokens=spec.max_new_tokens, batch_size=spec.batch_size)
    said.loc[chosen, "rationale"] = [first_sentence(text) for text in told]
    return _flagged(task, said, [dict(zip(chosen, labels, strict=True)).get(i) for i in said.index])


def _flagged(task: tasks.Task, said: pd.DataFrame, labels: Sequence[str | None]) -> pd.DataFrame:
    """`said` with a column `contradicts`: whether the rationale argues for another label, None where there is none."""
    flags = [
        contradicts(task, why, label) if isinstance(why, str) and isinstance(label, str) else None
        for why, label in zip(said["rationale"], labels, strict=True)
    ]
    return said.assign(contradicts=pd.Series(flags, index=said.index, dtype=object))


def who(P: params.Params, model: str | None, teacher: LabelModel | ApiTeacher) -> dict[str, Any]:
    """All of an untuned local model that decides what it writes, but for prompt and sampling; for the key of an answer.

    An endpoint has a key of its own: see :class:`distillery.api.ApiTeacher`.
    """
    if teacher.arch == "api":
        return {}
    spec, folder = P.models[model], models.fetch(model, P.models[model])
    content = None
    if spec.folder and not spec.wheel:  # a wheel or a revision says what is in it, a folder does not
        files = sorted(file for file in folder.iterdir() if file.suffix in (".json", ".safetensors", ".model"))
        content = [[file.name, hashlib.file_digest(file.open("rb"), "sha256").hexdigest()] for file in files]
    template = teacher.tokenizer.chat_template or "plain"
    dtype = str(teacher.dtype).removeprefix("torch.")
    return {
        "model": spec.model_dump() | {"content": content},
        "adapter": None,
        "template": hashlib.sha256(str(template).encode()).hexdigest(),
        "dtype": dtype,
        "quantization": "nf4" if getattr(teacher.model, "is_loaded_in_4bit", False) else None,
        "writer": version("transformers"),
    }


def write(
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

    asker: see :func:`who`.
    """
    if teacher.arch == "api":
        return teacher.generate(prompts, max_new_tokens=max_new_tokens, temperature=temperature, sample=sample)
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed if temperature else None}
    questions = [Question(asker | sampling, prompt, sample) for prompt in prompts]
    store = Store(root / STORE)

    def keep(rows: list[int], texts: list[str]) -> None:
        store.put((questions[i], Answer(text)) for i, text in zip(rows, texts, strict=True))

    known = [answer.text if answer else None for answer in store.get(questions)]
    return teacher.generate(
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=1000 * seed + sample,
        batch_size=batch_size,
        known=known,
        keep=keep,
    )


def ask_why(task: tasks.Task, texts: Sequence[str], labels: Sequence[str]) -> list[list[dict[str, str]]]:
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


def contradicts(task: tasks.Task, rationale: str, label: str) -> bool:
    """Whether `rationale` names another label of the task and not `label`: then it argues for another answer."""
    said = set(re.findall(r"\w+", rationale.casefold()))
    named = {name for name in task.names if said & {name.casefold(), task.word(name).casefold()}}
    return bool(named) and label not in named


def first_sentence(text: str) -> str:
    """`text` up to the first full stop that ends a sentence (a dot within a number does not)."""
    found = re.search(r"[.!?](?=\s|$)", text)
    return text[: found.end()] if found else text


def ask_to_reword(task: tasks.Task, texts: Sequence[str]) -> list[list[dict[str, str]]]:
    """Conversations that ask for one rewording of each text, after the task's solved examples."""
    prompts = []
    for text in texts:
        turns = []
        for shot in [*(s for s in task.few_shot if s.paraphrase), None]:
            turns += [{"role": "user", "content": f"{task.prompt.paraphrase}\n\n{shot.text if shot else text}"}]
            turns += [{"role": "assistant", "content": shot.paraphrase}] if shot else []
        prompts.append(turns)
    return prompts


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
    overlap: bool = False,
) -> str:
    """`kept`, or the first reason why the paraphrase `text` of `source` cannot be used.

    overlap: whether `text` is a near-duplicate of a validation or test row. The label's survival is for a teacher to
    judge: see :func:`judge`.
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
    if overlap:
        return "near-duplicate of a held-out row"
    return "kept"


def write_paraphrases(root: Path, P: params.Params, task: tasks.Task, gold: pd.DataFrame) -> pd.DataFrame:
    """`augment.per_row` paraphrases of every row of `gold` by the untuned teacher; what it has written is kept.

    Returns id, text, label, group, source_id, source_text; label and group are those of the row.
    """
    spec, frames = P.augment, []
    columns = ["id", "text", "label", "group", "source_id", "source_text"]
    if not spec.per_row:
        return pd.DataFrame(columns=columns, dtype=str)
    teacher = open_teacher(spec.teacher, P, task)
    asker, prompts = who(P, P.teachers[spec.teacher].model, teacher), ask_to_reword(task, gold["text"].tolist())
    settings = {key: getattr(spec, key) for key in ("temperature", "max_new_tokens", "batch_size", "seed")}
    for n in range(spec.per_row):
        made = write(root, teacher, asker, prompts, sample=n, **settings)
        frames.append(gold.assign(made=[text.strip().strip('"').strip() for text in made], n=n))
    rows = pd.concat(frames, ignore_index=True)
    rows = rows.assign(source_id=rows["id"], source_text=rows["text"], text=rows["made"])
    return rows.assign(id=rows["id"] + "#" + rows["n"].astype(str))[columns]


def judge(
    root: Path, P: params.Params, task: tasks.Task, candidates: pd.DataFrame, held_out: Sequence[str], near: float
) -> pd.DataFrame:
    """`candidates` with a `reason` each: `kept`, or why not; see :func:`why_dropped`.

    held_out: validation and test texts; a candidate at similarity `near` or above to one of them is dropped. With
    `keep.same_label` the tuned teacher must read the row's label in what the filters left.
    """
    spec = P.augment
    if candidates.empty:
        return candidates.assign(reason=pd.Series(dtype=str))
    closest = np.maximum(*(data.nearest(candidates["text"].tolist(), held_out, masked)[0] for masked in (True, False)))
    reasons = [
        why_dropped(source, text, keep=spec.keep, overlap=bool(nearness >= near - data.SLACK))
        for source, text, nearness in zip(candidates["source_text"], candidates["text"], closest, strict=True)
    ]
    candidates = candidates.assign(reason=reasons)
    left = candidates.index[candidates["reason"] == "kept"]
    twice = left[candidates.loc[left, "text"].duplicated()]
    candidates.loc[twice, "reason"] = "written twice"
    left = left.difference(twice)
    if spec.keep.same_label and len(left):
        tuned = root / "data" / "teacher" / spec.teacher / "model"
        tuned_too = P.teachers[spec.teacher].finetune is not None
        model = (
            open_teacher(spec.teacher, P, task, tuned=tuned) if tuned_too else open_asked(root, spec.teacher, P, task)
        )
        read = candidates.loc[left].assign(source=spec.source, split="augmented")
        said = signals(read, ask(model, read), task.names, -1)["label"]
        changed = left[said.to_numpy(object) != candidates.loc[left, "label"].to_numpy(object)]
        candidates.loc[changed, "reason"] = "label changed"
    return candidates


def label_paraphrases(
    root: Path, P: params.Params, task: tasks.Task, kept: pd.DataFrame, gold: pd.DataFrame
) -> pd.DataFrame:
    """Every teacher's signal for every kept paraphrase, by the model that was not tuned on the row it was made of; none
    of a teacher that has no such model."""
    source, out = P.augment.source, []
    rows = kept[["id", "text", "group", "source_id"]].assign(source=source, split="augmented")
    for name, spec in P.teachers.items():
        if source not in P.sources_of(name) or rows.empty or spec.kind == "answers":
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
            model = open_teacher(name, P, task, tuned=where) if spec.finetune else open_asked(root, name, P, task)
            said = signals(part, ask(model, part), task.names, k)
            out.append(said.assign(teacher=name, order=part.index))
    columns = ["teacher", "source", "split", "id", "label", "probabilities", "fold", "rationale"]
    if not out:
        return pd.DataFrame(columns=columns)
    return pd.concat(out).sort_values(["teacher", "order"], kind="stable")[columns].reset_index(drop=True)
