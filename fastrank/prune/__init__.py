"""Fewer channels: similarity pruning of the networks of the zoo, and of any other through torch-pruning."""

from fastrank.prune._channels import channels
from fastrank.prune._torch_pruning import Importance, with_torch_pruning
from fastrank.prune.selection import removal_order, select
from fastrank.prune.similarity import CRITERIA, csa, distances, l2, pabs, principal_angles, vbd

__all__ = [
    "CRITERIA",
    "Importance",
    "channels",
    "csa",
    "distances",
    "l2",
    "pabs",
    "principal_angles",
    "removal_order",
    "select",
    "vbd",
    "with_torch_pruning",
]
