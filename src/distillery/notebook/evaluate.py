"""Tables and sentences of 05_evaluate: what the students are worth. Shares are in [0, 1]."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd

from distillery.notebook.style import join_words, shown_change
from distillery.wording import human_count, percent

if TYPE_CHECKING:
    from distillery.config.schema import Params
    from distillery.evaluation.results import Check

CLOSE = 0.02  # a difference of shares below this is called none


def student_table(params: Params) -> pd.DataFrame:
    """The students of an experiment: their model, layers, rows, teachers and control."""
    rows = [
        {
            "student": name,
            "model": student.model,
            "layers": str(student.init.layers),
            "rows of each phase": " → ".join(phase.rows_text for phase in student.phases),
            "teachers": ", ".join(dict.fromkeys(teacher for p in student.phases for teacher in p.teachers)) or "none",
            "control": student.control or "none",
        }
        for name, student in params.students.items()
    ]
    return pd.DataFrame(rows)


def comparison_table(board: pd.DataFrame) -> pd.DataFrame:
    """Every comparison of the leaderboard, a row each: of a student with its control, then with its teacher."""
    columns = ["versus", "difference", "difference_low", "difference_high", "p", "detectable", "verdict"]
    lines = board[board["role"] != "export"].set_index("model")
    sides = [lines[[start + column for column in columns]].set_axis(columns, axis=1) for start in ("", "teacher_")]
    return pd.concat(sides).dropna(subset="verdict").reset_index()


def leader_sentence(board: pd.DataFrame, headline: str) -> str:
    """The best model beside the headline. board: model, role, accuracy, best first."""
    best, head = board.iloc[0], board.set_index("model").loc[headline]
    if best["model"] == headline:
        return f"The headline student {headline} is the best model here, with {percent(head['accuracy'])}."
    text = (
        f"The best model is the {best['role']} {best['model']} with {percent(best['accuracy'])}; the headline student "
    )
    return text + f"{headline} is {100 * (best['accuracy'] - head['accuracy']):.1f} points below it."


def verdict_sentence(verdicts: Sequence[str]) -> str:
    """How many comparisons show a difference. verdicts: `better`, `worse` or `no evidence`."""
    if not verdicts:
        return "No student has a control or a teacher to be compared with."
    count = Counter(verdicts)
    text = (
        f"Of {len(verdicts)} comparisons {count['better']} show a student that is better, {count['worse']} one that is "
    )
    text += "worse. "
    if count["no evidence"]:
        return text + f"{count['no evidence']} show no evidence either way: the test set may be too small for them."
    return text + "Every one of them shows a difference."


def check_sentence(checks: Sequence[Check], headline: str, control: str | None) -> str:
    """How many checks passed, the models that failed one, and whether headline or control are among these."""
    failed = [check for check in checks if not check.passed]
    if not failed:
        return f"All {len(checks)} checks passed: nothing here makes the scores worthless."
    kinds = join_words([f"{n} of {kind}" for kind, n in Counter(check.kind for check in failed).items()])
    text = f"**{len(failed)} of {len(checks)} checks failed** ({kinds})"
    if not all(check.models for check in failed):
        return text + ", one at least for all models. Read them before any score."
    models = list(dict.fromkeys(model for check in failed for model in check.models))
    text += f": {join_words(models)}. "
    among = [f"the headline student {headline}"] if headline in models else []
    among += [f"{control}, the control of {headline}"] if control in models else []
    if among:
        text += f"Among them {'are' if len(among) > 1 else 'is'} {join_words(among)}. "
    else:
        text += f"The headline student {headline} is not among them" + (
            f", nor is its control {control}. " if control else ". "
        )
    return text + "Read them before any score."


def pair_sentence(pairs_right: float, pairs: int, accuracy: float) -> str:
    """Share of contrast pairs with both rows right, beside the accuracy on all rows."""
    if not pairs:
        return "This test set has no contrast pairs."
    by_chance = accuracy**2
    text = (
        f"The headline student has both rows right on {percent(pairs_right)} of {pairs} pairs. If its errors fell on "
    )
    text += f"rows at random, it would be {percent(by_chance)}: "
    if pairs_right < by_chance - CLOSE:
        return text + "it often misses the few words that decide."
    return text + "it reads the few words that decide as well as the rest."


def robustness_sentence(robustness: pd.DataFrame, headline: str) -> str:
    """The perturbation that changes most predictions of the headline. robustness: perturbation, model, consistency."""
    rows = robustness[robustness["model"] == headline]
    if rows.empty:
        return "The headline student was not perturbed."
    worst = rows.loc[rows["consistency"].idxmin()]
    text = f"{headline} keeps its prediction on at least {percent(worst['consistency'])} of the rows "
    text += f"(*{worst['perturbation']}*): "
    if worst["consistency"] >= 0.9:
        return text + "what must not matter hardly matters."
    return text + "it reacts to **what must not matter**."


def front_sentence(board: pd.DataFrame, headline: str) -> str:
    """Whether a smaller model is as accurate as the headline. board: model, parameters, accuracy."""
    head = board.set_index("model").loc[headline]
    sized = board[board["parameters"].notna() & (board["role"] != "untrained") & (board["model"] != headline)]
    better = sized[(sized["parameters"] <= head["parameters"]) & (sized["accuracy"] >= head["accuracy"])]
    if better.empty:
        return f"No model of the size of {headline} or smaller is as accurate: it is on the dashed line."
    names = join_words(better["model"].tolist())
    verb = "are" if len(better) > 1 else "is"
    return f"{names} {verb} no larger than {headline} and at least as accurate: prefer it."


def size_sentence(series: pd.DataFrame) -> str:
    """Whether students of more parameters are better where nothing else differs.

    series: from the smallest, see :func:`distillery.report.tables.size_series`; accuracy with accuracy_low and _high.
    """
    small, large = series.iloc[0], series.iloc[-1]
    text = f"{join_words(series['model'].tolist())} differ in size alone: "
    text += f"{human_count(small['parameters'])} to {human_count(large['parameters'])} parameters, "
    text += f"{percent(small['accuracy'])} to {percent(large['accuracy'])}. "
    if large["accuracy_low"] > small["accuracy_high"]:
        return text + "The intervals of the smallest and the largest are apart: more parameters help."
    if large["accuracy_high"] < small["accuracy_low"]:
        return text + "The intervals of the smallest and the largest are apart: more parameters **harm**."
    return text + "The intervals of the smallest and the largest overlap: **no evidence** that size matters."


def confusion_sentence(labels: Sequence[str], predictions: Sequence[str]) -> str:
    """The most frequent error of a model."""
    errors = Counter((label, p) for label, p in zip(labels, predictions, strict=True) if label != p)
    if not errors:
        return "The headline student makes no error."
    (label, prediction), n = errors.most_common(1)[0]
    back = errors[(prediction, label)]
    text = f"{n} of {sum(errors.values())} errors of the headline student predict {prediction} where the label is "
    text += f"{label}, {back} the other way round: "
    if n > 1.5 * back:
        return text + f"it leans towards {prediction}."
    return text + "it confuses the two, but leans to neither."


def calibration_sentence(ece: float | None, temperature: float | None) -> str:
    """Expected calibration error, and the temperature that validation rows fit best (above 1: overconfident)."""
    if ece is None or pd.isna(ece):
        return "The headline student gives no probabilities."
    text = f"The headline student's confidence is off by {100 * ece:.1f} points on average (ECE). "
    if temperature is None or pd.isna(temperature) or abs(temperature - 1) < 0.05:
        return text + "No temperature would correct that."
    kind = "overconfident" if temperature > 1 else "underconfident"
    return text + f"It is {kind}: on validation rows a temperature of {temperature:.2f} fits best."


def phase_sentence(gains: pd.DataFrame, headline: str, validation_rows: int) -> str:
    """What each phase gave the headline, and which of these gains the validation rows can show.

    gains: model, after phase, accuracy, gain and gain_error, its standard error. A gain of less than two of these
    counts as none.
    """
    rows = gains[gains["model"] == headline]
    rows = rows.assign(before=rows["accuracy"].shift()).iloc[1:]
    if rows.empty:
        return f"{headline} has no phases."
    phases = [f"phase {phase}" for phase in rows["after phase"]]
    changes = map(shown_change, rows["before"], rows["accuracy"])
    parts = [f"{phase} gave {change} points" for phase, change in zip(phases, changes, strict=True)]
    text = f"{headline}: {join_words(parts)}. "
    unclear = (~(rows["gain"].abs() > 2 * rows["gain_error"])).tolist()  # NaN with a single row
    harmful = [phase for phase, gain, no in zip(phases, rows["gain"], unclear, strict=True) if gain < 0 and not no]
    unseen = [phase for phase, no in zip(phases, unclear, strict=True) if no]
    if not harmful and not unseen:
        return text + "Each phase helped."
    if harmful:
        text += f"{join_words(harmful).capitalize()} made it **worse**: try the list of phases without it. "
    if unseen:
        text += f"The {validation_rows:,} validation rows cannot show a change by {join_words(unseen)}: it is below "
        text += "two standard errors of a difference. "
    return text.rstrip()


def closeness_sentence(close: pd.DataFrame, headline: str, teacher: str | None) -> str:
    """Whether training brought the headline near its teacher. close: model, teacher, agreement, kl."""
    rows = close[close["teacher"] == teacher].set_index("model")
    before = f"{headline}, untrained"
    if headline not in rows.index or before not in rows.index:
        return "The headline student has no teacher here, or no untrained counterpart."
    start, end = rows.loc[before], rows.loc[headline]
    text = f"Training moved {headline} from {percent(start['agreement'])} agreement with {teacher} to "
    text += f"{percent(end['agreement'])}, from {start['kl']:.3f} to {end['kl']:.3f} nats: "
    return text + ("it came nearer." if end["kl"] < start["kl"] else "it did **not** come nearer.")


def disagreement_sentence(kinds: dict[str, int]) -> str:
    """Rows on which only one of student and teacher is right. kinds: kind -> test rows."""
    student, teacher = kinds.get("only the student is right", 0), kinds.get("only the teacher is right", 0)
    if not student and not teacher:
        return "There is no row on which only one of student and teacher is right."
    text = f"On {teacher} rows only the teacher is right, on {student} only the student: "
    if student >= teacher:
        return text + f"the student loses no row in sum, and wins {student - teacher}."
    return text + f"the student loses {teacher - student} rows in sum."
