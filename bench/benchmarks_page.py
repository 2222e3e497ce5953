"""The table of docs/benchmarks.md, from bench/results/bench-cpu.json (of `make bench-cpu`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastrank import benchmarks

RESULT = Path(__file__).resolve().parent / "results" / "bench-cpu.json"


def table(result: Mapping[str, Any] | None) -> str:
    """A table a family in Markdown, and who was left out and why; "not yet measured" without a result."""
    if result is None:
        return "Not yet measured."
    machine = result["machine"]
    clock = machine["cpu_mhz"]["now"]
    parts = [
        f"{machine['cpu']} ({machine['cpu_capability']}), {machine['cpu_threads']} threads"
        + (f", {clock:.0f} MHz as found" if clock else "")
        + f", torch {machine['torch']}. {result['line']}."
    ]
    for family, title in benchmarks.FAMILIES.items():
        rows = [row for row in result["rows"] if row["family"] == family]
        if not rows:
            continue
        heads = benchmarks.columns(rows)
        rule = ["---", "---", *["---:"] * (len(heads) - 2)]
        lines = "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *benchmarks.lines(rows)))
        parts += [f"### {title}", lines]
        if out := benchmarks.left_out(rows):
            parts.append("Left out: " + "; ".join(out) + ".")
    return "\n\n".join(parts)


def committed() -> dict[str, Any] | None:
    """The result that is in the repository, or None."""
    return json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else None
