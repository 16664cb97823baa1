"""Distillation losses: pure functions of tensors, in nats, one value per supervised position.

Space. A row of a divergence is one supervised position with K outcomes: the K labels of an example, or the K tokens of
a vocabulary at one position of a completion. The formulas are the same. Other terms compare hidden states.

Denominator. A term returns one value per row. :func:`reduce` sums them and divides by the number of supervised
positions of the *whole optimizer step*, so micro-batches of any size add up to the gradient of the whole batch.

Precision. float32 whatever the model's dtype (float64 if the student's logits are float64). A teacher's probability may
be 0 (log-probability -inf): its logarithm is held at `LOG_FLOOR`, the smallest normal float32, so that the terms which
divide by it stay finite. A student's logits must be finite: exclude an outcome with a large negative one such as -1e4.

Errors. Shapes are checked everywhere, values on a CPU alone: a GPU would have to be waited for at every step. It is
waited for where a `mask` leaves rows out.
"""

from distillery.losses.balance import balanced_weights
from distillery.losses.combine import combine_terms, reduce
from distillery.losses.divergences import (
    DISTRIBUTION_TERMS,
    LOG_FLOOR,
    cross_entropy,
    jsd,
    kl,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    temperature_factor,
    tvd,
)
from distillery.losses.hidden_states import (
    attention_transfer_maps,
    cosine_embedding,
    hidden_mse,
    pair_layers,
    pkd,
)
from distillery.losses.multi_teacher import confidence_weights, mix_teachers
from distillery.losses.regularizers import shortcut_penalty
from distillery.losses.two_outcomes import two_outcome_logits, two_outcome_probabilities
from distillery.losses.vocabulary import (
    kl_sampled_rest,
    kl_top_k,
    merge_rest,
    shared_vocabulary,
    to_top_k,
    universal_logit_distance,
)

__all__ = [
    "DISTRIBUTION_TERMS",
    "LOG_FLOOR",
    "attention_transfer_maps",
    "balanced_weights",
    "combine_terms",
    "confidence_weights",
    "cosine_embedding",
    "cross_entropy",
    "hidden_mse",
    "jsd",
    "kl",
    "kl_sampled_rest",
    "kl_top_k",
    "merge_rest",
    "mix_teachers",
    "pair_layers",
    "pkd",
    "reduce",
    "reverse_kl",
    "shared_vocabulary",
    "shortcut_penalty",
    "skew_kl",
    "skew_reverse_kl",
    "temperature_factor",
    "to_top_k",
    "tvd",
    "two_outcome_logits",
    "two_outcome_probabilities",
    "universal_logit_distance",
]
