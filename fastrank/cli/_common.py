"""What the commands share: the application, the options that several of them take, models by name or file."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import nn

from fastrank import data, models
from fastrank import io as _io

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
Rank = Annotated[int, typer.Option("-r", "--rank", help="CP rank of every 3×3 convolution; 0 is dense.")]
Rates = Annotated[
    str | None,
    typer.Option("-cpr", "--compress-rate", "--compress_rate", help="Pruning rates as in NORTON: '[0.]+[0.1]*2'."),
]
Classes = Annotated[int | None, typer.Option(help="Logits; the architecture's own by default.")]
Root = Annotated[str | None, typer.Option("--root", "--data_dir", help="Where the data set lies on disk.")]
Mean = Annotated[str | None, typer.Option(help="Mean of the pixels, a share of white a channel.", metavar="R,G,B")]
Std = Annotated[str | None, typer.Option(help="Their standard deviation.", metavar="R,G,B")]

GREY = ("digits", "mnist")
COCO_TASKS = {"maskrcnn": "instances", "keypointrcnn": "keypoints"}
# Detectors of so many classes answer with COCO's own category ids, which have gaps up to 90.
COCO_IDS = 91


def network_of(name: str, **options: Any) -> nn.Module:
    """A saved model, or a fresh one by name."""
    if name.endswith(".safetensors"):
        if any(value for value in options.values()):
            raise ValueError("rank, compress_rate and num_classes must be left out for a saved model, got some")
        return _io.load(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # untrained weights, but the same ones at every call
        return models.build(name, **options)


def size_of(text: str | None, network: nn.Module) -> tuple[int, int, int]:
    """The size that --input names, or the one that the file bears, or that the architecture was published with."""
    known = getattr(network, "fastrank_input_size", None)
    if text is None and known is not None:
        channels, height, width = known
        return channels, height, width
    if text is None:
        origin = getattr(network, "fastrank_origin", None) or models.identify(network)
        if origin is None:
            raise ValueError("--input must be given for a network that has no name here, got none")
        return models.default_input_size(str(origin["name"]))
    parts = text.replace("x", ",").replace("×", ",").split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"--input must be three whole numbers C,H,W, got {text!r}")
    channels, height, width = (int(part) for part in parts)
    return channels, height, width


def blank(network: nn.Module, size: tuple[int, int, int]) -> torch.Tensor:
    """One image of zeros, where and as the network's parameters are."""
    like = next((p for p in network.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.zeros(1, *size, device=like.device, dtype=like.dtype)


def numbers_of(option: str, text: str | None) -> tuple[float, ...] | None:
    """"0.5,0.5,0.5" as numbers."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{option} must be numbers joined by commas, got {text!r}") from error


def images_of(
    dataset: str, network: nn.Module, root: str | None, size: int | None, mean: str | None, std: str | None
) -> tuple[Any, dict[str, Any]]:
    """The test split of a data set, and the options that it was loaded with.

    Sets of grey images come in as many channels as the network was published for, COCO with what the detector answers.
    """
    options: dict[str, Any] = {"size": size, "mean": numbers_of("--mean", mean), "std": numbers_of("--std", std)}
    origin = getattr(network, "fastrank_origin", None) or {}
    if dataset in GREY and origin:
        options["channels"] = models.default_input_size(str(origin["name"]))[0]
    if dataset == "coco":
        options["task"] = COCO_TASKS.get(str(origin.get("name")), "detection")
        options["contiguous"] = origin.get("num_classes") != COCO_IDS
    options = {key: value for key, value in options.items() if value is not None}
    return data.load(dataset, root=root, split="test", **options), options


def print_json(document: Any) -> None:
    """One JSON document on standard output."""
    print(json.dumps(document, indent=2))
