"""A small run of every Tucker-2 kernel, for compute-sanitizer: every way through them, both layouts, and gradients.

The CUDA kernels run a tile in one block and in as many as their plan would take.

    python bench/tucker2_workload.py [--device cuda|cpu]

`--device cpu` runs the same calls by stand-ins, the host build of the CUDA kernels and Triton's interpreter.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import workload
from torch import Tensor

Pair = tuple[int, int]
ACTIVATIONS = ("none", "relu", "silu")


@dataclass(frozen=True)
class Case:
    """A convolution; `batch` is that of a card with 132 multiprocessors, and smaller ones get less."""

    batch: int
    channels: int
    size: Pair
    ranks: Pair
    out_channels: int
    kernel: Pair = (3, 3)
    stride: Pair = (1, 1)
    padding: Pair = (1, 1)
    dilation: Pair = (1, 1)

    @property
    def geometry(self) -> tuple[Pair, Pair, Pair]:
        return self.stride, self.padding, self.dilation


CASES = {
    "several column tiles": Case(2, 16, (9, 9), (150, 70), 136),
    "one tile of 32 columns": Case(2, 16, (9, 9), (90, 100), 24),
    "224 ranks": Case(2, 8, (6, 6), (20, 220), 16),
    "the widest": Case(2, 8, (6, 6), (20, 300), 16),
    "several passes": Case(40, 16, (40, 41), (16, 16), 16, stride=(3, 3)),
    "resident weights": Case(33, 16, (30, 30), (16, 16), 16),
    "images in one tile": Case(330, 8, (5, 5), (20, 20), 16),
    "many channels": Case(1, 520, (7, 7), (40, 40), 520),
    "odd sizes": Case(3, 5, (11, 7), (3, 9), 7, stride=(2, 1)),
    "a long kernel": Case(2, 8, (17, 9), (8, 8), 8, kernel=(7, 5), padding=(3, 2)),
    "far apart": Case(2, 8, (15, 15), (8, 24), 8, padding=(3, 4), dilation=(3, 4)),
    "a blank border": Case(2, 8, (2, 2), (8, 8), 8, padding=(6, 6)),
    "points": Case(2, 24, (9, 9), (16, 16), 16, kernel=(1, 1), padding=(0, 0)),
}
# Triton compiles a kernel for each.
TRITON = ("several column tiles", "odd sizes", "far apart", "points")


def tensors(
    case: Case, batch: int, dtype: torch.dtype, device: str, channels_last: bool
) -> tuple[list[Tensor], Tensor]:
    """(x, w_in, core, w_out, bias) and a residual, x and the residual in the layout asked for."""
    (rank_in, rank_out), sizes = case.ranks, zip(case.size, case.kernel, *case.geometry, strict=True)
    out = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    x = random(batch, case.channels, *case.size).contiguous(memory_format=layout)
    residual = random(batch, case.out_channels, *out).contiguous(memory_format=layout)
    factors = (
        random(rank_in, case.channels),
        random(rank_out, rank_in, *case.kernel),
        random(case.out_channels, rank_out),
    )
    return [x, *factors, random(case.out_channels)], residual


def options(case: Case) -> dict[str, Any]:
    return dict(zip(("stride", "padding", "dilation"), case.geometry, strict=True))


def main() -> None:
    """Exit with a sentence where a kernel is missing."""
    device = workload.device(__doc__, "Tucker-2 kernels")
    from fastrank import _backends, _native, ops
    from fastrank.ops import _tucker2_kernels as kernels

    kernel, part = ("cuda", "_C_cuda") if device == "cuda" else ("host", "_host")
    for needed in (part, "_host"):
        workload.require(_native.why_missing(needed), "Tucker-2 kernels")
    torch.manual_seed(0)
    card = _backends.card(torch.device(device))
    halves = (torch.float16, torch.bfloat16)
    runs = itertools.product(CASES.items(), (True, False))
    for index, ((name, case), channels_last) in enumerate(runs):
        batch = max(min(case.batch, 2), case.batch * card[1] // 132)
        inputs, residual = tensors(case, batch, halves[(index + index // 2) % 2], device, channels_last)
        for split, refusal in ways(case, batch, card).items():
            if not refusal:
                packed, out = kernels.pack(inputs[1:4], inputs[4], split=split), torch.empty_like(residual)
                kernels.convolve(inputs[0], packed, residual, out, case.geometry, ACTIVATIONS[index % 3])
            print(f"{kernel}, {name}, a tile in {split}: {refusal or 'ran'}", flush=True)
        if "" in ways(case, batch, card).values():
            gradients(inputs, kernel, case, 1)  # those of the factors are the library's work
    kinds = (torch.float32, torch.float16) if device == "cpu" else (torch.float32, *halves)
    for index, name in enumerate(TRITON):
        inputs, residual = tensors(CASES[name], 2, kinds[index % len(kinds)], device, index % 2 == 0)
        call = {"residual": residual, "activation": ACTIVATIONS[index % 3], "backend": "triton", **options(CASES[name])}
        ops.tucker2_conv2d(*inputs, **call)
        gradients(inputs, "triton", CASES[name], len(inputs))
        print(f"triton, {name}: ran", flush=True)
    if device == "cuda":
        torch.cuda.synchronize()


def ways(case: Case, batch: int, card: tuple[bool, int, int]) -> dict[int, str]:
    """Blocks that a tile may be split into, and why such a kernel cannot run (empty where it can)."""
    from fastrank import _native
    from fastrank.ops import _tucker2_kernels as kernels

    x, shape = (batch, case.channels, *case.size), (*case.ranks, *case.kernel)
    listed = kernels.sizes(x, shape, case.out_channels, case.geometry)
    best = kernels.best_split(x, shape, case.out_channels, case.geometry, card)
    splits = {1, 2, best} if best > 1 else {1}
    return {split: _native.host().tucker2_plan(listed, split, *card)["refusal"] for split in sorted(splits)}


def gradients(inputs: list[Tensor], backend: str, case: Case, count: int) -> None:
    """Of the first `count` inputs, from a gradient of the output that is random."""
    from fastrank import ops

    leaves = [t.detach().requires_grad_(i < count) for i, t in enumerate(inputs)]
    out = ops.tucker2_conv2d(*leaves, backend=backend, **options(case))
    torch.autograd.grad(out, leaves[:count], torch.randn_like(out))


if __name__ == "__main__":
    main()
