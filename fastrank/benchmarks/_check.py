"""Right or wrong, before anything is timed: every contender's result against float64, within derived bounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastrank.benchmarks._registry import Case, Contender, Judge, Thunk, compared

Tensors = Sequence[Tensor]


@dataclass
class Prepared:
    """A case whose contenders were checked: calls that may be timed, errors of all, and who is left out and why."""

    case: Case
    inputs: Any
    calls: dict[str, Thunk] = field(default_factory=dict)
    chosen: dict[str, Contender] = field(default_factory=dict)
    errors: dict[str, dict[str, float | None]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)

    @property
    def red(self) -> dict[str, str]:
        """fastrank's own contenders that are wrong."""
        return {name: reason for name, reason in self.wrong.items() if not self.chosen[name].peer}


def prepare(case: Case, compare: Sequence[str] | None = None) -> Prepared:
    """Build and check fastrank's contenders of a case and the peers that were named.

    A contender that raises is wrong where it is fastrank's, and left out where it is a peer. A peer whose result is
    wrong is left out too: nothing wrong is ever timed.
    """
    inputs = case.make()
    found = Prepared(case, inputs)
    judge = case.judge(inputs)
    with torch.set_grad_enabled(case.grad):
        for each in compared(case, compare):
            found.chosen[each.name] = each
            if each.refusal:
                found.left_out[each.name] = each.refusal
                continue
            try:
                call = each.build(inputs)
                outcome = (each.judge(inputs) if each.judge else judge)(call())
            except failures() as problem:
                reason = f"{type(problem).__name__}: {str(problem).partition(chr(10))[0]}"
                (found.left_out if each.peer or each.may_refuse else found.wrong)[each.name] = reason
                continue
            error, limit = outcome
            told = error if math.isfinite(error) else None  # JSON has no infinity
            found.errors[each.name] = {"error": told, "limit": limit if each.exact else None}
            if each.exact and not error <= limit:
                found.wrong[each.name] = f"its error is {error:.1e}, at most {limit:.1e} is right"
            else:
                found.calls[each.name] = call
    return found


def failures() -> tuple[type[Exception], ...]:
    """What a contender may raise without ending the run: what torch and its compilers raise for what they cannot run.

    Named, because an interrupt, a full memory of the host or a wrong name in a contender must end it.
    """
    raised: tuple[type[Exception], ...] = (RuntimeError, ValueError, TypeError, NotImplementedError)
    try:
        from triton.errors import TritonError
    except ImportError:
        return raised
    return (*raised, TritonError)


def within(truth: Tensors, limits: Sequence[float]) -> Judge:
    """Judges tensors by their largest difference to `truth`, each over its limit: (error, 1.0)."""

    def judge(outputs: Any) -> tuple[float, float]:
        found = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        if [each.shape for each in found] != [each.shape for each in truth]:
            return math.inf, 1.0
        pairs = zip(found, truth, limits, strict=True)
        return worst([(float((one.double() - right.double()).abs().max()), limit) for one, right, limit in pairs])

    return judge


def relative(truth: Tensors, limits: Sequence[float]) -> Judge:
    """Judges tensors by their relative Frobenius error to `truth`; the worst of them against its limit."""

    def judge(outputs: Any) -> tuple[float, float]:
        pairs = zip(list(outputs), truth, limits, strict=True)
        return worst([(float((one.to(right) - right).norm() / right.norm()), limit) for one, right, limit in pairs])

    return judge


def worst(found: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The (error, limit) that is farthest over its limit, or closest to it; infinite where an error is NaN."""
    return max(((error if error == error else math.inf, limit) for error, limit in found), key=lambda e: e[0] / e[1])


def multilinear(
    function: Callable[..., Sequence[Tensor]], arguments: Tensors, dtype: torch.dtype, *, roundings: int, terms: int
) -> Judge:
    """Judges the outputs of a function that is linear in each of its arguments, evaluated in `dtype`.

    The truth is `function` of the arguments in float64 (float32 without TF32 for halves on a GPU). Every intermediate
    result that is rounded to `dtype` is off by half an eps of a sum over absolute values at most, which `function` of
    the absolute values bounds; and a sum of so many terms in float32 loses about the root of their number of such eps.
    roundings: eps of `dtype` allowed, half the number of rounded results; terms: of the longest chain of sums.
    """
    like = arguments[0]
    kind = torch.float32 if like.is_cuda and like.element_size() == 2 else torch.float64
    lost = roundings * torch.finfo(dtype).eps + terms**0.5 * torch.finfo(torch.float32).eps
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
        truth = function(*(each.detach().to(kind) for each in arguments))
        sizes = function(*(each.detach().to(kind).abs() for each in arguments))
    return within(truth, [lost * float(each.abs().max()) for each in sizes])
