"""Polar Express coefficients and schedules: minimax by its definition, and what the composition promises."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import randn

from fastrank.reference import polar
from fastrank.reference.polar import SCHEDULES, coefficients, evaluate, quintic, schedule


def image(quintics: tuple[polar.Quintic, ...], lower: float, upper: float = 1.0, points: int = 20_000) -> torch.Tensor:
    """The composition of quintics on a grid that is dense at both ends of [lower, upper]."""
    x = torch.linspace(math.log(lower), math.log(upper), points, dtype=torch.float64).exp()
    x = torch.cat((x, torch.linspace(lower, upper, points, dtype=torch.float64)))
    for a, b, c in quintics:
        x = a * x + b * x**3 + c * x**5
    return x


@pytest.mark.parametrize("upper", [0.3, 1.0, 1.9])
@pytest.mark.parametrize("low", [1e-4, 1e-3, 0.024, 0.1, 0.5, 0.9, 0.99])
def test_a_quintic_is_minimax(low, upper):
    """Four extremes of one size and alternating signs, no larger error between them: Chebyshev's criterion for the
    three-dimensional Haar space of x, x³, x⁵ on an interval away from 0."""
    found = a, b, c = quintic(low * upper, upper)
    root = math.sqrt(9 * b * b - 20 * a * c)
    inner = [math.sqrt((-3 * b - sign * root) / (10 * c)) for sign in (1, -1)]
    points = [low * upper, *inner, upper]
    assert points == sorted(points)
    errors = [1 - evaluate(found, x) for x in points]
    size = abs(errors[0])
    # Two roundings of terms that are up to |b| + |c| large.
    slack = 1e-14 * (abs(a) * upper + abs(b) * upper**3 + abs(c) * upper**5)
    assert all(abs(abs(e) - size) <= slack for e in errors)
    assert all(e * f < 0 for e, f in itertools.pairwise(errors))
    assert float((image((found,), low * upper, upper) - 1).abs().max()) <= size + slack


def test_a_quintic_of_a_point_is_the_taylor_polynomial():
    a, b, c = quintic(1 - 1e-9)
    assert (a, b, c) == (15 / 8, -10 / 8, 3 / 8)
    near = quintic(1 - 1e-4)  # the other branch, close by
    assert all(abs(x - y) <= 1e-3 for x, y in zip(near, (a, b, c), strict=True))


def test_published_coefficients():
    """The first five of the paper, for l = 1e-3, a cushion of 0.02407 and no safety factor."""
    published = [
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    ]
    found = coefficients(1e-3, 5, cushion=0.02407327424182761, safety=1.0)
    for ours, theirs in zip(found, published, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize("cushion", [1e-9, polar.CUSHION, 0.1])
@pytest.mark.parametrize(("lower", "iterations"), [(1 / 64, 4), (1 / 400, 6), (1e-3, 5), (1e-3, 7), (1e-4, 9)])
def test_the_composition_takes_the_interval_around_one(lower, iterations, cushion):
    found = coefficients(lower, iterations, cushion, 1.0)
    values = image(found, lower)
    least = lower
    for each in found:
        least = evaluate(each, least)
    delta = 1 - least  # what the last interval says
    assert float(values.min()) >= least - 1e-9
    assert float(values.max()) <= 1 + delta + 1e-9
    plain = 1.0
    for _ in range(iterations):  # Muon's quintic never comes closer than 0.3 to 1
        plain = evaluate((3.4445, -4.7750, 2.0315), plain)
    assert delta < abs(plain - 1)
    # Values below the interval stay below it, above 0: directions without a singular value are never blown up.
    below = image(found, 1e-9, lower)
    assert float(below.min()) > 0
    assert float(below.max()) <= 1 + delta + 1e-9


def test_more_iterations_and_wider_bounds_are_better_and_worse():
    def delta(lower: float, iterations: int) -> float:
        return float((image(coefficients(lower, iterations), lower) - 1).abs().max())

    assert delta(1e-3, 5) > delta(1e-3, 6) > delta(1e-3, 7)
    assert delta(1e-4, 7) > delta(1e-3, 7)


def test_a_cushion_keeps_quintics_away_from_zero_inside():
    """Between its extremes a quintic for [l, 1] dips to 1 - E, nearly 0 for a small l; the cushion bounds the dip."""
    first = lambda cushion: coefficients(1e-5, 1, cushion, 1.0)[0]  # noqa: E731
    dips = [float(image((first(cushion),), 0.3).min()) for cushion in (1e-9, polar.CUSHION, 0.1)]
    tops = [float(image((first(cushion),), 0.3).max()) for cushion in (1e-9, polar.CUSHION, 0.1)]
    ratios = [dip / top for dip, top in zip(dips, tops, strict=True)]
    assert ratios[0] < 1e-3
    assert ratios[0] < ratios[1] < ratios[2]
    assert ratios[1] > polar.CUSHION


def test_a_safety_factor_forgives_what_lies_above_the_interval():
    """Without one, an excess grows with every iteration; stretched quintics take it in."""
    excess = 1.0015
    with_it, without = (coefficients(1e-4, 9, safety=safety) for safety in (polar.SAFETY, 1.0))
    assert not abs(float(image(without, excess, excess * 1.0001).max()) - 1) <= 1e-3
    assert abs(float(image(with_it, excess, excess * 1.0001).max()) - 1) <= 1e-6
    assert abs(float(image(with_it, 1e-4).min()) - 1) <= 1e-3


@pytest.mark.parametrize("plan", SCHEDULES, ids=lambda plan: f"{plan.tolerance:g}")
def test_a_schedule_reaches_its_tolerance_in_exact_arithmetic(plan):
    assert sum(map(len, plan.quintics())) == sum(plan.blocks)
    assert tuple(q for block in plan.quintics() for q in block) == coefficients(plan.lower, sum(plan.blocks))
    # Condition 50 in the Schatten 4-norm of 4,096 equal singular values, the worst that a matrix of n = 4,096 can be.
    values = image(coefficients(plan.lower, sum(plan.blocks)), max(plan.lower, 1 / 50 / 4096**0.25))
    assert float((values - 1).abs().max()) <= plan.tolerance


def test_the_cheapest_schedule_that_holds_is_taken():
    assert [each.tolerance for each in SCHEDULES] == sorted((each.tolerance for each in SCHEDULES), reverse=True)
    assert schedule(None) is polar.DEFAULT
    for each in SCHEDULES:
        assert schedule(each.tolerance) is each
        assert schedule(each.tolerance * 1.01) is each
    assert schedule(0.5) is SCHEDULES[0]
    with pytest.raises(ValueError, match=r"^tolerance must be at least 3e-05, got 1e-06"):
        schedule(1e-6)


@pytest.mark.parametrize("plan", SCHEDULES, ids=lambda plan: f"{plan.tolerance:g}")
@pytest.mark.parametrize("shape", [(9, 40), (40, 9), (16, 16), (1, 7)])
def test_float64_is_the_method_without_rounding(shape, plan):
    """Singular values as the composition of the quintics maps them, exactly: singular vectors as float64 has them."""
    u, s, vh = torch.linalg.svd(randn(*shape, dtype=torch.float64), full_matrices=False)
    s = s + s[0] / 20  # of condition 20 at most
    unit = s / s.pow(4).sum() ** 0.25
    for a, b, c in coefficients(plan.lower, sum(plan.blocks)):
        unit = a * unit + b * unit**3 + c * unit**5
    found = polar.polar_factor((u * s) @ vh, plan)
    torch.testing.assert_close(found, (u * unit) @ vh, rtol=0, atol=1e-10)


def test_two_halves_hold_twenty_two_bits():
    x = randn(10_000) * torch.logspace(-3, 1, 10_000)
    high, low = polar._high_low(x)
    assert torch.equal(high.half().float(), high)
    assert torch.equal((low * polar.LOW_SCALE).half().float(), low * polar.LOW_SCALE)
    # 2**-36: half a unit of float16's subnormal numbers, over LOW_SCALE.
    assert bool(((high + low - x).abs() <= 2.0**-22 * x.abs() + 2.0**-36).all())


@pytest.fixture(scope="module")
def accuracy() -> ModuleType:
    """The script that measures what the page says."""
    path = Path(__file__).resolve().parents[1] / "bench" / "polar_accuracy.py"
    spec = importlib.util.spec_from_file_location("polar_accuracy", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_committed_figures(accuracy):
    page = accuracy.PAGE.read_text(encoding="utf-8")
    rows = json.loads(accuracy.RESULT.read_text(encoding="utf-8"))["rows"]
    assert accuracy.filled(page, rows) == page
    assert {(row["n"], row["m"], row["spectrum"]) for row in rows} == {
        (*size, spectrum) for size in accuracy.SIZES for spectrum in accuracy.SPECTRA
    }
    names = {f"{plan.tolerance:g}" for plan in SCHEDULES}
    for row in rows:
        assert set(row["methods"]) == {"muon", *names}
    for plan in SCHEDULES:  # the promises of the page's second table
        row = {(r["n"], r["spectrum"]): r["methods"][f"{plan.tolerance:g}"] for r in rows}
        for n, _ in accuracy.SIZES:
            assert max(row[n, kind]["error"] for kind in ("Gaussian matrix", "i^-0.7")) <= plan.tolerance
            if plan is not SCHEDULES[0]:
                assert row[n, "1 to 1e-3, exponential"]["gap"] <= 1e-4
            if plan.split:
                assert row[n, "1 to 1e-3, exponential"]["error"] <= 1e-3
        assert max(each["over"] for each in row.values()) <= 1e-3


@pytest.mark.parametrize("spectrum", ["i^-0.7", "1 to 1e-3, exponential"])
def test_the_committed_figures_come_out_again(accuracy, spectrum):
    """Errors within a factor of 2 (roundings fall otherwise on another machine); the gap within as much, above 1e-6."""
    n, m = accuracy.SIZES[0]
    rows = json.loads(accuracy.RESULT.read_text(encoding="utf-8"))["rows"]
    (wanted,) = (row["methods"] for row in rows if (row["n"], row["spectrum"]) == (n, spectrum))
    found = accuracy.measure(n, m, spectrum)["methods"]
    for name in wanted:
        assert wanted[name]["error"] / 2 <= found[name]["error"] <= 2 * wanted[name]["error"], name
        slack = 1e-6 + abs(wanted[name]["gap"])
        assert abs(found[name]["gap"] - wanted[name]["gap"]) <= slack, name
