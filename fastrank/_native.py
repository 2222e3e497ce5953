"""Finds and loads the compiled parts, and says in one sentence why one is missing.

_C        operator schemas; needs torch alone
_C_cuda   the CUDA kernels; needs a CUDA build of torch
_host     pybind11 module: build facts, launch plans, kernels compiled for the host; needs no torch
"""

from __future__ import annotations


def load(name: str) -> bool:
    """Load a compiled part once; whether it is there."""
    return not why_missing(name)


def why_missing(name: str) -> str:
    """Empty where the compiled part is loaded, else one sentence for `fastrank env` and error messages."""
    return f"fastrank.{name} was not built"
