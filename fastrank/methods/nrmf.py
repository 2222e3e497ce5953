"""NRMF: train with a nuclear-norm-like regulariser, take ranks by energy, factor by Tucker-2, fine-tune.

Source: Ran, Lin, So, Chesi, Wong, "Exploiting elasticity in tensor ranks for compressing neural networks", ICPR 2020.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fastrank import _checks, ranks
from fastrank.methods._spectra import Candidate, Method, dense
from fastrank.plan import LayerPlan
from fastrank.regularize import GramTrace, NuclearNorm, Regularizer
from fastrank.regularize.nuclear import spatial_kernels


def regularizer(model: nn.Module, alpha: float = 1e-2, *, mode: str = "nuclear") -> Regularizer:
    """α · L_n over the M kernels larger than 1×1.

    mode "gram" is the published L_n = 1/(2M) Σ [tr(W₃W₃ᵀ) + tr(W₄W₄ᵀ)], which equals the mean of ‖W‖_F²; "nuclear"
    (default) puts Σσ of the two unfoldings in place of the traces, which is what lowers ranks.
    """
    _checks.number("alpha", alpha, 0.0)
    _checks.choice("mode", mode, ("nuclear", "gram"))
    layers = len(spatial_kernels(model))
    return GramTrace(model, alpha / layers) if mode == "gram" else NuclearNorm(model, alpha / (2 * layers))


def propose(layer: Candidate, options: dict[str, Any]) -> LayerPlan:
    """Tucker-2 with R_in from the mode-3 and R_out from the mode-4 spectrum at `energy`."""
    if layer.is_pointwise:
        return dense("a 1×1 kernel has no spatial core to shrink")
    pair = tuple(ranks.energy_rank(layer.spectrum(mode), options["energy"]) for mode in ("mode3", "mode4"))
    return LayerPlan("tucker2", pair, f"ranks that keep {options['energy']:.4g} of the energy of each unfolding")


METHOD = Method(propose, {"energy": 0.95}, knob="energy")
