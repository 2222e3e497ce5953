"""`torch.compile(fullgraph=True, dynamic=True)`: no graph break, and as few compilations as of the dense layer."""

from __future__ import annotations

import copy

import pytest
import torch
from export_cases import forms, small_lenet
from helpers import randn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

import fastrank
from fastrank.export import _trace
from fastrank.nn import FusedTucker2Conv

# Batches of several sizes, maps of several sizes and shapes. A batch of 1 is a program of its own to torch.compile, of
# any network, and so are square maps, if those before were not.
SHAPES = ((2, 9, 7), (3, 9, 7), (5, 12, 8), (6, 6, 10), (7, 5, 11))
ALSO = ((1, 9, 7), (2, 8, 8), (3, 10, 10), (1, 8, 8))


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compilations(layer, shapes, train=False):
    """How often `layer` is compiled for inputs of these shapes one after the other; its outputs are checked."""
    counter = CompileCounter()
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for n, height, width in shapes:
        x = randn(n, 4, height, width).requires_grad_(train)
        with torch.set_grad_enabled(train):
            found, wanted = compiled(x), layer(x)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        if train:
            own, true = (torch.autograd.grad(out.sum(), (x, *layer.parameters())) for out in (found, wanted))
            for first, second in zip(own, true, strict=True):
                torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)
    return counter.frame_count


@pytest.mark.parametrize("name", forms())
def test_compile_makes_one_graph_for_all_sizes(name):
    layer = forms()[name]
    assert compilations(layer.train(), SHAPES[:3], train=True) <= 2
    torch._dynamo.reset()
    assert compilations(layer.eval(), SHAPES) <= 2


@pytest.mark.parametrize("name", ["tucker2", "gated-svd"])
def test_compile_is_as_often_as_of_the_dense_layer_for_batches_of_one_and_square_maps(name):
    layer = forms()[name].eval()
    found = compilations(layer, SHAPES + ALSO)
    torch._dynamo.reset()
    assert found == compilations(layer.to_dense(), SHAPES + ALSO)


def test_compile_takes_whole_networks_forward_and_backward():
    model, counter = small_lenet().train(), CompileCounterWithBackend("aot_eager")
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for n, height, width in (SHAPES[0], SHAPES[2]):
        x = randn(n, 1, 2 * height, 2 * width)
        for network, run in ((model, compiled), (twin, twin)):
            network.zero_grad()
            run(x).square().mean().backward()
        for (name, parameter), own in zip(twin.named_parameters(), model.parameters(), strict=True):
            scale = float(parameter.grad.abs().max())
            assert float((own.grad - parameter.grad).abs().max()) <= 1e-4 * scale + 1e-6, name
    assert counter.frame_count <= 2


def test_compile_takes_networks_fused_for_inference():
    model = small_lenet()
    fused = fastrank.fuse_for_inference(model, randn(2, 1, 8, 8))
    counter = CompileCounter()
    compiled = torch.compile(fused, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for n, height, width in SHAPES:
            x = randn(n, 1, 2 * height, 2 * width)
            torch.testing.assert_close(compiled(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2


def test_compile_by_inductor_gives_the_same_outputs():
    layer = FusedTucker2Conv(4, 6, 3, (2, 3), padding=1, activation="relu").eval()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for n, height, width in SHAPES[:3]:
            x = randn(n, 4, height, width)
            torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)


def test_the_leaves_of_outputs_are_their_tensors():
    a, b = randn(2), randn(3)
    assert [id(value) for value in _trace.leaves_of({"x": a, "y": (b, [a])})] == [id(a), id(b), id(a)]
