"""The integer program against every combination, and the limits that it keeps."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from fastrank import LayerPlan
from fastrank.budget import Choice, solve

VALUE = st.integers(0, 40).map(lambda value: value / 8)
COST = st.integers(1, 40).map(float)
OPTION = st.builds(lambda e, a, b: Choice(LayerPlan("dense"), e, {"latency": a, "params": b}), VALUE, COST, COST)
LAYERS = st.lists(st.lists(OPTION, min_size=1, max_size=4), min_size=1, max_size=5)


@given(LAYERS, st.floats(0.1, 1.2), st.floats(0.1, 1.2))
def test_the_choice_is_the_best_of_all_combinations(layers, a, b):
    most = {kind: sum(max(c.costs[kind] for c in mine) for mine in layers) for kind in ("latency", "params")}
    limits = {"latency": a * most["latency"], "params": b * most["params"]}
    best = None
    for combination in itertools.product(*layers):
        costs = {kind: sum(c.costs[kind] for c in combination) for kind in limits}
        if all(costs[kind] <= limits[kind] for kind in limits):
            error = sum(c.error for c in combination)
            best = error if best is None else min(best, error)
    picked = solve(layers, limits)
    assert (picked is None) == (best is None)
    if picked is not None:
        chosen = [mine[i] for mine, i in zip(layers, picked, strict=True)]
        for kind, limit in limits.items():
            assert sum(c.costs[kind] for c in chosen) <= limit * (1 + 1e-6)  # the solver's feasibility tolerance
        # A gap of 1e-3, and the tie-break: at most 1e-6 a kind and layer of what a limit allows.
        assert sum(c.error for c in chosen) <= best * (1 + 1.1e-3) + 1e-4


def test_of_equal_errors_the_cheaper_one_is_taken():
    dear, cheap = (Choice(LayerPlan("dense"), 0.5, {"macs": cost}) for cost in (9.0, 3.0))
    assert solve([[dear, cheap]], {"macs": 10.0}) == [1]


def test_nothing_to_choose_and_limits_below_zero():
    assert solve([], {"macs": 1.0}) == []
    assert solve([], {"macs": -1.0}) is None
    assert solve([[Choice(LayerPlan("dense"), 0.0, {"macs": 1.0})]], {"macs": -1.0}) is None
