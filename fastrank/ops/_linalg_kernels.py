"""Calls the spectral kernels of csrc/linalg: on a GPU ("cuda"), or compiled for the host ("host")."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastrank import _memory, _native
from fastrank.ops._spectra import SUBGRADIENT

TABLE_MATRICES, STATE_INTS, TILE, GRAM_PARTIALS = 64, 256, 64, 64  # of csrc/linalg too


class Limits(NamedTuple):
    """Most sweeps of the first pass, of each later pass, and most passes: they bound the fixed launch sequence."""

    first_sweeps: int
    later_sweeps: int
    passes: int


# What few matrices need is enough: beyond it a matrix is reported as not converged. Later passes of a decomposition may
# have to turn stand-ins for dead rows away from all others, which takes as many sweeps as a first pass.
SPECTRAL_LIMITS = Limits(14, 6, 4)
SVD_LIMITS = Limits(16, 16, 6)


def spectral(
    matrices: Sequence[Tensor], kind: str, energy: float | None, chosen: str, *, limits: Limits = SPECTRAL_LIMITS
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The sub-gradient U_k V_kᵀ or the projection U_k Σ_k V_kᵀ of each matrix, its k, and its status.

    matrices: 2-D, float32, float16 or bfloat16, any shapes and strides, on one device. kind: "subgradient" (k is the
    numerical rank, or the energy rank where that is smaller) or "projection" (the energy rank, which takes an energy).
    Returns fresh contiguous tensors of the shapes and dtypes given, ranks (N,) int64 and status (N,) int32 on their
    device: 0, or NONFINITE (the result is NaN, the rank 0), or NOT_CONVERGED (the result is approximate). Nothing waits
    for the device. Raises RuntimeError where `chosen` was not built, and on limits out of range.
    """
    outs = [torch.empty(matrix.shape, dtype=_kernel_dtype(matrix, chosen), device=matrix.device) for matrix in matrices]
    ranks, status = _results(matrices, torch.int64), _results(matrices, torch.int32)
    for places, inputs, state, workspace in _calls(matrices, chosen):
        targets = [outs[place] for place in places]
        options = places, kind == SUBGRADIENT, energy or 0.0
        if chosen == "cuda":
            torch.ops.fastrank.launch_spectral(inputs, targets, *options, limits, ranks, status, state, workspace)
        else:
            _native.host().linalg_spectral(
                *_tables(inputs), _addresses(targets), *options, limits, *_addresses((ranks, status, state, workspace))
            )
        del workspace
    return [out.to(matrix.dtype) for out, matrix in zip(outs, matrices, strict=True)], ranks, status


def svd(
    matrices: Sequence[Tensor], chosen: str, *, limits: Limits = SVD_LIMITS
) -> tuple[list[tuple[Tensor, Tensor, Tensor]], Tensor]:
    """Thin (U, S, Vh) of each matrix in float32, S descending, and status (N,) as `spectral` returns it.

    U (m, r) and Vh (r, n) are orthonormal to rounding, the vectors of zero singular values included; r = min(m, n).
    One of the two is a transposed view.
    """
    factors = []
    for matrix in matrices:
        n, m = sorted(matrix.shape)
        factors.append([matrix.new_empty(shape, dtype=torch.float32) for shape in ((n, n), (n,), (n, m))])
    status = _results(matrices, torch.int32)
    for places, inputs, state, workspace in _calls(matrices, chosen):
        targets = [[factors[place][part] for place in places] for part in range(3)]
        if chosen == "cuda":
            torch.ops.fastrank.launch_svd(inputs, *targets, places, limits, status, state, workspace)
        else:
            _native.host().linalg_svd(
                *_tables(inputs), *map(_addresses, targets), places, limits, *_addresses((status, state, workspace))
            )
        del workspace
    found = [
        (q.mT, s, v) if matrix.shape[0] <= matrix.shape[1] else (v.mT, s, q)
        for matrix, (q, s, v) in zip(matrices, factors, strict=True)
    ]
    return found, status


def workspace_floats(rows: int, columns: int) -> int:
    """Floats of workspace that a matrix takes: `workspace_floats` of csrc/linalg/linalg.cu, which a test compares."""
    n, m = sorted((rows, columns))
    pairs = -(-n // TILE)
    tiles = pairs * (pairs + 1) // 2
    chunks = min(-(-m // 256), max(1, GRAM_PARTIALS // tiles))
    square, tile = (pairs * TILE) ** 2, TILE**2
    sizes = (2 * n * (n + m), square, square, pairs * tile, tiles * chunks * tile, n, n, n, 2 * n, pairs)
    return sum(-(-size // 4) * 4 for size in sizes)


def _calls(matrices: Sequence[Tensor], chosen: str) -> Iterator[tuple[list[int], list[Tensor], Tensor, Tensor]]:
    """The places, the matrices, the state and the workspace of each call: tables of matrices, large ones together.

    A table whose workspace finds no memory is halved. The caller lets go of each workspace before the next one.
    """
    filled = [place for place, matrix in enumerate(matrices) if matrix.numel()]
    filled.sort(key=lambda place: -min(matrices[place].shape))
    waiting = [filled[start : start + TABLE_MATRICES] for start in range(0, len(filled), TABLE_MATRICES)]
    while waiting:
        places = waiting.pop(0)
        inputs = [matrices[place].detach().to(_kernel_dtype(matrices[place], chosen)) for place in places]
        floats = sum(workspace_floats(*matrix.shape) for matrix in inputs)
        state = torch.zeros(len(places) * STATE_INTS, dtype=torch.int32, device=inputs[0].device)
        try:
            workspace = [torch.empty(floats, dtype=torch.float32, device=inputs[0].device)]
        except torch.OutOfMemoryError as error:
            if len(places) == 1:
                what = f"the workspace of {4 * floats:,} bytes for matrices[{places[0]}]"
                raise _memory.too_much(what, error) from error
            waiting[:0] = [places[: len(places) // 2], places[len(places) // 2 :]]
            continue
        yield places, inputs, state, workspace.pop()


def _kernel_dtype(matrix: Tensor, chosen: str) -> torch.dtype:
    """The dtype that the kernels read and write: the host build has float32 alone."""
    return torch.float32 if chosen == "host" else matrix.dtype


def _results(matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Zeros, one a matrix: what the empty ones keep."""
    device = matrices[0].device if matrices else torch.device("cpu")
    return torch.zeros(len(matrices), dtype=dtype, device=device)


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _tables(matrices: Sequence[Tensor]) -> tuple[list[int], list[tuple[int, ...]]]:
    """Addresses, and (rows, columns, row stride, column stride), of float32 matrices."""
    return _addresses(matrices), [(*matrix.shape, *matrix.stride()) for matrix in matrices]
