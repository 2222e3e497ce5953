"""The family "gates": lists of gated factors of a whole model, their penalty and its proximal step.

A problem is (directions, gates): a gate (k,) for the k slices of each direction along dim 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrank import ops
from fastrank.benchmarks._check import within, worst
from fastrank.benchmarks._registry import KERNELS, Case, Contender, Judge, Thunk, Work, refusals
from fastrank.benchmarks.layers import LARGE_LISTS, RESNET18_CONVS, gated_shapes

C = 0.1  # where the funnel penalty bends
ETA = 1e-3
EPS = torch.finfo(torch.float32).eps
Shapes = Sequence[tuple[int, ...]]


class Problem(NamedTuple):
    """Tensors of all factors of a model."""

    directions: list[Tensor]
    gates: list[Tensor]

    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [*self.directions, *self.gates]

    def copied(self) -> Problem:
        """The same in other memory."""
        return Problem(*([t.detach().clone().requires_grad_(t.requires_grad) for t in part] for part in self))


def cases(device: str) -> list[Case]:
    """Rows for a device: factors of ResNet-18's 3×3 convolutions; a CPU takes seconds over its widest."""
    resnet = gated_shapes(RESNET18_CONVS if device == "cuda" else RESNET18_CONVS[:12])
    name = "ResNet-18" if device == "cuda" else "ResNet-18, up to 256 channels"
    found = [
        factors_case(name, resnet, device),
        factors_case(name, resnet, device, training=True),
        penalty_case(name, resnet, device),
        proximal_case(name, resnet, device),
    ]
    large = LARGE_LISTS if device == "cuda" else {}
    return [*found, *(factors_case(what, shapes, device) for what, shapes in large.items())]


def make(shapes: Shapes, device: str, grad: bool) -> Problem:
    """Directions and gates of all factors."""
    torch.manual_seed(0)
    directions = [torch.randn(shape, device=device, requires_grad=grad) for shape in shapes]
    return Problem(directions, [torch.rand(shape[0], device=device, requires_grad=grad) for shape in shapes])


def along(gate: Tensor, direction: Tensor) -> Tensor:
    return gate.view(-1, *(1,) * (direction.dim() - 1))


def naive_factors(directions: Sequence[Tensor], gates: Sequence[Tensor]) -> list[Tensor]:
    """g v / ‖v‖, factor by factor, as it is written."""
    pairs = zip(directions, gates, strict=True)
    return [along(g, v) * v / along(v.flatten(1).norm(dim=1), v) for v, g in pairs]


def foreach_factors(directions: Sequence[Tensor], gates: Sequence[Tensor]) -> list[Tensor]:
    """The shortest chain that torch._foreach offers: no operator of it reduces over the slices of a tensor."""
    norms = [torch.linalg.vector_norm(v, dim=tuple(range(1, v.dim()))) for v in directions]
    scales = torch._foreach_div(list(gates), norms)
    return list(torch._foreach_mul(list(directions), [along(s, v) for s, v in zip(scales, directions, strict=True)]))


def loop(directions: Sequence[Tensor], gates: Sequence[Tensor]) -> list[Tensor]:
    """fastrank's operator, one factor a call."""
    return [ops.gated_factor(v, g) for v, g in zip(directions, gates, strict=True)]


def naive_penalty(gates: Sequence[Tensor]) -> Tensor:
    """Σ |g| / (|g| + c), gate by gate, as it is written."""
    return torch.stack([(gate.abs() / (gate.abs() + C)).sum() for gate in gates]).sum()


def foreach_penalty(gates: Sequence[Tensor]) -> Tensor:
    """The shortest chain that torch._foreach offers."""
    sizes = torch._foreach_abs(list(gates))
    terms = torch._foreach_div(sizes, torch._foreach_add(sizes, C))
    return torch.stack([term.sum() for term in terms]).sum()


def factors_case(name: str, shapes: Shapes, device: str, *, training: bool = False) -> Case:
    """All gated factors of a model; with the gradients of directions and gates if asked."""

    def forward(function: Callable[..., list[Tensor]]) -> Callable[[Problem], Thunk]:
        return lambda p: partial(function, p.directions, p.gates)

    def backward(function: Callable[..., list[Tensor]]) -> Callable[[Problem], Thunk]:
        # The gradient of an output is the direction: made of what is there.
        return lambda p: (
            lambda: torch.autograd.grad(
                function(p.directions, p.gates), p.tensors(), [v.detach().flip(0) for v in p.directions]
            )
        )

    def judge(p: Problem) -> Judge:
        wide = Problem(*([t.detach().double().requires_grad_(training) for t in part] for part in p))
        truth = (backward if training else forward)(naive_factors)(wide)()
        # A norm of n entries is off by √n eps at most, a product and a quotient by half an eps each. A gradient is a
        # sum of two such terms that may cancel, each of the size of the upstream gradient times gate over norm.
        lost = [EPS * (4 + max(v[0].numel(), 1) ** 0.5) for v in wide.directions]
        if not training:
            return within(truth, [share * float(t.abs().max()) for share, t in zip(lost, truth, strict=True)])
        sizes = [upper(v, g) for v, g in zip(wide.directions, wide.gates, strict=True)]
        return within(truth, [share * size for which in (0, 1) for share, size in
                              zip(lost, [pair[which] for pair in sizes], strict=True)])  # fmt: skip

    build = backward if training else forward
    refused = refusals("gated_factor", device)
    moved = 4 * sum(torch.Size(shape).numel() for shape in shapes)
    return _case(
        "gated_factors",
        name + (", forward and backward" if training else ""),
        shapes,
        device,
        [
            Contender("auto", build(ops.gated_factors)),
            *(
                Contender(each, build(partial(ops.gated_factors, backend=each)), refusal=refused.get(each, ""))
                for each in KERNELS
            ),
            Contender("a call a factor", build(loop)),
            Contender("naive", build(naive_factors), "eager"),
            Contender("foreach", build(foreach_factors), "foreach"),
        ],
        judge,
        bytes_moved=moved * (5 if training else 2),
        grad=training,
    )


def upper(direction: Tensor, gate: Tensor) -> tuple[float, float]:
    """Bounds of the terms that the gradients of a factor are sums of: (of the direction, of the gate)."""
    norms = direction.detach().flatten(1).norm(dim=1)
    given = direction.detach().flip(0).flatten(1)
    of_gate = (given.abs() * direction.detach().flatten(1).abs()).sum(1) / norms
    term = gate.detach() / norms * (given.abs().amax(1) + of_gate / norms * direction.detach().flatten(1).abs().amax(1))
    return float(term.max()), float(of_gate.max())


def penalty_case(name: str, shapes: Shapes, device: str) -> Case:
    """The funnel penalty of all gates, and its gradient."""

    def build(function: Callable[[list[Tensor]], Tensor]) -> Callable[[Problem], Thunk]:
        def both(p: Problem) -> Thunk:
            def call() -> list[Tensor]:
                total = function(p.gates)
                return [total.detach(), *torch.autograd.grad(total, p.gates)]

            return call

        return both

    def judge(p: Problem) -> Judge:
        wide = Problem([], [t.detach().double().requires_grad_() for t in p.gates])
        truth = build(naive_penalty)(wide)()
        # A sum of as many terms as there are gates, each below 1; a gradient c / (|g| + c)² is at most 1 / c.
        total = sum(g.numel() for g in p.gates)
        return within(truth, [4 * EPS * total**0.5 * float(truth[0]), *[8 * EPS / C] * len(p.gates)])

    refused = refusals("funnel_penalty", device)
    return _case(
        "funnel_penalty",
        f"{name}, forward and backward",
        shapes,
        device,
        [
            Contender("auto", build(lambda gates: ops.funnel_penalty(gates, C))),
            *(
                Contender(
                    each,
                    build(partial(lambda gates, backend: ops.funnel_penalty(gates, C, backend=backend), backend=each)),
                    refusal=refused.get(each, ""),
                )
                for each in KERNELS
            ),
            Contender("naive", build(naive_penalty), "eager"),
            Contender("foreach", build(foreach_penalty), "foreach"),
        ],
        judge,
        bytes_moved=12 * sum(shape[0] for shape in shapes),
        grad=True,
    )


def proximal_case(name: str, shapes: Shapes, device: str) -> Case:
    """The proximal step of the funnel penalty, on copies of all gates."""

    def stepped(p: Problem, backend: str, alone: bool) -> Thunk:
        def call() -> list[Tensor]:
            gates = [gate.clone() for gate in p.gates]
            for part in [[gate] for gate in gates] if alone else [gates]:
                ops.funnel_proximal_(part, ETA, C, backend=backend)
            return gates

        return call

    def judge(p: Problem) -> Judge:
        # Above the threshold η / c the point x of a gate g > 0 is where (g − x)(x + c)² = η c, whose slope in x is
        # below 4 for x and g up to 1; x is rounded by half an eps.
        before = torch.cat(p.gates).double()

        def of(outputs: Any) -> tuple[float, float]:
            x = torch.cat(list(outputs)).double()
            left = ((before - x) * (x + C).square() - ETA * C).abs()
            return worst([(float(torch.where(x > 0, left, before - ETA / C).max()), 2 * EPS)])

        return of

    refused = refusals("funnel_proximal_", device)
    names = [("auto", ""), *((each, refused.get(each, "")) for each in KERNELS)]
    return _case(
        "funnel_proximal_",
        name,
        shapes,
        device,
        [
            *(Contender(each, partial(stepped, backend=each, alone=False), refusal=reason) for each, reason in names),
            Contender("a call a factor", partial(stepped, backend="auto", alone=True)),
        ],
        judge,
        bytes_moved=16 * sum(shape[0] for shape in shapes),
        baselines=("a call a factor",),
    )


def _case(
    operation: str,
    name: str,
    shapes: Shapes,
    device: str,
    found: Sequence[Contender],
    judge: Callable[[Any], Judge],
    *,
    bytes_moved: int,
    grad: bool = False,
    baselines: tuple[str, ...] = ("naive", "foreach"),
) -> Case:
    return Case(
        family="gates",
        operation=operation,
        name=name,
        dtype=torch.float32,
        device=device,
        make=partial(make, shapes, device, grad),
        judge=judge,
        contenders=found,
        baselines=baselines,
        sizes={"tensors": 2 * len(shapes), "entries": sum(torch.Size(shape).numel() for shape in shapes)},
        copied=Problem.copied,
        tensors=Problem.tensors,
        work=lambda p: Work(0.0, float(bytes_moved)),
        grad=grad,
    )
