"""CP of every filter: exact where it can be, never far above the bounds elsewhere, and no term without end."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import tensorly
import torch
from helpers import EPS, l2_relative, randn
from tensorly.decomposition import parafac
from test_decompose import F64, KERNELS, kernel

from fastrank import decompose
from fastrank.decompose import _als, _filters, _gauss_newton


def errors(weight, found):
    """Relative error of each filter."""
    found = decompose.CPFilters(*(f.double() for f in found))
    weight = weight.double()
    return (found.weight() - weight).flatten(1).norm(dim=1) / weight.flatten(1).norm(dim=1)


def cp_errors(weight, rank, **options):
    return errors(weight, decompose.cp_filters(weight, rank, **options))


def largest_terms(weight, found):
    """The largest term of each filter, as a multiple of the filter."""
    sizes = math.prod(f.double().norm(dim=2) for f in found)
    return sizes.amax(0) / weight.double().flatten(1).norm(dim=1)


def planted(filters, channels, kh, kw, rank, seed=0):
    factors = (randn(rank, filters, n, seed=seed + i, dtype=F64) for i, n in enumerate((channels, kh, kw)))
    return torch.einsum("roi,roy,rox->oiyx", *factors)


def without_best_approximation(filters, channels=6, kernel=3):
    """Filters of border rank 2 and rank 3, x∘x∘y + x∘y∘x + y∘x∘x: two terms come arbitrarily near, and diverge."""
    (a, b, c), (d, e, f) = (
        [torch.nn.functional.normalize(randn(filters, n, seed=s + i, dtype=F64), dim=1) for i, n in enumerate(sizes)]
        for s, sizes in ((0, (channels, kernel, kernel)), (5, (channels, kernel, kernel)))
    )
    return sum(torch.einsum("oi,oy,ox->oiyx", *term) for term in ((a, b, f), (a, e, c), (d, b, c)))


def pixel_bound(weight, rank):
    """No rank-R sum is nearer to a filter than its pixels' R principal directions: relative error of each filter."""
    spectra = np.linalg.svd(weight.double().flatten(2).numpy(), compute_uv=False) ** 2
    return np.sqrt(spectra[:, rank:].sum(1) / spectra.sum(1))


@pytest.mark.parametrize("shape", KERNELS)
def test_exact_at_one_term_a_pixel_and_at_the_singular_triples_of_all_channels(shape):
    for rank in {shape[2] * shape[3], min(shape[2] * shape[3], shape[1] * min(shape[2:]))}:
        for dtype in EPS:
            weight = kernel(shape, dtype)
            found = decompose.cp_filters(weight, rank)
            assert {f.dtype for f in found} == {dtype}
            assert tuple(tuple(f.shape) for f in found) == tuple((rank, shape[0], n) for n in shape[1:])
            bound = {F64: 1e-12, torch.float32: 1e-5}.get(dtype, 4 * EPS[dtype])
            assert float(errors(weight, found).max()) <= bound


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e15])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(("channels", "kh", "kw"), [(6, 3, 4), (40, 3, 3), (12, 5, 5)])
def test_planted_ranks_are_found_in_every_filter(channels, kh, kw, rank, scale):
    weight = planted(60, channels, kh, kw, rank, seed=rank) * scale
    assert float(cp_errors(weight, rank).max()) <= 1e-6
    # float32 entries are off by EPS/2; the three factors round once more each.
    assert float(cp_errors(weight.float(), rank).max()) <= 8 * EPS[torch.float32]


@pytest.mark.parametrize("rank", [4, 5, 6])
def test_planted_ranks_near_the_typical_one_are_found_in_most_filters(rank):
    found = cp_errors(planted(100, 32, 3, 3, rank), rank)
    assert float((found <= 1e-6).double().mean()) >= 0.9
    assert float(found.max()) <= 0.03


def test_gauss_newton_converges_quadratically_near_an_exact_fit(monkeypatch):
    weight = planted(20, 12, 3, 3, 3)
    pixels = (weight / weight.flatten(1).norm(dim=1)[:, None, None, None]).flatten(2)
    truth = [randn(3, 20, n, seed=i + 1, dtype=F64).transpose(0, 1) for i, n in enumerate((3, 3))]
    starts = [v * (1 + 0.03 * randn(*v.shape, seed=7, dtype=F64)) for v in truth]
    reached = []
    for steps in range(7):
        monkeypatch.setattr(_gauss_newton, "STEPS", steps)
        reached.append(float(_gauss_newton.refine(pixels.mT @ pixels, *starts)[0].median().clamp(min=0).sqrt()))
    assert reached[0] > 3e-3
    # Each step squares an error, up to the curvature, until it meets float64's rounding of a squared error.
    assert all(after <= max(1e2 * before**2, 1e-7) for before, after in itertools.pairwise(reached))
    assert reached[-1] <= 1e-7


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_the_scale_does_not_matter(scale):
    weight = kernel((6, 5, 3, 3))
    small = decompose.cp_filters(weight * scale, 2).weight() / scale
    assert l2_relative(small, decompose.cp_filters(weight, 2).weight()) <= 1e-6


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_no_filter_gets_worse_with_more_sweeps(rank):
    weight = kernel((10, 7, 3, 3))
    found = torch.stack([cp_errors(weight, rank, max_iter=n, tol=0.0) for n in (*range(1, 24), 40, 64, 65, 200)])
    assert float(found[0].max()) < 1
    # The search works on squared errors, which float64 resolves to 1e-16: their roots, at these sizes, to 1e-14.
    assert float((found[1:] - found[:-1]).max()) <= 1e-12
    assert float((found[0] - found[-1]).min()) > 0


@pytest.mark.parametrize("shape", [(10, 7, 3, 3), (10, 1, 3, 3), (10, 2, 3, 3), (4, 12, 3, 5), (6, 3, 3, 1)])
def test_the_error_falls_over_the_ranks_and_respects_its_bounds(shape):
    """Every search ends in a local optimum, so neighbouring ranks may trade places by a little."""
    weight, top = kernel(shape), shape[2] * shape[3]
    found = [cp_errors(weight, rank) for rank in range(1, top + 1)]
    means = [float(f.square().mean().sqrt()) for f in found]
    assert means[-1] <= 1e-12
    assert all(after <= before * 1.02 + 1e-6 for before, after in itertools.pairwise(means))
    # A rank-1 term fits at least the strongest of the kh·kw pixels of a filter: ‖W‖²(1 − 1/(kh·kw)) is left at most.
    assert float(found[0].max()) <= math.sqrt(1 - 1 / top) + 1e-9
    for rank, each in enumerate(found, 1):
        assert bool((each.numpy() >= pixel_bound(weight, rank) - 1e-7).all())


@pytest.mark.parametrize(("rank", "slack"), [(6, 1.02), (7, 1.02), (8, 1.02)])
def test_high_ranks_of_a_3x3_kernel_reach_the_bound_of_its_pixels(rank, slack):
    """From R = 6 on, every space of 3×3 images of R dimensions but for a few is spanned by images of rank 1."""
    weight = kernel((24, 64, 3, 3))
    assert float(cp_errors(weight, rank).mean()) <= slack * pixel_bound(weight, rank).mean()


@pytest.mark.parametrize("rank", [2, 4, 8])
def test_errors_and_terms_against_one_parafac_a_filter(rank):
    weight = kernel((8, 64, 3, 3))
    theirs, largest = [], []
    for each in weight.numpy():
        cp = parafac(each, rank)
        theirs.append(np.linalg.norm(tensorly.cp_to_tensor(cp) - each) / np.linalg.norm(each))
        sizes = math.prod(np.linalg.norm(f, axis=0) for f in cp.factors)
        largest.append(sizes.max() / np.linalg.norm(each))
    found = decompose.cp_filters(weight, rank)
    assert float(errors(weight, found).mean()) <= 1.002 * np.mean(theirs)
    assert float(largest_terms(weight, found).max()) <= 2
    assert rank < 8 or max(largest) > 2


@pytest.mark.parametrize("rank", range(1, 9))
@pytest.mark.parametrize("shape", [(32, 16, 3, 3), (16, 3, 3, 3), (8, 6, 5, 5)])
def test_no_term_is_larger_than_five_times_its_filter(shape, rank):
    weight = kernel(shape)
    found = decompose.cp_filters(weight, rank)
    assert float(largest_terms(weight, found).max()) <= _als.LARGEST_TERM * (1 + 1e-9)


def test_filters_without_a_best_approximation_get_a_bounded_one():
    weight = without_best_approximation(20)
    found = decompose.cp_filters(weight, 2, max_iter=1000, tol=0.0)
    assert float(largest_terms(weight, found).max()) <= _als.LARGEST_TERM * (1 + 1e-9)
    # Two terms of size t leave an error of the order 1/t²: the bound costs that much and no more.
    assert float(errors(weight, found).max()) <= 1 / _als.LARGEST_TERM**2
    # Without the bound they would go on growing.
    free = [parafac(weight[0].numpy(), 2, n_iter_max=n, tol=0).factors for n in (100, 1000)]
    before, after = (math.prod(np.linalg.norm(f, axis=0) for f in factors).max() for factors in free)
    assert after > 1.3 * before


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_terms_are_balanced_and_zero_filters_stay_zero(rank):
    weight = kernel((6, 5, 3, 3))
    weight[2] = 0
    weight[4, :, 1] = 0
    found = decompose.cp_filters(weight, rank)
    norms = torch.stack([f.norm(dim=2) for f in found])
    assert bool(torch.isfinite(norms).all())
    assert float((norms - norms[0]).abs().max()) <= 1e-12 * float(norms.max())
    assert not any(bool(f[:, 2].any()) for f in found)
    zeros = decompose.cp_filters(torch.zeros(3, 4, 3, 3), rank)
    assert not any(bool(f.any()) for f in zeros)


def test_the_result_is_determined_by_the_seed(monkeypatch):
    """The seed draws the random starts, which only nearly exact filters need."""
    weight = planted(40, 6, 3, 4, 6)
    state = torch.get_rng_state()
    first = decompose.cp_filters(weight, 6, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.randn(5)
    again, other = decompose.cp_filters(weight, 6, seed=7), decompose.cp_filters(weight, 6, seed=8)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.pointwise, other.pointwise)
    # The random starts are worth having.
    monkeypatch.setattr(_filters, "RETRIES", 0)
    alone = cp_errors(weight, 6)
    assert float(errors(weight, first).square().sum()) < 0.9 * float(alone.square().sum())


def test_a_filter_is_fitted_in_company_as_it_is_alone():
    """Also one a million times smaller than its neighbours."""
    small = kernel((1, 5, 3, 3), seed=1) * 1e-6
    together = decompose.cp_filters(torch.cat([kernel((3, 5, 3, 3)), small]), 4).weight()[3:]
    assert l2_relative(together, decompose.cp_filters(small, 4).weight()) <= 1e-9


def test_gradients_of_the_weight_are_not_tracked():
    weight = kernel((4, 5, 3, 3)).requires_grad_()
    assert not any(f.requires_grad for f in (*decompose.cp_filters(weight, 2), *decompose.cp_layer(weight, 2)))
