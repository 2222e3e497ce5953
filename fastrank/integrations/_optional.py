"""Packages that only one integration needs."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, extra: str, what: str) -> Any:
    """The module of an optional package; ImportError with one sentence, about `what` needs it, where it is absent."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = "tensorboard" if "tensorboard" in module else module.partition(".")[0]
        raise ImportError(f"{what} needs {package}, which is absent: pip install 'fastrank[{extra}]'") from error
