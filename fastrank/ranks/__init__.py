"""Spectrum -> rank. Pure functions."""

from fastrank.ranks.energy import energy_rank, threshold_rank
from fastrank.ranks.spectrum import singular_values
from fastrank.ranks.vbmf import vbmf_rank

__all__ = ["energy_rank", "singular_values", "threshold_rank", "vbmf_rank"]
