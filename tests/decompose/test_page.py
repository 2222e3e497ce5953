"""The page on decompositions shows the committed figures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_measured_table_is_that_of_the_committed_result():
    page = (ROOT / "docs" / "decompositions.md").read_text(encoding="utf-8")
    table = page.partition("<!-- measured:begin -->\n")[2].partition("<!-- measured:end -->")[0]
    command = [sys.executable, "bench/test_decompose.py", "bench/results/decompose-cpu.json"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert table == made
    assert made.count("\n") > 10
