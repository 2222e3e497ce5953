"""Results that survive a stop: every benchmark is written as it ends, and none begins when the time is up.

$FASTRANK_BENCH_OUT: a file that gets one line of JSON a benchmark, its name and extra_info.
$FASTRANK_BENCH_SECONDS: benchmarks that would start later than so many seconds after the first are skipped.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

SECONDS = float(os.environ.get("FASTRANK_BENCH_SECONDS", "inf"))
BEGIN = time.monotonic()


@pytest.fixture(autouse=True)
def kept(request: pytest.FixtureRequest) -> Iterator[None]:
    """Around every benchmark."""
    if time.monotonic() - BEGIN > SECONDS:
        pytest.skip(f"the {SECONDS:.0f} s for benchmarks are used up")
    benchmark = request.getfixturevalue("benchmark") if "benchmark" in request.fixturenames else None
    yield
    target = os.environ.get("FASTRANK_BENCH_OUT")
    if target and benchmark is not None and benchmark.extra_info:
        row = {"name": request.node.name, "group": benchmark.group, "extra_info": dict(benchmark.extra_info)}
        with Path(target).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
