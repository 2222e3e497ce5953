"""`SVDConv`: a drop-in for `nn.Conv2d` in one of TRP's three two-layer forms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastrank import _checks, decompose, ops, reference
from fastrank._stages import ConvStage
from fastrank.nn._conv import Pair, RankSum, adopt, geometry_of, init_uniform, require_factorable
from fastrank.nn._forms import SVD, Form
from fastrank.nn._fused import FusedConv2d, like_batch

_OPERATORS = {
    "channel": ops.channel_svd_conv2d,
    "spatial": ops.spatial_svd_conv2d,
    "decoupled": ops.decoupled_svd_conv2d,
}
SCHEMES = ("channel", "spatial", "decoupled")


def max_rank(scheme: str, shape: tuple[int, ...]) -> int:
    """The rank at which `scheme` is exact for a kernel (O, I, kh, kw)."""
    out_channels, in_channels, kh, kw = shape
    return {
        "channel": min(out_channels, in_channels * kh * kw),
        "spatial": min(in_channels * kh, out_channels * kw),
        "decoupled": min(in_channels, kh * kw),
    }[_checks.choice("scheme", scheme, SCHEMES)]


class SVDConv(FusedConv2d):
    """A convolution as two, x (N, I, H, W) -> (N, O, H', W'). Parameters first, second and bias (O,) by scheme:

    channel    kh×kw I→R, then 1×1 R→O: first (R, I, kh, kw), second (O, R, 1, 1)
    spatial    kh×1 I→R, then 1×kw R→O: first (R, I, kh, 1), second (O, R, 1, kw)
    decoupled  R pointwise→depthwise paths, summed: first (R, O, I), second (R, O, kh, kw)

    The other arguments are those of `nn.Conv2d`; groups is 1. activation and backend: as in `FusedTucker2Conv`.
    Raises ValueError or TypeError, naming the argument.
    """

    first: nn.Parameter
    second: nn.Parameter

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        rank: int,
        *,
        scheme: str = "channel",
        activation: str = "none",
        backend: str = "auto",
        **geometry: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, activation=activation, backend=backend, **geometry)
        kh, kw = self.kernel_size
        self.scheme = _checks.choice("scheme", scheme, SCHEMES)
        self.rank = _checks.integer("rank", rank, 1, max_rank(scheme, (out_channels, in_channels, kh, kw)))
        kind = {"device": geometry.get("device"), "dtype": geometry.get("dtype")}
        first, second = {
            "channel": ((rank, in_channels, kh, kw), (out_channels, rank, 1, 1)),
            "spatial": ((rank, in_channels, kh, 1), (out_channels, rank, 1, kw)),
            "decoupled": ((rank, out_channels, in_channels), (rank, out_channels, kh, kw)),
        }[scheme]
        self.first = nn.Parameter(torch.empty(first, **kind))
        self.second = nn.Parameter(torch.empty(second, **kind))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the factors anew, for outputs of the variance that `nn.Conv2d`'s default initialisation gives."""
        kh, kw = self.kernel_size
        fan_first, fan_second = {
            "channel": (self.in_channels * kh * kw, self.rank),
            "spatial": (self.in_channels * kh, self.rank * kw),
            "decoupled": (self.in_channels, self.rank * kh * kw),
        }[self.scheme]
        init_uniform(self.first, 1 / fan_first)
        init_uniform(self.second, 1 / (3 * fan_second))
        self._init_bias()

    @property
    def form(self) -> Form:
        """See `FusedConv2d.form`."""
        return SVD[self.scheme]

    def _operate(self, x: Tensor, residual: Tensor | None) -> Tensor:
        batched, padding = self._padded(self._batched(x))
        out = _OPERATORS[self.scheme](
            batched,
            self.first,
            self.second,
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
    def from_conv(
        cls, conv: nn.Conv2d, rank: int, scheme: str = "channel", *, moment: Tensor | None = None
    ) -> SVDConv:
        """The best rank-R form of `conv` in the given scheme, exact at `max_rank`.

        moment: see `decompose.channel_svd`; of no effect on the scheme "decoupled".

        Carries what `FusedTucker2Conv.from_conv` carries and refuses the same layers.
        """
        conv = require_factorable(conv)
        if _checks.choice("scheme", scheme, SCHEMES) == "decoupled":
            first, second = decompose.decoupled_svd(conv.weight, rank)
        else:
            split = decompose.channel_svd if scheme == "channel" else decompose.spatial_svd
            first, second = split(conv.weight, rank, moment=moment)
        size = (conv.kernel_size[0], conv.kernel_size[1])
        layer = cls(conv.in_channels, conv.out_channels, size, rank, scheme=scheme, **geometry_of(conv))
        return adopt(layer, conv, first=first, second=second)

    def to_dense(self) -> nn.Conv2d:
        """One `nn.Conv2d` with the merged kernel: the same function to rounding. ValueError with an activation."""
        self._require_no_activation()
        with reference.linalg.full_precision(self.first.device):
            merged = self.form.merge(self.first, self.second)
        return self._plain(merged, bias=self.bias is not None)

    def to_sequential(self) -> nn.Sequential:
        """The same as plain modules, for export and comparison."""
        has_bias = self.bias is not None
        if self.scheme == "channel":
            return self._activated(self._plain(self.first), self._plain(self.second, where="none", bias=has_bias))
        if self.scheme == "spatial":
            return self._activated(
                self._plain(self.first, where="vertical"), self._plain(self.second, where="horizontal", bias=has_bias)
            )
        return self._activated(
            self._plain(self.first.flatten(0, 1)[:, :, None, None], where="none"),
            self._plain(self.second.flatten(0, 1)[:, None], groups=self.rank * self.out_channels),
            RankSum(self.rank, self.out_channels, self.bias).train(self.training),
        )

    def conv_stages(self, in_size: Pair) -> list[ConvStage]:
        """The two convolutions on an (H, W) map, for counting."""
        kh, kw = self.kernel_size
        out, has_bias, rank = self._out_size(in_size), self.bias is not None, self.rank
        if self.scheme == "channel":
            return [
                ConvStage("first", self.in_channels, rank, (kh, kw), 1, False, out),
                ConvStage("second", rank, self.out_channels, (1, 1), 1, has_bias, out),
            ]
        if self.scheme == "spatial":
            return [
                ConvStage("first", self.in_channels, rank, (kh, 1), 1, False, (out[0], in_size[1])),
                ConvStage("second", rank, self.out_channels, (1, kw), 1, has_bias, out),
            ]
        groups = rank * self.out_channels
        return [
            ConvStage("first", self.in_channels, groups, (1, 1), 1, False, in_size),
            ConvStage("second", groups, groups, (kh, kw), groups, False, out),
        ]

    def extra_repr(self) -> str:
        """What `nn.Conv2d` shows, and the ranks."""
        return f"{super().extra_repr()}, rank={self.rank}, scheme={self.scheme!r}"

    def config(self) -> dict[str, Any]:
        """See `FactoredConv2d.config`."""
        return {**super().config(), "rank": self.rank, "scheme": self.scheme}
