"""A kernel as a list of matrices: one of a named unfolding, or one a filter."""

from __future__ import annotations

import pytest
import torch
from helpers import randn

from fastrank.decompose import decoupled_svd, unfold
from fastrank.decompose.unfold import ALL_MATRICIZATIONS, MATRICIZATIONS, fold_all, unfold_all

SHAPE = (4, 3, 2, 5)


@pytest.mark.parametrize("name", ALL_MATRICIZATIONS)
def test_fold_all_inverts_unfold_all(name):
    weight = randn(*SHAPE)
    for kernel in (weight, weight.contiguous(memory_format=torch.channels_last)):
        matrices = unfold_all(kernel, name)
        assert torch.equal(fold_all(matrices, name, SHAPE), weight)
    if name in MATRICIZATIONS:
        assert len(matrices) == 1
        assert torch.equal(matrices[0], unfold(weight, name))
    else:
        assert [matrix.shape for matrix in matrices] == [(3, 10)] * 4
        assert matrices[3][1, 1 * 5 + 2] == weight[3, 1, 1, 2]


def test_the_matrices_of_filters_are_those_that_decoupled_svd_truncates():
    weight = randn(*SHAPE, dtype=torch.float64)
    pointwise, depthwise = decoupled_svd(weight, 2)
    truncated = []
    for matrix in unfold_all(weight, "decoupled"):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        truncated.append(u[:, :2] * s[:2] @ vh[:2])
    merged = torch.einsum("roi,royx->oiyx", pointwise, depthwise)
    torch.testing.assert_close(fold_all(truncated, "decoupled", SHAPE), merged)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda w: unfold_all(w, "decoupld"), ValueError, "matricization must be one of .*did you mean 'decoupled'"),
        (lambda w: unfold_all(w[0], "decoupled"), ValueError, "weight must be of shape"),
        (lambda w: unfold_all(w[:0], "decoupled"), ValueError, r"weight must be of sizes \(O, I, kh, kw\)"),
        (lambda w: unfold_all(w.int(), "decoupled"), TypeError, "weight must be a floating-point tensor"),
        (lambda w: fold_all([], "mode3", SHAPE), ValueError, "matrices must be 1 for 'mode3' and a kernel of shape"),
        (lambda w: fold_all([w], "decoupled", SHAPE), ValueError, "matrices must be 4 for 'decoupled'"),
        (lambda w: fold_all([w], "mode5", SHAPE), ValueError, "matricization must be one of"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call(randn(*SHAPE))
