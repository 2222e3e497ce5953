"""What the peers that are not torch itself need: why one is missing, and its layers over fastrank's factors."""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from fastrank.benchmarks import timing
from fastrank.benchmarks._registry import Thunk

# tensorly-torch's ways to run a factorised convolution: factor by factor, and by the kernel merged at every call.
WAYS = ("factorized", "reconstructed")


@contextmanager
def tensorly_kept() -> Iterator[None]:
    """TensorLy over torch, as tensorly-torch needs it and, when it is imported, sets it; afterwards as it was."""
    loaded = sys.modules.get("tensorly")
    before = loaded.get_backend() if loaded is not None else os.environ.get("TENSORLY_BACKEND", "numpy")
    if "tltorch" in sys.modules:
        sys.modules["tensorly"].set_backend("pytorch")
    try:
        yield
    finally:
        if "tensorly" in sys.modules:
            sys.modules["tensorly"].set_backend(before)


@cache
def missing(module: str) -> str:
    """Why a package cannot be used, or "": "tltorch is not installed"."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import_module(module)
    except ImportError as problem:
        known = isinstance(problem, ModuleNotFoundError) and problem.name == module.partition(".")[0]
        return f"{problem.name} is not installed" if known else f"{module} cannot be imported: {problem}"
    return ""


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of a peer: TensorLy's of ranks above a mode's size, and of solvers that did not converge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def cannot_compile() -> str:
    """Why torch.compile cannot be used, or ""."""
    if torch.cuda.is_available():
        return missing("triton")
    return "" if any(map(shutil.which, ("c++", "g++", "clang++"))) else "torch.compile needs a C++ compiler on a CPU"


def compiled_call(function: Callable[..., Any], *arguments: Any, tuned: bool = True) -> Thunk:
    """The call of a compiled function; compiled here, and once for all arguments of the same shapes.

    tuned: on a GPU, by the fastest of many kernels for each operation: seconds for a layer, minutes for a network.
    """
    fast = _compiled(function, tuned)
    with torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=1024):  # one a shape
        fast(*arguments)
    return lambda: fast(*arguments)


@cache
def _compiled(function: Callable[..., Any], tuned: bool) -> Callable[..., Any]:
    # CUDA graphs are captured by the caller, for all contenders alike. Tuning takes a CPU minutes.
    mode = "max-autotune-no-cudagraphs" if tuned and timing.DEVICE == "cuda" else None
    found: Callable[..., Any] = torch.compile(function, mode=mode, dynamic=False, fullgraph=True)
    return found


def tltorch_conv(kind: str, way: str, factors: Any, bias: Tensor | None, stride: int, padding: int) -> nn.Module:
    """tensorly-torch's FactorizedConv over given factors.

    kind: "tucker" with factors (core, [factor a mode]) or "cp" with (weights, [factor a mode]); a factor is (size,
    rank), and the modes are O, I, kh, kw. way: one of `WAYS`, for "cp" also "mobilenet".
    """
    layers, tensors = import_module("tltorch.factorized_layers"), import_module("tltorch.factorized_tensors")
    head, modes = factors
    parameters = [nn.Parameter(each.detach().clone()) for each in modes]
    if kind == "tucker":
        weight = tensors.TuckerTensor(nn.Parameter(head.detach().clone()), parameters)
    else:
        weight = tensors.CPTensor(nn.Parameter(head.detach().clone()), parameters)
    found: nn.Module = layers.FactorizedConv.from_factorization(
        weight, implementation=way, stride=stride, padding=padding, bias=bias
    )
    return found.eval()


def tltorch_tucker2(
    w_in: Tensor, core: Tensor, w_out: Tensor, bias: Tensor | None, stride: int, padding: int, way: str
) -> nn.Module:
    """A Tucker-2 convolution, w_in (R_in, I), core (R_out, R_in, kh, kw), w_out (O, R_out); whole along kh and kw."""
    whole = [torch.eye(size, dtype=core.dtype, device=core.device) for size in core.shape[2:]]
    return tltorch_conv("tucker", way, (core, [w_out, w_in.T, *whole]), bias, stride, padding)


def tltorch_cp(
    w_in: Tensor, depthwise: Sequence[Tensor], w_out: Tensor, bias: Tensor | None, stride: int, padding: int, way: str
) -> nn.Module:
    """A convolution with one CP of the whole kernel: w_in (R, I), depthwise (R, kh) and (R, kw), w_out (O, R)."""
    ones = torch.ones(w_in.shape[0], dtype=w_in.dtype, device=w_in.device)
    return tltorch_conv("cp", way, (ones, [w_out, w_in.T, *(each.T for each in depthwise)]), bias, stride, padding)
