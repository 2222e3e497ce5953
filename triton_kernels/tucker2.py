"""Triton kernels of the Tucker-2 convolution, 1×1 → kh×kw → 1×1 in one launch, and of its transpose.

A program walks over tiles of the output. It projects the points that a tile reads, halo included, onto the inner
rank (z1, into scratch memory of its own, which stays in L2: Triton has no shifted view of shared memory), convolves
them with the core (z2, which stays in registers where it is narrow), and expands the result to the output's channels.

Letters: `first` (R1, C), `core` (R2, R1, kh, kw) and `last` (O, R2) are the factors in the order of their use. The
transposed convolution, which is the gradient of the input, takes (w_outᵀ, coreᵀ, w_inᵀ) in the same places.
Without `first` the core reads x itself, without `last` z2 is the result: the channel scheme of SVDConv is kh×kw → 1×1,
and the gradient of its input 1×1 → kh×kw.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrank.triton_kernels.common import dot, finish_tile, phase_taps, pixel_pointers, project_points, tile_pixels
from fastrank.triton_kernels.tucker2_plan import Convolution, Plan, plan

PACK_BLOCK = 1024


@triton.jit
def pack_kernel(
    first, core, last, packed, channels, rank_1, rank_2, outs, padded_channels, size,
    first_r, first_c, core_r, core_s, core_h, core_w, last_o, last_r,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, PADDED_1: tl.constexpr, PADDED_2: tl.constexpr,
    PROJECT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """first (PADDED_1, padded C), core (kh kw, PADDED_2, PADDED_1), last (padded O, PADDED_2), one after the other.

    Zeros in the padding: the loops of the convolution need no masks, and rows of weights are aligned.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    core_begin = PADDED_1 * padded_channels
    last_begin = core_begin + KERNEL_H * KERNEL_W * PADDED_1 * PADDED_2
    value = tl.zeros((BLOCK,), first.dtype.element_ty)
    if PROJECT:
        r, c = i // padded_channels, i % padded_channels
        mask = (i < core_begin) & (r < rank_1) & (c < channels)
        value = tl.load(first + r.to(tl.int64) * first_r + c.to(tl.int64) * first_c, mask, 0.0)
    j = i - core_begin
    s, r, tap = j % PADDED_1, j // PADDED_1 % PADDED_2, j // (PADDED_1 * PADDED_2)
    mask = (i >= core_begin) & (i < last_begin) & (s < rank_1) & (r < rank_2)
    place = r.to(tl.int64) * core_r + s.to(tl.int64) * core_s
    place += (tap // KERNEL_W).to(tl.int64) * core_h + (tap % KERNEL_W).to(tl.int64) * core_w
    value += tl.load(core + place, mask, 0.0)
    j = i - last_begin
    o, r = j // PADDED_2, j % PADDED_2
    mask = (i >= last_begin) & (o < outs) & (r < rank_2)
    value += tl.load(last + o.to(tl.int64) * last_o + r.to(tl.int64) * last_r, mask, 0.0)
    tl.store(packed + i, value, i < size)


@triton.jit(
    do_not_specialize=[
        "batch", "in_h", "in_w", "out_h", "out_w", "tiles", "tiles_h", "tiles_w", "rank_1", "rank_2",
    ]
)  # fmt: skip
def convolution_kernel(
    x, packed, bias, residual, out, middle, scratch,
    batch, channels, padded_channels, rank_1, rank_2, outs, padded_outs, in_h, in_w, out_h, out_w,
    tiles, tiles_h, tiles_w, x_n, x_c, x_h, x_w, residual_n, residual_c, residual_h, residual_w,
    out_n, out_c, out_y, out_x,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, TILE_N: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    HALO_H: tl.constexpr, HALO_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    GRID_H: tl.constexpr, GRID_W: tl.constexpr, ORIGIN_H: tl.constexpr, ORIGIN_W: tl.constexpr,
    STEP_H: tl.constexpr, STEP_W: tl.constexpr, PHASES_H: tl.constexpr, PHASES_W: tl.constexpr,
    LEAD_H: tl.constexpr, LEAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    EVERY_H: tl.constexpr, EVERY_W: tl.constexpr,
    MAIN_1: tl.constexpr, REST_1: tl.constexpr, PASSES_1: tl.constexpr,
    MAIN_2: tl.constexpr, REST_2: tl.constexpr, PASSES_2: tl.constexpr,
    ROWS: tl.constexpr, PIXELS: tl.constexpr, DEPTH: tl.constexpr, DEPTH_1: tl.constexpr, DEPTH_2: tl.constexpr,
    BLOCK_O: tl.constexpr,
    PROJECT: tl.constexpr, EXPAND: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, OUT: tl.constexpr, MIDDLE: tl.constexpr,
    TF32: tl.constexpr,
):  # fmt: skip
    """Tiles of out = activation(convolution + bias + residual) where OUT, and of z2 (pixels, R2) where MIDDLE.

    Where not PROJECT, z1 is x and rank_1 the number of its channels. Where not EXPAND, out is z2 as it is.

    Along an axis, pixel j of phase a of a tile is the output's PHASES · j + a. Of the taps that meet the phase the
    first reads point STRIDE · j + place of the halo, every other one the point STEP after the one before. Point i of
    the halo of a tile from j on is the input's (STRIDE · j + i) · GRID + ORIGIN.
    """
    WIDTH_1: tl.constexpr = MAIN_1 + REST_1
    WIDTH_2: tl.constexpr = MAIN_2 + REST_2
    PADDED_1: tl.constexpr = WIDTH_1 * PASSES_1
    PADDED_2: tl.constexpr = WIDTH_2 * PASSES_2
    HALO: tl.constexpr = TILE_N * HALO_H * HALO_W
    HALO_ROWS: tl.constexpr = (HALO + ROWS - 1) // ROWS * ROWS if PROJECT else 0
    PIXELS_2: tl.constexpr = PIXELS if EXPAND else 0
    dtype = x.dtype.element_ty
    core = packed + PADDED_1 * padded_channels
    last = core + KERNEL_H * KERNEL_W * PADDED_1 * PADDED_2
    z1 = scratch + tl.program_id(0).to(tl.int64) * (HALO_ROWS * PADDED_1 + PIXELS_2 * PADDED_2)
    depth_1 = tl.arange(0, DEPTH_1)

    z2 = z1 + HALO_ROWS * PADDED_1 + tl.arange(0, PIXELS)[:, None] * PADDED_2

    # Without hoisting: what all loops of a tile need would be in registers at once.
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), disable_licm=True):
        tile_w, tile_h = tile % tiles_w * TILE_W, tile // tiles_w % tiles_h * TILE_H
        tile_n = tile // (tiles_w * tiles_h) * TILE_N

        if PROJECT:
            for start in range(0, HALO_ROWS, ROWS):
                point = start + tl.arange(0, ROWS)
                n = tile_n + point // (HALO_H * HALO_W)
                h = (tile_h * STRIDE_H + point // HALO_W % HALO_H) * GRID_H + ORIGIN_H
                w = (tile_w * STRIDE_W + point % HALO_W) * GRID_W + ORIGIN_W
                inside = (point < HALO) & (n < batch) & (h >= 0) & (h < in_h) & (w >= 0) & (w < in_w)
                points = pixel_pointers(x, n, h, w, x_n, x_h, x_w)
                for column in range(0, rank_1, WIDTH_1):
                    total, more, main, rest = project_points(
                        points, inside, packed, channels, padded_channels, x_c, rank_1, column,
                        MAIN_1, REST_1, DEPTH, ROWS, TF32,
                    )  # fmt: skip
                    tl.store(z1 + (point[:, None] * PADDED_1 + main[None, :]), total.to(dtype))
                    if REST_1:
                        tl.store(z1 + (point[:, None] * PADDED_1 + rest[None, :]), more.to(dtype))
            tl.debug_barrier()

        for phase in tl.range(0, PHASES_H * PHASES_W, disable_licm=True):
            phase_h, phase_w = phase // PHASES_W, phase % PHASES_W
            first_h, count_h, place_h = phase_taps(phase_h, KERNEL_H, PHASES_H, LEAD_H, DILATION_H, EVERY_H)
            first_w, count_w, place_w = phase_taps(phase_w, KERNEL_W, PHASES_W, LEAD_W, DILATION_W, EVERY_W)
            for column in tl.range(0, rank_2, WIDTH_2, disable_licm=True):
                in_tile, n, h, w = tile_pixels(TILE_N, TILE_H, TILE_W, PIXELS)
                if PROJECT:
                    z1_rows = ((n * HALO_H + h * STRIDE_H) * HALO_W + w * STRIDE_W) * PADDED_1
                    z1_rows = z1 + (z1_rows[:, None] + depth_1[None, :])
                else:
                    top = ((tile_h + h) * STRIDE_H + place_h) * GRID_H + ORIGIN_H
                    left = ((tile_w + w) * STRIDE_W + place_w) * GRID_W + ORIGIN_W
                    points = pixel_pointers(x, tile_n + n, top, left, x_n, x_h, x_w)
                    points = points[:, None] + depth_1.to(tl.int64)[None, :] * x_c
                    top = tl.where(tile_n + n < batch, top, -(2**30))  # above the map with every tap
                main = column + tl.arange(0, MAIN_2)
                total, rest = tl.zeros((PIXELS, MAIN_2), tl.float32), main
                more = total
                if REST_2:
                    rest = column + MAIN_2 + tl.arange(0, REST_2)
                    more = tl.zeros((PIXELS, REST_2), tl.float32)
                for step in range(tl.cdiv(rank_1, DEPTH_1) * count_h * count_w):
                    chunk = step // (count_h * count_w) * DEPTH_1
                    tap_h, tap_w = step // count_w % count_h, step % count_w
                    tap = (first_h + tap_h * EVERY_H) * KERNEL_W + first_w + tap_w * EVERY_W
                    if PROJECT:
                        shift = (place_h + tap_h * STEP_H) * HALO_W + place_w + tap_w * STEP_W
                        # Past the first-level cache: this program wrote them a moment ago.
                        a = tl.load(z1_rows + (shift * PADDED_1 + chunk), cache_modifier=".cg")
                    else:
                        down, right = tap_h * (STEP_H * GRID_H), tap_w * (STEP_W * GRID_W)
                        mask = (top + down >= 0) & (top + down < in_h) & (left + right >= 0) & (left + right < in_w)
                        mask = mask[:, None] & (chunk + depth_1 < channels)[None, :]
                        shift = tl.cast(down, tl.int64) * x_h + tl.cast(right, tl.int64) * x_w
                        a = tl.load(points + (shift + tl.cast(chunk, tl.int64) * x_c), mask, 0.0)
                    weights = core + (tap * (PADDED_1 * PADDED_2) + chunk)
                    b = tl.load(weights + (main[None, :] * PADDED_1 + depth_1[:, None]))
                    total = dot(a, b, total, TF32)
                    if REST_2:
                        b = tl.load(weights + (rest[None, :] * PADDED_1 + depth_1[:, None]))
                        more = dot(a, b, more, TF32)
                total = tl.where((main < rank_2)[None, :], total, 0.0).to(dtype)
                if REST_2:
                    more = tl.where((rest < rank_2)[None, :], more, 0.0).to(dtype)
                if MIDDLE or DEPTH_2 == 0:
                    n, h, w = tile_n + n, (tile_h + h) * PHASES_H + phase_h, (tile_w + w) * PHASES_W + phase_w
                    inside = in_tile & (n < batch) & (h < out_h) & (w < out_w)
                if MIDDLE:
                    place = middle + ((n.to(tl.int64) * out_h + h) * out_w + w)[:, None] * PADDED_2
                    tl.store(place + main[None, :], total, inside[:, None])
                    if REST_2:
                        tl.store(place + rest[None, :], more, inside[:, None])
                if OUT:
                    if not EXPAND:
                        outputs = pixel_pointers(out, n, h, w, out_n, out_y, out_x)
                        finish_tile(total, main, inside, outs, bias, outputs, outputs, out_c, out_c, False, False, 0)
                        if REST_2:
                            finish_tile(more, rest, inside, outs, bias, outputs, outputs, out_c, out_c, False, False, 0)
                    elif DEPTH_2 == 0:
                        outputs = pixel_pointers(out, n, h, w, out_n, out_y, out_x)
                        residuals = pixel_pointers(residual, n, h, w, residual_n, residual_h, residual_w)
                        for start in range(0, padded_outs, BLOCK_O):
                            o = start + tl.arange(0, BLOCK_O)
                            y = tl.zeros((PIXELS, BLOCK_O), tl.float32)
                            y = dot(total, tl.load(last + (o[None, :] * PADDED_2 + main[:, None])), y, TF32)
                            if REST_2:
                                y = dot(more, tl.load(last + (o[None, :] * PADDED_2 + rest[:, None])), y, TF32)
                            finish_tile(
                                y, o, inside, outs, bias, residuals, outputs, out_c, residual_c,
                                BIAS, RESIDUAL, ACTIVATION,
                            )  # fmt: skip
                    else:
                        tl.store(z2 + main[None, :], total)
                        if REST_2:
                            tl.store(z2 + rest[None, :], more)
            if OUT and DEPTH_2:
                tl.debug_barrier()
                in_tile, n, h, w = tile_pixels(TILE_N, TILE_H, TILE_W, PIXELS)
                n, h, w = tile_n + n, (tile_h + h) * PHASES_H + phase_h, (tile_w + w) * PHASES_W + phase_w
                inside = in_tile & (n < batch) & (h < out_h) & (w < out_w)
                outputs = pixel_pointers(out, n, h, w, out_n, out_y, out_x)
                residuals = pixel_pointers(residual, n, h, w, residual_n, residual_h, residual_w)
                depth_2 = tl.arange(0, DEPTH_2)
                for start in range(0, padded_outs, BLOCK_O):
                    o = start + tl.arange(0, BLOCK_O)
                    y = tl.zeros((PIXELS, BLOCK_O), tl.float32)
                    for chunk in range(0, rank_2, DEPTH_2):
                        a = tl.load(z2 + (chunk + depth_2)[None, :], cache_modifier=".cg")
                        b = tl.load(last + (o[None, :] * PADDED_2 + (chunk + depth_2)[:, None]))
                        y = dot(a, b, y, TF32)
                    finish_tile(
                        y, o, inside, outs, bias, residuals, outputs, out_c, residual_c, BIAS, RESIDUAL, ACTIVATION
                    )  # fmt: skip
                tl.debug_barrier()
        if PROJECT:
            tl.debug_barrier()


def pack(first: Tensor | None, core: Tensor, last: Tensor | None, sizes: Plan) -> Tensor:
    """The factors in the order and padding that the kernels read."""
    first, last = (core[:0, :0, 0, 0] if each is None else each for each in (first, last))
    packed = torch.empty(sizes.packed, dtype=core.dtype, device=core.device)
    pack_kernel[(triton.cdiv(sizes.packed, PACK_BLOCK),)](
        first, core, last, packed, first.shape[1], *core.shape[1::-1], last.shape[0], sizes.channels, sizes.packed,
        *first.stride(), *core.stride(), *last.stride(),
        core.shape[2], core.shape[3], *sizes.ranks, sizes.options["PROJECT"], PACK_BLOCK,
    )  # fmt: skip
    return packed


def convolve(
    x: Tensor,
    packed: Tensor,
    work: Convolution,
    sizes: Plan,
    *,
    out: Tensor | None = None,
    middle: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: int = 0,
    tf32: bool = False,
) -> None:
    """out (N, O, H', W'), of any strides, and middle (N, H', W', padded R2), contiguous: whichever is given.

    activation: 0 none, 1 ReLU, 2 SiLU. Without a last factor out has no epilogue. Nothing is empty.
    """
    scratch = torch.empty(sizes.programs * sizes.scratch, dtype=x.dtype, device=x.device)
    # What is not there is not read: x stands in for it.
    b, r, y, z = (x if each is None else each for each in (bias, residual, out, middle))
    convolution_kernel[(sizes.programs,)](
        x, packed, b, r, y, z, scratch,
        work.batch, work.channels, sizes.channels, *work.ranks, work.outs, sizes.outs, *work.in_size, *work.out_size,
        *sizes.tiles, *x.stride(), *r.stride(), *y.stride(),
        BIAS=bias is not None, RESIDUAL=residual is not None, ACTIVATION=activation, OUT=out is not None,
        MIDDLE=middle is not None, TF32=tf32, **sizes.options,
    )  # fmt: skip


# What the launchers can launch, for offline compilation: kernel, pointers to elements of the tensors' dtype, other
# arguments, the sets of constants, and the integers that are often multiples of 16 (compiled both ways).
def _variant(channels: int, outs: int, ranks: tuple[int, int], size: int, dtype: str, unit: str, **more: int) -> dict:
    """The constants of a 3×3 convolution of `size`² pixels at batch 32, its epilogue (where it has one) included."""
    transposed, stride = bool(more.get("TRANSPOSED")), more.get("STRIDE", 1)
    project, expand = more.get("PROJECT", 1), more.get("EXPAND", 1)
    sizes = [((size - 1) // stride + 1,) * 2, (size, size)]
    work = Convolution(
        32, channels, outs, ranks, sizes[not transposed], sizes[transposed], (3, 3), (stride, stride), (1, 1), (1, 1),
        transposed, 4 if dtype == "fp32" else 2, bool(project), bool(expand),
    )  # fmt: skip
    flags = {"OUT": 1, "MIDDLE": int(transposed and expand), "BIAS": expand, "RESIDUAL": expand,
             "ACTIVATION": 2 * expand, "TF32": int(unit != "fma")}  # fmt: skip
    dense = {"x_c": 1, "out_c": 1, "residual_c": 1} if more.get("CHANNELS_LAST", 1) else {}
    least = 90 if unit == "wgmma" else 0
    return {**plan(work, 132, unit).options, **flags, **dense, "DTYPES": (dtype,), "LEAST": least}


_PIXELS = ["x_n", "x_h", "x_w", "residual_n", "residual_h", "residual_w", "out_n", "out_y", "out_x"]
_SIZES = [
    "batch", "channels", "padded_channels", "rank_1", "rank_2", "outs", "padded_outs", "in_h", "in_w", "out_h", "out_w",
    "tiles", "tiles_h", "tiles_w", "size",
]  # fmt: skip
_WEIGHTS = ["first_r", "first_c", "core_r", "core_s", "core_h", "core_w", "last_o", "last_r"]
_ALL = dict.fromkeys((*_SIZES, *_PIXELS, *_WEIGHTS, "x_c", "residual_c", "out_c"), "i32")
_LAYERS = (
    (64, 64, (32, 32), 56, {}),
    (128, 128, (72, 72), 28, {}),
    (512, 256, (299, 222), 14, {"STRIDE": 2, "TRANSPOSED": 1}),
    (512, 512, (512, 512), 28, {"CHANNELS_LAST": 0}),
)
# The channel scheme of SVDConv, and the gradient of its input.
_TWO_STEPS = (
    (64, 64, (64, 40), 56, {"PROJECT": 0}),
    (512, 512, (512, 300), 14, {"PROJECT": 0, "STRIDE": 2}),
    (80, 256, (80, 72), 28, {"PROJECT": 0, "CHANNELS_LAST": 0}),
    (128, 64, (40, 64), 56, {"EXPAND": 0, "TRANSPOSED": 1}),
    (512, 512, (300, 512), 14, {"EXPAND": 0, "TRANSPOSED": 1, "STRIDE": 2}),
)
_VARIANTS = [
    _variant(*layer[:4], dtype, unit, **layer[4])
    for dtype, unit, layers in (
        ("fp16", "wgmma", _LAYERS), ("bf16", "wgmma", _LAYERS[1:2]), ("fp32", "wgmma", _LAYERS[1:]),
        ("fp16", "mma", _LAYERS), ("fp32", "mma", _LAYERS), ("fp32", "fma", _LAYERS[1:3]),
        ("fp16", "wgmma", _TWO_STEPS), ("bf16", "wgmma", _TWO_STEPS[:1]), ("fp32", "wgmma", _TWO_STEPS[1:4]),
        ("fp16", "mma", _TWO_STEPS), ("fp32", "mma", _TWO_STEPS[1:4]), ("fp32", "fma", _TWO_STEPS[1:]),
    )
    for layer in layers
]  # fmt: skip
_PACKS = [
    {"KERNEL_H": 3, "KERNEL_W": 3, "PADDED_1": 96, "PADDED_2": 80, "PROJECT": project, "BLOCK": PACK_BLOCK}
    for project in (1, 0)
]
KERNELS = [
    (convolution_kernel, ("x", "packed", "bias", "residual", "out", "middle", "scratch"), _ALL, _VARIANTS,
     ("channels", "padded_channels", "outs", "padded_outs", *_PIXELS)),
    (pack_kernel, ("first", "core", "last", "packed"), _ALL, _PACKS, ("channels", "padded_channels")),
]  # fmt: skip
