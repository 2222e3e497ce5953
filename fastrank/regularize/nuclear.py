"""Penalties on the singular values of convolution kernels: the nuclear norm, and NRMF's published Gram form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastrank import _checks, ops
from fastrank.decompose.unfold import ALL_MATRICIZATIONS, fold_all
from fastrank.ops import SpectralState
from fastrank.ops.linalg import METHODS
from fastrank.regularize import _kernels
from fastrank.regularize._kernels import laid_out_as, shape_of, spatial_kernels
from fastrank.regularize._spectral import SpectralRegularizer
from fastrank.regularize.base import Regularizer, add_gradient, trained

__all__ = ["GramTrace", "NuclearNorm", "spatial_kernels"]


class NuclearNorm(SpectralRegularizer):
    """weight · Σ over the kernels larger than 1×1 of `model`, and over their matrices, of ‖·‖_*.

    The sub-gradient is U_k V_kᵀ folded back, k by the energy rule of each matrix (`energy` in (0, 1]; None: the
    numerical rank). matricization: one or more of "mode3", "mode4", "channel", "spatial", "decoupled" (the last gives
    one matrix a filter); see `fastrank.decompose.unfold`.

    method: "exact", by decompositions, or "polar", by matrix products alone, which needs no `energy` and has errors in
    small singular values. warm, for "exact": start from the last step's decompositions, exact to `tolerance` (relative,
    Frobenius norm) and with the same k; anew every `refresh_every` steps. on_nonfinite: "raise" names the layer of a
    kernel with NaN or infinite values, "skip" gives it no gradient, counts it in `skipped` and warns once.
    share: where torch.distributed is initialised, the ranks of `process_group` (None: all) decompose a share of the
    matrices each and exchange the results; `value` is computed by each rank for itself.
    Source: TRP (one matricization, energy rule); NRMF's nuclear form (mode3 and mode4).
    """

    def __init__(
        self,
        model: nn.Module,
        weight: float,
        *,
        energy: float | None = None,
        matricization: Sequence[str] | str = ("mode3", "mode4"),
        method: str = "exact",
        warm: bool = True,
        refresh_every: int = 50,
        tolerance: float = 1e-4,
        on_nonfinite: str = "raise",
        share: bool = True,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.weight = _checks.number("weight", weight, 0.0)
        self.energy = None if energy is None else _checks.number("energy", energy, 0.0, 1.0, open_low=True)
        names = (matricization,) if isinstance(matricization, str) else tuple(matricization)
        self.matricization = tuple(_checks.choice("matricization", name, ALL_MATRICIZATIONS) for name in names)
        if not names:
            raise _checks.fail("matricization", f"at least one of {list(ALL_MATRICIZATIONS)}", "none")
        self._method = _checks.choice("method", method, METHODS)
        if method == "polar" and energy is not None:
            raise _checks.fail("method", "'exact' where energy cuts the spectrum", repr(method))
        super().__init__(
            _kernels.spatial_layers(model),
            self.matricization,
            warm=warm,
            refresh_every=refresh_every,
            tolerance=tolerance,
            on_nonfinite=on_nonfinite,
            share=share,
            process_group=process_group,
        )
        self._buffers: list[Tensor] = []
        if method == "polar":
            self._state = None  # products of the whole matrix have nothing to start from

    def add_gradients(self) -> None:
        """Add weight · Σ fold(U_k V_kᵀ) to every kernel's gradient."""
        if self.weight == 0:
            return
        for kernel in self._solve(self._subgradients, self.energy, self._method):
            for name, matrices in zip(self.matricization, kernel.results, strict=True):
                gradient = fold_all(matrices, name, shape_of(kernel.value))
                add_gradient(kernel.parameter, laid_out_as(kernel.name, kernel.parameter, gradient), self.weight)

    def _subgradients(self, matrices: list[Tensor], state: SpectralState | None) -> tuple[list[Tensor], None]:
        tolerance = self._tolerance if self._method == "polar" else None
        found = ops.nuclear_subgradient(
            matrices,
            out=self._room(matrices),
            energy=self.energy,
            state=state,
            method=self._method,
            tolerance=tolerance,
            on_nonfinite=self._on_nonfinite,
        )
        return found, None

    def _room(self, matrices: list[Tensor]) -> list[Tensor] | None:
        """Memory for results, the same at every step: on a CPU the system takes its time over new memory."""
        if self._method == "polar" or any(matrix.device.type != "cpu" for matrix in matrices):
            return None
        kinds = [(matrix.shape, matrix.dtype) for matrix in matrices]
        if kinds != [(buffer.shape, buffer.dtype) for buffer in self._buffers]:
            self._buffers = [torch.empty(shape, dtype=dtype) for shape, dtype in kinds]
        return self._buffers

    def value(self) -> Tensor:
        """weight · Σ‖·‖_* of the kernels to be trained that are finite; raises where others are not to be skipped."""
        values = self._values()
        if values and self._on_nonfinite == "skip":
            values = self._zeroed(values, _kernels.finite(list(values.values())))
        matrices = [matrix for group in self._matrices(values) for part in group for matrix in part]
        with _kernels.named(values):
            return self.weight * ops.nuclear_norm(matrices, on_nonfinite=self._on_nonfinite)


class GramTrace(Regularizer):
    """weight · Σ over the kernels larger than 1×1 of ½(tr W₃W₃ᵀ + tr W₄W₄ᵀ): NRMF's regulariser as published.

    Both traces equal ‖W‖_F², so this is weight decay on the kernels, with gradient 2 · weight · W. It is the nuclear
    norm of the Gram matrix, not of the kernel: see `NuclearNorm` for the latter.
    """

    def __init__(self, model: nn.Module, weight: float) -> None:
        self.weight = _checks.number("weight", weight, 0.0)
        self._kernels = _kernels.Kernels(_kernels.spatial_layers(model))

    @property
    def kernels(self) -> dict[str, nn.Parameter]:
        """The kernels that it governs at this moment, by layer name."""
        return self._kernels.current()

    def governed(self) -> Mapping[str, nn.Parameter]:
        """The kernels, by layer name."""
        return self.kernels

    def add_gradients(self) -> None:
        """Add 2 · weight · W to every kernel's gradient."""
        if self.weight == 0:
            return
        for kernel in trained(self.kernels).values():
            add_gradient(kernel, kernel.detach(), 2 * self.weight)

    def value(self) -> Tensor:
        """weight · Σ‖W‖_F²."""
        values = [_kernels.whole(name, kernel) for name, kernel in self.kernels.items()]
        return self.weight * torch.stack([value.float().square().sum() for value in values]).sum()
