"""What several test files share: layouts, errors, planted kernels, the suite that both factored convolutions pass."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastrank import _tables

EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}
LAYOUTS = ("contiguous", "channels_last", "sliced", "expanded")
BACKENDS = ("auto", "sequence", "dense", "reference")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*size, generator=generator(seed), dtype=torch.float64).to(dtype)


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The values of the 4-D x in another layout (`expanded` repeats the first image)."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        wide = x.new_full((x.shape[0], x.shape[1] + 2, x.shape[2] + 1, 2 * x.shape[3]), math.nan)
        wide[:, 1:-1, 1:, ::2] = x
        return wide[:, 1:-1, 1:, ::2]
    if layout == "expanded":
        return x[:1].expand(x.shape)
    return x.contiguous()


def max_relative(found: Tensor, wanted: Tensor) -> float:
    """Largest error relative to the largest wanted value; 0 for empty tensors."""
    assert found.shape == wanted.shape
    if wanted.numel() == 0:
        return 0.0
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-300))


def l2_relative(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-300))


def planted_tucker(out_channels: int, in_channels: int, kernel: int, ranks: tuple[int, int], seed: int = 0) -> Tensor:
    """A float64 kernel (O, I, k, k) of exact Tucker ranks (R_in, R_out)."""
    w_in = randn(ranks[0], in_channels, seed=seed, dtype=torch.float64)
    core = randn(ranks[1], ranks[0], kernel, kernel, seed=seed + 1, dtype=torch.float64)
    w_out = randn(out_channels, ranks[1], seed=seed + 2, dtype=torch.float64)
    return torch.einsum("or,rsyx,si->oiyx", w_out, core, w_in)


class Spare(nn.Module):
    """A network with a plain, a strided, a shared and a grouped convolution; what `convert` meets in the wild."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 16, 3, stride=2, padding=1, bias=False)
        self.twice = nn.Conv2d(16, 16, 3, padding="same")
        self.again = self.twice
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.point = nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(self.stem(x).relu()).relu()
        out: Tensor = self.point(self.grouped(self.again(self.twice(x).relu())))
        return out


class Residual(nn.Module):
    """A stem, a strided block with a 1×1 projection, and a head: the shapes that a ResNet has."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.a, self.b = nn.Conv2d(12, 16, 3, 2, 1, bias=False), nn.Conv2d(16, 16, 3, padding=1)
        self.norm, self.shortcut = nn.BatchNorm2d(16), nn.Conv2d(12, 16, 1, 2, bias=False)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        out: Tensor = self.fc((self.norm(self.b(self.a(x).relu())) + self.shortcut(x)).relu().mean((2, 3)))
        return out


def residual() -> Residual:
    """In float64 and eval mode, the same at every call."""
    torch.manual_seed(0)
    return Residual().double().eval()


def close_gates(layer: nn.Module, *open_gates: int) -> None:
    """Set gates by hand: as many of each penalised vector as asked stay open (at 1), the rest close."""
    with torch.no_grad():
        for gate, count in zip(layer.penalized(), open_gates, strict=True):
            gate.copy_((torch.arange(len(gate)) < count).to(gate.dtype))


class Calling(nn.Module):
    """A function as a module."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


class FactoredConvSuite:
    """What `tucker2_conv2d` and `cp_conv2d` both have to show. Subclasses give op, overload and factors().

    The oracle is one convolution in float64 with the kernel that `merge` builds by NumPy-style broadcasting.
    """

    stages = 3

    @staticmethod
    def op(*args, **options):
        raise NotImplementedError

    @staticmethod
    def overload():
        raise NotImplementedError

    def name(self) -> str:
        return self.overload().name().partition(".")[0].removeprefix("fastrank::")

    def factors(
        self, i: int, o: int, kernel: tuple[int, int], rank: int, dtype: torch.dtype, seed: int = 0
    ) -> list[Tensor]:
        raise NotImplementedError

    def merge(self, *factors: Tensor) -> Tensor:
        raise NotImplementedError

    def oracle(self, x: Tensor, factors: list[Tensor], bias: Tensor | None, **geometry) -> Tensor:
        weight = self.merge(*(f.double() for f in factors))
        return F.conv2d(x.double(), weight, None if bias is None else bias.double(), **geometry)

    def compare(self, x: Tensor, factors: list[Tensor], bias: Tensor | None, backend: str = "auto", **geometry) -> None:
        """Every output within (roundings of the stages + sqrt(sum length)) · eps of the oracle on absolute values."""
        found = self.op(x, *factors, bias, backend=backend, **geometry)
        wanted = self.oracle(x, factors, bias, **geometry)
        assert found.dtype == x.dtype
        assert found.shape == wanted.shape
        unseen = [None if t is None else t.to("meta") for t in (x, *factors, bias)]
        assert self.op(*unseen, backend="auto", **geometry).shape == wanted.shape
        if found.numel() == 0:
            return
        size = self.oracle(x.abs(), [f.abs() for f in factors], None if bias is None else bias.abs(), **geometry)
        length = sum(f.numel() for f in factors) + 1
        bound = EPS[x.dtype] * (2 * self.stages + math.sqrt(length)) * size + torch.finfo(x.dtype).tiny * 8
        assert bool(((found.double() - wanted).abs() <= bound).all())

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", EPS)
    def test_equals_the_merged_convolution_in_every_layout_and_dtype(self, dtype, layout, backend):
        x = lay_out(randn(3, 5, 9, 7, dtype=dtype), layout)
        factors = self.factors(5, 6, (3, 2), 3, dtype)
        self.compare(x, factors, randn(6, seed=9, dtype=dtype), backend, stride=(2, 1), padding=(1, 0), dilation=(1, 2))

    @pytest.mark.parametrize("batch", [0, 1, 5])
    @pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 4), (1, 5), (3, 1)])
    def test_equals_the_merged_convolution_in_every_geometry(self, kernel, batch):
        factors = self.factors(4, 3, kernel, 1, torch.float64)
        x = randn(batch, 4, 7, 9, dtype=torch.float64)
        for stride, dilation, padding in itertools.product(
            (1, (2, 1), 3), (1, (1, 2)), (0, 2, (1, 3), "same", "valid")
        ):
            if padding != "same" or stride == 1:
                self.compare(x, factors, None, stride=stride, dilation=dilation, padding=padding)

    def test_smallest_map(self):
        self.compare(randn(2, 4, 3, 3), self.factors(4, 2, (3, 3), 2, torch.float32), None)

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("padding", [1, "same"])
    def test_keeps_the_memory_format(self, backend, padding):
        factors = self.factors(4, 6, (3, 2), 2, torch.float32)
        x = randn(2, 4, 8, 8)
        for memory_format in (torch.channels_last, torch.contiguous_format):
            out = self.op(x.contiguous(memory_format=memory_format), *factors, padding=padding, backend=backend)
            assert out.is_contiguous(memory_format=memory_format)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_gradients_equal_those_of_the_merged_convolution(self, layout):
        leaves = [randn(3, 4, 6, 5), *self.factors(4, 3, (3, 2), 2, torch.float32), randn(3, seed=5)]
        geometry = {"stride": (1, 2), "padding": (2, 1), "dilation": (2, 1)}
        grads = []
        for dtype, function in (
            (torch.float32, self.op),
            (torch.float64, lambda x, *f, **g: self.oracle(x, f[:-1], f[-1], **g)),
        ):
            own = [leaf.to(dtype).clone().requires_grad_() for leaf in leaves]
            out = function(lay_out(own[0], layout), *own[1:], **geometry)
            grads.append(torch.autograd.grad((out * out.detach().cos()).sum(), own))
        for found, wanted in zip(*grads, strict=True):
            assert l2_relative(found, wanted) <= 1e-5

    def test_gradients_are_only_computed_where_they_are_asked_for(self):
        inputs = [randn(2, 4, 5, 5), *self.factors(4, 3, (3, 3), 2, torch.float32), randn(3, seed=5)]
        whole = [i.clone().requires_grad_() for i in inputs]
        wanted = torch.autograd.grad(self.op(*whole).square().sum(), whole)
        for index in range(len(inputs)):
            own = [i.clone().requires_grad_(j == index) for j, i in enumerate(inputs)]
            (found,) = torch.autograd.grad(self.op(*own).square().sum(), own[index])
            torch.testing.assert_close(found, wanted[index])

    @pytest.mark.parametrize("backend", ["sequence", "dense"])
    @pytest.mark.parametrize(
        "geometry", [{}, {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}, {"padding": "same"}]
    )
    def test_first_and_second_derivatives(self, geometry, backend):
        inputs = [
            randn(2, 2, 5, 6, dtype=torch.float64),
            *self.factors(2, 2, (2, 3), 2, torch.float64),
            randn(2, seed=3, dtype=torch.float64),
        ]
        inputs = [i.requires_grad_() for i in inputs]

        def function(*leaves):
            return self.op(*leaves, backend=backend, **geometry)

        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)

    @pytest.mark.parametrize("activation", ["none", "relu", "silu"])
    def test_auto_past_the_operator_equals_the_operator(self, activation, auto_takes):
        inputs = [randn(2, 4, 6, 5), *self.factors(4, 3, (3, 2), 2, torch.float32), randn(3, seed=5)]
        inputs.append(randn(2, 3, 3, 6, seed=7))
        options = {"activation": activation, "stride": (2, 1), "padding": 1}
        for choice in _tables.LIBRARY[self.name()]:
            auto_takes(choice)
            found = []
            for backend in ("auto", choice):
                own = [i.clone().requires_grad_() for i in inputs]
                out = self.op(*own[:-1], residual=own[-1], backend=backend, **options)
                assert ("fastrank" in type(out.grad_fn).__name__) == (backend != "auto")
                found.append([out, *torch.autograd.grad((out * out.detach().cos()).sum(), own)])
            assert torch.equal(found[0][0], found[1][0])
            # Gradients of biases and merged kernels are sums of as many terms as there are pixels, in another order.
            bound = 2 * EPS[torch.float32] * math.sqrt(out[:, 0].numel())
            assert all(l2_relative(a, b) <= bound for a, b in zip(*found, strict=True))

    def test_auto_keeps_the_maps_between_and_the_operator_does_not(self, auto_takes):
        auto_takes("sequence")
        inputs = [randn(2, 4, 6, 5), *self.factors(4, 3, (3, 3), 2, torch.float32), randn(3, seed=5)]
        inputs = [i.requires_grad_() for i in inputs]
        kept = {}
        for backend in ("auto", "sequence"):
            shapes = kept[backend] = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t, to=shapes: to.append(t.shape) or t, lambda t: t):
                out = self.op(*inputs, padding=1, backend=backend)
            out.sum().backward()
        maps = [{tuple(each) for each in shapes if tuple(each[2:]) == (6, 5)} for shapes in kept.values()]
        assert maps[1] == {(2, 4, 6, 5)}, "x alone"
        assert maps[0] > maps[1]

    @pytest.mark.parametrize("grad", [False, True])
    def test_auto_trains_by_what_is_fastest_both_ways(self, grad, auto_takes):
        asked = []
        auto_takes(lambda facts: asked.append(facts.work.call) or "sequence")
        inputs = [randn(2, 4, 6, 5), *self.factors(4, 3, (3, 3), 2, torch.float32), randn(3, seed=5)]
        inputs[1].requires_grad_(grad)
        self.op(*inputs)
        assert asked == ["training" if grad else "forward"]

    def test_auto_is_the_operator_where_torch_watches(self, auto_takes):
        auto_takes("sequence")
        x, *factors = randn(2, 4, 6, 5), *self.factors(4, 3, (3, 3), 2, torch.float32)
        name, calling = self.name(), Calling(self.op)
        traced = torch.fx.experimental.proxy_tensor.make_fx(calling)(x, *factors)
        for graph in (traced.graph, torch.export.export(calling, (x, *factors)).graph):
            called = [str(node.target) for node in graph.nodes if node.op == "call_function"]
            assert called == [f"fastrank.{name}.default"]
        with FlopCounterMode(display=False) as counter:
            self.op(x, *factors)
        assert [str(key) for key in counter.get_flop_counts()["Global"]] == [f"fastrank.{name}"]

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_opcheck(self, layout):
        factors = self.factors(3, 4, (3, 2), 2, torch.float32)
        inputs = [lay_out(randn(2, 3, 6, 5), layout), *factors, randn(4, seed=2)]
        for needs in (True, False):
            own = [i.detach().requires_grad_(needs) for i in inputs]
            residual = randn(*self.op(*own, stride=(1, 2), padding=(1, 0)).shape, seed=3).requires_grad_(needs)
            for activation in ("none", "relu", "silu"):
                geometry = (1, 2), (1, 0), (1, 1)
                torch.library.opcheck(self.overload(), (*own, residual, *geometry, activation, "auto"))

    def test_opcheck_without_bias_and_without_images(self):
        factors = [f.requires_grad_() for f in self.factors(3, 4, (3, 3), 2, torch.float32)]
        torch.library.opcheck(
            self.overload(), (randn(0, 3, 6, 5), *factors, None, None, *[(1, 1)] * 3, "none", "dense")
        )

    def test_flop_formula_is_twice_the_multiply_adds(self):
        layer = self.layer()
        x = torch.zeros(3, layer.in_channels, 11, 8)
        with FlopCounterMode(display=False) as counter:
            layer(x)
        assert counter.get_total_flops() == 2 * 3 * sum(stage.macs for stage in layer.conv_stages((11, 8)))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast_computes_in_its_dtype_and_leaves_float64_alone(self, dtype):
        x, bias = randn(2, 4, 6, 6), randn(3, seed=4)
        factors = [f.requires_grad_() for f in self.factors(4, 3, (3, 3), 2, torch.float32)]
        with torch.autocast("cpu", dtype):
            out = self.op(x, *factors, bias)
            double = self.op(x.double(), *(f.double() for f in factors), bias.double())
        assert out.dtype == dtype
        assert double.dtype == torch.float64
        assert max_relative(double, self.oracle(x, factors, bias)) <= 1e-12
        lowered = self.op(x.to(dtype), *(f.to(dtype) for f in factors), bias.to(dtype))
        assert torch.equal(out, lowered)
        out.float().sum().backward()
        assert all(f.grad.dtype == torch.float32 and bool(f.grad.isfinite().all()) for f in factors)

    def layer(self) -> nn.Module:
        raise NotImplementedError
