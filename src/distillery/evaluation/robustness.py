"""Do models answer the same when a row is rewritten with its label kept?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from distillery import metrics
from distillery.evaluation.perturbations import perturbations
from distillery.evaluation.results import Results
from distillery.tasks.schema import ANSWER_LABELS
from distillery.teachers.paraphrases import generate_paraphrases, rejection_reason

EXAMPLES_PER_CHANGE = 4  # rewritten rows shown of each change


def paraphrase_test_rows(root: Path, results: Results) -> pd.DataFrame:
    """`evaluate.paraphrased_rows` test rows of the headline's source, and what `augment.teacher` made of them in `new`.

    The filters of augmentation drop what has other numbers, names in capitals or directions. Whether the label still
    holds is asked of no model: one that is scored here would be judged by itself.
    """
    params, source = results.params, results.headline.source
    test = results.tests[source]
    chosen = test.sample(min(params.evaluate.paraphrased_rows, len(test)), random_state=params.evaluate.seed)
    if chosen.empty:
        return chosen.assign(new=pd.Series(dtype=object))
    task = results.tasks[source]
    made = generate_paraphrases(root, params, task, chosen)
    made = made.drop_duplicates("source_id").set_index("source_id")["text"]
    chosen = chosen.assign(new=chosen["id"].map(made))
    reasons = [
        rejection_reason(a, b, keep=params.augment.keep, perturbations=task.perturbations)
        for a, b in zip(chosen["text"], chosen["new"], strict=True)
    ]
    return chosen[np.array(reasons) == "kept"].reset_index(drop=True)


def measure_robustness(
    results: Results, scorers: dict[str, Callable[[list[str]], np.ndarray]], paraphrases: pd.DataFrame | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """How the models in `scorers` answer test rows of the headline's source that are rewritten with the label kept.

    Of every rule of :func:`perturbations` at most `evaluate.rewritten_rows` rows that it changes, and
    `paraphrases` (test rows with `new`, see :func:`paraphrase_test_rows`).
    Returns the table and the examples of :class:`Measurements`.
    """
    e, source = results.params.evaluate, results.headline.source
    test, labels = results.tests[source], np.array(results.labels[source], dtype=object)
    order = np.random.default_rng(e.seed).permutation(len(test))
    shuffled = test.iloc[order].reset_index(drop=True)
    every = [text for s in ("test", "validation") for text in getattr(results, f"{s}s")[source]["text"]]
    table, examples, asked = [], [], {}
    for change, rule in perturbations(every, results.tasks[source].perturbations).items():
        new = shuffled["text"].map(rule)
        asked[change] = shuffled.assign(new=new)[new != shuffled["text"]].head(e.rewritten_rows)
    asked["other words"] = shuffled.head(0) if paraphrases is None else paraphrases
    free = list(labels) == list(ANSWER_LABELS)  # another question has another answer, not another label
    asked = {change: rows for change, rows in asked.items() if len(rows) and not free}
    for change, rows in asked.items():
        pairs = rows.head(EXAMPLES_PER_CHANGE)[["text", "new"]].itertuples(index=False)
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
