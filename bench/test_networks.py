"""Images a second of ResNet-18: dense, compressed in several forms, and fused for inference.

    pytest bench/test_networks.py --benchmark-only

Random weights at the ranks of fastrank.benchmarks.layers; the speed does not depend on what they recognise. Contenders:
"dense" is torchvision's network, "sequence" has three plain convolutions for each compressed layer, "auto" what
`fastrank.compress` returns, "fused" what `fastrank.fuse_for_inference` makes of that, "fused dense" of the dense one;
"fused cuda" and "fused triton" have their backend forced. On a GPU: bfloat16, channels_last, 224², eager, compiled and
in CUDA graphs. On a CPU: one image of 64² in float32, eager. Beside every speed-up stands the ratio of multiply-adds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastrank
from fastrank import complexity
from fastrank.benchmarks import Case, timing
from fastrank.benchmarks import tucker2_contenders as contenders
from fastrank.benchmarks.layers import RESNET18
from fastrank.benchmarks.networks import forced, replaced, resnet18_plan, sequential

sys.path.insert(0, str(Path(__file__).parent))
import rows

GPU = timing.DEVICE == "cuda"
DTYPE = torch.bfloat16 if GPU else torch.float32
FORMAT = torch.channels_last if GPU else torch.contiguous_format
SIZE = 224 if GPU else 64
BATCHES = (32, 1, 128, 8) if GPU else (1,)
COMPILED = ("dense", "fused dense", "sequence", "fused")
GRAPH_US = 4000.0
Network = Callable[[Tensor], Tensor]

if GPU:
    torch.backends.cudnn.benchmark = True


@cache
def networks() -> tuple[dict[str, nn.Module], dict[str, str], float]:
    """(contender -> network, contender -> why it is left out, how many times fewer multiply-adds)."""
    torchvision = pytest.importorskip("torchvision", reason="the networks are torchvision's, which is not installed")
    torch.manual_seed(0)
    model = torchvision.models.resnet18().eval()
    small = fastrank.compress(model, resnet18_plan(model)).eval()
    macs = [complexity.count(each, (3, SIZE, SIZE)).macs for each in (model, small)]
    # Proved in float32, where the bounds are tight.
    example = torch.randn(1, 3, SIZE, SIZE)
    fused = fastrank.fuse_for_inference(small, example)
    found = {
        "dense": model,
        "fused dense": fastrank.fuse_for_inference(model, example),
        "sequence": replaced(small, sequential),
        "auto": small,
        "fused": fused,
    }
    layer = RESNET18[0]
    probe = contenders.problem(layer, 1, epilogue=True, dtype=DTYPE, device=timing.DEVICE, memory_format=FORMAT)
    refusals = contenders.refusals(probe, "forward")
    left_out = {name: refusals[name] for name in contenders.KERNELS if name in refusals}
    kernels = [name for name in contenders.KERNELS if name not in left_out]
    found |= {f"fused {name}": replaced(fused, partial(forced, name)) for name in kernels}
    ready = {name: each.to(timing.DEVICE, DTYPE, memory_format=FORMAT).eval() for name, each in found.items()}
    for each in ready.values():
        each.requires_grad_(False)
    return ready, {f"fused {name}": reason for name, reason in left_out.items()}, macs[0] / macs[1]


def wrong(calls: Mapping[str, Network], x: Tensor) -> dict[str, str]:
    """The networks that must not be timed, and why: compressed ones have to agree, and dense ones, another function."""
    outs: dict[str, Tensor] = {}
    bad: dict[str, str] = {}
    for name, call in calls.items():
        try:
            outs[name] = call(x).double()
        except RuntimeError as error:
            bad[name] = str(error).partition("\n")[0]
    for name, out in outs.items():
        right = outs["dense" if name.endswith("dense") else "sequence"]
        error = float((out - right).abs().max() / right.abs().max())
        # Some twenty layers, each of which rounds its maps elsewhere than the other network does.
        if not error <= 30 * torch.finfo(DTYPE).eps:
            bad[name] = f"it is off by {error:.1e}"
    return bad


def timed(calls: Mapping[str, Network], x: Tensor) -> dict[str, Any]:
    """Quantiles of eager wall time; on a GPU of CUDA graphs over two batches too."""
    thunks = {name: partial(call, x) for name, call in calls.items()}
    eager = timing.in_turns(thunks, 12)
    found = {"eager": {name: timing.Quantiles.of(values).as_dict() for name, values in eager.items()}}
    if GPU:
        other = torch.randn_like(x)
        both = {name: [partial(call, x), partial(call, other)] for name, call in calls.items()}
        quantiles = timing.long_graph_times(both, least_us=GRAPH_US, repeats=10)
        found["cold_graph"] = {name: each.as_dict() for name, each in quantiles.items()}
    return found


def run(benchmark: Any, batch: int, calls: Mapping[str, Network]) -> None:
    _, left_out, fewer = networks()
    torch.manual_seed(1)
    x = torch.randn(batch, 3, SIZE, SIZE, device=timing.DEVICE, dtype=DTYPE).contiguous(memory_format=FORMAT)
    with torch.no_grad():
        bad = wrong(calls, x)
        found = timed({name: call for name, call in calls.items() if name not in bad}, x)
        benchmark.pedantic(partial(calls["sequence"], x), rounds=3)
    images = {
        way: {name: batch / (each["p50_us"] * 1e-6) for name, each in times.items()} for way, times in found.items()
    }
    faster = {way: {name: rate / rates["dense"] for name, rate in rates.items()} for way, rates in images.items()}
    benchmark.extra_info.update(
        op="tucker2_conv2d",
        network="ResNet-18",
        batch=batch,
        size=SIZE,
        fewer_macs=fewer,
        images_a_second=images,
        faster_than_dense=faster,
        times=found,
        left_out=left_out,
        wrong=bad,
        environment=timing.environment(),
    )
    assert not bad, bad  # told when the others are measured


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.benchmark(group="ResNet-18")
def test_resnet18(benchmark: Any, batch: int) -> None:
    run(benchmark, batch, networks()[0])


@pytest.mark.parametrize("batch", BATCHES[:2])
@pytest.mark.benchmark(group="ResNet-18 compiled")
def test_resnet18_compiled(benchmark: Any, batch: int) -> None:
    if not GPU:
        pytest.skip("compiling takes a CPU minutes")
    torch.compiler.reset()
    ready = networks()[0]
    run(benchmark, batch, {name: torch.compile(ready[name], dynamic=False) for name in COMPILED})


@rows.of("networks")
@pytest.mark.benchmark(group="networks")
def test_family(benchmark: Any, case: Case) -> None:
    """The registry's rows, on every device."""
    rows.measured(benchmark, case)
