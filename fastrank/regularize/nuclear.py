"""Penalties on the singular values of convolution kernels: the nuclear norm, and NRMF's published Gram form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from fastrank import _checks, ops
from fastrank.decompose.unfold import MATRICIZATIONS, fold, unfold
from fastrank.nn._conv import why_not_factorable
from fastrank.regularize.base import Regularizer


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


@contextmanager
def named(kernels: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Where an operator refuses a matrix of these kernels, say which layer it came from."""
    try:
        yield
    except ValueError:
        for name, kernel in kernels.items():
            _checks.finite(f"the kernel of layer {name!r}", kernel.detach())
        raise


def add_gradient(parameter: nn.Parameter, gradient: Tensor, weight: float) -> None:
    """parameter.grad += weight · gradient."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    parameter.grad.add_(gradient.to(parameter.grad.dtype), alpha=weight)


class NuclearNorm(Regularizer):
    """weight · Σ over the kernels larger than 1×1 of `model` and over `matricizations` of ‖unfold(W)‖_*.

    The sub-gradient is U_k V_kᵀ folded back, k by the energy rule (`energy` in (0, 1]; None: the numerical rank).
    matricizations: one or more of "mode3", "mode4", "channel", "spatial" (see `fastrank.decompose.unfold`).
    Source: TRP (one matricization, energy rule); NRMF's nuclear form (mode3 and mode4).
    """

    def __init__(
        self,
        model: nn.Module,
        weight: float,
        *,
        energy: float | None = None,
        matricizations: Sequence[str] | str = ("mode3", "mode4"),
    ) -> None:
        self.weight = _checks.number("weight", weight, 0.0)
        self.energy = None if energy is None else _checks.number("energy", energy, 0.0, 1.0, open_low=True)
        names = (matricizations,) if isinstance(matricizations, str) else tuple(matricizations)
        self.matricizations = tuple(_checks.choice("matricizations", name, MATRICIZATIONS) for name in names)
        if not names:
            raise _checks.fail("matricizations", f"at least one of {list(MATRICIZATIONS)}", "none")
        self.kernels = spatial_kernels(model)

    def _matrices(self) -> list[Tensor]:
        return [unfold(w.detach(), name) for w in self.kernels.values() for name in self.matricizations]

    def add_gradients(self) -> None:
        """Add weight · Σ fold(U_k V_kᵀ) to every kernel's gradient."""
        if self.weight == 0:
            return
        with named(self.kernels):
            sub = iter(ops.nuclear_subgradient(self._matrices(), energy=self.energy))
        for kernel in self.kernels.values():
            shape = (kernel.shape[0], kernel.shape[1], kernel.shape[2], kernel.shape[3])
            for name in self.matricizations:
                add_gradient(kernel, fold(next(sub), name, shape), self.weight)

    def value(self) -> Tensor:
        """weight · Σ‖·‖_*."""
        with named(self.kernels):
            return self.weight * ops.nuclear_norm(self._matrices())


class GramTrace(Regularizer):
    """weight · Σ over the kernels larger than 1×1 of ½(tr W₃W₃ᵀ + tr W₄W₄ᵀ): NRMF's regulariser as published.

    Both traces equal ‖W‖_F², so this is weight decay on the kernels, with gradient 2 · weight · W. It is the nuclear
    norm of the Gram matrix, not of the kernel: see `NuclearNorm` for the latter.
    """

    def __init__(self, model: nn.Module, weight: float) -> None:
        self.weight = _checks.number("weight", weight, 0.0)
        self.kernels = spatial_kernels(model)

    def add_gradients(self) -> None:
        """Add 2 · weight · W to every kernel's gradient."""
        if self.weight == 0:
            return
        for kernel in self.kernels.values():
            add_gradient(kernel, kernel.detach(), 2 * self.weight)

    def value(self) -> Tensor:
        """weight · Σ‖W‖_F²."""
        return (
            self.weight
            * torch.stack([kernel.detach().float().square().sum() for kernel in self.kernels.values()]).sum()
        )
