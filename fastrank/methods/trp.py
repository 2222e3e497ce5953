"""TRP: trained rank pruning. Project the weights to low rank every few steps while training, then factor once.

Source: Xu et al., "Trained Rank Pruning for Efficient Deep Neural Networks", 2019, and its public code.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fastrank import ranks
from fastrank.methods._spectra import Candidate, Method, dense
from fastrank.plan import LayerPlan
from fastrank.regularize import LowRankProjection, NuclearNorm, Regularizer


def regularizers(
    model: nn.Module, *, scheme: str = "channel", every: int = 20, energy: float = 0.98, nuclear: float = 0.0
) -> list[Regularizer]:
    """The projection D, and with `nuclear` = λ > 0 the sub-gradient term λ · U_k V_kᵀ taken before it ("TRP+Nu").

    scheme: "channel", "spatial" or "decoupled", where each filter is cut to its own rank. The paper uses every = 20,
    energy = 0.98 (a discarded tail of 0.02); λ = 3e-4.
    """
    found: list[Regularizer] = [LowRankProjection(model, every=every, energy=energy, matricization=scheme)]
    if nuclear:
        found.insert(0, NuclearNorm(model, nuclear, energy=energy, matricization=scheme))
    return found


def _propose(scheme: str, layer: Candidate, options: dict[str, Any]) -> LayerPlan:
    if layer.first:
        return dense("TRP leaves the first convolution alone")
    if layer.is_pointwise:
        return dense("TRP leaves 1×1 kernels alone")
    if layer.conv.stride != (1, 1) and scheme != "decoupled":
        return dense("TRP factors convolutions of stride 1 only")
    spectrum = layer.spectrum(scheme)
    if options["threshold"] is not None:
        rank, rule = (
            ranks.threshold_rank(spectrum, options["threshold"]),
            f"singular values from {options['threshold']:g}",
        )
    else:
        rank = ranks.energy_rank(spectrum, options["energy"])
        rule = f"rank that keeps {options['energy']:.4g} of the energy"
    return LayerPlan(f"svd-{scheme}", (rank,), f"{rule} of the {scheme} matrix")


def propose_channel(layer: Candidate, options: dict[str, Any]) -> LayerPlan:
    """kh×kw then 1×1, by the channel matrix."""
    return _propose("channel", layer, options)


def propose_spatial(layer: Candidate, options: dict[str, Any]) -> LayerPlan:
    """kh×1 then 1×kw, by the spatial matrix."""
    return _propose("spatial", layer, options)


def propose_decoupled(layer: Candidate, options: dict[str, Any]) -> LayerPlan:
    """R pointwise→depthwise paths a filter, summed; the energy is that of all filters together."""
    return _propose("decoupled", layer, options)


_DEFAULTS = {"energy": 0.98, "threshold": None}
CHANNEL = Method(propose_channel, _DEFAULTS, knob="energy")
SPATIAL = Method(propose_spatial, _DEFAULTS, knob="energy")
DECOUPLED = Method(propose_decoupled, _DEFAULTS, knob="energy")
