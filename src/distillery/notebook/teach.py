"""Figures, tables and sentences of 02_teach: what a teacher knows, and how sure it is."""

from __future__ import annotations

import json
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from distillery import metrics
from distillery.notebook.style import BLUE, GREY
from distillery.wording import percent

KEYS = ["source", "split", "id"]
SHOWN_SCORES = ["accuracy", "balanced_accuracy", "micro_f1", "macro_f1", "hamming_loss", "log_loss", "ece"]
SHOWN_SCORES += ["macro_average_precision", "commonest_answer"]
CLOSE = 0.02  # a difference of shares below this is called none


def held_out_predictions(rows: pd.DataFrame, signals: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """The teacher's predictions of rows that it was not tuned on: label, prediction, confidence, right.

    names: the labels of the task.

    rows: source, split, id, label. signals: source, split, id, label, probabilities.
    """
    merged = rows[[*KEYS, "label"]].merge(signals[[*KEYS, "label", "probabilities"]], on=KEYS, suffixes=("", "_signal"))
    merged = merged[merged["split"] != "train"].dropna(subset="label").rename(columns={"label_signal": "prediction"})
    p = np.stack(merged.pop("probabilities").to_list()) if len(merged) else np.zeros((0, len(names)))
    merged["confidence"] = metrics.confidence(p, merged["prediction"], names).astype(float)
    return merged.assign(right=merged["label"] == merged["prediction"])


def score_table(results: dict[str, dict], in_sample: dict | None) -> pd.DataFrame:
    """Scores [score, split]; in_sample: scores on the gold rows by the model that was tuned on these rows."""
    table = pd.DataFrame({split: {k: v for k, v in r.items() if isinstance(v, float)} for split, r in results.items()})
    if in_sample:
        table.insert(0, "train, in sample", pd.Series(in_sample))
        table = table.rename(columns={"train": "train, out of fold"})
    return table.loc[[score for score in SHOWN_SCORES if score in table.index]]


def rationale_table(rows: pd.DataFrame, signals: pd.DataFrame, from_file: bool) -> pd.DataFrame:
    """The rationales, each beside the label that it argues for: the gold label in `train`, elsewhere the teacher's own.

    from_file: answers from a file bring rationales of the teacher's own label everywhere.
    """
    written = signals[signals["rationale"].notna()]
    merged = rows[[*KEYS, "text", "label"]].merge(
        written.drop(columns="probabilities"), on=KEYS, suffixes=("_gold", "")
    )
    gold = (merged["split"] == "train") & (not from_file)
    merged["label"] = merged["label_gold"].where(gold, merged["label"])
    merged["label from"] = np.where(gold, "gold", "teacher")
    return merged[["text", "label", "label from", "rationale", "contradicts"]]


def plot_losses(histories: dict[str, pd.DataFrame]) -> None:
    """Training loss over the optimizer steps, a line for each model: the whole one, and one a fold."""
    _, axes = plt.subplots(figsize=(9, 2.6), layout="constrained")
    for name, history in histories.items():
        axes.plot(history["step"], history["loss"], label=name)
    axes.set(title="training loss", xlabel="optimizer step", ylim=(0, None))
    axes.legend()


def plot_confidence(predictions: pd.DataFrame) -> None:
    """Reliability diagram, and accuracy of the most confident share. predictions: confidence, right."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
    bins = predictions.groupby(pd.cut(predictions["confidence"], np.linspace(0, 1, 11)), observed=True)
    left.plot([0, 1], [0, 1], color=GREY, linewidth=0.8)
    left.plot(bins["confidence"].mean(), bins["right"].mean(), "o-", color=BLUE)
    left.set(
        title="reliability on held-out rows", xlabel="confidence", ylabel="accuracy", xlim=(0.3, 1), ylim=(0, 1.03)
    )
    ranked = predictions.sort_values("confidence", ascending=False)["right"].expanding().mean().to_numpy()
    right.plot(np.arange(1, len(ranked) + 1) / len(ranked), ranked, color=BLUE)
    right.set(title="accuracy of the most confident share", xlabel="share of rows", ylim=(None, 1.01))


def untrained_sentence(best: float, majority: float, tuned: bool, answer: str = "label") -> str:
    """The untuned teacher's best validation accuracy beside the share of the most frequent label.

    tuned: whether it is tuned after this. answer: what the shares are of, see
    :func:`distillery.notebook.labels.answer_name`.
    """
    text = "Before tuning" if tuned else "Untuned,"
    text += f" the teacher is right on {percent(best)} of the validation rows at best. The most frequent "
    text += f"{answer} alone is right on {percent(majority)}: "
    if best > majority + CLOSE:
        return text + "the teacher knows something of the task" + (" before it sees gold rows." if tuned else ".")
    return text + f"the teacher does **not** know the task{' yet' * tuned}, it must be tuned before it teaches."


def loss_sentence(histories: dict[str, pd.DataFrame]) -> str:
    """Whether the training loss of the model on all gold rows fell."""
    if not histories:
        return "This teacher is not tuned."
    losses = next(iter(histories.values()))["loss"]
    if len(losses) < 2:
        return f"Only one loss was logged, {losses.iloc[0]:.2f} nats: too few steps to see whether it falls."
    first, last = losses.iloc[0], losses.iloc[-1]
    text = f"On all gold rows the loss went from {first:.2f} to {last:.2f} nats: "
    return text + (
        "the model fits these rows better." if last < first else "the model did **not** fit these rows better."
    )


def memory_sentence(in_sample: float, held_out: float | None, out_of_fold: float | None) -> str:
    """What the teacher memorised of its gold rows, and which signals students see for them.

    in_sample, held_out: accuracy of the teacher on the gold rows it was tuned on, and on held-out rows; None: these
    have no labels. out_of_fold: accuracy on the gold rows by models tuned without them, each on fewer rows than the
    teacher; None without folds.
    """
    text = f"On rows it was tuned on the teacher is right on {percent(in_sample)}"
    if held_out is not None:
        is_memory = in_sample > held_out + CLOSE
        text += f", on held-out rows on {percent(held_out)}: "
        text += "the difference is memory" if is_memory else "there is no sign that it memorised these rows"
    if out_of_fold is None:
        return text + ". Without folds no student learns from its signals for the rows it was tuned on."
    text += ". For the rows it was tuned on, students see signals of models that learned without them "
    if held_out is not None and out_of_fold < held_out - CLOSE:
        return text + f"({percent(out_of_fold)}), which are weaker since they learned from fewer rows."
    return text + f"({percent(out_of_fold)})."


def knowledge_sentence(accuracy: float, majority: float, rows: int, answer: str = "label") -> str:
    """What the teacher can give a student: accuracy on held-out rows beside the most frequent label's share.

    answer: as for :func:`untrained_sentence`.
    """
    if not rows:
        return "None of its rows that it was not tuned on has a label: there is **nothing** to score it on."
    text = f"On {rows:,} held-out rows the teacher is right on {percent(accuracy)}, "
    if accuracy > majority + CLOSE:
        return text + f"{100 * (accuracy - majority):.1f} points more than the most frequent {answer}: it can teach."
    return text + f"the most frequent {answer} on {percent(majority)}: it has **nothing** to teach."


def calibration_sentence(confidence: float, accuracy: float) -> str:
    """Mean confidence beside accuracy, both in [0, 1]."""
    text = f"Mean confidence is {percent(confidence)}, accuracy {percent(accuracy)}. The teacher is "
    if abs(confidence - accuracy) <= CLOSE:
        return text + "well calibrated on average."
    if confidence > accuracy:
        return text + "overconfident: its probabilities are too sharp, and a temperature above 1 softens them."
    return text + "underconfident: its probabilities are too flat, and a temperature above 1 flattens them more."


def selection_sentence(confident_half: float, all_rows: float) -> str:
    """Accuracy of the more confident half of the rows beside that of all rows."""
    text = f"The more confident half of the rows is right on {percent(confident_half)}, all rows on "
    text += f"{percent(all_rows)}: "
    if confident_half > all_rows + CLOSE:
        return text + "a filter on confidence gives cleaner pseudo-labels."
    return text + "a filter on confidence would **not** give cleaner pseudo-labels."


def confident_half(predictions: pd.DataFrame) -> float:
    """Accuracy of the more confident half of `predictions` (confidence, right)."""
    ranked = predictions.sort_values("confidence", ascending=False, kind="stable")["right"]
    return float(ranked.head(max(1, len(ranked) // 2)).mean())


def label_error_sentence(suspects: int, rows: int) -> str:
    """How many gold labels are probably wrong, of those that the teacher gave signals for out of sample."""
    if not suspects:
        return f"The teacher confidently contradicts none of the {rows:,} gold labels that it did not learn from."
    text = f"The teacher confidently contradicts {suspects:,} of the {rows:,} gold labels that it did not learn from "
    text += f"({percent(suspects / rows)}): the label or the teacher is wrong. "
    if suspects > 0.2 * rows:
        return text + "These are too many to be errors of the labels alone: trust the list little."
    return text + "`label_errors.csv` has them for a person to read, the worst first."


def labelling_sentence(to_label: int, margin: float) -> str:
    """How unsure the teacher is of the pool rows to label next. margin: the largest of them."""
    if not to_label:
        return "There are no pool rows to label."
    text = f"`to_label.csv` lists {to_label:,} pool rows, one of each group, from the least sure one to a margin of "
    text += f"{margin:.2f} between the two most probable labels: "
    if margin > 0.5:
        return text + "the last ones are clear to the teacher, so label the first ones."
    return text + "the teacher decides none of them clearly, and a label of each would teach it something."


def rationale_sentence(written: int, contradictions: int) -> str:
    """How many rationales name another label than the one they were written for."""
    if not written:
        return "There are no rationales."
    if not contradictions:
        return f"None of the {written} rationales names another label than the one it was written for."
    text = f"{contradictions} of the {written} rationales "
    if contradictions == 1:
        return text + "names another label than the one it was written for: a student must not learn from it."
    return text + "name another label than the one they were written for: a student must not learn from these."


def tokens_sentence(tokens: pd.DataFrame, signals: pd.DataFrame) -> str:
    """How many completions have log-probabilities, how much of the probability they hold, and which rows have none.

    tokens: as :func:`distillery.teachers.served_tokens.collect_tokens` returns them. signals: of all its rows.
    """
    labelled = signals[signals["split"].isin(["train", "pool"])]
    known = set(zip(tokens["source"], tokens["split"], tokens["id"], strict=True))
    missing = [row[-1] for row in zip(*(labelled[key] for key in KEYS), strict=True) if row not in known]
    steps = [step for text in tokens["tokens"] for step in json.loads(text)]
    if not steps:
        return "No row has log-probabilities of tokens."
    mass = np.array([sum(np.exp(logprob) for _, logprob in others) for _, _, others in steps])
    text = f"{len(tokens):,} completions have log-probabilities at {len(steps):,} tokens. The returned tokens hold "
    text += f"{100 * mass.mean():.2f} % of the probability on average, at least {100 * mass.min():.2f} %; the rest is "
    text += "kept as one more outcome."
    if missing:
        shown = ", ".join(f"`{row}`" for row in missing[:3]) + (", …" if len(missing) > 3 else "")
        text += f" {len(missing):,} rows have none: {shown}."
    return text
