"""Plans under budgets, measured: is the predicted time the measured one, and what does calibration keep?

    python bench/plans.py [--out FILE] [--threads 2] [--only latency,accuracy]

latency: a network with random weights, a budget in time, and the plan for it. Its layers' times, added up, predict the
share of the dense time; the network that `compress` makes is then built with its real factors and measured anew beside
the dense one, in turns. Times of layers come from this run alone.

accuracy: a network trained on scikit-learn's digits, compressed under budgets in multiply-adds, and tested before any
fine-tuning: as decomposed from the kernels alone by one energy for all layers, with all layers chosen together, and
with all layers chosen together for, and decomposed for, 512 training images.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastrank
from fastrank import _tables, data, latency, models, train

RESULTS = Path(__file__).resolve().parent / "results"
NETWORKS = (
    ("torchvision:resnet18", (3, 224, 224), 1),
    ("torchvision:resnet18", (3, 224, 224), 8),
    ("torchvision:vgg11_bn", (3, 224, 224), 1),
    ("torchvision:resnet50", (3, 224, 224), 1),
    ("vgg_16_bn", (3, 32, 32), 32),
    ("resnet_56", (3, 32, 32), 32),
)
SHARES = (0.8, 0.65, 0.5)
STUDIES = (("nrmf", (0.7, 0.5, 0.3)), ("trp-channel", (0.7, 0.5, 0.3)), ("trp-spatial", (0.7, 0.5, 0.3)))


def latency_rows() -> list[dict[str, Any]]:
    """A row a network, batch and share; "refused" holds the reason where the budget cannot be met."""
    rows: list[dict[str, Any]] = []
    for name, size, batch in NETWORKS:
        torch.manual_seed(0)
        model, x = models.build(name).eval(), torch.randn(batch, *size)
        for share in SHARES:
            row: dict[str, Any] = {"network": name, "input": [batch, *size], "share": share}
            started = time.monotonic()
            try:
                plan = fastrank.make_plan(model, "auto", example_input=x, budget={"latency": share})
            except ValueError as error:
                row["refused"] = str(error)
            else:
                small = fastrank.compress(model, plan)
                found = latency.compare({"dense": model, "planned": small}, x, rounds=15)
                row |= {
                    "seconds": time.monotonic() - started,
                    "predicted": plan.options["predicted"]["latency"],
                    "while_planning": plan.options["measured"]["latency"],
                    "measured": found["planned"].p20_us / found["dense"].p20_us,
                    "dense_us": found["dense"].p50_us,
                    "spread": (found["dense"].p80_us - found["dense"].p20_us) / found["dense"].p50_us,
                    "factored": len(plan.compressed),
                    "layers": len(plan.layers),
                }
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def accuracy_rows() -> list[dict[str, Any]]:
    """A row a form and share: accuracy in percent before fine-tuning, three ways."""
    torch.manual_seed(0)
    options = {"size": 16, "channels": 3}
    train_set, test_set = (data.load("digits", split=split, **options) for split in ("train", "test"))
    model = models.build("resnet_20")
    config = train.TrainConfig(epochs=15, batch_size=64, lr=0.1)
    train.fit(model, train_set, None, config)
    model.eval()
    x = torch.zeros(1, 3, 16, 16)
    calibration = fastrank.calibrate(model, train_set, images=512)
    dense = train.evaluate(model, test_set).top1
    rows = []
    for method, shares in STUDIES:
        for share in shares:
            ask: dict[str, Any] = {"example_input": x, "budget": {"macs": share}}
            plans = {
                "energy": fastrank.make_plan(model, method, **ask),
                "global": fastrank.make_plan(model, method, allocation="global", **ask),
                "calibrated": fastrank.make_plan(model, method, allocation="global", calibration=calibration, **ask),
            }
            row: dict[str, Any] = {"method": method, "share": share, "dense": dense}
            for way, plan in plans.items():
                own = calibration if way == "calibrated" else None
                row[way] = train.evaluate(fastrank.compress(model, plan, calibration=own), test_set).top1
            row["decomposed"] = _decomposed(model, plans["energy"], calibration, test_set)
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def _decomposed(model: nn.Module, plan: fastrank.Plan, calibration: Any, test_set: Any) -> float:
    """The very ranks of the plain plan, with decompositions for the calibration."""
    return train.evaluate(fastrank.compress(model, plan, calibration=calibration), test_set).top1


def latency_table(found: dict[str, Any]) -> str:
    """Predicted against measured, in Markdown."""
    lines = ["| network | input | asked | factored | predicted | measured | off by |", "|" + " ---: |" * 7]
    lines[1] = "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    off = []
    for row in found["latency"]:
        head = f"| {row['network']} | {'×'.join(map(str, row['input']))} | {row['share']:g}"
        if "refused" in row:
            least = row["refused"].partition("at least ")[2].partition(",")[0]
            lines.append(f"{head} | refused: at least {least} | | | |")
            continue
        off.append(abs(row["predicted"] / row["measured"] - 1))
        lines.append(
            f"{head} | {row['factored']} of {row['layers']} | {row['predicted']:.3f} | {row['measured']:.3f} "
            f"| {100 * (row['predicted'] / row['measured'] - 1):+.1f} % |"
        )
    within = sum(value <= 0.1 for value in off)
    note = (
        f"Shares of the dense network's time, {found['machine']['threads']} threads of a CPU "
        f"({found['machine']['cpu']}), torch {found['machine']['torch']}: {within} of {len(off)} predictions within "
        f"10 %, the worst off by "
        f"{100 * max(off, default=0):.0f} %."
    )
    return "\n".join(lines) + f"\n\n{note}"


def accuracy_table(found: dict[str, Any]) -> str:
    """Accuracy before fine-tuning, in Markdown."""
    heads = ["form", "MACs", "one energy", "the same, calibrated", "together", "together, calibrated"]
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " ---: |" * 5]
    for row in found["accuracy"]:
        cells = [f"{row[way]:.2f}" for way in ("energy", "decomposed", "global", "calibrated")]
        lines.append(f"| {row['method']} | {row['share']:g} | {' | '.join(cells)} |")
    dense = found["accuracy"][0]["dense"]
    return "\n".join(lines) + f"\n\nAccuracy in percent on the held-out digits, without fine-tuning; dense {dense:.2f}."


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "plans-cpu.json")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="latency,accuracy")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    os.environ["FASTRANK_CACHE"] = tempfile.mkdtemp()  # neither older times of layers nor the user's tuned tables
    found = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.is_file() else {}
    found["machine"] = {
        "cpu": _tables.cpu_name(),
        "vector": torch.backends.cpu.get_cpu_capability(),
        "threads": arguments.threads,
        "torch": torch.__version__,
        "fastrank": fastrank.__version__,
    }
    for part, measure in (("latency", latency_rows), ("accuracy", accuracy_rows)):
        if part in arguments.only.split(","):
            found[part] = measure()
    arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(latency_table(found) if "latency" in found else "", accuracy_table(found) if "accuracy" in found else "")


if __name__ == "__main__":
    main()
