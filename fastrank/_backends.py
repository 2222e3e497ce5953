"""Which implementation serves a call, and why the others do not.

`can_run_*` are predicates over `Facts`: they both select and explain. `choose` is a pure function of the facts and
of the checked-in measurements, so that the forward pass, the backward pass and a compiled graph choose alike.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fastrank import _checks, _native


@dataclass(frozen=True)
class Verdict:
    """Whether a backend can serve a call; `reason` says why not (empty when it can)."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


@dataclass(frozen=True)
class Facts:
    """What a choice may depend on: the call's kind and the installation, never a tensor's values."""

    op: str
    device: str
    dtype: torch.dtype
    interpreter: bool
    missing_triton: str
    missing_cuda: str
    missing_host: str


# The backends that exist for an operator. The first is what `auto` takes where AUTO names no other for the device:
# kernels move there only with a committed measurement that shows them winning.
BACKENDS: dict[str, tuple[str, ...]] = {
    "gated_factor": ("reference", "triton", "cuda", "host"),
    "funnel_penalty": ("reference", "triton", "cuda", "host"),
    "tucker2_conv2d": ("sequence", "dense", "reference"),
    "cp_conv2d": ("sequence", "dense", "reference"),
    "svd": ("reference", "gram", "cuda", "host"),
    "nuclear_norm": ("reference", "gram", "cuda", "host"),
    "nuclear_subgradient": ("reference", "gram", "cuda", "host"),
    "project_energy": ("reference", "gram", "cuda", "host"),
    "polar_factors": ("reference", "triton"),
}
# What won in bench/results/linalg-cpu.json. A backend that cannot run a call is passed over.
SPECTRAL = ("svd", "nuclear_norm", "nuclear_subgradient", "project_energy")
AUTO: dict[tuple[str, str], str] = {(op, "cpu"): "gram" for op in SPECTRAL}
NAMES = ("auto", "reference", "gram", "triton", "cuda", "host", "sequence", "dense")


@lru_cache(maxsize=1)
def why_no_triton() -> str:
    """Empty where triton can be imported, else one sentence."""
    return "" if importlib.util.find_spec("triton") else "the triton package is not installed"


def interpreting() -> bool:
    """Whether Triton kernels run through its CPU interpreter (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def facts(op: str, x: Tensor) -> Facts:
    """The facts of a call of `op` whose leading tensor is `x`."""
    return Facts(
        op=op,
        device=x.device.type,
        dtype=x.dtype,
        interpreter=interpreting(),
        missing_triton=why_no_triton(),
        missing_cuda=_native.why_missing("_C_cuda"),
        missing_host=_native.why_missing("_host"),
    )


def can_run_library(facts: Facts) -> Verdict:
    """reference, sequence and dense are plain PyTorch: they run wherever torch does."""
    return Verdict(True)


def can_run_gram(facts: Facts) -> Verdict:
    """Gram matrices by library products: for matrices whose squares float64 can hold."""
    if facts.dtype is torch.float64:
        return Verdict(False, "a Gram matrix halves the digits of float64")
    return Verdict(True)


def can_run_triton(facts: Facts) -> Verdict:
    """Triton kernels: on a CUDA tensor, or on a CPU tensor under the interpreter (which has no correct bfloat16)."""
    if facts.missing_triton:
        return Verdict(False, facts.missing_triton)
    if facts.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return Verdict(False, f"the Triton kernels take float32, float16 and bfloat16, not {facts.dtype}")
    if facts.device == "cuda" and not facts.interpreter:
        return Verdict(True)
    if facts.device == "cpu" and facts.interpreter:
        if facts.dtype is torch.bfloat16:
            return Verdict(False, "Triton's interpreter computes bfloat16 wrongly")
        return Verdict(True)
    return Verdict(
        False, f"the tensor is on {facts.device} and TRITON_INTERPRET is {'on' if facts.interpreter else 'off'}"
    )


def can_run_cuda(facts: Facts) -> Verdict:
    """The compiled CUDA C++ kernels: on a CUDA tensor, where `fastrank._C_cuda` was built."""
    if facts.device != "cuda":
        return Verdict(False, f"the tensor is on {facts.device}, not on a CUDA device")
    if facts.missing_cuda:
        return Verdict(False, facts.missing_cuda)
    if facts.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return Verdict(False, f"the CUDA kernels take float32, float16 and bfloat16, not {facts.dtype}")
    return Verdict(True)


def can_run_host(facts: Facts) -> Verdict:
    """The CUDA C++ kernels compiled for the host: a CPU stand-in for tests, slow on purpose."""
    if facts.device != "cpu":
        return Verdict(False, f"the tensor is on {facts.device}; the host build of the kernels reads CPU memory")
    if facts.missing_host:
        return Verdict(False, facts.missing_host)
    if facts.dtype is not torch.float32 and not (facts.op in SPECTRAL and facts.dtype.itemsize == 2):
        return Verdict(False, f"the host build of the kernels takes float32, not {facts.dtype}")
    return Verdict(True)


_PREDICATES: dict[str, Callable[[Facts], Verdict]] = {
    "reference": can_run_library,
    "gram": can_run_gram,
    "sequence": can_run_library,
    "dense": can_run_library,
    "triton": can_run_triton,
    "cuda": can_run_cuda,
    "host": can_run_host,
}


def explain(facts: Facts) -> dict[str, Verdict]:
    """The verdict of every backend on a call, the ones that do not exist for its operator included."""
    known = BACKENDS[facts.op]
    return {
        name: _PREDICATES[name](facts) if name in known else Verdict(False, f"{facts.op} has no {name} backend")
        for name in NAMES
        if name != "auto"
    }


def choose(facts: Facts, requested: str) -> str:
    """The backend that serves a call. A backend that was asked for by name is taken or refused, never replaced."""
    _checks.choice("backend", requested, NAMES)
    if requested == "auto":
        measured = AUTO.get((facts.op, facts.device))
        return measured if measured and _PREDICATES[measured](facts) else BACKENDS[facts.op][0]
    verdict = explain(facts)[requested]
    if not verdict:
        raise ValueError(f"backend={requested!r} cannot run {facts.op} here: {verdict.reason}")
    return requested
