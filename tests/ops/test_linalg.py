"""The spectral operators against LAPACK's own acceptance ratios, float64, and the inequalities that define them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from helpers import EPS, generator, l2_relative, randn
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fastrank import ops, reference

pytestmark = pytest.mark.usefixtures("poison")


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


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("kind", KINDS)
def test_svd_meets_lapacks_ratios(kind, dtype):
    matrices = [matrix(kind, m, n, dtype) for m, n in SHAPES]
    for a, (u, s, vh) in zip(matrices, ops.svd(matrices), strict=True):
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


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_empty_matrices_and_empty_lists(shape):
    a = torch.zeros(shape)
    ((u, s, vh),) = ops.svd([a])
    assert (u.shape, s.shape, vh.shape) == ((shape[0], 0), (0,), (0, shape[1]))
    assert float(ops.nuclear_norm([a])) == 0
    assert ops.nuclear_subgradient([a], energy=0.5)[0].shape == shape
    projected, ranks = ops.project_energy([a], 0.5)
    assert projected[0].shape == shape
    assert ranks == [0]
    assert (ops.svd([]), ops.nuclear_subgradient([]), ops.project_energy([], 0.5)) == ([], [], ([], []))
    assert float(ops.nuclear_norm([])) == 0


def test_views_give_what_their_copies_give():
    base = randn(12, 20)
    views = [base.T, base[::2, 1::3], base[:1].expand(5, 20), base[3:3], base[:, 4:5]]
    copies = [view.contiguous() for view in views]
    for found, wanted in zip(ops.project_energy(views, 0.7)[0], ops.project_energy(copies, 0.7)[0], strict=True):
        torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(ops.nuclear_norm(views), ops.nuclear_norm(copies))
    for found, wanted in zip(ops.nuclear_subgradient(views), ops.nuclear_subgradient(copies), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(6, 6), (3, 12), (12, 3), (1, 5)])
def test_the_subgradient_inequality_and_the_dual_gap(shape, dtype):
    for seed in range(50):
        w = randn(*shape, seed=seed, dtype=dtype)
        (g,) = ops.nuclear_subgradient([w])
        norm, r = float(ops.nuclear_norm([w])), min(shape)
        assert float(torch.linalg.matrix_norm(g, 2)) <= 1 + 30 * EPS[dtype] * r
        assert float((g * w).sum()) == pytest.approx(norm, rel=30 * r * EPS[dtype])
        for other in range(20):
            z = randn(*shape, seed=1000 + other, dtype=dtype)
            bound = norm + float((g * (z - w)).sum())
            assert float(ops.nuclear_norm([z])) >= bound - 100 * EPS[dtype] * (norm + abs(bound))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("energy", [None, 0.6, 1.0])
def test_the_subgradient_does_not_depend_on_scale_and_turns_with_the_matrix(dtype, energy):
    w = randn(7, 11, dtype=dtype)
    (g,) = ops.nuclear_subgradient([w], energy=energy)
    for scale in (1e-30, 1e-3, 1e3, 1e30):
        assert l2_relative(ops.nuclear_subgradient([scale * w], energy=energy)[0], g) <= 300 * EPS[dtype]
    q = torch.linalg.qr(randn(7, 7, seed=3, dtype=dtype))[0]
    assert l2_relative(ops.nuclear_subgradient([q @ w], energy=energy)[0], q @ g) <= 300 * EPS[dtype]
    assert l2_relative(ops.nuclear_subgradient([-w], energy=energy)[0], -g) <= 300 * EPS[dtype]


@pytest.mark.parametrize("dtype", EPS)
def test_the_subgradient_of_zero_and_of_a_low_rank_matrix(dtype):
    assert torch.equal(ops.nuclear_subgradient([torch.zeros(4, 6, dtype=dtype)])[0], torch.zeros(4, 6, dtype=dtype))
    u, v = torch.ones(8, 1, dtype=dtype), torch.ones(2, 1, dtype=dtype)
    (g,) = ops.nuclear_subgradient([3 * u @ v.T])
    assert g.dtype == dtype
    assert l2_relative(g, u @ v.T / 4) <= 2 * EPS[dtype] + 30 * EPS[torch.float32] * (dtype != torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("energy", [1e-9, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("kind", ["random", "graded", "repeated", "tiny", "huge"])
def test_projection_error_is_the_tail_energy_and_projecting_again_changes_nothing(kind, energy, dtype):
    matrices = [matrix(kind, m, n, dtype) for m, n in SHAPES]
    projected, ranks = ops.project_energy(matrices, energy)
    again, ranks_again = ops.project_energy(projected, energy)
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


def test_projection_is_idempotent_where_the_cut_is_not_at_the_edge():
    u, v = torch.linalg.qr(randn(9, 5))[0], torch.linalg.qr(randn(12, 5, seed=1))[0]
    a = (u * torch.tensor([10.0, 9.0, 8.0, 0.1, 0.01])) @ v.T
    (p,), (k,) = ops.project_energy([a], 0.95)
    (p2,), (k2,) = ops.project_energy([p], 0.95)
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


def test_nuclear_norm_has_the_subgradient_as_its_gradient():
    matrices = [
        randn(3, 5, dtype=torch.float64).requires_grad_(),
        randn(4, 2, seed=1, dtype=torch.float64).requires_grad_(),
    ]
    assert torch.autograd.gradcheck(lambda *m: ops.nuclear_norm(m), matrices)
    mixed = [randn(3, 5).requires_grad_(), randn(4, 4), randn(2, 3, seed=2).half().requires_grad_()]
    (2 * ops.nuclear_norm(mixed)).backward()
    for w, g in zip(mixed, ops.nuclear_subgradient(mixed), strict=True):
        if w.requires_grad:
            assert w.grad.dtype == w.dtype
            torch.testing.assert_close(w.grad, 2 * g)
    assert mixed[1].grad is None


def test_nuclear_norm_refuses_a_second_derivative():
    w = randn(3, 3).requires_grad_()
    with pytest.raises(RuntimeError, match="nuclear_norm is differentiable once: call backward without create_graph"):
        torch.autograd.grad(ops.nuclear_norm([w]), w, create_graph=True)


@pytest.mark.parametrize("needs", [True, False])
def test_opcheck(needs):
    matrices = [randn(3, 5).requires_grad_(needs), randn(5, 4, seed=1).T.detach().requires_grad_(needs), randn(1, 1)]
    torch.library.opcheck(torch.ops.fastrank.nuclear_norm.default, (matrices, "auto"))
    if not needs:
        torch.library.opcheck(torch.ops.fastrank.nuclear_norm.default, ([], "auto"))
        torch.library.opcheck(torch.ops.fastrank.nuclear_subgradient.default, (matrices, 0.5, "auto"))


def test_autocast_does_not_lower_the_precision():
    """TRP's rule for mixed precision: the SVD and what is rebuilt from it stay in float32."""
    a = randn(20, 30)
    outside = [ops.project_energy([a], 0.9)[0][0], ops.nuclear_subgradient([a])[0], ops.nuclear_norm([a])]
    with torch.autocast("cpu", torch.bfloat16):
        inside = [ops.project_energy([a], 0.9)[0][0], ops.nuclear_subgradient([a])[0], ops.nuclear_norm([a])]
    for found, wanted in zip(inside, outside, strict=True):
        assert torch.equal(found, wanted)


def test_inputs_are_left_alone_and_outputs_are_fresh():
    a = randn(4, 4)
    before = a.clone()
    for made in (ops.project_energy([a], 1.0)[0][0], ops.nuclear_subgradient([a])[0], ops.svd([a])[0][0]):
        made.zero_()
    assert torch.equal(a, before)


GOOD = torch.eye(3)
NAN, INF = GOOD * math.nan, GOOD / 0


@pytest.mark.parametrize(
    "call", [ops.svd, ops.nuclear_norm, ops.nuclear_subgradient, lambda m, **o: ops.project_energy(m, 0.5, **o)]
)
@pytest.mark.parametrize(
    ("matrices", "options", "error", "message"),
    [
        ([GOOD, NAN], {}, ValueError, r"matrices\[1\] must be finite, got 9 NaN or infinite values out of 9"),
        ([GOOD, GOOD, INF], {}, ValueError, r"matrices\[2\] must be finite"),
        ([GOOD[0]], {}, ValueError, r"matrices\[0\] must be of shape \(any, any\) = \(m, n\), got \(3,\)"),
        ([GOOD.long()], {}, TypeError, r"matrices\[0\] must be a floating-point tensor"),
        ([GOOD, [1.0]], {}, TypeError, r"matrices\[1\] must be a torch.Tensor, got list"),
        (GOOD, {}, TypeError, r"matrices must be a list of 2-D tensors, got Tensor"),
        ({"a": GOOD}, {}, TypeError, r"matrices must be a list of 2-D tensors, got dict"),
        (
            [GOOD],
            {"backend": "sequence"},
            ValueError,
            r"backend='sequence' cannot run \w+ here: \w+ has no sequence backend",
        ),
        ([], {"backend": "nonsense"}, ValueError, r"backend must be one of"),
    ],
)
def test_bad_input_is_refused_with_the_index(call, matrices, options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call(matrices, **options)


@pytest.mark.parametrize(
    ("energy", "error"),
    [
        (0.0, ValueError),
        (-0.1, ValueError),
        (1.1, ValueError),
        (math.nan, ValueError),
        (True, TypeError),
        ("1", TypeError),
    ],
)
def test_bad_energies_are_refused(energy, error):
    for call in (lambda: ops.project_energy([GOOD], energy), lambda: ops.nuclear_subgradient([GOOD], energy=energy)):
        with pytest.raises(error, match=r"^energy must be a"):
            call()


def test_warm_starts_are_refused_until_they_exist():
    for call in (
        lambda s: ops.project_energy([GOOD], 0.5, state=s),
        lambda s: ops.nuclear_subgradient([GOOD], state=s),
    ):
        with pytest.raises(ValueError, match=r"^state must be None"):
            call({})


def test_random_numbers_are_not_drawn():
    before = torch.get_rng_state()
    ops.project_energy([torch.randn(3, 4, generator=generator(1))], 0.5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_matrix_on_which_lapack_gives_up_is_decomposed_in_another_rounding(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LAPACK fails on some projected kernels, which ones depending on its build and threads: here it always does."""
    matrix = randn(12, 30, dtype=torch.float64).to(dtype)
    first = reference.linalg.working(matrix)
    svd, svdvals, refused = torch.linalg.svd, torch.linalg.svdvals, []

    def fails_once(function):
        def call(a, *args, **kwargs):
            if a.dtype == first.dtype and a.shape == first.shape:
                refused.append(a)
                raise torch.linalg.LinAlgError("linalg.svd: The algorithm failed to converge")
            return function(a, *args, **kwargs)

        return call

    want = svdvals(first.double())
    monkeypatch.setattr(torch.linalg, "svd", fails_once(svd))
    monkeypatch.setattr(torch.linalg, "svdvals", fails_once(svdvals))
    ((u, s, vh),) = ops.svd([matrix])
    norm = ops.nuclear_norm([matrix])
    assert len(refused) == 3
    assert u.dtype == s.dtype == vh.dtype == norm.dtype == first.dtype
    eps = torch.finfo(first.dtype).eps
    assert (s.double() - want).abs().max() <= 10 * eps * want[0]
    assert ((u * s @ vh).double() - first.double()).norm() <= 10 * eps * 12**0.5 * want[0]
    assert abs(float(norm) - float(want.sum())) <= 12 * 10 * eps * float(want[0])
