"""The fast path of inference gives what the operator gives: every factored form, by every way of the library."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers import EPS, LAYOUTS, lay_out, max_relative, randn

from fastrank._tables import LIBRARY
from fastrank.nn import FusedCPConv, FusedTucker2Conv, SVDConv
from fastrank.nn.svd import SCHEMES

pytestmark = pytest.mark.usefixtures("poison")

GEOMETRIES = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)},
    {"kernel_size": 2, "padding": "same"},
    {"kernel_size": (3, 5), "stride": 2, "padding": (1, 2), "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": "same", "padding_mode": "circular"},
    {"kernel_size": 1},
]
KINDS = {
    "tucker2": FusedTucker2Conv,
    "cp": FusedCPConv,
    **{scheme: partial(SVDConv, scheme=scheme) for scheme in SCHEMES},
}


def layer_of(kind="tucker2", dtype=torch.float32, **options):
    torch.manual_seed(0)
    options = {"kernel_size": 3, "padding": 1, **options}
    size = options.pop("kernel_size")
    ranks = 2 if size != 1 or kind not in ("cp", "decoupled") else 1
    return KINDS[kind](5, 6, size, ranks, dtype=dtype, **options).eval().requires_grad_(False)


def fast(layer, x, residual=None):
    """What the fast path gives; it must be the one that serves the call."""
    out = layer._prepared(layer, x, residual)
    assert out is not None
    return out


FORMS = [(kind, name) for kind in KINDS for name in LIBRARY[layer_of(kind).form.op]]


@pytest.mark.parametrize(("kind", "name"), FORMS)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
def test_equals_the_operator_in_every_geometry(kind, name, geometry, activation, auto_takes):
    auto_takes(name)
    for bias in (True, False):
        layer = layer_of(kind, torch.float64, activation=activation, bias=bias, **geometry)
        for x in (randn(3, 5, 11, 9, dtype=torch.float64), randn(5, 11, 9, dtype=torch.float64)):
            plain = layer._operate(x, None)
            for residual in (None, randn(*plain.shape, seed=3, dtype=torch.float64)):
                before = None if residual is None else residual.clone()
                for _ in range(2):  # made, and kept
                    found, wanted = fast(layer, x, residual), layer._operate(x, residual)
                    assert found.shape == wanted.shape
                    assert max_relative(found, wanted) <= 1e-13
                assert residual is None or torch.equal(residual, before)


@pytest.mark.parametrize(("kind", "name"), FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", EPS)
def test_equals_the_operator_in_every_layout_and_dtype(kind, name, layout, dtype, auto_takes):
    auto_takes(name)
    layer = layer_of(kind, dtype)
    x = lay_out(randn(3, 5, 8, 7, dtype=dtype), layout)
    found, wanted = fast(layer, x), layer._operate(x, None)
    assert found.dtype == dtype
    assert found.stride() == wanted.stride()
    # As many roundings as stages and products a stage have, of numbers as large as the largest output.
    assert max_relative(found, wanted) <= 40 * EPS[dtype]
