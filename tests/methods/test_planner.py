"""make_plan: every method proposes what its paper says, budgets are met on the whole model, wrong options are named."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from helpers import Spare, planted_tucker, randn
from torch import nn

from fastrank import Plan, complexity, compress, convert, make_plan, models, ranks
from fastrank.decompose import unfold
from fastrank.methods import METHODS

SIZES = {"resnet_20": (3, 32, 32), "lenet5_nrmf": (1, 8, 8)}


@pytest.fixture(scope="module")
def networks():
    """The two networks, with kernels that have something to compress: planted Tucker ranks and a little noise."""
    torch.manual_seed(0)
    found = {name: models.build(name) for name in SIZES}
    for model in found.values():
        for n, conv in enumerate(m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)):
            o, i, k, _ = conv.weight.shape
            planted = planted_tucker(o, i, k, (max(1, i // 4), max(1, o // 4)), seed=n)
            noise = randn(o, i, k, k, seed=n + 50, dtype=torch.float64) * 0.05 * planted.std()
            conv.weight.data = ((planted + noise) / planted.norm()).float()
    return found


def example(name):
    return torch.zeros(2, *SIZES[name])


@pytest.mark.parametrize("given", [False, True], ids=["weights", "macs"])
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_covers_every_convolution_and_never_makes_the_model_bigger(networks, method, name, given):
    model = networks[name]
    before, flags = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    plan = make_plan(model, method, example_input=example(name) if given else None)
    assert list(plan.layers) == [site.name for site in convert.sites(model)]
    assert all(layer.reason for layer in plan.layers.values())
    assert plan.method == method
    assert Plan.from_json(plan.to_json()).layers == plan.layers
    assert plan.compressed
    found = compress(model, plan)
    assert found.fastrank_plan.compressed == plan.compressed
    dense, small = (complexity.count(m, SIZES[name]) for m in (model, found))
    assert small.params < dense.params
    if given:
        assert small.macs < dense.macs
    found(example(name))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == flags


def test_nrmf_takes_energy_ranks_and_vbmf_takes_evbmf_ranks(networks):
    model = networks["resnet_20"]
    weight = model.layer3[1].conv1.weight
    for method, rule in (
        ("nrmf", lambda m: ranks.energy_rank(ranks.singular_values(m), 0.9)),
        ("vbmf", ranks.vbmf_rank),
    ):
        plan = make_plan(model, method, **({"energy": 0.9} if method == "nrmf" else {}))
        layer = plan.layers["layer3.1.conv1"]
        assert (layer.method, layer.ranks) == (
            "tucker2",
            tuple(rule(unfold(weight, mode)) for mode in ("mode3", "mode4")),
        )
        assert layer.ranks[0] <= 17
        assert plan.layers["layer2.0.shortcut.0"].reason == "a 1×1 kernel has no spatial core to shrink"
    assert make_plan(nn.Conv2d(64, 64, 3), "vbmf").layers[""].reason == "EVBMF sees only noise (ranks 0×0)"


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
def test_trp_leaves_the_first_strided_and_pointwise_layers_alone(networks, scheme):
    model = networks["resnet_20"]
    plan = make_plan(model, f"trp-{scheme}")
    reasons = {name: layer.reason for name, layer in plan.layers.items()}
    assert reasons["conv1"] == "TRP leaves the first convolution alone"
    assert reasons["layer2.0.conv1"] == "TRP factors convolutions of stride 1 only"
    assert reasons["layer2.0.shortcut.0"] == "TRP leaves 1×1 kernels alone"
    layer = plan.layers["layer2.0.conv2"]
    spectrum = ranks.singular_values(unfold(model.layer2[0].conv2.weight, scheme))
    assert (layer.method, layer.ranks) == (f"svd-{scheme}", (ranks.energy_rank(spectrum, 0.98),))
    cut = make_plan(model, f"trp-{scheme}", threshold=float(spectrum[4]))
    assert cut.layers["layer2.0.conv2"].ranks == (5,)


def test_norton_takes_one_rank_for_every_3x3(networks):
    plan = make_plan(networks["lenet5_nrmf"], "norton", rank=3)
    assert {name: (layer.method, layer.ranks) for name, layer in plan.layers.items()} == {
        "conv1": ("dense", ()),
        "conv2": ("dense", ()),
        "conv3": ("cp", (3,)),
    }
    assert plan.layers["conv1"].reason == "NORTON factors 3×3 kernels only"
    assert "multiply-adds" not in make_plan(networks["lenet5_nrmf"], "norton", rank=9).layers["conv3"].reason


def test_auto_takes_the_cheapest_form_of_every_layer(networks):
    model, x = networks["resnet_20"], example("resnet_20")
    sizes = convert.input_sizes(model, x)
    plans = [make_plan(model, m, example_input=x, energy=0.95) for m in ("auto", "nrmf", "trp-channel", "trp-spatial")]
    for site in convert.sites(model):
        costs = [
            sum(s.macs for s in convert.factored_stages(site.conv, p.layers[site.name], sizes[site.name]))
            for p in plans
        ]
        assert costs[0] == min(costs)


@pytest.mark.parametrize("kind", ["macs", "params"])
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.knob])
def test_budgets_are_met_on_the_whole_model_and_nearly_used_up(networks, method, kind):
    model, x = networks["resnet_20"], example("resnet_20")
    whole, found = getattr(complexity.count(model, SIZES["resnet_20"]), kind), []
    for share in (0.6, 0.8, 0.95):
        given = x if kind == "macs" or method == "auto" else None
        plan = make_plan(model, method, example_input=given, budget={kind: share})
        small = compress(model, plan)
        found.append(getattr(complexity.count(small, SIZES["resnet_20"]), kind))
        assert found[-1] <= share * whole
        assert found[-1] >= (share - 0.1) * whole
        assert plan.options["budget"] == {kind: share}
        if method == "auto":
            assert plan.options["allocation"] == "global"
        else:
            assert 0 < plan.options["energy"] <= 1
    assert all(a < b for a, b in itertools.pairwise(found))


def test_budgets_that_nothing_meets_name_the_least_that_does(networks):
    model, x = networks["resnet_20"], example("resnet_20")
    for kind in ("macs", "params"):
        with pytest.raises(
            ValueError,
            match=rf"^budget\['{kind}'\] must be at least 0\.\d+, the least that this method reaches here, got 0.001",
        ) as caught:
            make_plan(model, "nrmf", example_input=x, budget={kind: 0.001})
        least = float(str(caught.value).split("at least ")[1].split(",")[0]) + 1e-3
        small = compress(model, make_plan(model, "nrmf", example_input=x, budget={kind: least}))
        whole = getattr(complexity.count(model, SIZES["resnet_20"]), kind)
        assert getattr(complexity.count(small, SIZES["resnet_20"]), kind) <= least * whole
    everything = make_plan(model, "nrmf", example_input=x, budget={"macs": 1.0})
    assert everything.options["energy"] > 0.999


def test_skipped_layers_stay_dense_with_the_pattern_as_the_reason(networks):
    plan = make_plan(networks["resnet_20"], "nrmf", skip=["layer1.*", "layer3.0.conv2"])
    skipped = {name: layer.reason for name, layer in plan.layers.items() if "skip" in layer.reason}
    assert {r for n, r in skipped.items() if n.startswith("layer1.")} == {"skip='layer1.*' asks for it"}
    assert len(skipped) == 7
    assert all(plan.layers[name].method == "dense" for name in skipped)


def test_layers_that_do_not_run_or_cannot_be_factored_are_left_dense():
    model = Spare()
    model.idle = nn.Conv2d(3, 64, 3)
    plan = make_plan(model, "norton", rank=1, example_input=torch.zeros(1, 3, 16, 16))
    assert plan.layers["idle"].reason == "the model does not run it on the example input"
    assert plan.layers["grouped"].reason == "groups must be 1, got 4"
    assert plan.layers["down"].method == "cp"
    assert make_plan(nn.Linear(2, 2), "auto").layers == {}


def test_multiply_adds_decide_where_the_input_is_known():
    """At stride 2 the first 1×1 stage runs on a map four times as large as the dense kernel does."""
    conv = nn.Conv2d(32, 32, 3, stride=2, padding=1)
    conv.weight.data = planted_tucker(32, 32, 3, (25, 25)).float()
    model = nn.Sequential(conv)
    # 2·32·25 + 9·25·25 = 7,225 weights against 9,216; 256·32·25 + 64·(9·25·25 + 25·32) multiply-adds against 64·9,216.
    assert make_plan(model, "nrmf", energy=0.9999999).layers["0"].ranks == (25, 25)
    refused = make_plan(model, "nrmf", energy=0.9999999, example_input=torch.zeros(1, 32, 16, 16)).layers["0"]
    assert refused.reason == "tucker2 at rank 25×25 takes 616,000 multiply-adds, the dense layer 589,824"


X = torch.zeros(1, 3, 16, 16)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("nmrf",), {}, ValueError, r"method must be one of .*got 'nmrf' \(did you mean 'nrmf'\?\)"),
        ((None,), {}, TypeError, r"method must be one of .*got NoneType"),
        (
            ("nrmf",),
            {"enrgy": 0.9},
            ValueError,
            r"option of method 'nrmf' must be one of \['energy'\], got 'enrgy' \(did you mean 'energy'\?\)",
        ),
        (("vbmf",), {"energy": 0.9}, ValueError, r"option of method 'vbmf' must be one of \[\], got 'energy'"),
        (("nrmf",), {"energy": 0}, ValueError, r"energy must be a finite number in \(0, 1\], got 0"),
        (("auto",), {"energy": "0.9"}, TypeError, r"energy must be a number, got str"),
        (("trp-channel",), {"threshold": -1}, ValueError, r"threshold must be a finite number at least 0, got -1"),
        (("norton",), {"rank": 0}, ValueError, r"rank must be an int .*got 0"),
        (("norton",), {"rank": 10}, ValueError, r"rank must be an int between 1 and 9, got 10"),
        (("norton",), {"rank": 2.5}, TypeError, r"rank must be an int, got float"),
        (
            ("norton",),
            {"budget": {"params": 0.5}},
            ValueError,
            r"budget must be None for method 'norton', whose ranks leave nothing to choose",
        ),
        (
            ("nrmf",),
            {"budget": {"macs": 0.5}},
            ValueError,
            r"example_input must be given with a budget in multiply-adds, got None",
        ),
        (
            ("nrmf",),
            {"budget": {"mac": 0.5}},
            ValueError,
            r"budget must be one of \['latency', 'macs', 'params', 'bytes', 'device'\], got 'mac' "
            r"\(did you mean 'macs'\?\)",
        ),
        (
            ("nrmf",),
            {"budget": {"params": 0}},
            ValueError,
            r"budget\['params'\] must be a finite number in \(0, 1\], got 0",
        ),
        (
            ("nrmf",),
            {"budget": {"params": 1.5}},
            ValueError,
            r"budget\['params'\] must be a finite number in \(0, 1\], got 1.5",
        ),
        (("nrmf",), {"budget": {"params": True}}, TypeError, r"budget\['params'\] must be a number, got bool"),
        (("nrmf",), {"budget": {}}, ValueError, r"budget must be a dict with at least one of the keys"),
        (("nrmf",), {"budget": 0.5}, ValueError, r"budget must be a dict with at least one of the keys"),
        (("nrmf",), {"skip": "down"}, TypeError, r"skip must be a list of layer names or patterns, got str"),
        (("nrmf",), {"skip": [3]}, TypeError, r"skip must be a list of layer names or patterns"),
        (
            ("nrmf",),
            {"skip": ["dwn"]},
            ValueError,
            r"skip must be names or patterns of convolutions of the model, got 'dwn' \(did you mean 'down'\?\)",
        ),
        (("nrmf",), {"example_input": [X]}, TypeError, r"example_input must be a torch.Tensor, got list"),
        (
            ("nrmf",),
            {"example_input": X[:, :2]},
            ValueError,
            r"example_input must be a batch that the model accepts, got shape \(1, 2, 16, 16\)",
        ),
    ],
)
def test_bad_input_is_refused_in_one_sentence(arguments, options, error, message):
    with pytest.raises(error, match=f"^{message}") as caught:
        make_plan(Spare(), *arguments, **options)
    assert "\n" not in str(caught.value)


def test_a_rank_is_checked_also_where_no_layer_would_use_it():
    with pytest.raises(ValueError, match=r"^rank must be an int"):
        make_plan(nn.Conv2d(3, 3, 1), "norton", rank=-1)
    with pytest.raises(TypeError, match=r"^model must be a torch.nn.Module, got str"):
        make_plan("resnet_20", "nrmf")


def test_a_kernel_that_is_not_finite_is_left_dense():
    model = Spare()
    with torch.no_grad():
        model.down.weight[0] = float("nan")
    for method in METHODS:
        assert make_plan(model, method).layers["down"].reason == "its weight holds NaN or infinite values"


def test_a_threshold_leaves_a_budget_nothing_to_choose():
    with pytest.raises(ValueError, match="^threshold must be None with a budget"):
        make_plan(models.build("lenet5_nrmf"), "trp-channel", threshold=0.05, budget={"params": 0.5})


def test_a_budget_that_a_plan_meets_is_met_by_the_compressed_model():
    """Padding makes the output map larger than the input map: fewer multiply-adds there with more parameters."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(64, 64, 3, padding=4)), torch.randn(1, 64, 4, 4)
    small = compress(model, make_plan(model, "nrmf", example_input=x, budget={"macs": 0.95}))
    dense, compressed = (complexity.count(network, tuple(x.shape)).macs for network in (model, small))
    assert compressed <= 0.95 * dense
