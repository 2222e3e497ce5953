"""What the factored convolutions share: geometry, padding strings, dispatch, and their registration as operators."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastrank import _backends, _checks
from fastrank.ops import _register

Pair = tuple[int, int]
Shape = tuple[int, ...]
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


def convolve(
    name: str,
    x: Tensor,
    factors: dict[str, Tensor],
    bias: Tensor | None,
    kernel: Pair,
    stride: int | Pair,
    padding: int | Pair | str,
    dilation: int | Pair,
    backend: str,
) -> Tensor:
    """Call the operator `name` on factors whose shapes are checked: autocast, one kind of tensor, geometry."""
    _checks.choice("backend", backend, BACKEND_NAMES)
    cast: Any = _register.autocast(x, *factors.values(), bias)
    x, *values, bias = cast
    _checks.same_kind(x=x, **dict(zip(factors, values, strict=True)), bias=bias)
    x, geometry = conv_geometry(x, kernel, stride, padding, dilation)
    out: Tensor = getattr(torch.ops.fastrank, name)(x, *values, bias, *geometry, backend)
    return out


def register_convolution(
    name: str,
    factors: tuple[str, str, str],
    *,
    sequence: Callable[..., Tensor],
    merge: Callable[..., Tensor],
    backward: Callable[..., tuple[Tensor | None, ...]],
    macs: Callable[..., Iterable[int]],
) -> None:
    """Register ``name(x, *factors, bias, stride, padding, dilation, backend)``, a convolution by three factors.

    sequence: the plain-PyTorch truth, of the operator's arguments but the backend; merge: factors -> dense kernel;
    backward: (grad, x, *factors, *geometry, needs) -> gradients of x and the factors; macs: multiply-adds of each
    stage from (shapes of the factors, (H, W), (H', W')).
    """

    def forward(x: Tensor, *arguments: Any) -> Tensor:
        *tensors, bias, stride, padding, dilation, backend = arguments
        if _backends.choose(_backends.facts(name, x), backend) == "dense":
            out = F.conv2d(x, merge(*tensors), bias, stride, padding, dilation)
        else:
            out = sequence(x, *tensors, bias, stride, padding, dilation)
        return out.contiguous(memory_format=_register.memory_format(x))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, _, stride, padding, dilation, _ = inputs
        ctx.geometry = stride, padding, dilation
        ctx.save_for_backward(*tensors)

    def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = backward(grad, *ctx.saved_tensors, *ctx.geometry, ctx.needs_input_grad[:4])
        grad_bias = grad.sum((0, 2, 3)) if ctx.needs_input_grad[4] else None
        return (*grads, grad_bias, None, None, None, None)

    tensors = ", ".join(f"Tensor {factor}" for factor in factors)
    schema = f"{name}(Tensor x, {tensors}, Tensor? bias, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, "
    _register.register(f"{schema}str backend) -> Tensor", forward, setup_context=setup_context, backward=gradients)

    @register_flop_formula(getattr(torch.ops.fastrank, name))
    def flops(x: Shape, *shapes: Any, out_shape: Shape, **_: object) -> int:
        """Two floating-point operations a multiply-add, of the stages as `sequence` runs them."""
        return 2 * x[0] * sum(macs(*shapes[:3], x[2:], out_shape[2:]))
