"""Warm steps of matrices on a GPU: the host decides by the age of a basis alone, and reads nothing.

Every step is taken, and every basis turned, whatever the error estimate says. Where that exceeds the tolerance a flag
goes to the host in its own time, and the next call that finds it decomposes the matrix anew. All matrices of a shape
are one batch of library products, and a step can be captured in a CUDA graph; an exact decomposition, which waits for
the GPU, cannot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrank.ops import _correction, _spectra
from fastrank.ops._entry import Entry
from fastrank.ops._pending import NONFINITE, STALE
from fastrank.ops._spectra import PROJECTION


def step(
    matrices: list[Tensor], entries: list[Entry], kind: str, energy: float | None, tolerance: float
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Results, ranks (N,) int64 and status (N,) int32 of matrices that all have an entry; their bases are turned."""
    out: list[Tensor] = list(matrices)
    ranks, status = list(matrices), list(matrices)
    for dtype in {entry.basis.dtype for entry in entries}:
        own = [i for i, entry in enumerate(entries) if entry.basis.dtype == dtype]
        for members, a in _spectra.groups([matrices[i] for i in own], stack=True):
            places = [own[i] for i in members]
            basis = torch.cat([entries[i].basis for i in places])
            found, k, flags, basis = batch(a.to(dtype), basis, kind, energy, tolerance)
            for i, x, q, *rest in zip(places, found, basis.chunk(len(basis)), k, flags, strict=True):
                out[i], entries[i].basis = _spectra.restore(x, matrices[i]), q
                ranks[i], status[i] = rest
    return out, torch.stack(ranks), torch.stack(status)


def batch(
    a: Tensor, basis: Tensor, kind: str, energy: float | None, tolerance: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same of A (B, n, m) from bases (B, n, n), with the turned bases; NaN where A is not finite."""
    largest = a.abs().amax((1, 2))
    finite = largest.isfinite()
    # A power of two, so that squares neither overflow nor vanish and nothing is rounded.
    unit = torch.where(finite & (largest > 0), torch.exp2(torch.frexp(largest).exponent.to(a.dtype)), 1)[:, None, None]
    scaled = torch.where(finite[:, None, None], a / unit, 0)
    found = _correction.correct(_spectra.gram(scaled), basis, kind, energy, a.shape[2])
    x = basis @ found.function @ basis.mT @ scaled
    if kind == PROJECTION:
        x = x * unit
    stale = ~(found.error <= tolerance)
    x = torch.where(finite[:, None, None], x, torch.nan)
    turned = torch.where(stale[:, None, None], basis, _orthonormal(_correction.turn(basis, found)))
    status = ((~finite) * NONFINITE + (finite & stale) * STALE).to(torch.int32)
    return x, torch.where(finite, found.ranks, 0), status, turned


def _orthonormal(basis: Tensor) -> Tensor:
    """A basis that is orthonormal up to E² made so up to E⁸, by two Newton–Schulz steps."""
    for _ in range(2):
        basis = 1.5 * basis - 0.5 * basis @ (basis.mT @ basis)
    return basis
