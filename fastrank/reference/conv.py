"""The truth of the factored convolutions, in plain PyTorch.

Letters: N batch, I input channels, O output channels, H W map, kh kw kernel, R rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]


def tucker2_conv2d(
    x: Tensor, w_in: Tensor, core: Tensor, w_out: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """1×1 (I→R_in), kh×kw (R_in→R_out; stride, padding and dilation here), 1×1 (R_out→O; bias here).

    x (N, I, H, W), w_in (R_in, I), core (R_out, R_in, kh, kw), w_out (O, R_out), bias (O,) -> (N, O, H', W').
    """
    z = F.conv2d(x, w_in[:, :, None, None])
    z = F.conv2d(z, core, None, stride, padding, dilation)
    return F.conv2d(z, w_out[:, :, None, None], bias)


def tucker2_weight(w_in: Tensor, core: Tensor, w_out: Tensor) -> Tensor:
    """The dense kernel (O, I, kh, kw) that a Tucker-2 triple stands for."""
    return torch.einsum("or,rsyx,si->oiyx", w_out, core, w_in)


def tucker2_conv2d_backward(
    grad: Tensor,
    x: Tensor,
    w_in: Tensor,
    core: Tensor,
    w_out: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (x, w_in, core, w_out); the two intermediate maps are recomputed, not stored.

    Built from differentiable operators alone, so that a second differentiation works.
    """
    need_x, need_in, need_core, need_out = needs
    one, zero = (1, 1), (0, 0)
    w_in4, w_out4 = w_in[:, :, None, None], w_out[:, :, None, None]
    z_in = F.conv2d(x, w_in4)
    grad_core = grad_w_in = grad_x = grad_w_out = None

    def step(g: Tensor, z: Tensor, w: Tensor, s: Pair, p: Pair, d: Pair, need_z: bool, need_w: bool) -> tuple[Tensor, Tensor]:
        out = torch.ops.aten.convolution_backward(g, z, w, None, s, p, d, False, zero, 1, (need_z, need_w, False))
        return out[0], out[1]

    below_core = need_x or need_in
    # The map behind the core is only read by w_out's gradient: with a frozen w_out its values do not matter.
    z_out = F.conv2d(z_in, core, None, stride, padding, dilation)
    grad_z_out, grad_w_out = step(grad, z_out, w_out4, one, zero, one, below_core or need_core, need_out)
    if below_core or need_core:
        grad_z_in, grad_core = step(grad_z_out, z_in, core, stride, padding, dilation, below_core, need_core)
        if below_core:
            grad_x, grad_w_in = step(grad_z_in, x, w_in4, one, zero, one, need_x, need_in)
    return (
        grad_x if need_x else None,
        grad_w_in.flatten(1) if need_in and grad_w_in is not None else None,
        grad_core if need_core else None,
        grad_w_out.flatten(1) if need_out and grad_w_out is not None else None,
    )


def cp_conv2d(
    x: Tensor, pointwise: Tensor, vertical: Tensor, horizontal: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """Pointwise I→R·O, vertical depthwise (stride (s, 1)), horizontal depthwise (stride (1, s)), sum over R, bias once.

    x (N, I, H, W), pointwise (R, O, I), vertical (R, O, kh), horizontal (R, O, kw), bias (O,) -> (N, O, H', W').
    Channel index of the intermediate maps: r·O + o.
    """
    rank, out_channels, _ = pointwise.shape
    groups = rank * out_channels
    z = F.conv2d(x, pointwise.flatten(0, 1)[:, :, None, None])
    z = F.conv2d(z, vertical.reshape(groups, 1, -1, 1), None, (stride[0], 1), (padding[0], 0), (dilation[0], 1), groups)
    z = F.conv2d(z, horizontal.reshape(groups, 1, 1, -1), None, (1, stride[1]), (0, padding[1]), (1, dilation[1]), groups)
    out = z.unflatten(1, (rank, out_channels)).sum(1)
    return out if bias is None else out + bias[:, None, None]


def cp_weight(pointwise: Tensor, vertical: Tensor, horizontal: Tensor) -> Tensor:
    """The dense kernel (O, I, kh, kw): filter o is Σ_r pointwise[r, o] ∘ vertical[r, o] ∘ horizontal[r, o]."""
    return torch.einsum("roi,roy,rox->oiyx", pointwise, vertical, horizontal)
