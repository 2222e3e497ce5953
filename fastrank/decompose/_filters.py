"""The search for the vertical and horizontal vectors of a batch of filters, each a tensor I × kh × kw of norm 1.

Only the Gram matrix of a filter's pixels, (kh·kw)², enters: the best third vectors follow from the other two, and so
does the error. Every filter is a problem of its own; all of them share each call.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastrank.decompose import _als, _gauss_newton
from fastrank.decompose._als import khatri_rao, unit

# No error² is below the energy that the pixels have beyond their R principal directions. Filters that have less than
# this there may be of the asked rank: Gauss–Newton finds out, and tries again from random starts where it comes near
# but stays above that bound. Kernels of trained networks have more, unless R reaches their input channels.
NEARLY_EXACT = 1e-4
PROMISING = 0.02
EXACT = 1e-12
RETRIES = 3
# Most unknowns a filter, and most entries of all normal equations at once, that Gauss–Newton is worth.
MOST_UNKNOWNS = 128
MOST_ENTRIES = 2**23


def search(
    gram: Tensor, kernel: tuple[int, int], rank: int, seed: int, max_iter: int, tol: float
) -> tuple[Tensor, Tensor, Tensor]:
    """gram (N, p, p), p = kh·kw, of trace 1 or 0 -> ridge (N,), b (N, R, kh) and c (N, R, kw), of norm 1."""
    sweep = partial(_sweep, kernel)
    bound, start = _principal_start(gram, kernel, rank)
    found = _als.minimise(sweep, gram, start, max_iter, tol)
    if rank * sum(kernel) <= MOST_UNKNOWNS:
        _finish(sweep, gram, kernel, bound, found, seed, max_iter, tol)
    b, c = torch.split(found[2], list(kernel), 2)
    return found[1], unit(b), unit(c)


def _finish(
    sweep: _als.Sweep,
    gram: Tensor,
    kernel: tuple[int, int],
    bound: Tensor,
    found: tuple[Tensor, Tensor, Tensor],
    seed: int,
    max_iter: int,
    tol: float,
) -> None:
    """Gauss–Newton on the filters that may be exact; writes what is better into `found`, error², ridge and bc."""
    error, rank, unknowns = found[0], found[2].shape[1], found[2][0].numel()
    near = (bound < NEARLY_EXACT).nonzero()[:, 0]
    generator = torch.Generator().manual_seed(seed)
    for attempt in range(1 + RETRIES):
        if not near.numel():
            return
        for part in torch.split(near, MOST_ENTRIES // unknowns**2):
            start = found[2][part]
            if attempt:
                drawn = torch.randn(len(part), rank, sum(kernel), generator=generator, dtype=gram.dtype)
                _, _, start = _als.minimise(sweep, gram[part], drawn.to(gram.device), max_iter, tol)
            new = _gauss_newton.refine(gram[part], *torch.split(start, list(kernel), 2))
            better = new[0] < error[part]
            for whole, values in zip(found, new, strict=True):
                whole[part[better]] = values[better]
        near = near[(error[near] > 2 * bound[near] + EXACT) & (error[near] < PROMISING)]


def _principal_start(gram: Tensor, kernel: tuple[int, int], rank: int) -> tuple[Tensor, Tensor]:
    """The pixels' principal directions: the energy (N,) beyond the leading R; those, cut to their strongest term."""
    values, vectors = torch.linalg.eigh(gram)
    images = torch.unflatten(vectors[:, :, -rank:].mT, 2, kernel)
    strongest = images.norm(dim=2).argmax(-1)[..., None, None].expand(-1, -1, kernel[0], 1)
    b = images.gather(3, strongest)[..., 0]
    for _ in range(3):
        c = unit((b[:, :, None] @ images)[:, :, 0])
        b = unit((images @ c[..., None])[..., 0])
    return values[:, :-rank].clamp(min=0).sum(1), torch.cat([b, c], 2)


def _sweep(kernel: tuple[int, int], gram: Tensor, bc: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `_als.Sweep`. a (N, R, I) is never formed: a Xᵀ (N, R, p) and a aᵀ are enough, X (p, I) being the filter."""
    b, c = torch.split(bc, list(kernel), 2)
    of_c = c @ c.mT
    images = khatri_rao(b, c)
    normal = (b @ b.mT) * of_c
    lengths = normal.diagonal(dim1=1, dim2=2).clone()
    dual = _als.solve(normal, ridge, images)
    seen = dual @ gram
    overlaps = seen @ dual.mT
    sizes = overlaps.diagonal(dim1=1, dim2=2) * lengths
    error = gram.diagonal(dim1=1, dim2=2).sum(1) - (seen * images).sum((1, 2)) - ridge * sizes.sum(1)
    seen = torch.unflatten(seen, 2, kernel)
    b = _als.solve(overlaps * of_c, ridge, (seen @ c[..., None])[..., 0])
    c = _als.solve(overlaps * (b @ b.mT), ridge, (b[:, :, None] @ seen)[:, :, 0])
    return error, sizes, torch.cat([b, c], 2)
