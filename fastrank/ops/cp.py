"""`cp_conv2d`: a convolution whose filters are sums of rank-1 terms (pointwise, vertical, horizontal)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastrank import _checks, reference
from fastrank.ops._conv import Library, Pair, Shape, Sizes, conv_macs, convolve, register_convolution
from fastrank.ops._depthwise_triton import TritonKernels


def cp_conv2d(
    x: Tensor,
    pointwise: Tensor,
    vertical: Tensor,
    horizontal: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str = "none",
    stride: int | Pair = 1,
    padding: int | Pair | str = 0,
    dilation: int | Pair = 1,
    backend: str = "auto",
) -> Tensor:
    """activation(convolution of x + bias + residual), the filters in CP form (NORTON).

    Filter o is W[o] = Σ_r pointwise[r, o] ∘ vertical[r, o] ∘ horizontal[r, o].
    Shapes: x (N, I, H, W), pointwise (R, O, I), vertical (R, O, kh), horizontal (R, O, kw), bias (O,),
    residual (N, O, H', W') -> (N, O, H', W'). The vertical pass strides along H, the horizontal one along W; padding
    may be "same" or "valid" (zeros). activation: "none" | "relu" | "silu". Tensors are of one dtype and device and of
    any strides; the output has x's memory format. Differentiable in every tensor, twice. A backend that is named
    recomputes the intermediate maps in the backward pass; "auto" stores them where it takes library calls.
    Under autocast the inputs are cast as for `torch.nn.functional.conv2d`.

    backend: "auto" (by tables of measured times) | "sequence" (library convolutions and a sum) | "depthwise" (a rank
    after the other: 1×1, then one depthwise kh×kw for both passes) | "dense" (one, with the merged kernel) |
    "triton" (one fused kernel) | "reference".
    Raises ValueError or TypeError, naming the argument, on a wrong shape, dtype, device or size, and ValueError with
    the reason where a named backend cannot run the call.
    """
    _checks.tensor("x", x, (None, None, None, None), "(N, I, H, W)")
    _checks.tensor("pointwise", pointwise, (None, None, x.shape[1]), "(R, O, I)")
    rank, out_channels, _ = pointwise.shape
    _checks.tensor("vertical", vertical, (rank, out_channels, None), "(R, O, kh)")
    _checks.tensor("horizontal", horizontal, (rank, out_channels, None), "(R, O, kw)")
    _checks.filled("pointwise", pointwise, "(R, O, I)")
    _checks.filled("vertical", vertical, "(R, O, kh)")
    _checks.filled("horizontal", horizontal, "(R, O, kw)")
    if bias is not None:
        _checks.tensor("bias", bias, (out_channels,), "(O,)")
    factors = {"pointwise": pointwise, "vertical": vertical, "horizontal": horizontal}
    kernel = vertical.shape[2], horizontal.shape[2]
    geometry = kernel, stride, padding, dilation
    return convolve("cp_conv2d", x, factors, bias, residual, *geometry, activation, backend)


def _macs(pointwise: Shape, vertical: Shape, horizontal: Shape, in_size: Pair, out_size: Pair) -> tuple[int, ...]:
    groups = pointwise[0] * pointwise[1]
    return (
        conv_macs(1, 1, pointwise[2], groups, in_size),
        conv_macs(vertical[2], 1, groups, groups, (out_size[0], in_size[1]), groups),
        conv_macs(1, horizontal[2], groups, groups, out_size, groups),
    )


def _by_rank(
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
    depthwise = reference.conv.cp_depthwise(vertical, horizontal)
    return reference.svd_conv.by_rank_conv2d(
        x, pointwise, depthwise, bias, residual, stride, padding, dilation, activation
    )


def _by_rank_backward(
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
    depthwise, either = reference.conv.cp_depthwise(vertical, horizontal), needs[2] or needs[3]
    grad_x, grad_pointwise, grad_depthwise = reference.svd_conv.by_rank_conv2d_backward(
        grad, x, pointwise, depthwise, stride, padding, dilation, (*needs[:2], either)
    )
    if grad_depthwise is None:
        return grad_x, grad_pointwise, None, None
    return grad_x, grad_pointwise, *reference.conv.cp_depthwise_backward(grad_depthwise, vertical, horizontal)


register_convolution(
    "cp_conv2d",
    ("pointwise", "vertical", "horizontal"),
    sequence=reference.conv.cp_conv2d,
    merge=reference.conv.cp_weight,
    merge_backward=reference.conv.cp_weight_backward,
    backward=reference.conv.cp_conv2d_backward,
    macs=_macs,
    sizes=lambda pointwise, vertical, horizontal: Sizes(
        pointwise[1], (vertical[2], horizontal[2]), (pointwise[0], pointwise[0])
    ),
    libraries={"depthwise": Library(_by_rank, _by_rank_backward)},
    kernels={"triton": TritonKernels()},
)
