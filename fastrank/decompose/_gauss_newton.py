"""Gauss–Newton for filters that may have exactly the asked CP rank, where ALS creeps and this converges quadratically.

The unknowns are b and c; a is eliminated (variable projection: Golub, Pereyra 1973; Kaufman 1975), so a step solves
R·(kh + kw) equations a filter. Steps that do not lower the error, or that make a term too large, are taken back and
damped (Levenberg, Marquardt).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastrank.decompose import _als
from fastrank.decompose._als import khatri_rao, unit

STEPS = 30
FIRST_DAMPING = 1e-4
LEAST_DAMPING = 1e-14
# The Gram matrix holds error² only to float64's rounding; a step at that level is taken, for it still converges.
ROUNDING = 1e-15


class Point(NamedTuple):
    """b, c of norm 1 and what the best a for them makes: a Xᵀ (N, R, p), a aᵀ (N, R, R), (ddᵀ + ridge)⁻¹ d, error².

    The error² is infinite where a term is too large.
    """

    b: Tensor
    c: Tensor
    seen: Tensor
    overlaps: Tensor
    dual: Tensor
    error: Tensor


def refine(gram: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """gram (N, p, p) of trace 1, b (N, R, kh), c (N, R, kw) -> error² (N,), ridge (N,) and b and c of norm 1 as one."""
    now = _evaluate(gram, unit(b), unit(c))
    damping = torch.full_like(now.error, FIRST_DAMPING)
    for _ in range(STEPS):
        new = _evaluate(gram, *_step(gram, now, damping))
        better = new.error < now.error + ROUNDING
        damping = torch.where(better, damping / 10, damping * 4).clamp(min=LEAST_DAMPING)
        # Errors are either below the noise or about to be after one more quadratic step.
        done = bool((now.error < ROUNDING).all())
        now = Point(*(torch.where(better.view(-1, *[1] * (x.dim() - 1)), x, y) for x, y in zip(new, now, strict=True)))
        if done:
            break
    return now.error, torch.full_like(now.error, _als.SMALLEST_RIDGE), torch.cat([now.b, now.c], 2)


def _evaluate(gram: Tensor, b: Tensor, c: Tensor) -> Point:
    images = khatri_rao(b, c)
    ridge = torch.full((), _als.SMALLEST_RIDGE, dtype=b.dtype, device=b.device).expand(b.shape[0])
    dual = _als.solve((b @ b.mT) * (c @ c.mT), ridge, images)
    seen = dual @ gram
    overlaps = seen @ dual.mT
    # b and c have norm 1, so the diagonal of a aᵀ holds the squared sizes of the terms, which the ridge counts.
    sizes = overlaps.diagonal(dim1=1, dim2=2)
    error = gram.diagonal(dim1=1, dim2=2).sum(1) - (seen * images).sum((1, 2)) - ridge * sizes.sum(1)
    error = torch.where(sizes.amax(1) <= _als.LARGEST_TERM**2, error, torch.inf)
    return Point(b, c, seen, overlaps, dual, error)


def _step(gram: Tensor, now: Point, damping: Tensor) -> tuple[Tensor, Tensor]:
    """One damped step: b and c of norm 1."""
    b, c = now.b, now.c
    count, rank, kh = b.shape
    size = kh + c.shape[2]
    images = khatri_rao(b, c)
    # How the term's image moves when b and c turn (their lengths do not matter): (N, R, kh + kw, p).
    turn_b = torch.eye(kh, dtype=b.dtype, device=b.device) - b[..., :, None] * b[..., None, :]
    turn_c = torch.eye(size - kh, dtype=b.dtype, device=b.device) - c[..., :, None] * c[..., None, :]
    moves = torch.cat(
        [turn_b[..., None] * c[:, :, None, None], b[:, :, None, :, None] * turn_c[:, :, :, None]], 2
    ).flatten(3)
    # What of the filter the terms leave, seen by each a; and the moves without what the terms already span.
    left = now.seen - now.overlaps @ images
    gradient = (moves @ left[..., None])[..., 0]
    flat = moves.flatten(1, 2)
    free = flat - (flat @ now.dual.mT) @ images
    normal = (free @ flat.mT).view(count, rank, size, rank, size)
    normal = (normal * now.overlaps[:, :, None, :, None]).view(count, rank * size, rank * size)
    normal.diagonal(dim1=1, dim2=2).add_(damping[:, None])
    found, wrong = torch.linalg.cholesky_ex(normal)
    step = torch.cholesky_solve(gradient.reshape(count, -1, 1), found).view(count, rank, size)
    step = torch.where((wrong == 0)[:, None, None], step, 0.0)
    return unit(b + step[..., :kh]), unit(c + step[..., kh:])
