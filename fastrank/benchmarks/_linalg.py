"""The family "linalg": U Vᵀ, regularisation steps and SVDs of all convolutions of a network; decompositions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fastrank import decompose, ops
from fastrank.benchmarks import linalg_contenders as contenders
from fastrank.benchmarks._check import relative, worst
from fastrank.benchmarks._peers import missing, quiet
from fastrank.benchmarks._registry import Case, Contender, Judge, Thunk, Work, refusals
from fastrank.benchmarks.linalg_contenders import MUON, Solve
from fastrank.reference.polar import coefficients

NETWORK = {"cuda": "ResNet-50 channel", "cpu": "ResNet-18, up to 128 channels"}
EPS = torch.finfo(torch.float32).eps
# Singular values that a regulariser's step takes off.
STEP = 1e-2
FILTERS = 4  # that a call of TensorLy decomposes of a layer; its time is multiplied up
DRIVERS = ("gesvd", "gesvdj", "gesvda")
Weights = Sequence[Tensor]


def cases(device: str) -> list[Case]:
    """Rows for a device; decompositions are measured on a CPU, where they are computed."""
    found = [
        subgradient_case(NETWORK[device], "flat", None, device),
        subgradient_case(NETWORK[device], "decaying", 0.9, device),
        step_case(NETWORK[device], device),
        svd_case(NETWORK[device], device),
    ]
    if device == "cpu":
        found += [*(filters_case(128, rank) for rank in (1, 4)), tucker2_case(128)]
    return found


def subgradient_case(network: str, spectrum: str, energy: float | None, device: str) -> Case:
    """U_k V_kᵀ of all matrices, of the numerical rank or the one that keeps `energy`."""
    refused = refusals("nuclear_subgradient", device).get("cuda", "")
    found = [
        Contender("auto", _solved(partial(ops.nuclear_subgradient, energy=energy))),
        Contender("warm", partial(_warm, energy=energy)),
        Contender("cuda", _solved(partial(ops.nuclear_subgradient, energy=energy, backend="cuda")), refusal=refused),
        *_loops(energy, device),
    ]
    if energy is None:
        if device == "cuda":  # the host's reference emulates the kernel's rounding, and is slow on purpose
            polar = partial(ops.nuclear_subgradient, method="polar")
            found.append(Contender("polar", _solved(polar), exact=False))
        quintics = coefficients(1e-3, 8)
        approximate: list[tuple[str, Solve]] = [
            ("muon", contenders.newton_schulz(MUON)),
            ("muon, 8 better steps", contenders.newton_schulz(quintics)),
        ]
        found += [Contender(name, _solved(solve), "muon", exact=False) for name, solve in approximate]
    return _case(
        "nuclear_subgradient",
        f"{network}, {spectrum}" + ("" if energy is None else f", energy {energy:g}"),
        device,
        network,
        spectrum,
        found,
        judge=lambda weights: relative(*contenders.truth(weights, energy)),
        baselines=("svd loop", "eigh"),
    )


def step_case(network: str, device: str) -> Case:
    """A step that lowers the nuclear norm of all weights: along the sub-gradient, or a proximal one as torchao has it.

    A sub-gradient step takes `STEP` off every singular value, a proximal one the same, but never below zero.
    """

    def along(subgradient: Callable[[Weights], list[Tensor]], weights: Weights) -> Thunk:
        return lambda: torch._foreach_sub(list(weights), torch._foreach_mul(subgradient(weights), STEP))

    def warm(weights: Weights) -> Thunk:
        call = _warm(weights)
        return along(lambda _: call(), weights)

    def moved(weights: Weights) -> Judge:
        found, limits = contenders.truth(weights, None)
        wanted = [w.double().cpu() - STEP * x for w, x in zip(weights, found, strict=True)]
        scale = [STEP * float(x.norm() / y.norm()) for x, y in zip(found, wanted, strict=True)]
        return relative(wanted, [limit * share + EPS for limit, share in zip(limits, scale, strict=True)])

    def lowered(weights: Weights) -> Judge:
        # An SVD is off by some eps of the largest singular value, as LAPACK's tests allow.
        wanted = contenders.soft_thresholded(weights, STEP)
        return relative(wanted, [30 * EPS * float(w.norm() / x.norm()) for w, x in zip(weights, wanted, strict=True)])

    gone = missing("torchao.prototype.pat")
    return _case(
        "regularisation step",
        f"{network}, flat",
        device,
        network,
        "flat",
        [
            Contender("auto", partial(along, ops.nuclear_subgradient)),
            Contender("warm", warm),
            Contender("svd loop", partial(along, contenders.svd_loop(None)), "svd"),
            Contender("torchao", lambda weights: contenders.pat_step(weights, STEP), "torchao", gone, judge=lowered),
        ],
        judge=moved,
        baselines=("svd loop", "torchao"),
    )


def svd_case(network: str, device: str) -> Case:
    """Thin SVDs of all matrices."""

    def library(weights: Weights, tall: bool) -> Thunk:
        given = [w.T if tall and w.shape[0] < w.shape[1] else w for w in weights]
        return lambda: [torch.linalg.svd(w, full_matrices=False) for w in given]

    def judge(weights: Weights) -> Judge:
        values = [torch.linalg.svdvals(w.double().cpu()) for w in weights]

        def of(outputs: Any) -> tuple[float, float]:
            found = []
            for w, s64, (u, s, vh) in zip(weights, values, outputs, strict=True):
                product = (u.double() * s.double()) @ vh.double()
                left = product - (w if product.shape == w.shape else w.T).double()
                apart = (s.double().cpu() - s64).abs().max() / s64[0]
                # LAPACK's tests allow 30 eps along the larger side; errors add up like its root.
                limit = 30 * EPS * math.sqrt(max(w.shape))
                found += [(float(left.norm() / s64.norm()), limit), (float(apart), limit)]
            return worst(found)

        return of

    refused = refusals("svd", device).get("cuda", "")
    return _case(
        "svd",
        f"{network}, flat",
        device,
        network,
        "flat",
        [
            Contender("auto", _solved(ops.svd)),
            Contender("cuda", _solved(partial(ops.svd, backend="cuda")), refusal=refused),
            Contender("svd loop", partial(library, tall=False), "svd"),
            Contender("svd loop, tall", partial(library, tall=True), "svd"),
        ],
        judge=judge,
        baselines=("svd loop",),
    )


def filters_case(channels: int, rank: int) -> Case:
    """CP of every filter of a layer; TensorLy's parafac (SVD start, at most 100 sweeps) is called once a filter."""

    def parafac(weight: Tensor, backend: str) -> Thunk:
        tensorly = import_module("tensorly")
        decomposition = import_module("tensorly.decomposition")
        with tensorly.backend_context(backend):
            given = [tensorly.tensor(each.double().numpy()) for each in weight[:FILTERS]]

        def call() -> list[Tensor]:
            with tensorly.backend_context(backend), quiet():
                return [decomposition.parafac(each, rank) for each in given]

        return call

    def theirs(weight: Tensor, backend: str) -> Judge:
        tensorly = import_module("tensorly")
        some = weight[:FILTERS]

        def judge(outputs: Any) -> tuple[float, float]:
            with tensorly.backend_context(backend):
                found = [torch.as_tensor(tensorly.to_numpy(tensorly.cp_to_tensor(each))) for each in outputs]
            return _mean_error(torch.stack(found), some), slices_bound(some, rank)

        return judge

    gone = missing("tensorly")
    return _decomposition(
        "cp_filters",
        channels,
        f"R={rank}",
        [
            Contender("auto", lambda weight: partial(decompose.cp_filters, weight, rank)),
            *(
                Contender(f"tensorly, {name}", partial(parafac, backend=name), "tensorly", gone,
                          judge=partial(theirs, backend=name), part=FILTERS / channels)
                for name in ("numpy", "pytorch")
            ),
        ],
        judge=lambda weight: lambda found: (_mean_error(found.weight(), weight), slices_bound(weight, rank)),
        baselines=("tensorly, numpy", "tensorly, pytorch"),
    )  # fmt: skip


def tucker2_case(channels: int) -> Case:
    """Tucker-2 of a layer at half its channels."""
    ranks = (channels // 2, channels // 2)

    def partial_tucker(weight: Tensor) -> Thunk:
        tensorly = import_module("tensorly")
        decomposition = import_module("tensorly.decomposition")

        def call() -> Any:
            with tensorly.backend_context("pytorch"), quiet():
                return decomposition.partial_tucker(weight, rank=list(ranks), modes=[0, 1])[0]

        return call

    def theirs(weight: Tensor) -> Judge:
        def judge(outputs: Any) -> tuple[float, float]:
            core, (w_out, w_in) = outputs
            return _error(torch.einsum("or,ps,rshw->ophw", w_out, w_in, core), weight), tails_bound(weight, ranks)

        return judge

    return _decomposition(
        "tucker2",
        channels,
        f"ranks {ranks[0]}, {ranks[1]}",
        [
            Contender("auto", lambda weight: partial(decompose.tucker2, weight, ranks)),
            Contender("tensorly", partial_tucker, "tensorly", missing("tensorly"), judge=theirs),
        ],
        judge=lambda weight: lambda found: (_error(found.weight(), weight), tails_bound(weight, ranks)),
        baselines=("tensorly",),
    )


def slices_bound(weight: Tensor, rank: int) -> float:
    """The mean relative error of filters by their R best terms σ u ∘ (rank-1 part of v), v a matrix kh×kw.

    u and v are singular vectors of a filter (I, kh·kw). The terms are orthogonal, so what they hold adds up; a fit that
    is started anywhere near is no worse.
    """
    filters = weight.double()
    _, s, vh = torch.linalg.svd(filters.flatten(2), full_matrices=False)
    first = torch.linalg.svdvals(vh.unflatten(2, filters.shape[2:]))[..., 0]
    held = (s * first).square().sort(dim=1, descending=True).values[:, :rank].sum(1)
    return float((1 - held / s.square().sum(1)).clamp(min=0).sqrt().mean())


def tails_bound(weight: Tensor, ranks: tuple[int, int]) -> float:
    """The relative error that a truncated HOSVD cannot exceed: what both unfoldings lose, and 30 eps of float32."""
    lost = 0.0
    for name, rank in zip(("mode3", "mode4"), ranks, strict=True):
        lost += float(torch.linalg.svdvals(decompose.unfold(weight, name).double())[rank:].square().sum())
    return math.sqrt(lost) / float(weight.double().norm()) + 30 * EPS


def _error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def _mean_error(found: Tensor, wanted: Tensor) -> float:
    left = (found.double() - wanted.double()).flatten(1).norm(dim=1)
    return float((left / wanted.double().flatten(1).norm(dim=1)).mean())


def _decomposition(
    operation: str, channels: int, what: str, found: Sequence[Contender], judge: Any, baselines: tuple[str, ...]
) -> Case:
    def make() -> Tensor:
        torch.manual_seed(0)
        return torch.randn(channels, channels, 3, 3) * math.sqrt(2 / (9 * channels))

    sizes = {"channels": channels, "what": what}
    name = f"{channels}×{channels}×3×3, {what}"
    return Case("linalg", f"decompose.{operation}", name, torch.float32, "cpu", make, judge, found, baselines, sizes)


def _case(
    operation: str,
    name: str,
    device: str,
    network: str,
    spectrum: str,
    found: Sequence[Contender],
    *,
    judge: Callable[[Any], Judge],
    baselines: tuple[str, ...],
) -> Case:
    convs, ways = contenders.NETWORKS[network]
    shapes = [tuple(decompose.unfold(torch.empty(o, i, k, k, device="meta"), way).shape) for o, i, k in convs
              for way in ways]  # fmt: skip
    # Whoever computes it reads and writes every matrix, and multiplies it with its smaller side twice.
    flops = sum(4.0 * min(shape) * math.prod(shape) for shape in shapes)
    return Case(
        family="linalg",
        operation=operation,
        name=name,
        dtype=torch.float32,
        device=device,
        make=partial(contenders.matrices, network, spectrum, device),
        judge=judge,
        contenders=found,
        baselines=baselines,
        sizes={"network": network, "spectrum": spectrum, "matrices": len(shapes)},
        before=contenders.drift,
        work=lambda weights: Work(flops, 8.0 * sum(map(math.prod, shapes))),
    )


def _solved(solve: Callable[[Any], Any]) -> Callable[[Weights], Thunk]:
    return lambda weights: partial(solve, weights)


def _warm(weights: Weights, energy: float | None = None) -> Thunk:
    """As the regularisers call it: with a state from weights a step away, and into memory that is there already."""
    state, room = ops.SpectralState(), [torch.empty_like(w) for w in weights]
    before = [w.clone() for w in weights]
    contenders.drift(before)
    ops.nuclear_subgradient(before, energy=energy, state=state)
    return lambda: ops.nuclear_subgradient(weights, energy=energy, state=state, out=room)


def _loops(energy: float | None, device: str) -> list[Contender]:
    found = [("svd loop", "svd", contenders.svd_loop(energy))]
    if device == "cuda":
        found += [(f"svd loop, {name}", "svd", contenders.svd_loop(energy, driver=name)) for name in DRIVERS[:2]]
        found.append(("svd loop, gesvda, tall", "svd", contenders.svd_loop(energy, tall=True, driver=DRIVERS[2])))
    else:
        found.append(("svd loop, tall", "svd", contenders.svd_loop(energy, tall=True)))
    found.append(("eigh", "eigh", contenders.batched_eigh(energy)))
    return [Contender(name, _solved(solve), peer) for name, peer, solve in found]
