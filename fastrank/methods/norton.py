"""NORTON's decomposition: each filter of every 3×3 convolution as a sum of `rank` rank-1 terms.

Source: the NORTON README and code. Its similarity pruning is not part of this plan.
"""

from __future__ import annotations

from typing import Any

from fastrank import _checks
from fastrank.methods._spectra import Candidate, Method, dense
from fastrank.plan import LayerPlan


def propose(layer: Candidate, options: dict[str, Any]) -> LayerPlan:
    """CP filters of the asked rank for a 3×3 kernel."""
    if layer.conv.kernel_size != (3, 3):
        return dense("NORTON factors 3×3 kernels only")
    rank = _checks.integer("rank", options["rank"], 1, 9)
    return LayerPlan("cp", (rank,), f"{rank} rank-1 terms a filter")


METHOD = Method(propose, {"rank": 4})
