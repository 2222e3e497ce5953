"""`GatedCPConv`: CP of a whole layer with a gate a slice, for training that finds the rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastrank import _checks, decompose, reference
from fastrank.nn import layer_cp
from fastrank.nn._conv import FactoredConv2d, Pair, adopt, geometry_of, require_factorable
from fastrank.nn._gated import GatedConv2d, Index, split
from fastrank.nn.layer_cp import LayerCPConv


def default_rank(shape: tuple[int, ...]) -> int:
    """The largest rank at which the factors of a kernel (O, I, kh, kw) hold no more values than the kernel.

    CP has no full rank that is found by an SVD, and the rank that is always enough costs many times the dense layer;
    the Funnel paper does not say where its CP variant starts. This choice is ours.
    """
    out_channels, in_channels, kh, kw = shape
    values = out_channels * in_channels * kh * kw // (in_channels + kh * kw + out_channels)
    return max(1, min(values, layer_cp.max_rank(shape)))


class GatedCPConv(GatedConv2d):
    """`LayerCPConv` with a gate a slice of each factor; x (N, I, H, W) -> (N, O, H', W').

    Directions w_in (R, I), depthwise (R, kh, kw), w_out (O, R); gates gate_in (R,), gate_depthwise (R,), gate_out (O,);
    bias (O,). Every component passes one slice of w_in and one of depthwise, so one gate of the two is enough:
    penalised and pruned is gate_depthwise, which starts as the norm of the component; gate_in starts at 1 and stays a
    plain parameter, as does gate_out. The arguments, the initial function and the errors are those of `LayerCPConv`.
    """

    GATES: ClassVar = {"w_in": "gate_in", "depthwise": "gate_depthwise", "w_out": "gate_out"}
    PENALIZED: ClassVar = ("gate_depthwise",)
    w_in: nn.Parameter
    depthwise: nn.Parameter
    w_out: nn.Parameter
    gate_in: nn.Parameter
    gate_depthwise: nn.Parameter
    gate_out: nn.Parameter

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | Pair, rank: int, **geometry: Any
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, **geometry)
        limit = layer_cp.max_rank((out_channels, in_channels, *self.kernel_size))
        self.rank = _checks.integer("rank", rank, 1, limit)
        kind = {"device": geometry.get("device"), "dtype": geometry.get("dtype")}
        self.w_in = nn.Parameter(torch.empty(rank, in_channels, **kind))
        self.depthwise = nn.Parameter(torch.empty(rank, *self.kernel_size, **kind))
        self.w_out = nn.Parameter(torch.empty(out_channels, rank, **kind))
        self.gate_in = nn.Parameter(torch.empty(rank, **kind))
        self.gate_depthwise = nn.Parameter(torch.empty(rank, **kind))
        self.gate_out = nn.Parameter(torch.empty(out_channels, **kind))
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """x (N, I, H, W) -> (N, O, H', W'), or the same without N."""
        return layer_cp.convolve(self, x, **self.factors())

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, rank: int | None = None, *, algorithm: str = "als") -> GatedCPConv:
        """The gated CP form of `conv`; by default at `default_rank`, exact at kh·kw·min(I, O).

        algorithm: "als" or "greedy", see `decompose.cp_layer`. Carries what `FusedTucker2Conv.from_conv` carries and
        refuses the same layers.
        """
        conv = require_factorable(conv)
        weight = reference.linalg.working(conv.weight.detach())
        shape = tuple(weight.shape)
        rank = default_rank(shape) if rank is None else rank
        factors = decompose.cp_layer(weight, rank, algorithm=algorithm)
        layer = cls(conv.in_channels, conv.out_channels, (shape[2], shape[3]), rank, **geometry_of(conv))
        w_in, size_in = split(factors.w_in)
        columns, size_out = split(factors.w_out.T)
        depthwise, gate_depthwise = split(factors.depthwise.double() * (size_in * size_out)[:, None, None])
        w_out, gate_out = split(columns.T)
        return adopt(
            layer,
            conv,
            w_in=w_in,
            depthwise=depthwise,
            w_out=w_out,
            gate_in=torch.ones_like(size_in),
            gate_depthwise=gate_depthwise,
            gate_out=gate_out,
        )

    def _form(self, ranks: Sequence[int]) -> FactoredConv2d:
        return self._plain_form(LayerCPConv, rank=ranks[0])

    def _cut(self, factors: Mapping[str, Tensor], kept: Sequence[Index]) -> dict[str, Tensor]:
        return {
            "w_in": factors["w_in"][kept[0]],
            "depthwise": factors["depthwise"][kept[0]],
            "w_out": factors["w_out"][:, kept[0]],
        }

    def extra_repr(self) -> str:
        """What `nn.Conv2d` shows, and the rank."""
        return f"{super().extra_repr()}, rank={self.rank}"

    def config(self) -> dict[str, Any]:
        """See `FactoredConv2d.config`."""
        return {**super().config(), "rank": self.rank}
