"""Timing: CUDA graphs over rotating inputs (cold L2), the same on one input (warm), wall time of calls and of the host.

A figure is a median with its p20 and p80 beside it, in microseconds a call. Contenders of one comparison are measured
in turns, every round in another order, so that a drift of the clocks meets all of them.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastrank.benchmarks._environment import environment as environment

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
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
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


def replays(thunks: Mapping[str, Sequence[Thunk]], calls: Mapping[str, int], repeats: int) -> dict[str, list[float]]:
    """Microseconds of one call, round by round, inside CUDA graphs of so many calls each, replayed in turns."""
    graphs = {name: capture(those, calls[name]) for name, those in thunks.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    for graph in graphs.values():
        graph.replay()
    for names in orders(list(graphs), repeats):
        for name in names:
            start.record()
            graphs[name].replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1e3 / calls[name])
    return times


def replay_times(thunks: Mapping[str, Sequence[Thunk]], calls: Mapping[str, int], repeats: int) -> dict[str, Quantiles]:
    """The same as quantiles."""
    return {name: Quantiles.of(values) for name, values in replays(thunks, calls, repeats).items()}


def graph_times(
    contenders: dict[str, Call], tensors: Sequence[Tensor], *, cold: bool, calls: int = 64, repeats: int = 20
) -> dict[str, Quantiles]:
    """Time of one call inside a CUDA graph of `calls`: launches cost nothing, memory is cold or warm as asked."""
    inputs = rotation(tensors) if cold else [list(tensors)]
    thunks = {name: [partial(call, one) for one in inputs] for name, call in contenders.items()}
    return replay_times(thunks, dict.fromkeys(contenders, calls), repeats)


def long_graphs(thunks: Mapping[str, Sequence[Thunk]], *, least_us: float, repeats: int) -> dict[str, list[float]]:
    """Microseconds of one call, round by round, inside CUDA graphs of about `least_us` that make every call of a list
    equally often."""
    calls = {}
    for name, those in thunks.items():
        (first,) = in_turns({name: those[0]}, 3).values()  # with the launches, so an upper bound
        calls[name] = len(those) * max(1, round(least_us / (min(first) * len(those))))
    return replays(thunks, calls, repeats)


def long_graph_times(thunks: Mapping[str, Sequence[Thunk]], *, least_us: float, repeats: int) -> dict[str, Quantiles]:
    """The same as quantiles."""
    return {name: Quantiles.of(us) for name, us in long_graphs(thunks, least_us=least_us, repeats=repeats).items()}


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


def orders(names: Sequence[str], rounds: int) -> Iterator[list[str]]:
    """The names once a round, every round in another order: who runs behind whom finds other things in the caches."""
    chance = random.Random(0)
    for _ in range(rounds):
        yield chance.sample(list(names), len(names))


def once(call: Thunk, repeats: int = 1) -> float:
    """Microseconds a call, over `repeats` calls, the host's work included and the device waited for."""
    synchronize()
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize()
    return (time.perf_counter() - begin) * 1e6 / repeats


def in_turns(
    calls: Mapping[str, Thunk], rounds: int, before: Callable[[], None] | None = None
) -> dict[str, list[float]]:
    """Microseconds of each call, `rounds` times each, in turns; `before` runs ahead of every round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for names in orders(list(calls), rounds):
        if before is not None:
            before()
        for name in names:
            times[name].append(once(calls[name]))
    return times


def for_seconds(
    calls: Mapping[str, Thunk],
    seconds: float,
    *,
    before: Callable[[], None] | None = None,
    least: int = 5,
    most: int = 60,
    least_us: float = 1000.0,
    led_us: float | None = None,
) -> dict[str, list[float]]:
    """Microseconds of each call, in turns for about so many seconds, between `least` and `most` rounds.

    A measurement of a round is of as many calls as take `least_us`, since clocks and machines are noisy below. Calls of
    less than `led_us` (None: as `least_us`) are led by one that does not count: what a long call of others left of
    caches, pages and threads would be all of a short one's time. `before` runs ahead of every round.
    """
    first: dict[str, float] = {}
    for name, call in calls.items():
        call()
        first[name] = once(call)
    repeats = {name: max(1, round(least_us / us)) for name, us in first.items()}
    round_s = sum(us * repeats[name] for name, us in first.items()) * 1e-6
    times: dict[str, list[float]] = {name: [] for name in calls}
    for names in orders(list(calls), min(max(round(seconds / max(round_s, 1e-9)), least), most)):
        if before is not None:
            before()
        for name in names:
            if first[name] < (least_us if led_us is None else led_us):
                calls[name]()
            times[name].append(once(calls[name], repeats[name]))
    return times


def ratio(those: Sequence[float], these: Sequence[float]) -> float:
    """How many times as long those took, round by round: the median."""
    return statistics.median(a / b for a, b in zip(those, these, strict=True))
