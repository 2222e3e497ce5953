"""plan: what becomes of every convolution, by a rule or under a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

import fastrank
from fastrank import data, models, report
from fastrank.calibration import Calibration
from fastrank.cli._common import GREY, Input, Json, Model, Root, app, blank, network_of, out, size_of
from fastrank.plan import Plan

Data = Annotated[str | None, typer.Option("--data", help="A data set to calibrate on, such as digits or imagenet.")]
Images = Annotated[int, typer.Option(help="How many of its training images.", min=1)]
KINDS = "latency=SHARE, macs=SHARE, params=SHARE or bytes=SHARE of the dense model"


@app.command(epilog="Example: fastrank plan torchvision:resnet18 --budget latency=0.5 --out plan.json")
def plan(
    model: Model,
    method: Annotated[
        str, typer.Option(help="auto, nrmf, vbmf, trp-channel, trp-spatial, trp-decoupled or norton.")
    ] = "auto",
    energy: Annotated[float | None, typer.Option(help="Share of squared singular values to keep.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of norton.")] = None,
    budget: Annotated[list[str] | None, typer.Option(help=f"{KINDS}; repeatable.")] = None,
    device: Annotated[str | None, typer.Option(help="Where latency is measured; the model's own by default.")] = None,
    batch: Annotated[int, typer.Option(help="Images a batch that latency is measured for.", min=1)] = 1,
    allocation: Annotated[
        str | None, typer.Option(help="energy: one for all layers; global: each layer its own.")
    ] = None,
    sensitivity: Annotated[str | None, typer.Option(help="energy, output or accuracy (these two with --data).")] = None,
    dataset: Data = None,
    root: Root = None,
    images: Images = 256,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Decompose for what the layers see of --data.")
    ] = False,
    max_drop: Annotated[
        float | None, typer.Option(help="Points of accuracy that may be lost before fine-tuning.")
    ] = None,
    cache: Annotated[bool, typer.Option(help="Use and keep measured times.")] = True,
    skip: Annotated[list[str] | None, typer.Option(help="Layer name or pattern to leave dense; repeatable.")] = None,
    input_size: Input = None,
    save_to: Annotated[Path | None, typer.Option("--out", help="Where to write the plan.")] = None,
    as_json: Json = False,
) -> None:
    """Choose a form and ranks for every convolution, with a reason each."""
    if calibrate and dataset is None:
        raise ValueError("--data must be given with --calibrate, got none")
    network = network_of(model)
    options: dict[str, Any] = {key: value for key, value in (("energy", energy), ("rank", rank)) if value is not None}
    shares: dict[str, Any] = _budget(budget or [])
    if device is not None:
        shares["device"] = device
    made = fastrank.make_plan(
        network,
        method,
        example_input=blank(network, size_of(input_size, network)).expand(batch, -1, -1, -1).contiguous(),
        budget=shares or None,
        allocation=allocation,
        sensitivity=sensitivity,
        data=None if dataset is None else training_images(network, dataset, root),
        images=images,
        calibration=calibrated(network, str(dataset), root, images) if calibrate else None,
        max_drop=max_drop,
        remember=cache,
        skip=skip or [],
        **options,
    )
    if save_to is not None:
        made.save(save_to)
    show_plan(made, as_json)


def training_images(network: nn.Module, dataset: str, root: str | None) -> Any:
    """The training split of a data set, with as many channels as the network was published for."""
    origin = getattr(network, "fastrank_origin", None) or {}
    options = {"channels": models.default_input_size(str(origin["name"]))[0]} if dataset in GREY and origin else {}
    return data.load(dataset, root=root, split="train", **options)


def calibrated(network: nn.Module, dataset: str, root: str | None, images: int) -> Calibration:
    """What the layers of `network` see of a data set."""
    with torch.random.fork_rng():
        return fastrank.calibrate(network, training_images(network, dataset, root), images=images)


def show_plan(plan: Plan, as_json: bool) -> None:
    """A plan as a table, with what its maker expects of each layer where it says so."""
    if as_json:
        out.print_json(plan.to_json())
        return
    kind, heading = next(
        (
            (kind, heading)
            for kind, heading in (("latency_us", "time, µs"), ("macs", "MACs"), ("params", "weights"))
            if any(kind in layer.estimate for layer in plan.layers.values())
        ),
        ("", ""),
    )
    cells = []
    for name, layer in plan.layers.items():
        row: list[object] = [name, layer.method, report.ranks_text(layer.ranks)]
        if kind:
            known = layer.estimate
            row += [report.short(known[key]) if key in known else "" for key in (f"dense_{kind}", kind)]
            lost = known.get("error", 0.0)
            shown = f"{lost:.3g}" if plan.options.get("sensitivity") == "accuracy" else f"{100 * lost:.1f} %"
            row.append(shown if layer.method != "dense" else "")
        cells.append([*row, layer.reason])
    title = f"{plan.method} plan: {len(plan.compressed)} of {len(plan.layers)} convolutions factored"
    columns = ["layer", "becomes", "ranks", *([heading, "planned", "error"] if kind else []), "because"]
    out.print(report.table(columns, cells, title=title, left=len(columns)))
    for line in facts(plan):
        out.print(line)


def facts(plan: Plan) -> list[str]:
    """What the plan says of the whole network, in lines."""
    told = []
    predicted, measured = plan.options.get("predicted"), plan.options.get("measured")
    if isinstance(predicted, dict):
        parts = [f"{kind} {share:.3f} of dense" for kind, share in predicted.items()]
        told.append(f"Predicted: {', '.join(parts)}.")
    if isinstance(measured, dict) and {"dense_us", "us", "latency"} <= measured.keys():
        times = f"{measured['us'] / 1000:.2f} ms against {measured['dense_us'] / 1000:.2f} ms dense"
        where = f"on {plan.options.get('device')}, input {report.by(plan.options.get('input', []))}"
        told.append(f"Measured as a whole: {measured['latency']:.3f} of dense ({times}) {where}.")
    accuracy = plan.options.get("accuracy")
    if isinstance(accuracy, dict) and {"dense", "compressed", "images"} <= accuracy.keys():
        told.append(
            f"Accuracy before fine-tuning: {accuracy['compressed']:.2f} % against {accuracy['dense']:.2f} % dense, "
            f"on {accuracy['images']} images."
        )
    return told


def _budget(texts: list[str]) -> dict[str, float]:
    shares: dict[str, float] = {}
    for text in texts:
        kind, _, share = text.partition("=")
        if kind in shares:
            raise ValueError(f"--budget must name each kind once, got {kind} twice")
        try:
            shares[kind] = float(share)
        except ValueError as error:
            raise ValueError(f"--budget must be {KINDS}, got {text!r}") from error
    return shares
