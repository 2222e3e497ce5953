"""MUSCO: ranks go the asked share of the way to EVBMF's in every round, and merging undoes a factorisation."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import planted_tucker
from torch import nn

from fastrank import complexity, convert, make_plan, models, ranks
from fastrank.decompose import unfold
from fastrank.methods import musco


@pytest.fixture(scope="module")
def network():
    """A LeNet-5 whose large kernels have a planted Tucker rank and a little noise."""
    torch.manual_seed(0)
    model = models.build("lenet5_nrmf")
    for n, conv in enumerate(m for m in model.modules() if isinstance(m, nn.Conv2d)):
        o, i, k, _ = conv.weight.shape
        planted = planted_tucker(o, i, k, (max(1, i // 4), max(1, o // 4)), seed=n)
        conv.weight.data = (planted / planted.norm()).float() + 1e-3 * torch.randn(conv.weight.shape)
    return model


@pytest.mark.parametrize(
    ("rank", "extreme", "weaken", "expected"),
    [(100, 20, 0.8, 36), (100, 20, 1.0, 20), (10, 20, 0.5, 10), (3, 2, 0.5, 2), (1, 1, 1.0, 1)],
)
def test_weakened_ranks(rank, extreme, weaken, expected):
    assert musco.weakened(rank, extreme, weaken) == expected


def test_one_full_round_is_vbmf(network):
    small, plan = musco.compress(network, rounds=1, weaken=1.0), make_plan(network, "vbmf")
    changed = {name: layer.ranks for name, layer in plan.compressed.items()}
    assert changed
    assert {name: layer.ranks for name, layer in small.fastrank_plan.compressed.items()} == changed


def test_rounds_shrink_and_fine_tuning_happens_between_them(network):
    before = copy.deepcopy(network.state_dict())
    seen = []

    def between(model, number):
        seen.append((number, complexity.count(model, (1, 8, 8)).params))

    weight = network.conv3.weight.detach()
    full = (weight.shape[1], weight.shape[0])
    extreme = [ranks.vbmf_rank(unfold(weight, mode)) for mode in ("mode3", "mode4")]
    small = musco.compress(network, rounds=3, weaken=0.5, between=between, example_input=torch.zeros(1, 1, 8, 8))
    assert [number for number, _ in seen] == [1, 2]
    sizes = [params for _, params in seen] + [complexity.count(small, (1, 8, 8)).params]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < complexity.count(network, (1, 8, 8)).params
    # Nothing trained in between, and the planted rank is what EVBMF finds: each round halves what is left. Later rounds
    # see the kernel through its core, with fewer directions of noise, so their cut may move by a few of the full rank.
    for index in (0, 1):
        rank = full[index]
        for _ in range(3):
            rank = musco.weakened(rank, extreme[index], 0.5)
        assert abs(small.fastrank_plan.layers["conv3"].ranks[index] - rank) <= 0.02 * full[index]
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


@pytest.mark.parametrize(
    ("options", "error"),
    [({"rounds": 0}, ValueError), ({"weaken": 0.0}, ValueError), ({"weaken": "x"}, TypeError)],
)
def test_bad_input(network, options, error):
    with pytest.raises(error, match=next(iter(options))):
        musco.compress(network, **options)


@pytest.mark.parametrize("method", ["nrmf", "trp-channel", "trp-spatial", "trp-decoupled", "norton"])
def test_decompress_gives_the_dense_network_back(network, method):
    small = convert.compress(network, make_plan(network, method))
    assert small.fastrank_plan.compressed
    merged = convert.decompress(small)
    assert not hasattr(merged, "fastrank_plan")
    assert [type(m) for m in merged.modules()] == [type(m) for m in network.modules()]
    x = torch.randn(2, 1, 8, 8)
    for model in (small, merged):
        model.eval()
    with torch.no_grad():
        want, got = small(x), merged(x)
    # Two ways to sum the same products: float32 rounding over a few thousand terms of the largest layer.
    assert (want - got).norm() <= 1e-5 * want.norm()
