"""What the tests of the gates' operators share: backends, layouts, the definition in float64, and error bounds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastrank import _backends

HALVES = (torch.float16, torch.bfloat16)
CASES = [
    *(("reference", "cpu", dtype) for dtype in (torch.float64, torch.float32, *HALVES)),
    ("host", "cpu", torch.float32),
    ("triton", "cpu", torch.float32),
    ("triton", "cpu", torch.float16),
    *(
        pytest.param(backend, "cuda", dtype, marks=pytest.mark.gpu)
        for backend in ("reference", "triton", "cuda")
        for dtype in (torch.float32, *HALVES)
    ),
]
over_backends = pytest.mark.parametrize(("backend", "device", "dtype"), CASES)

LAYOUTS = ["contiguous", "sliced", "expanded", "transposed", "channels_last"]


def available(backend: str, device: str, dtype: torch.dtype, op: str = "gated_factor") -> None:
    """Skip, with the reason, where a backend cannot run."""
    verdict = _backends.explain(_backends.facts(op, torch.empty(0, device=device, dtype=dtype)))[backend]
    if not verdict:
        pytest.skip(verdict.reason)


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The values of x in another layout (for `expanded`, some of them)."""
    if layout == "sliced":
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), math.nan)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if layout == "expanded":
        return x[..., :1].expand(x.shape) if x.numel() else x
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    return x


def truth(direction: Tensor, gate: Tensor) -> Tensor:
    """The definition, with nothing shared with the package: zero slices are taken out by hand."""
    flat = direction.reshape(direction.shape[0], math.prod(direction.shape[1:]))
    squares = flat.square().sum(1, keepdim=True)  # pairwise: Tensor.norm adds one by one, which many equal numbers show
    normal = torch.where(squares > 0, flat / torch.where(squares > 0, squares, 1.0).sqrt(), 0.0)
    return (gate[:, None] * normal).reshape(direction.shape)


def close(name: str, got: Tensor, want: Tensor, scale: Tensor, length: int, dtype: torch.dtype) -> None:
    """|got - want| <= scale (eps_sum (sqrt(length) + 8) + eps_dtype); twice that in float64, where the truth errs too.

    The terms: a sum of `length` products, a few more roundings, one rounding to store.
    """
    eps_sum = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    bound = scale.detach() * (eps_sum * (math.sqrt(length) + 8) + torch.finfo(dtype).eps)
    bound = bound * (2 if dtype == torch.float64 else 1) + torch.finfo(dtype).smallest_normal
    error = (got.detach().double() - want.detach()).abs()
    assert got.shape == want.shape
    assert bool((error <= bound).all()), f"{name}: {float((error / bound).max()):.2f} times the bound"


def check_pair(
    direction: Tensor, gate: Tensor, grad: Tensor, out: Tensor, grad_direction: Tensor, grad_gate: Tensor
) -> None:
    """A factor and its gradients against float64; the output's memory format is the input's."""
    v, g, u = (t.detach().double().requires_grad_() for t in (direction, gate, grad))
    want_out = truth(v, g)
    want = torch.autograd.grad(want_out, (v, g), u)

    rows = direction.shape[0]
    length = math.prod(direction.shape[1:])
    shape = (rows, *(1,) * (direction.dim() - 1))
    norm = v.detach().reshape(rows, length).norm(dim=1)
    size = u.detach().reshape(rows, length).norm(dim=1)
    inverse = torch.where(norm > 0, 1 / norm, 0.0)
    close("out", out, want_out, want_out.abs(), length, direction.dtype)
    close("grad of gate", grad_gate, want[1], size, length, direction.dtype)
    steep = (g.detach().abs() * inverse).reshape(shape)
    scale = steep * (u.detach().abs() + (size * inverse).reshape(shape) * v.detach().abs())
    close("grad of direction", grad_direction, want[0], scale, length, direction.dtype)

    if direction.dim() == 4:
        last = torch.channels_last
        assert out.is_contiguous(memory_format=last) or not direction.is_contiguous(memory_format=last)
