"""Who can run a Tucker-2 convolution: the library in several ways, fastrank's kernels, and what torch.compile makes.

A contender is a function of a `Problem` that prepares its weights and returns the call to time, so that every copy of a
problem has weights of its own, and cold ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrank import _backends, reference
from fastrank.benchmarks import _registry
from fastrank.benchmarks._peers import compiled_call, tltorch_tucker2
from fastrank.benchmarks._registry import KERNELS as KERNELS
from fastrank.benchmarks._registry import Thunk
from fastrank.benchmarks.layers import Layer
from fastrank.nn import FusedTucker2Conv
from fastrank.ops import _conv, tucker2_conv2d


@dataclass(frozen=True)
class Problem:
    """A layer's input, factors and epilogue: relu(conv(x) + bias + residual) where there is a bias, else conv(x)."""

    layer: Layer
    x: Tensor
    factors: tuple[Tensor, Tensor, Tensor]
    bias: Tensor | None
    residual: Tensor | None

    @property
    def activation(self) -> str:
        return "none" if self.bias is None else "relu"

    @property
    def geometry(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        return (self.layer.stride, self.layer.stride), (1, 1), (1, 1)

    @property
    def memory_format(self) -> torch.memory_format:
        last = self.x.is_contiguous(memory_format=torch.channels_last)
        return torch.channels_last if last else torch.contiguous_format

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.x, *self.factors, self.bias, self.residual) if t is not None]

    def copied(self) -> Problem:
        """The same in other memory."""
        w_in, core, w_out = (factor.clone() for factor in self.factors)
        bias, residual = (None if t is None else t.clone() for t in (self.bias, self.residual))
        return replace(self, x=self.x.clone(), factors=(w_in, core, w_out), bias=bias, residual=residual)

    def wide(self) -> Problem:
        """The same values in a dtype of negligible error: float64 on a CPU, float32 for halves on a GPU."""
        kind = torch.float32 if self.x.is_cuda and self.x.itemsize == 2 else torch.float64
        w_in, core, w_out = (factor.to(kind) for factor in self.factors)
        bias, residual = (None if t is None else t.to(kind) for t in (self.bias, self.residual))
        return replace(self, x=self.x.to(kind), factors=(w_in, core, w_out), bias=bias, residual=residual)

    def upstream(self) -> Tensor:
        """A gradient of the output, the same at every call and in every dtype, in the layout of x."""
        shape = self.x.shape[0], self.layer.out_channels, self.layer.out_size, self.layer.out_size
        generator = torch.Generator(self.x.device).manual_seed(1)
        found = torch.randn(shape, generator=generator, device=self.x.device).to(torch.bfloat16)
        return found.to(self.x.dtype).contiguous(memory_format=self.memory_format)


def problem(
    layer: Layer, batch: int, *, epilogue: bool, dtype: torch.dtype, device: str, memory_format: torch.memory_format
) -> Problem:
    """Random values that keep their variance through the factors."""
    torch.manual_seed(0)
    kind: dict[str, Any] = {"dtype": dtype, "device": device}
    (rank_in, rank_out), i, o = layer.ranks, layer.in_channels, layer.out_channels
    w_in = torch.randn(rank_in, i, **kind) / math.sqrt(i)
    core = torch.randn(rank_out, rank_in, 3, 3, **kind) / math.sqrt(9 * rank_in)
    w_out = torch.randn(o, rank_out, **kind) / math.sqrt(rank_out)
    x = torch.randn(batch, i, layer.size, layer.size, **kind).contiguous(memory_format=memory_format)
    bias = torch.randn(o, **kind) if epilogue else None
    residual = None
    if epilogue and layer.takes_residual:
        shape = batch, o, layer.out_size, layer.out_size
        residual = torch.randn(shape, **kind).contiguous(memory_format=memory_format)
    return Problem(layer, x, (w_in, core, w_out), bias, residual)


def finish(out: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    """What a network in eager mode does behind a convolution, in place as ResNets do."""
    if residual is not None:
        out += residual
    return out.relu_() if activation == "relu" else out


def dense(p: Problem) -> Thunk:
    """One library convolution of the merged kernel, merged before: what the layer cost that was compressed."""
    wide = (factor.float() for factor in p.factors)
    weight = reference.conv.tucker2_weight(*wide).to(p.x.dtype).contiguous(memory_format=p.memory_format)
    return lambda: finish(torch.conv2d(p.x, weight, p.bias, *p.geometry), p.residual, p.activation)


def weights(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """The factors as kernels of convolutions, in the layout of x."""
    w_in, core, w_out = p.factors
    kernels = (w_in[:, :, None, None], core, w_out[:, :, None, None])
    first, middle, last = (kernel.contiguous(memory_format=p.memory_format) for kernel in kernels)
    return first, middle, last


def sequence(p: Problem) -> Thunk:
    """Three library convolutions."""
    first, middle, last = weights(p)

    def call() -> Tensor:
        z = torch.conv2d(torch.conv2d(p.x, first), middle, None, *p.geometry)
        return finish(torch.conv2d(z, last, p.bias), p.residual, p.activation)

    return call


def padded(p: Problem) -> Thunk:
    """Three library convolutions at ranks that are multiples of 8, as tensor cores like them."""
    more_in, more_out = (-rank % 8 for rank in p.layer.ranks)
    w_in, core, w_out = p.factors
    factors = (
        F.pad(w_in, (0, 0, 0, more_in)),
        F.pad(core, (0, 0, 0, 0, 0, more_in, 0, more_out)),
        F.pad(w_out, (0, more_out)),
    )
    return sequence(replace(p, factors=factors))


def cuda(p: Problem) -> Thunk:
    """The CUDA C++ kernel over weights that are packed before; on a CPU its host build."""
    return prepared(p, "cuda")


def triton(p: Problem) -> Thunk:
    """The Triton kernel over weights that are packed before."""
    return prepared(p, "triton")


def prepared(p: Problem, backend: str) -> Thunk:
    """A kernel as inference calls it."""
    launch = _conv.KERNELS["tucker2_conv2d"][backend].prepare(p.x, p.factors, p.bias, p.geometry)

    def call() -> Tensor:
        out = output(p)
        launch(p.x, p.residual, out, p.activation)
        return out

    return call


def output(p: Problem) -> Tensor:
    """Room for the output, in the layout of x."""
    shape = p.x.shape[0], p.layer.out_channels, p.layer.out_size, p.layer.out_size
    return torch.empty(shape, dtype=p.x.dtype, device=p.x.device, memory_format=p.memory_format)


def auto(p: Problem) -> Thunk:
    """A layer in inference, as users call it."""
    layer = FusedTucker2Conv(
        p.layer.in_channels, p.layer.out_channels, 3, p.layer.ranks, stride=p.layer.stride, padding=1,
        bias=p.bias is not None, activation=p.activation, device="meta",
    ).eval()  # fmt: skip
    for name, value in zip(("w_in", "core", "w_out", "bias"), (*p.factors, p.bias), strict=True):
        setattr(layer, name, None if value is None else nn.Parameter(value, requires_grad=False))
    return lambda: layer(p.x, p.residual)


def compiled() -> Callable[[Problem], Thunk]:
    """What torch.compile makes of three convolutions and their epilogue; compiled once for all copies of a problem."""

    def three(
        x: Tensor, first: Tensor, middle: Tensor, last: Tensor, bias: Any, residual: Any, p: Any, activation: str
    ) -> Tensor:
        z = F.conv2d(F.conv2d(x, first), middle, None, *p)
        return reference.conv.epilogue(F.conv2d(z, last, bias), residual, activation)

    def build(p: Problem) -> Thunk:
        return compiled_call(three, p.x, *weights(p), p.bias, p.residual, p.geometry, p.activation)

    return build


def tltorch(way: str) -> Callable[[Problem], Thunk]:
    """tensorly-torch's layer over the same factors, by one of its ways."""

    def build(p: Problem) -> Thunk:
        layer = tltorch_tucker2(*p.factors, p.bias, p.layer.stride, 1, way)
        return lambda: finish(layer(p.x), p.residual, p.activation)

    return build


CONTENDERS: dict[str, Callable[[Problem], Thunk]] = {
    "dense": dense, "sequence": sequence, "padded": padded, "cuda": cuda, "triton": triton, "auto": auto
}  # fmt: skip


def refusals(p: Problem, call: str) -> dict[str, str]:
    """The contenders that cannot run a problem, or need not, each with the reason."""
    last = p.memory_format is torch.channels_last
    found = _registry.refusals("tucker2_conv2d", p.x.device, p.x.dtype, p.layer.work(p.x.shape[0], last, call))
    if not any(rank % 8 for rank in p.layer.ranks):
        found["padded"] = "the ranks are multiples of 8 as given"
    return found


def auto_takes(p: Problem, call: str) -> tuple[str, str]:
    """The backend that `auto` takes for a problem, and how that is known."""
    last = p.memory_format is torch.channels_last
    choice = _backends.fastest(_backends.facts("tucker2_conv2d", p.x, p.layer.work(p.x.shape[0], last, call)))
    return choice.backend, choice.estimate.source


def three_convolutions(stride: int, x: Tensor, w_in: Tensor, core: Tensor, w_out: Tensor) -> Tensor:
    """What a network of plain layers trains."""
    z = F.conv2d(F.conv2d(x, w_in[:, :, None, None]), core, None, stride, 1)
    return F.conv2d(z, w_out[:, :, None, None])


def trained(name: str, p: Problem) -> tuple[list[Tensor], Callable[[], Tensor]]:
    """(x, w_in, core, w_out) that want gradients, and the forward pass of them without an epilogue.

    By three plain convolutions for "sequence", by the operator otherwise.
    """
    leaves = [t.detach().requires_grad_() for t in (p.x, *p.factors)]
    if name == "sequence":
        return leaves, lambda: three_convolutions(p.layer.stride, *leaves)
    return leaves, lambda: tucker2_conv2d(*leaves, stride=p.layer.stride, padding=1, backend=name)


def training(name: str) -> Callable[[Problem], Thunk]:
    """Forward and backward: the gradients of x and of all factors."""

    def build(p: Problem) -> Thunk:
        (leaves, forward), upstream = trained(name, p), p.upstream()
        return lambda: torch.autograd.grad(forward(), leaves, upstream)

    return build


def tltorch_training(way: str) -> Callable[[Problem], Thunk]:
    """The same of tensorly-torch's layer; its factors along the kernel are identities, and stay so."""

    def build(p: Problem) -> Thunk:
        layer = tltorch_tucker2(*p.factors, None, p.layer.stride, 1, way)
        found = dict(layer.named_parameters())
        core, (w_out, w_in, *_) = (
            next(t for name, t in found.items() if name.endswith("core")),
            [t for name, t in found.items() if "factor_" in name],
        )
        x, upstream = p.x.detach().requires_grad_(), p.upstream()

        def call() -> tuple[Tensor, ...]:
            of_x, of_in, of_core, of_out = torch.autograd.grad(layer(x), (x, w_in, core, w_out), upstream)
            return of_x, of_in.T, of_core, of_out

        return call

    return build


def saved_bytes(forward: Thunk, but: Sequence[Tensor]) -> int:
    """Bytes that autograd keeps of a forward pass, without those of the tensors in `but` (weights are there anyway)."""
    known = {t.untyped_storage().data_ptr() for t in but}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = forward()
    del out  # until here the graph held what it had saved, so that no address was used twice
    return sum(kept.values())
