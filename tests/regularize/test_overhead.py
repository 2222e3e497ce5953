"""The measured overhead of a regulariser: whole steps in turn, of copies, by a clock that the test can set."""

from __future__ import annotations

import copy
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import randn
from torch import nn

from fastrank.latency import Latency
from fastrank.nn import GatedTucker2Conv
from fastrank.regularize import Funnel, LowRankProjection, NuclearNorm, Overhead, Regularizer, overhead

X = randn(4, 3, 8, 8)
LOG: list[str] = []


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(), nn.Conv2d(6, 4, 3))


class Noted(Regularizer):
    """Writes down when it acts, in a list that copies share."""

    def __init__(self, parameter, every=1):
        self.parameter, self.every = parameter, every

    def governed(self):
        return {"0": self.parameter}

    def add_gradients(self):
        assert self.parameter.grad is not None
        LOG.append("add")

    def after_step(self, stepped=True):
        LOG.append("after")

    def value(self):
        return torch.zeros(())


@pytest.fixture
def clock(monkeypatch):
    """A clock that an optimizer step moves by 1 ms and a regulariser by another 0.25; it also logs the steps."""
    LOG.clear()
    now = [0.0]
    module = sys.modules[overhead.__module__]  # the function has the name of its module
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    class Ticking(torch.optim.SGD):
        def step(self, closure=None):
            LOG.append("step")
            now[0] += 1e-3
            return super().step(closure)

    class Slow(Noted):
        def after_step(self, stepped=True):
            super().after_step(stepped)
            now[0] += 0.25e-3

    return SimpleNamespace(optimizer=Ticking, regularizer=Slow)


@pytest.mark.parametrize(
    ("every", "steps", "window", "samples"), [(1, 7, 1, 7), (1, 1, 1, 3), (4, 20, 4, 5), (4, 2, 4, 3)]
)
def test_counts_whole_windows_of_both_kinds_in_turn(clock, every, steps, window, samples):
    model = network()
    noted = clock.regularizer(model[0].weight, every)
    noted.attach(optimizer := clock.optimizer(model.parameters(), 0.01))
    found = overhead(model, noted, X, steps=steps, optimizer=optimizer)
    assert (found.window, found.plain.samples, found.regularized.samples) == (window, samples, samples)
    with_it, without = ["add", "step", "after"] * window, ["step"] * window
    pairs = [LOG[i : i + len(with_it + without)] for i in range(0, len(LOG), len(with_it + without))]
    assert len(pairs) == samples + 2
    assert pairs[::2] == [without + with_it] * len(pairs[::2])
    assert pairs[1::2] == [with_it + without] * len(pairs[1::2])
    assert found.plain_us == pytest.approx(1000)
    assert found.step_us == pytest.approx(1250)
    assert found.added_us == pytest.approx(250)
    assert found.ratio == pytest.approx(1.25)


def test_several_regularisers_share_a_window():
    model = network()
    found = overhead(
        model, [Noted(model[0].weight, 2), Noted(model[4].weight, 3), NuclearNorm(model, 1e-3)], X, steps=1
    )
    assert (found.window, found.plain.samples) == (6, 3)
    assert found.regularizers == ("Noted", "Noted", "NuclearNorm")


def test_what_is_measured_is_a_copy_in_training_mode():
    model, seen = network().eval(), []
    model[2].register_forward_hook(lambda module, inputs, output: seen.append((module.training, module is model[2])))
    with torch.no_grad():
        model[0].weight.grad = torch.ones_like(model[0].weight)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    projection, penalty = LowRankProjection(model, every=2, energy=0.5), NuclearNorm(model, 1.0)
    penalty.attach(optimizer)
    optimizer.step()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict(), projection.state_dict()))
    gradients, rng = [parameter.grad for parameter in model.parameters()], torch.get_rng_state()
    values = copy.deepcopy(gradients)
    with torch.no_grad():
        overhead(model, [penalty, projection], X, steps=2, optimizer=optimizer)
    after = model.state_dict(), optimizer.state_dict(), projection.state_dict()
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert all(parameter.grad is own for parameter, own in zip(model.parameters(), gradients, strict=True))
    torch.testing.assert_close(gradients, values, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), rng)
    assert not model.training
    assert set(seen) == {(True, False)}


def test_proximal_gates_and_a_loss_of_ones_own():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = GatedTucker2Conv(3, 4, 3, (2, 2))

        def forward(self, x, scale):
            return {"out": self.layer(x) * scale}

    model = Pair()
    found = overhead(model, Funnel(model), (X, 2.0), steps=1, loss=lambda output: output["out"].mean())
    assert found.step_us > 0
    with pytest.raises(ValueError, match=r"^loss must be given for a model whose output is no tensor, got dict$"):
        overhead(model, Funnel(model), (X, 2.0), steps=1)


def test_text_and_dictionary():
    found = Overhead(
        Latency(1020.0, 1000.0, 1100.0, 20), Latency(1000.0, 990.0, 1010.0, 20), ("NuclearNorm",), 1, "cpu"
    )
    text = "1.020 ms (p20 1.000, p80 1.100) against 1.000 ms (p20 0.990, p80 1.010); medians of 20 samples of 1 step"
    assert str(found) == f"NuclearNorm: +2.0 % of a training step on cpu: {text}"
    read = json.loads(json.dumps(found.as_dict()))
    assert read == found.as_dict()
    assert (read["ratio"], read["step_p80_us"], read["plain_p20_us"]) == (1.02, 1100.0, 990.0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: overhead("net", NuclearNorm(m, 1.0), X), TypeError, "model must be a torch.nn.Module, got str"),
        (lambda m: overhead(m, m, X), TypeError, "regularizer must be one or more .*Regularizer, got Sequential"),
        (lambda m: overhead(m, [], X), ValueError, "regularizer must be one or more .*Regularizer, got none"),
        (
            lambda m: overhead(m, NuclearNorm(network(), 1.0), X),
            ValueError,
            "regularizer must be one that was made of model, got a NuclearNorm whose '0' is of another model",
        ),
        (lambda m: overhead(m, NuclearNorm(m, 1.0), [1.0]), TypeError, "example_input must be a torch.Tensor, got"),
        (lambda m: overhead(m, NuclearNorm(m, 1.0), X, steps=0), ValueError, "steps must be an int at least 1, got 0"),
        (lambda m: overhead(m, NuclearNorm(m, 1.0), X, loss=3), TypeError, "loss must be a function of the model's"),
        (lambda m: overhead(m, NuclearNorm(m, 1.0), X, loss=lambda y: y), TypeError, "loss must be a function to a 0"),
        (lambda m: overhead(m, NuclearNorm(m, 1.0), X, optimizer=3), TypeError, "optimizer must be a torch.optim"),
        (
            lambda m: overhead(m, NuclearNorm(m, 1.0), X, optimizer=torch.optim.SGD(m[0].parameters(), 0.1)),
            ValueError,
            "optimizer must be one that holds every trained parameter that NuclearNorm governs",
        ),
    ],
)
def test_bad_input_is_refused_in_one_sentence(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call(network())
