"""Gated factors and the funnel penalty against the chain of PyTorch calls a user would write, layer by layer.

    pytest bench/test_gates.py --benchmark-json=gates.json

On a CPU: wall time of the reference. On a GPU: every backend, and in extra_info the times inside a CUDA graph.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrank import _backends
from fastrank.ops import funnel_penalty, gated_factor

sys.path.insert(0, str(Path(__file__).parent))
import timing

DEVICE = timing.DEVICE
CONTENDERS = ["naive", "reference", "triton", "cuda"]

# (in, out) channels of ResNet-18's sixteen 3x3 convolutions; a full-rank Tucker-2 has three factors for each.
CONVS = [*[(64, 64)] * 4, (64, 128), *[(128, 128)] * 3, (128, 256), *[(256, 256)] * 3, (256, 512), *[(512, 512)] * 3]
SOME = CONVS if DEVICE == "cuda" else CONVS[:8]  # a CPU takes seconds over the wide layers
FACTORS = [shape for i, o in SOME for shape in ((i, i), (o, i, 3, 3), (o, o))]


def naive_factor(direction: Tensor, gate: Tensor) -> Tensor:
    shape = (-1, *(1,) * (direction.dim() - 1))
    return gate.view(shape) * direction / direction.flatten(1).norm(dim=1).view(shape)


def naive_penalty(gates: list[Tensor], c: float) -> Tensor:
    total = gates[0].new_zeros(())
    for gate in gates:
        total = total + (gate.abs() / (gate.abs() + c)).sum()
    return total


def factor_by(contender: str) -> Callable[[Tensor, Tensor], Tensor]:
    return naive_factor if contender == "naive" else lambda v, g: gated_factor(v, g, backend=contender)


def penalty_by(contender: str) -> Callable[[list[Tensor]], Tensor]:
    if contender == "naive":
        return lambda gates: naive_penalty(gates, 0.1)
    return lambda gates: funnel_penalty(gates, 0.1, backend=contender)


def needs(contender: str, op: str) -> None:
    """Skip, with the reason, where a contender cannot run; the interpreter is no contender."""
    if contender == "naive":
        return
    if contender == "triton" and DEVICE == "cpu":
        pytest.skip("Triton kernels need a GPU to be timed")
    verdict = _backends.explain(_backends.facts(op, torch.empty(0, device=DEVICE)))[contender]
    if not verdict:
        pytest.skip(verdict.reason)


def tensors() -> tuple[list[Tensor], list[Tensor]]:
    """Directions and gates of all factors."""
    torch.manual_seed(0)
    directions = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in FACTORS]
    return directions, [torch.rand(shape[0], device=DEVICE, requires_grad=True) for shape in FACTORS]


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.benchmark(group="gated_factor, ResNet-18 factors, forward")
def test_gated_factor(benchmark: Any, contender: str) -> None:
    needs(contender, "gated_factor")
    directions, gates = tensors()
    function, count = factor_by(contender), len(directions)
    for direction, gate in zip(directions, gates, strict=True):  # what is wrong is not timed
        torch.testing.assert_close(function(direction, gate), naive_factor(direction, gate))

    def call(inputs: Any) -> None:
        with torch.no_grad():
            for direction, gate in zip(inputs[:count], inputs[count:], strict=True):
                function(direction, gate)

    timing.measure(benchmark, call, directions + gates, bytes_moved=2 * 4 * sum(v.numel() for v in directions))


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.benchmark(group="gated_factor, ResNet-18 factors, forward and backward")
def test_gated_factor_training(benchmark: Any, contender: str) -> None:
    needs(contender, "gated_factor")
    directions, gates = tensors()
    function, count = factor_by(contender), len(directions)
    upstream = [torch.randn_like(v) for v in directions]

    def call(inputs: Any) -> None:
        out = [function(v, g) for v, g in zip(inputs[:count], inputs[count:], strict=True)]
        torch.autograd.grad(out, list(inputs), upstream)

    timing.measure(benchmark, call, directions + gates, bytes_moved=5 * 4 * sum(v.numel() for v in directions))


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.benchmark(group="funnel_penalty, ResNet-18 gates, forward and backward")
def test_funnel_penalty(benchmark: Any, contender: str) -> None:
    needs(contender, "funnel_penalty")
    gates, function = tensors()[1], penalty_by(contender)
    torch.testing.assert_close(function(gates), naive_penalty(gates, 0.1))

    def call(inputs: Any) -> None:
        torch.autograd.grad(function(list(inputs)), list(inputs))

    timing.measure(benchmark, call, gates, bytes_moved=3 * 4 * sum(g.numel() for g in gates))
