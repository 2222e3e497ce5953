"""Trains every method on the digits at matched budgets, runs the published studies, and writes what came out.

    python bench/accuracy.py                     # about an hour on two cores; an interrupted run goes on
    python bench/accuracy.py --quick --out DIR   # a few minutes, nothing converged: to see that it runs

Writes DIR/results.json and the figures; with --commit also bench/results/accuracy-cpu.json and docs/figures, from which
`make tables` fills docs/accuracy.md. Cells are kept under DIR/cells: delete one to compute it anew.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

from studies import comparison, funnel, norton, nrmf, plots, trp
from studies.lab import Lab, Length, machine

ROOT = Path(__file__).resolve().parents[1]
STUDIES = {
    "comparison": comparison.run,
    "norton": norton.run,
    "funnel": funnel.run,
    "nrmf": nrmf.run,
    "trp": trp.run,
}


def rounded(value: Any) -> Any:
    """Five significant digits are more than the figures carry."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def main() -> None:
    """Run what is asked and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--only", default=",".join(STUDIES), help=f"studies, separated by commas: {', '.join(STUDIES)}")
    parser.add_argument("--quick", action="store_true", help="one epoch of everything")
    parser.add_argument("--commit", action="store_true", help="put the results and figures where the docs take them")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",")
    for name in chosen:
        if name not in STUDIES:
            parser.error(f"--only must name some of {list(STUDIES)}, got {name!r}")
    length = Length.quick() if arguments.quick else Length()
    started = time.monotonic()
    lab = Lab(arguments.out, length)
    results: dict[str, Any] = {"machine": machine(), "epochs": vars(length) | {}, "held_out": len(lab.test_set)}
    for name in chosen:
        results[name] = rounded(STUDIES[name](lab))
    results["seconds_of_this_run"] = round(time.monotonic() - started)
    (arguments.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    figures = plots.draw(results, arguments.out)
    print(f"Written to {arguments.out}: results.json, {', '.join(path.name for path in figures)}")
    if arguments.commit:
        shutil.copy(arguments.out / "results.json", ROOT / "bench" / "results" / "accuracy-cpu.json")
        (ROOT / "docs" / "figures").mkdir(parents=True, exist_ok=True)
        for path in figures:
            shutil.copy(path, ROOT / "docs" / "figures" / path.name)


if __name__ == "__main__":
    main()
