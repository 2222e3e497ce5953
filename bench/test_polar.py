"""U Vᵀ of all convolutions of a ResNet (family linalg): the polar factor's schedules against other ways.

    pytest bench/test_polar.py --full --benchmark-only --benchmark-json=polar.json

On a CPU: wall times of the PyTorch contenders on some layers of ResNet-18 (the reference emulates the kernel's rounding
and is slow on purpose). On a GPU: ResNet-50, the Triton kernels, and the times inside a CUDA graph. Ratios, errors and
dual gaps are printed and go into extra_info. Muon's five steps are no sub-gradient: see their error.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrank import _backends
from fastrank.benchmarks import timing
from fastrank.benchmarks.linalg_contenders import MUON, newton_schulz
from fastrank.ops.polar import polar_factors
from fastrank.reference.polar import SCHEDULES, coefficients

DEVICE = timing.DEVICE
Factors = Callable[[Sequence[Tensor]], list[Tensor]]

# (O, I k²) of the convolutions, and how many there are of each.
RESNET50 = [
    ((256, 1024), 5), ((1024, 256), 6), ((512, 128), 4), ((128, 512), 3), ((256, 64), 4), ((64, 256), 2),
    ((256, 2304), 6), ((2048, 512), 3), ((512, 2048), 2), ((128, 1152), 4), ((64, 576), 3), ((512, 4608), 3),
    ((512, 256), 1), ((256, 512), 1), ((1024, 512), 1), ((512, 1024), 1), ((64, 147), 1), ((64, 64), 1),
    ((128, 256), 1), ((2048, 1024), 1),
]  # fmt: skip
RESNET18_HALF = [((64, 147), 1), ((64, 576), 4), ((128, 576), 1), ((128, 1152), 3), ((128, 64), 1)]
QUINTICS = coefficients(1e-3, 8)  # for the plain form: 1e-3 of the Frobenius norm


def weights() -> list[Tensor]:
    """Gaussian matrices of the layers' shapes, with He's scale."""
    torch.manual_seed(0)
    shapes = [shape for shape, count in (RESNET50 if DEVICE == "cuda" else RESNET18_HALF) for _ in range(count)]
    return [torch.randn(shape, device=DEVICE) * (2 / shape[1]) ** 0.5 for shape in shapes]


def by_svd(driver: str | None = None) -> Factors:
    def call(matrices: Sequence[Tensor]) -> list[Tensor]:
        # Tall, as the gesvda driver wants them.
        tall = [matrix if matrix.shape[0] > matrix.shape[1] else matrix.mT for matrix in matrices]
        found = [torch.linalg.svd(matrix, full_matrices=False, driver=driver) for matrix in tall]
        return [
            u @ vh if matrix.shape[0] > matrix.shape[1] else (u @ vh).mT
            for matrix, (u, _, vh) in zip(matrices, found, strict=True)
        ]

    return call


def by_foreach(matrices: Sequence[Tensor]) -> list[Tensor]:
    """The same with torch._foreach_mm: one grouped product for all layers."""
    foreach_mm = torch._foreach_mm  # type: ignore[attr-defined]
    xs = [matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix for matrix in matrices]
    xs = [x / x.norm() for x in xs]
    for a, b, c in QUINTICS:
        grams = foreach_mm(xs, [x.mT for x in xs])
        squares = foreach_mm(grams, grams)
        both = torch._foreach_add(torch._foreach_mul(grams, b), squares, alpha=c)
        xs = torch._foreach_add(foreach_mm(both, xs), xs, alpha=a)
    return [x.mT if m.shape[0] > m.shape[1] else x for m, x in zip(matrices, xs, strict=True)]


def contenders() -> tuple[dict[str, Factors], set[str]]:
    """Everything that can run here, and the names of those that a CUDA graph cannot hold."""
    found: dict[str, Factors] = {"svd": by_svd(), "newton_schulz": newton_schulz(QUINTICS), "muon": newton_schulz(MUON)}
    waiting = {"svd"}
    if hasattr(torch, "_foreach_mm"):
        found["foreach_mm"] = by_foreach
    if DEVICE == "cuda":
        for driver in ("gesvd", "gesvdj", "gesvda"):
            found[f"svd_{driver}"] = by_svd(driver)
            waiting.add(f"svd_{driver}")
        found["newton_schulz_fp16"] = newton_schulz(QUINTICS, torch.float16)
        found["muon_bf16"] = newton_schulz(MUON, torch.bfloat16)
    verdict = _backends.explain(_backends.facts("polar_factors", torch.empty(0, device=DEVICE)))["triton"]
    kernel = "triton" if verdict and DEVICE == "cuda" else "reference"  # the interpreter is no contender
    for plan in SCHEDULES:
        tolerance = plan.tolerance
        found[f"{kernel}_{tolerance:g}"] = lambda matrices, t=tolerance: polar_factors(  # type: ignore[misc]
            matrices, tolerance=t, backend=kernel
        )
    return found, waiting


def truth(matrices: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """U Vᵀ and the nuclear norm of each matrix, in float64."""
    found = (torch.linalg.svd(matrix.double(), full_matrices=False) for matrix in matrices)
    return [(u @ vh, s.sum()) for u, s, vh in found]


def quality(matrices: list[Tensor], factors: list[Tensor], wanted: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Largest relative error to U Vᵀ and largest dual gap over the layers."""
    errors, gaps = [], []
    for matrix, factor, (exact, norm) in zip(matrices, factors, wanted, strict=True):
        errors.append(float((factor.double() - exact).norm() / exact.norm()))
        gaps.append(float(1 - (factor.double() * matrix.double()).sum() / norm))
    return {"error": max(errors), "gap": max(gaps)}


def in_turns(calls: dict[str, Factors], matrices: list[Tensor], rounds: int) -> dict[str, timing.Quantiles]:
    """Wall time of a call, the device waited for, in microseconds."""
    if DEVICE == "cuda":
        return timing.eager_times(calls, matrices, repeats=rounds)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.perf_counter()
            call(matrices)
            times[name].append((time.perf_counter() - begin) * 1e6)
    return {name: timing.Quantiles.of(values) for name, values in times.items()}


@pytest.mark.benchmark(group="polar factors of all convolutions")
def test_polar_factors(benchmark: Any) -> None:
    matrices = weights()
    calls, waiting = contenders()
    exact = truth(matrices)
    found = {name: quality(matrices, call(matrices), exact) for name, call in calls.items()}
    for plan in SCHEDULES:  # what is wrong is not timed
        (name,) = (name for name in found if name.endswith(f"_{plan.tolerance:g}"))
        assert found[name]["gap"] <= 1e-4, f"{name}: {found[name]}"
    times = in_turns(calls, matrices, 5)
    info: dict[str, Any] = {"quality": found, "times": {name: each.as_dict() for name, each in times.items()}}
    if DEVICE == "cuda":
        free = {name: call for name, call in calls.items() if name not in waiting}
        for cold in (True, False):
            graph = timing.graph_times(free, matrices, cold=cold, calls=8, repeats=10)
            info["cold_graph" if cold else "warm_graph"] = {name: each.as_dict() for name, each in graph.items()}
    benchmark.extra_info.update(environment=timing.environment(), layers=len(matrices), **info)
    ours = next(name for name in calls if name.endswith(f"_{SCHEDULES[1].tolerance:g}"))
    print()
    for name, each in times.items():
        ratio = each.p50_us / times[ours].p50_us
        line = f"{name:20s} {each.p50_us / 1e3:9.2f} ms  {ratio:8.2f} × {ours}"
        if "cold_graph" in info and name not in waiting:
            line += f"  in a graph {info['cold_graph'][name]['p50_us']:.0f} us"
        print(line + f"  error {found[name]['error']:.1e}  gap {found[name]['gap']:.1e}")
    benchmark.pedantic(lambda: calls[ours](matrices), rounds=3)
