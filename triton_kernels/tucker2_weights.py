"""Triton kernels of the Tucker-2 factors' gradients: z1 as a whole map, and products of two maps over their pixels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrank.triton_kernels.common import dot, pixel_pointers, project_points
from fastrank.triton_kernels.tucker2_plan import Pair, Plan, Products, products

SUM_BLOCK = 256


@triton.jit(do_not_specialize=["pixels", "height", "width", "rank"])
def project_kernel(
    x, packed, out, pixels, height, width, channels, padded_channels, rank, x_n, x_c, x_h, x_w,
    MAIN_1: tl.constexpr, REST_1: tl.constexpr, PASSES_1: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    TF32: tl.constexpr,
):  # fmt: skip
    """z1 (pixels, R1) of a block of pixels, in x's dtype; the columns that pad R1 are zero."""
    PADDED_1: tl.constexpr = (MAIN_1 + REST_1) * PASSES_1
    pixel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = pixel < pixels
    points = pixel_pointers(x, pixel // (height * width), pixel // width % height, pixel % width, x_n, x_h, x_w)
    place = out + pixel.to(tl.int64)[:, None] * PADDED_1
    for column in range(0, PADDED_1, MAIN_1 + REST_1):
        total, more, main, rest = project_points(
            points, inside, packed, channels, padded_channels, x_c, rank, column, MAIN_1, REST_1, DEPTH, ROWS, TF32
        )
        tl.store(place + main[None, :], total.to(x.dtype.element_ty), inside[:, None])
        if REST_1:
            tl.store(place + rest[None, :], more.to(x.dtype.element_ty), inside[:, None])


@triton.jit(do_not_specialize=["pixels", "share", "a_height", "a_width", "b_height", "b_width", "tiles_b"])
def products_kernel(
    a, b, partials, pixels, share, a_channels, b_channels, a_height, a_width, b_height, b_width, tiles_b,
    a_n, a_c, a_h, a_w, b_n, b_c, b_h, b_w,
    KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, DEPTH: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    """partials[z, tap] = Σ a[:, pixel] · b[:, what the tap meets at that pixel]ᵀ over the z-th share of a's pixels."""
    tile, tap, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tile // tiles_b * BLOCK_A + tl.arange(0, BLOCK_A)
    column = tile % tiles_b * BLOCK_B + tl.arange(0, BLOCK_B)
    a_columns, b_columns = a + row.to(tl.int64)[None, :] * a_c, b + column.to(tl.int64)[None, :] * b_c
    shift_h = tap // KERNEL_W * DILATION_H - PADDING_H
    shift_w = tap % KERNEL_W * DILATION_W - PADDING_W
    total = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    for start in range(split * share, tl.minimum(split * share + share, pixels), DEPTH):
        pixel = start + tl.arange(0, DEPTH)
        n, h, w = pixel // (a_height * a_width), pixel // a_width % a_height, pixel % a_width
        inside = pixel < pixels
        left = tl.load(pixel_pointers(a_columns, n[:, None], h[:, None], w[:, None], a_n, a_h, a_w),
                       inside[:, None] & (row < a_channels)[None, :], 0.0)  # fmt: skip
        h, w = h * STRIDE_H + shift_h, w * STRIDE_W + shift_w
        inside = inside & (h >= 0) & (h < b_height) & (w >= 0) & (w < b_width)
        right = tl.load(pixel_pointers(b_columns, n[:, None], h[:, None], w[:, None], b_n, b_h, b_w),
                        inside[:, None] & (column < b_channels)[None, :], 0.0)  # fmt: skip
        total = dot(tl.trans(left), right, total, TF32)
    # Shares and taps of whole tiles; offsets of one fit 32 bits.
    size = tl.num_programs(0) * (BLOCK_A * BLOCK_B)
    place = partials + (split * tl.num_programs(1) + tap).to(tl.int64) * size
    tl.store(place + row[:, None] * (tiles_b * BLOCK_B) + column[None, :], total)


@triton.jit(do_not_specialize=["splits", "split_size", "taps", "tap_size", "columns", "padded_columns", "size"])
def sum_kernel(
    partials, out, splits, split_size, taps, tap_size, columns, padded_columns, size, BLOCK: tl.constexpr
):  # fmt: skip
    """out (A, B, taps) = Σ partials (splits, taps, padded A, padded B) over the splits, in their order."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tap, column, row = i % taps, i // taps % columns, i // taps // columns
    place = partials + tap.to(tl.int64) * tap_size + row.to(tl.int64) * padded_columns + column
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(splits):
        total += tl.load(place, i < size, 0.0)
        place += split_size
    tl.store(out + i, total.to(out.dtype.element_ty), i < size)


def project(x: Tensor, packed: Tensor, rank: int, sizes: Plan, tf32: bool) -> Tensor:
    """z1 as a channels-last map (N, padded R1, H, W); packed: what `tucker2.pack` made for a convolution of x."""
    out = torch.empty(x.shape[0], x.shape[2], x.shape[3], sizes.ranks[0], dtype=x.dtype, device=x.device)
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    names = ("MAIN_1", "REST_1", "PASSES_1", "ROWS", "DEPTH", "num_warps", "num_stages")
    project_kernel[(triton.cdiv(pixels, sizes.options["ROWS"]),)](
        x, packed, out, pixels, x.shape[2], x.shape[3], x.shape[1], sizes.channels, rank, *x.stride(),
        TF32=tf32, **{name: sizes.options[name] for name in names},
    )  # fmt: skip
    return out.permute(0, 3, 1, 2)


def weight_gradient(
    a: Tensor, b: Tensor, out: Tensor, kernel: Pair, geometry: tuple[Pair, Pair, Pair], sizes: Products, tf32: bool
) -> None:
    """out (A, B, kh · kw), contiguous: the gradient of a convolution's kernel; a is that of its output, b its input.

    a (N, A, H', W') and b (N, B, H, W) of any strides; they may have more channels than out, which are left out.
    geometry: stride, padding, dilation. The sums are taken in one order: the same bits every time.
    """
    pixels, taps = a.shape[0] * a.shape[2] * a.shape[3], kernel[0] * kernel[1]
    (stride_h, stride_w), (padding_h, padding_w), (dilation_h, dilation_w) = geometry
    partials = torch.empty(sizes.splits, taps, *sizes.padded, dtype=torch.float32, device=a.device)
    products_kernel[(sizes.tiles[0] * sizes.tiles[1], taps, sizes.splits)](
        a, b, partials, pixels, sizes.share, a.shape[1], b.shape[1], *a.shape[2:], *b.shape[2:], sizes.tiles[1],
        *a.stride(), *b.stride(), kernel[1], stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
        TF32=tf32, **sizes.options,
    )  # fmt: skip
    sum_kernel[(triton.cdiv(out.numel(), SUM_BLOCK),)](
        partials, out, sizes.splits, partials.stride(0), taps, partials.stride(1), out.shape[1], sizes.padded[1],
        out.numel(), SUM_BLOCK,
    )  # fmt: skip


# What the launchers can launch, for offline compilation: kernel, pointers to elements of the tensors' dtype, other
# arguments, the sets of constants, and the integers that are often multiples of 16 (compiled both ways).
_STRIDES = [f"{name}_{letter}" for name in "abx" for letter in "nchw"]
_SIZES = [
    "pixels", "height", "width", "channels", "padded_channels", "rank", "share", "a_channels", "b_channels",
    "a_height", "a_width", "b_height", "b_width", "tiles_b", "splits", "taps", "tap_size", "columns",
    "padded_columns", "size",
]  # fmt: skip
_ALL = {**dict.fromkeys((*_SIZES, *_STRIDES), "i32"), "split_size": "i64", "partials": "*fp32"}
_UNITS = [("fp16", "wgmma"), ("bf16", "wgmma"), ("fp32", "wgmma"), ("fp16", "mma"), ("fp32", "mma"), ("fp32", "fma")]
_GEOMETRY = {
    **{f"{name}_{letter}": 1 for name in ("STRIDE", "PADDING", "DILATION") for letter in "HW"},
    "KERNEL_W": 3, "a_c": 1, "b_c": 1,
}  # fmt: skip
_PRODUCTS = [
    {
        **_GEOMETRY, "TF32": int(unit != "fma"), "DTYPES": (dtype,), "LEAST": 90 if unit == "wgmma" else 0,
        **products((channels, channels), 9, 1 << 16, 4 if dtype == "fp32" else 2, 132, unit).options,
    }
    for dtype, unit in _UNITS
    for channels in (32, 512)
]  # fmt: skip
_PROJECTIONS = [
    {"MAIN_1": 128, "REST_1": 32, "PASSES_1": 1, "ROWS": 64, "DEPTH": depth, "x_c": 1, "TF32": tf32,
     "num_warps": 8, "num_stages": 3, "DTYPES": dtypes, "LEAST": least}
    for depth, tf32, dtypes, least in (
        (64, 1, ("fp16", "bf16"), 90), (32, 1, ("fp32",), 90), (32, 1, ("fp16",), 0), (16, 1, ("fp32",), 0),
        (16, 0, ("fp32",), 0),
    )
]  # fmt: skip
KERNELS = [
    (project_kernel, ("x", "packed", "out"), _ALL, _PROJECTIONS, ("channels", "padded_channels", "x_n", "x_h", "x_w")),
    (
        products_kernel,
        ("a", "b"),
        _ALL,
        _PRODUCTS,
        ("a_channels", "b_channels", "a_n", "a_h", "a_w", "b_n", "b_h", "b_w"),
    ),
    (sum_kernel, ("out",), _ALL, [{"BLOCK": SUM_BLOCK}], ()),
]
