"""Families measured: all of a family is checked first, then its contenders are timed in turns, row by row."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from fastrank.benchmarks import timing
from fastrank.benchmarks._check import Prepared, prepare
from fastrank.benchmarks._peers import tensorly_kept
from fastrank.benchmarks._registry import Case, Work, cases
from fastrank.benchmarks.layers import peaks

GRAPH_US, MOST_COPIES, GRAPH_ROUNDS = 4000.0, 512, 12
Say = Callable[[str], None]


def run(
    families: Sequence[str],
    compare: Sequence[str] | None = None,
    *,
    seconds: float = 1.0,
    device: str | None = None,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Measure families and give a JSON-able result.

    compare: peers by the keys of `PEERS`; all for None. seconds: about so long every row is measured. say: gets a line
    ahead of every row. The result: "environment", "ok", and "families": name -> {"green", "wrong", "rows"}; a row is
    what `measured` returns. Of a family with a wrong contender of fastrank nothing is timed. The library's convolutions
    are the best that cuDNN finds.
    """
    cudnn: Any = torch.backends.cudnn
    before, cudnn.benchmark = cudnn.benchmark, True
    try:
        found = {name: family(cases(name, device), compare, seconds=seconds, say=say) for name in families}
        environment = timing.environment()
    finally:
        cudnn.benchmark = before
    return {
        "environment": environment,
        "seconds_a_row": seconds,
        "compare": None if compare is None else list(compare),
        "families": found,
        "ok": all(each["green"] for each in found.values()),
    }


@tensorly_kept()
def family(
    rows: Iterable[Case], compare: Sequence[str] | None = None, *, seconds: float = 1.0, say: Say = lambda line: None
) -> dict[str, Any]:
    """Check every row, and time them all if fastrank is right in each: {"green", "wrong", "rows"}."""
    ready = []
    for case in rows:
        say(f"checking {case}")
        ready.append(prepare(case, compare))
    wrong = {f"{each.case}: {name}": reason for each in ready for name, reason in each.red.items()}
    found = []
    for each in ready:
        if not wrong:
            say(f"timing {each.case}")
        found.append(measured(each, seconds, why_not=next(iter(f"{k}: {v}" for k, v in wrong.items()), "")))
    return {"green": not wrong, "wrong": wrong, "rows": found}


def measured(ready: Prepared, seconds: float, why_not: str = "") -> dict[str, Any]:
    """A JSON-able row: what the case is, and of each contender its error, times, and ratios to the baselines.

    ratios: baseline -> contender -> how many times as long the baseline takes, the median over rounds. way:
    "cold_graph" (a CUDA graph over rotating inputs) or "eager" (wall time). left_out: who was not timed, and why.
    why_not: nothing is timed, for this reason: fastrank is wrong somewhere in the family, and "green" is false.
    """
    case = ready.case
    work = case.work(ready.inputs) if case.work else None
    row: dict[str, Any] = {
        "family": case.family,
        "operation": case.operation,
        "case": case.name,
        "sizes": dict(case.sizes),
        "dtype": str(case.dtype).removeprefix("torch."),
        "device": case.device,
        "threads": torch.get_num_threads(),
        "baselines": list(case.baselines),
        "fewer_macs": work.fewer_macs if work else None,
        "errors": ready.errors,
        "left_out": {**ready.left_out, **{name: f"wrong: {reason}" for name, reason in ready.wrong.items()}},
        "green": not why_not,
        "not_timed": why_not or ("" if ready.calls else "nobody is left"),
    }
    if row["not_timed"]:
        return row | {"way": None, "times": {}, "ratios": {}, "floor_us": None, "roofline": {}}
    with torch.set_grad_enabled(case.grad):
        way, us = timed(ready, seconds)
    us = {name: [each / ready.chosen[name].part for each in values] for name, values in us.items()}
    times = {name: timing.Quantiles.of(values).as_dict() for name, values in us.items()}
    floor = floor_us(work, case.device) if work else None
    return row | {
        "way": way,
        "times": times,
        "ratios": ratios(us, case.baselines),
        "floor_us": floor,
        "roofline": {} if floor is None else {name: floor / each["p50_us"] for name, each in times.items()},
    }


def timed(ready: Prepared, seconds: float) -> tuple[str, dict[str, list[float]]]:
    """(the way, microseconds round by round): cold CUDA graphs where inputs can be copied, else wall time."""
    case = ready.case
    if case.device != "cuda" or case.copied is None or case.tensors is None:
        before = None if case.before is None else lambda: case.before(ready.inputs)  # type: ignore[misc]
        return "eager", timing.for_seconds(ready.calls, seconds, before=before)
    size = sum(t.numel() * t.element_size() for t in case.tensors(ready.inputs))
    others = [case.copied(ready.inputs) for _ in range(timing.copies(size, MOST_COPIES) - 1)]
    thunks = {name: [call, *map(ready.chosen[name].build, others)] for name, call in ready.calls.items()}
    return "cold_graph", timing.long_graphs(thunks, least_us=GRAPH_US, repeats=GRAPH_ROUNDS)


def ratios(us: Mapping[str, Sequence[float]], baselines: Sequence[str]) -> dict[str, dict[str, float]]:
    """Baseline -> contender -> the median over rounds of how many times as long the baseline took."""
    return {
        base: {name: timing.ratio(us[base], values) for name, values in us.items()} for base in baselines if base in us
    }


def floor_us(work: Work, device: str) -> float | None:
    """What nothing is faster than on the GPU that is there; None on a CPU, or where its rates are not known."""
    rates = peaks() if device == "cuda" else None
    return None if rates is None else 1e6 * max(work.flops / rates[0], work.bytes / rates[1])


def geometric_mean(rows: Iterable[Mapping[str, Any]], contender: str, baseline: str) -> float | None:
    """Of how many times as fast as a baseline a contender is, over the rows that timed both; None where none did."""
    found = [row["ratios"].get(baseline, {}).get(contender) for row in rows]
    values = [each for each in found if each is not None]
    return statistics.geometric_mean(values) if values else None
