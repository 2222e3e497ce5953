"""export: a model, compressed or not, as a file for another runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from fastrank import export as _export
from fastrank.cli._common import Input, Json, Model, app, blank, network_of, out, print_json, size_of

FORMATS: dict[str, tuple[Any, str]] = {
    "onnx": (_export.onnx, "ONNX"),
    "pt2": (_export.program, "torch.export program"),
    "aoti": (_export.package, "AOTInductor package"),
}


@app.command(epilog="Example: fastrank export small.safetensors --to onnx --out small.onnx")
def export(
    model: Model,
    to: Annotated[str, typer.Option("--to", help="onnx, pt2 (torch.export) or aoti (AOTInductor).")],
    save_to: Annotated[Path, typer.Option("--out", help="The file: .onnx, or .pt2 for the other two.")],
    input_size: Input = None,
    batch: Annotated[int, typer.Option(help="Images in the example batch.", min=1)] = 1,
    static: Annotated[bool, typer.Option("--static", help="Fix the batch at --batch instead of leaving it open.")] = (
        False
    ),
    opset: Annotated[
        int | None,
        typer.Option(help=f"ONNX operator set, {_export.OPSETS[0]} (default) to {_export.OPSETS[-1]}."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a model for another runtime, factored layers as plain convolutions, and compare its outputs."""
    if to not in FORMATS:
        raise ValueError(f"--to must be one of {list(FORMATS)}, got {to!r}")
    if opset is not None and to != "onnx":
        raise ValueError(f"--opset must be left out for --to {to}, got {opset}")
    write, name = FORMATS[to]
    network = network_of(model)
    size = size_of(input_size, network)
    # Drawn at random: on an image of zeros a wrong weight would not show.
    example = torch.empty_like(blank(network, size).expand(batch, *size).contiguous())
    example.normal_(generator=torch.Generator(example.device).manual_seed(0))
    write(network, save_to, example, dynamic_batch=not static, **({} if opset is None else {"opset": opset}))
    written = save_to.stat().st_size
    if as_json:
        document = {"model": model, "to": to, "out": str(save_to), "input": list(size), "bytes": written}
        print_json({**document, "batch": batch if static else None, "opset": opset})
        return
    images = f"batches of {batch}" if static else "batches of any size"
    out.print(f"{save_to}: {name} of {model}, {images} of {'×'.join(map(str, size))}, {written:,} bytes, same outputs")
