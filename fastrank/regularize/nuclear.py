"""Penalties on the singular values of convolution kernels: the nuclear norm, and NRMF's published Gram form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from fastrank import _checks, ops
from fastrank.decompose.unfold import ALL_MATRICIZATIONS, fold_all, unfold_all
from fastrank.nn._conv import why_not_factorable
from fastrank.regularize.base import Regularizer, add_gradient, trained


def spatial_kernels(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable kernels that rank regularisers act on: plain convolutions larger than 1×1, by layer name.

    Raises ValueError where there is none.
    """
    if not isinstance(model, nn.Module):
        raise _checks.fail_type("model", "a torch.nn.Module", model)
    kernels = {
        name: cast(nn.Parameter, module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
        and not why_not_factorable(module)
        and module.weight.shape[2] * module.weight.shape[3] > 1
        and module.weight.requires_grad
    }
    if not kernels:
        raise _checks.fail("model", "a model with a trainable convolution larger than 1×1", type(model).__name__)
    return kernels


def shape_of(kernel: Tensor) -> tuple[int, int, int, int]:
    """(O, I, kh, kw)."""
    out_channels, in_channels, kh, kw = kernel.shape
    return out_channels, in_channels, kh, kw


@contextmanager
def named(kernels: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Where an operator refuses a matrix of these kernels, say which layer it came from."""
    try:
        yield
    except ValueError:
        for name, kernel in kernels.items():
            _checks.finite(f"the kernel of layer {name!r}", kernel.detach())
        raise


class NuclearNorm(Regularizer):
    """weight · Σ over the kernels larger than 1×1 of `model`, and over their matrices, of ‖·‖_*.

    The sub-gradient is U_k V_kᵀ folded back, k by the energy rule of each matrix (`energy` in (0, 1]; None: the
    numerical rank). matricization: one or more of "mode3", "mode4", "channel", "spatial", "decoupled" (the last gives
    one matrix a filter); see `fastrank.decompose.unfold`.
    Source: TRP (one matricization, energy rule); NRMF's nuclear form (mode3 and mode4).
    """

    def __init__(
        self,
        model: nn.Module,
        weight: float,
        *,
        energy: float | None = None,
        matricization: Sequence[str] | str = ("mode3", "mode4"),
    ) -> None:
        self.weight = _checks.number("weight", weight, 0.0)
        self.energy = None if energy is None else _checks.number("energy", energy, 0.0, 1.0, open_low=True)
        names = (matricization,) if isinstance(matricization, str) else tuple(matricization)
        self.matricization = tuple(_checks.choice("matricization", name, ALL_MATRICIZATIONS) for name in names)
        if not names:
            raise _checks.fail("matricization", f"at least one of {list(ALL_MATRICIZATIONS)}", "none")
        self.kernels = spatial_kernels(model)

    def governed(self) -> Mapping[str, nn.Parameter]:
        """The kernels, by layer name."""
        return self.kernels

    def _matrices(self) -> list[list[Tensor]]:
        kernels = trained(self.kernels).values()
        return [unfold_all(kernel.detach(), name) for kernel in kernels for name in self.matricization]

    def add_gradients(self) -> None:
        """Add weight · Σ fold(U_k V_kᵀ) to every kernel's gradient."""
        if self.weight == 0:
            return
        groups = self._matrices()
        with named(self.kernels):
            found = iter(ops.nuclear_subgradient([matrix for group in groups for matrix in group], energy=self.energy))
        subgradients = iter([[next(found) for _ in group] for group in groups])
        for kernel in trained(self.kernels).values():
            for name in self.matricization:
                add_gradient(kernel, fold_all(next(subgradients), name, shape_of(kernel)), self.weight)

    def value(self) -> Tensor:
        """weight · Σ‖·‖_*."""
        with named(self.kernels):
            return self.weight * ops.nuclear_norm([matrix for group in self._matrices() for matrix in group])


class GramTrace(Regularizer):
    """weight · Σ over the kernels larger than 1×1 of ½(tr W₃W₃ᵀ + tr W₄W₄ᵀ): NRMF's regulariser as published.

    Both traces equal ‖W‖_F², so this is weight decay on the kernels, with gradient 2 · weight · W. It is the nuclear
    norm of the Gram matrix, not of the kernel: see `NuclearNorm` for the latter.
    """

    def __init__(self, model: nn.Module, weight: float) -> None:
        self.weight = _checks.number("weight", weight, 0.0)
        self.kernels = spatial_kernels(model)

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
        return (
            self.weight
            * torch.stack([kernel.detach().float().square().sum() for kernel in self.kernels.values()]).sum()
        )
