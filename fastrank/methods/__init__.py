"""The published systems, each on one screen, and `make_plan`, which asks them."""

from fastrank.methods import norton, nrmf, trp, vbmf
from fastrank.methods.planner import METHODS, make_plan

__all__ = ["METHODS", "make_plan", "norton", "nrmf", "trp", "vbmf"]
