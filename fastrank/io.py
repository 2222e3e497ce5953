"""Saved models that carry their architecture: safetensors with origin, factored layers and plan in the header.

Nothing is ever unpickled, and nothing of a size that the file's own tensors do not confirm is allocated.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from torch import Tensor, nn

from fastrank import _checks, _files, models
from fastrank.fuse import FusedModel
from fastrank.models._external import AUX_LOGITS
from fastrank.models.detection import OPTIONS
from fastrank.models.identify import identify
from fastrank.nn import (
    FusedCPConv,
    FusedTucker2Conv,
    GatedCPConv,
    GatedSVDConv,
    GatedTucker2Conv,
    LayerCPConv,
    SVDConv,
)
from fastrank.nn._conv import FactoredConv2d
from fastrank.plan import Plan

FORMAT = "fastrank-model"
VERSION = 1
KEY = "fastrank"
LAYERS: dict[str, type[FactoredConv2d]] = {
    "FusedTucker2Conv": FusedTucker2Conv,
    "FusedCPConv": FusedCPConv,
    "SVDConv": SVDConv,
    "LayerCPConv": LayerCPConv,
    "GatedTucker2Conv": GatedTucker2Conv,
    "GatedSVDConv": GatedSVDConv,
    "GatedCPConv": GatedCPConv,
}


def save(model: nn.Module, path: str | os.PathLike[str], *, input_size: tuple[int, int, int] | None = None) -> None:
    """Write `model` to one safetensors file, atomically.

    The header holds where the architecture comes from (a name for `models.build`; torchvision and timm networks built
    elsewhere are recognised), every factored layer, the plan and the training flag. A model of unknown origin is saved
    too; loading it then needs the dense model (see `load`). What `fuse_for_inference` returns is refused.

    input_size: (C, H, W) that the model is made for, by default its attribute `fastrank_input_size`, where it has one;
    `load` sets that attribute, and the command line takes it where no --input is given.
    """
    header = {KEY: json.dumps(describe(model, input_size))}
    _files.save_tensors(path, model.state_dict(), header)


def describe(model: nn.Module, input_size: tuple[int, int, int] | None = None) -> dict[str, Any]:
    """What a saved file says of `model`, as JSON-able values; see `save`, whose refusals are made here."""
    if not isinstance(model, nn.Module):
        raise _checks.fail_type("model", "a torch.nn.Module", model)
    if any(isinstance(module, FusedModel) for module in model.modules()):
        expected = "as it was before fuse_for_inference (save that network, and fuse it again when it is loaded)"
        raise _checks.fail("model", expected, "a fused one, which is a graph without an architecture to name")
    plan = getattr(model, "fastrank_plan", None)
    size = getattr(model, "fastrank_input_size", None) if input_size is None else input_size
    layers = {
        name: {"type": type(module).__name__, "config": module.config()}
        for name, module in model.named_modules()  # a shared layer once, under its first name
        if isinstance(module, FactoredConv2d)
    }
    header: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "origin": identify(model),
        "layers": layers,
        "plan": json.loads(plan.to_json()) if isinstance(plan, Plan) else None,
        "training": model.training,
    }
    if size is not None:
        header["input_size"] = list(_size("input_size", size))
    return header


def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """The model that `save` wrote, on the CPU, in the mode it was saved in.

    model: the dense network, for files of networks that fastrank cannot build by name; it is changed in place, or left
    alone where the file does not fit it.
    Raises FileNotFoundError, or ValueError with one sentence for a broken, foreign or hostile file.
    """
    tensors, metadata = _files.load_tensors(path)
    header = _header(os.fspath(path), metadata)
    plan = None
    if header["plan"] is not None:
        plan = Plan.from_json(json.dumps(header["plan"]), source=f"{os.fspath(path)}: plan")
    if model is None:
        # The shapes are compared on the meta device first: a header must not be able to ask for memory.
        with torch.device("meta"):
            _assemble(path, _built(path, header["origin"]), header, tensors)
        with torch.random.fork_rng(devices=[]):
            model = _built(path, header["origin"])
    elif not isinstance(model, nn.Module):
        raise _checks.fail_type("model", "a torch.nn.Module or None", model)
    model = _assemble(path, model, header, tensors)
    model.load_state_dict(tensors, assign=True)
    if plan is not None:
        model.fastrank_plan = plan  # type: ignore[assignment]
    if "input_size" in header:
        model.fastrank_input_size = tuple(header["input_size"])  # type: ignore[assignment]
    return model.train(header["training"])


def _header(path: str, metadata: dict[str, str]) -> dict[str, Any]:
    try:
        header: dict[str, Any] = json.loads(metadata[KEY])
    except (KeyError, ValueError, RecursionError) as error:
        raise _checks.fail("path", "a model saved by fastrank.save", f"{path}, whose header holds no model") from error
    wanted: dict[str, tuple[type, ...]] = {
        "format": (str,),
        "version": (int,),
        "origin": (dict, type(None)),
        "layers": (dict,),
        "plan": (dict, type(None)),
        "training": (bool,),
    }
    newer = isinstance(header, dict) and header.get("format") == FORMAT and _is_newer(header.get("version"))
    if not newer:
        for key, kinds in wanted.items():
            given = len(header) - ("input_size" in header) if isinstance(header, dict) else None
            if given != len(wanted) or key not in header or not isinstance(header[key], kinds):
                found = f"{path}, whose header has a wrong {key!r}"
                raise _checks.fail("path", "a model saved by fastrank.save", found)
    if newer or header["format"] != FORMAT or type(header["version"]) is not int or header["version"] != VERSION:
        found = f"{path} of {header['format']} version {header['version']}"
        found += ", which a newer fastrank wrote: update this one (pip install -U fastrank)" if newer else ""
        raise _checks.fail("path", f"a file of {FORMAT} version {VERSION}", found)
    if "input_size" in header:
        try:
            _size("input_size", header["input_size"])
        except (TypeError, ValueError) as error:
            found = f"{path}, whose header has a wrong 'input_size': {error}"
            raise _checks.fail("path", "a model saved by fastrank.save", found) from error
    return header


def _is_newer(version: Any) -> bool:
    return type(version) is int and version > VERSION


def _size(name: str, value: Any) -> tuple[int, int, int]:
    """Three sizes (C, H, W) of an image."""
    if not isinstance(value, tuple | list) or len(value) != 3:
        raise _checks.fail_type(name, "three ints (C, H, W)", value)
    channels, height, width = (_checks.integer(f"{name}[{i}]", size, 1) for i, size in enumerate(value))
    return channels, height, width


def _built(path: str | os.PathLike[str], origin: dict[str, Any] | None) -> nn.Module:
    if origin is None:
        raise _checks.fail(
            "model", f"the dense network, since {os.fspath(path)} is of one that has no name here", "None"
        )
    known = {"name", "num_classes", "rank", "compress_rate"}
    if not known <= set(origin) <= {*known, *OPTIONS, AUX_LOGITS}:
        raise _checks.fail(
            "path", "a model saved by fastrank.save", f"{os.fspath(path)}, whose origin has keys {sorted(origin)}"
        )
    try:
        return models.build(**origin)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        message = f"{os.fspath(path)}, whose network cannot be built: {str(error).partition(chr(10))[0]}"
        raise _checks.fail("path", "a model saved by fastrank.save", message) from error


def _assemble(
    path: str | os.PathLike[str], model: nn.Module, header: dict[str, Any], tensors: dict[str, Tensor]
) -> nn.Module:
    """`model` with the header's factored layers in their places, on the meta device and without values.

    Raises ValueError where the tensors do not fit the result; `model` is then as before.
    """
    before: list[tuple[nn.Module, str, nn.Module]] = []
    result = model
    try:
        for name, entry in header["layers"].items():
            layer, replaced = _layer(path, result, name, entry, tensors)
            if not name:
                result = layer
                continue
            # A shared layer stands at several places and was saved under the first.
            places = [(p, key) for p in result.modules() for key, child in p._modules.items() if child is replaced]
            for parent, attribute in places:
                before.append((parent, attribute, replaced))
                setattr(parent, attribute, layer)
        _check_fit(path, result, tensors)
    except BaseException:
        for parent, attribute, replaced in before:
            setattr(parent, attribute, replaced)
        raise
    return result


def _layer(
    path: str | os.PathLike[str], model: nn.Module, name: str, entry: Any, tensors: dict[str, Tensor]
) -> tuple[nn.Module, nn.Module]:
    """The factored layer that the header describes, and the module of `model` that it replaces."""
    prefix = f"{name}." if name else ""
    try:
        kind, config = LAYERS[entry["type"]], dict(entry["config"])
        dtype = next(tensor.dtype for key, tensor in tensors.items() if key.startswith(prefix))
        layer = kind(**config, device="meta", dtype=dtype)
        replaced = model.get_submodule(name)
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration, RuntimeError, OverflowError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        message = f"{os.fspath(path)}, whose layer {name!r} cannot be built: {reason}"
        raise _checks.fail("path", "a model saved by fastrank.save", message) from error
    if not isinstance(replaced, nn.Conv2d | FactoredConv2d):
        message = f"{os.fspath(path)}, whose layer {name!r} stands for a {type(replaced).__name__}"
        raise _checks.fail("path", "a model whose factored layers stand for convolutions", message)
    # Frozen parts of a network are a matter of its origin, not of the file.
    layer.requires_grad_(any(parameter.requires_grad for parameter in replaced.parameters()))
    return layer.train(replaced.training), replaced


def _check_fit(path: str | os.PathLike[str], model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Every tensor of `model` is in the file, of its shape and of its kind (floating-point or not), and no other."""
    own = {name: _kind(tensor) for name, tensor in model.state_dict().items()}
    given = {name: _kind(tensor) for name, tensor in tensors.items()}
    for name in [*own, *tensors]:
        if own.get(name) != given.get(name):
            found = (
                f"{os.fspath(path)}, whose tensor {name!r} is {given.get(name)} where the network has {own.get(name)}"
            )
            raise _checks.fail("path", "a file whose tensors fit its architecture", found)


def _kind(tensor: Tensor) -> str:
    return f"{'floating-point' if tensor.dtype.is_floating_point else tensor.dtype} of shape {tuple(tensor.shape)}"
