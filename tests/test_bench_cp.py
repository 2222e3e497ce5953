"""The benchmarks of CP and SVD layers: what they time is right, and the sanitizer's workload runs without a GPU."""

from __future__ import annotations

import sys

import pytest
import torch
from bench_modules import FakeBenchmark, load


def test_rows_are_kept_as_the_goals_read_them(monkeypatch) -> None:
    bench, goals = load("test_cp"), load("goals")
    monkeypatch.setattr(bench.timing, "DEVICE", "cpu")
    benchmark = FakeBenchmark()
    bench.run(benchmark, bench._cp.case(16, 6, 2, "cpu"))
    info = benchmark.extra_info
    assert (info["op"], info["layer"], info["rank"], info["batch"]) == ("cp_conv2d", "16, 6x6", 2, 1)
    assert set(info["eager"]) == {"auto", "depthwise", "dense", "sequence"}
    assert set(info["left_out"]) == {"triton"}
    assert info["macs"] == 36 * 2 * 16 * (16 + 6)
    assert benchmark.rounds == 3
    assert goals.FAMILIES[2] == "cp"


def test_a_wrong_contender_fails_the_row(monkeypatch) -> None:
    bench = load("test_cp")
    right = bench._cp.by("depthwise")

    def by(backend: str, activation: str = "relu"):
        return (lambda p: lambda: 1.01 * right(p)()) if backend == "depthwise" else lambda p: right(p)

    monkeypatch.setattr(bench._cp, "by", by)
    benchmark = FakeBenchmark()
    with pytest.raises(AssertionError, match=r"'depthwise': 'its error is "):
        bench.run(benchmark, bench._cp.case(16, 6, 2, "cpu"))
    assert "depthwise" not in benchmark.extra_info["eager"]


def test_the_workload_runs_every_kernel_without_a_gpu(monkeypatch, capsys) -> None:
    workload = load("cp_workload")
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: Triton's interpreter is off")
    monkeypatch.setattr(workload, "CASES", {"tiny": workload.Case(3, 5, (4, 3), 2, stride=(2, 1))})
    monkeypatch.setattr(sys, "argv", ["cp_workload.py", "--device", "cpu"])
    workload.main()
    shown = capsys.readouterr().out.splitlines()
    assert shown == [f"{op}, tiny: ran" for op in ("cp_conv2d", "decoupled_svd_conv2d", "channel_svd_conv2d")]
    monkeypatch.setattr(sys, "argv", ["cp_workload.py"])
    with pytest.raises(SystemExit, match="torch sees no NVIDIA GPU"):
        workload.main()
