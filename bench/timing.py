"""Timing on a GPU: CUDA graphs over rotating inputs (cold L2), the same on one input (warm), and eager wall time.

A figure is a median with its p20 and p80 beside it, in microseconds a call. Contenders of one comparison are measured
in turns, so that a drift of the clocks meets all of them.
"""

from __future__ import annotations

import json
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Call = Callable[[Sequence[Tensor]], Any]
Thunk = Callable[[], Any]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Quantiles:
    """Microseconds a call over `samples` measurements."""

    p20_us: float
    p50_us: float
    p80_us: float
    samples: int

    @staticmethod
    def of(values_us: Sequence[float]) -> Quantiles:
        cuts = statistics.quantiles(values_us, n=10, method="inclusive")
        return Quantiles(cuts[1], statistics.median(values_us), cuts[7], len(values_us))

    def as_dict(self) -> dict[str, float | int]:
        return asdict(self)


@cache
def environment() -> dict[str, Any]:
    """The machine, the clocks as first found, and the versions that a figure depends on."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "triton": __import__("triton").__version__ if find_spec("triton") else None,
        "cpu": platform.processor() or platform.machine(),
        "cpu_threads": torch.get_num_threads(),
        "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
        "tf32_cudnn": torch.backends.cudnn.allow_tf32,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = properties.name
        found["l2_bytes"] = properties.L2_cache_size
        found["multiprocessors"] = properties.multi_processor_count
    if shutil.which("nvidia-smi"):
        fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
        shown = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        found["nvidia_smi"] = dict(zip(fields.split(","), shown.split(", "), strict=False))
    return found


def copies(size: int, at_most: int) -> int:
    """How many copies of `size` bytes it takes to push one out of the L2 cache before it comes round again."""
    cached = torch.cuda.get_device_properties(0).L2_cache_size if DEVICE == "cuda" else 0
    return min(max(2, 3 * cached // max(size, 1) + 1), at_most)


def rotation(tensors: Sequence[Tensor], at_most: int = 64) -> list[list[Tensor]]:
    """Copies of the inputs, as many as make them cold."""
    count = copies(sum(t.numel() * t.element_size() for t in tensors), at_most)
    return [[t.detach().clone().requires_grad_(t.requires_grad) for t in tensors] for _ in range(count)]


def capture(thunks: Sequence[Thunk], calls: int) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `calls` calls, of the thunks in turn."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for thunk in thunks:
            thunk()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            thunks[i % len(thunks)]()
    return graph


def replay_times(thunks: Mapping[str, Sequence[Thunk]], calls: Mapping[str, int], repeats: int) -> dict[str, Quantiles]:
    """Time of one call inside CUDA graphs of so many calls each, replayed in turns."""
    graphs = {name: capture(those, calls[name]) for name, those in thunks.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for graph in graphs.values():
        graph.replay()
    for _ in range(repeats):
        for name, graph in graphs.items():
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1e3 / calls[name])
    return {name: Quantiles.of(values) for name, values in times.items()}


def graph_times(
    contenders: dict[str, Call], tensors: Sequence[Tensor], *, cold: bool, calls: int = 64, repeats: int = 20
) -> dict[str, Quantiles]:
    """Time of one call inside a CUDA graph of `calls`: launches cost nothing, memory is cold or warm as asked."""
    inputs = rotation(tensors) if cold else [list(tensors)]
    thunks = {name: [partial(call, one) for one in inputs] for name, call in contenders.items()}
    return replay_times(thunks, dict.fromkeys(contenders, calls), repeats)


def long_graph_times(thunks: Mapping[str, Sequence[Thunk]], *, least_us: float, repeats: int) -> dict[str, Quantiles]:
    """Time of one call inside CUDA graphs of about `least_us` that make every call of a list equally often."""
    calls = {}
    for name, those in thunks.items():
        (first,) = in_turns({name: those[0]}, 1).values()  # with the launches, so an upper bound
        calls[name] = len(those) * max(1, round(least_us / (min(first) * len(those))))
    return replay_times(thunks, calls, repeats)


def host_times(calls: Mapping[str, Thunk], *, burst: int = 64, rounds: int = 15) -> dict[str, Quantiles]:
    """What a call costs the host, which does not wait for the device: of bursts that fit into the launch queue."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            synchronize()
            begin = time.perf_counter()
            for _ in range(burst):
                call()
            times[name].append((time.perf_counter() - begin) * 1e6 / burst)
    synchronize()
    return {name: Quantiles.of(values) for name, values in times.items()}


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def eager_times(contenders: dict[str, Call], tensors: Sequence[Tensor], *, repeats: int = 50) -> dict[str, Quantiles]:
    """Wall time of one synchronised call, the host's work included."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call(tensors)
    for _ in range(repeats):
        for name, call in contenders.items():
            torch.cuda.synchronize()
            begin = time.perf_counter()
            call(tensors)
            torch.cuda.synchronize()
            times[name].append((time.perf_counter() - begin) * 1e6)
    return {name: Quantiles.of(values) for name, values in times.items()}


def in_turns(
    calls: Mapping[str, Thunk], rounds: int, before: Callable[[], None] | None = None
) -> dict[str, list[float]]:
    """Microseconds of each call, `rounds` times each, one after the other; `before` runs ahead of every round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        if before is not None:
            before()
        for name, call in calls.items():
            synchronize()
            begin = time.perf_counter()
            call()
            synchronize()
            times[name].append((time.perf_counter() - begin) * 1e6)
    return times


def ratio(those: Sequence[float], these: Sequence[float]) -> float:
    """How many times as long those took, round by round: the median."""
    return statistics.median(a / b for a, b in zip(those, these, strict=True))


def cases(path: str, keep: str = "") -> list[dict[str, Any]]:
    """Name and extra_info of each case of pytest-benchmark's JSON; written to the file `keep`, where one is named."""
    text = Path(path).read_text(encoding="utf-8")
    found = [{key: each[key] for key in ("name", "extra_info")} for each in json.loads(text)["benchmarks"]]
    if keep:
        Path(keep).write_text(json.dumps({"benchmarks": found}, indent=1) + "\n", encoding="utf-8")
    return found


def measure(benchmark: Any, call: Call, inputs: list[Tensor], **facts: Any) -> None:
    """pytest-benchmark's wall time of synchronised calls; on a GPU the cold and warm graph times beside it.

    `facts` (bytes moved, multiply-adds, ...) go into extra_info with the environment.
    """

    def run() -> None:
        call(inputs)
        synchronize()

    benchmark.extra_info.update(environment=environment(), **facts)
    if DEVICE == "cuda":
        for cold in (True, False):
            found = graph_times({"call": call}, inputs, cold=cold, calls=16)["call"]
            benchmark.extra_info["cold_graph" if cold else "warm_graph"] = found.as_dict()
    benchmark.pedantic(run, rounds=10, warmup_rounds=2)
