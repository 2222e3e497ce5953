"""The two moments of a training step at which a rank regulariser acts, and how it attaches to any optimizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fastrank import _checks


class Attachment(NamedTuple):
    """The hooks by which a regulariser acts around the steps of an optimizer."""

    before: RemovableHandle
    after: RemovableHandle

    def remove(self) -> None:
        """Take the regulariser off the optimizer; a second time does nothing."""
        self.before.remove()
        self.after.remove()


class Regularizer(ABC):
    """Adds to gradients before a step, or changes weights after it.

    Both happen on unscaled quantities: in a mixed-precision loop call `add_gradients` after
    ``scaler.unscale_(optimizer)`` and before clipping, and tell `after_step` whether the scaler let the step through;
    before that, `bind` once, and `start_epoch` at the start of every epoch. `fastrank.train` does all of this; in
    other loops `attach` does all but `start_epoch`.
    """

    _attachment: Attachment | None = None

    @abstractmethod
    def add_gradients(self) -> None:
        """Add the penalty's (sub-)gradient to the ``.grad`` of the parameters it governs."""

    def after_step(self, stepped: bool = True) -> None:  # noqa: B027  (most regularisers have nothing to do here)
        """Act on the weights after an optimizer step; `stepped` is False where a gradient scaler skipped it."""

    def start_epoch(self, epoch: int) -> None:  # noqa: B027  (most regularisers do the same in every epoch)
        """Epoch number `epoch`, counted from 0, begins, or goes on after a resume."""

    @abstractmethod
    def value(self) -> Tensor:
        """The penalty as it enters the loss, weight included; a detached 0-d tensor, for logs."""

    def governed(self) -> Mapping[str, nn.Parameter]:
        """The parameters it acts on, by the names that errors use."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What must survive a resume (nothing by default)."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        if state:
            raise ValueError(f"state must be empty for {type(self).__name__}, got keys {sorted(state)}")

    def bind(self, optimizer: Optimizer) -> None:
        """Meet the optimizer that moves the governed parameters, before its first step.

        Raises ValueError, naming the first one, where a governed parameter that is to be trained is in none of the
        optimizer's groups: its penalty would pile up in a gradient that nobody applies.
        """
        if not isinstance(optimizer, Optimizer):
            raise _checks.fail_type("optimizer", "a torch.optim.Optimizer", optimizer)
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, parameter in trained(self.governed()).items():
            if id(parameter) not in held:
                whole = f"one that holds every trained parameter that {type(self).__name__} governs"
                raise _checks.fail("optimizer", whole, f"{type(optimizer).__name__} without that of {name!r}")

    def attach(self, optimizer: Optimizer) -> Attachment:
        """Act around every ``optimizer.step()`` from now on; `remove` of the result ends that.

        - Gradient accumulation: once a step, not once a backward pass.
        - Mixed precision: with a `torch.amp.GradScaler`, whether or not the loop calls ``unscale_``, and with fused
          optimizers, which unscale inside their step. A step that the scaler skips adds, projects and counts nothing.
        - A closure handed to ``step`` is evaluated first, then the penalty's gradient is added. The loss it returns
          is without the penalty, so LBFGS, which searches along that loss, is refused.
        - Clipping: a loop that clips before its step does not clip the penalty.
        - Compiled and DDP-wrapped models share their parameters with the model inside: hand over either one.

        Governed parameters must be in the optimizer's groups (see `bind`), and those with ``requires_grad=False`` are
        left alone. A regulariser is on one optimizer at a time: attaching it again moves it. Raises ValueError or
        TypeError.
        """
        if isinstance(optimizer, torch.optim.LBFGS):
            raise _checks.fail("optimizer", "one that does not search along the loss", "LBFGS")
        self.bind(optimizer)
        if self._attachment is not None:
            self._attachment.remove()
        stepping = _Stepping(self)
        self._attachment = Attachment(
            optimizer.register_step_pre_hook(stepping.before), optimizer.register_step_post_hook(stepping.after)
        )
        return self._attachment


class _Stepping:
    """What happens around one step of the optimizer that a regulariser is attached to."""

    def __init__(self, regularizer: Regularizer) -> None:
        self.regularizer, self.stepped = regularizer, True
        self.scale: Tensor | None = None

    def before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Add to the gradients; `args` are those of ``Optimizer.step``, the optimizer first."""
        found_inf = getattr(optimizer, "found_inf", None)
        self.stepped = found_inf is None or not float(found_inf)
        if not self.stepped:
            return None
        self.scale = unscale(optimizer)
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self.regularizer.add_gradients()
            return None
        evaluate: Callable[[], Any] = closure

        def penalised() -> Any:
            loss = evaluate()
            self.regularizer.add_gradients()
            return loss

        return args[:1], {**kwargs, "closure": penalised}

    def after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Act on the weights, unless the step was one that changed nothing."""
        if self.scale is not None:
            optimizer.grad_scale, self.scale = self.scale, None  # type: ignore[attr-defined]
        self.regularizer.after_step(stepped=self.stepped)


def unscale(optimizer: Optimizer) -> Tensor | None:
    """Divide the gradients by the loss scale that a `GradScaler` left to a fused optimizer; the scale, if there is one.

    The scaler hands scale and number of infinite gradients to such an optimizer as the attributes `grad_scale` and
    `found_inf`, for its step to use; a `grad_scale` of None is what it leaves itself after an ``unscale_``.
    """
    scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    if scale is None:
        return None
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.detach().div_(scale.to(parameter.grad.device))
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    return scale


def trained(parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Those of `parameters` that are to be trained at this moment."""
    return {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}


def add_gradient(parameter: nn.Parameter, gradient: Tensor, weight: float) -> None:
    """parameter.grad += weight · gradient."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    parameter.grad.add_(gradient.to(parameter.grad.dtype), alpha=weight)
