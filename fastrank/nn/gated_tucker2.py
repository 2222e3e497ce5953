"""`GatedTucker2Conv`: Tucker-2 with a gate a slice, for training that finds the ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastrank import _checks, decompose, ops, reference
from fastrank.decompose.tucker import max_ranks
from fastrank.nn._conv import FactoredConv2d, Pair, adopt, geometry_of, require_factorable
from fastrank.nn._gated import GatedConv2d, Index, split
from fastrank.nn.tucker2 import FusedTucker2Conv
from fastrank.ops._conv import BACKEND_NAMES


class GatedTucker2Conv(GatedConv2d):
    """`FusedTucker2Conv` with a gate a slice of each factor; x (N, I, H, W) -> (N, O, H', W').

    Directions w_in (R_in, I), core (R_out, R_in, kh, kw), w_out (O, R_out); gates gate_in (R_in,), gate_core (R_out,),
    gate_out (O,); bias (O,). Penalised and pruned are gate_in and gate_core; gate_out is a plain parameter. The
    arguments, the initial function and the errors are those of `FusedTucker2Conv`. Source: the Funnel paper.
    """

    GATES: ClassVar = {"w_in": "gate_in", "core": "gate_core", "w_out": "gate_out"}
    PENALIZED: ClassVar = ("gate_in", "gate_core")
    w_in: nn.Parameter
    core: nn.Parameter
    w_out: nn.Parameter
    gate_in: nn.Parameter
    gate_core: nn.Parameter
    gate_out: nn.Parameter

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        ranks: int | Pair,
        *,
        backend: str = "auto",
        **geometry: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, **geometry)
        self.ranks = _checks.pair("ranks", ranks, 1)
        limits = max_ranks((out_channels, in_channels, *self.kernel_size))
        for index in (0, 1):
            _checks.integer(f"ranks[{index}]", self.ranks[index], 1, limits[index])
        self.backend = _checks.choice("backend", backend, BACKEND_NAMES)
        kind = {"device": geometry.get("device"), "dtype": geometry.get("dtype")}
        rank_in, rank_out = self.ranks
        self.w_in = nn.Parameter(torch.empty(rank_in, in_channels, **kind))
        self.core = nn.Parameter(torch.empty(rank_out, rank_in, *self.kernel_size, **kind))
        self.w_out = nn.Parameter(torch.empty(out_channels, rank_out, **kind))
        self.gate_in = nn.Parameter(torch.empty(rank_in, **kind))
        self.gate_core = nn.Parameter(torch.empty(rank_out, **kind))
        self.gate_out = nn.Parameter(torch.empty(out_channels, **kind))
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """x (N, I, H, W) -> (N, O, H', W'), or the same without N."""
        batched, padding = self._padded(self._batched(x))
        factors = self.factors()
        out = ops.tucker2_conv2d(
            batched,
            factors["w_in"],
            factors["core"],
            factors["w_out"],
            self.bias,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            backend=self.backend,
        )
        return out if x.dim() == 4 else out[0]

    @classmethod
    def from_conv(
        cls, conv: nn.Conv2d, ranks: int | Pair | None = None, *, algorithm: str = "hosvd"
    ) -> GatedTucker2Conv:
        """The gated Tucker-2 form of `conv`, at full ranks (where it is exact) unless some are given.

        gate_in starts at 1 and gate_core, at full ranks by HOSVD, at the mode-4 singular values of the kernel.
        Carries what `FusedTucker2Conv.from_conv` carries and refuses the same layers.
        """
        conv = require_factorable(conv)
        weight = reference.linalg.working(conv.weight.detach())
        full = max_ranks(tuple(weight.shape))
        factors = decompose.tucker2(weight, full if ranks is None else ranks, algorithm=algorithm)
        rank_out, rank_in = factors.core.shape[:2]
        size = (conv.kernel_size[0], conv.kernel_size[1])
        layer = cls(conv.in_channels, conv.out_channels, size, (rank_in, rank_out), **geometry_of(conv))
        (w_in, gate_in), (core, gate_core), (w_out, gate_out) = (split(factor) for factor in factors)
        return adopt(
            layer, conv, w_in=w_in, core=core, w_out=w_out, gate_in=gate_in, gate_core=gate_core, gate_out=gate_out
        )

    def _form(self, ranks: Sequence[int]) -> FactoredConv2d:
        return self._plain_form(FusedTucker2Conv, ranks=tuple(ranks), backend=self.backend)

    def _cut(self, factors: Mapping[str, Tensor], kept: Sequence[Index]) -> dict[str, Tensor]:
        kept_in, kept_out = kept
        return {
            "w_in": factors["w_in"][kept_in],
            "core": factors["core"][kept_out][:, kept_in],
            "w_out": factors["w_out"][:, kept_out],
        }

    def extra_repr(self) -> str:
        """What `nn.Conv2d` shows, and the ranks."""
        return f"{super().extra_repr()}, ranks={self.ranks}"

    def config(self) -> dict[str, Any]:
        """See `FactoredConv2d.config`."""
        return {**super().config(), "ranks": list(self.ranks)}
