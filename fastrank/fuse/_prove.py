"""Whether two networks are the same function, by what they make of an example."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fastrank import _checks
from fastrank.fuse._trace import Recorder


def run(model: nn.Module, example: tuple[Any, ...], dtype: torch.dtype | None = None) -> list[Tensor]:
    """The floating-point tensors that `model` returns; it gets copies of the inputs, in `dtype` where one is given."""
    found = pytree.tree_leaves(model(*copied(example, dtype)))
    return [value for value in found if isinstance(value, Tensor) and value.is_floating_point()]


def copied(example: tuple[Any, ...], dtype: torch.dtype | None = None) -> tuple[Any, ...]:
    """The inputs, with their tensors cloned, since a network may write into them."""

    def copy(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.clone() if dtype is None or not value.is_floating_point() else value.to(dtype, copy=True)

    copies: tuple[Any, ...] = pytree.tree_map(copy, example)
    return copies


def errors(found: list[Tensor], wanted: list[Tensor]) -> list[float]:
    """The largest error of each tensor, relative to the largest wanted value; infinite where shapes differ."""
    if [f.shape for f in found] != [w.shape for w in wanted]:
        return [math.inf]
    return [error(f, w) for f, w in zip(found, wanted, strict=True)]


def error(found: Tensor, wanted: Tensor) -> float:
    """The largest error relative to the largest wanted value, NaN included as infinite."""
    if found.shape != wanted.shape:
        return math.inf
    if wanted.numel() == 0:
        return 0.0
    found, wanted = found.double(), wanted.double()
    worst, largest = float((found - wanted).abs().max()), float(wanted.abs().max())
    return 0.0 if worst == 0 else math.inf if math.isnan(worst) or largest == 0 else worst / largest


def require_equal(
    found: list[float], bounds: list[float], plain: fx.GraphModule, fused: fx.GraphModule, example: tuple[Any, ...]
) -> None:
    """Raises ValueError with the worst error and the first node that bears one, unless found ≤ bounds.

    plain, fused: the graphs that were compared, for the search.
    """
    if len(found) == len(bounds) and all(f <= b for f, b in zip(found, bounds, strict=True)):
        return
    pairs = zip(found, bounds, strict=True) if len(found) == len(bounds) else [(math.inf, 0.0)]
    worst, bound = next((f, b) for f, b in pairs if not f <= b)
    values: dict[str, Tensor] = {}
    Recorder(plain, lambda node, value: values.update({node.name: value.clone()})).run(*copied(example))
    apart: list[str] = []

    def compare(node: fx.Node, value: Tensor) -> None:
        twin = values.get(node.meta.get("stands_for", node.name))
        if twin is not None and value.is_floating_point() and not error(value, twin) <= bound:
            apart.append(node.name)

    Recorder(fused, compare).run(*copied(example))
    where = f"first at {apart[0]}" if apart else "already in the traced graph: its forward depends on values or chance"
    got = f"a largest relative error of {worst:.1e}, {where}"
    raise _checks.fail("model", f"equal to its fused form on example_input to {bound:.1e}", got)
