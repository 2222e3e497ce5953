"""Pruned networks of the zoo: nothing but what read the removed channels is lost."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import EPS, generator, max_relative, randn
from torch import Tensor, nn

from fastrank import Plan, complexity, compress, load, make_plan, models, prune, save
from fastrank.models.identify import identify
from fastrank.nn import FusedCPConv
from fastrank.plan import LayerPlan
from fastrank.prune._layouts import layout

SIZES = {"vgg_16_bn": 16, "resnet_50": 32}
LENGTHS = {"vgg_16_bn": 13, "resnet_20": 12, "resnet_56": 30, "resnet_110": 57, "densenet_40": 39, "resnet_50": 20}
# Every stage that shortcuts feed grows, shrinks and keeps its width against the one before it at least once.
RATES = [
    ("vgg_16_bn", 2, "[0.3]*6+[0.6]*7"),
    ("resnet_20", 1, "[0.]+[0.3]*11"),
    ("resnet_20", 0, "[0.4]*2+[0.2]*10"),
    ("resnet_56", 1, "[0.]+[0.18]*29"),
    ("resnet_56", 0, "[0.5]+[0.1]+[0.4]*28"),
    ("resnet_56", 1, "[0.25]+[0.5]+[0.7]*28"),
    ("resnet_56", 0, "[0.]+[0.]+[0.7]*28"),
    ("resnet_56", 0, "[0.4]+[0.1]+[0.7]*28"),
    ("densenet_40", 2, "[0.]+[0.3]*38"),
    ("resnet_50", 1, "[0.2]*4+[0.6]*16"),
]
# A transition counts its rate from what reaches it, so a rate of 0 keeps as many of its channels as are left before it.
DENSENET_RATES = "[0.]+[0.25]*12+[0.]+[0.25]*12+[0.]+[0.25]*12"


def lively(name: str, rank: int = 0) -> nn.Module:
    """The network in float64 and eval mode, with normalisations that no two channels share."""
    model = models.build(name, rank=rank).double().eval()
    for index, module in enumerate(model.modules()):
        if isinstance(module, nn.BatchNorm2d):
            shape = module.weight.shape
            for offset, tensor in enumerate((module.weight, module.bias, module.running_mean)):
                tensor.data = 0.3 * randn(*shape, seed=4 * index + offset, dtype=torch.float64) + (offset == 0)
            module.running_var = 0.5 + randn(*shape, seed=4 * index + 3, dtype=torch.float64).square()
    return model


def survivors(model: nn.Module, pruned: nn.Module) -> dict[tuple[str, ...], list[int]]:
    """Groups read together -> the channels of theirs that are left, told by the statistics of their normalisation."""
    found = {}
    for name, reads in layout(model).readers.items():
        before, after = model.get_submodule(name), pruned.get_submodule(name)
        if isinstance(before, nn.BatchNorm2d):
            place = {value: index for index, value in enumerate(before.running_mean.tolist())}
            found[reads] = [place[value] for value in after.running_mean.tolist()]
    return found


def without(model: nn.Module, kept: dict[tuple[str, ...], list[int]]) -> nn.Module:
    """A copy of `model` in which every layer and shortcut of the layout reads zeros for the removed channels."""
    model, parts = copy.deepcopy(model), layout(model)
    reads = {conv.name: conv.reads for conv in parts.convs} | {each.name: (each.source,) for each in parts.shortcuts}
    for name, groups in reads.items() | {(n, r) for n, r in parts.readers.items() if n.endswith(("fc", "linear1"))}:
        if groups:

            def hook(_: nn.Module, args: tuple[Tensor], groups: tuple[str, ...] = groups) -> Tensor:
                mask = torch.zeros(args[0].shape[1], dtype=args[0].dtype).index_fill(0, torch.tensor(kept[groups]), 1)
                return args[0] * mask.reshape(-1, *[1] * (args[0].dim() - 2))

            model.get_submodule(name).register_forward_pre_hook(hook)
    return model


@pytest.mark.parametrize(("name", "rank", "rates"), RATES)
def test_pruned_networks_compute_what_is_left_of_the_network(name, rank, rates):
    model = lively(name, rank)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    x = randn(2, 3, *[SIZES.get(name, 8)] * 2, dtype=torch.float64)
    pruned = prune.channels(model, rates)
    with torch.device("meta"):
        twin = models.build(name, rank=rank, compress_rate=rates).state_dict()
    assert {key: value.shape for key, value in pruned.state_dict().items()} == {k: v.shape for k, v in twin.items()}
    assert identify(pruned) == {**model.fastrank_origin, "compress_rate": models.parse_rates(rates)}
    assert not any(module.training for module in pruned.modules())
    wanted = without(model, survivors(model, pruned))(x)
    assert max_relative(pruned(x), wanted) <= 1e6 * EPS[torch.float64]
    assert max_relative(model(x), wanted) > 1e-3
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])


@pytest.mark.parametrize(("name", "rank"), [*((name, 0) for name in LENGTHS if name != "vgg_16_bn"), ("vgg_16_bn", 1)])
def test_rates_of_zero_change_nothing(name, rank):
    model = lively(name, rank)
    pruned = prune.channels(model, [0.0] * LENGTHS[name])
    assert pruned is not model
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in pruned.state_dict().items())
    x = randn(1, 3, *[SIZES.get(name, 8)] * 2, dtype=torch.float64)
    assert torch.equal(pruned(x), model(x))
    assert pruned.fastrank_origin["compress_rate"] == [0.0] * LENGTHS[name]


def plant(model: nn.Module, rates: str) -> None:
    """Make as many filters of every group as `rates` remove copies of others, and silent."""
    origin = model.fastrank_origin
    parts = layout(model)
    with torch.device("meta"):
        twin = models.build(**{**origin, "compress_rate": rates})
    dead: dict[str, list[int]] = {}
    with torch.no_grad():
        for conv in parts.convs:
            layer = model.get_submodule(conv.name)
            out, left = layer.out_channels, twin.get_submodule(conv.name).out_channels
            # Duplicates stand behind their originals: of equals, the later goes.
            order = out // 2 + torch.randperm(out - out // 2, generator=generator(3))
            gone = dead.setdefault(conv.writes, order[: out - left].tolist())
            for index, channel in enumerate(gone):
                for parameter in layer.parameters():
                    axis = int(isinstance(layer, FusedCPConv) and parameter.dim() > 1)
                    parameter.select(axis, channel).copy_(parameter.select(axis, index))
        for name, reads in parts.readers.items():
            layer, start = model.get_submodule(name), 0
            for group in reads:
                gone = [start + channel for channel in dead[group]]
                start += next(model.get_submodule(c.name).out_channels for c in parts.convs if c.writes == group)
                if isinstance(layer, nn.BatchNorm2d):
                    layer.weight[gone] = layer.bias[gone] = 0.0


@pytest.mark.parametrize(
    ("name", "rank", "rates", "criterion"),
    [
        *(("densenet_40", 1, DENSENET_RATES, criterion) for criterion in prune.CRITERIA),
        ("densenet_40", 0, DENSENET_RATES, "pabs"),
        ("vgg_16_bn", 2, "[0.25]*12", "pabs"),
        ("vgg_16_bn", 0, "[0.25]*12", "l2"),
        ("resnet_50", 0, "[0.25]*20", "l2"),
    ],
)
def test_silent_duplicates_are_what_goes(name, rank, rates, criterion):
    """Filters that repeat others are the closest pairs; where nothing hears them the outputs stay as they were."""
    model = lively(name, rank)
    plant(model, rates)
    x = randn(2, 3, *[SIZES.get(name, 8)] * 2, dtype=torch.float64)
    pruned = prune.channels(model, rates, criterion=criterion)
    assert max_relative(pruned(x), model(x)) <= 1e6 * EPS[torch.float64]


@pytest.mark.parametrize("rank", [1, 4])
def test_zero_filters_go_first(rank):
    """Dead channels of a residual network: the empty span is at angle 0 from everything."""
    model, inner = lively("resnet_56", rank), [1, 5]
    dead = {"conv1": [], "layer1": [2, 9], "layer2": [0, 10, 17, 31], "layer3": []}
    with torch.no_grad():
        for conv in layout(model).convs:
            model.get_submodule(conv.name).pointwise[:, dead.get(conv.writes, inner)] = 0.0
        for name, (group,) in layout(model).readers.items():
            layer = model.get_submodule(name)
            if isinstance(layer, nn.BatchNorm2d):
                # The stem keeps all its channels, but stage 1 must not hear those that it loses.
                gone = dead["layer1" if group == "conv1" else group] if group in dead else inner
                layer.weight[gone] = layer.bias[gone] = 0.0
    rates = [0.0, 2 / 16, 4 / 32, *(2 / n for n in (16, 32, 64) for _ in range(9))]
    pruned = prune.channels(model, rates)
    kept = survivors(model, pruned)
    assert sorted(kept[("layer1",)]) == [c for c in range(16) if c not in dead["layer1"]]
    assert sorted(kept[("layer2",)]) == [c for c in range(32) if c not in dead["layer2"]]
    assert kept[("layer3.4.conv1",)] == [c for c in range(64) if c not in inner]
    x = randn(2, 3, 8, 8, dtype=torch.float64)
    assert max_relative(pruned(x), model(x)) <= 1e6 * EPS[torch.float64]


def test_every_writer_of_a_stage_counts_the_same():
    """A stage goes by the sum of its convolutions' distances, whatever their scale."""
    model = lively("resnet_50")
    first = survivors(model, prune.channels(model, "[0.]+[0.5]+[0.]*18"))[("layer1",)]
    with torch.no_grad():
        model.layer1[1].conv3.weight *= 1e6
    assert survivors(model, prune.channels(model, "[0.]+[0.5]+[0.]*18"))[("layer1",)] == first
    own = prune.select(prune.distances(model.layer1[1].conv3, "l2"), 128).tolist()
    assert first != own


def test_inputs_that_are_gone_do_not_count():
    """conv1 of VGG is compared on the survivors of conv0."""
    model = lively("vgg_16_bn")
    kept = survivors(model, prune.channels(model, "[0.5]*2+[0.]*11"))
    inputs = torch.tensor(kept[("features.conv0",)])
    alone = prune.distances(model.features.conv1, "l2", inputs=inputs)
    assert kept[("features.conv1",)] == prune.select(alone, 32).tolist()


def test_a_plan_of_norton_can_be_pruned_and_travels(tmp_path):
    """Plain and factored convolutions side by side, as `make_plan` leaves them; the file rebuilds the network."""
    model = models.build("resnet_20").eval()
    model = compress(model, make_plan(model, "norton", rank=2, skip=["layer3.*"]))
    pruned = prune.channels(model, "[0.25]*12", criterion="csa")
    assert isinstance(pruned.layer1[0].conv2, FusedCPConv)
    assert type(pruned.layer3[0].conv2) is nn.Conv2d
    save(pruned, tmp_path / "pruned.safetensors")
    back = load(tmp_path / "pruned.safetensors")
    x = randn(2, 3, 8, 8)
    assert torch.equal(back(x), pruned(x))
    assert back.fastrank_origin == pruned.fastrank_origin


def test_modes_flags_and_dtypes_are_carried():
    model = models.build("vgg_16_bn", rank=1).half()
    model.features.conv3.requires_grad_(False)
    model.features.norm3.eval()
    pruned = prune.channels(model, "[0.5]*12")
    assert all(parameter.dtype == torch.float16 for parameter in pruned.parameters())
    assert not any(parameter.requires_grad for parameter in pruned.features.conv3.parameters())
    assert pruned.features.conv4.pointwise.requires_grad
    assert pruned.training
    assert not pruned.features.norm3.training
    assert isinstance(pruned.features.conv3.pointwise, nn.Parameter)
    assert complexity.count(pruned, (3, 32, 32)).params == sum(p.numel() for p in pruned.parameters())


@pytest.mark.parametrize(
    ("change", "rates", "options", "error", "match"),
    [
        (None, "[0.1]*5", {}, ValueError, "^compress_rate must be 12 rates long for resnet_20, got 5 rates"),
        (None, "[1.5]*12", {}, ValueError, r"^compress_rate\[0\] must be a rate"),
        (None, "[0.1]*12", {"criterion": "pab"}, ValueError, "^criterion must be one of"),
        ("pruned", "[0.1]*12", {}, ValueError, "^model must be a network of full width, got resnet_20, which has been"),
        ("anonymous", "[0.1]*12", {}, ValueError, r"^model must be a network that models.build made .*got Cifar"),
        ("other", "[0.1]*12", {}, ValueError, "^model must be the resnet_20 that its fastrank_origin names"),
        ("tucker", "[0.1]*12", {}, TypeError, r"^model.layer1.0.conv1 must be an nn.Conv2d or a FusedCPConv"),
    ],
)
def test_what_cannot_be_pruned_is_named(change, rates, options, error, match):
    model = models.build("resnet_20")
    if change == "pruned":
        model = prune.channels(model, "[0.1]*12")
    elif change == "anonymous":
        del model.fastrank_origin
    elif change == "other":
        model.layer1[0].conv1 = nn.Conv2d(16, 8, 3)
    elif change == "tucker":
        model = compress(model, Plan({"layer1.0.conv1": LayerPlan("tucker2", (4, 4))}, "nrmf", {}))
    with pytest.raises(error, match=match):
        prune.channels(model, rates, **options)


def test_networks_without_widths_are_refused():
    for name in ("lenet5_nrmf", "torchvision:resnet18"):
        with pytest.raises(ValueError, match=f"^model must be a network of the zoo whose widths .* got {name}"):
            prune.channels(models.build(name), [0.5])
    with pytest.raises(TypeError, match=r"^model must be a torch.nn.Module, got str"):
        prune.channels("resnet_56", [])
