"""Results that survive a stop: every benchmark is written as it ends, and none begins when the time is up.

$FASTRANK_BENCH_OUT: a file that gets one line of JSON a benchmark, its name and extra_info.
$FASTRANK_BENCH_SECONDS: benchmarks that would start later than so many seconds after the first are skipped.
$FASTRANK_BENCH_ROW_SECONDS: about so long each row of the registry is timed; 1.5 by default (rows.py).
$FASTRANK_KEEP=1: the result of the registry's rows goes where the documents take it from (bench/results).

A CPU measures the rows of the registry (`test_family`) where there are any; `--full` adds the lists that are a GPU's,
or long.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrank import benchmarks

SECONDS = float(os.environ.get("FASTRANK_BENCH_SECONDS", "inf"))
BEGIN = time.monotonic()
ROOT = Path(__file__).resolve().parents[1]
FAMILY_TEST = "test_family"
# What test_family of the families measured, for the line at the end.
ROWS: list[dict[str, Any]] = []
ENVIRONMENT: dict[str, Any] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="on a CPU: the long lists too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or config.getoption("--full"):
        return
    rows = [item for item in items if getattr(item, "originalname", "") == FAMILY_TEST]
    if rows:  # a file without any is asked for as a whole
        config.hook.pytest_deselected(items=[item for item in items if item not in rows])
        items[:] = rows


@pytest.fixture(autouse=True)
def kept(request: pytest.FixtureRequest) -> Iterator[None]:
    """Around every benchmark."""
    if time.monotonic() - BEGIN > SECONDS:
        pytest.skip(f"the {SECONDS:.0f} s for benchmarks are used up")
    benchmark = request.getfixturevalue("benchmark") if "benchmark" in request.fixturenames else None
    yield
    if benchmark is None or not benchmark.extra_info:
        return
    info = dict(benchmark.extra_info)
    if "row" in info:
        ROWS.append(info["row"])
        ENVIRONMENT.update(info["environment"])
    target = os.environ.get("FASTRANK_BENCH_OUT")
    if target:
        line = {"name": request.node.name, "group": benchmark.group, "extra_info": info}
        with Path(target).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def pytest_unconfigure() -> None:
    """The last line: what the registry's rows came to. The same as JSON."""
    if not ROWS:
        return
    machine = ENVIRONMENT | {"cores": ENVIRONMENT.get("cpu_threads")}
    result = summary(ROWS, time.monotonic() - BEGIN) | {"machine": machine}
    keep = os.environ.get("FASTRANK_KEEP") == "1"
    folder = ROOT / ("bench/results/reliability" if keep else "runs/reliability")
    write(folder / "bench.json", result)
    if keep and not torch.cuda.is_available():
        write(ROOT / "bench/results/bench-cpu.json", result | {"rows": ROWS})
    device = "gpu" if torch.cuda.is_available() else "cpu"
    print(f"bench-{device}: {'' if result['ok'] else 'FAILED: '}{result['line']}", flush=True)


def summary(rows: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """The line and its figures: how many rows and families, and how many times as fast `auto` is, geometric means."""
    families = {row["family"] for row in rows}
    red = {row["family"] for row in rows if not row["green"]}
    timed = sum(bool(row["times"]) for row in rows)
    parts = [f"{len(rows)} rows", f"{len(families - red)} of {len(families)} families green"]
    right = [row for row in rows if row["family"] not in red]
    means = {base: benchmarks.geometric_mean(right, "auto", base) for base in ("dense", "sequence")}
    told = [f"over {base} {value:.2f}×" for base, value in means.items() if value is not None]
    if told:
        parts.append(f"geometric mean of auto {', '.join(told)}")
    return {
        "line": ", ".join([*parts, f"{seconds:.0f} s"]),
        "ok": not red,
        "seconds": round(seconds, 1),
        "rows": len(rows),
        "timed": timed,
        "red": sorted(red),
        "auto_over": means,
    }


def write(path: Path, data: object) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
