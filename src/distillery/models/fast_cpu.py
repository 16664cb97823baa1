"""Faster training of small encoders on a CPU: cheap dropout, and gradients of the used embeddings alone."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
)


class BitDropout(nn.Dropout):
    """`nn.Dropout` that on a CPU takes 16 bits of the generator for an element, where torch draws a number for each:
    of a small encoder's step that was a tenth. p is rounded to a 65,536th."""

    def forward(self, input: Tensor) -> Tensor:
        dropped = round(self.p * 2**16)
        if not self.training or not 0 < dropped < 2**16 or input.device.type != "cpu":
            return super().forward(input)
        bits = torch.empty(-(-input.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        keep = bits.view(torch.int16)[: input.numel()].view(input.shape) >= dropped - 2**15
        return input * keep.to(input.dtype).mul_(2**16 / (2**16 - dropped))


def use_bit_dropout(model: nn.Module) -> None:
    """Replace every `nn.Dropout` in `model` by :class:`BitDropout`."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, BitDropout(child.p))


class PartialEmbedding(nn.Module):
    """An embedding of which only the rows of `ids` are trained: no other row has a gradient, so gradient, AdamW's two
    states and their passes over memory need hold no other. A small encoder's vocabulary is most of its weights, and
    the texts of a phase use a part of it: of MiniLM's 30,522 words this project's finance corpus has 7,459, 320 rows
    of it 2,918.

    While gradients are recorded, input_ids must be of `ids`; otherwise any token is read. Weight decay leaves the
    other rows alone: it holds down what is trained.
    """

    def __init__(self, embedding: nn.Embedding, ids: Iterable[int]):
        super().__init__()
        device = embedding.weight.device
        used = torch.tensor(sorted(set(ids)), device=device)
        slot = torch.full((embedding.num_embeddings,), -1, device=device)
        slot[used] = torch.arange(len(used), device=device)
        padding = embedding.padding_idx
        self.padding = None if padding is None or slot[padding] < 0 else int(slot[padding])  # it has no gradient
        self.whole = embedding.requires_grad_(False)
        self.rows = nn.Parameter(embedding.weight.detach()[used])
        self.register_buffer("used", used, persistent=False)
        self.register_buffer("slot", slot, persistent=False)

    @property
    def weight(self) -> Tensor:
        """[vocabulary, d], not trained itself: what has been learned is not in it before :meth:`written`."""
        return self.whole.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return nn.functional.embedding(self.slot[input_ids], self.rows, self.padding)
        return self.written()(input_ids)

    @torch.no_grad()
    def written(self) -> nn.Embedding:
        """The embedding with what has been learned written into it."""
        self.whole.weight[self.used] = self.rows
        return self.whole


def train_used_embeddings(model: PreTrainedModel, ids: Iterable[int]) -> None:
    """Train only the rows `ids` of the input embedding, if it is trained at all; see :class:`PartialEmbedding`."""
    if model.config.is_encoder_decoder:
        return  # its embedding is shared by encoder and decoder
    embedding = model.get_input_embeddings()
    if type(embedding) is nn.Embedding and embedding.weight.requires_grad:
        model.set_input_embeddings(PartialEmbedding(embedding, ids))


def restore_full_embedding(model: PreTrainedModel) -> None:
    """Undo :func:`train_used_embeddings`; what has been learned stays."""
    if isinstance(seen := model.get_input_embeddings(), PartialEmbedding):
        model.set_input_embeddings(seen.written().requires_grad_())
