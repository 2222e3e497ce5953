"""report: what a run left behind, and what of an image several networks see."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import fastrank
from fastrank import complexity as _complexity
from fastrank import demo as _demo
from fastrank import report
from fastrank.cli._common import Json, Mean, Root, Std, app, images_of, network_of, numbers_of, out, print_json, size_of

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@app.command("report", epilog="Example: fastrank report runs/demo")
def report_(
    paths: Annotated[list[str], typer.Argument(help="The folder of a run; with --cam, the models to compare.")],
    cam: Annotated[bool, typer.Option("--cam", help="Class activation maps under several models.")] = False,
    image: Annotated[list[Path] | None, typer.Option(help="An image file for --cam; repeatable.")] = None,
    dataset: Annotated[str | None, typer.Option("--data", help="A data set to take the inputs of --cam from.")] = None,
    index: Annotated[list[int] | None, typer.Option(help="Which of its test images; repeatable.")] = None,
    root: Root = None,
    size: Annotated[int | None, typer.Option(help="Pixels a side; the first model's own by default.")] = None,
    mean: Mean = None,
    std: Std = None,
    layer: Annotated[str | None, typer.Option(help="The layer to look at; the last convolution by default.")] = None,
    save_to: Annotated[Path | None, typer.Option("--out", help="The picture; of a run, the folder to use.")] = None,
    as_json: Json = False,
) -> None:
    """Show the summary of a run and write it as a page; with --cam, the activation maps of several models."""
    if not cam:
        given = {"--image": image, "--data": dataset, "--index": index, "--layer": layer}
        wrong = [name for name, value in given.items() if value]
        if wrong or len(paths) != 1:
            found = f"{wrong[0]} without --cam" if wrong else f"{len(paths)}"
            raise ValueError(f"a report must be of one run folder, or of models with --cam, got {found}")
        _run(paths[0], save_to, as_json)
        return
    if bool(image) == (dataset is not None):
        raise ValueError(f"--image or --data must be given, and not both, got {'both' if image else 'neither'}")
    if index and dataset is None:
        raise ValueError("--index must be of a data set, got one without --data")
    networks = {name: network_of(name) for name in paths}
    first = networks[paths[0]]
    if dataset is not None:
        inputs = _of_data(images_of(dataset, first, root, size, mean, std)[0], dataset, index or [0])
    else:
        shape = size_of(None, first)
        shape = shape if size is None else (shape[0], size, size)
        chosen = [numbers_of("--mean", mean), numbers_of("--std", std)]
        inputs = [_of_file(path, shape, chosen) for path in image or []]
    save_to = Path("cam.png") if save_to is None else save_to
    _maps(networks, inputs, layer, save_to, as_json)


def _maps(
    networks: dict[str, Any], inputs: list[tuple[str, Tensor, Tensor]], layer: str | None, save_to: Path, as_json: bool
) -> None:
    """inputs: caption, picture in [0, 1], and the image as the networks get it."""
    shape = tuple(inputs[0][2].shape)
    macs = {name: _complexity.count(network, shape).macs for name, network in networks.items()}
    base = next(iter(macs.values()))
    # Every network explains the class that the first one sees, so that the maps of a row answer one question.
    asked = [report.activation_map(next(iter(networks.values())), x, layer=layer).predicted for _, _, x in inputs]
    found = {
        name: [report.activation_map(net, x, layer=layer, target=t) for (_, _, x), t in zip(inputs, asked, strict=True)]
        for name, net in networks.items()
    }
    shares = {name: 100 * (1 - count / base) for name, count in macs.items()}
    headings = [(f"CR = {shares[name]:.0f} %", found[name]) for name in networks]
    pictures = [(caption, picture) for caption, picture, _ in inputs]
    title = "Class activation maps; CR: multiply-adds saved"
    report.plot_activations(save_to, pictures, headings, title=title)
    rows: list[dict[str, Any]] = [
        {
            "model": name,
            "macs": macs[name],
            "compression_percent": shares[name],
            "layer": found[name][0].layer,
            "predicted": [seen.predicted for seen in found[name]],
            "probability": [seen.probability for seen in found[name]],
        }
        for name in networks
    ]
    if as_json:
        print_json({"out": str(save_to), "explained": asked, "models": rows})
        return
    cells = []
    for row in rows:
        seen = ", ".join(f"{k} ({100 * p:.0f} %)" for k, p in zip(row["predicted"], row["probability"], strict=True))
        cost = report.thousands(row["macs"]), f"{row['compression_percent']:.1f} %"
        cells.append([row["model"], row["layer"], *cost, seen])
    out.print(report.table(["model", "layer", "MACs", "CR", "predicted"], cells, left=2))
    out.print(f"Written to {save_to}; every map explains class {', '.join(map(str, asked))}.")


def _of_data(found: Any, name: str, indices: list[int]) -> list[tuple[str, Tensor, Tensor]]:
    """Test images by number, with their labels as captions."""
    inputs = []
    for number in indices:
        if not 0 <= number < len(found):
            raise ValueError(f"--index must be between 0 and {len(found) - 1} for {name}, got {number}")
        image, label = found[number]
        white = 1.0
        if isinstance(found, fastrank.data.ImageSet):
            mean, std = found.mean, found.std
            white = 255.0 if found.pixels.dtype == torch.uint8 else 1.0
        else:
            mean, std = (torch.tensor(values) for values in IMAGENET)
        picture = (image * std[:, None, None] + mean[:, None, None]) / white
        inputs.append((f"class {label}", picture, image))
    return inputs


def _of_file(
    path: Path, shape: tuple[int, ...], chosen: list[tuple[float, ...] | None]
) -> tuple[str, Tensor, Tensor]:
    """An image file, its middle square at the network's size; normalised as ImageNet's unless `chosen` says else."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ImportError("--image needs Pillow, which is absent: pip install 'fastrank[cam]'") from error
    channels, height, width = shape
    try:
        with Image.open(path) as opened:
            grey = opened.convert("RGB" if channels == 3 else "L")
    except UnidentifiedImageError as error:
        raise ValueError(f"--image must be an image, got {str(path)!r}, which is none that Pillow knows") from error
    side = min(grey.size)
    left, top = (grey.size[0] - side) // 2, (grey.size[1] - side) // 2
    square = grey.crop((left, top, left + side, top + side)).resize((width, height), Image.Resampling.BILINEAR)
    picture = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(height, width, channels)
    picture = picture.permute(2, 0, 1).float() / 255
    numbers = []
    for option, values, default in zip(("--mean", "--std"), chosen, IMAGENET, strict=True):
        values = values or (default if channels == 3 else (0.5,) * channels)
        if len(values) != channels:
            raise ValueError(f"{option} must be {channels} numbers, one a channel, got {len(values)}")
        numbers.append(torch.tensor(values)[:, None, None])
    return path.name, picture, (picture - numbers[0]) / numbers[1]


def _run(folder: str, save_to: Path | None, as_json: bool) -> None:
    found = report.read_run(folder)
    place = Path(folder) if save_to is None else save_to
    place.mkdir(parents=True, exist_ok=True)
    plots = []
    if any(found.history.values()):
        report.plot_history(place / "history.png", found.history, title=f"Training, {Path(folder).name}")
        plots.append("history.png")
    if found.gates:
        report.plot_gates(place / "gates.png", found.gates, title=f"Gates, {Path(folder).name}")
        plots.append("gates.png")
    page = report.write_html(folder, place / report.PAGE)
    if as_json:
        epochs = {name: len(rows) for name, rows in found.history.items()}
        print_json({"run": folder, "summary": found.summary, "epochs": epochs, "plots": plots, "page": str(page)})
        return
    if "dense_latency" in found.summary:
        for block in _demo.tables(found.summary):
            out.print(block)
    elif found.stages:
        out.print(report.stage_table(found.stages, title=folder))
    else:
        out.print(f"{folder}: no summary yet, {sum(map(len, found.history.values()))} epochs of training so far")
    out.print(f"Written to {place}: {', '.join([*plots, page.name])}")
