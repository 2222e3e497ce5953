"""The candidates of a layer: what they say they lose is what the decomposition loses, what they cost is counted."""

from __future__ import annotations

import pytest
import torch
from helpers import planted_tucker, randn
from torch import nn

from fastrank import complexity
from fastrank.budget._choices import DENSE, FORMS, KEPT, Choice, Place, approximation, choices, counted, grid, thin
from fastrank.convert import Call, skeleton


def place_of(conv: nn.Conv2d, size: int = 8, images: int = 2) -> Place:
    return Place("conv", conv, [Call((images, conv.in_channels, size, size), False)], images)


def decaying(out_channels: int, in_channels: int, kernel: int) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)
    planted = planted_tucker(out_channels, in_channels, kernel, (in_channels // 3, out_channels // 3))
    noise = 0.3 * planted.std() * randn(*planted.shape, dtype=torch.float64)
    conv.weight.data = ((planted + noise) / planted.norm()).float()
    return conv


@pytest.mark.parametrize("form", FORMS)
def test_the_error_is_the_share_of_energy_that_the_decomposition_loses(form):
    conv = decaying(18, 12, 3)
    found = FORMS[form](conv)
    assert found
    weight = conv.weight.detach().double()
    for layer, error in found[:: max(1, len(found) // 6)]:
        lost = float((weight - approximation(conv, layer).double()).square().sum() / weight.square().sum())
        # Tails in float64 against factors in float32: 18·12·9 entries of 6e-8 each, relative to the whole.
        assert error == pytest.approx(lost, abs=1e-6)


def test_what_a_choice_costs_is_what_the_compressed_model_counts():
    conv = decaying(20, 16, 3)
    place = place_of(conv, 10, 3)
    for choice in choices(place, list(FORMS)):
        layer = skeleton(conv, choice.layer, "cpu")
        cost = complexity.count(layer, (16, 10, 10))
        assert choice.costs["macs"] == cost.macs
        assert choice.costs["params"] == cost.params - 20  # the bias
        assert choice.costs["bytes"] == 4 * choice.costs["params"]
    assert counted(place, DENSE)["macs"] == complexity.count(conv, (16, 10, 10)).macs


def test_a_layer_that_is_called_several_times_costs_all_calls():
    conv = nn.Conv2d(8, 8, 3, padding=1)
    calls = [Call((2, 8, size, size), False) for size in (4, 4, 6)]
    assert counted(Place("c", conv, calls, 2), DENSE)["macs"] == 9 * 8 * 8 * (16 + 16 + 36)


def test_ranks_are_round_where_that_leaves_a_choice():
    assert grid(1) == [1]
    assert grid(3) == [1, 2, 3]
    assert all(rank % 4 == 0 for rank in grid(48))
    assert all(rank % 8 == 0 for rank in grid(128))
    assert all(rank % 16 == 0 for rank in grid(512))
    assert [grid(limit)[-1] for limit in (1, 7, 48, 100, 512)] == [1, 7, 48, 96, 512]
    assert all(1 <= rank <= limit for limit in range(1, 300) for rank in grid(limit))


def test_only_the_front_remains_and_its_ends_are_kept():
    found = [Choice(DENSE, 1 / cost, {"macs": float(cost)}) for cost in range(1, 101)]
    beaten = [Choice(DENSE, 2.0, {"macs": 50.0})]
    kept = thin([*beaten, *found])
    assert len(kept) == KEPT
    assert (kept[0].costs["macs"], kept[-1].costs["macs"]) == (1.0, 100.0)
    assert beaten[0] not in kept
    errors = [choice.error for choice in kept]
    assert errors == sorted(errors, reverse=True)


def test_pointwise_and_tiny_kernels_get_only_forms_that_fit():
    forms = {c.layer.method for c in choices(place_of(nn.Conv2d(32, 32, 1)), list(FORMS))}
    assert forms == {"svd-channel"}
    assert choices(place_of(nn.Conv2d(1, 1, 1)), list(FORMS)) == []
    dead = nn.Conv2d(8, 8, 3)
    nn.init.zeros_(dead.weight)
    assert all(choice.error == 0.0 for choice in choices(place_of(dead), list(FORMS)) if choice.layer.method != "cp")
