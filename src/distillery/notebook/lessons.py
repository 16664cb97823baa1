"""What the lessons share: rows of the finance corpus, and students small enough to train in a second."""

from __future__ import annotations

import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from distillery import losses
from distillery.files import repository_root
from distillery.notebook.style import PALETTE

LABELS = ["positive", "neutral", "negative"]


def read_corpus(rows: int, seed: int = 0) -> pd.DataFrame:
    """At least `rows` rows of `data/corpora/finance.jsonl`, whole groups in a random order: text, label, group, ...

    label_id is the index of the label in `LABELS`.
    """
    path = repository_root() / "data/corpora/finance.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    corpus = pd.DataFrame([json.loads(line) for line in lines])
    corpus["label_id"] = corpus["label"].map(LABELS.index)
    shuffled = np.random.default_rng(seed).permutation(corpus["group"].unique())
    order = corpus["group"].map({group: i for i, group in enumerate(shuffled)})
    corpus = corpus.iloc[np.argsort(order, kind="stable")].reset_index(drop=True)
    return corpus.head(rows)


def split_by_group(frame: pd.DataFrame, shares: list[float], seed: int = 0) -> list[pd.DataFrame]:
    """`frame` cut into parts of about these `shares` (they sum to 1); rows of one group stay together."""
    groups = np.random.default_rng(seed).permutation(frame["group"].unique())
    ends = np.round(np.cumsum([0, *shares]) * len(groups)).astype(int)
    parts = [groups[a:b] for a, b in zip(ends, ends[1:], strict=False)]
    return [frame[frame["group"].isin(part)].reset_index(drop=True) for part in parts]


def train_linear_student(
    features: Tensor, logprobs: Tensor, temperature: float = 1.0, steps: int = 150, learning_rate: float = 0.05
) -> torch.nn.Linear:
    """A linear classifier that minimizes T**2 KL(teacher || student) with Adam, all rows in every step.

    features: [n, words]. logprobs: [n, labels], the teacher's log-probabilities at T = 1; -inf for a probability of 0.
    """
    student = torch.nn.Linear(features.shape[1], logprobs.shape[1])
    torch.nn.init.zeros_(student.weight)
    torch.nn.init.zeros_(student.bias)
    optimizer = torch.optim.Adam(student.parameters(), learning_rate, weight_decay=1e-4)
    for _ in range(steps):
        loss = temperature**2 * losses.kl(student(features), logprobs, temperature).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student


def accuracy(student: torch.nn.Linear, features: Tensor, label_ids: pd.Series) -> float:
    """Share of the rows for which the student's most probable label is the gold label."""
    return float((student(features).argmax(-1).numpy() == label_ids.to_numpy()).mean())


def plot_lines(x: list, lines: dict[str, list], title: str, xlabel: str, ylabel: str, log: bool = False) -> None:
    """Several lines over the same `x`."""
    _, axes = plt.subplots(figsize=(6, 2.8), layout="constrained")
    for (name, values), colour in zip(lines.items(), PALETTE, strict=False):
        axes.plot(x, values, "o-" if len(x) <= 20 else "-", label=name, color=colour, markersize=4)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    if log:
        axes.set_xscale("log", base=2)
        axes.set_xticks(x, [f"{value:g}" for value in x])
    if len(lines) > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


def plot_token_values(tokens: list[str], values: list[float], title: str, colour: str = PALETTE[0]) -> None:
    """A bar for every token of a text, in nats."""
    _, axes = plt.subplots(figsize=(min(10, 1.5 + 0.55 * len(tokens)), 2.4), layout="constrained")
    axes.bar(range(len(tokens)), values, color=colour)
    axes.set_xticks(range(len(tokens)), tokens, rotation=45, ha="right")
    axes.set(title=title, ylabel="nats")


def plot_histograms(samples: dict[str, np.ndarray], title: str, mark: float | None = None) -> None:
    """Histograms of several samples over one axis; `mark` is a value to compare them with."""
    _, axes = plt.subplots(figsize=(6, 2.6), layout="constrained")
    edges = np.histogram_bin_edges(np.concatenate(list(samples.values())), 20)
    for (name, values), colour in zip(samples.items(), PALETTE, strict=False):
        axes.hist(values, edges, label=name, color=colour, histtype="step", linewidth=1.5, density=True)
    if mark is not None:
        axes.axvline(mark, color="black", linewidth=0.8, linestyle=":", label="observed")
    axes.set(title=title, yticks=[])
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
