"""Batch normalisation folded into the convolution ahead of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastrank.fuse._trace import why_untouchable
from fastrank.nn import FusedCPConv, FusedTucker2Conv, LayerCPConv, SVDConv

Convolution = FusedTucker2Conv | FusedCPConv | LayerCPConv | SVDConv | nn.Conv2d
FOLDABLE = (FusedTucker2Conv, FusedCPConv, LayerCPConv, SVDConv, nn.Conv2d)


def output_factor(layer: Convolution) -> tuple[str, int]:
    """The parameter whose scale is that of the outputs, and its dimension of output channels."""
    if isinstance(layer, FusedCPConv):
        return "horizontal", 1
    if isinstance(layer, SVDConv):
        return "second", 1 if layer.scheme == "decoupled" else 0
    return ("weight", 0) if isinstance(layer, nn.Conv2d) else ("w_out", 0)


def why_no_statistics(norm: nn.Module) -> str:
    """Empty where `norm` is the same affine map of the channels for every batch, else the reason."""
    if type(norm) not in (nn.BatchNorm2d, nn.SyncBatchNorm):
        return f"it is of the class {type(norm).__name__}"
    if norm.training:
        return "it stays in training mode"
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics"
    return why_untouchable(norm)


@torch.no_grad()
def fold(layer: Convolution, norm: _BatchNorm) -> str:
    """Scale the outputs and the bias of `layer` as `norm` does; a reason, and nothing done, where the dtype overflows.

    γ (conv(x) + b − μ) / √(σ² + ε) + β: computed in float64 and rounded once.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    name, dim = output_factor(layer)
    old: nn.Parameter = getattr(layer, name)
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.double()
    shift = -norm.running_mean.double() if layer.bias is None else layer.bias.double() - norm.running_mean.double()
    shift = shift * scale if norm.bias is None else shift * scale + norm.bias.double()
    across = [-1 if d == dim else 1 for d in range(old.dim())]
    factor = (old.double() * scale.view(across)).to(old.dtype)
    bias = shift.to(old.dtype)
    if not (_finite(factor) and _finite(bias)):
        return f"folded, the weights are not finite in {old.dtype}"
    setattr(layer, name, nn.Parameter(factor, requires_grad=old.requires_grad))
    layer.bias = nn.Parameter(bias, requires_grad=old.requires_grad)
    return ""


def _finite(values: Tensor) -> bool:
    return bool(torch.isfinite(values).all())
