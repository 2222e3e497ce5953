"""One warm step: a function of G = A Aᵀ to first order, from an eigenbasis of nearly the same matrix.

Q of an earlier step almost diagonalises G: H = Qᵀ G Q is a diagonal D plus small entries. A function of G is then
Q (f(D) + H ∘ f[D]) Qᵀ to first order, with the divided differences f[D]_ij = (f(d_i) − f(d_j)) / (d_i − d_j)
(Daleckii & Krein 1965). For f = λ^(-1/2) among kept eigenvalues that is −1 / (√d_i √d_j (√d_i + √d_j)), for f = 1 it
is 0: near-ties cost nothing, except across the cut, where no method can tell them apart.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastrank.ops import _gram, _spectra
from fastrank.ops._spectra import SUBGRADIENT

# The estimate of what is left out, as a share of ‖N‖₂ ‖N‖_F / √k (see `correct`): random, low-rank, sparse and aligned
# drifts of flat, decaying and square spectra leave out less, by 1.1 times and more; a test tries them.
FULL, TRUNCATED = 1 / 3, 1 / 5
# Pairs that would turn by more are near-ties: first order says nothing about them.
LARGEST_ANGLE = 0.1


class Step(NamedTuple):
    """A warm step over (B, n, n): F with result Q F Qᵀ A, k (B,), the estimated error (B,), H without its diagonal, and
    that, d (B, n).
    """

    function: Tensor
    ranks: Tensor
    error: Tensor
    coupling: Tensor
    values: Tensor


def correct(g: Tensor, basis: Tensor, kind: str, energy: float | None, longest: int) -> Step:
    """One step from `basis` for G, both (B, n, n). The error is infinite where the step decides nothing.

    It is estimated as a share of ‖N‖₂ ‖N‖_F / √k with N_ij = H_ij / √(δ_i δ_j), i ≠ j, where δ_i is the
    distance of d_i from the nearest point where f is not smooth: the cut, and 0 for the inverse root. On a GPU the host
    reads nothing.
    """
    n = g.shape[1]
    off = _spectra.symmetric(basis.mT, (g @ basis).mT)
    d = off.diagonal(dim1=1, dim2=2).clamp(min=0)
    off.diagonal(dim1=1, dim2=2).zero_()
    if energy is None and g.device.type == "cpu":
        least, top = d.min(), d.max()
        if bool((least * _gram.RESOLUTION > torch.finfo(d.dtype).eps * top) & (least > _gram.SMALLEST)):
            return _full(off, d)
    values, order = d.sort(dim=1, descending=True)
    k = _spectra.kept_rank(values, kind, energy, longest, _gram.EPS)
    kept = order.argsort(dim=1) < k[:, None]
    last = values.gather(1, (k - 1).clamp(min=0)[:, None])
    following = values.gather(1, k.clamp(max=n - 1)[:, None])
    cut = (last + following) / 2 if energy is not None else (_gram.EPS * longest) ** 2 * values[:, :1]
    distance = torch.where((k == n)[:, None], torch.inf, (d - cut).abs())
    if kind == SUBGRADIENT:
        distance = torch.where(kept, torch.minimum(distance, d), distance)
        root, f = torch.where(kept, d, 0).sqrt(), torch.where(kept, d, torch.inf).rsqrt()
        tiny = torch.finfo(d.dtype).tiny
        change = (root[:, :, None] + root[:, None]).clamp_(min=tiny).reciprocal_().mul_(off)
        change.mul_(-f[:, :, None]).mul_(f[:, None])
    else:
        f, change = kept.to(d.dtype), torch.zeros_like(off)
    across = kept[:, :, None] ^ kept[:, None]
    apart = d[:, :, None] - d[:, None]
    turn = torch.where(across & (apart != 0), off / apart, 0)  # a tie across the cut has an infinite error below
    change = torch.where(across, turn * (f[:, :, None] - f[:, None]), change)
    change.diagonal(dim1=1, dim2=2).copy_(f)
    slip = (turn * off).abs().sum((1, 2), dtype=torch.float64) / 2
    scale = distance.rsqrt()
    error = TRUNCATED * _second_order(off * scale[:, :, None] * scale[:, None], k)
    top = values[:, 0]
    sure = (top > _gram.SMALLEST) & (top < _gram.LARGEST) & _gram.resolved(values, k, kind, energy, slip) & (k > 0)
    return Step(change, k, torch.where(sure, error, torch.inf), off, d)


def _full(off: Tensor, d: Tensor) -> Step:
    """The same where every eigenvalue is kept, as it is in the training of most layers: a third of the work."""
    root = d.sqrt()
    f = root.reciprocal()
    relative = (off * f[:, :, None]).mul_(f[:, None])
    change = -root[:, :, None] - root[:, None]
    torch.div(relative, change, out=change)
    change.diagonal(dim1=1, dim2=2).copy_(f)
    k = torch.full((len(d),), d.shape[1])
    error = torch.where(d.amax(1) < _gram.LARGEST, FULL * _second_order(relative, k), torch.inf)
    return Step(change, k, error, off, d)


def _second_order(relative: Tensor, k: Tensor) -> Tensor:
    """‖N‖₂ ‖N‖_F / √k, the first norm by a few power steps and half as much again, at most the second one."""
    whole = torch.linalg.vecdot(relative.flatten(1), relative.flatten(1)).sqrt()
    vector = relative @ _signs(relative.shape[1], relative).expand(len(relative), -1, 1)
    for _ in range(2):  # scaled down by nothing: four powers of N are far from float32's ends
        vector = relative @ vector
    tiny = torch.finfo(relative.dtype).tiny
    largest = (relative @ vector).norm(dim=(1, 2)) / vector.norm(dim=(1, 2)).clamp(min=tiny)
    error: Tensor = torch.minimum(1.5 * largest, whole) * whole / k.clamp(min=1).sqrt()
    return error


def _signs(n: int, like: Tensor) -> Tensor:
    """A fixed vector (1, n, 1) of 1 and −1 without a pattern that a matrix is likely to share."""
    golden = torch.arange(n, device=like.device) * 0.6180339887 % 1
    return torch.where(golden < 0.5, -1.0, 1.0).to(like)[None, :, None]


def turn(basis: Tensor, step: Step) -> Tensor:
    """The basis (B, n, n) moved to first order towards the eigenvectors of G, orthonormal to first order.

    Near-ties, which do not matter, are left as they are.
    """
    angle = step.coupling / (step.values[:, None] - step.values[:, :, None])
    return basis + basis @ torch.where(angle.abs() < LARGEST_ANGLE, angle, 0)
