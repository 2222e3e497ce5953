"""The spectral operators against LAPACK's own acceptance ratios, float64, and the inequalities that define them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from helpers import EPS, l2_relative, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fastrank import ops

pytestmark = pytest.mark.usefixtures("poison")

# A backend and a dtype that it serves. "host" is the CUDA kernels compiled for the CPU; on a GPU the kernels have the
# same tests in test_linalg_kernels.py.
CASES = [
    *[("reference", dtype) for dtype in EPS],
    *[(backend, dtype) for backend in ("gram", "host") for dtype in EPS if dtype != torch.float64],
]
SINGLE = [case for case in CASES if case[1] in (torch.float32, torch.float64)]
each_case = pytest.mark.parametrize(("backend", "dtype"), CASES)
each_single = pytest.mark.parametrize(("backend", "dtype"), SINGLE)


def graded(m: int, n: int, dtype: torch.dtype, *, repeated: bool = False) -> torch.Tensor:
    """Singular values from 1 down to eps (or 1 and 1/2, many times each) between random orthonormal bases."""
    r = min(m, n)
    sigma = torch.logspace(0, math.log10(EPS[dtype]), r, dtype=torch.float64)
    sigma = torch.where(torch.arange(r) % 2 == 0, 1.0, 0.5).double().sort(descending=True).values if repeated else sigma
    u, v = (
        torch.linalg.qr(randn(m, r, dtype=torch.float64))[0],
        torch.linalg.qr(randn(n, r, seed=1, dtype=torch.float64))[0],
    )
    return ((u * sigma) @ v.T).to(dtype)


def matrix(kind: str, m: int, n: int, dtype: torch.dtype) -> torch.Tensor:
    tiny = 1e-30 if dtype in (torch.float32, torch.float64) else 1e-3
    made = {
        "zero": lambda: torch.zeros(m, n),
        "identity": lambda: torch.eye(m, n),
        "random": lambda: randn(m, n, dtype=torch.float64),
        "rank 2": lambda: randn(m, 2, dtype=torch.float64) @ randn(2, n, seed=1, dtype=torch.float64),
        "graded": lambda: graded(m, n, dtype),
        "repeated": lambda: graded(m, n, dtype, repeated=True),
        "tiny": lambda: tiny * randn(m, n, dtype=torch.float64),
        "huge": lambda: randn(m, n, dtype=torch.float64) / tiny,
    }[kind]()
    return made.to(dtype)


KINDS = ("zero", "identity", "random", "rank 2", "graded", "repeated", "tiny", "huge")
SHAPES = ((1, 1), (1, 7), (7, 1), (5, 5), (4, 40), (40, 4), (33, 31))


@each_case
@pytest.mark.parametrize("kind", KINDS)
def test_svd_meets_lapacks_ratios(kind, backend, dtype):
    matrices = [matrix(kind, m, n, dtype) for m, n in SHAPES]
    for a, (u, s, vh) in zip(matrices, ops.svd(matrices, backend=backend), strict=True):
        work = torch.promote_types(dtype, torch.float32)
        assert (u.dtype, s.dtype, vh.dtype) == (work,) * 3
        (m, n), r, ulp = a.shape, min(a.shape), EPS[work]
        assert (u.shape, s.shape, vh.shape) == ((m, r), (r,), (r, n))
        u, s, vh, a = u.double(), s.double(), vh.double(), a.double()
        assert bool((s >= 0).all() and (s[1:] <= s[:-1]).all())
        norm = torch.linalg.matrix_norm(a, 1).clamp(min=1e-300)
        assert torch.linalg.matrix_norm(a - (u * s) @ vh, 1) / (norm * max(m, n) * ulp) <= 30
        assert torch.linalg.matrix_norm(torch.eye(r) - u.T @ u, 1) / (m * ulp) <= 30
        assert torch.linalg.matrix_norm(torch.eye(r) - vh @ vh.T, 1) / (n * ulp) <= 30
        exact = torch.from_numpy(scipy.linalg.svdvals(a.numpy()))
        assert float((s - exact).abs().max()) <= 30 * ulp * max(float(exact[0]), 1e-300) * math.sqrt(r)


@pytest.mark.parametrize("backend", ["auto", "reference", "gram", "host"])
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_empty_matrices_and_empty_lists(shape, backend):
    a, options = torch.zeros(shape), {"backend": backend}
    ((u, s, vh),) = ops.svd([a], **options)
    assert (u.shape, s.shape, vh.shape) == ((shape[0], 0), (0,), (0, shape[1]))
    assert float(ops.nuclear_norm([a], **options)) == 0
    assert ops.nuclear_subgradient([a], energy=0.5, **options)[0].shape == shape
    projected, ranks = ops.project_energy([a], 0.5, **options)
    assert projected[0].shape == shape
    assert ranks == [0]
    assert ops.svd([], **options) == ops.nuclear_subgradient([], **options) == []
    assert ops.project_energy([], 0.5, **options) == ([], [])
    assert float(ops.nuclear_norm([], **options)) == 0


@pytest.mark.parametrize("backend", ["reference", "gram", "host"])
def test_views_give_what_their_copies_give(backend):
    base, options = randn(12, 20), {"backend": backend}
    views = [base.T, base[::2, 1::3], base[:1].expand(5, 20), base[3:3], base[:, 4:5]]
    copies = [view.contiguous() for view in views]
    pairs = (ops.project_energy(some, 0.7, **options)[0] for some in (views, copies))
    for found, wanted in zip(*pairs, strict=True):
        torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(ops.nuclear_norm(views, **options), ops.nuclear_norm(copies, **options))
    pairs = (ops.nuclear_subgradient(some, **options) for some in (views, copies))
    for found, wanted in zip(*pairs, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@each_single
@pytest.mark.parametrize("shape", [(6, 6), (3, 12), (12, 3), (1, 5)])
def test_the_subgradient_inequality_and_the_dual_gap(shape, backend, dtype):
    """On 1,000 pairs a shape: ‖Z‖_* >= ‖W‖_* + <G, Z - W>, with equality at W, where ‖G‖₂ = 1."""
    matrices = [randn(*shape, seed=seed, dtype=dtype) for seed in range(50)]
    others = [randn(*shape, seed=1000 + seed, dtype=dtype) for seed in range(20)]
    r, eps = min(shape), EPS[dtype]
    exact = [scipy.linalg.svdvals(z.double().numpy()).sum() for z in others]
    for w, g in zip(matrices, ops.nuclear_subgradient(matrices, backend=backend), strict=True):
        norm = float(ops.nuclear_norm([w], backend=backend))
        assert norm == pytest.approx(scipy.linalg.svdvals(w.double().numpy()).sum(), rel=30 * r * eps)
        assert float(torch.linalg.matrix_norm(g, 2)) <= 1 + 30 * eps * r
        assert float((g * w).sum()) == pytest.approx(norm, rel=30 * r * eps)
        for z, other in zip(others, exact, strict=True):
            bound = norm + float((g * (z - w)).sum())
            assert other >= bound - 100 * eps * (norm + abs(bound))


@each_single
@pytest.mark.parametrize("energy", [None, 0.6, 1.0])
def test_the_subgradient_does_not_depend_on_scale_and_turns_with_the_matrix(backend, dtype, energy):
    w = randn(7, 11, dtype=dtype)
    q = torch.linalg.qr(randn(7, 7, seed=3, dtype=dtype))[0]
    scaled = [scale * w for scale in (1e-30, 1e-3, 1e3, 1e30)]
    g, *same, turned, opposite = ops.nuclear_subgradient([w, *scaled, q @ w, -w], energy=energy, backend=backend)
    for found, wanted in ((turned, q @ g), (opposite, -g), *((other, g) for other in same)):
        assert l2_relative(found, wanted) <= 300 * EPS[dtype]


@each_case
def test_the_subgradient_of_zero_and_of_a_low_rank_matrix(backend, dtype):
    zero, u, v = torch.zeros(4, 6, dtype=dtype), torch.ones(8, 1, dtype=dtype), torch.ones(2, 1, dtype=dtype)
    none, g = ops.nuclear_subgradient([zero, 3 * u @ v.T], backend=backend)
    assert torch.equal(none, zero)
    assert g.dtype == dtype
    assert l2_relative(g, u @ v.T / 4) <= 2 * EPS[dtype] + 30 * EPS[torch.float32] * (dtype != torch.float64)


@each_single
@pytest.mark.parametrize("energy", [1e-9, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("kind", ["random", "graded", "repeated", "tiny", "huge"])
def test_projection_error_is_the_tail_energy_and_projecting_again_changes_nothing(kind, energy, backend, dtype):
    matrices = [matrix(kind, m, n, dtype) for m, n in SHAPES]
    projected, ranks = ops.project_energy(matrices, energy, backend=backend)
    again, ranks_again = ops.project_energy(projected, energy, backend=backend)
    for a, p, k, p2, k2 in zip(matrices, projected, ranks, again, ranks_again, strict=True):
        sigma = np.linalg.svd(a.double().numpy(), compute_uv=False)
        share = sigma / sigma[0]
        kept = np.cumsum(share**2) / np.sum(share**2)
        slack = 30 * EPS[dtype]
        assert kept[k - 1] >= energy - slack
        assert k == 1 or kept[k - 2] < energy + slack
        assert p.dtype == dtype
        tail = math.sqrt(np.sum(share[k:] ** 2))
        assert float((p.double() - a.double()).norm() / sigma[0]) == pytest.approx(
            tail, abs=100 * EPS[dtype] * math.sqrt(min(a.shape))
        )
        assert k2 <= k
        if energy == 1.0:
            assert l2_relative(p2, p) <= 100 * EPS[dtype]


@pytest.mark.parametrize("backend", ["reference", "gram", "host"])
def test_projection_is_idempotent_where_the_cut_is_not_at_the_edge(backend):
    u, v = torch.linalg.qr(randn(9, 5))[0], torch.linalg.qr(randn(12, 5, seed=1))[0]
    a = (u * torch.tensor([10.0, 9.0, 8.0, 0.1, 0.01])) @ v.T
    (p,), (k,) = ops.project_energy([a], 0.95, backend=backend)
    (p2,), (k2,) = ops.project_energy([p], 0.95, backend=backend)
    assert (k, k2) == (3, 3)
    assert l2_relative(p2, p) <= 1e-5


@pytest.mark.parametrize("scale", [1e-200, 1e-160, 1.0, 1e160, 1e200])
def test_the_kept_rank_does_not_depend_on_the_scale_of_float64_matrices(scale):
    a = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)) * scale
    assert ops.project_energy([a], 0.8)[1] == [2]
    (g,) = ops.nuclear_subgradient([a], energy=0.8)
    assert torch.equal(g.round(decimals=9), torch.diag(torch.tensor([1.0, 1, 0, 0], dtype=torch.float64)))


@given(
    arrays(np.float64, st.tuples(st.integers(1, 6), st.integers(1, 6)), elements=st.integers(-8, 8)),
    st.sampled_from([0.25, 0.5, 0.9, 1.0]),
)
def test_any_integer_matrix(a, energy):
    w = torch.from_numpy(a)
    sigma = scipy.linalg.svdvals(a)
    size = max(float(sigma[0]), 1.0)
    ((u, s, vh),) = ops.svd([w])
    assert np.abs(s.numpy() - sigma).max() <= 1e-13 * size * 10
    assert float(((u * s) @ vh - w).abs().max()) <= 1e-13 * size * 10
    assert float(ops.nuclear_norm([w])) == pytest.approx(sigma.sum(), abs=1e-12 * size)
    rank = np.linalg.matrix_rank(a)
    (g,) = ops.nuclear_subgradient([w])
    assert float(g.square().sum()) == pytest.approx(rank, abs=1e-8)
    assert float((g * w).sum()) == pytest.approx(sigma.sum(), abs=1e-10 * size)
    (p,), (k,) = ops.project_energy([w], energy)
    assert 1 <= k <= min(a.shape)
    assert float((p - w).square().sum()) == pytest.approx((sigma[k:] ** 2).sum(), abs=1e-10 * size**2)
    assert (sigma[:k] ** 2).sum() >= energy * (sigma**2).sum() * (1 - 1e-12)
    assert k == 1 or (sigma[: k - 1] ** 2).sum() <= energy * (sigma**2).sum() * (1 + 1e-12)


LISTS = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 40), st.sampled_from(("random", "rank 2", "repeated", "zero"))),
    max_size=6,
)


@settings(max_examples=300)
@given(LISTS, st.sampled_from([None, 0.3, 0.9, 0.999]), st.sampled_from(["reference", "gram"]), st.booleans())
def test_any_list_of_shapes_comes_back_in_order(shapes, energy, backend, double):
    dtype = torch.float64 if double and backend == "reference" else torch.float32
    matrices = [matrix(kind, m, n, dtype) if m and n else torch.zeros(m, n, dtype=dtype) for m, n, kind in shapes]
    eps = EPS[dtype]
    subgradients = ops.nuclear_subgradient(matrices, energy=energy, backend=backend)
    projected, ranks = ops.project_energy(matrices, energy or 1.0, backend=backend)
    assert len(subgradients) == len(projected) == len(ranks) == len(matrices)
    total = 0.0
    for w, g, p, k in zip(matrices, subgradients, projected, ranks, strict=True):
        assert g.shape == p.shape == w.shape
        if not w.numel():
            assert k == 0
            continue
        sigma = np.linalg.svd(w.double().numpy(), compute_uv=False)
        total += sigma.sum()
        r, top = min(w.shape), max(sigma[0], 1e-300)
        assert float(torch.linalg.matrix_norm(g.double(), 2)) <= 1 + 30 * eps * r
        gained = float((g.double() * w.double()).sum())
        assert gained <= sigma.sum() * (1 + 30 * eps * r)
        if energy is None:
            assert gained >= sigma.sum() - top * eps * r * (max(w.shape) + 30)
        kept = np.cumsum(sigma**2) / max(np.sum(sigma**2), 1e-300)
        margin = np.abs(kept - (energy or 1.0)).min()
        if energy is not None and margin > 100 * eps:  # off ties
            wanted = int((kept < energy).sum()) + 1 if sigma[0] > 0 else 1
            assert k == wanted
            assert gained == pytest.approx(sigma[:k].sum(), abs=100 * eps * top * r)
        assert float((p.double() - w.double()).norm()) == pytest.approx(
            math.sqrt(np.sum(sigma[k:] ** 2)), abs=100 * eps * top * math.sqrt(r)
        )
    assert float(ops.nuclear_norm(matrices, backend=backend)) == pytest.approx(total, rel=100 * eps, abs=1e-30)
