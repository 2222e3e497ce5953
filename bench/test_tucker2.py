"""Tucker-2 convolutions of ResNet-18, ResNet-50 and VGG-16 against the library, layer by layer.

    pytest bench/test_tucker2.py --benchmark-only

Contenders (fastrank.benchmarks.tucker2_contenders): the dense layer that was compressed, three library convolutions
with ranks as given and padded to multiples of 8, fastrank's kernels over weights packed before, torch.compile, and the
layer as users call it. "plain" is the convolution alone, "epilogue" with bias, residual (where maps allow) and ReLU.

On a GPU: bfloat16, channels_last, cudnn.benchmark; times inside a CUDA graph with cold inputs and weights, the same
warm, and eager wall time. On a CPU: float32, contiguous, wall time of a few layers. Contenders of a row take turns in
one process. What is wrong is not timed. Who cannot run a layer is left out, with the reason in extra_info, where also
the layer's floor is and how close to it everyone comes. The most important rows come first: time may run out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrank import _backends
from fastrank.benchmarks import Case, timing
from fastrank.benchmarks import tucker2_contenders as contenders
from fastrank.benchmarks.layers import FORWARD_BATCHES, OTHERS, RESNET18, TRAINED_BATCHES, Layer, floor_us, peaks
from fastrank.benchmarks.tucker2_contenders import Problem, Thunk

sys.path.insert(0, str(Path(__file__).parent))
import rows
import tucker2_warm

GPU = timing.DEVICE == "cuda"
DTYPE = torch.bfloat16 if GPU else torch.float32
FORMAT = torch.channels_last if GPU else torch.contiguous_format
GRAPH_US, MOST_COPIES = 4000.0, 512
LAYERS = {layer.name: layer for layer in (*RESNET18, *OTHERS)}
ON_A_CPU = ("64, 56x56", "NRMF conv4")
COMPILED = ("64, 56x56", "NRMF conv1", "NRMF conv4")
Builder = Callable[[Problem], Thunk]

if GPU:
    torch.backends.cudnn.benchmark = True


def layers(names: Sequence[str], batches: Sequence[int]) -> Any:
    """Every layer at every batch, batch by batch, as parameters of a test."""
    if not GPU:
        names, batches = [name for name in names if name in ON_A_CPU], sorted({min(n, 8) for n in batches})
    found = [pytest.param(LAYERS[name], n, id=f"{name}, N={n}") for n in batches for name in names]
    return pytest.mark.parametrize(("layer", "batch"), found)


def make(layer: Layer, batch: int, epilogue: bool) -> Problem:
    return contenders.problem(layer, batch, epilogue=epilogue, dtype=DTYPE, device=timing.DEVICE, memory_format=FORMAT)


def facts(layer: Layer, batch: int, call: str, p: Problem) -> dict[str, Any]:
    """What is known of a row before anything is timed."""
    takes, source = contenders.auto_takes(p, call)
    return {
        "op": "tucker2_conv2d",
        "layer": layer.name,
        "batch": batch,
        "ranks": list(layer.ranks),
        "counts": layer.counts,
        "dtype": str(DTYPE).removeprefix("torch."),
        "layout": "channels_last" if FORMAT is torch.channels_last else "contiguous",
        "macs": batch * layer.macs,
        "dense_macs": batch * layer.dense_macs,
        "auto_takes": takes,
        "auto_by": source,
        "environment": timing.environment(),
    }


def failures() -> tuple[type[Exception], ...]:
    """What a contender may raise without taking the row with it."""
    if _backends.why_no_triton():
        return (RuntimeError,)
    from triton.errors import TritonError

    return RuntimeError, TritonError


def wrong(
    builders: Mapping[str, Builder], p: Problem, wanted: Sequence[Tensor], library: Sequence[str], terms: int = 1
) -> dict[str, str]:
    """The contenders that must not be timed, and why.

    Right is at most twice the largest error of the library's own, or twice what is lost where a result is rounded, and
    where `terms` products are added up in float32 in any order.
    """
    found: dict[str, Sequence[Tensor]] = {}
    bad: dict[str, str] = {}
    for name, build in builders.items():
        try:
            outs = build(p)()
            timing.synchronize()
        except failures() as error:
            bad[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        else:
            found[name] = [outs] if isinstance(outs, Tensor) else outs
    accumulated = torch.finfo(torch.float32).eps * terms**0.5
    for index, right in enumerate(wanted):
        errors = {name: float((outs[index] - right).abs().max()) for name, outs in found.items()}
        rounding = max(torch.finfo(DTYPE).eps, accumulated) * float(right.abs().max())
        limit = 2 * max(rounding, *(errors[name] for name in library if name in errors))
        for name, error in errors.items():
            if not error <= limit:
                bad[name] = f"output {index} is off by {error:.2e}, at most {limit:.2e} is right"
    return bad


def timed(builders: Mapping[str, Builder], p: Problem) -> dict[str, Any]:
    """Quantiles of every contender by every way of timing that this machine has."""
    first = {name: build(p) for name, build in builders.items()}
    eager = timing.in_turns(first, 10 if GPU else 7)
    found = {"eager": {name: timing.Quantiles.of(values).as_dict() for name, values in eager.items()}}
    if not GPU:
        return found
    count = timing.copies(sum(t.numel() * t.element_size() for t in p.tensors()), MOST_COPIES)
    others = [p.copied() for _ in range(count - 1)]
    cold = {name: [first[name], *map(build, others)] for name, build in builders.items()}
    warm = {name: [thunk] for name, thunk in first.items()}
    for way, thunks, repeats in (("cold_graph", cold, 12), ("warm_graph", warm, 5)):
        quantiles = timing.long_graph_times(thunks, least_us=GRAPH_US, repeats=repeats)
        found[way] = {name: each.as_dict() for name, each in quantiles.items()}
    return found


def best_times(found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The primary figures: cold graphs where there are any, else wall time."""
    times: dict[str, dict[str, float]] = found.get("cold_graph", found["eager"])
    return times


def compare(layer: Layer, batch: int, epilogue: bool, builders: Mapping[str, Builder]) -> dict[str, Any]:
    """Check and time the forward pass."""
    p = make(layer, batch, epilogue)
    with torch.no_grad():
        wanted = reference_output(p)
        bad = wrong(builders, p, [wanted], ["dense", "sequence"])
        del wanted
        found = timed({name: build for name, build in builders.items() if name not in bad}, p)
    rates = peaks()
    if rates is not None:
        floor = floor_us(layer, batch, DTYPE.itemsize, p.residual is not None, rates)
        share = {name: floor / each["p50_us"] for name, each in best_times(found).items()}
        found |= {"floor_us": floor, "roofline": share}
    return {**found, "wrong": bad, "bytes": DTYPE.itemsize * layer.elements(batch, p.residual is not None)}


def reference_output(p: Problem) -> Tensor:
    wide = p.wide()
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
        return contenders.sequence(wide)()


def run_forward(benchmark: Any, layer: Layer, batch: int, more: Mapping[str, Builder], only: Sequence[str]) -> None:
    p = make(layer, batch, False)
    left_out = contenders.refusals(p, "inference")
    builders = {name: contenders.CONTENDERS[name] for name in only if name not in left_out} | dict(more)
    benchmark.extra_info.update(facts(layer, batch, "inference", p), left_out=left_out)
    for way, epilogue in (("plain", False), ("epilogue", True)):
        benchmark.extra_info[way] = compare(layer, batch, epilogue, builders)
    # One number for pytest-benchmark's own table; those that count are in extra_info.
    with torch.no_grad():
        benchmark.pedantic(contenders.auto(p), rounds=3)
    # Told when the others are measured.
    bad = {way: benchmark.extra_info[way]["wrong"] for way in ("plain", "epilogue")}
    assert not any(bad.values()), bad


@pytest.fixture(scope="module")
def warm_cache() -> None:
    """Triton's kernels, compiled by all cores before the clock matters."""
    if GPU and "triton" not in contenders.refusals(make(RESNET18[0], 1, False), "inference"):
        tucker2_warm.warm()


@pytest.fixture(autouse=True)
def room(warm_cache: None) -> Any:
    """Memory of graphs goes back before the next row."""
    yield
    if GPU:
        torch.cuda.empty_cache()


@layers([layer.name for layer in RESNET18], FORWARD_BATCHES)
@pytest.mark.benchmark(group="tucker2 forward")
def test_forward(benchmark: Any, layer: Layer, batch: int) -> None:
    run_forward(benchmark, layer, batch, {}, list(contenders.CONTENDERS))


@pytest.mark.benchmark(group="tucker2 host")
def test_host(benchmark: Any) -> None:
    """What the host spends on an eager call, and that no call of fastrank waits for the device."""
    if not GPU:
        pytest.skip("a CPU computes while its host calls")
    layer = LAYERS["64, 56x56"]
    p = make(layer, 1, True)
    left_out = contenders.refusals(p, "inference")
    calls = {name: build(p) for name, build in contenders.CONTENDERS.items() if name not in left_out}
    with torch.no_grad():
        for name, call in calls.items():
            call()
            if name in (*contenders.KERNELS, "auto"):
                torch.cuda.set_sync_debug_mode("error")
                try:
                    call()
                finally:
                    torch.cuda.set_sync_debug_mode("default")
        found = timing.host_times(calls)
        benchmark.pedantic(calls["auto"], rounds=3)
    host = {name: each.as_dict() for name, each in found.items()}
    benchmark.extra_info.update(facts(layer, 1, "inference", p), left_out=left_out, host=host)


@layers([layer.name for layer in RESNET18], TRAINED_BATCHES)
@pytest.mark.benchmark(group="tucker2 forward and backward")
def test_training(benchmark: Any, layer: Layer, batch: int) -> None:
    p = make(layer, batch, False)
    left_out = contenders.refusals(p, "backward")
    names = [name for name in ("sequence", "cuda", "triton", "auto") if name not in left_out]
    benchmark.extra_info.update(facts(layer, batch, "backward", p), left_out=left_out)
    builders = {name: contenders.training(name) for name in names}
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
        wanted = contenders.training("sequence")(p.wide())()  # of the same gradient of the output
    bad = wrong(builders, p, wanted, ["sequence"], batch * layer.out_size**2)
    del wanted
    builders = {name: build for name, build in builders.items() if name not in bad}
    saved = {}
    for name in builders:
        leaves, forward = contenders.trained(name, p)
        saved[name] = contenders.saved_bytes(forward, leaves[1:])
    benchmark.extra_info.update(plain={**timed(builders, p), "wrong": bad}, saved_bytes=saved)
    benchmark.pedantic(builders["sequence"](p), rounds=3)
    assert not bad, bad


@layers(COMPILED, (1, 32))
@pytest.mark.benchmark(group="tucker2 compiled")
def test_compiled(benchmark: Any, layer: Layer, batch: int) -> None:
    """The layer against what torch.compile finds for three convolutions after trying everything."""
    if not GPU:
        pytest.skip("torch.compile tunes its kernels on a GPU")
    run_forward(
        benchmark, layer, batch, {"compiled": contenders.compiled()}, ["dense", "sequence", "cuda", "triton", "auto"]
    )


@layers([layer.name for layer in OTHERS], FORWARD_BATCHES)
@pytest.mark.benchmark(group="tucker2 forward")
def test_forward_of_other_networks(benchmark: Any, layer: Layer, batch: int) -> None:
    run_forward(benchmark, layer, batch, {}, list(contenders.CONTENDERS))


@rows.of("tucker2")
@pytest.mark.benchmark(group="tucker2")
def test_family(benchmark: Any, case: Case) -> None:
    """The registry's rows, on every device."""
    rows.measured(benchmark, case)
