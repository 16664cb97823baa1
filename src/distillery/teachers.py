"""Teachers: models that give signals - label probabilities, rationales, paraphrases - for a student to learn from."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from peft import PeftModel
from sklearn.model_selection import StratifiedGroupKFold

from distillery import data, models, params, tasks, training
from distillery.models import LabelModel
from distillery.params import UserError

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
    """Every row that teacher `name` labels: source, split, id, text, group, and the gold label (for scoring only)."""
    parts = []
    for source in P.sources_of(name):
        folder = root / "data" / "processed" / source
        for split in params.SPLITS:
            rows = data.read(folder, split)
            if split == "pool":
                rows = rows.merge(data.read(folder, "pool_labels")[["id", "label"]], on="id", validate="1:1")
            parts.append(rows.assign(source=source, split=split)[["source", "split", "id", "text", "group", "label"]])
    return pd.concat([part for part in parts if len(part)], ignore_index=True)


def open_teacher(name: str, P: params.Params, task: tasks.Task, *, tuned: Path | None = None) -> LabelModel:
    """The teacher `name` as it was fetched, or `tuned`: as it lies in that folder (whole, or as adapters)."""
    spec = P.teachers[name]
    origin = P.models[spec.model]
    arch = "causal" if spec.kind == "lm" else "classifier"
    adapters = tuned is not None and (tuned / "adapter_config.json").exists()
    folder = tuned if tuned and not adapters else models.fetch(spec.model, origin)
    # weights that are about to be trained stay in float32; others may lie in the precision they are used in
    trained = spec.finetune is not None and spec.finetune.lora is None and tuned is None
    model = models.load(
        folder,
        arch,
        labels=task.names,
        dtype=spec.dtype if arch == "causal" and not trained else "float32",
        seed=spec.seed,
        trust_remote_code=origin.trust_remote_code,
    )
    if adapters:
        model = PeftModel.from_pretrained(model, tuned).merge_and_unload()
    tokenizer = models.load_tokenizer(folder, origin.trust_remote_code)
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
    return teacher, history


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


def cross_fit(
    name: str,
    P: params.Params,
    task: tasks.Task,
    gold: pd.DataFrame,
    fold: np.ndarray,
    folder: Path,
    said: pd.DataFrame,
) -> pd.DataFrame:
    """`said`, with the gold rows answered by the fold models in `folder` that were tuned without them.

    gold: rows (source, split, id, text). fold: [len(gold)], see :func:`folds`.
    """
    said = said.set_index(["source", "split", "id"])
    for k in sorted(set(fold)):
        rows = gold[fold == k]
        model = open_teacher(name, P, task, tuned=folder / str(k))
        new = signals(rows, model.predict(rows["text"].tolist()), task.names, k).set_index(["source", "split", "id"])
        said.loc[new.index, ["label", "fold"]] = new[["label", "fold"]]
        for key, value in new["probabilities"].items():
            said.at[key, "probabilities"] = value
    return said.reset_index()


def evaluate(rows: pd.DataFrame, said: pd.DataFrame, names: Sequence[str]) -> dict[str, dict]:
    """Scores of the signals `said` against the gold labels of `rows` that have one, per split."""
    keys = ["source", "split", "id"]
    both = (
        rows[[*keys, "label"]]
        .dropna(subset="label")
        .merge(said[[*keys, "label", "probabilities"]].rename(columns={"label": "prediction"}))
    )
    return {split: training.scores(part, names) for split, part in both.groupby("split", sort=False)}


def add_rationales(
    name: str, P: params.Params, task: tasks.Task, rows: pd.DataFrame, said: pd.DataFrame
) -> pd.DataFrame:
    """`said` with a rationale for a sample of gold and pool rows: of the gold label if there is one, else its own."""
    spec = P.teachers[name]
    open_rows = rows.index[rows["split"].isin(["train", "pool"])]
    chosen = np.random.default_rng(spec.seed).permutation(open_rows)[: spec.rationales]
    labels = [rows["label"][i] if rows["split"][i] == "train" else said["label"][i] for i in chosen]
    told = rationales(
        open_teacher(name, P, task),
        rows["text"][chosen].tolist(),
        labels,
        max_new_tokens=spec.max_new_tokens,
        batch_size=spec.batch_size,
    )
    said = said.copy()
    said.loc[chosen, "rationale"] = told
    return said


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
        prompts.append(turns)
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
        prompts.append(turns)
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
    """`augment.per_row` paraphrases of every row of `gold` by the untuned teacher, written once and then cached.

    Returns id, text, label, group, source_id, source_text; label and group are those of the row.
    """
    spec = P.augment
    frames = []
    for n in range(spec.per_row):
        teacher = P.teachers[spec.teacher]
        settings = {"temperature": spec.temperature, "max_new_tokens": spec.max_new_tokens, "seed": spec.seed + n}
        decides = [P.models[teacher.model].model_dump(), teacher.dtype, teacher.prompt, task.prompt.model_dump()]
        shots = [shot.model_dump() for shot in task.few_shot]
        key = training.run_key(decides, shots, settings, spec.batch_size, gold["text"].tolist())
        path = root / ".cache" / "paraphrases" / f"{key}.json"
        if not path.exists():
            model = open_teacher(spec.teacher, P, task)
            texts = paraphrases(model, gold["text"].tolist(), batch_size=spec.batch_size, **settings)
            with params.atomic(path) as scratch:
                scratch.write_text(json.dumps(texts, ensure_ascii=False, indent=0), encoding="utf-8")
        frames.append(gold.assign(made=json.loads(path.read_text(encoding="utf-8")), n=n))
    columns = ["id", "text", "label", "group", "source_id", "source_text"]
    if not frames:
        return pd.DataFrame(columns=columns, dtype=str)
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
        model = open_teacher(spec.teacher, P, task, tuned=tuned if P.teachers[spec.teacher].finetune else None)
        said = model.predict(candidates.loc[left, "text"].tolist()).argmax(-1)
        changed = left[[task.names[i] for i in said] != candidates.loc[left, "label"].to_numpy()]
        candidates.loc[changed, "reason"] = "label changed"
    return candidates


def label_paraphrases(
    root: Path, P: params.Params, task: tasks.Task, kept: pd.DataFrame, gold: pd.DataFrame
) -> pd.DataFrame:
    """Every teacher's signal for every kept paraphrase, by the model that was not tuned on the row it was made of."""
    source, out = P.augment.source, []
    rows = kept[["id", "text", "source_id"]].assign(source=source, split="augmented")
    for name, spec in P.teachers.items():
        if source not in P.sources_of(name) or rows.empty:
            continue
        folder = root / "data" / "teacher" / name
        fold = pd.Series(-1, index=rows.index)
        if spec.finetune:
            known = pd.read_parquet(folder / "signals.parquet", columns=["source", "split", "id", "fold"])
            known = known[(known["source"] == source) & (known["split"] == "train")].set_index("id")["fold"]
            fold = rows["source_id"].map(known)
        for k in sorted(fold.unique()):
            where = (folder / "folds" / str(k) if k >= 0 else folder / "model") if spec.finetune else None
            part = rows[fold == k]
            model = open_teacher(name, P, task, tuned=where)
            said = signals(part, model.predict(part["text"].tolist()), task.names, k)
            out.append(said.assign(teacher=name, order=part.index))
    columns = ["teacher", "source", "split", "id", "label", "probabilities", "fold", "rationale"]
    if not out:
        return pd.DataFrame(columns=columns)
    return pd.concat(out).sort_values(["teacher", "order"], kind="stable")[columns].reset_index(drop=True)
