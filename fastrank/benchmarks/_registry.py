"""The registry: every operation that is timed, its sizes and dtype, and who computes it, family by family.

A family is a module with `cases(device)`. A `Case` is one row of its table: it makes its inputs, knows what is right,
and lists its contenders: fastrank's backends, and the peers that users would take instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrank import _backends, _checks

KERNELS = ("cuda", "triton")
Thunk = Callable[[], Any]
# What a call returned -> (error, the most that is right).
Judge = Callable[[Any], tuple[float, float]]

FAMILIES = {
    "tucker2": "Tucker-2 convolutions",
    "cp": "CP convolutions",
    "linalg": "Sub-gradients, singular values and decompositions of all convolutions of a network",
    "gates": "Gated factors and penalties of a whole model",
    "networks": "Whole networks",
}
# What --compare takes: who a user would call instead.
PEERS = {
    "dense": "the layer or network that was compressed",
    "sequence": "plain library convolutions in a row",
    "compile": "torch.compile of these",
    "tltorch": "tensorly-torch's FactorizedConv",
    "svd": "torch.linalg.svd, one matrix after the other, by each of its drivers",
    "eigh": "Gram matrices and a batched torch.linalg.eigh",
    "muon": "five Newton–Schulz steps by Muon's coefficients",
    "torchao": "a step of torchao's PruneOptimizer with ProxNuclearNorm",
    "tensorly": "TensorLy's parafac and partial_tucker",
    "eager": "the published formulas in plain PyTorch, factor by factor",
    "foreach": "a chain of torch._foreach operators",
}


class Work(NamedTuple):
    """What a call cannot avoid, FLOPs and bytes; its multiply-adds, compressed and dense, where less is the point."""

    flops: float
    bytes: float
    macs: int = 0
    dense_macs: int = 0

    @property
    def fewer_macs(self) -> float | None:
        """How many times fewer multiply-adds than dense."""
        return self.dense_macs / self.macs if self.macs else None


@dataclass(frozen=True)
class Contender:
    """Someone who computes a case.

    peer: a key of `PEERS`, or "" for fastrank itself, where a wrong result makes the family red. build: from the case's
    inputs, prepare what a user prepares once, and give the call that is timed. refusal: why it cannot run, or "".
    may_refuse: whether what it raises is a refusal that only the call itself tells. judge: of its own, where it
    computes something else than the case. exact: False for what only approximates: its error is told and not judged.
    part: the share of the work that a call does; times are divided by it.
    """

    name: str
    build: Callable[[Any], Thunk]
    peer: str = ""
    refusal: str = ""
    may_refuse: bool = False
    judge: Callable[[Any], Judge] | None = None
    exact: bool = True
    part: float = 1.0


@dataclass(frozen=True)
class Case:
    """A row. make: the inputs, the same at every call. judge: from the inputs, what tells right from wrong in float64.

    operation: the public function, or the kind of network. sizes: JSON-able. baselines: the contenders that ratios are
    to, the most important first. copied: the inputs in other memory, for cold graphs; without it a GPU's time is wall
    time. tensors: what a call reads, for how many copies make it cold. before: runs ahead of every round. work: what a
    call has to do. grad: whether calls differentiate.
    """

    family: str
    operation: str
    name: str
    dtype: torch.dtype
    device: str
    make: Callable[[], Any]
    judge: Callable[[Any], Judge]
    contenders: Sequence[Contender]
    baselines: Sequence[str]
    sizes: Mapping[str, Any] = field(default_factory=dict)
    copied: Callable[[Any], Any] | None = None
    tensors: Callable[[Any], Sequence[Tensor]] | None = None
    before: Callable[[Any], None] | None = None
    work: Callable[[Any], Work] | None = None
    grad: bool = False

    def __str__(self) -> str:
        return f"{self.operation}, {self.name}"


def cases(family: str, device: str | None = None) -> list[Case]:
    """The rows of a family on a device, "cpu" or "cuda"; by default on the GPU where there is one.

    On a GPU bfloat16 and channels_last, on a CPU float32 and fewer, smaller rows. Raises ValueError for another family.
    """
    _checks.choice("family", family, tuple(FAMILIES))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    module = import_module(f"fastrank.benchmarks._{family}")
    found: list[Case] = module.cases(device)
    return found


def refusals(
    op: str,
    device: str | torch.device,
    dtype: torch.dtype = torch.float32,
    work: _backends.ConvWork | None = None,
) -> dict[str, str]:
    """The kernels of an operator that cannot run a call on such tensors, each with the reason."""
    facts = _backends.facts(op, torch.empty(0, device=device, dtype=dtype), work)
    verdicts = _backends.explain(facts)
    kernels = [name for name in KERNELS if name in _backends.BACKENDS[op]]
    found = {name: verdicts[name].reason for name in kernels if not verdicts[name]}
    if facts.interpreter and "triton" in kernels and "triton" not in found:
        found["triton"] = "Triton's interpreter is no contender"
    return found


def compared(case: Case, compare: Sequence[str] | None) -> list[Contender]:
    """fastrank's own contenders of a case and the peers that were named; all of them for None."""
    return [each for each in case.contenders if not each.peer or compare is None or each.peer in compare]


def names(option: str, text: str, known: Mapping[str, str]) -> list[str]:
    """Names joined by commas, checked: "" is all of them. Raises ValueError that names the choices."""
    found = [part.strip() for part in text.split(",") if part.strip()] or list(known)
    unknown = sorted(set(found) - set(known))
    if unknown:
        raise ValueError(f"{option} must name some of {', '.join(known)}, got {', '.join(unknown)}")
    return [name for name in known if name in found]
