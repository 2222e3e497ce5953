"""CP convolutions (pointwise, vertical, horizontal, sum over R) against the library, layer by layer.

    pytest bench/test_depthwise.py --benchmark-only

Contenders: the dense layer that was compressed, the chain of four operations, a rank after the other ("depthwise"), the
fused Triton kernel over weights that are packed before, and what torch.compile makes of the chain; with bias and ReLU.
Then the same, but dense and compiled, forward and backward. On a GPU: bfloat16, channels_last, cudnn.benchmark, times
inside a CUDA graph with cold inputs. On a CPU: float32, contiguous, wall time of fewer layers and contenders.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrank import _backends, reference
from fastrank.ops import _conv, cp_conv2d

sys.path.insert(0, str(Path(__file__).parent))
import timing

GPU = timing.DEVICE == "cuda"
DTYPE = torch.bfloat16 if GPU else torch.float32
FORMAT = torch.channels_last if GPU else torch.contiguous_format
GEOMETRY = (1, 1), (1, 1), (1, 1)
OP = "cp_conv2d"
# (channels in and out, size of the map): goal 6 is the geometric mean over these and R.
LAYERS = [(64, 56), (128, 28), (256, 14)]
RANKS = [1, 2, 4]
BATCH = 32 if GPU else 1
ROWS = [(*layer, rank) for rank in RANKS for layer in LAYERS] if GPU else [(64, 56, 1), (128, 28, 2)]
rows = pytest.mark.parametrize(("channels", "size", "rank"), ROWS)
Call = Callable[[Sequence[Tensor]], Any]

if GPU:
    torch.backends.cudnn.benchmark = True


def made(channels: int, size: int, rank: int) -> list[Tensor]:
    """x, pointwise, vertical, horizontal and bias, of values that keep their variance through the factors."""
    torch.manual_seed(0)
    drawn = [
        torch.randn(BATCH, channels, size, size),
        torch.randn(rank, channels, channels) / math.sqrt(channels),
        torch.randn(rank, channels, 3) / math.sqrt(9 * rank),
        torch.randn(rank, channels, 3),
        torch.randn(channels),
    ]
    x, *others = (each.to(timing.DEVICE, DTYPE) for each in drawn)
    return [x.contiguous(memory_format=FORMAT), *others]


def chain(x: Tensor, *factors: Tensor) -> Tensor:
    """What a network of plain layers runs."""
    return reference.conv.cp_conv2d(x, *factors, None, *GEOMETRY, "relu")


def by(backend: str) -> Call:
    """The operator as training calls it."""

    def call(tensors: Sequence[Tensor]) -> Tensor:
        return cp_conv2d(*tensors, padding=1, activation="relu", backend=backend)

    return call


def dense(tensors: Sequence[Tensor]) -> Call:
    """One library convolution of the merged kernel, merged before."""
    wide = [factor.float() for factor in tensors[1:4]]
    weight = reference.conv.cp_weight(*wide).to(DTYPE).contiguous(memory_format=FORMAT)
    return lambda tensors: torch.conv2d(tensors[0], weight, tensors[4], *GEOMETRY).relu_()


def triton(tensors: Sequence[Tensor]) -> Call:
    """The fused kernel, as inference calls it: its weights stay packed."""
    x, *factors, bias = tensors
    launch = _conv.KERNELS[OP]["triton"].prepare(x, factors, bias, GEOMETRY)

    def call(tensors: Sequence[Tensor]) -> Tensor:
        out = torch.empty_like(tensors[0])  # as many channels as x, and as many pixels
        launch(tensors[0], None, out, "relu")
        return out

    return call


def compiled(tensors: Sequence[Tensor]) -> Call:
    torch.compiler.reset()
    # Graphs are captured by the caller, for all contenders alike.
    fast = torch.compile(chain, mode="max-autotune-no-cudagraphs", dynamic=False, fullgraph=True)
    return lambda tensors: fast(*tensors)


def training(call: Call) -> Call:
    """Forward and backward: the gradients of x, the factors and the bias."""

    def both(tensors: Sequence[Tensor]) -> Any:
        leaves = [each.detach().requires_grad_() for each in tensors]
        out = call(leaves)
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    return both


def refusals(tensors: Sequence[Tensor], call: str) -> dict[str, str]:
    """The contenders that cannot run here, each with the reason."""
    work = _conv.work_of(OP, tensors[0], tensors[1:4], GEOMETRY, call)
    facts = _backends.facts(OP, tensors[0], work)
    verdict = _backends.explain(facts)["triton"]
    found = {} if verdict else {"triton": verdict.reason}
    if facts.interpreter and not found:
        found["triton"] = "Triton's interpreter is no contender"
    if not GPU:
        found["compiled"] = "torch.compile tunes its kernels on a GPU"
    return found


def check(calls: dict[str, Call], tensors: list[Tensor]) -> None:
    """Every contender against the chain in float64, or on a GPU in float32."""
    wide = [each.detach().to(torch.float32 if GPU else torch.float64) for each in tensors]
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
        wanted = by("sequence")(wide)
        size = float(by("sequence")([each.abs() for each in wide]).max())
    # Roundings of three maps, of merged weights and of the output, each of half an eps of sums over absolute values at
    # most, and of sums in float32, an eps a term.
    terms = tensors[0].shape[1] + 9 * tensors[1].shape[0] + 2
    limit = (4 * torch.finfo(DTYPE).eps + terms * torch.finfo(torch.float32).eps) * size
    for name, call in calls.items():
        error = float((call(tensors).detach() - wanted).abs().max())
        assert error <= limit, f"{name} is off by {error}, at most {limit} is right"


def timed(calls: dict[str, Call], tensors: list[Tensor]) -> dict[str, dict[str, Any]]:
    """Quantiles of every contender, by every way of timing that this machine has."""
    times = timing.in_turns({name: lambda call=call: call(tensors) for name, call in calls.items()}, 10)
    found = {"eager": {name: timing.Quantiles.of(each).as_dict() for name, each in times.items()}}
    if GPU:
        cold = timing.graph_times(calls, tensors, cold=True)
        found["cold_graph"] = {name: each.as_dict() for name, each in cold.items()}
    return found


def facts_of(channels: int, size: int, rank: int, left_out: dict[str, str]) -> dict[str, Any]:
    pixels = BATCH * size * size
    elements = 2 * pixels * channels + rank * channels * (channels + 6)
    return {
        "op": OP,
        "layer": f"{channels}, {size}x{size}",
        "rank": rank,
        "batch": BATCH,
        "macs": pixels * rank * channels * (channels + 9),
        "bytes": elements * DTYPE.itemsize,
        "left_out": left_out,
        "environment": timing.environment(),
    }


@rows
@pytest.mark.benchmark(group="cp forward")
def test_forward(benchmark: Any, channels: int, size: int, rank: int) -> None:
    tensors = made(channels, size, rank)
    left_out = refusals(tensors, "inference")
    built = {"dense": dense, "triton": triton, "compiled": compiled}
    with torch.no_grad():
        calls = {name: by(name) for name in ("sequence", "depthwise")}
        calls |= {name: build(tensors) for name, build in built.items() if name not in left_out}
        check(calls, tensors)
        benchmark.extra_info.update(**facts_of(channels, size, rank, left_out), **timed(calls, tensors))
        benchmark.pedantic(calls["sequence"], (tensors,), rounds=3)


@rows
@pytest.mark.benchmark(group="cp forward and backward")
def test_training(benchmark: Any, channels: int, size: int, rank: int) -> None:
    tensors = made(channels, size, rank)
    left_out = refusals(tensors, "backward")
    names = [name for name in ("sequence", "depthwise", "triton") if name not in left_out]
    check({name: by(name) for name in names}, tensors)
    calls = {name: training(by(name)) for name in names}
    benchmark.extra_info.update(**facts_of(channels, size, rank, left_out), **timed(calls, tensors))
    benchmark.pedantic(calls["sequence"], (tensors,), rounds=3)
