"""How the kept tokens of a teacher lie on the disk: ids in the fewest bytes, log-probabilities in one byte.

A byte stands for a log-probability from 0 down to `LOWEST`, in steps that grow with its square root: the largest
probabilities, on which a divergence rests, have the smallest steps. The error is at most
`sqrt(-LOWEST * -logprob) / LEVELS` nats, 0.02 at a probability of 1/e and 0.05 at 1/1000.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

LOWEST = -24.0  # nats; a token below it is kept as likely as this, 4e-11
LEVELS = 255


def id_type(vocabulary: int) -> type[np.unsignedinteger]:
    """The smallest integer type that holds the ids of a `vocabulary` of this size."""
    return np.uint16 if vocabulary <= 2**16 else np.uint32


def encode_logprobs(logprobs: np.ndarray) -> np.ndarray:
    """`logprobs`, at most 0, as bytes of the same shape."""
    share = np.clip(logprobs.astype(np.float32), LOWEST, 0) / LOWEST
    return np.rint(LEVELS * np.sqrt(share)).astype(np.uint8)


def decode_logprobs(codes: np.ndarray) -> np.ndarray:
    """float32 log-probabilities of :func:`encode_logprobs`."""
    return np.float32(LOWEST) * np.square(codes.astype(np.float32) / LEVELS)


def scaled_to_tail(values: Tensor, log_tail: Tensor) -> Tensor:
    """`values` [n, k], log-probabilities, so that their mass and that of the tail [n] are 1 together."""
    mass = torch.log1p(-log_tail.double().exp()).clamp_min(torch.finfo(torch.float32).min)
    return values + (mass - values.double().logsumexp(-1)).float()[:, None]


def sample_rest(logprobs: Tensor, indices: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """`count` tokens drawn from the tail of each row in proportion to their probability, and the tail's entropy.

    The draws are systematic (Madow 1949): equal steps through the cumulated probability, from one random start. Each
    token is drawn as often as independent draws would draw it on average, and the mean over the sample varies less.

    Args: logprobs: [n, K]; indices: [n, k], the tokens that are kept and not drawn.
    Returns: (ids [n, count] int64, entropy [n] in nats; 0 where nothing is left).
    Source: Anshumann et al. 2025, "Sparse Logit Sampling", for the unbiased estimate from sampled tokens.
    """
    tail = logprobs.double().scatter(1, indices, -torch.inf).log_softmax(-1).nan_to_num(nan=-torch.inf)
    p = tail.exp()
    entropy = -(p * tail.clamp_min(torch.finfo(torch.float64).min)).sum(-1)
    generator = torch.Generator().manual_seed(seed)
    start = torch.rand(len(p), 1, generator=generator, dtype=torch.float64).to(p.device)
    points = (torch.arange(count, dtype=torch.float64, device=p.device) + start) / count
    cumulated = p.cumsum(-1)
    drawn = torch.searchsorted(cumulated, points * cumulated[:, -1:], right=True)
    return drawn.clamp_max(p.shape[1] - 1), entropy
