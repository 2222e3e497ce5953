"""The plans of the spectral kernels: who meets whom, how much memory, and the numbers that Python and C++ both hold."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path

import pytest

from fastrank import _native
from fastrank.ops import _linalg_kernels as kernels

pytestmark = pytest.mark.skipif(not _native.load("_host"), reason=_native.why_missing("_host") or "built")
REPORT = Path(__file__).resolve().parents[2] / "bench" / "kernel_report.py"


@pytest.mark.parametrize("size", [2, 4, 6, 32, 64])
def test_in_a_sweep_each_two_rows_meet_once_and_in_a_round_nobody_twice(size: int) -> None:
    met = []
    for turn in range(size - 1):
        pairs = [tuple(_native.host().linalg_meeting(size, turn, pair)) for pair in range(size // 2)]
        assert sorted(itertools.chain(*pairs)) == list(range(size))
        met += pairs
    assert sorted(met) == list(itertools.combinations(range(size), 2))


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 128, 129, 1000])
@pytest.mark.parametrize("ratio", [1, 9, 400])
def test_python_allocates_the_workspace_that_the_kernels_lay_out(n: int, ratio: int) -> None:
    for rows, columns in ((n, ratio * n + 3), (ratio * n + 3, n)):
        assert kernels.workspace_floats(rows, columns) == _native.host().linalg_workspace(rows, columns)


def test_constants_agree() -> None:
    constants = _native.host().linalg_constants()
    assert constants["state_ints"] == kernels.STATE_INTS
    assert constants["table_matrices"] == kernels.TABLE_MATRICES
    assert (constants["tile"], constants["gram_partials"]) == (kernels.TILE, kernels.GRAM_PARTIALS)
    for limits in (kernels.SPECTRAL_LIMITS, kernels.SVD_LIMITS):
        assert max(limits.first_sweeps, limits.later_sweeps) <= constants["max_sweeps"]
        assert limits.passes <= constants["max_passes"]


def test_the_report_knows_the_shared_memory_of_each_kernel() -> None:
    """48 KB need no opt-in on any architecture."""
    spec = importlib.util.spec_from_file_location("kernel_report_of_linalg", REPORT)
    assert spec is not None
    assert spec.loader is not None
    report = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = report
    spec.loader.exec_module(report)
    for name, size in _native.host().linalg_shared_bytes().items():
        assert report.DYNAMIC_SHARED[name] == size
        assert size <= 48 * 1024


@pytest.mark.skipif(not _native.load("_C_cuda"), reason=_native.why_missing("_C_cuda") or "built")
@pytest.mark.parametrize("name", ["launch_spectral", "launch_svd"])
def test_the_launch_operators_are_implemented_for_cuda(name: str) -> None:
    import torch

    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastrank::{name}", "CUDA")
