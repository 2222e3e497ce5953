"""Networks of torchvision and timm by name, never downloaded; both packages are imported on first use."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from typing import Any

from torch import nn

SOURCES = ("torchvision", "timm")

AUXILIARY = ("torchvision:googlenet", "torchvision:inception_v3")
"""Networks with auxiliary classifiers, which `build` leaves out unless it is asked for them by `AUX_LOGITS`."""
AUX_LOGITS = "aux_logits"


def build_external(source: str, name: str, num_classes: int, aux_logits: bool) -> nn.Module:
    """The network `name` of `source` ("torchvision" or "timm"), initialised at random.

    aux_logits: with the auxiliary classifiers, of the networks of `AUXILIARY`.
    Raises ImportError where the package is missing and ValueError for a name that it does not have.
    """
    return _torchvision(name, num_classes, aux_logits) if source == "torchvision" else _timm(name, num_classes)


def _torchvision(name: str, num_classes: int, aux_logits: bool) -> nn.Module:
    models = _import("torchvision.models", f"torchvision:{name}")
    known = models.list_models(module=models)
    if name not in known:
        raise _unknown("torchvision", name, known)
    # Auxiliary classifiers make training return tuples; torchvision drops them with its own weights too. Its truncated
    # normal start takes seconds, and these networks normalise their batches.
    options = {AUX_LOGITS: aux_logits, "init_weights": False} if f"torchvision:{name}" in AUXILIARY else {}
    model: nn.Module = models.get_model(name, weights=None, num_classes=num_classes, **options)
    return model


def _timm(name: str, num_classes: int) -> nn.Module:
    timm = _import("timm", f"timm:{name}")
    # Names with a scheme ("hf-hub:...") would make timm look for a configuration on the network.
    if ":" in name or "/" in name or not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=num_classes)
    return model


def _import(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"name {name!r} needs {package}: install it with `pip install 'fastrank[vision]'`") from error


def _unknown(source: str, name: str, known: Iterable[str]) -> ValueError:
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    hint = f" (nearest: {', '.join(f'{source}:{n}' for n in near)})" if near else ""
    return ValueError(f"name must be '{source}:' and an image classifier of {source}, got '{source}:{name}'{hint}")
