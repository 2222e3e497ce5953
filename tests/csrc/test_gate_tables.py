"""The gates' plans and tables: every slice and every gate is served once, a list that fits by one launch."""

from __future__ import annotations

import random

import pytest

from fastrank import _native
from fastrank.ops import _gates

pytestmark = pytest.mark.skipif(not _native.load("_host"), reason=_native.why_missing("_host") or "built")
ARGUMENT_BYTES = 32764  # what a kernel's arguments may hold from CUDA 12.1 on
SMALL_BYTES = 4096  # and before


@pytest.mark.parametrize(
    ("rows", "row_size"), [(0, 3), (3, 0), (1, 1), (17, 27), (64, 64), (64, 1024), (64, 1025), (5, 2**33)]
)
@pytest.mark.parametrize("aligned", [False, True])
def test_a_plan_covers_every_slice(rows, row_size, aligned):
    plan = _native.host().gated_plan(rows, row_size, element_bytes=2, aligned=aligned)
    rows_per_block = plan["threads"] // plan["lanes"]
    if rows * row_size == 0:
        assert plan["blocks"] == 0
    else:
        assert (plan["blocks"] - 1) * rows_per_block < rows <= plan["blocks"] * rows_per_block
    assert row_size % plan["pack"] == 0
    assert plan["pack"] == 1 or aligned


@pytest.mark.parametrize(
    ("row_size", "lanes", "pack"),
    [(64, 8, 4), (256, 8, 4), (260, 16, 4), (576, 32, 4), (1024, 32, 4), (1028, 256, 4), (4608, 256, 4), (33, 8, 1)],
)
def test_short_slices_take_few_threads(row_size, lanes, pack):
    plan = _native.host().gated_plan(4, row_size, element_bytes=4, aligned=True)
    assert (plan["lanes"], plan["pack"]) == (lanes, pack)


def test_chunks_are_those_that_partial_sums_are_allocated_for():
    for size in (0, 1, _gates.FUNNEL_CHUNK, _gates.FUNNEL_CHUNK + 1, 2**33):
        plan = _native.host().gates_plan(size, element_bytes=2, aligned=True)
        assert plan["blocks"] == -(-size // _gates.FUNNEL_CHUNK)
        assert plan["pack"] == 8
        assert _native.host().gates_plan(size, element_bytes=2, aligned=False)["pack"] == 1


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("count", [1, 48, 65, 66, 160, 300, 533, 534, 1500])
def test_tables_hold_the_list_in_order(count, backward):
    """Every tensor that is not empty is in one table; blocks and tensors find each other."""
    pick = random.Random(count)
    rows = [pick.choice([0, 1, 7, 64, 512]) for _ in range(count)]
    sizes = [pick.choice([0, 1, 33, 64, 576, 4608]) for _ in range(count)]
    host = _native.host()
    tables = host.gated_tables(rows, sizes, element_bytes=4, backward=backward)
    filled = [i for i in range(count) if rows[i] * sizes[i]]
    assert [i for table in tables for i in table["tensors"]] == filled
    assert len(tables) == (1 if len(filled) else 0) or count > 500
    for table in tables:
        assert table["bytes"] <= (SMALL_BYTES if count <= 60 else ARGUMENT_BYTES)
        first = 0
        for i, start in zip(table["tensors"], table["first"], strict=True):
            plan = host.gated_plan(rows[i], sizes[i], element_bytes=4, aligned=True)
            assert start == first
            first += plan["blocks"]
        assert table["blocks"] == first
        for place, start in enumerate(table["first"]):
            assert host.find_entry(table["first"], start) == place
            end = (table["first"] + [first])[place + 1]
            assert host.find_entry(table["first"], end - 1) == place


def test_a_resnet_50_is_one_launch():
    """53 convolutions, three factors each, forward and backward."""
    for backward in (False, True):
        (table,) = _native.host().gated_tables([64] * 159, [576] * 159, element_bytes=4, backward=backward)
        assert table["tensors"] == list(range(159))


def test_blocks_beyond_one_grid_take_another_launch():
    rows, sizes = [2**31 - 300, 4000, 2**31 - 1], [8200] * 3
    tables = _native.host().gated_tables(rows, sizes, element_bytes=4, backward=False)
    assert [table["tensors"] for table in tables] == [[0], [1], [2]]
    assert all(table["blocks"] <= 2**31 - 1 for table in tables)


def test_lists_of_columns_of_unequal_lengths_are_refused():
    with pytest.raises(RuntimeError, match="a call takes one size a tensor"):
        _native.host().gated_tables([1, 2], [3], element_bytes=4, backward=False)
