"""The two moments of a training step at which a rank regulariser acts, and how it attaches to any optimizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class Regularizer(ABC):
    """Adds to gradients before a step, or changes weights after it.

    Both happen on unscaled float32 quantities: in a mixed-precision loop call `add_gradients` after
    ``scaler.unscale_(optimizer)`` and before clipping, and tell `after_step` whether the scaler let the step through.
    `fastrank.train` does this; other loops can use `attach`.
    """

    @abstractmethod
    def add_gradients(self) -> None:
        """Add the penalty's (sub-)gradient to the ``.grad`` of the parameters it governs."""

    def after_step(self, stepped: bool = True) -> None:  # noqa: B027  (most regularisers have nothing to do here)
        """Act on the weights after an optimizer step; `stepped` is False where a gradient scaler skipped it."""

    @abstractmethod
    def value(self) -> Tensor:
        """The penalty as it enters the loss, weight included; a detached 0-d tensor, for logs."""

    def state_dict(self) -> dict[str, Any]:
        """What must survive a resume (nothing by default)."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        if state:
            raise ValueError(f"state must be empty for {type(self).__name__}, got keys {sorted(state)}")

    def attach(self, optimizer: Optimizer) -> tuple[RemovableHandle, RemovableHandle]:
        """Run before and after every ``optimizer.step()``, for loops that never scale gradients; gives both handles."""
        return (
            optimizer.register_step_pre_hook(lambda *_: self.add_gradients()),
            optimizer.register_step_post_hook(lambda *_: self.after_step()),
        )
