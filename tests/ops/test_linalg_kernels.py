"""The spectral kernels of csrc/linalg, compiled for the host and, with `-m gpu`, on a GPU: against float64."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import EPS, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastrank import _native
from fastrank.ops import _linalg_kernels as kernels
from fastrank.ops._linalg_kernels import Limits
from fastrank.ops._pending import NONFINITE, NOT_CONVERGED
from fastrank.ops._spectra import PROJECTION, SUBGRADIENT

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(not _native.load("_host"), reason=_native.why_missing("_host") or "built"),
]
DEVICES = {"host": "cpu", "cuda": "cuda"}
over_builds = pytest.mark.parametrize("chosen", ["host", pytest.param("cuda", marks=pytest.mark.gpu)])
ULP = EPS[torch.float32]
# Sides around the 32 rows of a block, the 64 of a pair of blocks, and the padding to whole pairs.
EDGES = ((63, 70), (64, 64), (80, 65), (127, 128), (128, 300), (131, 129), (130, 140), (192, 200), (230, 200))


def planted(m: int, n: int, sigma: Tensor) -> Tensor:
    """A float64 matrix of the given singular values between random orthonormal bases."""
    r = min(m, n)
    u = torch.linalg.qr(randn(m, r, seed=m, dtype=torch.float64))[0]
    v = torch.linalg.qr(randn(n, r, seed=n + 1, dtype=torch.float64))[0]
    return (u * sigma.double()) @ v.T


def spectrum(kind: str, r: int) -> Tensor:
    i = torch.arange(r, dtype=torch.float64)
    return {
        "power": (i + 1) ** -0.7,
        "graded": 10 ** (math.log10(ULP) * i / max(r - 1, 1)),
        "repeated": torch.where(i < r / 2, 1.0, 0.5),
        "clustered": 1 + 1e-6 * i.flip(0),
        "low rank": (i < max(1, r // 4)).double(),
        "tail": torch.where(i < max(1, r // 3), 1.0, 1e-4),
    }[kind]


def made(kind: str, m: int, n: int) -> Tensor:
    if kind == "zero":
        return torch.zeros(m, n)
    if kind == "identity":
        return torch.eye(m, n)
    if kind == "ones":
        return torch.ones(m, n)
    if kind == "corner":  # its null rows are unit vectors that its stand-ins could coincide with
        return torch.diag_embed((torch.arange(min(m, n)) >= min(m, n) // 2).float())
    if kind in ("random", "tiny", "huge"):
        return (randn(m, n, dtype=torch.float64) * {"random": 1, "tiny": 1e-30, "huge": 1e30}[kind]).float()
    return planted(m, n, spectrum(kind, min(m, n))).float()


KINDS = ("zero", "identity", "ones", "corner", "random", "tiny", "huge")
SPECTRA = ("power", "graded", "repeated", "clustered", "low rank", "tail")
SHAPES = ((1, 1), (1, 7), (7, 1), (2, 2), (5, 5), (4, 40), (40, 4), (33, 31), (20, 90))


def norm1(a: Tensor) -> float:
    return float(torch.linalg.matrix_norm(a, 1)) if a.numel() else 0.0


def check_svd(a: Tensor, found: tuple[Tensor, Tensor, Tensor]) -> None:
    """LAPACK's acceptance ratios, and singular values to rounding of the largest."""
    assert all(t.dtype == torch.float32 and t.device == a.device for t in found)
    u, s, vh = (t.double().cpu() for t in found)
    a = a.double().cpu()
    (m, n), r = a.shape, min(a.shape)
    assert (u.shape, s.shape, vh.shape) == ((m, r), (r,), (r, n))
    assert bool((s >= 0).all() and (s[1:] <= s[:-1]).all())
    assert norm1(a - (u * s) @ vh) <= 30 * max(norm1(a), 1e-300) * max(m, n) * ULP
    assert norm1(torch.eye(r) - u.T @ u) <= 30 * m * ULP
    assert norm1(torch.eye(r) - vh @ vh.T) <= 30 * n * ULP
    exact = torch.linalg.svdvals(a)
    assert float((s - exact).abs().max()) <= 30 * ULP * float(exact[0]) * math.sqrt(r)


@over_builds
@pytest.mark.parametrize("kind", KINDS + SPECTRA)
def test_svd_meets_lapacks_ratios(kind: str, chosen: str) -> None:
    matrices = [made(kind, m, n).to(DEVICES[chosen]) for m, n in SHAPES]
    found, status = kernels.svd(matrices, chosen)
    assert status.tolist() == [0] * len(SHAPES)
    for a, factors in zip(matrices, found, strict=True):
        check_svd(a, factors)


@over_builds
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precisions_are_computed_in_float32(dtype: torch.dtype, chosen: str) -> None:
    a = made("power", 12, 20).to(DEVICES[chosen], dtype)
    (factors,), status = kernels.svd([a], chosen)
    check_svd(a.float(), factors)
    for kind, energy in ((SUBGRADIENT, 0.9), (PROJECTION, 0.9)):
        (half,), (rank,), _ = kernels.spectral([a.T], kind, energy, chosen)
        (single,), (rank_single,), _ = kernels.spectral([a.T.float()], kind, energy, chosen)
        assert half.dtype == dtype
        assert int(rank) == int(rank_single)
        assert torch.equal(half, single.to(dtype))
    assert int(status[0]) == 0


def check_spectral(a: Tensor, found: Tensor, kind: str, rank: int) -> None:
    """Against the float64 truth at the rank found: the projection's error is the tail, U_k V_kᵀ is a partial isometry
    that takes the nuclear norm of what is kept."""
    assert (found.shape, found.dtype, found.device) == (a.shape, a.dtype, a.device)
    assert found.is_contiguous()
    a, found = a.double().cpu(), found.double().cpu()
    sigma = torch.linalg.svdvals(a)
    slack = 30 * ULP * max(a.shape)
    top = max(float(sigma[0]), 1e-300)
    if kind == PROJECTION:
        tail = float((sigma[rank:] / top).norm())
        # A first pass is trusted down to sigma_1 / 16: its vectors err by up to 256 roundings of a Gram matrix.
        assert float((found - a).div(top).norm()) == pytest.approx(tail, abs=slack + 256 * ULP)
        return
    assert float(torch.linalg.matrix_norm(found, 2)) <= 1 + slack + 256 * ULP
    kept = float(sigma[:rank].sum())
    assert float((found * a).sum()) == pytest.approx(kept, rel=slack)
    assert float(found.square().sum()) == pytest.approx(rank, rel=slack + 256 * ULP)


def numerical_rank(a: Tensor) -> int:
    sigma = torch.linalg.svdvals(a.double().cpu())
    return int((sigma > ULP * max(a.shape) * sigma[0]).sum())


@over_builds
def test_sizes_around_the_blocks(chosen: str) -> None:
    matrices = [randn(m, n, seed=m).to(DEVICES[chosen]) for m, n in EDGES]
    found, ranks, status = kernels.spectral(matrices, SUBGRADIENT, None, chosen)
    assert status.tolist() == [0] * len(EDGES)
    assert (ranks.dtype, status.dtype) == (torch.int64, torch.int32)
    for a, g, rank in zip(matrices, found, ranks.tolist(), strict=True):
        assert rank == min(a.shape)
        check_spectral(a, g, SUBGRADIENT, rank)


@over_builds
@pytest.mark.parametrize("kind", ["random", "low rank"])
def test_svd_of_more_than_one_pair_of_blocks(kind: str, chosen: str) -> None:
    a = made(kind, 66, 90).to(DEVICES[chosen])
    (factors,), status = kernels.svd([a], chosen)
    assert int(status[0]) == 0
    check_svd(a, factors)


@over_builds
def test_a_pair_of_blocks_at_rest_follows_the_rotations_of_the_others(chosen: str) -> None:
    """The pair of blocks 1 and 2, which the first round meets, is orthogonal within itself, but not to the rest.

    Two passes have to be enough: more would make good what a wrong update leaves.
    """
    a = randn(128, 200)
    a[32:96] = 3 * torch.linalg.qr(randn(200, 64, seed=1))[0].T
    a = a.to(DEVICES[chosen])
    (factors,), status = kernels.svd([a], chosen, limits=Limits(12, 4, 2))
    assert int(status[0]) == 0
    check_svd(a, factors)


@over_builds
@pytest.mark.parametrize("kind", [*SPECTRA, "random", "tiny", "huge"])
def test_ranks_are_those_of_float64_away_from_ties(kind: str, chosen: str) -> None:
    shapes = ((9, 30), (30, 9), (40, 41))
    matrices = [made(kind, m, n).to(DEVICES[chosen]) for m, n in shapes]
    sub, ranks, status = kernels.spectral(matrices, SUBGRADIENT, None, chosen)
    assert status.tolist() == [0] * len(shapes)
    for a, g, rank in zip(matrices, sub, ranks.tolist(), strict=True):
        sigma = torch.linalg.svdvals(a.double().cpu())
        near = (sigma / sigma[0] / (ULP * max(a.shape))).log().abs() < 0.3  # a cut within 35 % is anyone's
        assert abs(rank - numerical_rank(a)) <= int(near.sum())
        check_spectral(a, g, SUBGRADIENT, rank)
    for a in matrices:
        squares = torch.linalg.svdvals(a.double().cpu()).square()
        share = squares.cumsum(0) / squares.sum()
        for k in (1, 3, 8):
            if k < len(share) and share[k] - share[k - 1] > 1e-4:
                energy = float(share[k - 1] + share[k]) / 2
                for what in (SUBGRADIENT, PROJECTION):
                    (x,), (rank,), _ = kernels.spectral([a], what, energy, chosen)
                    assert int(rank) == k + 1
                    check_spectral(a, x, what, k + 1)


@over_builds
def test_zero_and_empty_matrices(chosen: str) -> None:
    device = DEVICES[chosen]
    shapes = ((3, 5), (0, 4), (4, 0), (0, 0), (70, 66))
    matrices = [torch.zeros(shape, device=device) for shape in shapes]
    for kind, energy, want in ((SUBGRADIENT, None, 0), (SUBGRADIENT, 0.5, 0), (PROJECTION, 0.5, 1)):
        found, ranks, status = kernels.spectral(matrices, kind, energy, chosen)
        assert all(torch.equal(x, a) for x, a in zip(found, matrices, strict=True))
        assert ranks.tolist() == [want, 0, 0, 0, want]
        assert status.tolist() == [0] * 5
    factors, status = kernels.svd(matrices[:4], chosen)
    assert status.tolist() == [0] * 4
    for a, factor in zip(matrices[1:4], factors[1:], strict=True):
        assert [tuple(t.shape) for t in factor] == [(a.shape[0], 0), (0,), (0, a.shape[1])]
    assert kernels.svd([], chosen)[0] == []
    assert kernels.spectral([], SUBGRADIENT, None, chosen)[0] == []


@over_builds
def test_a_matrix_does_not_depend_on_its_neighbours(chosen: str) -> None:
    """More matrices than a table holds, of mixed shapes, against calls of one; and the same bits every time."""
    matrices = [randn(i % 7 + 1, i % 11 + 1, seed=i).to(DEVICES[chosen]) for i in range(kernels.TABLE_MATRICES + 9)]
    matrices[20] = randn(65, 66).to(DEVICES[chosen])
    found, ranks, status = kernels.spectral(matrices, PROJECTION, 0.8, chosen)
    again = kernels.spectral(matrices, PROJECTION, 0.8, chosen)
    assert int(status.abs().sum()) == 0
    assert all(torch.equal(a, b) for a, b in zip(found, again[0], strict=True))
    for i in (*range(0, len(matrices), 6), 20):
        (alone,), (rank,), _ = kernels.spectral([matrices[i]], PROJECTION, 0.8, chosen)
        assert torch.equal(found[i], alone)
        assert int(ranks[i]) == int(rank)
        check_spectral(matrices[i], alone, PROJECTION, int(rank))
    first, second = (kernels.svd(matrices[:9], chosen)[0] for _ in range(2))
    assert all(torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))


@over_builds
def test_views_give_what_their_copies_give(chosen: str) -> None:
    base = randn(40, 90).to(DEVICES[chosen])
    views = [base.T, base[::2, 1::3], base[:1].expand(5, 90), base[:, :1].expand(40, 70), base[:, 4:5], base[3:4]]
    copies = [view.contiguous() for view in views]
    for kind, energy in ((SUBGRADIENT, None), (PROJECTION, 0.7)):
        found, wanted = (kernels.spectral(m, kind, energy, chosen)[0] for m in (views, copies))
        assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
    assert torch.equal(base, randn(40, 90).to(base))


@over_builds
@pytest.mark.parametrize("exponent", [-140, -126, 60, 100, 124])
def test_scaling_by_a_power_of_two_changes_nothing(exponent: int, chosen: str) -> None:
    """Down to where the entries are subnormal, up to where their squares are long infinite."""
    a = torch.tensor([[4.0, 1.0, 0.0], [2.0, -3.0, 5.0]], device=DEVICES[chosen]) / 8
    scaled = torch.ldexp(a.double(), torch.tensor(exponent, device=a.device)).float()
    for kind, energy in ((SUBGRADIENT, None), (PROJECTION, 0.5)):
        (x,), ranks, _ = kernels.spectral([a], kind, energy, chosen)
        (y,), ranks_scaled, status = kernels.spectral([scaled], kind, energy, chosen)
        assert int(status[0]) == 0
        assert torch.equal(ranks, ranks_scaled)
        back = x if kind == SUBGRADIENT else torch.ldexp(x.double(), torch.tensor(exponent, device=a.device)).float()
        assert torch.equal(y, back)


@over_builds
@pytest.mark.parametrize(
    ("bad", "place", "value"), [(0, (5, 8), math.nan), (1, (69, 65), math.inf), (2, (0, 0), -math.inf)]
)
def test_a_nonfinite_entry_is_reported_and_stays_with_its_matrix(
    bad: int, place: tuple[int, int], value: float, chosen: str
) -> None:
    matrices = [randn(m, n, seed=m).to(DEVICES[chosen]) for m, n in ((6, 9), (70, 66), (3, 3))]
    clean = kernels.spectral(matrices, SUBGRADIENT, None, chosen)[0]
    matrices[bad][place] = value
    found, ranks, status = kernels.spectral(matrices, SUBGRADIENT, None, chosen)
    (factors,), svd_status = kernels.svd([matrices[bad]], chosen)
    assert status.tolist() == [NONFINITE * (i == bad) for i in range(3)]
    assert svd_status.tolist() == [NONFINITE]
    assert all(bool(t.isnan().all()) for t in (found[bad], *factors))
    assert int(ranks[bad]) == 0
    assert all(torch.equal(found[i], clean[i]) for i in range(3) if i != bad)


@over_builds
@pytest.mark.parametrize("shape", [(20, 30), (70, 66)])
def test_what_the_limits_cut_off_is_reported(shape: tuple[int, int], chosen: str) -> None:
    a, easy = randn(*shape).to(DEVICES[chosen]), torch.eye(4, device=DEVICES[chosen])
    found, _, status = kernels.spectral([a, easy], SUBGRADIENT, None, chosen, limits=Limits(1, 1, 1))
    assert status.tolist() == [NOT_CONVERGED, 0]
    assert bool(found[0].isfinite().all())
    assert torch.equal(found[1], easy)
    _, status = kernels.svd([a, easy], chosen, limits=Limits(1, 1, 1))
    assert status.tolist() == [NOT_CONVERGED, 0]


@over_builds
@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(0, 1, 1), "first_sweeps must be between 1 and 24, got 0"),
        (Limits(1, 25, 1), "later_sweeps must be between 1 and 24, got 25"),
        (Limits(1, 1, 9), "passes must be between 1 and 8, got 9"),
    ],
)
def test_limits_out_of_range_are_refused(limits: Limits, message: str, chosen: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        kernels.spectral([torch.eye(2, device=DEVICES[chosen])], SUBGRADIENT, None, chosen, limits=limits)


@over_builds
def test_the_subgradient_inequality(chosen: str) -> None:
    """‖Z‖_* ≥ ‖W‖_* + ⟨G, Z − W⟩ for every Z."""
    matrices = [randn(6, 9, seed=seed).to(DEVICES[chosen]) for seed in range(20)]
    found, _, _ = kernels.spectral(matrices, SUBGRADIENT, None, chosen)
    others = torch.stack([randn(6, 9, seed=1000 + seed, dtype=torch.float64) for seed in range(50)])
    norms = torch.linalg.svdvals(others).sum(1)
    for w, g in zip(matrices, found, strict=True):
        w, g = w.double().cpu(), g.double().cpu()
        bound = torch.linalg.svdvals(w).sum() + (g * (others - w)).sum((1, 2))
        assert bool((norms >= bound - 100 * ULP * (norms + bound.abs())).all())


@given(
    shapes=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=6),
    rank=st.integers(0, 12),
    scale=st.integers(-25, 25),
    energy=st.sampled_from([None, 0.3, 0.9, 1.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40)
def test_any_list(shapes: list[tuple[int, int]], rank: int, scale: int, energy: float | None, seed: int) -> None:
    matrices = [
        (randn(m, rank, seed=seed, dtype=torch.float64) @ randn(rank, n, seed=seed + 1, dtype=torch.float64)).float()
        * 10.0**scale
        for m, n in shapes
    ]
    sub, ranks, status = kernels.spectral(matrices, SUBGRADIENT, energy, "host")
    factors, svd_status = kernels.svd(matrices, "host")
    assert int((status | svd_status).sum()) == 0
    for a, g, k, factor in zip(matrices, sub, ranks.tolist(), factors, strict=True):
        if a.numel() and rank:
            check_spectral(a, g, SUBGRADIENT, k)
        if a.numel():
            check_svd(a, factor)


def test_random_numbers_are_not_drawn() -> None:
    before = torch.get_rng_state()
    kernels.svd([torch.zeros(3, 4)], "host")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
def test_captured_in_a_graph_without_a_synchronisation() -> None:
    matrices = [randn(m, n, seed=m).cuda() for m, n in EDGES]
    want, want_ranks, _ = kernels.spectral(matrices, SUBGRADIENT, 0.9, "cuda")
    want_factors, _ = kernels.svd(matrices[:3], "cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # a synchronisation, or a copy from pageable memory, is an error in here
        found, ranks, status = kernels.spectral(matrices, SUBGRADIENT, 0.9, "cuda")
        factors, _ = kernels.svd(matrices[:3], "cuda")
    for _ in range(2):
        graph.replay()
        assert torch.equal(ranks, want_ranks)
        assert int(status.sum()) == 0
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
        pairs = zip(factors, want_factors, strict=True)
        assert all(torch.equal(a, b) for x, y in pairs for a, b in zip(x, y, strict=True))


@pytest.mark.gpu
def test_schemas_of_the_launch_operators() -> None:
    a = randn(5, 7).cuda()
    state = torch.zeros(kernels.STATE_INTS, dtype=torch.int32, device="cuda")
    status, ranks = state.new_zeros(1), state.new_zeros(1, dtype=torch.int64)
    workspace = a.new_zeros(kernels.workspace_floats(5, 7))
    tail = (status, state, workspace)
    spectral = ([a], [torch.empty_like(a)], [0], True, 0.9, list(kernels.SPECTRAL_LIMITS), ranks, *tail)
    svd = ([a], [a.new_empty(5, 5)], [a.new_empty(5)], [a.new_empty(5, 7)], [0], list(kernels.SVD_LIMITS), *tail)
    for operator, arguments in ((torch.ops.fastrank.launch_spectral, spectral), (torch.ops.fastrank.launch_svd, svd)):
        torch.library.opcheck(operator.default, arguments, test_utils=("test_schema",))
