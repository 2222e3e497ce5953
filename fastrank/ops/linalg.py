"""Spectral operators over lists of matrices of any shapes: SVD, nuclear norm, its sub-gradient, energy projection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from fastrank import _backends, _checks, reference
from fastrank.ops import _register, _solve
from fastrank.ops._spectra import PROJECTION, SUBGRADIENT
from fastrank.ops._warm import SpectralState

ON_NONFINITE = ("raise", "skip")
METHODS = ("exact", "polar")


def svd(matrices: Sequence[Tensor], *, backend: str = "auto") -> list[tuple[Tensor, Tensor, Tensor]]:
    """Thin SVDs: for each (m, n) matrix U (m, r), S (r,) descending, Vh (r, n) with r = min(m, n), in the given order.

    float16 and bfloat16 are computed and returned in float32. Not differentiable: singular vectors have no
    derivative at repeated singular values, and nothing here needs one.
    backend: "auto" | "reference" | "gram" (library matrix products and eigensolver) | "cuda" | "host" (the CUDA kernel
    compiled for the CPU, for tests).
    Raises ValueError on NaN or infinite entries (with the matrix's index) and on anything that is not a matrix.
    """
    checked = _prepare(matrices, backend)
    return _solve.svd(checked, backend)


def nuclear_norm(matrices: Sequence[Tensor], *, backend: str = "auto", on_nonfinite: str = "raise") -> Tensor:
    """The sum of all singular values of all matrices, a 0-d tensor (float32 for half-precision inputs).

    Differentiable once: its gradient is the analytic sub-gradient U Vᵀ at the numerical rank, never a derivative of
    an SVD. backend, on_nonfinite and errors as in `nuclear_subgradient`.
    """
    checked = _prepare(matrices, backend, on_nonfinite=on_nonfinite)
    total: Tensor = torch.ops.fastrank.nuclear_norm(checked, backend, on_nonfinite)
    return total


def nuclear_subgradient(
    matrices: Sequence[Tensor],
    *,
    energy: float | None = None,
    backend: str = "auto",
    state: SpectralState | None = None,
    method: str = "exact",
    tolerance: float | None = None,
    on_nonfinite: str = "raise",
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """U_k V_kᵀ of each matrix, in its shape and dtype: a sub-gradient of the nuclear norm of its best rank-k part.

    energy: keep the smallest k with Σ_{i≤k} σ_i² ≥ energy · Σ σ_i² (in (0, 1]); None keeps the numerical rank, the
    σ_i above eps · max(m, n) · σ_1. Zero for a zero matrix.
    backend: "auto" | "reference" | "gram" (library matrix products and eigensolver) | "cuda" | "host" (the CUDA kernel
    compiled for the CPU, for tests); for method "polar" "auto" | "reference" | "triton".
    state: a `SpectralState` to start from the eigenbases of the last call with it (see there).
    method: "exact", or "polar": U Vᵀ by Newton–Schulz iterations to `tolerance` (see `fastrank.ops.polar_factors`),
    which takes no energy and no state.
    on_nonfinite: "raise" a ValueError that names the matrix, or "skip" it: its sub-gradient is 0, it is counted (see
    `spectral_counts`) and a RuntimeWarning is given. On a GPU the kernels do not wait for the answer: the error, or the
    warning, comes with the next call or with `check_pending`.
    out: a tensor of each matrix's shape, dtype and device to write to and return: on a CPU large results in new
    memory cost the system time. It must share no memory with a matrix.
    Raises ValueError or TypeError, naming the argument. Source: Watson 1992; truncation as in TRP.
    """
    checked = [matrix.detach() for matrix in _prepare(matrices, backend, energy, state, on_nonfinite)]
    targets = None if out is None else _targets(out, checked)
    if _checks.choice("method", method, METHODS) == "polar":
        if targets is not None:
            raise _checks.fail("out", 'None where method is "polar"', "a list")
        if energy is not None or state is not None:
            raise _checks.fail("method", '"exact" where energy or state is given', method)
        return _solve.polar(checked, tolerance, backend, on_nonfinite)
    if tolerance is not None:
        raise _checks.fail("tolerance", 'None unless method is "polar"', tolerance)
    if state is not None or targets is not None:
        return _solve.spectral(checked, SUBGRADIENT, energy, backend, on_nonfinite, state, targets)[0]
    return list(torch.ops.fastrank.nuclear_subgradient(checked, energy, backend, on_nonfinite))


def project_energy(
    matrices: Sequence[Tensor],
    energy: float,
    *,
    backend: str = "auto",
    state: SpectralState | None = None,
    on_nonfinite: str = "raise",
) -> tuple[list[Tensor], Sequence[int]]:
    """Each matrix truncated to the rank that keeps `energy` of its squared singular values, and those ranks.

    energy in (0, 1]; ranks are at least 1 (0 for an empty matrix). The squared error is the discarded tail energy.
    Ranks of matrices on a GPU stay there until one is read: they come as a `Ranks`, on a CPU as a list.
    A matrix skipped as not finite is returned as it is, with rank 0. The other arguments, and errors, are those of
    `nuclear_subgradient`.
    """
    _checks.number("energy", energy, 0.0, 1.0, open_low=True)
    checked = [matrix.detach() for matrix in _prepare(matrices, backend, energy, state, on_nonfinite)]
    if state is not None:
        projected, ranks = _solve.spectral(checked, PROJECTION, energy, backend, on_nonfinite, state)
    else:
        projected, ranks = torch.ops.fastrank.project_energy(checked, energy, backend, on_nonfinite)
    return list(projected), Ranks(ranks) if ranks.is_cuda else ranks.tolist()


class Ranks(Sequence[int]):
    """Ranks that stay on their device, as the int64 tensor `tensor`, until one of them is read as an int."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._read: list[int] | None = None

    @property
    def values(self) -> list[int]:
        """The ranks as ints; the first reading waits for the device."""
        if self._read is None:
            self._read = self.tensor.tolist()
        return self._read

    def __len__(self) -> int:
        return len(self.tensor)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        return self.values[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self.values == list(other)

    def __repr__(self) -> str:
        return repr(self.values)


def _prepare(
    matrices: Sequence[Tensor],
    backend: str,
    energy: float | None = None,
    state: object = None,
    on_nonfinite: str = "raise",
) -> list[Tensor]:
    if isinstance(matrices, Tensor) or not isinstance(matrices, Sequence):
        raise _checks.fail_type("matrices", "a list of 2-D tensors", matrices)
    if state is not None and not isinstance(state, SpectralState):
        raise _checks.fail_type("state", "a SpectralState or None", state)
    if energy is not None:
        _checks.number("energy", energy, 0.0, 1.0, open_low=True)
    _checks.choice("backend", backend, _backends.NAMES)
    _checks.choice("on_nonfinite", on_nonfinite, ON_NONFINITE)
    return [_checks.tensor(f"matrices[{i}]", matrix, (None, None), "(m, n)") for i, matrix in enumerate(matrices)]


def _targets(out: Sequence[Tensor], matrices: list[Tensor]) -> list[Tensor]:
    if isinstance(out, Tensor) or not isinstance(out, Sequence):
        raise _checks.fail_type("out", "a list of tensors", out)
    if len(out) != len(matrices):
        raise _checks.fail("out", f"a list of {len(matrices)} tensors", len(out))
    held = {matrix.untyped_storage().data_ptr() for matrix in matrices}
    for i, (target, matrix) in enumerate(zip(out, matrices, strict=True)):
        _checks.tensor(f"out[{i}]", target, tuple(matrix.shape), "that of its matrix")
        _checks.same_kind(**{f"matrices[{i}]": matrix, f"out[{i}]": target})
        if target.numel() and target.untyped_storage().data_ptr() in held:
            raise _checks.fail(f"out[{i}]", "memory of its own", "memory of a matrix or of another result")
        held.add(target.untyped_storage().data_ptr())
        if target.requires_grad:
            raise _checks.fail(f"out[{i}]", "a tensor that does not require gradients", "one that does")
    return list(out)


def _nuclear_norm(matrices: list[Tensor], backend: str, on_nonfinite: str) -> Tensor:
    if not matrices:
        return torch.zeros(())
    first = reference.linalg.working(matrices[0])
    return torch.stack([norm.to(first) for norm in _solve.norms(matrices, backend, on_nonfinite)]).sum()


def _fake_nuclear_norm(matrices: list[Tensor], backend: str, on_nonfinite: str) -> Tensor:
    return reference.linalg.working(matrices[0]).new_empty(()) if matrices else torch.empty(())


def _nuclear_subgradient(matrices: list[Tensor], energy: float | None, backend: str, on_nonfinite: str) -> list[Tensor]:
    return _solve.spectral(matrices, SUBGRADIENT, energy, backend, on_nonfinite)[0]


def _fake_nuclear_subgradient(
    matrices: list[Tensor], energy: float | None, backend: str, on_nonfinite: str
) -> list[Tensor]:
    return [matrix.new_empty(matrix.shape) for matrix in matrices]


def _project_energy(
    matrices: list[Tensor], energy: float, backend: str, on_nonfinite: str
) -> tuple[list[Tensor], Tensor]:
    return _solve.spectral(matrices, PROJECTION, energy, backend, on_nonfinite)


def _fake_project_energy(
    matrices: list[Tensor], energy: float, backend: str, on_nonfinite: str
) -> tuple[list[Tensor], Tensor]:
    device = matrices[0].device if matrices else torch.device("cpu")
    ranks = torch.empty(len(matrices), dtype=torch.int64, device=device)
    return [matrix.new_empty(matrix.shape) for matrix in matrices], ranks


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    matrices, ctx.backend, ctx.on_nonfinite = inputs
    ctx.save_for_backward(*matrices)


def _backward(ctx: Any, grad: Tensor) -> tuple[list[Tensor], None, None]:
    if torch.is_grad_enabled():
        raise RuntimeError("nuclear_norm is differentiable once: call backward without create_graph")
    sub = torch.ops.fastrank.nuclear_subgradient(list(ctx.saved_tensors), None, ctx.backend, ctx.on_nonfinite)
    return [grad.to(g) * g for g in sub], None, None


_register.register(
    "nuclear_norm(Tensor[] matrices, str backend, str on_nonfinite) -> Tensor",
    _nuclear_norm,
    fake=_fake_nuclear_norm,
    setup_context=_setup_context,
    backward=_backward,
)
_register.register(
    "nuclear_subgradient(Tensor[] matrices, float? energy, str backend, str on_nonfinite) -> Tensor[]",
    _nuclear_subgradient,
    fake=_fake_nuclear_subgradient,
)
_register.register(
    "project_energy(Tensor[] matrices, float energy, str backend, str on_nonfinite) -> "
    "(Tensor[] projected, Tensor ranks)",
    _project_energy,
    fake=_fake_project_energy,
)
