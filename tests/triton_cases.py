"""What the tests of the Triton convolutions share: calls, what they have to give, the judge, the examples."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import EPS, LAYOUTS, lay_out, randn
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from fastrank import _native, reference
from fastrank.ops import _tucker2_triton

CASES = [
    ("cpu", torch.float32),
    ("cpu", torch.float16),
    *(pytest.param("cuda", dtype, marks=pytest.mark.gpu) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
]
on_devices = pytest.mark.parametrize(("device", "dtype"), CASES)
poisoned = pytest.mark.usefixtures("poison")


@dataclass(frozen=True)
class Form:
    """A factored convolution: its operator and kernels, and what they have to compute.

    draw: (I, ranks, O, kernel) -> the factors, of a scale that keeps all maps near 1. stages: the factors as kernels of
    the library's convolutions; `strided` is the place of the one that the geometry belongs to.
    """

    names: tuple[str, ...]
    operator: Callable[..., Tensor]
    kernels: Any
    draw: Callable[..., Sequence[Tensor]]
    stages: Callable[..., Sequence[Tensor]]
    strided: int

    @property
    def differentiated(self) -> tuple[str, ...]:
        return "x", *self.names


@dataclass(frozen=True)
class Config:
    """One call. sizes: (N, I, ranks, O); extra: rows and columns beyond the dilated kernel, less the padding."""

    form: Form
    sizes: tuple[int, ...]
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
    def geometry(self) -> dict[str, tuple[int, int]]:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}

    def tensors(self, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
        """x, the factors and the options, of a scale that keeps all maps near 1, and the gradient of the output."""
        n, i, *ranks, o = self.sizes
        reach = [d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilation, strict=True)]
        size = [max(1, a - 2 * p) + e for a, p, e in zip(reach, self.padding, self.extra, strict=True)]
        out = [(h + 2 * p - a) // t + 1 for h, p, a, t in zip(size, self.padding, reach, self.stride, strict=True)]
        made = {"x": lay_out(randn(n, i, *size), self.layout)}
        made |= zip(self.form.names, self.form.draw(i, ranks, o, self.kernel), strict=True)
        if self.bias:
            made["bias"] = randn(o, seed=4)
        if self.residual:
            made["residual"] = lay_out(randn(n, o, *out, seed=5), self.residual)
        made["grad"] = randn(n, o, *out, seed=6)
        return {name: each.to(device, dtype) for name, each in made.items()}


def kernel_results(config: Config, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output, and the gradients of the convolution in it: those of the epilogue are not the kernels'."""
    form, factors = config.form, [tensors[name] for name in config.form.names]
    epilogue = {name: tensors.get(name) for name in ("bias", "residual")}
    out = form.operator(
        tensors["x"], *factors, **epilogue, **config.geometry, activation=config.activation, backend="triton"
    )
    geometry, needs = tuple(config.geometry.values()), (True,) * len(form.differentiated)
    grads = form.kernels.backward(tensors["grad"], tensors["x"], factors, geometry, needs)
    return {"out": out, **dict(zip(form.differentiated, grads, strict=True))}


@dataclass
class Errors:
    """Values in float64, and the variance of what the roundings of a dtype with this eps do to them.

    A value v is rounded by at most half a unit in the last place, so by a number of a range of at most eps |v|: a
    variance of (eps v)² / 12 if it is even.
    """

    eps: float
    value: Tensor
    passed: Tensor | float = 0.0  # variance that came through the convolution
    own: Tensor | float = field(init=False)

    def __post_init__(self) -> None:
        self.own = (self.eps * self.value).square() / 12

    def into(self, through: Callable[[Tensor, Tensor], Tensor], weight: Tensor, exact: bool = False) -> Errors:
        """The map behind a convolution with `weight`, linear in this one; exact: this one was not rounded."""
        variance = torch.zeros_like(self.value) if exact else self.own + self.passed
        return Errors(self.eps, through(self.value, weight), through(variance, weight.square()))

    def summed(self, taps: int, exact: bool) -> Tensor:
        """The variance for sums over pixels: one rounding before the convolution of so many taps reaches as many."""
        return torch.zeros_like(self.value) if exact else self.own + taps * self.passed


def expected(config: Config, tensors: dict[str, Tensor], eps: float) -> dict[str, tuple[Tensor, Tensor]]:
    """(value, standard deviation of what rounds to it) of everything in `kernel_results`, from float64 tensors.

    Maps between the factors are rounded, sums are not, and the result is rounded once, behind the epilogue.
    """
    form, kernels = config.form, config.form.stages(*(tensors[name] for name in config.form.names))
    last = len(kernels) - 1
    options = [tuple(config.geometry.values()) if i == form.strided else (1, 0, 1) for i in range(last + 1)]
    taps = [kernel.shape[2] * kernel.shape[3] for kernel in kernels]
    ahead = [Errors(eps, tensors["x"])]
    for i, kernel in enumerate(kernels):
        ahead.append(ahead[-1].into(lambda z, w, i=i: F.conv2d(z, w, None, *options[i]), kernel, i == 0))
    back, grads = Errors(eps, tensors["grad"]), []
    for i in range(last, -1, -1):
        z, shape = ahead[i], kernels[i].shape
        # Roundings of either map, and of the result.
        pairs = (
            (back.summed(taps[i + 1] if i < last else 1, i == last), z.value.square()),
            (back.value.square(), z.summed(taps[i - 1] if i else 1, i == 0)),
        )
        spread = sum(conv2d_weight(b, shape, a, *options[i]) for a, b in pairs)
        grads.append(Errors(eps, conv2d_weight(z.value, shape, back.value, *options[i]), spread))
        back = back.into(lambda d, w, i=i, z=z: conv2d_input(z.value.shape, w, d, *options[i]), kernels[i], i == last)
    total = ahead[-1].value
    for name, axes in (("bias", (slice(None), None, None)), ("residual", ())):
        total = total + (tensors[name][axes] if name in tensors else 0.0)
    # No activation is steeper than 1.1.
    out = Errors(eps, reference.conv.epilogue(total, None, config.activation), 1.1**2 * ahead[-1].passed)
    found = dict(zip(("out", "x", *form.names), (out, back, *reversed(grads)), strict=True))
    return {
        name: (each.value.view(like.shape), (each.own + each.passed).sqrt().view(like.shape))
        for (name, each), like in zip(found.items(), (total, *(tensors[n] for n in form.differentiated)), strict=True)
    }


def judge(config: Config, dtype: torch.dtype, device: str) -> None:
    """Every entry of the output and of the gradients is off by no more than roundings make it.

    Of the dtype: 13 standard deviations of them (`expected`). Sums of independent errors of bounded range get there
    once in 1e12 times (Hoeffding: 2 exp(-13² / 6)). Images that are equal are rounded alike: the errors of N of them
    add up. Of float32 sums, in any order: an eps a term of the same sums over absolute values, which holds always. TF32
    cuts both operands of every product to 10 bits. Below the normal numbers a rounding loses half of the least one.
    """
    tensors = config.tensors(dtype, device)
    exact = {name: each.double() for name, each in tensors.items()}
    wanted = expected(config, exact, EPS[dtype])
    sizes = expected(replace(config, activation="none"), {name: each.abs() for name, each in exact.items()}, 0.0)
    factors = [tensors[name] for name in config.form.names]
    # Sums over pixels, and over what the factors and their transposes sum over.
    pixels = max(each.shape[0] * each.shape[2] * each.shape[3] for each in (tensors["x"], tensors["grad"]))
    terms = pixels + sum(each.numel() // each.shape[0] + each.numel() // each.shape[1] for each in factors) + 2
    share = 1.1 * terms * EPS[torch.float32]
    if device == "cuda" and _tucker2_triton._tf32(dtype):
        share += 1.1 * 2 * len(factors) * 2.0**-10
    deviations = 13 * math.sqrt(config.sizes[0] if config.layout == "expanded" else 1)
    least = 8 * terms * torch.finfo(dtype).tiny * EPS[dtype]
    for name, found in kernel_results(config, tensors).items():
        want, spread = wanted[name]
        assert found.dtype == dtype, name
        assert found.shape == want.shape, name
        allowed = deviations * spread + share * sizes[name][0] + least
        error = (found.double() - want).abs() / allowed
        assert bool((error <= 1).all()), f"{name}: {float(error.max())} times what roundings do"


def check_expected(config: Config) -> None:
    """The judge's values, which it has from a chain of its own, against the operator and autograd in float64."""
    tensors, form = config.tensors(torch.float64, "cpu"), config.form
    wanted = expected(config, tensors, 0.0)
    leaves = [tensors[name].clone().requires_grad_() for name in form.differentiated]
    epilogue = {name: tensors.get(name) for name in ("bias", "residual")}
    out = form.operator(*leaves, **epilogue, **config.geometry, activation=config.activation, backend="sequence")
    plain = form.operator(*leaves, **config.geometry, backend="sequence")
    grads = torch.autograd.grad(plain, leaves, tensors["grad"])
    for name, found in zip(("out", *form.differentiated), (out, *grads), strict=True):
        torch.testing.assert_close(found.detach(), wanted[name][0], rtol=1e-10, atol=1e-10)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interpreter that does not check every sum of 32-bit integers: a third of its time. The other tests do."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)


# The interpreter takes its time: most ranks, kernels and strides are small.
_ranks = st.one_of(st.integers(1, 16), st.sampled_from([17, 33, 40]))
_edges = st.sampled_from([1, 2, 2, 3, 3, 4])
_steps = st.sampled_from([1, 1, 1, 2, 2, 3])


def configs(form: Form, ranks: int) -> st.SearchStrategy[Config]:
    """Any small call of a form that has so many ranks."""
    return st.builds(
        Config,
        st.just(form),
        sizes=st.tuples(st.integers(1, 3), st.integers(1, 20), *[_ranks] * ranks, st.integers(1, 20)),
        kernel=st.tuples(_edges, _edges),
        extra=st.tuples(st.integers(0, 7), st.integers(0, 7)),
        stride=st.tuples(_steps, _steps),
        padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
        dilation=st.tuples(_steps, _steps),
        layout=st.sampled_from(LAYOUTS),
        bias=st.booleans(),
        residual=st.sampled_from(("", *LAYOUTS)),
        activation=st.sampled_from(("none", "relu", "silu")),
    )


def guarded(shape: Sequence[int], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """A block of sevens, and a tensor two entries inside it along every dimension."""
    whole = torch.full([n + 4 for n in shape], 7.0, dtype=dtype, device=device)
    return whole, whole[tuple(slice(2, n + 2) for n in shape)]


def calls_of(kernels: dict[str, tuple[str, ...]], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the functions of the kernels' modules that are called from now on."""
    calls: list[str] = []

    def watched(real: Callable[..., Any], name: str) -> Callable[..., Any]:
        return lambda *a, **o: (calls.append(name), real(*a, **o))[1]

    for module, names in kernels.items():
        loaded = _native.triton_kernels(module)
        for name in names:
            monkeypatch.setattr(loaded, name, watched(getattr(loaded, name), name))
    return calls


def far_apart(shape: Sequence[int], dimension: int) -> Tensor:
    """A float16 map whose elements lie 2**30 apart along one dimension, in memory that is reserved, hardly touched."""
    apart = 2**30 + 16
    step = [math.prod(shape[i + 1 :]) for i in range(4)]
    step[dimension] = apart
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, 2 * (2 * apart + 4096), flags=flags)
    return torch.frombuffer(memory, dtype=torch.float16).as_strided(tuple(shape), step)
