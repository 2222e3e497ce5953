"""Decompositions and ranks on a CPU against what one would call instead, measured in turns in one process (family
linalg).

    pytest bench/test_decompose.py --full --benchmark-only --benchmark-json=decompose.json
    python bench/test_decompose.py decompose.json bench/results/decompose-cpu.json    # docs/decompositions.md's table

TensorLy's parafac is called on a few filters a round, as is with NumPy, and its time multiplied up to the layer. The
SVD contenders are torch.linalg.svd of the same float32 matrices, without the products that make factors of them.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tensorly
import torch
from tensorly.decomposition import parafac
from torch import Tensor

from fastrank import decompose, ranks
from fastrank.benchmarks import timing
from fastrank.benchmarks.layers import RESNET18_CONVS
from fastrank.decompose.unfold import unfold_all

sys.path.insert(0, str(Path(__file__).parent))
import rows

if timing.DEVICE == "cuda":
    pytest.skip("figures of a CPU", allow_module_level=True)

SAMPLE = 4


class Contender(NamedTuple):
    """What else does the job; `part` of it is timed and multiplied up."""

    name: str
    call: Callable[[], Any]
    part: float = 1.0


@pytest.fixture(autouse=True)
def quiet_tensorly() -> Iterator[None]:
    """TensorLy warns that a rank above a mode's size gets fewer starting vectors from an SVD."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def he(*shape: int) -> Tensor:
    return torch.randn(shape) * math.sqrt(2 / (shape[0] * math.prod(shape[2:])))


def resnet18() -> list[Tensor]:
    torch.manual_seed(0)
    return [he(o, i, k, k) for o, i, k in RESNET18_CONVS]


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def compare(benchmark: Any, ours: Callable[[], Any], others: list[Contender], rounds: int = 7, **facts: Any) -> None:
    """Wall times in turns, in milliseconds; how many times as long the others took, by the medians."""
    calls = [Contender("fastrank", ours), *others]
    times = timing.in_turns({each.name: each.call for each in calls}, rounds)
    found = {each.name: timing.Quantiles.of([t / each.part for t in times[each.name]]) for each in calls}
    benchmark.extra_info.update(
        environment=timing.environment(),
        times={name: quantiles.as_dict() for name, quantiles in found.items()},
        times_as_long={each.name: found[each.name].p50_us / found["fastrank"].p50_us for each in others},
        **facts,
    )
    benchmark.pedantic(ours, rounds=rounds)


def by_parafac(filters: Tensor, rank: int, backend: str) -> list[float]:
    """Errors of one call a filter with TensorLy's defaults: SVD start, at most 100 sweeps."""
    with tensorly.backend_context(backend):
        given = [tensorly.tensor(each.double().numpy()) for each in filters]
        return [float(tensorly.norm(tensorly.cp_to_tensor(parafac(x, rank)) - x) / tensorly.norm(x)) for x in given]


@pytest.mark.parametrize("rank", [1, 2, 4, 8])
@pytest.mark.benchmark(group="cp_filters, 256×256×3×3")
def test_cp_filters(benchmark: Any, rank: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(256, 256, 3, 3)
    found = decompose.cp_filters(weight, rank)
    error = (found.weight() - weight).flatten(1).norm(dim=1) / weight.flatten(1).norm(dim=1)
    some = weight[: 16 * SAMPLE]
    theirs = sum(by_parafac(some, rank, "numpy")) / len(some)
    own = float(error[: len(some)].mean())
    assert own <= 1.001 * theirs, f"an error of {own:.5f}, parafac has {theirs:.5f}"
    sizes = math.prod(factor.norm(dim=2) for factor in found) / weight.flatten(1).norm(dim=1)
    assert float(sizes.max()) <= 5
    others = [
        Contender(f"parafac, {name}", lambda name=name: by_parafac(weight[:SAMPLE], rank, name), SAMPLE / len(weight))
        for name in ("numpy", "pytorch")
    ]
    compare(
        benchmark,
        lambda: decompose.cp_filters(weight, rank),
        others,
        error=own,
        error_of_parafac=theirs,
        largest_term=float(sizes.max()),
        filters_compared=len(some),
    )


@pytest.mark.benchmark(group="vbmf_rank, 512×4608")
def test_vbmf_rank(benchmark: Any) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(512, 4608) + 0.3 * torch.randn(512, 100) @ torch.randn(100, 4608)
    assert ranks.vbmf_rank(matrix) == 100
    others = [Contender("svdvals alone", lambda: torch.linalg.svdvals(matrix))]
    compare(benchmark, lambda: ranks.vbmf_rank(matrix), others)


@pytest.mark.benchmark(group="tucker2, ResNet-18's convolutions at half ranks")
def test_tucker2(benchmark: Any) -> None:
    weights = resnet18()
    halves = [(max(1, w.shape[1] // 2), w.shape[0] // 2) for w in weights]
    for weight, pair in zip(weights, halves, strict=True):
        tails = 0.0
        for name, rank in zip(("mode3", "mode4"), pair, strict=True):
            tails += float(torch.linalg.svdvals(decompose.unfold(weight, name).double())[rank:].square().sum())
        left = float((decompose.tucker2(weight, pair).weight() - weight).double().square().sum())
        assert left <= tails * (1 + 1e-5), f"an error of {left:.3e}, the unfoldings lose {tails:.3e}"
    unfolded = [decompose.unfold(weight, name) for weight in weights for name in ("mode3", "mode4")]
    others = [Contender("svd", lambda: [torch.linalg.svd(m, full_matrices=False) for m in unfolded])]
    compare(benchmark, lambda: list(map(decompose.tucker2, weights, halves)), others, rounds=5)


@pytest.mark.parametrize("scheme", ["channel", "spatial", "decoupled"])
@pytest.mark.benchmark(group="two layers by an SVD, ResNet-18's convolutions at half ranks")
def test_svd(benchmark: Any, scheme: str) -> None:
    weights = resnet18()
    function = {
        "channel": decompose.channel_svd,
        "spatial": decompose.spatial_svd,
        "decoupled": decompose.decoupled_svd,
    }[scheme]
    matrices = [unfold_all(weight, scheme) for weight in weights]
    halves = [max(1, min(each[0].shape) // 2) for each in matrices]
    equation = {"channel": "riyx,oruv->oiyx", "spatial": "riyu,orvx->oiyx", "decoupled": "roi,royx->oiyx"}[scheme]
    for weight, rank, each in zip(weights, halves, matrices, strict=True):
        merged = torch.einsum(equation, *function(weight, rank))
        spectra = torch.linalg.svdvals(torch.stack(each).double())
        tail = float(spectra[..., rank:].square().sum() / spectra.square().sum()) ** 0.5
        error = relative(merged, weight)
        assert abs(error - tail) <= 1e-5, f"an error of {error:.6f}, the tail is {tail:.6f}"
    others = [Contender("svd", lambda: [torch.linalg.svd(m, full_matrices=False) for each in matrices for m in each])]
    compare(benchmark, lambda: list(map(function, weights, halves)), others, rounds=5)


@pytest.mark.parametrize("algorithm", ["als", "greedy"])
@pytest.mark.parametrize(("channels", "rank"), [(128, 128), (512, 512)])
@pytest.mark.benchmark(group="cp_layer")
def test_cp_layer(benchmark: Any, channels: int, rank: int, algorithm: str) -> None:
    torch.manual_seed(0)
    weight = he(channels, channels, 3, 3)
    error = relative(decompose.cp_layer(weight, rank, algorithm=algorithm).weight(), weight)
    # Axis-parallel slices of the same rank, the start of one and the least that the other reaches.
    slices = torch.linalg.svdvals(weight.flatten(2).permute(2, 0, 1)).flatten().sort(descending=True).values
    start = float(slices[rank:].square().sum() / slices.square().sum()) ** 0.5
    assert error <= start, f"an error of {error:.5f}, slices leave {start:.5f}"
    others, theirs = [], 0.0
    if channels == 128 and algorithm == "als":
        given = weight.flatten(2).double().numpy()
        cp = parafac(given, rank, init="random", random_state=0)
        theirs = relative(torch.from_numpy(tensorly.cp_to_tensor(cp)), weight.flatten(2))
        assert error <= 1.005 * theirs, f"an error of {error:.5f}, parafac has {theirs:.5f}"
        others = [Contender("parafac, numpy", lambda: parafac(given, rank, init="random", random_state=0))]
    compare(
        benchmark,
        lambda: decompose.cp_layer(weight, rank, algorithm=algorithm),
        others,
        rounds=5 if channels == 128 else 3,
        error=error,
        error_of_slices=start,
        **({"error_of_parafac": theirs} if others else {}),
    )


def main(path: str, keep: str = "") -> None:
    """Prints a Markdown table of a result, and writes what it takes of it to the file `keep`, where one is named."""
    cases = rows.cases(path, keep)
    found = cases[0]["extra_info"]["environment"]
    print(f"Medians, in turns; torch {found['torch']}, threads: {found['cpu_threads']}.\n")
    print("| what | fastrank | instead | takes | ratio | error | its error |\n|---|---:|---|---:|---:|---:|---:|")
    for each in cases:
        info, case = each["extra_info"], each["name"].removeprefix("test_")
        first = [f"`{case}`", f"{info['times']['fastrank']['p50_us'] / 1e3:.1f} ms"]
        errors = [f"{info[key]:.4f}" if key in info else "" for key in ("error", "error_of_parafac")]
        for name, times in (info["times_as_long"] or {"": 0.0}).items():
            other = [name, f"{info['times'][name]['p50_us'] / 1e3:.0f} ms", f"{times:.1f}×"] if name else ["", "", ""]
            print(f"| {' | '.join([*first, *other, *errors])} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
