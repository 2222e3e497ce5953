"""Faster, Mask and Keypoint R-CNN of torchvision over a feature pyramid whose ResNet-50 may be compressed (NORTON)."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fastrank import _checks

# Class in torchvision.models.detection, and classes with the background: those of COCO, or person alone.
_KINDS = {"fasterrcnn": ("FasterRCNN", 91), "maskrcnn": ("MaskRCNN", 91), "keypointrcnn": ("KeypointRCNN", 2)}
_KEYPOINTS = 17
_PYRAMID = 256
_STAGES = ("layer1", "layer2", "layer3", "layer4")
_BACKBONE = "resnet_50"

DETECTORS = tuple(_KINDS)
ALIASES = {f"{name}_CPresnet50_fpn": name for name in DETECTORS}
"""The names of the published code."""
OPTIONS = ("backbone", "trainable_layers", "frozen_norm", "min_size", "max_size")
"""What `build` takes for detectors alone."""
INPUT_SIZE = (3, 800, 800)

# torchvision's published files are of a time when these convolutions were modules by themselves.
_PYRAMID_CONV = re.compile(r"(backbone\.fpn\.(?:inner|layer)_blocks\.\d+|rpn\.head\.conv)\.(weight|bias)")
_MASK_CONV = re.compile(r"roi_heads\.mask_head\.mask_fcn(\d)\.(weight|bias)")


def build_detector(
    name: str, num_classes: int | None, rank: int, rates: list[float] | None, options: Mapping[str, Any]
) -> tuple[nn.Module, dict[str, Any] | None]:
    """The detector `name` of `DETECTORS`, and the arguments of `models.build` that make it again.

    These are None where the backbone is a module that `models.build` cannot make. Options as in `models.build`.
    """
    tv, settings = _torchvision(name), _settings(options)
    body, made_by = _backbone(settings.pop("backbone", _BACKBONE), rank, rates)
    if settings.get("frozen_norm", False):
        _freeze_norm(body)
    returned = {stage: str(i) for i, stage in enumerate(_STAGES)}
    pyramid = tv.backbone_utils.BackboneWithFPN(body, returned, _widths(body, tv), _PYRAMID)
    trainable = settings.get("trainable_layers", 5)
    trained = ("layer4", "layer3", "layer2", "layer1", "conv1")[:trainable]  # counted from the output, as torchvision
    for key, parameter in pyramid.body.named_parameters():
        if trainable < 5 and key.partition(".")[0] not in trained:
            parameter.requires_grad_(False)

    kind, default = _KINDS[name]
    classes = default if num_classes is None else _checks.integer("num_classes, with the background,", num_classes, 2)
    sizes = {key: value for key, value in settings.items() if key in ("min_size", "max_size")}
    heads = {"num_keypoints": _KEYPOINTS} if name == "keypointrcnn" else {}
    model: nn.Module = getattr(tv, kind)(pyramid, num_classes=classes, **sizes, **heads)
    origin = None if made_by is None else {"name": name, "num_classes": classes, **made_by, **settings}
    return model, origin


def modern_name(key: str) -> str:
    """The name that torchvision has today for a tensor of its published detectors."""
    mask = _MASK_CONV.fullmatch(key)
    if mask:
        return f"roi_heads.mask_head.{int(mask[1]) - 1}.0.{mask[2]}"
    found = _PYRAMID_CONV.fullmatch(key)
    if not found:
        return key
    inner = "0.0" if found[1].startswith("rpn") else "0"
    return f"{found[1]}.{inner}.{found[2]}"


def _torchvision(name: str) -> ModuleType:
    try:
        return importlib.import_module("torchvision.models.detection")
    except ImportError as error:
        raise ImportError(
            f"name {name!r} needs torchvision: install it with `pip install 'fastrank[detection]'`"
        ) from error


def _settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, checked; sizes as JSON has them."""
    settings = dict(options)
    if "trainable_layers" in settings:
        _checks.integer("trainable_layers", settings["trainable_layers"], 0, 5)
    if not isinstance(settings.get("frozen_norm", False), bool):
        raise _checks.fail_type("frozen_norm", "a bool", settings["frozen_norm"])
    if "max_size" in settings:
        _checks.integer("max_size", settings["max_size"], 1)
    sizes = settings.get("min_size", 1)
    if isinstance(sizes, tuple | list) and sizes:
        settings["min_size"] = [_checks.integer(f"min_size[{i}]", size, 1) for i, size in enumerate(sizes)]
    else:
        _checks.integer("min_size", sizes, 1)
    return settings


def _backbone(given: Any, rank: int, rates: list[float] | None) -> tuple[nn.Module, dict[str, Any] | None]:
    """The backbone, and the part of the detector's origin that makes it."""
    from fastrank.models._build import build
    from fastrank.models.identify import identify

    if isinstance(given, str):
        given = build(given, rank=rank, compress_rate=rates)
        known: dict[str, Any] | None = given.fastrank_origin
    elif isinstance(given, nn.Module):
        if rank or rates is not None:
            raise _checks.fail("rank and compress_rate", "left out where backbone is a module", [rank, rates])
        known = identify(given)
    else:
        raise _checks.fail_type("backbone", "a ResNet (a module) or the name of one", given)
    missing = next((stage for stage in _STAGES if not isinstance(getattr(given, stage, None), nn.Module)), None)
    if missing is not None:
        expected = f"a ResNet with the stages {', '.join(_STAGES)}"
        raise _checks.fail("backbone", expected, f"{type(given).__name__} without {missing}")
    if known is None:
        return given, None
    made_by = {"rank": known["rank"], "compress_rate": known["compress_rate"]}
    if known["name"] != _BACKBONE:
        made_by["backbone"] = known["name"]
    return given, made_by


def _widths(body: nn.Module, tv: ModuleType) -> list[int]:
    """Channels behind each stage, found by a small blank image; every training flag is restored."""
    like = next(body.parameters())
    flags = [(module, module.training) for module in body.modules()]
    stages = tv.backbone_utils.IntermediateLayerGetter(body, {stage: stage for stage in _STAGES}).eval()
    try:
        with torch.no_grad():
            found = stages(torch.zeros(1, 3, 64, 64, device=like.device, dtype=like.dtype))
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        expected = "a ResNet whose children run one after the other up to layer4"
        raise _checks.fail("backbone", expected, f"{type(body).__name__} ({reason})") from error
    finally:
        for module, training in flags:
            module.training = training
    return [found[stage].shape[1] for stage in _STAGES]


def _freeze_norm(module: nn.Module) -> None:
    """Replace every BatchNorm2d with scales and statistics inside by torchvision's frozen one of the same values."""
    from torchvision.ops.misc import FrozenBatchNorm2d

    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d) and child.affine and child.track_running_stats:
            frozen = FrozenBatchNorm2d(child.num_features, child.eps).to(child.weight.device, child.weight.dtype)
            frozen.load_state_dict(child.state_dict())
            setattr(module, name, frozen)
        else:
            _freeze_norm(child)
