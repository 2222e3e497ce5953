"""inspect, train, compress: from a network to a smaller one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import fastrank
from fastrank import complexity as _complexity
from fastrank import distributed, ranks, recipe, report
from fastrank import io as _io
from fastrank.cli._bench import explain_layers, show_explained
from fastrank.cli._common import Input, Json, Model, Root, app, blank, network_of, out, print_json, size_of
from fastrank.cli._plan import Data, Images, calibrated, show_plan
from fastrank.convert import input_sizes, sites
from fastrank.decompose import unfold
from fastrank.plan import Plan


@app.command(epilog="Example: fastrank inspect torchvision:resnet18")
def inspect(
    model: Model,
    input_size: Input = None,
    energy: float = 0.95,
    explain: Annotated[
        bool, typer.Option("--explain", help="Of a compressed model: the backend of every layer, and why.")
    ] = False,
    batch: Annotated[int, typer.Option(help="Images a batch that --explain is for.", min=1)] = 1,
    plot: Annotated[Path | None, typer.Option(help="Of a plan: a picture of every layer, as PNG.")] = None,
    as_json: Json = False,
) -> None:
    """Show every convolution of a model with its energy ranks and costs, or a plan file as a table and a plot."""
    if model.endswith(".json"):
        loaded = Plan.load(model)
        if plot is not None:
            report.plot_plan(plot, loaded.layers, title=f"{Path(model).name}: {loaded.method}")
        show_plan(loaded, as_json)
        return
    if plot is not None:
        raise ValueError(f"--plot must be of a plan file, got {model!r}")
    network = network_of(model)
    size = size_of(input_size, network)
    if explain:
        explained = explain_layers(network, size, batch)
        if as_json:
            print_json({"model": model, "input": list(size), "batch": batch, "layers": explained})
        else:
            show_explained(explained, f"{model} at {report.by((batch, *size))}: backends of the compressed layers")
        return
    found, seen = _complexity.count(network, size), input_sizes(network, blank(network, size))
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
        print_json({"model": model, "input": list(size), "macs": found.macs, "params": found.params, "layers": rows})
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


@app.command(epilog="Example: fastrank train recipes/nrmf_lenet5_digits.yaml --out runs/nrmf")
def train(
    recipe_file: Annotated[Path, typer.Argument(help="A recipe (YAML).", metavar="RECIPE")],
    save_to: Annotated[Path, typer.Option("--out", help="Folder for checkpoints, plan, model and summary.")] = Path(
        "runs/train"
    ),
    root: Root = None,
    pretrained: Annotated[
        str | None, typer.Option(help="Weights to start from, for recipes that want them.", metavar="FILE")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One epoch of everything.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew instead of resuming what is in --out.")] = False,
    parallel: Annotated[
        str | None, typer.Option(help="Under torchrun: ddp (the default) or fsdp, sharded.", metavar="ddp|fsdp")
    ] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Log every epoch for TensorBoard, in the folder tensorboard of --out.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train, regularise, compress and fine-tune as a recipe says; a killed run goes on where it was.

    On several GPUs or machines: torchrun --nproc-per-node 4 -m fastrank train RECIPE --out DIR.
    """
    chosen = recipe.load(recipe_file)
    several = distributed.started_as_rank()
    if parallel is not None and not several:
        raise ValueError(f"--parallel must be left out where torchrun has not started several ranks, got {parallel!r}")
    with distributed.joined():
        summary = recipe.run(
            chosen.quick() if quick else chosen,
            save_to,
            root=root,
            pretrained=pretrained,
            resume=not fresh,
            progress=None,
            parallel=(parallel or "ddp") if several else None,
            logger=_tensorboard() if tensorboard else None,
        )
        main = distributed.rank() == 0
    if as_json and main:
        print_json(summary)
    elif main:
        out.print(report.stage_table(report.stages_of(summary), title=str(recipe_file)))
        if line := report.published(summary):
            out.print(line)
        out.print(f"Written to {save_to}: summary.json, model.safetensors" + (", plan.json" if chosen.compress else ""))
    if several:
        distributed.leave()


@app.command(epilog="Example: fastrank compress model.safetensors --plan plan.json --out small.safetensors")
def compress(
    model: Model,
    plan_file: Annotated[Path, typer.Option("--plan", help="A plan made by `fastrank plan`.")],
    save_to: Annotated[Path, typer.Option("--out", help="Where to write the compressed model.")],
    input_size: Input = None,
    guard: Annotated[bool, typer.Option(help="Keep layers dense that would grow.")] = True,
    dataset: Data = None,
    root: Root = None,
    images: Images = 256,
    as_json: Json = False,
) -> None:
    """Apply a plan to a model and save the result with its architecture; with --data, calibrated on these images."""
    if save_to.suffix != ".safetensors":
        raise ValueError(f"--out must end in .safetensors, got {str(save_to)!r}")
    network, chosen = network_of(model), Plan.load(plan_file)
    size = size_of(input_size, network)
    before = _complexity.count(network, size)
    calibration = None if dataset is None else calibrated(network, dataset, root, images)
    small = fastrank.compress(network, chosen, guard=guard, calibration=calibration)
    after = _complexity.count(small, size)
    _io.save(small, save_to, input_size=size)
    totals = {
        "out": str(save_to),
        "macs": {"dense": before.macs, "compressed": after.macs},
        "params": {"dense": before.params, "compressed": after.params},
    }
    if as_json:
        print_json(totals)
        return
    cells = [
        [kind, report.thousands(a), report.thousands(b), f"{a / b:.2f}×"]
        for kind, a, b in (("parameters", before.params, after.params), ("multiply-adds", before.macs, after.macs))
    ]
    out.print(report.table(["", "dense", "compressed", "fewer"], cells, title=f"{model} -> {save_to}"))


def _tensorboard() -> Any:
    from fastrank.integrations import tensorboard

    return tensorboard.epoch_logger
