"""Lists of gates and factors: what single calls give, one node of autograd, proximal steps in place, counts."""

from __future__ import annotations

import math

import pytest
import torch
from gate_cases import LAYOUTS, available, check_pair, close, lay_out, over_backends
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from fastrank import ops, reference
from fastrank.ops import count_below, funnel_proximal_, gated_factor, gated_factors

pytestmark = pytest.mark.usefixtures("poison")

LISTS = {
    "one": [(5, 3)],
    "empty ones": [(0, 3), (4, 0, 3), (2, 2), (0,)],
    "all empty": [(0, 3), (2, 0)],
    "odd": [(1,), (9, 7, 3, 3), (33, 64), (3, 1025), (2, 2049), (2, 4099), (1, 8200), (17, 1, 1, 1)],
    "300": [(i % 3 + 1, i % 7) for i in range(300)],
}
SIZES = [(), (3,), (0,), (5, 3), (4097,), (8200,), (1, 1, 7), (2048,)]


def pairs(shapes, device, dtype, layout="contiguous"):
    """Directions, gates and upstream gradients; some slices and gates are zero."""
    torch.manual_seed(0)
    directions, gates, grads = [], [], []
    for shape in shapes:
        direction, grad = torch.randn(2, *shape).to(device, dtype).unbind()
        gate = torch.randn(shape[0]).to(device, dtype)
        if shape[0] > 2:
            direction[1], gate[2] = 0, 0
        directions.append(lay_out(direction, layout).detach().requires_grad_())
        gates.append(lay_out(gate, "sliced").detach().requires_grad_())
        grads.append(lay_out(grad, layout))
    return directions, gates, grads


@pytest.mark.parametrize(
    ("shapes", "layout"),
    [(shapes, layout) for name, shapes in LISTS.items() for layout in (LAYOUTS if name == "odd" else LAYOUTS[:2])],
    ids=lambda value: value if isinstance(value, str) else str(len(value)),
)
@over_backends
def test_gated_factors(backend, device, dtype, shapes, layout):
    available(backend, device, dtype)
    directions, gates, grads = pairs(shapes, device, dtype, layout)
    outs = gated_factors(directions, gates, backend=backend)
    found = torch.autograd.grad(outs, [*directions, *gates], grads)
    count = len(shapes)
    for i in range(count):
        check_pair(directions[i], gates[i], grads[i], outs[i], found[i], found[count + i])
    for i in range(min(count, 8)):
        single = gated_factor(directions[i], gates[i], backend=backend)
        assert torch.equal(single, outs[i])
        alone = torch.autograd.grad(single, (directions[i], gates[i]), grads[i])
        assert torch.equal(alone[0], found[i])
        assert torch.equal(alone[1], found[count + i])


@pytest.mark.parametrize("backend", ["reference", "host", "triton"])
@given(data=st.data())
def test_gated_factors_any_list(backend, data):
    available(backend, "cpu", torch.float32)
    shape = st.tuples(st.integers(0, 4), st.integers(0, 70))
    shapes = data.draw(st.lists(shape, min_size=1, max_size=4), "shapes")
    layout = data.draw(st.sampled_from(LAYOUTS), "layout")
    directions, gates, grads = pairs(shapes, "cpu", torch.float32, layout)
    outs = gated_factors(directions, gates, backend=backend)
    found = torch.autograd.grad(outs, [*directions, *gates], grads)
    for i, out in enumerate(outs):
        check_pair(directions[i], gates[i], grads[i], out, found[i], found[len(shapes) + i])


@over_backends
def test_nothing_beside_the_tensors_is_touched(backend, device, dtype):
    """Inputs lie in one buffer between guard bands, at addresses that are no multiple of 16 bytes."""
    available(backend, device, dtype)
    torch.manual_seed(0)
    sizes, guard = (4099, 1, 8, 33), 7
    band = torch.full((sum(sizes) + guard * (len(sizes) + 1),), math.nan).to(device, dtype)
    gates, first = [], guard
    for size in sizes:
        gates.append(band[first : first + size])
        gates[-1].copy_(torch.randn(size))
        first += size + guard
    before = band.clone()
    values = [gate.clone() for gate in gates]
    counts = count_below(gates, 0.5, backend=backend)
    penalty = ops.funnel_penalty(gates, 0.1, backend=backend)
    outs = gated_factors([gate[None] for gate in gates], [gate.new_ones(1) for gate in gates], backend=backend)
    assert torch.equal(band.view(torch.uint8), before.view(torch.uint8))
    assert counts.tolist() == [int((v.double().abs() < 0.5).sum()) for v in values]
    doubles = [value.double() for value in values]
    want = ops.funnel_penalty(doubles, 0.1, backend="reference")
    close("penalty", penalty, want, want, sum(sizes), penalty.dtype)
    for out, value in zip(outs, doubles, strict=True):
        unit = value / value.square().sum().sqrt()
        close("out", out[0], unit, unit.abs(), len(value), dtype)
    funnel_proximal_(gates, 0.01, 0.1, backend=backend)
    moved = torch.zeros_like(band, dtype=torch.bool)
    for gate in gates:
        moved[gate.storage_offset() : gate.storage_offset() + gate.numel()] = True
    assert torch.equal(band[~moved].view(torch.uint8), before[~moved].view(torch.uint8))
    assert not bool(band[moved].isnan().any())


@over_backends
def test_same_bits_every_time(backend, device, dtype):
    available(backend, device, dtype)
    directions, gates, grads = pairs(LISTS["odd"], device, dtype)
    runs = []
    for _ in range(3):
        outs = gated_factors(directions, gates, backend=backend)
        moved = [gate.detach().clone() for gate in gates]
        funnel_proximal_(moved, 0.01, 0.1, backend=backend)
        runs.append([*outs, *torch.autograd.grad(outs, [*directions, *gates], grads), *moved])
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


def test_factors_that_the_loss_does_not_reach_get_no_gradient():
    directions, gates, grads = pairs([(2, 3), (3, 4), (1, 2)], "cpu", torch.float32)
    directions[2].requires_grad_(False)
    outs = gated_factors(directions, gates)
    found = torch.autograd.grad([outs[0], outs[2]], [*directions[:2], *gates], [grads[0], grads[2]], allow_unused=True)
    assert [x is None for x in found] == [False, True, False, True, False]
    gates[2].requires_grad_(False)
    outs = gated_factors(directions, gates)
    assert torch.autograd.grad(outs[2].sum(), directions[0], allow_unused=True) == (None,)


def test_gradcheck_of_a_list():
    torch.manual_seed(0)
    directions = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True), torch.randn(1, 2, 2).double()]
    directions[1].requires_grad_()
    gates = [torch.randn(2, dtype=torch.float64, requires_grad=True), torch.randn(1).double().requires_grad_()]

    def function(*tensors):
        return tuple(gated_factors(tensors[:2], tensors[2:]))

    assert torch.autograd.gradcheck(function, (*directions, *gates))
    assert torch.autograd.gradgradcheck(function, (*directions, *gates))


def test_activation_checkpointing_runs_it_again():
    """Whose backward pass may ask for saved tensors once only."""
    directions, gates, _ = pairs([(2, 3), (3, 4)], "cpu", torch.float32)

    def loss(*tensors):
        return sum(out.square().sum() for out in gated_factors(tensors[:2], tensors[2:]))

    want = torch.autograd.grad(loss(*directions, *gates), [*directions, *gates])
    again = checkpoint(loss, *directions, *gates, use_reentrant=False)
    for a, b in zip(want, torch.autograd.grad(again, [*directions, *gates]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("penalty", ["funnel", "l1", "l2"])
@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
@over_backends
def test_funnel_proximal(backend, device, dtype, layout, penalty):
    """One rounding of the truth: both are within a few roundings of float64 of the exact point."""
    available(backend, device, dtype, "funnel_proximal_")
    torch.manual_seed(0)
    gates = [lay_out(torch.randn(size).to(device, dtype), layout if size else "contiguous") for size in SIZES]
    for eta, c in ((0.0, 0.1), (0.02, 0.1), (0.004, 0.3), (1e-5, 1e-3), (0.5, 1e-6)):
        moved = [gate.clone() if gate.is_contiguous() else lay_out(gate, layout) for gate in gates]
        assert funnel_proximal_(moved, eta, c, penalty=penalty, backend=backend) is None
        for gate, found in zip(gates, moved, strict=True):
            want = reference.gates.proximal_points(gate.double(), eta, c, penalty)
            # The threshold separates exactly; elsewhere a float64 error, magnified by at most 1 / w (w as in the
            # kernel, at least 1e-3 here), is far below the rounding to store.
            slack = 2e-12 if dtype == torch.float64 else torch.finfo(dtype).eps
            bound = slack * want.abs() + torch.finfo(dtype).smallest_normal
            assert bool(((found.double() - want).abs() <= bound).all())
            assert torch.equal(found == 0, want.to(dtype) == 0)
            assert eta > 0 or torch.equal(found, gate)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # the interpreter's numpy
@over_backends
def test_what_is_not_finite(backend, device, dtype):
    available(backend, device, dtype, "count_below")
    gates = [
        torch.tensor([math.nan, -math.inf, math.inf, 0.0, -0.25]).to(device, dtype),
        torch.zeros(0).to(device, dtype),
    ]
    assert count_below(gates, 0.3, backend=backend).tolist() == [2, 0]
    assert count_below(gates, 0.25, backend=backend).tolist() == [1, 0]
    funnel_proximal_(gates, 0.01, 0.1, backend=backend)
    assert gates[0].isnan().tolist()[0]
    assert not bool(gates[0][3:].isnan().any())
    out, _ = gated_factors([gates[0][None], gates[1][None]], [gates[0][3:4], gates[0][3:4]], backend=backend)
    assert bool(out.isnan().all())


@over_backends
def test_count_below(backend, device, dtype):
    available(backend, device, dtype, "count_below")
    torch.manual_seed(0)
    for layout in ("contiguous", "sliced", "expanded"):
        gates = [lay_out(torch.randn(size).to(device, dtype), layout if size else "contiguous") for size in SIZES]
        for threshold in (0, 0.02, 0.7, 1e9):
            found = count_below(gates, threshold, backend=backend)
            assert found.dtype == torch.int64
            assert found.device == gates[0].device
            assert found.tolist() == [int((gate.double().abs() < threshold).sum()) for gate in gates]


@pytest.mark.parametrize(
    ("backend", "device"),
    [
        ("reference", "cpu"),
        ("host", "cpu"),
        # Not by Triton's interpreter, which rounds the numbers handed to a kernel to float32.
        pytest.param("triton", "cuda", marks=pytest.mark.gpu),
        pytest.param("cuda", "cuda", marks=pytest.mark.gpu),
    ],
)
def test_the_threshold_is_compared_in_float64(backend, device):
    available(backend, device, torch.float32, "count_below")
    gate = torch.tensor([0.02], device=device)  # just below the float64 of that name
    assert float(gate) < 0.02
    assert count_below([gate], 0.02, backend=backend).tolist() == [1]
    assert count_below([gate], float(gate), backend=backend).tolist() == [0]


@over_backends
def test_parameters_are_moved_in_place_and_autograd_knows(backend, device, dtype):
    available(backend, device, dtype, "funnel_proximal_")
    gate = nn.Parameter(torch.tensor([0.5, 0.001]).to(device, dtype))
    square = gate.square().sum()
    funnel_proximal_([gate], 0.01, 0.1, backend=backend)
    assert gate.requires_grad
    assert gate.is_leaf
    assert gate[1] == 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


@over_backends
def test_opcheck_of_gates(backend, device, dtype):
    available(backend, device, dtype, "count_below")
    gates = [torch.randn(3).to(device, dtype), torch.randn(2, 2).to(device, dtype)]
    opcheck(torch.ops.fastrank.count_below.default, (gates, 0.5, backend))
    opcheck(torch.ops.fastrank.funnel_proximal_.default, (gates, 0.1, 0.5, "funnel", backend))


@over_backends
def test_compiles_to_one_graph(backend, device, dtype):
    available(backend, device, dtype)
    directions, gates, _ = pairs([(3, 5), (2, 7)], device, dtype)

    def loss(directions, gates):
        outs = gated_factors(directions, gates, backend=backend)
        return sum(out.float().square().sum() for out in outs)

    def step(gates):
        funnel_proximal_(gates, 0.05, 0.3, backend=backend)
        return count_below(gates, 1e-9, backend=backend)

    want = torch.autograd.grad(loss(directions, gates), [*directions, *gates])
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(directions, gates), [*directions, *gates]), want, strict=True):
        assert torch.equal(a, b)
    plain, traced = ([gate.detach().clone() for gate in gates] for _ in range(2))
    assert torch.equal(step(plain), torch.compile(step, fullgraph=True, backend="aot_eager")(traced))
    assert all(torch.equal(a, b) for a, b in zip(plain, traced, strict=True))


def test_empty_lists():
    assert gated_factors([], []) == []
    assert funnel_proximal_([], 0.1, 0.1) is None
    assert count_below([], 0.1).shape == (0,)


X, G = torch.ones(3, 4), torch.ones(3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gated_factors(X, [G]), TypeError, "directions must be a list of tensors, got Tensor"),
        (lambda: gated_factors([X], [G, G]), ValueError, "gates must be of as many tensors as directions, 1, got 2"),
        (lambda: gated_factors([X, X], [G, G[:2]]), ValueError, r"gates\[1\] must be of shape \(3\) .*, got \(2,\)"),
        (lambda: gated_factors([X, X.half()], [G, G.half()]), TypeError, r"directions\[1\] must be of the dtype"),
        (lambda: gated_factors([X], [1]), TypeError, r"gates\[0\] must be a torch.Tensor, got int"),
        (lambda: gated_factors([G[0]], [G]), ValueError, r"directions\[0\] must be of one dimension or more"),
        (lambda: gated_factors([X], [G], backend="dense"), ValueError, "gated_factor has no dense backend"),
        (lambda: funnel_proximal_(G, 0.1, 0.1), TypeError, "gates must be a list of tensors, got Tensor"),
        (lambda: funnel_proximal_([G], -1, 0.1), ValueError, "eta must be a finite number at least 0, got -1"),
        (lambda: funnel_proximal_([G], 1, 0), ValueError, "c must be a finite number above 0, got 0"),
        (lambda: funnel_proximal_([G], 1, 1, penalty="l0"), ValueError, "penalty must be one of"),
        (lambda: funnel_proximal_([G], 1, 1, backend="gram"), ValueError, "funnel_proximal_ has no gram backend"),
        (lambda: count_below([G.int()], 1), TypeError, r"gates\[0\] must be a floating-point tensor"),
        (lambda: count_below([G], -1), ValueError, "threshold must be a finite number at least 0, got -1"),
        (lambda: count_below([G], 1, backend="fast"), ValueError, "backend must be one of"),
    ],
)
def test_bad_lists(call, error, message):
    with pytest.raises(error, match=f"^{message}|^backend=.*{message}"):
        call()


def test_lists_are_public():
    assert {"gated_factors", "funnel_proximal_", "count_below"} <= set(ops.__all__)
    assert isinstance(gated_factor(X, G), Tensor)
