"""The public functions. Each validates once, then dispatches; nothing else touches a kernel."""

from fastrank.ops.cp import cp_conv2d
from fastrank.ops.gates import funnel_penalty, gated_factor
from fastrank.ops.linalg import nuclear_norm, nuclear_subgradient, project_energy, svd
from fastrank.ops.tucker2 import tucker2_conv2d

__all__ = [
    "cp_conv2d",
    "funnel_penalty",
    "gated_factor",
    "nuclear_norm",
    "nuclear_subgradient",
    "project_energy",
    "svd",
    "tucker2_conv2d",
]
