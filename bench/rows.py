"""What pytest-benchmark's rows share: the registry's cases, figures of a GPU beside its own, results from its JSON."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrank import benchmarks
from fastrank.benchmarks import timing
from fastrank.benchmarks.timing import Call

SECONDS = float(os.environ.get("FASTRANK_BENCH_ROW_SECONDS", "1.5"))


def of(family: str) -> Any:
    """The registry's rows of a family as parameters of a test."""
    return pytest.mark.parametrize("case", benchmarks.cases(family), ids=str)


# Family -> what of fastrank is wrong in it, as far as it was checked.
RED: dict[str, dict[str, str]] = {}


@cache
def checked(family: str) -> dict[str, benchmarks.Prepared]:
    """Row -> its checked contenders, of a whole family."""
    return {str(case): check(case) for case in benchmarks.cases(family)}


def check(case: benchmarks.Case) -> benchmarks.Prepared:
    """The checked contenders of a row; what is wrong goes into `RED`."""
    ready = benchmarks.prepare(case)
    RED.setdefault(case.family, {}).update({f"{case}: {name}": why for name, why in ready.red.items()})
    return ready


def measured(benchmark: Any, case: benchmarks.Case) -> None:
    """Time a row and keep it as extra_info["row"]; fails, and times nothing, where its family is wrong somewhere.

    On a CPU the whole family is checked first; on a GPU, whose time may run out, row by row.
    """
    ready = checked(case.family)[str(case)] if timing.DEVICE == "cpu" else check(case)
    wrong = RED[case.family]
    row = benchmarks.measured(ready, SECONDS, next((f"{what}: {why}" for what, why in wrong.items()), ""))
    benchmark.extra_info.update(row=row, environment=timing.environment())
    # One number for pytest-benchmark's own table; those that count are in extra_info.
    with torch.set_grad_enabled(case.grad):
        benchmark.pedantic(ready.calls["auto"] if row["times"] else int, rounds=3)
    assert not wrong, wrong


def cases(path: str, keep: str = "") -> list[dict[str, Any]]:
    """Name and extra_info of each case of pytest-benchmark's JSON but the registry's rows; written to the file `keep`,
    where one is named."""
    text = Path(path).read_text(encoding="utf-8")
    found = [{key: each[key] for key in ("name", "extra_info")} for each in json.loads(text)["benchmarks"]
             if "row" not in each["extra_info"]]  # fmt: skip
    if keep:
        Path(keep).write_text(json.dumps({"benchmarks": found}, indent=1) + "\n", encoding="utf-8")
    return found


def measure(benchmark: Any, call: Call, inputs: list[Tensor], **facts: Any) -> None:
    """pytest-benchmark's wall time of synchronised calls; on a GPU the cold and warm graph times beside it.

    `facts` (bytes moved, multiply-adds, ...) go into extra_info with the environment.
    """

    def run() -> None:
        call(inputs)
        timing.synchronize()

    benchmark.extra_info.update(environment=timing.environment(), **facts)
    if timing.DEVICE == "cuda":
        for cold in (True, False):
            found = timing.graph_times({"call": call}, inputs, cold=cold, calls=16)["call"]
            benchmark.extra_info["cold_graph" if cold else "warm_graph"] = found.as_dict()
    benchmark.pedantic(run, rounds=10, warmup_rounds=2)
