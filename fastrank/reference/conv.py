"""The truth of the factored convolutions, in plain PyTorch.

Letters: N batch, I input channels, O output channels, H W map, kh kw kernel, R rank.
The backward functions recompute the intermediate maps instead of storing them, and are built from differentiable
operators alone, so that a second differentiation works.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]
Geometry = tuple[Pair, Pair, Pair]  # stride, padding, dilation
ONE, ZERO = (1, 1), (0, 0)
ACTIVATIONS = ("none", "relu", "silu")


def epilogue(out: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    """activation(out + residual): what follows a convolution in a network."""
    out = out if residual is None else out + residual
    return out if activation == "none" else F.relu(out) if activation == "relu" else F.silu(out)


def epilogue_backward(grad: Tensor, before: Tensor | None, after: Tensor | None, activation: str) -> Tensor:
    """The gradient ahead of the activation, from its result (relu) or its argument (silu)."""
    if activation == "relu":
        assert after is not None
        return grad * (after > 0)
    if activation == "silu":
        assert before is not None
        gate = before.sigmoid()
        return grad * gate * (1 + before * (1 - gate))
    return grad


def tucker2_conv2d(
    x: Tensor,
    w_in: Tensor,
    core: Tensor,
    w_out: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    activation: str,
) -> Tensor:
    """1×1 (I→R_in), kh×kw (R_in→R_out; stride, padding and dilation here), 1×1 (R_out→O; bias here), `epilogue`.

    x (N, I, H, W), w_in (R_in, I), core (R_out, R_in, kh, kw), w_out (O, R_out), bias (O,), residual (N, O, H', W')
    -> (N, O, H', W').
    """
    z = F.conv2d(x, w_in[:, :, None, None])
    z = F.conv2d(z, core, None, stride, padding, dilation)
    return epilogue(F.conv2d(z, w_out[:, :, None, None], bias), residual, activation)


def tucker2_weight(w_in: Tensor, core: Tensor, w_out: Tensor) -> Tensor:
    """The dense kernel (O, I, kh, kw) that a Tucker-2 triple stands for."""
    return torch.einsum("or,rsyx,si->oiyx", w_out, core, w_in)


def tucker2_weight_backward(grad: Tensor, w_in: Tensor, core: Tensor, w_out: Tensor) -> tuple[Tensor, ...]:
    """Gradients of (w_in, core, w_out) from the gradient (O, I, kh, kw) of the kernel."""
    half = torch.einsum("oiyx,si->osyx", grad, w_in)
    other = torch.einsum("or,rsyx->osyx", w_out, core)
    return (
        torch.einsum("osyx,oiyx->si", other, grad),
        torch.einsum("or,osyx->rsyx", w_out, half),
        torch.einsum("osyx,rsyx->or", half, core),
    )


def tucker2_conv2d_backward(
    grad: Tensor,
    x: Tensor,
    w_in: Tensor,
    core: Tensor,
    w_out: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of (x, w_in, core, w_out); None where `needs` is False."""
    need_x, need_in, need_core, need_out = needs
    w_in4, w_out4 = w_in[:, :, None, None], w_out[:, :, None, None]
    z_in = F.conv2d(x, w_in4)
    z_out = F.conv2d(z_in, core, None, stride, padding, dilation)
    below_core = need_x or need_in
    grad_z, grad_out = step(grad, z_out, w_out4, (below_core or need_core, need_out))
    grad_z, grad_core = step(grad_z, z_in, core, (below_core, need_core), stride, padding, dilation)
    grad_x, grad_in = step(grad_z, x, w_in4, (need_x, need_in))
    return grad_x, _flat(grad_in), grad_core, _flat(grad_out)


def cp_conv2d(
    x: Tensor,
    pointwise: Tensor,
    vertical: Tensor,
    horizontal: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    activation: str,
) -> Tensor:
    """Pointwise I→R·O, vertical depthwise (stride (s, 1)), horizontal depthwise (stride (1, s)), sum over R, bias once.

    x (N, I, H, W), pointwise (R, O, I), vertical (R, O, kh), horizontal (R, O, kw), bias (O,), residual (N, O, H', W')
    -> (N, O, H', W'), after `epilogue`. Channel index of the intermediate maps: r·O + o.
    """
    rank, out_channels, _ = pointwise.shape
    z = F.conv2d(x, _pointwise4(pointwise))
    z = F.conv2d(z, _vertical4(vertical), None, *along_h(stride, padding, dilation), rank * out_channels)
    z = F.conv2d(
        z, _horizontal4(horizontal), None, *along_w(stride, padding, dilation), rank * out_channels
    )
    out = torch.unflatten(z, 1, (rank, out_channels)).sum(1)
    if bias is not None:
        out = out + bias[:, None, None]
    return epilogue(out, residual, activation)


def cp_weight(pointwise: Tensor, vertical: Tensor, horizontal: Tensor) -> Tensor:
    """The dense kernel (O, I, kh, kw): filter o is Σ_r pointwise[r, o] ∘ vertical[r, o] ∘ horizontal[r, o]."""
    return torch.einsum("roi,roy,rox->oiyx", pointwise, vertical, horizontal)


def cp_weight_backward(grad: Tensor, pointwise: Tensor, vertical: Tensor, horizontal: Tensor) -> tuple[Tensor, ...]:
    """Gradients of (pointwise, vertical, horizontal) from the gradient (O, I, kh, kw) of the kernel."""
    grad_pointwise = torch.einsum("oiyx,royx->roi", grad, cp_depthwise(vertical, horizontal))
    grad_depthwise = torch.einsum("oiyx,roi->royx", grad, pointwise)
    return grad_pointwise, *cp_depthwise_backward(grad_depthwise, vertical, horizontal)


def cp_depthwise(vertical: Tensor, horizontal: Tensor) -> Tensor:
    """The kernels (R, O, kh, kw) of one depthwise pass that does what the vertical and the horizontal one do."""
    return torch.einsum("roy,rox->royx", vertical, horizontal)


def cp_depthwise_backward(grad: Tensor, vertical: Tensor, horizontal: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of (vertical, horizontal) from the gradient (R, O, kh, kw) of `cp_depthwise`."""
    return torch.einsum("royx,rox->roy", grad, horizontal), torch.einsum("royx,roy->rox", grad, vertical)


def cp_conv2d_backward(
    grad: Tensor,
    x: Tensor,
    pointwise: Tensor,
    vertical: Tensor,
    horizontal: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of (x, pointwise, vertical, horizontal); None where `needs` is False."""
    need_x, need_point, need_vertical, need_horizontal = needs
    groups = pointwise.shape[0] * pointwise.shape[1]
    point4, vertical4, horizontal4 = _pointwise4(pointwise), _vertical4(vertical), _horizontal4(horizontal)
    over_h = (*along_h(stride, padding, dilation), groups)
    over_w = (*along_w(stride, padding, dilation), groups)
    z_point = F.conv2d(x, point4)
    z_vertical = F.conv2d(z_point, vertical4, None, *over_h)
    below = need_x or need_point
    # Every rank's map receives the same gradient: the backward of the sum over R.
    grad_z: Tensor | None = grad.unsqueeze(1).expand(-1, pointwise.shape[0], -1, -1, -1).flatten(1, 2)
    grad_z, grad_horizontal = step(
        grad_z, z_vertical, horizontal4, (below or need_vertical, need_horizontal), *over_w
    )
    grad_z, grad_vertical = step(grad_z, z_point, vertical4, (below, need_vertical), *over_h)
    grad_x, grad_point = step(grad_z, x, point4, (need_x, need_point))
    shaped = zip((grad_point, grad_vertical, grad_horizontal), (pointwise, vertical, horizontal), strict=True)
    return grad_x, *(None if g is None else g.reshape(factor.shape) for g, factor in shaped)


def step(
    grad: Tensor | None,
    z: Tensor,
    weight: Tensor,
    needs: tuple[bool, bool],
    stride: Pair = ONE,
    padding: Pair = ZERO,
    dilation: Pair = ONE,
    groups: int = 1,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of one convolution's input and weight."""
    if grad is None or not any(needs):
        return None, None
    out = torch.ops.aten.convolution_backward(
        grad, z, weight, None, stride, padding, dilation, False, ZERO, groups, (*needs, False)
    )
    return out[0], out[1]


def _flat(grad: Tensor | None) -> Tensor | None:
    return None if grad is None else grad.flatten(1)


def _pointwise4(pointwise: Tensor) -> Tensor:
    return pointwise.flatten(0, 1)[:, :, None, None]


def _vertical4(vertical: Tensor) -> Tensor:
    return vertical.flatten(0, 1)[:, None, :, None]


def _horizontal4(horizontal: Tensor) -> Tensor:
    return horizontal.flatten(0, 1)[:, None, None, :]


def along_h(stride: Pair, padding: Pair, dilation: Pair) -> Geometry:
    """The geometry of a kh×1 pass."""
    return (stride[0], 1), (padding[0], 0), (dilation[0], 1)


def along_w(stride: Pair, padding: Pair, dilation: Pair) -> Geometry:
    """The geometry of a 1×kw pass."""
    return (1, stride[1]), (0, padding[1]), (1, dilation[1])
