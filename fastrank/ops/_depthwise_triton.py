"""The Triton kernels of Σ_r depthwise_r(pointwise_r(x)) as a backend: of CP filters, and of decoupled SVD layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastrank import _native
from fastrank.ops import _register
from fastrank.ops._conv import Geometry, Launch, out_size
from fastrank.ops._tucker2_triton import _machine, _on, _tf32
from fastrank.reference.conv import ACTIVATIONS


class _Convolution:
    """The convolution of x to maps of out_size, or its input's gradient: its plan, and its weights packed once."""

    def __init__(
        self, x: Tensor, factors: Sequence[Tensor], out_size: tuple[int, int], geometry: Geometry, transposed: bool
    ) -> None:
        self._kernels, plans = _native.triton_kernels("depthwise"), _native.triton_kernels("depthwise_plan")
        pointwise, *depthwise = factors
        rank, outs, channels = pointwise.shape
        self.tf32 = _tf32(x.dtype)
        self.processors, hopper = _machine(x.device)
        self.unit = "fma" if x.dtype is torch.float32 and not self.tf32 else "wgmma" if hopper else "mma"
        self._work = plans.Depthwise(
            x.shape[0], channels, outs, rank, (x.shape[2], x.shape[3]), out_size,
            (depthwise[0].shape[2], depthwise[-1].shape[-1]), *geometry, x.element_size(),
        )  # fmt: skip
        self._plan = (plans.input_plan if transposed else plans.plan)(self._work, self.processors, self.unit)
        self._packed = self._kernels.pack(pointwise, tuple(depthwise), self._plan.packing, transposed=transposed)

    def run(self, x: Tensor, out: Tensor, **epilogue: Any) -> None:
        """Write out; see `convolve`."""
        self._kernels.convolve(x, self._packed, self._work, self._plan, out, tf32=self.tf32, **epilogue)

    def input_gradient(self, grad: Tensor, out: Tensor | None, want_middle: bool) -> Tensor | None:
        """Write out, if given; return the gradient of z, a channels-last map (N, R · O, H, W), if wanted."""
        work, middle = self._work, None
        if want_middle:
            middle = grad.new_empty(work.batch, *work.in_size, work.rank * work.outs)
        self._kernels.input_gradient(grad, self._packed, work, self._plan, out=out, middle=middle, tf32=self.tf32)
        return None if middle is None else middle.permute(0, 3, 1, 2)

    def pointwise_gradient(self, grad_z: Tensor, x: Tensor, like: Tensor) -> Tensor:
        """(R, O, I): the products of the two maps over all pixels."""
        plans, kernels = _native.triton_kernels("tucker2_plan"), _native.triton_kernels("tucker2_weights")
        sizes = plans.products(
            (grad_z.shape[1], x.shape[1]), 1, x.shape[0] * x.shape[2] * x.shape[3], x.element_size(),
            self.processors, self.unit,
        )  # fmt: skip
        out = like.new_empty(like.shape)
        point = (1, 1), (0, 0), (1, 1)
        kernels.weight_gradient(grad_z, x, out.view(grad_z.shape[1], x.shape[1], 1), (1, 1), point, sizes, self.tf32)
        return out

    def depthwise_gradient(self, grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(R, O, kh, kw)."""
        kernels, work = _native.triton_kernels("depthwise_weights"), self._work
        out = torch.empty(work.rank, work.outs, *work.kernel, dtype=dtype, device=x.device)
        kernels.depthwise_gradient(x, self._packed[0], grad, out, work, self._plan, self.tf32)
        return out


class TritonKernels:
    """What `ops._conv.Kernels` asks for.

    factors: (pointwise (R, O, I), depthwise (R, O, kh, kw)), or (pointwise, vertical (R, O, kh), horizontal
    (R, O, kw)), whose products are the depthwise weights, in float32.
    """

    def prepare(self, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None, geometry: Geometry) -> Launch:
        """Packs the weights; the launch is one, of everything else."""
        kernel = factors[1].shape[2], factors[-1].shape[-1]
        with _on(x.device):
            made = _Convolution(x, factors, out_size((x.shape[2], x.shape[3]), kernel, geometry), geometry, False)
        bias = None if bias is None else bias.contiguous()

        def launch(x: Tensor, residual: Tensor | None, out: Tensor, activation: str) -> None:
            with _on(x.device):
                made.run(x, out, bias=bias, residual=residual, activation=ACTIVATIONS.index(activation))

        return launch

    def backward(
        self, grad: Tensor, x: Tensor, factors: Sequence[Tensor], geometry: Geometry, needs: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        """The gradient of z, which is written once where pointwise wants it, gives those of x and pointwise; z, made
        again on chip, that of the depthwise weights.

        Nothing is computed that no gradient in `needs` asks for.
        """
        need_x, need_pointwise, *need_depthwise = needs
        grads: list[Tensor | None] = [None] * len(needs)
        size = grad.shape[2], grad.shape[3]
        with _on(x.device):
            if need_x or need_pointwise:
                back = _Convolution(x, factors, size, geometry, True)
                if need_x:
                    grads[0] = torch.empty_like(x, memory_format=_register.memory_format(x))
                grad_z = back.input_gradient(grad, grads[0], need_pointwise)
                if grad_z is not None:
                    grads[1] = back.pointwise_gradient(grad_z, x, factors[0])
            if any(need_depthwise):
                ahead = _Convolution(x, factors, size, geometry, False)
                grads[2:] = _split(ahead, grad, x, factors[1:], need_depthwise)
        return tuple(grads)


def _split(
    made: _Convolution, grad: Tensor, x: Tensor, depthwise: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of the depthwise weights, or of the two factors whose products they are: in float32 throughout."""
    if len(depthwise) == 1:
        return [made.depthwise_gradient(grad, x, depthwise[0].dtype)]
    vertical, horizontal = depthwise
    whole = made.depthwise_gradient(grad, x, torch.float32)
    return [
        (whole * horizontal[:, :, None].float()).sum(3).to(vertical.dtype) if needs[0] else None,
        (whole * vertical[..., None].float()).sum(2).to(horizontal.dtype) if needs[1] else None,
    ]
