"""Recognises torchvision and timm networks that were built elsewhere, so that their files can rebuild them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fastrank.models._build import build
from fastrank.models._external import AUX_LOGITS, AUXILIARY

Shapes = dict[str, tuple[int, ...]]


def dense_shapes(model: nn.Module) -> Shapes:
    """Parameter and buffer shapes of `model`, factored convolutions counted as the `nn.Conv2d` they stand for."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        if not callable(getattr(module, "conv_stages", None)):
            continue
        prefix = f"{name}." if name else ""
        for key in list(module.state_dict()):
            del shapes[prefix + key]
        kernel: Any = (module.out_channels, module.in_channels, *module.kernel_size)
        shapes[f"{prefix}weight"] = kernel
        if module.bias is not None:
            shapes[f"{prefix}bias"] = kernel[:1]
    return shapes


def structure(model: nn.Module) -> dict[str, tuple[type, str]]:
    """Class and settings of every module by name, factored convolutions as the `nn.Conv2d` they stand for."""
    found: dict[str, tuple[type, str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if callable(getattr(module, "conv_stages", None)):
            layer: Any = module
            sizes = (
                layer.in_channels,
                layer.out_channels,
                layer.kernel_size,
                layer.stride,
                layer.padding,
                layer.dilation,
            )
            module = nn.Conv2d(*sizes, 1, layer.bias is not None, layer.padding_mode, device="meta")
        # A leaf says all it knows, since some keep their settings out of extra_repr.
        found[name] = type(module), module.extra_repr() if module._modules else repr(module)
    return found


def identify(model: nn.Module) -> dict[str, Any] | None:
    """The origin with which `models.build` makes the network again; None if there is none.

    The `fastrank_origin` that `models.build` left, or what the class and shapes of a torchvision or timm network tell;
    either way only where every module has the class, settings and shapes that it would have if built so.
    """
    known = getattr(model, "fastrank_origin", None)
    origins = [known] if isinstance(known, dict) else _guesses(model)
    shapes, modules = dense_shapes(model), structure(model)
    for origin in origins:
        try:
            with torch.device("meta"):
                twin = build(**origin)
        except (ImportError, RuntimeError, TypeError, ValueError):
            continue
        if dense_shapes(twin) == shapes and structure(twin) == modules:
            return origin
    return None


def _guesses(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Origins worth trying: every builder of the model's torchvision module, or timm's own record."""
    where = type(model).__module__
    state = list(model.state_dict().values())
    if where.startswith("torchvision.models.") and state:
        zoo = importlib.import_module("torchvision.models")
        # The classifier is the last module of every torchvision classifier, and its bias the last tensor.
        classes = tuple(state[-1].shape)[:1]
        for name in zoo.list_models(module=zoo):
            if classes and zoo.get_model_builder(name).__module__ == where:
                origin = {"name": f"torchvision:{name}", "num_classes": classes[0], "rank": 0, "compress_rate": None}
                yield origin
                if origin["name"] in AUXILIARY:
                    yield {**origin, AUX_LOGITS: True}
    elif where.startswith("timm.models."):
        config = getattr(model, "pretrained_cfg", None) or {}
        classes_of_timm = getattr(model, "num_classes", None)
        if isinstance(config.get("architecture"), str) and isinstance(classes_of_timm, int) and classes_of_timm > 0:
            name = f"timm:{config['architecture']}"
            yield {"name": name, "num_classes": classes_of_timm, "rank": 0, "compress_rate": None}
