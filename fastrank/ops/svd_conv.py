"""`channel_svd_conv2d`, `spatial_svd_conv2d`, `decoupled_svd_conv2d`: convolutions in the two-step forms of TRP."""

from __future__ import annotations

from torch import Tensor

from fastrank import _checks, reference
from fastrank.ops._conv import Library, Pair, Shape, Sizes, conv_macs, convolve, register_convolution
from fastrank.ops._depthwise_triton import TritonKernels
from fastrank.ops._tucker2_triton import ChannelKernels


def channel_svd_conv2d(
    x: Tensor,
    first: Tensor,
    second: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str = "none",
    stride: int | Pair = 1,
    padding: int | Pair | str = 0,
    dilation: int | Pair = 1,
    backend: str = "auto",
) -> Tensor:
    """activation(convolution of x + bias + residual) by a kh×kw convolution I→R and a 1×1 one R→O.

    Shapes: x (N, I, H, W), first (R, I, kh, kw), second (O, R, 1, 1), bias (O,), residual (N, O, H', W') ->
    (N, O, H', W'). The rest, derivatives and errors included, is as in `tucker2_conv2d`.

    backend: "auto" (by tables of measured times) | "sequence" (two library convolutions) | "dense" (one, with the
    merged kernel) | "triton" (one fused kernel) | "reference".
    """
    _checks.tensor("x", x, (None, None, None, None), "(N, I, H, W)")
    _checks.tensor("first", first, (None, x.shape[1], None, None), "(R, I, kh, kw)")
    _checks.tensor("second", second, (None, first.shape[0], 1, 1), "(O, R, 1, 1)")
    _checks.filled("first", first, "(R, I, kh, kw)")
    _checks.filled("second", second, "(O, R, 1, 1)")
    if bias is not None:
        _checks.tensor("bias", bias, (second.shape[0],), "(O,)")
    factors, kernel = {"first": first, "second": second}, (first.shape[2], first.shape[3])
    geometry = kernel, stride, padding, dilation
    return convolve("channel_svd_conv2d", x, factors, bias, residual, *geometry, activation, backend)


def spatial_svd_conv2d(
    x: Tensor,
    first: Tensor,
    second: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str = "none",
    stride: int | Pair = 1,
    padding: int | Pair | str = 0,
    dilation: int | Pair = 1,
    backend: str = "auto",
) -> Tensor:
    """activation(convolution of x + bias + residual) by a kh×1 convolution I→R and a 1×kw one R→O.

    Shapes: x (N, I, H, W), first (R, I, kh, 1), second (O, R, 1, kw), bias (O,), residual (N, O, H', W') ->
    (N, O, H', W'). The first strides along H, the second along W. The rest is as in `tucker2_conv2d`.

    backend: "auto" (by tables of measured times) | "sequence" (two library convolutions) | "dense" (one, with the
    merged kernel) | "reference".
    """
    _checks.tensor("x", x, (None, None, None, None), "(N, I, H, W)")
    _checks.tensor("first", first, (None, x.shape[1], None, 1), "(R, I, kh, 1)")
    _checks.tensor("second", second, (None, first.shape[0], 1, None), "(O, R, 1, kw)")
    _checks.filled("first", first, "(R, I, kh, 1)")
    _checks.filled("second", second, "(O, R, 1, kw)")
    if bias is not None:
        _checks.tensor("bias", bias, (second.shape[0],), "(O,)")
    factors, kernel = {"first": first, "second": second}, (first.shape[2], second.shape[3])
    geometry = kernel, stride, padding, dilation
    return convolve("spatial_svd_conv2d", x, factors, bias, residual, *geometry, activation, backend)


def decoupled_svd_conv2d(
    x: Tensor,
    pointwise: Tensor,
    depthwise: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str = "none",
    stride: int | Pair = 1,
    padding: int | Pair | str = 0,
    dilation: int | Pair = 1,
    backend: str = "auto",
) -> Tensor:
    """activation(convolution of x + bias + residual) by R pairs of a 1×1 and a depthwise kh×kw convolution, summed.

    Filter o is W[o] = Σ_r pointwise[r, o] ∘ depthwise[r, o]. Shapes: x (N, I, H, W), pointwise (R, O, I), depthwise
    (R, O, kh, kw), bias (O,), residual (N, O, H', W') -> (N, O, H', W'). The rest is as in `cp_conv2d`.

    backend: "auto" (by tables of measured times) | "sequence" (library convolutions and a sum) | "depthwise" (a rank
    after the other) | "dense" (one, with the merged kernel) | "triton" (one fused kernel) | "reference".
    """
    _checks.tensor("x", x, (None, None, None, None), "(N, I, H, W)")
    _checks.tensor("pointwise", pointwise, (None, None, x.shape[1]), "(R, O, I)")
    rank, out_channels, _ = pointwise.shape
    _checks.tensor("depthwise", depthwise, (rank, out_channels, None, None), "(R, O, kh, kw)")
    _checks.filled("pointwise", pointwise, "(R, O, I)")
    _checks.filled("depthwise", depthwise, "(R, O, kh, kw)")
    if bias is not None:
        _checks.tensor("bias", bias, (out_channels,), "(O,)")
    factors, kernel = {"pointwise": pointwise, "depthwise": depthwise}, (depthwise.shape[2], depthwise.shape[3])
    geometry = kernel, stride, padding, dilation
    return convolve("decoupled_svd_conv2d", x, factors, bias, residual, *geometry, activation, backend)


def _channel_macs(first: Shape, second: Shape, in_size: Pair, out_size: Pair) -> tuple[int, int]:
    return (
        conv_macs(first[2], first[3], first[1], first[0], out_size),
        conv_macs(1, 1, second[1], second[0], out_size),
    )


def _spatial_macs(first: Shape, second: Shape, in_size: Pair, out_size: Pair) -> tuple[int, int]:
    return (
        conv_macs(first[2], 1, first[1], first[0], (out_size[0], in_size[1])),
        conv_macs(1, second[3], second[1], second[0], out_size),
    )


def _decoupled_macs(pointwise: Shape, depthwise: Shape, in_size: Pair, out_size: Pair) -> tuple[int, int]:
    groups = pointwise[0] * pointwise[1]
    return (
        conv_macs(1, 1, pointwise[2], groups, in_size),
        conv_macs(depthwise[2], depthwise[3], groups, groups, out_size, groups),
    )


register_convolution(
    "channel_svd_conv2d",
    ("first", "second"),
    sequence=reference.svd_conv.channel_conv2d,
    merge=reference.svd_conv.channel_weight,
    merge_backward=reference.svd_conv.channel_weight_backward,
    backward=reference.svd_conv.channel_conv2d_backward,
    macs=_channel_macs,
    sizes=lambda first, second: Sizes(second[0], (first[2], first[3]), (first[0], first[0])),
    kernels={"triton": ChannelKernels()},
)
register_convolution(
    "spatial_svd_conv2d",
    ("first", "second"),
    sequence=reference.svd_conv.spatial_conv2d,
    merge=reference.svd_conv.spatial_weight,
    merge_backward=reference.svd_conv.spatial_weight_backward,
    backward=reference.svd_conv.spatial_conv2d_backward,
    macs=_spatial_macs,
    sizes=lambda first, second: Sizes(second[0], (first[2], second[3]), (first[0], first[0])),
)
register_convolution(
    "decoupled_svd_conv2d",
    ("pointwise", "depthwise"),
    sequence=reference.svd_conv.decoupled_conv2d,
    merge=reference.svd_conv.decoupled_weight,
    merge_backward=reference.svd_conv.decoupled_weight_backward,
    backward=reference.svd_conv.decoupled_conv2d_backward,
    macs=_decoupled_macs,
    sizes=lambda pointwise, depthwise: Sizes(
        pointwise[1], (depthwise[2], depthwise[3]), (pointwise[0], pointwise[0])
    ),
    libraries={
        "depthwise": Library(reference.svd_conv.by_rank_conv2d, reference.svd_conv.by_rank_conv2d_backward)
    },
    kernels={"triton": TritonKernels()},
)
