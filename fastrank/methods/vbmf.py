"""TKD-VBMF: Tucker-2 at the ranks that EVBMF finds in the two unfoldings. The baseline of NRMF, Funnel and MUSCO.

Source: Kim et al., "Compression of deep convolutional neural networks for fast and low power mobile applications",
2016.
"""

from __future__ import annotations

from typing import Any

from fastrank import ranks
from fastrank.decompose.unfold import unfold
from fastrank.methods._spectra import Candidate, Method, dense
from fastrank.plan import LayerPlan


def propose(layer: Candidate, options: dict[str, Any]) -> LayerPlan:
    """Tucker-2 at the EVBMF ranks of the mode-3 and mode-4 unfoldings."""
    if layer.is_pointwise:
        return dense("a 1×1 kernel has no spatial core to shrink")
    weight = layer.conv.weight.detach()
    pair = tuple(ranks.vbmf_rank(unfold(weight, mode)) for mode in ("mode3", "mode4"))
    if 0 in pair:
        return dense(f"EVBMF sees only noise (ranks {pair[0]}×{pair[1]})")
    return LayerPlan("tucker2", pair, "ranks that EVBMF finds in each unfolding")


METHOD = Method(propose, {})
