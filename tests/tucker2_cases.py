"""What the tests of the Tucker-2 kernels share: factors, outputs with guard bands, the judge, the ways to take."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from helpers import EPS, randn
from torch import Tensor

from fastrank import reference

HOPPER, AMPERE = (True, 4, 227 * 1024), (False, 4, 163 * 1024)
HALVES = (torch.float16, torch.bfloat16)


def factors_of(i: int, o: int, kernel: tuple[int, int], ranks: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    """Factors that keep the variance of their input."""
    rank_in, rank_out = ranks
    return [
        (randn(rank_in, i, seed=1) / math.sqrt(i)).to(dtype),
        (randn(rank_out, rank_in, *kernel, seed=2) / math.sqrt(rank_in * kernel[0] * kernel[1])).to(dtype),
        (randn(o, rank_out, seed=3) / math.sqrt(rank_out)).to(dtype),
    ]


def three_convolutions(
    x: Tensor, factors: list[Tensor], bias: Tensor | None, added: Tensor | None, geometry: Any, activation: str
) -> Tensor:
    """What a library does on a CPU in 16 bits: sums in float32, maps rounded between the convolutions.

    Not with 16-bit convolutions themselves: torch 2.11 crashes in some of them (bfloat16, small strided maps).
    """
    w_in, core, w_out = (f.float() for f in factors)
    z = F.conv2d(x.float(), w_in[:, :, None, None]).to(x.dtype).float()
    z = F.conv2d(z, core, None, *geometry).to(x.dtype).float()
    out = F.conv2d(z, w_out[:, :, None, None], None if bias is None else bias.float())
    return reference.conv.epilogue(out, None if added is None else added.float(), activation).to(x.dtype)


def rounding_spread(
    x: Tensor, factors: list[Tensor], bias: Tensor | None, added: Tensor | None, geometry: Any, eps: float
) -> Tensor:
    """Standard deviation (N, O, H', W') of an output whose two maps, and itself, are rounded to a dtype with this eps.

    A value v is off by up to half a unit in the last place, which is at most eps |v|, evenly spread: a variance of
    (eps v)² / 12. It passes a convolution by the squares of the weights. The result is rounded twice, before and after
    a residual is added, and an activation (slope at most 1.1) passes all that on. Everything in float64.
    """
    w_in, core, w_out = (f.double() for f in factors)
    first = F.conv2d(x.double(), w_in[:, :, None, None])
    second = F.conv2d(first, core, None, *geometry)
    out = F.conv2d(second, w_out[:, :, None, None], None if bias is None else bias.double())
    total = out if added is None else out + added.double()
    squares = F.conv2d(first.square(), core.square(), None, *geometry) + second.square()
    squares = F.conv2d(squares, w_out.square()[:, :, None, None]) + out.square() + total.square()
    return 1.1 * eps * (squares / 12).sqrt()


def judge(found: Tensor, library: Tensor, wanted: Tensor, spread: Tensor | None = None) -> None:
    """At most twice the library's own error in this dtype, or two roundings of the largest value; no bias; aligned.

    The library is lucky at times, above all where a handful of outputs are what cancellation left. So an output may
    also be off by six times `spread`, the standard deviation that roundings alone give it (`rounding_spread`): once in
    5e8 outputs by chance. No bias and aligned follow: by as much as errors of that size allow.
    """
    assert found.dtype == library.dtype
    assert found.shape == wanted.shape
    if wanted.numel() == 0:
        return
    eps, scale = EPS[found.dtype], float(wanted.abs().max())
    error, theirs = found.double() - wanted, library.double() - wanted
    chance = torch.zeros_like(wanted) if spread is None else 6 * spread
    assert bool((error.abs() <= chance.clamp_min(max(2 * float(theirs.abs().max()), 2 * eps * scale))).all())
    # Roundings of equal values are equal, so as many of them average out as there are different values.
    distinct = math.sqrt(wanted.unique().numel())
    noise = max(2 * abs(float(theirs.mean())), 3 * eps * scale / distinct, float(chance.max()) / distinct)
    assert abs(float(error.mean())) <= max(1e-3 * scale, noise)
    # One minus the cosine is half the square of the error across, over the square of the length.
    turned, turned_theirs = (
        1 - float(F.cosine_similarity(v.flatten(), wanted.flatten(), 0, 1e-300))
        for v in (found.double(), library.double())
    )
    by_chance = float(chance.square().sum() / wanted.square().sum().clamp_min(1e-300)) / 2
    assert turned <= max(1e-4, 4 * turned_theirs, by_chance) or scale == 0


def guarded(
    shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """An output inside a larger block of memory, and that block, filled with a value no kernel writes."""
    n, o, h, w = shape
    band, fill = 64, -777.0
    block = torch.full((n * o * h * w + 2 * band,), fill, dtype=dtype, device=device)
    inside = block[band:-band].view(n, h, w, o).permute(0, 3, 1, 2) if channels_last else block[band:-band].view(shape)
    return inside, block


def untouched(block: Tensor) -> bool:
    return bool((block[:64] == -777.0).all() and (block[-64:] == -777.0).all())


USUAL: dict[str, Any] = {
    "batch": 2,
    "kernel": (3, 3),
    "stride": (1, 1),
    "padding": (1, 1),
    "dilation": (1, 1),
    "cards": ((HOPPER, 1), (AMPERE, 1), (HOPPER, 2)),
}
CASES: dict[str, dict[str, Any]] = {
    "several column tiles": {"channels": 16, "size": (9, 9), "ranks": (150, 70), "out_channels": 136},
    "one tile of 32 columns": {"channels": 16, "size": (9, 9), "ranks": (90, 100), "out_channels": 24},
    "the widest": {
        "channels": 8,
        "size": (6, 6),
        "ranks": (20, 300),
        "out_channels": 16,
        "cards": ((HOPPER, 4), (HOPPER, 8)),
    },
    "224 ranks": {
        "channels": 8,
        "size": (6, 6),
        "ranks": (20, 220),
        "out_channels": 16,
        "cards": ((HOPPER, 1), (AMPERE, 1)),
    },
    "several passes": {"channels": 16, "size": (40, 41), "ranks": (16, 16), "out_channels": 16, "stride": (3, 3)},
    "resident weights": {"channels": 64, "size": (30, 30), "ranks": (32, 32), "out_channels": 64},
    "images in one tile": {"channels": 24, "size": (5, 5), "ranks": (20, 20), "out_channels": 16, "batch": 7},
    "a long kernel": {
        "channels": 8,
        "size": (17, 9),
        "ranks": (8, 8),
        "out_channels": 8,
        "kernel": (7, 5),
        "padding": (3, 2),
    },
    "far apart": {
        "channels": 8,
        "size": (15, 15),
        "ranks": (8, 24),
        "out_channels": 8,
        "dilation": (3, 4),
        "padding": (3, 4),
    },
    "more ranks than registers": {
        "channels": 8,
        "size": (5, 5),
        "ranks": (16, 500),
        "out_channels": 72,
        "cards": ((HOPPER, 8),),
    },
    "a wide box": {
        "batch": 4,
        "channels": 8,
        "size": (1, 500),
        "ranks": (8, 8),
        "out_channels": 8,
        "kernel": (1, 1),
        "stride": (1, 4),
        "padding": (0, 0),
    },
    "a blank border": {"channels": 8, "size": (2, 2), "ranks": (8, 8), "out_channels": 8, "padding": (6, 6)},
}
