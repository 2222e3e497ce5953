"""TRP's projection: every few steps each kernel is replaced by its own low-rank approximation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastrank import _checks, ops
from fastrank.decompose.unfold import ALL_MATRICIZATIONS, fold_all, unfold_all
from fastrank.regularize.base import Regularizer, trained
from fastrank.regularize.nuclear import named, shape_of, spatial_kernels


class LowRankProjection(Regularizer):
    """Every `every` steps, overwrite each kernel larger than 1×1 by its truncation to `energy`; momentum is untouched.

    energy: the share of squared singular values kept, in (0, 1]; at 1 weights are not changed. matricization: TRP's
    "channel", "spatial" or "decoupled" (each filter by itself), or "mode3", "mode4". keep_first: leave the first
    convolution alone, as TRP does. A step that a gradient scaler skipped does not count. `ranks` holds the ranks of the
    last projection, by layer name; for "decoupled" the largest of a layer's filters. Source: TRP, eq. 1 and 3.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 20,
        energy: float = 0.98,
        matricization: str = "channel",
        keep_first: bool = True,
    ) -> None:
        self.every = _checks.integer("every", every, 1)
        self.energy = _checks.number("energy", energy, 0.0, 1.0, open_low=True)
        self.matricization = _checks.choice("matricization", matricization, ALL_MATRICIZATIONS)
        self.kernels = spatial_kernels(model)
        first = next((name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)), None)
        if keep_first and len(self.kernels) > 1:
            self.kernels.pop(first or "", None)
        self.steps = 0
        self.ranks: dict[str, int] = {}

    def governed(self) -> Mapping[str, nn.Parameter]:
        """The kernels, by layer name."""
        return self.kernels

    def add_gradients(self) -> None:
        """A projection has no gradient."""

    def after_step(self, stepped: bool = True) -> None:
        """Count the step, and project where its turn has come."""
        if not stepped:
            return
        self.steps += 1
        if self.steps % self.every == 0:
            self.project()

    @torch.no_grad()
    def project(self) -> None:
        """Truncate every kernel in place now."""
        kernels = trained(self.kernels)
        groups = [unfold_all(kernel.detach(), self.matricization) for kernel in kernels.values()]
        if self.energy == 1.0:
            self.ranks = {name: min(group[0].shape) for name, group in zip(kernels, groups, strict=True)}
            return
        with named(kernels):
            projected, ranks = ops.project_energy([matrix for group in groups for matrix in group], self.energy)
        found = iter(zip(projected, ranks, strict=True))
        self.ranks = {}
        for (name, kernel), group in zip(kernels.items(), groups, strict=True):
            matrices, own = zip(*(next(found) for _ in group), strict=True)
            kernel.copy_(fold_all(matrices, self.matricization, shape_of(kernel)))
            self.ranks[name] = max(own)

    def value(self) -> Tensor:
        """A projection adds nothing to the loss."""
        return torch.zeros(())

    def state_dict(self) -> dict[str, Any]:
        """The step counter."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the step counter."""
        self.steps = _checks.integer("state['steps']", state.get("steps"), 0)
