"""What the factored convolutions share: geometry checks and padding strings."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastrank import _backends, _checks

Pair = tuple[int, int]
BACKEND_NAMES = _backends.NAMES


def same_padding(kernel: Pair, dilation: Pair) -> tuple[Pair, Pair]:
    """Zeros (before, after) along H and W that keep the size of the map at stride 1, the larger part after."""
    totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return (totals[0] // 2, totals[0] - totals[0] // 2), (totals[1] // 2, totals[1] - totals[1] // 2)


def conv_geometry(
    x: Tensor, kernel: Pair, stride: int | Pair, padding: int | Pair | str, dilation: int | Pair
) -> tuple[Tensor, tuple[Pair, Pair, Pair]]:
    """x and the checked (stride, padding, dilation) as pairs.

    The zeros that a padding string asks for on one side only are appended to x: the first stage has no bias, so
    padding its input with zeros is padding its output with zeros.
    """
    strides, dilations = _checks.pair("stride", stride, 1), _checks.pair("dilation", dilation, 1)
    if isinstance(padding, str):
        _checks.choice("padding", padding, ("same", "valid"))
        if padding == "valid":
            paddings = (0, 0)
        else:
            if strides != (1, 1):
                raise _checks.fail("stride", "1 with padding='same'", strides)
            top, left = same_padding(kernel, dilations)
            paddings = (top[0], left[0])
            x = F.pad(x, (0, left[1] - left[0], 0, top[1] - top[0])) if top[1] != top[0] or left[1] != left[0] else x
    else:
        paddings = _checks.pair("padding", padding, 0)
    _checks.conv_output_size((x.shape[2], x.shape[3]), kernel, strides, paddings, dilations)
    return x, (strides, paddings, dilations)


def conv_macs(kh: int, kw: int, in_channels: int, out_channels: int, out_size: Pair, groups: int = 1) -> int:
    """Multiply-adds of one image through one convolution, without its bias."""
    return kh * kw * in_channels * out_channels // groups * out_size[0] * out_size[1]
