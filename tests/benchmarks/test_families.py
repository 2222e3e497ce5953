"""Families of benchmarks on tiny rows: everyone is checked, what is wrong is never timed, results are what is shown."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from bench_modules import BENCH, load
from rich.console import Console

from fastrank import benchmarks, cli, report
from fastrank.benchmarks import _cp, _gates, _linalg, _networks, _run, _tucker2, linalg_contenders, timing
from fastrank.benchmarks._check import failures, multilinear, relative, within, worst
from fastrank.benchmarks.layers import Layer

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = Layer("tiny", 8, 12, 2, 6, (3, 5), {})
SECONDS = 1e-6
NETWORK = (((6, 3, 3), (8, 6, 3), (12, 8, 1)), ("mode3", "mode4"))
SHAPES = [(3, 3), (4, 3, 3, 3), (4, 4)]
DEEP = _networks.Spec("ResNet-20", "cp_conv2d", partial(_networks.zoo, "resnet_20", 1, "[0.]+[0.4]*11"), 8)


def tiny(family: str, monkeypatch: pytest.MonkeyPatch) -> list[benchmarks.Case]:
    monkeypatch.setitem(linalg_contenders.NETWORKS, "tiny", NETWORK)
    return {
        "tucker2": lambda: [
            _tucker2.case(TINY, 2, "cpu"),
            _tucker2.case(Layer("square", 8, 8, 1, 6, (3, 5), {}), 2, "cpu", epilogue=True),
            _tucker2.training_case(TINY, 2, "cpu"),
        ],
        "cp": lambda: [
            _cp.case(8, 6, 2, "cpu"),
            _cp.training_case(8, 6, 2, "cpu"),
            _cp.layer_case(8, 6, "cpu"),
        ],
        "linalg": lambda: [
            _linalg.subgradient_case("tiny", "flat", None, "cpu"),
            _linalg.subgradient_case("tiny", "decaying", 0.9, "cpu"),
            _linalg.step_case("tiny", "cpu"),
            _linalg.svd_case("tiny", "cpu"),
            _linalg.filters_case(6, 1),
            _linalg.tucker2_case(6),
        ],
        "gates": lambda: [
            _gates.factors_case("tiny", SHAPES, "cpu"),
            _gates.factors_case("tiny", SHAPES, "cpu", training=True),
            _gates.penalty_case("tiny", SHAPES, "cpu"),
            _gates.proximal_case("tiny", SHAPES, "cpu"),
        ],
        "networks": lambda: [_networks.case(DEEP, 2, "cpu")],
    }[family]()


@pytest.mark.parametrize("family", benchmarks.FAMILIES)
def test_every_family_runs(family, monkeypatch) -> None:
    rows = tiny(family, monkeypatch)
    found = benchmarks.family(rows, seconds=SECONDS)
    assert json.loads(json.dumps(found)) == found
    assert found["green"], found["wrong"]
    for case, row in zip(rows, found["rows"], strict=True):
        assert not row["not_timed"]
        assert row["way"] == "eager"
        # Who is left out is a kernel, which needs a GPU, or a package that is not there.
        known = {name for name, why in row["left_out"].items() if "not installed" in why}
        known |= {name for name in row["left_out"] if "cuda" in name or "triton" in name}
        assert {name: why for name, why in row["left_out"].items() if name not in known} == {}
        assert {*row["times"], *row["left_out"]} == {each.name for each in case.contenders}
        for us in row["times"].values():
            assert 0 < us["p20_us"] <= us["p50_us"] <= us["p80_us"]
        for base, ratios in row["ratios"].items():
            assert ratios[base] == 1
            assert set(ratios) == set(row["times"])
        for error in row["errors"].values():
            assert error["limit"] is None or 0 <= error["error"] <= error["limit"]
        assert (row["fewer_macs"] is not None) == (family in ("tucker2", "cp", "networks"))
        assert row["roofline"] == {}
        assert row["floor_us"] is None


def off(build: Any, change: Any) -> Any:
    """A contender whose result is changed."""
    return lambda p: (lambda call: lambda: change(call()))(build(p))


def raising(p: Any) -> Any:
    raise RuntimeError("no such layer\nand more")


def spoilt(case: benchmarks.Case, name: str, **changes: Any) -> benchmarks.Case:
    found = [replace(each, **changes) if each.name == name else each for each in case.contenders]
    return replace(case, contenders=found)


@pytest.mark.parametrize(
    "change",
    [lambda y: 1.001 * y, lambda y: y.flip(1), lambda y: y[:, :-1], lambda y: y * float("nan")],
    ids=["scaled", "flipped", "smaller", "nan"],
)
def test_a_wrong_contender_of_ours_turns_the_family_red(change, monkeypatch) -> None:
    rows = tiny("tucker2", monkeypatch)
    calls: list[str] = []
    monkeypatch.setattr(timing, "for_seconds", lambda *args, **_: calls.append("timed") or {})
    auto = next(each for each in rows[0].contenders if each.name == "auto")
    found = benchmarks.family([spoilt(rows[0], "auto", build=off(auto.build, change)), *rows[1:]], seconds=SECONDS)
    assert not calls
    assert not found["green"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    (what,) = found["wrong"]
    assert what == "tucker2_conv2d, tiny, N=2: auto"
    for row in found["rows"]:
        assert row["not_timed"].startswith(f"{what}: its error is ")
        assert row["times"] == row["ratios"] == {}
        assert not row["green"]
    for cells in benchmarks.lines(found["rows"]):
        assert cells[1].startswith("not timed: ")
        assert not any("×" in cell for cell in cells[2:])


def test_a_wrong_peer_is_left_out_and_the_family_stays_green(monkeypatch) -> None:
    (case, *_) = tiny("tucker2", monkeypatch)
    dense = next(each for each in case.contenders if each.name == "dense")
    case = spoilt(case, "dense", build=off(dense.build, lambda y: y + 1))
    case = spoilt(case, "sequence", build=raising)
    found = benchmarks.family([case], ["dense", "sequence"], seconds=SECONDS)
    (row,) = found["rows"]
    assert found["green"]
    assert set(row["times"]) == {"auto"} | ({"sequence, ranks padded to 8"} & set(row["times"]))
    assert row["left_out"]["dense"].startswith("wrong: its error is ")
    assert row["left_out"]["sequence"] == "RuntimeError: no such layer"
    assert row["ratios"] == {}


def test_a_contender_of_ours_that_raises_is_wrong_unless_it_may_refuse(monkeypatch) -> None:
    (case, *_) = tiny("cp", monkeypatch)
    ready = benchmarks.prepare(spoilt(case, "depthwise", build=raising), [])
    assert ready.red == {"depthwise": "RuntimeError: no such layer"}
    ready = benchmarks.prepare(spoilt(case, "depthwise", build=raising, may_refuse=True), [])
    assert ready.red == {}
    assert ready.left_out["depthwise"] == "RuntimeError: no such layer"
    assert RuntimeError in failures()


def test_what_approximates_is_told_and_not_judged(monkeypatch) -> None:
    (case, *_) = tiny("linalg", monkeypatch)
    ready = benchmarks.prepare(case, ["muon"])
    assert ready.errors["muon"]["limit"] is None
    # Muon's coefficients leave singular values between 0.7 and 1.2 (and below, where they were small).
    assert 0.05 < ready.errors["muon"]["error"] < 1
    assert "muon" in ready.calls
    row = benchmarks.measured(ready, SECONDS)
    cells = {cells[1]: cells[-1] for cells in benchmarks.lines([row])}
    assert cells["muon"].endswith(" approximate")


def test_judges() -> None:
    judge = within([torch.zeros(2), torch.ones(3)], [0.5, 0.1])
    assert judge([torch.tensor([0.0, 0.25]), torch.ones(3)]) == (0.25, 0.5)
    assert judge([torch.zeros(2), torch.ones(4)])[0] == float("inf")
    assert worst([(0.1, 1.0), (0.01, 0.02)]) == (0.01, 0.02)
    assert worst([(0.1, 1.0), (float("nan"), 1.0)]) == (float("inf"), 1.0)
    error, limit = relative([torch.tensor([3.0, 4.0]).double()], [0.3])([torch.tensor([3.0, 5.0])])
    assert (error, limit) == (pytest.approx(0.2), 0.3)
    # eps times (roundings + √terms), times the sum over absolute values.
    judge = multilinear(
        lambda x, y: [x @ y], [torch.tensor([[-1.0, 1.0]]), torch.ones(2, 1)], torch.float32, roundings=2, terms=4
    )
    assert judge(torch.zeros(1, 1)) == (0.0, 4 * torch.finfo(torch.float32).eps * 2)


def test_bounds_of_decompositions() -> None:
    torch.manual_seed(0)
    a, b, c = torch.randn(5, 4, 1, 1), torch.randn(5, 1, 3, 1), torch.randn(5, 1, 1, 3)
    assert _linalg.slices_bound(a * b * c, 1) < 1e-6
    assert 0.1 < _linalg.slices_bound(torch.randn(5, 4, 3, 3), 1) < 1
    weight = torch.einsum("or,rihw->oihw", torch.randn(6, 2), torch.randn(2, 4, 3, 3))
    assert _linalg.tails_bound(weight, (4, 2)) < 1e-5
    assert _linalg.tails_bound(weight, (4, 1)) > 1e-2


def test_a_gpu_row_has_the_fraction_of_the_floor(monkeypatch) -> None:
    """Graphs that are none, for the code around them."""
    (case, *_) = tiny("tucker2", monkeypatch)
    ready = benchmarks.prepare(case, ["dense"])
    ready.case = replace(case, device="cuda")
    copied: list[int] = []

    def graphs(thunks: Any, *, least_us: float, repeats: int) -> dict[str, list[float]]:
        copied.extend(len(those) for those in thunks.values())
        return {"auto": [20.0] * repeats, "dense": [30.0] * (repeats - 1) + [90.0]}

    monkeypatch.setattr(timing, "long_graphs", graphs)
    monkeypatch.setattr(timing, "copies", lambda size, at_most: 3)
    monkeypatch.setattr(_run, "peaks", lambda: (790e12, 4.3e12))
    row = benchmarks.measured(ready, SECONDS)
    assert copied == [3, 3]
    assert row["way"] == "cold_graph"
    assert row["ratios"] == {"dense": {"auto": 1.5, "dense": 1.0}}
    elements = 4 * TINY.elements(2, False)
    assert row["floor_us"] == pytest.approx(1e6 * elements / 4.3e12)
    assert row["roofline"] == {"auto": row["floor_us"] / 20, "dense": row["floor_us"] / 30}
    heads, (first, second) = benchmarks.columns([row]), benchmarks.lines([row])
    assert dict(zip(heads, first, strict=True))["of the floor's speed"] == f"{100 * row['roofline']['auto']:.0f} %"
    assert dict(zip(heads, first, strict=True))["fewer multiply-adds"] == f"{row['fewer_macs']:.2f}×"
    assert dict(zip(heads, second, strict=True))["fewer multiply-adds"] == ""


def test_a_network_without_its_package_is_left_out(monkeypatch) -> None:
    case = _networks.case(DEEP._replace(needs="no_such_package"), 1, "cpu")
    found = benchmarks.family([case], seconds=SECONDS)
    (row,) = found["rows"]
    assert found["green"]
    assert row["not_timed"] == "nobody is left"
    assert set(row["left_out"].values()) >= {"no_such_package is not installed"}


def row_of(**more: Any) -> dict[str, Any]:
    us = {"p20_us": 900.0, "p50_us": 1000.0, "p80_us": 1100.0, "samples": 9}
    return {
        "family": "cp", "operation": "op", "case": "case", "baselines": ["dense", "sequence"], "fewer_macs": 2.0,
        "errors": {"auto": {"error": 1e-6, "limit": 1e-5}}, "left_out": {"cuda": "no GPU"}, "green": True,
        "not_timed": "", "roofline": {}, "times": {"dense": {**us, "p50_us": 4000.0}, "auto": us},
        "ratios": {"dense": {"auto": 4.0, "dense": 1.0}},
    } | more  # fmt: skip


def test_rows_are_shown_the_fastest_first() -> None:
    rows = [row_of(), row_of(case="other", left_out={"cuda": "no GPU", "triton": "no"})]
    first, second, *_ = benchmarks.lines(rows)
    assert first == ["op, case", "auto", "1 ms", "-10 +10 %", "4.00× dense", "2.00×", "1.0e-06"]
    assert second == ["", "dense", "4 ms", "-78 -72 %", "", "", ""]
    assert benchmarks.left_out(rows) == ["cuda: no GPU", "triton: no (op, other)"]
    assert benchmarks.geometric_mean([row_of(), row_of(ratios={"dense": {"auto": 1.0}})], "auto", "dense") == 2.0
    assert benchmarks.geometric_mean(rows, "auto", "sequence") is None
    shown = Console(width=200, record=True)
    shown.print(report.table(benchmarks.columns(rows), list(benchmarks.lines(rows)), left=2))
    assert "4.00× dense" in shown.export_text()


def test_a_run_ends_with_one_line_and_its_figures() -> None:
    found = load("conftest").summary([row_of(), row_of(family="gates", ratios={})], 12.34)
    assert found["line"] == "2 rows, 2 of 2 families green, geometric mean of auto over dense 4.00×, 12 s"
    assert (found["ok"], found["seconds"], found["rows"], found["red"]) == (True, 12.3, 2, [])
    red = load("conftest").summary([row_of(), row_of(family="gates", green=False, times={}, ratios={})], 1.0)
    assert (red["ok"], red["red"], red["timed"]) == (False, ["gates"], 1)


def test_pytest_ends_with_the_line(tmp_path) -> None:
    """A CPU runs the rows and not the long lists, and what it found is kept where it is asked to be."""
    (tmp_path / "bench").mkdir()
    shutil.copy(BENCH / "conftest.py", tmp_path / "bench")
    (tmp_path / "bench" / "test_rows.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('case', [1])\n"
        "def test_family(benchmark, case):\n"
        f"    benchmark.extra_info.update(row={row_of()!r}, environment={{'cpu': 'a CPU'}})\n"
        "    benchmark(int)\n"
        "def test_long(benchmark):\n    raise AssertionError\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "bench"]
    environment = {"PATH": "", "FASTRANK_KEEP": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    line = done.stdout.splitlines()[-1]
    assert line.startswith("bench-cpu: 1 rows, 1 of 1 families green, geometric mean of auto over dense 4.00×, ")
    kept = json.loads((tmp_path / "bench/results/reliability/bench.json").read_text(encoding="utf-8"))
    assert line == f"bench-cpu: {kept['line']}"
    assert (kept["ok"], kept["rows"], kept["machine"]) == (True, 1, {"cpu": "a CPU", "cores": None})
    page = json.loads((tmp_path / "bench/results/bench-cpu.json").read_text(encoding="utf-8"))
    assert page["rows"] == [row_of()]
    done = subprocess.run(
        [*command, "--full"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "test_long" in done.stdout


def test_the_page() -> None:
    page = load("benchmarks_page")
    assert page.table(None) == "Not yet measured."
    machine = {"cpu": "a CPU", "cpu_capability": "AVX2", "cpu_threads": 2, "cpu_mhz": {"now": 2100.0}, "torch": "2.11"}
    text = page.table({"machine": machine, "line": "1 rows, green", "rows": [row_of()]})
    assert text.startswith(
        "a CPU (AVX2), 2 threads, 2100 MHz as found, torch 2.11. 1 rows, green.\n\n### CP convolutions"
    )
    assert "| op, case | auto | 1 ms | -10 +10 % | 4.00× dense | 2.00× | 1.0e-06 |" in text
    assert text.endswith("Left out: cuda: no GPU.")


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["fastrank", "bench", *args])
    code = 0
    try:
        cli.main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def few(monkeypatch) -> None:
    rows = {family: tiny(family, monkeypatch)[:1] for family in ("tucker2", "gates")}
    monkeypatch.setattr(_run, "cases", lambda family, device=None: rows[family])


def test_the_command(few, monkeypatch, capsys) -> None:
    code, text, told = command(
        monkeypatch, capsys, "--family", "tucker2,gates", "--compare", "dense,eager", "--seconds", "1e-6"
    )
    assert code == 0
    assert "timing tucker2_conv2d, tiny, N=2" in told
    for words in ("tucker2: Tucker-2 convolutions", "× dense", "gated_factors, tiny", "× naive", "left out: cuda: "):
        assert words in text
    assert "tltorch" not in text
    code, text, told = command(
        monkeypatch, capsys, "--family", "gates", "--compare", "eager", "--seconds", "1e-6", "--json"
    )
    found = json.loads(text)
    assert (code, told) == (0, "")
    assert set(found) == {"environment", "seconds_a_row", "compare", "families", "ok"}
    assert found["compare"] == ["eager"]
    assert set(found["families"]["gates"]["rows"][0]["times"]) == {"auto", "a call a factor", "naive"}


def test_the_command_fails_where_a_family_is_red(monkeypatch, capsys) -> None:
    (case, *_) = tiny("cp", monkeypatch)
    auto = next(each for each in case.contenders if each.name == "auto")
    case = spoilt(case, "auto", build=off(auto.build, lambda y: 1.01 * y))
    monkeypatch.setattr(_run, "cases", lambda family, device=None: [case])
    code, text, _ = command(monkeypatch, capsys, "--family", "cp", "--compare", "dense")
    assert code == 1
    assert "not timed: " in text
    assert "wrong: cp_conv2d, 8, 6x6, R=2, N=1: auto: its error is " in text
    assert "× dense" not in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--family", "tukcer2"), "--family must name some of tucker2, cp, linalg, gates, networks, got tukcer2"),
        (("--family", "cp", "--compare", "cudnn"), "--compare must name some of dense, sequence, "),
        (("--compare", "dense"), "--compare must go with --family, got it alone"),
        (("--family", "cp", "--tune"), "--family must stand without a model, --arch and --tune, got one of them"),
        (("--family", "cp", "--seconds", "0"), "--seconds must be above 0, got 0"),
        (("--family", "cp", "--device", "tpu"), "--device must be cpu"),
    ],
)
def test_bad_options_are_one_sentence(args, message, monkeypatch, capsys) -> None:
    code, _, told = command(monkeypatch, capsys, *args)
    assert code == 2
    assert told.startswith(f"fastrank: {message}")
