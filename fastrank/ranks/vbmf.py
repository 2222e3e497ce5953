"""The rank that empirical variational Bayesian matrix factorisation finds, analytically.

Source: Nakajima, Sugiyama, Babacan, Tomioka, "Global analytic solution of fully-observed variational Bayesian matrix
factorization", JMLR 14 (2013). Two repairs: the matrix is normalised first, so that the result does not depend on its
scale, and the noise variance is found on a grid with local refinement, because the free energy has several minima.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastrank import _checks
from fastrank.ranks.spectrum import singular_values

# Points of the first grid, and of each finer one around the best point of the last: the variance is found to 1e-9.
GRIDS = (400, *[33] * 6)


def vbmf_rank(matrix: Tensor) -> int:
    """Rank of a noisy (m, n) matrix by analytic EVBMF; any orientation, any scale. 0 where it sees only noise.

    Needs singular values alone, in float64. Raises ValueError on NaN, Inf and empty matrices.
    """
    _checks.tensor("matrix", matrix, (None, None), "(m, n)")
    if matrix.numel() == 0:
        raise _checks.fail("matrix", "non-empty", f"shape {tuple(matrix.shape)}")
    _checks.finite("matrix", matrix.detach())
    wide = matrix.detach() if matrix.shape[0] <= matrix.shape[1] else matrix.detach().T
    spectrum = singular_values(wide)
    if float(spectrum[0]) == 0.0:
        return 0
    squares = (spectrum / spectrum[0]).square()
    # Below this level singular values are rounding, which is no Gaussian noise: read them as flat. It is that of the
    # computation, or that of storing the entries, which spreads over all of the spectrum.
    (rows, columns), working = wide.shape, torch.promote_types(wide.dtype, torch.float32)
    stored = torch.finfo(wide.dtype).eps * (rows**-0.5 + columns**-0.5) * float(squares.sum().sqrt())
    squares = squares.clamp(min=max(torch.finfo(working).eps * columns, stored) ** 2)
    return _rank(squares / squares.mean(), columns)


def _rank(squares: Tensor, columns: int) -> int:
    rows = squares.numel()
    alpha = rows / columns
    tau_bar = 2.5129 * math.sqrt(alpha)
    x_bar = (1 + tau_bar) * (1 + alpha / tau_bar)
    upper = float(squares.sum()) / (rows * columns)
    # At most this many components can be signal, so what follows bounds the noise from below.
    tail = squares[min(math.ceil(rows / (1 + alpha)) - 1, rows - 1) :]
    lower = min(max(float(tail[0]) / (columns * x_bar), float(tail.mean()) / columns), upper)
    variance = _minimise(lower, upper, squares, columns, alpha, x_bar)
    return int((squares > columns * variance * x_bar).sum())


def _minimise(lower: float, upper: float, squares: Tensor, columns: int, alpha: float, x_bar: float) -> float:
    """The noise variance of least free energy in [lower, upper], on logarithmic grids of finer and finer steps."""
    low, high = math.log(lower), math.log(upper)
    for points in GRIDS:
        grid = torch.linspace(low, high, points, dtype=torch.float64, device=squares.device)
        best = int(_free_energy(grid.exp(), squares, columns, alpha, x_bar).argmin())
        low, high = grid[[max(best - 1, 0), min(best + 1, points - 1)]].tolist()
    return math.exp(float(grid[best]))


def _free_energy(variances: Tensor, squares: Tensor, columns: int, alpha: float, x_bar: float) -> Tensor:
    """Free energy up to a constant, one value a noise variance (G,)."""
    x = squares / (columns * variances[:, None])
    signal = x > x_bar
    safe = torch.where(signal, x, torch.full_like(x, x_bar))
    tau = (safe - (1 + alpha) + ((safe - (1 + alpha)).square() - 4 * alpha).clamp(min=0).sqrt()) / 2
    of_signal = safe - tau + torch.log((tau + 1) / safe) + alpha * torch.log(tau / alpha + 1)
    # The terms Σ log x of noise and signal share the log of the variance; x − log x is the noise part.
    return torch.where(signal, of_signal, x - torch.log(x)).sum(1)
