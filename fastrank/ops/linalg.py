"""Spectral operators over lists of matrices of any shapes: SVD, nuclear norm, its sub-gradient, energy projection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastrank import _backends, _checks, reference
from fastrank.ops import _register


def svd(matrices: Sequence[Tensor], *, backend: str = "auto") -> list[tuple[Tensor, Tensor, Tensor]]:
    """Thin SVDs: for each (m, n) matrix U (m, r), S (r,) descending, Vh (r, n) with r = min(m, n), in the given order.

    float16 and bfloat16 are computed and returned in float32. Not differentiable: singular vectors have no
    derivative at repeated singular values, and nothing here needs one.
    Raises ValueError on NaN or infinite entries (with the matrix's index) and on anything that is not a matrix.
    """
    _prepare("svd", matrices, backend)
    return [reference.linalg.svd(matrix) for matrix in matrices]


def nuclear_norm(matrices: Sequence[Tensor], *, backend: str = "auto") -> Tensor:
    """The sum of all singular values of all matrices, a 0-d tensor (float32 for half-precision inputs).

    Differentiable once: its gradient is the analytic sub-gradient U Vᵀ at the numerical rank, never a derivative of
    an SVD. Raises as `svd`.
    """
    _prepare("nuclear_norm", matrices, backend)
    total: Tensor = torch.ops.fastrank.nuclear_norm(list(matrices), backend)
    return total


def nuclear_subgradient(
    matrices: Sequence[Tensor], *, energy: float | None = None, backend: str = "auto", state: None = None
) -> list[Tensor]:
    """U_k V_kᵀ of each matrix, in its shape and dtype: a sub-gradient of the nuclear norm of its best rank-k part.

    energy: keep the smallest k with Σ_{i≤k} σ_i² ≥ energy · Σ σ_i² (in (0, 1]); None keeps the numerical rank.
    state: reserved for warm starts; must be None. Raises as `svd`. Source: Watson 1992; truncation as in TRP.
    """
    _prepare("nuclear_subgradient", matrices, backend, energy, state)
    return list(torch.ops.fastrank.nuclear_subgradient([matrix.detach() for matrix in matrices], energy, backend))


def project_energy(
    matrices: Sequence[Tensor], energy: float, *, backend: str = "auto", state: None = None
) -> tuple[list[Tensor], list[int]]:
    """Each matrix truncated to the rank that keeps `energy` of its squared singular values, and those ranks.

    energy in (0, 1]; ranks are at least 1. The squared error is the discarded tail energy. Raises as `svd`.
    """
    _checks.number("energy", energy, 0.0, 1.0, open_low=True)
    _prepare("project_energy", matrices, backend, energy, state)
    projected = [reference.linalg.project_energy(matrix, energy) for matrix in matrices]
    return [matrix for matrix, _ in projected], [int(rank) for _, rank in projected]


def _prepare(
    op: str, matrices: Sequence[Tensor], backend: str, energy: float | None = None, state: object = None
) -> None:
    if isinstance(matrices, Tensor) or not isinstance(matrices, Sequence):
        raise _checks.fail_type("matrices", "a list of 2-D tensors", matrices)
    if state is not None:
        raise _checks.fail("state", "None (warm starts are not built yet)", type(state).__name__)
    if energy is not None:
        _checks.number("energy", energy, 0.0, 1.0, open_low=True)
    _checks.choice("backend", backend, _backends.NAMES)
    for index, matrix in enumerate(matrices):
        _checks.tensor(f"matrices[{index}]", matrix, (None, None), "(m, n)")
        _backends.choose(_backends.facts(op, matrix), backend)
        _checks.finite(f"matrices[{index}]", matrix.detach())


def _nuclear_norm(matrices: list[Tensor], backend: str) -> Tensor:
    if not matrices:
        return torch.zeros(())
    first = reference.linalg.working(matrices[0])
    return torch.stack([reference.linalg.nuclear_norm(matrix).to(first) for matrix in matrices]).sum()


def _fake_nuclear_norm(matrices: list[Tensor], backend: str) -> Tensor:
    return reference.linalg.working(matrices[0]).new_empty(()) if matrices else torch.empty(())


def _nuclear_subgradient(matrices: list[Tensor], energy: float | None, backend: str) -> list[Tensor]:
    return [reference.linalg.nuclear_subgradient(matrix, energy) for matrix in matrices]


def _fake_nuclear_subgradient(matrices: list[Tensor], energy: float | None, backend: str) -> list[Tensor]:
    return [matrix.new_empty(matrix.shape) for matrix in matrices]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    matrices, ctx.backend = inputs
    ctx.save_for_backward(*matrices)


def _backward(ctx: Any, grad: Tensor) -> tuple[list[Tensor], None]:
    if torch.is_grad_enabled():
        raise RuntimeError("nuclear_norm is differentiable once: call backward without create_graph")
    sub = torch.ops.fastrank.nuclear_subgradient(list(ctx.saved_tensors), None, ctx.backend)
    return [grad.to(g.dtype) * g for g in sub], None


_register.register(
    "nuclear_norm(Tensor[] matrices, str backend) -> Tensor",
    _nuclear_norm,
    fake=_fake_nuclear_norm,
    setup_context=_setup_context,
    backward=_backward,
)
_register.register(
    "nuclear_subgradient(Tensor[] matrices, float? energy, str backend) -> Tensor[]",
    _nuclear_subgradient,
    fake=_fake_nuclear_subgradient,
)
