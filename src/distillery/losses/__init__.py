"""Distillation losses: pure functions of tensors, in nats, one value per supervised position.

Two spaces. A row of a *distribution term* is one supervised position with K outcomes: the K labels of an example
(exact and small), or the K tokens of a vocabulary at one completion position. No formula depends on which; each
docstring says where the term is meant to be used. `representation` terms compare hidden states instead.

One denominator. A term returns one value per row; :func:`reduce` sums them and divides by the number of supervised
positions of the *whole optimizer step*, all accumulated micro-batches together. Micro-batches of any size then add up
to the gradient of the one big batch.

Numbers. Everything is computed in float32 (float64 if the student's logits are float64), whatever the model's dtype.
A teacher's probability may be exactly 0 (log-probability -inf). Its logarithm is held at `LOG_FLOOR`, the smallest
normal float32, so that the terms which divide by it (`reverse_kl`, and `skew_reverse_kl` at `alpha` 0) stay finite.
A student's logits must be finite: exclude an outcome with a large negative number such as -1e4.
"""

from distillery.losses.combine import combine_terms, reduce
from distillery.losses.divergences import (
    DISTRIBUTION_TERMS,
    DIVERGENCE_FUNCTIONS,
    IGNORE_INDEX,
    LOG_FLOOR,
    cross_entropy,
    jsd,
    kl,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    temper,
    temperature_factor,
    tvd,
)
from distillery.losses.hidden_states import (
    attention_transfer,
    attention_transfer_maps,
    cosine_embedding,
    hidden_mse,
    pair_layers,
    pkd,
)
from distillery.losses.multi_teacher import confidence_weights, mix_teachers
from distillery.losses.regularizers import multitask, shortcut_penalty
from distillery.losses.vocabulary import (
    MAX_VOCABULARY_PADDING,
    kl_top_k,
    shared_vocabulary,
    to_top_k,
    top_k_error,
    universal_logit_distance,
)

__all__ = [
    "DISTRIBUTION_TERMS",
    "DIVERGENCE_FUNCTIONS",
    "IGNORE_INDEX",
    "LOG_FLOOR",
    "MAX_VOCABULARY_PADDING",
    "attention_transfer",
    "attention_transfer_maps",
    "combine_terms",
    "confidence_weights",
    "cosine_embedding",
    "cross_entropy",
    "hidden_mse",
    "jsd",
    "kl",
    "kl_top_k",
    "mix_teachers",
    "multitask",
    "pair_layers",
    "pkd",
    "reduce",
    "reverse_kl",
    "shared_vocabulary",
    "shortcut_penalty",
    "skew_kl",
    "skew_reverse_kl",
    "temper",
    "temperature_factor",
    "to_top_k",
    "top_k_error",
    "tvd",
    "universal_logit_distance",
]
