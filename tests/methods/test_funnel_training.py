"""Funnel's steps together: what `compress` calls, in which order, and that training with the penalty closes gates."""

from __future__ import annotations

import pytest
import torch
from helpers import close_gates, max_relative, randn, residual
from torch import nn

from fastrank.methods import funnel
from fastrank.nn import FusedTucker2Conv
from fastrank.nn._gated import GatedConv2d
from fastrank.regularize import Constant, Funnel, Linear

TARGET = 2  # the teacher's rank


def test_the_regularizer_is_the_published_one_by_default():
    found = funnel.factorize(residual())
    default = funnel.regularizer(found)
    assert isinstance(default, Funnel)
    assert (default.weight, default.penalty, default.step, default.schedule) == (0.002, "funnel", "proximal", Linear())
    own = funnel.regularizer(found, 0.1, penalty="l1", schedule=Constant(0.5), step="subgradient")
    assert (own.weight, own.penalty, own.step, own.schedule) == (0.1, "l1", "subgradient", Constant(0.5))


@pytest.mark.parametrize("form", ["tucker2", "svd"])
def test_compress_runs_the_steps_in_order_and_trains_in_place(form):
    model, seen, x = residual(), [], randn(3, 3, 16, 16, dtype=torch.float64)

    def warm(network):
        assert [isinstance(m, GatedConv2d) for m in (network.a, network.b, network.shortcut)] == [True, True, False]
        with torch.no_grad():
            network.fc.bias += 1
        seen.append(network)

    def close(network, regularizers):
        assert network is seen[0]
        (found,) = regularizers
        assert (found.weight, found.schedule, found.step) == (0.5, Constant(2.0), "subgradient")
        assert {id(gate) for gate in found.gates.values()} == {
            id(gate) for layer in (network.a, network.b) for gate in layer.penalized()
        }
        for name in ("a", "b"):
            layer = network.get_submodule(name)
            close_gates(layer, *[4, 3][: len(layer.penalized())])
        seen.append(network)

    settings = {"form": form, "weight": 0.5, "schedule": Constant(2.0), "step": "subgradient", "skip": ("shortcut",)}
    found = funnel.compress(model, warm=warm, close=close, threshold=0.9, example_input=x[:1], **settings)
    assert len(seen) == 2
    remain = {name: layer.ranks for name, layer in found.fastrank_plan.compressed.items()}
    assert remain == dict.fromkeys(("a", "b"), (4, 3) if form == "tucker2" else (4,))
    assert torch.equal(found.fc.bias, model.fc.bias + 1)
    assert type(found.shortcut) is nn.Conv2d
    assert found.fastrank_plan.options["guard"] == "macs"
    alone = funnel.compress(model, warm=None, close=lambda network, _: None, threshold=0)
    assert max_relative(alone(x), model(x)) <= 1e-12


@pytest.mark.parametrize(("weight", "still_open"), [(0.01, TARGET), (0.0, 8)])
def test_only_the_penalty_closes_the_gates_that_a_low_rank_teacher_does_not_need(weight, still_open):
    """A student of a kernel of core rank 2 ends at that rank and with the teacher's outputs."""
    torch.manual_seed(0)
    teacher = nn.Conv2d(6, 8, 3, padding=1, bias=False)
    student = nn.Sequential(nn.Conv2d(6, 6, 1, bias=False), nn.Conv2d(6, 8, 3, padding=1, bias=False))
    with torch.no_grad():
        teacher.weight.copy_((torch.randn(8, TARGET) @ torch.randn(TARGET, 54)).view(8, 6, 3, 3) / 8)
        student[0].weight.copy_(torch.eye(6)[:, :, None, None])
        student[1].weight.copy_(teacher.weight + 0.02 * torch.randn_like(teacher.weight))
    x = torch.randn(8, 6, 6, 6)
    wanted = teacher(x).detach()

    def close(network, regularizers):
        gates = [p for name, p in network.named_parameters() if ".gate_" in name]
        rest = [p for name, p in network.named_parameters() if ".gate_" not in name]
        optimizer = torch.optim.Adam([{"params": gates, "lr": 0.02}, {"params": rest, "lr": 0.001}])
        for regularizer in regularizers:
            regularizer.attach(optimizer)
        for step in range(100):
            for regularizer in regularizers:
                regularizer.start_epoch(step // 10)
            optimizer.zero_grad()
            (network(x) - wanted).square().mean().backward()
            optimizer.step()
        assert int(network[1].gate_core.count_nonzero()) == still_open
        assert int(network[1].gate_in.count_nonzero()) == 6

    schedule = Linear(1.0, 0.1, 10)
    found = funnel.compress(student, warm=None, close=close, weight=weight, schedule=schedule, threshold=1e-30)
    assert [type(m) for m in found] == [nn.Conv2d, FusedTucker2Conv if weight else nn.Conv2d]
    if weight:
        assert found[1].ranks == (6, TARGET)
    # The gates are pulled as long as the loss is worth less than the penalty, 0.01: that is what may remain.
    assert float((found(x) - wanted).detach().square().mean()) <= 0.01
