"""The figures of the accuracy studies, as PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from fastrank.report import COLOURS

MARKERS = "osD^vP*X<>hdp"
# What belongs together has one colour.
FAMILIES = {"SVD": 0, "TRP": 1, "Tucker-2": 2, "NRMF": 2, "VBMF": 5, "MUSCO": 5, "Funnel": 3, "NORTON": 4}


def draw(results: dict[str, Any], out: Path) -> list[Path]:
    """Every figure whose study is in `results`."""
    makers = {"comparison": _pareto, "norton": _norton, "funnel": _gates, "nrmf": _spectra}
    drawn = []
    for study, maker in makers.items():
        if study in results:
            figure = maker(results[study])
            path = out / f"accuracy-{study}.png"
            figure.savefig(path, dpi=130)
            pyplot.close(figure)
            drawn.append(path)
    return drawn


def _colour(row: str) -> str:
    return COLOURS[next(index for family, index in FAMILIES.items() if row.startswith(family))]


def _pareto(study: dict[str, Any]) -> Any:
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 5.2), sharey=True, layout="constrained")
    dense = study["dense"]
    plain = [value for key, value in dense["top1"].items() if key.startswith("plain")]
    rows = sorted({row["row"] for row in study["rows"]}, key=[row["row"] for row in study["rows"]].index)
    reached = [row for row in study["rows"] if "unreachable" not in row]
    columns = (
        ("macs", dense["macs"], "multiply-adds, share of dense"),
        ("params", dense["params"], "parameters, share of dense"),
        ("ms", None, "measured time of a batch, share of dense"),
    )
    for axis, (key, whole, label) in zip(axes, columns, strict=True):
        axis.axhline(sum(plain) / len(plain), color="0.6", linestyle="--", linewidth=1, label="dense, plain training")
        for index, name in enumerate(rows):
            points = [
                (row[key] / (whole or row["dense_ms"]), row["tuned"])
                for row in reached
                if row["row"] == name and key in row
            ]
            if not points:
                continue
            axis.plot(
                [x for x, _ in points],
                [y for _, y in points],
                marker=MARKERS[index % len(MARKERS)],
                color=_colour(name),
                linewidth=1,
                markersize=6,
                label=name,
                alpha=0.9,
            )
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy on held-out digits, %, mean of the seeds")
    axes[2].axvline(1, color="0.6", linestyle=":", linewidth=1)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.suptitle(f"{study['network']} on digits: accuracy after fine-tuning against cost")
    return figure


def _norton(study: dict[str, Any]) -> Any:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    ranks = [row["rank"] for row in study["ranks"]]
    left.plot(ranks, [row["converted"] for row in study["ranks"]], "o-", color=COLOURS[1], label="without fine-tuning")
    left.plot(ranks, [row["tuned"] for row in study["ranks"]], "s-", color=COLOURS[0], label="fine-tuned")
    left.axhline(study["dense"]["top1"], color="0.6", linestyle="--", linewidth=1, label="dense")
    other = left.twinx()
    other.plot(ranks, [row["nmse"] for row in study["ranks"]], "^:", color=COLOURS[2])
    other.set_ylabel("NMSE of the weights (triangles)", color=COLOURS[2])
    other.set_ylim(bottom=0)
    left.set(xlabel="rank R", ylabel="accuracy, %", title="Rank ablation")
    left.legend(loc="upper left", bbox_to_anchor=(0.02, 0.92), frameon=False)
    left.grid(alpha=0.3)
    trade = study["trade_off"]
    names = [f"R = {row['rank']}\n{row['rate']:.0%} pruned" for row in trade]
    right.bar(names, [row["tuned"] for row in trade], color=COLOURS[0], width=0.6)
    for index, row in enumerate(trade):
        text = f"{row['tuned']:.1f} %\n−{row['fewer']['params']:.0f} % params"
        right.text(index, row["tuned"], text, ha="center", va="bottom", fontsize=8)
    low, high = min(row["tuned"] for row in trade), max(row["tuned"] for row in trade)
    right.set_ylim(max(0, low - 2), min(100.4, high + 1))
    right.set(ylabel="accuracy after fine-tuning, %", title="Rank against pruning at like multiply-adds")
    return figure


def _gates(study: dict[str, Any]) -> Any:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    top = sorted(study["gates"]["before"])[int(0.98 * len(study["gates"]["before"]))]
    bins = [top * i / 60 for i in range(61)]
    for name, colour in (("before", COLOURS[5]), ("after", COLOURS[1])):
        left.hist(study["gates"][name], bins=bins, color=colour, alpha=0.65, label=f"{name} closing", log=True)
    left.axvline(0.02, color="0.3", linestyle="--", linewidth=1, label="threshold 0.02")
    left.set(xlabel="|gate|", ylabel="gates", title="Penalised gates of the whole network")
    left.legend(frameon=False)
    rows = {name: row for name, row in study["schedule"].items() if "diverged" not in row}
    for index, (name, row) in enumerate(rows.items()):
        right.scatter(row["pruned_percent"], row["pruned"], color=COLOURS[index % 6], marker=MARKERS[index], label=name)
    right.set(xlabel="pruned gates, %", ylabel="accuracy after pruning, %", title="Schedules of C")
    right.grid(alpha=0.3)
    right.legend(frameon=False, fontsize=8)
    return figure


def _spectra(study: dict[str, Any]) -> Any:
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), sharey=True, sharex="col", layout="constrained")
    titles = {"mode3": "input side (mode 3)", "mode4": "output side (mode 4)"}
    for row, (training, curves) in zip(axes, study["curves"].items(), strict=True):
        for axis, (mode, title) in zip(row, titles.items(), strict=True):
            shown = curves[mode]
            for index, (epoch, values) in enumerate(shown.items()):
                shade = pyplot.get_cmap("viridis")(index / max(len(shown) - 1, 1))
                axis.plot(values, color=shade, linewidth=1.4, label=f"epoch {epoch}")
            axis.set_title(f"{'with' if training == 'NRMF' else 'without'} NRMF, {title}")
            axis.grid(alpha=0.3)
        row[0].set_ylabel("σ / σ₁")
    for axis in axes[1]:
        axis.set_xlabel("index of the singular value")
    axes[0, 1].legend(frameon=False, fontsize=8)
    figure.suptitle(f"Singular values of {study['layer']} (128→256) over the epochs")
    return figure
