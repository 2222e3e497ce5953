"""Inference past the operator: what a factored layer keeps between calls, so that a call costs its convolutions alone.

Where nothing needs a gradient and no transformation of torch watches, the library's convolutions are called directly,
with weights that are merged or laid out once. What is kept follows the factors: torch counts the writes to a tensor,
and a factor that is another tensor, lies elsewhere or was written to makes everything anew. A write that torch does not
count, through `factor.data` or from outside, is seen from the next `train`, `eval`, `to` or pass with gradients on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrank import _backends
from fastrank.nn._forms import Branches, Form, chain, stages_of
from fastrank.ops import _conv, _register
from fastrank.ops._conv import KERNELS, Launch, empty
from fastrank.reference.conv import Geometry

if TYPE_CHECKING:
    from fastrank.nn._fused import FusedConv2d

Pair = tuple[int, int]
MAX_PLANS = 64


class Plan(NamedTuple):
    """How inputs of one shape and layout are served."""

    branches: Branches
    summed: int  # R where a branch ends in R·O channels to be summed, else 0
    padding: tuple[int, ...] | None  # applied ahead of the stages, in the layer's padding_mode
    out_shape: tuple[int, ...]
    memory_format: torch.memory_format | None  # to bring the output into; None where it comes so
    launch: Launch | None = None  # the kernel that serves them instead of the stages, over weights packed for it


class _Kept:
    """What was made of the factors as they were: aliases that keep their memory from being given to others, plans."""

    def __init__(self, layer: FusedConv2d, factors: Sequence[nn.Parameter]) -> None:
        # Views of the parameters' own memory, and the count of writes at which copies of them are good.
        self.aliases = tuple(factor.detach() for factor in factors)
        self.factors = tuple(
            (name, factor, alias, factor._version)
            for name, factor, alias in zip(layer.form.factors, factors, self.aliases, strict=True)
        )
        self.bias = layer.bias
        self.packed_bias: tuple[Tensor, int] | None = None  # its alias and count of writes, once a kernel packed it
        self.plans: dict[Any, Plan | None] = {}
        self.stages: dict[tuple[str, Geometry, torch.memory_format], Branches] = {}

    def holds(self, layer: FusedConv2d) -> bool:
        """Whether the parameters are as they were."""
        parameters = layer._parameters
        for name, factor, alias, version in self.factors:
            if parameters.get(name) is not factor or not factor.is_set_to(alias) or factor._version != version:
                return False
        if parameters.get("bias") is not self.bias:
            return False
        packed = self.packed_bias
        return packed is None or (self.bias.is_set_to(packed[0]) and self.bias._version == packed[1])  # type: ignore[union-attr]


class Prepared:
    """The fast path of one layer. Copies of the layer, pickled ones too, start with an empty one."""

    __slots__ = ("_kept", "_latest")

    def __init__(self) -> None:
        self._kept: _Kept | None = None
        self._latest: _Latest | None = None

    def __reduce__(self) -> tuple[type[Prepared], tuple[()]]:
        return Prepared, ()

    def drop(self) -> None:
        """Forget what was made of the factors."""
        self._kept = self._latest = None

    def __call__(self, layer: FusedConv2d, x: Tensor, residual: Tensor | None) -> Tensor | None:
        """What `layer.forward` returns, or None where the operator has to serve the call."""
        latest = self._latest
        # The same as below for an input like the last one, in one piece: behind a convolution that has emptied the
        # caches, what is not executed is what is fast.
        if latest is not None and residual is None and type(x) is Tensor and x.layout is torch.strided:
            shape, stride, dtype, device, threads, held, bias, stages, activation = latest
            if x.shape == shape and x.stride() == stride and x.dtype is dtype and x.device == device:
                parameters: Any = layer._parameters
                for name, factor, alias, version in held:
                    if parameters[name] is not factor or factor._version != version or not factor.is_set_to(alias):
                        break
                else:
                    watched = _grad() or _modes() or _autocast() or _tracing() is not None or _functorch() is not None
                    if not watched and parameters["bias"] is bias and threads == _threads():
                        for weight, own_bias, arguments in stages:
                            x = _conv2d(x, weight, own_bias, *arguments)
                        return x if activation == "none" else x.relu_() if activation == "relu" else F.silu(x, True)
        return self._serve(layer, x, residual)

    def _serve(self, layer: FusedConv2d, x: Tensor, residual: Tensor | None) -> Tensor | None:
        if type(x) is not Tensor or layer.backend != "auto" or _register.watched(x) or _autocast():
            return None
        if torch.is_grad_enabled() and _needs_gradient(layer, x, residual):
            # Whoever trains changes the factors, by ways that torch may not count (sharded parameters).
            self.drop()
            return None
        kept = self._kept
        if kept is None or not kept.holds(layer):
            self.drop()
            self._kept = kept = _keep(layer)
            if kept is None:
                return None
        key = (x.shape, x.stride(), x.dtype, x.device, torch.get_num_threads())
        plan = kept.plans.get(key, _MISSING)
        if plan is _MISSING:
            if x.is_cuda and torch.cuda.is_current_stream_capturing():
                return None  # weights made while a graph is captured hold nothing before its replay
            if len(kept.plans) >= MAX_PLANS:
                kept.plans.clear()
            with torch.inference_mode(False), torch.no_grad():
                plan = kept.plans[key] = _plan(layer, kept, x)
        if plan is None or not _fits(residual, x, plan):
            return None
        rows = len(plan.branches)
        if rows == 1 and not (plan.summed or plan.padding or plan.memory_format) and x.dim() == 4:
            stages = tuple((weight, kept.bias if biased else None, rest) for weight, biased, rest in plan.branches[0])
            self._latest = (*key, kept.factors, kept.bias, stages, layer.activation)
        return _run(plan, layer, x, residual)


_MISSING: Any = object()
# Looked up once: see `Prepared.__call__`.
_conv2d, _grad, _threads = torch.conv2d, torch.is_grad_enabled, torch.get_num_threads
_modes, _functorch, _tracing = _register.modes, _register.functorch, _register.tracing
_autocast = torch._C._is_any_autocast_enabled
# An input's shape, strides, dtype and device, and threads; the factors as kept, the bias; convolutions, activation.
_Latest = tuple[Any, ...]


def _needs_gradient(layer: FusedConv2d, x: Tensor, residual: Tensor | None) -> bool:
    if x.requires_grad or (residual is not None and residual.requires_grad):
        return True
    return any(parameter is not None and parameter.requires_grad for parameter in layer._parameters.values())


def _keep(layer: FusedConv2d) -> _Kept | None:
    """Nothing where a parameter is computed (parametrized, swapped, of a subclass) or its writes are not counted."""
    bias = layer._parameters.get("bias")
    factors = [layer._parameters.get(name) for name in layer.form.factors]
    usable = [type(p) is nn.Parameter and not p.is_inference() for p in (*factors, *([] if bias is None else [bias]))]
    if not all(usable) or "bias" not in layer._parameters:
        return None
    return _Kept(layer, factors)  # type: ignore[arg-type]


def _plan(layer: FusedConv2d, kept: _Kept, x: Tensor) -> Plan | None:
    if x.numel() == 0 or x.dtype != kept.aliases[0].dtype or x.device != kept.aliases[0].device:
        return None
    # The operator on no images says whether the arguments are right, and the shape of the output.
    batched = layer._batched(x)
    probe = layer._operate(batched[:0], None)
    padded, padding = layer._padded(batched)
    geometry = (layer.stride, padding, layer.dilation)
    memory_format = _register.memory_format(padded)
    work = work_of(layer, padded, padding)
    chosen = _backends.choose(_backends.facts(layer.form.op, x, work), "auto")
    padding_too = None if padded is batched else _pads(layer)
    out_shape = (x.shape[0], *probe.shape[1:]) if x.dim() == 4 else tuple(probe.shape[1:])
    if chosen in KERNELS[layer.form.op]:
        launch = KERNELS[layer.form.op][chosen].prepare(padded, kept.aliases, kept.bias, geometry)
        if kept.bias is not None:
            kept.packed_bias = kept.bias.detach(), kept.bias._version
        if x.is_cuda:
            torch.cuda.current_stream(x.device).synchronize()  # whatever stream reads the packed weights next
        return Plan((), 0, padding_too, out_shape, None, launch)
    if chosen != "dense" and chosen not in layer.form.stages:
        return None
    branches = _stages(layer.form, kept, chosen, geometry, memory_format)
    summed = work.ranks[0] if layer.form.sums and chosen == "sequence" else 0
    kept_format = chain(branches, padded, None, summed).is_contiguous(memory_format=memory_format)
    return Plan(
        branches=branches,
        summed=summed,
        padding=padding_too,
        out_shape=out_shape,
        memory_format=None if kept_format else memory_format,
    )


def _pads(layer: FusedConv2d) -> tuple[int, ...]:
    """The layer's padding as `torch.nn.functional.pad` takes it."""
    (top, bottom), (left, right) = layer._sides()
    return left, right, top, bottom


def work_of(layer: FusedConv2d, padded: Tensor, padding: Pair) -> _backends.ConvWork:
    """An inference of `layer` on the padded (N, I, H, W) with `padding` left to the convolution, as tables know it."""
    factors = [layer.get_parameter(name) for name in layer.form.factors]
    return _conv.work_of(layer.form.op, padded, factors, (layer.stride, padding, layer.dilation), "inference")


def _stages(
    form: Form, kept: _Kept, backend: str, geometry: Geometry, memory_format: torch.memory_format
) -> Branches:
    """The stages of a backend; inputs of one layout share the weights."""
    known = kept.stages.get((backend, geometry, memory_format))
    if known is None:
        known = kept.stages[backend, geometry, memory_format] = stages_of(
            form, kept.aliases, backend, geometry, memory_format
        )
        weight = known[0][0].weight
        if weight.is_cuda:
            torch.cuda.current_stream(weight.device).synchronize()  # whatever stream reads them next
    return known


def _fits(residual: Tensor | None, x: Tensor, plan: Plan) -> bool:
    """Whether a residual can be added as it is; the operator says what is wrong with another one."""
    if residual is None:
        return True
    if type(residual) is not Tensor or residual.layout is not torch.strided:
        return False
    return residual.shape == plan.out_shape and residual.dtype == x.dtype and residual.device == x.device


def _launch(plan: Plan, launch: Launch, layer: FusedConv2d, x: Tensor, residual: Tensor | None, single: bool) -> Tensor:
    """The kernel, whose epilogue is all of the layer's."""
    out = empty(x, (1, *plan.out_shape) if single else plan.out_shape)
    launch(x, residual[None] if single and residual is not None else residual, out, layer.activation)
    return out[0] if single else out


def _run(plan: Plan, layer: FusedConv2d, x: Tensor, residual: Tensor | None) -> Tensor:
    bias: Any = layer._parameters["bias"]
    single = x.dim() == 3
    out = x[None] if single else x
    if plan.padding is not None:
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        out = F.pad(out, plan.padding, mode=mode)
    if plan.launch is not None:
        return _launch(plan, plan.launch, layer, out, residual, single)
    out = chain(plan.branches, out, bias, plan.summed)
    if plan.memory_format is not None:
        out = out.contiguous(memory_format=plan.memory_format)
    if single:
        out = out[0]
    # Nobody else has seen `out`, so it may be written to.
    if residual is not None:
        out.add_(residual)
    if layer.activation == "relu":
        out.relu_()
    elif layer.activation == "silu":
        F.silu(out, inplace=True)
    return out
