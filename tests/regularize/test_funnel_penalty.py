"""Funnel regularisation: schedules, proximal maps against brute force, the gates it finds, closes and leaves."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from helpers import EPS, randn
from torch import nn

from fastrank import ops
from fastrank.nn import GatedCPConv, GatedSVDConv, GatedTucker2Conv
from fastrank.regularize import Constant, Exponential, Funnel, Linear, proximal
from fastrank.regularize.schedules import SMALLEST

F64 = torch.float64
PENALTIES = {
    "funnel": lambda x, c: x.abs() / (x.abs() + c),
    "l1": lambda x, c: x.abs(),
    "l2": lambda x, c: x.square(),
}
MAPS = {
    "funnel": proximal.funnel,
    "l1": lambda gates, eta, c: proximal.l1(gates, eta),
    "l2": lambda gates, eta, c: proximal.l2(gates, eta),
}
SIZES = torch.tensor([0.0, 1e-9, 1e-4, 0.003, 0.01, 0.02, 0.1, 0.37, 1.0, 5.0, 80.0], dtype=F64)
RATES = (1e-8, 2e-5, 1e-3, 0.03, 0.5, 4.0)
WIDTHS = (1e-4, 0.001, 0.01, 0.2, 1.0, 10.0)


class Gates(nn.Module):
    """The least that Funnel needs of a layer: some gates of which it names a few."""

    def __init__(self, *values, dtype=F64):
        super().__init__()
        self.gate = nn.Parameter(torch.tensor(values, dtype=dtype))
        self.free = nn.Parameter(torch.ones(2, dtype=dtype))

    def penalized(self):
        return [self.gate]


def sgd(model, lr=0.1, **options):
    return torch.optim.SGD(model.parameters(), lr, **options)


def test_schedules():
    linear = Linear()
    assert linear == Linear(start=10.0, end=0.001, epochs=100)
    found = [linear.at(epoch) for epoch in (0, 1, 50, 99, 100, 1000)]
    assert found == pytest.approx([10, 9.90001, 5.0005, 0.10099, 0.001, 0.001], rel=4 * EPS[F64])
    assert Linear(1, 3, 4).at(1) == 1.5
    exponential = Exponential(10, 0.5, 5)
    assert [exponential.at(epoch) for epoch in (0, 4, 5, 14, 15)] == [10, 10, 5, 2.5, 1.25]
    assert exponential.at(10**6) == 1e-6
    assert Exponential(1, 0.1, 1, end=0.05).at(2) == 0.05
    assert Constant(0.01).at(0) == Constant(0.01).at(10**6) == 0.01
    assert hash(linear) == hash(Linear()), "frozen"
    smallest = ops.funnel_penalty([torch.zeros(1, requires_grad=True)], Constant(SMALLEST).at(0))
    assert torch.autograd.grad(smallest, smallest.grad_fn.next_functions[0][0].variable)[0] == 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Constant(0), ValueError, "c must be a finite number at least 1e-30, got 0"),
        (lambda: Constant("1"), TypeError, "c must be a number, got str"),
        (lambda: Linear(start=-1), ValueError, "start must be a finite number at least 1e-30, got -1"),
        (lambda: Linear(end=0.0), ValueError, "end must be"),
        (lambda: Linear(epochs=0), ValueError, "epochs must be an int at least 1, got 0"),
        (lambda: Linear(epochs=9.5), TypeError, "epochs must be an int, got float"),
        (lambda: Exponential(1, 1.1, 5), ValueError, r"factor must be a finite number in \(0, 1\], got 1.1"),
        (lambda: Exponential(1, 0.5, 0), ValueError, "every must be an int at least 1, got 0"),
        (lambda: Exponential(1, 0.5, 1, end=2), ValueError, r"end must be a finite number in \[1e-30, 1\], got 2"),
        (lambda: Linear().at(-1), ValueError, "epoch must be an int at least 0, got -1"),
        (lambda: Constant(1).at(0.5), TypeError, "epoch must be an int, got float"),
        (lambda: Exponential(1, 0.5, 1).at(-1), ValueError, "epoch must be"),
    ],
)
def test_schedules_refuse(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()


@pytest.mark.parametrize("c", WIDTHS)
@pytest.mark.parametrize("eta", RATES)
@pytest.mark.parametrize("penalty", PENALTIES)
def test_proximal_points_are_the_global_minima(penalty, eta, c):
    """No point of a fine grid is better, by more than the rounding of the objective itself."""
    sizes = torch.cat([SIZES, proximal.funnel_threshold(eta, c) * torch.linspace(0.7, 1.4, 36, dtype=F64)])

    def objective(x, v):
        return (x - v).square() / 2 + eta * PENALTIES[penalty](x, c)

    found = MAPS[penalty](sizes, eta, c)
    grid = sizes[:, None] * torch.linspace(0, 1, 20_001, dtype=F64)
    best = objective(grid, sizes[:, None]).amin(1)
    assert bool((objective(found, sizes) <= best + 4 * EPS[F64] * sizes.square()).all())
    assert bool((found >= 0).all())
    assert bool((found <= sizes).all())
    assert bool((found.sort().values == MAPS[penalty](sizes.sort().values, eta, c)).all()), "monotone"
    assert torch.equal(MAPS[penalty](-sizes, eta, c), torch.where(found == 0, 0.0, -found)), "odd"
    assert torch.equal(MAPS[penalty](sizes, 0.0, c), sizes), "a rate of 0 changes no bit"
    assert math.isnan(MAPS[penalty](torch.tensor(math.nan, dtype=F64), eta, c)), "divergence stays visible"


@pytest.mark.parametrize(("eta", "c"), list(itertools.product(RATES, WIDTHS)))
def test_the_funnel_closes_what_lies_below_its_threshold(eta, c):
    threshold = proximal.funnel_threshold(eta, c)
    beside = threshold * torch.tensor([1 - 1e-9, 1.0, 1 + 1e-9], dtype=F64)
    below, at, above = proximal.funnel(beside, eta, c).tolist()
    assert below == at == 0.0
    assert above > 0
    assert above >= (math.sqrt(2 * eta) - c) * (1 - 1e-6), "where there is a jump, it is at least so high"
    if 2 * eta > c * c:
        # At the jump both minima are worth the same: ½ v² = ½ (x − v)² + η x / (x + C), x = v − C/2.
        x = threshold - c / 2
        assert (x - threshold) ** 2 / 2 + eta * x / (x + c) == pytest.approx(threshold**2 / 2, rel=1e-12)
    # Near its singular point the cubic's root is known to √eps only; away from there it is exact to rounding.
    size = torch.tensor(2 * threshold + 1.0, dtype=F64)
    x = proximal.funnel(size, eta, c)
    assert float((size - x) * (x + c).square()) == pytest.approx(eta * c, rel=1e-6)


def test_the_published_numbers():
    """F_C and its slope at C = x = 0.01; Linear() is at 0.01 nowhere, so C comes from a constant."""
    model = Gates(0.01, -0.01, 0.0)
    funnel = Funnel(model, 1.0, schedule=Constant(0.01), step="subgradient")
    assert float(funnel.value()) == pytest.approx(1.0, rel=4 * EPS[F64])
    funnel.add_gradients()
    assert model.gate.grad.tolist() == pytest.approx([25, -25, 0])
    default = Funnel(model)
    assert (default.weight, default.schedule, default.penalty, default.step) == (0.002, Linear(), "funnel", "proximal")


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_subgradients_are_those_of_the_value(dtype, normalized):
    model = nn.Sequential(Gates(0.5, -0.2, 0.0, dtype=dtype), Gates(1.5, dtype=dtype))
    model[0].gate.grad = torch.ones(3, dtype=dtype)
    funnel = Funnel(model, 0.3, schedule=Constant(0.25), step="subgradient", normalized=normalized)
    gates = [model[0].gate, model[1].gate]
    value = ops.funnel_penalty([gate.detach() for gate in gates], 0.25, normalized=normalized)
    assert float(funnel.value()) == pytest.approx(0.3 * float(value), rel=8 * EPS[dtype])
    leaves = [gate.detach().requires_grad_() for gate in gates]
    slopes = torch.autograd.grad(ops.funnel_penalty(leaves, 0.25, normalized=normalized), leaves)
    with torch.no_grad():
        funnel.add_gradients()
    torch.testing.assert_close(model[0].gate.grad, 1 + 0.3 * slopes[0])
    torch.testing.assert_close(model[1].gate.grad, 0.3 * slopes[1])
    assert model[0].gate.grad[2] == 1, "nothing at 0"
    assert model[0].free.grad is None
    funnel.after_step()
    assert model[1].gate.item() == 1.5


@pytest.mark.parametrize(("penalty", "value", "slopes"), [("l1", 2.5, [1, -1, 0]), ("l2", 4.25, [4, -1, 0])])
def test_the_penalties_it_is_compared_with(penalty, value, slopes):
    model = Gates(2.0, -0.5, 0.0)
    funnel = Funnel(model, 0.5, penalty=penalty, step="subgradient")
    assert float(funnel.value()) == 0.5 * value
    funnel.add_gradients()
    assert model.gate.grad.tolist() == [0.5 * slope for slope in slopes]


@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_proximal_step_follows_the_optimizers_and_leaves_its_state_alone(penalty):
    model, twin = (nn.Sequential(Gates(0.5, -0.2, 0.03, 0.0), Gates(1.5, 0.004)) for _ in range(2))
    optimizers = [
        torch.optim.SGD([{"params": m[0].parameters()}, {"params": m[1].parameters(), "lr": 0.02}], 0.1, momentum=0.9)
        for m in (model, twin)
    ]
    funnel = Funnel(model, 0.05, schedule=Constant(0.1), penalty=penalty)
    funnel.attach(optimizers[0])
    for step in range(3):
        for m in (model, twin):
            for index, parameter in enumerate(m.parameters()):
                parameter.grad = 0.1 * randn(*parameter.shape, seed=10 * step + index, dtype=F64)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            for layer, lr in ((twin[0], 0.1), (twin[1], 0.02)):
                layer.gate.copy_(MAPS[penalty](layer.gate, lr * 0.05, 0.1))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(optimizers[0].state[a]["momentum_buffer"], optimizers[1].state[b]["momentum_buffer"]), (
            "momentum is without the penalty"
        )
    before = copy.deepcopy(model.state_dict())
    funnel.after_step(stepped=False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_normalized_funnel_is_one_of_c_times_the_weight():
    moved = []
    for normalized, weight in ((True, 0.4), (False, 0.4 * 0.05)):
        model = Gates(0.5, -0.2, 0.03, 0.01)
        funnel = Funnel(model, weight, schedule=Constant(0.05), normalized=normalized)
        funnel.bind(sgd(model))
        moved.append(float(funnel.value()))
        funnel.after_step()
        moved.append(model.gate.detach())
    assert moved[0] == pytest.approx(moved[2], rel=1e-12)
    torch.testing.assert_close(moved[1], moved[3])


def test_the_epoch_sets_c_and_is_the_state():
    model = Gates(1.0)
    funnel = Funnel(model, 1.0, schedule=Linear(3.0, 1.0, 2))
    assert (funnel.c, float(funnel.value())) == (3.0, 0.25)
    funnel.start_epoch(1)
    assert (funnel.c, float(funnel.value())) == (2.0, pytest.approx(1 / 3))
    other = Funnel(model, 1.0, schedule=Linear(3.0, 1.0, 2))
    other.load_state_dict(funnel.state_dict())
    assert (other.epoch, other.c) == (1, 2.0)
    for wrong, error in (({}, TypeError), ({"epoch": -1}, ValueError)):
        with pytest.raises(error, match=r"^state\['epoch'\] must be an int"):
            other.load_state_dict(wrong)
    with pytest.raises(ValueError, match="^epoch must be an int at least 0"):
        other.start_epoch(-1)


def test_a_tensor_as_learning_rate():
    model = Gates(0.5)
    funnel = Funnel(model, 1.0, penalty="l1")
    funnel.bind(sgd(model, torch.tensor(0.125)))
    funnel.after_step()
    assert model.gate.item() == 0.375


def test_gates_of_all_gated_layers_are_found_once_by_name():
    shared = GatedSVDConv.from_conv(nn.Conv2d(4, 6, 1))
    model = nn.ModuleDict(
        {
            "stem": nn.Conv2d(3, 4, 3),
            "tucker": GatedTucker2Conv.from_conv(nn.Conv2d(4, 4, 3)),
            "shared": shared,
            "again": shared,
            "cp": GatedCPConv(6, 4, 3, 5),
            "frozen": GatedSVDConv.from_conv(nn.Conv2d(4, 6, 1)).requires_grad_(False),
            "own": Gates(1.0, dtype=torch.float32),
        }
    )
    wanted = [p for name in ("tucker", "shared", "cp", "own") for p in model[name].penalized()]
    funnel = Funnel(model)
    assert list(map(id, funnel.gates.values())) == list(map(id, wanted))
    assert all(model.get_parameter(name) is gate for name, gate in funnel.gates.items())
    assert list(funnel.gates)[:2] == ["tucker.gate_in", "tucker.gate_core"]
    assert funnel.governed() is funnel.gates


def test_gates_of_several_dtypes_in_one_model():
    model = nn.Sequential(Gates(0.5, dtype=torch.float32), Gates(0.5, dtype=F64), Gates(0.5, dtype=torch.bfloat16))
    for step in ("subgradient", "proximal"):
        funnel = Funnel(model, 0.1, schedule=Constant(0.5), step=step)
        funnel.bind(sgd(model))
        assert float(funnel.value()) == pytest.approx(0.15)
        funnel.add_gradients()
    assert [layer.gate.grad.item() for layer in model] == pytest.approx([0.05] * 3, rel=2 * EPS[torch.bfloat16])
    funnel.after_step()
    (wanted,) = proximal.funnel(torch.tensor([0.5], dtype=F64), 0.01, 0.5)
    for layer in model:
        assert layer.gate.item() == wanted.to(layer.gate.dtype).item()


def test_autocast_does_not_lower_its_precision():
    results = []
    for enabled in (False, True):
        for step in ("proximal", "subgradient"):
            model = Gates(0.5, -0.2, 0.03, dtype=torch.float32)
            funnel = Funnel(model, 0.1, schedule=Constant(0.01), step=step)
            funnel.bind(sgd(model))
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                funnel.add_gradients()
                funnel.after_step()
                value = funnel.value()
            results.append([model.gate.detach(), model.gate.grad, value])
    for plain, lowered in zip(results[:2], results[2:], strict=True):
        assert all((a is b is None) or torch.equal(a, b) for a, b in zip(plain, lowered, strict=True))


@pytest.mark.parametrize("step", ["proximal", "subgradient"])
def test_gates_of_ranks_that_are_not_needed_close(step):
    """A layer starts at a rank-2 target plus noise: six gates end at exactly 0, or swing around it by sub-gradients."""
    target, start = (nn.Conv2d(8, 8, 1, bias=False).double() for _ in range(2))
    with torch.no_grad():
        kernel = randn(8, 2, seed=1, dtype=F64) @ randn(2, 8, seed=2, dtype=F64) / 3
        target.weight.copy_(kernel.reshape(8, 8, 1, 1))
        start.weight.copy_(target.weight + 0.1 * randn(8, 8, 1, 1, seed=3, dtype=F64))
    layer = GatedSVDConv.from_conv(start)
    others = [parameter for parameter in layer.parameters() if parameter is not layer.gate_first]
    optimizer = torch.optim.SGD([{"params": others}, {"params": [layer.gate_first], "lr": 0.1}], 0.05, momentum=0.9)
    funnel = Funnel(layer, 0.01, schedule=Linear(1.0, 0.001, 60), step=step)
    funnel.attach(optimizer)
    x = randn(32, 8, 2, 2, dtype=F64)
    for epoch in range(80):
        funnel.start_epoch(epoch)
        for _ in range(5):
            optimizer.zero_grad()
            (layer(x) - target(x).detach()).square().mean().backward()
            optimizer.step()
    kept, closed = layer.gate_first.detach().split_with_sizes([2, 6])
    assert bool((kept > 0.5).all())
    if step == "subgradient":
        assert float(closed.abs().max()) > 0.02
        assert bool((closed != 0).all())
        return
    assert bool((closed == 0).all())
    pruned = layer.pruned(0.02)
    assert pruned.rank == 2
    assert float((pruned(x) - target(x)).detach().norm() / target(x).detach().norm()) < 1e-3


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: Funnel(m, -1.0), ValueError, "weight must be a finite number at least 0, got -1"),
        (lambda m: Funnel(m, True), TypeError, "weight must be a number, got bool"),
        (lambda m: Funnel(m, schedule=0.1), TypeError, "schedule must be a schedule, such as .*, got float"),
        (lambda m: Funnel(m, penalty="l3"), ValueError, r"penalty must be one of \['funnel', 'l1', 'l2'\], got 'l3'"),
        (lambda m: Funnel(m, step="prox"), ValueError, "step must be one of .*did you mean 'proximal'"),
        (lambda m: Funnel(m, normalized=1), TypeError, "normalized must be a bool, got int"),
        (
            lambda m: Funnel(m, penalty="l1", normalized=True),
            ValueError,
            "normalized must be False where penalty is 'l1', which has no C, got True",
        ),
        (lambda m: Funnel(nn.Conv2d(1, 1, 3)), ValueError, "model must be a model with trainable gates, .* got Conv2d"),
        (lambda m: Funnel(m.requires_grad_(False)), ValueError, "model must be a model with trainable gates"),
        (lambda m: Funnel("resnet"), TypeError, "model must be a torch.nn.Module, got str"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call(Gates(1.0))


def test_a_layer_that_names_what_is_no_parameter_is_refused():
    class Odd(Gates):
        def penalized(self):
            return [self.gate.detach()]

    with pytest.raises(ValueError, match=r"^penalized\(\) of layer '0' must be a list of parameters of the model, got"):
        Funnel(nn.Sequential(Odd(1.0)))


def test_the_gates_below_a_threshold_are_counted_by_name():
    layers = nn.Sequential(
        GatedSVDConv.from_conv(nn.Conv2d(4, 6, 1)), GatedSVDConv.from_conv(nn.Conv2d(6, 4, 1)).double()
    )
    penalty = Funnel(layers)
    with torch.no_grad():
        for gate in penalty.gates.values():
            gate.copy_(torch.linspace(-0.3, 0.3, gate.numel(), dtype=gate.dtype))
    wanted = {name: int((gate.detach().double().abs() < 0.2).sum()) for name, gate in penalty.gates.items()}
    assert penalty.below(0.2) == wanted
    assert list(penalty.below(0.2)) == list(penalty.gates)
    assert sum(wanted.values()) > 0
    assert set(penalty.below(0).values()) == {0}
    with pytest.raises(ValueError, match=r"^threshold must be a finite number at least 0"):
        penalty.below(-1)
