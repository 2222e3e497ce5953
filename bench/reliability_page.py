"""docs/reliability.md's tables, from the results that the commands leave under bench/results/reliability."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Name of the result -> the command, and what it shows.
COMMANDS = {
    "bench": ("make bench-cpu", "every benchmark, each behind its check"),
    "fuzz": ("make fuzz", "random lives of random networks; parsers under a coverage-guided fuzzer"),
    "faults": ("make faults", "training killed at random moments, and resumed"),
    "mutants": ("make mutants", "seeded bugs that the tests have to find"),
    "coverage": ("make coverage", "lines of `fastrank/` that the suite runs on a CPU"),
    "soak": ("make soak", "a long regularised training against the exact method"),
    "sanitize": ("make sanitize", "CUDA C++ kernels, compiled for the host, under two sanitizers"),
}


def results(folder: Path) -> dict[str, Any]:
    """The results that are there, by name."""
    found = {name: folder / f"{name}.json" for name in COMMANDS}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in found.items() if path.is_file()}


def commands_table(found: Mapping[str, Any]) -> str:
    """Every command with its last figure, and what it was found on."""
    lines = ["| command | what it shows | last figure | seconds | commit |", "| --- | --- | --- | ---: | --- |"]
    for name, (command, shows) in COMMANDS.items():
        each = found.get(name)
        if each is None:
            lines.append(f"| `{command}` | {shows} | not yet measured | | |")
            continue
        figure = each["line"] if each["ok"] else f"**failed:** {each['line']}"
        commit = each["machine"].get("commit") or ""
        lines.append(f"| `{command}` | {shows} | {figure} | {each['seconds']:,.0f} | {commit} |")
    known = [each["machine"] for each in found.values()]
    machines = {f"{each['cpu']}, torch {each['torch']}, threads: {each['cores']}" for each in known}
    return "\n".join(lines) + (f"\n\nOn: {'; '.join(sorted(machines))}." if machines else "")


def bugs_table(found: Mapping[str, Any]) -> str:
    """Seeded bugs, by the part of the tree that they are in."""
    if "mutants" not in found:
        return "Not yet measured."
    parts: dict[str, list[Any]] = {}
    for row in found["mutants"]["rows"]:
        part = "/".join(row["file"].split("/")[:2]) if row["file"].count("/") > 1 else row["file"]
        parts.setdefault(part, []).append(row)
    lines = ["| where | bugs | killed |", "| --- | ---: | ---: |"]
    for part, rows in sorted(parts.items()):
        lines.append(f"| `{part}` | {len(rows)} | {sum(row['outcome'] == 'killed' for row in rows)} |")
    alive = [row for row in found["mutants"]["rows"] if row["outcome"] != "killed"]
    told = "\n".join(f"- {row['name']} (`{row['file']}`)" for row in alive)
    return "\n".join(lines) + (f"\n\nAlive:\n\n{told}" if alive else "\n\nNone is alive.")
