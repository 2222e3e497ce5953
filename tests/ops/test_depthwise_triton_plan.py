"""The plans of the Triton pointwise-depthwise kernels: every pixel once, blocks that fit; refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastrank import _backends, _native
from fastrank.ops import cp_conv2d

plans = _native.triton_kernels("depthwise_plan")
small = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(0, 6), st.integers(1, 4))
calls = {
    "batch": st.integers(1, 300),
    "channels": st.integers(1, 600),
    "outs": st.integers(1, 600),
    "rank": st.one_of(st.integers(1, 8), st.integers(9, 200)),
    "size": st.tuples(st.integers(1, 120), st.integers(1, 120)),
    "geometry": st.tuples(small, small),
    "itemsize": st.sampled_from([2, 4]),
}
machines = {"processors": st.sampled_from([1, 46, 132]), "unit": st.sampled_from(["wgmma", "mma", "fma"])}


def work_of(batch, channels, outs, rank, size, geometry, itemsize):
    """None where there is no output."""
    kernel, stride, padding, dilation = zip(*geometry, strict=True)
    out = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, (k, s, p, d) in zip(size, geometry, strict=True))
    if min(out) < 1:
        return None
    return plans.Depthwise(batch, channels, outs, rank, size, out, kernel, stride, padding, dilation, itemsize)


def covered(work, plan, size, phases):
    """Tiles cover a map of this size, and none lies outside."""
    tile, o = plan.tile, plan.options
    assert tile[0] * tile[1] * tile[2] <= o["PIXELS"]
    assert tile[2] & (tile[2] - 1) == 0
    assert plan.tiles[0] == -(-work.batch // tile[0]) * plan.tiles[1] * plan.tiles[2]
    for length, count, rows, each in zip(size, plan.tiles[1:], tile[1:], phases, strict=True):
        assert (count - 1) * rows * each < length <= count * rows * each


def within_bound(work, plan):
    """What the refusal of too many weights counts on."""
    taps = work.kernel[0] * work.kernel[1]
    assert sum(plan.packing.sizes) <= 2 * work.rank * (work.outs + 128) * (work.channels + 256 + taps)


@given(**calls, **machines)
def test_any_plan_fits(batch, channels, outs, rank, size, geometry, itemsize, processors, unit):
    work = work_of(batch, channels, outs, rank, size, geometry, itemsize)
    if work is None:
        return
    plan = plans.plan(work, processors, unit)
    o, packing = plan.options, plan.packing
    covered(work, plan, work.out_size, (1, 1))
    within_bound(work, plan)
    assert (plan.blocks - 1) * o["BLOCK_O"] < outs <= plan.blocks * o["BLOCK_O"]
    assert 1 <= plan.shares <= plan.tiles[0]
    # As few programs as keep the processors busy: each has memory of its own.
    assert plan.shares == 1 or (plan.shares - 1) * plan.blocks < plans.PROGRAMS * processors
    assert o["GROUP"] * (o["GROUPS"] - 1) < rank <= o["GROUP"] * o["GROUPS"] == packing.ranks
    assert (packing.blocks, packing.rows) == (packing.groups, packing.columns) == (plan.blocks, o["BLOCK_O"])
    halo = plan.tile[0] * o["HALO_H"] * o["HALO_W"]
    assert halo <= plans.MAX_HALO or plan.tile == (1, 1, 1)
    assert o["GROUP"] == 1 or halo * o["GROUP"] * o["BLOCK_O"] * itemsize <= plans.SCRATCH
    assert plan.scratch == -(-halo // o["ROWS"]) * o["ROWS"] * o["GROUP"] * o["BLOCK_O"]
    # Loops in whole steps, over sizes that the padding completes.
    assert packing.depth >= channels
    assert packing.depth % o["DEPTH"] == 0
    width = o["MAIN"] + o["REST"]
    assert o["GROUP"] * o["BLOCK_O"] % width == 0
    assert all(each & (each - 1) == 0 for each in (o["MAIN"], o["REST"], o["ROWS"], o["PIXELS"], o["BLOCK_O"]))
    assert min(o["MAIN"], o["ROWS"], o["PIXELS"], o["BLOCK_O"], o["DEPTH"]) >= 16
    assert packing.taps % o["UNROLL"] == 0
    # Blocks that registers and shared memory hold.
    threads = 32 * o["num_warps"]
    assert max(o["ROWS"] * width, o["PIXELS"] * o["BLOCK_O"]) <= 32 * threads
    step = (o["ROWS"] + width) * o["DEPTH"] * itemsize
    assert step * (o["num_stages"] - 1) <= plans.SHARED


@given(**calls, **machines)
def test_any_plan_of_the_input_fits(batch, channels, outs, rank, size, geometry, itemsize, processors, unit):
    work = work_of(batch, channels, outs, rank, size, geometry, itemsize)
    if work is None:
        return
    plan = plans.input_plan(work, processors, unit)
    o, packing = plan.options, plan.packing
    phases = o["PHASES_H"], o["PHASES_W"]
    covered(work, plan, work.in_size, phases)
    within_bound(work, plan)
    assert plan.shares == plan.tiles[0] * phases[0] * phases[1]
    assert (plan.blocks - 1) * o["BLOCK_I"] < channels <= plan.blocks * o["BLOCK_I"] == packing.blocks
    assert (packing.ranks, packing.rows, packing.groups) == (rank, 1, 1)
    assert outs <= packing.depth == packing.columns
    assert packing.depth % o["DEPTH"] == 0
    assert min(o["PIXELS"], o["DEPTH"], o["BLOCK_I"]) >= 16
    threads, scalar = 32 * o["num_warps"], unit == "fma"
    assert o["PIXELS"] * max(o["BLOCK_I"], o["DEPTH"]) <= (32 if scalar else 64) * threads
    assert (o["PIXELS"] + o["BLOCK_I"]) * o["DEPTH"] * itemsize <= 227 * 1024


READY = _backends.Facts(
    op="cp_conv2d",
    device="cuda",
    dtype=torch.float16,
    interpreter=False,
    missing_triton="",
    missing_cuda="",
    missing_host="",
    work=_backends.ConvWork(
        batch=32,
        in_channels=64,
        out_channels=64,
        size=(56, 56),
        kernel=(3, 3),
        ranks=(2, 2),
        stride=(1, 1),
        padding=(1, 1),
        dilation=(1, 1),
        channels_last=True,
        call="forward",
    ),
)


@pytest.mark.parametrize("op", ["cp_conv2d", "decoupled_svd_conv2d"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({"out_channels": 1 << 20}, ""),
        (
            {"dilation": (16, 16)},
            "the Triton kernels hold every point that a pixel's taps span, at most 1024, not 33×33",
        ),
        (
            {"batch": 1 << 20},
            "the Triton kernels count the pixels of a batch, its padding included, in 31 bits",
        ),
        (
            {"ranks": (40000, 40000)},
            "the Triton kernels count the weights, their padding included, in 31 bits",
        ),
    ],
)
def test_each_refusal(op, change, reason):
    here = replace(READY, op=op, work=replace(READY.work, **change))
    assert _backends.explain(here)["triton"] == _backends.Verdict(reason == "", reason)


def test_what_is_refused_says_so():
    x, pointwise, line = (torch.zeros(shape, dtype=torch.float64) for shape in ((1, 2, 3, 3), (1, 2, 2), (1, 2, 1)))
    with pytest.raises(ValueError, match=r"^backend='triton' cannot run cp_conv2d here: .* not torch.float64"):
        cp_conv2d(x, pointwise, line, line, backend="triton")
