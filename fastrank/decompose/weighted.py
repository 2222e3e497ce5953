"""Decompositions that keep what a layer computes on given inputs, rather than the entries of its kernel.

A layer whose patches x (I·kh·kw) have the second moment M = E[x xᵀ] computes W x, and an approximation Ŵ errs by
E‖(W - Ŵ) x‖² = tr((W - Ŵ) M (W - Ŵ)ᵀ). The plain decompositions are those for M = 1. A moment is taken from data by
`fastrank.calibrate`. Products and eigenvectors are in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrank import _checks

RIDGE = 1e-6
"""What is added to the diagonal of a moment, relative to its mean: directions that no input had stay determined."""


def output_error(weight: Tensor, approximation: Tensor, moment: Tensor) -> float:
    """tr((W - Ŵ) M (W - Ŵ)ᵀ) / tr(W M Wᵀ) for kernels (O, I, kh, kw); 0 where the layer computes nothing."""
    m = checked_moment(weight, moment)
    w = weight.detach().to(m.dtype).flatten(1)
    rest = w - approximation.detach().to(m.dtype).flatten(1)
    whole = float((w @ m).mul_(w).sum())
    return max(0.0, float((rest @ m).mul_(rest).sum())) / whole if whole > 0 else 0.0


def channel(weight: Tensor, rank: int, moment: Tensor) -> tuple[Tensor, Tensor]:
    """first (R, I·kh·kw) and second (O, R) of the channel form with the least error, in float64."""
    w, m = weight.detach().double().flatten(1), checked_moment(weight, moment).double()
    basis = _leading(w @ m @ w.T, rank)
    return basis.T @ w, basis


def spatial(weight: Tensor, rank: int, moment: Tensor) -> tuple[Tensor, Tensor]:
    """vertical (R, I, kh) and horizontal (O, R, kw) of the spatial form, in float64.

    The vertical filters are the best where taps of different columns are uncorrelated; the horizontal ones are the best
    for these vertical ones. Where the plain vertical filters leave a smaller error, they are taken.
    """
    out_channels, in_channels, kh, kw = weight.shape
    w, m = weight.detach().double(), checked_moment(weight, moment).double()
    matrix = w.permute(1, 2, 0, 3).reshape(in_channels * kh, out_channels * kw)
    columns = torch.einsum("axbx->ab", m.view(in_channels * kh, kw, in_channels * kh, kw))
    found: list[tuple[float, Tensor, Tensor]] = []
    for metric in (columns, torch.eye(len(columns), dtype=m.dtype, device=m.device)):
        vertical = (matrix @ _leading(matrix.T @ metric @ matrix, rank)).T
        best, error, _ = _refit(w.flatten(1), m, vertical)
        found.append((error, vertical.reshape(rank, in_channels, kh), best.view(out_channels, rank, kw)))
    _, vertical, horizontal = min(found, key=lambda item: item[0])
    return vertical, horizontal


def tucker2(weight: Tensor, ranks: tuple[int, int], moment: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """w_in (R_in, I), core (R_out, R_in, kh, kw), w_out (O, R_out) of the Tucker-2 form, in float64.

    w_in is the best where taps are uncorrelated, or the plain one where that leaves a smaller error; core and w_out are
    the best for it.
    """
    _, in_channels, kh, kw = weight.shape
    (rank_in, rank_out), taps = ranks, kh * kw
    w, m = weight.detach().double(), checked_moment(weight, moment).double()
    by_input = w.transpose(0, 1).reshape(in_channels, -1)
    channels = torch.einsum("itjt->ij", m.view(in_channels, taps, in_channels, taps))
    values, vectors = torch.linalg.eigh(_ridged(channels))
    root, inverse = ((vectors * values**power) @ vectors.T for power in (0.5, -0.5))
    found: list[tuple[float, Tensor, Tensor, Tensor]] = []
    for w_in in (
        _leading(root @ by_input @ by_input.T @ root, rank_in).T @ inverse,
        _leading(by_input @ by_input.T, rank_in).T,
    ):
        w_in = torch.linalg.qr(w_in.T).Q.T  # the same space, well conditioned
        dense, error, metric = _refit(w.flatten(1), m, w_in)
        basis = _leading(dense @ metric @ dense.T, rank_out)
        cut = dense - basis @ (basis.T @ dense)
        error += float((cut @ metric).mul_(cut).sum())
        found.append((error, w_in, (basis.T @ dense).view(rank_out, rank_in, kh, kw), basis))
    _, w_in, core, basis = min(found, key=lambda item: item[0])
    return w_in, core, basis


def checked_moment(weight: Tensor, moment: Tensor) -> Tensor:
    """`moment`, of the size that the kernel (O, I, kh, kw) asks for."""
    side = weight[0].numel()
    return _checks.tensor("moment", moment, (side, side), "(I·kh·kw, I·kh·kw)").detach().to(weight.device)


def _refit(weight: Tensor, moment: Tensor, factor: Tensor) -> tuple[Tensor, float, Tensor]:
    """The B (O, R·T) with the least error of Ŵ = B K for K = factor ⊗ 1_T, that error, and the metric K M Kᵀ.

    weight (O, A·T), factor (R, A): it acts on the first part of a patch's index, and leaves the T taps of the rest.
    """
    rank, along = factor.shape
    taps = weight.shape[1] // along
    # K is never built: seen = M Kᵀ and K M Kᵀ by products with the factor alone, which saves T times the work.
    blocks = moment.view(along, taps, along, taps).transpose(2, 3)
    seen = (blocks @ factor.T).transpose(2, 3).reshape(along, taps * rank * taps)
    metric = (factor @ seen).view(rank * taps, rank * taps)
    cross = weight @ seen.view(along * taps, rank * taps)
    best = torch.linalg.solve(_ridged(metric), cross.T).T
    error = (weight @ moment).mul_(weight).sum() - 2 * (best * cross).sum() + (best @ metric).mul_(best).sum()
    return best, float(error), metric


def _ridged(moment: Tensor) -> Tensor:
    """`moment` with a small multiple of the identity added; the identity itself where it is zero."""
    mean = moment.diagonal().mean()
    size = torch.where(mean > 0, RIDGE * mean, torch.ones_like(mean))
    return moment + size * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)


def _leading(gram: Tensor, rank: int) -> Tensor:
    """The leading eigenvectors (n, rank) of a symmetric matrix."""
    vectors: Tensor = torch.linalg.eigh((gram + gram.T) / 2).eigenvectors
    return vectors.flip(1)[:, :rank]
