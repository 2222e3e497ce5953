"""What the networks of the zoo share: 3×3 convolutions that may be factored, and the widths that rates leave."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fastrank import _checks


def conv3x3(in_channels: int, out_channels: int, *, stride: int = 1, rank: int = 0, bias: bool = False) -> nn.Module:
    """A 3×3 convolution with padding 1; a rank above 0 makes it the CP block of NORTON."""
    if rank == 0:
        return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=bias)
    from fastrank.nn import FusedCPConv

    return FusedCPConv(in_channels, out_channels, 3, rank, stride=stride, padding=1, bias=bias)


class Widths:
    """Channels that one compression rate a position leaves: int(n·(1−c)), as published (NORTON)."""

    def __init__(self, rates: Sequence[float]) -> None:
        self.rates = rates

    def __call__(self, position: int, channels: int) -> int:
        rate = self.rates[position]
        # Kept in floating point as published: the channel counts of published checkpoints depend on its rounding.
        kept = int(channels * (1 - rate))
        if kept < 1:
            expected = f"a rate that keeps at least one of {channels} channels"
            raise _checks.fail(f"compress_rate[{position}]", expected, rate)
        return kept


def initialise(model: nn.Module) -> nn.Module:
    """He initialisation (fan-out, ReLU) of every plain convolution; factored layers keep their own. Returns `model`."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model
