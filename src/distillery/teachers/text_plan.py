"""What a language model is to write: a label, a topic and further properties of each text, and the conversations."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from distillery.tasks.schema import FewShotExample, Task

# Of a request for a text. What is the same for the texts of a label comes first, so that it is read once.
SYSTEM = """You write short texts for training a classifier. Its question about each text: {question}
The right answer to every text that you write is {label}: {meaning}.
Write concrete facts with names and numbers, as real texts have them, and never the answer itself.
Reply with one text."""
REQUEST = "Write a text."
TOPICS = """A classifier answers a question about each text: {question}
Name what texts may be about to which the right answer is {label}: {meaning}.{examples}

Write a numbered list of {n} different topics, each in at most five words."""
DEFAULT_QUESTION = "Which label fits?"
LIST_ITEM = re.compile(r"(?:^|\s)\d+[.)]\s+")  # of a numbered list, also on one line
MAX_TOPIC_WORDS = 12


@dataclass(frozen=True)
class PlannedText:
    """One text to write.

    attributes: further properties by name. cycle: the texts of one label in one cycle have different topics.
    """

    label: str
    topic: str
    attributes: Mapping[str, str]
    cycle: int


def label_counts(n: int, names: Sequence[str], shares: Mapping[str, float] | None) -> dict[str, int]:
    """How many of `n` texts each label gets: equal numbers, or by `shares`, which need not sum to 1.

    Rounded by largest remainders, so they add up to `n`.
    """
    weights = np.array([1.0 if shares is None else shares.get(name, 0.0) for name in names])
    exact = n * weights / weights.sum()
    counts = np.floor(exact).astype(int)
    for i in np.argsort(counts - exact, kind="stable")[: n - counts.sum()]:
        counts[i] += 1
    return dict(zip(names, counts.tolist(), strict=True))


def plan_texts(
    counts: Mapping[str, int],
    topics: Mapping[str, Sequence[str]],
    attributes: Mapping[str, Sequence[str]],
    seed: int,
) -> list[PlannedText]:
    """The texts to write, cycle after cycle: in each cycle a label has each of its topics once, in random order.

    counts: texts of each label. topics: of each label. attributes: the values of each further property, of which a text
    gets one at random.
    """
    rng, planned = np.random.default_rng(seed), []
    for label, n in counts.items():
        of_label = topics[label] if n else []
        for start in range(0, n, max(1, len(of_label))):
            for k in rng.permutation(len(of_label))[: n - start]:
                values = {name: options[rng.integers(len(options))] for name, options in attributes.items()}
                planned.append(PlannedText(label, of_label[k], values, start // len(of_label)))
    return sorted(planned, key=lambda text: text.cycle)


def shown_examples(task: Task, text: PlannedText, n: int, seed: int) -> list[FewShotExample]:
    """The `n` solved examples of the task file that a request for `text` shows: of its label, in random order, the same
    for all texts of its cycle."""
    examples = [example for example in task.few_shot if example.label == text.label]
    rng = np.random.default_rng([seed, text.cycle, task.names.index(text.label)])
    return [examples[i] for i in rng.permutation(len(examples))[:n]]


def writing_turns(task: Task, text: PlannedText, examples: Sequence[FewShotExample]) -> list[dict[str, str]]:
    """The conversation that requests `text`, after `examples` as texts that were written before."""
    turns = [{"role": "system", "content": SYSTEM.format(**_fields(task, text.label))}]
    for example in examples:
        turns += [{"role": "user", "content": REQUEST}, {"role": "assistant", "content": example.text}]
    properties = {"topic": text.topic, **text.attributes}
    lines = [f"{name.capitalize().replace('_', ' ')}: {value}" for name, value in properties.items()]
    return [*turns, {"role": "user", "content": "\n".join([REQUEST, *lines])}]


def topic_turns(task: Task, label: str, n: int) -> list[dict[str, str]]:
    """The conversation that requests `n` topics of texts with `label`."""
    lines = "\n".join(f"- {example.text}" for example in task.few_shot if example.label == label)
    examples = f"\n\nSuch texts are:\n{lines}" if lines else ""
    return [{"role": "user", "content": TOPICS.format(**_fields(task, label), examples=examples, n=n)}]


def _fields(task: Task, label: str) -> dict[str, str]:
    question = task.prompt.instruction or DEFAULT_QUESTION
    return {"question": question, "label": task.word(label), "meaning": task.labels[label]}


def parse_topics(answer: str) -> list[str]:
    """The topics in a numbered list, which may stand on one line; without a number nothing is a topic."""
    items = [item.strip(" \n.;,*\"'") for item in LIST_ITEM.split(answer)[1:]]
    return [item for item in dict.fromkeys(items) if 0 < len(item.split()) <= MAX_TOPIC_WORDS]
