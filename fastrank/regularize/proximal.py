"""Proximal maps of the gate penalties, x = argmin ½ (x − g)² + η · penalty(x), for every gate by itself.

Gates are float64 tensors of any shape; η ≥ 0 is a learning rate times the penalty's weight. All keep the sign of the
gate, never enlarge it, and give exactly 0 for a gate of 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def l1(gates: Tensor, eta: float) -> Tensor:
    """penalty |x|: the soft threshold, 0 from |g| = η down."""
    size = gates.abs()
    return _closed(size <= eta, gates.sign() * (size - eta))


def l2(gates: Tensor, eta: float) -> Tensor:
    """penalty x²: g / (1 + 2η), which closes no gate."""
    return gates / (1 + 2 * eta)


def funnel_threshold(eta: float, c: float) -> float:
    """The largest |g| whose proximal point under the funnel is 0.

    With v = |g| the objective is stationary in x > 0 where (v − x)(x + C)² = ηC. As large as at x = 0 it is there for
    x = v − C/2 only, and then η = ½ (v + C/2)²: where that x is above 0, 2η > C², the proximal point jumps from 0 to
    √(2η) − C. Otherwise it leaves 0 without a jump, as soon as the slope η/C of the penalty is exceeded.
    """
    return math.sqrt(2 * eta) - c / 2 if 2 * eta > c * c else eta / c


def funnel(gates: Tensor, eta: float, c: float) -> Tensor:
    """penalty |x| / (|x| + C), not convex: the global minimum, 0 where it is not unique.

    Above the threshold it is the largest root of (x − v)(x + C)² + ηC = 0. In y = x + C and s = v + C that is the
    cubic y³ − s y² + ηC = 0, whose three roots are real; by Viète's formula the largest one is
    s/3 · (1 + 2 cos(φ/3)) with cos φ = 1 − 27ηC / (2s³). Written with sines of half the angles the difference v − x
    comes out without cancellation, and is exactly 0 for η = 0.
    """
    size = gates.abs()
    s = size + c
    angle = (6.75 * (eta / s) * (c / s) / s).clamp(max=1).sqrt().asin() / 3
    opened = size - 4 / 3 * s * angle.sin().square()
    return _closed(size <= funnel_threshold(eta, c), gates.sign() * opened.clamp(min=0))


def _closed(where: Tensor, gates: Tensor) -> Tensor:
    """0 at the given gates; those that are NaN lie below no threshold and stay so."""
    return torch.where(where, 0.0, gates)
