"""The work of a factored convolution, and the plain steps that each library backend makes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

Pair = tuple[int, int]


@dataclass(frozen=True)
class ConvWork:
    """The size of a factored convolution's call. ranks is (R_in, R_out) of Tucker-2, (R, R) of CP."""

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
    call: str  # "forward", "backward", or "inference": a forward whose merged or packed weights are at hand

    @property
    def out_size(self) -> Pair:
        """(H', W')."""
        sizes = zip(self.size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        height, width = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)
        return height, width


class Step(NamedTuple):
    """One call of the library inside a backend.

    kind: "convolution", "depthwise", "sum" (over R) or "merge" (factors to dense kernel), with "-backward" behind it
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


def steps(op: str, backend: str, work: ConvWork, dtype: torch.dtype, threads: int) -> list[Step]:
    """What `backend` ("dense" or "sequence") runs for a call, in the terms that a cost model knows."""
    size, out, (kh, kw), batch = work.size, work.out_size, work.kernel, work.batch
    in_channels, out_channels, (rank_in, rank_out) = work.in_channels, work.out_channels, work.ranks
    moves = work.stride != (1, 1) or work.dilation != (1, 1)

    def conv(source: int, target: int, kernel: Pair, before: Pair, after: Pair) -> Step:
        vendor = vendor_serves(batch, source, before, kernel, moves and kernel != (1, 1), dtype, threads)
        taps, pixels = kernel[0] * kernel[1], (before[0] * before[1], after[0] * after[1])
        macs = taps * source * target * pixels[1] * batch
        return Step("convolution", batch, source, target, *pixels, taps, macs, vendor)

    def depthwise(maps: int, taps: int, before: Pair, after: Pair) -> Step:
        pixels = before[0] * before[1], after[0] * after[1]
        return Step("depthwise", batch, maps, maps, *pixels, taps, taps * maps * pixels[1] * batch)

    if backend == "dense":
        forward = [conv(in_channels, out_channels, (kh, kw), size, out)]
        if op == "tucker2_conv2d":
            macs = kh * kw * out_channels * rank_in * (rank_out + in_channels)
        else:
            macs = kh * kw * out_channels * rank_in * (1 + in_channels)
        merge = Step("merge", 1, in_channels, out_channels, kh * kw, kh * kw, kh * kw, macs)
        return {
            "inference": forward,
            "forward": [merge, *forward],
            "backward": [merge, _gradient(forward[0]), _gradient(merge)],
        }[work.call]
    if op == "tucker2_conv2d":
        forward = [
            conv(in_channels, rank_in, (1, 1), size, size),
            conv(rank_in, rank_out, (kh, kw), size, out),
            conv(rank_out, out_channels, (1, 1), out, out),
        ]
        last = []
    else:
        maps, between, pixels = rank_in * out_channels, (out[0], size[1]), out[0] * out[1]
        forward = [
            conv(in_channels, maps, (1, 1), size, size),
            depthwise(maps, kh, size, between),
            depthwise(maps, kw, between, out),
        ]
        last = [Step("sum", batch, maps, out_channels, pixels, pixels, 0, maps * pixels * batch)]
    # The backward pass computes the two intermediate maps anew.
    return [*forward[:2], *map(_gradient, forward)] if work.call == "backward" else [*forward, *last]


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
