"""A small run of every linear-algebra kernel on the GPU, for compute-sanitizer: odd sizes, strides, all dtypes."""

from __future__ import annotations

import sys

import torch

from fastrank import _native, ops

SHAPES = [(1, 1), (1, 7), (9, 5), (33, 70), (64, 65), (130, 300)]


def main() -> None:
    if reason := _native.why_missing("_C_cuda"):
        sys.exit(f"the CUDA kernels cannot run: {reason}")
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        matrices = [torch.randn(shape, device="cuda").to(dtype) for shape in SHAPES]
        strided = torch.randn(20, 60, device="cuda").to(dtype)[::2, 1::3]
        matrices += [strided, torch.zeros(4, 6, device="cuda").to(dtype)]
        ops.svd(matrices, backend="cuda")
        ops.nuclear_subgradient(matrices, energy=0.9, backend="cuda")
        ops.project_energy(matrices, 0.9, backend="cuda")
        ops.nuclear_subgradient(matrices, method="polar", backend="triton")
    ops.check_pending()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
