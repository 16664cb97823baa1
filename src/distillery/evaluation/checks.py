"""Leaks, contaminated teachers and shortcuts: what would make the numbers worthless."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from distillery.config.schema import Params, SplitRef, TeacherConfig
from distillery.data.near_duplicates import has_near_duplicate
from distillery.data.storage import read_split
from distillery.evaluation.reading import read_result_file
from distillery.evaluation.results import TRAINED_ROLES, Check, ModelResult
from distillery.files import Paths
from distillery.label_sets import LabelSets, single_labels

MAX_LABEL_SHARE = 0.95  # a model that predicts one label for a larger share of the rows does not read the text

MAX_LABEL_BIAS = 0.2  # total variation distance of the predicted labels' shares from the true ones

MIN_MEMORY_GAP = 0.1  # accuracy on rows a teacher was fine-tuned on minus that on others: from here on it memorises

MAX_NAMED_LABELS = 5  # labels that one message lists


def run_checks(
    root: Path, params: Params, models: list[ModelResult], tests: dict[str, pd.DataFrame], labels: dict[str, list[str]]
) -> list[Check]:
    """Every check of `models` and of the rows in `tests`; shortcuts only on sources with a fixed set of `labels`."""
    checks = [check for source, test in tests.items() for check in find_leaks(root, params, source, test)]
    checks += [c for m in models if m.role == "teacher" for c in find_contamination(root, params, m, tests)]
    for result in models:
        if result.role in TRAINED_ROLES and result.source in labels:
            checks += find_shortcuts(result, tests[result.source]["label"], labels[result.source])
    return checks


def find_leaks(root: Path, params: Params, source: str, test: pd.DataFrame) -> list[Check]:
    """Test rows of `source` that are also, exactly or nearly, among rows that a model learned from or was chosen on.

    Compares the files as they are now, not as they were when the source was prepared. Exactly: the same text, id or
    group. Nearly: a similarity of at least `near_duplicate`, with digits masked or as written.
    """
    checks, learned = [], _training_rows(root, params, source)
    for split_ref, rows in learned.items():
        other = SplitRef.parse(split_ref).source
        same = test["text"].isin(rows["text"])
        if other == source:  # ids and groups are names inside one source
            same |= test["id"].isin(rows["id"]) | test["group"].isin(rows["group"])
        close = has_near_duplicate(test["text"].tolist(), rows["text"].tolist(), params.data[other].near_duplicate)
        exact, near = int(same.sum()), int((close & ~same.to_numpy()).sum())
        if exact or near:
            models = _learners(params, split_ref)
            counts = ", ".join([f"{exact} the same"] * bool(exact) + [f"{near} nearly"] * bool(near))
            counts += f"; the first is {test['id'][(same | close).to_numpy()].iloc[0]}"
            use = f"{', '.join(models)} learned from" if models else "choices were made on"
            text = f"{exact + near} of the {len(test):,} test rows of {source} are also in {split_ref} ({counts}), "
            text += f"which {use}: every score that depends on these rows is too high."
            checks.append(Check("leak", False, text, tuple(models)))
    if not checks:
        text = (
            f"None of the {len(test):,} test rows of {source} is in {', '.join(learned)}, and no row there is nearly "
        )
        checks.append(Check("leak", True, f"{text}the same, with numbers masked or as written."))
    return checks


def _training_rows(root: Path, params: Params, source: str) -> dict[str, pd.DataFrame]:
    """Every set of rows that a model tested on `source` may have learned from, or been chosen on: `source/split`."""
    rows = {}
    for other in [name for name in params.data if params.data[name].task == params.data[source].task]:
        for split in ("train", "pool", "validation"):
            rows[f"{other}/{split}"] = read_split(Paths(root).processed(other), split)
        augmented = Paths(root).augmented(other) / "rows.parquet"
        if other == params.augment.source and params.augment.per_row and augmented.exists():
            rows[f"{other}/augmented"] = pd.read_parquet(augmented)
    return {split_ref: part for split_ref, part in rows.items() if len(part)}


def _learners(params: Params, split_ref: str) -> list[str]:
    """The teachers and students that learn from the rows of `split_ref`."""
    tuned = [name for name, teacher in params.teachers.items() if teacher.finetune and teacher.finetune.on == split_ref]
    trained = [name for name, spec in params.students.items() if any(split_ref in phase.data for phase in spec.phases)]
    return list(dict.fromkeys([*tuned, *trained]))


def find_contamination(root: Path, params: Params, teacher: ModelResult, tests: dict[str, pd.DataFrame]) -> list[Check]:
    """Whether `teacher` is scored, or teaches, on rows whose labels it has learned.

    Four signs: its training rows, the folds that its signals name, `evaluate.pretrained_on`, and, whatever the files
    record, its scores: a teacher as accurate on test rows as on rows it was fine-tuned on has seen them.
    """
    spec = params.teachers[teacher.key]
    texts = _pretrained_on_source(params, teacher, spec)
    passed_text = None
    if spec.finetune is None:
        passed_text = f"{teacher.name} was fine-tuned on nothing here. What it learned from before is not known here, "
        passed_text += "unless evaluate.pretrained_on names it."
    else:
        texts += _scored_on_training_rows(root, teacher, spec, tests[teacher.source])
        texts += _signals_from_memory(root, teacher, spec)
        figures, memorised = _memory_scores(root, teacher, spec)
        if memorised:
            texts.append(
                f"{teacher.name} is {figures}: as accurate there as on what it memorised, so it has seen them."
            )
        passed_text = figures and f"{teacher.name} is {figures}."
    if not texts and passed_text:
        return [Check("contamination", True, passed_text, (teacher.name,))]
    return [Check("contamination", False, text, (teacher.name,)) for text in texts]


def _pretrained_on_source(params: Params, teacher: ModelResult, spec: TeacherConfig) -> list[str]:
    for name, sources in params.evaluate.pretrained_on.items():
        if name in (spec.model, teacher.key) and teacher.source in sources:
            text = f"{name} had learned from {teacher.source} before this experiment (evaluate.pretrained_on): "
            return [f"{text}the scores of {teacher.name} are no test of it."]
    return []


def _scored_on_training_rows(root: Path, teacher: ModelResult, spec: TeacherConfig, test: pd.DataFrame) -> list[str]:
    tuned_on = SplitRef.parse(spec.finetune.on)
    rows = read_split(Paths(root).processed(tuned_on.source), tuned_on.split)
    same_source = tuned_on.source == teacher.source  # ids are names inside one source
    learned = test["text"].isin(rows["text"]) | (test["id"].isin(rows["id"]) if same_source else False)
    if not learned.any():
        return []
    count = f"{int(learned.sum())} of the {len(test):,} test rows"
    return [f"{teacher.name} was fine-tuned on {count} that it is scored on."]


def _signals_from_memory(root: Path, teacher: ModelResult, spec: TeacherConfig) -> list[str]:
    tuned_on = SplitRef.parse(spec.finetune.on)
    signals = read_result_file(Paths(root).teacher(teacher.key) / "signals.parquet", root)
    signals = signals[(signals["source"] == tuned_on.source) & (signals["split"] == tuned_on.split)]
    memorised = int((signals["fold"] < 0).sum())
    if not memorised:
        return []
    text = f"The signals of {teacher.name} for {memorised} of the {len(signals)} rows of {spec.finetune.on} come from "
    return [f"{text}a model that was fine-tuned on those very rows: students learn what it memorised."]


def _memory_scores(root: Path, teacher: ModelResult, spec: TeacherConfig) -> tuple[str | None, bool]:
    """The teacher's accuracies in words (None where one is missing), and whether they show that it saw the test."""
    metadata = read_result_file(Paths(root).teacher(teacher.key) / "metrics.json", root)
    split, rows = ("validation", "of the validation rows")
    if spec.finetune.folds:
        split, rows = ("train", "of them where a fold left them out")
    scores = [(metadata.get(part) or {}).get("accuracy") for part in ("memorised", split, "test")]
    if None in scores:
        return None, False
    memorised, unseen, scored = scores
    text = f"right on {_percent(memorised)} of the rows it was fine-tuned on, on {_percent(unseen)} {rows}, "
    text += f"on {_percent(scored)} of the test rows"
    gap = memorised - unseen
    return text, gap >= MIN_MEMORY_GAP and memorised - scored < gap / 4


def find_shortcuts(result: ModelResult, label: pd.Series, names: Sequence[str] = ()) -> list[Check]:
    """Whether `result` predicts one label for all rows, some label too often, or one of the labels never.

    label [n]: the true labels. Checks the run with the most biased predictions; a label counts as never predicted
    when one run does not predict it for any row. names: the labels of the task, where these are label sets.
    """
    if isinstance(names, LabelSets):
        return find_set_shortcuts(result, label, names)
    true, worst, bias = label.value_counts(normalize=True), None, -1.0
    for run in result.predictions:
        excess = (pd.Series(run).value_counts() / len(run)).sub(true, fill_value=0)  # unreadable answers are none
        if excess.abs().sum() / 2 > bias:
            worst, bias = excess, float(excess.abs().sum() / 2)
    most, fewest = worst.idxmax(), worst.idxmin()

    def shares(name: str) -> str:
        share = worst[name] + true.get(name, 0.0)
        return f'"{name}" for {_percent(share)} of the test rows ({_percent(true.get(name, 0.0))} are)'

    text = f"{result.name} predicts {shares(most)}"
    if worst[most] + true.get(most, 0.0) > MAX_LABEL_SHARE and true.get(most, 0.0) < MAX_LABEL_SHARE - 0.05:
        reason = "it has learned the most frequent label, not to read the text"
        return [Check("shortcut", False, f"{text}: {reason}.", (result.name,))]
    text += f" and {shares(fewest)}" if fewest != most else ""
    biased = f"{text}: its predictions are biased."
    texts = [biased] * (bias > MAX_LABEL_BIAS) + _never_predicted(result, label)
    if not texts:
        return [Check("shortcut", True, f"{text}.", (result.name,))]
    return [Check("shortcut", False, text, (result.name,)) for text in texts]


def find_set_shortcuts(result: ModelResult, label: pd.Series, names: LabelSets) -> list[Check]:
    """Whether `result` predicts one label set for nearly all rows, or one of the labels never.

    label [n]: the true label sets. As :func:`find_shortcuts`, for the run with the most frequent set.
    """
    shares = [pd.Series(run).value_counts() / len(run) for run in result.predictions]  # unreadable answers are none
    most = max(shares, key=lambda run: run.max() if len(run) else 0.0)
    if most.empty:
        text = f"{result.name} gives no answer to the test rows that can be read."
        return [Check("shortcut", False, text, (result.name,))]
    name, share, true = most.index[0], float(most.iloc[0]), float((label == most.index[0]).mean())
    text = f'{result.name} predicts "{name}" for {_percent(share)} of the test rows ({_percent(true)} are)'
    if share > MAX_LABEL_SHARE and true < MAX_LABEL_SHARE - 0.05:
        return [Check("shortcut", False, f"{text}: it has not learned to read the text.", (result.name,))]
    texts = _never_predicted(result, label, names)
    if not texts:
        return [Check("shortcut", True, f"{text}, and each label for some of them.", (result.name,))]
    return [Check("shortcut", False, text, (result.name,)) for text in texts]


def _never_predicted(result: ModelResult, label: pd.Series, names: Sequence[str] = ()) -> list[str]:
    """One message that names the labels of test rows that a run of `result` never predicts; [] when there are none."""
    counts = pd.Series(single_labels(label, names), dtype=object).value_counts()
    sets = [set(single_labels(run, names)) for run in result.predictions]
    runs = {name: sum(name not in run for run in sets) for name in counts.index}
    missing = [name for name, number in runs.items() if number]
    if not missing:
        return []
    total = len(result.predictions)
    named = ", ".join(
        f'"{name}" ({counts[name]:,} of the {len(label):,} test rows'
        + (f"; in {runs[name]} of {total} training runs)" if total > 1 else ")")
        for name in missing[:MAX_NAMED_LABELS]
    )
    others = len(missing) - MAX_NAMED_LABELS
    return [f"{result.name} never predicts {named}{f' and {others} other labels' if others > 0 else ''}."]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
