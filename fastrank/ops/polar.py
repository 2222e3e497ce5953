"""`polar_factors`: U Vᵀ of a list of matrices by matrix products alone; nothing waits for a result."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrank import _backends, _checks, _memory, _native
from fastrank.ops import _polar_plan, _register
from fastrank.reference import polar


def polar_factors(matrices: Sequence[Tensor], *, tolerance: float | None = None, backend: str = "auto") -> list[Tensor]:
    """U Vᵀ of each (m, n) matrix U S Vᵀ, in its shape and dtype: the full sub-gradient of the nuclear norm, nearly.

    matrices: 2-D tensors of any shapes, dtypes and devices. Zero gives zero, and scaling a matrix by a power of two
    changes nothing. One with NaN or infinite entries gives NaN throughout: nobody looks. Not differentiable.

    tolerance: relative Frobenius error for condition numbers of up to 50; at least 3e-5. None is 5e-3, with a dual gap
    1 - ⟨X, W⟩/‖W‖₊ of at most 1e-4 up to a condition number of 1000. It fixes the number of iterations, so that nothing
    waits for a result. Directions of too small singular values come out shorter than 1, never longer than 1.001. The
    factor of a rank-deficient matrix holds, beside U Vᵀ, multiples of directions that rounding made: use an exact
    method where these matter.

    backend: "auto" | "reference" | "triton" (all matrices in one sequence of launches). float64 is served by the
    reference alone, which then computes in float64.
    Source: Polar Express (Amsel et al. 2025) on Gram matrices with restarts. Raises ValueError or TypeError, naming the
    argument, on anything that is not a list of matrices, and on a wrong tolerance or backend.
    """
    if isinstance(matrices, Tensor) or not isinstance(matrices, Sequence):
        raise _checks.fail_type("matrices", "a list of 2-D tensors", matrices)
    if tolerance is not None:
        tolerance = _checks.number("tolerance", tolerance, polar.SCHEDULES[-1].tolerance)
    _checks.choice("backend", backend, _backends.NAMES)
    for index, matrix in enumerate(matrices):
        _checks.tensor(f"matrices[{index}]", matrix, (None, None), "(m, n)")
    if not matrices:
        return []
    held = polar.schedule(tolerance).tolerance
    return list(torch.ops.fastrank.polar_factors([matrix.detach() for matrix in matrices], held, backend))


def _polar_factors(matrices: list[Tensor], tolerance: float, backend: str) -> list[Tensor]:
    schedule = polar.schedule(tolerance)
    outs = _polar_factors_fake(matrices, tolerance, backend)
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, matrix in enumerate(matrices):
        if _backends.choose(_backends.facts("polar_factors", matrix), backend) == "reference":
            outs[index] = polar.polar_factor(matrix, schedule)
        elif matrix.numel():
            groups.setdefault((matrix.device, matrix.dtype), []).append(index)

    def launch(members: Sequence[int]) -> list[None]:
        some, targets = [matrices[i] for i in members], [outs[i] for i in members]
        kernels, layouts = _native.triton_kernels("polar"), tuple(map(_polar_plan.layout, some, targets))
        block, device = kernels.block(max(each[0] for each in layouts)), some[0].device
        # A Triton kernel runs on the current device.
        with torch.cuda.device(device if device.type == "cuda" else -1):
            plan = _polar_plan.plan(layouts, block, kernels.EDGE, device)
            kernels.polar_factors(some, targets, plan, schedule.quintics(), schedule.split)
        return []

    for members in groups.values():
        _memory.in_parts(launch, members, lambda i: f"the workspace for matrices[{i}], {tuple(matrices[i].shape)},")
    return outs


def _polar_factors_fake(matrices: list[Tensor], tolerance: float, backend: str) -> list[Tensor]:
    return [matrix.new_empty(matrix.shape) for matrix in matrices]


_register.register(
    "polar_factors(Tensor[] matrices, float tolerance, str backend) -> Tensor[]",
    _polar_factors,
    fake=_polar_factors_fake,
)
