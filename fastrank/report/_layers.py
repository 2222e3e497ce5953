"""What became of each layer of a run: its form, ranks and reason from the plan, its cost before and after."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fastrank import complexity, io, models
from fastrank.nn._conv import FactoredConv2d
from fastrank.plan import Plan

Row = dict[str, Any]
COSTS = ("params", "macs", "latency_us")


def layer_rows(folder: Path, summary: Mapping[str, Any]) -> tuple[list[Row], str]:
    """A row a layer of plan.json, and in one line what of them is not known and why.

    A row has name, method, ranks, reason, and of "params", "macs" and "latency_us" what is known, each also as
    "dense_..."; the costs are those of the plan's estimates, else they are counted on model.safetensors.
    """
    path = folder / "plan.json"
    if not path.is_file():
        return [], "No plan.json in this folder: nothing was compressed, or the run has not come that far."
    try:
        plan = Plan.load(path)
    except (ValueError, TypeError) as error:
        return [], f"plan.json cannot be read: {error}."
    rows: list[Row] = [
        {"name": name, "method": layer.method, "ranks": layer.ranks, "reason": layer.reason, **layer.estimate}
        for name, layer in plan.layers.items()
    ]
    if all(key in row for row in rows for key in ("params", "macs", "dense_params", "dense_macs")):
        return rows, ""
    try:
        model = io.load(folder / "model.safetensors")
        counted = complexity.count(model, _input_size(summary))
    except (FileNotFoundError, ValueError, TypeError, KeyError, ImportError) as error:
        return rows, f"What layers cost before and after is not known: {error}."
    modules = dict(model.named_modules())
    for row in rows:
        found = counted.per_layer.get(row["name"])
        if found is not None and found.output_shape is not None:
            dense = _dense_weights(modules[row["name"]])
            places = found.output_shape[-1] * found.output_shape[-2]
            bias = 0 if getattr(modules[row["name"]], "bias", None) is None else found.output_shape[1]
            costs = {
                "params": found.params,
                "dense_params": dense + bias,
                "macs": found.macs,
                "dense_macs": dense * places,
            }
            row.update(costs)
    return rows, ""


def _dense_weights(module: nn.Module) -> int:
    """How many weights the convolution has, or had before it was factored, without its bias."""
    if isinstance(module, nn.Conv2d):
        return module.weight.numel()
    assert isinstance(module, FactoredConv2d)
    kh, kw = module.kernel_size
    return module.out_channels * module.in_channels * kh * kw


def _input_size(summary: Mapping[str, Any]) -> tuple[int, ...]:
    """(C, H, W): what the run recorded, or what its network was published with."""
    size = summary.get("input_size")
    if isinstance(size, list) and len(size) == 3:
        return tuple(size)
    section, data = summary.get("model"), summary.get("data")
    if not isinstance(section, dict) or not isinstance(section.get("name"), str):
        raise ValueError("the summary names neither a network nor the size of its images")
    channels, height, width = models.default_input_size(section["name"])
    if isinstance(data, dict) and isinstance(data.get("size"), int):
        height = width = data["size"]
    return channels, height, width
