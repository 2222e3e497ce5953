"""Alternating least squares with a ridge and momentum, for a batch of CP problems: what every CP here has in common.

A CP problem is a tensor of norm 1 (or 0) and a sum of R terms a_r ∘ b_r ∘ c_r that is to come near it. Two things are
added to the textbook's sweep:
- a ridge on the sizes t_r of the terms: what a sweep lowers is error² + ridge · Σ t_r², so that two terms cannot grow
  against each other without end, which plain ALS lets them do (degeneracy). The ridge is `RIDGE` times the error² left,
  so that it vanishes where a tensor has the asked rank, and more while a term is larger than `LARGEST_TERM`.
- Nesterov's momentum with restarts (Mitchell, Ye, De Sterck, "Nesterov acceleration of alternating least squares for
  canonical tensor decomposition", 2020): a sweep costs the same and a quarter as many are needed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# What a term of the tensor's own norm costs, as a share of the error². Larger keeps terms smaller and the error larger.
RIDGE = 1e-3
# Below this the normal equations would lose more to rounding than to the ridge.
SMALLEST_RIDGE = 1e-12
# No term is larger than this multiple of its tensor. error² + ridge · Σ t_r² is at most 1, which it is without terms,
# so that the ridge 1 / LARGEST_TERM² is always enough. It is where every search begins.
LARGEST_TERM = 5.0
SAFE_RIDGE = 1 / LARGEST_TERM**2
# The ridge goes up at most, and down at most, by these factors a sweep.
RAISE, LOWER = 4.0, 64.0
MOMENTUM = 0.9
# Sweeps between two looks at which problems still improve; each look waits for the device.
LOOK_EVERY = 5
# LAPACK inverts matrices smaller than this faster than it solves with their Cholesky factors.
SMALL = 8
VANISHED = 1e-200

# (data, bc, ridge) -> (error² (N,), t² (N, R), bc'). bc (N, R, j + k) holds b and c side by side. The results: what the
# best a for these b and c leaves, the squared sizes of its terms, and the b and c of the next sweep.
Sweep = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def minimise(
    sweep: Sweep, data: Tensor, bc: Tensor, max_iter: int, tol: float, ridge: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sweeps from bc (N, R, j + k): error² (N,), ridge (N,) and bc of the best sweep of each problem.

    A problem is left alone when its error² fell by less than `tol` of it a sweep since the last look. Errors never rise
    with the number of sweeps. ridge: where an earlier call ended, to go on from there.
    """
    error = torch.full((data.shape[0],), torch.inf, dtype=data.dtype, device=data.device)
    ridge = torch.full_like(error, SAFE_RIDGE) if ridge is None else ridge
    found = error.clone(), ridge.clone(), bc.clone()
    problems = torch.arange(data.shape[0], device=data.device)
    # Per problem: the point that the next sweep starts from, what the sweep of the best point led to, the best point
    # with its error² and ridge, the error² at the last look, the sweeps that helped since the last restart.
    at, ahead, best, best_ridge = bc, bc, bc, ridge
    looked, streak = torch.full_like(error, 2.0), torch.zeros_like(error)
    for step in range(1, max_iter + 1):
        here, sizes, after = sweep(data, at, ridge)
        too_large = sizes.amax(1) > LARGEST_TERM**2
        better = (here < error) & ~too_large
        chosen = better[:, None, None]
        streak = torch.where(better, streak + 1, 0.0)
        error, best_ridge = torch.where(better, here, error), torch.where(better, ridge, best_ridge)
        best = torch.where(chosen, at, best)
        # After a sweep that did not help: again from where the best point's own sweep led, without momentum.
        momentum = (streak / (streak + 3)).clamp(max=MOMENTUM)[:, None, None]
        at = torch.where(chosen, torch.addcmul(after, momentum, after - ahead), ahead)
        ahead = torch.where(chosen, after, ahead)
        lower = torch.maximum(RIDGE * error, ridge / LOWER).clamp(min=SMALLEST_RIDGE)
        ridge = torch.where(too_large, ridge * RAISE, torch.where(better, lower, ridge)).clamp(max=SAFE_RIDGE)
        if step % LOOK_EVERY and step < max_iter:
            continue
        going = (looked - error > tol * LOOK_EVERY * error) & (error > 0)
        if step == max_iter or not bool(going.all()):
            for whole, part in zip(found, (error, best_ridge, best), strict=True):
                whole[problems] = part
            if step == max_iter or not bool(going.any()):
                break
            kept = (data, problems, at, ahead, best, best_ridge, error, ridge, streak)
            data, problems, at, ahead, best, best_ridge, error, ridge, streak = (x[going] for x in kept)
        looked = error
    return found


def solve(gram: Tensor, ridge: Tensor, right: Tensor) -> Tensor:
    """The normal equations gram (N, R, R) with ridge (N,) on the sizes of the terms, for right (N, R, j).

    The diagonal holds the squared size of a term at unit coefficient, so the ridge is a factor there, and no vector
    needs norm 1. Terms that vanished leave zeros, which anything positive turns into the right answer, zero.
    Overwrites gram.
    """
    gram.diagonal(dim1=1, dim2=2).mul_(1 + ridge[:, None]).add_(VANISHED)
    if gram.shape[1] < SMALL:
        inverse: Tensor = torch.linalg.inv_ex(gram)[0]
        return inverse @ right
    return torch.cholesky_solve(right, torch.linalg.cholesky_ex(gram)[0])


def unit(vectors: Tensor) -> Tensor:
    """Vectors along the last dimension, divided by their norms; zero vectors stay zero."""
    lengths: Tensor = vectors.norm(dim=-1, keepdim=True)
    return vectors / lengths.clamp(min=torch.finfo(vectors.dtype).tiny)


def khatri_rao(p: Tensor, q: Tensor) -> Tensor:
    """Products of all entries of p (N, R, j) and q (N, R, k), term by term: (N, R, j·k)."""
    return (p[..., :, None] * q[..., None, :]).flatten(2)
