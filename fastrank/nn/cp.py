"""`FusedCPConv`: a drop-in for `nn.Conv2d` whose filters are sums of rank-1 terms (NORTON's block)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastrank import _checks, decompose, ops, reference
from fastrank._stages import ConvStage
from fastrank.decompose.cp import max_rank
from fastrank.nn._conv import Pair, RankSum, adopt, geometry_of, init_uniform, require_factorable
from fastrank.nn._forms import CP, Form
from fastrank.nn._fused import FusedConv2d, like_batch


class FusedCPConv(FusedConv2d):
    """Convolution with filters W[o] = Σ_r pointwise[r, o] ∘ vertical[r, o] ∘ horizontal[r, o].

    x (N, I, H, W) -> (N, O, H', W'). Parameters: pointwise (R, O, I), vertical (R, O, kh), horizontal (R, O, kw),
    bias (O,). rank: between 1 and kh·kw. The other arguments are those of `nn.Conv2d`; groups is 1. The initial
    factors give outputs of the variance that `nn.Conv2d`'s default initialisation gives. activation and backend: as in
    `FusedTucker2Conv`.
    Raises ValueError or TypeError, naming the argument, on wrong sizes and ranks.
    """

    pointwise: nn.Parameter
    vertical: nn.Parameter
    horizontal: nn.Parameter

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        rank: int,
        *,
        activation: str = "none",
        backend: str = "auto",
        **geometry: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, activation=activation, backend=backend, **geometry)
        kh, kw = self.kernel_size
        self.rank = _checks.integer("rank", rank, 1, max_rank((out_channels, in_channels, kh, kw)))
        kind = {"device": geometry.get("device"), "dtype": geometry.get("dtype")}
        self.pointwise = nn.Parameter(torch.empty(rank, out_channels, in_channels, **kind))
        self.vertical = nn.Parameter(torch.empty(rank, out_channels, kh, **kind))
        self.horizontal = nn.Parameter(torch.empty(rank, out_channels, kw, **kind))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the factors anew."""
        init_uniform(self.pointwise, 1 / (3 * self.in_channels * self.rank))
        init_uniform(self.vertical, 1 / self.kernel_size[0])
        init_uniform(self.horizontal, 1 / self.kernel_size[1])
        self._init_bias()

    @property
    def form(self) -> Form:
        """See `FusedConv2d.form`."""
        return CP

    def _operate(self, x: Tensor, residual: Tensor | None) -> Tensor:
        batched, padding = self._padded(self._batched(x))
        out = ops.cp_conv2d(
            batched,
            self.pointwise,
            self.vertical,
            self.horizontal,
            self.bias,
            residual=like_batch(x, residual),
            activation=self.activation,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            backend=self.backend,
        )
        return out if x.dim() == 4 else out[0]

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, rank: int, *, seed: int = 0) -> FusedCPConv:
        """The filter-wise CP form of `conv`, exact at rank kh·kw; `seed` starts the alternating least squares.

        Carries what `FusedTucker2Conv.from_conv` carries and refuses the same layers.
        """
        conv = require_factorable(conv)
        factors = decompose.cp_filters(conv.weight, rank, seed=seed)
        size = (conv.kernel_size[0], conv.kernel_size[1])
        layer = cls(conv.in_channels, conv.out_channels, size, rank, **geometry_of(conv))
        return adopt(layer, conv, **factors._asdict())

    def to_dense(self) -> nn.Conv2d:
        """One `nn.Conv2d` with the merged kernel: the same function to rounding. ValueError with an activation."""
        self._require_no_activation()
        with reference.linalg.full_precision(self.pointwise.device):
            merged = reference.conv.cp_weight(self.pointwise, self.vertical, self.horizontal)
        return self._plain(merged, bias=self.bias is not None)

    def to_sequential(self) -> nn.Sequential:
        """Pointwise, vertical and horizontal plain convolutions and the sum over R: NORTON's block as published."""
        groups = self.rank * self.out_channels
        return self._activated(
            self._plain(self.pointwise.flatten(0, 1)[:, :, None, None], where="none"),
            self._plain(self.vertical.flatten(0, 1)[:, None, :, None], where="vertical", groups=groups),
            self._plain(self.horizontal.flatten(0, 1)[:, None, None, :], where="horizontal", groups=groups),
            RankSum(self.rank, self.out_channels, self.bias).train(self.training),
        )

    def conv_stages(self, in_size: Pair) -> list[ConvStage]:
        """The three convolutions on an (H, W) map, for counting; the sum over R and its bias count nothing."""
        kh, kw = self.kernel_size
        groups, out = self.rank * self.out_channels, self._out_size(in_size)
        return [
            ConvStage("pointwise", self.in_channels, groups, (1, 1), 1, False, in_size),
            ConvStage("vertical", groups, groups, (kh, 1), groups, False, (out[0], in_size[1])),
            ConvStage("horizontal", groups, groups, (1, kw), groups, False, out),
        ]

    def extra_repr(self) -> str:
        """What `nn.Conv2d` shows, and the ranks."""
        return f"{super().extra_repr()}, rank={self.rank}"

    def config(self) -> dict[str, Any]:
        """See `FactoredConv2d.config`."""
        return {**super().config(), "rank": self.rank}
