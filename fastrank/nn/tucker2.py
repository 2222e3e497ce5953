"""`FusedTucker2Conv`: a drop-in for `nn.Conv2d` whose kernel is held in Tucker-2 form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastrank import _checks, decompose, ops, reference
from fastrank._stages import ConvStage
from fastrank.decompose.tucker import max_ranks
from fastrank.nn._conv import Pair, adopt, geometry_of, init_uniform, require_factorable
from fastrank.nn._forms import TUCKER2, Form
from fastrank.nn._fused import FusedConv2d, like_batch


class FusedTucker2Conv(FusedConv2d):
    """Convolution with kernel W[o, i] = Σ w_out[o, r] core[r, s] w_in[s, i]; x (N, I, H, W) -> (N, O, H', W').

    Parameters: w_in (R_in, I), core (R_out, R_in, kh, kw), w_out (O, R_out), bias (O,). ranks = (R_in, R_out), or one
    int for both. The other arguments are those of `nn.Conv2d`; groups is 1. The initial factors give outputs of the
    variance that `nn.Conv2d`'s default initialisation gives. activation: "none", "relu" or "silu", behind the
    convolution and the residual that `forward` may be given. backend: see `fastrank.ops.tucker2_conv2d`.
    Raises ValueError or TypeError, naming the argument, on wrong sizes and ranks.
    """

    w_in: nn.Parameter
    core: nn.Parameter
    w_out: nn.Parameter

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        ranks: int | Pair,
        *,
        activation: str = "none",
        backend: str = "auto",
        **geometry: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, activation=activation, backend=backend, **geometry)
        self.ranks = _checks.pair("ranks", ranks, 1)
        limits = max_ranks((out_channels, in_channels, *self.kernel_size))
        for index in (0, 1):
            _checks.integer(f"ranks[{index}]", self.ranks[index], 1, limits[index])
        kind = {"device": geometry.get("device"), "dtype": geometry.get("dtype")}
        rank_in, rank_out = self.ranks
        self.w_in = nn.Parameter(torch.empty(rank_in, in_channels, **kind))
        self.core = nn.Parameter(torch.empty(rank_out, rank_in, *self.kernel_size, **kind))
        self.w_out = nn.Parameter(torch.empty(out_channels, rank_out, **kind))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the factors anew."""
        rank_in, rank_out = self.ranks
        init_uniform(self.w_in, 1 / self.in_channels)
        init_uniform(self.core, 1 / (rank_in * self.kernel_size[0] * self.kernel_size[1]))
        init_uniform(self.w_out, 1 / (3 * rank_out))
        self._init_bias()

    @property
    def form(self) -> Form:
        """See `FusedConv2d.form`."""
        return TUCKER2

    def _operate(self, x: Tensor, residual: Tensor | None) -> Tensor:
        batched, padding = self._padded(self._batched(x))
        out = ops.tucker2_conv2d(
            batched,
            self.w_in,
            self.core,
            self.w_out,
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
        cls, conv: nn.Conv2d, ranks: int | Pair, *, algorithm: str = "hosvd", moment: Tensor | None = None
    ) -> FusedTucker2Conv:
        """The Tucker-2 form of `conv` with ranks (R_in, R_out), exact at `decompose.tucker.max_ranks`.

        algorithm and moment: see `decompose.tucker2`.

        Carries geometry, padding_mode, bias, dtype, device, training flag and requires_grad. `conv` must be an
        `nn.Conv2d` itself (a subclass may compute its weight) with groups=1 and finite weights, else TypeError or
        ValueError.
        """
        conv = require_factorable(conv)
        factors = decompose.tucker2(conv.weight, ranks, algorithm=algorithm, moment=moment)
        rank_out, rank_in = factors.core.shape[:2]
        layer = cls(
            conv.in_channels, conv.out_channels, _pair(conv.kernel_size), (rank_in, rank_out), **geometry_of(conv)
        )
        return adopt(layer, conv, **factors._asdict())

    def to_dense(self) -> nn.Conv2d:
        """One `nn.Conv2d` with the merged kernel: the same function to rounding. ValueError with an activation."""
        self._require_no_activation()
        with reference.linalg.full_precision(self.core.device):
            merged = reference.conv.tucker2_weight(self.w_in, self.core, self.w_out)
        return self._plain(merged, bias=self.bias is not None)

    def to_sequential(self) -> nn.Sequential:
        """Three plain convolutions 1×1 → kh×kw → 1×1, for export and comparison."""
        return self._activated(
            self._plain(self.w_in[:, :, None, None], where="none"),
            self._plain(self.core),
            self._plain(self.w_out[:, :, None, None], where="none", bias=self.bias is not None),
        )

    def conv_stages(self, in_size: Pair) -> list[ConvStage]:
        """The three convolutions on an (H, W) map, for counting."""
        (rank_in, rank_out), out = self.ranks, self._out_size(in_size)
        return [
            ConvStage("w_in", self.in_channels, rank_in, (1, 1), 1, False, in_size),
            ConvStage("core", rank_in, rank_out, self.kernel_size, 1, False, out),
            ConvStage("w_out", rank_out, self.out_channels, (1, 1), 1, self.bias is not None, out),
        ]

    def extra_repr(self) -> str:
        """What `nn.Conv2d` shows, and the ranks."""
        return f"{super().extra_repr()}, ranks={self.ranks}"

    def config(self) -> dict[str, Any]:
        """See `FactoredConv2d.config`."""
        return {**super().config(), "ranks": list(self.ranks)}


def _pair(size: tuple[int, ...]) -> Pair:
    return size[0], size[1]
