"""The figures of bench/growth.py: a picture a variable, time beside memory, all axes logarithmic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from fastrank.report import COLOURS
from fastrank.report._plots import figure_of, tidy, write

MARKERS, DASHES = "os^Dv", ("-", (0, (4, 2)), "-", (0, (4, 2)), "-")
GAP = 0.075
"""Least distance of two labels, as a share of a panel's height."""
SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
BYTES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))


def draw(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """A PNG a group; the files."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, group in result["groups"].items():
        panels: dict[str, list[Mapping[str, Any]]] = {}
        for row in group["series"]:
            if row["points"]:
                panels.setdefault(row["panel"], []).append(row)
        figure, axes = figure_of(len(panels), 2, width=10.4, height=2.9 * len(panels) + 0.5)
        for (left, right), (panel, rows) in zip(axes, panels.items(), strict=True):
            _panel(left, rows, "time", "p50_us", 1e-6, SECONDS)
            _panel(right, rows, "memory", "peak_bytes", 1.0, BYTES)
            left.set_title(f"{panel}: time of a call", loc="left", fontsize=10)
            right.set_title(f"{panel}: peak of memory", loc="left", fontsize=10)
        for ax in axes[-1]:
            ax.set_xlabel(group["variable"])
        path = folder / f"growth-{name}.png"
        write(figure, path, f"Cost over the {group['variable']}; behind each name its exponent, measured (predicted)")
        drawn.append(path)
    return drawn


def _panel(
    ax: Any, rows: Sequence[Mapping[str, Any]], what: str, key: str, scale: float, units: Sequence[tuple[float, str]]
) -> None:
    ax.set_xscale("log")
    ax.set_yscale("log")
    ends = []
    for index, row in enumerate(rows):
        points = [point for point in row["points"] if point[key] > 0]
        if not points:
            continue
        xs, ys = [point["size"] for point in points], [point[key] * scale for point in points]
        colour, line = COLOURS[index % len(COLOURS)], row[what]
        style = {"marker": MARKERS[index % len(MARKERS)], "linestyle": DASHES[index % len(DASHES)]}
        ax.plot(xs, ys, color=colour, markersize=4, linewidth=1.5, **style)
        if what == "time":
            low, high = ([max(point[each], 1e-3) * scale for point in points] for each in ("p20_us", "p80_us"))
            ax.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)
        fitted = "" if line is None else f"  {line['exponent']:.2f} ({line['predicted']:.2f})"
        ends.append((ys[-1], row["name"] + fitted, colour))
    sizes = sorted({point["size"] for row in rows for point in row["points"]})
    ax.set_xlim(sizes[0] / 1.15, sizes[-1] * 1.15)
    ax.set_xticks(sizes, [str(size) for size in sizes], fontsize=8)
    ax.xaxis.set_minor_locator(NullLocator())
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 50 * low else (1.0, 2.0, 5.0), numticks=9))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, place: _with_unit(value, units)))
    ax.tick_params(axis="y", labelsize=8)
    tidy(ax)
    _label(ax, sorted(ends))


def _label(ax: Any, ends: Sequence[tuple[float, str, str]]) -> None:
    """Each line's label beside its end, moved apart where they would overlap. ends: (y, label, colour), by y."""
    low, high = (math.log10(limit) for limit in ax.get_ylim())
    heights = [(math.log10(y) - low) / (high - low) for y, _, _ in ends]
    for place in range(1, len(heights)):
        heights[place] = max(heights[place], heights[place - 1] + GAP)
    for place in reversed(range(len(heights))):
        heights[place] = min(heights[place], 0.97 - GAP * (len(heights) - 1 - place))
    for (_, told, colour), height in zip(ends, heights, strict=True):
        ax.text(1.01, height, told, transform=ax.transAxes, fontsize=8, color=colour, va="center")


def _with_unit(value: float, units: Sequence[tuple[float, str]]) -> str:
    scale, unit = next(((scale, unit) for scale, unit in units if value >= scale * 0.999), units[-1])
    return f"{value / scale:g} {unit}"
