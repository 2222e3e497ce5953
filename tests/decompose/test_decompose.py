"""The decompositions reach the bounds that theory gives them, at every rank, shape, scale and dtype."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import tensorly
import torch
from helpers import EPS, l2_relative, planted_tucker, randn
from hypothesis import given
from hypothesis import strategies as st
from tensorly.decomposition import partial_tucker

from fastrank import decompose
from fastrank.decompose import tucker as tucker_module
from fastrank.decompose.unfold import MATRICIZATIONS

F64 = torch.float64
KERNELS = [
    (8, 6, 3, 3),
    (6, 8, 3, 3),
    (5, 1, 3, 3),
    (1, 5, 3, 3),
    (7, 4, 1, 1),
    (4, 7, 1, 5),
    (3, 3, 2, 4),
    (40, 2, 3, 3),
]


def kernel(shape, dtype=F64, seed=0):
    return randn(*shape, seed=seed, dtype=dtype)


def sigma(weight, name):
    return np.linalg.svd(decompose.unfold(weight.double(), name).numpy(), compute_uv=False)


def limits(shape):
    o, i, kh, kw = shape
    return min(i, o * kh * kw), min(o, i * kh * kw)


@pytest.mark.parametrize("name", MATRICIZATIONS)
def test_unfoldings_are_inverted_by_fold_and_hold_the_stated_entries(name):
    weight = kernel((4, 3, 2, 5))
    matrix = decompose.unfold(weight, name)
    assert torch.equal(decompose.fold(matrix, name, (4, 3, 2, 5)), weight)
    o, i, y, x = 3, 1, 1, 2
    row, column = {
        "mode3": (i, (o * 2 + y) * 5 + x),
        "mode4": (o, (i * 2 + y) * 5 + x),
        "channel": (o, (i * 2 + y) * 5 + x),
        "spatial": (i * 2 + y, o * 5 + x),
    }[name]
    assert matrix[row, column] == weight[o, i, y, x]


@pytest.mark.parametrize("algorithm", ["hosvd", "hooi"])
@pytest.mark.parametrize("shape", KERNELS)
def test_tucker2_is_exact_at_full_ranks_with_orthonormal_factors(shape, algorithm):
    for dtype in EPS:
        weight = kernel(shape, dtype)
        found = decompose.tucker2(weight, limits(shape), algorithm=algorithm)
        assert {f.dtype for f in found} == {dtype}
        # Three factors rounded to the dtype, each product a sum of at most max(shape) terms.
        bound = {F64: 1e-12, torch.float32: 1e-5}.get(dtype, 4 * EPS[dtype])
        assert l2_relative(decompose.Tucker2(*(f.double() for f in found)).weight(), weight) <= bound
        for factor in (found.w_in, found.w_out.T):
            gram = factor.double() @ factor.double().T
            assert (
                float((gram - torch.eye(len(gram))).abs().max()) <= 4 * EPS[dtype] * math.sqrt(factor.shape[1]) + 1e-14
            )


@pytest.mark.parametrize("shape", KERNELS)
@pytest.mark.parametrize("algorithm", ["hosvd", "hooi"])
def test_tucker2_has_the_asked_ranks_and_stays_within_the_theoretical_bounds(shape, algorithm):
    weight = kernel(shape)
    mode3, mode4 = sigma(weight, "mode3"), sigma(weight, "mode4")
    top_in, top_out = limits(shape)
    for rank_in in {1, max(1, top_in // 2), top_in}:
        for rank_out in {1, max(1, top_out // 2), top_out}:
            found = decompose.tucker2(weight, (rank_in, rank_out), algorithm=algorithm)
            assert found.w_in.shape == (rank_in, shape[1])
            assert found.core.shape == (rank_out, rank_in, *shape[2:])
            assert found.w_out.shape == (shape[0], rank_out)
            error = float((found.weight() - weight).square().sum())
            tails = (mode3[rank_in:] ** 2).sum(), (mode4[rank_out:] ** 2).sum()
            slack = 1e-12 * (mode3**2).sum()
            assert max(tails) - slack <= error <= sum(tails) + slack


@given(
    shape=st.tuples(st.integers(1, 8), st.integers(1, 8), st.integers(1, 3), st.integers(1, 3)),
    share=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    double=st.booleans(),
    seed=st.integers(0, 999),
)
def test_hooi_is_never_worse_than_hosvd(shape, share, double, seed):
    weight = kernel(shape, F64 if double else torch.float32, seed)
    ranks = tuple(max(1, round(s * top)) for s, top in zip(share, limits(shape), strict=True))
    errors = []
    for algorithm in ("hosvd", "hooi"):
        found = decompose.tucker2(weight, ranks, algorithm=algorithm)
        assert (found.w_in.shape[0], found.w_out.shape[1]) == ranks
        errors.append(float((found.weight() - weight).double().norm()))
    assert errors[1] <= errors[0] + 10 * EPS[weight.dtype] * float(weight.norm())


def test_hooi_improves_with_every_sweep(monkeypatch):
    weight, errors = kernel((12, 10, 3, 3)), []
    monkeypatch.setattr(tucker_module, "HOOI_TOLERANCE", -1.0)
    for sweeps in range(8):
        monkeypatch.setattr(tucker_module, "HOOI_SWEEPS", sweeps)
        errors.append(float((decompose.tucker2(weight, (4, 3), algorithm="hooi").weight() - weight).norm()))
    assert all(after <= before * (1 + 1e-13) for before, after in itertools.pairwise(errors))
    assert errors[-1] < errors[0] * (1 - 1e-4)
    assert errors[0] == pytest.approx(float((decompose.tucker2(weight, (4, 3)).weight() - weight).norm()))


@pytest.mark.parametrize(
    ("shape", "ranks"), [((12, 10, 3, 3), (4, 3)), ((8, 16, 3, 3), (5, 5)), ((16, 4, 1, 3), (2, 6))]
)
def test_hooi_reaches_the_error_of_tensorly(shape, ranks):
    weight = kernel(shape)
    (core, factors), _ = partial_tucker(
        tensorly.tensor(weight.numpy()), rank=[ranks[1], ranks[0]], modes=[0, 1], init="svd", n_iter_max=500, tol=1e-12
    )
    theirs = np.linalg.norm(np.einsum("rsyx,or,is->oiyx", core, *factors) - weight.numpy())
    ours = float((decompose.tucker2(weight, ranks, algorithm="hooi").weight() - weight).norm())
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("algorithm", ["hosvd", "hooi"])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15])
@pytest.mark.parametrize(("dtype", "bound"), [(F64, 1e-12), (torch.float32, 1e-5)])
def test_planted_tucker_ranks_are_recovered_exactly(algorithm, scale, dtype, bound):
    weight = (planted_tucker(12, 10, 3, (3, 4)) * scale).to(dtype)
    assert l2_relative(decompose.tucker2(weight, (3, 4), algorithm=algorithm).weight(), weight) <= bound
    assert l2_relative(decompose.tucker2(weight, (2, 4), algorithm=algorithm).weight(), weight) > 1e-2
    assert l2_relative(decompose.tucker2(weight, (3, 3), algorithm=algorithm).weight(), weight) > 1e-2


@pytest.mark.parametrize("shape", KERNELS)
def test_core_slices_of_a_full_hosvd_have_the_norms_of_the_mode_singular_values(shape):
    weight = kernel(shape)
    core = decompose.tucker2(weight, limits(shape)).core
    np.testing.assert_allclose(core.transpose(0, 1).flatten(1).norm(dim=1), sigma(weight, "mode3"), rtol=1e-12)
    np.testing.assert_allclose(core.flatten(1).norm(dim=1), sigma(weight, "mode4"), rtol=1e-12)


def merged(scheme, first, second):
    first, second = first.double().numpy(), second.double().numpy()
    if scheme == "channel":
        return np.tensordot(second[:, :, 0, 0], first, 1)
    if scheme == "spatial":
        return np.einsum("riy,orx->oiyx", first[..., 0], second[:, :, 0])
    return (first[..., None, None] * second[:, :, None]).sum(0)


SPLIT = {"channel": decompose.channel_svd, "spatial": decompose.spatial_svd, "decoupled": decompose.decoupled_svd}


def tops(shape):
    o, i, kh, kw = shape
    return {"channel": min(o, i * kh * kw), "spatial": min(i * kh, o * kw), "decoupled": min(i, kh * kw)}


def shapes_of(scheme, shape, rank):
    o, i, kh, kw = shape
    return {
        "channel": ((rank, i, kh, kw), (o, rank, 1, 1)),
        "spatial": ((rank, i, kh, 1), (o, rank, 1, kw)),
        "decoupled": ((rank, o, i), (rank, o, kh, kw)),
    }[scheme]


@pytest.mark.parametrize("scheme", SPLIT)
@pytest.mark.parametrize("shape", KERNELS)
def test_svd_schemes_reach_the_eckart_young_bound_at_every_rank(shape, scheme):
    weight = kernel(shape)
    if scheme == "decoupled":
        spectra = np.stack([np.linalg.svd(f.flatten(1).numpy(), compute_uv=False) for f in weight])
    else:
        spectra = sigma(weight, scheme)[None]
    for rank in range(1, tops(shape)[scheme] + 1):
        factors = SPLIT[scheme](weight, rank)
        assert tuple(tuple(f.shape) for f in factors) == shapes_of(scheme, shape, rank)
        error = ((merged(scheme, *factors) - weight.numpy()) ** 2).sum()
        assert error == pytest.approx((spectra[:, rank:] ** 2).sum(), abs=1e-12 * (spectra**2).sum())


@pytest.mark.parametrize("scheme", SPLIT)
@pytest.mark.parametrize("dtype", EPS)
def test_svd_schemes_are_exact_at_full_rank_in_every_dtype(dtype, scheme):
    for layout in (torch.contiguous_format, torch.channels_last):
        weight = kernel((6, 5, 3, 3), dtype).contiguous(memory_format=layout)
        factors = SPLIT[scheme](weight, tops(weight.shape)[scheme])
        assert {f.dtype for f in factors} == {dtype}
        bound = {F64: 1e-12, torch.float32: 1e-5}.get(dtype, 4 * EPS[dtype])
        assert l2_relative(torch.from_numpy(merged(scheme, *factors)), weight) <= bound


def test_svd_schemes_place_the_singular_values_as_documented():
    weight = kernel((6, 5, 3, 3))
    first, second = decompose.channel_svd(weight, 4)
    root = np.sqrt(sigma(weight, "channel")[:4])
    np.testing.assert_allclose(first.flatten(1).norm(dim=1), root, rtol=1e-12)
    np.testing.assert_allclose(second[:, :, 0, 0].norm(dim=0), root, rtol=1e-12)
    vertical, horizontal = decompose.spatial_svd(weight, 4)
    np.testing.assert_allclose(vertical.flatten(1).norm(dim=1), np.ones(4), rtol=1e-12)
    np.testing.assert_allclose(
        horizontal.transpose(0, 1).flatten(1).norm(dim=1), sigma(weight, "spatial")[:4], rtol=1e-12
    )


def test_autocast_does_not_lower_the_precision():
    weight = kernel((6, 5, 3, 3), torch.float32)
    calls = [
        lambda: decompose.tucker2(weight, (5, 6), algorithm="hooi"),
        lambda: decompose.channel_svd(weight, 6),
        lambda: decompose.spatial_svd(weight, 15),
        lambda: decompose.decoupled_svd(weight, 5),
        lambda: decompose.cp_filters(weight, 4),
        lambda: decompose.cp_layer(weight, 20),
        lambda: decompose.cp_layer(weight, 20, algorithm="greedy"),
    ]
    for call in calls:
        with torch.autocast("cpu", torch.bfloat16):
            inside = call()
        assert all(torch.equal(a, b) for a, b in zip(inside, call(), strict=True))


W = torch.zeros(4, 3, 3, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: decompose.tucker2(W, (0, 1)), ValueError, r"ranks\[0\] must be an int at least 1, got 0"),
        (lambda: decompose.tucker2(W, (4, 4)), ValueError, r"ranks\[0\] must be an int between 1 and 3, got 4"),
        (lambda: decompose.tucker2(W, (3, 5)), ValueError, r"ranks\[1\] must be an int between 1 and 4, got 5"),
        (lambda: decompose.tucker2(W, (1.0, 2)), TypeError, r"ranks\[0\] must be an int, got float"),
        (lambda: decompose.tucker2(W, True), TypeError, r"ranks must be an int or a pair of ints, got bool"),
        (lambda: decompose.tucker2(W, (1, 2, 3)), TypeError, r"ranks must be an int or a pair of ints"),
        (
            lambda: decompose.tucker2(W, 2, algorithm="hoi"),
            ValueError,
            r"algorithm must be one of .*did you mean 'hooi'",
        ),
        (
            lambda: decompose.tucker2(W[0], 2),
            ValueError,
            r"weight must be of shape .*\(O, I, kh, kw\), got \(3, 3, 3\)",
        ),
        (lambda: decompose.tucker2(W.long(), 2), TypeError, r"weight must be a floating-point tensor"),
        (lambda: decompose.tucker2(W / 0, 2), ValueError, r"weight must be finite, got 108 NaN"),
        (lambda: decompose.tucker2(None, 2), TypeError, r"weight must be a torch.Tensor, got NoneType"),
        (lambda: decompose.channel_svd(W, 5), ValueError, r"rank must be an int between 1 and 4, got 5"),
        (lambda: decompose.spatial_svd(W, -1), ValueError, r"rank must be an int between 1 and 9, got -1"),
        (lambda: decompose.decoupled_svd(W, 4), ValueError, r"rank must be an int between 1 and 3, got 4"),
        (lambda: decompose.channel_svd(W, 1.5), TypeError, r"rank must be an int, got float"),
        (lambda: decompose.spatial_svd(W / 0, 1), ValueError, r"weight must be finite"),
        (lambda: decompose.channel_svd(W / 0, 1), ValueError, r"weight must be finite"),
        (lambda: decompose.decoupled_svd(W / 0, 1), ValueError, r"weight must be finite"),
        (lambda: decompose.cp_filters(W, 10), ValueError, r"rank must be an int between 1 and 9, got 10"),
        (lambda: decompose.cp_filters(W, 1, seed=-1), ValueError, r"seed must be an int at least 0"),
        (lambda: decompose.cp_filters(W, 1, max_iter=0), ValueError, r"max_iter must be an int at least 1"),
        (lambda: decompose.cp_filters(W, 1, tol=math.nan), ValueError, r"tol must be a finite number at least 0"),
        (lambda: decompose.cp_filters(W / 0, 1), ValueError, r"weight must be finite, got 108 NaN"),
        (lambda: decompose.cp_filters(W[0], 1), ValueError, r"weight must be of shape"),
        (lambda: decompose.cp_layer(W, 28), ValueError, r"rank must be an int between 1 and 27, got 28"),
        (lambda: decompose.cp_layer(W, 0), ValueError, r"rank must be an int between 1 and 27, got 0"),
        (lambda: decompose.cp_layer(W, 2.0), TypeError, r"rank must be an int, got float"),
        (lambda: decompose.cp_layer(W, 1, algorithm="a"), ValueError, r"algorithm must be one of \['als', 'greedy'\]"),
        (lambda: decompose.cp_layer(W, 1, seed=-1), ValueError, r"seed must be an int at least 0"),
        (lambda: decompose.cp_layer(W, 1, max_iter=0), ValueError, r"max_iter must be an int at least 1"),
        (lambda: decompose.cp_layer(W, 1, tol=-1), ValueError, r"tol must be a finite number at least 0"),
        (lambda: decompose.cp_layer(W / 0, 1), ValueError, r"weight must be finite"),
        (lambda: decompose.unfold(W, "mode5"), ValueError, r"matricization must be one of"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()


@pytest.mark.parametrize("name", ["channel_svd", "spatial_svd", "decoupled_svd", "tucker2", "cp_filters", "cp_layer"])
def test_an_empty_weight_is_named(name):
    with pytest.raises(ValueError, match="^weight must be of sizes"):
        getattr(decompose, name)(torch.randn(0, 3, 3, 3), 1)
