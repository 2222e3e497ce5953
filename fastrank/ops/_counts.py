"""How often the spectral operators met something unusual in this process."""

from __future__ import annotations

import warnings

_COUNTS = {"nonfinite_skipped": 0, "not_converged": 0}


def count(event: str, times: int = 1) -> None:
    """Add to one of the counts."""
    _COUNTS[event] += times


def spectral_counts() -> dict[str, int]:
    """Since the process began: matrices skipped as not finite (`on_nonfinite="skip"`), and eigensolvers that did not
    converge and were replaced by a slower exact method."""
    return dict(_COUNTS)


def skipped(places: list[int]) -> None:
    """Count matrices that were left out, and warn of it (Python shows one warning a place in a program)."""
    if places:
        count("nonfinite_skipped", len(places))
        warnings.warn(
            f"{len(places)} matrices with NaN or infinite values were skipped, the first of them matrices[{places[0]}]",
            RuntimeWarning,
            stacklevel=2,
        )
