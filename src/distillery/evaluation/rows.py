"""Single test rows: where student and teacher differ, and random samples."""

from __future__ import annotations

import numpy as np
import pandas as pd

from distillery import metrics
from distillery.evaluation.gather import UNPARSABLE
from distillery.evaluation.results import TRAINED_ROLES, Results
from distillery.tasks.schema import accepted_answers


def disagreements(results: Results) -> pd.DataFrame:
    """The headline's test rows: where it and its teacher differ, then where it is wrong, the most confident first.

    Columns id, text, label, student_prediction, student_probability, rationale (of the corpus), kind (one of
    ERROR_KINDS), differs; with a teacher also teacher_prediction, teacher_probability, teacher_rationale. Of several
    seeds the first one's predictions. Of free answers also accepted (the right ones), student_answer, teacher_answer.
    """
    head = results.headline
    test, labels = results.tests[head.source], results.labels[head.source]
    rows = test[["id", "text", "label"]].assign(
        student_prediction=head.predictions[0],
        student_probability=metrics.confidence(head.probabilities[0], head.predictions[0], labels),
        rationale=test["rationale"],
    )
    if head.answers is not None:
        rows["accepted"] = [" or ".join(accepted_answers(answers)) for answers in test["answers"]]
        rows["student_answer"] = head.answers
    signal = results.signals.get((head.teacher, head.source))
    student_right = rows["student_prediction"] == rows["label"]
    if signal is not None:
        rows["teacher_prediction"] = signal["prediction"].where(signal["prediction"].notna(), UNPARSABLE)
        p_teacher = np.stack(signal["probabilities"].to_numpy())
        rows["teacher_probability"] = metrics.confidence(p_teacher, signal["prediction"], labels)
        rows["teacher_rationale"] = signal["rationale"]
        if head.answers is not None:
            rows["teacher_answer"] = signal["answer"]
        teacher_right = rows["teacher_prediction"] == rows["label"]
        cases = [student_right & teacher_right, student_right, teacher_right]
        kinds = ["both right", "only the student is right", "only the teacher is right"]
        rows["kind"] = np.select(cases, kinds, "both wrong")
        rows["differs"] = rows["student_prediction"] != rows["teacher_prediction"]
    else:
        rows["kind"] = np.where(student_right, "right", "wrong")
        rows["differs"] = False
    rank = np.where(rows["differs"], 0, np.where(student_right, 2, 1))
    rows = rows.assign(_rank=rank).sort_values(["_rank", "student_probability", "id"], ascending=[True, False, True])
    return rows.drop(columns="_rank").reset_index(drop=True)


def sample_rows(results: Results) -> pd.DataFrame:
    """`evaluate.samples` random test rows of the headline's source: text, label, and each trained model's prediction.

    A model's column bears its name in the leaderboard.
    """
    config, source = results.params.evaluate, results.headline.source
    test = results.tests[source]
    drawn = np.sort(np.random.default_rng(config.seed).permutation(len(test))[: config.samples])
    rows = test.iloc[drawn][["text", "label"]]
    predictions = {m.name: m.predictions[0][drawn] for m in results.models
                   if m.source == source and m.role in TRAINED_ROLES}  # fmt: skip
    return rows.assign(**predictions).reset_index(drop=True)
