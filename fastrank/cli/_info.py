"""demo and env: a first look, and what is installed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from fastrank import demo as _demo
from fastrank import env as _env
from fastrank import report
from fastrank.cli._common import Json, app, out, print_json


@app.command(epilog="Example: fastrank demo --out runs/demo")
def demo(
    save_to: Annotated[Path, typer.Option("--out", help="Folder for the results.")] = Path("runs/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="A minute at most; nothing converges.")] = False,
    as_json: Json = False,
) -> None:
    """Train, compress and fine-tune a CNN on real handwritten digits, and show what came out."""
    settings = _demo.Settings.quick() if quick else _demo.Settings()
    say = (lambda _: None) if as_json else out.print
    summary = _demo.run(save_to, settings=settings, say=say)
    if as_json:
        print_json(summary)
        return
    for block in _demo.tables(summary):
        out.print(block)
    for line in _demo.reading(summary):
        out.print(line)
    out.print(f"Written to {save_to} in {summary['seconds']:.0f} s: {', '.join(sorted(os.listdir(save_to)))}")


@app.command(epilog="Example: fastrank env --json")
def env(as_json: Json = False) -> None:
    """Show what is installed, what is missing and why (put this into bug reports)."""
    found = _env.collect()
    if as_json:
        print_json(found)
        return
    gpus = (
        ", ".join(f"{gpu['name']} (sm_{gpu['capability'].replace('.', '')})" for gpu in found["gpus"]) or "none visible"
    )
    cells: list[list[object]] = [
        ["fastrank", found["fastrank"]],
        ["python", found["python"]],
        ["torch", f"{found['torch']['version']} (CUDA {found['torch']['cuda'] or 'none'})"],
        ["cpu", f"{found['cpu']['name']}, {found['cpu']['threads']} threads"],
        ["gpu", gpus],
        *([name, version or "not installed"] for name, version in found["packages"].items()),
        *([f"fastrank.{name}", state] for name, state in found["compiled"].items()),
        ["built for", ", ".join(found["build"].get("archs") or []) or "no GPU"],
    ]
    out.print(report.table(["", ""], cells, left=2))
    ops = [
        [
            op,
            ", ".join(b for b, reason in backends.items() if not reason),
            "; ".join(f"{b}: {r}" for b, r in backends.items() if r),
        ]
        for op, backends in found["backends"].items()
    ]
    out.print(report.table(["operator", "backends here", "not here, because"], ops, left=3))
