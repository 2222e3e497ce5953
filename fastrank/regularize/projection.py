"""TRP's projection: every few steps each kernel is replaced by its own low-rank approximation."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastrank import _checks, ops
from fastrank.decompose.unfold import ALL_MATRICIZATIONS, fold_all
from fastrank.ops import SpectralState
from fastrank.regularize import _kernels
from fastrank.regularize._kernels import laid_out_as, shape_of
from fastrank.regularize._spectral import SpectralRegularizer
from fastrank.regularize.base import trained


class LowRankProjection(SpectralRegularizer):
    """Every `every` steps, overwrite each kernel larger than 1×1 by its truncation to `energy`; momentum is untouched.

    energy: the share of squared singular values kept, in (0, 1]; at 1 weights are not changed. matricization: TRP's
    "channel", "spatial" or "decoupled" (each filter by itself), or "mode3", "mode4". keep_first: leave the first
    convolution alone, as TRP does. A step that a gradient scaler skipped does not count.

    on_nonfinite, share, process_group, and with `warm` refresh_every and tolerance: as in `NuclearNorm`; under "skip" a
    kernel that is not finite is not projected. Source: TRP, eq. 1 and 3.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 20,
        energy: float = 0.98,
        matricization: str = "channel",
        keep_first: bool = True,
        warm: bool = False,
        refresh_every: int = 50,
        tolerance: float = 1e-4,
        on_nonfinite: str = "raise",
        share: bool = True,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.every = _checks.integer("every", every, 1)
        self.energy = _checks.number("energy", energy, 0.0, 1.0, open_low=True)
        self.matricization = _checks.choice("matricization", matricization, ALL_MATRICIZATIONS)
        layers = _kernels.spatial_layers(model)
        first = next((name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)), None)
        if keep_first and len(layers) > 1:
            layers.pop(first or "", None)
        self.steps = 0
        self._ranks: dict[str, int | tuple[Tensor, Tensor | None]] = {}
        super().__init__(
            layers,
            (self.matricization,),
            warm=warm,
            refresh_every=refresh_every,
            tolerance=tolerance,
            on_nonfinite=on_nonfinite,
            share=share,
            process_group=process_group,
        )

    @property
    def ranks(self) -> dict[str, int]:
        """The ranks of the last projection, by layer name; for "decoupled" the largest of a layer's filters.

        Ranks stay on a GPU until they are read here. Kernels that were skipped are left out.
        """
        for name, found in list(self._ranks.items()):
            if isinstance(found, tuple):
                rank, good = found
                if good is None or bool(good):
                    self._ranks[name] = int(rank)
                else:
                    del self._ranks[name]
        return {name: int(rank) for name, rank in self._ranks.items() if isinstance(rank, int)}

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
            values = {name: kernel.detach() for name, kernel in trained(self.kernels).items()}
            groups = self._matrices({name: torch.empty(shape_of(v), device="meta") for name, v in values.items()})
            self._ranks = {name: min(group[0][0].shape) for name, group in zip(values, groups, strict=True)}
            return
        self._ranks = {}
        for kernel in self._solve(self._projections, self.energy):
            folded = fold_all(kernel.results[0], self.matricization, shape_of(kernel.value))
            if kernel.good is not None:
                folded = torch.where(kernel.good.to(folded.device), folded, kernel.value)
            kernel.parameter.copy_(laid_out_as(kernel.name, kernel.parameter, folded))
            assert kernel.rank is not None
            self._ranks[kernel.name] = kernel.rank, kernel.good

    def _projections(self, matrices: list[Tensor], state: SpectralState | None) -> tuple[list[Tensor], Tensor]:
        found, ranks = ops.project_energy(matrices, self.energy, state=state, on_nonfinite=self._on_nonfinite)
        lazy: Tensor | None = getattr(ranks, "tensor", None)
        return found, torch.tensor(list(ranks), dtype=torch.int64) if lazy is None else lazy

    def value(self) -> Tensor:
        """A projection adds nothing to the loss."""
        return torch.zeros(())

    def state_dict(self) -> dict[str, Any]:
        """The step counter, and what `SpectralRegularizer.state_dict` holds."""
        return {"steps": self.steps, **super().state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self.steps = _checks.integer("state['steps']", state.get("steps"), 0)
        super().load_state_dict(state)
