"""What bench/growth.py lets grow: operators and training steps, with the counts that predict their cost.

Letters: C channels, H map size, N batch, R rank, L number of layers or matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastrank import ops, regularize
from fastrank.benchmarks.timing import DEVICE
from fastrank.nn import GatedTucker2Conv

Thunk = Callable[[], Any]
FLOAT = 4
SIDE = 14
"""The map where it is not what grows."""


class Series(NamedTuple):
    """A call by the size of one thing, all else fixed.

    make: from the size to the call; None where the series is that of key `of` with that of key `minus` taken off, round
    by round. work: what the time should grow with, counted in `unit`; held: bytes that the peak should grow with.
    """

    name: str
    panel: str
    make: Callable[[int], Thunk] | None
    work: Callable[[int], float]
    held: Callable[[int], float]
    unit: str = "multiply-adds"
    of: str = ""
    minus: str = ""

    @property
    def key(self) -> str:
        return f"{self.panel}: {self.name}"


class Group(NamedTuple):
    """Series over one variable; `quick` are the sizes of a quick run.

    limit_s: a series ends before a call that would take longer.
    """

    name: str
    variable: str
    fixed: str
    sizes: tuple[int, ...]
    quick: tuple[int, ...]
    series: tuple[Series, ...]
    limit_s: float = 3.0


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


def conv(
    channels: int, size: int, batch: int, rank: int, *, backend: str = "auto", cp: bool = False, grad: bool = False
) -> Thunk:
    """A 3×3 Tucker-2 or CP layer of C to C channels; with `grad` forward and backward."""
    x = randn(batch, channels, size, size)
    if cp:
        factors = randn(rank, channels, channels), randn(rank, channels, 3), randn(rank, channels, 3)
    else:
        factors = randn(rank, channels), randn(rank, rank, 3, 3), randn(channels, rank)
    call = partial(ops.cp_conv2d if cp else ops.tucker2_conv2d, padding=1, backend=backend)
    if not grad:
        return partial(call, x, *factors)
    leaves = [value.requires_grad_() for value in (x, *factors)]
    weight = randn(batch, channels, size, size)
    return lambda: torch.autograd.grad(call(*leaves), leaves, weight)


def conv_work(channels: int, size: int, batch: int, rank: int, *, backend: str = "auto", cp: bool = False) -> float:
    """Multiply-adds of the forward pass; three times as many with the backward pass."""
    places = batch * size * size
    if cp:
        return places * rank * channels * (channels + 6)
    chain = places * (2 * channels * rank + 9 * rank**2)
    merged = 9 * rank * channels * (rank + channels) + places * 9 * channels**2
    return {"sequence": chain, "dense": merged}.get(backend, min(chain, merged))


def conv_held(
    channels: int, size: int, batch: int, rank: int, *, backend: str = "auto", cp: bool = False, grad: bool = False
) -> float:
    """Bytes of the output and what is between; with the backward pass also of all gradients."""
    places = batch * size * size
    weights = rank * channels * (channels + 6) if cp else 2 * rank * channels + 9 * rank**2
    middle = places * rank * (channels if cp else 1)
    kernel = 9 * channels**2 if backend == "dense" else 0
    one = places * channels + middle + kernel
    return FLOAT * (2 * one + weights if grad else one)


def convs(shape: Callable[[int], tuple[int, int, int, int]], *, cp: Callable[[int], int] | None = None) -> list[Series]:
    """Both passes of every way to compute; shape: from the size to (C, H, N, R); cp: to the CP layer's rank."""
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("Tucker-2, auto", {}),
        ("Tucker-2, sequence", {"backend": "sequence"}),
        ("Tucker-2, dense", {"backend": "dense"}),
    ]
    if cp:
        kinds.append(("CP", {"cp": True}))
    found = []
    for grad in (False, True):
        for name, how in kinds:

            def sizes(n: int, how: dict[str, Any] = how) -> tuple[int, int, int, int]:
                channels, size, batch, rank = shape(n)
                return channels, size, batch, cp(n) if cp and "cp" in how else rank

            def make(n: int, how: dict[str, Any] = how, grad: bool = grad, sizes: Any = sizes) -> Thunk:
                return conv(*sizes(n), **how, grad=grad)

            def work(n: int, how: dict[str, Any] = how, grad: bool = grad, sizes: Any = sizes) -> float:
                return conv_work(*sizes(n), **how) * (3 if grad else 1)

            def held(n: int, how: dict[str, Any] = how, grad: bool = grad, sizes: Any = sizes) -> float:
                return conv_held(*sizes(n), **how, grad=grad)

            panel = "convolutions, forward and backward" if grad else "convolutions, forward"
            found.append(Series(name, panel, make, work, held))
    return found


Shapes = Callable[[int], list[tuple[int, int]]]


def spectral(call: str, shapes: list[tuple[int, int]], *arguments: Any) -> Thunk:
    return partial(getattr(ops, call), [randn(*shape) for shape in shapes], *arguments)


def projection(shapes: list[tuple[int, int]]) -> Thunk:
    return spectral("project_energy", shapes, 0.9)


def warm(shapes: list[tuple[int, int]]) -> Thunk:
    """Sub-gradients of matrices that have moved a little since the state saw them."""
    matrices, state = [randn(*shape) for shape in shapes], ops.SpectralState(refresh_every=1_000_000)
    ops.nuclear_subgradient(matrices, state=state)
    moved = [matrix + 1e-4 * torch.randn_like(matrix) for matrix in matrices]
    return partial(ops.nuclear_subgradient, moved, state=state)


def decompositions(shapes: Shapes) -> list[Series]:
    """On n×m matrices with n ≤ m: time as n²m, memory as nm."""

    def work(n: int) -> float:
        return float(sum(min(shape) ** 2 * max(shape) for shape in shapes(n)))

    def held(n: int) -> float:
        return float(FLOAT * sum(rows * columns for rows, columns in shapes(n)))

    makers: dict[str, Callable[[list[tuple[int, int]]], Thunk]] = {
        "svd": partial(spectral, "svd"),
        "sub-gradient, cold": partial(spectral, "nuclear_subgradient"),
        "sub-gradient, warm": warm,
        "projection to energy": projection,
    }
    return [
        Series(name, "decompositions", lambda n, maker=maker: maker(shapes(n)), work, held)  # type: ignore[misc]
        for name, maker in makers.items()
    ]


def gates(shapes: Shapes) -> list[Series]:
    """Both read their tensors once; shapes: of the directions."""

    def make(call: str, n: int) -> Thunk:
        directions, sizes = [randn(*shape) for shape in shapes(n)], [randn(shape[0]).abs() for shape in shapes(n)]
        if call == "gated factors":
            return partial(ops.gated_factors, directions, sizes)
        return partial(ops.funnel_penalty, sizes, 0.1)

    def work(call: str, n: int) -> float:
        return float(FLOAT * sum(2 * a * b if call == "gated factors" else a for a, b in shapes(n)))

    return [
        Series(name, "gates", partial(make, name), partial(work, name), partial(work, name), unit="bytes")
        for name in ("gated factors", "funnel penalty")
    ]


class Chain(nn.Module):
    """x + layer(x) / L, L times: neither activations nor gradients vanish or grow, however long it is."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x) / len(self.layers)
        return x


WIDTH = 8


def step(kind: str, count: int) -> Thunk:
    """A training step of a chain of 3×3 convolutions from 8 to 8 channels on 2 maps of 8×8: SGD with momentum."""
    torch.manual_seed(0)
    gated = "gated" in kind or kind == "Funnel"
    make: Callable[..., nn.Module] = (
        partial(GatedTucker2Conv, ranks=(WIDTH, WIDTH)) if gated else partial(nn.Conv2d, bias=False)
    )
    model = Chain(make(WIDTH, WIDTH, 3, padding=1) for _ in range(count)).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    regularizer: regularize.Regularizer | None = None
    if kind == "NRMF":
        regularizer = regularize.NuclearNorm(model, 1e-3)
    elif kind == "TRP":
        regularizer = regularize.LowRankProjection(model, every=1)
    elif kind == "Funnel":
        regularizer = regularize.Funnel(model)
    if regularizer is not None:
        regularizer.attach(optimizer)
    x = randn(2, WIDTH, 8, 8)

    def call() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return call


def steps() -> list[Series]:
    """Steps with a regulariser and without, and their difference; all should grow as L."""

    def linear(n: int) -> float:
        return float(n)

    kinds = {"no regulariser": "", "NRMF": "no regulariser", "TRP, a projection a step": "no regulariser"}
    kinds |= {"gated, no regulariser": "", "Funnel": "gated, no regulariser"}
    named = {"TRP, a projection a step": "TRP"}
    found = [
        Series(name, "training step", partial(step, named.get(name, name)), linear, linear, unit="layers")
        for name in kinds
    ]
    for name, base in kinds.items():
        if base:
            found.append(
                Series(
                    f"{name}, added",
                    "added",
                    None,
                    linear,
                    linear,
                    "layers",
                    *(f"training step: {each}" for each in (name, base)),
                )
            )
    return found


def square_layer(n: int) -> list[tuple[int, int]]:
    return [(n, 9 * n)]


GROUPS: Sequence[Group] = (
    Group(
        "channels",
        "channels C",
        f"Convolutions from C to C channels, 3×3, map {SIDE}×{SIDE}, N = 1, R = C/4 (CP: R = 2); matrices C×9C; "
        "gates of a factor of C×9C/4.",
        (64, 128, 256, 512, 1024, 2048),
        (16, 32, 64),
        (
            *convs(lambda n: (n, SIDE, 1, n // 4), cp=lambda n: 2),
            *decompositions(square_layer),
            *gates(lambda n: [(n, 9 * n // 4)]),
        ),
    ),
    Group(
        "map",
        "map size H",
        "Convolutions from 64 to 64 channels, 3×3, map H×H, N = 1, R = 16 (CP: R = 2).",
        (7, 14, 28, 56, 112, 224),
        (4, 8, 16),
        tuple(convs(lambda n: (64, n, 1, 16), cp=lambda n: 2)),
    ),
    Group(
        "batch",
        "batch N",
        f"Convolutions from 64 to 64 channels, 3×3, map {SIDE}×{SIDE}, R = 16 (CP: R = 2).",
        (1, 2, 4, 8, 16, 32, 64, 128),
        (1, 2, 4),
        tuple(convs(lambda n: (64, SIDE, n, 16), cp=lambda n: 2)),
    ),
    Group(
        "rank",
        "rank R",
        f"Convolutions from 256 to 256 channels, 3×3, map {SIDE}×{SIDE}, N = 1 (CP: rank R/8).",
        (8, 16, 32, 64, 128, 256),
        (8, 16, 32),
        tuple(convs(lambda n: (256, SIDE, 1, n), cp=lambda n: n // 8)),
    ),
    Group(
        "layers",
        "number of layers L",
        "L matrices of 96×128 (96 rows are the least that start warm); gates of L factors of 32×288; training steps "
        "of a chain of L convolutions from 8 to 8 channels, 3×3, on 2 maps of 8×8.",
        (10, 30, 100, 300, 1000),
        (2, 4, 8),
        (*decompositions(lambda n: [(96, 128)] * n), *gates(lambda n: [(32, 288)] * n), *steps()),
        limit_s=8.0,
    ),
)
