"""The Triton kernels of tucker2_conv2d against float64, judged by the error of three library convolutions."""

from __future__ import annotations

import itertools
import math
import mmap
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from helpers import EPS, LAYOUTS, lay_out, max_relative, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastrank import _native, reference
from fastrank.ops import _tucker2_triton, tucker2_conv2d
from fastrank.ops._tucker2_triton import TritonKernels, _Convolution

poisoned = pytest.mark.usefixtures("poison")
CASES = [
    ("cpu", torch.float32),
    ("cpu", torch.float16),
    *(pytest.param("cuda", dtype, marks=pytest.mark.gpu) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
]
on_devices = pytest.mark.parametrize(("device", "dtype"), CASES)
COSINE = {torch.float32: 0.999999, torch.float16: 0.9999, torch.bfloat16: 0.9999}


@dataclass(frozen=True)
class Config:
    """One call. sizes: (N, I, R_in, R_out, O); extra: rows and columns beyond the dilated kernel, less the padding."""

    sizes: tuple[int, int, int, int, int]
    kernel: tuple[int, int]
    extra: tuple[int, int] = (4, 5)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    layout: str = "contiguous"
    bias: bool = False
    residual: str = ""  # its layout, where there is one
    activation: str = "none"

    @property
    def geometry(self) -> dict:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}

    def tensors(self, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
        """x, the factors and the options, of a scale that keeps all maps near 1, and the gradient of the output."""
        n, i, r, s, o = self.sizes
        reach = [d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilation, strict=True)]
        size = [max(1, a - 2 * p) + e for a, p, e in zip(reach, self.padding, self.extra, strict=True)]
        out = [(h + 2 * p - a) // t + 1 for h, p, a, t in zip(size, self.padding, reach, self.stride, strict=True)]
        taps = self.kernel[0] * self.kernel[1]
        made = {
            "x": randn(n, i, *size),
            "w_in": randn(r, i, seed=1) / math.sqrt(i),
            "core": randn(s, r, *self.kernel, seed=2) / math.sqrt(r * taps),
            "w_out": randn(o, s, seed=3) / math.sqrt(s),
        }
        if self.bias:
            made["bias"] = randn(o, seed=4)
        if self.residual:
            made["residual"] = lay_out(randn(n, o, *out, seed=5), self.residual)
        made["x"] = lay_out(made["x"], self.layout)
        made["grad"] = randn(n, o, *out, seed=6)
        return {name: each.to(device, dtype) for name, each in made.items()}


FACTORS = ("w_in", "core", "w_out")
GRADIENTS = ("x", *FACTORS)


def results(config: Config, tensors: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """The output, and the gradients of the convolution in it: those of the epilogue are not the kernels'."""
    x, grad, factors = tensors["x"], tensors["grad"], [tensors[name] for name in FACTORS]
    epilogue = {name: tensors.get(name) for name in ("bias", "residual")}
    out = tucker2_conv2d(x, *factors, **epilogue, **config.geometry, activation=config.activation, backend=backend)
    geometry, needs = tuple(config.geometry.values()), (True,) * 4
    if backend == "triton":
        grads = TritonKernels().backward(grad, x, factors, geometry, needs)
    else:
        grads = reference.conv.tucker2_conv2d_backward(grad, x, *factors, *geometry, needs)
    return {"out": out, **dict(zip(GRADIENTS, grads, strict=True))}


class Round(torch.autograd.Function):
    """Values of half precision in float32, and gradients."""

    @staticmethod
    def forward(_, x: Tensor) -> Tensor:
        return x.half().float()

    @staticmethod
    def backward(_, grad: Tensor) -> Tensor:
        return grad.half().float()


def rounded(config: Config, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`results` of three half-precision convolutions with float32 sums: every map that they write is rounded."""
    t = {name: each.float().requires_grad_(name in GRADIENTS) for name, each in tensors.items()}
    z = Round.apply(F.conv2d(t["x"], t["w_in"][:, :, None, None]))
    z = Round.apply(F.conv2d(z, t["core"], None, *config.geometry.values()))
    out = F.conv2d(z, t["w_out"][:, :, None, None])
    grads = torch.autograd.grad(out, [t[name] for name in GRADIENTS], t["grad"])
    out = Round.apply(out if t.get("bias") is None else out + t["bias"][:, None, None])
    out = Round.apply(out if t.get("residual") is None else out + t["residual"])
    out = reference.conv.epilogue(out, None, config.activation)
    return {name: each.detach().half() for name, each in zip(("out", *GRADIENTS), (out, *grads), strict=True)}


def judge(config: Config, dtype: torch.dtype, device: str) -> None:
    """Largest error at most twice the library's, cosine near 1, no bias.

    Where the library happens to be exact: three roundings (z1, z2, the result) of half an eps each, of sums of absolute
    values at most.
    """
    tensors = config.tensors(dtype, device)
    exact = {name: each.double() for name, each in tensors.items()}
    wanted = results(config, exact, "sequence")
    sizes = results(replace(config, activation="none"), {name: each.abs() for name, each in exact.items()}, "sequence")
    emulated = device == "cpu" and dtype is torch.float16  # where torch's own crash on some maps of one column
    library = rounded(config, tensors) if emulated else results(config, tensors, "sequence")
    for name, found in results(config, tensors, "triton").items():
        want = wanted[name]
        assert found.dtype == dtype, name
        assert found.shape == want.shape, name
        error, allowed = found.double() - want, library[name].double() - want
        floor = 1.5 * EPS[dtype] * float(sizes[name].max())
        assert float(error.abs().max()) <= 2 * float(allowed.abs().max()) + floor, name
        if float(want.norm()) <= 1e3 * floor:
            continue  # nothing but roundings is left: they have no direction
        cosine = float(F.cosine_similarity(found.double().flatten(), want.flatten(), 0))
        assert cosine >= COSINE[dtype], name
        assert abs(float(error.mean())) <= 1e-3 * float(want.abs().max()), name


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interpreter that does not check every sum of 32-bit integers: a third of its time. The other tests do."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)


# The interpreter takes its time: most ranks, kernels and strides are small.
ranks = st.one_of(st.integers(1, 16), st.sampled_from([17, 33, 40]))
edges = st.sampled_from([1, 2, 2, 3, 3, 4])
steps = st.sampled_from([1, 1, 1, 2, 2, 3])


@poisoned
@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@settings(max_examples=300)
@given(
    config=st.builds(
        Config,
        sizes=st.tuples(st.integers(1, 3), st.integers(1, 20), ranks, ranks, st.integers(1, 20)),
        kernel=st.tuples(edges, edges),
        extra=st.tuples(st.integers(0, 7), st.integers(0, 7)),
        stride=st.tuples(steps, steps),
        padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
        dilation=st.tuples(steps, steps),
        layout=st.sampled_from(LAYOUTS),
        bias=st.booleans(),
        residual=st.sampled_from(("", *LAYOUTS)),
        activation=st.sampled_from(("none", "relu", "silu")),
    ),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_any_convolution_under_the_interpreter(config: Config, dtype: torch.dtype) -> None:
    if torch.cuda.is_available():
        pytest.skip("the kernels were compiled for a GPU")
    judge(config, dtype, "cpu")


FIXED = [
    Config((2, 5, 3, 4, 6), (3, 3), padding=(1, 1), bias=True, residual="channels_last", activation="relu"),
    Config((2, 33, 17, 31, 40), (1, 1), stride=(2, 2), layout="channels_last"),
    Config(
        (1, 8, 130, 40, 16), (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), layout="sliced", activation="silu"
    ),
    Config((3, 16, 24, 150, 8), (5, 1), (6, 9), stride=(3, 2), padding=(4, 3), residual="expanded"),
    Config((1, 8, 304, 304, 16), (1, 1), (3, 3), stride=(1, 2), layout="channels_last", bias=True),
]


@poisoned
@on_devices
@pytest.mark.parametrize("config", FIXED)
def test_chosen_convolutions(config: Config, device: str, dtype: torch.dtype) -> None:
    """Ranks of one accumulator and two, of several passes, kept in registers or not."""
    judge(config, dtype, device)


@poisoned
@on_devices
def test_the_same_bits_every_time(device: str, dtype: torch.dtype) -> None:
    config = Config((2, 5, 40, 37, 20), (2, 2), (9, 9), layout="channels_last", bias=True)
    tensors = config.tensors(dtype, device)
    first = results(config, tensors, "triton")
    for _ in range(2 if device == "cpu" else 100):
        again = results(config, tensors, "triton")
        assert all(torch.equal(first[name], again[name]) for name in first)


@poisoned
@on_devices
def test_nothing_is_written_around_the_results(device: str, dtype: torch.dtype) -> None:
    config = Config((2, 5, 20, 18, 6), (3, 3), (8, 9), stride=(2, 1), padding=(1, 1))
    tensors = config.tensors(dtype, device)
    x, grad, factors = tensors["x"], tensors["grad"], [tensors[name] for name in FACTORS]
    geometry, sizes = (config.stride, config.padding, config.dilation), (7, 2, 3)

    def guarded(shape: torch.Size) -> tuple[Tensor, Tensor]:
        whole = torch.full([n + 4 for n in shape], 7.0, dtype=dtype, device=device)
        return whole, whole[tuple(slice(2, n + 2) for n in shape)]

    wanted = results(config, tensors, "triton")
    whole, out = guarded(grad.shape)
    TritonKernels().prepare(x, factors, None, geometry)(x, None, out, "none")
    assert torch.equal(out, wanted["out"])
    turned = (factors[2].t(), factors[1].transpose(0, 1), factors[0].t())
    whole_x, grad_x = guarded(x.shape)
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
    shape, apart = [2, 2, 3, 3], 2**30 + 16
    shape[dimension] = 3
    step = [math.prod(shape[i + 1 :]) for i in range(4)]
    step[dimension] = apart
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)

    def far() -> Tensor:
        memory = mmap.mmap(-1, 2 * (2 * apart + 4096), flags=flags)
        return torch.frombuffer(memory, dtype=torch.float16).as_strided(shape, step)

    config = Config((shape[0], shape[1], 3, 3, shape[1]), (1, 1))
    near = {**config.tensors(torch.float16, "cpu"), "x": randn(*shape).half(), "grad": randn(*shape, seed=1).half()}
    factors = [near[name] for name in FACTORS]
    x, residual, out, grad = far(), far(), far(), far()
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
    config = Config((1, 3, 2, 3, 4), (3, 3), (2, 2), padding=(1, 1))
    tensors = config.tensors(torch.float32, "cpu")
    arguments = tensors["grad"], tensors["x"], [tensors[name] for name in FACTORS]
    geometry = (config.stride, config.padding, config.dilation)
    wanted = TritonKernels().backward(*arguments, geometry, (True,) * 4)
    calls = []
    for module, names in (("tucker2", ("pack", "convolve")), ("tucker2_weights", ("project", "weight_gradient"))):
        kernels = _native.triton_kernels(module)
        for name in names:
            real = getattr(kernels, name)
            monkeypatch.setattr(
                kernels, name, lambda *a, real=real, name=name, **o: (calls.append(name), real(*a, **o))[1]
            )
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
    wanted = results(config, {name: each.detach() for name, each in {**tensors, "grad": masked}.items()}, "triton")
    assert all(torch.equal(found[name], wanted[name]) for name in GRADIENTS)
    assert torch.equal(found["residual"], masked)
    assert torch.equal(found["bias"], masked.sum((0, 2, 3)))


@poisoned
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_second_derivatives_go_through_the_library(activation: str) -> None:
    config = Config((2, 3, 2, 3, 4), (3, 2), padding=(1, 0), stride=(2, 1), bias=True, activation=activation)

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
    config = Config((2, 16, 24, 20, 16), (3, 3), (15, 15), padding=(1, 1), layout="channels_last", bias=True)
    tensors = config.tensors(dtype, device)
    results(config, tensors, "triton")  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(config, tensors, "triton")
    tensors["x"].copy_(tensors["x"].flip(0))
    graph.replay()
    wanted = results(config, tensors, "triton")
    assert all(torch.equal(captured[name], wanted[name]) for name in wanted)


@poisoned
def test_the_reference_is_what_the_suite_thinks_it_is() -> None:
    """The sequence that errors are compared with is three library convolutions."""
    config = FIXED[0]
    t = config.tensors(torch.float32, "cpu")
    geometry = (config.stride, config.padding, config.dilation)
    wanted = reference.conv.tucker2_conv2d(
        t["x"], t["w_in"], t["core"], t["w_out"], t["bias"], t["residual"], *geometry, "relu"
    )
    assert torch.equal(results(config, t, "sequence")["out"], wanted)
