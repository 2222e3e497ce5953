"""Every GPU kernel compiles offline, without spills and within a block's shared memory, and is in the report."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "bench" / "kernel_report.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kernel_report", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kernel_report"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_no_kernel_spills() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--arch", "sm_90a", "--json"], capture_output=True, text=True, check=False
    )
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    assert report["problems"] == []
    assert done.returncode == 0
    if set(report["skipped"]) == {"cuda", "triton"}:
        pytest.skip("; ".join(report["skipped"].values()))
    assert report["rows"]


def test_finds_what_is_wrong(script: ModuleType) -> None:
    """Spills, too much shared memory, and kernels that no row stands for."""
    good = {"source": "cuda", "variant": "", "arch": "sm_90a", "registers": 32, "hmma": 0, "hgmma": 0}
    rows = [
        script.Row(kernel="a", spill_bytes=8, local_bytes=0, shared_bytes=0, **good),
        script.Row(kernel="b", spill_bytes=0, local_bytes=0, shared_bytes=228 * 1024, **good),
        script.Row(kernel="gated_factors_kernel", spill_bytes=0, local_bytes=0, shared_bytes=0, **good),
    ]
    text = "\n".join(script.problems(rows, {}))
    assert "a () on sm_90a spills 8 bytes" in text
    assert "b () on sm_90a needs 233472 bytes of shared memory" in text
    assert "cuda gated_factors_backward_kernel is not in the table" in text
    assert "triton gated_factors_kernel is not in the table" in text
    assert "cuda gated_factors_kernel is not in the table" not in text
    assert "triton" not in "\n".join(script.problems(rows, {"triton": "not installed"}))


def test_reads_ptxas(script: ModuleType) -> None:
    log = """ptxas info    : Compiling entry function '_Z1kv' for 'sm_90a'
ptxas info    : Function properties for _Z1kv
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 32 bytes smem, 400 bytes cmem[0]
"""
    assert script.parse_ptxas(log) == {
        "_Z1kv": {"registers": 40, "spill_bytes": 12, "local_bytes": 16, "shared_bytes": 32}
    }


def test_refuses_a_wrong_architecture() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--arch", "hopper"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "--arch must be a list such as sm_80,sm_90a, got 'hopper'" in done.stderr
