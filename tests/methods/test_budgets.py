"""Plans under budgets of all layers together: met, explained, in any kind, with data, and refused in one sentence."""

from __future__ import annotations

import json
import math
import time

import pytest
import torch
from helpers import Spare, planted_tucker, randn
from torch import nn

import fastrank
from fastrank import LayerPlan, Plan, complexity, compress, convert, make_plan, models
from fastrank.budget import Place, _allocate, _clock

SIZE = (3, 16, 16)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    model = models.build("resnet_20")
    for n, conv in enumerate(m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)):
        o, i, k, _ = conv.weight.shape
        planted = planted_tucker(o, i, k, (max(1, i // 4), max(1, o // 4)), seed=n)
        noise = randn(o, i, k, k, seed=n + 50, dtype=torch.float64) * 0.2 * planted.std()
        conv.weight.data = ((planted + noise) / planted.norm()).float()
    return model.eval()


@pytest.fixture(scope="module")
def small_network() -> nn.Module:
    """Two convolutions worth factoring, for what looks at every candidate."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 10, 3)
    )
    return nn.Sequential(*model, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def costs(model: nn.Module) -> dict[str, float]:
    counted = complexity.count(model, SIZE)
    tensors = [*model.parameters(), *model.buffers()]
    return {
        "macs": counted.macs,
        "params": counted.params,
        "bytes": sum(t.numel() * t.element_size() for t in tensors),
    }


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch):
    """A device whose time is known: a layer takes its multiply-adds in ns, and a factored one 5 µs more a stage.

    A whole network takes the sum of its convolutions and `more` times that; yields the dict that holds `more`.
    """
    world = {"more": 0.25, "measured": 0}

    def us(model: nn.Module) -> float:
        total = 0.0
        for cost in complexity.count(model, SIZE).per_layer.values():
            if "Conv" in cost.kind:
                total += cost.macs / 1000 + 5 * max(0, len(cost.stages) - 1)
        return total

    def measure(model, x, places, layers):
        world["measured"] += 1
        return [
            [
                sum(stage.macs for stage in stages) / 1000 + 5 * (len(stages) - 1)
                for stages in (
                    convert.factored_stages(place.conv, layer, place.calls[0].size)
                    for layer in (LayerPlan("dense"), *mine)
                )
            ]
            for place, mine in zip(places, layers, strict=True)
        ]

    def ratio(dense, planned, x):
        base = us(dense)
        return base * (1 + world["more"]), us(planned) + world["more"] * base

    monkeypatch.setattr(_clock, "measure", measure)
    monkeypatch.setattr(_allocate, "ratio", ratio)
    monkeypatch.setattr(_allocate, "share_of", lambda model, x, places: 1 / (1 + world["more"]))
    return world


def test_the_switched_network_times_every_candidate_in_its_place(one_thread):
    """A layer that sleeps is found as slow as it sleeps, the dense one is not, and the model is left as it was."""

    class Sleeping(nn.Conv2d):
        def forward(self, x):
            time.sleep(0.02)
            return super().forward(x)

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Sleeping(4, 4, 3), nn.BatchNorm2d(4)).train()
    x = randn(2, 3, 8, 8)
    calls = convert.calls(model, x)
    places = [Place(str(i), model[i], calls[str(i)], 2) for i in (0, 1)]
    rows = _clock.measure(model, x, places, [[LayerPlan("svd-channel", (1,))], []])
    assert [len(row) for row in rows] == [2, 1]
    assert rows[1][0] >= 20_000 > max(rows[0])
    assert all(m.training for m in model.modules())
    assert 0.5 < _clock.share_of(model, x, places) <= 1.0


@pytest.mark.parametrize("kind", ["macs", "params", "bytes"])
@pytest.mark.parametrize("method", ["auto", "nrmf", "trp-spatial"])
def test_a_counted_budget_is_met_and_nearly_used_up(network, method, kind):
    dense = costs(network)
    share = 0.5
    plan = make_plan(network, method, example_input=torch.zeros(1, *SIZE), budget={kind: share}, allocation="global")
    small = costs(compress(network, plan))
    assert share - 0.1 <= small[kind] / dense[kind] <= share
    # The prediction is exact: it is counted.
    assert plan.options["predicted"][kind] == pytest.approx(small[kind] / dense[kind], abs=1e-4)
    assert Plan.from_json(plan.to_json()).layers == plan.layers
    assert all(layer.reason for layer in plan.layers.values())
    forms = {layer.method for layer in plan.compressed.values()}
    assert forms <= {"auto": {"tucker2", "svd-channel", "svd-spatial", "svd-decoupled"}, "nrmf": {"tucker2"},
                     "trp-spatial": {"svd-spatial"}}[method]  # fmt: skip


def test_norton_chooses_a_rank_for_every_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3), nn.Conv2d(12, 4, 1))
    plan = make_plan(model, "norton", example_input=torch.zeros(1, *SIZE), budget={"macs": 0.6}, allocation="global")
    small = complexity.count(compress(model, plan), SIZE)
    assert small.macs <= 0.6 * complexity.count(model, SIZE).macs
    assert {layer.method for layer in plan.compressed.values()} == {"cp"}
    assert plan.layers["2"].reason == "NORTON factors 3×3 kernels only"


def test_all_layers_together_lose_less_than_one_energy_for_all(network):
    x, budget = torch.zeros(1, *SIZE), {"macs": 0.5}

    def lost(plan: Plan) -> float:
        small = compress(network, plan)
        total = 0.0
        for name in plan.compressed:
            weight = network.get_submodule(name).weight.detach()
            merged = small.get_submodule(name).to_dense().weight.detach()
            total -= math.log1p(-float((weight - merged).square().sum() / weight.square().sum()))
        return total

    together = make_plan(network, "nrmf", example_input=x, budget=budget, allocation="global")
    alike = make_plan(network, "nrmf", example_input=x, budget=budget)
    assert lost(together) < lost(alike)
    said = -sum(math.log1p(-layer.estimate["error"]) for layer in together.compressed.values())
    assert lost(together) == pytest.approx(said, rel=1e-4)


def test_several_budgets_are_kept_at_once(network):
    plan = make_plan(network, "auto", example_input=torch.zeros(1, *SIZE), budget={"macs": 0.6, "params": 0.3})
    dense, small = costs(network), costs(compress(network, plan))
    assert small["macs"] <= 0.6 * dense["macs"]
    assert small["params"] <= 0.3 * dense["params"]


def test_a_latency_budget_is_met_as_measured_and_no_layer_is_slower(network, clock):
    plan = make_plan(network, "auto", example_input=torch.zeros(1, *SIZE), budget={"latency": 0.6}, remember=False)
    measured = plan.options["measured"]
    assert 0.6 * (1 - 0.03) <= measured["latency"] <= 0.6
    assert measured["latency"] == pytest.approx(measured["us"] / measured["dense_us"], abs=1e-3)
    # What runs beside the convolutions is in both, so the sum of layers predicts the whole.
    assert plan.options["predicted"]["latency"] == pytest.approx(measured["latency"], abs=1e-3)
    for layer in plan.compressed.values():
        assert layer.estimate["latency_us"] < 0.97 * layer.estimate["dense_latency_us"]
    assert plan.options["device"] == "cpu"
    assert plan.options["input"] == [1, *SIZE]


def test_what_layers_alone_do_not_tell_is_measured_and_made_up_for(network, clock, monkeypatch):
    """A network whose factored layers run 20 % slower in place than alone still keeps its budget."""
    honest = _allocate.ratio

    def slower(dense, planned, x):
        base, us = honest(dense, planned, x)
        return base, us if planned is dense else 1.2 * us

    monkeypatch.setattr(_allocate, "ratio", slower)
    plan = make_plan(network, "auto", example_input=torch.zeros(1, *SIZE), budget={"latency": 0.7}, remember=False)
    assert plan.options["measured"]["latency"] <= 0.7
    assert plan.options["predicted"]["latency"] < 0.65


def test_a_layer_stays_dense_for_the_reason_that_was_measured(network, clock, monkeypatch):
    """Where three convolutions take longer than one, the reason says by how much, at which map."""
    honest = _clock.measure

    def small_maps_are_slow(model, x, places, layers):
        rows = honest(model, x, places, layers)
        return [
            row if place.calls[0].size[0] > 4 else [row[0], *(1.4 * row[0] for _ in row[1:])]
            for place, row in zip(places, rows, strict=True)
        ]

    monkeypatch.setattr(_clock, "measure", small_maps_are_slow)
    plan = make_plan(network, "auto", example_input=torch.zeros(1, *SIZE), budget={"latency": 0.8}, remember=False)
    reason = plan.layers["layer3.1.conv1"].reason
    assert plan.layers["layer3.1.conv1"].method == "dense"
    assert reason.startswith("the fastest form tried, ")
    assert reason.endswith("takes 1.40× its time at 4×4, N=1")


def test_measured_times_are_remembered_by_device_and_not_measured_twice(network, clock, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTRANK_CACHE", str(tmp_path / "cache"))
    x = torch.zeros(1, *SIZE)
    first = make_plan(network, "nrmf", example_input=x, budget={"latency": 0.7})
    assert clock["measured"] > 0
    clock["measured"] = 0
    (file,) = (tmp_path / "cache").glob("layers-cpu-*.json")  # beside it lies its lock
    assert make_plan(network, "nrmf", example_input=x, budget={"latency": 0.7}).layers == first.layers
    assert clock["measured"] == 0
    make_plan(network, "nrmf", example_input=torch.zeros(2, *SIZE), budget={"latency": 0.7})  # another batch
    assert clock["measured"] > 0
    file.write_text('{"format": "fastrank-layer-times", "version": 1, "us": {"x": -1}}')
    with pytest.warns(UserWarning, match="cannot be read: they are taken anew"):
        make_plan(network, "nrmf", example_input=x, budget={"latency": 0.7})
    assert json.loads(file.read_text())["us"]


def test_a_real_clock_finds_a_wide_layer_faster(one_thread):
    """Rank 8 of 192 channels saves some twenty times the work: faster on any machine, however busy."""
    torch.manual_seed(0)
    conv = nn.Conv2d(192, 192, 3, padding=1)
    conv.weight.data = planted_tucker(192, 192, 3, (8, 8)).float() / 100
    model = nn.Sequential(conv, nn.ReLU())
    plan = make_plan(model, "auto", example_input=randn(2, 192, 24, 24), budget={"latency": 0.9}, remember=False)
    assert plan.layers["0"].method != "dense"
    assert plan.options["measured"]["latency"] <= 0.9
    assert "× faster (" in plan.layers["0"].reason


def test_data_decide_what_an_error_is(small_network):
    x = randn(16, *SIZE)
    by_energy = make_plan(small_network, "auto", example_input=x[:1], budget={"macs": 0.5})
    by_output = make_plan(small_network, "auto", example_input=x[:1], budget={"macs": 0.5}, data=x)
    assert by_energy.options["sensitivity"] == "energy"
    assert by_output.options["sensitivity"] == "output"
    assert "kernel's energy" in next(iter(by_energy.compressed.values())).reason
    assert "outputs' energy" in next(iter(by_output.compressed.values())).reason


def test_a_calibrated_plan_wants_its_calibration_and_keeps_the_outputs_better(small_network):
    network, x = small_network, randn(48, *SIZE)
    calibration = fastrank.calibrate(network, x)
    plan = make_plan(network, "nrmf", example_input=x[:1], budget={"macs": 0.4}, calibration=calibration,
                     allocation="global")  # fmt: skip
    with pytest.raises(ValueError, match="^calibration must be given for a plan that was made with one"):
        compress(network, plan)
    own = compress(network, plan, calibration=calibration)
    plain = compress(network, Plan(plan.layers, plan.method, {"guard": "macs"}))
    with torch.no_grad():
        wanted, found, other = (net.eval()(x) for net in (network, own, plain))
    assert float((found - wanted).square().sum()) < float((other - wanted).square().sum())


def test_accuracy_as_the_sensitivity_and_as_a_limit():
    torch.manual_seed(0)
    data = fastrank.data.load("digits")
    model = models.build("lenet5_nrmf")
    config = fastrank.train.TrainConfig(epochs=2, batch_size=64, lr=0.05)
    fastrank.train.fit(model, data, None, config, progress=False)
    x = torch.zeros(1, 1, 8, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ask = {"example_input": x, "data": data, "images": 128}
    plan = make_plan(model, "auto", budget={"macs": 0.6}, sensitivity="accuracy", **ask)
    assert plan.options["sensitivity"] == "accuracy"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    kept = make_plan(model, "auto", budget={"macs": 0.9}, max_drop=50.0, **ask)
    assert kept.options["accuracy"]["dense"] - kept.options["accuracy"]["compressed"] <= 50.0
    message = r"^max_drop must be at least \d+\.\d+ at the budget .* \(up to .* it holds\), got 0"
    with pytest.raises(ValueError, match=message):
        make_plan(model, "trp-channel", budget={"macs": 0.2}, max_drop=0.0, allocation="global", **ask)


X = torch.zeros(1, 3, 16, 16)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("auto",), {"budget": {"latency": 0.5}}, ValueError, "example_input must be given with a budget in time"),
        (
            ("auto",),
            {"budget": {"macs": 0.001}, "example_input": X},
            ValueError,
            r"budget\['macs'\] must be at least 0\.\d+, the least that these forms reach here, got 0.001",
        ),
        (("vbmf",), {"budget": {"bytes": 0.5}}, ValueError, "budget must be None for method 'vbmf'"),
        (
            ("auto",),
            {"budget": {"latency": 0.5, "device": "cuda:7"}, "example_input": X},
            ValueError,
            r"budget\['device'\] must be one of the \d+ CUDA devices visible here, got 'cuda:7'",
        ),
        (
            ("auto",),
            {"budget": {"latency": 0.5, "device": "tpu"}, "example_input": X},
            ValueError,
            r"budget\['device'\] must be 'cpu' or 'cuda'",
        ),
        (("auto",), {"budget": {"macs": 0.5, "device": "cpu"}, "example_input": X}, ValueError, r"budget\['device'\]"),
        (("auto",), {"budget": {"device": "cpu"}}, ValueError, "budget must be a dict with at least one of the keys"),
        (("nrmf",), {"budget": {"bytes": 0.5}, "allocation": "energy"}, ValueError, "allocation must be 'global'"),
        (("nrmf",), {"budget": {"params": 0.5}, "allocation": "best"}, ValueError, "allocation must be one of"),
        (("nrmf",), {"sensitivity": "output"}, ValueError, "sensitivity must be None without a budget"),
        (("auto",), {"budget": {"params": 0.5}, "sensitivity": "output"}, ValueError, "data must be given for the s"),
        (("auto",), {"budget": {"params": 0.5}, "max_drop": 1}, ValueError, "data must be given for max_drop"),
        (("auto",), {"budget": {"params": 0.5}, "calibration": 3}, TypeError, "calibration must be what"),
        (
            ("auto",),
            {"budget": {"params": 0.5}, "sensitivity": "accuracy", "data": X},
            ValueError,
            "data must be batches of images and labels for an accuracy, got images alone",
        ),
    ],
)
def test_bad_input_is_refused_in_one_sentence(arguments, options, error, message):
    with pytest.raises(error, match=f"^{message}") as caught:
        make_plan(Spare(), *arguments, **options)
    assert "\n" not in str(caught.value)


def test_a_model_without_an_eligible_layer_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"^model must be a model with a convolution .* none: it has no convolution"):
        make_plan(nn.Linear(3, 3), "auto", budget={"params": 0.5})
    with pytest.raises(ValueError, match=r"none: groups must be 1, got 4"):
        make_plan(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)), "auto", budget={"params": 0.5})


def test_a_plan_of_another_model_names_the_first_mismatch(network):
    plan = make_plan(network, "nrmf")
    with pytest.raises(ValueError, match=r"plan.layers must be names of convolutions of the model, got 'conv1'"):
        compress(Spare(), plan)
    other = models.build("resnet_20", num_classes=10)
    other.layer1[0].conv1 = nn.Conv2d(16, 16, 5, padding=2)
    wrong = r"^plan.layers\['layer1.0.conv1'\] must be for a kernel of 16×16×5×5, as the model has, got one for 16×16×3"
    with pytest.raises(ValueError, match=wrong):
        compress(other, plan)
