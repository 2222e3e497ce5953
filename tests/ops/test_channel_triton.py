"""The Triton kernels of channel_svd_conv2d, the Tucker-2 ones without a projection, against float64."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from helpers import max_relative, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_cases import (
    Config,
    Form,
    calls_of,
    check_expected,
    configs,
    far_apart,
    guarded,
    judge,
    kernel_results,
    on_devices,
    poisoned,
    quick,
)  # fmt: skip

from fastrank import _backends, reference
from fastrank.ops import channel_svd_conv2d
from fastrank.ops._tucker2_triton import ChannelKernels, _Convolution

__all__ = ["quick"]  # a fixture


def draw(i: int, ranks: list[int], o: int, kernel: tuple[int, int]) -> list[Tensor]:
    (rank,) = ranks
    return [
        randn(rank, i, *kernel, seed=1) / math.sqrt(i * kernel[0] * kernel[1]),
        randn(o, rank, 1, 1, seed=2) / math.sqrt(rank),
    ]


CHANNEL = Form(
    ("first", "second"), channel_svd_conv2d, ChannelKernels(), draw, lambda first, second: [first, second], 0
)


@poisoned
@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@settings(max_examples=200)
@given(config=configs(CHANNEL, 1), dtype=st.sampled_from([torch.float32, torch.float16]))
def test_any_convolution_under_the_interpreter(config: Config, dtype: torch.dtype) -> None:
    if torch.cuda.is_available():
        pytest.skip("the kernels were compiled for a GPU")
    judge(config, dtype, "cpu")


FIXED = [
    Config(CHANNEL, (2, 5, 3, 6), (3, 3), padding=(1, 1), bias=True, residual="channels_last", activation="relu"),
    Config(CHANNEL, (2, 33, 17, 40), (1, 1), stride=(2, 2), layout="channels_last"),
    Config(
        CHANNEL, (1, 80, 40, 16), (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), layout="sliced",
        activation="silu",
    ),
    Config(CHANNEL, (3, 16, 150, 8), (5, 1), (6, 9), stride=(3, 2), padding=(4, 3), residual="expanded"),
    Config(CHANNEL, (1, 260, 304, 16), (1, 1), (3, 3), stride=(1, 2), layout="channels_last", bias=True),
]  # fmt: skip


@poisoned
@on_devices
@pytest.mark.parametrize("config", FIXED)
def test_chosen_convolutions(config: Config, device: str, dtype: torch.dtype) -> None:
    """Ranks of one accumulator and two, of several passes, kept in registers or not; channels of several steps."""
    judge(config, dtype, device)


@poisoned
@on_devices
def test_the_same_bits_every_time(device: str, dtype: torch.dtype) -> None:
    config = Config(CHANNEL, (2, 5, 40, 20), (2, 2), (9, 9), layout="channels_last", bias=True)
    tensors = config.tensors(dtype, device)
    first = kernel_results(config, tensors)
    for _ in range(2 if device == "cpu" else 100):
        again = kernel_results(config, tensors)
        assert all(torch.equal(first[name], again[name]) for name in first)


@poisoned
@on_devices
def test_nothing_is_written_around_the_results(device: str, dtype: torch.dtype) -> None:
    config = Config(CHANNEL, (2, 5, 20, 6), (3, 3), (8, 9), stride=(2, 1), padding=(1, 1))
    tensors = config.tensors(dtype, device)
    x, grad, first, second = (tensors[name] for name in ("x", "grad", "first", "second"))
    geometry = (config.stride, config.padding, config.dilation)
    wanted = kernel_results(config, tensors)
    whole, out = guarded(grad.shape, dtype, device)
    ChannelKernels().prepare(x, (first, second), None, geometry)(x, None, out, "none")
    assert torch.equal(out, wanted["out"])
    whole_x, grad_x = guarded(x.shape, dtype, device)
    turned = (second[:, :, 0, 0].t(), first.transpose(0, 1), None)
    _Convolution(grad, turned, (x.shape[2], x.shape[3]), geometry, True).run(grad_x)
    assert torch.equal(grad_x, wanted["x"])
    for each, inside in ((whole, out), (whole_x, grad_x)):
        inside.fill_(7.0)
        assert bool((each == 7.0).all())


@pytest.mark.parametrize("dimension", range(4))
def test_offsets_beyond_31_bits(dimension: int) -> None:
    shape = [2, 2, 3, 3]
    shape[dimension] = 3
    config = Config(CHANNEL, (shape[0], shape[1], 3, shape[1]), (2, 2), stride=(1, 1), padding=(1, 1), dilation=(2, 2))
    factors = [config.tensors(torch.float16, "cpu")[name] for name in CHANNEL.names]
    near_x, near_grad = randn(*shape).half(), randn(*shape, seed=1).half()
    x, residual, out, grad = (far_apart(shape, dimension) for _ in range(4))
    for each, value in ((x, near_x), (residual, near_grad), (grad, near_grad)):
        each.copy_(value)
    geometry = ((1, 1), (1, 1), (2, 2))
    ChannelKernels().prepare(x, factors, None, geometry)(x, residual, out, "none")
    wanted = channel_svd_conv2d(near_x, *factors, residual=near_grad, padding=1, dilation=2, backend="triton")
    assert torch.equal(out, wanted)
    # The gradient of x is written to such a map by the kernel itself.
    turned = (factors[1][:, :, 0, 0].t(), factors[0].transpose(0, 1), None)
    _Convolution(grad, turned, (shape[2], shape[3]), geometry, True).run(out)
    near = ChannelKernels().backward(near_grad, near_x, factors, geometry, (True, True, True))
    found = ChannelKernels().backward(grad, x, factors, geometry, (False, True, True))
    assert all(torch.equal(a, b) for a, b in zip((out, *found[1:]), near, strict=True))


@poisoned
@on_devices
def test_infinities_stay_what_they_are(device: str, dtype: torch.dtype) -> None:
    """Zeros that pad the channels or the rank must not meet an infinite entry: the product is no number."""
    tensors = {name: each.abs() for name, each in FIXED[0].tensors(dtype, device).items()}
    tensors["x"][0, 1, 2, 2] = math.inf
    given = {name: tensors[name] for name in ("x", "first", "second")}
    found, wanted = (channel_svd_conv2d(**given, padding=1, backend=backend) for backend in ("triton", "sequence"))
    assert bool(wanted.isinf().any())
    assert torch.equal(found.isinf(), wanted.isinf())
    assert not bool(found.isnan().any())
    # The same of the gradient of x, whose map between the factors is the projected gradient.
    grad = tensors["grad"].clone()
    grad[0, 1, 2, 2] = math.inf
    geometry, factors = ((1, 1), (1, 1), (1, 1)), [given["first"], given["second"]]
    found = ChannelKernels().backward(grad, given["x"], factors, geometry, (True, False, False))[0]
    wanted = reference.svd_conv.channel_conv2d_backward(grad, given["x"], *factors, *geometry, (True, False, False))[0]
    assert bool(wanted.isinf().any())
    assert torch.equal(found.isinf(), wanted.isinf())
    assert not bool(found.isnan().any())
    for activation in ("relu", "silu"):
        bad = torch.full_like(given["x"], math.nan)
        assert bool(channel_svd_conv2d(**{**given, "x": bad}, activation=activation, backend="triton").isnan().all())


@poisoned
@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=3)))
def test_only_what_is_asked_for_is_computed(needs: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(CHANNEL, (1, 3, 2, 4), (3, 3), (2, 2), padding=(1, 1))
    tensors = config.tensors(torch.float32, "cpu")
    arguments = tensors["grad"], tensors["x"], [tensors[name] for name in CHANNEL.names]
    geometry = (config.stride, config.padding, config.dilation)
    wanted = ChannelKernels().backward(*arguments, geometry, (True,) * 3)
    watched = {"tucker2": ("pack", "convolve"), "tucker2_weights": ("project", "weight_gradient")}
    calls = calls_of(watched, monkeypatch)
    found = ChannelKernels().backward(*arguments, geometry, needs)
    for need, mine, full in zip(needs, found, wanted, strict=True):
        assert torch.equal(mine, full) if need else mine is None
    x, first, second = needs
    assert calls.count("weight_gradient") == first + second
    assert calls.count("project") == first
    assert calls.count("convolve") == x + second
    assert calls.count("pack") == (x or first) + second


@poisoned
@on_devices
def test_autograd_takes_the_kernels_gradients(device: str, dtype: torch.dtype) -> None:
    config = replace(FIXED[0], residual="contiguous")
    tensors = config.tensors(dtype, device)
    leaves = {name: each.requires_grad_() for name, each in tensors.items() if name != "grad"}
    out = channel_svd_conv2d(**leaves, **config.geometry, activation="relu", backend="triton")
    found = dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), tensors["grad"]), strict=True))
    masked = tensors["grad"] * (out > 0)
    wanted = kernel_results(config, {name: each.detach() for name, each in {**tensors, "grad": masked}.items()})
    assert all(torch.equal(found[name], wanted[name]) for name in CHANNEL.differentiated)
    assert torch.equal(found["residual"], masked)
    assert torch.equal(found["bias"], masked.sum((0, 2, 3)))


@poisoned
def test_second_derivatives_go_through_the_library() -> None:
    config = Config(CHANNEL, (2, 3, 2, 4), (3, 2), padding=(1, 0), stride=(2, 1), bias=True)

    def twice(dtype: torch.dtype, backend: str) -> tuple[Tensor, ...]:
        leaves = {k: v.requires_grad_() for k, v in config.tensors(dtype, "cpu").items() if k != "grad"}
        out = channel_svd_conv2d(**leaves, **config.geometry, backend=backend)
        grads = torch.autograd.grad(out.square().sum(), list(leaves.values()), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), list(leaves.values()))

    found, wanted = twice(torch.float32, "triton"), twice(torch.float64, "sequence")
    assert max(max_relative(a, b) for a, b in zip(found, wanted, strict=True)) <= 1e-4


@on_devices
def test_empty_batches(device: str, dtype: torch.dtype) -> None:
    tensors = FIXED[0].tensors(dtype, device)
    x = tensors["x"][:0].requires_grad_()
    out = channel_svd_conv2d(x, tensors["first"], tensors["second"], backend="triton")
    out.sum().backward()
    assert out.shape[0] == x.grad.shape[0] == 0


@pytest.mark.gpu
@on_devices
def test_a_graph_replays_it(device: str, dtype: torch.dtype) -> None:
    if device == "cpu":
        pytest.skip("graphs are a GPU's")
    config = Config(CHANNEL, (2, 16, 24, 16), (3, 3), (15, 15), padding=(1, 1), layout="channels_last", bias=True)
    tensors = config.tensors(dtype, device)
    kernel_results(config, tensors)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernel_results(config, tensors)
    tensors["x"].copy_(tensors["x"].flip(0))
    graph.replay()
    wanted = kernel_results(config, tensors)
    assert all(torch.equal(captured[name], wanted[name]) for name in wanted)


WORK = _backends.ConvWork(
    batch=32, in_channels=64, out_channels=64, size=(56, 56), kernel=(3, 3), ranks=(32, 32), stride=(1, 1),
    padding=(1, 1), dilation=(1, 1), channels_last=True, call="forward",
)  # fmt: skip


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({}, ""),
        (
            {"dilation": (16, 16)},
            "the Triton kernels hold every point that a pixel's taps span, at most 1024, not 33×33",
        ),
        (
            {"batch": 1 << 20},
            "the Triton kernels count the pixels of a batch, its padding included, in 31 bits",
        ),
        (
            {"in_channels": 20000, "ranks": (20000, 20000)},
            "the Triton kernels count the weights, their padding included, in 31 bits",
        ),
    ],
)
def test_each_refusal(more: dict, reason: str) -> None:
    here = _backends.Facts(
        op="channel_svd_conv2d", device="cuda", dtype=torch.float16, interpreter=False, missing_triton="",
        missing_cuda="", missing_host="", work=replace(WORK, **more),
    )  # fmt: skip
    assert _backends.explain(here)["triton"] == _backends.Verdict(reason == "", reason)


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_what_is_expected_is_what_the_library_computes(activation: str) -> None:
    check_expected(replace(FIXED[2], bias=True, residual="sliced", activation=activation, stride=(2, 3)))
