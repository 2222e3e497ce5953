"""A small run of every gate kernel on the GPU, for compute-sanitizer: odd sizes, all dtypes, short and long lists."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from fastrank import _native
from fastrank.ops import count_below, funnel_penalty, funnel_proximal_, gated_factors

SHAPES = [(1,), (5, 3), (9, 7, 3, 3), (3, 1024), (3, 1025), (2, 4099), (2, 8200), (2, 16400)]
MANY = [(i % 3 + 1, i % 7 + 1) for i in range(800)]  # more than one table holds


def leaf(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype).requires_grad_()


def main() -> None:
    if reason := _native.why_missing("_C_cuda"):
        sys.exit(f"the CUDA kernels cannot run: {reason}")
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for shapes in (SHAPES, MANY):
            directions, gates = [leaf(s, dtype) for s in shapes], [leaf(s[:1], dtype) for s in shapes]
            outs = gated_factors(directions, gates, backend="cuda")
            torch.autograd.grad(outs, [*directions, *gates], [torch.ones_like(out) for out in outs])
        gates = [leaf((i % 5 + 1,), dtype) for i in range(1700)]
        gates.append(leaf((8195,), dtype))
        funnel_penalty(gates, 0.1, backend="cuda").backward()
        for penalty in ("funnel", "l1", "l2"):
            funnel_proximal_(gates, 0.01, 0.1, penalty=penalty, backend="cuda")
        count_below(gates, 0.1, backend="cuda")
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
