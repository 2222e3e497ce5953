"""Fused forms of the networks that people use: everything that can be folded is, and the outputs are the same."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import timm
import torch
import torchvision
from helpers import max_relative, randn
from torch import nn

import fastrank
from fastrank import LayerPlan, Plan, convert, models
from fastrank.fuse import fuse_for_inference
from fastrank.nn import FusedCPConv, FusedTucker2Conv, SVDConv
from fastrank.nn._conv import geometry_of

RESNETS = torchvision.models.resnet
TV_DENSE = {"growth_rate": 4, "block_config": (2, 3), "num_init_features": 8, "num_classes": 4}


def vgg():
    layers = torchvision.models.vgg.make_layers([8, "M", 16, "M", 16, 24, "M"], batch_norm=True)
    model = torchvision.models.VGG(layers, num_classes=4, init_weights=False)
    model.classifier = nn.Linear(24 * 49, 4)
    return model


def densenet(**options):
    return lambda: torchvision.models.DenseNet(**TV_DENSE, **options)


def timm_resnet(**options):
    block = timm.models.resnet.Bottleneck if options.pop("deep", False) else timm.models.resnet.BasicBlock
    return lambda: timm.models.resnet.ResNet(block, (1, 1, 1, 1), channels=(8, 16, 24, 32), num_classes=4, **options)


# Network, and how many BatchNorm2d, rectifiers (ReLU and SiLU) and additions are left where every k×k convolution is
# a fused layer. Behind plain 1×1 convolutions a BatchNorm is folded, a rectifier and an addition stay.
NETWORKS = {
    "torchvision BasicBlock": (lambda: RESNETS.ResNet(RESNETS.BasicBlock, [2, 1, 1, 1], 4), 0, 0, 0),
    "torchvision Bottleneck": (
        lambda: RESNETS.ResNet(RESNETS.Bottleneck, [1, 1, 1, 1], 4, width_per_group=16),
        0,
        8,
        4,
    ),
    "torchvision VGG": (vgg, 0, 0, 0),
    "torchvision DenseNet": (densenet(), 7, 12, 0),
    "torchvision DenseNet, checkpointed": (densenet(memory_efficient=True, drop_rate=0.2), 7, 12, 0),
    "torchvision GoogLeNet": (lambda: models.build("torchvision:googlenet", num_classes=4), 0, 37, 0),
    "timm ResNet": (timm_resnet(drop_path_rate=0.1), 0, 0, 0),
    "timm Bottleneck": (timm_resnet(deep=True, stem_type="deep", stem_width=8, avg_down=True), 0, 8, 4),
    "timm DenseNet": (
        lambda: timm.models.densenet.DenseNet(4, (2, 3), num_classes=4, norm_layer="batchnorm2d"),
        7,
        12,
        0,
    ),
    "timm VGG": (lambda: timm.models.vgg.VGG([8, "M", 16], 4, norm_layer=nn.BatchNorm2d, mlp_ratio=0.01), 0, 0, 0),
    "timm SiLU": (lambda: models.build("timm:seresnet33ts", num_classes=4), 0, None, None),
    "lenet5_nrmf": (lambda: models.build("lenet5_nrmf"), 0, 2, 0),
    "resnet_20": (lambda: models.build("resnet_20"), 0, 0, 0),
    "resnet_56, rank 1": (lambda: models.build("resnet_56", rank=1), 0, 0, 0),
    "resnet_50": (lambda: models.build("resnet_50", num_classes=4, compress_rate="[0.9]*20"), 0, 32, 16),
    "vgg_16_bn": (lambda: models.build("vgg_16_bn", compress_rate="[0.9]*13"), 0, 1, 0),
    "densenet_40": (lambda: models.build("densenet_40", rank=1, compress_rate="[0.]+[0.5]*38"), 39, 39, 0),
}


def randomised(model):
    """Statistics, scales and shifts as a trained network has them."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            for name, low in (("running_mean", -0.3), ("running_var", 0.5), ("weight", 0.5), ("bias", -0.3)):
                nn.init.uniform_(getattr(module, name), low, low + 1, generator=generator)
    return model


def compressed(model, kinds=("tucker2", "cp")):
    """Random factors for every convolution above 1×1, of the kinds in turn."""
    torch.manual_seed(2)
    kinds, replacements = itertools.cycle(kinds), {}
    for site in convert.sites(model):
        size, channels = site.conv.kernel_size, (site.conv.in_channels, site.conv.out_channels)
        if site.reason or max(size) == 1:
            continue
        options = {**geometry_of(site.conv), "device": "cpu"}
        kind = next(kinds)
        if kind == "tucker2":
            layer = FusedTucker2Conv(*channels, size, (min(4, channels[0]), min(5, channels[1])), **options)
        else:
            layer = (
                FusedCPConv(*channels, size, 1, **options)
                if kind == "cp"
                else SVDConv(*channels, size, 3, scheme=kind, **options)
            )
        replacements[site.conv] = layer
    return convert.copy_with(model, replacements)


def left_in(fused):
    """BatchNorm2d, rectifiers and additions that the graph still runs."""
    modules = dict(fused.named_modules())
    found = Counter()
    for node in fused.graph.nodes:
        name = (
            type(modules[node.target]).__name__
            if node.op == "call_module"
            else getattr(node.target, "__name__", node.target)
        )
        found[name.lower().rstrip("_")] += 1
    return found["batchnorm2d"], found["relu"] + found["silu"], found["add"] + found["iadd"]


@pytest.mark.parametrize("name", NETWORKS)
def test_what_can_be_folded_is(name):
    build, norms, rectifiers, additions = NETWORKS[name]
    torch.manual_seed(0)
    model = compressed(randomised(build()))
    channels, size = (1, 8) if name == "lenet5_nrmf" else (3, 32)
    fused = fuse_for_inference(model, randn(2, channels, size, size))
    found = left_in(fused)
    wanted = (norms, rectifiers, additions)
    assert found == tuple(f if w is None else w for f, w in zip(found, wanted, strict=True))
    x = randn(3, channels, size + 8, size, seed=3)
    model.eval()
    with torch.no_grad():
        wanted = convert.copy_with(model, {}).double()(x.double())
        assert max_relative(fused(x), wanted) <= 2 * max_relative(model(x), wanted) + 1e-5


@pytest.mark.parametrize("kinds", [("channel",), ("spatial", "decoupled")])
def test_svd_layers_take_all_that_follows_them(kinds):
    model = compressed(randomised(models.build("resnet_20")), kinds)
    fused = fuse_for_inference(model, randn(2, 3, 32, 32))
    assert left_in(fused) == (0, 0, 0)
    assert {row.kind for row in fused.fusion_report} == {"SVDConv", "Conv2d"}
    assert all(row.folded and not row.left for row in fused.fusion_report)


def test_a_plan_compressed_fused_compiled():
    model = randomised(models.build("resnet_20", compress_rate="[0.5]*12"))
    names = [site.name for site in convert.sites(model)]
    methods = itertools.cycle((LayerPlan("tucker2", (3, 3)), LayerPlan("cp", (1,)), LayerPlan("svd-channel", (2,))))
    plan = Plan({name: next(methods) for name in names[1:] if "shortcut" not in name}, "by hand", {"guard": "none"})
    model = fastrank.compress(model, plan)
    x = randn(2, 3, 32, 32)
    fused = fastrank.fuse_for_inference(model, x)
    assert left_in(fused)[0] == 0
    assert {row.layer for row in fused.fusion_report} == set(names)
    with torch.no_grad():
        compiled = torch.compile(fused, fullgraph=True, backend="eager")(x)
        assert max_relative(compiled, model.eval()(x)) <= 1e-5


def test_a_detectors_backbone_can_be_fused_by_itself():
    detector = models.build("fasterrcnn", num_classes=3, compress_rate="[0.9]*20", rank=1)
    images = randn(1, 3, 64, 64)
    with pytest.raises(ValueError, match=r"^example_input must be an input that the model accepts|^model must be trac"):
        fuse_for_inference(detector, ([images[0]],))
    fused = fuse_for_inference(randomised(detector.backbone), images)
    assert left_in(fused)[0] == 0
    assert list(fused(images)) == ["0", "1", "2", "3", "pool"]
