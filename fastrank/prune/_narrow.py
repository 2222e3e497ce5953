"""Layers made narrower in place: which axes of which tensors run over the output and the input channels."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastrank.nn import FusedCPConv

# Tensor -> its axis over the channels.
Axes = dict[str, int]
# Class -> (attribute that counts the channels, axes) of the outputs and of the inputs.
_NORM: tuple[str, Axes] = ("num_features", {"weight": 0, "bias": 0, "running_mean": 0, "running_var": 0})
_LAYERS: dict[type[nn.Module], tuple[tuple[str, Axes], tuple[str, Axes]]] = {
    nn.Conv2d: (("out_channels", {"weight": 0, "bias": 0}), ("in_channels", {"weight": 1})),
    nn.Linear: (("out_features", {"weight": 0, "bias": 0}), ("in_features", {"weight": 1})),
    FusedCPConv: (
        ("out_channels", {"pointwise": 1, "vertical": 1, "horizontal": 1, "bias": 0}),
        ("in_channels", {"pointwise": 2}),
    ),
    _BatchNorm: (_NORM, _NORM),
}


def can_narrow(layer: nn.Module) -> bool:
    """Whether `keep_outputs` and `keep_inputs` know the layer."""
    return isinstance(layer, tuple(_LAYERS)) and getattr(layer, "groups", 1) == 1


def keep_outputs(layer: nn.Module, indices: Tensor) -> None:
    """Keep the given output channels of `layer`, in the given order."""
    _take(layer, 0, indices)


def keep_inputs(layer: nn.Module, indices: Tensor) -> None:
    """Keep the given input channels of `layer`, in the given order; those of a normalisation are its outputs."""
    _take(layer, 1, indices)


def _take(layer: nn.Module, side: int, indices: Tensor) -> None:
    count, axes = next(sides for kind, sides in _LAYERS.items() if isinstance(layer, kind))[side]
    for name, axis in axes.items():
        value: Any = getattr(layer, name)
        if value is not None:
            taken = value.detach().index_select(axis, indices.to(value.device))
            needs = value.requires_grad
            setattr(layer, name, nn.Parameter(taken, needs) if isinstance(value, nn.Parameter) else taken)
    setattr(layer, count, len(indices))
