"""Greedy choice of the filters to keep: of the closest pair, the one nearer to all the others goes (NORTON)."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastrank import _checks

Matrix = np.ndarray[Any, np.dtype[np.float64]]
# Relative difference below which two totals count as equal.
_SAME = 1e-12


def select(distances: Tensor, keep: int, *, protect: Collection[int] = ()) -> Tensor:
    """Indices (keep,), ascending, of the filters that stay when one after another is removed.

    distances (O, O): symmetric, finite, not negative; the diagonal is not read. Each step takes the closest pair of
    those left and removes the one of the smaller total distance to the others left. Ties: the first pair in the order
    of the indices, and in it the later index; totals that agree to twelve digits tie, so that equal filters do. The
    survivors of a smaller `keep` are survivors of a larger one.
    protect: indices that stay whatever their distances.
    Raises ValueError or TypeError, naming the argument.
    """
    matrix = _matrix(distances)
    _checks.integer("keep", keep, max(1, len(set(protect))), len(matrix))
    for index in protect:
        _checks.integer("protect", index, 0, len(matrix) - 1)
    removed = set(_removals(matrix, len(matrix) - keep, sorted(set(protect))))
    return torch.tensor([index for index in range(len(matrix)) if index not in removed], dtype=torch.long)


def removal_order(distances: Tensor) -> Tensor:
    """All indices (O,) in the order in which `select` removes them, the last survivor at the end."""
    matrix = _matrix(distances)
    removed = _removals(matrix, len(matrix) - 1, [])
    return torch.tensor([*removed, *(set(range(len(matrix))) - set(removed))], dtype=torch.long)


def _matrix(distances: Any) -> Matrix:
    _checks.tensor("distances", distances, (None, None), "(O, O)")
    _checks.filled("distances", distances, "(O, O)")
    if distances.shape[0] != distances.shape[1]:
        raise _checks.fail("distances", "of shape (O, O)", tuple(distances.shape))
    _checks.finite("distances", distances.detach())
    matrix = distances.detach().double().cpu().clone().fill_diagonal_(0.0)
    gap, largest = float((matrix - matrix.T).abs().max()), float(matrix.abs().max())
    if gap > 1e-6 * largest or float(matrix.min()) < 0:
        found = f"entries down to {float(matrix.min()):g}, mirrored ones {gap:g} apart"
        raise _checks.fail("distances", "symmetric and not negative", found)
    symmetric: Matrix = ((matrix + matrix.T) / 2).numpy()
    return symmetric


def _removals(matrix: Matrix, count: int, protected: list[int]) -> list[int]:
    """The first `count` removals, in order.

    The nearest neighbour of every row is kept up to date; a removal touches the few rows that lose theirs, which makes
    about O(n²) in all.
    """
    open_pairs = matrix.copy()
    np.fill_diagonal(open_pairs, np.inf)
    open_pairs[np.ix_(protected, protected)] = np.inf
    nearest, least = open_pairs.argmin(1), open_pairs.min(1)
    alive = np.ones(len(matrix), dtype=bool)
    keepers = set(protected)
    removed: list[int] = []
    for _ in range(count):
        # argmin takes the first of equals: `first` is the smallest index in any closest pair, hence below `second`.
        first = int(least.argmin())
        second = int(nearest[first])
        if first in keepers or second in keepers:
            gone = first if second in keepers else second
        else:
            total = matrix[first, alive].sum()
            gone = first if total < matrix[second, alive].sum() * (1 - _SAME) else second
        removed.append(gone)
        alive[gone] = False
        open_pairs[gone, :] = open_pairs[:, gone] = np.inf
        least[gone] = np.inf
        stale = np.flatnonzero((nearest == gone) & alive)
        nearest[stale], least[stale] = open_pairs[stale].argmin(1), open_pairs[stale].min(1)
    return removed
