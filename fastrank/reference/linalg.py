"""The truth of the matrix operators: true singular value decompositions, one matrix after the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

_INHERITED = "none"  # torch's word for a precision that is not set at this level


def working(matrix: Tensor) -> Tensor:
    """`matrix` in a dtype that LAPACK and cuSOLVER have: half precisions in float32."""
    return matrix.float() if matrix.dtype in (torch.float16, torch.bfloat16) else matrix


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of an (m, n) matrix: U (m, r), S (r,) descending, Vh (r, n), r = min(m, n); halves in float32."""
    work = working(matrix.detach())
    try:
        u, s, vh = torch.linalg.svd(work, full_matrices=False)
        return u, s, vh
    except LinAlgError:
        # LAPACK's divide and conquer gives up on some matrices with many singular values near 0, such as projections
        # leave behind. Rounded otherwise, they get through: in float64, and in float64 as the transpose.
        if work.dtype == torch.float64:
            v, s, uh = torch.linalg.svd(work.mT, full_matrices=False)
            return uh.mT, s, v.mT
        u, s, vh = svd(work.double())
        return u.to(work.dtype), s.to(work.dtype), vh.to(work.dtype)


def energy_rank(singular_values: Tensor, energy: float) -> Tensor:
    """Smallest k with Σ_{i≤k} σ_i² ≥ energy · Σ σ_i², in [1, n], as a 0-d int64 tensor; σ descending, in float64.

    The sum is exactly the last partial sum, so energy = 1 keeps every value that still changes it. Dividing by a power
    of two rounds nothing and keeps the squares of any scale finite. 0 where there are no values.
    """
    sigma = singular_values.double()
    unit = sigma[:1] / torch.frexp(sigma[:1]).mantissa
    partial = (sigma / torch.where(sigma[:1] > 0, unit, torch.ones_like(unit))).square().cumsum(0)
    below = (partial < energy * partial[-1:]).sum()
    return (below + 1).clamp(max=sigma.numel())


def numerical_rank(singular_values: Tensor, shape: tuple[int, int]) -> Tensor:
    """How many σ stand above rounding noise, eps · max(m, n) · σ_max, as a 0-d int64 tensor (0 for a zero matrix)."""
    cut = torch.finfo(singular_values.dtype).eps * max(shape) * singular_values[:1]
    return (singular_values > cut).sum()


def nuclear_norm(matrix: Tensor) -> Tensor:
    """Σ σ_i as a 0-d tensor."""
    work = working(matrix.detach())
    try:
        found: Tensor = torch.linalg.svdvals(work)
    except LinAlgError:
        found = svd(work)[1]
    return found.sum()


def nuclear_subgradient(matrix: Tensor, energy: float | None) -> Tensor:
    """U_k V_kᵀ with k from the energy rule (None: the numerical rank); zero for a zero matrix."""
    u, s, vh = svd(matrix)
    k = numerical_rank(s, (matrix.shape[0], matrix.shape[1]))
    if energy is not None:
        k = torch.minimum(k, energy_rank(s, energy))
    # Masking instead of slicing: k stays on the device.
    kept = (torch.arange(s.numel(), device=s.device) < k).to(s.dtype)
    return _product(u * kept, vh).to(matrix.dtype)


def project_energy(matrix: Tensor, energy: float) -> tuple[Tensor, Tensor]:
    """Best approximation of the rank that the energy rule keeps, and that rank (0-d int64)."""
    u, s, vh = svd(matrix)
    k = energy_rank(s, energy)
    kept = s * (torch.arange(s.numel(), device=s.device) < k)
    return _product(u * kept, vh).to(matrix.dtype), k


def full_precision(device: torch.device) -> torch.autocast:
    """A context in which autocast does not lower matrix products on `device` (meta knows none)."""
    return torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """`full_precision`, and float32 products in float32 whatever torch was told to prefer.

    ``torch.set_float32_matmul_precision`` and its kin have a GPU multiply in TF32 and a CPU in bfloat16: fast, and off
    by 2e-3, which a Gram matrix turns into wrong ranks. Torch's settings are changed for the length of the context.
    """
    all_of_torch: Any = torch.backends
    chosen = [backend for backend in (all_of_torch.cuda.matmul, all_of_torch.mkldnn.matmul) if _lowers(backend)]
    # What is inherited from the setting for all of torch goes back to being inherited.
    before = [_INHERITED if all_of_torch.fp32_precision == b.fp32_precision else b.fp32_precision for b in chosen]
    for backend in chosen:
        backend.fp32_precision = "ieee"
    try:
        with full_precision(device):
            yield
    finally:
        for backend, setting in zip(chosen, before, strict=True):
            backend.fp32_precision = setting


def _lowers(backend: Any) -> bool:
    return backend.fp32_precision not in (_INHERITED, "ieee")


def _product(left: Tensor, right: Tensor) -> Tensor:
    with exact_products(left.device):
        return left @ right
