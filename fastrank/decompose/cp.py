"""CP of every filter of a kernel at once (NORTON): alternating least squares, batched over the filters."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastrank import _checks, reference

# Relative to the mean diagonal of the normal equations: keeps components from growing without bound when two of them
# become parallel, which plain ALS does at higher ranks.
RIDGE = 1e-9


class CPFilters(NamedTuple):
    """Filter o ≈ Σ_r pointwise[r, o] ∘ vertical[r, o] ∘ horizontal[r, o]: (R, O, I), (R, O, kh), (R, O, kw)."""

    pointwise: Tensor
    vertical: Tensor
    horizontal: Tensor

    def weight(self) -> Tensor:
        """The dense kernel (O, I, kh, kw)."""
        return reference.conv.cp_weight(*self)


def max_rank(shape: tuple[int, ...]) -> int:
    """The rank at which every I×kh×kw filter is exact: one term a pixel of the kernel."""
    return shape[2] * shape[3]


def cp_filters(weight: Tensor, rank: int, *, seed: int = 0, max_iter: int = 200, tol: float = 1e-7) -> CPFilters:
    """CP of rank R of each filter of a kernel (O, I, kh, kw), the three factors of a term balanced in norm.

    Each filter is first compressed without loss to min(I, kh·kw) channels, so that one batched ALS in float64 over all
    filters is cheap; it starts from `seed` and stops when a sweep improves the relative error by less than `tol`.
    rank: between 1 and kh·kw, at which the sum is exact. Raises ValueError on other ranks, NaN and Inf.
    """
    _checks.tensor("weight", weight, (None, None, None, None), "(O, I, kh, kw)")
    _checks.filled("weight", weight, "(O, I, kh, kw)")
    _checks.integer("rank", rank, 1, max_rank(tuple(weight.shape)))
    _checks.integer("seed", seed, 0)
    _checks.integer("max_iter", max_iter, 1)
    _checks.number("tol", tol, 0.0)
    _checks.finite("weight", weight.detach())
    # Products of three squares leave float64's range early. A unit whose cube scales the kernel rounds nothing.
    unit = 2.0 ** max(-340, min(340, math.frexp(float(weight.detach().abs().max()))[1] // 3))
    filters = weight.detach().double() / unit / unit / unit
    if rank == max_rank(tuple(weight.shape)):
        factors = _one_term_a_pixel(filters)
    else:
        basis, small = _compress(filters)
        a, b, c = _als(small, rank, seed, max_iter, tol)
        factors = torch.einsum("oim,orm->ori", basis, a), b, c
    return CPFilters(*((factor.transpose(0, 1) * unit).to(weight.dtype).contiguous() for factor in _balance(*factors)))


def _compress(filters: Tensor) -> tuple[Tensor, Tensor]:
    """(O, I, kh, kw) as an orthonormal basis (O, I, m) times (O, m, kh, kw), m = min(I, kh·kw)."""
    basis, small = torch.linalg.qr(filters.flatten(2))
    return basis, small.unflatten(2, filters.shape[2:])


def _one_term_a_pixel(filters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out_channels, _, kh, kw = filters.shape
    rows = torch.eye(kh, dtype=filters.dtype, device=filters.device).repeat_interleave(kw, 0)
    columns = torch.eye(kw, dtype=filters.dtype, device=filters.device).repeat(kh, 1)
    return filters.flatten(2).transpose(1, 2), rows.expand(out_channels, -1, -1), columns.expand(out_channels, -1, -1)


def _als(target: Tensor, rank: int, seed: int, max_iter: int, tol: float) -> tuple[Tensor, Tensor, Tensor]:
    """Batched ALS on (O, m, kh, kw) -> (O, R, m), (O, R, kh), (O, R, kw)."""
    generator = torch.Generator().manual_seed(seed)
    out_channels, _, kh, kw = target.shape
    b = torch.randn(out_channels, rank, kh, generator=generator, dtype=torch.float64).to(target.device)
    c = torch.randn(out_channels, rank, kw, generator=generator, dtype=torch.float64).to(target.device)
    # One unfolding a factor, its own mode last: (O, kh·kw, m), (O, m·kw, kh), (O, m·kh, kw).
    of_a = target.permute(0, 2, 3, 1).flatten(1, 2).contiguous()
    of_b = target.permute(0, 1, 3, 2).flatten(1, 2).contiguous()
    of_c = target.flatten(1, 2)
    total = target.square().sum()
    error = torch.full_like(total, torch.inf)
    for _ in range(max_iter):
        a = _solve(of_a, b, c)
        b = _solve(of_b, a, c)
        c = _solve(of_c, a, b)
        a, b, c = _balance(a, b, c)
        previous = error
        error = (of_a - _khatri_rao(b, c).mT @ a).square().sum()
        if previous - error <= tol * total:
            break
    return a, b, c


def _khatri_rao(p: Tensor, q: Tensor) -> Tensor:
    """Products of all entries of p (O, R, j) and q (O, R, k), term by term: (O, R, j·k)."""
    return (p[..., :, None] * q[..., None, :]).flatten(2)


def _solve(unfolding: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """Least squares of one factor given the other two: (PPᵀ ∘ QQᵀ + ridge) X = KR(P, Q) · unfolding, a filter each."""
    gram = (p @ p.mT) * (q @ q.mT)
    ridge = RIDGE * gram.diagonal(dim1=1, dim2=2).mean(1)
    # A zero filter has a zero Gram matrix: any positive ridge then gives the right answer, zero.
    ridge = torch.where(ridge > 0, ridge, torch.ones_like(ridge))
    gram.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    factor, _ = torch.linalg.cholesky_ex(gram)
    return torch.cholesky_solve(_khatri_rao(p, q) @ unfolding, factor)


def _balance(*factors: Tensor) -> tuple[Tensor, ...]:
    """The same terms, with the three factors of each of equal norm."""
    norms = [factor.norm(dim=-1, keepdim=True) for factor in factors]
    target = (norms[0] * norms[1] * norms[2]) ** (1 / 3)
    return tuple(
        torch.where(norm > 0, factor * (target / norm.clamp(min=torch.finfo(norm.dtype).tiny)), factor * 0)
        for factor, norm in zip(factors, norms, strict=True)
    )
