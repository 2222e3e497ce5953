"""Triton kernels of the pointwise → depthwise → sum-over-R convolution in one launch, and of its input's gradient.

A program walks over tiles of the output, for one block of output channels. It projects the points that a tile reads,
halo included, onto all paths of its channels (z, into scratch memory of its own, small enough for the first-level
cache: Triton has no shifted view of shared memory), and adds up shifted rows of z times the depthwise weights.

Letters: `pointwise` (R, O, I) and the depthwise weights (R, O, kh, kw), or (R, O, kh) and (R, O, kw), whose products
those are. Packed they are float32; z is rounded to the dtype of x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrank.triton_kernels.common import dot, finish_tile, phase_taps, pixel_pointers, project_points, tile_pixels
from fastrank.triton_kernels.depthwise_plan import Depthwise, Packing, Plan, input_plan, plan

PACK_BLOCK = 1024


@triton.jit
def depthwise_pack_kernel(
    pointwise, first, second, packed, taps_packed, rank, rows, depth, outs, size, taps_size,
    point_r, point_o, point_i, first_r, first_o, first_h, first_w, second_r, second_o, second_w,
    RANKS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr, TAPS: tl.constexpr,
    KERNEL_W: tl.constexpr, SEPARABLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """pointwise as (blocks, RANKS, ROWS, DEPTH), then the depthwise weights as (groups, RANKS, TAPS, COLUMNS).

    Zeros in the padding: loops need no masks. `rows` and `depth` are the sizes of pointwise along o and i, or swapped.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k, row, r = i % DEPTH, i // DEPTH % ROWS + i // (DEPTH * ROWS * RANKS) * ROWS, i // (DEPTH * ROWS) % RANKS
    mask = (i < size) & (r < rank) & (row < rows) & (k < depth)
    place = r.to(tl.int64) * point_r + row.to(tl.int64) * point_o + k.to(tl.int64) * point_i
    tl.store(packed + i, tl.load(pointwise + place, mask, 0.0), i < size)
    i -= size
    o, tap, r = (
        i % COLUMNS + i // (COLUMNS * TAPS * RANKS) * COLUMNS,
        i // COLUMNS % TAPS,
        i // (COLUMNS * TAPS) % RANKS,
    )
    inside = (i >= 0) & (i < taps_size)
    mask = inside & (r < rank) & (o < outs)
    h, w = (tap // KERNEL_W).to(tl.int64), (tap % KERNEL_W).to(tl.int64)
    r, o = r.to(tl.int64), o.to(tl.int64)
    value = tl.load(first + (r * first_r + o * first_o + h * first_h + w * first_w), mask, 0.0).to(tl.float32)
    if SEPARABLE:
        value *= tl.load(second + (r * second_r + o * second_o + w * second_w), mask, 0.0).to(tl.float32)
    tl.store(taps_packed + i, value, inside)


@triton.jit
def _fill(
    x, weights, z, columns, tile_n, tile_h, tile_w, batch, channels, in_h, in_w, x_n, x_c, x_h, x_w, padded_channels,
    TILE_N: tl.constexpr, HALO_H: tl.constexpr, HALO_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    GRID_H: tl.constexpr, GRID_W: tl.constexpr, ORIGIN_H: tl.constexpr, ORIGIN_W: tl.constexpr,
    WIDTH: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    TF32: tl.constexpr,
):  # fmt: skip
    """z of the halo of a tile: its points times `columns` rows of the weights; then everyone sees it."""
    HALO: tl.constexpr = TILE_N * HALO_H * HALO_W
    for start in range(0, HALO, ROWS):
        point = start + tl.arange(0, ROWS)
        n = tile_n + point // (HALO_H * HALO_W)
        h = (tile_h * STRIDE_H + point // HALO_W % HALO_H) * GRID_H + ORIGIN_H
        w = (tile_w * STRIDE_W + point % HALO_W) * GRID_W + ORIGIN_W
        inside = (point < HALO) & (n < batch) & (h >= 0) & (h < in_h) & (w >= 0) & (w < in_w)
        points = pixel_pointers(x, n, h, w, x_n, x_h, x_w)
        for column in range(0, columns, MAIN + REST):
            total, more, main, rest = project_points(
                points, inside, weights, channels, padded_channels, x_c, columns, column, MAIN, REST, DEPTH, ROWS, TF32
            )
            tl.store(z + (point[:, None] * WIDTH + main[None, :]), total.to(x.dtype.element_ty))
            if REST:
                tl.store(z + (point[:, None] * WIDTH + rest[None, :]), more.to(x.dtype.element_ty))
    tl.debug_barrier()


@triton.jit(do_not_specialize=["batch", "in_h", "in_w", "out_h", "out_w", "tiles", "tiles_h", "tiles_w", "rank"])
def depthwise_kernel(
    x, packed, depthwise, bias, residual, out, scratch,
    batch, channels, padded_channels, rank, outs, in_h, in_w, out_h, out_w,
    tiles, tiles_h, tiles_w, x_n, x_c, x_h, x_w, residual_n, residual_c, residual_h, residual_w,
    out_n, out_c, out_y, out_x,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, TILE_N: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    HALO_H: tl.constexpr, HALO_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    GRID_H: tl.constexpr, GRID_W: tl.constexpr, ORIGIN_H: tl.constexpr, ORIGIN_W: tl.constexpr,
    STEP_H: tl.constexpr, STEP_W: tl.constexpr,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    ROWS: tl.constexpr, PIXELS: tl.constexpr, DEPTH: tl.constexpr, BLOCK_O: tl.constexpr, UNROLL: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    """Tiles of out = activation(Σ_r depthwise_r(pointwise_r(x)) + bias + residual), BLOCK_O channels of it.

    Along an axis, pixel j of a tile reads the points STRIDE · j + STEP · tap of the halo. Point i of the halo of a tile
    from j on is the input's (STRIDE · j + i) · GRID + ORIGIN. z is made for GROUP paths at a time.
    """
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    WIDTH: tl.constexpr = GROUP * BLOCK_O
    HALO_ROWS: tl.constexpr = (TILE_N * HALO_H * HALO_W + ROWS - 1) // ROWS * ROWS
    block = tl.program_id(0)
    z = scratch + (tl.program_id(1) * tl.num_programs(0) + block).to(tl.int64) * (HALO_ROWS * WIDTH)
    packed += block * (GROUPS * WIDTH) * padded_channels
    depthwise += block * (GROUPS * WIDTH * TAPS)
    column = tl.arange(0, BLOCK_O)
    o = block * BLOCK_O + column

    # Without hoisting: what all loops of a tile need would be in registers at once.
    for tile in tl.range(tl.program_id(1), tiles, tl.num_programs(1), disable_licm=True):
        tile_w, tile_h = tile % tiles_w * TILE_W, tile // tiles_w % tiles_h * TILE_H
        tile_n = tile // (tiles_w * tiles_h) * TILE_N
        y = tl.zeros((PIXELS, BLOCK_O), tl.float32)
        for group in tl.range(0, GROUPS, disable_licm=True):
            paths = tl.minimum(rank - group * GROUP, GROUP)
            _fill(
                x, packed + group * WIDTH * padded_channels, z, paths * BLOCK_O, tile_n, tile_h, tile_w,
                batch, channels, in_h, in_w, x_n, x_c, x_h, x_w, padded_channels,
                TILE_N, HALO_H, HALO_W, STRIDE_H, STRIDE_W, GRID_H, GRID_W, ORIGIN_H, ORIGIN_W,
                WIDTH, MAIN, REST, ROWS, DEPTH, TF32,
            )  # fmt: skip
            in_tile, n, h, w = tile_pixels(TILE_N, TILE_H, TILE_W, PIXELS)
            z_rows = ((n * HALO_H + h * STRIDE_H) * HALO_W + w * STRIDE_W) * WIDTH
            z_rows = z + (z_rows[:, None] + column[None, :])
            for path in tl.range(0, paths, disable_licm=True):
                for tap in tl.range(0, TAPS, loop_unroll_factor=UNROLL):
                    shift = tap // KERNEL_W * (STEP_H * HALO_W) + tap % KERNEL_W * STEP_W
                    shifted = tl.load(z_rows + (shift * WIDTH + path * BLOCK_O)).to(tl.float32)
                    weight = tl.load(depthwise + (((group * GROUP + path) * TAPS + tap) * BLOCK_O + column))
                    y += shifted * weight[None, :]
            tl.debug_barrier()
        in_tile, n, h, w = tile_pixels(TILE_N, TILE_H, TILE_W, PIXELS)
        n, h, w = tile_n + n, tile_h + h, tile_w + w
        inside = in_tile & (n < batch) & (h < out_h) & (w < out_w)
        outputs = pixel_pointers(out, n, h, w, out_n, out_y, out_x)
        residuals = pixel_pointers(residual, n, h, w, residual_n, residual_h, residual_w)
        finish_tile(y, o, inside, outs, bias, residuals, outputs, out_c, residual_c, BIAS, RESIDUAL, ACTIVATION)


@triton.jit(
    do_not_specialize=["batch", "grad_h", "grad_w", "in_h", "in_w", "tiles", "tiles_h", "tiles_w", "rank", "blocks"]
)
def depthwise_input_kernel(
    grad, packed, depthwise, out, middle,
    batch, outs, padded_outs, rank, channels, grad_h, grad_w, in_h, in_w, tiles, tiles_h, tiles_w, blocks,
    grad_n, grad_c, grad_y, grad_x, out_n, out_c, out_y, out_x,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, TILE_N: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    ORIGIN_H: tl.constexpr, ORIGIN_W: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr,
    PHASES_H: tl.constexpr, PHASES_W: tl.constexpr, LEAD_H: tl.constexpr, LEAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, EVERY_H: tl.constexpr, EVERY_W: tl.constexpr,
    PIXELS: tl.constexpr, DEPTH: tl.constexpr, BLOCK_I: tl.constexpr,
    OUT: tl.constexpr, MIDDLE: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    """One tile of one phase of the gradients of x (BLOCK_I channels of it) where OUT, of z (pixels, R, O) where MIDDLE.

    Along an axis, pixel j of phase a of a tile is the input's PHASES · j + a. Of the taps that meet the phase the
    first reads point j + place + ORIGIN of the output's gradient, every other one the point STEP after the one before.
    """
    block, tile = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    phase, tile = tile % (PHASES_H * PHASES_W), tile // (PHASES_H * PHASES_W)
    phase_h, phase_w = phase // PHASES_W, phase % PHASES_W
    first_h, count_h, place_h = phase_taps(phase_h, KERNEL_H, PHASES_H, LEAD_H, DILATION_H, EVERY_H)
    first_w, count_w, place_w = phase_taps(phase_w, KERNEL_W, PHASES_W, LEAD_W, DILATION_W, EVERY_W)
    in_tile, n, h, w = tile_pixels(TILE_N, TILE_H, TILE_W, PIXELS)
    n += tile // (tiles_w * tiles_h) * TILE_N
    h += tile // tiles_w % tiles_h * TILE_H
    w += tile % tiles_w * TILE_W
    in_tile = in_tile & (n < batch)
    points_h, points_w = h + (place_h + ORIGIN_H), w + (place_w + ORIGIN_W)
    h, w = h * PHASES_H + phase_h, w * PHASES_W + phase_w
    inside = in_tile & (h < in_h) & (w < in_w)
    i, depth = block * BLOCK_I + tl.arange(0, BLOCK_I), tl.arange(0, DEPTH)
    y = tl.zeros((PIXELS, BLOCK_I), tl.float32)
    for step in range(padded_outs // DEPTH * rank):
        o, r = step // rank * DEPTH + depth, step % rank
        total = tl.zeros((PIXELS, DEPTH), tl.float32)
        for tap in range(count_h * count_w):
            tap_h, tap_w = tap // count_w, tap % count_w
            point_h, point_w = points_h + tap_h * STEP_H, points_w + tap_w * STEP_W
            met = in_tile & (point_h >= 0) & (point_h < grad_h) & (point_w >= 0) & (point_w < grad_w)
            rows = pixel_pointers(grad, n, point_h, point_w, grad_n, grad_y, grad_x)
            g = tl.load(
                rows[:, None] + o.to(tl.int64)[None, :] * grad_c, met[:, None] & (o < outs)[None, :], 0.0
            )  # fmt: skip
            place = (first_h + tap_h * EVERY_H) * KERNEL_W + first_w + tap_w * EVERY_W
            weight = tl.load(depthwise + ((r * (KERNEL_H * KERNEL_W) + place) * padded_outs + o))
            total += g.to(tl.float32) * weight[None, :]
        a = total.to(grad.dtype.element_ty)
        if MIDDLE:
            # One of the programs that share the pixels writes it.
            rows = middle + ((n.to(tl.int64) * in_h + h) * in_w + w)[:, None] * (rank * outs)
            tl.store(rows + (r * outs + o)[None, :], a, (inside & (block == 0))[:, None] & (o < outs)[None, :])
        if OUT:
            b = tl.load(packed + (i[None, :] * (rank * padded_outs) + (r * padded_outs + o)[:, None]))
            y = dot(a, b, y, TF32)
    if OUT:
        outputs = pixel_pointers(out, n, h, w, out_n, out_y, out_x)
        finish_tile(y, i, inside, channels, out, outputs, outputs, out_c, out_c, False, False, 0)


def pack(
    pointwise: Tensor, depthwise: tuple[Tensor, ...], sizes: Packing, *, transposed: bool = False
) -> tuple[Tensor, Tensor]:
    """The weights in the order and padding that a kernel reads: (in their dtype, in float32).

    pointwise (R, O, I); depthwise: one tensor (R, O, kh, kw), or two, (R, O, kh) and (R, O, kw). transposed: for the
    gradient of the input, which sums over O.
    """
    rank, outs, _ = pointwise.shape
    size, taps_size = sizes.sizes
    packed = torch.empty(size, dtype=pointwise.dtype, device=pointwise.device)
    taps = torch.empty(taps_size, dtype=torch.float32, device=pointwise.device)
    points = pointwise.transpose(1, 2) if transposed else pointwise
    first, second = depthwise[0], depthwise[-1]
    separable = len(depthwise) == 2
    strides = (*first.stride(), 0) if separable else first.stride()
    depthwise_pack_kernel[(triton.cdiv(size + taps_size, PACK_BLOCK),)](
        points, first, second, packed, taps, rank, points.shape[1], points.shape[2], outs, size, taps_size,
        *points.stride(), *strides, *second.stride()[:3],
        sizes.ranks, sizes.rows, sizes.depth, sizes.columns, sizes.taps, second.shape[-1], separable, PACK_BLOCK,
    )  # fmt: skip
    return packed, taps


def convolve(
    x: Tensor,
    packed: tuple[Tensor, Tensor],
    work: Depthwise,
    sizes: Plan,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: int = 0,
    tf32: bool = False,
) -> None:
    """Write out (N, O, H', W'), of any strides. activation: 0 none, 1 ReLU, 2 SiLU. Nothing is empty."""
    scratch = torch.empty(sizes.blocks * sizes.shares * sizes.scratch, dtype=x.dtype, device=x.device)
    b, r = (x if each is None else each for each in (bias, residual))  # what is not there is not read
    depthwise_kernel[(sizes.blocks, sizes.shares)](
        x, *packed, b, r, out, scratch,
        work.batch, work.channels, sizes.packing.depth, work.rank, work.outs, *work.in_size, *work.out_size,
        *sizes.tiles, *x.stride(), *r.stride(), *out.stride(),
        BIAS=bias is not None, RESIDUAL=residual is not None, ACTIVATION=activation, TF32=tf32, **sizes.options,
    )  # fmt: skip


def input_gradient(
    grad: Tensor,
    packed: tuple[Tensor, Tensor],
    work: Depthwise,
    sizes: Plan,
    *,
    out: Tensor | None = None,
    middle: Tensor | None = None,
    tf32: bool = False,
) -> None:
    """out (N, I, H, W), of any strides, and middle (N, H, W, R · O), contiguous, the gradient of z: what is given.

    packed: transposed. sizes: an `input_plan`.
    """
    y, z = (grad if each is None else each for each in (out, middle))
    blocks = 1 if out is None else sizes.blocks
    depthwise_input_kernel[(sizes.shares * blocks,)](
        grad, *packed, y, z,
        work.batch, work.outs, sizes.packing.depth, work.rank, work.channels, *work.out_size, *work.in_size,
        *sizes.tiles, blocks, *grad.stride(), *y.stride(),
        OUT=out is not None, MIDDLE=middle is not None, TF32=tf32, **sizes.options,
    )  # fmt: skip


# What the launchers can launch, for offline compilation: see KERNELS in triton_kernels/tucker2.py.
def variant(
    channels: int, outs: int, rank: int, size: int, dtype: str, unit: str, *, transposed: bool, stride: int = 1
) -> dict:
    """The constants of a 3×3 convolution of `size`² pixels at batch 32."""
    out = ((size - 1) // stride + 1,) * 2
    work = Depthwise(
        32, channels, outs, rank, (size, size), out, (3, 3), (stride, stride), (1, 1), (1, 1),
        4 if dtype == "fp32" else 2,
    )  # fmt: skip
    made = (input_plan if transposed else plan)(work, 132, unit).options
    return {**made, "TF32": int(unit != "fma"), "DTYPES": (dtype,), "LEAST": 90 if unit == "wgmma" else 0}


_STRIDES = [f"{name}_{letter}" for name in ("x", "residual") for letter in "nchw"]
_STRIDES += [f"{name}_{letter}" for name in ("grad", "out") for letter in "ncyx"]
_SIZES = [
    "batch", "channels", "padded_channels", "rank", "outs", "padded_outs", "in_h", "in_w", "out_h", "out_w", "grad_h",
    "grad_w", "tiles", "tiles_h", "tiles_w", "blocks", "rows", "depth", "size", "taps_size",
]  # fmt: skip
_POINTS = [f"point_{a}" for a in "roi"] + [f"first_{a}" for a in "rohw"] + [f"second_{a}" for a in "row"]
ALL = {**dict.fromkeys((*_SIZES, *_STRIDES, *_POINTS), "i32"), "depthwise": "*fp32", "taps_packed": "*fp32"}
# Channels, output channels, R, size of the map, stride; with which dtypes and units.
_LAYERS = [(64, 64, 1, 56, 1), (64, 128, 2, 56, 2), (128, 128, 4, 28, 1), (256, 256, 2, 14, 1), (512, 512, 8, 7, 1)]
CASES = [
    (layer, dtype, unit)
    for dtype, unit, layers in (
        ("fp16", "wgmma", _LAYERS), ("bf16", "wgmma", _LAYERS[4:]), ("fp32", "wgmma", _LAYERS[::4]),
        ("fp16", "mma", _LAYERS[::2]), ("bf16", "mma", _LAYERS[1:2]), ("fp32", "mma", _LAYERS[4:]),
        ("fp32", "fma", _LAYERS[1::3]),
    )
    for layer in layers
]  # fmt: skip
_DENSE = {"x_c": 1, "out_c": 1, "residual_c": 1}
_FORWARD = [
    {**variant(*layer[:4], dtype, unit, transposed=False, stride=layer[4]), "BIAS": 1, "RESIDUAL": 1, "ACTIVATION": 2,
     **(_DENSE if layer[0] != 512 else {})}
    for layer, dtype, unit in CASES
]  # fmt: skip
_INPUT = [
    {**variant(*layer[:4], dtype, unit, transposed=True, stride=layer[4]), "OUT": 1, "MIDDLE": 1,
     **({"grad_c": 1, "out_c": 1} if layer[0] != 512 else {})}
    for layer, dtype, unit in CASES
]  # fmt: skip
_PACKING = {"RANKS": 4, "ROWS": 64, "DEPTH": 64, "COLUMNS": 64, "TAPS": 9, "KERNEL_W": 3, "BLOCK": PACK_BLOCK}
KERNELS = [
    (depthwise_kernel, ("x", "packed", "bias", "residual", "out", "scratch"), ALL, _FORWARD,
     ("channels", "padded_channels", "outs", *(name for name in _STRIDES if name[0] in "xro"))),
    (depthwise_input_kernel, ("grad", "packed", "out", "middle"), ALL, _INPUT,
     ("channels", "outs", "padded_outs", *(name for name in _STRIDES if name[0] in "go"))),
    (depthwise_pack_kernel, ("pointwise", "first", "second", "packed"), ALL,
     [{**_PACKING, "SEPARABLE": separable} for separable in (1, 0)], ()),
]  # fmt: skip
