"""Which implementation serves a call, and why the others do not.

`can_run_*` are predicates over `Facts`: they both select and explain. `choose` is a pure function of the facts and
of tables of measurements (see `_tables`), so that it answers alike at every call and in every process.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastrank import _checks, _native, _tables
from fastrank._tables import ConvWork as ConvWork
from fastrank._tables import Estimate
from fastrank._tables import remembered as remembered


@dataclass(frozen=True)
class Verdict:
    """Whether a backend can serve a call; `reason` says why not (empty when it can)."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


# A GPU as csrc/tucker2/plan.h takes it: whether it is a Hopper, its multiprocessors, shared bytes a block may have.
Card = tuple[bool, int, int]
# The card whose kernels the host runs: one of few multiprocessors, so that blocks take several tiles of small maps.
HOST_CARD: Card = (True, 4, 227 * 1024)


@lru_cache
def card(device: torch.device) -> Card:
    """The GPU behind a device; what the host stands for where it is a CPU."""
    if device.type != "cuda":
        return HOST_CARD
    found: Any = torch.cuda.get_device_properties(device)
    hopper = found.major == 9 and "9.0a" in _native.build_info()["archs"]
    return hopper, found.multi_processor_count, found.shared_memory_per_block_optin


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
    work: ConvWork | None = None
    machine: str = ""  # as tables call the device; known where there is `work`
    threads: int = 0  # of a CPU
    card: Card | None = None  # that a convolution's kernels would run on


# The backends that exist for an operator. The first is what `auto` takes where AUTO names no other for the device:
# kernels move there only with a committed measurement that shows them winning.
BACKENDS: dict[str, tuple[str, ...]] = {
    "gated_factor": ("reference", "triton", "cuda", "host"),
    "funnel_penalty": ("reference", "triton", "cuda", "host"),
    "funnel_proximal_": ("reference", "triton", "cuda", "host"),
    "count_below": ("reference", "triton", "cuda", "host"),
    "tucker2_conv2d": (*_tables.LIBRARY["tucker2_conv2d"], "reference", "triton", "cuda", "host"),
    "cp_conv2d": (*_tables.LIBRARY["cp_conv2d"], "reference", "triton"),
    "channel_svd_conv2d": (*_tables.LIBRARY["channel_svd_conv2d"], "reference", "triton"),
    "spatial_svd_conv2d": (*_tables.LIBRARY["spatial_svd_conv2d"], "reference"),
    "decoupled_svd_conv2d": (*_tables.LIBRARY["decoupled_svd_conv2d"], "reference", "triton"),
    "svd": ("reference", "gram", "cuda", "host"),
    "nuclear_norm": ("reference", "gram", "cuda", "host"),
    "nuclear_subgradient": ("reference", "gram", "cuda", "host"),
    "project_energy": ("reference", "gram", "cuda", "host"),
    "polar_factors": ("reference", "triton"),
}
# What won in bench/results/linalg-cpu.json. A backend that cannot run a call is passed over.
SPECTRAL = ("svd", "nuclear_norm", "nuclear_subgradient", "project_energy")
AUTO: dict[tuple[str, str], str] = {(op, "cpu"): "gram" for op in SPECTRAL}
NAMES = ("auto", "reference", "gram", "triton", "cuda", "host", "sequence", "depthwise", "dense")
TRITON_REACH = 1024  # MAX_REACH of triton_kernels/tucker2_plan.py


@lru_cache(maxsize=1)
def why_no_triton() -> str:
    """Empty where triton can be imported, else one sentence."""
    return "" if importlib.util.find_spec("triton") else "the triton package is not installed"


def interpreting() -> bool:
    """Whether Triton kernels run through its CPU interpreter (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def facts(op: str, x: Tensor, work: ConvWork | None = None) -> Facts:
    """The facts of a call of `op` whose leading tensor is `x`."""
    return facts_of(op, x.device, x.dtype, work)


def facts_of(op: str, device: torch.device, dtype: torch.dtype, work: ConvWork | None = None) -> Facts:
    """The facts of a call of `op` on tensors of a device and dtype."""
    return Facts(
        op=op,
        device=device.type,
        dtype=dtype,
        interpreter=interpreting(),
        missing_triton=why_no_triton(),
        missing_cuda=_native.why_missing("_C_cuda"),
        missing_host=_native.why_missing("_host"),
        work=work,
        machine="" if work is None else _tables.device_name(device.type, device.index),
        threads=torch.get_num_threads() if device.type == "cpu" else 0,
        card=None if work is None or device.type == "meta" else card(device),
    )


def can_run_library(facts: Facts) -> Verdict:
    """reference, sequence, depthwise and dense are plain PyTorch: they run wherever torch does."""
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
    fits = Verdict(True)
    if facts.work and facts.op in ("tucker2_conv2d", "channel_svd_conv2d"):
        fits = fits_triton_tucker2(facts.work, facts.op == "tucker2_conv2d")
    if facts.work and facts.op in ("cp_conv2d", "decoupled_svd_conv2d"):
        fits = fits_triton_depthwise(facts.work)
    if facts.device == "cuda" and not facts.interpreter:
        return fits
    if facts.device == "cpu" and facts.interpreter:
        if facts.dtype is torch.bfloat16:
            return Verdict(False, "Triton's interpreter computes bfloat16 wrongly")
        return fits
    return Verdict(
        False, f"the tensor is on {facts.device} and TRITON_INTERPRET is {'on' if facts.interpreter else 'off'}"
    )


def fits_triton_tucker2(work: ConvWork, projects: bool = True) -> Verdict:
    """The limits of triton_kernels/tucker2.py: pixels and weights are counted in 32 bits, elements of maps in 64.

    projects: whether a 1×1 convolution comes first, as in Tucker-2 and not in the channel scheme.
    """
    points = fits_triton_points(work)
    if not points:
        return points
    # Ranks are padded to whole accumulators, channels in the place of one to whole steps.
    ranks = work.ranks if projects else (work.in_channels, work.ranks[1])
    rank_in, rank_out = (4 * rank // 3 + 32 for rank in ranks)
    taps = work.kernel[0] * work.kernel[1]
    channels = projects * (work.in_channels + 128) * rank_in + (work.out_channels + 128) * rank_out
    if channels + taps * rank_in * rank_out >= 2**31:
        return Verdict(False, "the Triton kernels count the weights, their padding included, in 31 bits")
    return Verdict(True)


def fits_triton_points(work: ConvWork) -> Verdict:
    """The limits of both: points of the halo of one pixel, and pixels."""
    spans = [d * (k - 1) + 1 for k, d in zip(work.kernel, work.dilation, strict=True)]
    if spans[0] * spans[1] > TRITON_REACH:
        return Verdict(
            False,
            f"the Triton kernels hold every point that a pixel's taps span, at most {TRITON_REACH}, "
            f"not {spans[0]}×{spans[1]}",
        )
    padded = [n + 2 * p for n, p in zip(work.size, work.padding, strict=True)]
    if work.batch * padded[0] * padded[1] >= 2**31:
        return Verdict(False, "the Triton kernels count the pixels of a batch, its padding included, in 31 bits")
    return Verdict(True)


def fits_triton_depthwise(work: ConvWork) -> Verdict:
    """The limits of triton_kernels/depthwise.py: pixels and weights are counted in 32 bits, elements of maps in 64."""
    points = fits_triton_points(work)
    if not points:
        return points
    # Paths, channels and output channels are padded to whole blocks, before the taps or for the input's gradient.
    taps = work.kernel[0] * work.kernel[1]
    columns = 2 * work.ranks[0] * (work.out_channels + 128)
    if columns * (work.in_channels + 256 + taps) >= 2**31:
        return Verdict(False, "the Triton kernels count the weights, their padding included, in 31 bits")
    return Verdict(True)


def can_run_cuda(facts: Facts) -> Verdict:
    """The compiled CUDA C++ kernels: on a CUDA tensor, where `fastrank._C_cuda` was built."""
    if facts.device != "cuda":
        return Verdict(False, f"the tensor is on {facts.device}, not on a CUDA device")
    if facts.missing_cuda:
        return Verdict(False, facts.missing_cuda)
    if facts.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return Verdict(False, f"the CUDA kernels take float32, float16 and bfloat16, not {facts.dtype}")
    return can_plan_tucker2(facts) if facts.op == "tucker2_conv2d" else Verdict(True)


def can_plan_tucker2(facts: Facts) -> Verdict:
    """The CUDA C++ kernels of the Tucker-2 convolution: for 16-bit numbers, where a tile fits the card."""
    if facts.dtype not in (torch.float16, torch.bfloat16):
        return Verdict(False, f"the Tucker-2 kernels in CUDA C++ take float16 and bfloat16, not {facts.dtype}")
    if facts.missing_host:
        return Verdict(False, facts.missing_host)
    if facts.work is None or facts.card is None:
        return Verdict(True)
    _, refusal = tucker2_choice(tucker2_sizes(facts.work), facts.card)
    return Verdict(not refusal, refusal)


@lru_cache(maxsize=4096)
def tucker2_choice(sizes: tuple[int, ...], card: Card) -> tuple[int, str]:
    """Into how many blocks a tile is best split, and why the kernels cannot run the convolution (empty: they can)."""
    split = _native.host().tucker2_split(sizes, *card)
    return split, _native.host().tucker2_plan(sizes, split, *card)["refusal"]


def tucker2_sizes(work: ConvWork) -> tuple[int, ...]:
    """A Tucker-2 convolution as csrc/tucker2/plan.h lists its sizes."""
    x = max(1, work.batch), work.in_channels, *work.size
    return (*x, *work.ranks, work.out_channels, *work.kernel, *work.stride, *work.padding, *work.dilation)


def can_run_host(facts: Facts) -> Verdict:
    """The CUDA C++ kernels compiled for the host: a CPU stand-in for tests, slow on purpose."""
    if facts.device != "cpu":
        return Verdict(False, f"the tensor is on {facts.device}; the host build of the kernels reads CPU memory")
    if facts.missing_host:
        return Verdict(False, facts.missing_host)
    if facts.op == "tucker2_conv2d":
        return can_plan_tucker2(facts)
    if facts.dtype is not torch.float32 and not (facts.op in SPECTRAL and facts.dtype.itemsize == 2):
        return Verdict(False, f"the host build of the kernels takes float32, not {facts.dtype}")
    return Verdict(True)


_PREDICATES: dict[str, Callable[[Facts], Verdict]] = {
    "reference": can_run_library,
    "gram": can_run_gram,
    "sequence": can_run_library,
    "depthwise": can_run_library,
    "dense": can_run_library,
    "triton": can_run_triton,
    "cuda": can_run_cuda,
    "host": can_run_host,
}


def verdict(facts: Facts, name: str) -> Verdict:
    """The verdict of one backend on a call."""
    if name not in BACKENDS[facts.op]:
        return Verdict(False, f"{facts.op} has no {name} backend")
    return _PREDICATES[name](facts)


def explain(facts: Facts) -> dict[str, Verdict]:
    """The verdict of every backend on a call, the ones that do not exist for its operator included."""
    return {name: verdict(facts, name) for name in NAMES if name != "auto"}


@dataclass(frozen=True)
class Choice:
    """The backend that `auto` takes for a factored convolution, and the estimate behind it."""

    backend: str
    estimate: Estimate


@remembered
def fastest(facts: Facts) -> Choice:
    """Of the backends that can run and whose time is known the fastest; the first of the operator's where none is."""
    assert facts.work is not None
    known = BACKENDS[facts.op]
    estimate = _tables.estimate(facts.op, facts.work, facts.dtype, facts.machine, facts.threads)
    able = [name for name in known if name in estimate.us and _PREDICATES[name](facts)]
    return Choice(min(able, key=lambda name: estimate.us[name], default=known[0]), estimate)


def choose(facts: Facts, requested: str) -> str:
    """The backend that serves a call. A backend that was asked for by name is taken or refused, never replaced."""
    _checks.choice("backend", requested, NAMES)
    if requested == "auto":
        if facts.work is not None:
            return fastest(facts).backend
        measured = AUTO.get((facts.op, facts.device))
        return measured if measured and _PREDICATES[measured](facts) else BACKENDS[facts.op][0]
    found = verdict(facts, requested)
    if not found:
        raise ValueError(f"backend={requested!r} cannot run {facts.op} here: {found.reason}")
    return requested
