"""Two-layer factorisations of a kernel by truncated SVDs (TRP's three schemes)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrank import _checks, reference
from fastrank.decompose import _spectral, weighted
from fastrank.decompose.unfold import unfold


def channel_svd(weight: Tensor, rank: int, *, moment: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A kernel (O, I, kh, kw) as kh×kw (I→R) then 1×1 (R→O): first (R, I, kh, kw), second (O, R, 1, 1), √S on both.

    rank: between 1 and min(O, I·kh·kw), at which the product is exact. moment: E[x xᵀ] (I·kh·kw, I·kh·kw) of the
    layer's patches; the outputs on such inputs are then kept as well as this form can, instead of the entries of the
    kernel. Raises ValueError on other ranks, NaN and Inf.
    """
    matrix = unfold(weight, "channel")
    _checks.integer("rank", rank, 1, min(matrix.shape))
    _checks.finite("weight", weight.detach())
    with reference.linalg.exact_products(weight.device):
        if moment is None:
            u, s, vh = _spectral.svd(matrix.detach())
        else:
            rows, u = weighted.channel(weight, rank, moment)
            s = rows.norm(dim=1)
            vh = rows / s[:, None].clamp(min=torch.finfo(s.dtype).tiny)
    root = s[:rank].sqrt()
    first = (root[:, None] * vh[:rank]).reshape(rank, *weight.shape[1:])
    second = (u[:, :rank] * root)[:, :, None, None]
    return first.to(weight.dtype).contiguous(), second.to(weight.dtype).contiguous()


def spatial_svd(weight: Tensor, rank: int, *, moment: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A kernel (O, I, kh, kw) as kh×1 (I→R) then 1×kw (R→O): vertical (R, I, kh, 1), horizontal (O, R, 1, kw).

    All of S is in the second. rank: between 1 and min(I·kh, O·kw), at which the product is exact. moment: as in
    `channel_svd`; the result is then near the best for the outputs. Raises as `channel_svd`.
    """
    matrix = unfold(weight, "spatial")
    _checks.integer("rank", rank, 1, min(matrix.shape))
    _checks.finite("weight", weight.detach())
    out_channels, in_channels, kh, kw = weight.shape
    with reference.linalg.exact_products(weight.device):
        if moment is not None:
            vertical, horizontal = weighted.spatial(weight, rank, moment)
            vertical, horizontal = vertical[..., None], horizontal[:, :, None]
            return vertical.to(weight.dtype).contiguous(), horizontal.to(weight.dtype).contiguous()
        u, s, vh = _spectral.svd(matrix.detach())
    vertical = u[:, :rank].T.reshape(rank, in_channels, kh, 1)
    horizontal = (s[:rank, None] * vh[:rank]).reshape(rank, out_channels, 1, kw).transpose(0, 1)
    return vertical.to(weight.dtype).contiguous(), horizontal.to(weight.dtype).contiguous()


def decoupled_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Each filter (I, kh·kw) as R terms: pointwise (R, O, I) ∘ depthwise (R, O, kh, kw), √S on both.

    rank: between 1 and min(I, kh·kw), at which the sum is exact. Raises as `channel_svd`.
    """
    _checks.tensor("weight", weight, (None, None, None, None), "(O, I, kh, kw)")
    _checks.filled("weight", weight, "(O, I, kh, kw)")
    _, in_channels, kh, kw = weight.shape
    _checks.integer("rank", rank, 1, min(in_channels, kh * kw))
    _checks.finite("weight", weight.detach())
    with reference.linalg.exact_products(weight.device):
        u, s, vh = _spectral.svd_batch(weight.detach().flatten(2))
    root = s[:, :rank, None].sqrt()
    pointwise = (u[:, :, :rank].mT * root).transpose(0, 1)
    depthwise = torch.unflatten((root * vh[:, :rank]).transpose(0, 1), 2, (kh, kw))
    return pointwise.to(weight.dtype).contiguous(), depthwise.to(weight.dtype).contiguous()
