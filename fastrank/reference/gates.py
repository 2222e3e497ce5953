"""The truth of the gated factors, of the funnel penalty and of the gates' proximal steps, in plain PyTorch.

Values and gradients are computed in float32 for float16 and bfloat16 inputs, in the input's dtype otherwise; proximal
steps always in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gated_factor(direction: Tensor, gate: Tensor) -> Tensor:
    """gate[j] * direction[j] / |direction[j]|, the norm over all dimensions but the first.

    direction (J, ...), gate (J,) -> (J, ...). Where the sum of squares of a slice is no normal number of the
    accumulation dtype (in float32: a norm below about 1e-19), the slice counts as zero: it stays 0, and so do its
    gradients and its gate's.
    """
    v, g = _widen(direction), _widen(gate)
    return (_along(g * _inverse_norm(v), v) * v).to(direction.dtype)


def gated_factor_backward(grad: Tensor, direction: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of (direction, gate) from grad (J, ...)."""
    u, v, g = _widen(grad), _widen(direction), _widen(gate)
    inverse = _inverse_norm(v)
    along = _dot(u, v) * inverse
    grad_direction = _along(g * inverse, v) * (u - _along(along * inverse, v) * v)
    return grad_direction.to(direction.dtype), along.to(gate.dtype)


def gated_factor_double_backward(
    a: Tensor, b: Tensor, grad: Tensor, direction: Tensor, gate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (grad, direction, gate) from a (J, ...) and b (J,), those of `gated_factor_backward`'s two results.

    With n = direction / norm: L = gate/norm (<a,grad> - <a,n><grad,n>) + b <grad,n>, differentiated.
    """
    a, b, u, v, g = (_widen(t) for t in (a, b, grad, direction, gate))
    inverse = _inverse_norm(v)
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
    terms = []
    for gate in gates:
        size = _widen(gate).abs()
        terms.append(torch.where(size == 0, 0.0, size / (size + c)).sum())
    return torch.stack(terms).sum() * (c if normalized else 1.0)


def funnel_penalty_backward(grad: Tensor, gates: Sequence[Tensor], c: float, normalized: bool) -> list[Tensor]:
    """grad * sign(g) c / (|g| + c)^2 (times c where `normalized`) for each tensor; the gradient at 0 is 0."""
    scale = grad * (c if normalized else 1.0)
    out = []
    for gate in gates:
        g = _widen(gate)
        width = g.abs() + c
        # Two divisions instead of a square: c * c is no normal number for a small c.
        out.append((scale * (g.sign() * (1 / width) * (c / width))).to(gate.dtype))
    return out


def funnel_penalty_double_backward(
    upstream: Sequence[Tensor], grad: Tensor, gates: Sequence[Tensor], c: float, normalized: bool
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of (grad, gates) from those of `funnel_penalty_backward`'s results; F'' = -2c / (|g| + c)^3, 0 at 0."""
    scale = c if normalized else 1.0
    one = torch.ones_like(grad)
    slopes = funnel_penalty_backward(one, [_widen(g) for g in gates], c, normalized)
    grad_grad = torch.stack([(_widen(u) * s).sum() for u, s in zip(upstream, slopes, strict=True)]).sum()
    grads = []
    for u, gate in zip(upstream, gates, strict=True):
        g = _widen(gate)
        width = g.abs() + c
        curvature = torch.where(g == 0, 0.0, -2 / width * (1 / width) * (c / width))
        grads.append((grad * scale * _widen(u) * curvature).to(gate.dtype))
    return grad_grad.to(grad.dtype), grads


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
    flat = torch.cat([gate.flatten().double() for gate in gates])
    moved = proximal_points(flat, eta, c, penalty)
    for gate, part in zip(gates, moved.split_with_sizes([gate.numel() for gate in gates]), strict=True):
        gate.copy_(part.view(gate.shape))


def count_below(gates: Sequence[Tensor], threshold: float) -> Tensor:
    """How many gates of each tensor have |g| < threshold; (len(gates),) int64. NaN is below nothing."""
    return torch.stack([(gate.double().abs() < threshold).sum() for gate in gates])


def _widen(x: Tensor) -> Tensor:
    return x.to(accumulation_dtype(x.dtype))


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """<x[j], y[j]> for every j; (J, ...) -> (J,)."""
    product = (x * y).unsqueeze(-1)
    return product.sum(dim=tuple(range(1, product.dim())))


def _inverse_norm(v: Tensor) -> Tensor:
    """1 / |v[j]|, and 0 (with gradient 0) where the slice counts as zero.

    Tensor.sum adds pairwise; vector_norm would save a temporary and add one by one, with an error that grows with
    the length of the slice.
    """
    squares = _dot(v, v)
    zero = squares < torch.finfo(v.dtype).tiny
    return torch.where(zero, 0.0, 1 / torch.where(zero, 1.0, squares).sqrt())


def _along(row: Tensor, like: Tensor) -> Tensor:
    """(J,) shaped to multiply (J, ...)."""
    return row.reshape(-1, *(1,) * (like.dim() - 1))
