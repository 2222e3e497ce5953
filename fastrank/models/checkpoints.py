"""Weights from files of this and of other programs, read without running anything and put under the names used here."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fastrank import _checks
from fastrank.models.detection import DETECTORS, modern_name
from fastrank.nn import FusedCPConv

FORMATS = "safetensors file or torch file (.pt, .pth, .tar; nothing is downloaded)"
# Where the programs that write torch files put the tensors, beside epochs, optimizers and settings.
_WRAPPERS = ("state_dict", "model", "model_state_dict", "net")
# nn.DataParallel and DistributedDataParallel; torch.compile.
_PREFIXES = ("module.", "_orig_mod.")
# Settings that NORTON's files hold beside their tensors; they explain a misfit.
_NOTES = ("rank", "compress_rate")
# What a damaged or hostile torch file makes torch.load raise besides UnpicklingError; no list is documented.
_ERRORS = (
    *(pickle.UnpicklingError, EOFError, OSError, RuntimeError, ImportError, AttributeError, IndexError, KeyError),
    *(TypeError, ValueError, AssertionError, OverflowError, MemoryError, RecursionError),
)
# Auxiliary classifiers that torchvision's files hold and the networks built here do without.
_AUXILIARY = {"torchvision:googlenet": ("aux1.", "aux2."), "torchvision:inception_v3": ("AuxLogits.",)}
# torchvision's published DenseNets are of a time when module names could hold dots ("norm.1", now "norm1").
_DOTTED = re.compile(r"(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..*)")
# The modules of NORTON's VGG-16 are numbered along its configuration, in which the four pools have numbers too.
_VGG_NUMBERS = (0, 1, 3, 4, 6, 7, 8, 10, 11, 12, 14, 15, 16)


@dataclass(frozen=True)
class Place:
    """Where a file keeps one tensor: its name there, and its shape, of as many numbers as the network's."""

    name: str
    shape: tuple[int, ...]


def load_weights(model: nn.Module, path: Any, *, name: str = "pretrained") -> str:
    """Copy the weights in the file at `path` into `model`; every tensor has to fit.

    The file is safetensors, or a torch file of tensors and plain values (a state dict alone, or under "state_dict",
    "model", "model_state_dict" or "net"), which is read with ``weights_only=True``: nothing in it is run. A prefix
    "module." that all names share is dropped, counters of batch normalisation may be absent. Names and shapes are those
    of this library, of torchvision and timm for their networks, or those of NORTON's repository (see `norton_layout`).

    name: what errors call the argument. Returns "own" or "norton", the naming that the file was found to have.
    Raises ValueError for a damaged file and, naming the first misfit, for one of another network; `model` is then as
    before.
    """
    path = weights_file(path, name=name)
    tensors, notes = read_tensors(path, name=name)
    origin = getattr(model, "fastrank_origin", None) or {}
    known = str(origin.get("name", "the network"))
    tensors = _modern(tensors, known)
    own = model.state_dict()
    plain = {key: Place(key, tuple(value.shape)) for key, value in own.items()}
    layouts = {"own": plain, "norton": norton_layout(model)}
    hits = {kind: sum(place.name in tensors for place in layout.values()) for kind, layout in layouts.items()}
    kind = "norton" if hits["norton"] > hits["own"] else "own"
    misfit = _first_misfit(own, layouts[kind], tensors)
    if misfit is not None:
        said = "".join(f", written with {key} {value!r}" for key, value in notes.items())
        raise _checks.fail(name, f"weights of {known} as built here", f"{path!r} with {misfit}{said}")
    state = {
        key: tensors[place.name].reshape(own[key].shape)
        for key, place in layouts[kind].items()
        if place.name in tensors
    }
    model.load_state_dict(state, strict=False)
    return kind


def norton_layout(model: nn.Module) -> dict[str, Place]:
    """Where the checkpoints of the NORTON repository keep each tensor of `model`, by its name here.

    A CP block X of rank R with O filters is three convolutions there, whose channel r·O+o is term r of filter o:
    ``X.feature.pointwise.weight`` (R·O, I, 1, 1), ``X.feature.vertical.weight`` (R·O, 1, kh, 1) and
    ``X.feature.horizontal.weight`` (R·O, 1, 1, kw), beside ``X.bias`` (O,). Besides: vgg_16_bn counts its pools when it
    numbers ``features.convN`` and ``features.normN``; densenet_40 says ``bn1`` and ``conv1`` for ``bn`` and ``conv``
    inside its dense layers and transitions; the classifier of resnet_110 is ``linear``. All else agrees.
    """
    origin = getattr(model, "fastrank_origin", None) or {}
    layout = {key: Place(key, tuple(value.shape)) for key, value in model.state_dict().items()}
    for block, module in model.named_modules():
        if not isinstance(module, FusedCPConv):
            continue
        prefix = f"{block}." if block else ""
        filters, (kh, kw) = module.rank * module.out_channels, module.kernel_size
        for factor, shape in (
            ("pointwise", (filters, module.in_channels, 1, 1)),
            ("vertical", (filters, 1, kh, 1)),
            ("horizontal", (filters, 1, 1, kw)),
        ):
            layout[prefix + factor] = Place(f"{prefix}feature.{factor}.weight", shape)
    network = origin.get("name")
    return {key: Place(_norton_name(place.name, network), place.shape) for key, place in layout.items()}


def _norton_name(key: str, network: Any) -> str:
    if network == "vgg_16_bn":
        return re.sub(r"^(features\.(?:conv|norm))(\d+)", lambda m: f"{m[1]}{_VGG_NUMBERS[int(m[2])]}", key)
    if network == "densenet_40":
        return re.sub(r"^((?:dense\d\.\d+|trans\d)\.(?:bn|conv))\.", r"\g<1>1.", key)
    if network == "resnet_110":
        return re.sub(r"^fc\.", "linear.", key)
    return key


def read_tensors(path: str, *, name: str = "pretrained") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors in a file of weights, on the CPU, and the rank and rates that it says they were made with, if any.

    Raises ValueError, calling the argument `name`, for a damaged file and for one that holds more than tensors and
    plain values.
    """
    if path.endswith(".safetensors"):
        try:
            return dict(load_file(path)), {}
        except (SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise _checks.fail(name, "a readable safetensors file", f"{path!r} ({reason})") from error
    content = _unpickled(path, name)
    if not isinstance(content, Mapping):
        raise _checks.fail(name, "a file that holds a state dict", f"{path!r}, which holds a {type(content).__name__}")
    inner = content
    for key in _WRAPPERS:
        if isinstance(content.get(key), Mapping):
            inner = content[key]
            break
    tensors = {key: value for key, value in inner.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not tensors or len(tensors) < len(inner):
        odd = next((key for key in inner if key not in tensors), "nothing")
        where = f"a state dict, alone or under one of {list(_WRAPPERS)}"
        raise _checks.fail(name, f"a file that holds {where}", f"{path!r}, which holds {odd!r}")
    while prefix := next((p for p in _PREFIXES if all(key.startswith(p) for key in tensors)), None):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    notes = {key: content[key] for key in _NOTES if isinstance(content.get(key), int | str)}
    return {key: value.detach() for key, value in tensors.items()}, notes


def weights_file(path: Any, *, name: str = "pretrained") -> str:
    """`path` as a str, of a file that exists; TypeError or ValueError otherwise."""
    if isinstance(path, bool) or not isinstance(path, str | os.PathLike):
        raise _checks.fail_type(name, f"None or the path of a {FORMATS}", path)
    found: str = os.fsdecode(path)
    if not os.path.isfile(found):
        raise _checks.fail(name, f"the path of an existing {FORMATS}", repr(found))
    return found


def _unpickled(path: str, name: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except _ERRORS as error:
        text = str(error)
        foreign = re.search(r"GLOBAL (\S+)", text)
        if foreign is not None:
            held = f"which names {foreign[1]} and is therefore not unpickled"
            raise _checks.fail(name, "a file of tensors and plain values", f"{path!r}, {held}") from error
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        reason = lines[0][:120] if lines else type(error).__name__
        raise _checks.fail(name, "a readable torch file", f"{path!r} ({reason})") from error


def _modern(tensors: dict[str, Tensor], network: str) -> dict[str, Tensor]:
    """The tensors under the names that torchvision uses today."""
    left_out = _AUXILIARY.get(network, ())
    kept = {key: value for key, value in tensors.items() if not key.startswith(left_out)}
    if network.startswith("torchvision:densenet"):
        kept = {_DOTTED.sub(r"\1\2", key): value for key, value in kept.items()}
    if network in DETECTORS:
        kept = {modern_name(key): value for key, value in kept.items()}
    return kept


def _first_misfit(own: Mapping[str, Tensor], layout: Mapping[str, Place], given: Mapping[str, Tensor]) -> str | None:
    for key, place in layout.items():
        # Weights saved before batch normalisation counted its batches lack that counter; it plays no part in outputs.
        if place.name not in given:
            if key.endswith("num_batches_tracked"):
                continue
            return f"no tensor {place.name!r}" + (f" (its first is {next(iter(given))!r})" if given else "")
        value = given[place.name]
        if tuple(value.shape) != place.shape:
            return f"{place.name!r} of shape {tuple(value.shape)} in place of {place.shape}"
        same_kind = value.dtype.is_floating_point == own[key].dtype.is_floating_point
        if not same_kind or value.layout != torch.strided or value.is_meta:
            return f"{place.name!r} of {value.dtype}, {value.layout}, on {value.device} in place of {own[key].dtype}"
    names = {place.name for place in layout.values()}
    extra = next((key for key in given if key not in names), None)
    return None if extra is None else f"a tensor {extra!r} that the network does not have"
