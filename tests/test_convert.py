"""A plan applied to networks: same function at full rank, nothing else touched, a reason for every layer left dense."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
import torchvision
from helpers import Spare, max_relative, randn
from torch import nn
from torch.nn.utils import parametrize, prune

from fastrank import LayerPlan, Plan, compress, convert, models
from fastrank.decompose.tucker import max_ranks
from fastrank.nn import FusedCPConv, FusedTucker2Conv, LayerCPConv, SVDConv, layer_cp
from fastrank.nn._conv import FactoredConv2d
from fastrank.nn.svd import max_rank

METHODS = {
    "tucker2": FusedTucker2Conv,
    "cp": FusedCPConv,
    "cp-layer": LayerCPConv,
    "svd-channel": SVDConv,
    "svd-spatial": SVDConv,
    "svd-decoupled": SVDConv,
}


def full(method, conv):
    shape = tuple(conv.weight.shape)
    if method == "tucker2":
        return LayerPlan(method, max_ranks(shape))
    if method == "cp-layer":
        return LayerPlan(method, (layer_cp.max_rank(shape),))
    return LayerPlan(method, (shape[2] * shape[3] if method == "cp" else max_rank(method.removeprefix("svd-"), shape),))


def full_plan(model, method):
    return Plan({site.name: full(method, site.conv) for site in convert.sites(model) if not site.reason})


def one(name, method="tucker2", ranks=(2, 2)):
    return Plan({name: LayerPlan(method, ranks)})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "build",
    [
        lambda: torchvision.models.resnet18(num_classes=5),
        lambda: torchvision.models.densenet121(num_classes=5),
        Spare,
    ],
    ids=["resnet18", "densenet121", "spare"],
)
def test_full_rank_networks_give_the_same_outputs(build, method):
    torch.manual_seed(0)
    model = build().eval()
    if isinstance(model, torchvision.models.DenseNet):
        del (
            model.features.denseblock2,
            model.features.denseblock3,
            model.features.denseblock4,
        )  # a block shows it, in a tenth of the time
        model.features.transition1 = model.features.transition2 = model.features.transition3 = nn.Identity()
        model.features.norm5, model.classifier = nn.BatchNorm2d(256).eval(), nn.Linear(256, 5)
    elif method == "cp-layer" and isinstance(model, torchvision.models.ResNet):
        model.layer3 = model.layer4 = nn.Identity()  # nine times as many terms as channels: here too a part shows it
        model.fc = nn.Linear(128, 5)
    x = randn(2, 3, 64, 64)
    found = compress(model, full_plan(model, method), guard=False)
    factored = [m for m in found.modules() if isinstance(m, FactoredConv2d)]
    assert {type(m) for m in factored} == {METHODS[method]}
    assert len(factored) == sum(not site.reason for site in convert.sites(model))
    with torch.no_grad():
        assert max_relative(found(x), model(x)) <= 1e-4  # twenty layers at 1e-5 each add up like a random walk


@pytest.mark.parametrize("inplace", [False, True])
def test_a_copy_leaves_the_original_alone_and_in_place_keeps_the_object(inplace):
    model = Spare()
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    model.down.eval()
    found = compress(model, one("down"), inplace=inplace)
    assert (found is model) == inplace
    assert isinstance(found.down, FusedTucker2Conv)
    assert not found.down.training
    assert found.stem.training
    assert found.down.stride == (2, 2)
    if not inplace:
        assert list(model.modules()) == modules
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert not hasattr(model, "fastrank_plan")
        assert not {p.data_ptr() for p in found.parameters()} & {p.data_ptr() for p in model.parameters()}
    else:
        assert found.stem is modules[1]


@pytest.mark.parametrize("inplace", [False, True])
def test_a_shared_layer_is_replaced_at_every_place_by_one_layer(inplace):
    model = Spare().eval()
    x = randn(2, 3, 16, 16)
    with torch.no_grad():
        wanted = model(x)
        found = compress(model, full_plan(model, "tucker2"), guard=False, inplace=inplace)
        assert found.twice is found.again
        assert isinstance(found.twice, FusedTucker2Conv)
        assert max_relative(found(x), wanted) <= 1e-5


def test_every_layer_has_its_place_and_reason_in_the_plan_as_applied():
    model = Spare()
    found = compress(model, Plan({"stem": LayerPlan("tucker2", (3, 3)), "down": LayerPlan("dense", (), "mine")}))
    applied = found.fastrank_plan
    assert list(applied.layers) == ["stem", "down", "twice", "grouped", "point"]
    reasons = {name: layer.reason for name, layer in applied.layers.items() if layer.method == "dense"}
    assert reasons == {
        "down": "mine",
        "twice": "not in the plan",
        "grouped": "groups must be 1, got 4",
        "point": "not in the plan",
    }
    assert all(reasons.values())
    assert found.fastrank_plan == Plan.from_json(applied.to_json())


def test_the_guard_keeps_dense_what_would_grow_and_says_by_how_much():
    model = Spare()
    plan = Plan({"stem": LayerPlan("tucker2", (3, 16)), "down": LayerPlan("tucker2", (2, 2))})
    guarded, free = compress(model, plan), compress(model, plan, guard=False)
    assert type(guarded.stem) is nn.Conv2d
    assert isinstance(guarded.down, FusedTucker2Conv)
    assert guarded.fastrank_plan.layers["stem"].reason == "tucker2 at rank 3×16 takes 697 weights, the dense layer 432"
    assert isinstance(free.stem, FusedTucker2Conv)
    assert sum(p.numel() for p in free.stem.parameters()) == 697 + 16
    # Equal cost is not cheaper: a 1×1 kernel at channel rank R holds R(I+O) against I·O.
    square = nn.Sequential(nn.Conv2d(8, 8, 1))
    assert type(compress(square, one("0", "svd-channel", (4,)))[0]) is nn.Conv2d
    assert type(compress(square, one("0", "svd-channel", (3,)))[0]) is SVDConv


def test_a_model_that_is_itself_a_convolution():
    conv = nn.Conv2d(16, 16, 3)
    found = compress(conv, one(""))
    assert isinstance(found, FusedTucker2Conv)
    assert found.fastrank_plan.layers[""].ranks == (2, 2)
    assert type(conv) is nn.Conv2d
    with pytest.raises(ValueError, match=r"^inplace must be False for a model that is itself a convolution, got True"):
        compress(conv, one(""), inplace=True)
    assert compress(conv, Plan({}), inplace=True) is conv


class Tied(nn.Module):
    """A decoder that shares the encoder's weight, and two convolutions that share a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Conv2d(4, 8, 3), nn.ConvTranspose2d(8, 4, 3)
        self.decoder.weight = self.encoder.weight
        self.left, self.right = nn.Conv2d(4, 8, 3), nn.Conv2d(4, 8, 3)
        self.right.bias = self.left.bias
        self.one, self.other = nn.Conv2d(4, 8, 3), nn.Conv2d(4, 8, 3)
        self.other.weight = self.one.weight


TIED = {
    "encoder": "it shares its weight with decoder",
    "left": "it shares its bias with right",
    "right": "it shares its bias with left",
    "one": "it shares its weight with other",
    "other": "it shares its weight with one",
}


@pytest.mark.parametrize("name", TIED)
def test_tied_tensors_are_refused(name):
    model = Tied()
    assert {site.name: site.reason for site in convert.sites(model)} == TIED
    with pytest.raises(
        ValueError, match=rf"^plan.layers\['{name}'\] must be dense for a layer that cannot be factored: {TIED[name]}"
    ):
        compress(model, one(name))
    assert compress(model, Plan({})).decoder.weight.shape == (8, 4, 3, 3)


class Scale(nn.Module):
    def forward(self, weight):
        return 2 * weight


def old_weight_norm(conv):
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(conv)


UNUSUAL = {
    "weight_norm": (old_weight_norm, "its weight is computed in forward"),
    "new weight_norm": (nn.utils.parametrizations.weight_norm, "ParametrizedConv2d is a subclass"),
    "parametrized": (
        lambda c: parametrize.register_parametrization(c, "weight", Scale()),
        "ParametrizedConv2d is a subclass",
    ),
    "pruned": (lambda c: prune.l1_unstructured(c, "weight", 0.5), "its weight is computed in forward"),
    "spectral_norm": (nn.utils.spectral_norm, "its weight is computed in forward"),
    "standardised": (lambda c: timm.layers.StdConv2d(8, 8, 3, padding=1), "StdConv2d is a subclass of nn.Conv2d"),
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_convolutions_are_left_dense_with_a_reason_and_still_work_in_the_copy(kind):
    make, reason = UNUSUAL[kind]
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        make(nn.Conv2d(8, 8, 3, padding=1)),
        make(nn.Conv2d(8, 8, 3, padding=1)),
        nn.Conv2d(8, 16, 3),
    ).eval()
    model(randn(1, 3, 9, 9))  # leaves a computed weight with a graph behind, where weights are computed
    reasons = {site.name: site.reason for site in convert.sites(model)}
    assert reasons["1"].startswith(reason)
    assert reasons["2"].startswith(reason)
    assert reasons["0"] == reasons["3"] == ""
    found = compress(model, Plan({"3": full("tucker2", model[3])}), guard=False)
    x = randn(2, 3, 10, 10)
    assert max_relative(found(x), model(x)) <= 1e-5
    found(x).sum().backward()
    assert all(p.grad is not None for p in found[2].parameters())
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match=r"^plan.layers\['1'\] must be dense for a layer that cannot be factored"):
        compress(model, one("1"))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("plan", "error", "message"),
    [
        (
            one("stm"),
            ValueError,
            r"plan.layers must be names of convolutions of the model, got 'stm' \(did you mean 'stem'\?\)",
        ),
        (one("again"), ValueError, r"plan.layers must be names of convolutions of the model, got 'again'"),
        (one("grouped"), ValueError, r"plan.layers\['grouped'\] must be dense .* groups must be 1, got 4"),
        (
            one("down", ranks=(17, 2)),
            ValueError,
            r"plan.layers\['down'\]: ranks\[0\] must be an int between 1 and 16, got 17",
        ),
        (
            one("down", ranks=(2, 17)),
            ValueError,
            r"plan.layers\['down'\]: ranks\[1\] must be an int between 1 and 16, got 17",
        ),
        (
            one("down", "cp", (10,)),
            ValueError,
            r"plan.layers\['down'\]: ranks\[0\] must be an int between 1 and 9, got 10",
        ),
        (
            one("down", "svd-channel", (17,)),
            ValueError,
            r"plan.layers\['down'\]: ranks\[0\] must be an int between 1 and 16, got 17",
        ),
        (
            one("down", "svd-spatial", (49,)),
            ValueError,
            r"plan.layers\['down'\]: ranks\[0\] must be an int between 1 and 48, got 49",
        ),
        (
            one("down", "svd-decoupled", (10,)),
            ValueError,
            r"plan.layers\['down'\]: ranks\[0\] must be an int between 1 and 9, got 10",
        ),
        (
            one("broken"),
            ValueError,
            r"plan.layers\['broken'\] must be dense .* its weight holds NaN or infinite values",
        ),
        ({"down": (2, 2)}, TypeError, r"plan must be a fastrank.Plan, got dict"),
        ("plan.json", TypeError, r"plan must be a fastrank.Plan, got str"),
    ],
)
def test_an_error_leaves_the_model_as_it_was(plan, error, message, inplace):
    model = Spare()
    model.broken = nn.Conv2d(3, 16, 3)
    with torch.no_grad():
        model.broken.weight[0, 0, 0, 0] = math.nan
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    if isinstance(plan, Plan):
        plan = Plan({"stem": LayerPlan("tucker2", (1, 1)), **plan.layers})
    with pytest.raises(error, match=f"^{message}") as caught:
        compress(model, plan, inplace=inplace)
    assert "\n" not in str(caught.value)
    assert list(model.modules()) == modules
    assert all(
        torch.equal(
            v,
            before[k],
        )
        or k.startswith("broken")
        for k, v in model.state_dict().items()
    )
    assert not hasattr(model, "fastrank_plan")


@pytest.mark.parametrize("model", [None, "resnet18", {"a": nn.Conv2d(3, 3, 3)}])
def test_what_is_no_module_is_refused(model):
    for call in (lambda: compress(model, Plan({})), lambda: convert.sites(model)):
        with pytest.raises(TypeError, match=r"^model must be a torch.nn.Module, got"):
            call()


def test_models_without_values_or_convolutions():
    with torch.device("meta"):
        model = Spare()
    assert {site.reason for site in convert.sites(model)} == {
        "its weight is on the meta device, which holds no values",
        "groups must be 1, got 4",
    }
    linear = nn.Linear(2, 2)
    assert convert.sites(linear) == []
    assert compress(linear, Plan({})).fastrank_plan.layers == {}
    with pytest.raises(ValueError, match=r"^plan.layers must be names of convolutions of the model, got 'a'$"):
        compress(linear, one("a"))


def test_compressing_again_takes_what_is_still_dense():
    model = Spare().eval()
    twice = compress(compress(model, one("down")), one("twice"))
    assert isinstance(twice.down, FusedTucker2Conv)
    assert isinstance(twice.twice, FusedTucker2Conv)
    with pytest.raises(ValueError, match=r"^plan.layers must be names of convolutions"):
        compress(twice, one("down"))


def test_gradients_flow_through_a_compressed_model_in_every_dtype():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        found = compress(
            Spare().to(dtype), Plan({"down": LayerPlan("cp", (2,)), "twice": LayerPlan("svd-spatial", (5,))})
        )
        assert {p.dtype for p in found.parameters()} == {dtype}
        found(randn(1, 3, 12, 12, dtype=dtype)).float().square().mean().backward()
        assert all(bool(p.grad.isfinite().all()) for p in found.parameters())


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.idle = nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(input=x))


def test_input_sizes_are_those_of_the_first_call_and_the_model_stays_as_it_was():
    model = ByKeyword()
    model.idle.eval()
    before = copy.deepcopy(model.state_dict())
    assert convert.input_sizes(model, torch.ones(2, 3, 11, 9)) == {"conv": (11, 9)}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert (model.training, model.bn.training, model.idle.training) == (True, True, False)
    assert not any(m._forward_pre_hooks for m in model.modules())
    spare = compress(Spare(), one("down"))
    assert convert.input_sizes(spare, torch.ones(1, 3, 11, 9))["down"] == (11, 9)
    with pytest.raises(
        ValueError,
        match=r"^example_input must be a batch that the model accepts, got shape \(1, 1, 8, 8\): Given groups=1",
    ):
        convert.input_sizes(model, torch.ones(1, 1, 8, 8))
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert model.training
    with pytest.raises(TypeError, match=r"^example_input must be a torch.Tensor, got tuple"):
        convert.input_sizes(model, (1, 3, 8, 8))


def test_a_second_compression_keeps_the_record_of_the_first():
    model = models.build("lenet5_nrmf")
    first = compress(model, Plan({"conv3": LayerPlan("tucker2", (4, 4), "one")}))
    second = compress(first, Plan({"conv2": LayerPlan("tucker2", (2, 4), "two")}))
    reasons = {name: layer.reason for name, layer in second.fastrank_plan.compressed.items()}
    assert reasons == {"conv2": "two", "conv3": "one"}
    assert first.fastrank_plan.layers["conv2"].method == "dense"
