"""fastrank: low-rank compression of CNNs that is fast where it is slow."""

from fastrank import complexity, data, decompose, latency, methods, models, nn, ops, prune, ranks, regularize, train
from fastrank._version import __version__
from fastrank.convert import compress
from fastrank.fuse import fuse_for_inference
from fastrank.io import load, save
from fastrank.methods import make_plan
from fastrank.plan import LayerPlan, Plan

__all__ = [
    "LayerPlan",
    "Plan",
    "__version__",
    "complexity",
    "compress",
    "data",
    "decompose",
    "fuse_for_inference",
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
