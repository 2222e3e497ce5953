"""How a long reliability run ends: one line on the terminal, its figures as JSON, an exit code.

`make fuzz`, `make faults`, `make mutants`, `make soak` and `make sanitize` end here. docs/reliability.md is generated
from the files under bench/results/reliability, which `--keep` writes.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "bench" / "results" / "reliability"
SCRATCH = ROOT / "runs" / "reliability"
BEGIN = time.monotonic()


def parser(description: str | None) -> argparse.ArgumentParser:
    """Arguments of every such run."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--keep", action="store_true", help="write the result where docs/reliability.md takes it from")
    return found


def finish(name: str, line: str, figures: Mapping[str, Any], *, ok: bool, keep: bool = False) -> int:
    """Write `figures` to NAME.json, print `line` last, and give the exit code.

    line: the one-line figure, such as "5,000 examples, 0 failures". figures: JSON-able; what a run is judged by.
    """
    folder = KEPT if keep else SCRATCH
    folder.mkdir(parents=True, exist_ok=True)
    data = {"line": line, "ok": ok, "seconds": round(time.monotonic() - BEGIN, 1), "machine": machine(), **figures}
    (folder / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(f"{name}: {line}" if ok else f"{name}: FAILED: {line}", flush=True)
    return 0 if ok else 1


def machine() -> dict[str, Any]:
    """What the figures were found on, and of which commit."""
    head = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {
        "commit": head.stdout.strip() or None,
        "cpu": cpu,
        "cores": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
