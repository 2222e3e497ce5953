"""The public functions. Each validates once, then dispatches; nothing else touches a kernel."""

from fastrank.ops._counts import spectral_counts
from fastrank.ops._pending import check_pending
from fastrank.ops._warm import SpectralState
from fastrank.ops.cp import cp_conv2d
from fastrank.ops.gates import count_below, funnel_penalty, funnel_proximal_, gated_factor, gated_factors
from fastrank.ops.linalg import nuclear_norm, nuclear_subgradient, project_energy, svd
from fastrank.ops.polar import polar_factors
from fastrank.ops.svd_conv import channel_svd_conv2d, decoupled_svd_conv2d, spatial_svd_conv2d
from fastrank.ops.tucker2 import tucker2_conv2d

__all__ = [
    "SpectralState",
    "channel_svd_conv2d",
    "check_pending",
    "count_below",
    "cp_conv2d",
    "decoupled_svd_conv2d",
    "funnel_penalty",
    "funnel_proximal_",
    "gated_factor",
    "gated_factors",
    "nuclear_norm",
    "nuclear_subgradient",
    "polar_factors",
    "project_energy",
    "spatial_svd_conv2d",
    "spectral_counts",
    "svd",
    "tucker2_conv2d",
]
