"""CP of every filter of a kernel at once (NORTON): alternating least squares, batched over the filters."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrank import _checks, reference
from fastrank.decompose import _als, _filters


class CPFilters(NamedTuple):
    """Filter o ≈ Σ_r pointwise[r, o] ∘ vertical[r, o] ∘ horizontal[r, o]: (R, O, I), (R, O, kh), (R, O, kw)."""

    pointwise: Tensor
    vertical: Tensor
    horizontal: Tensor

    def weight(self) -> Tensor:
        """The dense kernel (O, I, kh, kw)."""
        return reference.conv.cp_weight(*self)


def max_rank(shape: tuple[int, ...]) -> int:
    """The rank at which every I×kh×kw filter is exact: one term a pixel of the kernel."""
    return shape[2] * shape[3]


def cp_filters(weight: Tensor, rank: int, *, seed: int = 0, max_iter: int = 200, tol: float = 5e-4) -> CPFilters:
    """CP of rank R of each filter of a kernel (O, I, kh, kw), the three factors of a term balanced in norm.

    Below rank kh·kw: ALS in float64 from the filters' principal directions, all filters in one batch, with a ridge and
    momentum (see `_als`); a filter is done when a sweep lowers its squared relative error by less than `tol`. Filters
    that come near to exact are finished by Gauss–Newton, where need be from random starts drawn from `seed`. No term is
    larger than `_als.LARGEST_TERM` times its filter. At ranks kh·kw and I·min(kh, kw) a closed form is exact.
    Raises ValueError on other ranks, empty weights, NaN and Inf.
    """
    _checks.tensor("weight", weight, (None, None, None, None), "(O, I, kh, kw)")
    _checks.filled("weight", weight, "(O, I, kh, kw)")
    _checks.integer("rank", rank, 1, max_rank(tuple(weight.shape)))
    _checks.integer("seed", seed, 0)
    _checks.integer("max_iter", max_iter, 1)
    _checks.number("tol", tol, 0.0)
    # Most calls in here are on small tensors: without autograd's bookkeeping they take a tenth less.
    with torch.inference_mode(), reference.linalg.exact_products(weight.device):
        filters, unit = _scaled(weight)
        if rank == max_rank(tuple(weight.shape)):
            a, b, c = _one_term_a_pixel(filters)
        elif rank >= weight.shape[1] * min(weight.shape[2:]):
            a, b, c = _svd_a_channel(filters, rank)
        else:
            a, b, c = _fit(filters, rank, seed, max_iter, tol)
        # b and c have norm 1, so a has the norm of the term.
        size = a.norm(dim=2, keepdim=True)
        share = size ** (1 / 3) * unit ** (1 / 3)
        a = a * (share / size.clamp(min=torch.finfo(size.dtype).tiny))
        factors = [x.transpose(0, 1).to(weight.dtype) for x in (a, b * share, c * share)]
    # Copied out here, they are ordinary tensors again.
    return CPFilters(*(x.clone(memory_format=torch.contiguous_format) for x in factors))


def _scaled(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(O, I, kh, kw) in float64 with entries of at most 2 a filter; the powers of two, (O, 1, 1), to multiply them by.

    That rounds nothing and keeps the squares of any scale finite.
    """
    peak = weight.flatten(1).abs().amax(1)[:, None, None].double()
    if not bool(torch.isfinite(peak).all()):
        _checks.finite("weight", weight)
    unit = torch.where(peak > 0, peak / torch.frexp(peak).mantissa / 2, torch.ones_like(peak))
    return weight.double() / unit[..., None], unit


def _fit(filters: Tensor, rank: int, seed: int, max_iter: int, tol: float) -> tuple[Tensor, Tensor, Tensor]:
    pixels = filters.flatten(2)
    gram = pixels.mT @ pixels
    energy = gram.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    gram = gram / energy.clamp(min=torch.finfo(energy.dtype).tiny)
    ridge, b, c = _filters.search(gram, (filters.shape[2], filters.shape[3]), rank, seed, max_iter, tol)
    images = _als.khatri_rao(b, c)
    return _als.solve(images @ images.mT, ridge, images) @ pixels.mT, b, c


def _one_term_a_pixel(filters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out_channels, _, kh, kw = filters.shape
    rows = torch.eye(kh, dtype=filters.dtype, device=filters.device).repeat_interleave(kw, 0)
    columns = torch.eye(kw, dtype=filters.dtype, device=filters.device).repeat(kh, 1)
    return filters.flatten(2).mT, rows.expand(out_channels, -1, -1), columns.expand(out_channels, -1, -1)


def _svd_a_channel(filters: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The singular triples of every channel, a kh × kw matrix, and terms of zeros up to the rank. For few channels."""
    b, sizes, c = torch.linalg.svd(filters, full_matrices=False)
    a = torch.diag_embed(sizes.transpose(1, 2)).permute(0, 3, 1, 2)
    missing = (0, 0, 0, rank - sizes[0].numel())
    a, b, c = a.flatten(1, 2), b.mT.flatten(1, 2), c.flatten(1, 2)
    return F.pad(a, missing), F.pad(b, missing), F.pad(c, missing)
