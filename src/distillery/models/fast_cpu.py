"""Faster training of small encoders on a CPU: cheap dropout, and gradients of the used embeddings alone."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class BitDropout(nn.Dropout):
    """`nn.Dropout` that on a CPU takes 16 bits of the random generator for an element; torch draws a number for each,
    which took a tenth of a small encoder's step. p is rounded to a multiple of 1 / 65,536."""

    def forward(self, input: Tensor) -> Tensor:
        threshold = round(self.p * 2**16)
        if not self.training or not 0 < threshold < 2**16 or input.device.type != "cpu":
            return super().forward(input)
        bits = torch.empty(-(-input.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        keep = bits.view(torch.int16)[: input.numel()].view(input.shape) >= threshold - 2**15
        return input * keep.to(input.dtype).mul_(2**16 / (2**16 - threshold))


def use_bit_dropout(model: nn.Module) -> None:
    """Replace every `nn.Dropout` in `model` by :class:`BitDropout`."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, BitDropout(child.p))


class PartialEmbedding(nn.Module):
    """An embedding of which only the rows `ids` are trained.

    No other row has a gradient, so the gradient, AdamW's two states and their passes over memory hold these rows alone.
    A small encoder's vocabulary is most of its weights, and the texts of a phase use a part of it: of MiniLM's 30,522
    words this project's finance corpus has 7,459, 320 rows of it 2,918.

    While gradients are recorded, input_ids must be among `ids`; otherwise any token is read. Weight decay leaves the
    other rows alone: it holds down only trained weights.
    """

    def __init__(self, embedding: nn.Embedding, ids: Iterable[int]):
        super().__init__()
        weight = embedding.weight.detach()
        device = weight.device
        trained = torch.tensor(sorted(set(ids)), device=device)
        row_of = torch.full((embedding.num_embeddings,), -1, device=device)  # id -> index in `rows`
        row_of[trained] = torch.arange(len(trained), device=device)
        padding = embedding.padding_idx
        # the padding token's row, which gets no gradient
        self.padding = None if padding is None or row_of[padding] < 0 else int(row_of[padding])
        self.full = embedding.requires_grad_(False)
        whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight  # of a model in shards
        self.rows = nn.Parameter(whole[trained])
        self.register_buffer("trained", trained, persistent=False)
        self.register_buffer("row_of", row_of, persistent=False)

    @property
    def weight(self) -> Tensor:
        """[vocabulary, d], without a gradient; trained rows are not in it before :meth:`merged`."""
        return self.full.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return nn.functional.embedding(self.row_of[input_ids], self.rows, self.padding)
        return self.merged()(input_ids)

    @torch.no_grad()
    def merged(self) -> nn.Embedding:
        """The full embedding, with the trained rows written into it."""
        self.full.weight[self.trained] = self.rows
        return self.full


def train_used_embeddings(model: PreTrainedModel, ids: Iterable[int]) -> None:
    """Train only the rows `ids` of the input embedding, if it is trained at all; see :class:`PartialEmbedding`."""
    if model.config.is_encoder_decoder:
        return  # its embedding is shared by encoder and decoder
    embedding = model.get_input_embeddings()
    if type(embedding) is nn.Embedding and embedding.weight.requires_grad:
        model.set_input_embeddings(PartialEmbedding(embedding, ids))


def restore_full_embedding(model: PreTrainedModel) -> None:
    """Undo :func:`train_used_embeddings`; the trained rows stay."""
    embedding = model.get_input_embeddings()
    if isinstance(embedding, PartialEmbedding):
        model.set_input_embeddings(embedding.merged().requires_grad_())
