"""CP of a whole kernel as a tensor O × I × (kh·kw): by regularised alternating least squares, or term by term."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrank import _checks, reference
from fastrank.decompose import _als, _spectral

DEFAULT_TOL = {"als": 3e-4, "greedy": 1e-2}
# ALS starts from the kernel's principal slices and from this many random factors; the best after `RACE` sweeps goes on.
RANDOM_STARTS = 2
RACE = 5
# Random starts of each term of the greedy algorithm, of which the best after `PROBES` iterations goes on.
TERM_STARTS = 4
PROBES = 2


class CPLayer(NamedTuple):
    """W[o, i] ≈ Σ_r w_out[o, r] w_in[r, i] depthwise[r]: w_in (R, I), depthwise (R, kh, kw), w_out (O, R)."""

    w_in: Tensor
    depthwise: Tensor
    w_out: Tensor

    def weight(self) -> Tensor:
        """The dense kernel (O, I, kh, kw)."""
        with reference.linalg.exact_products(self.w_in.device):
            return torch.einsum("or,ri,ryx->oiyx", self.w_out, self.w_in, self.depthwise)


def cp_layer(
    weight: Tensor, rank: int, *, algorithm: str = "als", seed: int = 0, max_iter: int = 100, tol: float | None = None
) -> CPLayer:
    """CP of rank R of a kernel (O, I, kh, kw), the three factors of a term balanced in norm; largest term first.

    algorithm: "als" fits all terms together, with the ridge, momentum and largest term of `_als`: max_iter sweeps, or
    until one lowers the squared error by less than `tol` of it (3e-4 by default). "greedy" (in the spirit of CP-TPM:
    Astrid, Lee 2017) takes one term after the other off what is left, by power iteration from random starts: max_iter
    iterations a term, or until one raises its energy by less than `tol` of it (1e-2 by default). It is coarser, and the
    terms of a lower rank are the first ones of a higher.
    rank: between 1 and kh·kw·min(I, O), at which the sum is exact. There, and for 1×1 kernels, where it is a truncated
    SVD, both take a closed form. `seed` draws the random starts. Computed in float64, but greedy in the weight's dtype
    where that is float32.
    Raises ValueError on other ranks, empty weights, NaN and Inf.
    """
    _checks.tensor("weight", weight, (None, None, None, None), "(O, I, kh, kw)")
    _checks.filled("weight", weight, "(O, I, kh, kw)")
    out_channels, in_channels, kh, kw = weight.shape
    top = kh * kw * min(out_channels, in_channels)
    _checks.integer("rank", rank, 1, top)
    _checks.choice("algorithm", algorithm, ("als", "greedy"))
    _checks.integer("seed", seed, 0)
    _checks.integer("max_iter", max_iter, 1)
    tol = DEFAULT_TOL[algorithm] if tol is None else _checks.number("tol", tol, 0.0)
    _checks.finite("weight", weight.detach())
    with torch.no_grad(), reference.linalg.exact_products(weight.device):
        peak = weight.detach().abs().amax().double()
        unit = torch.where(peak > 0, peak, torch.ones_like(peak))
        tensor = (weight.detach().double() / unit).flatten(2).transpose(1, 2).contiguous()
        norm = tensor.norm()
        tensor = tensor / torch.where(norm > 0, norm, torch.ones_like(norm))
        generator = torch.Generator().manual_seed(seed)
        exact = min(kh * kw, out_channels * in_channels) * min(out_channels, in_channels)
        if rank >= exact or kh * kw == 1 or not bool(peak > 0):
            a, b, c = _principal_slices(tensor, rank)
        elif algorithm == "als":
            a, b, c = _als_terms(tensor, rank, generator, max_iter, tol)
        else:
            a, b, c = _greedy_terms(tensor.to(reference.linalg.working(weight).dtype), rank, generator, max_iter, tol)
        a, b, c = _balanced(a, b, c, norm ** (1 / 3) * unit ** (1 / 3))
        factors = b, torch.unflatten(c, 1, (kh, kw)), a.T
        return CPLayer(*(x.to(weight.dtype).contiguous() for x in factors))


def _balanced(a: Tensor, b: Tensor, c: Tensor, share: Tensor) -> list[Tensor]:
    """The terms of a (R, O), b (R, I), c (R, K) with three factors of equal norm, times share³; largest first."""
    norms = [x.norm(dim=1, keepdim=True) for x in (a, b, c)]
    size = (norms[0] * norms[1] * norms[2]) ** (1 / 3)
    order = size[:, 0].argsort(descending=True, stable=True)
    factors = (
        torch.where(size > 0, x * (size / norm.clamp(min=torch.finfo(norm.dtype).tiny)), 0.0) * share
        for x, norm in zip((a, b, c), norms, strict=True)
    )
    return [factor[order] for factor in factors]


def _principal_slices(tensor: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` largest singular triples of the kernel's slices along its principal directions of pixels.

    tensor (O, K, I) -> a (R, O) with the terms' sizes, b (R, I), c (R, K). Exact when it takes them all; terms of zeros
    where there are no more.
    """
    by_pixel = tensor.transpose(0, 1).flatten(1)
    directions, _, _ = _spectral.svd(by_pixel) if tensor.shape[1] > 1 else (by_pixel.new_ones(1, 1), None, None)
    slices = torch.unflatten(directions.T @ by_pixel, 1, (tensor.shape[0], tensor.shape[2]))
    u, s, vh = (torch.stack(parts) for parts in zip(*(_spectral.svd(m) for m in slices), strict=True))
    chosen = s.flatten().topk(min(rank, s.numel())).indices
    place, number = chosen // s.shape[1], chosen % s.shape[1]
    a, b, c = u.mT[place, number] * s[place, number][:, None], vh[place, number], directions.T[place]
    missing = (0, 0, 0, rank - chosen.numel())
    return F.pad(a, missing), F.pad(b, missing), F.pad(c, missing)


def _als_terms(
    tensor: Tensor, rank: int, generator: torch.Generator, max_iter: int, tol: float
) -> tuple[Tensor, Tensor, Tensor]:
    """tensor (O, K, I) -> a (R, O), b (R, I), c (R, K)."""
    problem, data = _Problem(tensor), tensor[None]
    starts = [torch.cat(_principal_slices(tensor, rank)[1:], 1)[None]]
    for _ in range(RANDOM_STARTS):
        drawn = torch.randn(1, rank, sum(problem.sizes), generator=generator, dtype=tensor.dtype)
        starts.append(drawn.to(tensor.device))
    raced = [_als.minimise(problem.sweep, data, bc, min(RACE, max_iter), 0.0) for bc in starts]
    _, ridge, bc = min(raced, key=lambda found: float(found[0]))
    if max_iter > RACE:
        _, ridge, bc = _als.minimise(problem.sweep, data, bc, max_iter - RACE, tol, ridge)
    b, c = torch.split(bc, problem.sizes, 2)
    return problem.best_a(b, c, ridge)[0][0], b[0], c[0]


class _Problem:
    """The kernel laid out for both large products of a sweep; each takes 2·O·I·K·R operations."""

    def __init__(self, tensor: Tensor) -> None:
        self.by_out = tensor.flatten(1)
        self.by_in = tensor.permute(2, 1, 0).flatten(1)
        self.pixels = tensor.shape[1]
        self.sizes = [tensor.shape[2], tensor.shape[1]]

    def best_a(self, b: Tensor, c: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """a (1, R, O); the kernel as b sees it (R, K, O); as b ∘ c see it (1, R, O); the squared sizes (1, R)."""
        seen = torch.unflatten(b[0] @ self.by_in, 1, (self.pixels, -1))
        wanted = (c[0][:, None] @ seen)[:, 0][None]
        normal = (b @ b.mT) * (c @ c.mT)
        lengths = normal.diagonal(dim1=1, dim2=2).clone()
        a = _als.solve(normal, ridge, wanted)
        return a, seen, wanted, a.square().sum(2) * lengths

    def sweep(self, data: Tensor, bc: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `_als.Sweep`; one problem of norm 1."""
        b, c = torch.split(bc, self.sizes, 2)
        a, seen, wanted, sizes = self.best_a(b, c, ridge)
        error = 1 - (a * wanted).sum((1, 2)) - ridge * sizes.sum(1)
        of_a = a @ a.mT
        c = _als.solve(of_a * (b @ b.mT), ridge, (seen @ a[0][..., None])[..., 0][None])
        seen = torch.unflatten(a[0] @ self.by_out, 1, (self.pixels, -1))
        b = _als.solve(of_a * (c @ c.mT), ridge, (c[0][:, None] @ seen)[:, 0][None])
        return error, sizes, torch.cat([b, c], 2)


def _greedy_terms(
    tensor: Tensor, rank: int, generator: torch.Generator, max_iter: int, tol: float
) -> tuple[Tensor, Tensor, Tensor]:
    """tensor (O, K, I) -> a (R, O) with the terms' sizes, b (R, I), c (R, K), in the order found.

    Each product reads all that is left of the kernel, which is what an iteration costs.
    """
    left = tensor.flatten(1).clone()
    probes = min(PROBES, max_iter)
    found = []
    for _ in range(rank):
        a = torch.randn(TERM_STARTS, left.shape[0], generator=generator, dtype=torch.float64).to(left)
        energy = left.new_zeros(())
        for step in range(1, max_iter + 1):
            b, c = _leading_pairs(torch.unflatten(a @ left, 1, tensor.shape[1:]))
            image = (c[:, :, None] * b[:, None, :]).flatten(1)
            a = image @ left.T
            energies = a.square().sum(1)
            if step == probes:
                best = energies.argmax()[None]
                a, b, c, image, energies = a[best], b[best], c[best], image[best], energies[best]
            if step > probes and bool(energies[0] - energy <= tol * energies[0]):
                break
            energy = energies[0]
        left.addr_(a[0], image[0], alpha=-1)
        found.append((a[0], b[0], c[0]))
    a, b, c = (torch.stack(parts).double() for parts in zip(*found, strict=True))
    return a, b, c


def _leading_pairs(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """b (S, I) and c (S, K) of norm 1 with the largest cᵀ M b of each matrix (S, K, I); b is 0 for a zero matrix."""
    _, vectors = torch.linalg.eigh(matrices @ matrices.mT)
    c = vectors[:, :, -1]
    return _als.unit((c[:, None] @ matrices)[:, 0]), c
