"""One choice for every layer, all layers together: the least error within the limits, exactly."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from fastrank.budget._choices import Choice

SECONDS = 30.0
GAP = 1e-3
"""How far above the least the sum of errors may stay, relative to it."""
# Of two plans of one error the cheaper one: the weight of the costs, as shares of their limits, beside the errors.
TIE = 1e-6


def solve(options: Sequence[Sequence[Choice]], limits: Mapping[str, float]) -> list[int] | None:
    """The place of the choice of each layer with the least sum of errors, where the sums of costs keep the limits.

    A multiple-choice knapsack, solved as an integer program by HiGHS (through scipy) to a gap of 0.1 %. None where no
    combination keeps the limits.
    """
    import numpy
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    if not options:
        return [] if all(limit >= 0 for limit in limits.values()) else None
    if any(limit <= 0 for limit in limits.values()):
        return None
    flat = [choice for layer in options for choice in layer]
    costs = numpy.array([[choice.costs[kind] / limit for choice in flat] for kind, limit in limits.items()])
    errors = numpy.array([choice.error for choice in flat]) + TIE * costs.sum(0)
    owner = numpy.repeat(numpy.arange(len(options)), [len(layer) for layer in options])
    one_each = csr_array((numpy.ones(len(flat)), (owner, numpy.arange(len(flat)))))
    with _remarks_on_stderr():
        found = milp(
            errors,
            integrality=numpy.ones(len(flat)),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(costs, ub=1.0), LinearConstraint(one_each, 1.0, 1.0)],
            options={"time_limit": SECONDS, "mip_rel_gap": GAP},
        )
    if found.x is None:
        return None
    picked, start = [], 0
    for layer in options:
        picked.append(int(numpy.argmax(found.x[start : start + len(layer)])))
        start += len(layer)
    return picked


@contextmanager
def _remarks_on_stderr() -> Iterator[None]:
    """HiGHS now and then prints a remark past Python to standard output, where a caller's results belong."""
    try:
        sys.stdout.flush()
        kept = os.dup(1)
        os.dup2(2, 1)
    except OSError:  # a process without standard output or error has nothing to mix up
        yield
        return
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
