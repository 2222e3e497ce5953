"""Where the Triton kernels of the polar factor find a list of matrices: tables that follow from shapes and strides."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

# n, m with n ≤ m, and the strides of the n rows and m columns in the input and in the output.
Layout = tuple[int, int, int, int, int, int]
Tasks = list[tuple[int, int, int]]


@dataclass(frozen=True)
class Plan:
    """Tables on the device, and how much memory the packed matrices take.

    table: (matrices, 14) int64, the columns as triton_kernels/polar.py names them. The tasks: (tiles, 3) int32, the
    matrix, row and column of a tile: of edge × edge elements of the n×m matrices (pack), of block × block of them
    (wide), and of block × block of the lower halves of the n×n ones (square).
    wide_size, square_size: elements of all n×m and of all n×n matrices, padded to whole blocks.
    """

    block: int
    table: Tensor
    pack_tasks: Tensor
    wide_tasks: Tensor
    square_tasks: Tensor
    wide_size: int
    square_size: int


def layout(matrix: Tensor, out: Tensor) -> Layout:
    """Sizes and strides of a matrix and of its result, turned so that n ≤ m."""
    (n, m), (a, b), (c, d) = matrix.shape, matrix.stride(), out.stride()
    return (n, m, a, b, c, d) if n <= m else (m, n, b, a, d, c)


@cache  # for good: a captured CUDA graph goes on reading the tables
def plan(layouts: tuple[Layout, ...], block: int, edge: int, device: torch.device) -> Plan:
    """The plan of a list of matrices, copied to the device: the first call cannot be part of a captured CUDA graph."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("polar_factors must be called once on these shapes before a CUDA graph captures it")
    rows: list[list[int]] = [[]] * len(layouts)
    pack: Tasks = []
    wide: Tasks = []
    square: Tasks = []
    wide_size = square_size = 0
    # The deepest tiles first: what starts late should not take long.
    for index in sorted(range(len(layouts)), key=lambda i: -layouts[i][1]):
        n, m, *strides = layouts[index]
        down, across = -(-n // block), -(-m // block)
        size, parts = down * across * block * block, block // edge
        if size >= 2**31:  # offsets inside a matrix are 32-bit numbers
            raise ValueError(f"matrices[i] must have fewer than 2**31 elements in whole tiles, got a matrix of {n}×{m}")
        tasks = len(pack), down * across * parts**2, len(square), down * (down + 1) // 2
        rows[index] = [n, m, down * block, across * block, wide_size, square_size, *strides, *tasks]
        pack += [(index, i, j) for i in range(down * parts) for j in range(across * parts)]
        wide += [(index, i, j) for i in range(down) for j in range(across)]
        square += [(index, i, j) for i in range(down) for j in range(i + 1)]
        wide_size += size
        square_size += (down * block) ** 2

    def on_device(tasks: Tasks) -> Tensor:
        return torch.tensor(tasks, dtype=torch.int32, device=device)

    table = torch.tensor(rows, dtype=torch.int64, device=device)
    return Plan(block, table, on_device(pack), on_device(wide), on_device(square), wide_size, square_size)
