"""How are the rows of each architecture computed, and how far from its plain forward pass?

    PYTHONPATH=src python benchmarks/architectures.py

Prints a markdown table over the tiny random models of `tests/architectures.py`. A difference is the largest one of a
completion's log-likelihood (nats) from one forward pass of `transformers` a row, over rows of 5 to 36 tokens with three
completions each. Unchecked: every model that takes token trees is packed, and logits are what the output head gives.
Checked: by the methods that `models/forward_check.py` chose. Greedy: rows whose six tokens are those of plain passes.
"""

import contextlib
import io
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from architectures import (
    ARCHITECTURES,
    END,
    PAD,
    WINDOW,
    drawn_rows,
    plain_greedy,
    plain_log_probabilities,
    random_model,
)
from distillery.models.forward_check import check_forward
from distillery.models.forward_methods import ForwardMethods
from distillery.models.generation import end_tokens, generate_batch
from distillery.models.packed.decoding import compute_prefix_kv
from distillery.models.runtime import configure_runtime
from distillery.models.scoring import causal_token_logits

VOCABULARY, PREFIX, NEW_TOKENS = 97, 3, 6
ROWS = drawn_rows(VOCABULARY, 5, 7, 4, WINDOW + 20)
COMPLETIONS = [[[8], [9, 10], [9, 11, END]]] * len(ROWS)
TOKENIZER = SimpleNamespace(pad_token_id=PAD, eos_token_id=END)  # all that is read of one


@torch.no_grad()
def largest_difference(model: torch.nn.Module, expected: torch.Tensor, methods: ForwardMethods) -> str:
    """From the `expected` log-likelihoods of all completions, as a cell of the table."""
    try:
        tokens = causal_token_logits(model, ROWS, COMPLETIONS, (), None, methods)
    except Exception as problem:
        return f"fails: {(str(problem).splitlines() or [''])[0]}"
    scores = tokens.logits.log_softmax(-1)[tokens.index, tokens.target_ids]
    likelihoods = torch.zeros(len(expected)).index_add(0, tokens.completion_index, scores)
    return f"{float((likelihoods - expected).abs().max()):.1e}"


def unchecked_difference(model: torch.nn.Module, expected: torch.Tensor) -> str:
    """As :func:`largest_difference`, of token trees that refuse no layer and of the output head alone."""
    with (
        patch("distillery.models.packed.attention._check_plain_attention"),
        patch("distillery.models.packed.hidden.above_frozen_layers", lambda *_: contextlib.nullcontext(0)),
    ):
        return largest_difference(model, expected, ForwardMethods())


def table_row(name: str) -> list[str]:
    """The cells of architecture `name`."""
    model = random_model(name, VOCABULARY)
    with torch.no_grad():
        likelihoods = [
            plain_log_probabilities(model, row, tokens)[range(len(tokens)), tokens].sum()
            for row, completions in zip(ROWS, COMPLETIONS, strict=True)
            for tokens in completions
        ]
    expected, printed = torch.stack(likelihoods), io.StringIO()
    with contextlib.redirect_stdout(printed):
        length = max(map(len, ROWS)) + NEW_TOKENS
        methods = check_forward(model, TOKENIZER, length, contextlib.nullcontext)
    with torch.no_grad():
        prefix_kv = compute_prefix_kv(model, ROWS[0][:PREFIX]) if methods.generation == "packed" else None
        settings = {"max_new_tokens": NEW_TOKENS, "temperature": 0.0} | end_tokens(model, TOKENIZER)
        generated = generate_batch(model, ROWS, prefix_kv, methods, **settings)
    equal = sum(tokens == plain_greedy(model, row, NEW_TOKENS) for tokens, row in zip(generated, ROWS, strict=True))
    head = "direct" if methods.direct_head else "the model's"
    differences = [unchecked_difference(model, expected), largest_difference(model, expected, methods)]
    why = printed.getvalue().strip().partition("; ")[2]
    return [name, methods.scoring, methods.generation, head, *differences, f"{equal} of {len(ROWS)}", why]


def main() -> None:
    configure_runtime()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, float32\n")
    print("| architecture | scoring | generation | head | unchecked | checked | greedy | why not the faster methods |")
    print("|---|---|---|---|--:|--:|--:|---|")
    for name in ARCHITECTURES:
        print("| " + " | ".join(table_row(name)) + " |", flush=True)


if __name__ == "__main__":
    main()
