"""Gated factors and the funnel penalty: every backend against float64, over sizes, dtypes, layouts and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from gate_cases import LAYOUTS, available, check_pair, close, lay_out, over_backends
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from fastrank import ops
from fastrank.ops import funnel_penalty, gated_factor

pytestmark = pytest.mark.usefixtures("poison")

# Slices of one element, odd ones, whole packs, more than a warp's row, more than one tile; and nothing at all.
SHAPES = [
    (1,),
    (7,),
    (5, 3),
    (3, 33),
    (9, 7, 1, 1),
    (6, 5, 3, 3),
    (11, 4, 4, 2, 3),
    (2, 1024),
    (3, 1025),
    (2, 257, 3, 4),
    (2, 4099),
    (0, 3),
    (4, 0, 3),
]
LISTS = [
    [()],
    [(3,)],
    [(0,)],
    [(5, 3), (0, 2), (1, 1, 7)],
    [(4097,), (8192,), (1,)],
    [(i % 5 + 1,) for i in range(131)],
]


def check_gated(direction: Tensor, gate: Tensor, grad: Tensor, backend: str) -> None:
    """Value and both gradients against float64."""
    direction, gate = direction.detach().requires_grad_(), gate.detach().requires_grad_()
    out = gated_factor(direction, gate, backend=backend)
    check_pair(direction, gate, grad, out, *torch.autograd.grad(out, (direction, gate), grad))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@over_backends
def test_gated_factor(backend: str, device: str, dtype: torch.dtype, shape: tuple[int, ...], layout: str) -> None:
    available(backend, device, dtype)
    torch.manual_seed(0)
    direction, grad = torch.randn(2, *shape).to(device, dtype).unbind()
    gate = lay_out(torch.randn(shape[0]).to(device, dtype), "sliced")
    if shape[0] > 2:
        direction[1] = 0
        gate[2] = 0
    check_gated(lay_out(direction, layout), gate, lay_out(grad, layout), backend)


def check_funnel(gates: list[Tensor], c: float, normalized: bool, backend: str) -> None:
    """Value and gradients against float64."""
    dtype = gates[0].dtype
    gates = [gate.detach().requires_grad_() for gate in gates]
    out = funnel_penalty(gates, c, normalized=normalized, backend=backend)
    upstream = 0.7
    got = torch.autograd.grad(out, gates, torch.full_like(out, upstream))
    scale = c if normalized else 1.0
    total = sum(gate.numel() for gate in gates)
    doubles = [gate.detach().double() for gate in gates]
    want = scale * sum((g.abs() / (g.abs() + c)).sum() for g in doubles)
    assert out.shape == ()
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close("penalty", out, want, want, total, out.dtype)
    for gate, grad in zip(doubles, got, strict=True):
        slope = upstream * scale * gate.sign() * c / (gate.abs() + c) ** 2
        close("slope", grad, slope, slope.abs(), 1, dtype)


@pytest.mark.parametrize("normalized", [False, True], ids=["plain", "normalized"])
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "expanded"])
@pytest.mark.parametrize("shapes", LISTS, ids=lambda shapes: f"{len(shapes)}x{shapes[0]}")
@over_backends
def test_funnel_penalty(
    backend: str, device: str, dtype: torch.dtype, shapes: list[tuple[int, ...]], layout: str, normalized: bool
) -> None:
    available(backend, device, dtype)
    torch.manual_seed(0)
    gates = [lay_out(torch.randn(shape).to(device, dtype), layout if shape else "contiguous") for shape in shapes]
    if layout == "contiguous":
        gates[0].view(-1)[:1] = 0
    check_funnel(gates, 0.05, normalized, backend)


@pytest.mark.parametrize("backend", ["reference", "host", "triton"])
@given(data=st.data())
def test_gated_factor_any_input(backend: str, data: st.DataObject) -> None:
    available(backend, "cpu", torch.float32)
    rows = data.draw(st.integers(1, 5), "rows")
    inner = data.draw(st.lists(st.integers(1, 6), max_size=3), "inner")
    seed = data.draw(st.integers(0, 2**31 - 1), "seed")
    layout = data.draw(st.sampled_from(LAYOUTS), "layout")
    magnitude = 10.0 ** data.draw(st.integers(-8, 8), "magnitude")
    random = torch.Generator().manual_seed(seed)
    direction, grad = torch.randn(2, rows, *inner, generator=random).unbind()
    zeros = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows), "zero slices"))
    direction[zeros] = 0
    gate = torch.randn(rows, generator=random)
    check_gated(lay_out(direction * magnitude, layout), gate, lay_out(grad, layout), backend)


@pytest.mark.parametrize("backend", ["reference", "host", "triton"])
@given(data=st.data())
def test_funnel_penalty_any_input(backend: str, data: st.DataObject) -> None:
    available(backend, "cpu", torch.float32)
    value = st.floats(-100, 100, width=32, allow_subnormal=False)
    gates = data.draw(st.lists(st.lists(value, max_size=9), min_size=1, max_size=4), "gates")
    c = data.draw(st.floats(1e-3, 100), "c")
    check_funnel(
        [torch.tensor(g, dtype=torch.float32) for g in gates], c, data.draw(st.booleans(), "normalized"), backend
    )


@over_backends
def test_zero_slices_give_zero(backend: str, device: str, dtype: torch.dtype) -> None:
    """Also where the sum of squares underflows; and NaN stays NaN in its own slice."""
    available(backend, device, dtype)
    direction = torch.ones(4, 5, device=device, dtype=dtype)
    direction[0] = 0
    direction[1] = torch.finfo(dtype).smallest_normal if dtype != torch.float16 else 0
    direction[2, 3] = math.nan
    direction.requires_grad_()
    gate = torch.full((4,), 2.0, device=device, dtype=dtype, requires_grad=True)
    out = gated_factor(direction, gate, backend=backend)
    grads = torch.autograd.grad(out.float().sum(), (direction, gate))
    for result in (out, *grads):
        assert bool((result[:2] == 0).all())
        assert bool(result[2].isnan().any())
        assert bool(result[3].isfinite().all())


@over_backends
def test_same_bits_every_time(backend: str, device: str, dtype: torch.dtype) -> None:
    available(backend, device, dtype)
    torch.manual_seed(0)
    direction, grad = torch.randn(2, 3, 5000).to(device, dtype).unbind()
    gate = torch.randn(3).to(device, dtype)

    def run() -> list[Tensor]:
        v, g = direction.clone().requires_grad_(), gate.clone().requires_grad_()
        out = gated_factor(v, g, backend=backend)
        penalty = funnel_penalty([v, g], 0.1, backend=backend)
        return [out, penalty, *torch.autograd.grad((out, penalty), (v, g), (grad, torch.ones_like(penalty)))]

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_gradcheck() -> None:
    torch.manual_seed(0)
    direction = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    gate = torch.randn(3, dtype=torch.float64, requires_grad=True)
    gates = [torch.randn(3, dtype=torch.float64).add(2).requires_grad_(), direction]
    for function, inputs in (
        (gated_factor, (direction, gate)),
        (lambda *g: funnel_penalty(g, 0.5), gates),
        (lambda *g: funnel_penalty(g, 0.5, normalized=True), gates),
    ):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@over_backends
def test_opcheck(backend: str, device: str, dtype: torch.dtype) -> None:
    available(backend, device, dtype)
    torch.manual_seed(0)
    direction = torch.randn(3, 2, 2, 2).to(device, dtype, memory_format=torch.channels_last).requires_grad_()
    gate = torch.randn(3).to(device, dtype).requires_grad_()
    grad = torch.randn(3, 2, 2, 2).to(device, dtype)
    gates, tail = [gate, direction], (0.5, True, backend)
    scalar = torch.ones((), device=device, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    library = torch.ops.fastrank
    opcheck(library.gated_factors.default, ([direction, direction], [gate, gate], backend))
    opcheck(library.gated_factors_backward.default, ([grad, grad], [direction, direction], [gate, gate], backend))
    opcheck(library.funnel_penalty.default, (gates, *tail))
    opcheck(library.funnel_penalty_backward.default, (scalar, gates, *tail))


@over_backends
def test_compiles_to_one_graph(backend: str, device: str, dtype: torch.dtype) -> None:
    available(backend, device, dtype)
    direction = torch.randn(3, 5).to(device, dtype).requires_grad_()
    gate = torch.randn(3).to(device, dtype).requires_grad_()

    def loss(direction: Tensor, gate: Tensor) -> Tensor:
        factor = gated_factor(direction, gate, backend=backend)
        return factor.float().square().sum() + funnel_penalty([gate], 0.1, backend=backend)

    want = torch.autograd.grad(loss(direction, gate), (direction, gate))
    got = torch.autograd.grad(
        torch.compile(loss, fullgraph=True, backend="aot_eager")(direction, gate), (direction, gate)
    )
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_empty_list_is_zero() -> None:
    assert funnel_penalty([], 0.1).item() == 0


X, G = torch.ones(3, 4), torch.ones(3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gated_factor([1.0], G), TypeError, "direction must be a torch.Tensor, got list"),
        (
            lambda: gated_factor(torch.tensor(1.0), G),
            ValueError,
            "direction must be of one dimension or more, got a 0-d",
        ),
        (
            lambda: gated_factor(X.int(), G),
            TypeError,
            "direction must be a floating-point tensor, got dtype torch.int32",
        ),
        (lambda: gated_factor(X, G[:2]), ValueError, r"gate must be of shape \(3\).*, got \(2,\)"),
        (lambda: gated_factor(X, G.double()), TypeError, "gate must be of the dtype of direction, torch.float32"),
        (lambda: gated_factor(X, G.to("meta")), ValueError, "gate must be on the device of direction, cpu, got meta"),
        (lambda: gated_factor(X, G, backend="tritn"), ValueError, "backend must be one of .*did you mean 'triton'"),
        (lambda: gated_factor(X, G, backend="dense"), ValueError, "gated_factor has no dense backend"),
        (lambda: gated_factor(X, G, backend="cuda"), ValueError, "the tensor is on cpu, not on a CUDA device"),
        (lambda: gated_factor(X.half(), G.half(), backend="host"), ValueError, "takes float32, not torch.float16"),
        (lambda: funnel_penalty(G, 0.1), TypeError, "gates must be a list of tensors, got Tensor"),
        (lambda: funnel_penalty([G, 1.0], 0.1), TypeError, r"gates\[1\] must be a torch.Tensor, got float"),
        (lambda: funnel_penalty([G, G.double()], 0.1), TypeError, r"gates\[1\] must be of the dtype of gates\[0\]"),
        (lambda: funnel_penalty([G], 0), ValueError, "c must be a finite number above 0, got 0"),
        (lambda: funnel_penalty([G], -1.0), ValueError, "c must be a finite number above 0, got -1.0"),
        (lambda: funnel_penalty([G], math.inf), ValueError, "c must be a finite number above 0, got inf"),
        (lambda: funnel_penalty([G], "0.1"), TypeError, "c must be a number, got str"),
        (lambda: funnel_penalty([G], 0.1, backend="sequence"), ValueError, "funnel_penalty has no sequence backend"),
    ],
)
def test_bad_input(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()  # type: ignore[operator]


def test_public() -> None:
    assert {"gated_factor", "funnel_penalty"} <= set(ops.__all__)
