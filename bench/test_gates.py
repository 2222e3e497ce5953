"""Gates of a whole model: lists of factors against a loop of single calls and a chain of torch._foreach operators.

    pytest bench/test_gates.py --benchmark-json=gates.json

On a CPU: wall time of the reference. On a GPU: every backend, and in extra_info the times inside a CUDA graph and the
bytes that a call has to move, which its bandwidth follows from.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrank import _backends
from fastrank.benchmarks import Case, timing
from fastrank.benchmarks._gates import foreach_factors, foreach_penalty, naive_factors, naive_penalty
from fastrank.benchmarks.layers import LARGE_LISTS, RESNET18_CONVS, gated_shapes
from fastrank.ops import count_below, funnel_penalty, funnel_proximal_, gated_factor, gated_factors

sys.path.insert(0, str(Path(__file__).parent))
import rows

DEVICE = timing.DEVICE
BACKENDS = ["reference", "triton", "cuda"]
CONTENDERS = ["naive", "foreach", "loop", *BACKENDS]

# A CPU takes seconds over the wide layers.
RESNET = gated_shapes(RESNET18_CONVS if DEVICE == "cuda" else RESNET18_CONVS[:12])
LISTS = {"ResNet-18": RESNET, **(LARGE_LISTS if DEVICE == "cuda" else {})}


def factors_by(contender: str) -> Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]]:
    if contender == "naive":
        return naive_factors
    if contender == "foreach":
        return foreach_factors
    if contender == "loop":
        fastest = "cuda" if DEVICE == "cuda" else "reference"
        return lambda v, g: [gated_factor(*pair, backend=fastest) for pair in zip(v, g, strict=True)]
    return lambda v, g: gated_factors(v, g, backend=contender)


def penalty_by(contender: str) -> Callable[[Sequence[Tensor]], Tensor]:
    if contender == "naive":
        return naive_penalty
    if contender == "foreach":
        return foreach_penalty
    return lambda gates: funnel_penalty(gates, 0.1, backend=contender)


def needs(contender: str, op: str) -> None:
    """Skip, with the reason, where a contender cannot run; the interpreter is no contender."""
    backend = {"naive": "reference", "foreach": "reference", "loop": "cuda" if DEVICE == "cuda" else "reference"}
    if contender == "triton" and DEVICE == "cpu":
        pytest.skip("Triton kernels need a GPU to be timed")
    verdict = _backends.explain(_backends.facts(op, torch.empty(0, device=DEVICE)))[backend.get(contender, contender)]
    if not verdict:
        pytest.skip(verdict.reason)


def tensors(shapes: Sequence[tuple[int, ...]]) -> tuple[list[Tensor], list[Tensor]]:
    """Directions and gates of all factors."""
    torch.manual_seed(0)
    directions = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in shapes]
    return directions, [torch.rand(shape[0], device=DEVICE, requires_grad=True) for shape in shapes]


def moved(tensors: Sequence[Tensor], times: int) -> int:
    return times * sum(x.numel() * x.element_size() for x in tensors)


@pytest.mark.parametrize("shapes", LISTS.values(), ids=LISTS)
@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.benchmark(group="gated_factors, forward")
def test_gated_factors(benchmark: Any, contender: str, shapes: list[tuple[int, ...]]) -> None:
    needs(contender, "gated_factor")
    directions, gates = tensors(shapes)
    function, count = factors_by(contender), len(directions)
    # What is wrong is not timed.
    torch.testing.assert_close(function(directions, gates), naive_factors(directions, gates))

    def call(inputs: Any) -> None:
        with torch.no_grad():
            function(inputs[:count], inputs[count:])

    rows.measure(benchmark, call, directions + gates, bytes_moved=moved(directions, 2) + moved(gates, 1))


@pytest.mark.parametrize("shapes", LISTS.values(), ids=LISTS)
@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.benchmark(group="gated_factors, forward and backward")
def test_gated_factors_training(benchmark: Any, contender: str, shapes: list[tuple[int, ...]]) -> None:
    needs(contender, "gated_factor")
    directions, gates = tensors(shapes)
    function, count = factors_by(contender), len(directions)
    upstream = [torch.randn_like(v) for v in directions]

    def call(inputs: Any) -> None:
        torch.autograd.grad(function(inputs[:count], inputs[count:]), list(inputs), upstream)

    rows.measure(benchmark, call, directions + gates, bytes_moved=moved(directions, 5) + moved(gates, 3))


@pytest.mark.parametrize("contender", ["naive", "foreach", *BACKENDS])
@pytest.mark.benchmark(group="funnel_penalty, ResNet-18 gates, forward and backward")
def test_funnel_penalty(benchmark: Any, contender: str) -> None:
    needs(contender, "funnel_penalty")
    gates, function = tensors(RESNET)[1], penalty_by(contender)
    torch.testing.assert_close(function(gates), naive_penalty(gates))

    def call(inputs: Any) -> None:
        torch.autograd.grad(function(list(inputs)), list(inputs))

    rows.measure(benchmark, call, gates, bytes_moved=moved(gates, 3))


@pytest.mark.parametrize("contender", ["loop", *BACKENDS])
@pytest.mark.benchmark(group="funnel_proximal_, ResNet-18 gates")
def test_funnel_proximal(benchmark: Any, contender: str) -> None:
    needs(contender, "funnel_proximal_")
    gates = [gate.detach() for gate in tensors(RESNET)[1]]
    loop = contender == "loop"
    backend = ("cuda" if DEVICE == "cuda" else "reference") if loop else contender

    def call(inputs: Any) -> None:
        for part in [[gate] for gate in inputs] if loop else [list(inputs)]:
            funnel_proximal_(part, 1e-6, 0.1, backend=backend)

    rows.measure(benchmark, call, gates, bytes_moved=moved(gates, 2))


@pytest.mark.parametrize("contender", ["naive", *BACKENDS])
@pytest.mark.benchmark(group="count_below, ResNet-18 gates")
def test_count_below(benchmark: Any, contender: str) -> None:
    needs(contender, "count_below")
    gates = [gate.detach() for gate in tensors(RESNET)[1]]

    def call(inputs: Any) -> None:
        if contender == "naive":
            torch.stack([(gate.abs() < 0.02).sum() for gate in inputs])
        else:
            count_below(list(inputs), 0.02, backend=contender)

    rows.measure(benchmark, call, gates, bytes_moved=moved(gates, 1))


@rows.of("gates")
@pytest.mark.benchmark(group="gates")
def test_family(benchmark: Any, case: Case) -> None:
    """The registry's rows, on every device."""
    rows.measured(benchmark, case)
