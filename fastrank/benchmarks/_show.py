"""Rows as cells of a table, for the terminal and for documents alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def columns(rows: Sequence[Row]) -> list[str]:
    """The table's head: the roofline where a GPU was measured, multiply-adds where they were counted."""
    return [
        "case",
        "contender",
        "p50",
        "p20–p80",
        "times as fast as",
        *(["fewer multiply-adds"] if any(row["fewer_macs"] for row in rows) else []),
        *(["of the floor's speed"] if any(row["roofline"] for row in rows) else []),
        *(["error"] if any(row["errors"] for row in rows) else []),
    ]


def lines(rows: Sequence[Row]) -> Iterator[list[str]]:
    """A line a contender, the fastest of a case first; one line for a case that was not timed."""
    heads = columns(rows)
    for row in rows:
        what = f"{row['operation']}, {row['case']}"
        if row["not_timed"]:
            yield [what, f"not timed: {row['not_timed']}", *[""] * (len(heads) - 2)]
            continue
        for index, (name, us) in enumerate(sorted(row["times"].items(), key=lambda item: item[1]["p50_us"])):
            ratio = ", ".join(f"{found[name]:.2f}× {base}" for base, found in row["ratios"].items() if base != name)
            cells = [what if index == 0 else "", name, duration(us["p50_us"]), spread(us), ratio]
            if "fewer multiply-adds" in heads:
                fewer = row["fewer_macs"] if not name.startswith("dense") and name != "fused dense" else None
                cells.append("" if fewer is None else f"{fewer:.2f}×")
            if "of the floor's speed" in heads:
                share = row["roofline"].get(name)
                cells.append("" if share is None else f"{100 * share:.0f} %")
            if "error" in heads:
                cells.append(error(row["errors"].get(name)))
            yield cells


def left_out(rows: Sequence[Row]) -> list[str]:
    """Who was not timed and why, each reason once, with the case or their number where it is not that of all."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, reason in row["left_out"].items():
            found.setdefault((name, reason), []).append(f"{row['operation']}, {row['case']}")
    return [
        f"{name}: {reason}"
        + (
            ""
            if len(where) == len(rows)
            else f" ({where[0]})"
            if len(where) == 1
            else f" ({len(where)} of {len(rows)} rows)"
        )
        for (name, reason), where in sorted(found.items())
    ]


def duration(us: float) -> str:
    """1234.5 -> "1.23 ms"."""
    for size, unit in ((1e6, "s"), (1e3, "ms")):
        if us >= size:
            return f"{us / size:.3g} {unit}"
    return f"{us:.3g} µs"


def spread(us: Mapping[str, float]) -> str:
    """p20 and p80 in per cent of the median: "-2 +5 %"."""
    low, high = (100 * (us[key] / us["p50_us"] - 1) for key in ("p20_us", "p80_us"))
    return f"{low:+.0f} {high:+.0f} %"


def error(found: Mapping[str, float | None] | None) -> str:
    """ "1.2e-06", with "approximate" behind what was not judged."""
    if found is None:
        return ""
    size = "not finite" if found["error"] is None else f"{found['error']:.1e}"
    return size + (" approximate" if found["limit"] is None else "")
