"""bench/growth.py: fitted exponents, the count of live bytes, series that end in time, and the tables."""

from __future__ import annotations

import copy
import itertools
import json
import math
import sys
from typing import Any

import pytest
import scipy.stats
import torch
from bench_modules import load
from hypothesis import given
from hypothesis import strategies as st

from fastrank import ops

SIZES = [1, 2, 4, 8, 16, 32]


@pytest.fixture
def growth() -> Any:
    return load("growth")


@pytest.fixture
def page(growth: Any) -> Any:
    return growth.growth_page


@pytest.fixture
def memory(growth: Any) -> Any:
    return sys.modules["growth_memory"]


@pytest.fixture
def series(growth: Any) -> Any:
    return sys.modules["growth_series"]


@given(exponent=st.floats(-3, 4), scale=st.floats(1e-6, 1e6), count=st.integers(3, 12))
def test_the_exponent_of_a_power_law(exponent: float, scale: float, count: int) -> None:
    xs = [2.0**place for place in range(count)]
    line = load("growth").fit(xs, [scale * x**exponent for x in xs])
    # Each logarithm, 70 at most in size, is rounded; the slope is a sum of a dozen of them over a spread of 1 and more.
    bound = 12 * 70 * sys.float_info.epsilon * 4
    assert line["exponent"] == pytest.approx(exponent, abs=bound)
    assert 0 <= line["error"] <= bound
    assert line["points"] == max(3, -(-count // 2))


def test_only_the_upper_half_is_fitted(growth) -> None:
    ys = [5.0, 0.1, 7.0, 8.0**2, 16.0**2, 32.0**2]
    line = growth.fit(SIZES, ys)
    assert line == growth.fit(SIZES[::-1], ys[::-1])
    assert line["exponent"] == pytest.approx(2)
    assert growth.fit(SIZES[:4], [1e9, 2.0, 4.0, 8.0])["exponent"] == pytest.approx(1)  # three points at least


def test_the_standard_error_is_that_of_the_textbook(growth) -> None:
    ys = [1.0, 2.5, 3.5, 9.0, 14.0, 40.0]
    truth = scipy.stats.linregress([math.log(x) for x in SIZES[3:]], [math.log(y) for y in ys[3:]])
    line = growth.fit(SIZES, ys)
    assert (line["exponent"], line["error"]) == pytest.approx((truth.slope, truth.stderr))


@pytest.mark.parametrize("ys", [[1.0, 2.0], [1.0, 2.0, 0.0], [9.0, 9.0, 9.0, 1.0, -1.0, 2.0], []])
def test_too_few_points_have_no_exponent(growth, ys) -> None:
    assert growth.fit(SIZES[: len(ys)], ys) is None


CALLS = {
    "a result": (lambda x: x + 1, 4000),
    "two at a time": (lambda x: (x + 1) + 1, 8000),
    "freed before the next": (lambda x: ((x + 1).sum(), (x + 2).sum()), 4008),
    "kept": (lambda x: [x + 1, x + 2, x + 3], 12000),
    "a view shares its memory": (lambda x: (x + 1).view(10, 100).t()[2:], 4000),
    "what was there before": (lambda x: x.view(10, 100).t(), 0),
    "in place": (lambda x: torch.zeros(1000).add_(x).mul_(2), 4000),
    "into a view of what was there": (lambda x: x.view(10, 100).copy_(torch.ones(100)), 400),
    "half precision": (lambda x: x.half(), 2000),
    "nothing": (lambda x: None, 0),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the allocator of the GPU counts there")
@pytest.mark.parametrize("name", CALLS)
def test_live_bytes_of_known_tensors(memory, name) -> None:
    call, count = CALLS[name]
    x = torch.randn(1000)
    assert [memory.peak_bytes(lambda: call(x)) for _ in range(2)] == [count, count]


def test_now_falls_when_tensors_go(memory) -> None:
    with memory.LiveBytes() as live:
        kept = torch.zeros(100)
        twin = kept.view(10, 10)
        gone = torch.zeros(200) + 1  # the zeros go at once, the sum below
        assert live.now == 400 + 800
        del gone, kept
        assert live.now == 400
        del twin
        assert live.now == 0
    assert live.peak == 400 + 2 * 800


@pytest.mark.skipif(torch.cuda.is_available(), reason="the allocator of the GPU counts there")
def test_live_bytes_inside_operators_and_backward_passes(memory) -> None:
    x, w_in, core, w_out = torch.randn(2, 6, 5, 5), torch.randn(2, 6), torch.randn(3, 2, 3, 3), torch.randn(4, 3)
    places = 2 * 5 * 5 * 4
    call = {"padding": 1, "backend": "sequence"}
    one = memory.peak_bytes(lambda: ops.tucker2_conv2d(x, w_in, core, w_out, **call))
    assert one == places * (3 + 4)  # the last of three convolutions has its input and its output
    dense = memory.peak_bytes(lambda: ops.tucker2_conv2d(x, w_in, core, w_out, padding=1, backend="dense"))
    assert dense >= places * 4 + 4 * 4 * 6 * 9  # output and merged kernel
    leaves = [value.requires_grad_() for value in (x, w_in, core, w_out)]
    both = memory.peak_bytes(lambda: torch.autograd.grad(ops.tucker2_conv2d(*leaves, **call).sum(), leaves))
    assert both >= 4 * sum(leaf.numel() for leaf in leaves) + places * 4  # all gradients, and that of the output


def tiny(series: Any, calls: dict[str, Any], **more: Any) -> Any:
    """A group of series whose calls are given by name; work is the size."""
    rows = [series.Series(name, "p", make, float, float, **more) for name, make in calls.items()]
    return series.Group("tiny", "things n", "Nothing.", (1, 2, 4, 8), (1, 2, 4), tuple(rows))


def test_a_series_ends_before_a_call_that_is_too_long(growth, series, monkeypatch) -> None:
    seen: list[int] = []

    def make(n: int) -> Any:
        seen.append(n)
        return lambda: sum(range(10))

    group = tiny(series, {"a": make})
    found, ended = growth.measure(group._replace(limit_s=0.0), (1, 2, 4), passes=2, seconds=0.0)
    assert ended == {"p: a": "at 2 a call would take about 0 s"}
    assert list(found["p: a"]) == [1]
    assert set(seen) == {1}
    monkeypatch.setattr(growth, "ONCE_US", math.inf)
    found, ended = growth.measure(group._replace(limit_s=math.inf), (1, 2, 4), passes=2, seconds=0.0)
    assert (list(found["p: a"]), ended) == ([1, 2, 4], {})
    assert all(len(point["us"]) == 4 and min(point["us"]) > 0 for point in found["p: a"].values())
    monkeypatch.setattr(growth, "ONCE_US", 0.0)
    found, _ = growth.measure(group._replace(limit_s=math.inf), (1, 2), passes=2, seconds=0.0)
    assert [len(point["us"]) for point in found["p: a"].values()] == [2, 2]


def test_what_is_added_is_the_difference_round_by_round(growth, series, monkeypatch) -> None:
    us = {"p: with": [5.0, 9.0, 7.0], "p: without": [1.0, 4.0, 2.0]}
    monkeypatch.setattr(growth.timing, "for_seconds", lambda calls, *_, **__: copy.deepcopy({k: us[k] for k in calls}))
    peaks = itertools.cycle([1000, 400])
    monkeypatch.setattr(growth, "peak_bytes", lambda call: next(peaks))
    group = tiny(series, {"with": lambda n: int, "without": lambda n: int})
    added = series.Series("added", "q", None, float, float, of="p: with", minus="p: without")
    group = group._replace(series=(*group.series, added))
    found, _ = growth.measure(group, (1, 2), passes=1, seconds=0.0)
    assert list(found["q: added"]) == [1, 2]
    assert all(point == {"us": [4.0, 5.0, 5.0], "peak": 600} for point in found["q: added"].values())


def test_a_tiny_run(growth, page, series, tmp_path, one_thread) -> None:
    groups = [
        series.Group("rank", "rank R", "Fixed.", (2, 4, 8), (1, 2, 4), tuple(series.convs(lambda n: (8, 4, 1, n)))),
        series.Group(
            "layers", "number of layers L", "Fixed.", (1, 2), (1, 2, 3),
            (*series.gates(lambda n: [(4, 6)] * n), *series.steps()),
        ),
    ]  # fmt: skip
    result = growth.run(groups, quick=True, seconds=0.0)
    assert json.loads(json.dumps(result)) == result
    assert result["quick"] is True
    for group in groups:
        rows = result["groups"][group.name]["series"]
        assert [row["name"] for row in rows] == [each.name for each in group.series]
        for row in rows:
            assert [point["size"] for point in row["points"]] == list(group.quick)
            if row["panel"] != "added":
                assert all(0 < point["p20_us"] <= point["p50_us"] <= point["p80_us"] for point in row["points"])
                assert row["time"]["points"] == 3
                assert row["memory"] is not None
    drawn = growth.growth_plots.draw(result, tmp_path)
    assert [path.name for path in drawn] == ["growth-rank.png", "growth-layers.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    assert len(page.table(result).splitlines()) == 2 + 6 + 10 + 2
    assert len(page.memory_table(result).splitlines()) == 2 + 6 + 10


def test_memory_is_as_predicted_where_it_is_exact(growth, series, memory, one_thread) -> None:
    """Gated factors hold their results and small ones; training steps as much more as they have layers."""
    if torch.cuda.is_available():
        pytest.skip("the allocator of the GPU rounds up")
    plain = [memory.peak_bytes(warmed(series.step("no regulariser", n))) for n in (4, 8, 16, 32)]
    steps = [b - a for a, b in itertools.pairwise(plain)]
    assert [b / a for a, b in itertools.pairwise(steps)] == pytest.approx([2, 2])
    added = [memory.peak_bytes(warmed(series.step("Funnel", n))) for n in (4, 8)]
    gated = [memory.peak_bytes(warmed(series.step("gated, no regulariser", n))) for n in (4, 8)]
    assert all(0 <= a - b <= 0.1 * b for a, b in zip(added, gated, strict=True))


def warmed(call: Any) -> Any:
    call()
    return call


def test_every_series_of_the_full_run_can_be_made(series, one_thread) -> None:
    for group in series.GROUPS:
        keys = [each.key for each in group.series]
        assert len(set(keys)) == len(keys)
        size = group.quick[0]
        for each in group.series:
            assert each.work(group.sizes[-1]) > each.work(group.sizes[0]) > 0
            assert each.held(group.sizes[-1]) > 0
            if each.make is None:
                assert {each.of, each.minus} <= set(keys)
            else:
                each.make(size)()


def line(exponent: float, predicted: float) -> dict[str, float]:
    return {"exponent": exponent, "error": 0.05, "predicted": predicted, "points": 3}


def made(**more: Any) -> dict[str, Any]:
    point = {"size": 64, "p20_us": 1.0, "p50_us": 1500.0, "p80_us": 3.0, "samples": 3, "peak_bytes": 2_500_000}
    row = {
        "name": "svd", "panel": "decompositions", "unit": "multiply-adds", "points": [{**point, "size": 8}, point],
        "time": line(3.4, 3.0), "memory": line(2.0, 2.0), **more,
    }  # fmt: skip
    environment = {"cpu": "a CPU", "cpu_threads": 2, "torch": "2.11"}
    groups = {"channels": {"variable": "channels C", "fixed": "Maps of 14×14.", "series": [row]}}
    return {"environment": environment, "quick": False, "groups": groups, "seconds": 12.3}


def test_the_tables(page) -> None:
    told = page.table(made()).splitlines()
    assert told[2] == "| channels C | svd | 8–64 | 1.5 ms | 3.40 ± 0.05 | 3.00 | **+0.40** | multiply-adds |"
    assert told[-1] == (
        "float32, 2 threads of a CPU, torch 2.11; medians; 1 series; above the prediction by more than 0.3: "
        "1 in time, 0 in memory; the run took 12 s."
    )
    assert page.memory_table(made()).splitlines()[2] == "| channels C | svd | 64 | 2.5 MB | 2.00 ± 0.05 | 2.00 |  |"
    early = made(ended="at 128 a call would take about 9 s", time=None, panel="convolutions, forward and backward")
    told = page.table(early).splitlines()
    assert told[2] == "| channels C | svd, forward and backward | 8–64 | 1.5 ms | – | – |  | multiply-adds |"
    assert told[-1] == (
        "Ended early: svd, forward and backward over channels C: at 128 a call would take about 9 s."
    )  # fmt: skip


@pytest.mark.parametrize(("exponent", "marked"), [(3.31, True), (3.29, False), (1.0, False)])
def test_what_is_marked(page, exponent, marked) -> None:
    assert page.flagged(line(exponent, 3.0)) == marked
    assert not page.flagged(None)


def test_without_a_result(page, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(page, "ROOT", tmp_path)
    monkeypatch.setattr(page, "FIGURES", tmp_path)
    assert page.result() is None
    assert page.table(None) == page.memory_table(None) == page.pictures(None) == "Not yet measured."
    assert page.pictures(made()) == ""
    (tmp_path / "growth-channels.png").touch()
    told = page.pictures(made())
    assert told == "![Time and memory over the channels C](figures/growth-channels.png)\n\nMaps of 14×14."


@pytest.mark.parametrize("arguments", [["--only", "chanels"], ["--keep", "--quick"], ["--keep", "--only", "map"]])
def test_mistakes_are_told(growth, monkeypatch, capsys, arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["growth.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        growth.main()
    assert "must " in capsys.readouterr().err


def test_memory_is_counted_whatever_threads_do(memory: Any) -> None:
    """Large matrices are decomposed by several threads, of which a dispatch mode sees only its own."""
    matrices = [torch.randn(128, 600) for _ in range(40)]
    before = torch.get_num_threads()
    state = ops.SpectralState()
    peaks = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            ops.nuclear_subgradient(matrices, state=state)
            peaks.append(memory.peak_bytes(lambda: ops.nuclear_subgradient(matrices, state=state)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert peaks[0] == peaks[1] >= 40 * 4 * 128 * 600
