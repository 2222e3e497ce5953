"""Channels removed from networks of others, by torch-pruning's dependency graph and the similarity here."""

from __future__ import annotations

import builtins
import importlib
import warnings
from typing import Any

import pytest
import torch
from helpers import EPS, max_relative, randn
from torch import Tensor, nn

from fastrank import compress as apply_plan
from fastrank import load, make_plan, models, prune, save
from fastrank.nn import FusedCPConv

tp = pytest.importorskip("torch_pruning")


class Small(nn.Module):
    """A residual network with a concatenation, a grouped and a depthwise convolution, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16))
        self.inner = nn.Conv2d(16, 24, 3, padding=1)
        self.back = nn.Conv2d(24, 16, 3, padding=1, bias=False)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.grouped = nn.Conv2d(32, 16, 3, padding=1, groups=2)
        self.head = nn.Conv2d(16, 5, 1)
        self.fc = nn.Linear(16, 7)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x).relu()
        x = x + self.back(self.inner(x).relu())
        x = self.grouped(torch.cat((x, self.depthwise(x)), 1)).relu()
        return self.head(x), self.fc(x.mean((2, 3)))


def small() -> nn.Module:
    torch.manual_seed(0)
    return Small().eval()


def lively(model: nn.Module) -> nn.Module:
    """Statistics and weights of normalisations that no two channels share."""
    for index, module in enumerate(model.modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = randn(module.num_features, seed=index)
            module.weight.data = 1 + 0.1 * randn(module.num_features, seed=index + 1)
    return model.eval()


def places(found: Tensor, given: Tensor) -> list[int]:
    """For each entry of `found` the index of the bitwise equal one of `given`."""
    return [next(i for i, row in enumerate(given) if torch.equal(row, each)) for each in found]


@pytest.mark.parametrize(("name", "factored"), [("resnet18", False), ("resnet18", True), ("vgg11_bn", False)])
def test_networks_of_torchvision_keep_the_chosen_filters_bitwise(name, factored):
    torch.manual_seed(0)
    if name == "resnet18":
        model = models.build("torchvision:resnet18", num_classes=10)
    else:
        model = importlib.import_module("torchvision.models").vgg11_bn(num_classes=10, init_weights=False)
        model.classifier = nn.Linear(512, 10)
        model.avgpool = nn.AdaptiveAvgPool2d(1)
    lively(model)
    if factored:
        model = apply_plan(model, make_plan(model, "norton", rank=1))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    x = randn(2, 3, 32, 32)
    with torch.no_grad():  # tracing needs gradients; a caller need not know
        pruned = prune.with_torch_pruning(model, x, 0.25, criterion="pabs" if factored else "l2")
    assert pruned(x).shape == (2, 10)
    assert {type(layer) for layer in model.modules()} == {type(layer) for layer in pruned.modules()}
    before = dict(model.named_modules())
    for layer_name, layer in pruned.named_modules():
        if isinstance(layer, nn.Conv2d | FusedCPConv):
            assert layer.out_channels == int(before[layer_name].out_channels * 0.75)
            assert getattr(layer, "backend", "auto") == "auto"
        if isinstance(layer, nn.BatchNorm2d):
            old = before[layer_name]
            kept = places(layer.running_mean, old.running_mean)
            assert kept == sorted(kept)
            for tensor in ("weight", "bias", "running_var"):
                assert torch.equal(getattr(layer, tensor), getattr(old, tensor)[kept])
    # The filters of the stem read the image, so all of each kept one is left.
    stem, statistics = ("conv1", "bn1") if name == "resnet18" else ("features.0", "features.1")
    kept = places(pruned.get_submodule(statistics).running_mean, before[statistics].running_mean)
    if isinstance(before[stem], FusedCPConv):
        assert torch.equal(pruned.get_submodule(stem).pointwise, before[stem].pointwise[:, kept])
    else:
        assert torch.equal(pruned.get_submodule(stem).weight, before[stem].weight[kept])
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_the_choice_is_that_of_select():
    """A single writer is chosen by its own distances, a residual sum by the mean-scaled average of its writers'."""
    model = lively(models.build("resnet_20"))
    pruned = prune.with_torch_pruning(model, randn(1, 3, 16, 16), 0.5)

    def kept(name: str) -> list[int]:
        return places(pruned.get_submodule(name).running_mean, model.get_submodule(name).running_mean)

    assert kept("layer2.0.bn1") == prune.select(prune.l2(model.layer2[0].conv1.weight), 16).tolist()
    matrices = [prune.l2(block.conv2.weight) for block in model.layer2]
    matrices.append(prune.l2(model.layer2[0].shortcut[0].weight))
    total = sum(matrix / matrix.mean() for matrix in matrices)
    assert kept("layer2.1.bn2") == prune.select(total, 16).tolist()


@pytest.mark.parametrize("factored", [False, True])
def test_what_is_left_computes_what_it_computed(factored):
    """With silent channels removed the outputs stay: concatenation, groups, depthwise and two outputs included."""
    model = small().double()
    if factored:
        for name in ("inner", "back"):
            setattr(model, name, FusedCPConv.from_conv(getattr(model, name), 4))
    with torch.no_grad():
        inner = model.inner.to_dense() if factored else model.inner
        for channel in range(18, 24):  # copies of filters 0 to 5 that `back` does not hear
            if factored:
                for parameter in model.inner.parameters():
                    axis = int(parameter.dim() > 1)
                    parameter.select(axis, channel).copy_(parameter.select(axis, channel - 18))
            else:
                inner.weight[channel] = inner.weight[channel - 18]
                inner.bias[channel] = inner.bias[channel - 18]
        (model.back.pointwise.data[:, :, 18:] if factored else model.back.weight.data[:, 18:]).zero_()
    x = randn(2, 3, 9, 9, dtype=torch.float64)
    others = [name for name, _ in model.named_modules() if name and name not in ("inner", "stem", "stem.1")]
    pruned = prune.with_torch_pruning(model, x, 0.25, criterion="pabs", skip=others)
    assert pruned.inner.out_channels == pruned.back.in_channels == 18
    for found, wanted in zip(pruned(x), model(x), strict=True):
        assert max_relative(found, wanted) <= 1e4 * EPS[torch.float64]


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.99])
def test_channels_left_by_the_ratio(ratio):
    model = small()
    pruned = prune.with_torch_pruning(model, randn(1, 3, 9, 9), ratio)
    left = {name: module.out_channels for name, module in pruned.named_modules() if isinstance(module, nn.Conv2d)}
    if ratio == 0.99:  # nothing would be left of any group, so it stays whole
        ratio = 0.0
    half = {name: int(n * (1 - ratio)) for name, n in (("stem.0", 16), ("inner", 24), ("back", 16), ("depthwise", 16))}
    assert left == {**half, "grouped": int(16 * (1 - ratio)), "head": 5}
    assert pruned.grouped.groups == 2
    assert [out.shape[1] for out in pruned(randn(1, 3, 9, 9))] == [5, 7]


def test_layers_to_skip_keep_their_channels():
    pruned = prune.with_torch_pruning(small(), randn(1, 3, 9, 9), 0.5, skip=["inn*"])
    assert pruned.inner.out_channels == 24
    assert pruned.back.out_channels == 8


def test_flags_and_modes_are_carried_and_the_name_is_not(tmp_path):
    model = models.build("resnet_20").train()
    model.layer1.requires_grad_(False)
    model.bn1.eval()
    pruned = prune.with_torch_pruning(model, randn(2, 3, 16, 16), 0.5)
    assert not any(parameter.requires_grad for parameter in pruned.layer1.parameters())
    assert all(parameter.requires_grad for parameter in pruned.layer2.parameters())
    assert pruned.layer1.training
    assert not pruned.bn1.training
    assert not hasattr(pruned, "fastrank_origin")
    save(pruned, tmp_path / "pruned.safetensors")
    with pytest.raises(ValueError, match="^model must be the dense network"):
        load(tmp_path / "pruned.safetensors")
    again = prune.with_torch_pruning(model, randn(2, 3, 16, 16), 0.5)
    nn.init.zeros_(again.conv1.weight)
    x = randn(1, 3, 16, 16)
    assert torch.equal(load(tmp_path / "pruned.safetensors", again).eval()(x), pruned.eval()(x))


@pytest.mark.parametrize("scope", [False, True])
def test_the_importance_serves_pruners_of_torch_pruning(scope):
    model = lively(models.build("resnet_20"))
    pruner = tp.pruner.MagnitudePruner(
        model,
        randn(1, 3, 16, 16),
        importance=prune.Importance("l2"),
        global_pruning=scope,
        pruning_ratio=0.5,
        ignored_layers=[model.fc],
    )
    scores = [pruner.importance(group) for group in pruner.DG.get_all_groups(ignored_layers=[model.fc])]
    for score in scores:
        assert torch.equal(score.sort().values, torch.arange(1, len(score) + 1) / len(score))
    pruner.step()
    assert model(randn(1, 3, 16, 16)).shape == (1, 10)
    assert model.layer3[0].conv1.out_channels == 32


def test_half_of_each_group_goes_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = apply_plan(small(), make_plan(small(), "norton", rank=2))
        prune.with_torch_pruning(model, randn(1, 3, 9, 9), 0.5)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"ratio": 1.0}, ValueError, "^ratio must be below 1, got 1.0"),
        ({"ratio": -0.1}, ValueError, "^ratio must be a finite number at least 0"),
        ({"ratio": "half"}, TypeError, "^ratio must be a number"),
        ({"criterion": "l3"}, ValueError, "^criterion must be one of"),
        ({"skip": "inner"}, TypeError, "^skip must be a list"),
        ({"skip": ["iner"]}, ValueError, "^skip must be .*did you mean 'inner'"),
        ({"model": "net"}, TypeError, "^model must be a torch.nn.Module"),
        ({"example_input": 3}, TypeError, "^example_input must be a torch.Tensor"),
        ({"example_input": torch.ones(1, 4, 9, 9)}, ValueError, "^model must be a network that torch-pruning can foll"),
    ],
)
def test_wrong_arguments_are_named(options, error, match):
    arguments: dict[str, Any] = {"model": small(), "example_input": randn(1, 3, 9, 9), "ratio": 0.5, **options}
    with pytest.raises(error, match=match):
        prune.with_torch_pruning(**arguments)


def test_other_factored_layers_are_refused():
    model = small()
    model = apply_plan(model, make_plan(model, "nrmf", energy=0.5))
    with pytest.raises(ValueError, match="^model must be of plain layers and FusedCPConv, got FusedTucker2Conv"):
        prune.with_torch_pruning(model, randn(1, 3, 9, 9), 0.5)


def test_without_the_library_one_sentence_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def missing(name: str, *arguments: Any) -> Any:
        if name.startswith("torch_pruning"):
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"pip install 'fastrank\[prune\]'"):
        prune.with_torch_pruning(small(), randn(1, 3, 9, 9), 0.5)
