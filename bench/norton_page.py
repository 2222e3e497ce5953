"""The tables of docs/networks.md, from the records of bench/norton.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import goals
import norton

from fastrank import report

Record = Mapping[str, Any]
TITLES = {"vgg_16_bn": "VGG-16-BN", "resnet_56": "ResNet-56", "resnet_50": "ResNet-50"}
UNKNOWN = "not yet measured"
# What a contender is compared with: a fold is open to the dense network, too.
BASES = {"four ops": "dense", "auto": "dense", "fused": "dense fused"}


def markdown(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; the first column is text, the others are numbers."""
    rule = ["---"] + ["---:"] * (len(columns) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rule, *lines))


def faster(record: Record | None, way: str, name: str) -> str:
    """As "1.84× (1.79–1.90)": the ratio of the medians, and of the outer fifths both ways."""
    times = {} if record is None else record["times"].get(way, {})
    if name not in times or BASES[name] not in times:
        return UNKNOWN
    base, mine = times[BASES[name]], times[name]
    low, high = base["p20_us"] / mine["p80_us"], base["p80_us"] / mine["p20_us"]
    return f"{base['p50_us'] / mine['p50_us']:.2f}× ({low:.2f}–{high:.2f})"


def rate(record: Record | None, way: str) -> str:
    """Images a second of the dense network as it is."""
    times = {} if record is None else record["times"].get(way, {})
    if "dense" not in times or record is None:
        return UNKNOWN
    return f"{record['batch'] / times['dense']['p50_us'] * 1e6:.3g}"


def setting(network: str, rank: int, rates: str | None) -> str:
    return f"{TITLES[network]}, R = {rank}{'' if rates is None else f', `{rates}`'}"


def read(folder: Path | None) -> list[Record]:
    """The records of a GPU run; none without one."""
    return [] if folder is None else [info for _, info in goals.read(folder, "norton") if "times" in info]


def classifiers(result: Mapping[str, Any]) -> str:
    """Every row at every batch, on a CPU; with what it was measured on."""
    found = [record for record in result["rows"] if record["network"] in TITLES]
    order = list(TITLES)
    found.sort(key=lambda record: (order.index(record["network"]), -record["macs"], record["batch"]))
    lines = [
        [
            setting(record["network"], record["rank"], record["compress_rate"]),
            str(record["batch"]),
            report.short(record["macs"]),
            rate(record, "eager"),
            f"{record['fewer_macs']:.2f}×",
            *(faster(record, "eager", name) for name in BASES),
        ]
        for record in found
    ]
    columns = ["network", "N", "MACs", "dense, images/s", "fewer MACs", *BASES]
    return f"{markdown(columns, lines)}\n\n{machine(result)}"


def machine(result: Mapping[str, Any]) -> str:
    here, first = result["environment"], result["rows"][0]
    layout = "channels_last" if first["channels_last"] else "NCHW"
    return f"{first['dtype']}, {layout}, {here['cpu_threads']} threads, {here['device']}, torch {here['torch']}, eager."


def classifiers_on_gpu(folder: Path | None) -> str:
    """The rows that are counted to the digit at the batches of a GPU, measured or not; a sentence without a run."""
    if folder is None:
        return "Not yet measured on a GPU."
    found = {
        (r["network"], r["rank"], r["compress_rate"], r["batch"], r["compiled"]): r
        for r in read(folder)
        if r["network"] in TITLES
    }
    lines = []
    for row in sorted((row for row in norton.rows() if row.exact), key=lambda row: list(TITLES).index(row.network)):
        dense, small = row.costs()
        for batch in sorted(norton.GPU_BATCHES):
            key = row.network, row.rank, row.rates, batch
            plain, compiled = (found.get((*key, way)) for way in (False, True))
            told = [setting(*key[:3]), str(batch), rate(plain, "graph"), f"{dense.macs / small.macs:.2f}×"]
            told += [faster(plain, "eager", name) for name in ("auto", "fused")]
            told += [faster(plain, "graph", name) for name in BASES]
            lines.append([*told, faster(compiled, "graph", "fused")])
    ways = ["eager: auto", "eager: fused", *(f"graph: {name}" for name in BASES), "compiled: fused"]
    return markdown(["network", "N", "dense, images/s", "fewer MACs", *ways], lines)


def detector(result: Mapping[str, Any], folder: Path | None) -> str:
    """Faster R-CNN, its ResNet alone and as a whole, on a CPU and on a GPU."""
    lines = []
    for where, records in (("CPU", result["rows"]), *([("GPU", read(folder))] if folder else [])):
        parts = {record["part"]: record for record in records if record["network"] == norton.DETECTOR}
        for part in ("backbone", "detector"):
            record = parts.get(part)
            size = [UNKNOWN] * 3 if record is None else [
                f"{record['size']}²",
                f"{report.short(record['dense_macs'])} → {report.short(record['macs'])}",
                f"{record['fewer_macs']:.2f}×",
            ]  # fmt: skip
            told = [rate(record, "eager"), *(faster(record, "eager", name) for name in BASES)]
            lines.append([f"{part}, {where}", *size[:2], told[0], size[2], *told[1:]])
    shown = markdown(["part", "image", "MACs", "dense, frames/s", "fewer MACs", *BASES], lines)
    return shown if folder else f"{shown}\n\nNot yet measured on a GPU."
