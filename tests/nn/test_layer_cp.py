"""CP of a whole layer: the merged kernel is the sum of its terms, and a planted rank is found.

That it stands in for nn.Conv2d in every geometry, dtype and layout is shown in test_layers.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import l2_relative, max_relative, randn
from torch import nn

from fastrank import LayerPlan, Plan, compress, convert
from fastrank.nn import LayerCPConv
from fastrank.nn.layer_cp import max_rank


def planted(o, i, k, rank):
    """A float64 convolution whose kernel is a sum of `rank` terms."""
    factors = [randn(*shape, rank, seed=s, dtype=torch.float64) for s, shape in enumerate(((o,), (i,), (k, k)))]
    conv = nn.Conv2d(i, o, k, padding=1).double()
    with torch.no_grad():
        conv.weight.copy_(torch.einsum("or,ir,yxr->oiyx", *factors))
    return conv


def test_the_kernel_is_the_sum_of_its_terms():
    layer = LayerCPConv(4, 6, (3, 2), 7, stride=(2, 1), padding=(1, 0), dilation=(1, 2), dtype=torch.float64)
    weight = torch.zeros(6, 4, 3, 2, dtype=torch.float64)
    for r in range(7):
        weight += (
            layer.w_out[:, r, None, None, None] * layer.w_in[r, :, None, None] * layer.depthwise[r, None]
        ).detach()
    assert max_relative(layer.to_dense().weight, weight) <= 1e-14
    x = randn(2, 4, 9, 8, dtype=torch.float64)
    assert max_relative(layer(x), F.conv2d(x, weight, layer.bias, (2, 1), (1, 0), (1, 2))) <= 1e-14


@pytest.mark.parametrize("algorithm", ["als", "greedy"])
def test_a_planted_rank_is_found(algorithm):
    conv = planted(8, 7, 3, 1 if algorithm == "greedy" else 3)
    layer = LayerCPConv.from_conv(conv, 1 if algorithm == "greedy" else 3, algorithm=algorithm)
    assert l2_relative(layer.to_dense().weight, conv.weight) <= 1e-4
    assert l2_relative(LayerCPConv.from_conv(conv, 2).to_dense().weight, conv.weight) > 1e-2 or algorithm == "greedy"


@pytest.mark.parametrize(
    ("shape", "rank"), [((6, 4, 3, 3), 36), ((4, 6, 1, 5), 20), ((8, 5, 1, 1), 5), ((1, 1, 2, 2), 4)]
)
def test_the_largest_rank_is_exact(shape, rank):
    assert max_rank(shape) == rank
    conv = nn.Conv2d(shape[1], shape[0], shape[2:]).double()
    assert l2_relative(LayerCPConv.from_conv(conv, rank).to_dense().weight, conv.weight) <= 1e-13
    with pytest.raises(ValueError, match=rf"^rank must be an int between 1 and {rank}, got {rank + 1}"):
        LayerCPConv(shape[1], shape[0], shape[2:], rank + 1)


def test_stages_by_hand():
    layer = LayerCPConv(4, 6, 3, 5, stride=2, padding=1)
    first, middle, last = layer.conv_stages((9, 7))
    assert (first.weights, first.macs) == (20, 20 * 63)
    assert (middle.weights, middle.macs, middle.groups) == (45, 45 * 20, 5)
    assert (last.weights, last.params, last.macs) == (30, 36, 30 * 20)


def test_as_part_of_a_plan():
    model = nn.Sequential(planted(8, 7, 3, 2), nn.Conv2d(8, 8, 3, bias=False).double())
    found = compress(model, Plan({"0": LayerPlan("cp-layer", (2,)), "1": LayerPlan("cp-layer", (30,))}))
    assert type(found[0]) is LayerCPConv
    assert found[0].rank == 2
    assert type(found[1]) is nn.Conv2d
    reason = "cp-layer at rank 30 takes 750 weights, the dense layer 576"
    assert found.fastrank_plan.layers["1"].reason == reason
    x = randn(2, 7, 9, 8, dtype=torch.float64)
    assert l2_relative(found(x), model(x)) <= 1e-3
    assert convert.factored_stages(model[0], LayerPlan("cp-layer", (2,)), (9, 8)) == found[0].conv_stages((9, 8))
    with pytest.raises(ValueError, match=r"^plan.layers\['1'\]: ranks\[0\] must be an int between 1 and 72, got 73"):
        compress(model, Plan({"1": LayerPlan("cp-layer", (73,))}))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: LayerCPConv(3, 4, 3, 0), ValueError, r"rank must be an int between 1 and 27, got 0"),
        (lambda: LayerCPConv(3, 4, 3, 2.0), TypeError, r"rank must be an int, got float"),
        (lambda: LayerCPConv.from_conv(nn.Conv2d(3, 4, 3), 28), ValueError, r"rank must be an int between 1 and 27, g"),
        (
            lambda: LayerCPConv.from_conv(nn.Conv2d(3, 4, 3), 2, algorithm="asl"),
            ValueError,
            r"algorithm must be one of",
        ),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()
