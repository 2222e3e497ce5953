"""How the funnel's width C moves with the epoch, counted from 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from fastrank import _checks

SMALLEST = 1e-30
"""The least C: far above the numbers that float32 no longer holds in full, far below any gate."""


@runtime_checkable
class Schedule(Protocol):
    """Anything with a C, above 0, for every epoch from 0 on; a dataclass, for a resume to compare its settings."""

    def at(self, epoch: int) -> float:
        """C in the given epoch."""


@dataclass(frozen=True)
class Constant:
    """C = c in every epoch."""

    c: float

    def __post_init__(self) -> None:
        _checks.number("c", self.c, SMALLEST)

    def at(self, epoch: int) -> float:
        """C in the given epoch."""
        _checks.integer("epoch", epoch, 0)
        return float(self.c)


@dataclass(frozen=True)
class Linear:
    """From `start` in epoch 0 straight to `end` in epoch `epochs`, where it stays. Defaults: the published setting."""

    start: float = 10.0
    end: float = 0.001
    epochs: int = 100

    def __post_init__(self) -> None:
        _checks.number("start", self.start, SMALLEST)
        _checks.number("end", self.end, SMALLEST)
        _checks.integer("epochs", self.epochs, 1)

    def at(self, epoch: int) -> float:
        """C in the given epoch."""
        done = min(_checks.integer("epoch", epoch, 0), self.epochs)
        return (self.start * (self.epochs - done) + self.end * done) / self.epochs


@dataclass(frozen=True)
class Exponential:
    """`start` times `factor` (in (0, 1]) once every `every` epochs, but never below `end`."""

    start: float
    factor: float
    every: int
    end: float = 1e-6

    def __post_init__(self) -> None:
        _checks.number("start", self.start, SMALLEST)
        _checks.number("factor", self.factor, 0, 1, open_low=True)
        _checks.integer("every", self.every, 1)
        _checks.number("end", self.end, SMALLEST, self.start)

    def at(self, epoch: int) -> float:
        """C in the given epoch."""
        times = _checks.integer("epoch", epoch, 0) // self.every
        return max(float(self.start * self.factor**times), self.end)
