"""Triton kernels of the polar factor: a ragged list of matrices goes through one launch a phase.

Matrices are oriented (n ≤ m), scaled by a power of two and packed, float16 and padded with zeros to whole tiles, into
one workspace. A number is held as high + low / 2048, two float16; a product is up to three
tensor-core products with float32 sums: high·high, and (low·high + high·low) / 2048 in a second accumulator.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

Quintic = tuple[float, float, float]

LOW_SCALE = tl.constexpr(2048.0)
HEADROOM = tl.constexpr(4)  # the Frobenius norm of a packed matrix is below 2**HEADROOM
CHUNK = tl.constexpr(128)  # partial sums read at a time
EDGE = 64  # of the tiles in which inputs are read
POINTERS = 32  # addresses a launch of pointers_kernel writes
PLANES = 5  # n×n matrices in the workspace: G, once Z G, and three that Z and the products of Zs take in turns

# Columns of the table, one row a matrix, as fastrank/ops/_polar_plan.py fills it. Sizes and offsets count elements,
# tasks are tiles.
FIELDS = tl.constexpr(14)
N, M = tl.constexpr(0), tl.constexpr(1)
PADDED_N, PADDED_M = tl.constexpr(2), tl.constexpr(3)
WIDE, SQUARE = tl.constexpr(4), tl.constexpr(5)
IN_ROW, IN_COLUMN = tl.constexpr(6), tl.constexpr(7)
OUT_ROW, OUT_COLUMN = tl.constexpr(8), tl.constexpr(9)
PACK_TASK, PACK_TASKS = tl.constexpr(10), tl.constexpr(11)
SQUARE_TASK, SQUARE_TASKS = tl.constexpr(12), tl.constexpr(13)


@triton.jit
def _task(tasks, table):
    """The table row of this program's matrix, its number, and the row and column of the tile."""
    task = tasks + 3 * tl.program_id(0)
    matrix = tl.load(task)
    return table + FIELDS * matrix, matrix, tl.load(task + 1), tl.load(task + 2)


@triton.jit
def _place(row, OFFSET: tl.constexpr, SIZE: tl.constexpr):
    """Where a packed matrix begins, in elements, and its row length; whole tiles, so both are multiples of 64."""
    return tl.multiple_of(tl.load(row + OFFSET), 64), tl.multiple_of(tl.load(row + SIZE).to(tl.int32), 64)


@triton.jit
def _tile(tile_row, tile_column, BLOCK: tl.constexpr):
    """The rows and columns of a tile. Offsets inside a matrix fit 32 bits: the launcher sees to it."""
    return (tile_row * BLOCK + tl.arange(0, BLOCK))[:, None], (tile_column * BLOCK + tl.arange(0, BLOCK))[None, :]


@triton.jit
def _power_of_two(exponent):
    """2**exponent for whole numbers from -126 to 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _exponent(x):
    """floor(log2 x) of a normal x > 0; -127 for 0 and subnormal numbers."""
    return ((x.to(tl.int32, bitcast=True) >> 23) & 255) - 127


@triton.jit
def _load_input(like, pointers, row, matrix, tile_row, tile_column, BLOCK: tl.constexpr):
    """A tile of the oriented input in float32, read along whichever of its dimensions is dense."""
    base = tl.load(pointers + 2 * matrix).to(tl.pointer_type(like.dtype.element_ty))
    n, m = tl.load(row + N), tl.load(row + M)
    i_stride, k_stride = tl.load(row + IN_ROW), tl.load(row + IN_COLUMN)
    if i_stride < k_stride:
        down, across = _tile(tile_column, tile_row, BLOCK)
        inside = (down < m) & (across < n)
        value = tl.trans(tl.load(base + down * k_stride + across * i_stride, inside, 0.0))
    else:
        i, k = _tile(tile_row, tile_column, BLOCK)
        value = tl.load(base + i * i_stride + k * k_stride, (i < n) & (k < m), 0.0)
    return value.to(tl.float32)


@triton.jit
def _store(high, low, offsets, value, SPLIT: tl.constexpr):
    first = value.to(tl.float16)
    tl.store(high + offsets, first)
    if SPLIT:
        tl.store(low + offsets, ((value - first.to(tl.float32)) * LOW_SCALE).to(tl.float16))


@triton.jit
def _store_symmetric(high, low, size, tile_row, tile_column, value, BLOCK: tl.constexpr):
    """A tile on or below the diagonal, and its mirror image: what is not symmetric would grow with every iteration."""
    i, j = _tile(tile_row, tile_column, BLOCK)
    _store(high, low, i * size + j, tl.where(i >= j, value, tl.trans(value)), True)
    if tile_row != tile_column:
        down, across = _tile(tile_column, tile_row, BLOCK)
        _store(high, low, down * size + across, tl.trans(value), True)


@triton.jit
def _rows_by_rows(
    total, left_high, left_low, right_high, right_low, size, tile_row, tile_column,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The tile of total + left · rightᵀ; both have rows of `size` elements."""
    i, j = tile_row * BLOCK + tl.arange(0, BLOCK), tile_column * BLOCK + tl.arange(0, BLOCK)
    left = i[:, None] * size + tl.arange(0, DEPTH)[None, :]
    right = j[:, None] * size + tl.arange(0, DEPTH)[None, :]
    if SPLIT:
        cross = tl.zeros((BLOCK, BLOCK), tl.float32)
        for k in range(0, size, DEPTH):
            a, b = tl.load(left_high + left + k), tl.trans(tl.load(right_high + right + k))
            cross = tl.dot(tl.load(left_low + left + k), b, cross)
            cross = tl.dot(a, tl.trans(tl.load(right_low + right + k)), cross)
            total = tl.dot(a, b, total)
        total += cross / LOW_SCALE
    else:
        for k in range(0, size, DEPTH):
            total = tl.dot(tl.load(left_high + left + k), tl.trans(tl.load(right_high + right + k)), total)
    return total


@triton.jit(do_not_specialize=["first", "count", *(f"p{i}" for i in range(32))])
def pointers_kernel(
    table, first, count,
    p0: tl.int64, p1: tl.int64, p2: tl.int64, p3: tl.int64, p4: tl.int64, p5: tl.int64, p6: tl.int64, p7: tl.int64,
    p8: tl.int64, p9: tl.int64, p10: tl.int64, p11: tl.int64, p12: tl.int64, p13: tl.int64, p14: tl.int64,
    p15: tl.int64, p16: tl.int64, p17: tl.int64, p18: tl.int64, p19: tl.int64, p20: tl.int64, p21: tl.int64,
    p22: tl.int64, p23: tl.int64, p24: tl.int64, p25: tl.int64, p26: tl.int64, p27: tl.int64, p28: tl.int64,
    p29: tl.int64, p30: tl.int64, p31: tl.int64,
):  # fmt: skip
    """table[first + i] = p_i for i < count: addresses that travel as arguments, so that a CUDA graph keeps them."""
    pointers = (
        p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, p10, p11, p12, p13, p14, p15, p16, p17, p18, p19, p20, p21, p22, p23,
        p24, p25, p26, p27, p28, p29, p30, p31,
    )  # fmt: skip
    for i in tl.static_range(32):
        tl.store(table + first + i, pointers[i], i < count)


@triton.jit
def norm_kernel(like, pointers, table, tasks, partials, BLOCK: tl.constexpr):
    """partials[2 t], [2 t + 1] = e, Σ (x / 2**e)² over tile t, with 2**e above its largest element."""
    row, matrix, tile_row, tile_column = _task(tasks, table)
    x = _load_input(like, pointers, row, matrix, tile_row, tile_column, BLOCK)
    exponent = tl.minimum(_exponent(tl.max(tl.max(tl.abs(x), 1), 0)) + 1, 126)
    x *= _power_of_two(-exponent)
    tl.store(partials + 2 * tl.program_id(0), exponent.to(tl.float32))
    tl.store(partials + 2 * tl.program_id(0) + 1, tl.sum(tl.sum(x * x, 1), 0))


@triton.jit
def pack_kernel(like, pointers, table, tasks, partials, high, low, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """A tile of the input times the power of two that brings the matrix' norm below 2**HEADROOM; NaN if not finite."""
    row, matrix, tile_row, tile_column = _task(tasks, table)
    partials += 2 * tl.load(row + PACK_TASK)
    count = tl.load(row + PACK_TASKS)
    tops = tl.full((CHUNK,), -126.0, tl.float32)
    for first in range(0, count, CHUNK):
        i = first + tl.arange(0, CHUNK)
        tops = tl.maximum(tops, tl.load(partials + 2 * i, i < count, -126.0))
    top = tl.max(tops, 0)
    sums = tl.zeros((CHUNK,), tl.float32)
    for first in range(0, count, CHUNK):
        i = first + tl.arange(0, CHUNK)
        below = tl.maximum(2 * (tl.load(partials + 2 * i, i < count, -126.0) - top), -126.0).to(tl.int32)
        sums += tl.load(partials + 2 * i + 1, i < count, 0.0) * _power_of_two(below)
    squares = tl.sum(sums, 0)
    # The norm is 2**top sqrt(squares), below 2**(top + half).
    half = (_exponent(squares) >> 1) + 1
    shift = HEADROOM - top.to(tl.int32) - half
    x = _load_input(like, pointers, row, matrix, tile_row, tile_column, BLOCK)
    # Two factors: one alone may be no normal number.
    x = x * _power_of_two(shift >> 1) * _power_of_two(shift - (shift >> 1))
    x = tl.where(squares < float("inf"), x, float("nan"))
    base, width = _place(row, WIDE, PADDED_M)
    i, k = _tile(tile_row, tile_column, BLOCK)
    _store(high + base, low + base, i * width + k, x, SPLIT)


@triton.jit
def gram_kernel(
    table, tasks, high, low, gram_high, gram_low, sums,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile of G = X Xᵀ, and the sum of the squares that it stands for in ‖G‖²."""
    row, _, tile_row, tile_column = _task(tasks, table)
    base, width = _place(row, WIDE, PADDED_M)
    high, low = high + base, low + base
    zero = tl.zeros((BLOCK, BLOCK), tl.float32)
    value = _rows_by_rows(zero, high, low, high, low, width, tile_row, tile_column, SPLIT, BLOCK, DEPTH)
    weight = tl.where(tile_row == tile_column, 1.0, 2.0)
    tl.store(sums + tl.program_id(0), weight * tl.sum(tl.sum(value * value, 1), 0))
    base, size = _place(row, SQUARE, PADDED_N)
    _store_symmetric(gram_high + base, gram_low + base, size, tile_row, tile_column, value, BLOCK)


@triton.jit
def quintic_kernel(
    table, tasks, gram_high, gram_low, sums, out_high, out_low, a, b, c,
    FIRST: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile of Z = a s I + b s³ G + c s⁵ G². FIRST: s = ‖G‖^-½ brings the singular values below 1; else s = 1."""
    row, _, tile_row, tile_column = _task(tasks, table)
    base, size = _place(row, SQUARE, PADDED_N)
    gram_high, gram_low = gram_high + base, gram_low + base
    if FIRST:
        first, count = tl.load(row + SQUARE_TASK), tl.load(row + SQUARE_TASKS)
        parts = tl.zeros((CHUNK,), tl.float32)
        for start in range(0, count, CHUNK):
            i = start + tl.arange(0, CHUNK)
            parts += tl.load(sums + first + i, i < count, 0.0)
        squares = tl.sum(parts, 0)
        scale = 1.0 / tl.sqrt_rn(tl.sqrt_rn(tl.where(squares == 0.0, 1.0, squares)))
        a, b, c = a * scale, b * scale * scale * scale, c * scale * scale * scale * scale * scale
    i, j = _tile(tile_row, tile_column, BLOCK)
    linear = (b / c) * tl.load(gram_high + i * size + j).to(tl.float32)
    linear += (b / c / LOW_SCALE) * tl.load(gram_low + i * size + j).to(tl.float32)
    value = _rows_by_rows(
        linear, gram_high, gram_low, gram_high, gram_low, size, tile_row, tile_column, True, BLOCK, DEPTH
    )
    value = c * value + tl.where(i == j, a, 0.0)
    _store_symmetric(out_high + base, out_low + base, size, tile_row, tile_column, value, BLOCK)


@triton.jit(do_not_specialize=["right_step", "out_step"])
def product_kernel(
    table, tasks, left_high, left_low, right_high, right_low, out_high, out_low,
    right_step: tl.int64, out_step: tl.int64, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile of left · right, which commute and are symmetric. Programs of y = 1 take right and out a step further."""
    row, _, tile_row, tile_column = _task(tasks, table)
    base, size = _place(row, SQUARE, PADDED_N)
    second = tl.program_id(1)
    right = base + tl.multiple_of(second * right_step, 64)
    out = base + tl.multiple_of(second * out_step, 64)
    zero = tl.zeros((BLOCK, BLOCK), tl.float32)
    value = _rows_by_rows(
        zero, left_high + base, left_low + base, right_high + right, right_low + right, size, tile_row, tile_column,
        True, BLOCK, DEPTH,
    )  # fmt: skip
    _store_symmetric(out_high + out, out_low + out, size, tile_row, tile_column, value, BLOCK)


@triton.jit
def apply_kernel(
    like, pointers, table, tasks, left_high, left_low, high, low, out_high, out_low,
    FINAL: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile of the symmetric n×n factor times X: the next X, or FINAL, into the outputs."""
    row, matrix, tile_row, tile_column = _task(tasks, table)
    square, size = _place(row, SQUARE, PADDED_N)
    base, width = _place(row, WIDE, PADDED_M)
    left_high, left_low, high, low = left_high + square, left_low + square, high + base, low + base
    i, k = _tile(tile_row, tile_column, BLOCK)
    left = i * size + tl.arange(0, DEPTH)[None, :]
    right = tl.arange(0, DEPTH)[:, None] * width + k
    total, cross = tl.zeros((BLOCK, BLOCK), tl.float32), tl.zeros((BLOCK, BLOCK), tl.float32)
    for first in range(0, size, DEPTH):
        a, x = tl.load(left_high + left + first), tl.load(high + right + first * width)
        cross = tl.dot(tl.load(left_low + left + first), x, cross)
        if SPLIT:
            cross = tl.dot(a, tl.load(low + right + first * width), cross)
        total = tl.dot(a, x, total)
    total += cross / LOW_SCALE
    if not FINAL:
        _store(out_high + base, out_low + base, i * width + k, total, SPLIT)
    else:
        out = tl.load(pointers + 2 * matrix + 1).to(tl.pointer_type(like.dtype.element_ty))
        n, m = tl.load(row + N).to(tl.int32), tl.load(row + M).to(tl.int32)
        i_stride, k_stride = tl.load(row + OUT_ROW).to(tl.int32), tl.load(row + OUT_COLUMN).to(tl.int32)
        value = total.to(like.dtype.element_ty)
        if i_stride < k_stride:
            down, across = _tile(tile_column, tile_row, BLOCK)
            tl.store(out + down * k_stride + across * i_stride, tl.trans(value), (down < m) & (across < n))
        else:
            tl.store(out + i * i_stride + k * k_stride, value, (i < n) & (k < m))


# Depth of a step, warps and stages for each edge of a tile.
OPTIONS = {
    64: {"BLOCK": 64, "DEPTH": 64, "num_warps": 4, "num_stages": 3},
    128: {"BLOCK": 128, "DEPTH": 32, "num_warps": 8, "num_stages": 3},
}


def block(largest: int) -> int:
    """The edge of the tiles that serve matrices whose largest n this is."""
    return 128 if largest >= 512 else 64


def polar_factors(
    matrices: list[Tensor], outs: list[Tensor], plan: Any, blocks: tuple[tuple[Quintic, ...], ...], split: bool
) -> None:
    """outs[i] = U Vᵀ of matrices[i], none empty, of one dtype and device, with the Plan of their layouts.

    blocks: the quintics between one Gram matrix and the next. split: hold the n×m matrices in 22 bits instead of 11.
    """
    like, options = matrices[0], OPTIONS[plan.block]
    pointers = torch.empty(2 * len(matrices), dtype=torch.int64, device=like.device)
    addresses = [each.data_ptr() for pair in zip(matrices, outs, strict=True) for each in pair]
    for first in range(0, len(addresses), POINTERS):
        some = addresses[first : first + POINTERS]
        pointers_kernel[(1,)](pointers, first, len(some), *some, *[0] * (POINTERS - len(some)))

    pack_grid, wide_grid, square_grid = (len(plan.pack_tasks),), (len(plan.wide_tasks),), (len(plan.square_tasks),)
    partials = torch.empty(2 * len(plan.pack_tasks), dtype=torch.float32, device=like.device)
    sums = torch.empty(len(plan.square_tasks), dtype=torch.float32, device=like.device)
    halves = {"dtype": torch.float16, "device": like.device}
    # Where there is no low half, its pointer is the high one's and is not read.
    x, spare = ((w[0], w[-1]) for w in torch.empty(2, 1 + split, plan.wide_size, **halves))
    squares = torch.empty(PLANES, 2, plan.square_size, **halves)
    plane = [(high, low) for high, low in squares]
    packing, wide = ((like, pointers, plan.table, tasks) for tasks in (plan.pack_tasks, plan.wide_tasks))
    square = plan.table, plan.square_tasks

    def multiply(left: int, *pairs: tuple[int, int]) -> None:
        """The product of plane `left` with the first of every pair (one or two) into the second, in one launch."""
        (right, out), (next_right, next_out) = pairs[0], pairs[-1]
        steps = [2 * plan.square_size * (b - a) for a, b in ((right, next_right), (out, next_out))]
        grid = (*square_grid, len(pairs))
        product_kernel[grid](*square, *plane[left], *plane[right], *plane[out], *steps, **options)

    norm_kernel[pack_grid](*packing, partials, BLOCK=EDGE)
    pack_kernel[pack_grid](*packing, partials, *x, SPLIT=split, BLOCK=EDGE)
    gram, once = 0, 1
    for index, quintics in enumerate(blocks):
        gram_kernel[square_grid](*square, *x, *plane[gram], sums, SPLIT=split, **options)
        free, total = [2, 3, 4], -1
        for step, quintic in enumerate(quintics):
            z, last = free.pop(), step + 1 == len(quintics)
            starting = index == 0 and step == 0
            quintic_kernel[square_grid](*square, *plane[gram], sums, *plane[z], *quintic, FIRST=starting, **options)
            pairs = [] if last else [(gram, once)]
            done, total = total, z
            if done >= 0:
                total = free.pop()
                pairs.append((done, total))
            if pairs:
                multiply(z, *pairs)
            if not last:
                multiply(once, (z, gram))
            if done >= 0:
                free += [done, z]
        final = index + 1 == len(blocks)
        apply_kernel[wide_grid](*wide, *plane[total], *x, *spare, FINAL=final, SPLIT=split, **options)
        x, spare = spare, x


# What the launcher can launch, for offline compilation: kernel, pointers to elements of the tensors' dtype, other
# arguments, the sets of constants, and the integers that are often multiples of 16 (compiled both ways).
_TILES = list(OPTIONS.values())
_LISTS = {"pointers": "*i64", "table": "*i64", "tasks": "*i32", "partials": "*fp32", "sums": "*fp32"}
_HALVES = {name + half: "*fp16" for name in ("", "gram_", "left_", "right_", "out_") for half in ("high", "low")}
_ALL = {**_LISTS, **_HALVES, **dict.fromkeys("abc", "fp32"), "right_step": "i64", "out_step": "i64"}


def _over(tiles: list[dict[str, int]], *names: str) -> list[dict[str, int]]:
    """Every tile with every choice of the named switches."""
    for name in names:
        tiles = [{**each, name: on} for each in tiles for on in (0, 1)]
    return tiles


_EDGE = [{"BLOCK": EDGE}]
_ADDRESSES = {"table": "*i64", "first": "i32", "count": "i32", **{f"p{i}": "i64" for i in range(POINTERS)}}
KERNELS = [
    (pointers_kernel, (), _ADDRESSES, [{}], ()),
    (norm_kernel, ("like",), _ALL, _EDGE, ()),
    (pack_kernel, ("like",), _ALL, _over(_EDGE, "SPLIT"), ()),
    (gram_kernel, (), _ALL, _over(_TILES, "SPLIT"), ()),
    (quintic_kernel, (), _ALL, _over(_TILES, "FIRST"), ()),
    (product_kernel, (), _ALL, _TILES, ()),
    (apply_kernel, ("like",), _ALL, _over(_TILES, "FINAL", "SPLIT"), ()),
]
