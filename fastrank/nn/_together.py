"""`gates_together`: the gated factors of a whole model in one call a forward pass."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastrank import _checks
from fastrank.nn._gated import GatedConv2d, compute_factors


class TogetherHandle:
    """The hooks of `gates_together`."""

    def __init__(self, model: nn.Module) -> None:
        self._hooks = (
            model.register_forward_pre_hook(_prepare),
            model.register_forward_hook(_forget, always_call=True),
        )

    def remove(self) -> None:
        """Let every layer compute its own factors again; a second time does nothing."""
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> TogetherHandle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def gates_together(model: nn.Module) -> TogetherHandle:
    """Compute the factors of all gated layers of `model` in one call (`ops.gated_factors`) at each forward pass.

    Results and gradients are bit for bit those without it; a model of many small layers launches less. Tensors of
    several dtypes or devices take one call each. The handle's `remove` ends it, and so does leaving it as a context
    manager.

    What a layer takes is forgotten when the model's forward pass ends, by an exception too, and is taken only while the
    parameters are those it was computed from. A layer called by itself, a second time in one pass, in a part of the
    model that activation checkpointing runs again, or under gradients where the model runs without, computes its own.
    Copies of the model are hooked as it is; parameters and state dicts stay as they are. `torch.compile` traces the
    hooks: call it after this function.

    The factors of all layers are then one node of autograd: they, and their gradients, are held from the first layer to
    the last, and with DistributedDataParallel the gradients of factors and gates are reduced at the end of the
    backward pass rather than during it. Not for FSDP, whose parameters are whole only while their layer runs.

    Raises TypeError where `model` is no module, ValueError where it has no gated layer.
    """
    if not isinstance(model, nn.Module):
        raise _checks.fail_type("model", "a torch.nn.Module", model)
    if not any(isinstance(module, GatedConv2d) for module in model.modules()):
        raise _checks.fail("model", "a model with gated layers", type(model).__name__)
    return TogetherHandle(model)


def _prepare(model: nn.Module, args: tuple[Any, ...]) -> None:
    layers = [module for module in model.modules() if isinstance(module, GatedConv2d)]
    if layers:
        for layer, ready in zip(layers, compute_factors(layers), strict=True):
            layer._ready = ready


def _forget(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    for module in model.modules():
        if isinstance(module, GatedConv2d):
            module._ready = None
