"""Networks by name: the zoo of the published experiments, torchvision and timm."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastrank import _checks
from fastrank.models import _external, detection
from fastrank.models.checkpoints import load_weights, weights_file
from fastrank.models.densenet import DenseNet40
from fastrank.models.lenet5 import lenet5_nrmf
from fastrank.models.rates import check_rates, parse_rates
from fastrank.models.resnet_cifar import resnet_20, resnet_56, resnet_56_bottleneck, resnet_110
from fastrank.models.resnet_imagenet import ResNet50
from fastrank.models.vgg import VGG16BN

# What the source of a detector is called inside this file.
_DETECTION = "detection"
# Rank 9 is exact for a 3×3 filter: nine one-pixel terms.
_MAX_RANK = 9


@dataclass(frozen=True)
class _Architecture:
    """make(num_classes, rank, rates), its defaults, and how many rates it wants (`or_rates`: also accepted)."""

    make: Callable[[int, int, Sequence[float]], nn.Module]
    rates: int
    or_rates: int | None = None
    num_classes: int = 10
    input_size: tuple[int, int, int] = (3, 32, 32)


_ZOO = {
    "lenet5_nrmf": _Architecture(lenet5_nrmf, 0, input_size=(1, 8, 8)),
    "resnet_20": _Architecture(resnet_20, 12),
    "resnet_56": _Architecture(resnet_56, 30),
    "resnet_56_bottleneck": _Architecture(resnet_56_bottleneck, 0),
    "resnet_110": _Architecture(resnet_110, 57),
    "vgg_16_bn": _Architecture(VGG16BN, 13, or_rates=12),
    "densenet_40": _Architecture(DenseNet40, 39),
    "resnet_50": _Architecture(ResNet50, 20, num_classes=1000, input_size=(3, 224, 224)),
}
NAMES = tuple(_ZOO)


def build(
    name: str,
    *,
    num_classes: int | None = None,
    rank: int = 0,
    compress_rate: Sequence[float] | str | None = None,
    pretrained: str | os.PathLike[str] | None = None,
    **options: Any,
) -> nn.Module:
    """The network `name` in training mode, on the default device.

    Args:
        name: one of `NAMES`, "torchvision:NAME" (image classifiers), "timm:NAME", or one of `DETECTORS`: torchvision's
            Faster, Mask and Keypoint R-CNN over a ResNet-50 with a feature pyramid (an alias is
            "fasterrcnn_CPresnet50_fpn" and the like).
        num_classes: logits; by default 10 for the CIFAR and digits networks, 1000 for the others. Of a detector, with
            the background: 91, or 2 for Keypoint R-CNN.
        rank: 0 for plain convolutions, 1–9 for NORTON's CP blocks of that rank in place of every 3×3 convolution.
        compress_rate: shares of the channels to leave out, as a list or as "[0.]+[0.1]*2+[0.4]*5"; which position
            means what is written at each architecture. Zoo only, like `rank`; in a detector, both shape the backbone.
        pretrained: a safetensors or torch file with weights of this very network, under the names used here, by
            torchvision, timm or NORTON (see `load_weights`), or None. Nothing is ever downloaded.
        **options: of detectors. ``backbone="resnet_50"``: a ResNet of four stages by name, or as a module, which may be
            compressed and becomes a part of the detector. ``trainable_layers=5``: stages of the backbone that are
            trained, counted from its output. ``frozen_norm=False``: fix batch normalisation in the backbone; for
            backbones that bring trained weights torchvision's recipe is True with 3 trainable layers.
            ``min_size=800``, ``max_size=1333``: pixels that images are resized to; several values of `min_size` are
            drawn from in training (Keypoint R-CNN: 640 to 800 in steps of 32). Of torchvision's GoogLeNet and
            Inception v3, ``aux_logits=False``: with the auxiliary classifiers, which answer in training mode only.

    The result bears `fastrank_origin`, a dict of name, num_classes, rank, compress_rate (a list or None) and the
    options given, that builds it again; a detector over a module bears none where the module has none. Raises
    ValueError or TypeError for bad arguments, ImportError where torchvision or timm is missing.
    """
    source, inner = _split(name)
    _check_options(name, source, options)
    classes = None if num_classes is None else _checks.integer("num_classes", num_classes, 1)
    _checks.integer("rank", rank, 0, _MAX_RANK)
    rates = _given_rates(compress_rate)
    path = None if pretrained is None else weights_file(pretrained)
    if source == _DETECTION:
        model, origin = detection.build_detector(inner, classes, rank, rates, options)
    else:
        model, origin = _classifier(name, classes, rank, rates, options)
    if origin is not None:
        model.fastrank_origin = origin  # type: ignore[assignment]
    if path is not None:
        load_weights(model, path)
    return model


def default_input_size(name: str) -> tuple[int, int, int]:
    """(C, H, W) that `name` was published with; (3, 224, 224) for torchvision and timm, (3, 800, 800) for detectors."""
    source, inner = _split(name)
    if source == _DETECTION:
        return detection.INPUT_SIZE
    return (3, 224, 224) if source else _ZOO[inner].input_size


def _classifier(
    name: str, classes: int | None, rank: int, rates: list[float] | None, options: Mapping[str, Any]
) -> tuple[nn.Module, dict[str, Any] | None]:
    """The network and the arguments of `build` that make it again."""
    source, inner = _split(name)
    if source:
        for argument, value in (("rank", rank), ("compress_rate", rates)):
            if value not in (0, None):
                expected = f"left out for {source} networks (compress them with fastrank.compress)"
                raise _checks.fail(argument, expected, value)
        classes = 1000 if classes is None else classes
        model = _external.build_external(source, inner, classes, bool(options.get(_external.AUX_LOGITS)))
    else:
        architecture = _ZOO[name]
        classes = architecture.num_classes if classes is None else classes
        model = architecture.make(classes, rank, _full_rates(name, architecture, rates))
    given = {option: value for option, value in options.items() if value is not False}
    return model, {"name": name, "num_classes": classes, "rank": rank, "compress_rate": rates, **given}


def _split(name: Any) -> tuple[str, str]:
    """(source, inner name); the source is empty for the zoo."""
    if not isinstance(name, str):
        raise _checks.fail_type("name", "a string", name)
    detector = detection.ALIASES.get(name, name)
    if detector in detection.DETECTORS:
        return _DETECTION, detector
    source, _, inner = name.partition(":")
    if inner and source in _external.SOURCES:
        return source, inner
    return "", _checks.choice("name", name, (*NAMES, *detection.DETECTORS, "torchvision:NAME", "timm:NAME"))


def _check_options(name: str, source: str, options: Mapping[str, Any]) -> None:
    known = [*detection.OPTIONS, _external.AUX_LOGITS]
    for option, value in options.items():
        if option not in known:
            raise TypeError(f"options of models.build must be among {known}, got {option!r}")
        if option == _external.AUX_LOGITS:
            if name not in _external.AUXILIARY:
                raise _checks.fail(option, f"left out for {name}, which has no auxiliary classifiers", value)
            if not isinstance(value, bool):
                raise _checks.fail_type(option, "a bool", value)
            continue
        if source != _DETECTION:
            raise _checks.fail(option, f"left out for {name}, which is no detector", value)


def _given_rates(compress_rate: Any) -> list[float] | None:
    if compress_rate is None:
        return None
    return parse_rates(compress_rate) if isinstance(compress_rate, str) else check_rates(compress_rate)


def _full_rates(name: str, architecture: _Architecture, rates: list[float] | None) -> list[float]:
    """`rates`, checked for the length that the architecture wants; zeros where none were given."""
    if rates is None:
        return [0.0] * architecture.rates
    if architecture.rates == 0:
        raise _checks.fail("compress_rate", f"None for {name}, whose widths are fixed", f"{len(rates)} rates")
    if len(rates) not in (architecture.rates, architecture.or_rates):
        also = "" if architecture.or_rates is None else f" or {architecture.or_rates}"
        raise _checks.fail("compress_rate", f"{architecture.rates}{also} rates long for {name}", f"{len(rates)} rates")
    return rates
