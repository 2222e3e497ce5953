"""By Gram matrices in float64, truncations of float32 kernels are as good as a true SVD's, also ill-conditioned."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import EPS, randn
from test_decompose import F64, SPLIT, merged, tops

from fastrank import decompose
from fastrank.decompose import _spectral

SPECTRA = {
    "flat": lambda n: torch.ones(n, dtype=F64),
    "steep": lambda n: torch.logspace(0, -12, n, dtype=F64),
    "cut": lambda n: (torch.arange(n) < n // 2).double(),
    "zero": lambda n: torch.zeros(n, dtype=F64),
}


def matrix(rows, columns, spectrum):
    """A float32 matrix of about the given singular values, which is what counts as exact from here on."""
    count = min(rows, columns)
    u = torch.linalg.qr(randn(rows, count, dtype=F64))[0]
    v = torch.linalg.qr(randn(columns, count, seed=1, dtype=F64))[0]
    return ((u * SPECTRA[spectrum](count)) @ v.T).float()


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (12, 40), (40, 12), (30, 30), (64, 576)])
def test_every_truncation_leaves_the_tail_energy(rows, columns, spectrum):
    given = matrix(rows, columns, spectrum)
    u, s, vh = _spectral.svd(given)
    exact, wide = np.linalg.svd(given.double().numpy(), compute_uv=False), given.double()
    energy, count = float((exact**2).sum()), min(rows, columns)
    assert (u.shape, s.shape, vh.shape) == ((rows, count), (count,), (count, columns))
    assert u.dtype == F64
    for rank in {1, count // 2, count - 1, count} - {0}:
        left = float((wide - (u[:, :rank] * s[:rank]) @ vh[:rank]).square().sum())
        # The Gram matrix is off by (columns + rows) roundings of its trace at most, and so is the energy of any basis.
        assert left == pytest.approx((exact[rank:] ** 2).sum(), abs=(rows + columns) * EPS[F64] * energy + 1e-300)
    # All triples multiply to the matrix to rounding.
    assert float((wide - (u * s) @ vh).norm()) <= 2 * (rows + columns) * EPS[F64] * float(wide.norm()) + 1e-300
    # Singular values are off by the same part of an energy: by 1e-8 of the largest at worst.
    np.testing.assert_allclose(s, exact, rtol=0, atol=1e-7 * exact.max(initial=0))


@pytest.mark.parametrize("scale", [1e-38, 1e38])
def test_any_scale_of_float32(scale):
    given = matrix(10, 30, "cut") * scale
    u, s, vh = _spectral.svd(given)
    assert float(((u * s) @ vh - given.double()).norm()) <= 1e-12 * float(given.double().norm())


def test_a_batch_is_its_matrices():
    batch = torch.stack([matrix(9, 20, name) for name in SPECTRA])
    for index, (u, s, vh) in enumerate(zip(*_spectral.svd_batch(batch), strict=True)):
        # Vectors within a gap of the spectrum mix as roundings fall: what they multiply to does not.
        left, values, right = _spectral.svd(batch[index])
        torch.testing.assert_close((u * s) @ vh, (left * values) @ right, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(u.mT @ u, torch.eye(9, dtype=u.dtype), rtol=1e-12, atol=1e-12)
        gap = 1e-7 * float(values.max())  # squared, this is a rounding
        torch.testing.assert_close(s, values, rtol=1e-7, atol=gap)


def test_float64_keeps_its_digits():
    """A Gram matrix would lose all but the first 1e-8 of this spectrum."""
    u = torch.linalg.qr(randn(20, 20, dtype=F64))[0]
    given = (u * torch.logspace(0, -14, 20, dtype=F64)) @ torch.linalg.qr(randn(20, 20, seed=1, dtype=F64))[0]
    np.testing.assert_allclose(_spectral.svd(given)[1], torch.logspace(0, -14, 20, dtype=F64), rtol=0, atol=1e-15)


@pytest.mark.parametrize("scheme", SPLIT)
@pytest.mark.parametrize("spectrum", ["flat", "steep", "cut"])
def test_float32_kernels_are_cut_as_well_as_float64_ones(scheme, spectrum):
    shape = (24, 18, 3, 3)
    weight = decompose.fold(matrix(24, 162, spectrum), "channel", shape)
    wide = weight.double().numpy()
    if scheme == "decoupled":
        spectra = np.linalg.svd(weight.double().flatten(2).numpy(), compute_uv=False)
    else:
        spectra = np.linalg.svd(decompose.unfold(weight.double(), scheme).numpy(), compute_uv=False)[None]
    norm = np.linalg.norm(wide)
    for rank in {1, tops(shape)[scheme] // 2, tops(shape)[scheme]}:
        left = np.linalg.norm(merged(scheme, *SPLIT[scheme](weight, rank)) - wide)
        tail = np.sqrt((spectra[:, rank:] ** 2).sum())
        # Rounding both factors to float32: EPS of Σ |first| |second|, of norm √rank · ‖W‖ at most. The Gram matrix:
        # the root of a few hundred roundings of the energy, where nothing else is left.
        slack = (EPS[torch.float32] * np.sqrt(rank) + np.sqrt(400 * EPS[F64]) * (tail < 1e-6 * norm)) * norm
        assert tail - slack <= left <= tail + slack


@pytest.mark.parametrize("spectrum", ["flat", "steep", "cut"])
def test_tucker2_of_ill_conditioned_float32_kernels_keeps_the_best_energy(spectrum):
    weight = decompose.fold(matrix(24, 162, spectrum), "channel", (24, 18, 3, 3))
    for name, factor in (("mode3", "w_in"), ("mode4", "w_out")):
        unfolded = decompose.unfold(weight.double(), name)
        exact = np.linalg.svd(unfolded.numpy(), compute_uv=False) ** 2
        for rank in {1, len(exact) // 2, len(exact)}:
            ranks = (rank, 24) if name == "mode3" else (18, rank)
            basis = getattr(decompose.tucker2(weight, ranks), factor).double()
            basis = basis.T if name == "mode3" else basis
            kept = float((basis.T @ unfolded).square().sum())
            # Basis vectors rounded to float32 lose and gain EPS of what they see.
            assert kept == pytest.approx(exact[:rank].sum(), rel=8 * EPS[torch.float32])
