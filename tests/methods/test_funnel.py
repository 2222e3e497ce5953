"""Funnel end to end: the factorised network is the network, pruning keeps what is open, and each layer takes its
cheaper form."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers import Residual, Spare, close_gates, max_relative, randn, residual
from torch import nn

from fastrank import LayerPlan, Plan, compress, convert, load, models, save
from fastrank.methods import funnel
from fastrank.nn import FusedTucker2Conv, GatedCPConv, GatedSVDConv, GatedTucker2Conv, LayerCPConv, SVDConv
from fastrank.nn._conv import FactoredConv2d
from fastrank.nn._gated import GatedConv2d
from fastrank.nn.gated_cp import default_rank

FORMS = {
    "tucker2": (GatedTucker2Conv, FusedTucker2Conv),
    "svd": (GatedSVDConv, SVDConv),
    "cp": (GatedCPConv, LayerCPConv),
}
EXACT = ("tucker2", "svd")
EXAMPLE = torch.zeros(1, 3, 16, 16)


def spare():
    torch.manual_seed(0)
    return Spare().double().eval()


def image(model):
    return randn(3, 3, 16, 16, dtype=next(model.parameters()).dtype)


def ranks(model):
    return {name: layer.ranks for name, layer in model.fastrank_plan.compressed.items()}


@pytest.mark.parametrize("form", FORMS)
def test_every_convolution_but_the_first_gets_gates(form):
    for model, names, points in (
        (residual(), ["a", "b", "shortcut"], ["shortcut"]),
        (spare(), ["down", "twice", "point"], ["point"]),
    ):
        before = copy.deepcopy(model.state_dict())
        found = funnel.factorize(model, form=form)
        gated = {name: module for name, module in found.named_modules() if isinstance(module, GatedConv2d)}
        assert list(gated) == names
        for name, layer in gated.items():
            assert type(layer) is (GatedSVDConv if name in points else FORMS[form][0])
            if type(layer) is GatedCPConv:
                assert layer.rank == default_rank(tuple(model.get_submodule(name).weight.shape))
        assert type(found.stem) is nn.Conv2d
        assert not any(isinstance(m, GatedConv2d) for m in model.modules())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert not {p.data_ptr() for p in found.parameters()} & {p.data_ptr() for p in model.parameters()}
        assert found.fastrank_plan.method == "funnel"
        assert set(found.fastrank_plan.compressed) == set(names)
        assert found.fastrank_plan.layers["stem"].reason == "Funnel leaves the first convolution alone"
    assert found.twice is found.again
    assert found.fastrank_plan.layers["grouped"].reason == "groups must be 1, got 4"


@pytest.mark.parametrize("form", EXACT)
@pytest.mark.parametrize("build", [residual, spare])
def test_nothing_closed_changes_nothing(build, form):
    """Before pruning, after pruning at 0 by either count, and in copies."""
    model = build()
    found, x = funnel.factorize(model, form=form), image(model)
    with torch.no_grad():
        forms = (
            found,
            copy.deepcopy(found),
            funnel.prune(found, 0),
            funnel.prune(found, 0, example_input=EXAMPLE.double()),
        )
        for network in forms:
            assert max_relative(network(x), model(x)) <= 1e-12
    # At full rank no form is cheaper than the dense layer.
    assert not any(isinstance(m, FactoredConv2d) for network in forms[2:] for m in network.modules())
    assert ranks(forms[2]) == {}


@pytest.mark.parametrize("form", EXACT)
def test_closed_gates_at_zero_change_nothing_either_in_the_cheap_form(form):
    model, x = residual(), image(residual())
    found = funnel.factorize(model, form=form)
    for name, count in (("a", 6), ("b", 6), ("shortcut", 4)):
        layer = found.get_submodule(name)
        close_gates(layer, *[count] * len(layer.penalized()))
    pruned = funnel.prune(found, 0.5)
    assert {type(pruned.a), type(pruned.b)} == {FORMS[form][1]}
    assert type(pruned.shortcut) is SVDConv
    assert max_relative(pruned(x), found(x)) <= 1e-12
    assert max_relative(pruned(x), model(x)) > 1e-3
    assert all(
        torch.equal(pruned.state_dict()[key], value)
        for key, value in model.state_dict().items()
        if "stem" in key or "fc" in key
    )


@pytest.mark.parametrize("form", FORMS)
def test_a_huge_threshold_leaves_rank_one_everywhere(form):
    for example_input in (None, EXAMPLE.double()):
        pruned = funnel.prune(funnel.factorize(residual(), form=form), 1e6, example_input=example_input)
        assert ranks(pruned) == {
            "a": (1, 1) if form == "tucker2" else (1,),
            "b": (1, 1) if form == "tucker2" else (1,),
            "shortcut": (1,),
        }
        assert [type(m) for m in (pruned.a, pruned.b, pruned.shortcut)] == [FORMS[form][1]] * 2 + [SVDConv]
        assert bool(pruned(image(pruned)).isfinite().all())


@pytest.mark.parametrize(
    ("name", "open_gates", "by_params", "by_macs"),
    [
        # 16·a + 9·a·b + 16·b weights against 2304: 2212 and 2354.
        ("b", (14, 14), True, True),
        ("b", (15, 14), False, False),
        # At stride 2 the first 1×1 runs on four times the pixels: 12·4·a + 9·a·b + 16·b against 1728 a pixel.
        ("a", (9, 13), True, True),  # 108 + 1053 + 208 = 1369 weights; 432 + 1053 + 208 = 1693 multiply-adds
        ("a", (10, 13), True, False),  # 120 + 1170 + 208 = 1498 weights; 480 + 1170 + 208 = 1858 multiply-adds
        # 28·r against 192: 6 → 168, 7 → 196.
        ("shortcut", (6,), True, True),
        ("shortcut", (7,), False, False),
    ],
)
def test_each_layer_takes_its_cheaper_form(name, open_gates, by_params, by_macs):
    found = funnel.factorize(residual())
    close_gates(found.get_submodule(name), *open_gates)
    for example_input, factored in ((None, by_params), (EXAMPLE.double(), by_macs)):
        pruned = funnel.prune(found, 0.5, example_input=example_input)
        layer = pruned.fastrank_plan.layers[name]
        if factored:
            assert layer.ranks == open_gates
            assert isinstance(pruned.get_submodule(name), FactoredConv2d)
            assert layer.reason.startswith(f"{open_gates[0]} of ")
            assert layer.reason.endswith("gates are at least 0.5")
        else:
            assert layer == LayerPlan("dense", (), layer.reason)
            assert "the dense layer" in layer.reason
            # Rebuilt from all gates: what the gated layer computes, its closed gates with it.
            rebuilt = pruned.get_submodule(name)
            assert type(rebuilt) is nn.Conv2d
            assert max_relative(rebuilt.weight, found.get_submodule(name).to_dense().weight) == 0


def test_a_form_of_equal_cost_stays_dense():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1))
    found = funnel.factorize(model)
    for count, kind in ((8, nn.Conv2d), (7, SVDConv)):
        close_gates(found[1], count)
        assert type(funnel.prune(found, 0.5)[1]) is kind


def test_dense_layers_are_rebuilt_from_the_gates_that_are_not_pruned():
    found = funnel.factorize(residual())
    with torch.no_grad():
        found.b.gate_core[-1] = 0.01  # below the threshold, but every other gate is open: not cheaper
    pruned = funnel.prune(found, 0.02)
    assert type(pruned.b) is nn.Conv2d
    x = randn(2, 16, 8, 8, dtype=torch.float64)
    assert max_relative(pruned.b(x), found.b(x)) <= 1e-13


@pytest.mark.parametrize("form", FORMS)
def test_the_plan_survives_json_and_applies_to_the_dense_network(form, tmp_path):
    model = residual()
    found = funnel.factorize(model, form=form)
    for layer in (found.a, found.b, found.shortcut):
        close_gates(layer, *[3, 5][: len(layer.penalized())])
    pruned = funnel.prune(found, 0.5, example_input=EXAMPLE.double())
    assert pruned.fastrank_plan.options == {"threshold": 0.5, "guard": "macs"}
    pruned.fastrank_plan.save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    assert plan == pruned.fastrank_plan
    again = compress(model, plan)
    assert [repr(m) for m in again.modules()] == [repr(m) for m in pruned.modules()]
    assert again.fastrank_plan.layers == plan.layers


def test_networks_are_saved_and_loaded_before_and_after_pruning(tmp_path):
    torch.manual_seed(0)
    gated = funnel.factorize(models.build("resnet_20", num_classes=5).eval())
    close_gates(gated.layer2[1].conv1, 10, 9)
    x = randn(1, 3, 32, 32)
    for name, network in (("gated", gated), ("pruned", funnel.prune(gated, 0.5, example_input=x))):
        save(network, tmp_path / name)
        again = load(tmp_path / name)
        assert repr(again) == repr(network)
        assert again.fastrank_plan == network.fastrank_plan
        with torch.no_grad():
            assert torch.equal(again(x), network(x))
    assert funnel.gates(load(tmp_path / "gated")).keys() == funnel.gates(gated).keys()


class Reversed(nn.Module):
    """Its first module runs last, and one never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.idle, self.first = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(3, 8, 3)

    def forward(self, x):
        return self.last(self.first(x))


def test_an_example_tells_which_convolution_is_first_and_which_idle():
    model = Reversed()
    by_module, by_run = funnel.factorize(model), funnel.factorize(model, example_input=EXAMPLE)
    assert set(by_module.fastrank_plan.compressed) == {"idle", "first"}
    assert set(by_run.fastrank_plan.compressed) == {"last"}
    assert by_run.fastrank_plan.layers["idle"].reason == "the model does not run it on the example input"
    # What does not run has no map, so that its weights decide.
    close_gates(by_module.idle, 7, 7)
    layer = funnel.prune(by_module, 0.5, example_input=EXAMPLE).fastrank_plan.layers["idle"]
    assert layer.ranks == (7, 7)


def test_what_is_skipped_or_factored_already_keeps_its_record():
    model = compress(spare(), Plan({"down": LayerPlan("tucker2", (2, 2), "mine")}))
    found = funnel.factorize(model, skip=["poi*"])
    assert set(found.fastrank_plan.compressed) == {"down", "twice"}
    assert type(found.down) is FusedTucker2Conv
    pruned = funnel.prune(found, 1e6)
    assert pruned.fastrank_plan.layers["down"] == LayerPlan("tucker2", (2, 2), "mine")
    assert pruned.fastrank_plan.layers["point"].reason == "skip='poi*' asks for it"
    assert pruned.twice is pruned.again
    assert pruned.twice.ranks == (1, 1)
    del found.fastrank_plan
    assert funnel.prune(found, 1e6).fastrank_plan.layers["point"].reason == "it has no gates"


def test_gates_are_copies_by_parameter_name():
    found = funnel.factorize(residual())
    named = funnel.gates(found)
    assert list(named) == ["a.gate_in", "a.gate_core", "b.gate_in", "b.gate_core", "shortcut.gate_first"]
    parameters = dict(found.named_parameters())
    for name, gate in named.items():
        assert torch.equal(gate, parameters[name])
        assert not gate.requires_grad
        gate.zero_()
    assert all(bool(gate.any()) for gate in funnel.gates(found).values())
    assert funnel.regularizer(found).gates.keys() == named.keys()
    assert list(funnel.gates(found.b)) == ["gate_in", "gate_core"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: funnel.factorize(None), TypeError, r"model must be a torch.nn.Module, got NoneType"),
        (lambda m: funnel.factorize(m, form="tuker2"), ValueError, r"form must be one of .*did you mean 'tucker2'"),
        (lambda m: funnel.factorize(m, form=None), TypeError, r"form must be one of .*, got NoneType"),
        (lambda m: funnel.factorize(nn.Linear(2, 2)), ValueError, r"model must be a network with a convolution to fac"),
        (
            lambda m: funnel.factorize(nn.Conv2d(3, 3, 3)),
            ValueError,
            r"model must be a network with a convolution to f",
        ),
        (
            lambda m: funnel.factorize(m, skip=("*",)),
            ValueError,
            r"model must be a network with a convolution to factor",
        ),
        (lambda m: funnel.factorize(m, skip=("c",)), ValueError, r"skip must be names or patterns of convolutions"),
        (
            lambda m: funnel.factorize(m, skip="a"),
            TypeError,
            r"skip must be a list of layer names or patterns, got str",
        ),
        (lambda m: funnel.factorize(m, example_input=EXAMPLE[:, :1]), ValueError, r"example_input must be a batch"),
        (lambda m: funnel.gates(m), ValueError, r"model must be a network with gated layers .*, got Residual"),
        (lambda m: funnel.gates({}), TypeError, r"model must be a torch.nn.Module, got dict"),
        (lambda m: funnel.prune(m, 0.02), ValueError, r"model must be a network with gated layers .*, got Residual"),
        (lambda m: funnel.prune(m, -1), ValueError, r"threshold must be a finite number at least 0, got -1"),
        (lambda m: funnel.prune(m, math.nan), ValueError, r"threshold must be a finite number at least 0, got nan"),
        (lambda m: funnel.prune(m, "0.02"), TypeError, r"threshold must be a number, got str"),
        (
            lambda m: funnel.prune(funnel.factorize(m), 0.1, example_input=EXAMPLE[:, :1]),
            ValueError,
            r"example_input m",
        ),
        (lambda m: funnel.regularizer(m), ValueError, r"model must be a model with trainable gates"),
        (lambda m: funnel.compress(m, warm=None, close=None, threshold=-1), ValueError, r"threshold must be a finite"),
        (lambda m: funnel.compress(m, warm=None, close=None, form="x"), ValueError, r"form must be one of"),
        (lambda m: funnel.compress(m, warm=None, close=None, penalty="l3"), ValueError, r"penalty must be one of"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(call, error, message):
    with pytest.raises(error, match=f"^{message}") as caught:
        call(Residual())
    assert "\n" not in str(caught.value)


def test_gates_that_are_not_finite_are_named():
    found = funnel.factorize(residual())
    with torch.no_grad():
        found.b.gate_core[3] = math.inf
    with pytest.raises(ValueError, match=r"^b\.gate_core must be finite, got 1 NaN or infinite values out of 16"):
        funnel.prune(found, 0.02)


def test_decompress_takes_gated_layers_too():
    model = residual()
    found = convert.decompress(funnel.factorize(model))
    assert [type(m) for m in found.modules()] == [type(m) for m in model.modules()]
    assert max_relative(found(image(model)), model(image(model))) <= 1e-12
