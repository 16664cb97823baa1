"""The whole study: every student of every seed, with its teachers, and the models that saw no PhraseBank row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.keep import commit
from distillery import metrics
from studies.phrasebank.data import ROOT, SUBSETS, is_far, read_corpus, sentiment_task, study_rows
from studies.phrasebank.results import EvaluatedModel
from studies.phrasebank.settings import StudySettings
from studies.phrasebank.training import (
    Cost,
    CrossFit,
    cross_fit,
    openable_teacher,
    predict_with_run,
    stack_probabilities,
    train,
)

CACHE = ROOT / ".cache" / "phrasebank"


def with_predictions(rows: pd.DataFrame, p: np.ndarray) -> pd.DataFrame:
    """`rows` (label, group, allagree) with the labels that the probabilities p [len(rows), labels] predict."""
    prediction = np.array(sentiment_task().names, dtype=object)[p.argmax(-1)]
    return rows[["label", "group", "allagree"]].assign(prediction=prediction)


def subset_scores(rows: pd.DataFrame, p: np.ndarray) -> list[dict[str, float]]:
    """Scores of the probabilities p for `rows`, and for those of them that are in all-agree."""
    predicted = with_predictions(rows, p)
    parts = (predicted, predicted[predicted["allagree"]])
    return [metrics.mean_scores(part["label"], part["prediction"], sentiment_task().names) for part in parts]


def print_scores(title: str, rows: pd.DataFrame, p: np.ndarray) -> None:
    """Print accuracy and macro-F1 of the probabilities p for `rows`, by which settings are chosen: no test rows."""
    pairs = zip(SUBSETS, subset_scores(rows, p), strict=True)
    parts = [f"{subset} {scores['accuracy']:.4f} / {scores['macro_f1']:.4f}" for subset, scores in pairs]
    print(f"{title}: {', '.join(parts)}", flush=True)


def fit_teachers(name: str, settings: StudySettings, rows: pd.DataFrame, seed: int, cache: Path) -> dict[str, CrossFit]:
    """The teachers of student `name`, each with its labels for all `rows`."""
    phases = settings.students[name].phases
    teachers = dict.fromkeys(teacher for phase in phases for teacher in phase.teachers)
    return {teacher: cross_fit(teacher, settings, rows, seed, cache) for teacher in teachers}


def train_student(
    name: str, settings: StudySettings, rows: pd.DataFrame, teachers: dict[str, CrossFit], seed: int, cache: Path
) -> tuple[pd.DataFrame, Cost]:
    """Train student `name` on `rows` with the labels of its `teachers`; see :func:`training.train`."""
    spec, opened = settings.students[name], {}
    labelled = rows.assign(**{f"probabilities_{teacher}": list(fit.probabilities) for teacher, fit in teachers.items()})
    if any(phase.needs_hidden_states for phase in spec.phases):
        labelled = labelled.assign(**{f"fold_{teacher}": fit.fold for teacher, fit in teachers.items()})
        opened = {teacher: openable_teacher(teacher, settings, fit, seed, cache) for teacher, fit in teachers.items()}
    splits = split_rows(labelled)
    unanimous = splits["train"][splits["train"]["allagree"]].assign(split_ref="allagree/train")
    frame = pd.concat([labelled, unanimous], ignore_index=True)
    held_out = {split: splits[split] for split in ("validation", "test")}
    title, model = f"seed {seed}, {name}", settings.models[spec.model]
    predictions, cost, _ = train(spec, model, frame, held_out, seed=seed, cache=cache, title=title, teachers=opened)
    return predictions, cost


def split_rows(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The gold rows among `rows` by split."""
    return {split: rows[rows["split_ref"] == f"50agree/{split}"] for split in ("train", "validation", "test")}


def evaluate_student(
    name: str, settings: StudySettings, rows: pd.DataFrame, seed: int, cache: Path
) -> Iterator[EvaluatedModel]:
    """Train student `name` of a seed, and its teachers. rows: see :func:`study_rows`."""
    spec, splits = settings.students[name], split_rows(rows)
    test, teachers = splits["test"], fit_teachers(name, settings, rows, seed, cache)
    for teacher, fit in teachers.items():
        p = fit.probabilities
        for split in ("train", "validation"):
            print_scores(f"seed {seed}, {teacher}, {split}", splits[split], p[splits[split].index])
        yield EvaluatedModel(teacher, "teacher", seed, with_predictions(test, p[test.index]), fit.cost)
    predictions, cost = train_student(name, settings, rows, teachers, seed, cache)
    title = f"seed {seed}, {name}, validation"
    print_scores(title, splits["validation"], stack_probabilities(predictions, "validation"))
    role = "student" if any(phase.teachers for phase in spec.phases) else "control"
    before, after = (with_predictions(test, stack_probabilities(predictions, split)) for split in ("untrained", "test"))
    no_training = Cost(cost.parameters, 0.0, cost.commit)
    yield EvaluatedModel(f"{spec.model}, untrained", "untrained", seed, before, no_training)
    yield EvaluatedModel(name, role, seed, after, cost)


def evaluate_majority(rows: pd.DataFrame, seed: int) -> EvaluatedModel:
    """The most frequent label of the training rows as the prediction of every test row."""
    labels, test = sentiment_task().names, rows[rows["split_ref"] == "50agree/test"]
    majority = rows["label"][rows["split_ref"] == "50agree/train"].mode()[0]
    p = np.eye(len(labels))[[labels.index(majority)] * len(test)]
    return EvaluatedModel("majority label", "majority", seed, with_predictions(test, p), Cost(None, 0.0, commit(ROOT)))


def evaluate_transfer(settings: StudySettings, phrasebank: pd.DataFrame, cache: Path) -> Iterator[EvaluatedModel]:
    """Models that saw no PhraseBank row, on all rows of :func:`read_phrasebank`."""
    test = phrasebank.assign(id=[f"row-{i}" for i in range(len(phrasebank))])
    corpus = read_corpus()
    far = is_far(corpus["text"].tolist(), phrasebank["text"].tolist())
    for name, spec in settings.transfer.items():
        print(f"{name}: {far.sum()} of {len(far)} rows of the corpus, the others are near-duplicates", flush=True)
        rows, splits = corpus[far].assign(split_ref="finance/train"), {"validation": test.head(1), "test": test}
        model = settings.models[spec.model]
        predictions, cost, _ = train(spec, model, rows, splits, seed=0, cache=cache, title=name)
        predicted = with_predictions(test, stack_probabilities(predictions, "test"))
        yield EvaluatedModel(name, "transfer", 0, predicted, cost)
    for run in settings.transfer_runs:
        name, _, seed = run.rpartition("-")
        predictions, cost = predict_with_run(run, test)
        predicted = with_predictions(test, stack_probabilities(predictions, "test"))
        yield EvaluatedModel(name, "transfer", int(seed), predicted, cost)


def run_study(
    settings: StudySettings, phrasebank: pd.DataFrame, headlines: Sequence[str], seeds: int, cache: Path = CACHE
) -> list[EvaluatedModel]:
    """Train and evaluate every model with the seeds 0 to `seeds` - 1. A finished model is read from `cache`."""
    evaluated = list(evaluate_transfer(settings, phrasebank, cache))
    for seed in range(seeds):
        rows = study_rows(phrasebank, headlines, settings, seed)
        evaluated.append(evaluate_majority(rows, seed))
        for name in settings.students:
            evaluated += evaluate_student(name, settings, rows, seed, cache)
    # several students may have one teacher, or start from one model
    return list({(model.name, model.seed): model for model in evaluated}.values())
