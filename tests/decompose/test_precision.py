"""Decompositions multiply in the precision of their entries, whatever torch was told to prefer."""

from __future__ import annotations

import pytest
import torch
from helpers import l2_relative, randn

from fastrank import decompose


@pytest.mark.parametrize("told", ["high", "medium"])
def test_low_precision_products_are_not_for_decompositions(told):
    weight = randn(64, 48, 3, 3)
    ways = (
        lambda: decompose.tucker2(weight, (20, 30)).weight(),
        lambda: torch.einsum("riyx,oruv->oiyx", *decompose.channel_svd(weight, 30)),
        lambda: decompose.cp_filters(weight[:8], 2).weight(),
    )
    wanted = [way() for way in ways]
    torch.set_float32_matmul_precision(told)
    try:
        factors = [decompose.tucker2(weight, (20, 30)), decompose.channel_svd(weight, 30)]
        filters = decompose.cp_filters(weight[:8], 2)
    finally:
        torch.set_float32_matmul_precision("highest")
    found = [factors[0].weight(), torch.einsum("riyx,oruv->oiyx", *factors[1]), filters.weight()]
    for x, y in zip(found, wanted, strict=True):
        assert l2_relative(x, y) <= 1e-5
