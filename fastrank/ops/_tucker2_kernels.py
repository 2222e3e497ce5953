"""The CUDA C++ kernels of the Tucker-2 convolution: on a GPU, or compiled for the host as a stand-in for tests.

Both read the factors from one packed buffer, padded and in the order of use; what makes it is `pack`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastrank import _backends, _native, reference
from fastrank.ops._conv import Geometry, Launch, Pair, Shape
from fastrank.reference.conv import ACTIVATIONS


class Packed(NamedTuple):
    """Packed weights, the (R_in, R_out, kh, kw) they were packed from, and the blocks that shall share a tile."""

    data: Tensor
    shape: tuple[int, int, int, int]
    split: int


def sizes(x: Shape, shape: Sequence[int], out_channels: int, geometry: Geometry) -> tuple[int, ...]:
    """A convolution as csrc/tucker2/plan.h lists it; x (N, I, H, W), shape (R_in, R_out, kh, kw)."""
    rank_in, rank_out, *kernel = shape
    return (*x, rank_in, rank_out, out_channels, *kernel, *geometry[0], *geometry[1], *geometry[2])


def pack(factors: Sequence[Tensor], bias: Tensor | None, *, split: int = 1, flip: bool = False) -> Packed:
    """The packed form of (w_in, core, w_out), of any strides, and the bias.

    split: blocks that share a tile, as `best_split` says. `flip` turns the core upside down and left to right.
    """
    w_in, core, w_out = factors
    shape = (w_in.shape[0], core.shape[0], core.shape[2], core.shape[3])
    listed = sizes((1, w_in.shape[1], 1, 1), shape, w_out.shape[0], ((1, 1), (0, 0), (1, 1)))
    data = torch.empty(_native.host().tucker2_packed_bytes(listed, split), dtype=torch.uint8, device=w_in.device)
    bias = None if bias is None else bias.contiguous()
    if w_in.is_cuda:
        torch.ops.fastrank.launch_tucker2_pack(w_in, core, w_out, bias, flip, split, data)
    else:
        flat = (value for t in (w_in, core, w_out) for value in (t.data_ptr(), t.stride()))
        address = 0 if bias is None else bias.data_ptr()
        _native.host().tucker2_pack(listed, split, _name(w_in), *flat, address, flip, data.data_ptr())
    return Packed(data, shape, split)


def convolve(
    x: Tensor,
    packed: Packed,
    residual: Tensor | None,
    out: Tensor,
    geometry: Geometry,
    activation: str,
    *,
    card: _backends.Card = _backends.HOST_CARD,
) -> None:
    """out = activation(convolution + bias + residual), all 16-bit and of any strides; `card` is for the host alone."""
    code = ACTIVATIONS.index(activation)
    if x.is_cuda:
        torch.ops.fastrank.launch_tucker2(x, packed.data, residual, out, (*packed.shape, packed.split), *geometry, code)
        return
    listed = sizes(x.shape, packed.shape, out.shape[1], geometry)
    added = (0, (0, 0, 0, 0)) if residual is None else (residual.data_ptr(), residual.stride())
    _native.host().tucker2_convolve(
        listed, packed.split, *card, _name(x), x.data_ptr(), x.stride(), packed.data.data_ptr(), *added,
        out.data_ptr(), out.stride(), code,
    )  # fmt: skip


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def best_split(x: Shape, shape: Sequence[int], out_channels: int, geometry: Geometry, card: _backends.Card) -> int:
    """Into how many blocks a tile of this convolution is best split on a card."""
    return _backends.tucker2_choice(sizes(x, shape, out_channels, geometry), card)[0]


def packed_for(x: Tensor, factors: Sequence[Tensor], bias: Tensor | None, geometry: Geometry) -> Packed:
    """The packed weights that a call with this input takes."""
    w_in, core, w_out = factors
    shape = (w_in.shape[0], core.shape[0], core.shape[2], core.shape[3])
    split = best_split(tuple(x.shape), shape, w_out.shape[0], geometry, _backends.card(x.device))
    return pack(factors, bias, split=split)


class CudaKernels:
    """`ops._conv.Kernels` over the functions above."""

    def prepare(self, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None, geometry: Geometry) -> Launch:
        """See `ops._conv.Kernels`."""
        packed = packed_for(x, factors, bias, geometry)

        def launch(x: Tensor, residual: Tensor | None, out: Tensor, activation: str) -> None:
            convolve(x, packed, residual, out, geometry, activation)

        return launch

    def backward(
        self, grad: Tensor, x: Tensor, factors: Sequence[Tensor], geometry: Geometry, needs: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        """See `ops._conv.Kernels`. At stride 1 the gradient of x is such a convolution; the library does the rest."""
        grad_x = input_gradient(grad, x, factors, geometry) if needs[0] else None
        rest = (needs[0] and grad_x is None, *needs[1:])
        if not any(rest):
            return grad_x, None, None, None
        w_in, core, w_out = factors
        library = reference.conv.tucker2_conv2d_backward(grad, x, w_in, core, w_out, *geometry, rest)
        return (library[0] if grad_x is None else grad_x, *library[1:])


def input_gradient(grad: Tensor, x: Tensor, factors: Sequence[Tensor], geometry: Geometry) -> Tensor | None:
    """The gradient of x by the same kernel with transposed factors; None where that is no convolution it can run."""
    w_in, core, w_out = factors
    stride, padding, dilation = geometry
    reach: Pair = (dilation[0] * (core.shape[2] - 1), dilation[1] * (core.shape[3] - 1))
    if stride != (1, 1) or padding[0] > reach[0] or padding[1] > reach[1]:
        return None
    turned: Geometry = ((1, 1), (reach[0] - padding[0], reach[1] - padding[1]), dilation)
    shape = (core.shape[0], core.shape[1], core.shape[2], core.shape[3])
    listed = sizes(tuple(grad.shape), shape, x.shape[1], turned)
    split, refusal = _backends.tucker2_choice(listed, _backends.card(grad.device))
    if refusal:
        return None
    out = torch.empty_like(x)
    packed = pack((w_out.t(), core.transpose(0, 1), w_in.t()), None, split=split, flip=True)
    convolve(grad, packed, None, out, turned, "none")
    return out
