"""Tucker-2 of a kernel along its two channel modes, by HOSVD or by HOOI."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastrank import _checks, ops, reference
from fastrank.decompose import weighted
from fastrank.decompose.unfold import unfold

# HOOI stops when a sweep adds less than this share of the kernel's energy; it converges in a handful of sweeps.
HOOI_TOLERANCE = 1e-10
HOOI_SWEEPS = 100


class Tucker2(NamedTuple):
    """W[o, i] ≈ Σ w_out[o, r] core[r, s] w_in[s, i]: w_in (R_in, I), core (R_out, R_in, kh, kw), w_out (O, R_out)."""

    w_in: Tensor
    core: Tensor
    w_out: Tensor

    def weight(self) -> Tensor:
        """The dense kernel (O, I, kh, kw)."""
        return reference.conv.tucker2_weight(*self)


def max_ranks(shape: tuple[int, ...]) -> tuple[int, int]:
    """The largest useful (R_in, R_out) of a kernel (O, I, kh, kw): the ranks at which Tucker-2 is exact."""
    out_channels, in_channels, kh, kw = shape
    return min(in_channels, out_channels * kh * kw), min(out_channels, in_channels * kh * kw)


def tucker2(
    weight: Tensor, ranks: int | tuple[int, int], *, algorithm: str = "hosvd", moment: Tensor | None = None
) -> Tucker2:
    """Tucker-2 of a kernel (O, I, kh, kw) with ranks (R_in, R_out), orthonormal w_inᵀ and w_out.

    algorithm: "hosvd" takes the leading singular vectors of the mode-3 and mode-4 unfoldings; "hooi" alternates the two
    projections until the fit stops improving, and is never worse. At full ranks both are exact to rounding.
    moment: E[x xᵀ] (I·kh·kw, I·kh·kw) of the layer's patches; the outputs on such inputs are then kept nearly as well
    as this form can, instead of the entries of the kernel, and `algorithm` is not used.
    float16 and bfloat16 are computed in float32. Raises ValueError on ranks outside [1, max_ranks], NaN and Inf.
    """
    _checks.tensor("weight", weight, (None, None, None, None), "(O, I, kh, kw)")
    _checks.filled("weight", weight, "(O, I, kh, kw)")
    rank_in, rank_out = _checks.pair("ranks", ranks, 1)
    limits = max_ranks(tuple(weight.shape))
    _checks.integer("ranks[0]", rank_in, 1, limits[0])
    _checks.integer("ranks[1]", rank_out, 1, limits[1])
    _checks.choice("algorithm", algorithm, ("hosvd", "hooi"))
    _checks.finite("weight", weight.detach())
    work = reference.linalg.working(weight.detach())
    with reference.linalg.exact_products(work.device):
        if moment is not None:
            factors = weighted.tucker2(weight, (rank_in, rank_out), moment)
            return Tucker2(*(factor.to(weight.dtype).contiguous() for factor in factors))
        u_in = _leading(unfold(work, "mode3"), rank_in)
        u_out = _leading(unfold(work, "mode4"), rank_out)
        if algorithm == "hooi":
            u_in, u_out = _hooi(work, u_in, u_out)
        core = torch.einsum("oiyx,is,or->rsyx", work, u_in, u_out)
    return Tucker2(*(factor.to(weight.dtype).contiguous() for factor in (u_in.T, core, u_out)))


def _hooi(weight: Tensor, u_in: Tensor, u_out: Tensor) -> tuple[Tensor, Tensor]:
    total = weight.double().square().sum()
    fit = torch.zeros_like(total)
    for _ in range(HOOI_SWEEPS):
        u_in = _leading(unfold(torch.einsum("oiyx,or->riyx", weight, u_out), "mode3"), u_in.shape[1])
        projected = torch.einsum("oiyx,is->osyx", weight, u_in)
        u_out = _leading(unfold(projected, "mode4"), u_out.shape[1])
        previous, fit = fit, torch.einsum("osyx,or->rsyx", projected, u_out).double().square().sum()
        if fit - previous <= HOOI_TOLERANCE * total:
            break
    return u_in, u_out


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors (m, rank) of an (m, n) matrix.

    For float32 they come from the Gram matrix in float64, which resolves singular values down to 1e-8 of the largest,
    finer than float32 itself; for float64 from an SVD. Where rank > n (HOOI's projections may be that narrow) any
    orthonormal vectors complete them.
    """
    u: Tensor
    if rank > matrix.shape[1]:
        u, _, _ = torch.linalg.svd(matrix, full_matrices=True)
    elif matrix.dtype == torch.float64 or matrix.shape[0] > matrix.shape[1]:
        ((u, _, _),) = ops.svd([matrix])
    else:
        wide = matrix.double()
        _, vectors = torch.linalg.eigh(wide @ wide.T)
        u = vectors.flip(1).to(matrix.dtype)
    return u[:, :rank]
