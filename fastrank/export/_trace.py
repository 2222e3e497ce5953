"""What every format starts from, a checked copy, lowered and traced, and what it ends with, a comparison."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from fastrank import _checks
from fastrank.convert import copy_with
from fastrank.export._lower import lowered

TOLERANCE = 1e-4
"""Largest difference between outputs, relative to the largest output, in float32 and float64."""
# What tracing raises for code that it cannot follow, and networks for inputs that they do not take.
REFUSALS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)
# float32 convolutions may multiply in TF32 on a GPU, which keeps ten bits of every factor.
_TF32_EPS = 2.0**-10


class Traced(NamedTuple):
    """A network on its way into a file.

    plain: a copy of it in eval mode. program: that, lowered and traced. examples: inputs to compare the outputs on,
    the first one those it was traced with; the second, where the batch is free, of another batch size. free: of every
    input, whether its first size is.
    """

    plain: nn.Module
    program: torch.export.ExportedProgram
    examples: list[tuple[Tensor, ...]]
    free: list[bool]


def trace(model: Any, example_input: Any, dynamic_batch: bool, device: str | None = None) -> Traced:
    """`model` lowered and traced by `torch.export` in eval mode and without gradients; `model` itself is untouched.

    device: where to bring a copy of the network and the example first. Raises TypeError or ValueError, naming the
    argument, for what cannot be traced.
    """
    example = _checked(model, example_input)
    plain = copy_with(model, {}).eval().requires_grad_(False)
    if device is not None:
        plain, example = plain.to(device), tuple(value.to(device) for value in example)
    outputs_of(plain, example)
    examples = _examples(example) if dynamic_batch else [example]
    free = [dynamic_batch and _follows(value, example) for value in example]
    dims = tuple({0: torch.export.Dim("batch")} if one else None for one in free)
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(lowered(plain), examples[0], dynamic_shapes=dims, strict=False)
    except REFUSALS as error:
        any_size = " with a batch of any size (dynamic_batch=False fixes the example's)" if dynamic_batch else ""
        expected = f"a network that torch.export can trace{any_size}"
        raise _checks.fail("model", expected, f"{type(model).__name__}: {first_line(error)}") from error
    return Traced(plain, program, examples, free)


def compare(traced: Traced, run: Callable[..., Any], what: str) -> None:
    """`run`, of the inputs of an example, gives what the network does; RuntimeError with the difference otherwise."""
    for inputs in traced.examples:
        wanted, found = outputs_of(traced.plain, inputs), leaves_of(run(*inputs))
        if [value.shape for value in found] != [value.shape for value in wanted]:
            shapes = [[tuple(value.shape) for value in values] for values in (found, wanted)]
            raise RuntimeError(f"{what} gives outputs of shapes {shapes[0]} where the model gives {shapes[1]}")
        for own, value in zip(found, wanted, strict=True):
            _require_close(what, own, value)


def outputs_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The tensors that the network makes of the inputs, without gradients."""
    try:
        with torch.no_grad():
            out = model(*inputs)
    except REFUSALS as error:
        shapes = [tuple(value.shape) for value in inputs]
        refusal = f"shapes {shapes}: {first_line(error)}"
        raise _checks.fail("example_input", "an input that the model accepts", refusal) from error
    return leaves_of(out)


def leaves_of(out: Any) -> list[Tensor]:
    """The tensors in an output of tensors, tuples, lists and dicts."""
    leaves = _pytree.tree_leaves(dict(out) if isinstance(out, Mapping) else out)
    if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
        kinds = sorted({type(leaf).__name__ for leaf in leaves})
        raise _checks.fail("model", "a network whose outputs are tensors, in tuples, lists or dicts", kinds)
    return leaves


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and log lines of torch's exporters, which are about torch's own code."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def first_line(error: BaseException) -> str:
    """The first line of an error's text that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _checked(model: Any, example_input: Any) -> tuple[Tensor, ...]:
    """The positional inputs of the model."""
    if not isinstance(model, nn.Module):
        raise _checks.fail_type("model", "a torch.nn.Module", model)
    if any(kind.__name__ == "GeneralizedRCNN" for kind in type(model).__mro__):  # torchvision is never imported here
        expected = "a network from tensors to tensors (of a detector, model.backbone is one)"
        raise _checks.fail("model", expected, f"the detector {type(model).__name__}")
    example = (example_input,) if isinstance(example_input, Tensor) else example_input
    if not isinstance(example, tuple) or not all(isinstance(value, Tensor) for value in example) or not example:
        raise _checks.fail_type("example_input", "a tensor or a tuple of the model's input tensors", example_input)
    for value in example:
        if value.numel() == 0:
            raise _checks.fail("example_input", "a batch of at least one image", f"shape {tuple(value.shape)}")
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise _checks.fail("model", "on a device that holds values", "parameters on the meta device")
    return tuple(value.detach() for value in example)


def _follows(value: Tensor, example: Sequence[Tensor]) -> bool:
    """Whether the first dimension of an input is the batch."""
    return value.dim() > 0 and value.shape[0] == example[0].shape[0]


def _examples(example: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """The example in a batch of at least 2, since 1 is a number to torch.export and not a size, and in a batch of 1."""

    def batch(size: int) -> tuple[Tensor, ...]:
        return tuple(
            value[torch.arange(size) % value.shape[0]] if _follows(value, example) else value for value in example
        )

    if example[0].dim() == 0:
        return [example]
    return [example if example[0].shape[0] > 1 else batch(2), batch(1)]


def _require_close(what: str, found: Tensor, wanted: Tensor) -> None:
    if not wanted.numel():
        return
    scale = float(wanted.abs().max()) or 1.0
    apart = float((found.to(wanted.device).double() - wanted.double()).abs().max()) / scale
    bound = _tolerance(wanted)
    if not apart <= bound:  # NaN too
        raise RuntimeError(
            f"{what} gives outputs that differ from the model's by {apart:.1e} of the largest, "
            f"more than {bound:.1e}: nothing was written (check=False writes it all the same)"
        )


def _tolerance(value: Tensor) -> float:
    """1e-4, and half of the digits where the arithmetic is coarser than that of float32."""
    if not value.is_floating_point():
        return 0.0
    eps = torch.finfo(value.dtype).eps
    if value.is_cuda and value.dtype == torch.float32:
        eps = max(eps, _TF32_EPS)
    return TOLERANCE if eps <= torch.finfo(torch.float32).eps else float(eps**0.5)
