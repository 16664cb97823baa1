"""Series adapters (Houlsby et al. 2019): small layers that the outputs of attention and MLP pass through."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distillery.errors import UserError
from distillery.models.heads import read_config
from distillery.models.layers import chosen_layers

ADAPTER = "series_adapter"  # its name in the linear layer that it follows
CONFIG_KEY = "series_adapters"  # of a saved model's config: their size and activation, and the layers that they follow
ADAPTER_WEIGHTS = "series_adapters.safetensors"
# of the file name of the other weights, `model.series.safetensors`: `transformers` alone would find a
# `model.safetensors`, leave out the adapters with a warning, and compute other predictions
VARIANT = "series"
INITIAL_STD = 1e-3  # of the weights before the first step: the adapter is then nearly the identity

# the linear layers back to the model's width, by their names in transformers
ATTENTION_OUTPUT = re.compile(r"(attn|attention|Attention)\.(output\.dense|dense|o|out_lin|out_proj|o_proj|c_proj)$")
MLP_OUTPUT = re.compile(
    r"(^|\.)(output\.dense|ffn\.lin2|ffn_output|fc2|DenseReluDense\.wo|mlp\.(c_proj|fc_out|down_proj|dense_4h_to_h))$"
)


class SeriesAdapter(nn.Module):
    """h + W2 f(W1 h + b1) + b2 for outputs h [..., width] of a sublayer, through `size` numbers a token.

    activation: f, `gelu` or `relu`. Houlsby et al. 2019, section 2.1; drawn as in their code: a normal distribution cut
    at two standard deviations of 0.001, and no bias.
    """

    def __init__(self, width: int, size: int, activation: str, **options: Any):
        super().__init__()
        self.down, self.up = nn.Linear(width, size, **options), nn.Linear(size, width, **options)
        self.activation = {"gelu": nn.functional.gelu, "relu": nn.functional.relu}[activation]
        for layer in (self.down, self.up):
            nn.init.trunc_normal_(layer.weight, std=INITIAL_STD, a=-2 * INITIAL_STD, b=2 * INITIAL_STD)
            nn.init.zeros_(layer.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        return hidden + self.up(self.activation(self.down(hidden)))


def _pass_through_adapter(layer: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return layer.get_submodule(ADAPTER)(output)


def sublayer_outputs(model: PreTrainedModel, layers: list[int] | str = "all") -> list[str]:
    """The names of the linear layers that end attention and MLP in the `layers` of `model`.

    Raises UserError for a model whose layers have other names, and when a layer does not exist.
    """
    # layers that share their weights, as ALBERT's, are no list to choose from
    parts = [model] if layers == "all" else chosen_layers(model, layers)
    within = {id(module) for part in parts for module in part.modules() if isinstance(module, nn.Linear | Conv1D)}
    names = [name for name, module in model.named_modules() if id(module) in within]
    attention = {name for name in names if ATTENTION_OUTPUT.search(name)}
    mlp = {name for name in names if MLP_OUTPUT.search(name)} - attention
    if not attention or not mlp:
        part = "MLP" if attention else "attention"
        kind = type(model).__name__
        raise UserError(f"adapter.kind: series: no output of {part} is known in the layers of {kind}; take `lora`")
    return [name for name in names if name in attention | mlp]


def add_series_adapters(
    model: PreTrainedModel, names: Collection[str], size: int, activation: str, dtype: torch.dtype = torch.float32
) -> None:
    """Let the outputs of the linear layers `names` of `model` pass through new adapters in `dtype`."""
    for name in names:
        layer = model.get_submodule(name)
        width = layer.nf if isinstance(layer, Conv1D) else layer.out_features
        adapter = SeriesAdapter(width, size, activation, device=layer.weight.device, dtype=dtype)
        layer.add_module(ADAPTER, adapter)
        layer.register_forward_hook(_pass_through_adapter)
    setattr(model.config, CONFIG_KEY, {"size": size, "activation": activation})


def adapted_layers(model: nn.Module) -> list[str]:
    """The names of the layers of `model` that a series adapter follows."""
    return [name.removesuffix(f".{ADAPTER}") for name, _ in model.named_modules() if name.endswith(f".{ADAPTER}")]


def has_series_adapters(model: nn.Module) -> bool:
    """Whether :func:`add_series_adapters` changed `model`."""
    return any(isinstance(module, SeriesAdapter) for module in model.modules())


def trained_alone(model: nn.Module) -> bool:
    """Whether a file of `model` holds its trained weights alone: it has adapters."""
    return hasattr(model, "peft_config") or has_series_adapters(model)


def adapter_parameters(model: nn.Module) -> int:
    """The number of weights in the series adapters of `model`."""
    adapters = [module for module in model.modules() if isinstance(module, SeriesAdapter)]
    return sum(weight.numel() for adapter in adapters for weight in adapter.parameters())


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """The trained weights of `model` by name."""
    return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}


def save_with_adapters(model: PreTrainedModel, folder: Path) -> None:
    """Write the config, the weights and the adapters of `model` to `folder`: see :data:`VARIANT`."""
    weights = model.state_dict()
    adapters = {name: weight.contiguous() for name, weight in weights.items() if f".{ADAPTER}." in name}
    getattr(model.config, CONFIG_KEY)["layers"] = adapted_layers(model)
    others = {name: weight for name, weight in weights.items() if name not in adapters}
    model.save_pretrained(folder, variant=VARIANT, state_dict=others)
    save_file(adapters, folder / ADAPTER_WEIGHTS)


def stored_adapters(folder: Path) -> dict[str, Any] | None:
    """The record that :func:`save_with_adapters` left in the config of the model in `folder`; None without adapters or
    without a config.

    Raises UserError when the config is damaged.
    """
    if not (folder / "config.json").exists():
        return None
    try:
        return read_config(folder).get(CONFIG_KEY)
    except ValueError as error:
        raise UserError(f"{folder.name}: cannot be loaded: {error}") from None


def reopen_adapters(model: PreTrainedModel, record: dict[str, Any] | None, folder: Path) -> None:
    """Give `model` the adapters of the :func:`stored_adapters` `record` of its `folder`, in its own precision.

    Without a record nothing changes. On the `meta` device the adapters have no values.
    Raises ValueError when the file does not hold these adapters.
    """
    if record is None:
        return
    add_series_adapters(model, record["layers"], record["size"], record["activation"], dtype=model.dtype)
    if model.device.type == "meta":
        return
    weights = load_file(folder / ADAPTER_WEIGHTS)
    wanted = [name for name in model.state_dict() if f".{ADAPTER}." in name]
    if sorted(weights) != sorted(wanted):
        raise ValueError(f"{ADAPTER_WEIGHTS} holds other adapters than its config names")
    model.load_state_dict(weights, strict=False)
