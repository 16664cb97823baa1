"""What came out: every model's scores side by side, with what it takes to believe them.

:func:`gather` reads what the runs left and looks for leaks and short cuts, :func:`measure` runs the models themselves
(speed, memory, rewritten sentences), :func:`leaderboard` scores and compares. Nothing here is imported by code that
trains, and nothing here writes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from distillery import data, metrics, params, robustness, tasks, teachers, training
from distillery.models import LabelModel

KINDS = (
    "only the teacher is right",
    "only the student is right",
    "both wrong",
    "both right",
    "wrong",
    "right",
)
ROLES = ("student", "control", "teacher", "untrained", "majority")
TRAINED = ("student", "control", "teacher")
UNREADABLE = "no readable answer"
EXAMPLES = 4  # rewritten rows shown of each change
LATENCY_ROWS = 32  # sentences given to each model one by one
ONE_ANSWER = 0.95  # a share of one answer above this is no reading of the text
LEANS = 0.2  # distance of the answers' shares from the true ones


# ---------------------------------------------------------------- gathering


@dataclass(frozen=True)
class Scored:
    """One line of the leaderboard: a model's predictions of the test rows of `source`, over its seeds."""

    name: str
    key: str  # its name in params (of the student it starts from, for an untrained one)
    role: str  # one of ROLES
    source: str
    predicted: np.ndarray  # [seeds, rows] labels
    probabilities: np.ndarray | None = None  # [seeds, rows, K]
    tokens: dict[str, float] | None = None  # mean scores of free answers' words
    written: np.ndarray | None = None  # [rows] free answers of the first seed
    validation: np.ndarray | None = None  # [seeds, validation rows, K]
    parameters: int | None = None
    trainable: int | None = None
    bytes: int | None = None
    seconds: float | None = None  # wall clock of its training, mean over seeds
    training_mb: float | None = None  # peak memory of its training, largest of the seeds
    teacher: str | None = None  # key of the teacher it is compared with
    control: str | None = None  # key of the student it is compared with


@dataclass(frozen=True)
class Check:
    """One thing that would make the numbers worthless, and whether it was found."""

    kind: str  # leak, contamination or shortcut
    passed: bool
    text: str
    about: tuple[str, ...] = ()  # names of the lines it speaks of; of all when empty


@dataclass(frozen=True)
class Results:
    """Everything that the report speaks of."""

    params: params.Params
    labels: dict[str, list[str]]  # of each source, in the order of probability vectors
    tests: dict[str, pd.DataFrame]  # of each source
    validations: dict[str, pd.DataFrame]  # of each source
    scored: list[Scored]
    signals: dict[tuple[str, str], pd.DataFrame]  # (teacher, source) -> its test signals, in the order of the rows
    history: pd.DataFrame  # model, seed, phase, step, loss
    audits: dict[str, Any]
    counts: dict[str, Any] | None  # of the augmentation
    checks: list[Check]

    @property
    def headline(self) -> Scored:
        return next(s for s in self.scored if s.key == self.params.evaluate.headline and s.role in TRAINED[:2])

    def find(self, key: str | None) -> Scored | None:
        """The student (or control) called `key`; None when there is no such line."""
        return next((s for s in self.scored if s.key == key and s.role in TRAINED[:2]), None)

    def teacher_of(self, line: Scored) -> Scored | None:
        """The line of the teacher that `line` is compared with."""
        same = (s for s in self.scored if s.role == "teacher" and (s.key, s.source) == (line.teacher, line.source))
        return next(same, None)

    @property
    def shown(self) -> list[Scored]:
        """The headline, its control and its teacher, as far as they exist and were tested on the same rows."""
        head = self.headline
        lines = [head, self.find(head.control), self.teacher_of(head)]
        return [line for line in lines if line is not None and line.source == head.source]


def teacher_of(P: params.Params, student: str) -> str | None:
    """The first teacher of `student`; a control is compared with the teacher of the student it is the control of."""
    named = [t for phase in P.students[student].phases for t in phase.teachers]
    if not named:
        counterparts = [s for s, spec in P.students.items() if spec.control == student]
        named = [t for s in counterparts for phase in P.students[s].phases for t in phase.teachers]
    return named[0] if named else None


def _read(path: Path, root: Path) -> Any:
    """A parquet, csv or JSON file. Raises UserError when it is missing."""
    try:
        if path.suffix == ".parquet":
            return pd.read_parquet(path)
        return pd.read_csv(path) if path.suffix == ".csv" else json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise params.UserError(f"{path.relative_to(root)}: no such file; `dvc repro` makes it") from None


def _aligned(rows: pd.DataFrame, split: str, wanted: pd.DataFrame, path: Path, root: Path) -> pd.DataFrame:
    """`rows` of `split` in the order of `wanted`. Raises UserError when they are not about exactly those rows."""
    rows = rows[rows["split"] == split]
    if rows["id"].duplicated().any() or set(rows["id"]) != set(wanted["id"]):
        name = path.relative_to(root)
        raise params.UserError(f"{name}: not the {split} rows of now; `dvc repro` brings it up to date")
    return rows.set_index("id").loc[wanted["id"]].reset_index()


def _probabilities(tables: Sequence[pd.DataFrame]) -> np.ndarray:
    return np.stack([np.stack(t["probabilities"].to_numpy()) for t in tables]).astype(np.float64)


def _stack(tables: Sequence[pd.DataFrame]) -> dict[str, np.ndarray]:
    predicted = np.stack([t["prediction"].to_numpy(dtype=object) for t in tables])
    tokens = {k: float(np.mean([t[k].mean() for t in tables])) for k in TOKENS if k in tables[0]}  # of free answers
    written = tables[0]["answer"].to_numpy(dtype=object) if "answer" in tables[0] else None
    return {"predicted": predicted, "probabilities": _probabilities(tables), "tokens": tokens, "written": written}


def _timing(folders: Sequence[Path], key: str) -> dict[str, float | None]:
    """Training time (mean) and peak memory (largest) as the runs in `folders` noted them; None where they did not."""
    found = [json.loads(path.read_text()) for f in folders if (path := f / "timing.json").exists()]
    seconds, memory = ([t[k] for t in found if k in t] for k in (key, "peak_memory_mb"))
    return {"seconds": float(np.mean(seconds)) if seconds else None, "training_mb": max(memory, default=None)}


def gather(root: Path, P: params.Params) -> Results:
    """Read the predictions of everything that params names, and nothing else (a removed student is gone).

    Raises UserError when a run's files are missing or belong to other rows.
    """
    students = {name: P.tested_on(name) for name in P.students}
    sources = [s for s in P.data if s in students.values()]
    asked = {s: data.read_task(root / f"data/processed/{s}") for s in sources}
    labels = {s: task.names for s, task in asked.items()}
    # Free answers are right or wrong: there is no answer to be given always, and none to lean on.
    closed = [s for s in sources if asked[s].kind != "qa"]
    tests = {s: data.read(root / f"data/processed/{s}", "test") for s in sources}
    validations = {s: data.read(root / f"data/processed/{s}", "validation") for s in sources}
    controls = {spec.control for spec in P.students.values()}
    scored, history, signals, begun = [], [], {}, {}

    for name, source in students.items():
        spec, folders = P.students[name], [root / f"runs/{name}-{seed}" for seed in P.seeds]
        facts = [_read(folder / "metrics.json", root) for folder in folders]
        common = {"source": source, "teacher": teacher_of(P, name), "parameters": facts[0].get("parameters")}
        paths = [folder / "predictions.parquet" for folder in folders]
        said = [_read(path, root) for path in paths]
        test, validation = (
            [_aligned(rows, split, wanted, path, root) for rows, path in zip(said, paths, strict=True)]
            for split, wanted in (("test", tests[source]), ("validation", validations[source]))
        )
        role = "control" if name in controls and not any(phase.teachers for phase in spec.phases) else "student"
        size = {"bytes": facts[0].get("bytes_on_disk"), "trainable": facts[0].get("trainable_parameters")}
        more = size | _timing(folders, "train_seconds") | {"validation": _probabilities(validation)}
        scored.append(Scored(name, name, role, **common, control=spec.control, **more, **_stack(test)))
        for seed, folder in zip(P.seeds, folders, strict=True):
            history.append(_history(folder / "history.csv", root).assign(model=name, seed=seed))

        # Students that start from the same model in the same way share their untrained scores: one line is enough.
        start = (spec.model, spec.arch, str(spec.init), spec.prompt, spec.few_shot, spec.dtype, source)
        if start not in begun:
            before = [_read(folder / "phases.parquet", root) for folder in folders]
            before = [rows[rows["phase"] == 0] for rows in before]
            if all((rows["split"] == "test").any() for rows in before):
                path = folders[0] / "phases.parquet"
                before = [_aligned(rows, "test", tests[source], path, root) for rows in before]
                begun[start] = Scored(f"{name}, untrained", name, "untrained", **common, **_stack(before))

    for teacher in P.teachers:
        for source in [s for s in sources if s in P.sources_of(teacher)]:
            folder = root / f"data/teacher/{teacher}"
            rows = _read(folder / "signals.parquet", root).rename(columns={"label": "prediction"})
            rows, path = rows[rows["source"] == source], folder / "signals.parquet"
            wanted = {*tests[source]["id"], *validations[source]["id"]}
            if P.teachers[teacher].kind == "answers" and not wanted <= set(rows["id"]):
                continue  # a file that answers some of the rows cannot be compared with models that answer all
            test = signals[teacher, source] = _aligned(rows, "test", tests[source], path, root)
            validation = _aligned(rows, "validation", validations[source], path, root)
            facts = _read(folder / "metrics.json", root)
            name = teacher if teacher not in P.students else f"{teacher}, teacher"
            name = name if len(sources) == 1 else f"{name} on {source}"
            size = {"parameters": facts.get("parameters"), "bytes": facts.get("bytes_on_disk")}
            more = size | _timing([folder], "seconds") | {"validation": _probabilities([validation])}
            scored.append(Scored(name, teacher, "teacher", source, **_stack([test]), **more))

    for source in closed:
        train = data.read(root / f"data/processed/{source}", "train")
        commonest = (train if len(train) else tests[source])["label"].mode()[0]  # the first of equals: deterministic
        name = f"always {commonest}" if len(sources) == 1 else f"always {commonest} on {source}"
        constant = np.full((1, len(tests[source])), commonest, dtype=object)
        scored.append(Scored(name, source, "majority", source, constant))

    counts = root / f"data/augmented/{P.augment.source}/counts.json"
    checks = [check for source in sources for check in leaks(root, P, source, tests[source])]
    checks += [check for line in scored if line.role == "teacher" for check in contamination(root, P, line, tests)]
    checks += [short_cut(line, tests[line.source]["label"]) for line in scored
               if line.role in TRAINED and line.source in closed]  # fmt: skip
    return Results(
        params=P,
        labels=labels,
        tests=tests,
        validations=validations,
        scored=scored + list(begun.values()),
        signals=signals,
        history=pd.concat(history, ignore_index=True)[["model", "seed", "phase", "step", "loss"]],
        audits={s: _read(root / f"data/processed/{s}/audit.json", root) for s in sources},
        counts=_read(counts, root) if P.augment.per_row and counts.exists() else None,
        checks=checks,
    )


def _history(path: Path, root: Path) -> pd.DataFrame:
    """Phase, step, loss of one run, the steps counted through its phases."""
    try:
        rows = _read(path, root)[["phase", "step", "loss"]]
    except pd.errors.EmptyDataError:
        return pd.DataFrame({"phase": [], "step": [], "loss": []})
    parts, done = [], 0
    for _, part in rows.groupby("phase", sort=True):
        part = part.assign(step=part["step"] + (done if len(part) and part["step"].min() <= done else 0))
        done = part["step"].max()
        parts.append(part)
    return pd.concat(parts) if parts else rows


# ---------------------------------------------------------------- checks


def _learned_from(root: Path, P: params.Params, source: str) -> dict[str, pd.DataFrame]:
    """Every set of rows that a model tested on `source` may have learned from, or been chosen on: `source/split`."""
    out = {}
    for other in [name for name in P.data if P.data[name].task == P.data[source].task]:
        for split in ("train", "pool", "validation"):
            out[f"{other}/{split}"] = data.read(root / f"data/processed/{other}", split)
        rows = root / f"data/augmented/{other}/rows.parquet"
        if other == P.augment.source and P.augment.per_row and rows.exists():
            out[f"{other}/augmented"] = pd.read_parquet(rows)
    return out


def _learners(P: params.Params, where: str) -> list[str]:
    """The teachers and students that learn from the rows of `where`."""
    tuned = [name for name, teacher in P.teachers.items() if teacher.finetune and teacher.finetune.on == where]
    trained = [name for name, student in P.students.items() if any(where in p.data for p in student.phases)]
    return list(dict.fromkeys([*tuned, *trained]))


def leaks(root: Path, P: params.Params, source: str, test: pd.DataFrame) -> list[Check]:
    """Test rows of `source` that stand, exactly or nearly, in rows that somebody learned from.

    The files are compared as they lie there now, not as they were when the source was prepared. Exactly: the same
    text, id or group. Nearly: at least `near_duplicate` alike, with digits masked or as written.
    """
    out, looked = [], _learned_from(root, P, source)
    for where, rows in looked.items():
        if rows.empty:
            continue
        same = test["text"].isin(rows["text"])
        if where.split("/")[0] == source:  # ids and groups are names inside one source
            same |= test["id"].isin(rows["id"]) | test["group"].isin(rows["group"])
        texts = test["text"].tolist(), rows["text"].tolist()
        closest = np.maximum(*(data.nearest(*texts, masked)[0] for masked in (True, False)))
        near = (closest >= P.data[where.split("/")[0]].near_duplicate - data.SLACK) & ~same.to_numpy()
        if same.any() or near.any():
            who = _learners(P, where)
            told = [f"{int(same.sum())} the same"] * bool(same.any()) + [f"{int(near.sum())} nearly"] * bool(near.any())
            text = f"{int(same.sum() + near.sum())} of the {len(test):,} test rows of {source} are also in {where} "
            text += f"({', '.join(told)}), which {', '.join(who) if who else 'choices were made on'}"
            text += f"{' learned from' if who else ''}: every score that hangs on it is too good to be true."
            out.append(Check("leak", False, text, tuple(who)))
    if not out:
        text = f"Not one of the {len(test):,} test rows of {source} is in {', '.join(looked)}, nor is a row that is "
        out.append(Check("leak", True, text + "nearly the same with numbers masked or as written."))
    return out


def contamination(root: Path, P: params.Params, line: Scored, tests: dict[str, pd.DataFrame]) -> list[Check]:
    """Whether the teacher of `line` is scored, or teaches, on rows that it has learned the answers of.

    Found by its rows, by the folds that its signals name, by `evaluate.pretrained_on`, and, whatever the files say, by
    its scores: a teacher that does on test rows what it does on rows it was tuned on has seen them.
    """
    spec, test, out = P.teachers[line.key], tests[line.source], []
    known = {who: sources for who, sources in P.evaluate.pretrained_on.items() if who in (spec.model, line.key)}
    if any(line.source in sources for sources in known.values()):
        text = f"{next(iter(known))} had learned from {line.source} before it came here (evaluate.pretrained_on): "
        out.append(Check("contamination", False, f"{text}the scores of {line.name} are no test of it.", (line.name,)))
    if spec.finetune is None:
        if not out:
            text = f"{line.name} was tuned on nothing here; what it learned from before is not known here "
            text += "unless evaluate.pretrained_on says it."
            out.append(Check("contamination", True, text, (line.name,)))
        return out
    on, split = spec.finetune.on.split("/")
    gold = data.read(root / f"data/processed/{on}", split)
    seen = test["text"].isin(gold["text"]) | (test["id"].isin(gold["id"]) if on == line.source else False)
    if seen.any():
        text = f"{line.name} was tuned on {int(seen.sum())} of the {len(test):,} test rows that it is scored on."
        out.append(Check("contamination", False, text, (line.name,)))
    signals = _read(root / f"data/teacher/{line.key}/signals.parquet", root)
    taught = signals[(signals["source"] == on) & (signals["split"] == split)]
    inside = int((taught["fold"] < 0).sum())
    if inside:
        text = f"What {line.name} says of {inside} of the {len(taught)} rows of {spec.finetune.on} comes from a model "
        text += "that was tuned on those very rows: students learn its memory, not its judgement."
        out.append(Check("contamination", False, text, (line.name,)))
    facts = _read(root / f"data/teacher/{line.key}/metrics.json", root)
    held_out = (
        ("train", "of them where a fold left them out") if spec.finetune.folds else ("validation", "of validation")
    )
    scores = [(facts.get(part) or {}).get("accuracy") for part in ("memorised", held_out[0], "test")]
    if None in scores:
        return out
    memorised, unseen, scored = scores
    figures = f"right on {_percent(memorised)} of the rows it was tuned on, on {_percent(unseen)} {held_out[1]}, "
    figures += f"on {_percent(scored)} of the test rows"
    if memorised - unseen >= 0.1 and memorised - scored < (memorised - unseen) / 4:
        text = f"{line.name} is {figures}: it does as well there as on what it has memorised, so it has seen them."
        out.append(Check("contamination", False, text, (line.name,)))
    elif not out:
        out.append(Check("contamination", True, f"{line.name} is {figures}.", (line.name,)))
    return out


def short_cut(line: Scored, gold: pd.Series) -> Check:
    """Whether `line` has learned to give the commonest answer, or leans on one, rather than to read."""
    true, worst, bias = gold.value_counts(normalize=True), None, -1.0
    for run in line.predicted:
        excess = (pd.Series(run).value_counts() / len(run)).sub(true, fill_value=0)  # unreadable answers are none
        if excess.abs().sum() / 2 > bias:
            worst, bias = excess, float(excess.abs().sum() / 2)

    def share(label: str) -> str:
        said = worst[label] + true.get(label, 0.0)
        return f'"{label}" for {_percent(said)} of the test rows ({_percent(true.get(label, 0.0))} are)'

    over, under = worst.idxmax(), worst.idxmin()
    said = worst[over] + true.get(over, 0.0)
    text = f"{line.name} answers {share(over)}"
    if said > ONE_ANSWER and true.get(over, 0.0) < ONE_ANSWER - 0.05:
        return Check("shortcut", False, f"{text}: it has learned the commonest answer, not to read.", (line.name,))
    text += f" and {share(under)}" if under != over else ""
    if bias > LEANS:
        return Check("shortcut", False, f"{text}: it leans.", (line.name,))
    return Check("shortcut", True, f"{text}.", (line.name,))


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


# ---------------------------------------------------------------- running the models


@dataclass(frozen=True)
class Measured:
    """What only the models themselves can tell.

    timing: name in the leaderboard -> sentences_per_second, latency_p50_ms, latency_p95_ms, memory_mb: another run will
    say otherwise. robustness: model, change, rows, kept, kept_low, kept_high, right_before, right_after (shares);
    examples: change, before, after: the same for the same runs.
    """

    timing: dict[str, dict[str, float]] = field(default_factory=dict)
    robustness: pd.DataFrame = field(default_factory=pd.DataFrame)
    examples: pd.DataFrame = field(default_factory=pd.DataFrame)


def throughput(
    scorers: dict[str, Callable[[list[str]], Any]], texts: list[str], rounds: int = 5, budget: float = 8.0
) -> dict[str, float]:
    """Sentences a second of each scorer on the same texts, side by side: name -> median over its rounds.

    Each is warmed up on a few texts first. Then they take turns, so that whatever else the machine does meets all of
    them; one that has spent its share of `budget` seconds, or had all its rounds, sits out. One round is had by all.
    """
    for score in scorers.values():
        score(texts[:4])
    seconds: dict[str, list[float]] = {name: [] for name in scorers}
    for _ in range(rounds):
        for name, score in scorers.items():
            if sum(seconds[name]) < budget / len(scorers):
                start = time.perf_counter()
                score(texts)
                seconds[name].append(time.perf_counter() - start)
    return {name: len(texts) / float(np.median(taken)) for name, taken in seconds.items()}


def latency(scorers: dict[str, Callable[[list[str]], Any]], texts: list[str]) -> dict[str, tuple[float, float]]:
    """Milliseconds for one sentence alone, each scorer in turn on each text: name -> 50th and 95th percentile."""
    taken: dict[str, list[float]] = {name: [] for name in scorers}
    for text in texts:
        for name, score in scorers.items():
            start = time.perf_counter()
            score([text])
            taken[name].append(1000 * (time.perf_counter() - start))
    return {name: tuple(float(q) for q in np.quantile(ms, [0.5, 0.95])) for name, ms in taken.items()}


def peak_memory(work: Callable[[], Any]) -> tuple[Any, float | None]:
    """What `work` returns, and the MB of memory that this process held at its peak beyond what it held before.

    None where the system does not tell: it takes Linux.
    """

    def held(what: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(what))

    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the highest mark so far
        before = held("VmRSS")
    except (OSError, StopIteration):
        return work(), None
    return work(), max(0.0, held("VmHWM") - before)


def speaker(model: LabelModel) -> Callable[[Sequence[str]], np.ndarray]:
    """Texts to probabilities [n, labels], computed anew each time: of a teacher that is only prompted with the prompt,
    solved examples and calibration that it has in the run."""
    if not hasattr(model, "prior"):
        return model.predict
    model.memory = None
    return lambda texts: teachers.ask(model, pd.DataFrame({"id": "", "text": list(texts), "group": None}))


def measure(root: Path, results: Results) -> Measured:
    """Open every trained model that is tested where the headline is, and run it on test rows of that source.

    Students of one shape (a student and its control) are equally fast: the first of them is measured for all. What
    rewritten sentences do is asked of the headline, its control and its teacher.
    """
    P, source = results.params, results.headline.source
    task = data.read_task(root / f"data/processed/{source}")
    lines = [line for line in results.scored if line.source == source and line.role in TRAINED]
    # what others have answered is read from a file or a store: there is nothing to run
    far = {name for name, spec in P.teachers.items() if spec.model is None}
    lines = [line for line in lines if line.role != "teacher" or line.key not in far]
    texts = results.tests[source]["text"].head(P.evaluate.throughput_rows).tolist()
    models, memory, shapes = {}, {}, {}

    def opened(line: Scored) -> LabelModel:
        if line.role == "teacher":
            if not P.teachers[line.key].finetune:
                return teachers.open_asked(root, line.key, P, task)
            return teachers.open_teacher(line.key, P, task, tuned=root / f"data/teacher/{line.key}/model")
        spec = P.students[line.key]
        return training.reopen(spec, root / f"runs/{line.key}-{P.seeds[0]}/model", task, spec.dtype)

    def opened_and_run(line: Scored) -> LabelModel:
        model = opened(line)
        speaker(model)(texts[:32])
        return model

    first = opened_and_run(lines[0])  # kept: what libraries take when first used is no model's memory
    for line in lines:
        spec = P.students.get(line.key)
        shapes[line.name] = line.name
        if line.role != "teacher":
            alike = [spec.model, spec.arch, spec.init, spec.prompt, spec.few_shot, spec.dtype, spec.max_length]
            shapes[line.name] = str(alike)
        if shapes[line.name] not in models:
            models[shapes[line.name]], memory[shapes[line.name]] = peak_memory(lambda line=line: opened_and_run(line))
    del first
    scorers = {shape: speaker(model) for shape, model in models.items()}
    rate, alone = throughput(scorers, texts), latency(scorers, texts[:LATENCY_ROWS])
    timing = {}
    for name, shape in shapes.items():
        timing[name] = {"sentences_per_second": rate[shape]}
        timing[name] |= {"latency_p50_ms": alone[shape][0], "latency_p95_ms": alone[shape][1]}
        timing[name] |= {} if memory[shape] is None else {"memory_mb": memory[shape]}

    scorers = {}
    for line in (line for line in results.shown if line.name in shapes):
        told = [name for name in shapes if shapes[name] == shapes[line.name]]
        scorers[line.name] = models[shapes[line.name]] if line.name == told[0] else opened(line)
    said = {name: speaker(model) for name, model in scorers.items()}
    return Measured(timing, *rewritten(results, said, paraphrased(root, results)))


def paraphrased(root: Path, results: Results) -> pd.DataFrame:
    """`evaluate.paraphrased_rows` test rows of the headline's source, and what `augment.teacher` made of them in `new`.

    The filters of augmentation drop what has other numbers, names in capitals or directions. Whether the label still
    holds is asked of no model: one that is scored here would be judged by itself.
    """
    P, source = results.params, results.headline.source
    test = results.tests[source]
    chosen = test.sample(min(P.evaluate.paraphrased_rows, len(test)), random_state=P.evaluate.seed)
    if chosen.empty:
        return chosen.assign(new=pd.Series(dtype=object))
    made = teachers.write_paraphrases(root, P, data.read_task(root / f"data/processed/{source}"), chosen)
    made = made.drop_duplicates("source_id").set_index("source_id")["text"]
    chosen = chosen.assign(new=chosen["id"].map(made))
    reasons = [
        teachers.why_dropped(a, b, keep=P.augment.keep) for a, b in zip(chosen["text"], chosen["new"], strict=True)
    ]
    return chosen[np.array(reasons) == "kept"].reset_index(drop=True)


def rewritten(
    results: Results, scorers: dict[str, Callable[[list[str]], np.ndarray]], paraphrases: pd.DataFrame | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """How the models in `scorers` answer test rows of the headline's source that are rewritten with the label kept.

    Of every rule of :func:`robustness.changes` at most `evaluate.rewritten_rows` rows that it changes, and
    `paraphrases` (test rows with `new`, see :func:`paraphrased`).
    Returns the table and the examples of :class:`Measured`.
    """
    e, source = results.params.evaluate, results.headline.source
    test, labels = results.tests[source], np.array(results.labels[source], dtype=object)
    order = np.random.default_rng(e.seed).permutation(len(test))
    shuffled = test.iloc[order].reset_index(drop=True)
    every = [text for s in ("test", "validation") for text in getattr(results, f"{s}s")[source]["text"]]
    table, examples, asked = [], [], {}
    for change, rule in robustness.changes(every).items():
        new = shuffled["text"].map(rule)
        asked[change] = shuffled.assign(new=new)[new != shuffled["text"]].head(e.rewritten_rows)
    asked["other words"] = shuffled.head(0) if paraphrases is None else paraphrases
    free = list(labels) == list(tasks.VERDICTS)  # another question has another answer, not another label
    asked = {change: rows for change, rows in asked.items() if len(rows) and not free}
    for change, rows in asked.items():
        pairs = rows.head(EXAMPLES)[["text", "new"]].itertuples(index=False)
        examples += [{"change": change, "before": before, "after": after} for before, after in pairs]
    texts = list(dict.fromkeys(text for rows in asked.values() for text in (*rows["text"], *rows["new"])))
    for name, predict in scorers.items():
        said = dict(zip(texts, labels[predict(texts).argmax(-1)], strict=True)) if texts else {}
        for change, rows in asked.items():
            before, after = rows["text"].map(said), rows["new"].map(said)
            kept = (before == after).to_numpy(float)
            low, high = metrics.interval(
                metrics.cluster_bootstrap(kept, rows["group"], e.bootstrap, e.seed), e.confidence
            )
            table.append({"model": name, "change": change, "rows": len(rows), "kept": kept.mean(), "kept_low": low,
                          "kept_high": high, "right_before": float((before == rows["label"]).mean()),
                          "right_after": float((after == rows["label"]).mean())})  # fmt: skip
    columns = ["model", "change", "rows", "kept", "kept_low", "kept_high", "right_before", "right_after"]
    return pd.DataFrame(table, columns=columns), pd.DataFrame(examples, columns=["change", "before", "after"])


# ---------------------------------------------------------------- scoring


def compared(results: Results, a: Scored, b: Scored | None) -> dict[str, float] | None:
    """Accuracy of a minus that of b on the same rows: mean, low, high, p, detectable; None when there is no such b.

    p is the larger of the bootstrap's, which draws groups and runs, and the permutation test's, which swaps groups.
    """
    if b is None or a.source != b.source:
        return None
    test, e = results.tests[a.source], results.params.evaluate
    gold, groups = test["label"].to_numpy(dtype=object), test["group"]
    found = metrics.paired_difference(
        gold, a.predicted, b.predicted, results.labels[a.source], groups, e.bootstrap, e.confidence, e.seed
    )["accuracy"]
    swapped = metrics.permutation_test(a.predicted == gold, b.predicted == gold, groups, e.bootstrap, e.seed)
    return found | {"p": max(found["p"], swapped)}


def calibrated(results: Results, line: Scored) -> dict[str, float]:
    """How far `line` may be trusted to know its errors, as it is and with a temperature fitted on validation rows."""
    gold = metrics.encode(results.tests[line.source]["label"], results.labels[line.source])
    chosen_on = metrics.encode(results.validations[line.source]["label"], results.labels[line.source])
    rows = []
    for run, held_out in zip(line.probabilities, line.validation, strict=True):
        temperature = metrics.fit_temperature(chosen_on, held_out)
        scaled = metrics.tempered(run, temperature)
        row = {"temperature": temperature, "ece_scaled": metrics.calibration(gold, scaled)["ece"]}
        rows.append(row | {"log_loss_scaled": metrics.log_loss(gold, scaled)})
    return pd.DataFrame(rows).mean().to_dict()


TOKENS = ("token_f1", "token_precision", "token_recall")
AVERAGED = ("balanced_accuracy", "macro_specificity", "weighted_f1", "mcc", "answer_bias", "commonest_answer")
WITH_PROBABILITIES = ("log_loss", "brier", "ece", "risk_coverage_area")
PER_LABEL = ("precision", "recall", "specificity")
TIMED = ("sentences_per_second", "latency_p50_ms", "latency_p95_ms", "memory_mb")


def leaderboard(results: Results, timing: dict[str, dict[str, float]] | None = None) -> pd.DataFrame:
    """One row a model, best accuracy first. Scores are means over seeds, in [0, 1], with percentile intervals.

    timing: as in :class:`Measured` (wall clock).
    verdict, teacher_verdict: `better` or `worse` than its control, or its teacher, when p, corrected for the number of
    all these comparisons (Holm), is under 1 - confidence; `no evidence` otherwise.
    """
    e, rows = results.params.evaluate, []
    close = closeness(results).set_index(["model", "teacher"])
    for line in results.scored:
        test, labels = results.tests[line.source], results.labels[line.source]
        gold, groups = test["label"].to_numpy(dtype=object), test["group"]
        drawn = metrics.bootstrap_scores(gold, line.predicted, labels, groups, e.bootstrap, e.seed)
        row: dict[str, Any] = {"model": line.name, "role": line.role, "source": line.source}
        row["seeds"] = len(line.predicted)
        row |= {"parameters": line.parameters, "trainable": line.trainable}
        row["megabytes"] = None if line.bytes is None else line.bytes / 1e6
        for score, mean in metrics.mean_scores(gold, line.predicted, labels).items():
            low, high = metrics.interval(drawn[score], e.confidence)
            row |= {score: mean, f"{score}_low": low, f"{score}_high": high}
        probabilities = [None] * len(line.predicted) if line.probabilities is None else line.probabilities
        reports = [
            metrics.classification_report(gold, said, p, labels)
            for said, p in zip(line.predicted, probabilities, strict=True)
        ]
        row |= line.tokens or {}
        row |= {k: float(np.mean([r[k] for r in reports])) for k in (*AVERAGED, *WITH_PROBABILITIES) if k in reports[0]}
        row |= {
            f"{score}_{label}": float(np.mean([report["labels"][label][score] for report in reports]))
            for label in labels
            for score in PER_LABEL
        }
        pairs, number = robustness.pairs_right(line.predicted == gold, gold, groups)
        row |= {"pairs_right": float(pairs.mean()), "pairs": number}
        if line.validation is not None:
            row |= calibrated(results, line)
        if (line.name, line.teacher) in close.index:
            alike = close.loc[(line.name, line.teacher)]
            row |= {"kl_to_teacher": alike["kl"], "agreement_with_teacher": alike["agreement"]}
        row |= (timing or {}).get(line.name, {}) | {"train_seconds": line.seconds, "training_mb": line.training_mb}
        if line.role in ("student", "control"):
            taught_by = results.teacher_of(line) if line.role == "student" else None
            for other, start in ((results.find(line.control), ""), (taught_by, "teacher_")):
                difference = compared(results, line, other)
                if difference:
                    row[f"{start}versus"] = other.name
                    row |= {f"{start}difference{end}": difference[key]
                            for end, key in (("", "mean"), ("_low", "low"), ("_high", "high"))}  # fmt: skip
                    row |= {f"{start}p": difference["p"], f"{start}detectable": difference["detectable"]}
        rows.append(row)

    columns = ["model", "role", "source", "seeds", "parameters", "trainable", "megabytes"]
    columns += [f"{score}{end}" for score in metrics.SCORES for end in ("", "_low", "_high")]
    columns += [k for k in TOKENS if any(k in row for row in rows)]
    columns += [*AVERAGED, *WITH_PROBABILITIES, "temperature", "ece_scaled", "log_loss_scaled", "pairs_right", "pairs"]
    columns += [f"{score}_{label}" for score in PER_LABEL for label in _all_labels(results)]
    columns += ["kl_to_teacher", "agreement_with_teacher", *TIMED, "train_seconds", "training_mb"]
    for start in ("", "teacher_"):
        columns += [f"{start}{c}" for c in ("versus", "difference", "difference_low", "difference_high", "p")]
        columns += [f"{start}detectable", f"{start}verdict"]
    board = pd.DataFrame(rows).reindex(columns=columns)
    board[["parameters", "trainable"]] = board[["parameters", "trainable"]].astype("Int64")
    _judge(board, e.confidence)
    order = [ROLES.index(role) for role in board["role"]]
    board = board.assign(_order=order).sort_values(["accuracy", "_order", "model"], ascending=[False, True, True])
    return board.drop(columns="_order").reset_index(drop=True)


def published(P: params.Params, board: pd.DataFrame) -> pd.DataFrame:
    """The source's figures beside this run's: model, score, published, this run, low, high (its interval), note.

    board: as :func:`leaderboard` makes it. What it has no score for is empty.
    """
    rows, source = [], P.tested_on(P.evaluate.headline)
    found = board.set_index("model")
    # where several sources are tested, a teacher has a line for each
    found = found.rename(index={f"{teacher} on {source}": teacher for teacher in P.teachers})
    for claim in P.recipe.published if P.recipe else []:
        for score, value in claim.scores.items():
            row = {"model": claim.model, "score": score, "published": value, "note": claim.note}
            for column, name in {"this run": score, "low": f"{score}_low", "high": f"{score}_high"}.items():
                known = claim.model in found.index and name in found
                row[column] = found.loc[claim.model, name] if known else None
            rows.append(row)
    return pd.DataFrame(rows, columns=["model", "score", "published", "this run", "low", "high", "note"])


def _judge(board: pd.DataFrame, confidence: float) -> None:
    """Correct all p of `board` for their number, in place, and put every comparison into a word."""
    p = board[["p", "teacher_p"]].astype(float).to_numpy().copy()
    p[~np.isnan(p)] = metrics.holm(p[~np.isnan(p)])
    for i, start in enumerate(("", "teacher_")):
        board[f"{start}p"] = p[:, i]
        board[f"{start}verdict"] = [
            None if np.isnan(x) else "no evidence" if x >= 1 - confidence else "better" if d > 0 else "worse"
            for x, d in zip(p[:, i], board[f"{start}difference"].astype(float), strict=True)
        ]


def comparisons(board: pd.DataFrame) -> int:
    """How many comparisons the p of `board` are corrected for."""
    return int(board["p"].notna().sum() + board["teacher_p"].notna().sum())


def _all_labels(results: Results) -> list[str]:
    return list(dict.fromkeys(label for labels in results.labels.values() for label in labels))


def legs(root: Path, results: Results) -> pd.DataFrame:
    """What each phase gave: model, after phase (0: as it was built), accuracy on the validation rows (mean over seeds;
    test rows are asked about at both ends only) and gain over the phase before."""
    P, parts = results.params, []
    for name in P.students:
        gold = results.validations[P.tested_on(name)].set_index("id")["label"]
        runs = [_read(root / f"runs/{name}-{seed}/phases.parquet", root) for seed in P.seeds]
        rows = pd.concat(runs, ignore_index=True)
        rows = rows[rows["split"] == "validation"]
        mean = rows["prediction"].eq(rows["id"].map(gold)).groupby(rows["phase"]).mean()
        found = {"model": name, "after phase": mean.index, "accuracy": mean.to_numpy(), "gain": mean.diff().to_numpy()}
        parts.append(pd.DataFrame(found))
    return pd.concat(parts, ignore_index=True)


def closeness(results: Results) -> pd.DataFrame:
    """How far every student answers as each teacher does, a row a pair: model, teacher, agreement, kl.

    agreement: share of test rows with the same answer; kl: mean KL(teacher || student) in nats; means over seeds.
    """
    rows = []
    for line in (line for line in results.scored if line.role in ("student", "control", "untrained")):
        for (teacher, source), signal in results.signals.items():
            if source == line.source:
                taught = np.stack(signal["probabilities"].to_numpy())
                same = line.predicted == signal["prediction"].to_numpy(object)
                kl = np.mean([metrics.kl(taught, p).mean() for p in line.probabilities])
                rows.append({"model": line.name, "teacher": teacher, "agreement": float(same.mean()), "kl": float(kl)})
    return pd.DataFrame(rows, columns=["model", "teacher", "agreement", "kl"])


HEADLINE = ("accuracy", "macro_f1", "mcc", "ece", "pairs_right", "difference", "teacher_difference", "kl_to_teacher",
            "agreement_with_teacher")  # fmt: skip


def summary(results: Results, board: pd.DataFrame) -> dict[str, Any]:
    """What `dvc metrics` shows: the headline with its intervals, then two scores a model. No wall clock in here."""
    head = board.set_index("model").loc[results.headline.name]
    keys = [c for k in HEADLINE for c in (k, f"{k}_low", f"{k}_high") if c in board]
    out: dict[str, Any] = {"headline": {k: round(float(head[k]), 6) for k in keys if pd.notna(head[k])}}
    trained = board[board["role"].isin(TRAINED)]
    for score in metrics.SCORES:
        out[score] = {m: round(float(v), 6) for m, v in zip(trained["model"], trained[score], strict=True)}
    return out


# ---------------------------------------------------------------- rows


def disagreements(results: Results) -> pd.DataFrame:
    """The headline's test rows: where it and its teacher differ, then what it got wrong, the most certain first.

    Columns id, text, gold, student, student_probability, rationale (of the corpus), kind (one of KINDS), differs; with
    a teacher also teacher, teacher_probability, teacher_rationale. Of several seeds the first one's predictions.
    Of free answers also accepted (what is right), student_written and teacher_written.
    """
    head = results.headline
    test = results.tests[head.source]
    rows = pd.DataFrame({"id": test["id"], "text": test["text"], "gold": test["label"], "student": head.predicted[0]})
    rows["student_probability"] = head.probabilities[0].max(1)
    rows["rationale"] = test["rationale"]
    if head.written is not None:
        rows["accepted"] = [" or ".join(tasks.accepted(known)) for known in test["answers"]]
        rows["student_written"] = head.written
    signal = results.signals.get((head.teacher, head.source))
    right = rows["student"] == rows["gold"]
    if signal is not None:
        rows["teacher"] = signal["prediction"].where(signal["prediction"].notna(), UNREADABLE)
        rows["teacher_probability"] = np.stack(signal["probabilities"].to_numpy()).max(1)
        rows["teacher_rationale"] = signal["rationale"]
        if head.written is not None:
            rows["teacher_written"] = signal["answer"]
        taught = rows["teacher"] == rows["gold"]
        cases = [right & taught, right, taught]
        rows["kind"] = np.select(
            cases, ["both right", "only the student is right", "only the teacher is right"], "both wrong"
        )
        rows["differs"] = rows["student"] != rows["teacher"]
    else:
        rows["kind"] = np.where(right, "right", "wrong")
        rows["differs"] = False
    rank = np.where(rows["differs"], 0, np.where(right, 2, 1))
    rows = rows.assign(_rank=rank).sort_values(["_rank", "student_probability", "id"], ascending=[True, False, True])
    return rows.drop(columns="_rank").reset_index(drop=True)


def samples(results: Results) -> pd.DataFrame:
    """Some test rows of the headline's source, drawn at random: text, gold, and each trained model's label."""
    e, source = results.params.evaluate, results.headline.source
    test = results.tests[source]
    some = np.sort(np.random.default_rng(e.seed).permutation(len(test))[: e.samples])
    rows = test.iloc[some][["text", "label"]].rename(columns={"label": "gold"})
    for line in results.scored:
        if line.source == source and line.role in TRAINED:
            rows[line.name] = line.predicted[0][some]
    return rows.reset_index(drop=True)
