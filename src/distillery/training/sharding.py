"""`compute.strategy: fsdp`: each process holds a part of every weight, with its gradient and optimizer states.

PyTorch's `fully_shard` (FSDP2) makes every layer a unit, which gathers its weights when it is called, and the weights
outside the layers (embeddings, last norm, head) one more. The losses call parts of a model in ways of their own, so the
root of the units is no model: it is called with what is to be computed. All processes have to call the same units in
the same order, whatever their rows are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from distillery.config.schema import ComputeConfig
from distillery.config.schema.compute import FSDP_4_BIT
from distillery.errors import UserError
from distillery.models.devices import default_device, load_on_cpu
from distillery.models.fast_cpu import PartialEmbedding
from distillery.models.label_model import MAX_ANSWER_TOKENS, LabelModel
from distillery.models.layers import find_layers, stack_depths
from distillery.training.disk import size_text
from distillery.training.processes import first_process_first, process_count, process_rank

Value = TypeVar("Value")


class _Root(nn.Module):
    """The root of the units of `model`: the weights outside its `layers` are gathered while it computes something."""

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module]):
        super().__init__()
        self.model, self.layers = model, tuple(layers)

    def forward(self, compute: Callable[[], Any]) -> Any:
        return compute()


def shard_model(student: LabelModel) -> None:
    """Shard the model of `student` over the processes that train together, in place.

    Each process contributes its shards, so that all begin alike, whatever the last bits of a drawn weight are.

    Raises UserError for a model in 4 bits, whose weights are no numbers to cut, and for float16.
    """
    model = student.model
    if any(hasattr(weight, "quant_state") for weight in model.parameters()):
        raise UserError(f"compute.strategy: fsdp: {FSDP_4_BIT}")
    if student.dtype == torch.float16:
        raise UserError("compute.strategy: fsdp: not in float16, whose small gradients vanish; set `dtype: bfloat16`")
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    mesh = init_device_mesh(default_device().type, (process_count(),))
    # else autocast would keep a narrow copy of each layer's weights for the backward pass
    narrow = MixedPrecisionPolicy(student.dtype, torch.float32, cast_forward_inputs=False)
    policy = MixedPrecisionPolicy() if student.dtype == torch.float32 else narrow
    layers = unit_layers(model)
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    student.sharded = _shard_root(_Root(model, layers), mesh)
    held, whole = local_bytes(model.parameters())
    print(f"each process holds {size_text(held)} of the {size_text(whole)} of weights", flush=True)


def build_for_training(compute: ComputeConfig, build: Callable[[], LabelModel]) -> LabelModel:
    """The model that `build` gives, where `compute` shards it in shards: then no GPU ever holds it as a whole.

    The first process builds it before the others do, for which it may fetch files.
    """
    sharded = compute.strategy == "fsdp" and process_count() > 1
    with first_process_first(), load_on_cpu() if sharded else nullcontext():
        model = build()
    if sharded:
        shard_model(model)
    return model


def unit_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of `model`, each a unit, of encoder and decoder where it has both; none if it has no list of them."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    try:
        stacks = [getattr(*find_layers(part, depth)) for part, depth in stack_depths(base)]
    except UserError:  # layers that share their weights
        return []
    return [layer for stack in stacks for layer in stack]


def _shard_root(root: nn.Module, mesh: DeviceMesh, ignored: Sequence[nn.Parameter] = ()) -> nn.Module:
    """`root` with its weights sharded, but for those of its units and the `ignored`; gathered until the backward pass.

    All its units sum gradients: the loss of each process is divided by what the step holds in all.
    """
    fully_shard(root, mesh=mesh, reshard_after_forward=False, ignored_params=set(ignored))
    for unit in _units(root):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo multiplies nothing on the way
    return root


def _units(root: nn.Module) -> list[FSDPModule]:
    return [module for module in root.modules() if isinstance(module, FSDPModule)]


def is_sharded(model: nn.Module) -> bool:
    """Whether :func:`shard_model` cut the weights of `model`."""
    return any(isinstance(weight, DTensor) for weight in model.parameters())


def shard_new_weights(student: LabelModel) -> None:
    """Shard what a phase has added to a sharded model: the rows of a partial embedding, and projections.

    Each is a root of its own, since the others have been called already.
    """
    mesh = init_device_mesh(student.device.type, (process_count(),))
    embedding = student.model.get_input_embeddings()
    if isinstance(embedding, PartialEmbedding):
        _shard_root(embedding, mesh, [embedding.full.weight])
    for module in getattr(student.model, "projections", nn.ModuleList()).modules():
        if isinstance(module, nn.Linear):
            _shard_root(module, mesh)


def compute_together(student: LabelModel, compute: Callable[[], Value]) -> Value:
    """What `compute` returns, with the weights outside the layers gathered; without shards just that.

    Every process has to call the layers equally often in it. With gradients it has to return the loss.
    """
    if student.sharded is None:
        return compute()
    if torch.is_grad_enabled():
        return student.sharded(compute)
    value = student.sharded(compute)
    student.sharded.reset_iter_state()
    return value


@torch.no_grad()
def predict_in_step(student: LabelModel, compute: Callable[[], Value]) -> Value:
    """:func:`compute_together` without gradients."""
    return compute_together(student, compute)


@contextmanager
def whole_weights(student: LabelModel) -> Iterator[None]:
    """Gather all weights once, within the context: then each process computes what it likes, without gradients."""
    if student.sharded is None:
        yield
        return
    root, units = student.sharded, _units(student.sharded)
    with torch.no_grad():
        root(lambda: None)  # the first call decides which unit is the root
    for layer in root.layers:
        layer.set_reshard_after_forward(False)
    for unit in units:
        unit.unshard()
    yield  # a failure ends the process: nothing is to be restored
    for layer in root.layers:
        layer.set_reshard_after_forward(True)
    root.reset_iter_state()
    for unit in units:
        unit.reshard()


def choose_methods(student: LabelModel, ids: Sequence[Sequence[int]], new_tokens: int = 0) -> None:
    """Let all processes decide together, before they differ, how a causal model computes rows as long as all `ids`.

    new_tokens: that follow a row; at least those of a label.

    Raises UserError for a model that computes each row alone: the processes would call its layers unequally often.
    """
    if student.sharded is None or student.arch != "causal" or not ids:
        return
    distributed.barrier()  # they read the same file of what was decided before
    longest = max(new_tokens, MAX_ANSWER_TOKENS, student.longest_answer)
    methods = predict_in_step(student, lambda: student.forward_methods(ids, longest))
    if methods.scoring == "plain":
        name = student.model.config.model_type
        raise UserError(f"compute.strategy: fsdp: {name} is computed row by row, which takes `strategy: ddp`")


def whole_tensor(value: Any) -> Any:
    """`value` on the CPU, of a shard in the first process the whole tensor, in others empty; all of them call this."""
    if not isinstance(value, DTensor):
        return value
    whole = value.full_tensor().detach()
    return whole.cpu() if process_rank() == 0 else whole.new_empty(0)


def whole_weights_by_name(model: nn.Module, trained_only: bool) -> dict[str, Tensor]:
    """The weights of a sharded `model` by name, whole in the first process, with its buffers unless `trained_only`.

    Names of one weight share its tensor. All processes have to call this.
    """
    whole: dict[int, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        if weight.requires_grad or not trained_only:
            if id(weight) not in whole:
                whole[id(weight)] = whole_tensor(weight)
            weights[name] = whole[id(weight)]
    if trained_only:
        return weights
    return {name: weights.get(name, value) for name, value in model.state_dict().items()}


def shard_of(whole: Tensor, like: Tensor) -> Tensor:
    """This process's shard of the `whole` tensor, cut as the sharded weight `like`."""
    rows = whole.chunk(process_count())
    own = rows[process_rank()] if process_rank() < len(rows) else whole[:0]
    own = own.to(like.device, copy=True).contiguous()
    shape = {"shape": whole.shape, "stride": whole.contiguous().stride()}
    return DTensor.from_local(own, like.device_mesh, [Shard(0)], run_check=False, **shape)


def shard_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole `weights` of `model` as shards, by the names of a file; buffers as they are."""
    sharded = next(weight for weight in model.parameters() if isinstance(weight, DTensor))
    buffers = {name for name, _ in model.named_buffers()}
    return {name: value if name in buffers else shard_of(value, sharded) for name, value in weights.items()}


def whole_optimizer_state(optimizer: Any) -> dict[str, Any]:
    """The state of `optimizer` as one process would have it, whole in the first one. All processes call this."""
    state = optimizer.state_dict()
    values = {i: {key: whole_tensor(x) for key, x in entry.items()} for i, entry in state["state"].items()}
    return state | {"state": values}


def load_optimizer_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Give `optimizer`, whose weights are shards, the whole `state` of :func:`whole_optimizer_state`."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    values = {
        i: {key: shard_of(x, weights[i]) if x.shape == weights[i].shape else x for key, x in entry.items()}
        for i, entry in state["state"].items()
    }
    optimizer.load_state_dict(state | {"state": values})


@torch.no_grad()
def clip_gradients(weights: Iterator[nn.Parameter], max_norm: float, norm_type: float = 2) -> Tensor:
    """As :func:`torch.nn.utils.clip_grad_norm_` for shards: the norm is that over all processes."""
    gradients = [weight.grad.to_local() for weight in weights if weight.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, norm_type) ** norm_type
    distributed.all_reduce(norm)
    norm = norm ** (1 / norm_type)
    torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


@torch.no_grad()
def restore_sharded_embedding(student: LabelModel) -> None:
    """As :func:`restore_full_embedding` for a sharded model: the trained rows are written into its shards."""
    embedding = student.model.get_input_embeddings()
    if isinstance(embedding, PartialEmbedding):
        rows, full = embedding.rows.full_tensor(), embedding.full.weight
        start = process_rank() * -(-full.shape[0] // process_count())
        own = full.to_local()
        here = (embedding.trained >= start) & (embedding.trained < start + len(own))
        own[embedding.trained[here] - start] = rows[here]
        student.model.set_input_embeddings(embedding.full.requires_grad_())


def local_bytes(tensors: Iterator[Tensor | None]) -> tuple[int, int]:
    """(bytes that this process holds, bytes of the whole) of `tensors`."""
    tensors = [tensor for tensor in tensors if tensor is not None]
    held = sum(tensor.to_local().nbytes if isinstance(tensor, DTensor) else tensor.nbytes for tensor in tensors)
    return held, sum(tensor.numel() * tensor.element_size() for tensor in tensors)
