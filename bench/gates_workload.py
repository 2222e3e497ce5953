"""A small run of every gate kernel on the GPU, for compute-sanitizer: odd sizes, all dtypes, forward and backward."""

from __future__ import annotations

import sys

import torch

from fastrank import _native
from fastrank.ops import funnel_penalty, gated_factor

SHAPES = [(1,), (5, 3), (9, 7, 3, 3), (3, 1024), (3, 1025), (2, 4099)]


def main() -> None:
    if reason := _native.why_missing("_C_cuda"):
        sys.exit(f"the CUDA kernels cannot run: {reason}")
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for shape in SHAPES:
            direction = torch.randn(shape, device="cuda").to(dtype).requires_grad_()
            gate = torch.randn(shape[0], device="cuda").to(dtype).requires_grad_()
            out = gated_factor(direction, gate, backend="cuda")
            torch.autograd.grad(out, (direction, gate), torch.ones_like(out))
        gates = [torch.randn(i % 5 + 1, device="cuda").to(dtype).requires_grad_() for i in range(70)]
        gates.append(torch.randn(8195, device="cuda").to(dtype).requires_grad_())
        funnel_penalty(gates, 0.1, backend="cuda").backward()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
