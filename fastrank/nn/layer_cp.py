"""`LayerCPConv`: a drop-in for `nn.Conv2d` whose whole kernel is one sum of rank-1 terms over the layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrank import _checks, decompose, reference
from fastrank._stages import ConvStage
from fastrank.nn._conv import FactoredConv2d, Pair, adopt, geometry_of, init_uniform, require_factorable
from fastrank.ops import _register


def max_rank(shape: tuple[int, ...]) -> int:
    """A rank that is always enough for a kernel (O, I, kh, kw): every pixel is a matrix of rank min(O, I)."""
    out_channels, in_channels, kh, kw = shape
    return kh * kw * min(out_channels, in_channels)


class LayerCPConv(FactoredConv2d):
    """Convolution with kernel W[o, i] = Σ_r w_out[o, r] w_in[r, i] depthwise[r]; x (N, I, H, W) -> (N, O, H', W').

    Three convolutions: 1×1 I→R, one kh×kw filter a channel (stride, padding and dilation here), 1×1 R→O (bias here).
    Parameters: w_in (R, I), depthwise (R, kh, kw), w_out (O, R), bias (O,). rank: between 1 and kh·kw·min(I, O). The
    other arguments are those of `nn.Conv2d`; groups is 1. The initial factors give outputs of the variance that
    `nn.Conv2d`'s default initialisation gives. Raises ValueError or TypeError, naming the argument.
    """

    w_in: nn.Parameter
    depthwise: nn.Parameter
    w_out: nn.Parameter

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | Pair, rank: int, **geometry: Any
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, **geometry)
        self.rank = _checks.integer("rank", rank, 1, max_rank((out_channels, in_channels, *self.kernel_size)))
        kind = {"device": geometry.get("device"), "dtype": geometry.get("dtype")}
        self.w_in = nn.Parameter(torch.empty(rank, in_channels, **kind))
        self.depthwise = nn.Parameter(torch.empty(rank, *self.kernel_size, **kind))
        self.w_out = nn.Parameter(torch.empty(out_channels, rank, **kind))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the factors anew."""
        init_uniform(self.w_in, 1 / self.in_channels)
        init_uniform(self.depthwise, 1 / (self.kernel_size[0] * self.kernel_size[1]))
        init_uniform(self.w_out, 1 / (3 * self.rank))
        self._init_bias()

    def forward(self, x: Tensor) -> Tensor:
        """x (N, I, H, W) -> (N, O, H', W'), or the same without N."""
        return convolve(self, x, self.w_in, self.depthwise, self.w_out)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, rank: int, *, algorithm: str = "als") -> LayerCPConv:
        """The CP form of `conv` at the given rank; algorithm: "als" or "greedy", see `decompose.cp_layer`.

        Carries what `FusedTucker2Conv.from_conv` carries and refuses the same layers.
        """
        conv = require_factorable(conv)
        factors = decompose.cp_layer(conv.weight, rank, algorithm=algorithm)
        size = (conv.kernel_size[0], conv.kernel_size[1])
        layer = cls(conv.in_channels, conv.out_channels, size, rank, **geometry_of(conv))
        return adopt(layer, conv, **factors._asdict())

    def to_dense(self) -> nn.Conv2d:
        """One `nn.Conv2d` with the merged kernel: the same function to rounding."""
        with reference.linalg.full_precision(self.w_in.device):
            merged = torch.einsum("or,ri,ryx->oiyx", self.w_out, self.w_in, self.depthwise)
        return self._plain(merged, bias=self.bias is not None)

    def to_sequential(self) -> nn.Sequential:
        """Three plain convolutions 1×1 → depthwise kh×kw → 1×1, for export and comparison."""
        return nn.Sequential(
            self._plain(self.w_in[:, :, None, None], where="none"),
            self._plain(self.depthwise[:, None], groups=self.rank),
            self._plain(self.w_out[:, :, None, None], where="none", bias=self.bias is not None),
        )

    def conv_stages(self, in_size: Pair) -> list[ConvStage]:
        """The three convolutions on an (H, W) map, for counting."""
        rank, out = self.rank, self._out_size(in_size)
        return [
            ConvStage("w_in", self.in_channels, rank, (1, 1), 1, False, in_size),
            ConvStage("depthwise", rank, rank, self.kernel_size, rank, False, out),
            ConvStage("w_out", rank, self.out_channels, (1, 1), 1, self.bias is not None, out),
        ]

    def extra_repr(self) -> str:
        """What `nn.Conv2d` shows, and the rank."""
        return f"{super().extra_repr()}, rank={self.rank}"

    def config(self) -> dict[str, Any]:
        """See `FactoredConv2d.config`."""
        return {**super().config(), "rank": self.rank}


def convolve(layer: FactoredConv2d, x: Tensor, w_in: Tensor, depthwise: Tensor, w_out: Tensor) -> Tensor:
    """x (N, I, H, W) or (I, H, W) through the three factors, with the geometry and bias of `layer`."""
    z, padding = layer._padded(layer._batched(x))
    if not _register.autocasting(x):
        _checks.same_kind(x=z, w_in=w_in, depthwise=depthwise, w_out=w_out, bias=layer.bias)
    layer._out_size((x.shape[-2], x.shape[-1]))
    z = F.conv2d(z, w_in[:, :, None, None])
    z = F.conv2d(z, depthwise[:, None], None, layer.stride, padding, layer.dilation, depthwise.shape[0])
    z = F.conv2d(z, w_out[:, :, None, None], layer.bias)
    return z if x.dim() == 4 else z[0]
