"""fastrank: low-rank compression of CNNs that is fast where it is slow.

Operators and layers come with the package; every other name is imported when it is first used, so that a program that
only runs compressed layers does not wait for the rest.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastrank import nn, ops
from fastrank._version import __version__

if TYPE_CHECKING:
    from fastrank import (
        complexity,
        data,
        decompose,
        export,
        hub,
        latency,
        methods,
        models,
        prune,
        ranks,
        regularize,
        train,
    )
    from fastrank.calibration import calibrate
    from fastrank.convert import compress
    from fastrank.fuse import fuse_for_inference
    from fastrank.io import load, save
    from fastrank.methods import make_plan
    from fastrank.plan import LayerPlan, Plan

# Where the names that are no modules come from.
_HOMES = {
    "LayerPlan": "plan",
    "Plan": "plan",
    "calibrate": "calibration",
    "compress": "convert",
    "fuse_for_inference": "fuse",
    "load": "io",
    "make_plan": "methods",
    "save": "io",
}
# Modules that are public under their full names.
_ROOMS = ("convert", "distributed", "integrations", "recipe", "report", "tune")

__all__ = [
    "LayerPlan",
    "Plan",
    "__version__",
    "calibrate",
    "complexity",
    "compress",
    "data",
    "decompose",
    "export",
    "fuse_for_inference",
    "hub",
    "latency",
    "load",
    "make_plan",
    "methods",
    "models",
    "nn",
    "ops",
    "prune",
    "ranks",
    "regularize",
    "save",
    "train",
]


def __getattr__(name: str) -> Any:
    """A public name that was not asked for before."""
    if name not in __all__ and name not in _ROOMS:
        raise AttributeError(f"module 'fastrank' has no attribute {name!r}")
    home = _HOMES.get(name)
    found = import_module(f"fastrank.{name}") if home is None else getattr(import_module(f"fastrank.{home}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
