"""The polar factor: every backend and schedule against float64, over spectra, sizes, scales, dtypes and layouts."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from helpers import EPS, generator, l2_relative, randn
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from fastrank import _backends, _native
from fastrank.ops.polar import polar_factors
from fastrank.reference.polar import DEFAULT, SCHEDULES, Schedule

pytestmark = pytest.mark.usefixtures("poison")

CASES = [
    *(("reference", "cpu", dtype) for dtype in EPS),
    ("triton", "cpu", torch.float32),
    ("triton", "cpu", torch.float16),
    *(
        pytest.param(backend, "cuda", dtype, marks=pytest.mark.gpu)
        for backend in ("reference", "triton")
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    ),
]
SINGLE = [case for case in CASES if torch.float32 in getattr(case, "values", case)]
over_backends = pytest.mark.parametrize(("backend", "device", "dtype"), CASES)
over_single = pytest.mark.parametrize(("backend", "device", "dtype"), SINGLE)
over_schedules = pytest.mark.parametrize("plan", SCHEDULES, ids=lambda plan: f"{plan.tolerance:g}")
SHAPES = ((1, 1), (1, 7), (7, 1), (5, 5), (4, 40), (65, 3), (33, 31), (70, 130))
INTERPRETED = ((1, 7), (40, 9))  # and one of more than a tile: the interpreter takes its time
OVERSHOOT = 1e-3  # largest singular value above 1 that the documentation admits
GAP = 1e-4  # dual gap that it promises up to a condition number of 1000


def available(backend: str, device: str, dtype: torch.dtype) -> None:
    verdict = _backends.explain(_backends.facts("polar_factors", torch.empty(0, device=device, dtype=dtype)))[backend]
    if not verdict:
        pytest.skip(verdict.reason)


def with_spectrum(m: int, n: int, sigma: Tensor, seed: int = 0) -> Tensor:
    """U diag(sigma) Vᵀ in float64, of random bases; sigma may be shorter than min(m, n)."""
    u = torch.linalg.qr(randn(m, len(sigma), seed=seed, dtype=torch.float64))[0]
    v = torch.linalg.qr(randn(n, len(sigma), seed=seed + 1, dtype=torch.float64))[0]
    return (u * sigma) @ v.T


def graded(m: int, n: int, condition: float) -> Tensor:
    return with_spectrum(m, n, torch.logspace(0, -math.log10(condition), min(m, n), dtype=torch.float64))


def two_values(m: int, n: int) -> Tensor:
    return with_spectrum(m, n, torch.where(torch.arange(min(m, n)) % 2 == 0, 1.0, 0.5).double())


KINDS = {
    "identity": torch.eye,
    "condition 50": lambda m, n: graded(m, n, 50),
    "two values": two_values,
    "tiny": lambda m, n: 1e-30 * graded(m, n, 20),
    "huge": lambda m, n: 1e30 * graded(m, n, 20),
}
HARD = {
    "random": lambda m, n: randn(m, n, dtype=torch.float64),
    "condition 1000": lambda m, n: graded(m, n, 1000),
    "rank 1": lambda m, n: with_spectrum(m, n, torch.ones(1).double()),
    "rank 2": lambda m, n: (
        with_spectrum(m, n, torch.tensor([1.0, 0.3]).double()) if min(m, n) > 1 else torch.ones(m, n)
    ),
    "half the rank": lambda m, n: with_spectrum(m, n, torch.ones((min(m, n) + 1) // 2).double()),
}


def matrices_of(kinds: dict, backend: str, device: str, dtype: torch.dtype) -> list[tuple[str, Tensor]]:
    """Matrices of every kind and shape in one list, with their kinds; tiny and huge ones as far as the dtype goes."""
    slow = backend == "triton" and device == "cpu"
    shapes = SHAPES if not slow else INTERPRETED if dtype == torch.float32 else INTERPRETED[1:]
    made = [(kind, kinds[kind](m, n).double()) for kind in kinds for m, n in shapes]
    if slow and dtype == torch.float32:
        made += [(kind, kinds[kind](70, 130).double()) for kind in kinds if kind in ("two values", "half the rank")]
    less = {"tiny": 1e28, "huge": 1e-26} if dtype == torch.float16 else {}
    return [(kind, (less.get(kind, 1.0) * each).to(device, dtype)) for kind, each in made]


def rounding(dtype: torch.dtype) -> float:
    """What writing the result down in its dtype may add to every error."""
    return EPS[dtype] if dtype in (torch.float16, torch.bfloat16) else 0.0


def judge(matrix: Tensor, factor: Tensor) -> SimpleNamespace:
    """Relative error to U Vᵀ (None where the rank is not full), dual gap, largest singular value above 1."""
    a, x = matrix.double().cpu(), factor.double().cpu()
    a = a / a.abs().max()
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    full = bool(s[-1] > 1e-5 * s[0])
    return SimpleNamespace(
        error=l2_relative(x, u @ vh) if full else None,
        gap=float(1 - (x * a).sum() / s.sum()),
        over=float(torch.linalg.matrix_norm(x, 2)) - 1,
    )


def check_kind(factors: list[Tensor], matrices: list[Tensor]) -> None:
    for matrix, factor in zip(matrices, factors, strict=True):
        assert (factor.shape, factor.dtype, factor.device) == (matrix.shape, matrix.dtype, matrix.device)
        assert factor.is_contiguous()


@over_schedules
@over_backends
def test_well_conditioned(backend: str, device: str, dtype: torch.dtype, plan: Schedule) -> None:
    """Frobenius error within the schedule's tolerance, and the rounding to the output's dtype."""
    available(backend, device, dtype)
    kinds, matrices = zip(*matrices_of(KINDS, backend, device, dtype), strict=True)
    found = polar_factors(matrices, tolerance=plan.tolerance, backend=backend)
    check_kind(found, matrices)
    for kind, matrix, factor in zip(kinds, matrices, found, strict=True):
        quality = judge(matrix, factor)
        assert quality.error is not None, kind
        assert quality.error <= plan.tolerance + rounding(dtype), kind
        assert quality.over <= OVERSHOOT + rounding(dtype), kind
        assert abs(quality.gap) <= GAP + rounding(dtype), kind


@pytest.mark.parametrize("plan", SCHEDULES[1:], ids=lambda plan: f"{plan.tolerance:g}")
@over_single
def test_hard_spectra(backend: str, device: str, dtype: torch.dtype, plan: Schedule) -> None:
    """Up to a condition number of 1000 and for any rank: as good a sub-gradient as promised, and no longer."""
    available(backend, device, dtype)
    kinds, matrices = zip(*matrices_of(HARD, backend, device, dtype), strict=True)
    found = polar_factors(matrices, tolerance=plan.tolerance, backend=backend)
    for kind, matrix, factor in zip(kinds, matrices, found, strict=True):
        quality = judge(matrix, factor)
        assert quality.over <= OVERSHOOT, kind
        # An exact sub-gradient's gap is 0; one that is too long gains by its length.
        assert -OVERSHOOT <= quality.gap <= GAP, kind
        if kind == "condition 1000" and plan.tolerance <= 1e-4:
            assert quality.error is not None
            assert quality.error <= 1e-3, kind


@over_backends
def test_the_default_is_the_documented_schedule(backend: str, device: str, dtype: torch.dtype) -> None:
    available(backend, device, dtype)
    a = [graded(9, 20, 50).to(device, dtype)]
    assert DEFAULT.tolerance == 5e-3
    default = polar_factors(a, backend=backend)[0]
    assert torch.equal(default, polar_factors(a, tolerance=6e-3, backend=backend)[0])
    if dtype == torch.float32:
        errors = [judge(a[0], polar_factors(a, tolerance=t, backend=backend)[0]).error for t in (5e-3, 1e-4)]
        assert errors[1] < errors[0] / 10  # 22 bits instead of 11


@over_backends
def test_zero_empty_and_no_matrices(backend: str, device: str, dtype: torch.dtype) -> None:
    available(backend, device, dtype)
    shapes = [(0, 3), (4, 0), (0, 0), (3, 5), (5, 3), (1, 1)]
    matrices = [torch.zeros(shape, device=device, dtype=dtype) for shape in shapes]
    found = polar_factors(matrices, backend=backend)
    check_kind(found, matrices)
    assert all(bool((factor == 0).all()) for factor in found)
    assert polar_factors([], backend=backend) == []
    assert polar_factors(matrices[:3], backend=backend)[1].shape == (4, 0)


@over_single
def test_one_bad_matrix_is_nan_and_the_others_are_not(backend: str, device: str, dtype: torch.dtype) -> None:
    available(backend, device, dtype)
    good = randn(6, 9, dtype=dtype).to(device)
    bad = [good.clone() for _ in range(3)]
    for each, value in zip(bad, (math.nan, math.inf, -math.inf), strict=True):
        each[3, 4] = value
    found = polar_factors([good, *bad, good], backend=backend)
    assert all(bool(factor.isnan().all()) for factor in found[1:4])
    alone = polar_factors([good], backend=backend)[0]
    assert torch.equal(found[0], alone)
    assert torch.equal(found[4], alone)


@over_single
@pytest.mark.parametrize("power", [-90, 100])
def test_powers_of_two_change_nothing(backend: str, device: str, dtype: torch.dtype, power: int) -> None:
    available(backend, device, dtype)
    matrices = [graded(5, 9, 20).to(device, dtype), graded(30, 20, 20).to(device, dtype)]
    scaled = [each * 2.0**power for each in matrices]
    found = [polar_factors(each, backend=backend) for each in (matrices, scaled)]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@over_single
def test_other_scales_change_little(backend: str, device: str, dtype: torch.dtype) -> None:
    """3.7 W is another matrix for every rounding, so both answers have the schedule's error."""
    available(backend, device, dtype)
    w = graded(12, 30, 50).to(device, dtype)
    one, other = (polar_factors([c * w], tolerance=1e-4, backend=backend)[0] for c in (1.0, 3.7))
    assert l2_relative(one, other) <= 2e-4
    subnormal = w * 1e-40  # the power of two that scales it is no float32
    assert judge(subnormal, polar_factors([subnormal], backend=backend)[0]).error <= DEFAULT.tolerance


@over_single
def test_subgradient_inequality(backend: str, device: str, dtype: torch.dtype) -> None:
    """‖W'‖₊ ≥ ‖W‖₊ + ⟨X, W' - W⟩, short of gap·‖W‖₊ and overshoot·‖W'‖₊, for 1,000 matrices W'."""
    available(backend, device, dtype)
    w = randn(6, 11, dtype=dtype).to(device)
    x = polar_factors([w], backend=backend)[0].double().cpu()
    w = w.double().cpu()
    others = torch.randn(1000, 6, 11, generator=generator(3), dtype=torch.float64)
    others[:500] = w + 10.0 ** torch.linspace(-6, 0, 500, dtype=torch.float64)[:, None, None] * others[:500]
    norms = torch.linalg.svdvals(others).sum(-1)
    norm = torch.linalg.svdvals(w).sum()
    bound = norm + ((others - w) * x).sum((1, 2))
    assert bool((norms * (1 + OVERSHOOT) + GAP * norm >= bound).all())


@over_single
def test_layouts(backend: str, device: str, dtype: torch.dtype) -> None:
    """A view gives what its contiguous copy gives, and inputs are left alone."""
    available(backend, device, dtype)
    wide = randn(40, 60).to(device, dtype)
    views = [wide.T, wide[::2, 1::3], wide[3:20].T, wide[:, :1].expand(40, 7), wide[5:6], wide[:, 2:3], wide[:0]]
    before = wide.clone()
    found = polar_factors(views, backend=backend)
    check_kind(found, views)
    assert torch.equal(wide, before)
    for view, factor in zip(views, found, strict=True):
        copy = polar_factors([view.contiguous()], backend=backend)[0]
        if backend == "triton":
            assert torch.equal(factor, copy)
        elif copy.numel():  # a library product may sum in another order, and so round a stored number the other way
            assert l2_relative(factor, copy) <= DEFAULT.tolerance + EPS[dtype]


@over_single
def test_same_bits_every_time_and_in_every_list(backend: str, device: str, dtype: torch.dtype) -> None:
    available(backend, device, dtype)
    # Two launches of addresses.
    matrices = [randn(3 + i, 20 - i, seed=i).to(device, dtype) for i in range(17)]
    first = polar_factors(matrices, backend=backend)
    again = polar_factors(matrices[2::-1], backend=backend)[::-1]
    alone = [polar_factors([matrix], backend=backend)[0] for matrix in matrices[:2]]
    for other in (again, alone):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=False))


@over_schedules
def test_triton_equals_its_twin(plan: Schedule) -> None:
    """The same roundings in another order. What the twin does not do would show here: an unsymmetric tile did."""
    available("triton", "cpu", torch.float32)
    matrices = [graded(9, 20, 50).float(), two_values(70, 130).float()]
    twin, kernel = (polar_factors(matrices, tolerance=plan.tolerance, backend=b) for b in ("reference", "triton"))
    for a, b, matrix in zip(twin, kernel, matrices, strict=True):
        assert l2_relative(a, b) <= plan.tolerance
        assert judge(matrix, b).error <= 3 * judge(matrix, a).error


def test_large_tiles_and_many_partial_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    available("triton", "cpu", torch.float32)
    long = graded(9, 64 * 129, 20).float()
    assert judge(long, polar_factors([long], backend="triton")[0]).error <= DEFAULT.tolerance
    monkeypatch.setattr(_native.triton_kernels("polar"), "block", lambda largest: 128)
    matrices, tolerance = [graded(130, 140, 50).float(), graded(3, 8, 50).float()], 1e-4
    for matrix, factor in zip(matrices, polar_factors(matrices, tolerance=tolerance, backend="triton"), strict=True):
        assert judge(matrix, factor).error <= tolerance


def test_a_list_of_several_kinds() -> None:
    """float64 beside float32 beside a half; under autocast, with gradients on, and no random number drawn."""
    matrices = [randn(4, 6, dtype=dtype).requires_grad_() for dtype in EPS]
    before = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        found = polar_factors(matrices, tolerance=1e-4)
    check_kind(found, matrices)
    assert not any(factor.requires_grad for factor in found)
    assert torch.equal(torch.get_rng_state(), before)
    assert judge(matrices[1].detach(), found[1]).error <= 1e-4


@given(data=st.data())
def test_any_list(data: st.DataObject) -> None:
    shapes = data.draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=4), "shapes")
    seed = data.draw(st.integers(0, 2**31 - 1), "seed")
    magnitude = 10.0 ** data.draw(st.integers(-35, 35), "magnitude")
    rank = data.draw(st.integers(1, 9), "rank")
    matrices = [magnitude * randn(m, rank, seed=seed) @ randn(rank, n, seed=seed + 1) for m, n in shapes]
    for matrix, factor in zip(matrices, polar_factors(matrices, backend="reference"), strict=True):
        if matrix.numel():
            quality = judge(matrix, factor)
            assert quality.over <= OVERSHOOT
            assert -OVERSHOOT <= quality.gap <= 2 * GAP


@over_backends
def test_opcheck(backend: str, device: str, dtype: torch.dtype) -> None:
    available(backend, device, dtype)
    matrices = [randn(3, 5).to(device, dtype), randn(6, 2).to(device, dtype).T, torch.zeros(0, 3, device=device)]
    opcheck(torch.ops.fastrank.polar_factors.default, (matrices, 5e-3, backend))


@over_single
def test_compiles_to_one_graph(backend: str, device: str, dtype: torch.dtype) -> None:
    available(backend, device, dtype)
    a = randn(5, 8, dtype=dtype).to(device)

    def function(a: Tensor) -> Tensor:
        return polar_factors([a, a.T], backend=backend)[1] * 2

    assert torch.equal(torch.compile(function, fullgraph=True, backend="aot_eager")(a), function(a))


@pytest.mark.gpu
@pytest.mark.parametrize("tolerance", [2e-2, 1e-4])
def test_cuda_graph_without_synchronisation(tolerance: float) -> None:
    matrices = [torch.randn(n, m, device="cuda") for n, m in ((1100, 1100), (64, 576), (512, 4608), (256, 64))]
    wanted = polar_factors(matrices, tolerance=tolerance, backend="triton")
    torch.cuda.set_sync_debug_mode("error")
    try:
        polar_factors(matrices, tolerance=tolerance, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = polar_factors(matrices, tolerance=tolerance, backend="triton")
    for matrix in matrices:
        matrix.mul_(2)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    fresh = [torch.randn(17, 29, device="cuda")]
    with (
        pytest.raises(RuntimeError, match="must be called once on these shapes"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        polar_factors(fresh, backend="triton")


GOOD = torch.eye(3)


@pytest.mark.parametrize(
    ("matrices", "options", "error", "message"),
    [
        (GOOD, {}, TypeError, "matrices must be a list of 2-D tensors, got Tensor"),
        ({"a": GOOD}, {}, TypeError, "matrices must be a list of 2-D tensors, got dict"),
        ([GOOD, [1.0]], {}, TypeError, r"matrices\[1\] must be a torch.Tensor, got list"),
        ([GOOD[0]], {}, ValueError, r"matrices\[0\] must be of shape \(any, any\) = \(m, n\), got \(3,\)"),
        ([GOOD.long()], {}, TypeError, r"matrices\[0\] must be a floating-point tensor"),
        ([GOOD], {"tolerance": 1e-6}, ValueError, "tolerance must be a finite number at least 3e-05, got 1e-06"),
        ([GOOD], {"tolerance": math.nan}, ValueError, "tolerance must be a finite number at least 3e-05, got nan"),
        ([GOOD], {"tolerance": "1"}, TypeError, "tolerance must be a number, got str"),
        ([GOOD], {"backend": "tritn"}, ValueError, "backend must be one of .*did you mean 'triton'"),
        ([GOOD], {"backend": "cuda"}, ValueError, "polar_factors has no cuda backend"),
        ([GOOD.double()], {"backend": "triton"}, ValueError, "float32, float16 and bfloat16, not torch.float64"),
    ],
)
def test_bad_input(matrices: object, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        polar_factors(matrices, **options)  # type: ignore[arg-type]
