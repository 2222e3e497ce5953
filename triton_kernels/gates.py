"""Triton kernels of the gated factors and of the funnel penalty. fp32 arithmetic, sums in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# The smallest normal float32: a slice whose sum of squares is below it counts as zero.
SMALLEST_NORMAL = tl.constexpr(1.17549435e-38)
FUNNEL_BLOCK = 2048
FINISH_BLOCK = 1024
MIN_COLUMNS, MAX_COLUMNS = 64, 4096
TILE = 2048


@triton.jit
def _inverse_norm(squares):
    zero = squares < SMALLEST_NORMAL
    return tl.where(zero, 0.0, 1.0 / tl.sqrt_rn(tl.where(zero, 1.0, squares)))


@triton.jit
def gated_factor_kernel(
    direction, gate, out, rows, row_size, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ONE_TILE: tl.constexpr
):
    """A tile of ROWS slices a program, COLUMNS elements at a time; ONE_TILE: row_size <= COLUMNS, read once."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    start = row[:, None] * row_size
    column = tl.arange(0, COLUMNS)[None, :]
    inside = row[:, None] < rows
    gates = tl.load(gate + row, row < rows, 0.0).to(tl.float32)
    if ONE_TILE:
        mask = inside & (column < row_size)
        v = tl.load(direction + start + column, mask, 0.0).to(tl.float32)
        scale = gates * _inverse_norm(tl.sum(v * v, 1))
        tl.store(out + start + column, scale[:, None] * v, mask)
    else:
        squares = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first in range(0, row_size, COLUMNS):
            v = tl.load(direction + start + first + column, inside & (first + column < row_size), 0.0).to(tl.float32)
            squares += v * v
        scale = gates * _inverse_norm(tl.sum(squares, 1))
        for first in range(0, row_size, COLUMNS):
            mask = inside & (first + column < row_size)
            v = tl.load(direction + start + first + column, mask, 0.0).to(tl.float32)
            tl.store(out + start + first + column, scale[:, None] * v, mask)


@triton.jit
def gated_factor_backward_kernel(
    grad,
    direction,
    gate,
    grad_direction,
    grad_gate,
    rows,
    row_size,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    """Gradients of direction and gate, tiled as the forward kernel."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    start = row[:, None] * row_size
    column = tl.arange(0, COLUMNS)[None, :]
    inside = row[:, None] < rows
    gates = tl.load(gate + row, row < rows, 0.0).to(tl.float32)
    if ONE_TILE:
        mask = inside & (column < row_size)
        v = tl.load(direction + start + column, mask, 0.0).to(tl.float32)
        u = tl.load(grad + start + column, mask, 0.0).to(tl.float32)
        inverse = _inverse_norm(tl.sum(v * v, 1))
        along = tl.sum(u * v, 1) * inverse
        result = (gates * inverse)[:, None] * (u - (along * inverse)[:, None] * v)
        tl.store(grad_direction + start + column, result, mask)
    else:
        squares = tl.zeros((ROWS, COLUMNS), tl.float32)
        dots = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first in range(0, row_size, COLUMNS):
            mask = inside & (first + column < row_size)
            v = tl.load(direction + start + first + column, mask, 0.0).to(tl.float32)
            u = tl.load(grad + start + first + column, mask, 0.0).to(tl.float32)
            squares += v * v
            dots += u * v
        inverse = _inverse_norm(tl.sum(squares, 1))
        along = tl.sum(dots, 1) * inverse
        scale = (gates * inverse)[:, None]
        radial = (along * inverse)[:, None]
        for first in range(0, row_size, COLUMNS):
            mask = inside & (first + column < row_size)
            v = tl.load(direction + start + first + column, mask, 0.0).to(tl.float32)
            u = tl.load(grad + start + first + column, mask, 0.0).to(tl.float32)
            tl.store(grad_direction + start + first + column, scale * (u - radial * v), mask)
    tl.store(grad_gate + row, along, row < rows)


@triton.jit
def funnel_partials_kernel(gates, partials, size, c, BLOCK: tl.constexpr):
    """partials[program] = the penalty of BLOCK gates."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    width = tl.abs(tl.load(gates + i, i < size, 0.0).to(tl.float32))
    term = tl.where(width == 0.0, 0.0, width / (width + c))
    tl.store(partials + tl.program_id(0), tl.sum(term, 0))


@triton.jit
def funnel_finish_kernel(partials, out, count, scale, BLOCK: tl.constexpr):
    """One program: out = scale * the sum of the partial sums."""
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, count, BLOCK):
        i = first + tl.arange(0, BLOCK)
        total += tl.load(partials + i, i < count, 0.0)
    tl.store(out, scale * tl.sum(total, 0))


@triton.jit
def funnel_backward_kernel(grad, gates, grads, size, c, scale, BLOCK: tl.constexpr):
    """grads = grad * scale * F'(gates), BLOCK of them a program."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gates + i, i < size, 0.0).to(tl.float32)
    width = tl.abs(gate) + c
    # Two divisions instead of a square: c * c is no normal number for a small c.
    slope = (1.0 / width) * (c / width)
    slope = tl.where(gate == 0.0, 0.0, tl.where(gate < 0.0, -slope, slope))
    tl.store(grads + i, tl.load(grad) * scale * slope, i < size)


def tile(row_size: int) -> dict[str, int | bool]:
    """The tile that serves slices of `row_size` elements: about TILE elements a program, one slice at least."""
    columns = min(max(triton.next_power_of_2(row_size), MIN_COLUMNS), MAX_COLUMNS)
    rows = max(TILE // columns, 1)
    return {"ROWS": rows, "COLUMNS": columns, "ONE_TILE": row_size <= columns, "num_warps": 4 if columns <= TILE else 8}


def gated_factor(direction: Tensor, gate: Tensor, out: Tensor) -> None:
    """out[j] = gate[j] * direction[j] / |direction[j]|; slices along dim 0 are blocks of memory, none is empty."""
    rows, row_size = direction.shape[0], direction.numel() // direction.shape[0]
    plan = tile(row_size)
    gated_factor_kernel[(triton.cdiv(rows, plan["ROWS"]),)](direction, gate, out, rows, row_size, **plan)


def gated_factor_backward(
    grad: Tensor, direction: Tensor, gate: Tensor, grad_direction: Tensor, grad_gate: Tensor
) -> None:
    """Gradients of `gated_factor` into grad_direction and grad_gate."""
    rows, row_size = direction.shape[0], direction.numel() // direction.shape[0]
    plan = tile(row_size)
    grid = (triton.cdiv(rows, plan["ROWS"]),)
    gated_factor_backward_kernel[grid](grad, direction, gate, grad_direction, grad_gate, rows, row_size, **plan)


def funnel_penalty(gates: list[Tensor], c: float, normalized: bool, out: Tensor) -> None:
    """out (0-d float32) = the penalty of contiguous, non-empty tensors: one launch a tensor and one for the sum."""
    counts = [triton.cdiv(gate.numel(), FUNNEL_BLOCK) for gate in gates]
    partials = torch.empty(sum(counts), dtype=torch.float32, device=out.device)
    for gate, partial, count in zip(gates, partials.split(counts), counts, strict=True):
        funnel_partials_kernel[(count,)](gate, partial, gate.numel(), c, BLOCK=FUNNEL_BLOCK)
    funnel_finish_kernel[(1,)](partials, out, sum(counts), c if normalized else 1.0, BLOCK=FINISH_BLOCK)


def funnel_penalty_backward(grad: Tensor, gates: list[Tensor], c: float, normalized: bool, grads: list[Tensor]) -> None:
    """grads[i] = grad * F'(gates[i]), one launch a tensor."""
    for gate, target in zip(gates, grads, strict=True):
        grid = (triton.cdiv(gate.numel(), FUNNEL_BLOCK),)
        scale = c if normalized else 1.0
        funnel_backward_kernel[grid](grad, gate, target, gate.numel(), c, scale, BLOCK=FUNNEL_BLOCK)


# What the launchers can launch, for offline compilation: kernel, pointers to elements of the tensors' dtype, other
# arguments, the sets of constants, and the integers that are often multiples of 16 (compiled both ways).
_TILES = [tile(size) for size in (64, 128, 256, 512, 1024, 2048, 4096, 4097)]
_SIZES = {"rows": "i32", "row_size": "i32"}
_BACKWARD = ("grad", "direction", "gate", "grad_direction", "grad_gate")
_SUM = {"partials": "*fp32", "size": "i32", "c": "fp32"}
_FINISH = {"partials": "*fp32", "out": "*fp32", "count": "i32", "scale": "fp32"}
_SLOPE = {"grad": "*fp32", "size": "i32", "c": "fp32", "scale": "fp32"}
KERNELS = [
    (gated_factor_kernel, ("direction", "gate", "out"), _SIZES, _TILES, ("row_size",)),
    (gated_factor_backward_kernel, _BACKWARD, _SIZES, _TILES, ("row_size",)),
    (funnel_partials_kernel, ("gates",), _SUM, [{"BLOCK": FUNNEL_BLOCK}], ("size",)),
    (funnel_finish_kernel, (), _FINISH, [{"BLOCK": FINISH_BLOCK}], ()),
    (funnel_backward_kernel, ("gates", "grads"), _SLOPE, [{"BLOCK": FUNNEL_BLOCK}], ("size",)),
]
