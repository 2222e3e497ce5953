"""Recognises torchvision and timm networks that were built elsewhere, so that their files can rebuild them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fastrank.models._build import build

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
        kernel: Any = (module.out_channels, module.in_channels, *module.kernel_size)  # type: ignore[misc]
        shapes[f"{prefix}weight"] = kernel
        if module.bias is not None:
            shapes[f"{prefix}bias"] = kernel[:1]
    return shapes


def identify(model: nn.Module) -> dict[str, Any] | None:
    """The `fastrank_origin` of `model`: as built by `models.build`, or found by its class and shapes; None if unknown."""
    known = getattr(model, "fastrank_origin", None)
    if isinstance(known, dict):
        return known
    shapes = dense_shapes(model)
    for name, classes in _guesses(model):
        with torch.device("meta"):
            twin = build(name, num_classes=classes)
        if type(twin) is type(model) and dense_shapes(twin) == shapes:
            return {"name": name, "num_classes": classes, "rank": 0, "compress_rate": None}
    return None


def _guesses(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Names and class counts worth trying: every builder of the model's torchvision module, or timm's own record."""
    where = type(model).__module__
    state = list(model.state_dict().values())
    if where.startswith("torchvision.models.") and state:
        zoo = importlib.import_module("torchvision.models")
        # The classifier is the last module of every torchvision classifier, and its bias the last tensor.
        classes = tuple(state[-1].shape)[:1]
        for name in zoo.list_models(module=zoo):
            if classes and zoo.get_model_builder(name).__module__ == where:
                yield f"torchvision:{name}", classes[0]
    elif where.startswith("timm.models."):
        config = getattr(model, "pretrained_cfg", None) or {}
        classes_of_timm = getattr(model, "num_classes", None)
        if isinstance(config.get("architecture"), str) and isinstance(classes_of_timm, int) and classes_of_timm > 0:
            yield f"timm:{config['architecture']}", classes_of_timm
