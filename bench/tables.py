"""Writes the generated tables of the documents anew from committed results and the code; `--check` only compares.

README.md: the demo's table comes from bench/results/demo-cpu.json (a summary.json of `make demo`), the state of every
operator from its registered backends, the shipped tables of times and the GPU results under bench/results.
docs/api.md: the public names. docs/recipes.md: the recipe files. docs/accuracy.md: bench/results/accuracy-cpu.json
(of bench/accuracy.py). docs/plans.md: bench/results/plans-cpu.json (of bench/plans.py).
docs/kernels/tucker2.md: what the plan predicts, where `fastrank._host` is built; the goals, and what was measured of
them in the newest bench/results/gpu* folder that holds such a run. docs/networks.md: bench/results/norton-cpu.json (of
bench/norton.py), and the newest such folder with NORTON's networks. docs/benchmarks.md,
docs/growth.md, docs/reliability.md: what `make bench-cpu`, `make growth` and the others of `make reliability` keep.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import api_page
import benchmarks_page
import dispatch
import goals
import growth_page
import norton_page
import plans
import polar_accuracy
import reliability_page
import tucker2_model
from studies import pages

from fastrank import _native, recipe, report
from fastrank._backends import AUTO, BACKENDS
from fastrank._tables._store import SHIPPED, Table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
NATIVE = ("triton", "cuda")


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown; the first column is text, the others are numbers."""
    rule = ["---"] + ["---:"] * (len(columns) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows))


def result(name: str) -> Any:
    """A committed result."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def demo_table() -> str:
    """The demo's rows, with what they were measured on."""
    summary = result("demo-cpu.json")
    base = summary["dense"]["plain"]
    rows = [
        [
            f"{name}, dense",
            report.short(row["params"]),
            report.short(row["macs"]),
            "",
            f"{row['accuracy']:.2f}",
            "",
            "",
            "",
        ]
        for name, row in summary["dense"].items()
    ]
    rows[0][-1] = f"{summary['dense_latency']['p50_us'] / 1000:.2f} ms"
    for row in summary["rows"]:
        ranks = ", ".join(f"{layer} {report.ranks_text(value)}" for layer, value in row["ranks"].items()) or "all dense"
        rows.append(
            [
                f"{row['training']}, {row['rule']}",
                f"{report.short(row['params'])} (÷{base['params'] / row['params']:.1f})",
                f"{report.short(row['macs'])} (÷{base['macs'] / row['macs']:.1f})",
                ranks,
                f"{row['accuracy_before']:.2f}",
                f"{row['accuracy_converted']:.2f}",
                f"{row['accuracy_finetuned']:.2f}",
                f"{row['latency']['p50_us'] / 1000:.2f} ms ({row['speedup']:.2f}×)",
            ]
        )
    columns = ["training, rule", "params", "MACs", "ranks", "dense %", "converted %", "tuned %", "batch of 64"]
    machine = summary["machine"]
    note = (
        f"Accuracy on {summary['data']['held_out']} held-out digits; median time on a CPU, "
        f"{machine['threads']} threads, "
        f"torch {machine['torch']}, all networks in turn in one process; "
        f"the run took {summary['seconds']:.0f} s."
    )
    return f"{markdown(columns, rows)}\n\n{note}"


def measured_on_gpu() -> set[str]:
    """The operators that a committed result of a GPU machine times."""
    names = set()
    for path in RESULTS.glob("gpu*/*.json*"):
        text = path.read_text(encoding="utf-8")
        names |= {op for op in BACKENDS if op in text}
    return names


def automatic(op: str) -> str:
    """What `auto` takes on a CPU and on a GPU: where shipped tables time the operator, one of what they time."""
    backends, chosen = BACKENDS[op], []
    for device in ("cpu", "cuda"):
        names = set()
        for path in SHIPPED.glob("*.json"):
            if path.stem.startswith("cpu") == (device == "cpu"):
                table = Table.loads(path.read_text(encoding="utf-8"))
                names |= {name for key, us in table.rows.items() if key.op == op for name in us}
                scales = [scale.split() for model in table.models.values() for scale in model.scale]
                names |= {name for each, name, _ in scales if each == op}
        timed = " or ".join(sorted(names, key=backends.index))
        chosen.append(f"{timed} (by measured times)" if timed else AUTO.get((op, device), backends[0]))
    return chosen[0] if chosen[0] == chosen[1] else f"{chosen[0]} on a CPU, {chosen[1]} on a GPU"


def status_table() -> str:
    """Every operator with its backends and whether its kernels were timed on a GPU."""
    measured, rows = measured_on_gpu(), []
    for op, backends in BACKENDS.items():
        kernels = [name for name in backends if name in NATIVE]
        library = [name for name in backends if name not in (*NATIVE, "host")]
        timed = "no kernel yet" if not kernels else "see bench/results" if op in measured else "not yet measured"
        rows.append([f"`{op}`", ", ".join(library), ", ".join(kernels) or "none", automatic(op), timed])
    return markdown(["operator", "plain PyTorch", "kernels", "`auto` takes", "kernels timed on a GPU"], rows)


def recipes_table() -> str:
    """Every recipe with the experiment it repeats, the figures published for it, and which of its values are ours."""
    rows = []
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        experiment = recipe.load(path).experiment
        published = ", ".join(
            f"{key} {report.short(value) if key in ('macs', 'params') else value}"
            for key, value in experiment.get("published", {}).items()
        )
        ours = ", ".join(experiment.get("ours", ["everything but the method"]))
        rows.append([f"`{path.name}`", experiment["source"], published, ours])
    columns = ["recipe", "experiment", "published", "ours"]
    lines = (columns, ["---"] * len(columns), *rows)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def gpu_results(family: str = "tucker2") -> Path | None:
    """The folder of the newest committed GPU run of a family of benchmarks, by its name."""
    return max((path.parent for path in RESULTS.glob(f"gpu*/bench_{family}.jsonl")), default=None)


def goals_page() -> str:
    """The goals of the Tucker-2 convolution; without a committed run of a GPU nothing is measured."""
    folder = gpu_results()
    return goals.goals_table(RESULTS) if folder is None else goals.page(folder)


# One of each shipped table of a CPU.
DISPATCH = ("dispatch-cpu-avx512.json", "dispatch-cpu-avx2.json")

DOCUMENTS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"demo": demo_table, "status": status_table},
    "docs/api.md": {"api": api_page.page},
    "docs/recipes.md": {"recipes": recipes_table},
    "docs/dispatch.md": {
        "dispatch": lambda: "\n\n".join(dispatch.table(result(name)) for name in DISPATCH),
        "cp": lambda: "\n\n".join(dispatch.cp_table(result(name)) for name in DISPATCH),
    },
    "docs/kernels/polar.md": {"accuracy": lambda: polar_accuracy.table(result("polar-accuracy.json")["rows"])},
    "docs/kernels/tucker2.md": {"goals": goals_page},
    "docs/networks.md": {
        "networks": lambda: norton_page.classifiers(result("norton-cpu.json")),
        "networks-gpu": lambda: norton_page.classifiers_on_gpu(gpu_results("norton")),
        "detector": lambda: norton_page.detector(result("norton-cpu.json"), gpu_results("norton")),
    },
    "docs/plans.md": {
        "latency": lambda: plans.latency_table(result("plans-cpu.json")),
        "calibration": lambda: plans.accuracy_table(result("plans-cpu.json")),
    },
    "docs/benchmarks.md": {"benchmarks": lambda: benchmarks_page.table(benchmarks_page.committed())},
    "docs/growth.md": {
        "pictures": lambda: growth_page.pictures(growth_page.result()),
        "time": lambda: growth_page.table(growth_page.result()),
        "memory": lambda: growth_page.memory_table(growth_page.result()),
        "gpu": lambda: growth_page.table(growth_page.result("cuda")),
    },
    "docs/reliability.md": {
        "commands": lambda: reliability_page.commands_table(reliability_page.results(RESULTS / "reliability")),
        "bugs": lambda: reliability_page.bugs_table(reliability_page.results(RESULTS / "reliability")),
    },
    "docs/accuracy.md": {
        name: lambda make=make: make(result("accuracy-cpu.json")) for name, make in pages.TABLES.items()
    },
}

if not _native.why_missing("_host"):
    DOCUMENTS["docs/kernels/tucker2.md"]["plan"] = tucker2_model.table


def filled(document: str, text: str, name: str, body: str) -> str:
    """`text` with what stands between the markers of `name` replaced."""
    pattern = rf"(<!-- {name}: [^>]*-->\n).*?(<!-- /{name} -->)"
    if not re.search(pattern, text, flags=re.DOTALL):
        raise SystemExit(f"{document} must have the markers of {name!r}, got none")
    return re.sub(pattern, lambda match: f"{match[1]}{body}\n{match[2]}", text, flags=re.DOTALL)


def main() -> int:
    """Write or check every document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a document is stale")
    check = parser.parse_args().check
    stale = []
    for document, tables in DOCUMENTS.items():
        path = ROOT / document
        now = wanted = path.read_text(encoding="utf-8")
        for name, make in tables.items():
            wanted = filled(document, wanted, name, make())
        if wanted != now:
            stale.append(document)
            if not check:
                path.write_text(wanted, encoding="utf-8")
    if check and stale:
        print(f"{', '.join(stale)} stale: run `make tables`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
