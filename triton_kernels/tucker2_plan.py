"""Block sizes of the Tucker-2 kernels: pure functions of a convolution's sizes and of the number of processors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

Pair = tuple[int, int]

MAX_REACH = 1024  # points that one pixel's taps may span: z1 holds all points between them
MAX_HALO = 2048  # points of a tile with its halo: z1 of all programs is to stay in the second-level cache
MAX_COLUMNS = 128  # of an accumulator
MAX_RESIDENT = 256  # bytes of a row of z2 that stay in registers
MAX_OPERAND = 16 * 1024  # bytes of a block of weights that a product with it takes at once
MAX_SUMS = 64 * 256  # float32 sums of a program: 64 of a thread, of 8 warps
SHARED = 96 * 1024  # bytes that loads under way may take: what compute capability 8.6 has, and two blocks of an H100
PROGRAMS = 2  # a processor
# Weights of the cost, in multiply-adds: an element that is moved, and a step of a loop.
MOVE, STEP = 128, 16384


@dataclass(frozen=True)
class Convolution:
    """A 1×1 → kh×kw → 1×1 convolution of (batch, channels, *in_size) to (batch, outs, *out_size), or its transpose.

    ranks is (R1, R2) in the order of use. The transpose maps from what the convolution of this geometry writes to what
    it reads. project, expand: whether the first and the last step are there; R1 is channels, R2 outs where not.
    """

    batch: int
    channels: int
    outs: int
    ranks: Pair
    in_size: Pair
    out_size: Pair
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    transposed: bool
    itemsize: int
    project: bool = True
    expand: bool = True


@dataclass(frozen=True)
class Axis:
    """How pixels, taps and points of the halo lie along one axis; `convolution_kernel` says what each number means."""

    stride: int
    grid: int
    origin: int
    step: int
    phases: int
    lead: int
    every: int
    reach: int  # points between the first and the last that one pixel of any phase reads

    def halo(self, tile: int) -> int:
        return (tile - 1) * self.stride + self.reach + 1


@dataclass(frozen=True)
class Plan:
    """What a launch needs to know; `options` are the kernel's constants, warps and stages."""

    tile: tuple[int, int, int]  # images, rows and columns of pixels (of a phase)
    tiles: tuple[int, int, int]  # all of them; in a column; in a row
    programs: int
    ranks: Pair  # padded to whole accumulators
    channels: int  # padded to whole steps of the loop
    outs: int
    packed: int  # elements of the packed weights
    scratch: int  # elements of z1 and z2 a program
    options: dict[str, int]


def axis(kernel: int, stride: int, padding: int, dilation: int, transposed: bool) -> Axis:
    """The transpose's pixel i reads points (i + padding - tap · dilation) / stride: whole ones, which pixels of one
    phase i mod stride find at every `every`-th tap. So no tap is computed in vain."""
    if transposed:
        every = stride // math.gcd(stride, dilation)
        origin = -((dilation * (kernel - 1) - padding) // stride)
        reach = (stride - 1 + padding) // stride - origin
        return Axis(1, 1, origin, -every * dilation // stride, stride, padding - stride * origin, every, reach)
    grid = math.gcd(stride, dilation) if kernel > 1 else stride
    return Axis(stride // grid, grid, -padding, dilation // grid, 1, 0, 1, (kernel - 1) * dilation // grid)


def parts(rank: int, least: int) -> tuple[int, int, int]:
    """(main, rest, passes): columns of the two accumulators, and how often they sweep to cover a rank.

    Blocks are powers of two; two of them, the second perhaps none, waste fewer columns than one.
    """
    passes = -(-rank // (2 * MAX_COLUMNS))
    share = -(-rank // passes)
    powers = [p for p in (16, 32, 64, 128) if p >= least or p >= share]
    pairs = [(a, b) for a in powers for b in (0, *powers) if a >= b and a + b >= share]
    return (*min(pairs, key=lambda pair: (sum(pair), pair[1])), passes)


def steps_of(channels: int, longest: int) -> tuple[int, int, int]:
    """Channels as `parts` of the length of a step, where the core reads them itself: whole steps waste few."""
    lengths = [length for length in (longest, longest // 2, longest // 4) if length >= 16]
    length = min(lengths, key=lambda each: -(-channels // each) * each * (1 + 16 / each))
    return length, 0, -(-channels // length)


def block_of(size: int) -> int:
    """The least power of two, at least 16, that holds `size`."""
    return max(16, 1 << (size - 1).bit_length())


def tiles_of(size: Pair, batch: int, pixels: int) -> Iterator[tuple[int, int, int]]:
    """Tiles of at most `pixels` pixels, each row a power of two; of several images only where they hold whole maps."""
    yield 1, 1, 1
    columns = 1
    while columns <= pixels:
        rows = min(size[0], pixels // columns)
        rows = -(-size[0] // -(-size[0] // rows))  # as many rows of tiles as before, evenly filled
        whole = rows == size[0] and columns >= size[1]
        yield (min(batch, pixels // (rows * columns)) if whole else 1), rows, columns
        if columns >= size[1]:
            return
        columns *= 2


@lru_cache(maxsize=4096)
def plan(work: Convolution, processors: int, unit: str) -> Plan:
    """The tile of least cost in a model of arithmetic, traffic and waves, and blocks that fit registers and memory.

    unit: what multiplies: "wgmma" (Hopper, 16 bits or TF32), "mma" (other tensor cores) or "fma" (float32 as it is).
    """
    geometry = zip(work.kernel, work.stride, work.padding, work.dilation, strict=True)
    axes = [axis(*each, work.transposed) for each in geometry]
    phases, taps = axes[0].phases * axes[1].phases, work.kernel[0] * work.kernel[1]
    size = math.ceil(work.out_size[0] / axes[0].phases), math.ceil(work.out_size[1] / axes[1].phases)
    sums = MAX_SUMS // 2 if unit == "fma" else MAX_SUMS
    longest = 128 // work.itemsize  # elements of a step: 128 bytes
    main_1, rest_1, passes_1 = parts(work.ranks[0], 32) if work.project else steps_of(work.channels, longest)
    whole = work.project and work.expand
    # z2 stays in registers as the operand of the last product where these can hold that operand as a whole.
    resident = not work.expand or work.ranks[1] * work.itemsize <= MAX_RESIDENT
    main_2, rest_2, passes_2 = parts(work.ranks[1], 16 if resident else 32)
    width_1, width_2 = main_1 + rest_1, main_2 + rest_2
    ranks = width_1 * passes_1, width_2 * passes_2
    depth, depth_1 = min(longest, block_of(work.channels)), min(longest, rest_1 or main_1)
    depth_2, columns = 0 if resident else min(longest, rest_2 or main_2), work.outs if work.expand else 1
    block_o = min(MAX_OPERAND // (main_2 * work.itemsize) if resident else MAX_COLUMNS, MAX_COLUMNS, block_of(columns))
    channels = -(-work.channels // depth) * depth if work.project else 0
    outs = -(-work.outs // block_o) * block_o if work.expand else 0
    weights = ranks[0] * channels + taps * ranks[0] * ranks[1] + ranks[1] * outs

    def rows_of(tile: tuple[int, int, int]) -> tuple[int, int]:
        """Points of the halo, and of them in a block of z1 (where there is none, what limits nothing)."""
        halo = tile[0] * axes[0].halo(tile[1]) * axes[1].halo(tile[2])
        return halo, 64 if not work.project else min(128, block_of(halo), block_of(sums // width_1 // 2 + 1))

    def cost(tile: tuple[int, int, int], pixels: int) -> tuple[float, int]:
        halo, rows = rows_of(tile)
        rows *= -(-halo // rows)
        count = math.ceil(work.batch / tile[0]) * math.ceil(size[0] / tile[1]) * math.ceil(size[1] / tile[2])
        arithmetic = rows * channels * ranks[0] + pixels * ranks[1] * (taps * ranks[0] + phases * outs)
        arithmetic *= 1 if pixels >= 64 else 2  # every fragment of the weights serves fewer rows
        steps = phases * outs // block_o + taps * passes_2 * ranks[0] // depth_1
        moved = halo * work.channels + phases * tile[0] * tile[1] * tile[2] * work.outs
        moved += weights + work.project * halo * ranks[0] + taps * passes_2 * pixels * ranks[0]
        # Memory is shared by all processors; a few of them do not reach its bandwidth.
        busy = math.ceil(count / processors) * (arithmetic + STEP * steps)
        return busy + max(count / processors, 0.4) * MOVE * moved, -pixels

    choices = [
        (tile, pixels)
        for pixels in (16, 32, 64, 128)
        if pixels * max(width_2, block_o) <= sums
        for tile in tiles_of(size, work.batch, pixels)
        if tile == (1, 1, 1) or not work.project or rows_of(tile)[0] <= MAX_HALO
    ]
    tile, pixels = min(choices, key=lambda choice: cost(*choice))
    halo, rows = rows_of(tile)
    if unit != "wgmma" or min(rows, pixels) < 64:  # the operands of a step come into registers
        depth, depth_1, depth_2 = (min(each, longest // 2) for each in (depth, depth_1, depth_2))
    # Residual and output stand beside the sums; so do the places of x's pixels where the core reads them.
    block_o = min(block_o, max(16, sums // (pixels * work.itemsize * (1 if work.project else 2))))
    warps = 4 if max(rows * width_1, pixels * max(width_2, block_o)) * work.itemsize <= sums else 8
    warps = warps if work.project or pixels < 128 else 8
    step = max((rows + width_1) * depth, (pixels + width_2) * depth_1, (pixels + block_o) * depth_2) * work.itemsize
    grid = math.ceil(size[0] / tile[1]), math.ceil(size[1] / tile[2])
    count = math.ceil(work.batch / tile[0]) * grid[0] * grid[1]
    per_axis = {
        "STRIDE": [a.stride for a in axes], "GRID": [a.grid for a in axes], "ORIGIN": [a.origin for a in axes],
        "STEP": [a.step for a in axes], "PHASES": [a.phases for a in axes], "LEAD": [a.lead for a in axes],
        "EVERY": [a.every for a in axes], "HALO": [a.halo(t) for a, t in zip(axes, tile[1:], strict=True)],
        "TILE": tile[1:], "KERNEL": work.kernel, "DILATION": work.dilation,
    }  # fmt: skip
    return Plan(
        tile=tile,
        tiles=(count, *grid),
        programs=min(count, PROGRAMS * processors),
        ranks=ranks,
        channels=channels,
        outs=outs,
        packed=weights,
        scratch=work.project * -(-halo // rows) * rows * ranks[0] + work.expand * pixels * ranks[1],
        options={
            **{f"{name}_{letter}": values[i] for name, values in per_axis.items() for i, letter in enumerate("HW")},
            "TILE_N": tile[0], "MAIN_1": main_1, "REST_1": rest_1, "PASSES_1": passes_1,
            "MAIN_2": main_2, "REST_2": rest_2, "PASSES_2": passes_2,
            "ROWS": rows, "PIXELS": pixels, "DEPTH": depth, "DEPTH_1": depth_1, "DEPTH_2": depth_2, "BLOCK_O": block_o,
            "PROJECT": int(work.project), "EXPAND": int(work.expand),
            "num_warps": warps, "num_stages": 3 if 3 * step <= SHARED and (whole or unit != "fma") else 2,
            # Left alone, the assembler takes 128 registers for some, and spills where it could have 255.
            **({} if whole or (work.project and unit == "fma") else {"maxnreg": 255}),
        },
    )  # fmt: skip


@dataclass(frozen=True)
class Products:
    """How the pixels of two maps are shared out, and the tiles of their products."""

    tiles: Pair
    padded: Pair  # channels, to whole tiles
    splits: int
    share: int  # pixels of a split
    options: dict[str, int]


@lru_cache(maxsize=4096)
def products(channels: Pair, taps: int, pixels: int, itemsize: int, processors: int, unit: str) -> Products:
    """Tiles that waste few channels, and splits enough to keep all processors busy."""
    widest = 64 if unit == "fma" else MAX_COLUMNS

    def tile(size: int) -> int:
        blocks = [block for block in (128, 64, 32, 16) if block <= widest]
        # A smaller tile reads more per product: it must save a quarter of the columns.
        return min(blocks, key=lambda block: -(-size // block) * block * (1 + 16 / block))

    block_a, block_b = tile(channels[0]), tile(channels[1])
    tiles = -(-channels[0] // block_a), -(-channels[1] // block_b)
    depth = (128 if unit == "wgmma" else 64) // itemsize
    wanted = -(-PROGRAMS * processors // (tiles[0] * tiles[1] * taps))
    share = -(-pixels // (depth * min(wanted, -(-pixels // (8 * depth))))) * depth
    return Products(
        tiles=tiles,
        padded=(tiles[0] * block_a, tiles[1] * block_b),
        splits=-(-pixels // share),
        share=share,
        options={
            "BLOCK_A": block_a, "BLOCK_B": block_b, "DEPTH": depth,
            "num_warps": 8 if block_a * block_b * itemsize > MAX_SUMS else 4, "num_stages": 3,
        },
    )  # fmt: skip
