"""The benchmarks of CP and SVD layers: what they time is right, and the sanitizer's workload runs without a GPU."""

from __future__ import annotations

import sys

import pytest
import torch
from bench_modules import load


def test_contenders_of_the_cp_layers_compute_the_layer(monkeypatch) -> None:
    bench = load("test_depthwise")
    tensors = bench.made(16, 6, 2)
    with torch.no_grad():
        calls = {name: bench.by(name) for name in ("sequence", "depthwise")} | {"dense": bench.dense(tensors)}
        bench.check(calls, tensors)
        wrong = {"off": lambda tensors: 1.01 * calls["dense"](tensors)}
        with pytest.raises(AssertionError, match=r"^off is off by"):
            bench.check(wrong, tensors)


def test_the_workload_runs_every_kernel_without_a_gpu(monkeypatch, capsys) -> None:
    workload = load("depthwise_workload")
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: Triton's interpreter is off")
    monkeypatch.setattr(workload, "CASES", {"tiny": workload.Case(3, 5, (4, 3), 2, stride=(2, 1))})
    monkeypatch.setattr(sys, "argv", ["depthwise_workload.py", "--device", "cpu"])
    workload.main()
    shown = capsys.readouterr().out.splitlines()
    assert shown == [f"{op}, tiny: ran" for op in ("cp_conv2d", "decoupled_svd_conv2d", "channel_svd_conv2d")]
    monkeypatch.setattr(sys, "argv", ["depthwise_workload.py"])
    with pytest.raises(SystemExit, match="torch sees no NVIDIA GPU"):
        workload.main()
