"""The truth of the gated factors, of the funnel penalty and of the gates' proximal steps, in plain PyTorch.

Values and gradients are computed in float32 for float16 and bfloat16 inputs, in the input's dtype otherwise; proximal
steps always in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gated_factors(directions: Sequence[Tensor], gates: Sequence[Tensor]) -> list[Tensor]:
    """gate[j] * direction[j] / |direction[j]| for every pair of a list, the norm over all dimensions but the first.

    directions[i] (J_i, ...), gates[i] (J_i,) -> list of (J_i, ...). Where the sum of squares of a slice is no normal
    number of the accumulation dtype (in float32: a norm below about 1e-19), the slice counts as zero: it stays 0, and
    so do its gradient and its gate's.
    """
    # What is a number a slice is computed for the whole list at once: on a CPU a call costs more than its numbers.
    scales = _flat(gates) * _inverse_norms(directions)
    pairs = zip(directions, _split(scales, gates), strict=True)
    return [(_along(scale, v) * _widen(v)).to(v.dtype) for v, scale in pairs]


def gated_factors_backward(
    grads: Sequence[Tensor], directions: Sequence[Tensor], gates: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of (directions, gates), two lists, from grads[i] (J_i, ...)."""
    inverse = _inverse_norms(directions)
    along = _dots(grads, directions) * inverse
    scales, shares = _split(_flat(gates) * inverse, gates), _split(along * inverse, gates)
    grad_directions = []
    for u, v, scale, share in zip(grads, directions, scales, shares, strict=True):
        across = torch.addcmul(_widen(u), _along(share, v), _widen(v), value=-1)
        grad_directions.append((_along(scale, v) * across).to(v.dtype))
    return grad_directions, _apart(along, gates)


def gated_factor_double_backward(
    a: Tensor, b: Tensor, grad: Tensor, direction: Tensor, gate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (grad, direction, gate) from a (J, ...) and b (J,), those of its `gated_factors_backward`.

    With n = direction / norm: L = gate/norm (<a,grad> - <a,n><grad,n>) + b <grad,n>, differentiated.
    """
    a, b, u, v, g = (_widen(t) for t in (a, b, grad, direction, gate))
    inverse = _inverse_norms([v])
    n = _along(inverse, v) * v
    a_n, u_n, a_u = _dot(a, n), _dot(u, n), _dot(a, u)
    scale = g * inverse
    across_a, across_u = a - _along(a_n, v) * n, u - _along(u_n, v) * n
    cross = a_u - a_n * u_n
    grad_grad = _along(scale, v) * across_a + _along(b, v) * n
    grad_gate = cross * inverse
    bent = _along(scale * cross, v) * n + _along(scale * u_n, v) * across_a + _along(scale * a_n - b, v) * across_u
    return grad_grad.to(grad.dtype), (-_along(inverse, v) * bent).to(direction.dtype), grad_gate.to(gate.dtype)


def funnel_penalty(gates: Sequence[Tensor], c: float, normalized: bool) -> Tensor:
    """The sum over all gates of |g| / (|g| + c), times c where `normalized` (the slope at 0 is then 1).

    Tensors of any shapes -> 0-d, of the accumulation dtype.
    """
    sizes = _flat(gates).abs()
    return torch.where(sizes == 0, 0.0, sizes / (sizes + c)).sum() * (c if normalized else 1.0)


def funnel_penalty_backward(grad: Tensor, gates: Sequence[Tensor], c: float, normalized: bool) -> list[Tensor]:
    """grad * sign(g) c / (|g| + c)^2 (times c where `normalized`) for each tensor; the gradient at 0 is 0."""
    flat = _flat(gates)
    width = flat.abs() + c
    # Two divisions instead of a square: c * c is no normal number for a small c.
    slopes = (grad * (c if normalized else 1.0)) * (flat.sign() * (1 / width) * (c / width))
    return _apart(slopes, gates)


def funnel_penalty_double_backward(
    upstream: Sequence[Tensor], grad: Tensor, gates: Sequence[Tensor], c: float, normalized: bool
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of (grad, gates) from those of `funnel_penalty_backward`'s results; F'' = -2c / (|g| + c)^3, 0 at 0."""
    scale = c if normalized else 1.0
    flat, up = _flat(gates), _flat(upstream)
    slopes = torch.cat(funnel_penalty_backward(torch.ones_like(grad), [flat], c, normalized))
    width = flat.abs() + c
    curvature = torch.where(flat == 0, 0.0, -2 / width * (1 / width) * (c / width))
    return (up * slopes).sum().to(grad.dtype), _apart(grad * scale * up * curvature, gates)


def proximal_points(gates: Tensor, eta: float, c: float, penalty: str) -> Tensor:
    """argmin_x ½ (x − g)² + η · penalty(x) for every gate by itself; float64 in and out.

    penalty: "funnel", |x| / (|x| + C); "l1", |x|; "l2", x². Keeps the sign of the gate, never enlarges it, and gives
    exactly 0 for a gate of 0; NaN stays NaN. Of the funnel, which is not convex, the global minimum, 0 where there are
    two.

    Above the threshold the funnel's is the largest root of (x − v)(x + C)² + ηC = 0 with v = |g|. In y = x + C and
    s = v + C that is the cubic y³ − s y² + ηC = 0, whose three roots are real; by Viète's formula the largest one is
    s/3 · (1 + 2 cos(φ/3)) with cos φ = 1 − 27ηC / (2s³). Written with sines of half the angles the difference v − x
    comes out without cancellation, and is exactly 0 for η = 0.
    """
    if penalty == "l2":
        return gates / (1 + 2 * eta)
    size = gates.abs()
    if penalty == "l1":
        moved = gates.sign() * (size - eta)
    else:
        s = size + c
        angle = (6.75 * (eta / s) * (c / s) / s).clamp(max=1).sqrt().asin() / 3
        moved = gates.sign() * (size - 4 / 3 * s * angle.sin().square()).clamp(min=0)
    return torch.where(size <= proximal_threshold(eta, c, penalty), 0.0, moved)


def proximal_threshold(eta: float, c: float, penalty: str) -> float:
    """The largest |g| whose proximal point is 0 whatever its sign ("l2": 0, it closes none).

    Of the funnel: with v = |g| the objective is stationary in x > 0 where (v − x)(x + C)² = ηC. As large as at x = 0 it
    is there for x = v − C/2 only, and then η = ½ (v + C/2)²: where that x is above 0, 2η > C², the proximal point jumps
    from 0 to √(2η) − C. Otherwise it leaves 0 without a jump, as soon as the slope η/C of the penalty is exceeded.
    """
    if penalty == "funnel":
        return math.sqrt(2 * eta) - c / 2 if 2 * eta > c * c else eta / c
    return eta if penalty == "l1" else 0.0


def funnel_proximal_(gates: Sequence[Tensor], eta: float, c: float, penalty: str) -> None:
    """Every gate of a list becomes its proximal point, in place."""
    moved = proximal_points(torch.cat([gate.flatten().double() for gate in gates]), eta, c, penalty)
    for gate, part in zip(gates, _split(moved, gates), strict=True):
        gate.copy_(part.view(gate.shape))


def count_below(gates: Sequence[Tensor], threshold: float) -> Tensor:
    """How many gates of each tensor have |g| < threshold; (len(gates),) int64. NaN is below nothing."""
    return torch.stack([(gate.double().abs() < threshold).sum() for gate in gates])


def _widen(x: Tensor) -> Tensor:
    return x.to(accumulation_dtype(x.dtype))


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """All entries of all tensors, one after the other; (sum of their sizes,)."""
    return _widen(torch.cat([tensor.flatten() for tensor in tensors]))


def _split(flat: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The 1-d parts of `flat` that stand for each tensor of a list."""
    return flat.split_with_sizes([tensor.numel() for tensor in like])


def _apart(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The parts of `flat` in the shapes and dtype of a list, each in memory of its own, as results must be."""
    copies: Any = torch.split_with_sizes_copy  # its stub says that it returns nothing
    parts = copies(flat.to(like[0].dtype), [tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def _dots(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """<x[j], y[j]> for every slice j of every pair; (J_1 + J_2 + ...,)."""
    return torch.cat([_dot(_widen(x), _widen(y)) for x, y in zip(xs, ys, strict=True)])


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """<x[j], y[j]> for every j; (J, ...) -> (J,)."""
    product = (x * y).unsqueeze(-1)
    return product.sum(dim=tuple(range(1, product.dim())))


def _inverse_norms(vs: Sequence[Tensor]) -> Tensor:
    """1 / |v[j]| for every slice of every tensor, and 0 (with gradient 0) where it counts as zero; (J_1 + J_2 + ...,).

    Tensor.sum adds pairwise; vector_norm would save a temporary and add one by one, with an error that grows with
    the length of the slice.
    """
    squares = _dots(vs, vs)
    zero = squares < torch.finfo(squares.dtype).tiny
    return torch.where(zero, 0.0, 1 / torch.where(zero, 1.0, squares).sqrt())


def _along(row: Tensor, like: Tensor) -> Tensor:
    """(J,) shaped to multiply (J, ...)."""
    return row.reshape(-1, *(1,) * (like.dim() - 1))
