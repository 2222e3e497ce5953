"""What README.md says is true: its tables are those of the code and the results (its code: tests/docs)."""

from __future__ import annotations

import subprocess
import sys

from docs_pages import ROOT, blocks


def test_the_use_on_ones_own_model_is_ten_lines() -> None:
    first = next(block for block in blocks(ROOT / "README.md") if block.language == "python")
    lines = [line for line in first.code.splitlines() if line and not line.startswith(("import", "from"))]
    assert len(lines) <= 10


def test_the_generated_tables_are_fresh() -> None:
    done = subprocess.run(
        [sys.executable, "bench/tables.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_ci_runs_the_readmes_test_command() -> None:
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").rstrip().endswith("exec make test")
