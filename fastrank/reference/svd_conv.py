"""The truth of the convolutions in two steps (TRP's forms), in plain PyTorch; letters as in `reference.conv`.

channel    kh×kw I→R, then 1×1 R→O
spatial    kh×1 I→R, then 1×kw R→O
decoupled  R paths of a 1×1 convolution I→O and a depthwise kh×kw one, summed

The backward functions recompute the map between the steps, and are differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrank.reference.conv import ONE, ZERO, Geometry, Pair, along_h, along_w, epilogue, step


def channel_conv2d(
    x: Tensor,
    first: Tensor,
    second: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    activation: str,
) -> Tensor:
    """x (N, I, H, W), first (R, I, kh, kw), second (O, R, 1, 1), bias (O,), residual and result (N, O, H', W')."""
    z = F.conv2d(x, first, None, stride, padding, dilation)
    return epilogue(F.conv2d(z, second, bias), residual, activation)


def channel_weight(first: Tensor, second: Tensor) -> Tensor:
    """The dense kernel (O, I, kh, kw)."""
    return torch.einsum("riyx,orab->oiyx", first, second)


def channel_weight_backward(grad: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
    """Gradients of (first, second) from that of the kernel."""
    return torch.einsum("oiyx,orab->riyx", grad, second), _second(torch.einsum("oiyx,riyx->or", grad, first))


def channel_conv2d_backward(
    grad: Tensor,
    x: Tensor,
    first: Tensor,
    second: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of (x, first, second); None where `needs` is False."""
    return _two_steps(grad, x, first, second, (stride, padding, dilation), (ONE, ZERO, ONE), needs)


def spatial_conv2d(
    x: Tensor,
    first: Tensor,
    second: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    activation: str,
) -> Tensor:
    """x (N, I, H, W), first (R, I, kh, 1), second (O, R, 1, kw), bias (O,), residual and result (N, O, H', W')."""
    z = F.conv2d(x, first, None, *along_h(stride, padding, dilation))
    return epilogue(F.conv2d(z, second, bias, *along_w(stride, padding, dilation)), residual, activation)


def spatial_weight(first: Tensor, second: Tensor) -> Tensor:
    """The dense kernel (O, I, kh, kw)."""
    return torch.einsum("riya,orbx->oiyx", first, second)


def spatial_weight_backward(grad: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
    """Gradients of (first, second) from that of the kernel."""
    over_x = torch.einsum("oiyx,orbx->riy", grad, second)
    return over_x.unsqueeze(3), torch.einsum("oiyx,riya->orx", grad, first).unsqueeze(2)


def spatial_conv2d_backward(
    grad: Tensor,
    x: Tensor,
    first: Tensor,
    second: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of (x, first, second); None where `needs` is False."""
    geometry = stride, padding, dilation
    return _two_steps(grad, x, first, second, along_h(*geometry), along_w(*geometry), needs)


def _two_steps(
    grad: Tensor,
    x: Tensor,
    first: Tensor,
    second: Tensor,
    geometry: Geometry,
    second_geometry: Geometry,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    need_x, need_first, need_second = needs
    z = F.conv2d(x, first, None, *geometry)
    grad_z, grad_second = step(grad, z, second, (need_x or need_first, need_second), *second_geometry)
    return (*step(grad_z, x, first, (need_x, need_first), *geometry), grad_second)


def _second(grad: Tensor) -> Tensor:
    return grad[:, :, None, None]


def decoupled_conv2d(
    x: Tensor,
    pointwise: Tensor,
    depthwise: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    activation: str,
) -> Tensor:
    """x (N, I, H, W), pointwise (R, O, I), depthwise (R, O, kh, kw), bias (O,), residual and result (N, O, H', W')."""
    rank, out_channels, _ = pointwise.shape
    z = F.conv2d(x, pointwise.flatten(0, 1)[:, :, None, None])
    z = F.conv2d(z, depthwise.flatten(0, 1)[:, None], None, stride, padding, dilation, rank * out_channels)
    out = torch.unflatten(z, 1, (rank, out_channels)).sum(1)
    return epilogue(out if bias is None else out + bias[:, None, None], residual, activation)


def decoupled_weight(pointwise: Tensor, depthwise: Tensor) -> Tensor:
    """The dense kernel (O, I, kh, kw)."""
    return torch.einsum("roi,royx->oiyx", pointwise, depthwise)


def decoupled_weight_backward(grad: Tensor, pointwise: Tensor, depthwise: Tensor) -> tuple[Tensor, ...]:
    """Gradients of (pointwise, depthwise) from that of the kernel."""
    return torch.einsum("oiyx,royx->roi", grad, depthwise), torch.einsum("oiyx,roi->royx", grad, pointwise)


def decoupled_conv2d_backward(
    grad: Tensor,
    x: Tensor,
    pointwise: Tensor,
    depthwise: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of (x, pointwise, depthwise); None where `needs` is False."""
    need_x, need_pointwise, need_depthwise = needs
    groups = pointwise.shape[0] * pointwise.shape[1]
    point4, depth4 = pointwise.flatten(0, 1)[:, :, None, None], depthwise.flatten(0, 1)[:, None]
    z = F.conv2d(x, point4)
    # Every rank's map receives the same gradient: the backward of the sum over R.
    grad_z = grad.unsqueeze(1).expand(-1, pointwise.shape[0], -1, -1, -1).flatten(1, 2)
    below = need_x or need_pointwise
    down, grad_depth = step(grad_z, z, depth4, (below, need_depthwise), stride, padding, dilation, groups)
    grad_x, grad_point = step(down, x, point4, (need_x, need_pointwise))
    shaped = zip((grad_point, grad_depth), (pointwise, depthwise), strict=True)
    return grad_x, *(None if g is None else g.reshape(factor.shape) for g, factor in shaped)


def by_rank_conv2d(
    x: Tensor,
    pointwise: Tensor,
    depthwise: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    activation: str,
) -> Tensor:
    """`decoupled_conv2d`, one rank after the other: the maps between are R times smaller, and stay in caches."""
    out: Tensor | None = None
    for point, depth in zip(pointwise, depthwise, strict=True):
        z = F.conv2d(x, point[:, :, None, None])
        part = F.conv2d(z, depth[:, None], bias if out is None else None, stride, padding, dilation, len(depth))
        out = part if out is None else out.add_(part)
    assert out is not None
    return epilogue(out, residual, activation)


def by_rank_conv2d_backward(
    grad: Tensor,
    x: Tensor,
    pointwise: Tensor,
    depthwise: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of (x, pointwise, depthwise), one rank after the other; None where `needs` is False."""
    total: Tensor | None = None
    found: list[Sequence[Tensor | None]] = []
    for r in range(pointwise.shape[0]):
        geometry = stride, padding, dilation
        grad_x, *factors = decoupled_conv2d_backward(
            grad, x, pointwise[r : r + 1], depthwise[r : r + 1], *geometry, needs
        )
        total = grad_x if total is None or grad_x is None else total.add_(grad_x)
        found.append(factors)
    parts = zip(zip(*found, strict=True), needs[1:], strict=True)
    return total, *(torch.cat(part) if need else None for part, need in parts)
