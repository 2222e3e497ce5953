"""The tables of docs/accuracy.md, from the results of bench/accuracy.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastrank import report

Results = dict[str, Any]


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the first column is text, the others are numbers."""
    rule = ["---"] + ["---:"] * (len(columns) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows))


def ratio(whole: float, part: float) -> str:
    """"÷3.1"."""
    return f"÷{whole / part:.1f}"


def setting(results: Results) -> str:
    """One paragraph: data, epochs, machine."""
    study, epochs, machine = results["comparison"], results["epochs"], results["machine"]
    dense = study["dense"]
    return (
        f"{study['network']} on the digits at {report.by(study['input'])}: {report.short(dense['macs'])} multiply-adds"
        f", {report.short(dense['params'])} parameters; {results['held_out']} held-out images (0.19 points each); "
        f"{epochs['dense']} epochs of training, {epochs['tune']} of fine-tuning, {epochs['close']} of closing gates; "
        f"CPU, {machine['threads']} threads, torch {machine['torch']}."
    )


def comparison(results: Results) -> str:
    """Every method at every budget."""
    study = results["comparison"]
    dense, rows = study["dense"], []
    for row in study["rows"]:
        if "unreachable" in row:
            rows.append([row["row"], row["budget"], "not reached", *[""] * 6])
            continue
        seeds = "" if row["seeds"] == 3 else f" ({row['seeds']} of 3 seeds)"
        rows.append(
            [
                row["row"],
                row["budget"],
                ratio(dense["macs"], row["macs"]) + seeds,
                ratio(dense["params"], row["params"]),
                f"{row['trained']:.2f}",
                f"{row['converted']:.2f}",
                f"{row['tuned']:.2f}",
                f"±{row['tuned_spread'] / 2:.2f}",
                f"{row['dense_ms'] / row['ms']:.2f}×" if "ms" in row else "",
            ]
        )
    columns = ["method", "budget", "MACs", "params", "dense %", "converted %", "tuned %", "spread", "speed"]
    return markdown(columns, rows)


def norton_ranks(results: Results) -> str:
    """The README's rank ablation."""
    rows = [
        [
            str(row["rank"]),
            f"{row['fewer']['macs']:.2f}",
            f"{row['fewer']['params']:.2f}",
            f"{row['nmse']:.4f}",
            f"{row['converted']:.2f}",
            f"{row['tuned']:.2f}",
        ]
        for row in results["norton"]["ranks"]
    ]
    return markdown(["rank", "MACs fewer %", "params fewer %", "NMSE", "without FT %", "with FT %"], rows)


def norton_trade(results: Results) -> str:
    """Rank against pruning at like multiply-adds, and the criteria."""
    rows = [
        [
            f"R = {row['rank']}, {row['rate']:.0%} pruned",
            f"{row['fewer']['macs']:.2f}",
            f"{row['fewer']['params']:.2f}",
            f"{row['converted']:.2f}",
            f"{row['tuned']:.2f}",
        ]
        for row in results["norton"]["trade_off"]
    ]
    rows += [
        [
            f"R = 4, 40% pruned by {name.upper()}",
            f"{row['fewer']['macs']:.2f}",
            f"{row['fewer']['params']:.2f}",
            f"{row['converted']:.2f}",
            f"{row['tuned']:.2f}",
        ]
        for name, row in results["norton"]["criteria"].items()
    ]
    return markdown(["rank and pruning", "MACs fewer %", "params fewer %", "without FT %", "with FT %"], rows)


def funnel(results: Results) -> str:
    """Penalty, step, schedule and learning rate: what closing leaves, pruned at 0.02, nothing fine-tuned."""
    study, rows = results["funnel"], []
    for kind, label in (("penalty", "penalty"), ("step", "step"), ("schedule", "C"), ("lr", "learning rate")):
        for name, row in study[kind].items():
            if "diverged" in row:
                rows.append([f"{label} {name}", "", "", "diverged", "", "", ""])
                continue
            rows.append(
                [
                    f"{label} {name}",
                    f"{row['pruned_percent']:.1f}",
                    f"{row['zero_percent']:.1f}",
                    f"{row['closed']:.2f}",
                    f"{row['pruned']:.2f}",
                    report.short(row["macs"]),
                    report.short(row["params"]),
                ]
            )
    columns = ["varied", "pruned gates %", "exact zeros %", "before pruning %", "after pruning %", "MACs", "params"]
    return markdown(columns, rows)


def funnel_thresholds(results: Results) -> str:
    """The threshold, with fine-tuning; and the three factorisations at half of the multiply-adds."""
    study = results["funnel"]
    cases = {
        **{f"threshold {name}": row for name, row in study["threshold"].items()},
        **{f"{form} at 2×": row for form, row in study["form"].items()},
    }
    rows = [
        [name, report.short(r["macs"]), report.short(r["params"]), f"{r['converted']:.2f}", f"{r['tuned']:.2f}"]
        for name, r in cases.items()
    ]
    return markdown(["varied", "MACs", "params", "pruned %", "tuned %"], rows)


def nrmf_layers(results: Results) -> str:
    """The README's layer table: ranks and parameters."""
    rows = []
    for row in results["nrmf"]["layers"]:
        cells = [row["layer"], f"{row['in']}→{row['out']}", report.short(row["params"])]
        for method in ("VBMF", "NRMF"):
            found = row[method]
            if 0 in found["ranks"]:
                cells.append("only noise")
            else:
                cells.append(
                    f"{report.ranks_text(found['ranks'])}: {report.short(found['params'])}"
                    f" ({ratio(row['params'], found['params'])})"
                )
        rows.append(cells)
    return markdown(["layer", "S→T", "params", "VBMF, plain training", "NRMF, p = 95 %"], rows)


def trp(results: Results) -> str:
    """Accuracy and speed-up right after the decomposition."""
    rows = [
        [
            f"{row['training']}, {row['scheme']}" if row["training"] == "plain" else row["training"],
            f"{row['trained']:.2f}",
            f"{row['converted']:.2f}",
            f"{row['speed_up']:.2f}×",
            report.short(row["params"]),
        ]
        for row in results["trp"]["rows"]
    ]
    return markdown(["training, scheme", "trained %", "decomposed %", "fewer MACs", "params"], rows)


TABLES: dict[str, Callable[[Results], str]] = {
    "setting": setting,
    "comparison": comparison,
    "trp": trp,
    "nrmf-layers": nrmf_layers,
    "funnel": funnel,
    "funnel-thresholds": funnel_thresholds,
    "norton-ranks": norton_ranks,
    "norton-trade": norton_trade,
}
