"""Saved models that carry their architecture: safetensors with the origin, the factored layers and the plan in the header.

Nothing is ever unpickled, and nothing of a size that the file's own tensors do not confirm is allocated.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from torch import Tensor, nn

from fastrank import _checks, _files, models
from fastrank.models.identify import identify
from fastrank.nn import FusedCPConv, FusedTucker2Conv, SVDConv
from fastrank.nn._conv import FactoredConv2d
from fastrank.plan import Plan

FORMAT = "fastrank-model"
VERSION = 1
KEY = "fastrank"
LAYERS: dict[str, type[FactoredConv2d]] = {
    "FusedTucker2Conv": FusedTucker2Conv,
    "FusedCPConv": FusedCPConv,
    "SVDConv": SVDConv,
}


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write `model` to one safetensors file, atomically.

    The header holds where the architecture comes from (a name for `models.build`; torchvision and timm networks built
    elsewhere are recognised), every factored layer, the plan and the training flag. A model of unknown origin is saved
    too; loading it then needs the dense model (see `load`).
    """
    if not isinstance(model, nn.Module):
        raise _checks.fail_type("model", "a torch.nn.Module", model)
    plan = getattr(model, "fastrank_plan", None)
    layers = {
        name: {"type": type(module).__name__, "config": module.config()}
        for name, module in model.named_modules()
        if isinstance(module, FactoredConv2d)
    }
    header = {
        "format": FORMAT,
        "version": VERSION,
        "origin": identify(model),
        "layers": layers,
        "plan": json.loads(plan.to_json()) if isinstance(plan, Plan) else None,
        "training": model.training,
    }
    _files.save_tensors(path, model.state_dict(), {KEY: json.dumps(header)})


def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """The model that `save` wrote, on the CPU, in the mode it was saved in.

    model: the dense network, for files of networks that fastrank cannot build by name; it is changed in place.
    Raises FileNotFoundError, or ValueError with one sentence for a broken, foreign or hostile file.
    """
    tensors, metadata = _files.load_tensors(path)
    header = _header(os.fspath(path), metadata)
    if model is None:
        # The shapes are compared on the meta device first: a header must not be able to ask for memory.
        with torch.device("meta"):
            _check_shapes(path, _assemble(path, _built(path, header["origin"]), header, tensors), tensors)
        with torch.random.fork_rng(devices=[]):
            model = _built(path, header["origin"])
    elif not isinstance(model, nn.Module):
        raise _checks.fail_type("model", "a torch.nn.Module or None", model)
    model = _assemble(path, model, header, tensors)
    _check_shapes(path, model, tensors)
    model.load_state_dict(tensors, assign=True)
    if header["plan"] is not None:
        model.fastrank_plan = Plan.from_json(json.dumps(header["plan"]), source=f"{os.fspath(path)}: plan")  # type: ignore[assignment]
    return model.train(header["training"])


def _header(path: str, metadata: dict[str, str]) -> dict[str, Any]:
    try:
        header = json.loads(metadata[KEY])
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
    for key, kinds in wanted.items():
        if not isinstance(header, dict) or not isinstance(header.get(key), kinds) or len(header) != len(wanted):
            raise _checks.fail("path", "a model saved by fastrank.save", f"{path}, whose header has a wrong {key!r}")
    if header["format"] != FORMAT or header["version"] != VERSION:
        found = f"{header['format']} version {header['version']}"
        raise _checks.fail("path", f"a file of {FORMAT} version {VERSION}", f"{path} of {found}")
    return header


def _built(path: str | os.PathLike[str], origin: dict[str, Any] | None) -> nn.Module:
    if origin is None:
        raise _checks.fail("model", f"the dense network, since {os.fspath(path)} is of one that has no name here", "None")
    if set(origin) != {"name", "num_classes", "rank", "compress_rate"}:
        raise _checks.fail("path", "a model saved by fastrank.save", f"{os.fspath(path)}, whose origin has keys {sorted(origin)}")
    return models.build(**origin)


def _assemble(path: str | os.PathLike[str], model: nn.Module, header: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    """`model` with the header's factored layers in their places, on the meta device and without values."""
    for name, entry in header["layers"].items():
        try:
            kind, config = LAYERS[entry["type"]], dict(entry["config"])
            bias = tensors.get(f"{name}.bias" if name else "bias")
            dtype = next(t.dtype for key, t in tensors.items() if key.startswith(f"{name}." if name else "")) if bias is None else bias.dtype
            layer = kind(**config, device="meta", dtype=dtype)
            parent_name, _, attribute = name.rpartition(".")
            parent = model.get_submodule(parent_name)
            replaced = model.get_submodule(name)
        except (KeyError, TypeError, ValueError, AttributeError, StopIteration) as error:
            message = f"{os.fspath(path)}, whose layer {name!r} cannot be built: {error or type(error).__name__}"
            raise _checks.fail("path", "a model saved by fastrank.save", message) from error
        if not isinstance(replaced, nn.Conv2d | FactoredConv2d):
            message = f"{os.fspath(path)}, whose layer {name!r} stands for a {type(replaced).__name__}"
            raise _checks.fail("path", "a model whose factored layers stand for convolutions", message)
        if name:
            setattr(parent, attribute, layer.train(replaced.training))
        else:
            model = layer.train(replaced.training)
    return model


def _check_shapes(path: str | os.PathLike[str], model: nn.Module, tensors: dict[str, Tensor]) -> None:
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in [*own, *tensors]:
        have = tuple(tensors[name].shape) if name in tensors else None
        if own.get(name) != have:
            found = f"{os.fspath(path)}, whose tensor {name!r} is of shape {have} where the network has {own.get(name)}"
            raise _checks.fail("path", "a file whose tensors fit its architecture", found)



