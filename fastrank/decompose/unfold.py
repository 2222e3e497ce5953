"""The matrices that a convolution kernel is read as. One place for the index order that every method relies on.

A kernel W is (O, I, kh, kw).
mode3    I × (O·kh·kw)     Tucker-2's input side
mode4    O × (I·kh·kw)     Tucker-2's output side
channel  O × (I·kh·kw)     TRP's channel scheme (the same matrix as mode4)
spatial  (I·kh) × (O·kw)   TRP's spatial scheme

TRP's third scheme, decoupled, reads each filter as a matrix of its own, O of them, I × (kh·kw): see `unfold_all`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrank import _checks

MATRICIZATIONS = ("mode3", "mode4", "channel", "spatial")
DECOUPLED = "decoupled"
ALL_MATRICIZATIONS = (*MATRICIZATIONS, DECOUPLED)


def unfold(weight: Tensor, matricization: str) -> Tensor:
    """The kernel (O, I, kh, kw) as the named matrix."""
    _checks.tensor("weight", weight, (None, None, None, None), "(O, I, kh, kw)")
    _checks.filled("weight", weight, "(O, I, kh, kw)")
    _checks.choice("matricization", matricization, MATRICIZATIONS)
    out_channels, in_channels, kh, kw = weight.shape
    if matricization == "mode3":
        return weight.transpose(0, 1).reshape(in_channels, -1)
    if matricization == "spatial":
        return weight.permute(1, 2, 0, 3).reshape(in_channels * kh, out_channels * kw)
    return weight.reshape(out_channels, -1)


def fold(matrix: Tensor, matricization: str, shape: tuple[int, int, int, int]) -> Tensor:
    """The inverse of `unfold` for a kernel of the given shape (O, I, kh, kw)."""
    _checks.choice("matricization", matricization, MATRICIZATIONS)
    out_channels, in_channels, kh, kw = shape
    if matricization == "mode3":
        return matrix.reshape(in_channels, out_channels, kh, kw).transpose(0, 1)
    if matricization == "spatial":
        return matrix.reshape(in_channels, kh, out_channels, kw).permute(2, 0, 1, 3)
    return matrix.reshape(shape)


def unfold_all(weight: Tensor, matricization: str) -> list[Tensor]:
    """The kernel (O, I, kh, kw) as its matrices: the one of `unfold`, or for "decoupled" O of I × (kh·kw)."""
    if _checks.choice("matricization", matricization, ALL_MATRICIZATIONS) != DECOUPLED:
        return [unfold(weight, matricization)]
    _checks.tensor("weight", weight, (None, None, None, None), "(O, I, kh, kw)")
    _checks.filled("weight", weight, "(O, I, kh, kw)")
    return list(weight.flatten(2))


def fold_all(matrices: Sequence[Tensor], matricization: str, shape: tuple[int, int, int, int]) -> Tensor:
    """The inverse of `unfold_all` for a kernel of the given shape (O, I, kh, kw)."""
    wanted = shape[0] if _checks.choice("matricization", matricization, ALL_MATRICIZATIONS) == DECOUPLED else 1
    if len(matrices) != wanted:
        raise _checks.fail("matrices", f"{wanted} for {matricization!r} and a kernel of shape {shape}", len(matrices))
    if matricization == DECOUPLED:
        return torch.stack(list(matrices)).reshape(shape)
    return fold(matrices[0], matricization, shape)
