"""`make_plan`: ask a method about every convolution, keep what is cheaper, and meet a budget."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from fastrank import _checks, complexity, convert
from fastrank.methods import norton, nrmf, trp, vbmf
from fastrank.methods._spectra import Candidate, Method, dense
from fastrank.plan import LayerPlan, Plan

BUDGETS = ("macs", "params")
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
    budget: dict[str, float] | None = None,
    skip: tuple[str, ...] | list[str] = (),
    **options: Any,
) -> Plan:
    """A plan for every convolution of `model`, each with a reason.

    method: "nrmf" (Tucker-2 at energy ranks; energy=0.95), "vbmf" (Tucker-2 at EVBMF ranks), "trp-channel",
    "trp-spatial" and "trp-decoupled" (energy=0.98, or threshold=σ), "norton" (rank=4), "auto" (the cheapest form;
    energy=0.95).
    example_input: a batch for the model; with it a layer is factored only where that takes fewer multiply-adds at its
    real stride and map, without it only where it takes fewer weights.
    budget: {"macs": share} or {"params": share} of the whole dense model; sets the energy so that the compressed model
    costs at most that (multiply-adds of convolutions and linear layers), and is an error where no energy does. "macs"
    needs example_input.
    skip: names of convolutions, or patterns such as "layer1.*", to leave dense; each has to match one.
    Raises ValueError or TypeError, naming the argument.
    """
    chosen = METHODS[_checks.choice("method", method, METHODS)]
    settings = check_options(method, options)
    found = convert.sites(model)
    check_skip(skip, [site.name for site in found])
    sizes = {} if example_input is None else convert.input_sizes(model, example_input)
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
    cost = "params" if example_input is None else "macs"

    def layers(settings: dict[str, Any]) -> dict[str, LayerPlan]:
        proposed = dict(fixed)
        for name, candidate in candidates.items():
            layer = chosen.propose(candidate, settings)
            if layer.method != "dense":
                layer = convert.guarded(candidate.conv, layer, cost, candidate.in_size)
            proposed[name] = layer
        return {site.name: proposed[site.name] for site in found}

    if budget is not None:
        kind, share = _budget(budget, chosen, method, settings, example_input)
        if kind == "macs":
            assert example_input is not None
            whole = complexity.count(model, tuple(example_input.shape)).macs
        else:
            whole = sum(parameter.numel() for parameter in model.parameters())
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


def _budget(
    budget: Any, chosen: Method, method: str, settings: dict[str, Any], example_input: Tensor | None
) -> tuple[str, float]:
    if not isinstance(budget, dict) or len(budget) != 1:
        raise _checks.fail("budget", f"a dict with one of the keys {list(BUDGETS)}", budget)
    ((kind, share),) = budget.items()
    _checks.choice("budget", kind, BUDGETS)
    if kind == "macs" and example_input is None:
        raise _checks.fail("example_input", "given with a budget in multiply-adds", "None")
    if settings.get("threshold") is not None:
        raise _checks.fail("threshold", "None with a budget, which sets the energy instead", settings["threshold"])
    if chosen.knob is None:
        raise _checks.fail("budget", f"None for method {method!r}, whose ranks leave nothing to choose", budget)
    return kind, _checks.number(f"budget[{kind!r}]", share, 0.0, 1.0, open_low=True)


def _meet(
    kind: str,
    share: float,
    whole: int,
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
