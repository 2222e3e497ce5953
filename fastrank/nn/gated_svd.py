"""`GatedSVDConv`: the channel SVD form with a gate a slice; the Funnel system's form of 1×1 convolutions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrank import _checks, ops, reference
from fastrank.decompose.unfold import unfold
from fastrank.nn._conv import FactoredConv2d, Pair, adopt, geometry_of, require_factorable
from fastrank.nn._gated import GatedConv2d, Index, split
from fastrank.nn.svd import SVDConv, max_rank
from fastrank.ops import _register


class GatedSVDConv(GatedConv2d):
    """`SVDConv` of the channel scheme with a gate a slice of each factor; x (N, I, H, W) -> (N, O, H', W').

    Directions first (R, I, kh, kw), second (O, R, 1, 1); gates gate_first (R,), gate_second (O,); bias (O,).
    Penalised and pruned is gate_first, which starts as the singular values; gate_second is a plain parameter. The
    arguments, the initial function and the errors are those of `SVDConv`. Source: the Funnel paper.
    """

    GATES: ClassVar = {"first": "gate_first", "second": "gate_second"}
    PENALIZED: ClassVar = ("gate_first",)
    first: nn.Parameter
    second: nn.Parameter
    gate_first: nn.Parameter
    gate_second: nn.Parameter

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | Pair, rank: int, **geometry: Any
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, **geometry)
        self.rank = _checks.integer(
            "rank", rank, 1, max_rank("channel", (out_channels, in_channels, *self.kernel_size))
        )
        kind = {"device": geometry.get("device"), "dtype": geometry.get("dtype")}
        self.first = nn.Parameter(torch.empty(rank, in_channels, *self.kernel_size, **kind))
        self.second = nn.Parameter(torch.empty(out_channels, rank, 1, 1, **kind))
        self.gate_first = nn.Parameter(torch.empty(rank, **kind))
        self.gate_second = nn.Parameter(torch.empty(out_channels, **kind))
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """x (N, I, H, W) -> (N, O, H', W'), or the same without N."""
        z, padding = self._padded(self._batched(x))
        factors = self.factors()
        if not _register.autocasting(x):
            _checks.same_kind(x=z, **factors, bias=self.bias)
        self._out_size((x.shape[-2], x.shape[-1]))
        z = F.conv2d(z, factors["first"], None, self.stride, padding, self.dilation)
        z = F.conv2d(z, factors["second"], self.bias)
        return z if x.dim() == 4 else z[0]

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, rank: int | None = None) -> GatedSVDConv:
        """The best gated rank-R form of `conv`, at full rank (where it is exact) unless one is given.

        All of S is in the first factor, so that gate_first holds the singular values of the channel matrix. Carries
        what `FusedTucker2Conv.from_conv` carries and refuses the same layers.
        """
        conv = require_factorable(conv)
        shape = tuple(conv.weight.shape)
        full = max_rank("channel", shape)
        rank = full if rank is None else _checks.integer("rank", rank, 1, full)
        weight = reference.linalg.working(_checks.finite("weight", conv.weight.detach()))
        ((u, s, vh),) = ops.svd([unfold(weight, "channel")])
        first, _ = split(vh[:rank].reshape(rank, *shape[1:]))
        second, gate_second = split(u[:, :rank, None, None])
        layer = cls(conv.in_channels, conv.out_channels, (shape[2], shape[3]), rank, **geometry_of(conv))
        return adopt(layer, conv, first=first, second=second, gate_first=s[:rank], gate_second=gate_second)

    def _form(self, ranks: Sequence[int]) -> FactoredConv2d:
        return self._plain_form(SVDConv, rank=ranks[0], scheme="channel")

    def _cut(self, factors: Mapping[str, Tensor], kept: Sequence[Index]) -> dict[str, Tensor]:
        return {"first": factors["first"][kept[0]], "second": factors["second"][:, kept[0]]}

    def extra_repr(self) -> str:
        """What `nn.Conv2d` shows, and the rank."""
        return f"{super().extra_repr()}, rank={self.rank}"

    def config(self) -> dict[str, Any]:
        """See `FactoredConv2d.config`."""
        return {**super().config(), "rank": self.rank}
