"""The polar factor U Vᵀ by Polar Express iterations: the schedules, and a twin of the kernel that rounds as it does.

Source: N. Amsel, D. Persson, C. Musco, R. M. Gower, "The Polar Express", 2025 (minimax quintics, cushion, safety
factor). The iteration runs on the n×n Gram matrix and starts anew from a fresh one after every block of iterations,
because rounding makes Gram matrices slightly indefinite and every iteration magnifies that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fastrank.reference import linalg

Quintic = tuple[float, float, float]

CUSHION = 0.024  # a quintic never serves an interval wider than 1 : 1/CUSHION
SAFETY = 1.002  # a quintic also serves singular values this much above its interval, where rounding may have put them
LOW_SCALE = 2048.0  # what float16 leaves of a number is stored times this: 11 further bits at the same exponents
HEADROOM = 4  # matrices are scaled to a Frobenius norm of about 2**HEADROOM, away from float16's subnormal numbers


def evaluate(quintic: Quintic, x: float) -> float:
    """a x + b x³ + c x⁵."""
    a, b, c = quintic
    return x * (a + x * x * (b + x * x * c))


def quintic(lower: float, upper: float = 1.0) -> Quintic:
    """The odd quintic nearest to 1 on [lower, upper], 0 < lower < upper, in the maximum norm: (a, b, c).

    Its error takes its extreme value with alternating signs at lower, at two inner points and at upper; the inner
    points are found by Remez' exchange. Where the interval is nearly a point it is the Taylor polynomial there.
    """
    low = lower / upper
    if low >= 1 - 5e-6:
        a, b, c = 15 / 8, -10 / 8, 3 / 8
    else:
        left, right = (3 * low + 1) / 4, (low + 3) / 4
        error, before = 0.0, math.inf
        while abs(error - before) > 1e-15:
            before = error
            points = ((low, 1.0), (left, -1.0), (right, 1.0), (1.0, -1.0))
            a, b, c, error = _solve([[x, x**3, x**5, sign, 1.0] for x, sign in points])
            root = math.sqrt(9 * b * b - 20 * a * c)
            left, right = math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))
    return a / upper, b / upper**3, c / upper**5


@lru_cache
def coefficients(
    lower: float, iterations: int, cushion: float = CUSHION, safety: float = SAFETY
) -> tuple[Quintic, ...]:
    """Quintics whose composition takes [lower, 1] nearest to 1, each the best for what the ones before it leave.

    cushion: where an interval is wider than 1 : 1/cushion its lower end is taken as cushion times the upper one, so
    that no quintic nears 0 inside; the result is centred on 1 again. safety ≥ 1: every quintic is stretched by this.
    """
    found, low, high = [], lower, 1.0
    for _ in range(iterations):
        best = quintic(max(low, cushion * high), high)
        if cushion * high > low:
            centre = (evaluate(best, low) + evaluate(best, high)) / 2
            best = best[0] / centre, best[1] / centre, best[2] / centre
        best = best[0] / safety, best[1] / safety**3, best[2] / safety**5
        found.append(best)
        low = evaluate(best, low)
        high = 2 - low
    return tuple(found)


@dataclass(frozen=True)
class Schedule:
    """A precision and a number of iterations.

    tolerance: relative Frobenius error to U Vᵀ that is held for condition numbers of up to 50.
    lower: singular values above `lower` times the Schatten 4-norm (Σσ⁴)^¼ are taken to 1; smaller ones stay below 1.
    blocks: iterations between fresh Gram matrices.
    split: whether the n×m matrices, too, are held as two float16 each, 22 bits, as the n×n matrices always are.
    """

    tolerance: float
    lower: float
    blocks: tuple[int, ...]
    split: bool

    def quintics(self) -> tuple[tuple[Quintic, ...], ...]:
        """The coefficients of every block."""
        found = coefficients(self.lower, sum(self.blocks))
        ends = [sum(self.blocks[: i + 1]) for i in range(len(self.blocks))]
        return tuple(found[end - count : end] for end, count in zip(ends, self.blocks, strict=True))


# From the cheapest to the most accurate; docs/kernels/polar.md has what each reaches.
SCHEDULES = (
    Schedule(2e-2, 1 / 400, (3, 3), split=False),
    Schedule(5e-3, 1e-3, (3, 4), split=False),
    Schedule(1e-4, 4e-4, (4, 4), split=True),
    Schedule(3e-5, 1e-4, (2, 3, 4), split=True),
)
DEFAULT = SCHEDULES[1]


def schedule(tolerance: float | None = None) -> Schedule:
    """The cheapest schedule that holds `tolerance`; None: dual gap ≤ 1e-4 up to a condition number of 1000.

    Raises ValueError below the smallest tolerance that some schedule holds.
    """
    if tolerance is None:
        return DEFAULT
    for each in SCHEDULES:
        if each.tolerance <= tolerance:
            return each
    raise ValueError(f"tolerance must be at least {SCHEDULES[-1].tolerance:g}, got {tolerance}")


def polar_factor(matrix: Tensor, plan: Schedule) -> Tensor:
    """U Vᵀ of an (m, n) matrix in its shape and dtype, contiguous; 0 for a zero matrix, all NaN for a non-finite one.

    Rounds what the kernel rounds; float64 matrices are computed in float64 with the same quintics.
    """
    if matrix.numel() == 0:
        return matrix.new_empty(matrix.shape)
    tall = matrix.shape[0] > matrix.shape[1]
    work = linalg.working(matrix.detach())
    exact = work.dtype == torch.float64
    with linalg.exact_products(matrix.device):
        x = _rounded(_scaled(work.mT if tall else work), plan.split, exact)
        scale = None
        for index, block in enumerate(plan.quintics()):
            gram = _mirrored(_product(x, x.mT, plan.split, plan.split, exact))
            if scale is None:  # no singular value is above the Schatten 4-norm, the root of the Gram matrix' norm
                bound = torch.linalg.matrix_norm(gram)
                scale = torch.where(bound == 0, bound, bound.rsqrt())
            x = _product(_block(gram, block, scale, exact), x, True, plan.split, exact)
            if index + 1 < len(plan.blocks):
                x = _rounded(x, plan.split, exact)
            scale = torch.ones_like(scale)
    return (x.mT if tall else x).to(matrix.dtype).contiguous()


def _block(gram: Tensor, block: tuple[Quintic, ...], scale: Tensor, exact: bool) -> Tensor:
    """The n×n factor that the iterations of a block put on the left; the first takes scale · x instead of x."""
    total = None
    for index, (a, b, c) in enumerate(block):
        square = _mirrored(_product(gram, gram, True, True, exact))
        z = (b * scale**3) * gram + (c * scale**5) * square
        z.diagonal().add_(a * scale)
        total = z if total is None else _mirrored(_product(z, total, True, True, exact))
        if index + 1 < len(block):
            once = _mirrored(_product(z, gram, True, True, exact))
            gram = _mirrored(_product(once, z, True, True, exact))
        scale = torch.ones_like(scale)
    assert total is not None
    return total


def _scaled(work: Tensor) -> Tensor:
    """The matrix times a power of two, with a Frobenius norm from 2**(HEADROOM - 1) to 2**HEADROOM."""
    x = work.double()
    first = torch.frexp(x.abs().max()).exponent
    x = torch.ldexp(torch.ldexp(x, -(first // 2)), first // 2 - first)
    norm = torch.linalg.matrix_norm(x)
    x = torch.ldexp(x, HEADROOM - torch.frexp(norm).exponent)
    return torch.where(norm.isfinite(), x, torch.full_like(x, math.nan)).to(work.dtype)


def _high_low(x: Tensor) -> tuple[Tensor, Tensor]:
    high = x.half().to(x.dtype)
    return high, ((x - high) * LOW_SCALE).half().to(x.dtype) / LOW_SCALE


def _rounded(x: Tensor, split: bool, exact: bool) -> Tensor:
    """As it is stored: in one float16, or in two where `split`."""
    if exact:
        return x
    high, low = _high_low(x)
    return high + low if split else high


def _product(left: Tensor, right: Tensor, split_left: bool, split_right: bool, exact: bool) -> Tensor:
    """left @ right out of products of float16 numbers with float32 sums; the product of two low parts is left out."""
    if exact:
        return left @ right
    (left_high, left_low), (right_high, right_low) = _high_low(left), _high_low(right)
    out = left_high @ right_high
    if split_left:
        out = out + left_low @ right_high
    if split_right:
        out = out + left_high @ right_low
    return out


def _mirrored(x: Tensor) -> Tensor:
    """The lower triangle and its mirror image: all that is computed of a symmetric product."""
    return x.tril() + x.tril(-1).mT


def _solve(rows: list[list[float]]) -> list[float]:
    """The solution of a small linear system, the right side in the last column, by elimination with pivots."""
    rows = [list(row) for row in rows]
    for i in range(len(rows)):
        pivot = max(range(i, len(rows)), key=lambda k: abs(rows[k][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [value / rows[i][i] for value in rows[i]]
        for k in range(len(rows)):
            if k != i:
                rows[k] = [value - rows[k][i] * top for value, top in zip(rows[k], rows[i], strict=True)]
    return [row[-1] for row in rows]
