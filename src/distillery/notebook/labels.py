"""Sentences of 02_teach and 04_distill on the labels that a model never predicts, while they can still be mended."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import pandas as pd

from distillery.label_sets import LabelSets, single_labels
from distillery.notebook.style import join_words

MAX_NAMED_LABELS = 5
TUNED = "`balance: class_weights` or `batches` where it is trained, more gold rows of it, or more steps may help"
TUNED_ON_SETS = "more gold rows of it, or more steps may help"
PROMPTED = "another prompt (`prompts`), solved examples (`few_shot`) or `calibrate` may help"
PROMPTED_ON_SETS = "another prompt (`prompts`) may help"


def answer_name(names: Sequence[str]) -> str:
    """What a row has of the labels `names` of a task: `label`, or `label set`."""
    return "label set" if isinstance(names, LabelSets) else "label"


def coverage_sentence(
    model: str, label: pd.Series, prediction: pd.Series, tuned: bool, names: Sequence[str] = ()
) -> str:
    """Whether `model` predicts every label of the validation rows for some of them.

    label, prediction: [rows]. tuned: whether it is trained here, which decides what may help. names: the labels of the
    task, where these are label sets.
    """
    counts = pd.Series(single_labels(label, names), dtype=object).value_counts()
    missing = [name for name in counts.index if name not in set(single_labels(prediction, names))]
    if not missing:
        return f"{model} predicts each of the {len(counts)} labels for some of the {len(label):,} validation rows."
    named = [f"{name} ({counts[name]:,} of {len(label):,})" for name in missing[:MAX_NAMED_LABELS]]
    if len(missing) > MAX_NAMED_LABELS:
        named.append(f"{len(missing) - MAX_NAMED_LABELS} other labels")
    return f"**{model} never predicts** {join_words(named)} on the validation rows: {_way_out(tuned, names)}."


def _way_out(tuned: bool, names: Sequence[str]) -> str:
    """What may help a model; see :func:`coverage_sentence`."""
    of_sets = isinstance(names, LabelSets)
    if not tuned:
        return PROMPTED_ON_SETS if of_sets else PROMPTED
    return TUNED_ON_SETS if of_sets else TUNED


def constant_sentence(
    model: str, label: pd.Series, prediction: pd.Series, tuned: bool, names: Sequence[str] = ()
) -> str:
    """Whether `model` is right on more validation rows than its own commonest answer, and the commonest label, are.

    label, prediction: [rows]; see :func:`coverage_sentence`.
    """
    accuracy, rows = float((label == prediction).mean()), len(label)
    majority = float(label.value_counts(normalize=True).max())
    text = f"{100 * accuracy:.1f} % of {rows:,} validation rows, the commonest {answer_name(names)} alone on "
    text += f"{100 * majority:.1f} %"
    if accuracy > majority:
        return f"{model} is right on {text}."
    return f"**{model} is not better than a constant answer**: it is right on {text}; {_way_out(tuned, names)}."


def warning_lines(sentences: Iterable[str]) -> Iterator[str]:
    """The sentences with something in bold as lines for the terminal."""
    for sentence in sentences:
        if "**" in sentence:
            yield "warning: " + sentence.replace("**", "")
