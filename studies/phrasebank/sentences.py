"""The computed sentences of the study's notebook: facts in, text out. Scores are in [0, 1]."""

from __future__ import annotations

import pandas as pd

from distillery.wording import percent


def teacher_sentence(student: pd.Series, teacher: pd.Series) -> str:
    """student, teacher: rows of the results of one subset."""
    gap = teacher["accuracy"] - student["accuracy"]
    text = f"On {student['subset']}, {student['model']} reaches {percent(student['accuracy'])}, its teacher "
    text += f"{teacher['model']} {percent(teacher['accuracy'])} with "
    text += f"{teacher['million_parameters'] / student['million_parameters']:.1f} times the parameters: "
    if gap > 0:
        return text + f"{100 * gap:.1f} points are lost between teacher and student."
    return text + "the student is **as good** as its teacher, which limits it no longer."


def gain_sentence(gain: pd.Series) -> str:
    """gain: a row of the gains."""
    points = [f"{100 * gain[column]:+.1f}" for column in ("difference", "low", "high")]
    text = f"On {gain['subset']}, {gain['student']} differs from {gain['control']} by {points[0]} points "
    text += f"({points[1]} to {points[2]}): "
    if gain["low"] > 0:
        return text + "better."
    return text + ("**worse**." if gain["high"] < 0 else "**no evidence** of a gain.")


def published_sentence(student: pd.Series, published: pd.Series) -> str:
    """student, published: rows of one subset; the published accuracy against the interval of the student's."""
    text = f"On {student['subset']}, the published accuracy of {published['model']} "
    text += f"({published['million_parameters']:g} M parameters), {percent(published['accuracy'])}, is "
    if published["accuracy"] > student["accuracy_high"]:
        return text + "**above** the interval of the student."
    if published["accuracy"] < student["accuracy_low"]:
        return text + "below the interval of the student."
    return text + "inside the interval of the student: no difference can be seen."


def transfer_sentence(transfer: pd.Series, majority: pd.Series, control: pd.Series) -> str:
    """Rows of one subset: a model that saw no PhraseBank row, the majority label, and a control trained on gold."""
    above = 100 * (transfer["accuracy"] - majority["accuracy"])
    lacking = 100 * (control["accuracy"] - transfer["accuracy"])
    text = f"On {transfer['subset']}, {transfer['model']} differs from the majority label by {above:+.1f} points: "
    if above <= 0:
        return text + "the finance corpus transfers **nothing** to this benchmark."
    text += "the finance corpus transfers to this benchmark, "
    if lacking > 0:
        return text + f"but the benchmark's own labels are worth {lacking:.1f} points more."
    return text + "and replaces its own labels."


def split_sentence(rows: pd.DataFrame, pairs: int) -> str:
    """rows: of one seed; pairs: held-out rows with a near-duplicate among the rows that are learned from."""
    test, unlabelled = (rows["split_ref"] == "50agree/test").sum(), rows["split_ref"].str.endswith("/pool").sum()
    text = f"{test:,} test rows, {unlabelled:,} unlabelled texts for the teacher. "
    if pairs:
        return text + f"**{pairs:,} held-out rows** have a near-duplicate among the rows that are learned from."
    return text + "No held-out row has a near-duplicate among the rows that are learned from."
