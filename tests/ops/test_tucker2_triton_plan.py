"""The plan of the Triton Tucker-2 kernels: every point once, every tap where it belongs, blocks that fit; refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastrank import _backends, _native

plans = _native.triton_kernels("tucker2_plan")
small = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(0, 6), st.integers(1, 4))


@given(geometry=small, transposed=st.booleans(), tile=st.integers(1, 5), begin=st.integers(0, 3))
def test_taps_read_the_points_of_the_convolution(geometry, transposed, tile, begin):
    """What `convolution_kernel` computes along one axis, against the definition."""
    kernel, stride, padding, dilation = geometry
    axis = plans.axis(kernel, stride, padding, dilation, transposed)
    begin *= tile
    for phase in range(axis.phases):
        taps = [k for k in range(kernel) if (phase + axis.lead - k * dilation) % axis.phases == 0]
        assert taps == list(range(taps[0], kernel, axis.every)) if taps else True
        place = (phase + axis.lead - taps[0] * dilation) // axis.phases if taps else 0
        if not transposed:
            assert (taps, place) == (list(range(kernel)), 0)
        for j in range(tile):
            pixel, found = axis.phases * (begin + j) + phase, {}
            for count, tap in enumerate(taps):
                point = axis.stride * j + place + count * axis.step
                assert 0 <= point < axis.halo(tile)
                found[tap] = (axis.stride * begin + point) * axis.grid + axis.origin
            if transposed:
                reads = {k: (pixel + padding - k * dilation) for k in range(kernel)}
                assert found == {k: at // stride for k, at in reads.items() if at % stride == 0}
            else:
                assert found == {k: pixel * stride - padding + k * dilation for k in range(kernel)}


@given(rank=st.integers(1, 2000), least=st.sampled_from([16, 32]))
def test_accumulators_cover_a_rank(rank, least):
    main, rest, passes = plans.parts(rank, least)
    width = main + rest
    assert all(each & (each - 1) == 0 and each <= plans.MAX_COLUMNS for each in (main, rest))
    assert main >= max(rest, 16)
    assert (passes - 1) * width < rank <= passes * width
    assert width * passes <= 4 * rank // 3 + 32  # what the refusal of too many weights counts on


sizes = st.tuples(st.integers(1, 300), st.integers(1, 600), st.integers(1, 600))


@given(
    sizes=sizes,
    ranks=st.tuples(st.integers(1, 600), st.integers(1, 600)),
    size=st.tuples(st.integers(1, 120), st.integers(1, 120)),
    geometry=st.tuples(small, small),
    transposed=st.booleans(),
    itemsize=st.sampled_from([2, 4]),
    unit=st.sampled_from(["wgmma", "mma", "fma"]),
    processors=st.sampled_from([1, 46, 132]),
    project=st.booleans(),
    expand=st.booleans(),
)
def test_any_plan_fits(sizes, ranks, size, geometry, transposed, itemsize, unit, processors, project, expand):
    kernel, stride, padding, dilation = zip(*geometry, strict=True)
    out = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, (k, s, p, d) in zip(size, geometry, strict=True))
    if min(out) < 1:
        return
    maps = (out, size) if transposed else (size, out)
    ranks = ranks[0] if project else sizes[1], ranks[1] if expand else sizes[2]
    work = plans.Convolution(
        *sizes, ranks, *maps, kernel, stride, padding, dilation, transposed, itemsize, project, expand
    )
    plan = plans.plan(work, processors, unit)
    o, tile = plan.options, plan.tile
    assert tile[0] * tile[1] * tile[2] <= o["PIXELS"]
    assert tile[2] & (tile[2] - 1) == 0
    count = -(-sizes[0] // tile[0]) * plan.tiles[1] * plan.tiles[2]
    assert (plan.tiles[0], plan.programs) == (count, min(count, plans.PROGRAMS * processors))
    for letter, length, n, rows in zip("HW", work.out_size, plan.tiles[1:], tile[1:], strict=True):
        step = rows * o[f"PHASES_{letter}"]  # the tiles cover the map, and none lies outside
        assert (n - 1) * step < length <= n * step
    halo = tile[0] * o["HALO_H"] * o["HALO_W"]
    assert halo <= plans.MAX_HALO or tile == (1, 1, 1) or not project
    width_1, width_2 = o["MAIN_1"] + o["REST_1"], o["MAIN_2"] + o["REST_2"]
    assert plan.ranks == (width_1 * o["PASSES_1"], width_2 * o["PASSES_2"])
    z1 = -(-halo // o["ROWS"]) * o["ROWS"] * plan.ranks[0]
    assert plan.scratch == project * z1 + expand * o["PIXELS"] * plan.ranks[1]
    assert (o["PROJECT"], o["EXPAND"]) == (project, expand)
    # Every rank and channel has a column, a step or a block, and no factor that is not there takes room.
    assert all(n <= padded <= 4 * n // 3 + 32 for n, padded in zip(ranks, plan.ranks, strict=True))
    assert plan.channels >= sizes[1] * project
    assert plan.outs >= sizes[2] * expand
    first, last = plan.channels * plan.ranks[0] * project, plan.outs * plan.ranks[1] * expand
    assert plan.packed == first + kernel[0] * kernel[1] * plan.ranks[0] * plan.ranks[1] + last
    # Loops in whole steps, over sizes that the padding completes.
    assert plan.channels % o["DEPTH"] == 0
    assert plan.outs % o["BLOCK_O"] == 0
    assert all(each % o["DEPTH_1"] == 0 for each in (o["MAIN_1"], o["REST_1"]))
    assert o["BLOCK_O"] >= 16
    assert expand or o["DEPTH_2"] == 0
    assert o["DEPTH_2"] == 0 or all(each % o["DEPTH_2"] == 0 for each in (o["MAIN_2"], o["REST_2"]))
    assert min(o["DEPTH"], o["DEPTH_1"], o["DEPTH_2"] or 16) >= 8 * 2 // min(2, itemsize)
    # Blocks that registers and shared memory hold.
    threads = 32 * o["num_warps"]
    assert max(o["ROWS"] * width_1, o["PIXELS"] * max(width_2, o["BLOCK_O"])) <= 64 * max(threads, 256)
    steps = [(o["ROWS"] + width_1) * o["DEPTH"], (o["PIXELS"] + width_2) * o["DEPTH_1"]]
    steps += [(o["PIXELS"] + o["BLOCK_O"]) * o["DEPTH_2"], width_2 * o["BLOCK_O"] if not o["DEPTH_2"] else 0]
    assert max(steps) * itemsize * (o["num_stages"] - 1) <= plans.SHARED


@given(
    channels=st.tuples(st.integers(1, 1000), st.integers(1, 1000)),
    taps=st.integers(1, 49),
    pixels=st.integers(1, 10**7),
    itemsize=st.sampled_from([2, 4]),
    unit=st.sampled_from(["wgmma", "mma", "fma"]),
    processors=st.sampled_from([1, 132]),
)
def test_products_share_out_all_pixels(channels, taps, pixels, itemsize, unit, processors):
    plan = plans.products(channels, taps, pixels, itemsize, processors, unit)
    blocks = plan.options["BLOCK_A"], plan.options["BLOCK_B"]
    for size, block, tiles, padded in zip(channels, blocks, plan.tiles, plan.padded, strict=True):
        assert (tiles - 1) * block < size <= tiles * block == padded
    assert (plan.splits - 1) * plan.share < pixels <= plan.splits * plan.share
    assert plan.share % plan.options["DEPTH"] == 0
    # No more shares than it takes to keep the processors busy: they are added up afterwards.
    assert plan.splits == 1 or (plan.splits - 1) * plan.tiles[0] * plan.tiles[1] * taps < plans.PROGRAMS * processors


WORK = _backends.ConvWork(
    batch=32,
    in_channels=64,
    out_channels=64,
    size=(56, 56),
    kernel=(3, 3),
    ranks=(32, 32),
    stride=(1, 1),
    padding=(1, 1),
    dilation=(1, 1),
    channels_last=True,
    call="forward",
)
READY = _backends.Facts(
    op="tucker2_conv2d",
    device="cuda",
    dtype=torch.float16,
    interpreter=False,
    missing_triton="",
    missing_cuda="",
    missing_host="",
    work=WORK,
)


@pytest.mark.parametrize(
    ("here", "reason"),
    [
        (READY, ""),
        (replace(READY, dtype=torch.bfloat16), ""),
        (replace(READY, device="cpu", interpreter=True), ""),
        (
            replace(READY, dtype=torch.float64),
            "the Triton kernels take float32, float16 and bfloat16, not torch.float64",
        ),
        (
            replace(READY, device="cpu", interpreter=True, dtype=torch.bfloat16),
            "Triton's interpreter computes bfloat16 wrongly",
        ),
        (replace(READY, device="cpu"), "the tensor is on cpu and TRITON_INTERPRET is off"),
        (
            replace(READY, work=replace(WORK, dilation=(16, 16))),
            "the Triton kernels hold every point that a pixel's taps span, at most 1024, not 33×33",
        ),
        (
            replace(READY, work=replace(WORK, batch=1 << 20)),
            "the Triton kernels count the pixels of a batch, its padding included, in 31 bits",
        ),
        (
            replace(READY, work=replace(WORK, ranks=(20000, 20000))),
            "the Triton kernels count the weights, their padding included, in 31 bits",
        ),
    ],
)
def test_each_refusal(here, reason):
    assert _backends.explain(here)["triton"] == _backends.Verdict(reason == "", reason)
    assert "\n" not in reason
    assert _backends.TRITON_REACH == plans.MAX_REACH


@pytest.mark.parametrize(("dtype", "reason"), [(torch.float64, "float64"), (torch.bfloat16, "bfloat16 wrongly")])
def test_what_is_refused_says_so(dtype, reason):
    from fastrank.ops import tucker2_conv2d

    x, w, core = (
        torch.zeros(1, 2, 3, 3, dtype=dtype),
        torch.zeros(2, 2, dtype=dtype),
        torch.zeros(2, 2, 1, 1, dtype=dtype),
    )
    if torch.cuda.is_available():
        reason = "the tensor is on cpu" if dtype is torch.bfloat16 else reason
    with pytest.raises(ValueError, match=f"^backend='triton' cannot run tucker2_conv2d here: .*{reason}"):
        tucker2_conv2d(x, w, core, w, backend="triton")
