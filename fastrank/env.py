"""What is installed, what is missing and why: the text of a bug report (`fastrank env`)."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from typing import Any

import torch

from fastrank import _backends, _native, _tables
from fastrank._version import __version__

PACKAGES = ("triton", "torchvision", "timm", "numpy", "safetensors", "scikit-learn", "matplotlib", "tensorly")


def collect() -> dict[str, Any]:
    """The environment as JSON-able data: versions, devices, compiled parts (with reasons) and backends an operator."""
    return {
        "fastrank": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {"name": _tables.cpu_name(), "threads": torch.get_num_threads()},
        "torch": {
            "version": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": _cudnn_version(),
        },
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "packages": {name: version(name) for name in PACKAGES},
        "compiled": {name: _native.why_missing(name) or "loaded" for name in _native.PARTS},
        "build": _native.build_info(),
        "triton_interpreter": _backends.interpreting(),
        "backends": _backends_here(),
    }


def version(package: str) -> str | None:
    """The installed version of a package; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cudnn_version() -> int | None:
    cudnn: Any = torch.backends.cudnn
    return cudnn.version() if cudnn.is_available() else None


def _backends_here() -> dict[str, dict[str, str]]:
    """Operator -> backend -> "" where it runs on float32 here, else the reason why not."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    probe = torch.empty(0, device=device)
    found = {}
    for op, names in _backends.BACKENDS.items():
        verdicts = _backends.explain(_backends.facts(op, probe))
        found[op] = {name: verdicts[name].reason for name in names}
    return found


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
    }
