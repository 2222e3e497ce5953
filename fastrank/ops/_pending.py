"""Statuses that kernels left on a GPU: read when they have arrived, never waited for inside an operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrank.ops import _counts

NONFINITE, NOT_CONVERGED, STALE = 1, 2, 4  # bits of a status, the first two as in csrc/linalg/linalg.h


@dataclass
class _Waiting:
    """A status on its way into host memory: which call left it, which places it speaks of, when it has arrived."""

    op: str
    status: Tensor
    places: list[int]
    on_nonfinite: str
    arrived: torch.cuda.Event
    stale: Callable[[int], None] | None


_WAITING: list[_Waiting] = []


def watch(
    op: str, status: Tensor, places: list[int], on_nonfinite: str, stale: Callable[[int], None] | None = None
) -> None:
    """Have `status` (N,) int32 on a GPU copied to the host and looked at by a later call; earlier ones are looked at.

    stale: told the place of every matrix whose status has bit STALE. While a CUDA graph is captured nothing is copied:
    its replays leave NaN for what is not finite.
    """
    if torch.cuda.is_current_stream_capturing():
        return
    settle()
    host = torch.empty(status.shape, dtype=status.dtype, pin_memory=True)
    host.copy_(status, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    _WAITING.append(_Waiting(op, host, places, on_nonfinite, event, stale))


def check_pending() -> None:
    """Wait for every spectral operator still running on a GPU and raise, or warn of, what it found.

    Raises ValueError where a matrix was not finite in a call with ``on_nonfinite="raise"``.
    """
    settle(wait=True)


def settle(*, wait: bool = False) -> None:
    """Look at the statuses that have arrived, all of them where `wait`."""
    while _WAITING and (wait or _WAITING[0].arrived.query()):  # type: ignore[no-untyped-call]
        first = _WAITING.pop(0)
        first.arrived.synchronize()
        judge(first.op, first.status.tolist(), first.places, first.on_nonfinite, first.stale)


def judge(
    op: str, flags: list[int], places: list[int], on_nonfinite: str, stale: Callable[[int], None] | None = None
) -> None:
    """Count, warn or raise for the flags of one call."""
    for place, flag in zip(places, flags, strict=True):
        if flag & STALE and stale is not None:
            stale(place)
    bad = [place for place, flag in zip(places, flags, strict=True) if flag & NONFINITE]
    _counts.count("not_converged", sum(bool(flag & NOT_CONVERGED) for flag in flags))
    if bad and on_nonfinite == "raise":
        raise ValueError(
            f"matrices[{bad[0]}] of an earlier {op} on a GPU must be finite, got NaN or infinite values "
            "(its results were NaN)"
        )
    _counts.skipped(bad)
