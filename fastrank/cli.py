"""The `fastrank` command. Every subcommand takes --json; wrong input ends with one sentence and exit code 2."""

from __future__ import annotations

import io
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import nn

import fastrank
from fastrank import complexity as _complexity
from fastrank import demo as _demo
from fastrank import env as _env
from fastrank import io as _io
from fastrank import models, ranks, recipe, report
from fastrank import train as _train
from fastrank.convert import input_sizes, sites
from fastrank.decompose import unfold
from fastrank.plan import Plan

app = typer.Typer(
    help="Low-rank compression of CNNs, fast where it is slow.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
# A pipe or a file has no width: do not fold what is written there at 80 columns.
out = Console(highlight=False, width=None if sys.stdout is not None and sys.stdout.isatty() else 120)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Model = Annotated[
    str, typer.Argument(help="lenet5_nrmf, torchvision:resnet18, timm:NAME, ... or a file saved by fastrank.")
]
Input = Annotated[str | None, typer.Option("--input", help="Input size C,H,W.", metavar="C,H,W")]


@app.command(epilog="Example: fastrank inspect torchvision:resnet18")
def inspect(model: Model, input_size: Input = None, energy: float = 0.95, as_json: Json = False) -> None:
    """Show every convolution of a model with its energy ranks and costs, or a plan file as a table."""
    if model.endswith(".json"):
        _show_plan(Plan.load(model), as_json)
        return
    network, size = _network(model), _input_size(input_size, model)
    found, seen = _complexity.count(network, size), input_sizes(network, _blank(network, size))
    rows: list[dict[str, Any]] = []
    for site in sites(network):
        kernel = site.conv.weight.detach()
        spectra = [] if site.reason else [ranks.singular_values(unfold(kernel, mode)) for mode in ("mode3", "mode4")]
        cost = found.per_layer.get(site.name)
        rows.append(
            {
                "name": site.name,
                "shape": list(kernel.shape),
                "stride": list(site.conv.stride),
                "input": list(seen.get(site.name, ())),
                "params": kernel.numel(),
                "macs": cost.macs if cost else 0,
                "ranks": [ranks.energy_rank(spectrum, energy) for spectrum in spectra],
                "refused": site.reason,
            }
        )
    if as_json:
        _print_json({"model": model, "input": list(size), "macs": found.macs, "params": found.params, "layers": rows})
        return
    cells = [
        [
            row["name"],
            report.by(row["shape"]),
            report.by(row["input"]),
            report.thousands(row["params"]),
            report.thousands(row["macs"]),
            row["refused"] or report.ranks_text(row["ranks"]),
        ]
        for row in rows
    ]
    untrained = "" if model.endswith(".safetensors") else " (untrained weights)"
    title = f"{model}{untrained} at {report.by(size)}: {found.params:,} parameters, {found.macs:,} multiply-adds"
    columns = ["layer", "O×I×kh×kw", "map", "weights", "MACs", f"ranks at {energy:g} energy"]
    out.print(report.table(columns, cells, title=title))


@app.command(epilog="Example: fastrank plan torchvision:resnet18 --method nrmf --budget macs=0.5 --out plan.json")
def plan(
    model: Model,
    method: Annotated[str, typer.Option(help="nrmf, vbmf, trp-channel, trp-spatial, norton or auto.")] = "nrmf",
    energy: Annotated[float | None, typer.Option(help="Share of squared singular values to keep.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of norton.")] = None,
    budget: Annotated[str | None, typer.Option(help="macs=SHARE or params=SHARE of the dense model.")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Layer name or pattern to leave dense; repeatable.")] = None,
    input_size: Input = None,
    save_to: Annotated[Path | None, typer.Option("--out", help="Where to write the plan.")] = None,
    as_json: Json = False,
) -> None:
    """Choose a form and ranks for every convolution, with a reason each."""
    network = _network(model)
    options = {key: value for key, value in (("energy", energy), ("rank", rank)) if value is not None}
    example = _blank(network, _input_size(input_size, model))
    made = fastrank.make_plan(
        network, method, example_input=example, budget=_budget(budget), skip=skip or [], **options
    )
    if save_to is not None:
        made.save(save_to)
    _show_plan(made, as_json)


@app.command(epilog="Example: fastrank train recipes/nrmf_lenet5_digits.yaml --out runs/nrmf")
def train(
    recipe_file: Annotated[Path, typer.Argument(help="A recipe (YAML).", metavar="RECIPE")],
    save_to: Annotated[Path, typer.Option("--out", help="Folder for checkpoints, plan, model and summary.")] = Path(
        "runs/train"
    ),
    root: Annotated[str | None, typer.Option(help="Where the data set lies on disk.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One epoch of everything.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew instead of resuming what is in --out.")] = False,
    as_json: Json = False,
) -> None:
    """Train, regularise, compress and fine-tune as a recipe says; a killed run goes on where it was."""
    chosen = recipe.load(recipe_file)
    summary = recipe.run(
        chosen.quick() if quick else chosen,
        save_to,
        root=root,
        resume=not fresh,
        progress=None,
    )
    if as_json:
        _print_json(summary)
        return
    stages = [(stage, summary[stage]) for stage in ("dense", "compressed", "finetuned") if stage in summary]
    cells = [
        [stage, f"{s['top1']:.2f}", f"{s['top5']:.2f}", report.thousands(s["params"]), report.thousands(s["macs"])]
        for stage, s in stages
    ]
    out.print(report.table(["stage", "Acc@1", "Acc@5", "params", "MACs"], cells, title=str(recipe_file)))
    out.print(f"Written to {save_to}: summary.json, model.safetensors" + (", plan.json" if chosen.compress else ""))


@app.command(epilog="Example: fastrank compress model.safetensors --plan plan.json --out small.safetensors")
def compress(
    model: Model,
    plan_file: Annotated[Path, typer.Option("--plan", help="A plan made by `fastrank plan`.")],
    save_to: Annotated[Path, typer.Option("--out", help="Where to write the compressed model.")],
    input_size: Input = None,
    guard: Annotated[bool, typer.Option(help="Keep layers dense that would grow.")] = True,
    as_json: Json = False,
) -> None:
    """Apply a plan to a model and save the result with its architecture."""
    if save_to.suffix != ".safetensors":
        raise ValueError(f"--out must end in .safetensors, got {str(save_to)!r}")
    network, chosen = _network(model), Plan.load(plan_file)
    size = _input_size(input_size, model)
    before = _complexity.count(network, size)
    small = fastrank.compress(network, chosen, guard=guard)
    after = _complexity.count(small, size)
    _io.save(small, save_to)
    totals = {
        "out": str(save_to),
        "macs": {"dense": before.macs, "compressed": after.macs},
        "params": {"dense": before.params, "compressed": after.params},
    }
    if as_json:
        _print_json(totals)
        return
    cells = [
        [kind, report.thousands(a), report.thousands(b), f"{a / b:.2f}×"]
        for kind, a, b in (("parameters", before.params, after.params), ("multiply-adds", before.macs, after.macs))
    ]
    out.print(report.table(["", "dense", "compressed", "fewer"], cells, title=f"{model} -> {save_to}"))


@app.command(epilog="Example: fastrank evaluate runs/demo/model.safetensors --data digits --size 16")
def evaluate(
    model: Model,
    dataset: Annotated[str, typer.Option("--data", help="digits, cifar10, cifar100 or imagenet.")],
    root: Annotated[str | None, typer.Option(help="Where the data set lies on disk.")] = None,
    size: Annotated[int | None, typer.Option(help="Pixels a side, for digits and imagenet.")] = None,
    as_json: Json = False,
) -> None:
    """Print the accuracy of a model on a data set's test split."""
    network = _network(model)
    found = fastrank.data.load(dataset, root=root, split="test", **({} if size is None else {"size": size}))
    _complexity.count(network, found.shape)  # names the size where the network refuses these images
    result = _train.evaluate(network, found)
    if as_json:
        _print_json({"model": model, "data": dataset, **asdict(result)})
    else:
        out.print(
            f"Acc@1 {result.top1:.2f}  Acc@5 {result.top5:.2f}  loss {result.loss:.4f}  ({result.count:,} images)"
        )


@app.command(epilog="Example: fastrank complexity --arch vgg_16_bn -r 1 -cpr '[0.6]*6+[0.8]*7'")
def complexity(
    arch: Annotated[str, typer.Option("--arch", help="An architecture's name or a saved file.")],
    rank: Annotated[int, typer.Option("-r", "--rank", help="CP rank of every 3×3 convolution; 0 is dense.")] = 0,
    compress_rate: Annotated[
        str | None, typer.Option("-cpr", "--compress-rate", help="Pruning rates, as in NORTON.")
    ] = None,
    num_classes: Annotated[int | None, typer.Option(help="Logits; the architecture's own by default.")] = None,
    input_size: Input = None,
    as_json: Json = False,
) -> None:
    """Count multiply-adds and parameters by both conventions, and the reductions against the dense network."""
    network = _network(arch, rank=rank, compress_rate=compress_rate, num_classes=num_classes)
    size = _input_size(input_size, arch)
    counts = {c: _complexity.count(network, size, convention=c) for c in _complexity.CONVENTIONS}
    document: dict[str, Any] = {"arch": arch, "rank": rank, "compress_rate": compress_rate, "input": list(size)}
    params, bare = counts["conv_fc"].params, counts["conv_fc"].params_without_block_biases
    document |= {"params": params, "params_without_block_biases": bare, "macs": {c: n.macs for c, n in counts.items()}}
    document["layers"] = counts["conv_fc"].table()
    if rank or compress_rate:
        whole = _network(arch, num_classes=num_classes)
        reductions = {c: counts[c].reduction_from(_complexity.count(whole, size, convention=c)) for c in counts}
        document["reduction_percent"] = {c: {"macs": macs, "params": fewer} for c, (macs, fewer) in reductions.items()}
    if as_json:
        _print_json(document)
        return
    cells = []
    for name, count in counts.items():
        fewer = document.get("reduction_percent", {}).get(name)
        shares = [f"{fewer['macs']:.2f} %", f"{fewer['params']:.2f} %"] if fewer else ["", ""]
        cells.append([name, report.thousands(count.macs), shares[0], report.thousands(count.params), shares[1]])
    title = f"{arch} at {report.by(size)}" + (f", rank {rank}" if rank else "")
    out.print(report.table(["convention", "MACs", "fewer", "parameters", "fewer"], cells, title=title))
    if bare != params:
        out.print(f"parameters without block biases (as the NORTON README counts): {report.thousands(bare)}")


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
        _print_json(summary)
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
        _print_json(found)
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


def main() -> None:
    """Entry point: bad input is one sentence on stderr and exit code 2, never a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # × and ÷ in a terminal that cannot show them are no error
    try:
        app()
    except (ValueError, TypeError, ImportError, OSError) as error:
        message = (
            str(error)
            if not isinstance(error, OSError) or error.filename is None
            else f"{error.strerror}: {error.filename}"
        )
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"fastrank: {message}", markup=False)
        sys.exit(2)
    except RuntimeError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"fastrank: {error}", markup=False)
        sys.exit(1)


def _network(name: str, **options: Any) -> nn.Module:
    """A saved model, or a fresh one by name."""
    if name.endswith(".safetensors"):
        if any(value for value in options.values()):
            raise ValueError("rank, compress_rate and num_classes must be left out for a saved model, got some")
        return _io.load(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # untrained weights, but the same ones at every call
        return models.build(name, **options)


def _input_size(text: str | None, model: str) -> tuple[int, int, int]:
    if text is None:
        if model.endswith(".safetensors"):
            origin = models.identify(_io.load(model)) or {}
            return models.default_input_size(str(origin.get("name")))
        return models.default_input_size(model)
    parts = text.replace("x", ",").replace("×", ",").split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"--input must be three whole numbers C,H,W, got {text!r}")
    channels, height, width = (int(part) for part in parts)
    return channels, height, width


def _blank(network: nn.Module, size: tuple[int, int, int]) -> torch.Tensor:
    like = next((p for p in network.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.zeros(1, *size, device=like.device, dtype=like.dtype)


def _budget(text: str | None) -> dict[str, float] | None:
    if text is None:
        return None
    kind, _, share = text.partition("=")
    try:
        return {kind: float(share)}
    except ValueError as error:
        raise ValueError(f"--budget must be macs=SHARE or params=SHARE, got {text!r}") from error


def _show_plan(plan: Plan, as_json: bool) -> None:
    if as_json:
        out.print_json(plan.to_json())
        return
    cells = [[name, layer.method, report.ranks_text(layer.ranks), layer.reason] for name, layer in plan.layers.items()]
    title = f"{plan.method} plan: {len(plan.compressed)} of {len(plan.layers)} convolutions factored"
    out.print(report.table(["layer", "becomes", "ranks", "because"], cells, title=title, left=4))


def _print_json(document: Any) -> None:
    print(json.dumps(document, indent=2))
