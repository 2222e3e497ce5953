"""Kernel -> factors. Pure functions of a weight; no modules."""

from fastrank.decompose.cp import CPFilters, cp_filters
from fastrank.decompose.layer_cp import CPLayer, cp_layer
from fastrank.decompose.svd import channel_svd, decoupled_svd, spatial_svd
from fastrank.decompose.tucker import Tucker2, tucker2
from fastrank.decompose.unfold import fold, unfold

__all__ = [
    "CPFilters",
    "CPLayer",
    "Tucker2",
    "channel_svd",
    "cp_filters",
    "cp_layer",
    "decoupled_svd",
    "fold",
    "spatial_svd",
    "tucker2",
    "unfold",
]
