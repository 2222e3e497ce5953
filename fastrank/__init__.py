"""fastrank: low-rank compression of CNNs that is fast where it is slow."""

from fastrank import (
    complexity,
    data,
    decompose,
    export,
    hub,
    latency,
    methods,
    models,
    nn,
    ops,
    prune,
    ranks,
    regularize,
    train,
)
from fastrank._version import __version__
from fastrank.calibration import calibrate
from fastrank.convert import compress
from fastrank.fuse import fuse_for_inference
from fastrank.io import load, save
from fastrank.methods import make_plan
from fastrank.plan import LayerPlan, Plan

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
