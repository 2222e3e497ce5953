"""Proximal maps of the gate penalties, x = argmin ½ (x − g)² + η · penalty(x), for every gate by itself.

Gates are tensors of any shape; η ≥ 0 is a learning rate times the penalty's weight. All keep the sign of the gate,
never enlarge it, and give exactly 0 for a gate of 0. They are `ops.funnel_proximal_` of a copy.
"""

from __future__ import annotations

from torch import Tensor

from fastrank import ops
from fastrank.ops.gates import proximal_threshold


def l1(gates: Tensor, eta: float) -> Tensor:
    """penalty |x|: the soft threshold, 0 from |g| = η down."""
    return _moved(gates, eta, 1.0, "l1")


def l2(gates: Tensor, eta: float) -> Tensor:
    """penalty x²: g / (1 + 2η), which closes no gate."""
    return _moved(gates, eta, 1.0, "l2")


def funnel(gates: Tensor, eta: float, c: float) -> Tensor:
    """penalty |x| / (|x| + C), not convex: the global minimum, 0 where it is not unique."""
    return _moved(gates, eta, c, "funnel")


def funnel_threshold(eta: float, c: float) -> float:
    """The largest |g| whose proximal point under the funnel is 0."""
    return proximal_threshold(eta, c, "funnel")


def _moved(gates: Tensor, eta: float, c: float, penalty: str) -> Tensor:
    moved = gates.detach().clone()
    ops.funnel_proximal_([moved], eta, c, penalty=penalty)
    return moved
