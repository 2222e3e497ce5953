"""TRP's projection: every few steps each kernel is replaced by its own low-rank approximation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastrank import _checks, ops
from fastrank.decompose.unfold import MATRICIZATIONS, fold, unfold
from fastrank.regularize.base import Regularizer
from fastrank.regularize.nuclear import named, spatial_kernels


class LowRankProjection(Regularizer):
    """Every `every` steps, overwrite each kernel larger than 1×1 by its truncation to `energy`; momentum is untouched.

    energy: the share of squared singular values kept, in (0, 1]; at 1 weights are not changed. matricization:
    "channel" or "spatial". keep_first: leave the first convolution alone, as TRP does. A step that a gradient scaler
    skipped does not count. `ranks` holds the ranks of the last projection, by layer name. Source: TRP, eq. 1 and 3.
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
        self.matricization = _checks.choice("matricization", matricization, MATRICIZATIONS)
        self.kernels = spatial_kernels(model)
        first = next((name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)), None)
        if keep_first and len(self.kernels) > 1:
            self.kernels.pop(first or "", None)
        self.steps = 0
        self.ranks: dict[str, int] = {}

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
        if self.energy == 1.0:
            self.ranks = {name: min(unfold(w, self.matricization).shape) for name, w in self.kernels.items()}
            return
        matrices = [unfold(kernel.detach(), self.matricization) for kernel in self.kernels.values()]
        with named(self.kernels):
            projected, ranks = ops.project_energy(matrices, self.energy)
        for kernel, matrix in zip(self.kernels.values(), projected, strict=True):
            shape = (kernel.shape[0], kernel.shape[1], kernel.shape[2], kernel.shape[3])
            kernel.copy_(fold(matrix, self.matricization, shape))
        self.ranks = dict(zip(self.kernels, ranks, strict=True))

    def value(self) -> Tensor:
        """A projection adds nothing to the loss."""
        return torch.zeros(())

    def state_dict(self) -> dict[str, Any]:
        """The step counter."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the step counter."""
        self.steps = _checks.integer("state['steps']", state.get("steps"), 0)
