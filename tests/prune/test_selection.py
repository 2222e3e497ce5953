"""The greedy choice, against the definition carried out naively."""

from __future__ import annotations

import pytest
import torch
from helpers import generator, randn

from fastrank import prune


def naive(distances: torch.Tensor, keep: int, protect: tuple[int, ...] = ()) -> list[int]:
    left = list(range(len(distances)))
    while len(left) > keep:
        pairs = [(i, j) for i in left for j in left if i < j and not {i, j} <= set(protect)]
        i, j = min(pairs, key=lambda pair: float(distances[pair]))
        total_i, total_j = (float(distances[k, left].sum()) for k in (i, j))
        gone = j if i in protect or (j not in protect and total_j <= total_i) else i
        left.remove(gone)
    return left


def matrices() -> list[torch.Tensor]:
    points = [randn(n, 2, seed=n, dtype=torch.float64) for n in (2, 3, 17, 24)]
    smooth = [torch.cdist(p, p, compute_mode="donot_use_mm_for_euclid_dist") for p in points]
    grid = torch.randint(0, 4, (20, 20), generator=generator(5)).double()  # whole numbers: many exact ties
    return [*smooth, (grid + grid.T).fill_diagonal_(0.0), torch.zeros(6, 6), torch.ones(5, 5)]


@pytest.mark.parametrize("distances", matrices(), ids=lambda matrix: f"{len(matrix)}")
def test_keeps_what_the_definition_keeps(distances):
    order = prune.removal_order(distances).tolist()
    assert sorted(order) == list(range(len(distances)))
    for keep in range(1, len(distances) + 1):
        wanted = naive(distances, keep)
        assert prune.select(distances, keep).tolist() == wanted
        assert sorted(order[len(order) - keep :]) == wanted
        for protect in ((0,), (len(distances) - 1, 1)):
            if keep >= len(set(protect)):
                assert prune.select(distances, keep, protect=protect).tolist() == naive(distances, keep, protect)


def test_the_nearer_of_the_closest_pair_goes():
    """Points 0, 1, 10, 13 and 30 on a line: of 0 and 1, the 1 lies nearer to the rest; then 13 of 10 and 13."""
    points = torch.tensor([0.0, 1.0, 10.0, 13.0, 30.0])
    distances = (points[:, None] - points).abs()
    assert prune.removal_order(distances).tolist()[:2] == [1, 3]
    assert prune.select(distances, 3).tolist() == [0, 2, 4]


def test_of_exact_duplicates_the_later_goes():
    points = torch.tensor([5.0, 0.0, 9.0, 5.0, 0.0])
    assert prune.select((points[:, None] - points).abs(), 3).tolist() == [0, 1, 2]


def test_the_diagonal_is_not_read():
    distances = matrices()[2]
    assert torch.equal(prune.select(distances + 3 * torch.eye(17), 6), prune.select(distances, 6))


@pytest.mark.parametrize(
    ("distances", "keep", "protect", "match"),
    [
        (torch.ones(3, 3), 0, (), "^keep must be an int between 1 and 3, got 0"),
        (torch.ones(3, 3), 4, (), "^keep must be an int between 1 and 3, got 4"),
        (torch.ones(3, 3), 1, (0, 1), "^keep must be an int between 2 and 3, got 1"),
        (torch.ones(3, 3), 2, (3,), "^protect must be an int between 0 and 2, got 3"),
        (torch.ones(3, 2), 1, (), r"^distances must be of shape \(O, O\), got \(3, 2\)"),
        (torch.ones(0, 0), 1, (), "^distances must be of sizes"),
        (torch.full((2, 2), torch.nan), 1, (), "^distances must be finite"),
        (torch.tensor([[0.0, 1.0], [2.0, 0.0]]), 1, (), "^distances must be symmetric"),
        (-torch.ones(2, 2), 1, (), "^distances must be symmetric and not negative"),
    ],
)
def test_wrong_arguments_are_named(distances, keep, protect, match):
    with pytest.raises(ValueError, match=match):
        prune.select(distances, keep, protect=protect)
