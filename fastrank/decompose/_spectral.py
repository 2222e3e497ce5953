"""SVDs for decompositions: through a Gram matrix in float64 where the entries are float32 or coarser.

Squaring halves the digits: singular values below 1e-8 of the largest drown, and vectors within such a gap mix. Both are
finer than what float32 entries hold, and a truncation is blind to them: the energy of U_kᵀ M for the computed basis U_k
is within a few m · 1e-16 of the best, relative to ‖M‖². What is left of the singular triples comes from a product with
M itself, so that the factors of all of them multiply to M to rounding. float64 entries get a true SVD.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrank import ops


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, r), S (r,), Vh (r, n), r = min(m, n), of an (m, n) matrix, in float64; zero vectors where S is 0."""
    u, s, vh = svd_batch(matrix[None])
    return u[0], s[0], vh[0]


def svd_batch(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same of each matrix of a batch (N, m, n)."""
    if matrices.shape[1] > matrices.shape[2]:
        u, s, vh = svd_batch(matrices.mT)
        return vh.mT, s, u.mT
    if matrices.dtype == torch.float64:
        u, s, vh = (torch.stack(parts) for parts in zip(*ops.svd(list(matrices)), strict=True))
        return u, s, vh
    wide = matrices.double()
    _, vectors = torch.linalg.eigh(wide @ wide.mT)
    u = vectors.flip(2)
    rest = u.mT @ wide
    s = rest.norm(dim=2)
    return u, s, rest.div_(s[..., None].clamp(min=torch.finfo(s.dtype).tiny))
