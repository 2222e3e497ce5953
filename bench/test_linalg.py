"""Sub-gradients, projections and SVDs of all convolutions of a network, against the loops they replace.

    pytest bench/test_linalg.py --benchmark-only --benchmark-json=linalg.json
    python bench/test_linalg.py linalg.json bench/results/linalg-cpu.json    # docs/spectral.md's table

All contenders take the same weights in turn, in one process, and the weights move by 1e-3 of their norm between rounds,
as in training. What is wrong is not timed: errors against float64 stand beside the times. On a GPU the contenders that
can be captured are timed inside CUDA graphs too, and torch's SVD drivers and Gram matrices with torch.linalg.eigh join.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrank import _backends, ops, reference
from fastrank.decompose import unfold

sys.path.insert(0, str(Path(__file__).parent))
import timing

DEVICE = timing.DEVICE
DRIFT = 1e-3
# (O, I, kernel) of the convolutions.
RESNET18 = [
    (64, 3, 7),
    *[(64, 64, 3)] * 4,
    *[(128, 64, 3), (128, 64, 1), *[(128, 128, 3)] * 3],
    *[(256, 128, 3), (256, 128, 1), *[(256, 256, 3)] * 3],
    *[(512, 256, 3), (512, 256, 1), *[(512, 512, 3)] * 3],
]
RESNET50 = [(64, 3, 7)] + [
    shape
    for width, blocks, before in ((64, 3, 64), (128, 4, 256), (256, 6, 512), (512, 3, 1024))
    for block in range(blocks)
    for shape in (
        (width, before if block == 0 else 4 * width, 1),
        (width, width, 3),
        (4 * width, width, 1),
        *([(4 * width, before, 1)] if block == 0 else []),
    )
]
NETWORKS = {
    "ResNet-18 mode3+mode4": (RESNET18, ("mode3", "mode4")),
    "ResNet-18 channel+spatial": (RESNET18, ("channel", "spatial")),
    "ResNet-50 channel": (RESNET50, ("channel",)),
}
Solve = Callable[[list[Tensor]], list[Tensor]]


def matrices(network: str, spectrum: str) -> list[Tensor]:
    """Unfoldings of He-initialised kernels ("flat"), or of ones whose singular values fall about as i^-0.7."""
    torch.manual_seed(0)
    shapes, names = NETWORKS[network]
    found = []
    for o, i, k in shapes:
        weight = torch.randn(o, i, k, k) * math.sqrt(2 / (o * k * k))
        for name in names:
            matrix = unfold(weight, name)
            if spectrum == "decaying":
                n = min(matrix.shape)
                turn = torch.linalg.qr(torch.randn(n, n))[0] * torch.arange(1, n + 1).pow(-0.7)
                matrix = turn @ matrix if matrix.shape[0] == n else matrix @ turn.T
            found.append(matrix.contiguous().to(DEVICE))
    return found


def svd_loop(energy: float | None, *, tall: bool = False, driver: str | None = None) -> Solve:
    """What published codes do: one torch.linalg.svd after the other; `tall` hands LAPACK the faster orientation."""

    def solve(weights: list[Tensor]) -> list[Tensor]:
        out = []
        for w in weights:
            turned = tall and w.shape[0] < w.shape[1]
            u, s, vh = torch.linalg.svd(w.T if turned else w, full_matrices=False, driver=driver)
            k = reference.linalg.numerical_rank(s, (w.shape[0], w.shape[1]))
            k = k if energy is None else torch.minimum(k, reference.linalg.energy_rank(s, energy))
            x = (u * (torch.arange(len(s), device=w.device) < k)) @ vh
            out.append(x.T if turned else x)
        return out

    return solve


def batched_eigh(energy: float | None) -> Solve:
    """Gram matrices and torch.linalg.eigh, the matrices of one shape in a batch."""

    def solve(weights: list[Tensor]) -> list[Tensor]:
        out = list(weights)
        for shape in {tuple(w.shape) for w in weights}:
            places = [i for i, w in enumerate(weights) if tuple(w.shape) == shape]
            a = torch.stack([weights[i] if shape[0] <= shape[1] else weights[i].T for i in places])
            values, vectors = torch.linalg.eigh(a @ a.mT)
            part = values.flip(1).cumsum(1) < (1.0 if energy is None else energy) * values.sum(1, keepdim=True)
            kept = torch.cat([torch.ones_like(part[:, :1]), part[:, :-1]], 1).flip(1)
            f = torch.where(kept & (values > 0), values, torch.inf).rsqrt()
            for i, x in zip(places, (vectors * f[:, None]) @ vectors.mT @ a, strict=True):
                out[i] = x if shape[0] <= shape[1] else x.T
        return out

    return solve


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


def truth(weights: list[Tensor], energy: float | None) -> list[Tensor]:
    """In float64, with the rank that float32 entries have."""
    out = []
    for w in weights:
        u, s, vh = torch.linalg.svd(w.double().cpu(), full_matrices=False)
        k = int((s > torch.finfo(torch.float32).eps * max(w.shape) * s[0]).sum())
        k = k if energy is None else min(k, int(reference.linalg.energy_rank(s, energy)))
        out.append(u[:, :k] @ vh[:k])
    return out


def worst(found: list[Tensor], wanted: list[Tensor]) -> tuple[float, int]:
    """Largest relative error among the matrices, and how many have another rank (by ‖X‖_F²)."""
    pairs = [(x.double().cpu(), y) for x, y in zip(found, wanted, strict=True)]
    ranks = sum(round(float(x.square().sum())) != round(float(y.square().sum())) for x, y in pairs)
    return max(float((x - y).norm() / y.norm()) for x, y in pairs), ranks


CASES = [
    (network, spectrum, energy)
    for network in NETWORKS
    for spectrum in ("flat", "decaying")
    for energy in (None, 0.9)
    if DEVICE == "cpu" or network == "ResNet-50 channel" or (network, spectrum) == ("ResNet-18 mode3+mode4", "flat")
]


@pytest.mark.parametrize(("network", "spectrum", "energy"), CASES)
@pytest.mark.benchmark(group="nuclear_subgradient")
def test_subgradient(benchmark: Any, network: str, spectrum: str, energy: float | None) -> None:
    weights = matrices(network, spectrum)
    calls, state = contenders(energy)
    calls["warm"](weights)

    def move() -> None:
        for w in weights:
            noise = torch.randn_like(w)
            w += DRIFT * noise * (w.norm() / noise.norm())

    move()
    wanted = truth(weights, energy)
    errors = {name: worst(call(weights), wanted) for name, call in calls.items()}
    for name in {"gram", "cuda", "warm"} & set(calls):
        error, ranks = errors[name]
        assert ranks == 0, f"{name} finds another rank for {ranks} matrices"
        assert error <= 1e-4 if name != "warm" else error <= 2e-4, f"{name} is off by {error:.1e}"
    # On a GPU loops over SVDs take seconds, and nothing else runs there: a few rounds are enough.
    rounds = 5 if DEVICE == "cpu" else 3
    times = timing.in_turns({name: lambda c=call: c(weights) for name, call in calls.items()}, rounds, move)
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
    weights = matrices(network, "flat")
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


def main(path: str, keep: str = "") -> None:
    """Prints a Markdown table of a result, and writes what it takes of it to the file `keep`, where one is named."""
    cases = timing.cases(path, keep)
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
