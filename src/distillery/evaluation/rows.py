"""Single test rows: where student and teacher differ, and random samples."""

from __future__ import annotations

import numpy as np
import pandas as pd

from distillery.evaluation.gather import UNPARSABLE
from distillery.evaluation.results import TRAINED_ROLES, Results
from distillery.tasks.schema import accepted_answers


def disagreements(results: Results) -> pd.DataFrame:
    """The headline's test rows: where it and its teacher differ, then what it got wrong, the most certain first.

    Columns id, text, gold, student, student_probability, rationale (of the corpus), kind (one of KINDS), differs; with
    a teacher also teacher, teacher_probability, teacher_rationale. Of several seeds the first one's predictions.
    Of free answers also accepted (what is right), student_written and teacher_written.
    """
    head = results.headline
    test = results.tests[head.source]
    rows = pd.DataFrame({"id": test["id"], "text": test["text"], "gold": test["label"], "student": head.predictions[0]})
    rows["student_probability"] = head.probabilities[0].max(1)
    rows["rationale"] = test["rationale"]
    if head.answers is not None:
        rows["accepted"] = [" or ".join(accepted_answers(known)) for known in test["answers"]]
        rows["student_written"] = head.answers
    signal = results.signals.get((head.teacher, head.source))
    right = rows["student"] == rows["gold"]
    if signal is not None:
        rows["teacher"] = signal["prediction"].where(signal["prediction"].notna(), UNPARSABLE)
        rows["teacher_probability"] = np.stack(signal["probabilities"].to_numpy()).max(1)
        rows["teacher_rationale"] = signal["rationale"]
        if head.answers is not None:
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


def sample_rows(results: Results) -> pd.DataFrame:
    """Some test rows of the headline's source, drawn at random: text, gold, and each trained model's label."""
    e, source = results.params.evaluate, results.headline.source
    test = results.tests[source]
    some = np.sort(np.random.default_rng(e.seed).permutation(len(test))[: e.samples])
    rows = test.iloc[some][["text", "label"]].rename(columns={"label": "gold"})
    for line in results.models:
        if line.source == source and line.role in TRAINED_ROLES:
            rows[line.name] = line.predictions[0][some]
    return rows.reset_index(drop=True)
