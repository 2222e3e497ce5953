"""evaluate and complexity: how good a network is and what it costs, in the words of the NORTON README."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from fastrank import complexity as _complexity
from fastrank import data, models, report
from fastrank import io as _io
from fastrank import train as _train
from fastrank.cli._common import (
    Classes,
    Input,
    Json,
    Mean,
    Rank,
    Rates,
    Root,
    Std,
    app,
    images_of,
    network_of,
    out,
    print_json,
    size_of,
)

# Images of which size a data set brings.
DATASETS = {"cifar10": (3, 32, 32), "imagenet": (3, 224, 224), "coco": (3, 800, 800)}
# What the CIFAR-10 networks of NORTON's repository were trained with, where ours divide by the true deviations.
NORTON = ("vgg_16_bn", "resnet_56", "resnet_110", "densenet_40")
NORTON_MEAN, NORTON_STD = "0.4914,0.4822,0.4465", "0.2023,0.1994,0.2010"


@app.command(epilog="Example: fastrank evaluate runs/demo/model.safetensors --data digits --size 16")
def evaluate(
    model: Annotated[str | None, typer.Argument(help="A saved file, or the name of an architecture as --arch.")] = None,
    arch: Annotated[str | None, typer.Option("--arch", help="An architecture's name, for --ckpt.")] = None,
    ckpt: Annotated[
        str | None, typer.Option(help="Its weights: safetensors, .pt, .pth, .tar; those of NORTON and torchvision too.")
    ] = None,
    rank: Rank = 0,
    compress_rate: Rates = None,
    num_classes: Classes = None,
    dataset: Annotated[
        str | None, typer.Option("--data", "--dataset", help="digits, mnist, cifar10, cifar100, imagenet, ...")
    ] = None,
    root: Root = None,
    size: Annotated[int | None, typer.Option(help="Pixels a side; the data's own by default.")] = None,
    mean: Mean = None,
    std: Std = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "--batch_size", help="Images at a time; 256, or 4 for detectors.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    save_to: Annotated[
        Path | None, typer.Option("--out", help="Save the network, with its architecture, as .safetensors.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Print the accuracy of a model, or the average precision of a detector, on a data set's test split."""
    if (model is None) == (arch is None):
        raise ValueError(f"MODEL or --arch must be given, and not both, got {'neither' if model is None else 'both'}")
    if save_to is not None and save_to.suffix != ".safetensors":
        raise ValueError(f"--out must end in .safetensors, got {str(save_to)!r}")
    name = str(arch or model)
    if ckpt is not None and name.endswith(".safetensors"):
        raise ValueError(f"--ckpt must be left out for a saved model, got {ckpt!r}")
    network = network_of(name, rank=rank, compress_rate=compress_rate, num_classes=num_classes)
    if ckpt is not None:
        models.load_weights(network, ckpt, name="--ckpt")
    dataset = dataset or _data_of(name, network)
    as_norton = ckpt is not None and not ckpt.endswith(".safetensors") and name in NORTON and dataset == "cifar10"
    as_norton = as_norton and mean is None and std is None
    if as_norton:
        mean, std = NORTON_MEAN, NORTON_STD
    found, options = images_of(dataset, network, root, size, mean, std)
    result, line = _measured(network, found, batch_size, device)
    if save_to is not None:
        _io.save(network, save_to, input_size=getattr(found, "shape", None))
    if as_json:
        document = {"model": name, "ckpt": ckpt, "rank": rank, "compress_rate": compress_rate, "data": dataset}
        print_json({**document, "options": options, **result})
        return
    out.print(line)
    if as_norton:
        out.print(f"Pixels were normalised as for NORTON's checkpoints, std {NORTON_STD}; --mean and --std set others.")


@app.command(epilog="Example: fastrank complexity --arch vgg_16_bn -r 1 -cpr '[0.6]*6+[0.8]*7'")
def complexity(
    arch: Annotated[str, typer.Option("--arch", help="An architecture's name or a saved file.")],
    rank: Rank = 0,
    compress_rate: Rates = None,
    num_classes: Classes = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", help="cifar10, imagenet or coco; has to fit the architecture.")
    ] = None,
    input_size: Input = None,
    as_json: Json = False,
) -> None:
    """Count multiply-adds and parameters by both conventions, and the reductions against the dense network."""
    network = network_of(arch, rank=rank, compress_rate=compress_rate, num_classes=num_classes)
    if dataset is not None:
        _check_dataset(dataset, arch, network)
    size = size_of(input_size, network)
    counts = {c: _complexity.count(network, size, convention=c) for c in _complexity.CONVENTIONS}
    document: dict[str, Any] = {"arch": arch, "rank": rank, "compress_rate": compress_rate, "input": list(size)}
    params, bare = counts["conv_fc"].params, counts["conv_fc"].params_without_block_biases
    document |= {"params": params, "params_without_block_biases": bare, "macs": {c: n.macs for c, n in counts.items()}}
    document["layers"] = counts["conv_fc"].table()
    # The README takes the MACs of ptflops, and the parameters without the biases of CP blocks, which ptflops misses.
    norton: dict[str, float] = {"computational_complexity": counts["ptflops"].macs, "number_of_parameters": bare}
    whole = _dense_twin(network)
    if whole is not None:
        full = {c: _complexity.count(whole, size, convention=c) for c in counts}
        reductions = {c: counts[c].reduction_from(full[c]) for c in counts}
        document["reduction_percent"] = {c: {"macs": macs, "params": fewer} for c, (macs, fewer) in reductions.items()}
        norton["FLOPs_reduced"] = reductions["ptflops"][0]
        norton["param_reduced"] = 100 * (1 - bare / full["ptflops"].params)
    document["norton"] = norton
    if as_json:
        print_json(document)
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
    out.print("In the words of the NORTON README:")
    out.print(f"Computational complexity: {norton['computational_complexity']}")
    out.print(f"Number of parameters: {norton['number_of_parameters']}")
    for key in ("FLOPs_reduced", "param_reduced"):
        if key in norton:
            out.print(f"{key} = {norton[key]:.2f}")


def _measured(
    network: nn.Module, found: Any, batch_size: int | None, device: str | None
) -> tuple[dict[str, Any], str]:
    """The result as JSON and in words: the README's for classifiers, the columns of its tables for detectors."""
    if isinstance(found, data.CocoSet):
        detected = _train.evaluate_detection(network, found, 4 if batch_size is None else batch_size, device)
        columns = [f"{key.replace('_', ' ')} {value:.3f}" for key, value in detected.metrics().items()]
        return asdict(detected), f"* {'  '.join(columns)}  ({detected.count:,} images)"
    _complexity.count(network, found.shape)  # names the size where the network refuses these images
    result = _train.evaluate(network, found, 256 if batch_size is None else batch_size, device)
    accuracy = f"* Acc@1 {result.top1:.3f} Acc@5 {result.top5:.3f}"
    return asdict(result), f"{accuracy}  loss {result.loss:.4f}  ({result.count:,} images)"


def _dense_twin(network: nn.Module) -> nn.Module | None:
    """The dense, unpruned network of the same name; None where that has no name."""
    origin = models.identify(network)
    return None if origin is None else network_of(**{**origin, "rank": 0, "compress_rate": None})


def _data_of(name: str, network: nn.Module) -> str:
    """The data set that a network of this input size was published for."""
    size = size_of(None, network)
    found = next((data for data, shape in DATASETS.items() if shape == size), None)
    if found is None:
        raise ValueError(f"--data must be given for {name}, whose images are {report.by(size)}, got none")
    return found


def _check_dataset(dataset: str, arch: str, network: nn.Module) -> None:
    size = size_of(None, network)
    fitting = [name for name, shape in DATASETS.items() if shape == size]
    if dataset not in fitting:
        expected = " or ".join(fitting) or "left out"
        raise ValueError(f"--dataset must be {expected} for {arch}, got {dataset!r}")
