"""Block sizes of the pointwise-depthwise kernels: pure functions of a convolution's sizes and of the processors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from fastrank.triton_kernels.tucker2_plan import MAX_COLUMNS, MAX_HALO, Axis, Pair, axis, block_of, tiles_of

MAX_SUMS = 32 * 256  # float32 sums of a program: 32 of a thread, of 8 warps
FLIGHT = 48  # registers of a thread for rows of z that are on their way
SHARED = 48 * 1024  # bytes that loads under way may take, so that some of the memory stays a first-level cache
SCRATCH = 32 * 1024  # bytes of z that a program wants to find in that cache
PROGRAMS = 2  # a processor
# Weights of the cost, in multiply-adds of a tensor core: an element that is moved, a step of a loop, a tap of the
# depthwise pass (a load from the first-level cache, a conversion and a multiply-add of a scalar unit).
MOVE, STEP, TAP = 128, 16384, 48
PRODUCT = {"wgmma": 1, "mma": 1, "fma": 16}  # a multiply-add of the pointwise pass


@dataclass(frozen=True)
class Depthwise:
    """Σ_r depthwise_r(pointwise_r(x)): x (batch, channels, *in_size) to (batch, outs, *out_size), in `rank` paths."""

    batch: int
    channels: int
    outs: int
    rank: int
    in_size: Pair
    out_size: Pair
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    itemsize: int

    def axes(self, transposed: bool) -> list[Axis]:
        geometry = zip(self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return [axis(*each, transposed) for each in geometry]


@dataclass(frozen=True)
class Packing:
    """Sizes of the packed weights: pointwise (blocks, ranks, rows, depth), depthwise (groups, ranks, taps, columns)."""

    blocks: int
    ranks: int
    rows: int
    depth: int
    groups: int
    columns: int
    taps: int

    @property
    def sizes(self) -> Pair:
        pointwise = self.blocks * self.ranks * self.rows * self.depth
        return pointwise, self.groups * self.ranks * self.taps * self.columns


@dataclass(frozen=True)
class Plan:
    """What a launch needs to know; `options` are the kernel's constants, warps and stages."""

    tile: tuple[int, int, int]  # images, rows and columns of pixels (of a phase)
    tiles: tuple[int, int, int]  # all of them; in a column; in a row
    blocks: int  # of output channels
    shares: int  # programs that share the tiles of a block
    packing: Packing
    scratch: int  # elements of z a program
    options: dict[str, int]


def _powers(least: int, most: int) -> list[int]:
    return [1 << i for i in range(least.bit_length() - 1, most.bit_length())]


def _columns(columns: int, most: int) -> Pair:
    """(main, rest): columns of the two accumulators that sweep `columns` in whole passes, the widest within `most`."""
    powers = _powers(16, MAX_COLUMNS)
    pairs = [(a, b) for a in powers for b in (0, *powers) if a >= b and a + b <= most and columns % (a + b) == 0]
    return max(pairs, key=lambda pair: (sum(pair), pair[0]), default=(16, 0))


def _tile_count(work: Depthwise, size: Pair, tile: tuple[int, int, int]) -> tuple[int, int, int]:
    rows, columns = math.ceil(size[0] / tile[1]), math.ceil(size[1] / tile[2])
    return math.ceil(work.batch / tile[0]) * rows * columns, rows, columns


def _constants(axes: list[Axis], work: Depthwise, tile: tuple[int, int, int], *names: str) -> dict[str, int]:
    """The kernels' constants of both axes."""
    per_axis = {
        "STRIDE": [a.stride for a in axes], "GRID": [a.grid for a in axes], "ORIGIN": [a.origin for a in axes],
        "STEP": [a.step for a in axes], "PHASES": [a.phases for a in axes], "LEAD": [a.lead for a in axes],
        "EVERY": [a.every for a in axes], "HALO": [a.halo(t) for a, t in zip(axes, tile[1:], strict=True)],
        "TILE": tile[1:], "KERNEL": work.kernel, "DILATION": work.dilation,
    }  # fmt: skip
    return {f"{name}_{letter}": per_axis[name][i] for name in names for i, letter in enumerate("HW")}


def _warps(sums: int) -> int:
    return 4 if sums <= MAX_SUMS // 2 else 8


def _unroll(taps: int, elements: int, itemsize: int, warps: int) -> int:
    """Taps of one step of a loop: what divides all of them, and whose loads fit registers."""
    registers = -(-elements * itemsize // (4 * 32 * warps))
    return max(n for n in range(1, 10) if taps % n == 0 and (n == 1 or n * registers <= FLIGHT))


@lru_cache(maxsize=4096)
def plan(work: Depthwise, processors: int, unit: str) -> Plan:
    """Of the forward pass and the depthwise factor's gradient: the blocks of least cost that fit registers and caches.

    unit: what multiplies: "wgmma" (Hopper, 16 bits or TF32), "mma" (other tensor cores) or "fma" (float32 as it is).
    """
    axes, taps = work.axes(False), work.kernel[0] * work.kernel[1]
    sums = MAX_SUMS // (4 if unit == "fma" else 1)  # the operands of scalar units are in registers too
    longest = (128 if unit == "wgmma" else 64) // work.itemsize
    depth = min(longest, block_of(work.channels))
    channels = -(-work.channels // depth) * depth

    def parts(tile: tuple[int, int, int], block_o: int) -> tuple[int, int, int, Pair]:
        """Points of the halo, of them in a block, ranks of a group, and columns of the accumulators."""
        halo = tile[0] * axes[0].halo(tile[1]) * axes[1].halo(tile[2])
        most = max(1, min(work.rank, SCRATCH // (halo * block_o * work.itemsize)))
        group = math.ceil(work.rank / math.ceil(work.rank / most))
        columns = _columns(group * block_o, MAX_COLUMNS)
        # Between two groups the output's sums stay in registers beside those of z.
        most = sums // sum(columns) // (1 if group == work.rank else 2)
        return halo, min(128, block_of(halo), _floor(most)), group, columns

    def cost(tile: tuple[int, int, int], pixels: int, block_o: int) -> tuple[float, int]:
        halo, rows, group, columns = parts(tile, block_o)
        points, blocks = -(-halo // rows) * rows, -(-work.outs // block_o)
        count = _tile_count(work, work.out_size, tile)[0] * blocks
        width = work.rank * block_o
        arithmetic = points * channels * width * PRODUCT[unit] * (1 if rows >= 64 else 2)
        cached = halo * group * block_o * work.itemsize <= SCRATCH
        arithmetic += pixels * width * taps * TAP * (1 if cached else 3)
        steps = points // rows * -(-width // sum(columns)) * channels // depth + work.rank * taps
        # The same points for other output channels come from the second-level cache.
        moved = halo * work.channels * (1 + (blocks - 1) / 3) / blocks + width * (channels + 2 * taps)
        moved += tile[0] * tile[1] * tile[2] * block_o
        busy = math.ceil(count / processors) * (arithmetic + STEP * steps)
        return busy + max(count / processors, 0.4) * MOVE * moved, -pixels

    choices = [
        (tile, pixels, block_o)
        for pixels in (16, 32, 64, 128)
        for block_o in _powers(16, min(MAX_COLUMNS, block_of(work.outs)))
        if pixels * block_o <= sums
        for tile in tiles_of(work.out_size, work.batch, pixels)
        if tile == (1, 1, 1) or tile[0] * axes[0].halo(tile[1]) * axes[1].halo(tile[2]) <= MAX_HALO
        if parts(tile, block_o)[2] == work.rank or 2 * pixels * block_o <= sums
    ]
    tile, pixels, block_o = min(choices, key=lambda choice: cost(*choice))
    halo, rows, group, (main, rest) = parts(tile, block_o)
    tiles, blocks = _tile_count(work, work.out_size, tile), -(-work.outs // block_o)
    scalar, whole = unit == "fma", group == work.rank
    warps = _warps(max(rows * (main + rest), pixels * block_o)) if whole and not scalar else 8
    step = (rows + main + rest) * depth * work.itemsize
    names = ("KERNEL", "TILE", "HALO", "STRIDE", "GRID", "ORIGIN", "STEP")
    return Plan(
        tile=tile,
        tiles=tiles,
        blocks=blocks,
        shares=min(tiles[0], -(-PROGRAMS * processors // blocks)),
        packing=Packing(blocks, -(-work.rank // group) * group, block_o, channels, blocks, block_o, taps),
        scratch=-(-halo // rows) * rows * group * block_o,
        options={
            **_constants(axes, work, tile, *names),
            "TILE_N": tile[0], "GROUP": group, "GROUPS": -(-work.rank // group), "MAIN": main, "REST": rest,
            "ROWS": rows, "PIXELS": pixels, "DEPTH": depth, "BLOCK_O": block_o,
            "UNROLL": _unroll(taps, pixels * block_o, work.itemsize, warps),
            "num_warps": warps, "num_stages": 3 if whole and not scalar and 3 * step <= SHARED else 2,
            # Without it the assembler spills, to make room for more programs on a processor than there are.
            **({"maxnreg": 255} if scalar or (unit == "mma" and not whole) else {}),
        },
    )  # fmt: skip


def _floor(size: int) -> int:
    """The greatest power of two, at least 16, within `size`."""
    return max(16, 1 << (size.bit_length() - 1))


@lru_cache(maxsize=4096)
def input_plan(work: Depthwise, processors: int, unit: str) -> Plan:
    """Of the input's gradient, which is written in blocks of the input's channels; `unit` as in `plan`."""
    axes, taps = work.axes(True), work.kernel[0] * work.kernel[1]
    phases = axes[0].phases * axes[1].phases
    size = math.ceil(work.in_size[0] / axes[0].phases), math.ceil(work.in_size[1] / axes[1].phases)
    longest = (128 if unit == "wgmma" else 64) // work.itemsize
    depth = min(longest, block_of(work.outs))
    outs = -(-work.outs // depth) * depth
    sums = MAX_SUMS if unit == "fma" else 2 * MAX_SUMS

    def cost(tile: tuple[int, int, int], pixels: int, block_i: int) -> tuple[float, int]:
        blocks = -(-work.channels // block_i)
        count = _tile_count(work, size, tile)[0] * blocks * phases
        arithmetic = pixels * work.rank * outs * block_i * PRODUCT[unit] * (1 if pixels >= 64 else 2)
        arithmetic += pixels * work.rank * outs * taps / phases * TAP
        steps = work.rank * outs // depth * (1 + taps / phases)
        halo = tile[0] * axes[0].halo(tile[1]) * axes[1].halo(tile[2])
        moved = halo * work.outs * (1 + (blocks - 1) / 3) / blocks + work.rank * outs * (block_i + 2 * taps)
        moved += tile[0] * tile[1] * tile[2] * block_i
        busy = math.ceil(count / processors) * (arithmetic + STEP * steps)
        return busy + max(count / processors, 0.4) * MOVE * moved, -pixels

    choices: Iterator[tuple[tuple[int, int, int], int, int]] = (
        (tile, pixels, block_i)
        for pixels in (16, 32, 64, 128)
        for block_i in _powers(16, min(2 * MAX_COLUMNS, block_of(work.channels)))
        if pixels * block_i <= sums
        for tile in tiles_of(size, work.batch, pixels)
    )
    tile, pixels, block_i = min(choices, key=lambda choice: cost(*choice))
    blocks = -(-work.channels // block_i)
    names = ("KERNEL", "TILE", "ORIGIN", "STEP", "PHASES", "LEAD", "DILATION", "EVERY")
    return Plan(
        tile=tile,
        tiles=_tile_count(work, size, tile),
        blocks=blocks,
        shares=_tile_count(work, size, tile)[0] * phases,
        packing=Packing(blocks * block_i, work.rank, 1, outs, 1, outs, taps),
        scratch=0,
        options={
            **_constants(axes, work, tile, *names),
            "TILE_N": tile[0], "PIXELS": pixels, "DEPTH": depth, "BLOCK_I": block_i,
            "num_warps": _warps(pixels * (block_i + depth) // (1 if unit == "fma" else 2)), "num_stages": 2,
        },
    )  # fmt: skip
