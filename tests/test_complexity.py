"""Counts by both conventions: computed by hand, against the published rows, and without a trace on the model."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastrank._stages import ConvStage
from fastrank.complexity import Complexity, count
from fastrank.models import build
from fastrank.nn import FusedCPConv, FusedTucker2Conv, SVDConv


@pytest.mark.parametrize(
    ("name", "macs", "params"),
    [
        ("resnet18", 1_822_177_768, 11_689_512),
        ("resnet50", 4_121_925_096, 25_557_032),
        ("densenet121", 2_882_620_136, 7_978_856),
    ],
)
def test_torchvision_networks(name, macs, params):
    with torch.device("meta"):
        found = count(build(f"torchvision:{name}"), 224, convention="ptflops")
    assert (found.macs, found.params) == (macs, params)


@pytest.mark.parametrize(
    ("conv", "macs", "out"),
    [
        (nn.Conv2d(4, 6, 3), 9 * 4 * 6 * 8 * 10, (8, 10)),
        (nn.Conv2d(4, 6, 3, bias=False), 9 * 4 * 6 * 8 * 10, (8, 10)),
        (nn.Conv2d(4, 6, 3, groups=2, padding=1), 9 * 2 * 6 * 10 * 12, (10, 12)),
        (nn.Conv2d(4, 8, (1, 5), groups=4, stride=(2, 3), padding=(0, 1)), 5 * 8 * 5 * 4, (5, 4)),
        (nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2), 9 * 4 * 6 * 5 * 6, (5, 6)),
        (nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular"), 9 * 4 * 6 * 10 * 12, (10, 12)),
        (nn.Conv2d(4, 6, (10, 12)), 120 * 4 * 6, (1, 1)),
    ],
)
def test_one_convolution(conv, macs, out):
    plain, full = count(conv, (4, 10, 12)), count(conv, (4, 10, 12), convention="ptflops")
    bias = 0 if conv.bias is None else conv.out_channels * out[0] * out[1]
    assert plain.macs == macs
    assert full.macs == macs + bias
    assert plain.params == full.params == sum(p.numel() for p in conv.parameters())
    assert plain.per_layer[""].output_shape == (1, conv.out_channels, *out)


class Small(nn.Module):
    """Modules and functions of every counted kind."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.bare = nn.BatchNorm2d(8, affine=False)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.drop = nn.Dropout(0.5)
        self.squeeze = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.pool(self.relu(self.bare(self.bn(self.conv(x)))))
        x = F.avg_pool2d(F.relu(torch.cat((x, x)) + 1), 1)[:1]
        return self.fc(self.drop(self.squeeze(x)).flatten(1))


def test_every_kind_of_module():
    plain, full = count(Small(), 6), count(Small(), 6, convention="ptflops")
    assert plain.macs == 9 * 3 * 8 * 36 + 8 * 5
    numel = 8 * 36
    # bias, affine and bare normalisation, rectifier, pooling; then the second pooling and the linear bias
    assert full.macs == plain.macs + numel * (1 + 2 + 1 + 1 + 1) + 8 * 9 + 5
    assert plain.params == full.params == 224 + 16 + 45
    assert [cost.name for cost in plain.per_layer.values()] == ["conv", "bn", "fc"]
    assert [cost.name for cost in full.per_layer.values()] == ["conv", "bn", "bare", "relu", "pool", "squeeze", "fc"]
    for found in (plain, full):
        assert sum(cost.macs for cost in found.per_layer.values()) == found.macs
        assert sum(cost.params for cost in found.per_layer.values()) == found.params


def test_linear_layer_over_tokens():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 7)

        def forward(self, x):
            return self.fc(x.flatten(2).transpose(1, 2))

    assert count(Tokens(), (3, 4, 5)).macs == 20 * 3 * 7
    assert count(Tokens(), (3, 4, 5), convention="ptflops").macs == 20 * (3 * 7 + 7)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
def test_cp_block(bias, stride):
    layer = FusedCPConv(5, 7, 3, 4, stride=stride, padding=1, bias=bias)
    h, w = (9 + stride - 1) // stride, (11 + stride - 1) // stride
    macs = 4 * 7 * (5 * 9 * 11 + 3 * h * 11 + 3 * h * w)
    found = count(layer, (5, 9, 11), convention="ptflops")
    assert found.macs == macs == count(layer, (5, 9, 11)).macs
    assert found.params == 4 * 7 * (5 + 6) + (7 if bias else 0)
    assert found.params_without_block_biases == 4 * 7 * (5 + 6)
    assert [stage.name for stage in found.per_layer[""].stages] == ["pointwise", "vertical", "horizontal"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda conv: FusedTucker2Conv.from_conv(conv, (3, 4)),
        lambda conv: SVDConv.from_conv(conv, 3, scheme="channel"),
        lambda conv: SVDConv.from_conv(conv, 3, scheme="spatial"),
    ],
    ids=["tucker2", "channel", "spatial"],
)
def test_factored_layer_counts_as_its_sequence(make, bias):
    layer = make(nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=bias))
    sequence = layer.to_sequential()
    for convention in ("conv_fc", "ptflops"):
        one, three = (count(m, (6, 9, 10), convention=convention) for m in (layer, sequence))
        assert (one.macs, one.params, one.block_biases) == (three.macs, three.params, 0)


def test_stage_arithmetic():
    stage = ConvStage("core", 6, 8, (3, 1), 2, True, (4, 5))
    assert (stage.weights, stage.params, stage.macs, stage.bias_adds) == (72, 80, 72 * 20, 8 * 20)
    bare = ConvStage("core", 6, 6, (3, 1), 6, False, (4, 5))
    assert (bare.weights, bare.params, bare.macs, bare.bias_adds) == (18, 18, 360, 0)


def test_batch_is_not_counted_and_an_int_is_a_square_rgb_image():
    conv = nn.Conv2d(3, 2, 3)
    assert count(conv, 8) == count(conv, (3, 8, 8)) == count(conv, (32, 3, 8, 8))
    assert count(conv, torch.Size((3, 8, 8))).input_size == (3, 8, 8)


def test_repeated_modules_and_shared_parameters():
    conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    tied = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    tied.weight = conv.weight
    found = count(nn.Sequential(conv, conv, tied), (4, 5, 5))
    assert found.macs == 3 * 144 * 25
    assert found.params == 144
    assert {name: (cost.macs, cost.params) for name, cost in found.per_layer.items()} == {
        "0": (2 * 144 * 25, 144),
        "2": (144 * 25, 0),
    }


def test_uncalled_parameters_count_as_parameters():
    class Lazybones(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))
            self.unused = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return {"out": x}

    found = count(Lazybones(), 4)
    assert (found.macs, found.params) == (0, 15)
    assert found.per_layer["unused"].output_shape is None


@pytest.mark.parametrize("size", [6, (4, 6, 6)], ids=["works", "fails"])
def test_model_is_left_as_it_was(size):
    model = Small().train()
    model.bn.eval()
    state, flags = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    generator = torch.get_rng_state()
    if size == 6:
        count(model, size)
    else:
        with pytest.raises(ValueError, match=r"input_size must be a size that the model accepts, got \(4, 6, 6\): "):
            count(model, size)
    assert [module.training for module in model.modules()] == flags
    assert all(not module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", [{"dtype": torch.float64}, {"dtype": torch.bfloat16}, {"device": "meta"}])
def test_device_and_dtype_of_the_model(kind):
    assert count(Small().to(**kind), 6).macs == count(Small(), 6).macs


def test_table_and_reductions():
    dense = count(nn.Conv2d(4, 8, 3, bias=False), (4, 10, 10))
    small = count(nn.Conv2d(4, 2, 3, bias=False), (4, 10, 10))
    assert small.reduction_from(dense) == (75.0, 75.0)
    (row,) = json.loads(json.dumps(dense.table()))
    assert row["kind"] == "Conv2d"
    assert row["output_shape"] == [1, 8, 8, 8]
    assert (row["macs"], row["params"], row["macs_share"], row["params_share"]) == (18_432, 288, 1.0, 1.0)
    with pytest.raises(ValueError, match="dense must be counted by the convention 'conv_fc', got 'ptflops'"):
        small.reduction_from(count(nn.Conv2d(4, 8, 3), (4, 10, 10), convention="ptflops"))
    with pytest.raises(ValueError, match="dense must be a count above 0"):
        small.reduction_from(Complexity(0, 0, {}, "conv_fc", (3, 8, 8)))
    assert count(nn.ReLU(), 4).table() == []


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": "resnet"}, TypeError, "model must be a torch.nn.Module, got str"),
        ({"input_size": (8, 8)}, ValueError, r"input_size must be an int, \(C, H, W\) or \(N, C, H, W\), got \(8, 8\)"),
        ({"input_size": None}, ValueError, "input_size must be an int"),
        ({"input_size": True}, ValueError, "input_size must be an int"),
        ({"input_size": 0}, ValueError, r"input_size\[1\] must be an int at least 1, got 0"),
        ({"input_size": (3, 8, -1)}, ValueError, r"input_size\[2\] must be an int at least 1, got -1"),
        ({"input_size": (3, 8.0, 8)}, TypeError, r"input_size\[1\] must be an int, got float"),
        ({"convention": "thop"}, ValueError, r"convention must be one of \['conv_fc', 'ptflops'\], got 'thop'"),
        ({"model": nn.LazyConv2d(3, 3)}, ValueError, "model must be initialised"),
        ({"input_size": 2}, ValueError, "input_size must be a size that the model accepts"),
        (
            {"model": FusedTucker2Conv(3, 4, 3, (2, 2)), "input_size": 2},
            ValueError,
            "input_size must be a size that the",
        ),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        count(**{"model": nn.Conv2d(3, 2, 3), "input_size": 8, **arguments})
