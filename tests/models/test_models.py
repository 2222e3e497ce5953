"""Networks by name: published sizes to the digit, shapes, origins, and refusals that say what would be right."""

from __future__ import annotations

import copy
import functools
import json
import socket
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fastrank.complexity import count
from fastrank.models import NAMES, build, default_input_size

# name, rank, compress_rate, MACs (ptflops), parameters, parameters without block biases
PUBLISHED = [
    ("vgg_16_bn", 0, None, 314_694_666, 14_991_946, 14_991_946),
    ("vgg_16_bn", 1, "[0.6]*6+[0.8]*7", 4_582_498, 150_667, 149_648),
    ("vgg_16_bn", 2, None, 74_138_634, 3_601_162, 3_601_162 - 4_224),
    ("vgg_16_bn", 8, "[0.21]*7+[0.75]*5", 126_490_634, 2_588_582, 2_588_582 - 2_060),
    ("resnet_56", 0, None, 127_087_242, 853_018, 853_018),
    ("resnet_56", 1, "[0.]+[0.18]*29", 14_477_450, 87_633, 87_633),
    ("resnet_56", 7, "[0.]+[0.18]*29", 93_346_442, 588_387, 588_387),
    ("resnet_110", 0, None, 256_037_514, 1_727_962, 1_727_962),
    ("resnet_110", 4, "[0.]+[0.4]*2+[0.5]*18+[0.65]*36", 47_348_106, 302_542, 302_542),
    ("densenet_40", 0, None, 290_135_002, 1_059_298, 1_059_298),
    ("densenet_40", 8, "[0.]+[0.08]*6+[0.09]*6+[0.08]*26", 213_587_810, 745_468, 745_468),
    ("resnet_50", 0, None, 4_121_925_096, 25_557_032, 25_557_032),
    ("resnet_50", 1, "[0.]+[0.1]*2+[0.4]*5+[0.75]*12", 923_650_408, 5_885_736, 5_885_736),
]
# The reductions that the NORTON README prints below its counts, in percent.
REDUCTIONS = [
    ("vgg_16_bn", 1, "[0.6]*6+[0.8]*7", 98.54, 99.00),
    ("densenet_40", 8, "[0.]+[0.08]*6+[0.09]*6+[0.08]*26", 26.38, 29.63),
    ("resnet_50", 1, "[0.]+[0.1]*2+[0.4]*5+[0.75]*12", 77.59, 76.97),
]
# Rows of the README's tables whose rates are published too: millions of MACs and parameters as printed there. Some
# of its digits are rounded and some cut off, so they are compared to within one in the last.
TABLES = [
    ("vgg_16_bn", 8, "[0.21]*7+[0.75]*5", 126.49, 2.58),
    ("vgg_16_bn", 8, "[0.3]*7+[0.75]*5", 101.91, 2.34),
    ("vgg_16_bn", 2, None, 74.14, 3.60),
    ("vgg_16_bn", 1, None, 37.68, 1.94),
    ("vgg_16_bn", 1, "[0.6]*6+[0.8]*7", 4.58, 0.14),
    ("resnet_56", 7, "[0.]+[0.18]*29", 93.34, 0.58),
    ("resnet_56", 7, "[0.]+[0.12]*2+[0.4]*27", 73.22, 0.44),
    ("resnet_56", 2, None, 37.52, 0.21),
    ("resnet_56", 1, "[0.]+[0.18]*29", 14.47, 0.08),
    ("resnet_110", 4, "[0.]+[0.4]*2+[0.5]*18+[0.65]*36", 47.34, 0.30),
    ("densenet_40", 8, "[0.]+[0.08]*6+[0.09]*6+[0.08]*26", 213.58, 0.74),
    ("densenet_40", 8, "[0.]+[0.2]*12+[0.]+[0.2]*12+[0.]+[0.2]*12", 168.23, 0.58),
    ("densenet_40", 4, "[0.]+[0.1]*12+[0.]+[0.1]*12+[0.]+[0.1]*12", 123.14, 0.40),
    ("resnet_50", 1, "[0.]+[0.28]*19", 1490, 10.52),
    ("resnet_50", 1, "[0.]+[0.1]*2+[0.4]*5+[0.75]*12", 920, 5.88),
]
# The README's rank ablation on VGG-16-BN: rank, reductions of MACs and parameters in percent. Its second digits mix
# rounding and truncation (64.856 is printed 64.85, 88.026 as 88.03), so they are compared to within one.
RANK_ABLATION = [
    (1, 88.03, 87.06),
    (2, 76.44, 75.98),
    (3, 64.85, 64.91),
    (4, 53.27, 53.84),
    (5, 41.69, 42.76),
    (6, 30.10, 31.69),
    (7, 18.51, 20.61),
    (8, 6.93, 9.54),
]
LENGTHS = {"vgg_16_bn": 13, "resnet_20": 12, "resnet_56": 30, "resnet_110": 57, "densenet_40": 39, "resnet_50": 20}


@functools.cache
def counted(name, convention="ptflops", **options):
    return count(build(name, **options), default_input_size(name), convention=convention)


@pytest.mark.parametrize(("name", "rank", "rates", "macs", "params", "without"), PUBLISHED)
def test_published_sizes(name, rank, rates, macs, params, without):
    found = counted(name, rank=rank, compress_rate=rates)
    assert (found.macs, found.params, found.params_without_block_biases) == (macs, params, without)


@pytest.mark.parametrize(
    ("name", "macs"),
    [
        ("resnet_56", 125_485_696),
        ("densenet_40", 282_917_328),
        ("resnet_50", 4_089_184_256),
        # 313,196,544 in the convolutions, 512·512 and 512·10 in the classifier.
        ("vgg_16_bn", 313_463_808),
    ],
)
def test_multiply_adds_of_convolutions_and_linear_layers(name, macs):
    assert counted(name, "conv_fc").macs == macs


@pytest.mark.parametrize(("name", "rank", "rates", "macs", "params"), REDUCTIONS)
def test_published_reductions(name, rank, rates, macs, params):
    dense, small = counted(name), counted(name, rank=rank, compress_rate=rates)
    fewer_macs, _ = small.reduction_from(dense)
    fewer_params = 100 * (1 - small.params_without_block_biases / dense.params)
    assert (round(fewer_macs, 2), round(fewer_params, 2)) == (macs, params)


@pytest.mark.parametrize(("rank", "macs", "params"), RANK_ABLATION)
def test_published_rank_ablation(rank, macs, params):
    found = counted("vgg_16_bn", rank=rank).reduction_from(counted("vgg_16_bn"))
    assert found == pytest.approx((macs, params), abs=0.012)


@pytest.mark.parametrize(("name", "rank", "rates", "macs", "params"), TABLES)
def test_published_tables(name, rank, rates, macs, params):
    found = counted(name, rank=rank, compress_rate=rates)
    assert found.macs / 1e6 == pytest.approx(macs, abs=10 if name == "resnet_50" else 0.01)
    assert found.params_without_block_biases / 1e6 == pytest.approx(params, abs=0.01)


def test_sizes_of_the_bottleneck_resnet():
    """TRP's "ResNet-56": a stem, then three stages of nine 1×1, 3×3, 1×1 blocks of expansion 4."""
    weights = macs = 3 * 16 * 9
    macs *= 1024
    norms, norm_maps, relu_maps, before, pixels = 16, 16 * 1024, 16 * 1024, 16, 1024
    for stage, mid in enumerate((16, 32, 64)):
        for block in range(9):
            wide, entering = 4 * mid, pixels  # the 3×3 convolution of the first block halves the map from stage 2 on
            pixels = pixels // 4 if stage and not block else pixels
            layers = [(before * mid, mid, entering), (9 * mid * mid, mid, pixels), (mid * wide, wide, pixels)]
            relu_maps += sum(channels * area for _, channels, area in layers)
            if not block:
                layers.append((before * wide, wide, pixels))
            for weight, channels, area in layers:
                weights, macs = weights + weight, macs + weight * area
                norms, norm_maps = norms + channels, norm_maps + channels * area
            before = wide
    assert weights + 2 * norms + 256 * 10 + 10 == counted("resnet_56_bottleneck").params == 869_530
    assert macs + 2560 == counted("resnet_56_bottleneck", "conv_fc").macs == 127_322_624
    # Besides: 2 a normalised value, 1 a rectified one, the map that the last pooling reads, the classifier's biases.
    everything = macs + 2560 + 2 * norm_maps + relu_maps + 256 * 64 + 10
    assert everything == counted("resnet_56_bottleneck").macs == 132_373_002
    with pytest.raises(ValueError, match="compress_rate must be None for resnet_56_bottleneck"):
        build("resnet_56_bottleneck", compress_rate=[0.1] * 30)


def test_sizes_of_the_other_networks():
    assert counted("resnet_20").params == 272_474
    # 156 + 19,328 + 295,168 in the convolutions, 123,000 + 10,164 + 850 in the linear layers.
    assert counted("lenet5_nrmf").params == 448_666


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward(name, rank):
    torch.manual_seed(0)
    model = build(name, num_classes=7, rank=rank)
    size = (3, 32, 32) if name == "resnet_50" else default_input_size(name)
    assert model.training
    out = model(torch.randn(2, *size))
    assert out.shape == (2, 7)
    out.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("name", sorted(LENGTHS))
def test_pruned_plain_networks_run(name):
    model = build(name, num_classes=3, compress_rate=[0.3] * LENGTHS[name]).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)


@pytest.mark.parametrize("size", [(4, 4), (5, 7), (8, 8), (28, 28)])
def test_lenet_takes_small_and_odd_maps(size):
    assert build("lenet5_nrmf").eval()(torch.randn(2, 1, *size)).shape == (2, 10)


def test_shortcut_crops_where_a_stage_is_narrower_than_the_one_before():
    rates = [0.0, 0.5, 0.9] + [0.0] * 27  # 16 -> 8 -> 3 -> 64 channels
    assert build("resnet_56", compress_rate=rates).eval()(torch.randn(1, 3, 8, 8)).shape == (1, 10)


def test_resnet_50_bears_the_names_of_torchvision():
    ours, theirs = build("resnet_50").state_dict(), build("torchvision:resnet50").state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


@pytest.mark.parametrize(
    "options",
    [
        {"name": "lenet5_nrmf"},
        {"name": "vgg_16_bn", "rank": 1, "compress_rate": "[0.6]*6+[0.8]*7", "num_classes": 100},
        {"name": "torchvision:squeezenet1_1", "num_classes": 5},
        {"name": "timm:resnet18.a1_in1k"},
    ],
)
def test_origin_builds_the_network_again(options):
    model = copy.deepcopy(build(**options))
    origin = json.loads(json.dumps(model.fastrank_origin))
    assert sorted(origin) == ["compress_rate", "name", "num_classes", "rank"]
    again = build(**origin)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in again.state_dict().items()} == shapes
    assert again.fastrank_origin == origin


def test_seed_decides_the_weights():
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(build("resnet_20").state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("name", ["torchvision:resnet18", "torchvision:googlenet", "timm:mobilenetv3_small_050"])
def test_nothing_is_downloaded(name, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("network used")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    model = build(name, num_classes=4)
    assert isinstance(model(torch.randn(2, 3, 64, 64)), torch.Tensor)


@pytest.mark.parametrize("name", ["lenet5_nrmf", "torchvision:resnet18"])
def test_pretrained_weights_come_from_a_file(name, tmp_path):
    source = build(name, num_classes=3)
    path = tmp_path / "weights.safetensors"
    # An old file: without the counters of batch normalisation.
    save_file({k: v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}, path)
    loaded = build(name, num_classes=3, pretrained=path).state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in source.state_dict().items())


def test_pretrained_weights_of_something_else_are_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    state = build("lenet5_nrmf").state_dict()
    save_file(state, path)
    with pytest.raises(
        ValueError, match=r"pretrained must be weights of lenet5_nrmf .*'fc3.weight' of shape \(10, 84\)"
    ):
        build("lenet5_nrmf", num_classes=3, pretrained=path)
    with pytest.raises(ValueError, match=r"pretrained must be weights of resnet_20 .*'conv1.weight' of shape"):
        build("resnet_20", pretrained=str(path))
    save_file({key: value for key, value in state.items() if key != "fc3.bias"}, path)
    with pytest.raises(ValueError, match=r"pretrained must be .* with no tensor 'fc3.bias'"):
        build("lenet5_nrmf", pretrained=path)
    save_file({**state, "spare": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"pretrained must be .* a tensor 'spare' that the network does not have"):
        build("lenet5_nrmf", pretrained=path)
    torch.save(state, path)
    with pytest.raises(ValueError, match="pretrained must be a readable safetensors file"):
        build("lenet5_nrmf", pretrained=path)
    with pytest.raises(ValueError, match="pretrained must be the path of an existing safetensors file or torch file"):
        build("lenet5_nrmf", pretrained=tmp_path / "none")
    with pytest.raises(TypeError, match="pretrained must be None or the path of a safetensors file"):
        build("torchvision:resnet18", pretrained=True)


@pytest.mark.parametrize("name", sorted(LENGTHS))
@pytest.mark.parametrize("off", [-2, 1])
def test_wrong_number_of_rates_names_the_right_one(name, off):
    length = LENGTHS[name]
    wanted = "13 or 12" if name == "vgg_16_bn" else str(length)
    with pytest.raises(
        ValueError, match=f"compress_rate must be {wanted} rates long for {name}, got {length + off} rates"
    ):
        build(name, compress_rate=[0.1] * (length + off))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"name": "resnet56"},
            ValueError,
            r"name must be one of \[.*\], got 'resnet56' \(did you mean 'resnet_56'\?\)",
        ),
        ({"name": "torchvision:resnet19"}, ValueError, r"got 'torchvision:resnet19' \(nearest: .*torchvision:resnet18"),
        ({"name": "torchvision:fasterrcnn_resnet50_fpn"}, ValueError, "an image classifier of torchvision"),
        ({"name": "timm:resnet81"}, ValueError, "got 'timm:resnet81' \\(nearest: timm:resnet18"),
        ({"name": "timm:hf-hub:someone/something"}, ValueError, "name must be 'timm:' and"),
        ({"name": "torchvision:"}, ValueError, "name must be one of"),
        ({"name": 3}, TypeError, "name must be a string, got int"),
        ({"name": "resnet_20", "num_classes": 0}, ValueError, "num_classes must be an int at least 1, got 0"),
        ({"name": "resnet_20", "num_classes": 2.0}, TypeError, "num_classes must be an int, got float"),
        ({"name": "resnet_20", "rank": -1}, ValueError, "rank must be an int between 0 and 9, got -1"),
        ({"name": "resnet_20", "rank": 10}, ValueError, "rank must be an int between 0 and 9, got 10"),
        ({"name": "resnet_20", "rank": True}, TypeError, "rank must be an int, got bool"),
        ({"name": "resnet_20", "compress_rate": 0.5}, TypeError, "compress_rate must be a list of rates"),
        ({"name": "resnet_20", "compress_rate": "[0.1]*"}, ValueError, "compress_rate must be lists of numbers"),
        (
            {"name": "resnet_20", "compress_rate": [0.1] * 11 + [1.0]},
            ValueError,
            r"compress_rate\[11\] must be a rate in",
        ),
        (
            {"name": "resnet_20", "compress_rate": "[0.99]*12"},
            ValueError,
            r"compress_rate\[0\] must be a rate that keeps",
        ),
        ({"name": "lenet5_nrmf", "compress_rate": [0.1]}, ValueError, "compress_rate must be None for lenet5_nrmf"),
        ({"name": "torchvision:resnet18", "rank": 2}, ValueError, "rank must be left out for torchvision networks"),
        ({"name": "timm:resnet18", "compress_rate": [0.1]}, ValueError, "compress_rate must be left out for timm"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        build(**options)


@pytest.mark.parametrize(
    ("module", "name"), [("torchvision.models", "torchvision:resnet18"), ("timm", "timm:resnet18")]
)
def test_missing_package_names_the_extra(module, name, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"name '{name}' needs {module.split('.')[0]}: .*fastrank\[vision\]"):
        build(name)


def test_default_input_sizes():
    assert default_input_size("lenet5_nrmf") == (1, 8, 8)
    assert default_input_size("timm:resnet18") == (3, 224, 224)
    with pytest.raises(ValueError, match="name must be one of"):
        default_input_size("resnet")


def test_rectifiers_and_pools_of_lenet_are_modules():
    kinds = [type(module) for module in build("lenet5_nrmf").children()]
    assert kinds.count(nn.ReLU) == 5
    assert kinds.count(nn.MaxPool2d) == 2
