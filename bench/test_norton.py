"""NORTON's networks and its detector (family networks), one line of results each; what is measured: see norton.py.

    pytest bench/test_norton.py --full --benchmark-only

On a GPU: the rows that are counted to the digit at all batches, the detector, the same rows compiled, then the others.
On a CPU: the first of these, briefly (`python bench/norton.py` measures all of them). The benchmark's own time is that
of measuring.
"""

from __future__ import annotations

import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest

from fastrank.benchmarks import timing

sys.path.insert(0, str(Path(__file__).parent))
import norton

SECONDS = 1.0
EXACT = [row for row in norton.rows() if row.exact]
OTHERS = [row for row in norton.rows() if not row.exact]
BATCHES = norton.GPU_BATCHES if norton.GPU else (1,)
IMAGE = 800 if norton.GPU else 320

prepared = cache(norton.Prepared)


def keep(benchmark: Any, record: dict[str, Any]) -> None:
    benchmark.extra_info.update(record, environment=timing.environment())
    assert not record["wrong"], record["wrong"]  # told when the others are measured


def run(benchmark: Any, row: norton.Row, batch: int, *, compiled: bool = False) -> None:
    measure = partial(prepared(row).measure, batch, SECONDS, compiled=compiled)
    keep(benchmark, benchmark.pedantic(measure, rounds=1))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("row", EXACT, ids=str)
@pytest.mark.benchmark(group="NORTON")
def test_rows(benchmark: Any, row: norton.Row, batch: int) -> None:
    run(benchmark, row, batch)


@pytest.mark.parametrize("part", ["backbone", "detector"])
@pytest.mark.benchmark(group="NORTON detector")
def test_detector(benchmark: Any, part: str) -> None:
    pytest.importorskip("torchvision", reason="the detector is torchvision's, which is not installed")
    keep(benchmark, benchmark.pedantic(partial(norton.detection, IMAGE, SECONDS, part=part), rounds=1))


@pytest.mark.parametrize("batch", norton.GPU_BATCHES[:2])
@pytest.mark.parametrize("row", EXACT, ids=str)
@pytest.mark.benchmark(group="NORTON compiled")
def test_rows_compiled(benchmark: Any, row: norton.Row, batch: int) -> None:
    if not norton.GPU:
        pytest.skip("compiling takes a CPU minutes")
    run(benchmark, row, batch, compiled=True)


@pytest.mark.parametrize("row", OTHERS, ids=str)
@pytest.mark.benchmark(group="NORTON")
def test_other_rows(benchmark: Any, row: norton.Row) -> None:
    if not norton.GPU:
        pytest.skip("`python bench/norton.py` measures all rows on a CPU")
    run(benchmark, row, norton.GPU_BATCHES[0])
