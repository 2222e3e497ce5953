"""What every fast path of the spectral operators shares: orientation, grouping, and which eigenvalues are kept.

A matrix W is oriented to A (n, m) with n = min, so that G = A Aᵀ (n, n) holds its singular values squared. Everything
asked of it is a function of G times A: Σ_{i≤k} f(λ_i) u_i u_iᵀ · A with f = λ^(-1/2) for the sub-gradient and f = 1 for
the projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SUBGRADIENT, PROJECTION = "subgradient", "projection"
# Matrices of up to so many entries are stacked with others of their shape: a copy is cheaper than a call each.
STACKED_ENTRIES = 1 << 16


class Group(NamedTuple):
    """Matrices of one oriented shape: their places in the list, and A (B, n, m) in float32 or float64."""

    places: list[int]
    oriented: Tensor


def working(dtype: torch.dtype) -> torch.dtype:
    """The dtype that matrices are computed in: half precisions in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def orient(matrix: Tensor) -> Tensor:
    """The matrix or its transpose, the shorter side first."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


def groups(matrices: Sequence[Tensor], *, stack: bool = False) -> list[Group]:
    """The matrices that are not empty, oriented; small ones (all of them where `stack`) together with their like."""
    together: dict[tuple[int, int, torch.dtype], list[int]] = {}
    found: list[Group] = []
    for place, matrix in enumerate(matrices):
        if not matrix.numel():
            continue
        if not stack and matrix.numel() > STACKED_ENTRIES:
            found.append(Group([place], orient(matrix.detach()).to(working(matrix.dtype))[None]))
            continue
        n, m = sorted(matrix.shape)
        together.setdefault((n, m, working(matrix.dtype)), []).append(place)
    for (_, _, dtype), places in together.items():
        found.append(Group(places, torch.stack([orient(matrices[place].detach()).to(dtype) for place in places])))
    return found


def gram(a: Tensor) -> Tensor:
    """A Aᵀ (B, n, n) of A (B, n, m)."""
    return symmetric(a, a)


def symmetric(left: Tensor, right: Tensor) -> Tensor:
    """left rightᵀ (B, n, n) of (B, n, r) and (B, n, r), known to be symmetric.

    Of a large single matrix on a CPU the blocks above the diagonal are mirrored, not computed.
    """
    count, n, _ = left.shape
    if count > 1 or n < 256 or left.device.type != "cpu":
        return left @ right.mT
    out = left.new_empty(1, n, n)
    step = -(-n // 256) * 64  # four stripes: 5/8 of the products, each still wide enough for the library
    for top in range(0, n, step):
        bottom = min(top + step, n)
        torch.mm(left[0, top:], right[0, top:bottom].mT, out=out[0, top:, top:bottom])
        out[0, top:bottom, bottom:] = out[0, bottom:, top:bottom].mT
    return out


def energy_rank(values: Tensor, energy: float) -> Tensor:
    """Smallest k with Σ_{i≤k} λ_i ≥ energy · Σ λ_i, in [1, n], of λ (B, n) descending: (B,) int64. Sums in float64."""
    partial = values.double().cumsum(1)
    return ((partial < energy * partial[:, -1:]).sum(1) + 1).clamp(max=values.shape[1])


def numerical_rank(values: Tensor, longest: int, eps: float) -> Tensor:
    """How many σ = √λ stand above eps · max(m, n) · σ_1: (B,) int64, 0 for a zero matrix."""
    return (values > (eps * longest) ** 2 * values[:, :1]).sum(1)


def kept_rank(values: Tensor, kind: str, energy: float | None, longest: int, eps: float) -> Tensor:
    """k of each matrix (B,): the numerical rank, the energy rank, or for a truncated sub-gradient the smaller one."""
    if kind == PROJECTION:
        assert energy is not None
        return energy_rank(values, energy)
    k = numerical_rank(values, longest, eps)
    return k if energy is None else torch.minimum(k, energy_rank(values, energy))


def weights(values: Tensor, k: Tensor, kind: str) -> Tensor:
    """f (B, n): 1/√λ or 1 for the first k eigenvalues, 0 beyond."""
    kept = torch.arange(values.shape[1], device=values.device) < k[:, None]
    if kind == PROJECTION:
        return kept.to(values.dtype)
    return torch.where(kept, values, torch.inf).rsqrt()


def write(left: Tensor, right: Tensor, matrix: Tensor, target: Tensor | None) -> Tensor:
    """left (n, r) @ right (r, m) of the oriented matrix as a result of `matrix`, in `target` or in new memory.

    A result that the caller keeps lies in memory that the process sees for the first time, and the system hands that
    out page by page: where memory is given, a large product is faster.
    """
    if matrix.shape[0] > matrix.shape[1]:
        left, right = right.mT, left.mT
    if target is None:
        target = torch.empty(matrix.shape, dtype=matrix.dtype, device=matrix.device)
    if target.dtype == left.dtype and target.is_contiguous():
        torch.mm(left, right, out=target)
    else:
        target.copy_(left @ right)
    return target


def restore(result: Tensor, matrix: Tensor) -> Tensor:
    """A result (n, m) of the oriented matrix in the shape and dtype of `matrix`, in memory of its own."""
    back = result if matrix.shape[0] <= matrix.shape[1] else result.mT
    return back.to(matrix.dtype).contiguous()
