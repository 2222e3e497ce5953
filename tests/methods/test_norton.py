"""NORTON end to end: the networks of its README, from random weights, with its numbers."""

from __future__ import annotations

import pytest
import torch
from helpers import EPS, max_relative, randn
from torch import nn

from fastrank import complexity, decompose, load, models, save
from fastrank import compress as apply_plan
from fastrank.methods import make_plan, norton
from fastrank.nn import FusedCPConv

# Multiply-adds as the README prints them, and true parameters (its count of VGG leaves out 1,019 biases).
ROWS = [
    ("vgg_16_bn", 1, "[0.6]*6+[0.8]*7", 4_582_498, 150_667),
    ("resnet_56", 1, "[0.]+[0.18]*29", 14_477_450, 87_633),
    ("densenet_40", 8, "[0.]+[0.08]*6+[0.09]*6+[0.08]*26", 213_587_810, 745_468),
    ("resnet_50", 1, "[0.]+[0.1]*2+[0.4]*5+[0.75]*12", 923_650_408, 5_885_736),
    pytest.param("resnet_110", 4, "[0.]+[0.4]*2+[0.5]*18+[0.65]*36", 47_348_106, 302_542, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "rank", "rates", "macs", "params"), ROWS)
def test_compressed_networks_have_the_published_size_and_travel(name, rank, rates, macs, params, tmp_path):
    model = models.build(name).eval()
    compressed = norton.compress(model, rank=rank, compress_rate=rates)
    size = models.default_input_size(name)
    counted = complexity.count(compressed, size, convention="ptflops")
    assert (counted.macs, counted.params) == (macs, params)
    assert sum(parameter.numel() for parameter in compressed.parameters()) == params
    assert compressed.fastrank_origin == {
        **model.fastrank_origin,
        "rank": rank,
        "compress_rate": models.parse_rates(rates),
    }
    save(compressed, tmp_path / "model.safetensors")
    back = load(tmp_path / "model.safetensors")
    x = randn(1, *size)
    assert torch.equal(back(x), compressed(x))
    assert bool(back(x).isfinite().all())


@pytest.mark.parametrize(
    ("name", "factored"),
    [
        ("vgg_16_bn", 13),
        ("resnet_20", 19),
        ("densenet_40", 37),
        ("resnet_50", 16),
        ("lenet5_nrmf", 1),
    ],
)
def test_decompose_factors_every_3x3_convolution(name, factored):
    """CIFAR stems too, and of a bottleneck the 3×3 alone; the result is what `models.build` builds."""
    model = models.build(name)
    result = norton.decompose(model, 1)
    layers = {key: module for key, module in result.named_modules() if isinstance(module, FusedCPConv)}
    assert len(layers) == factored
    assert not any(m.kernel_size == (3, 3) for m in result.modules() if isinstance(m, nn.Conv2d))
    twin = models.build(name, rank=1)
    assert {key: value.shape for key, value in result.state_dict().items()} == {
        key: value.shape for key, value in twin.state_dict().items()
    }
    assert result.fastrank_origin == twin.fastrank_origin
    assert model.fastrank_origin["rank"] == 0
    assert not any(isinstance(module, FusedCPConv) for module in model.modules())
    for key, value in result.state_dict().items():
        assert key.rpartition(".")[0] in layers or torch.equal(value, model.state_dict()[key])


def test_rank_nine_is_the_network_itself():
    model = models.build("resnet_20").double().eval()
    result = norton.compress(model, rank=9)
    x = randn(2, 3, 16, 16, dtype=torch.float64)
    assert max_relative(result(x), model(x)) <= 1e5 * EPS[torch.float64]
    assert norton.nmse(model, result) <= (16 * EPS[torch.float64]) ** 2


def test_a_layer_is_that_of_cp_filters_with_the_seed():
    model = models.build("resnet_20")
    for seed in (0, 3):
        wanted = decompose.cp_filters(model.layer2[0].conv1.weight, 2, seed=seed)
        layer = norton.compress(model, rank=2, seed=seed).layer2[0].conv1
        assert torch.equal(layer.pointwise, wanted.pointwise)
        assert torch.equal(layer.horizontal, wanted.horizontal)
        assert (layer.stride, layer.padding, layer.bias) == ((2, 2), (1, 1), None)


def test_nmse_is_the_mean_of_relative_errors_and_falls_with_the_rank():
    model = models.build("resnet_20")
    errors = [norton.nmse(model, norton.decompose(model, rank)) for rank in (1, 3, 8)]
    assert errors == sorted(errors, reverse=True)
    assert 0 < errors[-1] < errors[0] < 1
    result = norton.decompose(model, 3)
    own = []
    for name, layer in result.named_modules():
        if isinstance(layer, FusedCPConv):
            weight = model.get_submodule(name).weight
            weight, merged = weight.detach(), layer.to_dense().weight.detach()
            gap = (weight - merged).flatten(1).norm(dim=1) / weight.flatten(1).norm(dim=1)
            own.append(float(gap.square().mean()))
    assert norton.nmse(model, result) == pytest.approx(sum(own) / len(own), rel=1e-5)


def test_nmse_of_networks_outside_the_zoo():
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.Conv2d(12, 12, 3, bias=False), nn.Conv2d(12, 4, 1))
    with torch.no_grad():
        model[1].weight[5] = 0.0  # a filter that is nothing is reproduced exactly
    factored = apply_plan(model, make_plan(model, "norton", rank=1))
    assert isinstance(factored[1], FusedCPConv)
    assert 0 < norton.nmse(model, factored) < 1
    with torch.no_grad():
        model[1].weight.zero_()
        for parameter in factored[1].parameters():
            parameter.zero_()
    factored[0] = model[0]
    assert norton.nmse(model, factored) == 0.0
    with pytest.raises(ValueError, match="^compressed_model must be a model with factored convolutions"):
        norton.nmse(model, model)
    with pytest.raises(ValueError, match="^dense_model must be with an nn.Conv2d '1' of shape"):
        norton.nmse(nn.Sequential(model[0], nn.Conv2d(12, 11, 3)), factored)
    with pytest.raises(ValueError, match="^dense_model must be with an nn.Conv2d '1' .* got NoneType"):
        norton.nmse(nn.Sequential(model[0]), factored)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 0}, "^rank must be an int between 1 and 9, got 0"),
        ({"rank": 10}, "^rank must be an int between 1 and 9"),
        (
            {"rank": 1, "compress_rate": "[0.99]*12"},
            r"^compress_rate\[0\] must be a rate that keeps at least one of 16",
        ),
        ({"rank": 1, "compress_rate": "[0.1]*3"}, "^compress_rate must be 12 rates long for resnet_20"),
        ({"rank": 1, "compress_rate": "[0.1]*12", "criterion": "cosine"}, "^criterion must be one of"),
        ({"rank": 1, "seed": -1}, "^seed must be"),
    ],
)
def test_wrong_options_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        norton.compress(models.build("resnet_20"), **options)


def test_only_plain_networks_of_the_zoo_are_decomposed():
    model = models.build("resnet_20")
    factored = norton.decompose(model, 1)
    planned = apply_plan(model, make_plan(model, "norton", rank=1))
    for given, match in (
        (factored, "a network of plain convolutions, got resnet_20, which is factored already"),
        (planned, "a network of plain convolutions"),
        (models.build("torchvision:resnet18"), "a network of the zoo"),
        (nn.Conv2d(3, 3, 3), "a network of the zoo .*, got Conv2d"),
    ):
        with pytest.raises(ValueError, match=f"^model must be {match}"):
            norton.decompose(given, 1)
    model.conv1 = nn.Conv2d(3, 16, 5, padding=2)
    with pytest.raises(ValueError, match="^model must be the resnet_20 that its fastrank_origin names"):
        norton.decompose(model, 1)
    with pytest.raises(TypeError, match="^model must be a torch.nn.Module"):
        norton.decompose("resnet_20", 1)


def test_networks_pruned_first_can_be_decomposed_then():
    model = models.build("resnet_20", compress_rate="[0.]+[0.25]*11")
    result = norton.decompose(model, 2)
    assert result.fastrank_origin == {**model.fastrank_origin, "rank": 2}
    assert result.eval()(randn(1, 3, 8, 8)).shape == (1, 10)
