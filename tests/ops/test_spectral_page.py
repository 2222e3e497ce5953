"""The page on spectral operators shows the committed figures, and `auto` takes what won in them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastrank import _backends

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "bench" / "results" / "linalg-cpu.json"
CASES = json.loads(RESULT.read_text(encoding="utf-8"))["benchmarks"]


def test_the_measured_table_is_that_of_the_committed_result():
    page = (ROOT / "docs" / "spectral.md").read_text(encoding="utf-8")
    table = page.partition("<!-- measured:begin -->\n")[2].partition("<!-- measured:end -->")[0]
    command = [sys.executable, "bench/test_linalg.py", str(RESULT.relative_to(ROOT))]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert table == made
    assert made.count("\n") > 10


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_auto_takes_on_a_cpu_what_was_fastest_of_the_exact_ways(case):
    times = {name: found["p50_us"] for name, found in case["extra_info"]["times"].items()}
    op = "svd" if case["name"].startswith("test_svd") else "nuclear_subgradient"
    chosen = _backends.choose(_backends.facts(op, torch.empty(0)), "auto")
    assert times[chosen] == min(times[name] for name in times if name not in ("warm", "polar"))
    assert not any(case["extra_info"].get("wrong_ranks", {}).get(name) for name in ("gram", "warm"))
