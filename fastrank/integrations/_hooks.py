"""Several regularisers on one optimizer, with the penalty outside or inside the clipping of gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fastrank import _checks
from fastrank.regularize.base import Attachment, Regularizer, trained

Given = Regularizer | Sequence[Regularizer] | Callable[[nn.Module], Regularizer | Sequence[Regularizer]]
"""Regularisers, or a function that makes them of the model once that is built."""


class Attachments:
    """Regularisers on an optimizer; `remove`, or the end of a ``with`` block, takes them off."""

    def __init__(self, handles: Iterable[Attachment | RemovableHandle]) -> None:
        self._handles = list(handles)

    def remove(self) -> None:
        """Take all of them off; a second time does nothing."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Attachments:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def attach_all(
    regularizers: Regularizer | Sequence[Regularizer], optimizer: Optimizer, *, clip_norm: float | None = None
) -> Attachments:
    """Attach each regulariser to `optimizer`, in their order, as `Regularizer.attach` does.

    clip_norm: bound the norm of all gradients that the optimizer holds, penalties included, right before each step
    (None: do not). A loop that asks for it here does not clip by itself: what a loop clips before its step is the
    loss's gradient alone. Like the penalty, it acts on unscaled gradients, also under a `GradScaler`.

    `start_epoch` of the regularisers stays the loop's to call. Raises ValueError or TypeError, naming the argument;
    then none is attached.
    """
    chosen = listed(regularizers)
    if clip_norm is not None:
        _checks.number("clip_norm", clip_norm, 0.0, open_low=True)
        if not chosen:
            raise _checks.fail("regularizers", "at least one where clip_norm is given", "none")
    for regularizer in chosen:
        regularizer.bind(optimizer)
    handles: list[Attachment | RemovableHandle] = [regularizer.attach(optimizer) for regularizer in chosen]
    if clip_norm is not None:
        handles.append(optimizer.register_step_pre_hook(_Clipping(clip_norm)))
    return Attachments(handles)


def attach_unclipped(regularizer: Regularizer, optimizer: Optimizer) -> RemovableHandle:
    """Leave `add_gradients` to the caller, who clips after it, and call `after_step` after every step."""
    regularizer.bind(optimizer)
    return optimizer.register_step_post_hook(lambda *_: regularizer.after_step(stepped=True))


def listed(given: Given, model: nn.Module | None = None) -> list[Regularizer]:
    """The regularisers as a list; those of a function are made of `model`."""
    found: Any = given
    if model is not None and callable(found) and not isinstance(found, Regularizer):
        found = found(model)
    if isinstance(found, Regularizer):
        return [found]
    if not isinstance(found, list | tuple) or not all(isinstance(each, Regularizer) for each in found):
        wrong = next((x for x in found if not isinstance(x, Regularizer)), found) if isinstance(found, list) else found
        raise _checks.fail_type("regularizers", "fastrank.regularize.Regularizer, one or a sequence of them", wrong)
    return list(found)


def optimizer_of(regularizer: Regularizer, optimizers: Sequence[Optimizer]) -> Optimizer:
    """The optimizer that moves what the regulariser governs; ValueError where none of them does."""
    governed = {id(parameter) for parameter in trained(regularizer.governed()).values()}
    for optimizer in optimizers:
        if governed <= {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}:
            return optimizer
    if not optimizers:
        raise _checks.fail("optimizer", "one that holds what the regularizers govern", "none")
    regularizer.bind(optimizers[0])
    return optimizers[0]


class _Clipping:
    """A hook before the step of an optimizer, behind those of its regularisers."""

    def __init__(self, norm: float) -> None:
        self.norm = norm

    def __call__(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        def clip() -> Tensor:
            held = (parameter for group in optimizer.param_groups for parameter in group["params"])
            return torch.nn.utils.clip_grad_norm_(held, self.norm)

        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            clip()
            return None
        evaluate: Callable[[], Any] = closure

        def clipped() -> Any:
            loss = evaluate()
            clip()
            return loss

        return args[:1], {**kwargs, "closure": clipped}
