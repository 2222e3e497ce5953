"""CP convolutions (pointwise, vertical, horizontal, sum over R) against the library, layer by layer.

    pytest bench/test_cp.py --benchmark-only

Contenders: the dense layer that was compressed, the chain of four operations, a rank after the other ("depthwise"), the
fused Triton kernel over weights that are packed before, and what torch.compile makes of the chain; with bias and ReLU.
Then the same, but dense and compiled, forward and backward. On a GPU: bfloat16, channels_last, cudnn.benchmark, times
inside a CUDA graph with cold inputs. On a CPU: float32, contiguous, wall time of fewer layers and contenders.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrank.benchmarks import Case, _cp, prepare, timing
from fastrank.benchmarks.layers import CP_LAYERS, CP_RANKS

sys.path.insert(0, str(Path(__file__).parent))
import rows

GPU = timing.DEVICE == "cuda"
# The names that goals.py reads, by those of the registry.
NAMES = {"compile": "compiled"}
CALLS, REPEATS = 64, 20
# Channels in and out, size of the map, rank: goal 6 is the geometric mean over these.
ROWS = [(*layer, rank) for rank in CP_RANKS for layer in CP_LAYERS] if GPU else [(64, 56, 1), (128, 28, 2)]
layers = pytest.mark.parametrize(("channels", "size", "rank"), ROWS)

if GPU:
    torch.backends.cudnn.benchmark = True


def timed(ready: Any) -> dict[str, dict[str, Any]]:
    """Quantiles of every contender, by every way of timing that this machine has."""
    eager = timing.in_turns(ready.calls, 10)
    found = {"eager": {NAMES.get(name, name): timing.Quantiles.of(us).as_dict() for name, us in eager.items()}}
    if GPU:
        others = timing.rotation(ready.inputs)[1:]
        thunks = {name: [call, *map(ready.chosen[name].build, others)] for name, call in ready.calls.items()}
        cold = timing.replay_times(thunks, dict.fromkeys(thunks, CALLS), REPEATS)
        found["cold_graph"] = {NAMES.get(name, name): each.as_dict() for name, each in cold.items()}
    return found


def run(benchmark: Any, case: Case) -> None:
    """Check, time and keep a row as goals.py reads it."""
    ready = prepare(case, ("dense", "sequence", "compile"))
    work, sizes = case.work(ready.inputs), case.sizes
    with torch.set_grad_enabled(case.grad):
        benchmark.extra_info.update(
            op="cp_conv2d",
            layer=f"{sizes['channels']}, {sizes['size']}x{sizes['size']}",
            rank=sizes["rank"],
            batch=sizes["batch"],
            macs=work.macs,
            bytes=work.bytes,
            left_out=ready.left_out,
            environment=timing.environment(),
            **timed(ready),
        )
        benchmark.pedantic(ready.calls["sequence"], rounds=3)
    assert not ready.wrong, ready.wrong  # told when the others are measured


@layers
@pytest.mark.benchmark(group="cp forward")
def test_forward(benchmark: Any, channels: int, size: int, rank: int) -> None:
    run(benchmark, _cp.case(channels, size, rank, timing.DEVICE, compile_too=GPU))


@layers
@pytest.mark.benchmark(group="cp forward and backward")
def test_training(benchmark: Any, channels: int, size: int, rank: int) -> None:
    run(benchmark, _cp.training_case(channels, size, rank, timing.DEVICE))


@rows.of("cp")
@pytest.mark.benchmark(group="cp")
def test_family(benchmark: Any, case: Case) -> None:
    """The registry's rows, on every device."""
    rows.measured(benchmark, case)
