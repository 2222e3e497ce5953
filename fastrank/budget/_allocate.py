"""A budget spent on all layers together: what each becomes, and the reason in words."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastrank import _checks
from fastrank.budget import _choices, _errors
from fastrank.budget._choices import DENSE, Choice, Place
from fastrank.budget._clock import Clock, ratio, share_of
from fastrank.budget._solve import solve
from fastrank.calibration import Calibration
from fastrank.convert import copy_with, skeleton
from fastrank.plan import LayerPlan

FASTER = 0.97
"""A factored layer counts as faster than the dense one from this share of its time on: closer ones differ by noise."""
ROUNDS = 6
"""Plans that are measured as a whole before a latency budget is given up."""
CLOSE = 0.02
"""A measured time this close below the budget is taken; further below, accuracy is bought back with the rest."""
WORST = 1 - 1e-9
SENSITIVITIES = ("energy", "output", "accuracy")


@dataclass(frozen=True)
class Request:
    """What is asked for.

    budget: shares of the dense model by kind. whole: what the dense model costs, by the counted kinds. data and images:
    for the sensitivities "output" and "accuracy". seen: what layers see of the data; calibrated: it is what
    decompositions are made for.
    """

    budget: Mapping[str, float]
    forms: Sequence[str]
    sensitivity: str
    whole: Mapping[str, float]
    example: Tensor | None
    device: torch.device
    data: Any
    images: int
    seen: Calibration | None
    calibrated: bool
    remember: bool


@dataclass(frozen=True)
class Allocation:
    """layers: name -> plan of every place; facts: JSON-able, for the plan's options."""

    layers: dict[str, LayerPlan]
    facts: dict[str, Any]


def allocate(model: nn.Module, places: Sequence[Place], request: Request) -> Allocation:
    """The plan with the least sum of harm that keeps the budget. ValueError where none does, naming the least."""
    options = [_choices.choices(place, request.forms) for place in places]
    options = _with_errors(model, places, options, request)
    dense = [Choice(DENSE, 0.0, _choices.counted(place, DENSE)) for place in places]
    whole = dict(request.whole)
    timed: nn.Module | None = None
    if "latency" in request.budget:
        assert request.example is not None
        timed = model if _device_of(model) == request.device else copy.deepcopy(model).to(request.device)
        dense, options = _with_times(timed, places, dense, options, request)
        # Of the whole only the convolutions' share is needed: as times, the two would be of different moments.
        share = share_of(timed, request.example.to(request.device), places)
        whole["latency"] = sum(d.costs["latency"] for d in dense) / share
    tried = [_useful(d, mine, request.budget) for d, mine in zip(dense, options, strict=True)]
    table = [[d, *mine] for d, mine in zip(dense, tried, strict=True)]
    if request.sensitivity != "accuracy":
        table = [[replace(choice, error=harm(choice.error)) for choice in mine] for mine in table]
    rest = {kind: whole[kind] - sum(d.costs[kind] for d in dense) for kind in request.budget}
    limits = {kind: share * whole[kind] - rest[kind] for kind, share in request.budget.items()}
    least = {kind: sum(min(c.costs[kind] for c in mine) for mine in table) for kind in request.budget}
    for kind, share in request.budget.items():
        # A predicted time is not precise enough to refuse by: the fastest network is measured first.
        if kind != "latency" and least[kind] > limits[kind]:
            reached = (rest[kind] + least[kind]) / whole[kind]
            expected = f"at least {reached:.3f}, the least that these forms reach here"
            raise _checks.fail(f"budget[{kind!r}]", expected, f"{share:g}")
    facts: dict[str, Any] = {"sensitivity": request.sensitivity}
    if timed is None:
        picked = solve(table, limits)
        if picked is None:
            raise _checks.fail("budget", "one whose limits can be kept together", dict(request.budget))
    else:
        picked, measured = _measured(timed, places, table, limits, whole, request)
        facts["measured"] = measured
        facts["device"] = str(request.device)
    chosen = [([d, *mine])[index] for d, mine, index in zip(dense, tried, picked, strict=True)]
    facts["predicted"] = {
        kind: round((rest[kind] + sum(c.costs[kind] for c in chosen)) / whole[kind], 4) for kind in request.budget
    }
    layers = {
        place.name: _explained(place, d, choice, mine, request)
        for place, d, choice, mine in zip(places, dense, chosen, options, strict=True)
    }
    return Allocation(layers, facts)


def harm(error: float) -> float:
    """-log of the share that is kept: what layers behind each other keep multiplies, and a layer that keeps nothing
    cannot be made up for by the others."""
    return -math.log1p(-min(error, WORST))


def _with_errors(
    model: nn.Module, places: Sequence[Place], options: list[list[Choice]], request: Request
) -> list[list[Choice]]:
    if request.seen is None:
        return options
    moments = {place.name: request.seen.moment(place.name) for place in places}
    found = [
        _errors.by_outputs(place, mine, moments[place.name], request.calibrated)
        for place, mine in zip(places, options, strict=True)
    ]
    if request.sensitivity == "accuracy":
        own = moments if request.calibrated else {}
        found = _errors.by_loss(model, places, found, request.data, request.images, own)
    return found


def _with_times(
    model: nn.Module,
    places: Sequence[Place],
    dense: Sequence[Choice],
    options: Sequence[Sequence[Choice]],
    request: Request,
) -> tuple[list[Choice], list[list[Choice]]]:
    assert request.example is not None
    clock = Clock(request.device, places[0].conv.weight.dtype, remember=request.remember)
    layers = [[choice.layer for choice in mine] for mine in options]
    times = clock.times(model, request.example.to(request.device), places, layers)
    clock.save()

    def timed(choice: Choice, us: float) -> Choice:
        return replace(choice, costs={**choice.costs, "latency": us})

    return [timed(whole, row[0]) for whole, row in zip(dense, times, strict=True)], [
        [timed(choice, us) for choice, us in zip(mine, row[1:], strict=True)]
        for mine, row in zip(options, times, strict=True)
    ]


def _useful(dense: Choice, options: Sequence[Choice], budget: Mapping[str, float]) -> list[Choice]:
    """Those that save something that is asked for, and are not slower than the dense layer where time is."""
    faster = [c for c in options if "latency" not in budget or c.costs["latency"] < FASTER * dense.costs["latency"]]
    return [c for c in faster if any(c.costs[kind] < dense.costs[kind] for kind in budget)]


def _measured(
    model: nn.Module,
    places: Sequence[Place],
    table: Sequence[Sequence[Choice]],
    limits: Mapping[str, float],
    whole: Mapping[str, float],
    request: Request,
) -> tuple[list[int], dict[str, float]]:
    """The choices with the least harm whose network, run as a whole beside the dense one, keeps the latency budget.

    What the sum of the layers' times misses, or makes too much of, is put on the budget's side, and the layers are
    chosen anew.
    """
    assert request.example is not None
    x, share = request.example.to(request.device), request.budget["latency"]
    by_name = dict(model.named_modules())
    shift, best, reached = 0.0, None, 1.0
    tried: set[tuple[int, ...]] = set()
    for _ in range(ROUNDS):
        picked = solve(table, {**limits, "latency": limits["latency"] - shift})
        if picked is None:  # by the sum of the layers nothing is fast enough: what remains is the fastest of each
            times = [[choice.costs["latency"] for choice in mine] for mine in table]
            picked = [mine.index(min(mine)) for mine in times]
            if any(
                sum(mine[i].costs[kind] for mine, i in zip(table, picked, strict=True)) > limit
                for kind, limit in limits.items()
                if kind != "latency"
            ):
                break
        if tuple(picked) in tried:
            break
        tried.add(tuple(picked))
        planned = copy_with(
            model,
            {
                by_name[place.name]: skeleton(place.conv, mine[i].layer, request.device).to(place.conv.weight.dtype)
                for place, mine, i in zip(places, table, picked, strict=True)
                if mine[i].layer.method != "dense"
            },
        )
        dense_us, us = ratio(model, planned, x)
        found = us / dense_us
        reached = min(reached, found)
        error = sum(mine[i].error for mine, i in zip(table, picked, strict=True))
        if found <= share and (best is None or error < best[0]):
            best = error, picked, {"dense_us": round(dense_us, 1), "us": round(us, 1), "latency": round(found, 4)}
        if share * (1 - CLOSE) <= found <= share:
            break
        shift += (found - share * (1 - CLOSE / 2)) * whole["latency"]
    if best is None:
        expected = f"at least {reached:.3f}, the least that was measured here"
        raise _checks.fail("budget['latency']", expected, f"{share:g}")
    return best[1], best[2]


def _explained(place: Place, dense: Choice, choice: Choice, tried: Sequence[Choice], request: Request) -> LayerPlan:
    estimate = {"error": choice.error}
    for kind in choice.costs:
        name = "latency_us" if kind == "latency" else kind
        estimate[name], estimate[f"dense_{name}"] = choice.costs[kind], dense.costs[kind]
    estimate = {name: float(f"{value:.6g}") for name, value in estimate.items()}
    reason = _kept(place, dense, tried, request) if choice.layer == DENSE else _why(dense, choice, request)
    return replace(choice.layer, reason=reason, estimate=estimate, shape=tuple(place.conv.weight.shape))


def _why(dense: Choice, choice: Choice, request: Request) -> str:
    told = []
    if "latency" in choice.costs:
        before, after = dense.costs["latency"], choice.costs["latency"]
        told.append(f"{before / after:.2f}× faster ({_us(before)} to {_us(after)})")
    for kind, word in (("macs", "multiply-adds"), ("params", "weights")):
        if kind in request.budget or (kind == "macs" and "latency" not in request.budget):
            told.append(f"{dense.costs[kind] / choice.costs[kind]:.1f}× fewer {word}")
    what = {
        "energy": f"loses {100 * choice.error:.2g} % of the kernel's energy",
        "output": f"loses {100 * choice.error:.2g} % of its outputs' energy",
        "accuracy": f"costs {choice.error:.2g} of cross-entropy alone",
    }[request.sensitivity]
    return f"{', '.join(told)}; {what}"


def _kept(place: Place, dense: Choice, tried: Sequence[Choice], request: Request) -> str:
    size = place.calls[0].shape
    where = f"{size[-2]}×{size[-1]}, N={size[0]}"
    if not tried:
        return "no factored form of it is cheaper by any count"
    kinds = list(request.budget)
    best = min(tried, key=lambda c: c.costs[kinds[0]])
    name = f"{best.layer.method} at rank {'×'.join(map(str, best.layer.ranks))}"
    if not _useful(dense, tried, request.budget):
        if "latency" in request.budget:
            best = min(tried, key=lambda c: c.costs["latency"])
            name = f"{best.layer.method} at rank {'×'.join(map(str, best.layer.ranks))}"
            slower = best.costs["latency"] / dense.costs["latency"]
            return f"the fastest form tried, {name}, takes {slower:.2f}× its time at {where}"
        return f"the cheapest form tried, {name}, saves nothing"
    kind = kinds[0]
    word = {"latency": "time", "macs": "multiply-adds", "params": "weights", "bytes": "bytes"}[kind]
    share = best.costs[kind] / dense.costs[kind]
    error = f"{best.error:.2g}" if request.sensitivity == "accuracy" else f"{100 * best.error:.2g} %"
    return f"the budget is met without it: {name} would take {share:.2f}× its {word} at an error of {error}"


def _us(us: float) -> str:
    return f"{us / 1000:.2f} ms" if us >= 1000 else f"{us:.0f} µs"


def _device_of(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
