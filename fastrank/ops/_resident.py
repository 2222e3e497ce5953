"""Warm steps of matrices on a GPU: the host decides by the age of a basis alone, and reads nothing.

Every step is taken, and every basis turned, whatever the error estimate says. Where that exceeds the tolerance a flag
goes to the host in its own time, and the next call that finds it decomposes the matrix anew. All matrices of a shape
are one batch of library products, and a step can be captured in a CUDA graph; an exact decomposition, which waits for
the GPU, cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastrank import _memory
from fastrank.ops import _correction, _spectra
from fastrank.ops._entry import Entry
from fastrank.ops._pending import NONFINITE, STALE
from fastrank.ops._spectra import PROJECTION


def step(
    matrices: list[Tensor], entries: list[Entry], kind: str, energy: float | None, tolerance: float
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Results, ranks (N,) int64 and status (N,) int32 of matrices that all have an entry; their bases are turned.

    Matrices of one shape are one batch, or several smaller ones where there is no memory for that.
    """
    out: list[Tensor] = list(matrices)
    ranks, status = list(matrices), list(matrices)
    together: dict[tuple[Any, ...], list[int]] = {}
    for i, (matrix, entry) in enumerate(zip(matrices, entries, strict=True)):
        together.setdefault((*sorted(matrix.shape), entry.basis.dtype), []).append(i)

    def solve(places: Sequence[int]) -> list[tuple[Tensor, ...]]:
        a = torch.stack([_spectra.orient(matrices[i].detach()).to(entries[i].basis.dtype) for i in places])
        basis = torch.cat([entries[i].basis for i in places])
        found, k, flags, basis = batch(a, basis, kind, energy, tolerance)
        restored = [_spectra.restore(x, matrices[i]) for i, x in zip(places, found, strict=True)]
        return list(zip(restored, basis.chunk(len(basis)), k, flags, strict=True))

    for places in together.values():
        found = _memory.in_parts(solve, places, lambda i: f"a warm step of matrices[{i}], {tuple(matrices[i].shape)},")
        for i, (x, q, k, flag) in zip(places, found, strict=True):
            out[i], entries[i].basis, ranks[i], status[i] = x, q, k, flag
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
