"""What a warm start keeps of one matrix."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Entry:
    """What is kept of one matrix: Q (1, n, n), the steps since it was computed anew, how many warm steps failed in a
    row, and for how many steps none is tried."""

    shape: tuple[int, int]
    basis: Tensor
    age: int = 0
    failures: int = 0
    pause: int = 0
