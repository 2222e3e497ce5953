"""A small run of the Triton kernels of CP, decoupled and channel SVD layers, for compute-sanitizer, with gradients.

    python bench/cp_workload.py [--device cuda|cpu]

`--device cpu` runs the same calls by Triton's interpreter.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import workload
from torch import Tensor

Pair = tuple[int, int]
ACTIVATIONS = ("none", "relu", "silu")


class Case(NamedTuple):
    """A convolution of a batch of 2, and its rank."""

    channels: int
    out_channels: int
    size: Pair
    rank: int
    kernel: Pair = (3, 3)
    stride: Pair = (1, 1)
    padding: Pair = (1, 1)
    dilation: Pair = (1, 1)


# Triton compiles kernels for each.
CASES = {
    "one rank": Case(16, 24, (9, 9), 1),
    "odd sizes": Case(5, 7, (11, 7), 3, stride=(2, 1)),
    "several blocks of channels": Case(24, 136, (7, 7), 2),
    "several groups of ranks": Case(16, 64, (14, 14), 9),
    "far apart": Case(8, 16, (15, 15), 2, padding=(3, 4), dilation=(3, 4)),
    "a blank border": Case(8, 8, (2, 2), 1, padding=(6, 6)),
    "points": Case(24, 16, (9, 9), 1, kernel=(1, 1), padding=(0, 0)),
}


def factors_of(op: str, case: Case) -> list[tuple[int, ...]]:
    """Shapes of an operator's factors."""
    i, o, r, (kh, kw) = case.channels, case.out_channels, case.rank, case.kernel
    shapes: dict[str, list[tuple[int, ...]]] = {
        "cp_conv2d": [(r, o, i), (r, o, kh), (r, o, kw)],
        "decoupled_svd_conv2d": [(r, o, i), (r, o, kh, kw)],
        "channel_svd_conv2d": [(r, i, kh, kw), (o, r, 1, 1)],
    }
    return shapes[op]


def main() -> None:
    """Exit with a sentence where the kernels cannot run."""
    device = workload.device(__doc__, "Triton kernels")
    torch.manual_seed(0)
    kinds = (torch.float32, torch.float16) if device == "cpu" else (torch.float32, torch.float16, torch.bfloat16)
    for index, (name, case) in enumerate(CASES.items()):
        layout = torch.contiguous_format if index % 2 else torch.channels_last
        for op in ("cp_conv2d", "decoupled_svd_conv2d", "channel_svd_conv2d"):
            run(op, case, kinds[index % len(kinds)], device, layout, ACTIVATIONS[index % 3])
            print(f"{op}, {name}: ran", flush=True)
    if device == "cuda":
        torch.cuda.synchronize()


def run(op: str, case: Case, dtype: torch.dtype, device: str, layout: torch.memory_format, activation: str) -> None:
    """Forward with a bias and a residual, and every gradient."""
    from fastrank import ops

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    options: dict[str, Any] = {"stride": case.stride, "padding": case.padding, "dilation": case.dilation}
    x = random(2, case.channels, *case.size).contiguous(memory_format=layout)
    leaves = [x, *(random(*shape) for shape in factors_of(op, case)), random(case.out_channels)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    call = getattr(ops, op)
    shape = call(*(leaf.detach().to("meta") for leaf in leaves), **options).shape
    residual = random(*shape).contiguous(memory_format=layout)
    out = call(*leaves, residual=residual, activation=activation, backend="triton", **options)
    torch.autograd.grad(out, leaves, random(*shape))


if __name__ == "__main__":
    main()
