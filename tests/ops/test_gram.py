"""The Gram path where it may work in float32: its error, its ranks, and when it must turn to float64."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from bench_modules import load
from helpers import EPS, l2_relative, randn

from fastrank import ops
from fastrank.ops import _gram, _spectra

N, M = 100, 250
SINGLE = EPS[torch.float32]


@functools.cache
def planted(kind: str, n: int = N, m: int = M) -> torch.Tensor:
    """A float32 matrix with singular values that are flat, decay, are those of a square matrix, or end early."""
    sigma = {
        "flat": np.linspace(1.0, 0.5, n),
        "decaying": np.arange(1, n + 1) ** -0.7,
        "steep": np.logspace(0, -4, n),
        "rank 40": np.where(np.arange(n) < 40, np.linspace(1.0, 0.6, n), 0.0),
        "noise": np.where(np.arange(n) < 40, 1.0, 1e-10),
    }[kind]
    u = torch.linalg.qr(randn(n, n, dtype=torch.float64))[0]
    v = torch.linalg.qr(randn(m, n, seed=1, dtype=torch.float64))[0]
    return ((u * torch.from_numpy(sigma)) @ v.T).float()


KINDS = ("flat", "decaying", "steep", "rank 40", "noise")


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
@pytest.mark.parametrize("energy", [None, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("kind", KINDS)
def test_results_and_ranks_are_float64s(kind, energy, scale):
    w = scale * planted(kind)
    u, s, vh = np.linalg.svd(w.double().numpy(), full_matrices=False)
    numerical = int((s > SINGLE * M * s[0]).sum())
    kept = np.cumsum(s**2) / np.sum(s**2)
    k = numerical if energy is None else min(numerical, int((kept < energy).sum()) + 1)
    for matrix in (w, w.T):
        (g,) = ops.nuclear_subgradient([matrix], energy=energy, backend="gram")
        wanted = torch.from_numpy(u[:, :k] @ vh[:k])
        assert l2_relative(g if matrix is w else g.T, wanted) <= 1e-4
        if energy is not None:
            (p,), (rank,) = ops.project_energy([matrix], energy, backend="gram")
            assert rank == int((kept < energy).sum()) + 1
            exact = torch.from_numpy((u[:, :rank] * s[:rank]) @ vh[:rank])
            assert l2_relative(p if matrix is w else p.T, exact) <= 1e-4
    assert float(ops.nuclear_norm([w], backend="gram")) == pytest.approx(s[:numerical].sum(), rel=1e-5)


def test_float64_is_for_what_float32_does_not_resolve():
    dtypes = {
        (kind, energy): _gram.decompose(planted(kind)[None], _spectra.SUBGRADIENT, energy).values.dtype
        for kind in KINDS
        for energy in (None, 0.9)
    }
    single = {key for key, dtype in dtypes.items() if dtype == torch.float32}
    assert {("flat", None), ("flat", 0.9), ("decaying", 0.9), ("rank 40", 0.9)} <= single
    assert not {("steep", None), ("rank 40", None), ("noise", None)} & single


@pytest.mark.parametrize("energy", [None, 0.9])
def test_a_batch_of_easy_and_hard_matrices(energy):
    """Small enough to be stacked: what one of them needs does not change what the others get."""
    stacked = [planted(kind) for kind in (*KINDS, "flat")]
    assert len(_spectra.groups(stacked)) == 1
    together = ops.nuclear_subgradient(stacked, energy=energy, backend="gram")
    for w, g in zip(stacked, together, strict=True):
        (alone,) = ops.nuclear_subgradient([w], energy=energy, backend="gram")
        assert l2_relative(g, alone) <= 2e-4


def test_one_hard_matrix_leaves_a_batch_of_projections_in_float32():
    held, count = {}, 20
    for last in ("decaying", "noise"):
        found = _gram.decompose(planted(last)[None], _spectra.PROJECTION, 0.9)
        assert found.values.dtype == (torch.float64 if last == "noise" else torch.float32)
        matrices = [*[planted("decaying")] * (count - 1), planted(last)]
        with load("growth_memory").LiveBytes() as live:
            ops.project_energy(matrices, 0.9, backend="gram")
        held[last] = live.peak
    # Eigenvalues and bases of all are then in float64, the matrices are not.
    assert held["noise"] <= held["decaying"] + 8 * count * (N * N + N)


@pytest.mark.parametrize("n", [256, 257, 300])
def test_a_gram_matrix_by_stripes(n):
    a = randn(1, n, 40, dtype=torch.float64)
    g = _spectra.gram(a)
    # Two libraries' products of the same numbers differ by roundings, and so may the two halves of one.
    assert float((g - g.mT).abs().max()) <= 40 * EPS[torch.float64] * float(g.abs().max())
    assert float((g - a @ a.mT).abs().max()) <= 40 * EPS[torch.float64] * float(g.abs().max())


def test_a_tie_at_the_cut_takes_float64_and_a_zero_batch_is_zero():
    w = planted("flat").clone()
    u, s, vh = torch.linalg.svd(w.double(), full_matrices=False)
    s[60] = s[59] * (1 - 1e-9)
    energy = float(s[:60].square().sum() / s.square().sum())
    tied = ((u * s) @ vh).float()
    assert _gram.decompose(tied[None], _spectra.SUBGRADIENT, energy).values.dtype == torch.float64
    for result in (ops.nuclear_subgradient([0 * w])[0], ops.project_energy([0 * w], 0.9)[0][0]):
        assert torch.equal(result, 0 * w)
