"""The Triton kernels of cp_conv2d and decoupled_svd_conv2d, one kernel, against float64."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import EPS, LAYOUTS, max_relative, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_cases import (
    Config,
    Form,
    calls_of,
    far_apart,
    guarded,
    kernel_results,
    on_devices,
    poisoned,
    quick,
)  # fmt: skip

from fastrank import _native, reference
from fastrank.ops import cp_conv2d, decoupled_svd_conv2d
from fastrank.ops._depthwise_triton import TritonKernels, _Convolution
from fastrank.ops._tucker2_triton import _tf32

__all__ = ["quick"]  # a fixture


def wide(depthwise: Tensor) -> Tensor:
    """The depthwise pass and the sum over R as one kernel (O, R · O, kh, kw) of the library's."""
    rank, outs, *kernel = depthwise.shape
    same = torch.eye(outs, dtype=depthwise.dtype, device=depthwise.device)
    return (same[:, None, :, None, None] * depthwise).reshape(outs, rank * outs, *kernel)


def draw_cp(i: int, ranks: list[int], o: int, kernel: tuple[int, int]) -> list[Tensor]:
    """Factors that keep the variance of their input."""
    (rank,), share = ranks, math.sqrt(kernel[0] * kernel[1] * ranks[0])
    vertical, horizontal = randn(rank, o, kernel[0], seed=2) / share, randn(rank, o, kernel[1], seed=3)
    return [randn(rank, o, i, seed=1) / math.sqrt(i), vertical, horizontal]


def draw_decoupled(i: int, ranks: list[int], o: int, kernel: tuple[int, int]) -> list[Tensor]:
    depthwise = randn(ranks[0], o, *kernel, seed=2) / math.sqrt(ranks[0] * kernel[0] * kernel[1])
    return [randn(ranks[0], o, i, seed=1) / math.sqrt(i), depthwise]


CP = Form(
    ("pointwise", "vertical", "horizontal"), cp_conv2d, TritonKernels(), draw_cp,
    lambda p, v, h: [p.flatten(0, 1)[..., None, None], wide(reference.conv.cp_depthwise(v, h))], 1,
)  # fmt: skip
DECOUPLED = Form(
    ("pointwise", "depthwise"), decoupled_svd_conv2d, TritonKernels(), draw_decoupled,
    lambda p, d: [p.flatten(0, 1)[..., None, None], wide(d)], 1,
)  # fmt: skip


def expected(config: Config, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `kernel_results` has to give, by two convolutions of the library, of tensors in float64."""
    leaves = {name: each.detach().requires_grad_(name in config.form.differentiated) for name, each in tensors.items()}
    first, second = config.form.stages(*(leaves[name] for name in config.form.names))
    out = F.conv2d(F.conv2d(leaves["x"], first), second, None, **config.geometry)
    grads = torch.autograd.grad(out, [leaves[name] for name in config.form.differentiated], leaves["grad"])
    if "bias" in tensors:
        out = out + tensors["bias"][:, None, None]
    out = reference.conv.epilogue(out, tensors.get("residual"), config.activation).detach()
    return {"out": out, **dict(zip(config.form.differentiated, grads, strict=True))}


def judge(config: Config, dtype: torch.dtype, device: str) -> None:
    """Every entry is off by no more than rounding can make it: bounds that hold always, not with high probability.

    A rounding to the dtype is off by half an eps. Every result has two at most, of a map (z, or its gradient) and of
    itself, and float32 sums of fewer than `terms` rounded products; all are relative to the same sums over absolute
    values. Below the normal numbers a rounding is off by half of the least number instead, times what follows it.
    No activation is steeper than 1.1. TF32 cuts both operands of a product to 10 bits.
    """
    tensors = config.tensors(dtype, device)
    exact = {name: each.double() for name, each in tensors.items()}
    wanted = expected(config, exact)
    absolute = {name: each.abs() for name, each in exact.items()}
    sizes = expected(replace(config, activation="none"), absolute)
    pixels = max(each.shape[0] * each.shape[2] * each.shape[3] for each in (tensors["x"], tensors["grad"]))
    terms = pixels + sum(tensors[name].numel() for name in config.form.names) + 16
    share = 2 * EPS[dtype] / 2 + terms * EPS[torch.float32]
    if device == "cuda" and _tf32(dtype):
        share += 2 * 2.0**-10
    least = torch.finfo(dtype).tiny * EPS[dtype] * (1 + sum(float(each.sum()) for each in absolute.values()))
    for name, found in kernel_results(config, tensors).items():
        assert found.dtype == dtype, name
        assert found.shape == wanted[name].shape, name
        allowed = 1.1 * share * (1 + share) * sizes[name] + least
        error = (found.double() - wanted[name]).abs() / allowed
        assert bool((error <= 1).all()), f"{name}: {float(error.max())} times what roundings do"


# The interpreter takes its time: paths, kernels and maps are small.
edges, steps = st.sampled_from([1, 2, 2, 3, 3, 4]), st.sampled_from([1, 1, 1, 2, 2, 3])
pairs = st.tuples(steps, steps)
any_config = st.builds(
    Config,
    st.sampled_from([CP, DECOUPLED]),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 20), st.sampled_from([1, 1, 2, 2, 3, 5]), st.integers(1, 20)),
    kernel=st.tuples(edges, edges),
    extra=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    stride=pairs,
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=pairs,
    layout=st.sampled_from(LAYOUTS),
    bias=st.booleans(),
    residual=st.sampled_from(("", *LAYOUTS)),
    activation=st.sampled_from(("none", "relu", "silu")),
)


@poisoned
@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@settings(max_examples=300)
@given(config=any_config, dtype=st.sampled_from([torch.float32, torch.float16]))
def test_any_convolution_under_the_interpreter(config: Config, dtype: torch.dtype) -> None:
    if torch.cuda.is_available():
        pytest.skip("the kernels were compiled for a GPU")
    judge(config, dtype, "cpu")


FIXED = [
    Config(CP, (2, 5, 3, 6), (3, 3), padding=(1, 1), bias=True, residual="channels_last", activation="relu"),
    Config(CP, (2, 33, 1, 40), (1, 1), stride=(2, 2), layout="channels_last"),
    Config(
        DECOUPLED, (1, 8, 6, 33), (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), layout="sliced",
        activation="silu",
    ),
    Config(CP, (3, 70, 2, 8), (5, 1), (6, 9), stride=(3, 2), padding=(4, 3), residual="expanded"),
    Config(DECOUPLED, (1, 8, 9, 20), (7, 7), (1, 3), padding=(2, 3), layout="channels_last", bias=True),
    Config(CP, (3, 5, 2, 6), (3, 3), (15, 16), padding=(1, 1), residual="contiguous", activation="silu"),
]  # fmt: skip


@poisoned
@on_devices
@pytest.mark.parametrize("config", FIXED)
def test_chosen_convolutions(config: Config, device: str, dtype: torch.dtype) -> None:
    """One block of output channels and several, one step over the channels and several, kernels beyond a step, several
    programs that take several tiles each."""
    judge(config, dtype, device)


@poisoned
@on_devices
def test_paths_in_groups(device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many that z is made for some of them at a time, the last time for fewer."""
    _native.triton_kernels("depthwise_weights")  # its lists of kernels are planned as it is imported
    plans = _native.triton_kernels("depthwise_plan")
    config = Config(DECOUPLED, (1, 3, 5, 14), (3, 3), (3, 3), padding=(1, 1))
    # Room for two paths of 16 channels and the halo of a map of 4 by 4 pixels.
    monkeypatch.setattr(plans, "SCRATCH", 2 * 6 * 6 * 16 * dtype.itemsize)
    made = []
    monkeypatch.setattr(plans, "plan", lambda *a, real=plans.plan.__wrapped__: (made.append(real(*a)), made[-1])[1])
    judge(config, dtype, device)
    assert {(plan.options["GROUP"], plan.packing.ranks) for plan in made} == {(2, 6)}


@poisoned
@on_devices
@pytest.mark.parametrize("form", [CP, DECOUPLED])
def test_the_same_bits_every_time(form: Form, device: str, dtype: torch.dtype) -> None:
    config = Config(form, (2, 5, 3, 18), (2, 2), (4, 4), layout="channels_last", bias=True)
    tensors = config.tensors(dtype, device)
    first = kernel_results(config, tensors)
    for _ in range(2 if device == "cpu" else 100):
        again = kernel_results(config, tensors)
        assert all(torch.equal(first[name], again[name]) for name in first)


@poisoned
@on_devices
def test_nothing_is_written_around_the_results(device: str, dtype: torch.dtype) -> None:
    config = Config(DECOUPLED, (2, 5, 3, 6), (3, 3), (5, 4), stride=(2, 1), padding=(1, 1))
    tensors = config.tensors(dtype, device)
    x, grad, factors = tensors["x"], tensors["grad"], [tensors[name] for name in config.form.names]
    geometry, wanted = tuple(config.geometry.values()), kernel_results(config, tensors)
    size = tuple(grad.shape[2:])
    whole, out = guarded(grad.shape, dtype, device)
    TritonKernels().prepare(x, factors, None, geometry)(x, None, out, "none")
    whole_x, grad_x = guarded(x.shape, dtype, device)
    back = _Convolution(x, factors, size, geometry, True)
    back.input_gradient(grad, grad_x, False)
    for block, inside, name in ((whole, out, "out"), (whole_x, grad_x, "x")):
        assert torch.equal(inside, wanted[name])
        inside.fill_(7.0)
        assert bool((block == 7.0).all()), name
    # The gradients of z and of the depthwise weights are contiguous: guarded in a line.
    kernels, pixels = _native.triton_kernels("depthwise"), x.shape[0] * x.shape[2] * x.shape[3]
    line = torch.full((pixels * 18 + 64,), 7.0, dtype=dtype, device=device)
    middle = line[32:-32].view(x.shape[0], *x.shape[2:], 18)
    kernels.input_gradient(grad, back._packed, back._work, back._plan, middle=middle)
    assert torch.equal(middle.permute(0, 3, 1, 2), back.input_gradient(grad, None, True))
    kernels, ahead = _native.triton_kernels("depthwise_weights"), _Convolution(x, factors, size, geometry, False)
    ends = torch.full((3 * 6 * 9 + 64,), 7.0, dtype=dtype, device=device)
    found = ends[32:-32].view(3, 6, 3, 3)
    kernels.depthwise_gradient(x, ahead._packed[0], grad, found, ahead._work, ahead._plan, ahead.tf32)
    assert torch.equal(found, wanted["depthwise"])
    for each in (line, ends):
        assert bool((each[:32] == 7.0).all())
        assert bool((each[-32:] == 7.0).all())


@pytest.mark.parametrize("dimension", range(4))
def test_offsets_beyond_31_bits(dimension: int) -> None:
    """Maps whose elements lie 2**30 apart along one dimension."""
    shape = [2, 2, 3, 3]
    shape[dimension] = 3
    config = Config(DECOUPLED, (shape[0], shape[1], 2, shape[1]), (1, 1))
    near = {**config.tensors(torch.float16, "cpu"), "x": randn(*shape).half(), "grad": randn(*shape, seed=1).half()}
    factors, geometry = [near[name] for name in config.form.names], ((1, 1), (0, 0), (1, 1))
    x, residual, out, grad, grad_x = (far_apart(shape, dimension) for _ in range(5))
    for each, value in ((x, near["x"]), (residual, near["grad"]), (grad, near["grad"])):
        each.copy_(value)
    TritonKernels().prepare(x, factors, None, geometry)(x, residual, out, "none")
    assert torch.equal(out, decoupled_svd_conv2d(near["x"], *factors, residual=near["grad"], backend="triton"))
    found = TritonKernels().backward(grad, x, factors, geometry, (False, True, True))
    wanted = TritonKernels().backward(near["grad"], near["x"], factors, geometry, (True, True, True))
    assert all(torch.equal(a, b) for a, b in zip(found[1:], wanted[1:], strict=True))
    _Convolution(x, factors, (shape[2], shape[3]), geometry, True).input_gradient(grad, grad_x, False)
    assert torch.equal(grad_x, wanted[0])


@poisoned
@on_devices
@pytest.mark.parametrize("config", [FIXED[0], FIXED[2]])
def test_infinities_stay_what_they_are(config: Config, device: str, dtype: torch.dtype) -> None:
    """Nothing that pads paths, channels, tiles or maps meets an infinite entry: the product would be no number.

    All else is positive. So infinite is what has a part from such an entry: what is not zero where all others are.
    """
    config = replace(config, bias=False, residual="", activation="none", layout="contiguous")
    tensors = {name: each.abs() + 0.1 for name, each in config.tensors(dtype, device).items()}
    exact = {name: each.double() for name, each in tensors.items()}
    parts = []
    # At a border the gradient's would meet the padding's zeros, in the sums for the depthwise weights.
    for name, place in (("x", 0), ("grad", 1)):
        tensors[name][0, 1, place, place] = math.inf
        parts.append(expected(config, {**exact, name: tensors[name].isinf().double()}))
    found = kernel_results(config, tensors)
    for name, each in found.items():
        places = [part[name] != 0 for part, given in zip(parts, ("x", "grad"), strict=True) if met(given, name)]
        assert torch.equal(each.isinf(), torch.stack(places).any(0)), name
        assert not bool(each.isnan().any()), name


def met(given: str, result: str) -> bool:
    """Whether a result is a sum over entries of x, or of the output's gradient."""
    return given != {"out": "grad", "x": "x"}.get(result)


@poisoned
@on_devices
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_no_number_stays_none(activation: str, device: str, dtype: torch.dtype) -> None:
    tensors = FIXED[0].tensors(dtype, device)
    factors = {name: tensors[name] for name in CP.names}
    bad = torch.full_like(tensors["x"], math.nan)
    assert bool(cp_conv2d(bad, **factors, padding=1, activation=activation, backend="triton").isnan().all())


@poisoned
@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=4)))
def test_only_what_is_asked_for_is_computed(needs: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(CP, (1, 3, 2, 4), (3, 3), (2, 2), padding=(1, 1))
    tensors = config.tensors(torch.float32, "cpu")
    arguments = tensors["grad"], tensors["x"], [tensors[name] for name in config.form.names]
    geometry = tuple(config.geometry.values())
    wanted = TritonKernels().backward(*arguments, geometry, (True,) * 4)
    modules = {
        "depthwise": ("pack", "input_gradient"),
        "depthwise_weights": ("depthwise_gradient",),
        "tucker2_weights": ("weight_gradient",),
    }
    calls = calls_of(modules, monkeypatch)
    found = TritonKernels().backward(*arguments, geometry, needs)
    for need, mine, full in zip(needs, found, wanted, strict=True):
        assert torch.equal(mine, full) if need else mine is None
    x, pointwise, vertical, horizontal = needs
    assert calls.count("input_gradient") == (x or pointwise)
    assert calls.count("weight_gradient") == pointwise
    assert calls.count("depthwise_gradient") == (vertical or horizontal)
    assert calls.count("pack") == (x or pointwise) + (vertical or horizontal)


@poisoned
@on_devices
@pytest.mark.parametrize("form", [CP, DECOUPLED])
def test_autograd_takes_the_kernels_gradients(form: Form, device: str, dtype: torch.dtype) -> None:
    config = replace(FIXED[0], form=form, residual="contiguous")
    tensors = config.tensors(dtype, device)
    leaves = {name: each.requires_grad_() for name, each in tensors.items() if name != "grad"}
    out = form.operator(**leaves, **config.geometry, activation="relu", backend="triton")
    found = dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), tensors["grad"]), strict=True))
    masked = tensors["grad"] * (out > 0)
    wanted = kernel_results(config, {name: each.detach() for name, each in {**tensors, "grad": masked}.items()})
    assert all(torch.equal(found[name], wanted[name]) for name in form.differentiated)
    assert torch.equal(found["residual"], masked)
    assert torch.equal(found["bias"], masked.sum((0, 2, 3)))


@poisoned
@pytest.mark.parametrize("form", [CP, DECOUPLED])
def test_second_derivatives_go_through_the_library(form: Form) -> None:
    config = Config(form, (2, 3, 2, 4), (3, 2), padding=(1, 0), stride=(2, 1), bias=True, activation="silu")

    def twice(dtype: torch.dtype, backend: str) -> tuple[Tensor, ...]:
        leaves = {k: v.requires_grad_() for k, v in config.tensors(dtype, "cpu").items() if k != "grad"}
        out = form.operator(**leaves, **config.geometry, activation="silu", backend=backend)
        grads = torch.autograd.grad(out.square().sum(), list(leaves.values()), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), list(leaves.values()))

    found, wanted = twice(torch.float32, "triton"), twice(torch.float64, "sequence")
    assert max(max_relative(a, b) for a, b in zip(found, wanted, strict=True)) <= 1e-4


@on_devices
@pytest.mark.parametrize("form", [CP, DECOUPLED])
def test_empty_batches(form: Form, device: str, dtype: torch.dtype) -> None:
    tensors = replace(FIXED[0], form=form).tensors(dtype, device)
    x = tensors["x"][:0].requires_grad_()
    out = form.operator(x, *(tensors[name] for name in form.names), backend="triton")
    out.sum().backward()
    assert out.shape[0] == x.grad.shape[0] == 0


GRAPHED = Config(CP, (2, 16, 3, 24), (3, 3), (15, 15), padding=(1, 1), layout="channels_last", bias=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_graph_replays_it(dtype: torch.dtype) -> None:
    tensors = GRAPHED.tensors(dtype, "cuda")
    kernel_results(GRAPHED, tensors)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernel_results(GRAPHED, tensors)
    tensors["x"].copy_(tensors["x"].flip(0))
    graph.replay()
    wanted = kernel_results(GRAPHED, tensors)
    assert all(torch.equal(captured[name], wanted[name]) for name in wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("form", [CP, DECOUPLED])
def test_a_compiled_graph_calls_it(form: Form) -> None:
    config = replace(GRAPHED, form=form)
    tensors = config.tensors(torch.bfloat16, "cuda")
    leaves = [tensors[name].requires_grad_() for name in form.differentiated]

    def call(*inputs: Tensor) -> Tensor:
        return form.operator(*inputs, **config.geometry, backend="triton")

    compiled = torch.compile(call, fullgraph=True)
    found, wanted = (
        (out, *torch.autograd.grad(out, leaves, tensors["grad"])) for out in (compiled(*leaves), call(*leaves))
    )
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.gpu
def test_more_elements_than_31_bits_count() -> None:
    """A batch of 2**31 elements and more: its last image as if it were alone."""
    config = Config(CP, (1, 64, 1, 64), (3, 3), (254, 254), padding=(1, 1), layout="channels_last")
    tensors = config.tensors(torch.bfloat16, "cuda")
    factors = [tensors[name] for name in CP.names]
    count = 2**31 // tensors["x"].numel() + 2
    x = tensors["x"].expand(count, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    assert x.numel() > 2**31
    out = cp_conv2d(x, *factors, padding=1, backend="triton")
    assert torch.equal(out[-1:], cp_conv2d(x[-1:], *factors, padding=1, backend="triton"))
