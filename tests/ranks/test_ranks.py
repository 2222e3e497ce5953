"""Ranks from spectra: the energy rule to the last tie, EVBMF on planted matrices of any scale, published tables."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers import planted_tucker, randn
from hypothesis import given
from hypothesis import strategies as st

from fastrank import ranks
from fastrank.decompose import unfold
from fastrank.nn import FusedTucker2Conv

F64 = torch.float64


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=12),
    st.integers(1, 16),
    st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    st.integers(-10, 10),
    st.randoms(use_true_random=False),
)
def test_energy_rank_is_the_exact_rule(values, sixteenths, dtype, exponent, random):
    """Integers times a power of two and energies in sixteenths are exact in every dtype, so equality is equality."""
    energy = Fraction(sixteenths, 16)
    ordered = sorted(values, reverse=True)
    total = sum(v * v for v in values)
    wanted = next(k for k in range(1, len(values) + 1) if sum(v * v for v in ordered[:k]) >= energy * total)
    random.shuffle(values)
    assert ranks.energy_rank(torch.tensor(values, dtype=F64).mul(2.0**exponent).to(dtype), float(energy)) == wanted


@pytest.mark.parametrize(
    ("values", "energy", "wanted"),
    [
        ([3.0, 4.0], 0.64, 1),
        ([3.0, 4.0], 0.6400001, 2),
        ([1.0] * 4, 0.5, 2),
        ([1.0] * 4, 0.75, 3),
        ([1.0] * 4, 1.0, 4),
        ([5.0, 0.0, 0.0], 1.0, 1),
        ([0.0, 0.0], 0.9, 1),
        ([0.0], 1.0, 1),
        ([2.0, 1.0, 1e-3], 1.0, 3),
        ([1.0], 1e-300, 1),
    ],
)
def test_energy_rank_at_ties_zeros_and_the_whole(values, energy, wanted):
    assert ranks.energy_rank(torch.tensor(values), energy) == wanted


def test_energy_is_summed_in_float64():
    # In float32 the 4,096 ones are lost one by one beside 1e4² = 1e8, whose spacing is 8.
    spectrum = torch.cat([torch.tensor([1e4]), torch.ones(4096)])
    assert ranks.energy_rank(spectrum, 1.0) == 4097
    assert ranks.energy_rank(spectrum, (1e8 + 2048.5) / (1e8 + 4096)) == 2050


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e-30, 1e30, 1e200, 1e300])
def test_energy_rank_does_not_depend_on_the_scale(scale):
    assert ranks.energy_rank(torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=F64) * scale, 0.9) == 3


def test_threshold_rank():
    spectrum = torch.tensor([0.2, 0.05, 1.0, 0.049], dtype=F64)
    found = [ranks.threshold_rank(spectrum, t) for t in (0.0, 0.05, 0.2, 1.0, 2.0)]
    assert found == [4, 3, 2, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (6, 6), (5, 40), (40, 5), (0, 3), (3, 0)])
def test_singular_values_agree_with_float64(shape, dtype):
    for scale in (1.0,) if dtype is torch.float16 else (1e-30, 1.0, 1e30):
        matrix = (randn(*shape, dtype=F64) * scale).to(dtype)
        found = ranks.singular_values(matrix)
        wanted = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
        assert found.dtype == F64
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-7 * wanted.max(initial=0.0))
        assert bool((found[1:] <= found[:-1]).all())
    assert not ranks.singular_values(torch.zeros(shape, dtype=dtype)).any()


def planted(rows, columns, rank, noise, seed=0):
    u = torch.linalg.qr(randn(rows, max(rank, 1), seed=seed, dtype=F64))[0][:, :rank]
    v = torch.linalg.qr(randn(columns, max(rank, 1), seed=seed + 1, dtype=F64))[0][:, :rank]
    size = math.sqrt(rows * columns)
    return size * torch.linspace(2, 1, max(rank, 1), dtype=F64)[:rank].mul(u) @ v.T + noise * randn(
        rows, columns, seed=seed + 2, dtype=F64
    )


@pytest.mark.parametrize("rank", [0, 1, 3, 8])
@pytest.mark.parametrize(("rows", "columns"), [(40, 40), (40, 90), (128, 300), (20, 500)])
def test_vbmf_recovers_planted_ranks_in_any_orientation_and_scale(rows, columns, rank):
    for seed in (0, 10, 20):
        for noise in (0.01, 0.1) if rank else (0.1,):
            matrix = planted(rows, columns, rank, noise, seed)
            for scale in (1e-30, 1e-4, 1.0, 1e30):
                assert ranks.vbmf_rank(matrix * scale) == rank
                assert ranks.vbmf_rank(matrix.T * scale) == rank
                assert ranks.vbmf_rank((matrix * scale).float()) == rank
            for half in (torch.float16, torch.bfloat16):
                assert ranks.vbmf_rank(matrix.to(half)) == rank
                assert ranks.vbmf_rank(matrix.T.to(half)) == rank


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_vbmf_of_noiseless_matrices(rank, dtype):
    assert ranks.vbmf_rank((randn(30, rank, dtype=F64) @ randn(rank, 50, seed=1, dtype=F64)).to(dtype)) == rank


@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (30, 1), (2, 2)])
def test_vbmf_of_the_smallest_matrices_is_an_int_in_range(shape):
    assert 0 <= ranks.vbmf_rank(randn(*shape)) <= min(shape)
    assert ranks.vbmf_rank(torch.zeros(shape)) == 0
    assert ranks.vbmf_rank(torch.ones(shape)) <= 1


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 999), st.integers(-20, 20))
def test_vbmf_is_blind_to_scale_and_orientation(rows, columns, seed, exponent):
    matrix = randn(rows, columns, seed=seed, dtype=F64) * torch.logspace(0, -2, columns, dtype=F64)
    rank = ranks.vbmf_rank(matrix)
    assert 0 <= rank <= min(rows, columns)
    assert ranks.vbmf_rank(matrix.T * 2.0**exponent) == rank


def evbmf_by_brute_force(matrix):
    """Nakajima et al. 2013, corollary 1 and theorem 2, as published: the free energy on 6,000 noise variances."""
    rows, columns = matrix.shape
    s2, alpha = np.linalg.svd(matrix, compute_uv=False) ** 2, rows / columns
    tau_bar = 2.5129 * math.sqrt(alpha)
    x_bar = (1 + tau_bar) * (1 + alpha / tau_bar)
    most = min(math.ceil(rows / (1 + alpha)) - 1, rows - 1)
    low, high = max(s2[most] / (columns * x_bar), s2[most:].mean() / columns), s2.sum() / (rows * columns)
    energies = []
    variances = np.geomspace(low, high, 6_000)
    for variance in variances:
        x = s2 / (columns * variance)
        z1, z2 = x[x > x_bar], x[x <= x_bar]
        tau = 0.5 * (z1 - (1 + alpha) + np.sqrt((z1 - (1 + alpha)) ** 2 - 4 * alpha))
        signal = z1 - tau + np.log((tau + 1) / z1) + alpha * np.log(tau / alpha + 1)
        energies.append((z2 - np.log(z2)).sum() + signal.sum())
    return int((s2 > columns * variances[int(np.argmin(energies))] * x_bar).sum())


@pytest.mark.parametrize("shape", [(12, 16), (10, 60), (24, 24)])
def test_vbmf_is_the_published_minimum_also_where_signal_and_noise_mix(shape):
    found = set()
    for seed in range(12):
        decay = torch.linspace(2.5, 0.1, shape[0], dtype=F64)[:, None] ** (1 + seed % 4)
        matrix = decay * randn(*shape, seed=seed, dtype=F64) + 0.3 * randn(*shape, seed=seed + 99, dtype=F64)
        found.add(ranks.vbmf_rank(matrix))
        assert ranks.vbmf_rank(matrix) == evbmf_by_brute_force(matrix.numpy())
    assert len(found) > 2


def test_vbmf_finds_the_tucker_ranks_of_a_noisy_kernel():
    weight = planted_tucker(64, 32, 3, (4, 6)) + 0.05 * randn(64, 32, 3, 3, seed=9, dtype=F64)
    assert [ranks.vbmf_rank(unfold(weight, mode)) for mode in ("mode3", "mode4")] == [4, 6]


def test_spectra_of_a_default_convolution():
    """A uniform start of variance 1/(3·1152): by Marchenko–Pastur σ² runs from (√n+√m)² to (√n−√m)² of it."""
    torch.manual_seed(0)
    weight = torch.nn.Conv2d(128, 256, 3).weight
    for mode, first, last in (("mode3", 1.00, 0.40), ("mode4", 0.71, 0.095)):
        squares = ranks.singular_values(unfold(weight, mode)).square()
        assert float(squares[0]) == pytest.approx(first, rel=0.03)
        assert float(squares[-1]) == pytest.approx(last, rel=0.05)


TABLE = [
    ((256, 256), (168, 176), 354_176),
    ((256, 512), (194, 275), 670_614),
    ((512, 512), (332, 328), 1_317_984),
    ((512, 512), (348, 342), 1_424_424),
    ((512, 512), (382, 392), 1_743_984),
    ((256, 256), (144, 141), 255_696),
    ((256, 512), (222, 299), 807_322),
    ((512, 512), (292, 212), 815_184),
    ((512, 512), (160, 69), 216_608),
    ((512, 512), (31, 39), 46_721),
]


@pytest.mark.parametrize(("channels", "pair", "wanted"), TABLE)
def test_parameters_of_the_published_nrmf_table(channels, pair, wanted):
    layer = FusedTucker2Conv(*channels, 3, pair, padding=1, bias=False, device="meta")
    assert sum(stage.params for stage in layer.conv_stages((7, 7))) == wanted
    assert sum(p.numel() for p in layer.parameters()) == wanted


SPECTRUM = torch.ones(3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ranks.energy_rank([1.0], 0.5), TypeError, r"singular_values must be a torch.Tensor, got list"),
        (
            lambda: ranks.energy_rank(torch.ones(2, 2), 0.5),
            ValueError,
            r"singular_values must be of shape \(any\) = \(n,\), got \(2, 2\)",
        ),
        (
            lambda: ranks.energy_rank(torch.ones(0), 0.5),
            ValueError,
            r"singular_values must be at least one value, got none",
        ),
        (lambda: ranks.energy_rank(-SPECTRUM, 0.5), ValueError, r"singular_values must be non-negative, got -1"),
        (lambda: ranks.energy_rank(SPECTRUM / 0, 0.5), ValueError, r"singular_values must be finite"),
        (
            lambda: ranks.energy_rank(SPECTRUM.long(), 0.5),
            TypeError,
            r"singular_values must be a floating-point tensor",
        ),
        (lambda: ranks.energy_rank(SPECTRUM, 0), ValueError, r"energy must be a finite number in \(0, 1\], got 0"),
        (lambda: ranks.energy_rank(SPECTRUM, 1.5), ValueError, r"energy must be a finite number in \(0, 1\], got 1.5"),
        (lambda: ranks.energy_rank(SPECTRUM, "0.9"), TypeError, r"energy must be a number, got str"),
        (
            lambda: ranks.threshold_rank(SPECTRUM, -1),
            ValueError,
            r"threshold must be a finite number at least 0, got -1",
        ),
        (lambda: ranks.threshold_rank(SPECTRUM, True), TypeError, r"threshold must be a number, got bool"),
        (lambda: ranks.vbmf_rank(torch.ones(3)), ValueError, r"matrix must be of shape \(any, any\)"),
        (lambda: ranks.vbmf_rank(torch.ones(0, 3)), ValueError, r"matrix must be non-empty, got shape \(0, 3\)"),
        (lambda: ranks.vbmf_rank(torch.full((2, 2), math.nan)), ValueError, r"matrix must be finite"),
        (lambda: ranks.vbmf_rank(None), TypeError, r"matrix must be a torch.Tensor, got NoneType"),
        (lambda: ranks.singular_values([1.0]), TypeError, r"matrix must be a torch.Tensor, got list"),
        (lambda: ranks.singular_values(torch.ones(3)), ValueError, r"matrix must be of shape \(any, any\)"),
        (lambda: ranks.singular_values(torch.ones(2, 2) / 0), ValueError, r"matrix must be finite"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()


def test_ranks_fall_with_the_energy():
    spectrum = ranks.singular_values(randn(30, 50))
    found = [ranks.energy_rank(spectrum, e) for e in (1.0, 0.98, 0.95, 0.92, 0.5, 0.1, 1e-6)]
    assert all(b <= a for a, b in itertools.pairwise(found))
    assert (found[0], found[-1]) == (30, 1)
