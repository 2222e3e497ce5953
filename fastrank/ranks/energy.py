"""Ranks from a spectrum: by energy, and by a threshold on the singular values."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrank import _checks, reference


def energy_rank(singular_values: Tensor, energy: float) -> int:
    """Smallest k with Σ_{i≤k} σ_i² ≥ energy · Σ σ_i², between 1 and n, computed in float64 (NRMF, TRP, Funnel).

    singular_values: (n,), any order. energy: in (0, 1]; TRP's discarded tail e is 1 − energy.
    """
    spectrum = _spectrum(singular_values)
    _checks.number("energy", energy, 0.0, 1.0, open_low=True)
    return int(reference.linalg.energy_rank(spectrum, energy))


def threshold_rank(singular_values: Tensor, threshold: float) -> int:
    """How many singular values (n,) reach `threshold` (≥ 0, absolute), at least 1 (TRP's final cut is 0.05)."""
    spectrum = _spectrum(singular_values)
    _checks.number("threshold", threshold, 0.0)
    return max(1, int((spectrum >= threshold).sum()))


def _spectrum(singular_values: Tensor) -> Tensor:
    _checks.tensor("singular_values", singular_values, (None,), "(n,)")
    if singular_values.numel() == 0:
        raise _checks.fail("singular_values", "at least one value", "none")
    _checks.finite("singular_values", singular_values)
    if bool((singular_values < 0).any()):
        raise _checks.fail("singular_values", "non-negative", f"{float(singular_values.min()):g}")
    return torch.sort(singular_values.detach().double(), descending=True).values
