"""bench/gpu.py and what it leaves: the steps asked for, their time, results that survive a stop, the table of goals."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from typing import Any

import pytest
from bench_modules import BENCH, load

MICRO = {"p20_us": 0.0, "p80_us": 0.0, "samples": 3}


@pytest.fixture
def gpu() -> Any:
    return load("gpu")


@pytest.mark.parametrize(
    ("only", "families", "steps", "found"),
    [
        ("", "", ["build", "tests", "sanitizer", "bench"], []),
        ("tucker2", "", ["build", "tests", "sanitizer", "bench"], ["tucker2"]),
        ("bench,tucker2,build", "", ["build", "bench"], ["tucker2"]),
        ("tests", "linalg,gates", ["tests"], ["gates", "linalg"]),
    ],
)
def test_steps_and_families_by_name(gpu, only, families, steps, found) -> None:
    assert gpu.chosen(only, families) == (steps, found)


def test_unknown_names_are_refused(gpu) -> None:
    with pytest.raises(
        ValueError, match=r"^--only and --families must name some of build, .*tucker2, got bnech, tukcer$"
    ):
        gpu.chosen("bnech", "tukcer")
    assert {"networks", "tucker2"} <= set(gpu.FAMILIES)
    assert "decompose" not in gpu.FAMILIES


def test_the_gpu_tests_of_a_family(gpu) -> None:
    everything = {path.name for path in gpu.gpu_tests([])}
    assert {"test_tucker2_device.py", "test_gate_lists.py", "test_polar.py"} <= everything
    gates = {path.name for path in gpu.gpu_tests(["gates"])}
    assert "test_gate_lists.py" in gates
    assert all("gate" in name for name in gates)
    mine = {path.name for path in gpu.gpu_tests(["tucker2"])}
    assert {"test_tucker2_device.py", "test_tucker2_triton.py"} <= mine
    assert all("tucker2" in name for name in mine)


def test_no_gpu_is_one_sentence_and_exit_code_2(gpu, monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "out"), "--only", "tucker2"])
    assert gpu.main() == 2
    assert capsys.readouterr().err == "the GPU run cannot start here: torch sees no NVIDIA GPU\n"
    assert not (tmp_path / "out").exists()


def test_a_step_leaves_the_later_ones_what_is_reserved(gpu, tmp_path) -> None:
    assert sum(gpu.RESERVED_S.values()) <= gpu.BUDGET_S < 600
    assert set(gpu.RESERVED_S) == set(gpu.STEPS)
    runner = gpu.Runner(tmp_path, [], gpu.STEPS)
    for step, later in zip(
        gpu.STEPS, (("tests", "sanitizer", "bench"), ("sanitizer", "bench"), ("bench",), ()), strict=True
    ):
        assert runner.left(step) == pytest.approx(gpu.BUDGET_S - sum(gpu.RESERVED_S[name] for name in later), abs=1)
    assert gpu.Runner(tmp_path, [], ["bench"]).left("bench") == pytest.approx(gpu.BUDGET_S, abs=1)


def test_commands_are_logged_and_stopped_in_time(gpu, tmp_path) -> None:
    runner = gpu.Runner(tmp_path, [], gpu.STEPS)
    code = "import os, sys; print('said', os.environ['WORD']); sys.exit(3)"
    assert runner.run("tests", [sys.executable, "-c", code], 60.0, WORD="hello") == (
        False,
        "exit code 3; see tests.log",
    )
    begin = time.monotonic()
    slow = [sys.executable, "-c", "print('begun', flush=True); import time; time.sleep(60)"]
    assert runner.run("tests", slow, 2.0) == (False, "it took more than 2 s; see tests.log")
    assert time.monotonic() - begin < 30
    assert runner.run("tests", slow, 0.0) == (False, f"no time was left of {gpu.BUDGET_S:.0f} s")
    log = (tmp_path / "tests.log").read_text(encoding="utf-8")
    assert "said hello" in log
    assert "begun" in log


def test_families_share_the_time_for_benchmarks(gpu, tmp_path, monkeypatch) -> None:
    runner, calls = gpu.Runner(tmp_path, ["networks", "tucker2"], ["bench"]), []

    def run(step: str, command: list[str], limit_s: float, **environment: str) -> tuple[bool, str]:
        calls.append((command[-1], limit_s, environment))
        return "networks" not in command[-1], "it broke"

    monkeypatch.setattr(runner, "run", run)
    result = runner.bench()
    assert (result.outcome, result.reason) == ("failed", "networks: it broke")
    for (path, limit, environment), family, share in zip(calls, ("networks", "tucker2"), (2, 1), strict=True):
        assert path == str(BENCH / f"test_{family}.py")
        assert limit == pytest.approx(gpu.BUDGET_S / share, abs=1)
        assert environment["FASTRANK_BENCH_OUT"] == str(tmp_path / f"bench_{family}.jsonl")
        assert float(environment["FASTRANK_BENCH_SECONDS"]) == pytest.approx(limit - gpu.GRACE_S)


def test_a_family_without_a_workload_or_tests_is_skipped_with_a_reason(gpu, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(gpu.shutil, "which", lambda name: "/bin/true")
    monkeypatch.setattr(gpu, "gpu_tests", lambda families: [])
    runner = gpu.Runner(tmp_path, ["networks"], gpu.STEPS)
    assert runner.sanitizer().reason == "networks has no workload"
    assert runner.tests().reason == "networks has no tests that need a GPU"


def test_every_benchmark_is_kept_as_it_ends_and_none_begins_too_late(tmp_path) -> None:
    shutil.copy(BENCH / "conftest.py", tmp_path)
    (tmp_path / "test_rows.py").write_text(
        "import os\n"
        "def test_one(benchmark):\n    benchmark.extra_info['a'] = 1\n    benchmark(int)\n"
        "def test_two(benchmark):\n    benchmark.extra_info['a'] = 2\n    benchmark(int)\n    os._exit(9)\n",
        encoding="utf-8",
    )
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "test_rows.py"]
    environment = {"PATH": "", "FASTRANK_BENCH_OUT": str(out)}
    first = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert first.returncode == 9, first.stdout + first.stderr
    (row,) = map(json.loads, out.read_text(encoding="utf-8").splitlines())
    assert row == {"name": "test_one", "group": None, "extra_info": {"a": 1}}
    late = environment | {"FASTRANK_BENCH_SECONDS": "0"}
    second = subprocess.run([*command, "-rs"], cwd=tmp_path, env=late, capture_output=True, text=True, check=False)
    assert "the 0 s for benchmarks are used up" in second.stdout
    assert len(out.read_text(encoding="utf-8").splitlines()) == 1


def forward_row(layer: str, batch: int, counts: dict[str, int], **us: float) -> dict[str, Any]:
    found = {name: {"p50_us": value, **MICRO} for name, value in us.items()}
    way = {"cold_graph": found, "eager": {name: {"p50_us": 1.0} for name in us}, "floor_us": 2.0}
    return {
        "name": "test_forward",
        "group": "tucker2 forward",
        "extra_info": {
            "layer": layer, "batch": batch, "ranks": [32, 32], "counts": counts, "auto_by": "measured here",
            "plain": way, "environment": {"gpu": "a card", "torch": "2", "cuda": "13", "cudnn": 9},
        },
    }  # fmt: skip


def write(path: Any, rows: list[dict[str, Any]], rest: str = "") -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + rest, encoding="utf-8")


@pytest.fixture
def results(tmp_path) -> Any:
    """A stack of two layers at N=128, 12 and 4 times, the second slower than dense; a training row; host times."""
    rows = [
        forward_row("64, 56x56", 128, {"ResNet-18": 12}, dense=8, sequence=10, padded=9, cuda=4, triton=5, auto=4),
        forward_row("NRMF conv4", 128, {"ResNet-18": 4}, dense=10, sequence=20, cuda=16, auto=12.5),
    ]
    trained = forward_row("64, 56x56", 128, {"ResNet-18": 16}, sequence=27, cuda=18, auto=18)
    trained["group"] = "tucker2 forward and backward"
    trained["extra_info"]["saved_bytes"] = {"sequence": 100, "cuda": 50, "auto": 50}
    compiled = forward_row("64, 56x56", 1, {"ResNet-18": 4}, compiled=18, auto=9)
    compiled["group"] = "tucker2 compiled"
    host = forward_row("64, 56x56", 1, {})
    host["group"] = "tucker2 host"
    host["extra_info"] |= {"host": {"auto": {"p50_us": 12.0}, "cuda": {"p50_us": 8.0}}}
    write(tmp_path / "bench_tucker2.jsonl", [*rows, trained, compiled, host], '{"name": "test_forw')
    network = {
        "network": "ResNet-18", "batch": 8, "fewer_macs": 2.6,
        "images_a_second": {"cold_graph": {"dense": 10, "auto": 20}},
        "faster_than_dense": {"cold_graph": {"dense": 1, "auto": 2}},
    }  # fmt: skip
    write(tmp_path / "bench_networks.jsonl", [{"name": "n", "group": "ResNet-18 compiled", "extra_info": network}])
    cp = [
        {"name": "test_forward[256-14-1]", "group": "cp forward",
         "extra_info": {"layer": f"{channels}, 14x14", "rank": rank, "cold_graph": {
             name: {"p50_us": us} for name, us in {"sequence": 40, "dense": 12, "triton": fused}.items()}}}
        for channels, rank, fused in ((128, 1, 4), (256, 1, 4), (256, 4, 10))
    ]  # fmt: skip
    write(tmp_path / "bench_cp.jsonl", cp)
    gates = [
        {"name": f"test_gated_factors[{name}]", "group": "gated_factors, forward",
         "extra_info": {"bytes_moved": 4.3e6 * 20, "cold_graph": {"p50_us": us}}}
        for name, us in (("foreach-ResNet-18", 90), ("cuda-ResNet-18", 30), ("triton-ResNet-18", 45),
                         ("cuda-64 MB of rows of 64", 25), ("triton-64 MB of rows of 64", 40),
                         ("cuda-64 MB of rows of 576", 21))
    ]  # fmt: skip
    write(tmp_path / "bench_gates.jsonl", gates)
    return tmp_path


def goals_by_what(folder: Any) -> dict[str, Any]:
    return {goal.what: goal for goal in load("goals").table(folder)}


def test_goals_from_results(results) -> None:
    goals = goals_by_what(results)

    def told(what: str) -> tuple[str, bool | None]:
        return goals[what].found, goals[what].met

    stack = goals["ResNet-18's stack, fused over three convolutions, N=128"]
    assert (stack.found, stack.met) == (f"{(12 * 9 + 4 * 20) / (12 * 4 + 4 * 16):.2f}×", True)
    assert stack.roofline == pytest.approx(16 * 2 / (12 * 4 + 4 * 16))
    dense = (12 * 8 + 4 * 10) / (12 * 4 + 4 * 12.5)
    assert told("ResNet-18's stack, auto over dense, N=128") == (f"{dense:.2f}×", False)
    assert told("every layer, auto over dense, to 3 % of noise") == ("0.80× at the worst (NRMF conv4, N=128)", False)
    assert told("every layer, auto over the best backend") == ("0.80× at the worst (NRMF conv4, N=128)", False)
    assert told("NRMF conv4, auto over dense, N=128") == ("0.80×", False)
    assert told("auto over torch.compile, N=1, geometric mean") == ("2.00× (1 rows)", True)
    assert told("layers of 64 channels, N≥32, fused") == ("50 % at the worst (64, 56x56, N=128)", False)
    assert told("ResNet-18's stack, forward and backward, fused over three, N=128") == ("1.50×", True)
    assert told("the same, layers with R ≤ 64, geometric mean") == ("1.50× (1 rows)", False)
    assert told("saved activations, fused of three") == ("50 %", True)
    assert told("host time of an eager call, auto") == ("12.0 µs (cuda 8.0)", False)
    for what in ("ResNet-18's stack, auto over dense, N=8", "NRMF conv5, auto over dense, N=128"):
        assert told(what) == ("not measured", None)
    assert {goal.number for goal in goals.values()} == {"1", "2", "3", "4", "5", "6", "11", "12"}
    mean = (10 * 10 * 4) ** (1 / 3)
    assert told("CP layers, fused over the chain of four operations, geometric mean") == (f"{mean:.2f}× (3 rows)", True)
    assert told("CP layers of 128 channels, R = 1, fused over dense") == ("3.00×", True)
    assert told("CP layers of 256 channels, R = 1, fused over dense") == ("3.00×", False)
    assert told("gated factors of ResNet-18, fused over a torch._foreach chain") == ("3.00×", True)
    assert told("gated factors of 64 MB and more") == ("80 % at the worst (64 MB of rows of 64)", False)


def test_missing_layers_and_a_missing_table_are_told(tmp_path) -> None:
    row = forward_row("64, 56x56", 128, {"ResNet-18": 4}, dense=8, sequence=8, cuda=4, auto=8)
    row["extra_info"]["auto_by"] = "nothing known"
    write(tmp_path / "bench_tucker2.jsonl", [row])
    found = goals_by_what(tmp_path)["ResNet-18's stack, auto over dense, N=128"].found
    assert found == "1.00× (4 of 16 layers); auto had no table of this device, with one 2.00×"


def test_goals_are_printed_and_written(results, monkeypatch, capsys) -> None:
    goals = load("goals")
    monkeypatch.setattr(sys, "argv", ["goals.py", str(results), "--write", str(results / "goals.md")])
    assert goals.main() == 1
    shown = capsys.readouterr().out
    assert shown == (results / "goals.md").read_text(encoding="utf-8")
    assert "| ResNet-18 | 8 | CUDA graph, compiled | auto | 20 | 2.60× | 2.00× |" in shown
    assert "Measured on a card, torch 2, CUDA 13, cuDNN 9." in shown
    monkeypatch.setattr(sys, "argv", ["goals.py", str(results / "nowhere")])
    assert goals.main() == 2
    assert capsys.readouterr().err.endswith("nowhere has no results of tucker2, networks, cp, gates\n")
