"""Kernels that are not finite, under `on_nonfinite="skip"`: left alone, counted, warned of once; the rest goes on."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from helpers import l2_relative
from torch import nn

from fastrank.regularize import LowRankProjection, NuclearNorm

MODES = (("mode3", "mode4"), "decoupled", "spatial")
WARNING = r"^a kernel with NaN or infinite values was left alone \(on_nonfinite=\"skip\"\); `skipped` counts on$"


def network(device="cpu"):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 96, 3), nn.Conv2d(96, 12, 3), nn.Conv2d(12, 12, 3)).to(device)


def spoil(model, value=math.nan):
    """One entry, in one of the filters, of the third kernel."""
    with torch.no_grad():
        model[2].weight[1, 2, 0, 0] = value


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("modes", MODES)
def test_a_kernel_gets_no_gradient_and_the_others_get_theirs(modes, value):
    model, whole = network(), network()
    spoil(model, value)
    model[2].weight.grad = (before := torch.ones_like(model[2].weight)).clone()
    penalty = NuclearNorm(model, 0.5, matricization=modes, on_nonfinite="skip")
    NuclearNorm(whole, 0.5, matricization=modes).add_gradients()
    with pytest.warns(RuntimeWarning, match=WARNING):
        penalty.add_gradients()
    assert penalty.skipped == 1
    assert torch.equal(model[2].weight.grad, before)
    for place in (0, 1, 3):
        assert l2_relative(model[place].weight.grad, whole[place].weight.grad) <= 1e-6


def test_a_kernel_is_not_projected_and_the_others_are():
    model, whole = network(), network()
    projections = [
        LowRankProjection(m, energy=0.5, matricization="decoupled", on_nonfinite="skip") for m in (model, whole)
    ]
    for projection in projections:
        projection.project()
    spoil(model)
    before = model[2].weight.detach().clone()
    with pytest.warns(RuntimeWarning, match=WARNING):
        projections[0].project()
    projections[1].project()
    assert [p.skipped for p in projections] == [1, 0]
    assert torch.equal(model[2].weight.nan_to_num(7), before.nan_to_num(7))
    for place in (0, 1, 3):
        assert l2_relative(model[place].weight, whole[place].weight) <= 1e-6
    assert projections[1].ranks == {**projections[0].ranks, "2": projections[1].ranks["2"]}
    assert "2" not in projections[0].ranks


def test_every_time_counts_and_one_warning_is_given():
    model = network()
    penalty = NuclearNorm(model, 0.5, on_nonfinite="skip")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        penalty.add_gradients()
        spoil(model)
        with pytest.warns(RuntimeWarning, match=WARNING):
            penalty.add_gradients()
        model[0].weight.data.fill_(math.inf)
        penalty.add_gradients()
        penalty.add_gradients()
    assert penalty.skipped == 1 + 2 + 2
    other = NuclearNorm(network(), 0.5, on_nonfinite="skip")
    other.load_state_dict(copy.deepcopy(penalty.state_dict()))
    assert other.skipped == 5
    other.add_gradients()
    assert (other.skipped, penalty.skipped) == (5, 5)


def test_the_value_is_that_of_the_kernels_that_are_finite():
    model = network()
    spoil(model)
    found = NuclearNorm(model, 0.5, on_nonfinite="skip").value()
    model[2].weight.requires_grad_(False)
    torch.testing.assert_close(found, NuclearNorm(model, 0.5).value())


@pytest.mark.parametrize("warm", [True, False])
def test_a_kernel_that_recovers_is_regularised_again(warm):
    model = network()
    penalty = NuclearNorm(model, 0.5, on_nonfinite="skip", warm=warm)
    wanted = network()
    NuclearNorm(wanted, 0.5).add_gradients()
    good = model[2].weight.detach().clone()
    penalty.add_gradients()
    spoil(model)
    with pytest.warns(RuntimeWarning, match=WARNING):
        penalty.add_gradients()
    with torch.no_grad():
        model[2].weight.copy_(good)
    for _ in range(2):
        model.zero_grad()
        penalty.add_gradients()
        for a, b in zip(model.parameters(), wanted.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None)
            assert b.grad is None or l2_relative(a.grad, b.grad) <= 2e-4
    assert penalty.skipped == 1


def test_all_kernels_may_be_bad():
    model = network()
    for parameter in model.parameters():
        parameter.data.fill_(math.nan)
    penalty, projection = (
        NuclearNorm(model, 0.5, on_nonfinite="skip"),
        LowRankProjection(model, energy=0.5, on_nonfinite="skip"),
    )
    with pytest.warns(RuntimeWarning, match=WARNING):
        penalty.add_gradients()
    with pytest.warns(RuntimeWarning, match=WARNING):
        projection.project()
    assert (penalty.skipped, projection.skipped, projection.ranks) == (4, 3, {})
    assert all(p.grad is None for p in model.parameters())
    assert float(penalty.value()) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_values_at_the_ends_of_a_dtype_are_finite(dtype):
    model = network().to(dtype)
    with torch.no_grad():
        model[2].weight[0] = torch.finfo(dtype).max
        model[2].weight[1] = torch.finfo(dtype).min
    penalty = NuclearNorm(model, 0.5, matricization="channel", on_nonfinite="skip")
    penalty.add_gradients()
    assert penalty.skipped == 0
    assert all(bool(k.grad.isfinite().all()) for k in penalty.kernels.values())


@pytest.mark.gpu
def test_on_a_gpu_a_skipped_kernel_stays_as_it_is():
    """The host does not know which one it is: its gradient gains zeros, and its ranks are left out once read."""
    model, whole = network("cuda"), network("cuda")
    spoil(model)
    before = model[2].weight.detach().clone()
    penalty, projection = (
        NuclearNorm(model, 0.5, on_nonfinite="skip"),
        LowRankProjection(model, energy=0.5, on_nonfinite="skip"),
    )
    NuclearNorm(whole, 0.5).add_gradients()
    penalty.add_gradients()
    torch.cuda.synchronize()
    with pytest.warns(RuntimeWarning, match=WARNING):
        penalty.add_gradients()
    projection.project()
    assert (penalty.skipped, projection.skipped) == (2, 1)
    assert not bool(model[2].weight.grad.any())
    assert l2_relative(model[0].weight.grad / 2, whole[0].weight.grad) <= 2e-4
    assert torch.equal(model[2].weight.nan_to_num(7), before.nan_to_num(7))
    assert set(projection.ranks) == {"1", "3"}
