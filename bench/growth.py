"""How time and memory grow with channels, map, batch, rank and layers: curves, and exponents fitted to them.

    python bench/growth.py [--quick] [--keep] [--only channels,layers] [--threads 2]

Calls of one size run in turns, all sizes twice over, but for calls of more than a second. A series ends before a call
that would take more than 3 s (8 s over the layers). An exponent is the slope of a least-squares line through the
logarithms of the upper half of the sizes, with its standard error; beside it stands the slope of the counted work, or
bytes, over the same sizes.
--keep writes bench/results/growth-cpu.json (on a GPU growth-gpu.json) and docs/figures/growth-*.png, else runs/.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import growth_page
import growth_plots
import torch
from growth_memory import peak_bytes
from growth_series import GROUPS, Group

from fastrank.benchmarks import timing

ROOT = Path(__file__).resolve().parents[1]
PASSES = 2
ONCE_US = 1e6
"""A call that takes longer is measured in the first pass alone."""
SECONDS = 0.5
"""For the calls of one size in one pass, beyond two rounds."""
ROUNDS: dict[str, Any] = {"least": 2, "most": 15, "led_us": 50e3}
"""Calls of 0.1 ms follow such of seconds."""
LEAST = 3
"""Points that an exponent is fitted to."""


def fit(xs: Sequence[float], ys: Sequence[float]) -> dict[str, float] | None:
    """Exponent b of y = a · xᵇ over the upper half of the points, three at least, and its standard error.

    None where fewer than three of these are above 0.
    """
    upper = sorted(zip(xs, ys, strict=True))[-max(LEAST, -(-len(xs) // 2)) :]
    points = [(math.log(x), math.log(y)) for x, y in upper if y > 0]
    if len(points) < LEAST:
        return None
    count = len(points)
    mean_x, mean_y = (sum(point[side] for point in points) / count for side in (0, 1))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    left = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in points)
    return {"exponent": slope, "error": math.sqrt(left / (count - 2) / spread), "points": count}


def measure(
    group: Group, sizes: Sequence[int], *, passes: int, seconds: float
) -> tuple[dict[str, dict[int, dict[str, Any]]], dict[str, str]]:
    """By key and size the times of all passes, in µs, and the peak of memory; and why a series ended early."""
    found: dict[str, dict[int, dict[str, Any]]] = {series.key: {} for series in group.series}
    ended: dict[str, str] = {}
    for turn in range(passes):
        for place, size in enumerate(sizes):
            calls = {
                series.key: series.make(size)
                for series in group.series
                if series.make and (_again(found[series.key].get(size)) if turn else series.key not in ended)
            }
            if not calls:
                continue
            if turn == 0:
                for key, call in calls.items():
                    call()  # what is made once, and kept, is no part of the peak
                    found[key][size] = {"us": [], "peak": peak_bytes(call)}
            for key, us in timing.for_seconds(calls, seconds, **ROUNDS).items():
                found[key][size]["us"] += us
            for series in group.series:
                if turn == 0 and series.key in calls and place + 1 < len(sizes):
                    next_size = sizes[place + 1]
                    ahead = min(found[series.key][size]["us"]) * series.work(next_size) / series.work(size)
                    if ahead > group.limit_s * 1e6:
                        ended[series.key] = f"at {next_size} a call would take about {ahead / 1e6:.0f} s"
            del calls
            gc.collect()
        print(f"{group.name}: pass {turn + 1} of {passes}", file=sys.stderr, flush=True)
    for series in group.series:
        if not series.make:
            for size, whole in found[series.of].items():
                less = found[series.minus].get(size)
                if less is not None:
                    us = [a - b for a, b in zip(whole["us"], less["us"], strict=False)]  # one may be measured once
                    found[series.key][size] = {"us": us, "peak": whole["peak"] - less["peak"]}
    return found, ended


def _again(point: Mapping[str, Any] | None) -> bool:
    """Whether a size is measured in a further pass."""
    return point is not None and min(point["us"]) < ONCE_US


def curves(group: Group, found: Mapping[str, Mapping[int, Mapping[str, Any]]], ended: Mapping[str, str]) -> Any:
    """The group with the points, fits and predictions of every series; JSON-able."""
    rows = []
    for series in group.series:
        own = found[series.key]
        sizes = list(own)
        points = [
            {"size": n, **timing.Quantiles.of(own[n]["us"]).as_dict(), "peak_bytes": own[n]["peak"]} for n in sizes
        ]
        row: dict[str, Any] = {"name": series.name, "panel": series.panel, "unit": series.unit, "points": points}
        for what, key, count in (("time", "p50_us", series.work), ("memory", "peak_bytes", series.held)):
            line = fit(sizes, [point[key] for point in points])
            predicted = fit(sizes, [count(n) for n in sizes])
            row[what] = None if line is None or predicted is None else {**line, "predicted": predicted["exponent"]}
        if series.key in ended:
            row["ended"] = ended[series.key]
        rows.append(row)
    return {"variable": group.variable, "fixed": group.fixed, "series": rows}


def run(groups: Sequence[Group], *, quick: bool = False, seconds: float = SECONDS) -> dict[str, Any]:
    """Measure all groups."""
    begin = time.monotonic()
    result: dict[str, Any] = {"environment": timing.environment(), "quick": quick, "groups": {}}
    for group in groups:
        torch.manual_seed(0)
        sizes = group.quick if quick else group.sizes
        how: dict[str, Any] = {"passes": 1 if quick else PASSES, "seconds": seconds / 10 if quick else seconds}
        result["groups"][group.name] = curves(group, *measure(group, sizes, **how))
    return {**result, "seconds": time.monotonic() - begin}


def main() -> int:
    """Measure, write, draw, and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, one pass")
    parser.add_argument("--keep", action="store_true", help="write the files that docs/growth.md is made of")
    parser.add_argument("--only", default="", help="some of the groups, with commas between")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--draw", type=Path, metavar="FILE", help="measure nothing: draw this result")
    options = parser.parse_args()
    wanted = [name for name in options.only.split(",") if name]
    names = [group.name for group in GROUPS]
    if not set(wanted) <= set(names):
        parser.error(f"--only must name some of {', '.join(names)}, got {options.only}")
    if options.keep and (options.quick or wanted):
        parser.error("--keep must be of a whole run, got --quick or --only")
    torch.set_num_threads(options.threads)
    if options.draw:
        result = json.loads(options.draw.read_text(encoding="utf-8"))
    else:
        result = run([group for group in GROUPS if not wanted or group.name in wanted], quick=options.quick)
    target = growth_page.path_of(timing.DEVICE) if options.keep else ROOT / "runs" / "growth.json"
    figures = growth_page.FIGURES if options.keep else target.parent
    target.parent.mkdir(parents=True, exist_ok=True)
    if not options.draw:
        target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    drawn = growth_plots.draw(result, figures)
    print(growth_page.table(result), growth_page.memory_table(result), sep="\n\n")
    print(f"growth: {growth_page.summary(result)}; {len(drawn)} figures in {figures}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
