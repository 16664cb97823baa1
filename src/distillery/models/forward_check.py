"""Choose how the rows of a causal model are computed: by the fastest method that equals its plain forward pass.

Token trees know attention with positions and nothing else. State-space and convolution layers, sliding windows,
attention sinks and whatever the next architecture brings would give other probabilities without an error. So each
method is compared with the forward pass of `transformers` before it is used.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distillery.files import Paths, repository_root, write_json
from distillery.fingerprint import code_digest
from distillery.models.devices import cpu_model
from distillery.models.forward_methods import ForwardMethods
from distillery.models.generation import end_tokens, generate_batch
from distillery.models.head import head_is_direct
from distillery.models.int8 import is_int8, rounding_error
from distillery.models.layers import transformer_body
from distillery.models.packed.attention import supports_token_trees
from distillery.models.packed.decoding import compute_prefix_kv
from distillery.models.scoring import TokenLogits, causal_token_logits, plain_token_logits
from distillery.models.undisturbed import undisturbed

PREFIX = 4  # tokens that all compared rows begin with
SHORT_ROWS = (8, 5)  # tokens of the compared rows beside the long one
NEW_TOKENS = 2  # that each method generates after a row
MIN_LENGTH = 64  # tokens of the long row; powers of two from here on, so that few lengths are compared
POSITION_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len")  # keys of a config

KEEP_CHECKS = "DISTILLERY_KEEP_CHECKS"  # an environment variable that stages have

_checked: dict[tuple[str, ...], ForwardMethods] = {}  # of this process


def check_forward(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> ForwardMethods:
    """The fastest methods whose results for rows of up to `length` tokens are those of `model`'s plain forward pass.

    Compares log-probabilities over the vocabulary at short rows and at one of `length` tokens, and greedy tokens: once
    a process for models of equal config and precision, and again for longer rows. A method that differs beyond rounding
    is not used, and a line is printed. Random state, gradients and modes of `model` stay as they are. The stages of a
    run share what they found, see :class:`_StoredChecks`.

    autocast: gives the context in which the model runs.
    """
    config, weights = transformer_body(model).config, next(model.parameters())
    device = weights.device.type
    if device == "meta":  # nothing can be compared
        method = "packed" if supports_token_trees(model) else "padded"
        return ForwardMethods(method, method, length=length)
    with autocast():
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weights.dtype
    # a trainer sets `use_cache`, which each method passes itself
    settings = {name: value for name, value in json.loads(config.to_json_string()).items() if name != "use_cache"}
    key = (json.dumps(settings), str(weights.dtype), str(dtype), device, str(is_int8(model)))
    known = _checked.get(key)
    if known is not None and length <= known.length:
        return known
    store = _StoredChecks(key, custom_code=hasattr(config, "auto_map"))
    methods, differences = store.read(length)
    if methods is None:
        with undisturbed(model), autocast():
            torch.set_autocast_cache_enabled(False)  # weights narrowed without gradients would serve the training
            compared = _ComparedRows(model, _compared_length(config, length), dtype, end_tokens(model, tokenizer))
            methods, differences = compared.choose_methods(length), compared.differences
        store.write(methods, differences)
    if differences:
        print(
            f"{config.model_type}: rows are scored {methods.scoring} and continued {methods.generation}; "
            f"{'; '.join(differences)}",
            flush=True,
        )
    _checked[key] = methods
    return methods


class _StoredChecks:
    """The methods of models of one config and precision, in a file of the run that all its stages read.

    Where :data:`KEEP_CHECKS` is not set, and for models with code of their own, nothing is read or written.
    """

    def __init__(self, key: tuple[str, ...], custom_code: bool):
        self.path = None
        if os.environ.get(KEEP_CHECKS) and not custom_code:
            self.path = Paths(repository_root()).cache / "forward_methods.json"
            versions = [code_digest("models"), version("torch"), version("transformers")]
            computation = [*versions, cpu_model(), torch.get_num_threads()]
            self.key = hashlib.sha256(json.dumps([*key, *computation]).encode()).hexdigest()

    def _records(self) -> dict[str, Any]:
        return json.loads(self.path.read_text()) if self.path and self.path.exists() else {}

    def read(self, length: int) -> tuple[ForwardMethods | None, list[str]]:
        """The kept methods for rows of up to `length` tokens, if there are any, and a phrase for each other method."""
        record = self._records().get(self.key) if self.path else None
        if record is None or record["methods"]["length"] < length:
            return None, []
        return ForwardMethods(**record["methods"]), record["differences"]

    def write(self, methods: ForwardMethods, differences: list[str]) -> None:
        """Keep `methods`, and the phrases `differences` on the others."""
        if self.path:
            record = {"methods": asdict(methods), "differences": differences}
            write_json(self.path, self._records() | {self.key: record})


def _compared_length(config: Any, length: int) -> int:
    """The next power of two from `length` on, or the model's highest length where that is less."""
    limits = [getattr(config, key, None) for key in POSITION_LIMITS]
    return min([max(MIN_LENGTH, 2 ** math.ceil(math.log2(length))), *(limit for limit in limits if limit)])


class _ComparedRows:
    """Rows of drawn tokens, two short ones and one of `length` tokens, with their plain log-probabilities.

    differences: a phrase for each method that cannot be used.
    """

    def __init__(self, model: PreTrainedModel, length: int, dtype: torch.dtype, ends: dict[str, Any]):
        self.model, self.length, self.end_tokens = model, length, ends
        self.differences: list[str] = []
        size = model.get_input_embeddings().weight.shape[0]
        # special tokens stand at the ends of a vocabulary
        tokens = torch.randint(size // 8, size // 2, (2 * length,), generator=torch.Generator().manual_seed(0)).tolist()
        prefix, starts = tokens[:PREFIX], (PREFIX, length // 2)
        self.prompts = [prefix + tokens[i : i + n - PREFIX] for i, n in zip(starts, SHORT_ROWS, strict=True)]
        self.prompts.append(prefix + tokens[length : 2 * length - PREFIX - 1])
        self.completions = [[tokens[-1:], tokens[-3:]], [tokens[-1:]], [tokens[-2:]]]
        self.direct_head = head_is_direct(model, self.prompts[0])
        self.reference = _log_probabilities(plain_token_logits(model, self.prompts, self.completions, ()))
        self.prefix_kv: Any = None
        # rounding errors of many operations add up; the known faults are larger by far
        self.tolerance = rounding_error(model, dtype) ** 0.75 * float(self.reference.abs().max())

    def choose_methods(self, length: int) -> ForwardMethods:
        """The methods to use for rows of up to `length` tokens."""
        candidates = ["packed", "padded"] if supports_token_trees(self.model) else ["padded"]
        scoring = self._first_equal(candidates, self._scoring_error)
        if scoring != "packed":
            candidates = ["padded"]  # generation by trees packs the prompts, too
        generation = self._first_equal(candidates, self._generation_error)
        return ForwardMethods(scoring, generation, self.direct_head, max(length, self.length))

    def _first_equal(self, candidates: Sequence[str], error: Callable[[str], float]) -> str:
        for method in candidates:
            try:
                difference = error(method)
            except Exception as problem:  # whatever an architecture raises at rows that it cannot take
                reason = (str(problem).splitlines() or [type(problem).__name__])[0]
                self.differences.append(f"not {method}: {reason}")
                continue
            if difference <= self.tolerance:
                return method
            self.differences.append(f"not {method}: {difference:.2g} nats from its plain forward pass")
        return "plain"

    def _scoring_error(self, method: str) -> float:
        """The difference of log-probabilities by `method` from the plain ones, in nats."""
        methods = ForwardMethods(scoring=method, direct_head=self.direct_head)
        tokens = causal_token_logits(self.model, self.prompts, self.completions, (), None, methods)
        error = _difference(_log_probabilities(tokens), self.reference)
        if method == "packed" and error <= self.tolerance:  # then also with the prefix computed before
            n, self.prefix_kv = len(SHORT_ROWS), compute_prefix_kv(self.model, self.prompts[0][:PREFIX])
            rows = self.prompts[:n], self.completions[:n]
            values = _log_probabilities(causal_token_logits(self.model, *rows, (), self.prefix_kv, methods))
            error = max(error, _difference(values, self.reference[: len(values)]))
        return error

    def _generation_error(self, method: str) -> float:
        """The difference of log-probabilities at the tokens that `method` generates from the plain ones, in nats."""
        packed, steps = method == "packed", []
        rows = self.prompts[: len(SHORT_ROWS)] if packed else self.prompts
        prompts = [prompt[: self.length - NEW_TOKENS] for prompt in rows]
        settings = {"max_new_tokens": NEW_TOKENS, "temperature": 0.0, "step_logits": steps} | self.end_tokens
        if packed:  # each step then has the logits of every row
            settings["end_token_ids"] = set()
        methods = ForwardMethods(generation=method, direct_head=self.direct_head)
        generated = generate_batch(self.model, prompts, self.prefix_kv if packed else None, methods, **settings)
        values = torch.stack([steps[k][i] for i, row in enumerate(generated) for k in range(len(row))])
        reference = plain_token_logits(self.model, prompts, [[row] for row in generated], ())
        return _difference(values.float().log_softmax(-1), _log_probabilities(reference))


def _log_probabilities(tokens: TokenLogits) -> Tensor:
    """[n, vocabulary] at the n tokens of completions."""
    return tokens.logits.log_softmax(-1)[tokens.index]


def _difference(values: Tensor, reference: Tensor) -> float:
    """The root mean square over the vocabulary of values - reference [n, vocabulary], at the worst of the n tokens.

    The largest difference at any token of the vocabulary would be mostly rounding: in bfloat16 half a nat.
    """
    return float((values - reference).nan_to_num(nan=torch.inf).square().mean(-1).sqrt().max())
