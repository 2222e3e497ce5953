"""CP of a whole kernel: closed forms, planted ranks, bounds, and what each algorithm promises of its terms."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import tensorly
import torch
from helpers import EPS, l2_relative, randn
from tensorly.decomposition import parafac
from test_decompose import F64, KERNELS, kernel, sigma

from fastrank import decompose
from fastrank.decompose import _als

ALGORITHMS = ("als", "greedy")


def top(shape):
    return shape[2] * shape[3] * min(shape[:2])


def error(weight, rank, **options):
    return l2_relative(decompose.cp_layer(weight, rank, **options).weight(), weight)


def sizes(found):
    """The norm of every term."""
    w_in, depthwise, w_out = (f.double() for f in found)
    return w_in.norm(dim=1) * depthwise.flatten(1).norm(dim=1) * w_out.norm(dim=0)


def planted(o, i, kh, kw, rank, seed=0):
    factors = (randn(*size, seed=seed + n, dtype=F64) for n, size in enumerate(((o, rank), (rank, i), (rank, kh, kw))))
    return torch.einsum("or,ri,ryx->oiyx", *factors)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("shape", KERNELS)
def test_exact_at_the_largest_rank(shape, algorithm):
    rank = top(shape)
    for dtype in EPS:
        weight = kernel(shape, dtype)
        found = decompose.cp_layer(weight, rank, algorithm=algorithm)
        assert {f.dtype for f in found} == {dtype}
        assert tuple(tuple(f.shape) for f in found) == ((rank, shape[1]), (rank, *shape[2:]), (shape[0], rank))
        bound = {F64: 1e-12, torch.float32: 1e-5}.get(dtype, 4 * EPS[dtype])
        assert l2_relative(decompose.CPLayer(*(f.double() for f in found)).weight(), weight) <= bound


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("shape", [(7, 4, 1, 1), (4, 7, 1, 1)])
def test_1x1_kernels_get_the_truncated_svd(shape, algorithm):
    weight = kernel(shape)
    spectrum = sigma(weight, "mode4")
    for rank in range(1, 5):
        found = decompose.cp_layer(weight, rank, algorithm=algorithm)
        np.testing.assert_allclose(sizes(found), spectrum[:rank], rtol=1e-12)
        left = float((found.weight() - weight).square().sum())
        assert left == pytest.approx((spectrum[rank:] ** 2).sum(), abs=1e-12 * (spectrum**2).sum())


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e15])
@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("shape", [(14, 12, 3, 3), (9, 20, 3, 1), (24, 10, 5, 5)])
def test_als_finds_planted_ranks(shape, rank, scale):
    weight = planted(*shape, rank) * scale
    assert error(weight, rank, max_iter=300, tol=0.0) <= 1e-6
    assert error(weight.float(), rank, max_iter=300, tol=0.0) <= 8 * EPS[torch.float32]
    assert rank == 1 or error(weight, rank - 1, max_iter=300, tol=0.0) > 1e-2


@pytest.mark.parametrize("shape", KERNELS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_error_falls_over_the_ranks_and_respects_the_bounds(shape, algorithm):
    """CP of rank R has mode ranks of R at most, so what the unfoldings lose by a cut is lost at least."""
    weight = kernel(shape)
    spectra = [sigma(weight, name) for name in ("mode3", "mode4")]
    ranks = sorted({1, 2, 3, top(shape) // 2, top(shape) - 1, top(shape)} - {0})
    found = [error(weight, rank, algorithm=algorithm) for rank in ranks]
    assert all(after <= before * 1.005 + 1e-7 for before, after in itertools.pairwise(found))
    for rank, each in zip(ranks, found, strict=True):
        floor = max(math.sqrt((s[rank:] ** 2).sum() / (s**2).sum()) for s in spectra)
        assert each >= floor - 1e-7
    # The strongest of the slices' singular triples is a term.
    slices = torch.linalg.svdvals(weight.flatten(2).permute(2, 0, 1))
    if algorithm == "als":
        assert found[0] <= math.sqrt(1 - float(slices.max() / weight.norm()) ** 2) + 1e-9


@pytest.mark.parametrize("rank", [2, 8, 24])
def test_als_never_gets_worse_with_more_sweeps(rank):
    weight = kernel((12, 10, 3, 3))
    found = [error(weight, rank, max_iter=n, tol=0.0) for n in (*range(1, 13), 20, 21, 40)]
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(found))
    assert found[-1] < found[0] < 1


@pytest.mark.parametrize("rank", [3, 12])
def test_als_is_as_good_as_parafac_and_bounds_its_terms(rank):
    weight = kernel((16, 12, 3, 3))
    theirs = []
    for seed in range(2):
        cp = parafac(weight.flatten(2).numpy(), rank, init="random", random_state=seed, n_iter_max=200)
        theirs.append(np.linalg.norm(tensorly.cp_to_tensor(cp) - weight.flatten(2).numpy()) / float(weight.norm()))
    found = decompose.cp_layer(weight, rank)
    assert l2_relative(found.weight(), weight) <= 1.005 * np.mean(theirs)
    assert float(sizes(found).max() / weight.norm()) <= 1


def test_a_kernel_without_a_best_approximation_gets_a_bounded_one():
    """x∘x∘y + x∘y∘x + y∘x∘x has rank 3, and sums of two terms come arbitrarily near, with terms that grow."""
    x, y = ([randn(n, seed=s + n, dtype=F64) for n in (6, 5, 9)] for s in (0, 50))
    x, y = ([v / v.norm() for v in vectors] for vectors in (x, y))
    triples = ((x[0], x[1], y[2]), (x[0], y[1], x[2]), (y[0], x[1], x[2]))
    weight = sum(torch.einsum("o,i,k->oik", *each) for each in triples).unflatten(2, (3, 3))
    found = decompose.cp_layer(weight, 2, max_iter=2000, tol=0.0)
    assert float(sizes(found).max() / weight.norm()) <= _als.LARGEST_TERM * (1 + 1e-9)
    # Two terms of size t leave an error of the order 1/t².
    assert l2_relative(found.weight(), weight) <= 1 / _als.LARGEST_TERM**2


def test_greedy_takes_one_term_after_the_other_off_what_is_left():
    weight = kernel((10, 8, 3, 3))
    found = decompose.cp_layer(weight, 30, algorithm="greedy")
    steps = [decompose.cp_layer(weight, rank, algorithm="greedy") for rank in (1, 2, 10)]
    energy = float(weight.square().sum())
    for each in (*steps, found):
        # A term is the best multiple of its unit tensor, so its energy is what the error loses.
        left = float((each.weight() - weight).square().sum())
        assert left == pytest.approx(energy - float(sizes(each).square().sum()), abs=1e-12 * energy)
    # The terms of a lower rank are among those of a higher one.
    for each in steps:
        assert all(float((sizes(found) - size).abs().min()) <= 1e-12 for size in sizes(each))


def test_greedy_finds_the_first_term_of_a_planted_kernel_and_als_the_rest():
    weight = planted(12, 10, 3, 3, 1)
    assert error(weight, 1, algorithm="greedy", tol=1e-12) <= 1e-6
    weight = weight + 0.2 * planted(12, 10, 3, 3, 2, seed=5)
    by_greedy, by_als = (error(weight, 3, algorithm=name) for name in ("greedy", "als"))
    assert by_als <= 1e-3
    assert by_als < by_greedy < error(weight, 1, algorithm="greedy")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("rank", [1, 7, 60, 72])
def test_terms_are_balanced_and_sorted(rank, algorithm):
    weight = kernel((8, 8, 3, 3))
    found = decompose.cp_layer(weight, rank, algorithm=algorithm)
    norms = torch.stack([found.w_in.norm(dim=1), found.depthwise.flatten(1).norm(dim=1), found.w_out.norm(dim=0)])
    assert float((norms - norms[0]).abs().max()) <= 1e-12 * float(norms.max())
    assert bool((norms[0, 1:] <= norms[0, :-1] * (1 + 1e-12)).all())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_zero_kernels_stay_zero(algorithm):
    found = decompose.cp_layer(torch.zeros(4, 3, 3, 3), 5, algorithm=algorithm)
    assert not any(bool(f.any()) for f in found)
    weight = kernel((6, 5, 3, 3))
    weight[1:] = 0
    for rank in (1, 5, 20):
        found = decompose.cp_layer(weight, rank, algorithm=algorithm)
        assert all(bool(f.isfinite().all()) for f in found)
        assert l2_relative(found.weight(), weight) <= (1.0 if rank == 1 else 0.9 if rank == 5 else 1e-5)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_the_scale_does_not_matter(scale):
    weight = kernel((8, 7, 3, 3))
    for algorithm in ALGORITHMS:
        found = decompose.cp_layer(weight * scale, 6, algorithm=algorithm).weight() / scale
        assert l2_relative(found, decompose.cp_layer(weight, 6, algorithm=algorithm).weight()) <= 1e-6


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_result_is_determined_by_its_seed_alone(algorithm):
    weight, state = planted(9, 8, 3, 3, 14), torch.get_rng_state()
    first = decompose.cp_layer(weight, 12, algorithm=algorithm, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.randn(3)
    again = decompose.cp_layer(weight, 12, algorithm=algorithm, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    others = [decompose.cp_layer(weight, 12, algorithm=algorithm, seed=s) for s in range(4, 9)]
    assert not all(torch.equal(first.w_in, other.w_in) for other in others)
