"""`channels`: a network of the zoo with the channels that its compression rates leave, chosen by similarity."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastrank import _checks, models
from fastrank.models.identify import identify
from fastrank.models.resnet_cifar import PadShortcut
from fastrank.prune._layouts import Conv, Layout, Shortcut, layout
from fastrank.prune._narrow import can_narrow, keep_inputs, keep_outputs
from fastrank.prune.selection import select
from fastrank.prune.similarity import CRITERIA, distances

# Group -> its surviving channels, in their new order.
Kept = dict[str, list[int]]


def channels(model: nn.Module, compress_rate: Sequence[float] | str, *, criterion: str = "pabs") -> nn.Module:
    """A copy of `model`, a network of the zoo, with the widths of ``models.build(..., compress_rate=compress_rate)``.

    Each group of channels keeps the filters that `select` leaves by the `distances` of the convolutions that write it.
    Where several do (a residual stage), their matrices are added, each divided by its mean. Groups are decided in the
    order in which they are first written; input channels that are already gone do not count in a distance. Every
    kept filter, bias, normalisation (with its statistics) and classifier column is that of `model`.

    The result computes what `model` would if no layer and no shortcut read the removed channels: where a shortcut
    without weights adds one group to another, the second is chosen and ordered so that each of its channels still
    receives its own. If it is the narrower one, its channels are chosen among those that the first one keeps; or, if
    the first is itself fed by a shortcut and its order therefore fixed, they are those that the crop lets through.
    ResNet-20 gains a projection where its stem and first stage come to differ in width; it starts as the selection of
    the right channels, exact in eval mode.

    model: from `models.build` without rates, its convolutions plain or `FusedCPConv`; it is not changed. criterion: for
    the `FusedCPConv`, see `fastrank.prune.similarity`; plain convolutions are compared by "l2".
    The result bears the `fastrank_origin` of its architecture. Raises ValueError or TypeError, naming the argument.
    """
    _checks.choice("criterion", criterion, CRITERIA)
    origin = _unpruned_origin(model)
    parts = layout(model)
    if parts is None:
        raise _checks.fail("model", "a network of the zoo whose widths can change", origin["name"])
    with torch.device("meta"):
        twin = models.build(**{**origin, "compress_rate": compress_rate})
    for conv in parts.convs:
        if not can_narrow(model.get_submodule(conv.name)):
            found = type(model.get_submodule(conv.name)).__name__
            raise TypeError(f"model.{conv.name} must be an nn.Conv2d or a FusedCPConv, got {found}")
    kept = _decide(model, twin, parts, criterion)
    result = copy.deepcopy(model)
    _apply(result, twin, parts, kept)
    result.fastrank_origin = twin.fastrank_origin
    return result


def _unpruned_origin(model: Any) -> dict[str, Any]:
    if not isinstance(model, nn.Module):
        raise _checks.fail_type("model", "a torch.nn.Module", model)
    origin = getattr(model, "fastrank_origin", None)
    if not isinstance(origin, dict):
        raise _checks.fail("model", "a network that models.build made (it bears fastrank_origin)", type(model).__name__)
    if any(origin["compress_rate"] or ()):
        raise _checks.fail("model", "a network of full width", f"{origin['name']}, which has been pruned already")
    if identify(model) is None:
        raise _checks.fail("model", f"the {origin['name']} that its fastrank_origin names", "one of other modules")
    return origin


def _decide(model: nn.Module, twin: nn.Module, parts: Layout, criterion: str) -> Kept:
    """The survivors of every group; `twin` has the new widths."""
    kept: Kept = {}
    for group in dict.fromkeys(conv.writes for conv in parts.convs):
        writers = [conv for conv in parts.convs if conv.writes == group]
        width = _width(twin, writers[0])
        shortcut = next((each for each in parts.shortcuts if each.target == group), None)
        if width == _width(model, writers[0]):
            matrix = torch.zeros(width, width)
        else:
            matrix = _together([_distances(model, conv, kept, parts, criterion) for conv in writers])
        if shortcut is None or _is_projection(twin.get_submodule(shortcut.name)):
            kept[group] = select(matrix, width).tolist()
        else:
            _align(model, twin, parts, shortcut, matrix, width, kept)
    return kept


def _align(
    model: nn.Module, twin: nn.Module, parts: Layout, shortcut: Shortcut, matrix: Tensor, width: int, kept: Kept
) -> None:
    """Decide the target of a shortcut so that position for position it receives what it received in `model`.

    `model` adds channel c of the source to channel c + offset; `twin` pads the source with `before` channels in front,
    or, where that is negative, crops as many.
    """
    offset = _padding(model.get_submodule(shortcut.name))
    before = _padding(twin.get_submodule(shortcut.name))
    fed = [channel + offset for channel in kept[shortcut.source]]
    if width >= len(fed):
        rest = [channel for channel in select(matrix, width, protect=fed).tolist() if channel not in set(fed)]
        kept[shortcut.target] = rest[:before] + fed + rest[before:]
        return
    if any(each.target == shortcut.source for each in parts.shortcuts):
        kept[shortcut.target] = fed[-before : width - before]
        return
    chosen = [fed[index] for index in select(matrix[fed][:, fed], width).tolist()]
    dropped = [channel for channel in fed if channel not in set(chosen)]
    kept[shortcut.target] = chosen
    order = dropped[:-before] + chosen + dropped[-before:]
    kept[shortcut.source] = [channel - offset for channel in order]


def _apply(result: nn.Module, twin: nn.Module, parts: Layout, kept: Kept) -> None:
    widths = {conv.writes: _width(result, conv) for conv in parts.convs}
    for conv in parts.convs:
        layer = result.get_submodule(conv.name)
        if conv.reads:
            keep_inputs(layer, _columns(conv.reads, kept, widths))
        keep_outputs(layer, torch.tensor(kept[conv.writes]))
    for name, reads in parts.readers.items():
        keep_inputs(result.get_submodule(name), _columns(reads, kept, widths))
    for shortcut in parts.shortcuts:
        path, _, attribute = shortcut.name.rpartition(".")
        block = result.get_submodule(path)
        new: nn.Module = twin.get_submodule(shortcut.name)
        if _is_projection(new):
            new = _selection(new, kept[shortcut.source], kept[shortcut.target], like=next(block.parameters()))
        setattr(block, attribute, new.train(block.training))


def _selection(projection: nn.Module, source: list[int], target: list[int], *, like: Tensor) -> nn.Module:
    """A 1×1 convolution and normalisation (still on the meta device) that pass the channels on that target keeps."""
    projection = projection.to(dtype=like.dtype).to_empty(device=like.device)
    layers: list[Any] = list(projection.children())
    conv, norm = layers
    same = torch.tensor(target)[:, None] == torch.tensor(source)[None, :]
    norm.reset_running_stats()
    with torch.no_grad():
        conv.weight.copy_(same[:, :, None, None])
        norm.weight.fill_(math.sqrt(1 + norm.eps))
        norm.bias.zero_()
    return projection


def _distances(model: nn.Module, conv: Conv, kept: Mapping[str, list[int]], parts: Layout, criterion: str) -> Tensor:
    inputs = None
    if conv.reads and all(group in kept for group in conv.reads):
        inputs = _columns(conv.reads, kept, {each.writes: _width(model, each) for each in parts.convs})
    return distances(model.get_submodule(conv.name), criterion, inputs=inputs).cpu()


def _together(matrices: list[Tensor]) -> Tensor:
    """The sum of the matrices, each divided by its mean so that scales do not matter; a single one as it is."""
    if len(matrices) == 1:
        return matrices[0]
    return torch.stack([matrix / matrix.mean() if bool(matrix.any()) else matrix for matrix in matrices]).sum(0)


def _columns(reads: Sequence[str], kept: Mapping[str, list[int]], widths: Mapping[str, int]) -> Tensor:
    """The survivors of the concatenated groups, counted through the concatenation."""
    found, start = [], 0
    for group in reads:
        found += [start + channel for channel in kept[group]]
        start += widths[group]
    return torch.tensor(found)


def _width(model: nn.Module, conv: Conv) -> int:
    width: Any = model.get_submodule(conv.name).out_channels
    return int(width)


def _padding(shortcut: nn.Module) -> int:
    return shortcut.before if isinstance(shortcut, PadShortcut) else 0


def _is_projection(shortcut: nn.Module) -> bool:
    return isinstance(shortcut, nn.Sequential)
