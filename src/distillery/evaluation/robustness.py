"""Robustness: how often models predict the same when a row is rewritten with its label kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from distillery import metrics
from distillery.config.schema import EvaluateConfig
from distillery.evaluation.perturbations import perturbations
from distillery.evaluation.results import Results
from distillery.teachers.paraphrases import generate_paraphrases, rejection_reason

EXAMPLES_PER_PERTURBATION = 4  # rewritten rows shown of each

PARAPHRASED = "other words"  # the perturbation that a teacher writes

TABLE_COLUMNS = (
    "perturbation",
    "model",
    "rows",
    "consistency",
    "consistency_low",
    "consistency_high",
    "accuracy_before",
    "accuracy_after",
)


def paraphrase_test_rows(root: Path, results: Results) -> pd.DataFrame:
    """`evaluate.paraphrased_rows` test rows of the headline's source, and in `new` a paraphrase by `augment.teacher`.

    The filters of augmentation drop paraphrases with other numbers, names in capitals or directions. No model checks
    whether the label still holds: each model at hand is scored here, and would check its own rows. Of free answers
    there are none.
    """
    params, source = results.params, results.headline.source
    test = results.tests[source]
    rows = test.sample(min(params.evaluate.paraphrased_rows, len(test)), random_state=params.evaluate.seed)
    task = results.tasks[source]
    if rows.empty or task.kind == "qa":  # another question has another answer
        return rows.head(0).assign(new=pd.Series(dtype=object))
    one_each = params.augment.model_copy(update={"per_row": 1})
    paraphrases = generate_paraphrases(root, params.model_copy(update={"augment": one_each}), task, rows)
    rows = rows.assign(new=paraphrases["text"].to_numpy())
    reasons = [
        rejection_reason(a, b, keep=params.augment.keep, perturbations=task.perturbations)
        for a, b in zip(rows["text"], rows["new"], strict=True)
    ]
    return rows[np.array(reasons) == "kept"].reset_index(drop=True)


def rewrite_test_rows(results: Results, paraphrases: pd.DataFrame | None = None) -> dict[str, pd.DataFrame]:
    """The test rows of the headline's source that each perturbation changes, with their text after it in `new`.

    Of every rule of :func:`perturbations` at most `evaluate.rewritten_rows` rows, drawn at random, and `paraphrases`
    (see :func:`paraphrase_test_rows`). None of free answers: another question has another answer.
    """
    config, source = results.params.evaluate, results.headline.source
    if results.tasks[source].kind == "qa":
        return {}
    test = results.tests[source]
    shuffled = test.iloc[np.random.default_rng(config.seed).permutation(len(test))].reset_index(drop=True)
    texts = [text for rows in (test, results.validations[source]) for text in rows["text"]]
    rewritten = {}
    for name, rule in perturbations(texts, results.tasks[source].perturbations).items():
        new = shuffled["text"].map(rule)
        rewritten[name] = shuffled.assign(new=new)[new != shuffled["text"]].head(config.rewritten_rows)
    if paraphrases is not None:
        rewritten[PARAPHRASED] = paraphrases
    return {name: rows for name, rows in rewritten.items() if len(rows)}


def measure_robustness(
    results: Results,
    predictors: dict[str, Callable[[pd.DataFrame], np.ndarray]],
    paraphrases: pd.DataFrame | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """How consistent the models in `predictors` (rows to probabilities [n, K]) are on those of `rewrite_test_rows`.

    Returns the tables `robustness` and `examples` of :class:`Measurements`.
    """
    models = {result.name: result for result in results.compared}
    rewritten = rewrite_test_rows(results, paraphrases)
    variants = [rows.assign(text=rows[column]) for rows in rewritten.values() for column in ("text", "new")]
    unique = pd.concat(variants).drop_duplicates("text", ignore_index=True) if variants else pd.DataFrame()
    table = []
    for model, predict in predictors.items():
        decided = results.decide(models[model], predict(unique)) if variants else []
        prediction = dict(zip(unique["text"] if variants else [], decided, strict=True))
        for name, rows in rewritten.items():
            scores = _consistency(rows, prediction, results.params.evaluate)
            table.append({"perturbation": name, "model": model, "rows": len(rows)} | scores)
    examples = [
        {"perturbation": name, "before": before, "after": after}
        for name, rows in rewritten.items()
        for before, after in rows.head(EXAMPLES_PER_PERTURBATION)[["text", "new"]].itertuples(index=False)
    ]
    return pd.DataFrame(table, columns=list(TABLE_COLUMNS)), pd.DataFrame(
        examples, columns=["perturbation", "before", "after"]
    )


def _consistency(rows: pd.DataFrame, prediction: dict[str, str], config: EvaluateConfig) -> dict[str, float]:
    """Share of rows with the same prediction before and after, its interval, and the accuracy before and after."""
    before, after = rows["text"].map(prediction), rows["new"].map(prediction)
    same = (before == after).to_numpy(float)
    drawn = metrics.cluster_bootstrap(same, rows["group"], config.bootstrap, config.seed)
    low, high = metrics.interval(drawn, config.confidence)
    return {
        "consistency": same.mean(),
        "consistency_low": low,
        "consistency_high": high,
        "accuracy_before": float((before == rows["label"]).mean()),
        "accuracy_after": float((after == rows["label"]).mean()),
    }
