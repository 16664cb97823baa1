"""Forward and backward passes of a causal model's layers as recorded CUDA graphs.

A GPU computes the layers of a short sequence in less time than a CPU needs to start their kernels one by one. A
recorded pass starts all of its kernels at once. It reads its inputs at fixed places, so there is one for each length.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from distillery.models.layers import transformer_body
from distillery.models.packed.attention import FUSED_TOKENS, supports_token_trees
from distillery.models.packed.frozen_layers import FrozenStates, run_body
from distillery.models.packed.token_tree import TokenTree

RECORDING_DEVICES = ("cuda",)
TOKENS_MULTIPLE = 128  # sequences are filled up to multiples of it, so that few lengths are recorded
MAX_GRADIENT_BYTES = 2**30  # each recorded pass keeps gradients of its own


def capture(compute: Callable[[], list[Tensor]], pool: Any) -> tuple[list[Tensor], Callable[[], None], Any]:
    """What `compute` returns, a function that computes it anew in place by one launch, and the pool of its memory."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        results = compute()
    return results, graph.replay, graph.pool()


@cache
def _side_stream() -> torch.cuda.Stream:
    """One for all: libraries keep memory for each stream."""
    return torch.cuda.Stream()


def on_side_stream(compute: Callable[[], Any]) -> Any:
    """What `compute` returns; on another stream than the current one, where what is to be captured must warm up."""
    current, side = torch.cuda.current_stream(), _side_stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        results = compute()
    current.wait_stream(side)
    return results


class RecordedPasses:
    """The passes of the layers of `body` that were recorded, by the number of tokens of a sequence.

    depth: of the layers that begin with frozen states. A sequence's first pass is recorded, and compared with the plain
    one; where a model cannot be recorded, or gives other values, a line is printed and `usable` is False from then on.
    """

    def __init__(self, body: nn.Module, depth: int = 0):
        self.body, self.depth, self.usable = body, depth, True
        self.parameters = [weight for weight in body.parameters() if weight.requires_grad]
        self._passes: dict[tuple[int, bool], _RecordedPass] = {}

    def takes(self, tree: TokenTree) -> bool:
        """Whether passes over `tree` are recorded: not over long sequences, whose kernels outlast their start."""
        return self.usable and tree.prefix_kv is None and tree.input_ids.shape[1] <= FUSED_TOKENS

    def run(self, tree: TokenTree, states: Tensor | None = None) -> Tensor | None:
        """As :func:`run_body`, with a gradient for the trained weights; from `states` below layer `depth` where given.

        The result holds until the next call. None where the model cannot be recorded.
        """
        key = (tree.input_ids.shape[1], states is not None)
        if key not in self._passes:
            try:
                self._passes[key] = self._record(tree, states)
            except (RuntimeError, ValueError) as problem:  # memory, or what a graph cannot hold
                cause = problem.__context__ or problem  # the end of a broken recording raises once more
                reason = (str(cause).splitlines() or [type(cause).__name__])[0]
                print(f"steps are not recorded as CUDA graphs: {reason}", flush=True)
                self.usable = False
                self._passes.clear()
                return None
        recorded = self._passes[key]
        recorded.read(tree, states)
        return _Replay.apply(recorded, *recorded.parameters)

    def _record(self, tree: TokenTree, states: Tensor | None) -> _RecordedPass:
        """A pass over sequences as long as `tree`. Raises ValueError when its values are not the plain pass's."""
        pools = [recorded.pool for recorded in self._passes.values()]
        if not pools:
            gc.collect()  # a plain pass that waits for it ties the weights' gradients to a stream that is not recorded
        device = tree.input_ids.device.type
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        # a weight that was narrowed outside of the graph would stay as it is now
        with torch.enable_grad(), torch.autocast(device, dtype, enabled=enabled, cache_enabled=False):
            return _RecordedPass(self.body, self.parameters, tree, self.depth, states, pools[0] if pools else None)


class _RecordedPass:
    """One forward pass over sequences of a length, and its backward pass.

    parameters: the trained weights that it uses. hidden: the last hidden states [1, T, d]. gradient: of the loss for
    `hidden`, which the backward pass reads. weight_gradients: of all `parameters`, one behind the other.
    """

    def __init__(
        self,
        body: nn.Module,
        parameters: Sequence[nn.Parameter],
        tree: TokenTree,
        depth: int,
        states: Tensor | None,
        pool: Any,
    ):
        self._states = None if states is None else states.clone()
        self._tree = replace(tree, input_ids=tree.input_ids.clone(), position_ids=tree.position_ids.clone())
        compute = partial(run_body, body, self._tree, depth if states is not None else 0, self._states)
        hidden, gradients, self.parameters = on_side_stream(partial(self._plain_pass, compute, parameters))
        self._graph_of_forward: Tensor | None = None
        (self.hidden,), self.forward, self.pool = capture(partial(self._forward, compute), pool)
        self.gradient = _first_gradient(hidden)
        (self.weight_gradients,), self.backward, _ = capture(self._backward, self.pool)
        self._graph_of_forward = None  # frees what the backward pass needs: the graphs hold the memory
        self._check(hidden, gradients)

    @staticmethod
    def _plain_pass(
        compute: Callable[[], Tensor], parameters: Sequence[nn.Parameter]
    ) -> tuple[Tensor, Tensor, list[nn.Parameter]]:
        """Hidden states of the plain pass, the gradients of those `parameters` that it uses, and these parameters.

        It also warms up: what libraries set up at their first call cannot be recorded. It leaves the mask of the tree.
        """
        hidden = compute()
        gradients = torch.autograd.grad(hidden, parameters, _first_gradient(hidden), allow_unused=True)
        used = [(part, weight) for part, weight in zip(gradients, parameters, strict=True) if part is not None]
        return hidden.detach(), torch.cat([part.flatten() for part, _ in used]), [weight for _, weight in used]

    def _forward(self, compute: Callable[[], Tensor]) -> list[Tensor]:
        self._graph_of_forward = compute()
        return [self._graph_of_forward.detach()]

    def _backward(self) -> list[Tensor]:
        gradients = torch.autograd.grad(self._graph_of_forward, self.parameters, self.gradient)
        return [torch.cat([part.flatten() for part in gradients])]

    def _check(self, hidden: Tensor, gradients: Tensor) -> None:
        """Raise ValueError where the recorded pass does not give the values of the plain one."""
        self.forward()
        self.backward()
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        compared = ("hidden states", self.hidden, hidden), ("gradients", self.weight_gradients, gradients)
        for name, recorded, plain in compared:
            tolerance = torch.finfo(dtype).eps ** 0.75 * float(plain.abs().max())
            difference = float((recorded - plain).abs().max())
            if not difference <= tolerance:  # NaN is none
                raise ValueError(f"their {name} are {difference:.2g} from those of the plain pass")

    def read(self, tree: TokenTree, states: Tensor | None) -> None:
        """Put the tokens of `tree`, or their `states`, where the recorded pass reads them."""
        mask = self._tree._sequence_mask
        self._tree.input_ids.copy_(tree.input_ids)
        self._tree.position_ids.copy_(tree.position_ids)
        mask.copy_(tree.sequence_mask(mask.dtype))
        if states is not None:
            self._states.copy_(states)


class _Replay(torch.autograd.Function):
    """A recorded forward pass, whose gradients are those of its recorded backward pass."""

    @staticmethod
    def forward(ctx: Any, recorded: _RecordedPass, *parameters: Tensor) -> Tensor:
        recorded.forward()
        ctx.recorded = recorded
        return recorded.hidden.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        recorded = ctx.recorded
        recorded.gradient.copy_(gradient)
        recorded.backward()
        # a copy: the next pass writes into the recorded one, and steps of several micro-batches add them
        parts = recorded.weight_gradients.clone().split([weight.numel() for weight in recorded.parameters])
        return None, *(part.view(weight.shape) for part, weight in zip(parts, recorded.parameters, strict=True))


def _first_gradient(hidden: Tensor) -> Tensor:
    """A gradient for `hidden`, with which passes are compared."""
    return hidden.detach().sign() / hidden.shape[-1]


def recorded_passes(model: nn.Module, frozen: FrozenStates | None = None) -> RecordedPasses | None:
    """The passes of the causal `model` to be recorded; None where that cannot be or does not pay.

    frozen: the states of its frozen layers, if they are kept. None on other devices than CUDA GPUs, with activations
    that are computed again in the backward pass, with dropout (its random numbers would depend on what was recorded),
    and where the trained weights lie in several precisions or take more than :data:`MAX_GRADIENT_BYTES`.
    """
    body = transformer_body(model)
    trained = [weight for weight in body.parameters() if weight.requires_grad]
    dropout = getattr(body.config, "attention_dropout", 0) or any(
        isinstance(module, nn.Dropout) and module.p for module in body.modules()
    )
    fits = trained and sum(weight.nbytes for weight in trained) <= MAX_GRADIENT_BYTES
    alike = len({(weight.dtype, weight.device) for weight in trained}) == 1
    if not (fits and alike) or trained[0].device.type not in RECORDING_DEVICES:
        return None
    if dropout or body.is_activation_checkpointing or not supports_token_trees(model):
        return None
    return RecordedPasses(body, frozen.depth if frozen else 0)
