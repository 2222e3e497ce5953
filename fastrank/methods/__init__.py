"""The published systems, each on one screen, and `make_plan`, which asks them."""

from fastrank.methods import funnel, musco, norton, nrmf, systems, trp, vbmf
from fastrank.methods.planner import METHODS, check_options, make_plan

__all__ = ["METHODS", "check_options", "funnel", "make_plan", "musco", "norton", "nrmf", "systems", "trp", "vbmf"]
