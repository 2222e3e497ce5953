"""The work of a factored convolution, and the plain steps that each library backend makes of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

Pair = tuple[int, int]


@dataclass(frozen=True)
class ConvWork:
    """The size of a factored convolution's call. ranks is (R_in, R_out) of Tucker-2, else (R, R)."""

    batch: int
    in_channels: int
    out_channels: int
    size: Pair
    kernel: Pair
    ranks: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    channels_last: bool
    # "inference": a forward with merged or packed weights at hand; "forward"; "backward", with the maps between and
    # merged kernels at hand where the library computes it. Of these follow "training", a forward and a backward, and
    # "gradient", a backward that computes the maps again.
    call: str

    @property
    def out_size(self) -> Pair:
        """(H', W')."""
        sizes = zip(self.size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        height, width = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)
        return height, width


class Step(NamedTuple):
    """One call of the library inside a backend.

    kind: "convolution", "depthwise", "sum" (of maps) or "merge" (factors to dense kernel), with "-backward" behind it
    where it is the gradient of that. pixels are those of one image, taps those of the kernel. vendor: whether torch
    hands the step to its vendor's library on a CPU, see `vendor_serves`.
    """

    kind: str
    batch: int
    in_channels: int
    out_channels: int
    in_pixels: int
    out_pixels: int
    taps: int
    macs: int
    vendor: bool = True

    @property
    def weights(self) -> int:
        """Elements of the kernel."""
        return self.taps * self.in_channels * (1 if self.kind.startswith("depthwise") else self.out_channels)


# What a library computes each operator by; `fastrank._backends` says what else serves it.
LIBRARY: dict[str, tuple[str, ...]] = {
    "tucker2_conv2d": ("sequence", "dense"),
    "cp_conv2d": ("sequence", "depthwise", "dense"),
    "channel_svd_conv2d": ("sequence", "dense"),
    "spatial_svd_conv2d": ("sequence", "dense"),
    "decoupled_svd_conv2d": ("sequence", "depthwise", "dense"),
}


def steps(op: str, backend: str, work: ConvWork, dtype: torch.dtype, threads: int) -> list[Step]:
    """What one of the backends `LIBRARY` runs for a call, in the terms that a cost model knows."""
    parts = _Parts(work, dtype, threads)
    if backend == "dense":
        forward = [parts.conv(work.in_channels, work.out_channels, work.kernel, work.size, work.out_size)]
        merge = parts.merge(op)
        return {
            "inference": forward,
            "forward": [merge, *forward],
            "backward": [_gradient(forward[0]), _gradient(merge)],
        }[work.call]
    if backend == "depthwise":
        path = parts.sequence("decoupled_svd_conv2d", 1)
        if work.call == "backward":
            return [*map(_gradient, path)] * work.ranks[0]
        return [*path * work.ranks[0], *[parts.sum(2)] * (work.ranks[0] - 1)]
    forward = parts.sequence(op, work.ranks[0])
    if work.call == "backward":
        return [*map(_gradient, forward)]
    return [*forward, *([parts.sum(work.ranks[0])] if "depthwise" in LIBRARY[op] else [])]


@dataclass(frozen=True)
class _Parts:
    """The steps that the backends of a call are put together from."""

    work: ConvWork
    dtype: torch.dtype
    threads: int

    def sequence(self, op: str, rank: int) -> list[Step]:
        """The convolutions of a form, without the sum over R."""
        work, size, out, (kh, kw) = self.work, self.work.size, self.work.out_size, self.work.kernel
        i, o, between = work.in_channels, work.out_channels, (out[0], size[1])
        if op == "tucker2_conv2d":
            rank_in, rank_out = work.ranks
            return [
                self.conv(i, rank_in, (1, 1), size, size),
                self.conv(rank_in, rank_out, (kh, kw), size, out),
                self.conv(rank_out, o, (1, 1), out, out),
            ]
        if op == "channel_svd_conv2d":
            return [self.conv(i, rank, (kh, kw), size, out), self.conv(rank, o, (1, 1), out, out)]
        if op == "spatial_svd_conv2d":
            return [self.conv(i, rank, (kh, 1), size, between), self.conv(rank, o, (1, kw), between, out)]
        pointwise = self.conv(i, rank * o, (1, 1), size, size)
        if op == "decoupled_svd_conv2d":
            return [pointwise, self.depthwise(rank * o, kh * kw, size, out)]
        return [pointwise, self.depthwise(rank * o, kh, size, between), self.depthwise(rank * o, kw, between, out)]

    def conv(self, source: int, target: int, kernel: Pair, before: Pair, after: Pair) -> Step:
        work, taps, pixels = self.work, kernel[0] * kernel[1], (before[0] * before[1], after[0] * after[1])
        moves = kernel != (1, 1) and (work.stride != (1, 1) or work.dilation != (1, 1))
        vendor = vendor_serves(work.batch, source, before, kernel, moves, self.dtype, self.threads)
        macs = taps * source * target * pixels[1] * work.batch
        return Step("convolution", work.batch, source, target, *pixels, taps, macs, vendor)

    def depthwise(self, maps: int, taps: int, before: Pair, after: Pair) -> Step:
        pixels, batch = (before[0] * before[1], after[0] * after[1]), self.work.batch
        return Step("depthwise", batch, maps, maps, *pixels, taps, taps * maps * pixels[1] * batch)

    def sum(self, terms: int) -> Step:
        """The sum of so many maps of all output channels."""
        batch, maps, pixels = self.work.batch, terms * self.work.out_channels, math.prod(self.work.out_size)
        return Step("sum", batch, maps, self.work.out_channels, pixels, pixels, 0, maps * pixels * batch)

    def merge(self, op: str) -> Step:
        """The dense kernel from the factors."""
        work, taps = self.work, math.prod(self.work.kernel)
        i, o, (rank_in, rank_out) = work.in_channels, work.out_channels, work.ranks
        more = {"tucker2_conv2d": rank_out, "cp_conv2d": 1}.get(op, 0)
        return Step("merge", 1, i, o, taps, taps, taps, taps * o * rank_in * (i + more))


def _gradient(step: Step) -> Step:
    return step._replace(kind=f"{step.kind}-backward")


def vendor_serves(
    batch: int, channels: int, size: Pair, kernel: Pair, moves: bool, dtype: torch.dtype, threads: int
) -> bool:
    """Whether torch gives a convolution on a CPU to oneDNN rather than to its own matrix product.

    The rule is ConvParams::use_mkldnn of ATen: small float32 maps, and 1×1 kernels on one thread, stay with the
    latter. The two differ in speed by factors, so that a cost model that mixes them is blind.
    """
    if dtype is not torch.float32:
        return True
    worth_it = batch > 1 or channels * size[0] * size[1] > 20480 or min(kernel) > 3
    return worth_it and (moves or batch >= 16 or kernel != (1, 1) or threads > 1)
