"""The CUDA C++ kernels of tucker2_conv2d on a GPU: every way through them, layers of ResNet-18, a graph."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import lay_out, randn
from tucker2_cases import CASES, HALVES, USUAL, factors_of, guarded, judge, untouched

from fastrank import _backends, reference
from fastrank.ops import _tucker2_kernels as kernels
from fastrank.ops import tucker2_conv2d

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_the_kernels_on_a_gpu(name: str, dtype: torch.dtype, layout: str, activation: str) -> None:
    case = USUAL | CASES[name]
    geometry = case["stride"], case["padding"], case["dilation"]
    factors = [
        f.cuda() for f in factors_of(case["channels"], case["out_channels"], case["kernel"], case["ranks"], dtype)
    ]
    # Batches with which a card of many multiprocessors takes the ways that the host takes with small ones.
    batch = {"resident weights": 40, "several passes": 64, "images in one tile": 600}.get(name, case["batch"])
    x = lay_out(randn(batch, case["channels"], *case["size"], dtype=dtype).cuda(), layout)
    bias = randn(case["out_channels"], seed=4, dtype=dtype).cuda()
    library = reference.conv.tucker2_conv2d(x, *factors, bias, None, *geometry, "none")
    residual = lay_out(randn(*library.shape, seed=5, dtype=dtype).cuda(), layout)
    library = reference.conv.tucker2_conv2d(x, *factors, bias, residual, *geometry, activation)
    wide = [t.cpu().double() for t in (x, *factors, bias, residual)]
    wanted = reference.conv.tucker2_conv2d(*wide, *geometry, activation)  # type: ignore[arg-type]
    splits = {kernels.packed_for(x, factors, bias, geometry).split} | {1, 4} if case["ranks"][1] < 225 else {8}
    hopper = _backends.card(x.device)[0]
    if not hopper and case["ranks"][1] > 224:
        pytest.skip("more than 224 ranks are split over a cluster, which this card has not")
    for split in splits if hopper else {1}:
        check_on_gpu(kernels.pack(factors, bias, split=split), x, residual, geometry, activation, library, wanted)


def check_on_gpu(packed, x, residual, geometry, activation, library, wanted) -> None:
    """A hundred times the same bits, right, and nothing written around them."""
    outs = []
    for _ in range(100):
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
        out, block = guarded(tuple(library.shape), x.dtype, channels_last, "cuda")
        kernels.convolve(x, packed, residual, out, geometry, activation)
        outs.append(out)
        assert untouched(block)
    judge(outs[0].cpu(), library.cpu(), wanted)
    assert all(torch.equal(outs[0], out) for out in outs)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3, 32])
@pytest.mark.parametrize(
    "layer",
    [(64, 56, 32, 32, 64, 1), (256, 14, 144, 141, 256, 1), (256, 14, 222, 299, 512, 2), (512, 7, 292, 212, 512, 1)],
)
def test_layers_of_resnet18_on_a_gpu(layer: tuple[int, ...], batch: int) -> None:
    channels, size, rank_in, rank_out, out_channels, stride = layer
    factors = [f.cuda() for f in factors_of(channels, out_channels, (3, 3), (rank_in, rank_out), torch.bfloat16)]
    x = lay_out(randn(batch, channels, size, size, dtype=torch.bfloat16).cuda(), "channels_last")
    own = [t.requires_grad_() for t in (x, *factors)]
    grads = []
    for backend in ("cuda", "sequence"):
        out = tucker2_conv2d(*own, stride=stride, padding=1, backend=backend)
        upstream = randn(*out.shape, seed=6, dtype=torch.bfloat16).cuda()
        grads.append([out.detach(), *torch.autograd.grad(out, own, upstream)])
    wide = [t.detach().cpu().double().requires_grad_() for t in own]
    out = tucker2_conv2d(*wide, stride=stride, padding=1, backend="sequence")
    wanted = [out.detach(), *torch.autograd.grad(out, wide, upstream.cpu().double())]
    for found, library, right in zip(*grads, wanted, strict=True):
        judge(found.cpu(), library.cpu(), right)


@pytest.mark.gpu
def test_a_graph_of_calls_on_a_gpu() -> None:
    x = lay_out(randn(4, 64, 14, 14, dtype=torch.bfloat16).cuda(), "channels_last")
    factors = [f.cuda() for f in factors_of(64, 64, (3, 3), (32, 32), torch.bfloat16)]
    wanted = tucker2_conv2d(x, *factors, padding=1, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = tucker2_conv2d(x, *factors, padding=1, backend="cuda")
    out.fill_(math.nan)
    graph.replay()
    assert torch.equal(out, wanted)
