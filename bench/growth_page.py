"""The tables of docs/growth.md, from a result of bench/growth.py."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ROOT / "docs" / "figures"
ABOVE = 0.3
"""An exponent so far above the predicted one is marked."""
UNKNOWN = "Not yet measured."
Result = Mapping[str, Any]


def path_of(device: str) -> Path:
    """Where the committed result of a "cpu" or a "cuda" device is."""
    return ROOT / "bench" / "results" / f"growth-{'cpu' if device == 'cpu' else 'gpu'}.json"


def result(device: str = "cpu") -> Result | None:
    """The committed result; None without one."""
    path = path_of(device)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the first two columns are text, the others are numbers."""
    rule = ["---"] * 2 + ["---:"] * (len(columns) - 2)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows))


def series(found: Result) -> Iterator[tuple[Result, Result]]:
    """Every (group, series) that has points."""
    for group in found["groups"].values():
        for each in group["series"]:
            if each["points"]:
                yield group, each


def flagged(line: Mapping[str, float] | None) -> bool:
    """Whether the cost grows faster than predicted."""
    return line is not None and line["exponent"] - line["predicted"] > ABOVE


def exponent(line: Mapping[str, float] | None) -> list[str]:
    """The cells of a fit: exponent with its standard error, prediction, and by how much it is above where that is much.

    Without a fit, which takes three points above 0, dashes.
    """
    if line is None:
        return ["–", "–", ""]
    above = f"**{line['exponent'] - line['predicted']:+.2f}**" if flagged(line) else ""
    return [f"{line['exponent']:.2f} ± {line['error']:.2f}", f"{line['predicted']:.2f}", above]


def seconds(us: float) -> str:
    """As "1.23 s", "4.56 ms" or "7.89 µs"."""
    for scale, unit in ((1e6, "s"), (1e3, "ms")):
        if abs(us) >= scale:
            return f"{us / scale:.3g} {unit}"
    return f"{us:.3g} µs"


def size(count: float) -> str:
    """Bytes as "1.23 GB", "4.56 MB", "7.89 kB"."""
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(count) >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"


def label(row: Result) -> str:
    return row["name"] + (", forward and backward" if row["panel"].endswith("forward and backward") else "")


def table(found: Result | None) -> str:
    """Times in Markdown, a row a series, and what they were measured on."""
    if found is None:
        return UNKNOWN
    rows = []
    for group, row in series(found):
        last = row["points"][-1]
        span = f"{row['points'][0]['size']}–{last['size']}"
        rows.append([group["variable"], label(row), span, seconds(last["p50_us"]), *exponent(row["time"]), row["unit"]])
    columns = ["grows", "what", "sizes", "at the largest", "exponent", "predicted", "above by", "from"]
    ends = [f"{label(row)} over {group['variable']}: {row['ended']}" for group, row in series(found) if "ended" in row]
    notes = [machine(found), *(["Ended early: " + "; ".join(ends) + "."] if ends else [])]
    return "\n\n".join([markdown(columns, rows), *notes])


def memory_table(found: Result | None) -> str:
    """Peaks of memory in Markdown, a row a series."""
    if found is None:
        return UNKNOWN
    rows = []
    for group, row in series(found):
        last = row["points"][-1]
        rows.append(
            [group["variable"], label(row), str(last["size"]), size(last["peak_bytes"]), *exponent(row["memory"])]
        )
    return markdown(["grows", "what", "largest", "peak there", "exponent", "predicted", "above by"], rows)


def machine(found: Result) -> str:
    here = found["environment"]
    where = here.get("gpu") or f"{here['cpu_threads']} threads of {here['cpu']}"
    return f"float32, {where}, torch {here['torch']}; medians; {summary(found)}."


def summary(found: Result) -> str:
    """In one line: how many series, how many exponents above prediction, how long it took."""
    rows = [row for _, row in series(found)]
    counts = [sum(flagged(row[what]) for row in rows) for what in ("time", "memory")]
    return (
        f"{len(rows)} series; above the prediction by more than {ABOVE}: {counts[0]} in time, {counts[1]} in memory; "
        f"the run took {found['seconds']:.0f} s"
    )


def pictures(found: Result | None) -> str:
    """The figures in Markdown, each with what was held fixed."""
    if found is None:
        return UNKNOWN
    parts = []
    for name, group in found["groups"].items():
        if (FIGURES / f"growth-{name}.png").is_file():
            parts.append(f"![Time and memory over the {group['variable']}](figures/growth-{name}.png)")
            parts.append(group["fixed"])
    return "\n\n".join(parts)
