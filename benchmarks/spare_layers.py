"""Which layers can SmolLM2 do without, as a language model?

    PYTHONPATH=src python benchmarks/spare_layers.py [layers to keep, 15 by default] [sentences, 12 by default]

Layers are left out one by one, each time the one whose absence costs the least, measured in nats a token of next-token
loss on unlabelled sentences (the pool of the finance corpus), without any training. Beside it: as many first
layers, and as many of both ends.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from distillery.config.load import load_params
from distillery.data.prepare import prepare_source
from distillery.errors import UserError
from distillery.files import repository_root
from distillery.models.fetch import fetch_model
from distillery.models.load import load_model, load_tokenizer
from distillery.tasks.schema import load_task


class Reader:
    """A causal language model as a list of layers to choose from, and the sentences that it is to predict."""

    def __init__(self, folder: object, texts: list[str]):
        tokenizer = load_tokenizer(folder)
        self.whole = load_model(folder, "causal").eval()
        self.layers = list(self.whole.model.layers)
        ids = [tokenizer(text)["input_ids"] for text in texts]
        length = max(map(len, ids))
        here = self.whole.device
        rows = [row + [0] * (length - len(row)) for row in ids]  # causal: what follows changes nothing
        tokens = torch.tensor(rows, device=here)
        real = torch.tensor([[k < len(row) for k in range(length)] for row in ids], device=here)
        self.wanted, self.next = real[:, 1:], tokens[:, 1:][real[:, 1:]]
        self.first = self.whole.model.embed_tokens(tokens)
        self.places = torch.arange(length, device=here)[None]
        self.turns = self.whole.model.rotary_emb(self.first, self.places)
        self.mask = torch.full((length, length), float("-inf"), device=here).triu(1)[None, None]

    def through(self, state: Tensor, layers: list[int]) -> Tensor:
        for i in layers:
            state = self.layers[i](
                state, attention_mask=self.mask, position_embeddings=self.turns, position_ids=self.places
            )
        return state

    def nats(self, layers: list[int], state: Tensor | None = None) -> float:
        """Cross-entropy a token when `state`, or the token vectors, pass the layers `kept`."""
        state = self.through(self.first if state is None else state, layers)
        state = self.whole.model.norm(state[:, :-1][self.wanted])
        return float(nn.functional.cross_entropy(self.whole.lm_head(state), self.next))


@torch.no_grad()
def main(keep: int = 15, sentences: int = 12) -> None:
    params, root = load_params(), repository_root()
    spec = params.data["finance"]
    prepared = prepare_source("finance", spec, load_task(spec.task, root / "tasks"), root)
    texts = prepared.rows["text"][prepared.split == "pool"].head(sentences).tolist()
    reader = Reader(fetch_model("smollm2", params.models["smollm2"]), texts)
    depth = len(reader.layers)
    layers = list(range(depth))
    print(f"{len(texts)} sentences, {len(reader.next)} tokens\n")
    print("| layers | nats a token | first layers | both ends | left |")
    print("|--:|--:|--:|--:|---|")
    print(f"| {depth} | {reader.nats(layers):.2f} | | | all |", flush=True)
    while len(layers) > keep:
        state, costs = reader.first, []
        for place, layer in enumerate(layers):
            costs.append((reader.nats(layers[place + 1 :], state), layer))
            state = reader.through(state, [layer])
        cost, layer = min(costs)
        layers.remove(layer)
        n = len(layers)
        ends = list(range((n + 1) // 2)) + list(range(depth - n // 2, depth))
        others = f"{reader.nats(list(range(n))):.2f} | {reader.nats(ends):.2f}"
        print(f"| {n} | {cost:.2f} | {others} | {', '.join(map(str, layers))} |", flush=True)


if __name__ == "__main__":
    try:
        main(*map(int, sys.argv[1:]))
    except UserError as mistake:
        sys.exit(f"error: {mistake}")
