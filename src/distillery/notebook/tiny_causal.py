"""A causal language model small enough to train in seconds, for the lesson on GKD."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from distillery import losses

PAD, UNKNOWN, START, END = range(4)
SPECIAL_TOKENS = ("<pad>", "<unk>", "<s>", "</s>")


@dataclass(frozen=True)
class Vocabulary:
    """Whole words as tokens: `words[i]` is token i."""

    words: tuple[str, ...]

    @classmethod
    def of(cls, texts: Sequence[Sequence[str]], min_count: int = 1) -> Vocabulary:
        """The words that occur at least `min_count` times in `texts`, the most frequent first."""
        counts = Counter(word for text in texts for word in text)
        return cls((*SPECIAL_TOKENS, *(word for word, n in counts.most_common() if n >= min_count)))

    def encode(self, texts: Sequence[Sequence[str]]) -> Tensor:
        """Token ids [texts, longest], `<s>` before and `</s>` after each text, `<pad>` at the end."""
        ids = {word: i for i, word in enumerate(self.words)}
        rows = [[START, *(ids.get(word, UNKNOWN) for word in text), END] for text in texts]
        width = max(map(len, rows))
        return torch.tensor([row + [PAD] * (width - len(row)) for row in rows])

    def words_of(self, tokens: Tensor) -> list[str]:
        return [self.words[i] for i in tokens.tolist()]

    def decode(self, tokens: Tensor) -> str:
        """The text of `tokens` [m], up to its end, the first word (the label) followed by a colon."""
        words = [word for word in self.words_of(tokens) if word not in ("<pad>", "<s>", "</s>")]
        return f"{words[0]}: {' '.join(words[1:])}" if words else ""


def without_padding(text: Tensor) -> Tensor:
    """`text` [m] as a batch of one, [1, tokens], without its padding."""
    return text[None, text != PAD]


def build_model(vocabulary: int, hidden: int, layers: int, seed: int) -> LlamaForCausalLM:
    """A Llama of random weights with four heads."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers}
    ids = {"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END}
    config = LlamaConfig(vocab_size=vocabulary, num_attention_heads=4, max_position_embeddings=128, **sizes, **ids)
    return LlamaForCausalLM(config)


def copy_model(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A copy of `model` with weights of its own."""
    return copy.deepcopy(model)


def _update(optimizer: torch.optim.Optimizer, loss: Tensor) -> float:
    """Take a step down `loss`; returns its value."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def train_on_texts(model: LlamaForCausalLM, tokens: Tensor, steps: int, seed: int, batch: int = 32) -> list[float]:
    """Cross-entropy of the next token with Adam; returns the loss of every step, in nats a token."""
    draw = torch.Generator().manual_seed(seed)
    optimizer, history = torch.optim.AdamW(model.parameters(), 3e-3), []
    for _ in range(steps):
        rows = tokens[torch.randint(len(tokens), (batch,), generator=draw)]
        real = rows[:, 1:] != PAD
        values = losses.cross_entropy(model(rows).logits[:, :-1][real], rows[:, 1:][real])
        history.append(_update(optimizer, losses.reduce(values, None, int(real.sum()))))
    return history


@torch.no_grad()
def sample(model: LlamaForCausalLM, prompts: Tensor, length: int, seed: int) -> Tensor:
    """`prompts` [n, m] with up to `length` more tokens each, drawn at temperature 1; `<pad>` after the end."""
    draw, tokens = torch.Generator().manual_seed(seed), prompts
    ended = torch.zeros(len(prompts), dtype=torch.bool)
    for _ in range(length):
        logits = model(tokens).logits[:, -1]
        logits[:, [PAD, UNKNOWN, START]] = -torch.inf
        new = torch.multinomial(logits.softmax(-1), 1, generator=draw)[:, 0].where(~ended, torch.tensor(PAD))
        tokens, ended = torch.cat([tokens, new[:, None]], 1), ended | (new == END)
    return tokens


@torch.no_grad()
def jsd_per_token(student: LlamaForCausalLM, teacher: LlamaForCausalLM, tokens: Tensor, beta: float = 0.5) -> list:
    """For each text [n, m] the JSD of the next-token distributions at each of its tokens, in nats; padding left out."""
    logits, logprobs = student(tokens).logits[:, :-1], teacher(tokens).logits[:, :-1].log_softmax(-1)
    real = tokens[:, 1:] != PAD
    return [losses.jsd(z[m], p[m], beta=beta).numpy() for z, p, m in zip(logits, logprobs, real, strict=True)]


def distill(
    student: LlamaForCausalLM,
    teacher: LlamaForCausalLM,
    source: Tensor,
    steps: int,
    on_policy: bool,
    seed: int,
    batch: int = 24,
) -> list[float]:
    """Minimize the JSD to the teacher; returns the loss of every step, in nats a token.

    source: texts [n, m] to learn from; on-policy, prompts that the student continues anew at every step.
    """
    draw = torch.Generator().manual_seed(seed)
    optimizer, history = torch.optim.AdamW(student.parameters(), 3e-3), []
    for step in range(steps):
        rows = source[torch.randint(len(source), (batch,), generator=draw)]
        rows = sample(student, rows, 14, seed + step) if on_policy else rows
        with torch.no_grad():
            logprobs = teacher(rows).logits[:, :-1].log_softmax(-1)
        real = rows[:, 1:] != PAD
        values = losses.jsd(student(rows).logits[:, :-1][real], logprobs[real])
        history.append(_update(optimizer, losses.reduce(values, None, int(real.sum()))))
    return history


def two_modes(size: int) -> Tensor:
    """Log-probabilities [size] of a distribution with one peak at a quarter and one at three quarters."""
    at = torch.arange(size).double()
    peaks = torch.exp(-((at - size / 4) ** 2) / 8) + 0.8 * torch.exp(-((at - 3 * size / 4) ** 2) / 8)
    return (peaks + 1e-4).log().log_softmax(-1)


def fit_one_peak(teacher_logprobs: Tensor, beta: float, steps: int = 400) -> list[float]:
    """Probabilities [size] of the bell curve that minimizes the scaled JSD to the teacher."""
    at = torch.arange(len(teacher_logprobs)).double()
    middle, log_width = (torch.tensor(x, dtype=torch.double, requires_grad=True) for x in (12.0, 1.5))
    optimizer = torch.optim.Adam([middle, log_width], 0.1)
    for _ in range(steps):
        logits = -((at - middle) ** 2) / (2 * torch.exp(2 * log_width))
        loss = losses.jsd(logits[None], teacher_logprobs[None], beta=beta, scaled=True).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return logits.softmax(-1).tolist()
