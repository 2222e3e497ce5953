"""Finds and loads the compiled parts and the Triton kernels, and says in one sentence why one is missing.

_C        operator schemas; needs torch alone
_C_cuda   the CUDA kernels; needs a CUDA build of torch
_host     pybind11 module: build facts, launch plans, kernels compiled for the host; needs no torch
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

PARTS = ("_C", "_C_cuda", "_host")
_PACKAGE = Path(__file__).parent


def load(name: str) -> bool:
    """Load a compiled part once; whether it is there."""
    return not why_missing(name)


@cache
def why_missing(name: str) -> str:
    """Empty where the compiled part is loaded, else one sentence for `fastrank env` and error messages."""
    if name not in PARTS:
        raise ValueError(f"name must be one of {list(PARTS)}, got {name!r}")
    found = sorted(path for path in _PACKAGE.glob(f"{name}.*") if path.suffix in (".so", ".pyd", ".dylib"))
    if not found:
        unbuilt = f"fastrank.{name} was not built: this copy of fastrank was never installed (run `pip install .`)"
        return str(build_info()["missing"].get(f"fastrank.{name}", unbuilt))
    if name == "_C_cuda" and (reason := why_missing("_C")):
        return f"fastrank._C_cuda needs fastrank._C, and {reason}"
    try:
        if name == "_host":
            importlib.import_module(f"fastrank.{name}")
        else:
            torch.ops.load_library(found[0])  # type: ignore[no-untyped-call]
    except (ImportError, OSError, RuntimeError) as error:
        return f"fastrank.{name} could not be loaded: {str(error).splitlines()[0]}"
    return ""


def host() -> Any:
    """The module fastrank._host; raises RuntimeError with the reason where it is missing."""
    if reason := why_missing("_host"):
        raise RuntimeError(f"the host build of the kernels is not available: {reason}")
    return importlib.import_module("fastrank._host")


@cache
def build_info() -> dict[str, Any]:
    """What the build recorded: missing ({part: reason}), nvcc, archs (built for), torch (built against), compiler."""
    record = _PACKAGE / "_build_info.json"
    info = {"missing": {}, "nvcc": "", "archs": [], "torch": ""}
    if record.is_file():
        info |= json.loads(record.read_text(encoding="utf-8"))
    return info


def triton_kernels(family: str) -> ModuleType:
    """The module fastrank.triton_kernels.<family>, imported on demand (it imports triton).

    The folder stands beside the package in a source tree and inside it once installed; both are found.
    """
    package = "fastrank.triton_kernels"
    if package not in sys.modules and importlib.util.find_spec(package) is None:
        folder = _PACKAGE.parent / "triton_kernels"
        spec = importlib.util.spec_from_file_location(
            package, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        if spec is None or spec.loader is None:
            raise ImportError(f"the Triton kernels are neither installed nor in {folder}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[package] = module
        spec.loader.exec_module(module)
    return importlib.import_module(f"{package}.{family}")
