"""The family "tucker2": layers of ResNet-18 forward, with bias and ReLU, and forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from fastrank import reference
from fastrank.benchmarks import tucker2_contenders as contenders
from fastrank.benchmarks._check import multilinear
from fastrank.benchmarks._peers import WAYS, cannot_compile, missing
from fastrank.benchmarks._registry import Case, Contender, Judge, Work, refusals
from fastrank.benchmarks.layers import FORWARD_BATCHES, RESNET18, Layer
from fastrank.benchmarks.tucker2_contenders import Problem

OP = "tucker2_conv2d"
ON_A_CPU = ("64, 56x56", "NRMF conv1", "NRMF conv4")
COMPILED = ("64, 56x56", "NRMF conv1", "NRMF conv4")


def cases(device: str) -> list[Case]:
    """Rows for a device; a CPU compiles one layer, which takes it many times as long as timing it."""
    if device == "cuda":
        found = [case(layer, n, device, compiled=layer.name in COMPILED) for n in FORWARD_BATCHES for layer in RESNET18]
        found += [case(layer, 32, device, epilogue=True) for layer in RESNET18]
        return [*found, *(training_case(layer, 32, device) for layer in RESNET18)]
    some = [layer for layer in RESNET18 if layer.name in ON_A_CPU]
    found = [case(layer, n, device, compiled=layer is some[0] and n == 1) for n in (1, 8) for layer in some]
    return [*found, case(some[0], 1, device, epilogue=True), training_case(some[-1], 8, device)]


def case(layer: Layer, batch: int, device: str, *, epilogue: bool = False, compiled: bool = False) -> Case:
    """The forward pass; with bias, residual (where a ResNet has one) and ReLU if asked."""
    refused = _refusals(layer, batch, device, "inference")
    found = [
        Contender("auto", contenders.auto),
        *(Contender(name, contenders.CONTENDERS[name], refusal=refused.get(name, "")) for name in contenders.KERNELS),
        Contender("dense", contenders.dense, "dense"),
        Contender("sequence", contenders.sequence, "sequence"),
    ]
    if any(rank % 8 for rank in layer.ranks):
        found.append(Contender("sequence, ranks padded to 8", contenders.padded, "sequence"))
    if compiled:
        found.append(Contender("compile", contenders.compiled(), "compile", cannot_compile()))
    found += [Contender(f"tltorch {way}", contenders.tltorch(way), "tltorch", missing("tltorch")) for way in WAYS]
    return _case(layer, batch, device, "with bias, ReLU" if epilogue else "", found, epilogue=epilogue)


def training_case(layer: Layer, batch: int, device: str) -> Case:
    """Forward and backward: the gradients of x and of all factors."""
    refused = _refusals(layer, batch, device, "backward")
    names = ("auto", *contenders.KERNELS)
    found = [Contender(name, contenders.training(name), refusal=refused.get(name, "")) for name in names]
    found.append(Contender("sequence", contenders.training("sequence"), "sequence"))
    gone = missing("tltorch")
    found += [Contender(f"tltorch {way}", contenders.tltorch_training(way), "tltorch", gone) for way in WAYS]
    return _case(layer, batch, device, "forward and backward", found, grad=True)


def dtype_of(device: str) -> torch.dtype:
    """What a device is measured in."""
    return torch.bfloat16 if device == "cuda" else torch.float32


def format_of(device: str) -> torch.memory_format:
    """The layout that a device is measured in."""
    return torch.channels_last if device == "cuda" else torch.contiguous_format


def _case(
    layer: Layer,
    batch: int,
    device: str,
    what: str,
    found: Sequence[Contender],
    *,
    epilogue: bool = False,
    grad: bool = False,
) -> Case:
    dtype = dtype_of(device)
    residual = epilogue and layer.takes_residual
    calls = 3 if grad else 1  # a backward pass has two products for every one of the forward pass
    return Case(
        family="tucker2",
        operation=OP,
        name=", ".join(part for part in (layer.name, f"N={batch}", what) if part),
        dtype=dtype,
        device=device,
        make=partial(
            contenders.problem, layer, batch, epilogue=epilogue, dtype=dtype, device=device,
            memory_format=format_of(device),
        ),
        judge=_training_judge if grad else _judge,
        contenders=found,
        baselines=("sequence",) if grad else ("dense", "sequence"),
        sizes={
            "batch": batch, "in_channels": layer.in_channels, "out_channels": layer.out_channels, "size": layer.size,
            "stride": layer.stride, "ranks": list(layer.ranks), "counts": layer.counts,
        },
        copied=Problem.copied,
        tensors=Problem.tensors,
        work=lambda p: Work(
            2.0 * calls * batch * layer.macs, float(calls * layer.elements(batch, residual) * dtype.itemsize),
            batch * layer.macs, batch * layer.dense_macs,
        ),
        grad=grad,
    )  # fmt: skip


def _refusals(layer: Layer, batch: int, device: str, call: str) -> dict[str, str]:
    work = layer.work(batch, format_of(device) is torch.channels_last, call)
    return refusals(OP, device, dtype_of(device), work)


def _judge(p: Problem) -> Judge:
    def layer(x: Tensor, w_in: Tensor, core: Tensor, w_out: Tensor, *more: Tensor) -> list[Tensor]:
        bias, residual = (*more, None, None)[:2]
        return [reference.conv.tucker2_conv2d(x, w_in, core, w_out, bias, residual, *p.geometry, p.activation)]

    # Two maps, the merged kernel, the output and its two additions are rounded. The dense kernel has the longest sum.
    terms = 9 * p.layer.in_channels + 9 * p.layer.ranks[0] + p.layer.ranks[1] + 2
    return multilinear(layer, p.tensors(), p.x.dtype, roundings=4, terms=terms)


def _training_judge(p: Problem) -> Judge:
    def gradients(*arguments: Tensor) -> tuple[Tensor, ...]:
        *leaves, upstream = arguments
        leaves = [each.requires_grad_() for each in leaves]
        return torch.autograd.grad(contenders.three_convolutions(p.layer.stride, *leaves), leaves, upstream)

    # Two maps, their two gradients and the result are rounded; gradients of factors are sums over all pixels.
    pixels = p.x.shape[0] * p.layer.size**2
    terms = pixels + 9 * sum(p.layer.ranks) + p.layer.in_channels + p.layer.out_channels
    return multilinear(gradients, [p.x, *p.factors, p.upstream()], p.x.dtype, roundings=4, terms=terms)
