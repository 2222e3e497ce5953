"""The fast path of inference by kernels: weights packed once, and anew when they were written to."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from helpers import randn

from fastrank import _backends, _native
from fastrank.nn import FusedTucker2Conv
from fastrank.ops._conv import KERNELS

pytestmark = pytest.mark.usefixtures("poison")
GEOMETRIES = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)},
    {"kernel_size": 3, "padding": "same", "padding_mode": "circular"},
    {"kernel_size": 1},
]


def layer_of(**options):
    torch.manual_seed(0)
    options = {"kernel_size": 3, "padding": 1, **options}
    layer = FusedTucker2Conv(5, 6, options.pop("kernel_size"), 2, dtype=torch.float16, **options)
    return layer.eval().requires_grad_(False)


def fast(layer, x, residual=None):
    """What the fast path gives; it must be the one that serves the call."""
    out = layer._prepared(layer, x, residual)
    assert out is not None
    return out


@pytest.fixture(params=["host", "triton"])
def kernel(request, auto_takes):
    """A kernel that `auto` chooses, as it would on a GPU."""
    if request.param == "host" and _native.why_missing("_host"):
        pytest.skip(_native.why_missing("_host"))
    if request.param == "triton" and not _backends.interpreting():
        pytest.skip("a GPU is here: Triton's interpreter is off")
    auto_takes(request.param)
    return request.param


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_kernel_serves_from_weights_that_it_packed_once(kernel, geometry, monkeypatch):
    layer = layer_of(activation="relu", **geometry)
    x = randn(2, 5, 9, 8, dtype=torch.float16)
    wanted = layer._operate(x, None)
    assert torch.equal(fast(layer, x), wanted)
    residual = randn(*wanted.shape, seed=3, dtype=torch.float16)
    packs = []
    kernels = KERNELS["tucker2_conv2d"][kernel]
    prepare = type(kernels).prepare
    monkeypatch.setattr(type(kernels), "prepare", lambda *a: packs.append(1) or prepare(*a))
    again = fast(layer, x, residual)
    assert not packs
    assert torch.equal(again, layer._operate(x, residual))
    assert torch.equal(fast(layer, x[0], residual[0]), again[0])
    channels_last = x.contiguous(memory_format=torch.channels_last)
    out = fast(layer, channels_last)
    assert torch.equal(out, wanted)
    assert out.stride() == layer._operate(channels_last, None).stride()


@pytest.mark.parametrize("name", ["w_in", "core", "w_out", "bias"])
def test_a_kernel_packs_anew_what_was_written_to(kernel, name):
    layer, x = layer_of(), randn(2, 5, 9, 8, dtype=torch.float16)
    before = fast(layer, x)
    with torch.no_grad():
        getattr(layer, name).mul_(2)
    after = fast(layer, x)
    assert not torch.equal(before, after)
    assert torch.equal(after, layer._operate(x, None))


def test_a_kernel_keeps_no_input_alive(kernel):
    layer, x = layer_of(), randn(2, 5, 9, 8, dtype=torch.float16)
    alive = weakref.ref(x)
    fast(layer, x)
    del x
    gc.collect()
    assert alive() is None
