"""What the fused convolutions in Triton share: products, pointers to pixels, the projection of points, the epilogue."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot(a, b, total, TF32: tl.constexpr):
    if TF32:
        return tl.dot(a, b, total, input_precision="tf32")
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def pixel_pointers(base, n, h, w, n_stride, h_stride, w_stride):
    """Pointers to channel 0 of pixels. A tensor may have more than 2**31 elements, an axis may not."""
    return base + (n.to(tl.int64) * n_stride + h.to(tl.int64) * h_stride + w.to(tl.int64) * w_stride)


@triton.jit
def tile_pixels(TILE_N: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, PIXELS: tl.constexpr):
    """Whether each of a block's rows is a pixel of the tile, and that pixel's image, row and column (else pixel 0)."""
    row = tl.arange(0, PIXELS)
    in_tile = row < TILE_N * TILE_H * TILE_W
    row = tl.where(in_tile, row, 0)
    return in_tile, row // (TILE_H * TILE_W), row // TILE_W % TILE_H, row % TILE_W


@triton.jit
def project_points(
    points, inside, weights, channels, padded_channels, channel_stride, rank, column,
    MAIN: tl.constexpr, REST: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    """Columns of z1 from `column` on, MAIN and REST of them, of ROWS points (pointers to channel 0)."""
    main = column + tl.arange(0, MAIN)
    total, rest = tl.zeros((ROWS, MAIN), tl.float32), main
    more = total
    if REST:
        rest = column + MAIN + tl.arange(0, REST)
        more = tl.zeros((ROWS, REST), tl.float32)
    for start in range(0, padded_channels, DEPTH):
        channel = start + tl.arange(0, DEPTH)
        mask = inside[:, None] & (channel < channels)[None, :]
        a = tl.load(points[:, None] + channel.to(tl.int64)[None, :] * channel_stride, mask, 0.0)
        total = dot(a, tl.load(weights + channel[:, None] + main[None, :] * padded_channels), total, TF32)
        if REST:
            more = dot(a, tl.load(weights + channel[:, None] + rest[None, :] * padded_channels), more, TF32)
    # Zeros in the padding would not do: their product with an infinite entry is no zero.
    total = tl.where(inside[:, None] & (main < rank)[None, :], total, 0.0)
    if REST:
        more = tl.where(inside[:, None] & (rest < rank)[None, :], more, 0.0)
    return total, more, main, rest


@triton.jit
def finish_tile(
    y, o, inside, outs, bias, residual, out, out_c, residual_c,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Store activation(y + bias + residual) to columns o; residual and out are pointers to the rows' channel 0."""
    mask, place = inside[:, None] & (o < outs)[None, :], o.to(tl.int64)[None, :]
    if BIAS:
        y += tl.load(bias + o, o < outs, 0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        y += tl.load(residual[:, None] + place * residual_c, mask, 0.0).to(tl.float32)
    if ACTIVATION == 1:
        y = tl.where(y < 0.0, 0.0, y)  # keeps NaN, as torch does
    elif ACTIVATION == 2:
        y = y * tl.sigmoid(y)
    tl.store(out[:, None] + place * out_c, y.to(out.dtype.element_ty), mask)


@triton.jit
def phase_taps(
    phase, KERNEL: tl.constexpr, PHASES: tl.constexpr, LEAD: tl.constexpr, DILATION: tl.constexpr, EVERY: tl.constexpr
):
    """The taps that meet a phase, every EVERY-th: the first, how many, and the first one's place in the halo."""
    if PHASES == 1:
        return 0, KERNEL, LEAD
    first = KERNEL
    for tap in tl.static_range(EVERY):
        first = tl.where((phase + LEAD - tap * DILATION) % PHASES == 0, tap, first)
    return first, (KERNEL - first + EVERY - 1) // EVERY, (phase + LEAD - first * DILATION) // PHASES
