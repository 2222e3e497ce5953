"""A network as a graph: a copy in eval mode, traced by `torch.fx` down to its convolutions and normalisations."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from fastrank import _checks
from fastrank.convert import copy_with
from fastrank.nn._conv import FactoredConv2d

# What code that is written for tensors raises when it is given torch.fx's stand-ins for them.
UNTRACEABLE = (fx.proxy.TraceError, TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError)
# Flags of torchvision and timm that recompute activations in a backward pass, which inference does not have.
_CHECKPOINTING = ("memory_efficient", "grad_checkpointing")


def prepared(model: nn.Module) -> nn.Module:
    """A copy of `model` in eval mode, without activation checkpointing, and with timm's norm-and-activation split."""
    twin = copy_with(model, {}).eval()
    for module in list(twin.modules()):
        for flag in _CHECKPOINTING:
            if isinstance(getattr(module, flag, None), bool):
                setattr(module, flag, False)
        for name, child in module.named_children():
            # Recognised by name, since timm is optional and never imported here.
            is_timm = type(child).__name__ == "BatchNormAct2d" and type(child).__module__.startswith("timm.")
            if is_timm and not why_untouchable(child):
                setattr(module, name, _split(child))
    return twin


def _split(norm_act: Any) -> nn.Sequential:
    norm = nn.BatchNorm2d(norm_act.num_features, norm_act.eps, norm_act.momentum, device="meta")
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        setattr(norm, name, getattr(norm_act, name))
    norm.affine, norm.track_running_stats = norm_act.affine, norm_act.track_running_stats
    parts = OrderedDict(norm=norm.train(norm_act.training), drop=norm_act.drop, act=norm_act.act)
    return nn.Sequential(parts).train(norm_act.training)


def why_untouchable(module: nn.Module) -> str:
    """Empty where calling `module` runs its forward on its own parameters and nothing else, else the reason."""
    if any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)):
        return "it carries hooks"
    if "forward" in vars(module):
        return "its forward is replaced by another function"
    return "it is parametrized" if is_parametrized(module) else ""


def traced(model: nn.Module, example: tuple[Any, ...]) -> tuple[fx.GraphModule, dict[nn.Module, str]]:
    """The graph of a `prepared` model, and the reasons why some modules in it were left whole.

    A module whose forward cannot be traced, or that must not be touched, becomes one node. Parameters of the
    network's forward that `example` leaves out keep their defaults. Raises ValueError where forward itself cannot be
    traced.
    """
    whole = {module: reason for module in model.modules() if (reason := why_untouchable(module))}
    if model in whole:
        raise _checks.fail("model", "a network to trace", f"{type(model).__name__}: {whole[model]}")
    parameters = list(inspect.signature(type(model).forward).parameters.values())[1:]
    left_out = {p.name: p.default for p in parameters[len(example) :] if p.default is not p.empty}
    while True:
        tracer = _Tracer(whole)
        try:
            graph = tracer.trace(model, left_out)
        except UNTRACEABLE as error:
            reason = str(error).partition("\n")[0]
            if tracer.failed is None or tracer.failed[0] is not error:
                expected = "traceable by torch.fx (a part of it may be: fuse that part)"
                raise _checks.fail("model", expected, f"{type(model).__name__}: {reason}") from error
            whole[tracer.failed[1]] = f"torch.fx cannot trace it: {reason}"
        else:
            return fx.GraphModule(model, graph, type(model).__name__), whole


class _Tracer(fx.Tracer):
    """Stops at convolutions, normalisations and the modules of `whole`; remembers the innermost module that failed."""

    def __init__(self, whole: dict[nn.Module, str]) -> None:
        super().__init__()
        self.whole = whole
        self.failed: tuple[Exception, nn.Module] | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether `m` is one node of the graph."""
        stops = m in self.whole or isinstance(m, FactoredConv2d | nn.Conv2d | _BatchNorm)
        return stops or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Trace into `m`, or make a node of it."""
        try:
            return super().call_module(m, forward, args, kwargs)
        except UNTRACEABLE as error:
            seen = self.failed is not None and self.failed[0] is error
            if not seen and not self.is_leaf_module(m, ""):
                self.failed = error, m
            raise


class Recorder(fx.Interpreter):
    """Runs a graph and hands every tensor that a node computes to `record`."""

    def __init__(self, graph: fx.GraphModule, record: Callable[[fx.Node, Tensor], None]) -> None:
        super().__init__(graph)
        self.record = record

    def run_node(self, n: fx.Node) -> Any:
        """The value of `n`."""
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.record(n, value)
        return value
