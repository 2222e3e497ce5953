"""`tucker2_conv2d`: a Tucker-2 convolution, 1×1 → kh×kw → 1×1, as one operator."""

from __future__ import annotations

from torch import Tensor

from fastrank import _checks, reference
from fastrank.ops._conv import Pair, Shape, Sizes, conv_macs, convolve, register_convolution
from fastrank.ops._tucker2_kernels import CudaKernels
from fastrank.ops._tucker2_triton import TritonKernels


def tucker2_conv2d(
    x: Tensor,
    w_in: Tensor,
    core: Tensor,
    w_out: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str = "none",
    stride: int | Pair = 1,
    padding: int | Pair | str = 0,
    dilation: int | Pair = 1,
    backend: str = "auto",
) -> Tensor:
    """activation(convolution of x + bias + residual), the kernel in Tucker-2 form.

    The kernel is W[o, i] = Σ w_out[o, r] core[r, s] w_in[s, i].
    Shapes: x (N, I, H, W), w_in (R_in, I), core (R_out, R_in, kh, kw), w_out (O, R_out), bias (O,),
    residual (N, O, H', W') -> (N, O, H', W'). Stride, padding (also "same" and "valid", zeros) and dilation belong to
    the core. activation: "none" | "relu" | "silu". Tensors are of one dtype and device and of any strides; the output
    has x's memory format. Channels-last with channels in multiples of 8 is what the kernels read and write fastest;
    other layouts they read in place. Differentiable in every tensor, twice. A backend that is named recomputes the two
    intermediate maps in the backward pass; "auto" stores them where it takes library calls. Under autocast
    the inputs are cast as for `torch.nn.functional.conv2d`.

    backend: "auto" (by tables of measured times) | "sequence" (three library convolutions) | "dense" (one, with the
    merged kernel) | "triton" | "cuda" (one fused kernel; float16 and bfloat16 in CUDA C++, float32 too in Triton) |
    "host" (that of "cuda" on a CPU, for tests) | "reference". A backend that is named is taken or refused.
    Raises ValueError or TypeError, naming the argument, on a wrong shape, dtype, device or size, and ValueError with
    the reason where a named backend cannot run the call.
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
    factors = {"w_in": w_in, "core": core, "w_out": w_out}
    kernel = core.shape[2], core.shape[3]
    return convolve(
        "tucker2_conv2d", x, factors, bias, residual, kernel, stride, padding, dilation, activation, backend
    )


def _macs(w_in: Shape, core: Shape, w_out: Shape, in_size: Pair, out_size: Pair) -> tuple[int, ...]:
    return (
        conv_macs(1, 1, w_in[1], w_in[0], in_size),
        conv_macs(core[2], core[3], core[1], core[0], out_size),
        conv_macs(1, 1, w_out[1], w_out[0], out_size),
    )


register_convolution(
    "tucker2_conv2d",
    ("w_in", "core", "w_out"),
    sequence=reference.conv.tucker2_conv2d,
    merge=reference.conv.tucker2_weight,
    merge_backward=reference.conv.tucker2_weight_backward,
    backward=reference.conv.tucker2_conv2d_backward,
    macs=_macs,
    sizes=lambda w_in, core, w_out: Sizes(w_out[0], (core[2], core[3]), (core[1], core[0])),
    kernels={"triton": TritonKernels(), "cuda": CudaKernels(), "host": CudaKernels()},
)
