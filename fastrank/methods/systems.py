"""The systems that are more than one plan: what a recipe may ask of them, and how they run.

A system may train between its steps. It never imports the training loop: a recipe hands it one callable a phase.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn

from fastrank import _checks
from fastrank.methods import funnel, musco, norton
from fastrank.regularize import schedules
from fastrank.regularize.base import Regularizer

# phase(model, regularizers, label) trains the model in place; the label tells the runs of one phase apart.
Phase = Callable[[nn.Module, list[Regularizer], str], None]


@dataclass(frozen=True)
class System:
    """run(model, example_input, phases, options) -> compressed copy.

    options: every option with its default. phases: phase name -> whether a recipe must give it.
    """

    run: Callable[[nn.Module, Tensor, Mapping[str, Phase], dict[str, Any]], nn.Module]
    options: Mapping[str, Any]
    phases: Mapping[str, bool]


SCHEDULES: dict[str, Any] = {
    "constant": schedules.Constant,
    "linear": schedules.Linear,
    "exponential": schedules.Exponential,
}


def schedule(section: Any) -> schedules.Schedule:
    """{"kind": "linear", "start": 10, ...} -> the schedule of C; ValueError or TypeError, naming the key."""
    if not isinstance(section, dict) or "kind" not in section:
        raise _checks.fail("schedule", f"a mapping with the key 'kind', one of {list(SCHEDULES)}", repr(section))
    chosen = SCHEDULES[_checks.choice("schedule.kind", section["kind"], SCHEDULES)]
    values = {key: value for key, value in section.items() if key != "kind"}
    for key in values:
        _checks.choice("key of schedule", key, [field.name for field in fields(chosen)])
    try:
        made: schedules.Schedule = chosen(**values)
        return made
    except TypeError as error:
        raise TypeError(f"schedule: {error}") from error


def _funnel(
    model: nn.Module, example_input: Tensor, phases: Mapping[str, Phase], options: dict[str, Any]
) -> nn.Module:
    warm, close = phases.get("warm"), phases["close"]
    return funnel.compress(
        model,
        warm=None if warm is None else lambda network: warm(network, [], "warm"),
        close=lambda network, penalties: close(network, list(penalties), "close"),
        example_input=example_input,
        **{**options, "schedule": schedule(options["schedule"])},
    )


def _musco(model: nn.Module, example_input: Tensor, phases: Mapping[str, Phase], options: dict[str, Any]) -> nn.Module:
    tune = phases.get("between")
    between = None if tune is None else lambda network, number: tune(network, [], f"round-{number}")
    return musco.compress(model, between=between, example_input=example_input, **options)


def _norton(
    model: nn.Module, example_input: Tensor, phases: Mapping[str, Phase], options: dict[str, Any]
) -> nn.Module:
    return norton.compress(model, **options)


SYSTEMS: dict[str, System] = {
    "funnel": System(
        _funnel,
        {
            "form": "tucker2",
            "threshold": 0.02,
            "weight": 0.002,
            "penalty": "funnel",
            "schedule": {"kind": "linear"},
            "step": "proximal",
            "skip": (),
        },
        {"warm": False, "close": True},
    ),
    "musco": System(_musco, {"rounds": 3, "weaken": 0.8}, {"between": False}),
    "norton": System(_norton, {"rank": 4, "compress_rate": None, "criterion": "pabs", "seed": 0}, {}),
}


def check(method: str, section: Mapping[str, Any]) -> dict[str, Any]:
    """All options of the system `method`, the given ones checked as far as that goes without a model."""
    system = SYSTEMS[_checks.choice("method", method, SYSTEMS)]
    for key in section:
        _checks.choice(f"option of {method!r}", key, (*system.options, *system.phases))
    for phase, needed in system.phases.items():
        if needed and phase not in section:
            raise _checks.fail(f"compress of {method!r}", f"with the section {phase!r}", sorted(section))
    options = {**system.options, **{key: section[key] for key in section if key in system.options}}
    if "schedule" in options:
        schedule(options["schedule"])
    for name, high in (("weaken", 1.0), ("threshold", math.inf), ("weight", math.inf)):
        if name in options:
            _checks.number(name, options[name], 0.0, high)
    for name in ("rounds", "rank"):
        if name in options:
            _checks.integer(name, options[name], 1)
    return options
