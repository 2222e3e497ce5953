"""The Triton kernels of tucker2_conv2d against float64, judged by the error of three library convolutions."""

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

from fastrank import _native
from fastrank.ops import _tucker2_triton, tucker2_conv2d
from fastrank.ops._tucker2_triton import TritonKernels, _Convolution

__all__ = ["quick"]  # a fixture


def draw(i: int, ranks: list[int], o: int, kernel: tuple[int, int]) -> list[Tensor]:
    r, s = ranks
    return [
        randn(r, i, seed=1) / math.sqrt(i),
        randn(s, r, *kernel, seed=2) / math.sqrt(r * kernel[0] * kernel[1]),
        randn(o, s, seed=3) / math.sqrt(s),
    ]


def stages(w_in: Tensor, core: Tensor, w_out: Tensor) -> list[Tensor]:
    return [w_in[:, :, None, None], core, w_out[:, :, None, None]]


TUCKER2 = Form(("w_in", "core", "w_out"), tucker2_conv2d, TritonKernels(), draw, stages, 1)


@poisoned
@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@settings(max_examples=300)
@given(config=configs(TUCKER2, 2), dtype=st.sampled_from([torch.float32, torch.float16]))
def test_any_convolution_under_the_interpreter(config: Config, dtype: torch.dtype) -> None:
    if torch.cuda.is_available():
        pytest.skip("the kernels were compiled for a GPU")
    judge(config, dtype, "cpu")


FIXED = [
    Config(TUCKER2, (2, 5, 3, 4, 6), (3, 3), padding=(1, 1), bias=True, residual="channels_last", activation="relu"),
    Config(TUCKER2, (2, 33, 17, 31, 40), (1, 1), stride=(2, 2), layout="channels_last"),
    Config(
        TUCKER2, (1, 8, 130, 40, 16), (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), layout="sliced",
        activation="silu",
    ),
    Config(TUCKER2, (3, 16, 24, 150, 8), (5, 1), (6, 9), stride=(3, 2), padding=(4, 3), residual="expanded"),
    Config(TUCKER2, (1, 8, 304, 304, 16), (1, 1), (3, 3), stride=(1, 2), layout="channels_last", bias=True),
]  # fmt: skip


@poisoned
@on_devices
@pytest.mark.parametrize("config", FIXED)
def test_chosen_convolutions(config: Config, device: str, dtype: torch.dtype) -> None:
    """Ranks of one accumulator and two, of several passes, kept in registers or not."""
    judge(config, dtype, device)


@poisoned
@on_devices
def test_the_same_bits_every_time(device: str, dtype: torch.dtype) -> None:
    config = Config(TUCKER2, (2, 5, 40, 37, 20), (2, 2), (9, 9), layout="channels_last", bias=True)
    tensors = config.tensors(dtype, device)
    first = kernel_results(config, tensors)
    for _ in range(2 if device == "cpu" else 100):
        again = kernel_results(config, tensors)
        assert all(torch.equal(first[name], again[name]) for name in first)


@poisoned
@on_devices
def test_nothing_is_written_around_the_results(device: str, dtype: torch.dtype) -> None:
    config = Config(TUCKER2, (2, 5, 20, 18, 6), (3, 3), (8, 9), stride=(2, 1), padding=(1, 1))
    tensors = config.tensors(dtype, device)
    x, grad, factors = tensors["x"], tensors["grad"], [tensors[name] for name in TUCKER2.names]
    geometry, sizes = (config.stride, config.padding, config.dilation), (7, 2, 3)
    wanted = kernel_results(config, tensors)
    whole, out = guarded(grad.shape, dtype, device)
    TritonKernels().prepare(x, factors, None, geometry)(x, None, out, "none")
    assert torch.equal(out, wanted["out"])
    turned = (factors[2].t(), factors[1].transpose(0, 1), factors[0].t())
    whole_x, grad_x = guarded(x.shape, dtype, device)
    _Convolution(grad, turned, tuple(x.shape[2:]), geometry, True).run(grad_x)
    assert torch.equal(grad_x, wanted["x"])
    for each, inside in ((whole, out), (whole_x, grad_x)):
        inside.fill_(7.0)
        assert bool((each == 7.0).all())
    # The sums over the shares of the pixels.
    kernels = _native.triton_kernels("tucker2_weights")
    line = torch.full((math.prod(sizes) + 64,), 7.0, dtype=dtype, device=device)
    partials = torch.ones(3, sizes[2], 16, 16, device=device)
    kernels.sum_kernel[(1,)](
        partials, line[32:], 3, partials.stride(0), sizes[2], partials.stride(1), sizes[1], 16, math.prod(sizes), 256
    )
    assert bool((line[32:-32] == 3.0).all())
    assert bool((line[:32] == 7.0).all())
    assert bool((line[-32:] == 7.0).all())


@pytest.mark.parametrize("dimension", range(4))
def test_offsets_beyond_31_bits(dimension: int) -> None:
    """Maps whose elements lie 2**30 apart along one dimension, in memory that is reserved and never touched."""
    shape = [2, 2, 3, 3]
    shape[dimension] = 3
    config = Config(TUCKER2, (shape[0], shape[1], 3, 3, shape[1]), (1, 1))
    near = {**config.tensors(torch.float16, "cpu"), "x": randn(*shape).half(), "grad": randn(*shape, seed=1).half()}
    factors = [near[name] for name in TUCKER2.names]
    x, residual, out, grad = (far_apart(shape, dimension) for _ in range(4))
    for each, value in ((x, near["x"]), (residual, near["grad"]), (grad, near["grad"])):
        each.copy_(value)
    geometry = ((1, 1), (0, 0), (1, 1))
    TritonKernels().prepare(x, factors, None, geometry)(x, residual, out, "none")
    wanted = tucker2_conv2d(near["x"], *factors, residual=near["grad"], backend="triton")
    assert torch.equal(out, wanted)
    found = TritonKernels().backward(grad, x, factors, geometry, (False, True, True, True))
    wanted_too = TritonKernels().backward(near["grad"], near["x"], factors, geometry, (False, True, True, True))
    assert all(torch.equal(a, b) for a, b in zip(found[1:], wanted_too[1:], strict=True))


@poisoned
@on_devices
def test_infinities_stay_what_they_are(device: str, dtype: torch.dtype) -> None:
    """Zeros that pad a rank must not meet an infinite entry: the product is no number."""
    tensors = {name: each.abs() for name, each in FIXED[0].tensors(dtype, device).items()}
    tensors["x"][0, 1, 2, 2] = math.inf
    factors = {name: tensors[name] for name in ("x", "w_in", "core", "w_out")}
    found, wanted = (tucker2_conv2d(**factors, padding=1, backend=backend) for backend in ("triton", "sequence"))
    assert bool(wanted.isinf().any())
    assert torch.equal(found.isinf(), wanted.isinf())
    assert not bool(found.isnan().any())
    for activation in ("relu", "silu"):
        bad = torch.full_like(factors["x"], math.nan)
        assert bool(tucker2_conv2d(**{**factors, "x": bad}, activation=activation, backend="triton").isnan().all())


@poisoned
@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=4)))
def test_only_what_is_asked_for_is_computed(needs: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(TUCKER2, (1, 3, 2, 3, 4), (3, 3), (2, 2), padding=(1, 1))
    tensors = config.tensors(torch.float32, "cpu")
    arguments = tensors["grad"], tensors["x"], [tensors[name] for name in TUCKER2.names]
    geometry = (config.stride, config.padding, config.dilation)
    wanted = TritonKernels().backward(*arguments, geometry, (True,) * 4)
    watched = {"tucker2": ("pack", "convolve"), "tucker2_weights": ("project", "weight_gradient")}
    calls = calls_of(watched, monkeypatch)
    found = TritonKernels().backward(*arguments, geometry, needs)
    for need, mine, full in zip(needs, found, wanted, strict=True):
        assert torch.equal(mine, full) if need else mine is None
    x, w_in, core, w_out = needs
    assert calls.count("weight_gradient") == w_in + core + w_out
    assert calls.count("project") == 2 * core
    assert calls.count("convolve") == (x or w_in) + w_out
    assert calls.count("pack") == (x or w_in or core) + (core or w_out)


@poisoned
@on_devices
def test_autograd_takes_the_kernels_gradients(device: str, dtype: torch.dtype) -> None:
    config = replace(FIXED[0], residual="contiguous")
    tensors = config.tensors(dtype, device)
    leaves = {name: each.requires_grad_() for name, each in tensors.items() if name != "grad"}
    out = tucker2_conv2d(**leaves, **config.geometry, activation="relu", backend="triton")
    found = dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), tensors["grad"]), strict=True))
    masked = tensors["grad"] * (out > 0)
    wanted = kernel_results(config, {name: each.detach() for name, each in {**tensors, "grad": masked}.items()})
    assert all(torch.equal(found[name], wanted[name]) for name in TUCKER2.differentiated)
    assert torch.equal(found["residual"], masked)
    assert torch.equal(found["bias"], masked.sum((0, 2, 3)))


@poisoned
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_second_derivatives_go_through_the_library(activation: str) -> None:
    config = Config(TUCKER2, (2, 3, 2, 3, 4), (3, 2), padding=(1, 0), stride=(2, 1), bias=True, activation=activation)

    def twice(dtype: torch.dtype, backend: str) -> tuple[Tensor, ...]:
        leaves = {k: v.requires_grad_() for k, v in config.tensors(dtype, "cpu").items() if k != "grad"}
        out = tucker2_conv2d(**leaves, **config.geometry, activation=activation, backend=backend)
        grads = torch.autograd.grad(out.square().sum(), list(leaves.values()), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), list(leaves.values()))

    found, wanted = twice(torch.float32, "triton"), twice(torch.float64, "sequence")
    assert max(max_relative(a, b) for a, b in zip(found, wanted, strict=True)) <= 1e-4


@on_devices
def test_empty_batches(device: str, dtype: torch.dtype) -> None:
    tensors = FIXED[0].tensors(dtype, device)
    x = tensors["x"][:0].requires_grad_()
    out = tucker2_conv2d(x, tensors["w_in"], tensors["core"], tensors["w_out"], backend="triton")
    out.sum().backward()
    assert out.shape[0] == x.grad.shape[0] == 0


def test_tf32_is_what_convolutions_were_told() -> None:
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            conv.fp32_precision = precision
            assert _tucker2_triton._tf32(torch.float32) == (precision == "tf32")
            assert not _tucker2_triton._tf32(torch.float16)
    finally:
        conv.fp32_precision = before


@pytest.mark.gpu
@on_devices
def test_a_graph_replays_it(device: str, dtype: torch.dtype) -> None:
    if device == "cpu":
        pytest.skip("graphs are a GPU's")
    config = Config(TUCKER2, (2, 16, 24, 20, 16), (3, 3), (15, 15), padding=(1, 1), layout="channels_last", bias=True)
    tensors = config.tensors(dtype, device)
    kernel_results(config, tensors)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernel_results(config, tensors)
    tensors["x"].copy_(tensors["x"].flip(0))
    graph.replay()
    wanted = kernel_results(config, tensors)
    assert all(torch.equal(captured[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_what_is_expected_is_what_the_library_computes(activation: str) -> None:
    check_expected(replace(FIXED[2], bias=True, residual="sliced", activation=activation, stride=(2, 3)))
