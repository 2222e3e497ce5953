"""Triton kernel of the depthwise weights' gradient; that of the pointwise ones is `tucker2_weights.weight_gradient`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrank.triton_kernels.common import pixel_pointers, tile_pixels
from fastrank.triton_kernels.depthwise import ALL, CASES, _fill, variant
from fastrank.triton_kernels.depthwise_plan import Depthwise, Plan
from fastrank.triton_kernels.tucker2_weights import SUM_BLOCK, sum_kernel


@triton.jit(do_not_specialize=["batch", "in_h", "in_w", "out_h", "out_w", "tiles", "tiles_h", "tiles_w", "rank"])
def depthwise_weights_kernel(
    x, packed, grad, partials, scratch,
    batch, channels, padded_channels, rank, outs, in_h, in_w, out_h, out_w, tiles, tiles_h, tiles_w,
    x_n, x_c, x_h, x_w, grad_n, grad_c, grad_y, grad_x,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, TILE_N: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    HALO_H: tl.constexpr, HALO_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    GRID_H: tl.constexpr, GRID_W: tl.constexpr, ORIGIN_H: tl.constexpr, ORIGIN_W: tl.constexpr,
    STEP_H: tl.constexpr, STEP_W: tl.constexpr,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    ROWS: tl.constexpr, PIXELS: tl.constexpr, DEPTH: tl.constexpr, BLOCK_O: tl.constexpr, UNROLL: tl.constexpr,
    TF32: tl.constexpr,
):  # fmt: skip
    """partials[share, tap, r, o] = Σ grad[o, pixel] · z[r, o, what the tap meets there] over a share of the tiles.

    Tiles, halo and z are those of `depthwise_kernel`. A share's sums are its own: the order is that of its tiles.
    """
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    WIDTH: tl.constexpr = GROUP * BLOCK_O
    HALO_ROWS: tl.constexpr = (TILE_N * HALO_H * HALO_W + ROWS - 1) // ROWS * ROWS
    block, share = tl.program_id(0), tl.program_id(1)
    z = scratch + (share * tl.num_programs(0) + block).to(tl.int64) * (HALO_ROWS * WIDTH)
    packed += block * (GROUPS * WIDTH) * padded_channels
    column = tl.arange(0, BLOCK_O)
    o = block * BLOCK_O + column
    row = tl.num_programs(0) * BLOCK_O
    partials += share.to(tl.int64) * (TAPS * rank * row)

    for tile in tl.range(share, tiles, tl.num_programs(1), disable_licm=True):
        tile_w, tile_h = tile % tiles_w * TILE_W, tile // tiles_w % tiles_h * TILE_H
        tile_n = tile // (tiles_w * tiles_h) * TILE_N
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
            n, h, w = tile_n + n, tile_h + h, tile_w + w
            inside = in_tile & (n < batch) & (h < out_h) & (w < out_w)
            rows = pixel_pointers(grad, n, h, w, grad_n, grad_y, grad_x)
            g = tl.load(rows[:, None] + o.to(tl.int64)[None, :] * grad_c, inside[:, None] & (o < outs)[None, :], 0.0)
            for step in range(paths * TAPS):
                path, tap = step // TAPS, step % TAPS
                shift = tap // KERNEL_W * (STEP_H * HALO_W) + tap % KERNEL_W * STEP_W
                # Rows that are no pixels meet zeros on both sides: zero times an infinite entry is no zero.
                shifted = tl.load(z_rows + (shift * WIDTH + path * BLOCK_O), inside[:, None], 0.0)
                place = partials + ((tap * rank + group * GROUP + path) * row + o)
                before = tl.load(place, (o >= 0) & (tile != share), 0.0)
                tl.store(place, before + tl.sum(g.to(tl.float32) * shifted.to(tl.float32), 0))
            tl.debug_barrier()


def depthwise_gradient(
    x: Tensor, packed: Tensor, grad: Tensor, out: Tensor, work: Depthwise, sizes: Plan, tf32: bool
) -> None:
    """out (R, O, kh, kw), contiguous: the gradient of the depthwise weights. packed: of pointwise, for `convolve`.

    The sums are taken in one order: the same bits every time.
    """
    taps, padded = sizes.packing.taps, sizes.blocks * sizes.packing.columns
    scratch = torch.empty(sizes.blocks * sizes.shares * sizes.scratch, dtype=x.dtype, device=x.device)
    partials = torch.empty(sizes.shares, taps, work.rank, padded, dtype=torch.float32, device=x.device)
    depthwise_weights_kernel[(sizes.blocks, sizes.shares)](
        x, packed, grad, partials, scratch,
        work.batch, work.channels, sizes.packing.depth, work.rank, work.outs, *work.in_size, *work.out_size,
        *sizes.tiles, *x.stride(), *grad.stride(), TF32=tf32, **sizes.options,
    )  # fmt: skip
    sum_kernel[(triton.cdiv(out.numel(), SUM_BLOCK),)](
        partials, out, sizes.shares, partials.stride(0), taps, partials.stride(1), work.outs, padded,
        out.numel(), SUM_BLOCK,
    )  # fmt: skip


KERNELS = [
    (
        depthwise_weights_kernel,
        ("x", "packed", "grad", "scratch"),
        {**ALL, "partials": "*fp32"},
        [
            {**variant(*layer[:4], dtype, unit, transposed=False, stride=layer[4]), "x_c": 1, "grad_c": 1}
            for layer, dtype, unit in CASES
        ],
        ("channels", "padded_channels", "outs", "x_n", "x_h", "x_w", "grad_n", "grad_y", "grad_x"),
    ),
]
