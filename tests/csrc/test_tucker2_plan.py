"""How the Tucker-2 kernels cut a convolution: every pixel once, every tap where stage 1 put it, all of it in memory."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastrank import _native

pytestmark = pytest.mark.skipif(bool(_native.why_missing("_host")), reason=_native.why_missing("_host") or "built")
HOPPER, AMPERE, ADA = (True, 132, 227 * 1024), (False, 108, 163 * 1024), (False, 128, 99 * 1024)
WIDTHS = (32, 64, 96, 128, 160, 224)


def host() -> Any:
    return _native.host()


def out_size(sizes: list[int]) -> tuple[int, int]:
    height, width = sizes[2:4]
    kernel, stride, padding, dilation = sizes[7:9], sizes[9:11], sizes[11:13], sizes[13:15]
    return tuple(  # type: ignore[return-value]
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip((height, width), kernel, stride, padding, dilation, strict=True)
    )


@st.composite
def convolutions(draw: st.DrawFn) -> list[int]:
    kernel = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    stride = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    padding = draw(st.tuples(st.integers(0, 4), st.integers(0, 4)))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    size = draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    assume(all(n + 2 * p > d * (k - 1) for n, p, d, k in zip(size, padding, dilation, kernel, strict=True)))
    batch, channels, out_channels = draw(st.tuples(st.integers(1, 9), st.integers(1, 300), st.integers(1, 200)))
    ranks = draw(st.tuples(st.integers(1, 200), st.integers(1, 224)))
    return [batch, channels, *size, *ranks, out_channels, *kernel, *stride, *padding, *dilation]


@settings(max_examples=400)
@given(
    sizes=convolutions(),
    card=st.sampled_from([HOPPER, AMPERE, ADA, (True, 4, 227 * 1024)]),
    split=st.sampled_from([1, 1, 2, 4, 8]),
)
def test_every_pixel_once_and_every_tap_where_it_was_put(
    sizes: list[int], card: tuple[bool, int, int], split: int
) -> None:
    split = split if card[0] else 1
    plan = host().tucker2_plan(sizes, split, *card)
    assume(not plan["refusal"])
    batch, _, height, width = sizes[:4]
    (kernel_h, kernel_w), stride = sizes[7:9], sizes[9:11]
    padding, dilation = sizes[11:13], sizes[13:15]
    (z_h, z_w), (out_h, out_w) = plan["z"], out_size(sizes)
    assert plan["shared_bytes"] <= card[2]
    assert plan["rows_out"] <= 128
    assert plan["images"] == 1 or plan["tile"] == [out_h, out_w]
    tiles = host().tucker2_tiles(sizes, split, *card)
    assert len(tiles) == plan["tiles"]
    outputs: Counter[tuple[int, int, int]] = Counter()
    for written, rows in tiles:
        # Where stage 1 puts which pixel of x. Rows of images behind the last one may write what nobody reads.
        place = {at: (image, y, x) for at, image, y, x, _ in written if at >= 0}
        assert len(place) == sum(at >= 0 for at, *_ in written)
        assert all(row < plan["rows_in"] for at, *_, row in written if at >= 0)
        assert all(0 <= at < plan["images"] * z_h * z_w for at in place)
        assert all(0 <= y < height and 0 <= x < width for _, y, x in place.values())
        for at, image, y, x in rows:
            if image >= batch or y >= out_h or x >= out_w:
                continue
            outputs[image, y, x] += 1
            for i, j in itertools.product(range(kernel_h), range(kernel_w)):
                source = y * stride[0] - padding[0] + i * dilation[0], x * stride[1] - padding[1] + j * dilation[1]
                tap = at + i * dilation[0] * z_w + j * dilation[1]
                inside = 0 <= source[0] < height and 0 <= source[1] < width
                assert place.get(tap) == ((image, *source) if inside else None)
                assert tap < plan["images"] * z_h * z_w
    assert outputs == Counter(itertools.product(range(batch), range(out_h), range(out_w)))


@settings(max_examples=300)
@given(sizes=convolutions(), passes=st.integers(1, 3), split=st.sampled_from([1, 2, 4, 8]))
def test_the_slots_hold_the_packed_weights_once(sizes: list[int], passes: int, split: int) -> None:
    weight_bytes = 16 * len(host().tucker2_sources(sizes, split))
    width = next(w for w in WIDTHS if w >= -(-sizes[5] // split))
    read: Counter[int] = Counter()
    for rank in range(split):
        pieces = host().tucker2_pieces(sizes, split, passes, rank)
        assert all(0 < size <= max(16384, 128 * width) and size % 32 == 0 and at % 16 == 0 for at, size in pieces)
        for at, size in pieces:
            read.update(range(at // 4096, (at + size) // 4096))
            assert at % 4096 == size % 4096 == 0
    # Stage 1's weights come once a pass, the others once; a block of a split reads its own.
    assert host().tucker2_pieces(sizes, split, 1, 0)[0][0] == 0
    assert sorted(read) == list(range(weight_bytes // 4096))
    assert set(read.values()) <= {1, passes}
    once = host().tucker2_pieces(sizes, 1, 1, 0)
    if split == 1:
        assert all(at == sum(size for _, size in once[:i]) for i, (at, _) in enumerate(once))


@settings(max_examples=100)
@given(sizes=convolutions(), split=st.sampled_from([1, 2, 4, 8]))
def test_every_weight_is_packed_once(sizes: list[int], split: int) -> None:
    _, channels, _, _, rank_in, rank_out, out_channels, kernel_h, kernel_w, *_ = sizes
    padded = -(-rank_in // 16) * 16
    found = Counter(map(tuple, host().tucker2_sources(sizes, split)))
    assert set(found.values()) == {1}
    for stage, rows, depth in (
        (1, rank_in, channels),
        (2, rank_out, kernel_h * kernel_w * padded),
        (3, out_channels, rank_out),
    ):
        wanted = {(stage, row, k) for row in range(rows) for k in range(0, depth, 8)}
        assert wanted <= found.keys()


@pytest.mark.parametrize("card", [HOPPER, AMPERE])
@pytest.mark.parametrize("batch", [1, 8, 32, 128])
@pytest.mark.parametrize(
    "layer",
    [
        (64, 56, 32, 32, 64, 1),
        (128, 28, 72, 72, 128, 1),
        (256, 14, 144, 141, 256, 1),
        (256, 14, 222, 209, 512, 2),
        (512, 14, 150, 224, 512, 1),
        (512, 7, 292, 212, 512, 1),
        (512, 7, 160, 69, 512, 1),
        (512, 7, 31, 39, 512, 1),
        (64, 224, 32, 32, 64, 1),
        (512, 28, 128, 128, 512, 1),
    ],
)
def test_the_layers_of_the_papers_fit(layer: tuple[int, ...], batch: int, card: tuple[bool, int, int]) -> None:
    channels, size, rank_in, rank_out, out_channels, stride = layer
    sizes = [batch, channels, size, size, rank_in, rank_out, out_channels, 3, 3, stride, stride, 1, 1, 1, 1]
    split = host().tucker2_split(sizes, *card)
    plan = host().tucker2_plan(sizes, split, *card)
    assert not plan["refusal"]
    assert plan["shared_bytes"] <= card[2]
    assert plan["padded_ranks"] == [-(-rank_in // 16) * 16, next(w for w in WIDTHS if w >= -(-rank_out // split))]
    assert plan["ring"] >= 2
    assert split == 1 or (card[0] and plan["cluster"] == split)
    assert plan["clocks"] <= host().tucker2_plan(sizes, 1, *card).get("clocks", float("inf"))
    if batch == 1 and size <= 14 and card[0] and rank_in > 100:
        assert split > 1  # few tiles: their weights would flow into a few multiprocessors
    if batch == 128:
        assert split == 1


def test_what_cannot_be_planned_says_why() -> None:
    def refusal(card: tuple[bool, int, int] = HOPPER, split: int = 1, **changes: int) -> str:
        names = ("batch", "channels", "height", "width", "rank_in", "rank_out", "out_channels")
        sizes = dict(zip(names, (1, 64, 8, 8, 32, 32, 64), strict=True)) | changes
        return str(host().tucker2_plan([*sizes.values(), 3, 3, 1, 1, 1, 1, 1, 1], split, *card)["refusal"])

    assert refusal() == ""
    assert refusal(rank_out=224) == ""
    wide = "R_out is above what the registers hold, 224, or 768 where the blocks of a cluster share it"
    assert refusal(rank_out=225) == wide
    assert refusal(split=4, rank_out=384) == ""
    assert refusal(split=4, rank_out=385) == wide
    assert refusal(split=8, rank_out=768) == ""
    assert refusal(split=8, rank_out=769).startswith("R_out is above")
    assert refusal(AMPERE, rank_out=225).startswith("R_out is above")
    assert refusal(channels=2049) == "there are more than 2048 input channels"
    assert refusal(rank_in=20000) == "no tile with its weights fits a block's shared memory"
    assert refusal(batch=2**31, height=100, width=100) == "there are more than 2^31 - 1 tiles"
