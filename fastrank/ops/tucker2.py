"""`tucker2_conv2d`: a Tucker-2 convolution, 1×1 → kh×kw → 1×1, as one operator."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastrank import _backends, _checks, reference
from fastrank.ops import _register
from fastrank.ops._conv import BACKEND_NAMES, Pair, conv_geometry, conv_macs


def tucker2_conv2d(
    x: Tensor,
    w_in: Tensor,
    core: Tensor,
    w_out: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Pair = 1,
    padding: int | Pair | str = 0,
    dilation: int | Pair = 1,
    backend: str = "auto",
) -> Tensor:
    """Convolve with a kernel in Tucker-2 form, W[o, i] = Σ w_out[o, r] core[r, s] w_in[s, i].

    Shapes: x (N, I, H, W), w_in (R_in, I), core (R_out, R_in, kh, kw), w_out (O, R_out), bias (O,) -> (N, O, H', W').
    Stride, padding (also "same" and "valid", zeros) and dilation belong to the core. The output keeps x's memory
    format. Differentiable in every tensor, twice; the backward pass recomputes the two intermediate maps instead of
    storing them. Under autocast the inputs are cast as for `torch.nn.functional.conv2d`.

    backend: "auto" | "sequence" (three library convolutions) | "dense" (one, with the merged kernel) | "reference".
    Raises ValueError or TypeError, naming the argument, on a wrong shape, dtype, device or size.
    """
    _checks.tensor("x", x, (None, None, None, None), "(N, I, H, W)")
    _checks.tensor("core", core, (None, None, None, None), "(R_out, R_in, kh, kw)")
    _checks.tensor("w_in", w_in, (core.shape[1], x.shape[1]), "(R_in, I)")
    _checks.tensor("w_out", w_out, (None, core.shape[0]), "(O, R_out)")
    _checks.filled("core", core, "(R_out, R_in, kh, kw)")
    _checks.filled("w_in", w_in, "(R_in, I)")
    _checks.filled("w_out", w_out, "(O, R_out)")
    if bias is not None:
        _checks.tensor("bias", bias, (w_out.shape[0],), "(O,)")
    _checks.choice("backend", backend, BACKEND_NAMES)
    x, w_in, core, w_out, bias = _register.autocast(x, w_in, core, w_out, bias)  # type: ignore[assignment]
    _checks.same_kind(x=x, w_in=w_in, core=core, w_out=w_out, bias=bias)
    x, geometry = conv_geometry(x, (core.shape[2], core.shape[3]), stride, padding, dilation)
    out: Tensor = torch.ops.fastrank.tucker2_conv2d(x, w_in, core, w_out, bias, *geometry, backend)
    return out


def _forward(
    x: Tensor,
    w_in: Tensor,
    core: Tensor,
    w_out: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    backend: str,
) -> Tensor:
    if _backends.choose(_backends.facts("tucker2_conv2d", x), backend) == "dense":
        out = F.conv2d(x, reference.conv.tucker2_weight(w_in, core, w_out), bias, stride, padding, dilation)
    else:
        out = reference.conv.tucker2_conv2d(x, w_in, core, w_out, bias, stride, padding, dilation)
    return out.contiguous(memory_format=_register.memory_format(x))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w_in, core, w_out, _, *ctx.geometry, _ = inputs
    ctx.save_for_backward(x, w_in, core, w_out)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    inputs: Any = (*ctx.saved_tensors, *ctx.geometry, ctx.needs_input_grad[:4])
    grads = reference.conv.tucker2_conv2d_backward(grad, *inputs)
    grad_bias = grad.sum((0, 2, 3)) if ctx.needs_input_grad[4] else None
    return (*grads, grad_bias, None, None, None, None)


_register.register(
    "tucker2_conv2d(Tensor x, Tensor w_in, Tensor core, Tensor w_out, Tensor? bias, SymInt[2] stride, "
    "SymInt[2] padding, SymInt[2] dilation, str backend) -> Tensor",
    _forward,
    setup_context=_setup_context,
    backward=_backward,
)


@register_flop_formula(torch.ops.fastrank.tucker2_conv2d)
def _flops(
    x: tuple[int, ...],
    w_in: tuple[int, ...],
    core: tuple[int, ...],
    w_out: tuple[int, ...],
    *_: object,
    out_shape: tuple[int, ...],
    **__: object,
) -> int:
    """Two floating-point operations a multiply-add, of the three stages as `sequence` runs them."""
    batch, height, width = x[0], *x[2:]
    stages = (
        conv_macs(1, 1, w_in[1], w_in[0], (height, width)),
        conv_macs(core[2], core[3], core[1], core[0], (out_shape[2], out_shape[3])),
        conv_macs(1, 1, w_out[1], w_out[0], (out_shape[2], out_shape[3])),
    )
    return 2 * batch * sum(stages)
