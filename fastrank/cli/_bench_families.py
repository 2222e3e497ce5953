"""bench --family: the benchmarks of whole families, each contender checked before it is timed."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from fastrank import benchmarks, report
from fastrank.cli._common import out, print_json

Family = Annotated[
    str | None,
    typer.Option(help=f"Measure families: all or some of {','.join(benchmarks.FAMILIES)}.", metavar="NAME,..."),
]
Compare = Annotated[
    str | None,
    typer.Option(
        help=f"With --family: peers, some of {','.join(benchmarks.PEERS)}; all by default.", metavar="NAME,..."
    ),
]
Seconds = Annotated[float, typer.Option(help="With --family: about so long each row is timed.")]


def show(family: str, compare: str | None, seconds: float, device: str | None, *, as_json: bool) -> int:
    """Measure and print; exit code 1 where fastrank is wrong somewhere, and nothing of that family was timed.

    device: "cpu" or "cuda"; by default the GPU where there is one. Raises ValueError for unknown names and devices,
    before anything is measured.
    """
    if not seconds > 0:
        raise ValueError(f"--seconds must be above 0, got {seconds:g}")
    here = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    if device is not None and device not in here:
        raise ValueError(f"--device must be {' or '.join(here)} with --family here, got {device}")
    families = benchmarks.names("--family", "" if family == "all" else family, benchmarks.FAMILIES)
    peers = None if compare is None else benchmarks.names("--compare", compare, benchmarks.PEERS)
    progress = Console(stderr=True, highlight=False, soft_wrap=True)
    say = (lambda line: None) if as_json else (lambda line: progress.print(line, style="dim", markup=False))
    result = benchmarks.run(families, peers, seconds=seconds, device=device, say=say)
    if as_json:
        print_json(result)
    else:
        _print(result)
    return 0 if result["ok"] else 1


def _print(result: dict[str, Any]) -> None:
    environment = result["environment"]
    device = environment.get("gpu") or f"{environment['cpu']}, {environment['cpu_threads']} threads"
    for name, found in result["families"].items():
        rows = found["rows"]
        title = f"{name}: {benchmarks.FAMILIES[name]}; medians in turns; {device}, torch {environment['torch']}"
        out.print(report.table(benchmarks.columns(rows), list(benchmarks.lines(rows)), title=title, left=2))
        for line in benchmarks.left_out(rows):
            out.print(f"left out: {line}", markup=False)
        for what, reason in found["wrong"].items():
            out.print(f"wrong: {what}: {reason}", markup=False)
