"""`cp_conv2d`: a convolution whose filters are sums of rank-1 terms (pointwise, vertical, horizontal)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastrank import _backends, _checks, reference
from fastrank.ops import _register
from fastrank.ops._conv import BACKEND_NAMES, Pair, conv_geometry, conv_macs


def cp_conv2d(
    x: Tensor,
    pointwise: Tensor,
    vertical: Tensor,
    horizontal: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Pair = 1,
    padding: int | Pair | str = 0,
    dilation: int | Pair = 1,
    backend: str = "auto",
) -> Tensor:
    """Convolve with filters in CP form, W[o] = Σ_r pointwise[r, o] ∘ vertical[r, o] ∘ horizontal[r, o] (NORTON).

    Shapes: x (N, I, H, W), pointwise (R, O, I), vertical (R, O, kh), horizontal (R, O, kw), bias (O,)
    -> (N, O, H', W'). The vertical pass strides along H, the horizontal one along W; padding may be "same" or "valid"
    (zeros). The output keeps x's memory format. Differentiable in every tensor, twice; the backward pass recomputes
    the intermediate maps. Under autocast the inputs are cast as for `torch.nn.functional.conv2d`.

    backend: "auto" | "sequence" (library convolutions and a sum) | "dense" (one, with the merged kernel) | "reference".
    Raises ValueError or TypeError, naming the argument, on a wrong shape, dtype, device or size.
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
    _checks.choice("backend", backend, BACKEND_NAMES)
    x, pointwise, vertical, horizontal, bias = _register.autocast(x, pointwise, vertical, horizontal, bias)  # type: ignore[assignment]
    _checks.same_kind(x=x, pointwise=pointwise, vertical=vertical, horizontal=horizontal, bias=bias)
    x, geometry = conv_geometry(x, (vertical.shape[2], horizontal.shape[2]), stride, padding, dilation)
    out: Tensor = torch.ops.fastrank.cp_conv2d(x, pointwise, vertical, horizontal, bias, *geometry, backend)
    return out


def _forward(
    x: Tensor,
    pointwise: Tensor,
    vertical: Tensor,
    horizontal: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    backend: str,
) -> Tensor:
    if _backends.choose(_backends.facts("cp_conv2d", x), backend) == "dense":
        out = F.conv2d(x, reference.conv.cp_weight(pointwise, vertical, horizontal), bias, stride, padding, dilation)
    else:
        out = reference.conv.cp_conv2d(x, pointwise, vertical, horizontal, bias, stride, padding, dilation)
    return out.contiguous(memory_format=_register.memory_format(x))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, pointwise, vertical, horizontal, _, *ctx.geometry, _ = inputs
    ctx.save_for_backward(x, pointwise, vertical, horizontal)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    inputs: Any = (*ctx.saved_tensors, *ctx.geometry, ctx.needs_input_grad[:4])
    grads = reference.conv.cp_conv2d_backward(grad, *inputs)
    grad_bias = grad.sum((0, 2, 3)) if ctx.needs_input_grad[4] else None
    return (*grads, grad_bias, None, None, None, None)


_register.register(
    "cp_conv2d(Tensor x, Tensor pointwise, Tensor vertical, Tensor horizontal, Tensor? bias, SymInt[2] stride, "
    "SymInt[2] padding, SymInt[2] dilation, str backend) -> Tensor",
    _forward,
    setup_context=_setup_context,
    backward=_backward,
)


@register_flop_formula(torch.ops.fastrank.cp_conv2d)
def _flops(
    x: tuple[int, ...],
    pointwise: tuple[int, ...],
    vertical: tuple[int, ...],
    horizontal: tuple[int, ...],
    *_: object,
    out_shape: tuple[int, ...],
    **__: object,
) -> int:
    """Two floating-point operations a multiply-add, of the three passes as `sequence` runs them."""
    groups = pointwise[0] * pointwise[1]
    (height, width), (out_height, out_width) = x[2:], out_shape[2:]
    stages = (
        conv_macs(1, 1, pointwise[2], groups, (height, width)),
        conv_macs(vertical[2], 1, groups, groups, (out_height, width), groups),
        conv_macs(1, horizontal[2], groups, groups, (out_height, out_width), groups),
    )
    return 2 * x[0] * sum(stages)
