"""The family "cp": convolutions whose filters are CP sums, with bias and ReLU, and forward and backward.

A problem is [x (N, C, H, H), pointwise (R, C, C), vertical (R, C, 3), horizontal (R, C, 3), bias (C,)].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastrank import reference
from fastrank.benchmarks._check import multilinear
from fastrank.benchmarks._peers import cannot_compile, compiled_call, missing, tltorch_cp
from fastrank.benchmarks._registry import Case, Contender, Judge, Thunk, Work, refusals
from fastrank.benchmarks.layers import CP_LAYERS, CP_RANKS
from fastrank.nn import FusedCPConv, LayerCPConv
from fastrank.ops import _conv, cp_conv2d

OP = "cp_conv2d"
GEOMETRY = (1, 1), (1, 1), (1, 1)
BATCH = {"cuda": 32, "cpu": 1}
ON_A_CPU = ((64, 56, 1), (128, 28, 2), (256, 14, 4))
TLTORCH = ("factorized", "mobilenet", "reconstructed")
Problem = Sequence[Tensor]
Builder = Callable[[Problem], Thunk]


def cases(device: str) -> list[Case]:
    """Rows for a device; a CPU compiles one layer."""
    rows = [(*layer, rank) for rank in CP_RANKS for layer in CP_LAYERS] if device == "cuda" else list(ON_A_CPU)
    found = [case(*row, device, compile_too=device == "cuda" or row == rows[0]) for row in rows]
    found += [training_case(*row, device) for row in (rows if device == "cuda" else rows[:1])]
    return [*found, *(layer_case(channels, size, device) for channels, size in CP_LAYERS[:2])]


def made(channels: int, size: int, rank: int, batch: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """x, pointwise, vertical, horizontal and bias, of values that keep their variance through the factors."""
    torch.manual_seed(0)
    drawn = [
        torch.randn(batch, channels, size, size),
        torch.randn(rank, channels, channels) / math.sqrt(channels),
        torch.randn(rank, channels, 3) / math.sqrt(9 * rank),
        torch.randn(rank, channels, 3),
        torch.randn(channels),
    ]
    x, *others = (each.to(device, dtype) for each in drawn)
    return [x.contiguous(memory_format=format_of(x)), *others]


def format_of(x: Tensor) -> torch.memory_format:
    """The layout that a device is measured in."""
    return torch.channels_last if x.is_cuda else torch.contiguous_format


def chain(x: Tensor, *factors: Tensor) -> Tensor:
    """What a network of plain layers runs."""
    return reference.conv.cp_conv2d(x, *factors, None, *GEOMETRY, "relu")  # type: ignore[call-arg, arg-type]


def by(backend: str, activation: str = "relu") -> Builder:
    """The operator as training calls it."""
    return lambda p: lambda: cp_conv2d(*p, padding=1, activation=activation, backend=backend)


def dense(p: Problem) -> Thunk:
    """One library convolution of the merged kernel, merged before."""
    x, *factors, bias = p
    merged = reference.conv.cp_weight(*(factor.float() for factor in factors))
    weight = merged.to(x.dtype).contiguous(memory_format=format_of(x))
    return lambda: torch.conv2d(x, weight, bias, *GEOMETRY).relu_()


def triton(p: Problem) -> Thunk:
    """The fused kernel, as inference calls it: its weights stay packed."""
    x, *factors, bias = p
    launch = _conv.KERNELS[OP]["triton"].prepare(x, factors, bias, GEOMETRY)

    def call() -> Tensor:
        out = torch.empty_like(x)  # as many channels as x, and as many pixels
        launch(x, None, out, "relu")
        return out

    return call


def compiled(p: Problem) -> Thunk:
    """What torch.compile makes of the chain."""
    return compiled_call(chain, *p)


def tltorch(way: str) -> Builder:
    """The same function as tensorly-torch writes it: one CP of rank R·C, whose last factor sums over R."""

    def build(p: Problem) -> Thunk:
        x, pointwise, vertical, horizontal, bias = p
        rank, channels = pointwise.shape[:2]
        total = torch.eye(channels, dtype=x.dtype, device=x.device).repeat(1, rank)
        layer = tltorch_cp(
            pointwise.flatten(0, 1), (vertical.flatten(0, 1), horizontal.flatten(0, 1)), total, bias, 1, 1, way
        )
        return lambda: layer(x).relu_()

    return build


def training(build: Builder) -> Builder:
    """Forward and backward: the gradients of x, the factors and the bias."""

    def both(p: Problem) -> Thunk:
        leaves = [each.detach().requires_grad_() for each in p]
        forward = build(leaves)

        def call() -> Any:
            out = forward()
            return torch.autograd.grad(out, leaves, torch.ones_like(out))

        return call

    return both


def auto(p: Problem) -> Thunk:
    """A layer in inference, as users call it."""
    x, *factors = p
    rank, channels = factors[0].shape[:2]
    layer = FusedCPConv(channels, channels, 3, rank, padding=1, activation="relu", device="meta").eval()
    for name, value in zip(("pointwise", "vertical", "horizontal", "bias"), factors, strict=True):
        setattr(layer, name, nn.Parameter(value, requires_grad=False))
    return lambda: layer(x)


def case(channels: int, size: int, rank: int, device: str, *, compile_too: bool = False) -> Case:
    """The forward pass, with bias and ReLU."""
    refused = _refusals(channels, size, rank, device, "inference")
    found = [
        Contender("auto", auto),
        Contender("depthwise", by("depthwise")),
        Contender("triton", triton, refusal=refused.get("triton", "")),
        Contender("dense", dense, "dense"),
        Contender("sequence", by("sequence"), "sequence"),
    ]
    if compile_too:
        found.append(Contender("compile", compiled, "compile", cannot_compile()))
    found += [Contender(f"tltorch {way}", tltorch(way), "tltorch", missing("tltorch")) for way in TLTORCH]
    return _case(channels, size, rank, device, "", found)


def training_case(channels: int, size: int, rank: int, device: str) -> Case:
    """Forward and backward, without ReLU: where its argument is all but 0 a rounding decides what passes."""
    refused = _refusals(channels, size, rank, device, "backward")
    found = [
        Contender("auto", training(by("auto", "none"))),
        Contender("depthwise", training(by("depthwise", "none"))),
        Contender("triton", training(by("triton", "none")), refusal=refused.get("triton", "")),
        Contender("sequence", training(by("sequence", "none")), "sequence"),
    ]
    return _case(channels, size, rank, device, "forward and backward", found, grad=True)


def layer_case(channels: int, size: int, device: str) -> Case:
    """One CP of the whole kernel, at a rank of as many as there are channels, without an epilogue."""
    batch, rank, pixels = BATCH[device], channels, BATCH[device] * size * size
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def make() -> list[Tensor]:
        torch.manual_seed(0)
        drawn = [
            torch.randn(batch, channels, size, size),
            torch.randn(rank, channels) / math.sqrt(channels),
            torch.randn(rank, 3) / 3,
            torch.randn(rank, 3),
            torch.randn(channels, rank) / math.sqrt(rank),
        ]
        x, *others = (each.to(device, dtype) for each in drawn)
        return [x.contiguous(memory_format=format_of(x)), *others]

    def layer(p: Problem) -> LayerCPConv:
        x, w_in, vertical, horizontal, w_out = p
        kind: dict[str, Any] = {"device": x.device, "dtype": x.dtype}
        found = LayerCPConv(channels, channels, 3, rank, padding=1, bias=False, **kind).eval().requires_grad_(False)
        found.w_in.copy_(w_in)
        found.w_out.copy_(w_out)
        found.depthwise.copy_(vertical[:, :, None] * horizontal[:, None, :])
        return found

    def run(x: Tensor, network: nn.Module) -> Thunk:
        return partial(network.to(memory_format=format_of(x)), x)  # type: ignore[call-overload]

    def by_tltorch(way: str) -> Builder:
        return lambda p: partial(tltorch_cp(p[1], p[2:4], p[4], None, 1, 1, way), p[0])

    def outputs(x: Tensor, w_in: Tensor, vertical: Tensor, horizontal: Tensor, w_out: Tensor) -> list[Tensor]:
        kernel = torch.einsum("ri,rh,rw,or->oihw", w_in, vertical, horizontal, w_out)
        return [torch.conv2d(x, kernel, None, *GEOMETRY)]

    # Two maps, a merged kernel of two products and the output are rounded. The dense kernel has the longest sum.
    terms = 9 * channels + 9 + 2 * rank
    macs, factors = pixels * rank * (2 * channels + 9), 2 * rank * channels + 9 * rank
    return Case(
        family="cp",
        operation="LayerCPConv",
        name=f"{channels}, {size}x{size}, R={rank}, N={batch}",
        dtype=dtype,
        device=device,
        make=make,
        judge=lambda p: multilinear(outputs, p, dtype, roundings=4, terms=terms),
        contenders=[
            Contender("auto", lambda p: run(p[0], layer(p))),
            Contender("dense", lambda p: run(p[0], layer(p).to_dense()), "dense"),
            Contender("sequence", lambda p: run(p[0], layer(p).to_sequential()), "sequence"),
            *(Contender(f"tltorch {way}", by_tltorch(way), "tltorch", missing("tltorch")) for way in TLTORCH),
        ],
        baselines=("dense", "sequence"),
        sizes={"batch": batch, "channels": channels, "size": size, "rank": rank},
        copied=copied,
        tensors=list,
        work=lambda p: Work(
            2.0 * macs, float((2 * pixels * channels + factors) * dtype.itemsize), macs, 9 * pixels * channels**2
        ),
    )


def copied(p: Problem) -> list[Tensor]:
    """The same in other memory."""
    return [each.clone() for each in p]


def _case(
    channels: int, size: int, rank: int, device: str, what: str, found: Sequence[Contender], *, grad: bool = False
) -> Case:
    dtype, batch = torch.bfloat16 if device == "cuda" else torch.float32, BATCH[device]
    pixels = batch * size * size
    elements = 2 * pixels * channels + rank * channels * (channels + 6)
    macs = pixels * rank * channels * (channels + 6)
    calls = 3 if grad else 1  # a backward pass has two products for every one of the forward pass
    # Rounded are three maps, their gradients or the merged kernel, and the result; the dense kernel's sum is longest.
    terms = 9 * channels + 9 * rank + 2 + (pixels if grad else 0)

    def judge(p: Problem) -> Judge:
        if not grad:
            return multilinear(lambda *t: [chain(*t)], p, dtype, roundings=4, terms=terms)
        return multilinear(gradients, p, dtype, roundings=5, terms=terms)

    return Case(
        family="cp",
        operation=OP,
        name=", ".join(part for part in (f"{channels}, {size}x{size}, R={rank}, N={batch}", what) if part),
        dtype=dtype,
        device=device,
        make=lambda: made(channels, size, rank, batch, dtype, device),
        judge=judge,
        contenders=found,
        baselines=("sequence",) if grad else ("dense", "sequence"),
        sizes={"batch": batch, "channels": channels, "size": size, "rank": rank},
        copied=copied,
        tensors=list,
        work=lambda p: Work(
            2.0 * calls * macs, float(calls * elements * dtype.itemsize), macs, 9 * pixels * channels**2
        ),
        grad=grad,
    )


def gradients(*arguments: Tensor) -> tuple[Tensor, ...]:
    """Of (x, pointwise, vertical, horizontal, bias), where that of the output is 1."""
    leaves = [each.requires_grad_() for each in arguments]
    out = reference.conv.cp_conv2d(*leaves, None, *GEOMETRY, "none")  # type: ignore[call-arg, arg-type]
    return torch.autograd.grad(out, leaves, torch.ones_like(out))


def _refusals(channels: int, size: int, rank: int, device: str, call: str) -> dict[str, str]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x = torch.empty(BATCH[device], channels, size, size, device="meta", dtype=dtype)
    factors = [torch.empty(rank, channels, k, device="meta", dtype=dtype) for k in (channels, 3, 3)]
    x = x.contiguous(memory_format=torch.channels_last if device == "cuda" else torch.contiguous_format)
    work = _conv.work_of(OP, x, factors, GEOMETRY, call)
    return refusals(OP, device, dtype, work)
