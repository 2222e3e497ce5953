"""The Triton kernels as a backend of `tucker2_conv2d` and `channel_svd_conv2d`: which launches a call takes, on which
precision and device."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from copy import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastrank import _native
from fastrank.ops import _register
from fastrank.ops._conv import Geometry, Launch, out_size
from fastrank.reference.conv import ACTIVATIONS

POINTWISE: Geometry = ((1, 1), (0, 0), (1, 1))
INTERPRETED = (1, False)  # a single processor: programs walk over several tiles in small tests too


@cache
def _machine(device: torch.device) -> tuple[int, bool]:
    """Processors, and whether they have Hopper's warp-group products."""
    if device.type != "cuda":
        return INTERPRETED
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.major == 9


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """A Triton kernel runs on the current device."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


def _tf32(dtype: torch.dtype) -> bool:
    """Whether float32 products may round their operands to TF32: what torch was told about convolutions."""
    cudnn: Any = torch.backends.cudnn
    return dtype is torch.float32 and cudnn.conv.fp32_precision == "tf32"


class _Convolution:
    """1×1 → kh×kw → 1×1 from x to maps of out_size, or its transpose: its plan, and its weights packed once.

    factors: (first (R1, C), core (R2, R1, kh, kw), last (O, R2)); first or last is None where there is no such step.
    """

    def __init__(
        self,
        x: Tensor,
        factors: tuple[Tensor | None, Tensor, Tensor | None],
        out_size: tuple[int, int],
        geometry: Geometry,
        transposed: bool,
    ) -> None:
        self._kernels, plans = _native.triton_kernels("tucker2"), _native.triton_kernels("tucker2_plan")
        first, core, last = factors
        self.x, self.out_size, self.tf32 = x, out_size, _tf32(x.dtype)
        self.processors, hopper = _machine(x.device)
        self.unit = "fma" if x.dtype is torch.float32 and not self.tf32 else "wgmma" if hopper else "mma"
        (batch, channels, *in_size), (rank_2, rank_1, *kernel) = x.shape, core.shape
        self.ranks = rank_1, rank_2
        self._work = plans.Convolution(
            batch, channels, rank_2 if last is None else last.shape[0], self.ranks, tuple(in_size), out_size,
            tuple(kernel), *geometry, transposed, x.element_size(), first is not None, last is not None,
        )  # fmt: skip
        self._plan = plans.plan(self._work, self.processors, self.unit)
        self._packed = self._kernels.pack(first, core, last, self._plan)

    def on(self, x: Tensor) -> _Convolution:
        """The same for another input of the same kind."""
        other = copy(self)
        other.x = x
        return other

    def run(self, out: Tensor | None, want_middle: bool = False, **epilogue: Any) -> Tensor | None:
        """Write out, if given; return z2 as a channels-last map (N, padded R2, H', W'), if wanted."""
        middle = None
        if want_middle:
            middle = self.x.new_empty(self.x.shape[0], *self.out_size, self._plan.ranks[1])
        self._kernels.convolve(
            self.x, self._packed, self._work, self._plan, out=out, middle=middle, tf32=self.tf32, **epilogue
        )
        return None if middle is None else middle.permute(0, 3, 1, 2)

    def project(self) -> Tensor:
        """z1 as a channels-last map (N, padded R1, H, W)."""
        kernels = _native.triton_kernels("tucker2_weights")
        return kernels.project(self.x, self._packed, self.ranks[0], self._plan, self.tf32)  # type: ignore[no-any-return]

    def weight_gradient(self, a: Tensor, b: Tensor, like: Tensor, geometry: Geometry = POINTWISE) -> Tensor:
        """The gradient, in the shape of `like`, of the weight that takes b to what has the gradient a."""
        plans, kernels = _native.triton_kernels("tucker2_plan"), _native.triton_kernels("tucker2_weights")
        kernel = (like.shape[2], like.shape[3]) if like.dim() == 4 else (1, 1)
        pixels = a.shape[0] * a.shape[2] * a.shape[3]
        sizes = plans.products(
            (a.shape[1], b.shape[1]), kernel[0] * kernel[1], pixels, a.element_size(), self.processors, self.unit
        )
        out = like.new_empty(like.shape)
        kernels.weight_gradient(a, b, out.view(*like.shape[:2], -1), kernel, geometry, sizes, self.tf32)
        return out


def _prepare(
    x: Tensor, factors: tuple[Tensor | None, Tensor, Tensor], bias: Tensor | None, geometry: Geometry
) -> Launch:
    """Packs the weights; the launch is one, of everything else."""
    size = out_size((x.shape[2], x.shape[3]), (factors[1].shape[2], factors[1].shape[3]), geometry)
    with _on(x.device):
        made = _Convolution(x, factors, size, geometry, False).on(x.new_empty(0))
    bias = None if bias is None else bias.contiguous()

    def launch(x: Tensor, residual: Tensor | None, out: Tensor, activation: str) -> None:
        with _on(x.device):
            made.on(x).run(out, bias=bias, residual=residual, activation=ACTIVATIONS.index(activation))

    return launch


class TritonKernels:
    """What `ops._conv.Kernels` asks for."""

    def prepare(self, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None, geometry: Geometry) -> Launch:
        """See `_prepare`."""
        w_in, core, w_out = factors
        return _prepare(x, (w_in, core, w_out), bias, geometry)

    def backward(
        self, grad: Tensor, x: Tensor, factors: Sequence[Tensor], geometry: Geometry, needs: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        """The transposed convolution gives the gradients of x and of z1; z1 and z2 are computed again.

        Nothing is computed that no gradient in `needs` asks for.
        """
        w_in, core, w_out = factors
        need_x, need_in, need_core, need_out = needs
        grads: list[Tensor | None] = [None] * 4
        with _on(x.device):
            if need_x or need_in or need_core:
                turned = (w_out.t(), core.transpose(0, 1), w_in.t())
                back = _Convolution(grad, turned, (x.shape[2], x.shape[3]), geometry, True)
            if need_x or need_in:
                if need_x:
                    grads[0] = torch.empty_like(x, memory_format=_register.memory_format(x))
                grad_z1 = back.run(grads[0], need_in)
                if grad_z1 is not None:
                    grads[1] = back.weight_gradient(grad_z1, x, w_in)
            if need_core or need_out:
                ahead = _Convolution(x, (w_in, core, w_out), (grad.shape[2], grad.shape[3]), geometry, False)
            if need_core:
                grads[2] = ahead.weight_gradient(back.project(), ahead.project(), core, geometry)
            if need_out:
                z2 = ahead.run(None, True)
                assert z2 is not None
                grads[3] = ahead.weight_gradient(grad, z2, w_out)
        return tuple(grads)


class ChannelKernels:
    """What `ops._conv.Kernels` asks for, of the channel scheme: kh×kw, then 1×1, with no projection before them."""

    def prepare(self, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None, geometry: Geometry) -> Launch:
        """factors: first (R, I, kh, kw), second (O, R, 1, 1). See `_prepare`."""
        first, second = factors
        return _prepare(x, (None, first, second[:, :, 0, 0]), bias, geometry)

    def backward(
        self, grad: Tensor, x: Tensor, factors: Sequence[Tensor], geometry: Geometry, needs: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        """The gradient of x is the transposed convolution, 1×1 → kh×kw; the map between the factors is computed again.

        Nothing is computed that no gradient in `needs` asks for.
        """
        first, second = factors
        need_x, need_first, need_second = needs
        grads: list[Tensor | None] = [None] * 3
        with _on(x.device):
            if need_x or need_first:
                turned = second[:, :, 0, 0].t(), first.transpose(0, 1)
                back = _Convolution(grad, (*turned, None), (x.shape[2], x.shape[3]), geometry, True)
            if need_x:
                grads[0] = torch.empty_like(x, memory_format=_register.memory_format(x))
                back.run(grads[0])
            if need_first:
                grads[1] = back.weight_gradient(back.project(), x, first, geometry)
            if need_second:
                ahead = _Convolution(x, (None, first, None), (grad.shape[2], grad.shape[3]), geometry, False)
                z = ahead.run(None, True)
                assert z is not None
                grads[2] = ahead.weight_gradient(grad, z, second)
        return tuple(grads)
