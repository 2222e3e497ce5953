"""Distances between filters: principal angles against planted ones and SciPy's, and the four criteria."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import EPS, randn
from scipy.linalg import subspace_angles
from torch import nn

from fastrank import prune
from fastrank.nn import FusedCPConv, FusedTucker2Conv
from fastrank.prune import similarity

F64 = torch.float64


def lines(*vectors: list[float]) -> torch.Tensor:
    """One-dimensional spans as a factor (O, d, 1)."""
    return torch.tensor(vectors, dtype=F64)[:, :, None]


def factors(rank: int, out: int, size: tuple[int, int, int] = (7, 3, 3), seed: int = 0) -> list[torch.Tensor]:
    return [randn(rank, out, d, seed=seed + i, dtype=F64) for i, d in enumerate(size)]


@pytest.mark.parametrize(
    ("a", "b", "angle"),
    [
        ([1, 0], [0, 1], math.pi / 2),
        ([1, 0], [0, -7e-9], math.pi / 2),
        ([3, 4], [3, 4], 0.0),
        ([3, 4], [-6e8, -8e8], 0.0),
        ([1, 0], [math.cos(0.3), math.sin(0.3)], 0.3),
        ([1, 0], [-math.cos(0.3), math.sin(0.3)], 0.3),
    ],
)
def test_angles_of_known_lines(a, b, angle):
    found = prune.principal_angles(lines(a, b))
    assert found.dtype == F64
    assert abs(float(found[0, 1]) - angle) <= 8 * EPS[F64]
    assert torch.equal(found, found.T)
    assert torch.equal(found.diagonal(), torch.zeros(2, dtype=F64))


@pytest.mark.parametrize("angle", [1e-12, 1e-8, 1e-4, 0.7, math.pi / 4, 0.8, math.pi / 2 - 1e-4, math.pi / 2 - 1e-9])
def test_angles_are_accurate_to_rounding_at_both_ends(angle):
    """An arccosine alone would be wrong by 1e-8 at the small end, an arcsine alone at the large one."""
    turn = torch.linalg.qr(randn(6, 6, dtype=F64))[0]
    planes = torch.zeros(2, 6, 2, dtype=F64)
    planes[:, 0, 0] = 1.0
    planes[0, 1, 1] = 1.0
    planes[1, 1, 1], planes[1, 2, 1] = math.cos(angle), math.sin(angle)
    mixed = turn @ planes @ randn(2, 2, seed=1, dtype=F64)
    assert abs(float(prune.principal_angles(mixed)[0, 1]) - angle) <= 100 * EPS[F64]


@pytest.mark.parametrize("chunk", [1, 1 << 22])
@pytest.mark.parametrize(("size", "width"), [(9, 4), (5, 3), (3, 2), (4, 1), (3, 7)])
def test_angles_of_spans_of_any_dimension_are_those_of_scipy(size, width, chunk, monkeypatch):
    monkeypatch.setattr(similarity, "_CHUNK", chunk)
    spans, bases = [], []
    for index in range(10):
        inner = 1 if index == 9 else min(1 + index % width, size)
        basis = randn(size, inner, seed=index, dtype=F64)
        if index == 9:
            basis = bases[0] + 1e-6 * basis  # a pair far below π/4
        bases.append(basis)
        spans.append(basis @ randn(inner, width, seed=20 + index, dtype=F64))
    found = prune.principal_angles(torch.stack(spans))
    for i, j in torch.combinations(torch.arange(10)).tolist():
        assert abs(float(found[i, j]) - subspace_angles(bases[i].numpy(), bases[j].numpy())[0]) <= 1e-12


def test_spans_without_angles():
    """The whole space holds every span, a span holds its own part, and the empty span of zeros lies in all."""
    whole, zero = randn(2, 3, 4, dtype=F64), torch.zeros(1, 3, 4, dtype=F64)
    line, plane = torch.zeros(1, 3, 4, dtype=F64), torch.zeros(1, 3, 4, dtype=F64)
    line[0, 0], plane[0, :2] = 1.0, randn(2, 4, seed=1, dtype=F64)
    found = prune.principal_angles(torch.cat((whole, zero, line, plane)))
    assert torch.equal(found[:3], torch.zeros(3, 5, dtype=F64))
    assert float(found[3, 4]) <= 4 * EPS[F64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_the_rank_of_a_span_is_numerical(dtype):
    """Columns parallel to rounding span a line."""
    columns = torch.stack((randn(6, dtype=F64), randn(6, seed=1, dtype=F64)))
    scaled = columns[:, :, None] * torch.tensor([1.0, 0.5, -4.0], dtype=F64)
    exact = prune.principal_angles(columns[:, :, None].to(dtype))
    assert torch.allclose(prune.principal_angles(scaled.to(dtype)), exact, rtol=0, atol=20 * EPS[dtype])


def test_pabs_adds_the_angles_of_the_three_factors():
    e, f = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]
    tilted = [math.cos(0.3), math.sin(0.3), 0.0]
    pointwise = torch.tensor([[e, f, e]], dtype=F64)
    vertical = torch.tensor([[e, e, tilted]], dtype=F64)
    horizontal = torch.tensor([[e, f, tilted]], dtype=F64)
    found = prune.pabs(pointwise, vertical, horizontal)
    assert abs(float(found[0, 1]) - math.pi) <= 16 * EPS[F64]
    assert abs(float(found[0, 2]) - 0.6) <= 16 * EPS[F64]
    assert abs(float(found[1, 2]) - (math.pi / 2 + 0.3 + math.pi / 2 - 0.3)) <= 16 * EPS[F64]


@pytest.mark.parametrize("criterion", [prune.pabs, prune.csa])
def test_angle_criteria_do_not_see_order_sign_and_scale_of_the_terms(criterion):
    given = factors(2, 5)
    scale = torch.tensor([-3.0, 0.25], dtype=F64)[:, None, None]
    changed = [(given[0] * scale).flip(0), (given[1] / scale).flip(0), given[2].flip(0)]
    assert torch.allclose(criterion(*changed), criterion(*given), rtol=0, atol=1e-13)


def test_csa_at_rank_one_is_the_squared_sine_between_the_filters():
    given = factors(1, 6)
    filters = torch.einsum("oi,oy,ox->oiyx", *(factor[0] for factor in given)).flatten(1)
    unit = filters / filters.norm(dim=1, keepdim=True)
    wanted = (1 - (unit @ unit.T).square()).fill_diagonal_(0.0)
    assert torch.allclose(prune.csa(*given), wanted, rtol=0, atol=1e-14)


def test_csa_keeps_small_distances():
    """Two filters 1e-9 apart are 1e-18 apart by csa, which one minus a product of cosines would round to zero."""
    tilt = torch.tensor([[[1.0, 0.0, 0.0], [math.cos(1e-9), math.sin(1e-9), 0.0]]], dtype=F64)
    same = torch.ones(1, 2, 3, dtype=F64)
    assert abs(float(prune.csa(tilt, same, same)[0, 1]) - 1e-18) <= 1e-23
    orthogonal = torch.eye(3, dtype=F64)[None, :2]
    assert float(prune.csa(orthogonal, same, same)[0, 1]) == 1.0


def test_vbd_is_the_quotient_of_variances():
    weight = torch.cat((randn(4, 3, 3, 3, dtype=F64), torch.full((2, 3, 3, 3), 0.5, dtype=F64)))
    found = prune.vbd(weight)
    for i in range(4):
        for j in range(6):
            if i != j:
                wanted = (weight[i] - weight[j]).var() / (weight[i].var() + weight[j].var())
                assert abs(float(found[i, j] - wanted)) <= 1e-14
    assert float(found[4, 5]) == 0.0
    assert float(prune.vbd(torch.stack((weight[0], -weight[0])))[0, 1]) == pytest.approx(2.0, abs=1e-14)


def test_l2_is_euclidean_and_exact_for_close_filters():
    weight = randn(7, 4, 3, 3, dtype=F64)
    weight[5] = weight[2]
    weight[6] = weight[3]
    weight[6, 0, 0, 0] += 1e-10
    found = prune.l2(weight)
    wanted = torch.cdist(weight.flatten(1), weight.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
    assert torch.allclose(found, wanted, rtol=1e-12, atol=0)
    assert float(found[2, 5]) == 0.0
    assert abs(float(found[3, 6]) - 1e-10) <= 4 * EPS[F64] * float(weight.abs().max())


def test_distances_of_layers():
    layer = FusedCPConv(6, 5, 3, 2)
    given = [layer.pointwise, layer.vertical, layer.horizontal]
    dense = layer.to_dense()
    for criterion, wanted in (
        ("pabs", prune.pabs(*given)),
        ("csa", prune.csa(*given)),
        ("vbd", prune.vbd(dense.weight)),
        ("l2", prune.l2(dense.weight)),
    ):
        found = prune.distances(layer, criterion)
        assert found.dtype == F64
        assert not found.requires_grad
        assert torch.allclose(found, wanted, rtol=0, atol=1e-6)
        assert torch.equal(prune.distances(dense, criterion), prune.l2(dense.weight))
    inputs = torch.tensor([4, 1])
    cut = prune.pabs(given[0][:, :, inputs], *given[1:])
    assert torch.equal(prune.distances(layer, inputs=inputs), cut)
    assert torch.equal(prune.distances(dense, inputs=inputs), prune.l2(dense.weight[:, inputs]))
    linear = nn.Linear(4, 3)
    assert torch.equal(prune.distances(linear), prune.l2(linear.weight))


@pytest.mark.parametrize("seed", range(3))
def test_a_removed_duplicate_is_always_the_nearest(seed):
    """Filter 4 is filter 1 with its terms written otherwise: at distance 0 by every criterion."""
    layer = FusedCPConv(6, 5, 3, 2, bias=False, dtype=F64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(randn(*parameter.shape, seed=seed, dtype=F64))
            parameter[:, 4] = parameter[:, 1].flip(0)
        layer.pointwise[:, 4] *= -1
        layer.vertical[:, 4] *= -1
    for criterion in prune.CRITERIA:
        found = prune.distances(layer, criterion).fill_diagonal_(torch.inf)
        assert divmod(int(found.argmin()), 5) == (1, 4)
        assert float(found.min()) <= 1e-14


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: prune.distances(nn.Conv2d(3, 3, 3), "pab"), ValueError, "criterion must be one of .*did you mean"),
        (lambda: prune.distances(FusedTucker2Conv(4, 4, 3, 2)), TypeError, "^layer must be .* got FusedTucker2Conv"),
        (lambda: prune.principal_angles(torch.ones(3, 3)), ValueError, "^factor must be of shape"),
        (lambda: prune.principal_angles(torch.ones(3, 0, 2)), ValueError, "^factor must be of sizes"),
        (lambda: prune.principal_angles(torch.full((1, 2, 2), math.nan)), ValueError, "^factor must be finite"),
        (lambda: prune.pabs(torch.ones(2, 3, 4), torch.ones(1, 3, 3), torch.ones(2, 3, 3)), ValueError, "^vertical"),
        (lambda: prune.l2(torch.ones(3)), ValueError, r"^weight must be of shape \(O, ...\)"),
        (lambda: prune.vbd(torch.full((2, 2), math.inf)), ValueError, "^weight must be finite"),
        (lambda: prune.l2([[1.0]]), TypeError, "^weight must be a torch.Tensor"),
    ],
)
def test_wrong_arguments_are_named(call, error, match):
    with pytest.raises(error, match=match):
        call()
