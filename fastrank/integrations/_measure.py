"""What the callbacks log of a network and its regularisers, and the regularisers' state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import nn

from fastrank import _checks, report
from fastrank.regularize.base import Regularizer
from fastrank.regularize.funnel import Funnel


class Logged:
    """What is measured at every logging step: the penalty, and by wish ranks and gates.

    energy: the share of the squared singular values that the ranks keep (None: no ranks; they cost one
    eigendecomposition a matrix). threshold: gates of `Funnel` are counted from here on (None: they are not).
    """

    def __init__(self, energy: float | None, threshold: float | None) -> None:
        self.energy = None if energy is None else _checks.number("energy", energy, 0.0, 1.0, open_low=True)
        self.threshold = None if threshold is None else _checks.number("threshold", threshold, 0.0)

    def __call__(self, model: nn.Module, regularizers: Sequence[Regularizer]) -> dict[str, float]:
        """Numbers by name: "fastrank/penalty", "fastrank/rank/LAYER.MATRIX", "fastrank/gates/NAME"."""
        found = {"fastrank/penalty": sum((float(each.value()) for each in regularizers), 0.0)}
        if self.energy is not None:
            for layer, spectra in report.spectra(model, energy=self.energy).items():
                found.update({f"fastrank/rank/{layer}.{name}": float(each.rank) for name, each in spectra.items()})
        if self.threshold is not None:
            for each in regularizers:
                if isinstance(each, Funnel):
                    for name, below in each.below(self.threshold).items():
                        found[f"fastrank/gates/{name}"] = float(each.gates[name].numel() - below)
        return found


def states(regularizers: Sequence[Regularizer]) -> list[dict[str, Any]]:
    """The state of every regulariser, whole: where ranks share work, all of them have to call this."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    for regularizer in regularizers:
        gather = getattr(regularizer, "gather_state", None)
        if several and gather is not None:
            gather()
    return [regularizer.state_dict() for regularizer in regularizers]


def restore(regularizers: Sequence[Regularizer], found: Sequence[dict[str, Any]], source: str) -> None:
    """Give each regulariser its state of `states`; ValueError where `source` holds those of other ones."""
    if len(found) != len(regularizers):
        raise _checks.fail("regularizers", f"the {len(found)} that {source} was written with", len(regularizers))
    for regularizer, state in zip(regularizers, found, strict=True):
        regularizer.load_state_dict(state)
