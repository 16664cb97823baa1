"""What a language model is to write: a label, a topic and further properties of each text, and the conversations."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from distillery.tasks.schema import FewShotExample, Task

# Of a request for a text. What is the same for all texts of a cycle comes first.
SYSTEM = """You write texts for training a classifier. Its question about each text: {question}
The labels:
{meanings}
Write each text so that its label is clear from the text alone, without naming the label. Every text has new names, \
numbers and words. Reply with the text only."""
LABEL = "{label} ({meaning})"
REQUEST = "Write a text. Label: {label}"
TOPICS = """A classifier answers a question about each text: {question}
The labels:
{meanings}{examples}

Write a numbered list of {n} different topics of such texts, each in at most five words, as different from each other as \
possible. Each topic must allow texts of every label."""
LIST_ITEM = re.compile(r"(?:^|\s)\d+[.)]\s+")  # of a numbered list, also on one line
MAX_TOPIC_WORDS = 12


@dataclass(frozen=True)
class PlannedText:
    """One text to write. attributes: further properties by name. cycle: the texts of one cycle and label have different topics."""

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
    counts: Mapping[str, int], topics: Sequence[str], attributes: Mapping[str, Sequence[str]], seed: int
) -> list[PlannedText]:
    """The texts to write, cycle after cycle: in each cycle a label has every topic once, in random order.

    counts: texts of each label. attributes: the values of each further property, of which a text gets one at random.
    """
    rng, planned = np.random.default_rng(seed), []
    for label, n in counts.items():
        for start in range(0, n, len(topics)):
            for k in rng.permutation(len(topics))[: n - start]:
                values = {name: options[rng.integers(len(options))] for name, options in attributes.items()}
                planned.append(PlannedText(label, topics[k], values, start // len(topics)))
    return sorted(planned, key=lambda text: text.cycle)


def cycle_examples(task: Task, n: int, seed: int, cycle: int) -> list[FewShotExample]:
    """The `n` solved examples of the task file that all texts of a cycle are shown: labels take turns, order random."""
    shuffled = [task.few_shot[i] for i in np.random.default_rng([seed, cycle]).permutation(len(task.few_shot))]
    by_label = [[example for example in shuffled if example.label == name] for name in task.names]
    turns = [examples[k] for k in range(len(shuffled)) for examples in by_label if k < len(examples)]
    return turns[:n]


def writing_turns(task: Task, planned: PlannedText, examples: Sequence[FewShotExample]) -> list[dict[str, str]]:
    """The conversation that requests the text `planned`, after `examples` as texts that were written before.

    What differs between two texts of a cycle stands at its end, so their common beginning is read once.
    """
    meanings = "\n".join(f"- {task.word(name)}: {meaning}" for name, meaning in task.labels.items())
    system = SYSTEM.format(question=task.prompt.instruction or "Which label fits?", meanings=meanings)
    turns = [{"role": "system", "content": system}]
    for example in examples:
        label = LABEL.format(label=task.word(example.label), meaning=task.labels[example.label])
        turns += [
            {"role": "user", "content": REQUEST.format(label=label)},
            {"role": "assistant", "content": example.text},
        ]
    label = LABEL.format(label=task.word(planned.label), meaning=task.labels[planned.label])
    properties = {"topic": planned.topic, **planned.attributes}
    lines = [f"{name.capitalize().replace('_', ' ')}: {value}" for name, value in properties.items()]
    return [*turns, {"role": "user", "content": "\n".join([REQUEST.format(label=label), *lines])}]


def topic_turns(task: Task, n: int) -> list[dict[str, str]]:
    """The conversation that requests `n` topics of texts of `task`."""
    meanings = "\n".join(f"- {task.word(name)}: {meaning}" for name, meaning in task.labels.items())
    examples = "\n".join(f"- {example.text}" for example in task.few_shot)
    content = TOPICS.format(
        question=task.prompt.instruction or "Which label fits?",
        meanings=meanings,
        examples=examples and f"\n\nSuch texts are:\n{examples}",
        n=n,
    )
    system = [{"role": "system", "content": task.prompt.system}] if task.prompt.system else []
    return [*system, {"role": "user", "content": content}]


def parse_topics(answer: str) -> list[str]:
    """The topics in a numbered list, which may stand on one line; without a number nothing is a topic."""
    items = [item.strip(" \n.;,*\"'") for item in LIST_ITEM.split(answer)[1:]]
    return [item for item in dict.fromkeys(items) if 0 < len(item.split()) <= MAX_TOPIC_WORDS]
