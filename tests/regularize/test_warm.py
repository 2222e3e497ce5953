"""Regularisers that start from their last decompositions: to tolerance, resumed bit for bit, resized with a layer."""

from __future__ import annotations

import copy
import io
import json

import pytest
import torch
from helpers import l2_relative, randn
from torch import nn
from torch.nn.utils import parametrize, prune

from fastrank import ops
from fastrank.decompose.unfold import unfold_all
from fastrank.regularize import GramTrace, LowRankProjection, NuclearNorm
from fastrank.train import _checkpoint
from fastrank.train._loop import _settings

TOLERANCE = 1e-4


def network():
    """Both unfoldings of the last kernel have 96 rows, from which on there are warm starts."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 96, 3), nn.ReLU(), nn.Conv2d(96, 96, 3))


REGULARIZERS = {
    "nuclear": lambda m: NuclearNorm(m, 1e-3),
    "truncated": lambda m: NuclearNorm(m, 1e-3, energy=0.9, matricization="channel", refresh_every=2),
    "decoupled": lambda m: NuclearNorm(m, 1e-3, matricization=("decoupled", "mode4")),
    "projection": lambda m: LowRankProjection(m, every=2, energy=0.9, warm=True),
}


def train(model, optimizer, steps, size=1e-5):
    """Gradients of the size that weights move by; the regulariser is attached."""
    for step in steps:
        for n, p in enumerate(model.parameters()):
            p.grad = size * randn(*p.shape, seed=100 * step + n)
        optimizer.step()


def saved(value):
    """As a file brings it back."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", REGULARIZERS)
def test_a_resume_goes_on_bit_for_bit(name):
    def start(model):
        optimizer = torch.optim.SGD(model.parameters(), 1.0, momentum=0.5)
        regularizer = REGULARIZERS[name](model)
        regularizer.attach(optimizer)
        return optimizer, regularizer

    whole, cut, bare = network(), network(), network()
    optimizer, regularizer = start(whole)
    train(whole, optimizer, range(3))
    kept = [saved(one.state_dict()) for one in (whole, optimizer, regularizer)]
    train(whole, optimizer, range(3, 6))
    for model in (cut, bare):
        second = start(model)
        model.load_state_dict(kept[0])
        second[0].load_state_dict(kept[1])
        second[1].load_state_dict(kept[2] if model is cut else {k: v for k, v in kept[2].items() if k != "spectral"})
        train(model, second[0], range(3, 6))
        if model is cut:
            assert second[1].state_dict().keys() == kept[2].keys()
    assert same(whole, cut)
    if name in ("nuclear", "decoupled"):
        assert regularizer.counts["warm"] > 0
        assert not same(whole, bare), "the state made no difference, so this test shows nothing"


def test_the_state_fits_a_checkpoint_of_train():
    model = network()
    regularizer = LowRankProjection(model, every=1, energy=0.9, warm=True)
    regularizer.after_step()
    tensors = {}
    header = json.loads(json.dumps(_checkpoint._pack("regularizers", [regularizer.state_dict()], tensors)))
    (state,) = _checkpoint._unpack(header, tensors)
    other = LowRankProjection(network(), energy=0.9, warm=True)
    other.load_state_dict(state)
    torch.testing.assert_close(other.state_dict(), regularizer.state_dict(), rtol=0, atol=0)
    assert tensors


def test_how_results_are_computed_is_no_setting_of_a_run():
    """Checkpoints of runs from before there were warm starts name the same settings."""
    model = network()
    found = _settings([NuclearNorm(model, 0.5, warm=False), LowRankProjection(model, warm=True, on_nonfinite="skip")])
    assert found == {
        "regularizers": ["NuclearNorm", "LowRankProjection"],
        "regularizers[0].weight": 0.5,
        "regularizers[0].energy": None,
        "regularizers[0].matricization": ("mode3", "mode4"),
        "regularizers[1].every": 20,
        "regularizers[1].energy": 0.98,
        "regularizers[1].matricization": "channel",
    }


def test_states_without_bases_load_and_others_are_refused():
    model = network()
    NuclearNorm(model, 1.0).load_state_dict({})
    projection = LowRankProjection(model, warm=True)
    projection.load_state_dict({"steps": 7})
    assert (projection.steps, projection.skipped) == (7, 0)
    for state, error, message in (
        ({"spectral": [1]}, TypeError, r"state\['spectral'\] must be a mapping, got list"),
        (
            {"spectral": {"world": 1, "shares": 3}},
            TypeError,
            r"state\['spectral'\]\['shares'\] must be a mapping, got int",
        ),
        ({"spectral": {"world": 1, "shares": {"0": {"0": 3}}}}, ValueError, r"state\['0'\] must be"),
        ({"skipped": -1}, ValueError, r"state\['skipped'\] must be an int at least 0, got -1"),
    ):
        with pytest.raises(error, match=f"^{message}"):
            NuclearNorm(model, 1.0).load_state_dict(state)


def test_gradients_are_exact_to_the_tolerance_and_anew_in_time():
    model = network()
    warm = NuclearNorm(model, 1.0, matricization="mode4", refresh_every=4, tolerance=TOLERANCE)
    exact = NuclearNorm(model, 1.0, matricization="mode4", warm=False)
    kernels = list(warm.kernels.values())
    for step in range(6):
        found = []
        for own in (warm, exact):
            model.zero_grad()
            own.add_gradients()
            found.append([kernel.grad for kernel in kernels])
        for a, b in zip(*found, strict=True):
            assert l2_relative(a, b) <= TOLERANCE
        with torch.no_grad():
            for n, kernel in enumerate(kernels):
                kernel.add_(randn(*kernel.shape, seed=10 * step + n), alpha=1e-5)
    assert warm.counts == {"warm": 4, "exact": 2 + 2 * 6, "fallback": 0}
    assert exact.counts == {}
    assert "spectral" not in exact.state_dict()


def replaced(layer, rows):
    layer.weight = nn.Parameter(layer.weight.detach()[:rows].clone())


def shrunk(layer, rows):
    layer.weight.data = layer.weight.detach()[:rows].clone()


@pytest.mark.parametrize("smaller", [replaced, shrunk])
@pytest.mark.parametrize("name", REGULARIZERS)
def test_a_layer_may_change_its_shape(name, smaller):
    model = network()
    regularizer = REGULARIZERS[name](model)
    regularizer.add_gradients()
    regularizer.after_step()
    state = regularizer.state_dict()
    smaller(model[1], 50)
    twin = copy.deepcopy(model)
    resumed = REGULARIZERS[name](twin)
    resumed.load_state_dict(state)
    fresh_model = copy.deepcopy(model)
    fresh = REGULARIZERS[name](fresh_model)
    for net, own in ((model, regularizer), (twin, resumed), (fresh_model, fresh)):
        net.zero_grad()
        own.add_gradients()
        if isinstance(own, LowRankProjection):
            own.project()
        assert own.kernels["1"] is net[1].weight
    for net in (model, twin):
        for a, b in zip(net.parameters(), fresh_model.parameters(), strict=True):
            assert a.shape == b.shape
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
            if b.grad is not None:
                assert l2_relative(a.grad, b.grad) <= 2 * TOLERANCE
    regularizer.bind(torch.optim.SGD(model.parameters(), 0.1))


def test_a_kernel_that_is_computed_later_on_keeps_its_parameter():
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    model = network()
    own = [NuclearNorm(model, 1.0), LowRankProjection(model), GramTrace(model, 1.0)]
    kernel, other = model[1].weight, model[3].weight
    prune.l1_unstructured(model[1], "weight", 0.5)
    parametrize.register_parametrization(model[3], "weight", Double())
    for regularizer in own:
        assert regularizer.kernels["1"] is kernel is model[1].weight_orig
        assert regularizer.governed()["3"] is other is model[3].parametrizations.weight.original


def test_freezing_a_layer_moves_the_others_in_the_list_and_stays_right():
    model = network()
    penalty, exact = NuclearNorm(model, 1.0), NuclearNorm(model, 1.0, warm=False)
    for frozen in (False, True, True, False):
        model[1].weight.requires_grad_(not frozen)
        found = []
        for own in (penalty, exact):
            model.zero_grad()
            own.add_gradients()
            found.append([k.grad for k in own.kernels.values() if k.grad is not None])
        assert len(found[0]) == 3 - frozen
        for a, b in zip(*found, strict=True):
            assert l2_relative(a, b) <= 2 * TOLERANCE


def test_a_copy_has_a_state_of_its_own():
    model = network()
    penalty = NuclearNorm(model, 1.0)
    penalty.add_gradients()
    before = penalty.state_dict()
    other_model, other = copy.deepcopy((model, penalty))
    assert other.kernels["1"] is other_model[1].weight
    other.add_gradients()
    assert other.counts["warm"] > 0
    assert penalty.counts["warm"] == 0
    torch.testing.assert_close(penalty.state_dict(), before, rtol=0, atol=0)


def test_polar_gradients_need_no_decomposition(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("a decomposition was asked for")

    model = network()
    polar, exact = NuclearNorm(model, 1.0, method="polar"), NuclearNorm(model, 1.0)
    exact.add_gradients()
    wanted = [kernel.grad for kernel in exact.kernels.values()]
    model.zero_grad()
    monkeypatch.setattr(torch.linalg, "svd", refuse)
    monkeypatch.setattr(torch.linalg, "eigh", refuse)
    polar.add_gradients()
    for kernel, gradient in zip(polar.kernels.values(), wanted, strict=True):
        assert l2_relative(kernel.grad, gradient) <= 10 * TOLERANCE
    assert polar.state_dict() == {"skipped": 0}


class OnTheDevice(list):
    """Ranks that must not be looked at, as a GPU would hold them."""

    def __iter__(self):
        raise AssertionError("the host waited for the ranks")

    __getitem__ = __iter__


def test_ranks_are_not_read_before_they_are_asked_for(monkeypatch):
    project = ops.project_energy

    def lazy(matrices, energy, **options):
        found, ranks = project(matrices, energy, **options)
        waiting = OnTheDevice()
        waiting.tensor = torch.tensor(ranks)
        return found, waiting

    monkeypatch.setattr(ops, "project_energy", lazy)
    model = network()
    wanted = {}
    for name, kernel in LowRankProjection(model).kernels.items():
        wanted[name] = max(project(unfold_all(kernel.detach(), "decoupled"), 0.7)[1])
    projection = LowRankProjection(model, energy=0.7, matricization="decoupled")
    projection.project()
    assert projection.ranks == wanted == projection.ranks


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"warm": 1}, TypeError, "warm must be a bool, got int"),
        ({"refresh_every": 0}, ValueError, "refresh_every must be an int at least 1, got 0"),
        ({"tolerance": 0.0}, ValueError, r"tolerance must be a finite number .*, got 0.0"),
        ({"on_nonfinite": "drop"}, ValueError, r"on_nonfinite must be one of \['raise', 'skip'\], got 'drop'"),
        ({"share": None}, TypeError, "share must be a bool, got NoneType"),
        ({"process_group": "gloo"}, TypeError, "process_group must be a torch.distributed.ProcessGroup, got str"),
        ({"method": "newton"}, ValueError, r"method must be one of \['exact', 'polar'\], got 'newton'"),
        ({"method": "polar", "energy": 0.9}, ValueError, "method must be 'exact' where energy cuts the spectrum"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        NuclearNorm(network(), 1.0, **options)
    if "method" not in options:
        with pytest.raises(error, match=f"^{message}"):
            LowRankProjection(network(), **options)
