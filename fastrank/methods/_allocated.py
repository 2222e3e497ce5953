"""A budget spent on all layers together, as `make_plan` asks for it: which one, in which forms, at what loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastrank import _checks, complexity, convert
from fastrank.budget import SENSITIVITIES, Place, Request, allocate, top1
from fastrank.calibration import Calibration, calibrate
from fastrank.plan import LayerPlan, Plan

KINDS = ("latency", "macs", "params", "bytes")
COUNTED = ("macs", "params")
"""The kinds that one energy for all layers can meet as well."""
ALLOCATIONS = ("energy", "global")
FORMS: dict[str, tuple[str, ...]] = {
    "nrmf": ("tucker2",),
    "trp-channel": ("svd-channel",),
    "trp-spatial": ("svd-spatial",),
    "trp-decoupled": ("svd-decoupled",),
    "norton": ("cp",),
    "auto": ("tucker2", "svd-channel", "svd-spatial", "svd-decoupled"),
}
DROP_STEPS = 5
"""Halvings of the way from a budget that loses too much to the dense model."""


@dataclass(frozen=True)
class Wish:
    """The arguments of `make_plan` that a global allocation takes; shares: of its budget, by kind."""

    method: str
    shares: Mapping[str, float]
    budget: Mapping[str, Any]
    example: Tensor | None
    sensitivity: str | None
    data: Any
    images: int
    calibration: Calibration | None
    max_drop: float | None
    remember: bool


def shares(budget: Any, example_input: Tensor | None) -> dict[str, float]:
    """The shares of a budget by kind, checked."""
    if not isinstance(budget, dict) or not budget.keys() - {"device"}:
        raise _checks.fail("budget", f"a dict with at least one of the keys {list(KINDS)}", budget)
    found: dict[str, float] = {}
    for kind, share in budget.items():
        if _checks.choice("budget", kind, (*KINDS, "device")) == "device":
            continue
        if kind in ("macs", "latency") and example_input is None:
            unit = {"macs": "multiply-adds", "latency": "time"}[kind]
            raise _checks.fail("example_input", f"given with a budget in {unit}", "None")
        found[kind] = _checks.number(f"budget[{kind!r}]", share, 0.0, 1.0, open_low=True)
    if "device" in budget and "latency" not in found:
        raise _checks.fail("budget['device']", "left out without a budget in 'latency'", budget["device"])
    return found


def is_global(method: str, wanted: Mapping[str, float], allocation: str | None) -> bool:
    """Whether the budget is spent on all layers together, rather than by one energy for all."""
    single = len(wanted) == 1 and next(iter(wanted)) in COUNTED
    if allocation is None:
        allocation = "energy" if single and method != "auto" else "global"
    if _checks.choice("allocation", allocation, ALLOCATIONS) == "energy" and not single:
        raise _checks.fail("allocation", f"'global' for a budget in {' and '.join(wanted)}", "'energy'")
    if allocation == "global" and method not in FORMS:
        raise _checks.fail("budget", f"None for method {method!r}, whose ranks leave nothing to choose", dict(wanted))
    return allocation == "global"


def whole(model: nn.Module, example_input: Tensor | None) -> dict[str, float]:
    """What the dense model costs, by the counted kinds; "macs" for one image, and only where an input is known."""
    tensors = [*model.parameters(), *model.buffers()]
    found: dict[str, float] = {
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
    }
    if example_input is not None:
        found["macs"] = complexity.count(model, tuple(example_input.shape)).macs
    return found


def plan(model: nn.Module, convolutions: Mapping[str, nn.Conv2d], fixed: Mapping[str, LayerPlan], wish: Wish) -> Plan:
    """The plan that `wish` asks for: `fixed` stays, the other convolutions are chosen."""
    if not convolutions:
        why = next((layer.reason for layer in fixed.values()), "it has no convolution")
        raise _checks.fail("model", "a model with a convolution that can be factored for a budget", f"none: {why}")
    calls = {} if wish.example is None else convert.calls(model, wish.example)
    images = 1 if wish.example is None else len(wish.example)
    places = [Place(name, conv, calls.get(name) or [_nominal(conv)], images) for name, conv in convolutions.items()]
    request = _request(model, wish)

    def attempt(shares: Mapping[str, float]) -> Plan:
        found = allocate(model, places, replace(request, budget=shares))
        options = {
            "budget": dict(wish.budget),
            "allocation": "global",
            "guard": next(iter(shares)),
            **({"input": list(wish.example.shape)} if wish.example is not None else {}),
            **({"calibrated": True} if wish.calibration is not None else {}),
            **found.facts,
        }
        layers = {name: fixed[name] if name in fixed else found.layers[name] for name in (*fixed, *found.layers)}
        return Plan(layers, wish.method, options)

    if wish.max_drop is None:
        return attempt(wish.shares)
    return _kept_accuracy(model, wish, attempt)


def _request(model: nn.Module, wish: Wish) -> Request:
    default = "energy" if wish.data is None and wish.calibration is None else "output"
    sensitivity = _checks.choice("sensitivity", wish.sensitivity or default, SENSITIVITIES)
    if wish.calibration is not None and not isinstance(wish.calibration, Calibration):
        raise _checks.fail_type("calibration", "what fastrank.calibrate gives, or None", wish.calibration)
    if wish.calibration is not None and sensitivity == "energy":
        raise _checks.fail("sensitivity", "'output' or 'accuracy' with a calibration", "'energy'")
    if sensitivity == "output" and wish.data is None and wish.calibration is None:
        raise _checks.fail("data", "given for the sensitivity 'output', or a calibration", "None")
    if wish.data is None and (sensitivity == "accuracy" or wish.max_drop is not None):
        name = "the sensitivity 'accuracy'" if sensitivity == "accuracy" else "max_drop"
        raise _checks.fail("data", f"given for {name}", "None")
    seen = wish.calibration
    if seen is None and sensitivity != "energy":
        seen = calibrate(model, wish.data, images=wish.images)
    return Request(
        budget=wish.shares,
        forms=FORMS[wish.method],
        sensitivity=sensitivity,
        whole=whole(model, wish.example),
        example=wish.example,
        device=_device(wish.budget.get("device"), model),
        data=wish.data,
        images=_checks.integer("images", wish.images, 1),
        seen=seen,
        calibrated=wish.calibration is not None,
        remember=wish.remember,
    )


def _kept_accuracy(model: nn.Module, wish: Wish, attempt: Callable[[Mapping[str, float]], Plan]) -> Plan:
    """The plan for the budget where it loses at most `max_drop` points; otherwise an error with the least that does."""
    allowed = _checks.number("max_drop", wish.max_drop, 0.0, 100.0)
    base = top1(model, wish.data, wish.images)

    def drop(found: Plan) -> float:
        return base - top1(convert.compress(model, found, calibration=wish.calibration), wish.data, wish.images)

    found = attempt(wish.shares)
    lost = drop(found)
    if lost <= allowed:
        accuracy = {"dense": base, "compressed": base - lost, "images": wish.images}
        return Plan(found.layers, found.method, {**found.options, "max_drop": allowed, "accuracy": accuracy})
    low, high = 0.0, 1.0  # how far from the dense model to the budget
    for _ in range(DROP_STEPS):
        middle = (low + high) / 2
        between = {kind: 1 - middle * (1 - share) for kind, share in wish.shares.items()}
        low, high = (middle, high) if drop(attempt(between)) <= allowed else (low, middle)
    nearest = {kind: round(1 - low * (1 - share), 3) for kind, share in wish.shares.items()}
    kept = f"at least {lost:.2f} at the budget {dict(wish.shares)} without fine-tuning (up to {nearest} it holds)"
    raise _checks.fail("max_drop", kept, f"{allowed:g}")


def _nominal(conv: nn.Conv2d) -> convert.Call:
    """A call of the smallest map that the kernel fits into, where no input is known."""
    return convert.Call((1, conv.in_channels, *convert.any_size(conv)), False)


def _device(name: Any, model: nn.Module) -> torch.device:
    if name is None:
        return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    known = "'cpu' or 'cuda', with or without a number"
    if not isinstance(name, str | torch.device):
        raise _checks.fail_type("budget['device']", known, name)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise _checks.fail("budget['device']", known, repr(name)) from error
    if device.type not in ("cpu", "cuda"):
        raise _checks.fail("budget['device']", known, repr(str(name)))
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise _checks.fail(
            "budget['device']", f"one of the {torch.cuda.device_count()} CUDA devices visible here", repr(str(name))
        )
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else torch.device("cpu")
