"""What a method may ask about a layer while a plan is made: its place in the model, its spectra, each computed once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastrank import ranks
from fastrank.decompose.unfold import unfold
from fastrank.plan import LayerPlan


@dataclass
class Candidate:
    """A convolution that could be factored. first: it is the model's first; in_size: (H, W) of the map it sees."""

    name: str
    conv: nn.Conv2d
    first: bool
    in_size: tuple[int, int]
    _spectra: dict[str, Tensor] = field(default_factory=dict)

    def spectrum(self, matricization: str) -> Tensor:
        """σ (n,) of the named matricization, descending, float64.

        "decoupled" has one matrix a filter and one rank for all: σ_i there is the root of the filters' summed σ_i².
        """
        if matricization not in self._spectra:
            weight = self.conv.weight.detach()
            if matricization == "decoupled":
                found = torch.linalg.svdvals(weight.flatten(2).double()).square().sum(0).sqrt()
            else:
                found = ranks.singular_values(unfold(weight, matricization))
            self._spectra[matricization] = found
        return self._spectra[matricization]

    @property
    def is_pointwise(self) -> bool:
        """Whether the kernel is 1×1."""
        return self.conv.kernel_size == (1, 1)


@dataclass(frozen=True)
class Method:
    """One way to propose a layer's form. defaults: its options; knob: the option that a budget turns, if any."""

    propose: Callable[[Candidate, dict[str, Any]], LayerPlan]
    defaults: dict[str, Any]
    knob: str | None = None


def dense(reason: str) -> LayerPlan:
    """Leave the layer alone, for the given reason."""
    return LayerPlan("dense", (), reason)
