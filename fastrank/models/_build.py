"""Networks by name: the zoo of the published experiments, torchvision and timm."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastrank import _checks
from fastrank.models import _external
from fastrank.models.densenet import DenseNet40
from fastrank.models.lenet5 import lenet5_nrmf
from fastrank.models.rates import check_rates, parse_rates
from fastrank.models.resnet_cifar import resnet_20, resnet_56, resnet_110
from fastrank.models.resnet_imagenet import ResNet50
from fastrank.models.vgg import VGG16BN

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
) -> nn.Module:
    """The network `name` in training mode, on the default device.

    Args:
        name: one of `NAMES`, "torchvision:NAME" (image classifiers) or "timm:NAME".
        num_classes: logits; by default 10 for the CIFAR and digits networks, 1000 for the others.
        rank: 0 for plain convolutions, 1–9 for NORTON's CP blocks of that rank in place of every 3×3 convolution.
        compress_rate: shares of the channels to leave out, as a list or as "[0.]+[0.1]*2+[0.4]*5"; which position
            means what is written at each architecture. Zoo only, like `rank`.
        pretrained: a safetensors file of this very network, or None. Nothing is ever downloaded.

    The result bears `fastrank_origin`, a dict of name, num_classes, rank and compress_rate (a list or None) that
    builds it again. Raises ValueError or TypeError for bad arguments, ImportError where torchvision or timm is missing.
    """
    source, inner = _split(name)
    classes = None if num_classes is None else _checks.integer("num_classes", num_classes, 1)
    _checks.integer("rank", rank, 0, _MAX_RANK)
    rates = _given_rates(compress_rate)
    path = _weights_path(pretrained)
    if source:
        for argument, value in (("rank", rank), ("compress_rate", rates)):
            if value not in (0, None):
                expected = f"left out for {source} networks (compress them with fastrank.compress)"
                raise _checks.fail(argument, expected, value)
        classes = 1000 if classes is None else classes
        model = _external.build_external(source, inner, classes)
    else:
        architecture = _ZOO[name]
        classes = architecture.num_classes if classes is None else classes
        model = architecture.make(classes, rank, _full_rates(name, architecture, rates))
    origin = {"name": name, "num_classes": classes, "rank": rank, "compress_rate": rates}
    model.fastrank_origin = origin  # type: ignore[assignment]
    if path is not None:
        _load_weights(model, path, name)
    return model


def default_input_size(name: str) -> tuple[int, int, int]:
    """(C, H, W) that `name` was published with; (3, 224, 224) for torchvision and timm."""
    source, inner = _split(name)
    return (3, 224, 224) if source else _ZOO[inner].input_size


def _split(name: Any) -> tuple[str, str]:
    """(source, inner name); the source is empty for the zoo."""
    if not isinstance(name, str):
        raise _checks.fail_type("name", "a string", name)
    source, _, inner = name.partition(":")
    if inner and source in _external.SOURCES:
        return source, inner
    return "", _checks.choice("name", name, (*NAMES, "torchvision:NAME", "timm:NAME"))


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


def _weights_path(pretrained: Any) -> str | None:
    if pretrained is None:
        return None
    if isinstance(pretrained, bool) or not isinstance(pretrained, str | os.PathLike):
        expected = "None or the path of a safetensors file (nothing is downloaded)"
        raise _checks.fail_type("pretrained", expected, pretrained)
    path = os.fsdecode(pretrained)
    if not os.path.isfile(path):
        raise _checks.fail("pretrained", "the path of an existing safetensors file (nothing is downloaded)", repr(path))
    return path


def _load_weights(model: nn.Module, path: str, name: str) -> None:
    """Copy the tensors of a safetensors file into `model`; every name and shape has to fit."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise _checks.fail("pretrained", "a readable safetensors file", f"{path!r} ({error})") from error
    misfit = _first_misfit(model.state_dict(), state)
    if misfit is not None:
        raise _checks.fail("pretrained", f"weights of {name} as built here", f"{path!r} with {misfit}")
    model.load_state_dict(state, strict=False)


def _first_misfit(own: dict[str, Tensor], given: dict[str, Tensor]) -> str | None:
    for key, value in own.items():
        # Weights saved before batch normalisation counted its batches lack that counter; it plays no part in outputs.
        if key not in given and not key.endswith("num_batches_tracked"):
            return f"no tensor {key!r}"
        if key in given and given[key].shape != value.shape:
            return f"{key!r} of shape {tuple(given[key].shape)} in place of {tuple(value.shape)}"
    extra = next((key for key in given if key not in own), None)
    return None if extra is None else f"a tensor {extra!r} that the network does not have"
