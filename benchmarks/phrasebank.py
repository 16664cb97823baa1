"""Financial PhraseBank (Malo et al. 2014): this repository's teachers and students on a public benchmark.

    PYTHONPATH=src python benchmarks/phrasebank.py --data DIR [--headlines DIR] [--seeds 5] [--own RUN ...]

DIR holds `Sentences_50Agree.txt` and `Sentences_AllAgree.txt` as they are published (`sentence@label`, latin-1), or
`derived/Sentences_50Agree.repaired.utf8.txt`, which goes before. Every seed draws its own split, by groups of near
duplicates and shared by both subsets (all-agree is a part of 50-agree), then trains its own teachers and students, as
`benchmarks/phrasebank.yaml` says. A finished part (one fold of a teacher, one phase of a student) lies in
`.cache/phrasebank` under a hash of all that decides it, an unfinished one has checkpoints there: a killed run goes on.

Writes `phrasebank.csv` and the tables of `phrasebank.md` beside this file whenever a student of a seed is done.
"""

from __future__ import annotations

import argparse
import csv
import inspect
import io
import itertools
import json
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import safetensors.torch
from keep import commit
from pydantic import Field, model_validator

from distillery import metrics
from distillery.config.load import load_params, validate_section
from distillery.config.schema import Count, ModelConfig, Name, Section, SourceConfig, SplitShares, StudentConfig
from distillery.data.cleaning import normalize_text
from distillery.data.near_duplicates import SIMILARITY_SLACK, cluster_near_duplicates, nearest_texts
from distillery.data.prepare import prepare_source
from distillery.data.readers import read_source
from distillery.errors import UserError
from distillery.files import atomic_write, file_digest, read_yaml
from distillery.fingerprint import code_digest
from distillery.models.fetch import fetch_model
from distillery.models.label_model import LabelModel
from distillery.models.layers import count_parameters
from distillery.models.load import load_model, load_tokenizer
from distillery.models.save import save_model
from distillery.tasks.schema import Task, load_task
from distillery.teachers.finetune import assign_folds
from distillery.training.rows import TrainingRows, phase_rows
from distillery.training.run import run_key, train_phase
from distillery.training.student import build_student

HERE = Path(__file__).resolve().parent
SUBSETS = ("50agree", "allagree")
FILES = {
    "50agree": ("derived/Sentences_50Agree.repaired.utf8.txt", "Sentences_50Agree.txt"),
    "allagree": ("Sentences_AllAgree.txt",),
}
COLUMNS = (
    *("subset", "model", "role", "params_m", "seeds", "accuracy_mean", "accuracy_low", "accuracy_high"),
    *("macro_f1_mean", "macro_f1_low", "macro_f1_high", "minutes", "commit"),
)
# As published: subset, model, role, millions of parameters, seeds, accuracy (mean, low, high), macro-F1. Random splits.
PUBLISHED = (
    ("50agree", "BERT-base, ten fine-tunes", 110, 10, (0.854, 0.840, 0.867), None),
    ("allagree", "FinBERT, the teacher of PKD", 109.5, 1, (0.9765,), 0.9500),
    ("allagree", "ALBERT, PKD", 11.7, 1, (0.9735,), 0.9626),
    ("allagree", "ALBERT, KD at T=5", 11.7, 1, (0.9647,), 0.9525),
    ("allagree", "ALBERT, CE on FinBERT's labels", 11.7, 1, (0.9529,), 0.9313),
    ("allagree", "ALBERT, gold labels alone", 11.7, 1, (0.8029,), 0.5544),
)
RESAMPLES = 2000
NEAR_DUPLICATE = SourceConfig.model_fields["near_duplicate"].default
EMPTY = "<!-- table -->\n<!-- end -->\n\n<!-- gains -->\n<!-- end -->\n"


class Teacher(StudentConfig):
    """A teacher is tuned in phases like a student, on gold labels, `folds` times, each time without one fold."""

    folds: Annotated[int, Field(ge=2)]


class Settings(Section):
    """`phrasebank.yaml`: what is trained. Phases name `50agree/train`, `allagree/train` and the pools, which teachers
    alone label: `headlines/pool`, `own/pool`, `spliced/pool`; those of `starts` name `finance/all`, this project's own
    corpus with its labels. A start is trained once, and a model for all that follows.
    """

    split: SplitShares
    headlines: Count  # how many of the pool, those nearest to the training sentences
    own: bool = False  # whether the texts of this project's corpus are a pool
    spliced: Count = 0  # sentences made of two training sentences, for each that can be cut
    models: dict[Name, ModelConfig]
    starts: dict[Name, StudentConfig] = {}
    teachers: dict[Name, Teacher]
    students: Annotated[dict[Name, StudentConfig], Field(min_length=1)]

    @model_validator(mode="after")
    def _names_fit(self):
        models = [*self.models, *self.starts]
        for spec in [*self.starts.values(), *self.teachers.values(), *self.students.values()]:
            taught = [(who, self.teachers) for phase in spec.phases for who in phase.teachers]
            for name, known in [(spec.model, models), *taught]:
                if name not in known:
                    raise ValueError(f"`{name}` is not named above; there are: {', '.join(known)}")
        return self


# ------------------------------------------------------------------------------------------------------------ data


def read_sentences(path: Path) -> list[tuple[str, str]]:
    """(sentence, label) of every line of a PhraseBank file, UTF-8 if it can be read as such, else latin-1.

    Raises UserError naming the line when one is not `sentence@label`.
    """
    content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    labels, rows = sorted(task().names), []
    for number, line in enumerate(text.split("\n"), 1):
        sentence, _, label = line.strip().rpartition("@")
        if line.strip() and not (normalize_text(sentence) and label in labels):
            raise UserError(f"{path.name}, line {number}: must be `sentence@label` with one of {', '.join(labels)}")
        if line.strip():
            rows.append((normalize_text(sentence), label))
    return rows


def task() -> Task:
    return load_task("finance-sentiment", HERE.parent / "tasks")


def spelling(text: str) -> str:
    """`text` without white space and letters that an encoding may have cost: what both files agree on."""
    return re.sub(r"[^!-~]", "", text)


def phrasebank(folder: Path) -> pd.DataFrame:
    """Every row of 50-agree: text, label, allagree (whether it is one of all-agree).

    Raises UserError when a file is missing or malformed, or a row of all-agree is not in 50-agree.
    """
    found = {}
    for subset, names in FILES.items():
        there = [folder / name for name in names if (folder / name).is_file()]
        if not there:
            raise UserError(f"--data {folder}: no {' or '.join(names)} there")
        found[subset] = there[0], read_sentences(there[0])
    keys = [(spelling(text), label) for text, label in found["50agree"][1]]
    path, rows = found["allagree"]
    unanimous = [(spelling(text), label) for text, label in rows]
    for text, label in set(unanimous) - set(keys):
        raise UserError(f"{path.name}, line {unanimous.index((text, label)) + 1}: not in {found['50agree'][0].name}")
    frame = pd.DataFrame(found["50agree"][1], columns=["text", "label"])
    return frame.assign(allagree=[key in set(unanimous) for key in keys])


def read_headlines(folder: Path) -> list[str]:
    """The distinct texts of at least 5 words in the columns `Headlines` and `Description` of a folder's .csv files.

    Raises UserError when there is none.
    """
    texts: dict[str, None] = {}
    for path in sorted(folder.glob("*.csv")):
        content = path.read_bytes()
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            text = content.decode("cp1252")
        for row in csv.DictReader(io.StringIO(text, newline="")):
            for column in ("Headlines", "Description"):
                line = normalize_text((row.get(column) or "").split("\n")[-1])  # some rows begin with a section's name
                if len(line.split()) >= 5:
                    texts[line] = None
    if not texts:
        raise UserError(f"--headlines {folder}: no .csv with a column `Headlines` there")
    return list(texts)


CUT = re.compile(r"(?: ,| ;| and| but| while| from| to| in| as| with| of)(?= )")
LEAST = 15  # characters that a part has


def splice(texts: Sequence[str], n: int, seed: int) -> list[str]:
    """New sentences for a teacher to label: each of `texts` up to one of its commas, conjunctions or prepositions, and
    then what follows the same word in another, `n` times. They are of the benchmark's kind as no other text at hand is,
    and often say something that no sentence of it says.
    """
    rng, known = np.random.default_rng(seed), set(texts)
    heads: list[tuple[str, str]] = []
    tails: dict[str, list[str]] = {}
    for text in texts:
        cuts = [m for m in CUT.finditer(text) if LEAST < m.end() < len(text) - LEAST]
        if cuts:
            cut = cuts[rng.integers(len(cuts))]
            heads.append((text[: cut.end()], cut[0]))
            tails.setdefault(cut[0], []).append(text[cut.end() :])
    made = [head + tails[word][rng.integers(len(tails[word]))] for _ in range(n) for head, word in heads]
    return list(dict.fromkeys(text for text in made if text not in known))


def corpus(split: SplitShares) -> list[dict[str, Any]]:
    """The rows of this project's own corpus."""
    source = SourceConfig(source="data/corpora/finance.jsonl", task="finance-sentiment", split=split)
    return read_source(source, HERE.parent).rows


def draw(bank: pd.DataFrame, pool: Sequence[str], settings: Settings, seed: int, cache: Path) -> pd.DataFrame:
    """The rows of one seed: where (`50agree/<split>`, `<pool>/pool`), id, text, label, group, allagree.

    Pool texts that nearly equal a validation or test sentence are left out; of the headlines, those nearest to a
    training sentence stay.
    """
    code = "".join(map(inspect.getsource, (draw, splice))) + code_digest("data") + CUT.pattern + str(LEAST)
    own = [row["text"] for row in corpus(settings.split)] if settings.own else []
    about = settings.model_dump(include={"split", "headlines", "spliced"})
    key = run_key(code, bank.to_csv(), list(pool), own, about, seed)
    kept = cache / f"rows-{key}.parquet"
    if kept.exists():
        return pd.read_parquet(kept)
    path = cache / "50agree.jsonl"
    with atomic_write(path) as new:
        bank[["text", "label", "allagree"]].to_json(new, orient="records", lines=True, force_ascii=False)
    spec = SourceConfig(source=path.name, task="finance-sentiment", split=settings.split, seed=seed)
    prepared = prepare_source("50agree", spec, task(), cache)
    audit = prepared.audit["across_splits"]["digits_masked"]
    print(f"seed {seed}: {prepared.audit['rows']} rows, {audit['pairs_above']} near-twins across splits", flush=True)
    rows = prepared.rows.assign(split_ref=[f"50agree/{part}" for part in prepared.split])
    held_out = rows["text"][rows["split_ref"].isin(["50agree/validation", "50agree/test"])].tolist()
    train = rows["text"][rows["split_ref"] == "50agree/train"].tolist()

    def far(texts: Sequence[str]) -> list[str]:
        away = nearest_texts(list(texts), held_out)[0] < NEAR_DUPLICATE - SIMILARITY_SLACK if texts else []
        return [text for text, ok in zip(texts, away, strict=True) if ok]

    pools = {"own": far(own), "spliced": far(splice(train, settings.spliced, seed))}
    if pool and settings.headlines:
        lines = far(pool)
        near = nearest_texts(lines, train)[0]
        pools["headlines"] = [lines[i] for i in sorted(np.argsort(-near, kind="stable")[: settings.headlines])]
    for name, texts in pools.items():
        extra = pd.DataFrame({"text": texts, "id": [f"{name}-{i:06d}" for i in range(len(texts))]})
        rows = pd.concat([rows, extra.assign(split_ref=f"{name}/pool", allagree=False)], ignore_index=True)
    rows = rows.assign(allagree=rows["allagree"].astype(bool))
    with atomic_write(kept) as new:
        rows[["split_ref", "id", "text", "label", "group", "allagree"]].to_parquet(new)
    return pd.read_parquet(kept)


# -------------------------------------------------------------------------------------------------- parts of the work


@contextmanager
def clock(path: Path) -> Iterator[None]:
    """Adds the processor time of the block to the seconds in the file `path`, kept up to date for a run that dies."""
    before = float(path.read_text()) if path.exists() else 0.0
    start, over = time.process_time(), threading.Event()

    def note() -> None:
        with atomic_write(path) as new:
            new.write_text(str(before + time.process_time() - start))

    def tick() -> None:
        while not over.wait(5):
            note()

    ticking = threading.Thread(target=tick, daemon=True)
    ticking.start()
    try:
        yield
    finally:
        over.set()
        ticking.join()
        note()


def finished(folder: Path) -> dict[str, Any] | None:
    path = folder / "about.json"  # written last
    return json.loads(path.read_text()) if path.exists() else None


def finish(folder: Path, answers: dict[str, np.ndarray], parameters: int) -> dict[str, Any]:
    """Write what a part says (name -> probabilities) and cost; drop its checkpoints."""
    with atomic_write(folder / "answers.npz") as new, open(new, "wb") as file:
        np.savez(file, **answers)
    minutes = float((folder / "seconds").read_text()) / 60 if (folder / "seconds").exists() else 0.0
    about = {"minutes": minutes, "parameters": parameters, "commit": commit(HERE.parent)}
    with atomic_write(folder / "about.json") as new:
        new.write_text(json.dumps(about))
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return about


def answers_of(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "answers.npz") as file:
        return dict(file)


def learn(
    spec: StudentConfig,
    model: ModelConfig,
    frame: pd.DataFrame,
    asked: dict[str, pd.DataFrame],
    seed: int,
    title: str,
    cache: Path,
    untrained: bool = False,
) -> list[tuple[Path, dict[str, Any]]]:
    """A student after each of its phases (and `untrained`): the folder of its answers, and its cost so far.

    frame: split_ref, text, label, `probabilities_<teacher>`. asked: the rows (text, label) that it answers,
    `validation` among them.
    Students that begin with the same phases on the same rows share those parts.
    """
    names = task().names
    gold = np.array([names.index(label) for label in asked["validation"]["label"]])
    validation = TrainingRows(asked["validation"]["text"].tolist(), gold)
    start = spec.model_dump(exclude={"phases", "control", "checkpoint_every", "folds"})
    texts = {part: rows["text"].tolist() for part, rows in asked.items()}
    key = run_key(inspect.getsource(learn), start, model.model_dump(), seed, texts, gold.tolist())
    student, before, out = None, None, []
    for k in range(0 if untrained else 1, len(spec.phases) + 1):
        if k:
            phase = spec.phases[k - 1]
            rows = phase_rows(frame, phase, names)
            signals = b"" if rows.logprobs is None else rows.logprobs.numpy().tobytes()
            key = run_key(key, phase.model_dump(), rows.texts, rows.targets.tolist(), signals)
        folder = cache / key
        if not finished(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if student is None:
                student = build_student(spec, fetch_model(spec.model, model), task(), seed)
                if before is not None:
                    safetensors.torch.load_model(student.model, str(before / "weights.safetensors"))
            if k:
                with clock(folder / "seconds"):
                    train_phase(
                        student,
                        rows,
                        phase,
                        folder=folder / "checkpoints",
                        seed=1000 * seed + k,
                        title=f"{title}, phase {k}",
                        checkpoint_every=spec.checkpoint_every,
                        validation=validation,
                    )
                with atomic_write(folder / "weights.safetensors") as new:
                    safetensors.torch.save_model(student.model, str(new))
            answers = {part: student.predict(texts[part]) for part in asked}
            finish(folder, answers, count_parameters(student.model)[0])
        before = folder if k else None
        out.append((folder, finished(folder)))
    return [(folder, total([cost for _, cost in out[: k + 1]])) for k, (folder, _) in enumerate(out)]


def total(costs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    commits = " ".join(dict.fromkeys(cost["commit"] for cost in costs))
    return {"minutes": sum(c["minutes"] for c in costs), "parameters": costs[-1]["parameters"], "commit": commits}


def start(board: Board, name: str, settings: Settings, bank: pd.DataFrame, cache: Path) -> ModelConfig:
    """The start `name`, tuned on this project's own corpus alone, as a model; scored on all rows of `bank`."""
    spec = settings.starts[name]
    own = pd.DataFrame(corpus(settings.split))[["text", "label"]]
    far = nearest_texts(own["text"].tolist(), bank["text"].tolist())[0] < NEAR_DUPLICATE - SIMILARITY_SLACK
    print(f"{name}: {far.sum()} of {len(own)} rows of the corpus, the others are near-twins", flush=True)
    frame = own[far].assign(split_ref="finance/all")
    part, cost = learn(spec, settings.models[spec.model], frame, {"validation": bank}, 0, name, cache)[-1]
    folder = part / "model"
    if not folder.exists():
        model = build_student(spec, fetch_model(spec.model, settings.models[spec.model]), task(), 0)
        safetensors.torch.load_model(model.model, str(part / "weights.safetensors"))
        save_model(model.model, model.tokenizer, folder)
    board.add(f"{name}, no PhraseBank row", "control", 0, bank, answers_of(part)["validation"], cost)
    return ModelConfig(folder=str(folder))


def teach(name: str, settings: Settings, rows: pd.DataFrame, seed: int, cache: Path) -> tuple[np.ndarray, dict]:
    """What teacher `name` says of every row [len(rows), labels], and its cost.

    The teacher is the mean of `folds` models, each tuned on the training rows but one fold. A training row is answered
    by the one model that has not seen it, every other row by their mean.
    """
    spec = settings.teachers[name]
    train = rows[rows["split_ref"] == "50agree/train"]
    fold = pd.Series(-1, index=rows.index)
    fold[train.index] = assign_folds(train, spec.folds, seed)
    said, costs = np.zeros((len(rows), len(task().names))), []
    for k in range(spec.folds):
        asked = {"held out": rows[fold == k]}
        asked |= {w.removeprefix("50agree/"): part for w, part in rows.groupby("split_ref") if w != "50agree/train"}
        title = f"seed {seed}, {name} without fold {k}"
        folder, cost = learn(spec, settings.models[spec.model], rows[fold != k], asked, seed, title, cache)[-1]
        answers = answers_of(folder)
        for part, table in asked.items():
            said[table.index] += answers[part] / (1 if part == "held out" else spec.folds)
        costs.append(cost)
    assert np.allclose(said.sum(1), 1, atol=1e-4), "a row that nobody was asked about"
    return said, total(costs) | {"parameters": costs[0]["parameters"] * spec.folds}


# ------------------------------------------------------------------------------------------------------------ scores


class Board:
    """Every model's answers on the test rows of every seed, and the table made of them."""

    def __init__(self) -> None:
        self.runs: dict[tuple[str, str, str], dict[int, dict[str, Any]]] = {}

    def add(self, model: str, role: str, seed: int, rows: pd.DataFrame, p: np.ndarray, cost: dict[str, Any]) -> None:
        """rows: label, group, allagree of the rows asked about; p: [len(rows), labels]."""
        said = np.array(task().names, dtype=object)[p.argmax(-1)]
        for subset, mine in (("50agree", np.ones(len(rows), bool)), ("allagree", rows["allagree"].to_numpy(bool))):
            run = {"gold": rows["label"].to_numpy()[mine], "said": said[mine], "groups": rows["group"].to_numpy()[mine]}
            self.runs.setdefault((subset, model, role), {})[seed] = run | cost

    def samples(self, key: tuple[str, str, str], seeds: Sequence[int]) -> dict[str, tuple[float, np.ndarray]]:
        """Mean over `seeds`, and it under resamples of groups within every seed and of seeds [RESAMPLES], per score.

        One seed draws the same groups for every model, so the difference of two models' resamples is paired.
        """
        runs, names = [self.runs[key][seed] for seed in seeds], task().names
        drawn = [
            metrics.bootstrap_scores(run["gold"], run["said"], names, run["groups"], RESAMPLES, seed)
            for seed, run in zip(seeds, runs, strict=True)
        ]
        weights = np.random.default_rng(0).multinomial(len(runs), np.full(len(runs), 1 / len(runs)), RESAMPLES)
        out = {}
        for score in ("accuracy", "macro_f1"):
            mean = np.mean([metrics.mean_scores(run["gold"], run["said"], names)[score] for run in runs])
            out[score] = float(mean), (np.stack([d[score] for d in drawn], 1) * weights).sum(1) / len(runs)
        return out

    def table(self) -> pd.DataFrame:
        """One row a subset and model, `COLUMNS`; published figures after ours."""
        rows = []
        for (subset, model, role), found in self.runs.items():
            runs = list(found.values())
            row = {"subset": subset, "model": model, "role": role, "seeds": len(runs)}
            row["params_m"] = round(runs[0]["parameters"] / 1e6, 1) if runs[0]["parameters"] else None
            for score, (mean, drawn) in self.samples((subset, model, role), list(found)).items():
                low, high = metrics.interval(drawn)
                row |= {f"{score}_mean": mean, f"{score}_low": low, f"{score}_high": high}
            row["minutes"] = round(float(np.mean([run["minutes"] for run in runs])), 2)
            row["commit"] = " ".join(dict.fromkeys(run["commit"] for run in runs))
            rows.append(row)
        for subset, model, size, seeds, accuracy, macro_f1 in PUBLISHED:
            row = {"subset": subset, "model": model, "role": "published", "params_m": size, "seeds": seeds}
            row |= dict(zip(("accuracy_mean", "accuracy_low", "accuracy_high"), accuracy, strict=False))
            rows.append(row | {"macro_f1_mean": macro_f1})
        table = pd.DataFrame(rows, columns=list(COLUMNS))
        return table.sort_values("subset", key=lambda s: s.map(SUBSETS.index), kind="stable", ignore_index=True)

    def differences(self, students: dict[str, StudentConfig]) -> list[str]:
        """Each student that has a control against it and all who have none, on the same test rows of the same seeds."""
        lines, controls = [], [who for who, spec in students.items() if spec.control is None]
        pairs = [
            (name, who)
            for name, spec in students.items()
            if spec.control is not None
            for who in dict.fromkeys([spec.control, *controls])
        ]
        for (name, control), subset in itertools.product(pairs, SUBSETS):
            keys = [key for who in (name, control) for key in self.runs if key[:2] == (subset, who)]
            if len(keys) < 2:
                continue
            both = [seed for seed in self.runs[keys[0]] if seed in self.runs[keys[1]]]
            ours, theirs = (self.samples(key, both) for key in keys)
            for score in ("accuracy", "macro_f1"):
                low, high = metrics.interval(ours[score][1] - theirs[score][1])
                cells = (subset, name, control, str(len(both)), score, f"{ours[score][0] - theirs[score][0]:+.4f}")
                lines.append(f"| {' | '.join(cells)} | {low:+.4f} to {high:+.4f} |")
        return lines


def replace(text: str, name: str, block: str) -> str:
    """`text` with what stands between `<!-- name -->` and `<!-- end -->` replaced by `block`."""
    return re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{block}\n{m[2]}", text, flags=re.S)


def write(board: Board, settings: Settings, folder: Path) -> None:
    """`phrasebank.csv`, and the tables between the marks of `phrasebank.md`."""
    table = board.table()
    with atomic_write(folder / "phrasebank.csv") as new:
        table.to_csv(new, index=False, float_format="%.6g")

    def cell(row: Any, score: str) -> str:
        mean, low, high = (getattr(row, f"{score}_{what}") for what in ("mean", "low", "high"))
        return "" if pd.isna(mean) else f"{mean:.4f}" + ("" if pd.isna(low) else f" ({low:.4f}–{high:.4f})")

    lines = [
        "| subset | model | role | M parameters | seeds | accuracy | macro-F1 | minutes |",
        "|---|---|---|" + "--:|" * 5,
    ]
    for row in table.itertuples():
        size, minutes = ("" if pd.isna(v) else f"{v:.1f}" for v in (row.params_m, row.minutes))
        scores = f"{cell(row, 'accuracy')} | {cell(row, 'macro_f1')}"
        lines.append(f"| {row.subset} | {row.model} | {row.role} | {size} | {row.seeds} | {scores} | {minutes} |")
    gains = [
        "| subset | student | control | seeds | score | difference | 95 % interval |",
        "|---|---|---|--:|---|--:|--:|",
    ]
    path = folder / "phrasebank.md"
    text = path.read_text(encoding="utf-8") if path.exists() else EMPTY
    text = replace(text, "table", "\n".join(lines))
    text = replace(text, "gains", "\n".join([*gains, *board.differences(settings.students)]))
    with atomic_write(path) as new:
        new.write_text(text, encoding="utf-8")


# --------------------------------------------------------------------------------------------------------------- main


def run(board: Board, settings: Settings, student: str, rows: pd.DataFrame, seed: int, cache: Path) -> None:
    """Train one student of one seed, and its teachers, and put their answers on the board."""
    names, spec = task().names, settings.students[student]
    asked = {part: rows[rows["split_ref"] == f"50agree/{part}"] for part in ("validation", "test")}
    test = asked["test"]
    commonest = names.index(rows["label"][rows["split_ref"] == "50agree/train"].mode()[0])
    free = {"minutes": 0.0, "parameters": None, "commit": commit(HERE.parent)}
    board.add("commonest label", "control", seed, test, np.eye(len(names))[[commonest] * len(test)], free)
    frame = rows
    for name in dict.fromkeys(who for phase in spec.phases for who in phase.teachers):
        said, cost = teach(name, settings, rows, seed, cache)
        board.add(name, "teacher", seed, test, said[test.index], cost)
        for part in ("train", "validation"):
            mine = rows[rows["split_ref"] == f"50agree/{part}"]
            report(f"seed {seed}, {name}, {part}", mine, said[mine.index])
        frame = frame.assign(**{f"probabilities_{name}": list(said)})
    unanimous = frame[(frame["split_ref"] == "50agree/train") & frame["allagree"]]
    frame = pd.concat([frame, unanimous.assign(split_ref="allagree/train")], ignore_index=True)
    bare = spec.model not in settings.starts
    legs = learn(spec, settings.models[spec.model], frame, asked, seed, f"seed {seed}, {student}", cache, bare)
    role = "student" if any(phase.teachers for phase in spec.phases) else "control"
    if bare:
        board.add(f"{spec.model}, untrained", "control", seed, test, answers_of(legs[0][0])["test"], legs[0][1])
    board.add(student, role, seed, test, answers_of(legs[-1][0])["test"], legs[-1][1])
    report(f"seed {seed}, {student}, validation", asked["validation"], answers_of(legs[-1][0])["validation"])


def report(title: str, rows: pd.DataFrame, p: np.ndarray) -> None:
    """A line of scores; for rows that settings are chosen on, test rows are for the table alone."""
    names = np.array(task().names, dtype=object)
    scores = []
    for subset in SUBSETS:
        mine = np.ones(len(rows), bool) if subset == "50agree" else rows["allagree"].to_numpy(dtype=bool)
        found = metrics.mean_scores(rows["label"].to_numpy()[mine], names[p.argmax(-1)][mine], list(names))
        scores.append(f"{subset} {found['accuracy']:.4f} / {found['macro_f1']:.4f}")
    print(f"{title}: {', '.join(scores)}", flush=True)


def own(board: Board, folder: Path, bank: pd.DataFrame, cache: Path) -> None:
    """Score a finished student (`runs/<student>-<seed>`) or teacher (`data/teacher/<teacher>`) of the experiment in
    `params.yaml`, which never saw a PhraseBank row, on all of them. Near-twins count as one in the intervals."""
    timing = json.loads((folder / "timing.json").read_text())
    teaches = folder.parent.name == "teacher"
    name = folder.name if teaches else folder.name.rpartition("-")[0]
    sections = load_params().teachers if teaches else load_params().students
    if name not in sections:
        raise UserError(f"--own {folder}: params.yaml knows no `{name}`; known: {', '.join(sections)}")
    spec, texts = sections[name], bank["text"].tolist()
    key = run_key(inspect.getsource(own), file_digest(folder / "model"), spec.model_dump(), texts)
    part = cache / f"own-{key}"
    if not finished(part):
        architecture = json.loads((folder / "model" / "config.json").read_text())["architectures"][0]
        arch = "causal" if architecture.endswith("ForCausalLM") else "classifier"
        model = load_model(folder / "model", arch, labels=task().names)
        extras = {"prompt": spec.prompt, "few_shot": spec.few_shot, "dtype": spec.dtype}
        asked = LabelModel(model, load_tokenizer(folder / "model"), task(), arch, **extras)
        finish(part, {"all": asked.predict(texts)}, count_parameters(model)[0])
    seconds = timing.get("train_seconds", timing.get("seconds"))
    title = f"{name}, this project's corpus only"
    cost = finished(part) | {"minutes": seconds / 60}
    seed = 0 if teaches else int(folder.name.rpartition("-")[2])
    board.add(title, "teacher" if teaches else "student", seed, bank, answers_of(part)["all"], cost)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the PhraseBank files")
    parser.add_argument("--headlines", type=Path, help="folder of .csv files with unlabelled headlines")
    parser.add_argument("--seeds", type=int, default=5, help="how many; they are 0, 1, …")
    parser.add_argument("--own", type=Path, nargs="*", default=[], help="runs/<student>-<seed>, data/teacher/<teacher>")
    parser.add_argument("--settings", type=Path, default=HERE / "phrasebank.yaml")
    parser.add_argument("--cache", type=Path, default=HERE.parent / ".cache" / "phrasebank")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of phrasebank.csv and phrasebank.md")
    given = parser.parse_args(arguments)
    settings = validate_section(Settings, read_yaml(given.settings), given.settings.name)
    given.cache.mkdir(parents=True, exist_ok=True)
    bank = phrasebank(given.data)
    pool = read_headlines(given.headlines) if given.headlines else []
    board = Board()
    clustered = bank.assign(group=cluster_near_duplicates(bank["text"].tolist(), NEAR_DUPLICATE))
    begun = {name: start(board, name, settings, clustered, given.cache) for name in settings.starts}
    settings = settings.model_copy(update={"models": settings.models | begun})
    for student, seed in itertools.product(settings.students, range(given.seeds)):
        run(board, settings, student, draw(bank, pool, settings, seed, given.cache), seed, given.cache)
        write(board, settings, given.out)
    for folder in given.own:
        own(board, folder, clustered, given.cache)
        write(board, settings, given.out)


if __name__ == "__main__":
    try:
        main()
    except UserError as mistake:
        sys.exit(f"error: {mistake}")
