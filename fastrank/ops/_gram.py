"""The spectral operators by library matrix products and a symmetric eigensolver: the fast path on a CPU.

Large float32 matrices go through a float32 Gram matrix where that is enough for a relative error of 1e-4: where every
eigenvalue that is kept, and the gap at the cut, stand well above its rounding noise. All others are squared in float64,
which resolves singular values down to 1e-8 of the largest, below what float32 entries hold. float64 matrices are left
to the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from fastrank import _memory
from fastrank.ops import _counts, _parallel, _spectra
from fastrank.ops._spectra import PROJECTION, SUBGRADIENT
from fastrank.reference import linalg as truth

EPS = torch.finfo(torch.float32).eps
# Largest share of λ_k that the noise of the Gram matrix, EPS · λ_1, may be: of σ_k it is half as much.
RESOLUTION = 1.2e-4
# Largest error that the noise may cause across the gap at the cut, relative to √k = ‖U_k V_kᵀ‖_F.
SLACK = 5e-5
# A sum of squares beyond these has met, or may meet, the ends of float32's range.
SMALLEST, LARGEST = 1e-25, 1e30
# Rows of Uᵀ A that are this long beside the longest are orthogonal to 1e-16 / RESOLVED² = 1e-8 and better.
RESOLVED = 1e-4
SINGLE_ROWS = 96  # below, float64 takes hardly longer than float32


class Decomposition(NamedTuple):
    """A (B, n, m), its Gram eigenvalues (B, n) descending and vectors (B, n, n), in the precision they need; k (B,).

    A of projections stays as it is.
    """

    oriented: Tensor
    values: Tensor
    basis: Tensor
    ranks: Tensor


def spectral(
    matrices: Sequence[Tensor], kind: str, energy: float | None, targets: Sequence[Tensor] | None = None
) -> tuple[list[Tensor], Tensor, list[int]]:
    """Sub-gradients or projections, the ranks (N,) int64, and the places of matrices that are not finite.

    What is returned for those is NaN, and for empty matrices empty, with rank 0. targets: tensors to write results to.
    """
    out = list(targets) if targets is not None else list(matrices)
    ranks = torch.zeros(len(matrices), dtype=torch.int64)
    for place in (place for place, matrix in enumerate(matrices) if not matrix.numel()):
        out[place] = torch.zeros_like(matrices[place])
    groups = _spectra.groups(matrices)

    def solve(group: _spectra.Group) -> list[int]:
        def part(rows: Sequence[int]) -> list[int]:
            places = group.places[rows[0] : rows[-1] + 1]
            return solve_batch(places, group.oriented[rows[0] : rows[-1] + 1])

        rows = range(len(group.places))
        return _memory.in_parts(part, rows, lambda row: f"matrices[{group.places[row]}]")

    def solve_batch(places: list[int], a: Tensor) -> list[int]:
        found, broken = decompose_finite(a, kind, energy)
        factors = zip(*factorised(found, kind), strict=True)
        for place, (left, right), k in zip(places, factors, found.ranks, strict=True):
            target = targets[place] if targets is not None else None
            out[place], ranks[place] = _spectra.write(left, right, matrices[place], target), k
        return [places[i] for i in broken]

    bad = _spread(solve, groups)
    for place in bad:
        out[place].fill_(torch.nan)
        ranks[place] = 0
    return out, ranks, bad


def _spread(solve: Callable[[_spectra.Group], list[int]], groups: list[_spectra.Group]) -> list[int]:
    """Have the threads solve all groups; the places of what was not finite."""
    costs = [len(group.places) * _parallel.cost(group.oriented.shape[1:]) for group in groups]
    return [place for found in _parallel.each(solve, groups, costs) for place in found]


def zeroed(a: Tensor) -> tuple[Tensor, list[int]]:
    """A batch with zeros for the matrices that are not finite, and which those are."""
    broken = [i for i, finite in enumerate(a.isfinite().all(2).all(1).tolist()) if not finite]
    return (a.index_fill(0, torch.tensor(broken), 0.0) if broken else a), broken


def decompose_finite(a: Tensor, kind: str, energy: float | None) -> tuple[Decomposition, list[int]]:
    """The Gram spectrum of a batch, zero for matrices that are not finite, and which those are."""
    broken: list[int] = []
    found = decompose(a, kind, energy)
    if found is None:
        a, broken = zeroed(a)
        found = decompose(a, kind, energy)
        assert found is not None
    return found, broken


def decompose(a: Tensor, kind: str, energy: float | None, g: Tensor | None = None) -> Decomposition | None:
    """The Gram spectrum of a batch; None where an entry of it is not finite. g: A Aᵀ, where it is known already."""
    longest = a.shape[2]
    g = _spectra.gram(a) if g is None else g
    largest = g.diagonal(dim1=1, dim2=2).amax(1)
    inside = (largest > SMALLEST) & (largest < LARGEST)
    # Sums of squares of finite entries may overflow, or vanish.
    if not bool(inside.all()) and not bool(a.isfinite().all()):
        return None
    ok = torch.zeros_like(inside)
    if a.shape[1] >= SINGLE_ROWS and bool(inside.any()) and _promising(g, kind, energy):
        values, basis = eigh(torch.where(inside[:, None, None], g, 0))
        k = _spectra.kept_rank(values, kind, energy, longest, EPS)
        ok = inside & resolved(values, k, kind, energy)
        if bool(ok.all()):
            return Decomposition(a, values, basis, k)
    mixed = bool(ok.any())
    if mixed:
        values, basis = values.double(), basis.double()
        values[~ok], basis[~ok] = eigh(_spectra.gram(a[~ok].double()))
    if kind != PROJECTION:  # those are formed in float32 (see `factorised`)
        a = a.double()
    if not mixed:
        values, basis = eigh(_spectra.gram(a.double()))
    return Decomposition(a, values, basis, _spectra.kept_rank(values, kind, energy, longest, EPS))


def factorised(found: Decomposition, kind: str) -> tuple[Tensor, Tensor]:
    """Two factors (B, n, r) and (B, r, m) of U_k f(Λ_k) U_kᵀ A, whichever way is less work."""
    a, values, basis, k = found
    n, most = a.shape[1], int(k.max())
    u, f = basis[:, :, :most], _spectra.weights(values, k, kind)[:, :most]
    if kind == PROJECTION:  # of norm 1: nothing is left for float64 to save
        a, u, f = a.float(), u.float(), f.float()
    if 2 * most < n:
        return u * f[:, None], u.mT @ a
    return _spectra.symmetric(u * f[:, None], u), a


def eigh(g: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (B, n) descending, none below 0, and eigenvectors in columns."""
    try:
        values, vectors = torch.linalg.eigh(g)
    except LinAlgError:
        _counts.count("not_converged")
        u, values, _ = zip(*(truth.svd(matrix.double()) for matrix in g), strict=True)
        return torch.stack(values).to(g.dtype), torch.stack(u).to(g.dtype)
    return values.flip(1).clamp(min=0), vectors.flip(2)


def _promising(g: Tensor, kind: str, energy: float | None) -> bool:
    """Whether the smallest eigenvalue may stand above the floor: a Cholesky test, for full sub-gradients."""
    if kind != SUBGRADIENT or energy is not None or len(g) > 1:
        return True
    vector = g[0, :, g[0].diagonal().argmax()]
    for _ in range(4):  # λ_1 from below; only the effort depends on it
        vector = g[0] @ (vector / vector.norm())
    shifted = g[0].clone()
    shifted.diagonal().sub_(EPS / RESOLUTION * vector.norm())
    return not bool(torch.linalg.cholesky_ex(shifted)[1])


def resolved(
    values: Tensor, k: Tensor, kind: str, energy: float | None, slip: Tensor | float = 0.0
) -> Tensor:
    """Whether the noise of λ (B, n) leaves the result and its rank k (B,) as they are, for each matrix: (B,) bool.

    slip: what else the sum of the k largest eigenvalues may be off by (B,).
    """
    n = values.shape[1]
    exact = values.dtype == torch.float64
    noise = torch.finfo(values.dtype).eps * values[:, 0]
    last = values.gather(1, (k - 1).clamp(min=0)[:, None])[:, 0]
    ok = last * RESOLUTION > noise if kind == SUBGRADIENT else torch.ones_like(k, dtype=torch.bool)
    if energy is None:
        return ok if exact else ok & (k == n)
    following = values.gather(1, k.clamp(max=n - 1)[:, None])[:, 0]
    ok &= (k == n) | ((last - following) * SLACK * k.sqrt() > noise)
    partial = values.double().cumsum(1)
    above = partial.gather(1, (k - 1).clamp(min=0)[:, None])[:, 0] - energy * partial[:, -1]
    unsure = 2 * k * noise + slip
    return ok & (above > unsure) & ((k == 1) | (last - above > unsure))


def norms(matrices: Sequence[Tensor]) -> tuple[list[Tensor], list[int]]:
    """‖·‖_* of each matrix as 0-d float32 tensors, 0 for one that is not finite, and the places of those."""
    found = [matrix.new_zeros((), dtype=torch.float32) for matrix in matrices]
    groups = _spectra.groups(matrices)

    def solve(group: _spectra.Group) -> list[int]:
        spectrum, broken = decompose_finite(group.oriented, SUBGRADIENT, None)
        for place, norm in zip(group.places, spectrum.values.double().sqrt().sum(1), strict=True):
            found[place] = norm.float()
        return [group.places[i] for i in broken]

    return found, _spread(solve, groups)


def svd(matrices: Sequence[Tensor]) -> tuple[list[tuple[Tensor, Tensor, Tensor]], list[int]]:
    """Thin SVDs in float32, and the places of non-finite matrices (whose factors are NaN).

    In float64: U from the Gram matrix; the rows of Uᵀ A are orthogonal up to noise, and a QR factorisation of them
    makes them so to rounding, completes those of singular value 0, and leaves a triangle that is diagonal to rounding.
    """
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for matrix in matrices:
        (height, width), r = matrix.shape, min(matrix.shape)
        u, s, vh = (matrix.new_zeros(size, dtype=torch.float32) for size in ((height, r), (r,), (r, width)))
        found.append((u, s, vh))
    bad = []
    for places, a in _spectra.groups(matrices):
        a, broken = zeroed(a)
        bad += [places[i] for i in broken]
        wide = a.double()
        _, u = eigh(_spectra.gram(wide))
        rows = u.mT @ wide
        norms = rows.norm(dim=2)
        order = norms.argsort(dim=1, descending=True, stable=True)
        norms, u = norms.gather(1, order), u.gather(2, order[:, None].expand_as(u))
        rows = rows.gather(1, order[:, :, None].expand_as(rows))
        if bool((norms[:, -1] > RESOLVED * norms[:, 0]).all()):
            v = rows / norms[:, :, None]
        else:
            q, triangle = torch.linalg.qr(rows.mT)
            signs = torch.where(triangle.diagonal(dim1=1, dim2=2) < 0, -1.0, 1.0).double()
            v = (q * signs[:, None]).mT
        for i, place in enumerate(places):
            left, right = u[i].float(), v[i].float()
            if matrices[place].shape[0] > matrices[place].shape[1]:
                left, right = right.mT, left.mT
            found[place] = left.contiguous(), norms[i].float(), right.contiguous()
    for place in bad:
        for factor in found[place]:
            factor.fill_(torch.nan)
    return found, bad

