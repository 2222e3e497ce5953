"""The CUDA C++ kernels of tucker2_conv2d: their source run on the host for two cards."""

from __future__ import annotations

import math
import mmap
from typing import Any

import pytest
import torch
from helpers import EPS, lay_out, randn
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from tucker2_cases import (
    AMPERE,
    CASES,
    HALVES,
    HOPPER,
    USUAL,
    factors_of,
    guarded,
    judge,
    rounding_spread,
    three_convolutions,
    untouched,
)

from fastrank import _backends, _native, reference
from fastrank.ops import _tucker2_kernels as kernels
from fastrank.ops import tucker2_conv2d

needs_host = pytest.mark.skipif(bool(_native.why_missing("_host")), reason=_native.why_missing("_host") or "built")
pytestmark = pytest.mark.usefixtures("poison")


@needs_host
@settings(max_examples=320)
@given(
    card=st.sampled_from([HOPPER, HOPPER, AMPERE]),
    split=st.sampled_from([1, 1, 2, 4, 8]),
    dtype=st.sampled_from(HALVES),
    batch=st.integers(1, 3),
    channels=st.sampled_from([1, 3, 8, 16, 24, 64, 72, 130]),
    out_channels=st.sampled_from([1, 5, 8, 16, 40, 72]),
    ranks=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    size=st.tuples(st.integers(1, 11), st.integers(1, 13)),
    layout=st.sampled_from(["contiguous", "channels_last", "sliced", "expanded"]),
    channels_last=st.booleans(),
    bias=st.booleans(),
    residual=st.booleans(),
    activation=st.sampled_from(["none", "relu", "silu"]),
)
def test_any_convolution_on_the_host(
    card, split, dtype, batch, channels, out_channels, ranks, kernel, stride, padding, dilation, size, layout,
    channels_last, bias, residual, activation,
):  # fmt: skip
    assume(all(n + 2 * p > d * (k - 1) for n, p, d, k in zip(size, padding, dilation, kernel, strict=True)))
    geometry = stride, padding, dilation
    options: Any = {"stride": stride, "padding": padding, "dilation": dilation}
    x = lay_out(randn(batch, channels, *size, dtype=dtype), layout)
    factors = factors_of(channels, out_channels, kernel, ranks, dtype)
    shift = randn(out_channels, seed=4, dtype=dtype) if bias else None
    shape = tuple(tucker2_conv2d(*(t.to("meta") for t in (x, *factors)), None, **options).shape)
    added = lay_out(randn(*shape, seed=5, dtype=dtype), layout) if residual else None
    out, block = guarded(shape, dtype, channels_last)
    packed = kernels.pack(factors, shift, split=split if card[0] else 1)
    kernels.convolve(x, packed, added, out, geometry, activation, card=card)
    wide = [None if t is None else t.double() for t in (x, *factors, shift, added)]
    judge(
        out,
        three_convolutions(x, factors, shift, added, geometry, activation),
        reference.conv.tucker2_conv2d(*wide, *geometry, activation),  # type: ignore[arg-type]
        rounding_spread(x, factors, shift, added, geometry, EPS[dtype]),
    )
    assert untouched(block)


@needs_host
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("channels_last", [True, False])
def test_every_way_through_the_kernels(name: str, channels_last: bool) -> None:
    case = USUAL | CASES[name]
    geometry = case["stride"], case["padding"], case["dilation"]
    factors = factors_of(case["channels"], case["out_channels"], case["kernel"], case["ranks"], torch.float16)
    x = randn(case["batch"], case["channels"], *case["size"], dtype=torch.float16)
    x = lay_out(x, "channels_last" if channels_last else "contiguous")
    bias = randn(case["out_channels"], seed=4, dtype=torch.float16)
    library = three_convolutions(x, factors, bias, None, geometry, "relu")
    wide = [t.double() for t in (x, *factors, bias)]
    wanted = reference.conv.tucker2_conv2d(*wide, None, *geometry, "relu")  # type: ignore[arg-type]
    for card, split in case["cards"]:
        out, block = guarded(tuple(library.shape), torch.float16, channels_last)
        kernels.convolve(x, kernels.pack(factors, bias, split=split), None, out, geometry, "relu", card=card)
        judge(out, library, wanted)
        assert untouched(block)


@needs_host
def test_the_cases_take_the_ways_they_are_named_for() -> None:
    def plan(name: str) -> dict[str, Any]:
        case = USUAL | CASES[name]
        shape = (*case["ranks"], *case["kernel"])
        geometry = case["stride"], case["padding"], case["dilation"]
        x = (case["batch"], case["channels"], *case["size"])
        found: dict[str, Any] = _native.host().tucker2_plan(
            kernels.sizes(x, shape, case["out_channels"], geometry), 1, *HOPPER
        )
        return found

    assert plan("several passes")["passes"] > 1
    assert plan("resident weights")["resident"]
    assert plan("images in one tile")["images"] > 1
    assert plan("a wide box")["box"][1] > 256
    assert plan("several column tiles")["cluster"] == 2
    assert plan("several column tiles")["slots"] > plan("several column tiles")["ring"]


@needs_host
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("stride", "padding", "dilation"),
    [((1, 1), (1, 1), (1, 1)), ((1, 1), (0, 3), (1, 2)), ((2, 1), (1, 1), (1, 1)), ((1, 1), (3, 3), (1, 1))],
)
def test_gradients_through_the_operator(stride, padding, dilation, dtype) -> None:
    leaves = [
        lay_out(randn(2, 12, 9, 8, dtype=dtype), "channels_last"),
        *factors_of(12, 16, (3, 3), (10, 7), dtype),
        randn(16, seed=4, dtype=dtype),
    ]
    upstream = randn(*tucker2_conv2d(*leaves, stride=stride, padding=padding, dilation=dilation).shape, seed=6)
    grads = []
    for backend, kind in (("host", dtype), ("sequence", dtype), ("sequence", torch.float64)):
        own = [leaf.to(kind).requires_grad_() for leaf in leaves]
        out = tucker2_conv2d(*own, stride=stride, padding=padding, dilation=dilation, backend=backend)
        grads.append(torch.autograd.grad(out, own, upstream.to(kind)))
    for found, library, wanted in zip(*grads, strict=True):
        judge(found, library, wanted)
        assert found.stride() == library.stride()


@needs_host
@pytest.mark.parametrize("batch", [0, 2])
def test_opcheck(batch: int) -> None:
    leaves = [randn(batch, 5, 6, 7, dtype=torch.float16), *factors_of(5, 8, (3, 3), (3, 4), torch.float16)]
    leaves = [leaf.requires_grad_() for leaf in (*leaves, randn(8, dtype=torch.float16))]
    arguments = (*leaves, None, (1, 1), (1, 1), (1, 1), "relu", "host")
    # float16 gradients of two runs differ by roundings.
    torch.library.opcheck(torch.ops.fastrank.tucker2_conv2d.default, arguments, atol=5e-2, rtol=5e-2)


@needs_host
def test_a_second_gradient_goes_through_the_library() -> None:
    leaves = [randn(1, 4, 5, 5), *factors_of(4, 4, (3, 3), (3, 3), torch.float32)]
    seconds = []
    for backend, kind in (("host", torch.float16), ("sequence", torch.float64)):
        own = [leaf.to(torch.float16).to(kind).requires_grad_() for leaf in leaves]
        (grad,) = torch.autograd.grad(tucker2_conv2d(*own, backend=backend).square().sum(), own[0], create_graph=True)
        seconds.append(torch.autograd.grad(grad.square().sum(), own))
    for found, wanted in zip(*seconds, strict=True):
        assert float((found.double() - wanted).norm() / wanted.norm()) <= 20 * EPS[torch.float16]


@needs_host
@pytest.mark.parametrize("card", [HOPPER, AMPERE])
def test_the_same_bits_every_time_and_nothing_is_written_to_the_inputs(card) -> None:
    x = lay_out(randn(3, 24, 9, 9, dtype=torch.float16), "channels_last")
    factors = factors_of(24, 16, (3, 3), (20, 20), torch.float16)
    before = [t.clone() for t in (x, *factors)]
    outs = []
    for _ in range(3):
        out, _ = guarded((3, 16, 9, 9), torch.float16, True)
        kernels.convolve(x, kernels.pack(factors, None), None, out, ((1, 1), (1, 1), (1, 1)), "none", card=card)
        outs.append(out)
    assert all(torch.equal(outs[0], out) for out in outs)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, *factors), strict=True))


@needs_host
@pytest.mark.parametrize("dimension", [0, 1, 2, 3])
@pytest.mark.parametrize(("card", "split"), [(HOPPER, 1), (HOPPER, 2), (AMPERE, 1)])
def test_offsets_beyond_31_bits(card, split, dimension) -> None:
    """Three entries along a dimension lie 2³⁰ + 8 elements apart, in memory whose pages are never touched between."""
    apart, shape = 2**30 + 8, [2, 8, 4, 5]
    shape[dimension] = 3
    step = [1, 1, 1, 1]
    for i in (1, 3, 2, 0):  # channels_last, so that whole groups of channels move where they can
        step[i] = math.prod(shape[j] for j in ((), (1,), (1, 3), (1, 2, 3))[(1, 3, 2, 0).index(i)])
    step[dimension] = apart
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)

    def far() -> Tensor:
        memory = mmap.mmap(-1, 2 * (2 * apart + 4096), flags=flags)
        return torch.frombuffer(memory, dtype=torch.float16).as_strided(shape, step)

    channels = shape[1]
    factors = factors_of(channels, channels, (3, 3), (5, 6), torch.float16)
    x, residual, out, near = far(), far(), far(), randn(*shape, dtype=torch.float16)
    x.copy_(near), residual.copy_(near)
    geometry = ((1, 1), (1, 1), (1, 1))
    packed = kernels.pack(factors, None, split=split)
    kernels.convolve(x, packed, residual, out, geometry, "none", card=card)
    wanted = torch.empty(shape, dtype=torch.float16)
    kernels.convolve(near, packed, near, wanted, geometry, "none", card=card)
    assert torch.equal(out, wanted)


@needs_host
def test_not_a_number_stays_where_it_belongs() -> None:
    """A NaN of x reaches the outputs whose window holds it, and no other."""
    x = randn(2, 8, 9, 9, dtype=torch.float16)
    x[0, 3, 4, 4] = math.nan
    factors = factors_of(8, 8, (3, 3), (5, 6), torch.float16)
    for card in (HOPPER, AMPERE):
        out, _ = guarded((2, 8, 9, 9), torch.float16, True)
        kernels.convolve(x, kernels.pack(factors, None), None, out, ((1, 1), (1, 1), (1, 1)), "none", card=card)
        wanted = torch.zeros(2, 8, 9, 9, dtype=torch.bool)
        wanted[0, :, 3:6, 3:6] = True
        assert torch.equal(out.isnan(), wanted)


@needs_host
@pytest.mark.parametrize(
    ("x", "changes", "message"),
    [
        (randn(1, 4, 5, 5), {}, "take float16 and bfloat16, not torch.float32"),
        (randn(1, 4, 5, 5, dtype=torch.float16), {"rank_out": 800}, "R_out is above what the registers hold"),
        (randn(1, 4, 5, 5, dtype=torch.float16), {"rank_in": 15000}, "no tile with its weights fits"),
    ],
)
def test_what_the_kernels_cannot_run_is_refused_in_one_sentence(x, changes, message) -> None:
    rank_in, rank_out = changes.get("rank_in", 3), changes.get("rank_out", 3)
    factors = factors_of(4, 4, (3, 3), (rank_in, rank_out), x.dtype)
    with pytest.raises(ValueError, match=rf"^backend='host' cannot run tucker2_conv2d here: .*{message}"):
        tucker2_conv2d(x, *factors, backend="host")
    with pytest.raises(ValueError, match=r"^backend='cuda' cannot run tucker2_conv2d here: the tensor is on cpu"):
        tucker2_conv2d(x, *factors, backend="cuda")


def test_facts_of_a_card_decide_without_one() -> None:
    """The choice for a GPU can be asked for on a machine that has none."""
    x = randn(1, 64, 8, 8, dtype=torch.bfloat16)
    work = _backends.ConvWork(
        batch=1, in_channels=64, out_channels=64, size=(8, 8), kernel=(3, 3), ranks=(32, 300), stride=(1, 1),
        padding=(1, 1), dilation=(1, 1), channels_last=True, call="forward",
    )  # fmt: skip
    facts = _backends.facts("tucker2_conv2d", x, work)
    on = {"device": "cuda", "missing_cuda": "", "missing_host": facts.missing_host}
    if not facts.missing_host:
        for card, able in ((HOPPER, True), (AMPERE, False)):
            asked = type(facts)(**{**vars(facts), **on, "card": card})
            assert bool(_backends.explain(asked)["cuda"]) is able
    asked = type(facts)(**{**vars(facts), **on, "missing_host": "it was not built"})
    assert _backends.explain(asked)["cuda"].reason == "it was not built"
