"""Predicted time of one library call, from measured ones: a sum of linear costs, and what it misses by interpolation.

A step costs so much a call, an image, a multiply-add, an element read and written (coefficients of 0 or more, by least
squares on relative errors). The logarithm of what was measured over that sum is interpolated between the measured
points with the kernel exp(-distance / LENGTH), on the logarithms of the sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from fastrank._tables._work import Step

BLOCK = 16  # channels in one register of the widest vector unit: a partly filled one costs as much
COSTS, PLACE = 6, 8  # how many summands a time has, and how many numbers say where a step lies
LENGTH = 6.0
FARTHEST = 50.0  # the logarithm of a ratio of times, beyond any that was measured
NOISE = 0.02
Vector = tuple[float, ...]


@dataclass(frozen=True)
class Group:
    """The steps of one kind that one implementation serves: coefficients (µs), measured points, their weights."""

    coefficients: Vector
    points: tuple[Vector, ...]
    weights: Vector

    def predict(self, step: Step) -> float:
        """Microseconds of a step of this group."""
        here = _position(step)
        pairs = zip(self.points, self.weights, strict=True)
        missed = sum(weight * math.exp(-math.dist(here, point) / LENGTH) for point, weight in pairs)
        return sum(c * f for c, f in zip(self.coefficients, _costs(step), strict=True)) * math.exp(
            max(-FARTHEST, min(missed, FARTHEST))
        )


@dataclass(frozen=True)
class Model:
    """Costs of steps at one dtype, layout and number of threads. scale: (op, backend, call) -> measured / predicted."""

    groups: Mapping[str, Group]
    scale: Mapping[str, float]

    def predict(self, label: str, steps: Iterable[Step]) -> float | None:
        """Microseconds of a call that consists of `steps`; None where one of them, or such a call, was not measured."""
        if label not in self.scale:
            return None
        total = 0.0
        for step in steps:
            group = self.groups.get(group_of(step))
            if group is None:
                return None
            total += group.predict(step)
        return total * self.scale[label]


def group_of(step: Step) -> str:
    """The name of the group that a step belongs to."""
    pointwise = step.kind.startswith("convolution") and step.taps == 1
    return f"{step.kind}{' 1x1' if pointwise else ''}{'' if step.vendor else ' small'}"


def fit(measured: Sequence[tuple[Step, float]]) -> dict[str, Group]:
    """Groups from (step, microseconds); a group of fewer points than it has coefficients is left out."""
    sorted_in: dict[str, list[tuple[Step, float]]] = {}
    for step, us in measured:
        sorted_in.setdefault(group_of(step), []).append((step, us))
    return {name: _fit(found) for name, found in sorted(sorted_in.items()) if len(found) > len(_costs(found[0][0]))}


def _fit(measured: Sequence[tuple[Step, float]]) -> Group:
    costs = torch.tensor([_costs(step) for step, _ in measured], dtype=torch.float64)
    times = torch.tensor([us for _, us in measured], dtype=torch.float64)
    coefficients = _nonnegative(costs / times[:, None])
    points = torch.tensor([_position(step) for step, _ in measured], dtype=torch.float64)
    missed = (times / (costs @ coefficients)).log()
    near = torch.exp(-torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist") / LENGTH)
    weights = torch.linalg.solve(near + NOISE * torch.eye(len(points), dtype=torch.float64), missed)
    rounded = [[float(f"{value:.5g}") for value in row.tolist()] for row in (coefficients, weights)]
    return Group(
        tuple(rounded[0]), tuple(tuple(round(v, 2) for v in point) for point in points.tolist()), tuple(rounded[1])
    )


def _nonnegative(costs: torch.Tensor) -> torch.Tensor:
    """The coefficients c ≥ 0 with costs @ c nearest to 1: least squares, without the most negative one, and again."""
    used = list(range(costs.shape[1]))
    while True:
        some = costs[:, used]
        scale = some.norm(dim=0).clamp(min=1e-300)
        solution = torch.linalg.lstsq(some / scale, torch.ones(len(costs), 1, dtype=torch.float64), driver="gelsd")
        found = solution.solution[:, 0] / scale
        if float(found.min()) >= 0 or len(used) == 1:
            coefficients = torch.zeros(costs.shape[1], dtype=torch.float64)
            coefficients[used] = found.clamp(min=0)
            return coefficients
        used.pop(int(found.argmin()))


def _filled(channels: int) -> int:
    return -(-channels // BLOCK) * BLOCK


@lru_cache(maxsize=4096)
def _costs(step: Step) -> Vector:
    """The summands of a time: calls, images, multiply-adds of whole blocks, elements read, written, of weights."""
    waste = _filled(step.in_channels) * _filled(step.out_channels) / (step.in_channels * step.out_channels)
    return (
        1.0,
        float(step.batch),
        step.macs * (waste if step.kind.startswith("convolution") else 1.0),
        float(step.batch * step.in_channels * step.in_pixels),
        float(step.batch * step.out_channels * step.out_pixels),
        float(step.weights),
    )


@lru_cache(maxsize=4096)
def _position(step: Step) -> Vector:
    """Where a step lies among others of its group, in octaves."""
    log = math.log2
    return (
        log(max(step.taps, 1)),
        log(step.in_channels),
        log(step.out_channels),
        log(step.batch * step.out_pixels),
        0.5 * log(step.batch),
        1.5 * log(step.in_pixels / step.out_pixels),
        3 * log(_filled(step.in_channels) / step.in_channels),
        3 * log(_filled(step.out_channels) / step.out_channels),
    )
