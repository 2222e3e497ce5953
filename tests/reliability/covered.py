"""Runs the suite, but for LEFT_OUT, and tells which share of the lines of fastrank/ it runs on this machine.

    python tests/reliability/covered.py [--jobs N] [--keep]

Lines that only a GPU reaches count as not run where there is none. Exit code 1 below 95 %, or where a test fails.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import outcome
from outcome import ROOT

WANTED = 95.0
LEFT_OUT = ("test_any_convolution_under_the_interpreter", "test_no_kernel_spills")
"""Kernels interpreted at length, and compiled: slow while lines are counted, and few of those are in fastrank/."""


def main() -> int:
    parser = outcome.parser(__doc__)
    parser.add_argument("--jobs", default="2", help="processes of pytest")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "coverage.json"
        command = [sys.executable, "-m", "pytest", "-q", "-n", options.jobs, "--dist", "worksteal", "--cov"]
        command += ["-k", " and ".join(f"not {name}" for name in LEFT_OUT)]
        variables = {**os.environ, "COVERAGE_FILE": str(Path(scratch) / "data")}
        command.append(f"--cov-report=json:{report}")
        code = subprocess.run(command, cwd=ROOT, env=variables, check=False).returncode
        if not report.is_file():
            return outcome.finish("coverage", "no coverage was measured", {}, ok=False)
        found = json.loads(report.read_text(encoding="utf-8"))
    totals = found["totals"]
    share, shares = totals["percent_covered"], {n: e["summary"]["percent_covered"] for n, e in found["files"].items()}
    missing = {name: each["missing_lines"] for name, each in found["files"].items() if each["missing_lines"]}
    line = f"{share:.1f} % of {totals['num_statements']:,} statements of fastrank/"
    line += "" if code == 0 else "; but the suite failed"
    figures = {
        "percent": share,
        "statements": totals["num_statements"],
        "missing": totals["missing_lines"],
        "least": {name: round(shares[name], 1) for name in sorted(shares, key=lambda name: shares[name])[:10]},
        "missing_lines": missing,
    }
    return outcome.finish("coverage", line, figures, ok=code == 0 and share >= WANTED, keep=options.keep)


if __name__ == "__main__":
    sys.exit(main())
