"""Sub-gradients, projections and SVDs of all convolutions of a network, against the loops they replace.

    pytest bench/test_linalg.py --full --benchmark-only --benchmark-json=linalg.json
    python bench/test_linalg.py linalg.json bench/results/linalg-cpu.json    # docs/spectral.md's table

All contenders take the same weights in turn, in one process, and the weights move by 1e-3 of their norm between rounds,
as in training. What is wrong is not timed: errors against float64 stand beside the times. On a GPU the contenders that
can be captured are timed inside CUDA graphs too, and torch's SVD drivers and Gram matrices with torch.linalg.eigh join.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrank import _backends, ops
from fastrank.benchmarks import Case, timing
from fastrank.benchmarks.linalg_contenders import (
    Solve,
    batched_eigh,
    drift,
    matrices,
    svd_loop,
    truth,
    worst,
)  # fmt: skip

sys.path.insert(0, str(Path(__file__).parent))
import rows

DEVICE = timing.DEVICE
def contenders(energy: float | None) -> tuple[dict[str, Solve], ops.SpectralState]:
    """Every way that runs here, the loop they are compared with first."""
    state = ops.SpectralState()
    found: dict[str, Solve] = {"svd loop": svd_loop(energy)}
    if DEVICE == "cuda":
        if energy is None:  # the drivers do not know of it: once is enough
            found |= {f"svd loop, {driver}": svd_loop(energy, driver=driver) for driver in ("gesvd", "gesvdj")}
            found["svd loop, gesvda, tall"] = svd_loop(energy, tall=True, driver="gesvda")
        found["Gram, batched eigh"] = batched_eigh(energy)
    else:
        found["svd loop, tall"] = svd_loop(energy, tall=True)
    facts = _backends.facts("nuclear_subgradient", torch.empty(0, device=DEVICE))
    for backend in ("gram", "cuda"):
        if _backends.explain(facts)[backend]:
            found[backend] = lambda w, b=backend: ops.nuclear_subgradient(w, energy=energy, backend=b)
    room: list[Tensor] = []

    def warm(weights: list[Tensor]) -> list[Tensor]:
        """As the regularisers call it: with a state, and into memory that is there already."""
        if not room:
            room.extend(torch.empty_like(w) for w in weights)
        return ops.nuclear_subgradient(weights, energy=energy, state=state, out=room)

    found["warm"] = warm
    if energy is None:
        # The host's reference of the polar method is no contender on a GPU.
        polar = "triton" if DEVICE == "cuda" else "reference"
        found["polar"] = lambda w: ops.nuclear_subgradient(w, method="polar", backend=polar)
    return found, state


CASES = [
    (network, spectrum, energy)
    for network in ("ResNet-18 mode3+mode4", "ResNet-18 channel+spatial", "ResNet-50 channel")
    for spectrum in ("flat", "decaying")
    for energy in (None, 0.9)
    if DEVICE == "cpu" or network == "ResNet-50 channel" or (network, spectrum) == ("ResNet-18 mode3+mode4", "flat")
]


@pytest.mark.parametrize(("network", "spectrum", "energy"), CASES)
@pytest.mark.benchmark(group="nuclear_subgradient")
def test_subgradient(benchmark: Any, network: str, spectrum: str, energy: float | None) -> None:
    weights = matrices(network, spectrum, DEVICE)
    calls, state = contenders(energy)
    calls["warm"](weights)

    drift(weights)
    wanted, _ = truth(weights, energy)
    errors = {name: worst(call(weights), wanted) for name, call in calls.items()}
    for name in {"gram", "cuda", "warm"} & set(calls):
        error, ranks = errors[name]
        assert ranks == 0, f"{name} finds another rank for {ranks} matrices"
        assert error <= 1e-4 if name != "warm" else error <= 2e-4, f"{name} is off by {error:.1e}"
    # On a GPU loops over SVDs take seconds, and nothing else runs there: a few rounds are enough.
    rounds = 5 if DEVICE == "cpu" else 3
    thunks = {name: lambda c=call: c(weights) for name, call in calls.items()}
    times = timing.in_turns(thunks, rounds, lambda: drift(weights))
    graphs: dict[str, Any] = {}
    if DEVICE == "cuda":
        capturable = {name: call for name, call in calls.items() if name in ("cuda", "polar", "warm")}
        graphs = {
            name: timing.graph_times({name: call}, weights, cold=True, calls=8)[name].as_dict()
            for name, call in capturable.items()
        }
    benchmark.extra_info.update(
        environment=timing.environment(),
        times={name: timing.Quantiles.of(values).as_dict() for name, values in times.items()},
        faster={name: timing.ratio(times["svd loop"], values) for name, values in times.items()},
        graphs=graphs,
        error={name: error for name, (error, _) in errors.items()},
        wrong_ranks={name: ranks for name, (_, ranks) in errors.items()},
        counts=state.counts,
    )
    benchmark.pedantic(lambda: calls["warm"](weights), rounds=3)


@pytest.mark.parametrize("network", ["ResNet-18 mode3+mode4", "ResNet-50 channel"])
@pytest.mark.benchmark(group="svd")
def test_svd(benchmark: Any, network: str) -> None:
    weights = matrices(network, "flat", DEVICE)
    calls = {
        "svd loop": lambda: [torch.linalg.svd(w, full_matrices=False) for w in weights],
        "svd loop, tall": lambda: [torch.linalg.svd(w.T, full_matrices=False) for w in weights],
        "gram": lambda: ops.svd(weights, backend="gram"),
    }
    if _backends.explain(_backends.facts("svd", weights[0]))["cuda"]:
        calls["cuda"] = lambda: ops.svd(weights, backend="cuda")
    error = 0.0
    for w, (u, s, vh) in zip(weights, calls["gram"](), strict=True):
        error = max(error, float(((u * s) @ vh - w).norm() / w.norm()))
    assert error <= 1e-5
    times = timing.in_turns(calls, 3)
    benchmark.extra_info.update(
        environment=timing.environment(),
        times={name: timing.Quantiles.of(values).as_dict() for name, values in times.items()},
        faster={name: timing.ratio(times["svd loop"], values) for name, values in times.items()},
        error={"gram": error},
    )
    benchmark.pedantic(calls["gram"], rounds=3)


@rows.of("linalg")
@pytest.mark.benchmark(group="linalg")
def test_family(benchmark: Any, case: Case) -> None:
    """The registry's rows, on every device."""
    rows.measured(benchmark, case)


def main(path: str, keep: str = "") -> None:
    """Prints a Markdown table of a result, and writes what it takes of it to the file `keep`, where one is named."""
    cases = rows.cases(path, keep)
    found = cases[0]["extra_info"]["environment"]
    print(f"Medians, in turns; torch {found['torch']}, threads: {found['cpu_threads']}.\n")
    print("| what | way | time | faster than the loop | error | other ranks |\n|---|---|---:|---:|---:|---:|")
    for each in cases:
        info, case = each["extra_info"], each["name"].removeprefix("test_")
        for name, times in info["times"].items():
            error = f"{info['error'][name]:.0e}" if name in info["error"] else ""
            ranks = str(info.get("wrong_ranks", {}).get(name, ""))
            row = [f"`{case}`", name, f"{times['p50_us'] / 1e3:.0f} ms", f"{info['faster'][name]:.1f}×", error, ranks]
            print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
