"""`lowered`: a network of factored layers as one of plain convolutions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastrank import _checks
from fastrank.convert import copy_with
from fastrank.nn._conv import FactoredConv2d

_ACTIVATIONS = {"relu": F.relu, "silu": F.silu}


class PlainConvolutions(nn.Module):
    """A factored layer as its `to_sequential()`, with its epilogue: activation(convolutions(x) + residual).

    x (N, I, H, W), residual (N, O, H', W') -> (N, O, H', W'), or all without N.
    """

    def __init__(self, layer: FactoredConv2d) -> None:
        super().__init__()
        stages = list(layer.to_sequential())
        self.activation = getattr(layer, "activation", "none")
        if self.activation != "none":
            del stages[-1]  # a residual comes ahead of it
        self.stages = nn.Sequential(*stages)
        self.train(layer.training)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """See the class."""
        out: Tensor = self.stages(x if x.dim() == 4 else x[None])
        out = out if x.dim() == 4 else out[0]
        if residual is not None:
            out = out + residual
        return out if self.activation == "none" else _ACTIVATIONS[self.activation](out)

    def extra_repr(self) -> str:
        """The activation, where there is one."""
        return "" if self.activation == "none" else f"activation={self.activation!r}"


def lowered(model: nn.Module) -> nn.Module:
    """A copy of `model` in which every factored layer is a `PlainConvolutions`: the same function to rounding.

    Gates are folded in. Layers of any backend become their sequence of convolutions, also where "auto" or "dense" runs
    the merged kernel: for that, `to_dense()` of the layer is one convolution. Networks of `fuse_for_inference` keep
    their epilogues. Raises TypeError where `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise _checks.fail_type("model", "a torch.nn.Module", model)
    layers = [module for module in model.modules() if isinstance(module, FactoredConv2d)]
    return copy_with(model, {layer: PlainConvolutions(layer) for layer in layers})
