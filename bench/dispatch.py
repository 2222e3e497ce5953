"""How far inference by the dispatcher is from the best of the dense layer and the published block, on this CPU.

    python bench/dispatch.py [--out FILE] [--rounds 60] [--threads 2]

Every compressed layer as users call it (`auto`, eval mode, no gradients) against `to_dense()` and `to_sequential()`,
in turns in one process: Tucker-2 layers of the shipped table, Tucker-2 layers whose shapes it has not seen, and CP
layers, whose `to_sequential()` is NORTON's block of four operations.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastrank import tune
from fastrank.benchmarks import timing
from fastrank.benchmarks.layers import OTHERS, RESNET18
from fastrank.nn import FusedCPConv, FusedTucker2Conv


class Case(NamedTuple):
    """A layer of a 3×3 kernel with padding 1, and its input. ranks: (R_in, R_out) of Tucker-2, R of CP."""

    in_channels: int
    out_channels: int
    stride: int
    size: int
    ranks: tuple[int, int] | int
    batch: int


def known() -> list[Case]:
    """The layers of ResNet-18, ResNet-50 and VGG-16 that the GPU benchmarks take, at small batches."""
    return [
        Case(layer.in_channels, layer.out_channels, layer.stride, layer.size, layer.ranks, batch)
        for layer in (*RESNET18, *OTHERS)
        for batch in (1, 8)
        if layer.size * batch <= 112
    ]


def unseen(count: int = 40) -> list[Case]:
    """Layers drawn at random."""
    draw = random.Random(0)
    found = []
    for _ in range(count):
        channels = draw.choice((32, 48, 64, 96, 128, 160, 256, 384, 512))
        out_channels = draw.choice((channels, 2 * channels))
        share = draw.uniform(0.1, 0.9)
        ranks = max(1, int(channels * share)), max(1, int(out_channels * share))
        found.append(
            Case(channels, out_channels, draw.choice((1, 1, 2)), draw.choice((7, 10, 14, 20, 28)), ranks,
                 draw.choice((1, 2, 4, 16)))
        )  # fmt: skip
    return found


def cp_layers() -> list[Case]:
    """3×3 layers of ResNets and VGG at the ranks of NORTON's networks and around them."""
    shapes = [(64, 64, 1, 56), (64, 64, 1, 32), (128, 128, 1, 28), (128, 128, 1, 16), (256, 256, 1, 14)]
    shapes += [(256, 256, 1, 8), (512, 512, 1, 7), (64, 128, 2, 56), (128, 256, 2, 28)]
    return [
        Case(i, o, stride, size, rank, batch)
        for rank in (1, 2, 4, 8)
        for i, o, stride, size in shapes
        for batch in (1, 8)
        if size * batch * rank <= 512
    ]


def layer_of(case: Case) -> FusedTucker2Conv | FusedCPConv:
    geometry: dict[str, Any] = {"stride": case.stride, "padding": 1}
    if isinstance(case.ranks, int):
        return FusedCPConv(case.in_channels, case.out_channels, 3, case.ranks, **geometry).eval()
    return FusedTucker2Conv(case.in_channels, case.out_channels, 3, case.ranks, **geometry).eval()


def measure(case: Case, rounds: int, channels_last: bool) -> dict[str, Any]:
    """Medians in microseconds, and how many times the best of the two the layer takes."""
    torch.manual_seed(0)
    layer = layer_of(case)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(case.batch, case.in_channels, case.size, case.size).to(memory_format=memory_format)
    models = {"auto": layer, "dense": layer.to_dense(), "sequence": layer.to_sequential()}
    models = {name: model.to(memory_format=memory_format) for name, model in models.items()}
    with torch.inference_mode():
        for model in models.values():
            for _ in range(3):
                model(x)
        times: dict[str, list[float]] = {name: [] for name in models}
        orders, chance = list(itertools.permutations(models)), random.Random(0)
        for turn in range(rounds):
            # Every order comes as often: who runs behind whom finds other things in the caches.
            if turn % len(orders) == 0:
                chance.shuffle(orders)
            for name in orders[turn % len(orders)]:
                start = time.perf_counter()
                models[name](x)
                times[name].append((time.perf_counter() - start) * 1e6)
    medians = {name: statistics.median(values) for name, values in times.items()}
    best = min("dense", "sequence", key=lambda name: medians[name])
    return {
        **case._asdict(), "channels_last": channels_last, "us": medians, "best": best,
        "over_best": medians["auto"] / medians[best], "over_published": medians["sequence"] / medians["auto"],
    }  # fmt: skip


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Median, 95th percentile and worst of over_best, and of the slower choice over the better one."""
    ratios = sorted(row["over_best"] for row in rows)
    avoided = [max(row["us"]["dense"], row["us"]["sequence"]) / row["us"][row["best"]] for row in rows]
    return {
        "layers": len(rows),
        "p50": statistics.median(ratios),
        "p95": ratios[int(0.95 * (len(ratios) - 1))],
        "worst": ratios[-1],
        "within_5_percent": sum(ratio <= 1.05 for ratio in ratios) / len(ratios),
        "wrong_choice_would_cost_p50": statistics.median(avoided),
    }


def table(results: dict[str, Any]) -> str:
    """The summaries in Markdown."""
    lines = [
        "| layers | how many | median | 95th percentile | worst | within 5 % | the other choice, median |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, group in results["groups"].items():
        found = group["summary"]
        lines.append(
            f"| {name} | {found['layers']} | {found['p50']:.3f} | {found['p95']:.3f} | {found['worst']:.2f} | "
            f"{found['within_5_percent']:.0%} | {found['wrong_choice_would_cost_p50']:.2f} |"
        )
    return "\n".join(lines) + "\n\n" + _note(results, "times over the best choice's")


def cp_summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Times faster than the published block: lowest, median and highest; share of the layers from 1.5 times on."""
    ratios = sorted(row["over_published"] for row in rows)
    return {
        "layers": len(rows),
        "lowest": ratios[0],
        "p50": statistics.median(ratios),
        "highest": ratios[-1],
        "from_1.5": sum(ratio >= 1.5 for ratio in ratios) / len(ratios),
        "within_5_percent": sum(row["over_best"] <= 1.05 for row in rows) / len(rows),
        "dense_p50": statistics.median(row["us"]["dense"] / row["us"]["auto"] for row in rows),
    }


def cp_table(results: dict[str, Any]) -> str:
    """The CP layers in Markdown, a line a layout and rank."""
    lines = [
        "| layers | how many | lowest | median | highest | 1.5 and more | within 5 % of best | over dense, median |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, group in results["cp"].items():
        found = group["summary"]
        lines.append(
            f"| {name} | {found['layers']} | {found['lowest']:.2f} | {found['p50']:.2f} | {found['highest']:.2f} | "
            f"{found['from_1.5']:.0%} | {found['within_5_percent']:.0%} | {found['dense_p50']:.2f} |"
        )
    return "\n".join(lines) + "\n\n" + _note(results, "times faster than the published block of four operations")


def _note(results: dict[str, Any], what: str) -> str:
    machine = results["environment"]
    processor = f"{machine['device']} ({machine['capability']})"
    return f"float32, {machine['cpu_threads']} threads, {processor}, torch {machine['torch']}; {what}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file for the rows, as JSON")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    groups: dict[str, Any] = {}
    for name, cases in (("known", known()), ("unseen", unseen())):
        for channels_last in (False, True):
            group = f"{name}, {'NHWC' if channels_last else 'NCHW'}"
            rows = [measure(case, options.rounds, channels_last) for case in cases]
            groups[group] = {"summary": summary(rows), "rows": rows}
            print(group, {key: round(value, 3) for key, value in summary(rows).items()}, flush=True)
    cp: dict[str, Any] = {}
    for channels_last in (False, True):
        for rank in (1, 2, 4, 8):
            rows = [measure(case, options.rounds, channels_last) for case in cp_layers() if case.ranks == rank]
            group = f"R = {rank}, {'NHWC' if channels_last else 'NCHW'}"
            cp[group] = {"summary": cp_summary(rows), "rows": rows}
            print(group, {key: round(value, 3) for key, value in cp_summary(rows).items()}, flush=True)
    if options.out:
        machine = timing.environment() | tune.environment()
        text = json.dumps({"environment": machine, "groups": groups, "cp": cp}, indent=1)
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
