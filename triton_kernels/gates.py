"""Triton kernels of gated factors and gates, each one launch for a list of tensors.

fp32 arithmetic (fp64 in the proximal step), sums in a fixed order. Where the tensors are is told by a table on the
device, int64: for every program its tensor's place in the list, then for every tensor its fields, pointers first and
its first program last. Kernels take it with `like`, any pointer of the tensors' dtype.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# The smallest normal float32: a slice whose sum of squares is below it counts as zero.
SMALLEST_NORMAL = tl.constexpr(1.17549435e-38)
FUNNEL_BLOCK = 2048
PROXIMAL_BLOCK = 512  # in double precision
COUNT_BLOCK = 1024
FINISH_BLOCK = 1024
TILE = tl.constexpr(4096)  # elements of a program: whole slices, or a part of a long one
COLUMNS = (64, 256, 1024, 2048, 4096)  # a slice takes the first of these widths that holds it
MOST_TABLES = 64


@triton.jit
def _own_entry(table, FIELDS: tl.constexpr):
    """The entry of this program's tensor, and how many of its programs come before this one."""
    program = tl.program_id(0).to(tl.int64)
    entry = table + tl.num_programs(0) + tl.load(table + program) * FIELDS
    return entry, program - tl.load(entry + FIELDS - 1)


@triton.jit
def _pointer(entry, FIELD: tl.constexpr, like, ALIGNED: tl.constexpr):
    found = tl.load(entry + FIELD).to(like.dtype)
    return tl.multiple_of(found, 16) if ALIGNED else found


@triton.jit
def _row_size(entry, FIELD: tl.constexpr, like, ALIGNED: tl.constexpr):
    found = tl.load(entry + FIELD)
    return tl.multiple_of(found, 128 // like.dtype.element_ty.primitive_bitwidth) if ALIGNED else found


@triton.jit
def _inverse_norm(squares):
    zero = squares < SMALLEST_NORMAL
    return tl.where(zero, 0.0, 1.0 / tl.sqrt_rn(tl.where(zero, 1.0, squares)))


@triton.jit
def _factor_tile(direction, gate, out, rows, row_size, block, COLUMNS: tl.constexpr, ONE_TILE: tl.constexpr):
    """TILE elements: slices of at most COLUMNS read once, or where not ONE_TILE a longer one read twice."""
    ROWS: tl.constexpr = TILE // COLUMNS
    row = block * ROWS + tl.arange(0, ROWS)
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
def gated_factors_kernel(like, table, ALIGNED: tl.constexpr):
    """Entries: direction, out, gate, rows, row size."""
    entry, block = _own_entry(table, 6)
    direction, out = _pointer(entry, 0, like, ALIGNED), _pointer(entry, 1, like, ALIGNED)
    gate, rows = _pointer(entry, 2, like, False), tl.load(entry + 3)
    row_size = _row_size(entry, 4, like, ALIGNED)
    if row_size <= 64:
        _factor_tile(direction, gate, out, rows, row_size, block, 64, True)
    elif row_size <= 256:
        _factor_tile(direction, gate, out, rows, row_size, block, 256, True)
    elif row_size <= 1024:
        _factor_tile(direction, gate, out, rows, row_size, block, 1024, True)
    elif row_size <= 2048:
        _factor_tile(direction, gate, out, rows, row_size, block, 2048, True)
    elif row_size <= TILE:
        _factor_tile(direction, gate, out, rows, row_size, block, TILE, True)
    else:
        _factor_tile(direction, gate, out, rows, row_size, block, TILE, False)


@triton.jit
def _differentiate_tile(
    grad,
    direction,
    grad_direction,
    gate,
    grad_gate,
    rows,
    row_size,
    block,
    COLUMNS: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    """Gradients of direction and gate, tiled as the forward kernel."""
    ROWS: tl.constexpr = TILE // COLUMNS
    row = block * ROWS + tl.arange(0, ROWS)
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
def gated_factors_backward_kernel(like, table, ALIGNED: tl.constexpr):
    """Entries: grad, direction, grad_direction, gate, grad_gate, rows, row size."""
    entry, block = _own_entry(table, 8)
    grad, direction = _pointer(entry, 0, like, ALIGNED), _pointer(entry, 1, like, ALIGNED)
    target = _pointer(entry, 2, like, ALIGNED)
    gate, slope, rows = _pointer(entry, 3, like, False), _pointer(entry, 4, like, False), tl.load(entry + 5)
    row_size = _row_size(entry, 6, like, ALIGNED)
    if row_size <= 64:
        _differentiate_tile(grad, direction, target, gate, slope, rows, row_size, block, 64, True)
    elif row_size <= 256:
        _differentiate_tile(grad, direction, target, gate, slope, rows, row_size, block, 256, True)
    elif row_size <= 1024:
        _differentiate_tile(grad, direction, target, gate, slope, rows, row_size, block, 1024, True)
    elif row_size <= 2048:
        _differentiate_tile(grad, direction, target, gate, slope, rows, row_size, block, 2048, True)
    elif row_size <= TILE:
        _differentiate_tile(grad, direction, target, gate, slope, rows, row_size, block, TILE, True)
    else:
        _differentiate_tile(grad, direction, target, gate, slope, rows, row_size, block, TILE, False)


@triton.jit
def funnel_partials_kernel(like, table, partials, c, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """partials[program] = the penalty of BLOCK gates. Entries: gates, size."""
    entry, block = _own_entry(table, 3)
    i = block * BLOCK + tl.arange(0, BLOCK)
    width = tl.abs(tl.load(_pointer(entry, 0, like, ALIGNED) + i, i < tl.load(entry + 1), 0.0).to(tl.float32))
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
def funnel_backward_kernel(like, table, grad, c, scale, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """grads = grad * scale * F'(gates), BLOCK of them a program. Entries: gates, grads, size."""
    entry, block = _own_entry(table, 4)
    i = block * BLOCK + tl.arange(0, BLOCK)
    inside = i < tl.load(entry + 2)
    gate = tl.load(_pointer(entry, 0, like, ALIGNED) + i, inside, 0.0).to(tl.float32)
    width = tl.abs(gate) + c
    # Two divisions instead of a square: c * c is no normal number for a small c.
    slope = (1.0 / width) * (c / width)
    slope = tl.where(gate == 0.0, 0.0, tl.where(gate < 0.0, -slope, slope))
    tl.store(_pointer(entry, 1, like, ALIGNED) + i, tl.load(grad) * scale * slope, inside)


@triton.jit
def funnel_proximal_kernel(
    like,
    table,
    eta: tl.float64,
    c: tl.float64,
    threshold: tl.float64,
    PENALTY: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Proximal points in place; PENALTY: 0 funnel, 1 l1, 2 l2. Entries: gates, size."""
    entry, block = _own_entry(table, 3)
    i = block * BLOCK + tl.arange(0, BLOCK)
    inside = i < tl.load(entry + 1)
    pointer = _pointer(entry, 0, like, ALIGNED) + i
    gate = tl.load(pointer, inside, 0.0).to(tl.float64)
    if PENALTY == 2:
        tl.store(pointer, (gate / (1.0 + 2.0 * eta)).to(like.dtype.element_ty), inside)
    else:
        size = tl.abs(gate)
        if PENALTY == 1:
            found = size - eta
        else:
            # As funnel_move of csrc/gates: s u with the smallest root u of u (1 - u)^2 = eta c / s^3, by Newton.
            s = size + c
            kappa = (eta / s) * (c / s) / s
            q = 6.75 * kappa
            w = tl.sqrt(tl.where(q < 1.0, 1.0 - q, 0.0))
            u = q / (1.0 + w) * (1.0 / 3.0 - 0.0515668 * w)
            for _ in tl.static_range(5):
                slope = tl.where(q < 1.0, (1.0 - u) * (1.0 - 3.0 * u), 1.0)
                u -= (u * (1.0 - u) * (1.0 - u) - kappa) / slope
            found = size - s * tl.where(q >= 1.0, 1.0 / 3.0, u)
        found = tl.where((size <= threshold) | (found < 0.0), 0.0, found)  # NaN stays
        tl.store(pointer, tl.where(gate < 0.0, -found, found).to(like.dtype.element_ty), inside)


@triton.jit
def count_below_kernel(like, table, counts, threshold: tl.float64, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """One program a tensor: counts[program] = how many gates are smaller than the threshold. Entries: gates, size."""
    entry, _ = _own_entry(table, 3)
    gates, size = _pointer(entry, 0, like, ALIGNED), tl.load(entry + 1)
    below = tl.zeros((BLOCK,), tl.int64)
    for first in range(0, size, BLOCK):
        i = first + tl.arange(0, BLOCK)
        gate = tl.abs(tl.load(gates + i, i < size, 0.0).to(tl.float64))
        below += ((gate < threshold) & (i < size)).to(tl.int64)
    tl.store(counts + tl.program_id(0), tl.sum(below, 0))


_TABLES: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()
_CAPTURED: list[tuple[Tensor, Tensor]] = []  # what the replays of CUDA graphs read: kept for good


def device_table(
    columns: Sequence[Sequence[Tensor]], sizes: Sequence[Sequence[int]], programs: Sequence[int]
) -> Tensor:
    """The table of a list on its device: columns of pointers, columns of sizes, programs a tensor.

    The latest MOST_TABLES are kept, by addresses and stream, so that a list whose tensors stay in place costs no copy.
    """
    tensors = [x for column in columns for x in column]
    device = tensors[0].device
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    addresses = [x.data_ptr() for x in tensors]
    key = (device, stream, len(columns), *addresses, *programs, *(n for column in sizes for n in column))
    found = _TABLES.get(key)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if found is None:
        count = len(programs)
        of_tensor = torch.tensor(programs)
        fields = torch.tensor([*addresses, *(n for column in sizes for n in column)]).view(-1, count)
        fields = torch.cat([fields, (of_tensor.cumsum(0) - of_tensor)[None]])
        host = torch.cat([torch.arange(count).repeat_interleave(of_tensor), fields.T.flatten()])
        if device.type == "cuda":
            host = host.pin_memory()
        found = host.to(device, non_blocking=True)
        if capturing:  # filled by the replay, so of no use to other calls
            _CAPTURED.append((found, host))
            return found
        _TABLES[key] = found
    elif capturing:
        _CAPTURED.append((found, found))
    _TABLES.move_to_end(key)
    while len(_TABLES) > MOST_TABLES:
        _TABLES.popitem(last=False)
    return found


def aligned(columns: Sequence[Sequence[Tensor]], row_sizes: Sequence[int] = ()) -> bool:
    """Whether every slice of the given tensors starts at a multiple of 16 bytes."""
    first = columns[0][0]
    return all(x.data_ptr() % 16 == 0 for column in columns for x in column) and all(
        n * first.element_size() % 16 == 0 for n in row_sizes
    )


def factor_programs(rows: int, row_size: int) -> int:
    """Programs of a factor: whole slices in tiles of TILE elements, a slice longer than that by itself."""
    columns = next((n for n in COLUMNS if row_size <= n), TILE.value)
    return int(triton.cdiv(rows, TILE.value // columns))


def _over_factors(kernel: Any, packed: list[list[Tensor]], single: list[list[Tensor]]) -> None:
    """Launch over columns of factors, `packed`, and of gates, `single`."""
    shapes = [(x.shape[0], x.numel() // x.shape[0]) for x in packed[0]]
    rows, sizes = [shape[0] for shape in shapes], [shape[1] for shape in shapes]
    programs = [factor_programs(*shape) for shape in shapes]
    table = device_table([*packed, *single], [rows, sizes], programs)
    kernel[(sum(programs),)](packed[0][0], table, ALIGNED=aligned(packed, sizes), num_warps=8)


def _over_gates(
    kernel: Any, columns: list[list[Tensor]], *arguments: Any, block: int, whole: bool = False, **constants: int
) -> None:
    """Launch over columns of gates: a program for each `block` of a tensor, or where `whole` one for all of it."""
    sizes = [x.numel() for x in columns[0]]
    programs = [1 if whole else triton.cdiv(n, block) for n in sizes]
    table = device_table(columns, [sizes], programs)
    kernel[(sum(programs),)](columns[0][0], table, *arguments, ALIGNED=aligned(columns), BLOCK=block, **constants)


def gated_factors(directions: list[Tensor], gates: list[Tensor], outs: list[Tensor]) -> None:
    """outs[i][j] = gates[i][j] * directions[i][j] / |directions[i][j]|; slices along dim 0 are blocks of memory."""
    _over_factors(gated_factors_kernel, [directions, outs], [gates])


def gated_factors_backward(
    grads: list[Tensor],
    directions: list[Tensor],
    gates: list[Tensor],
    grad_directions: list[Tensor],
    grad_gates: list[Tensor],
) -> None:
    """Gradients of `gated_factors` into grad_directions and grad_gates."""
    _over_factors(gated_factors_backward_kernel, [grads, directions, grad_directions], [gates, grad_gates])


def funnel_penalty(gates: list[Tensor], c: float, normalized: bool, out: Tensor) -> None:
    """out (0-d float32) = the penalty of contiguous, non-empty tensors: one launch, and one for the sum."""
    count = sum(triton.cdiv(gate.numel(), FUNNEL_BLOCK) for gate in gates)
    partials = torch.empty(count, dtype=torch.float32, device=out.device)
    _over_gates(funnel_partials_kernel, [gates], partials, c, block=FUNNEL_BLOCK)
    funnel_finish_kernel[(1,)](partials, out, count, c if normalized else 1.0, BLOCK=FINISH_BLOCK)


def funnel_penalty_backward(grad: Tensor, gates: list[Tensor], c: float, normalized: bool, grads: list[Tensor]) -> None:
    """grads[i] = grad * F'(gates[i])."""
    _over_gates(funnel_backward_kernel, [gates, grads], grad, c, c if normalized else 1.0, block=FUNNEL_BLOCK)


def funnel_proximal(gates: list[Tensor], eta: float, c: float, threshold: float, penalty: int) -> None:
    """Every gate becomes its proximal point, in place, and 0 where |g| <= threshold (not with penalty 2, l2)."""
    _over_gates(funnel_proximal_kernel, [gates], eta, c, threshold, block=PROXIMAL_BLOCK, PENALTY=penalty)


def count_below(gates: list[Tensor], threshold: float, counts: Tensor) -> None:
    """counts[i] = how many |g| of gates[i] are below the threshold; tensors may be empty."""
    _over_gates(count_below_kernel, [gates], counts, threshold, block=COUNT_BLOCK, whole=True)


# What the launchers can launch, for offline compilation: kernel, pointers to elements of the tensors' dtype, other
# arguments, the sets of constants, and the integers that are often multiples of 16 (compiled both ways).
_TABLE = {"table": "*i64"}
_BOTH = [{"ALIGNED": True}, {"ALIGNED": False}]
_FACTORS = [{**constant, "num_warps": 8} for constant in _BOTH]
_GATES = [{**constant, "BLOCK": FUNNEL_BLOCK} for constant in _BOTH]
_SUM = {**_TABLE, "partials": "*fp32", "c": "fp32"}
_FINISH = {"partials": "*fp32", "out": "*fp32", "count": "i32", "scale": "fp32"}
_SLOPE = {**_TABLE, "grad": "*fp32", "c": "fp32", "scale": "fp32"}
_STEP = {**_TABLE, "eta": "fp64", "c": "fp64", "threshold": "fp64"}
_STEPS = [{**constant, "BLOCK": PROXIMAL_BLOCK, "PENALTY": penalty} for constant in _BOTH for penalty in (0, 1, 2)]
_COUNTS = [{**constant, "BLOCK": COUNT_BLOCK} for constant in _BOTH]
_COUNT = {**_TABLE, "counts": "*i64", "threshold": "fp64"}
KERNELS = [
    (gated_factors_kernel, ("like",), _TABLE, _FACTORS, ()),
    (gated_factors_backward_kernel, ("like",), _TABLE, _FACTORS, ()),
    (funnel_partials_kernel, ("like",), _SUM, _GATES, ()),
    (funnel_finish_kernel, (), _FINISH, [{"BLOCK": FINISH_BLOCK}], ()),
    (funnel_backward_kernel, ("like",), _SLOPE, _GATES, ()),
    (funnel_proximal_kernel, ("like",), _STEP, _STEPS, ()),
    (count_below_kernel, ("like",), _COUNT, _COUNTS, ()),
]
