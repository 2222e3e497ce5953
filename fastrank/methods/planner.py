"""`make_plan`: ask a method about every convolution, keep what is cheaper, and meet a budget.

A budget in multiply-adds or parameters turns a method's own knob, one energy for all layers, as published. Every other
budget, and every one of the method "auto", is spent on all layers together: see `fastrank.budget`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from fastrank import _checks, convert
from fastrank.calibration import Calibration
from fastrank.methods import _allocated, norton, nrmf, trp, vbmf
from fastrank.methods._spectra import Candidate, Method, dense
from fastrank.plan import LayerPlan, Plan

# The budget's knob is an energy: after this many halvings it is known to 1e-6.
BISECTIONS = 20


def _propose_auto(layer: Candidate, options: dict[str, Any]) -> LayerPlan:
    """Of the Tucker-2 and the two SVD forms at `energy`, the one with the fewest multiply-adds on the layer's map."""
    forms = [nrmf.propose(layer, options)]
    for propose in (trp.propose_channel, trp.propose_spatial):
        forms.append(propose(layer, {**trp.CHANNEL.defaults, **options}))
    forms = [form for form in forms if form.method != "dense"]
    if not forms:
        return dense("a 1×1 kernel has no spatial core to shrink")

    def macs(form: LayerPlan) -> int:
        return sum(stage.macs for stage in convert.factored_stages(layer.conv, form, layer.in_size))

    best = min(forms, key=macs)
    return LayerPlan(best.method, best.ranks, f"cheapest of {len(forms)} forms; {best.reason}")


METHODS: dict[str, Method] = {
    "nrmf": nrmf.METHOD,
    "vbmf": vbmf.METHOD,
    "trp-channel": trp.CHANNEL,
    "trp-spatial": trp.SPATIAL,
    "trp-decoupled": trp.DECOUPLED,
    "norton": norton.METHOD,
    "auto": Method(_propose_auto, {"energy": 0.95}, knob="energy"),
}


def make_plan(
    model: nn.Module,
    method: str,
    *,
    example_input: Tensor | None = None,
    budget: dict[str, Any] | None = None,
    allocation: str | None = None,
    sensitivity: str | None = None,
    data: Any = None,
    images: int = 256,
    calibration: Calibration | None = None,
    max_drop: float | None = None,
    remember: bool = True,
    skip: tuple[str, ...] | list[str] = (),
    **options: Any,
) -> Plan:
    """A plan for every convolution of `model`, each with a reason.

    method: "nrmf" (Tucker-2 at energy ranks; energy=0.95), "vbmf" (Tucker-2 at EVBMF ranks), "trp-channel",
    "trp-spatial" and "trp-decoupled" (energy=0.98, or threshold=σ), "norton" (rank=4), "auto" (the cheapest form;
    energy=0.95).
    example_input: a batch for the model; with it a layer is factored only where that takes fewer multiply-adds at its
    real stride and map, without it only where it takes fewer weights.
    skip: names of convolutions, or patterns such as "layer1.*", to leave dense; each has to match one.

    budget: shares of the whole dense model by kind: "latency" (time of the batch `example_input`, measured on the
    model's device or on the one that the further key "device" names), "macs" (of convolutions and linear layers),
    "params", "bytes" (of parameters and buffers). "latency" and "macs" need example_input.
    allocation: "energy" sets one energy for all layers, as the methods were published; for one budget in "macs" or
    "params", and there the default but for "auto". "global" chooses form and ranks of every layer so that Σ -log(1 - e)
    over the layers' errors e is least within the budget, of which several kinds may then be asked for at once. Under a
    latency budget a layer is factored only where that is faster, and the network is measured as a whole.
    sensitivity, what an error is: "energy" of the kernel; "output", the energy of the layer's outputs on `data`, the
    default where there are data; "accuracy", the growth of the cross-entropy on `data`, which then needs labels.
    data: a batch, batches, or a data set, of which `images` images are used. calibration: of `fastrank.calibrate`;
    errors are then those of decompositions made for it, and `compress` needs it too.
    max_drop: points of accuracy on `data` that the compressed model may lose at most, before any fine-tuning.
    remember: keep measured times of layers in the cache folder ($FASTRANK_CACHE), and use those that are there.
    Raises ValueError or TypeError, naming the argument; for a budget that cannot be met, with the least that can.
    """
    chosen = METHODS[_checks.choice("method", method, METHODS)]
    settings = check_options(method, options)
    found = convert.sites(model)
    check_skip(skip, [site.name for site in found])
    sizes = {} if example_input is None else convert.input_sizes(model, example_input)
    shares = {} if budget is None else _allocated.shares(budget, example_input)
    together = bool(shares) and _allocated.is_global(method, shares, allocation)
    candidates: dict[str, Candidate] = {}
    fixed: dict[str, LayerPlan] = {}
    for site in found:
        reason = site.reason or skipped(site.name, skip)
        if not reason and sizes and site.name not in sizes:
            reason = "the model does not run it on the example input"
        if reason:
            fixed[site.name] = dense(reason)
        else:
            size = sizes.get(site.name, convert.any_size(site.conv))
            candidates[site.name] = Candidate(site.name, site.conv, site is found[0], size)
    if together:
        assert budget is not None
        if method != "auto":  # what the method would not touch at any rank
            own = {name: chosen.propose(candidate, chosen.defaults) for name, candidate in candidates.items()}
            fixed.update({name: layer for name, layer in own.items() if layer.method == "dense"})
        wish = _allocated.Wish(
            method, shares, budget, example_input, sensitivity, data, images, calibration, max_drop, remember
        )
        convolutions = {name: candidate.conv for name, candidate in candidates.items() if name not in fixed}
        plan = _allocated.plan(model, convolutions, fixed, wish)
        return Plan({site.name: plan.layers[site.name] for site in found}, method, plan.options)
    for name, value in (("sensitivity", sensitivity), ("calibration", calibration), ("max_drop", max_drop)):
        if value is not None:
            raise _checks.fail(name, "None without a budget that is allocated globally (allocation='global')", value)
    cost = "params" if example_input is None else "macs"

    def layers(settings: dict[str, Any]) -> dict[str, LayerPlan]:
        proposed = dict(fixed)
        for name, candidate in candidates.items():
            layer = chosen.propose(candidate, settings)
            if layer.method != "dense":
                layer = convert.guarded(candidate.conv, layer, cost, candidate.in_size)
            proposed[name] = layer
        return {site.name: replace(proposed[site.name], shape=tuple(site.conv.weight.shape)) for site in found}

    if shares:
        ((kind, share),) = shares.items()
        _check_knob(chosen, method, settings, shares)
        whole = _allocated.whole(model, example_input)[kind]
        settings = _meet(kind, share, whole, chosen, settings, layers, candidates)
    options = {**settings, "guard": cost, **({"budget": budget} if budget else {})}
    return Plan(layers(settings), method, options)


def check_options(method: str, options: dict[str, Any]) -> dict[str, Any]:
    """All options of `method`, the given ones checked; ValueError or TypeError, naming what is wrong."""
    chosen = METHODS[_checks.choice("method", method, METHODS)]
    for name in options:
        _checks.choice(f"option of method {method!r}", name, chosen.defaults)
    settings = {**chosen.defaults, **options}
    if "energy" in settings:
        settings["energy"] = _checks.number("energy", settings["energy"], 0.0, 1.0, open_low=True)
    if "rank" in settings:
        _checks.integer("rank", settings["rank"], 1)
    if settings.get("threshold") is not None:
        settings["threshold"] = _checks.number("threshold", settings["threshold"], 0.0)
    return settings


def check_skip(skip: Any, names: list[str]) -> None:
    if not isinstance(skip, tuple | list) or not all(isinstance(pattern, str) for pattern in skip):
        raise _checks.fail_type("skip", "a list of layer names or patterns", skip)
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, names, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise _checks.fail("skip", "names or patterns of convolutions of the model", f"{pattern!r}{hint}")


def skipped(name: str, skip: tuple[str, ...] | list[str]) -> str:
    pattern = next((pattern for pattern in skip if fnmatchcase(name, pattern)), None)
    return f"skip={pattern!r} asks for it" if pattern is not None else ""


def _check_knob(chosen: Method, method: str, settings: dict[str, Any], shares: dict[str, float]) -> None:
    """One energy for all layers can be set: the method has one, and nothing else decides its ranks."""
    if settings.get("threshold") is not None:
        raise _checks.fail("threshold", "None with a budget, which sets the energy instead", settings["threshold"])
    if chosen.knob is None:
        more = " by one energy for all layers (allocation='global' chooses a rank for each)"
        expected = f"None for method {method!r}, whose ranks leave nothing to choose"
        raise _checks.fail("budget", expected + (more if method in _allocated.FORMS else ""), shares)


def _meet(
    kind: str,
    share: float,
    whole: float,
    chosen: Method,
    settings: dict[str, Any],
    layers: Callable[[dict[str, Any]], dict[str, LayerPlan]],
    candidates: dict[str, Candidate],
) -> dict[str, Any]:
    """`settings` with the largest value of the knob at which the model costs at most `share` of `whole`."""
    knob = chosen.knob
    assert knob is not None

    def convolutions(plan: dict[str, LayerPlan]) -> int:
        stages = (
            stage
            for name, candidate in candidates.items()
            for stage in convert.factored_stages(candidate.conv, plan[name], candidate.in_size)
        )
        return sum(stage.macs if kind == "macs" else stage.weights for stage in stages)

    rest = whole - convolutions({name: dense("") for name in candidates})
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        fits = rest + convolutions(layers({**settings, knob: middle})) <= share * whole
        low, high = (middle, high) if fits else (low, middle)
    if low == 0.0:
        least = (rest + convolutions(layers({**settings, knob: high}))) / whole
        raise _checks.fail(f"budget[{kind!r}]", f"at least {least:.3f}, the least that this method reaches here", share)
    return {**settings, knob: low}
