"""`fuse_for_inference`: trace, rewrite, prove."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastrank import _checks
from fastrank.convert import copy_with
from fastrank.fuse import _prove
from fastrank.fuse._rewrite import EXAMPLE, FusedLayer, Rewriter
from fastrank.fuse._trace import UNTRACEABLE, Recorder, prepared, traced
from fastrank.nn._conv import FactoredConv2d

# float32 convolutions may multiply in TF32 on a GPU, which keeps ten bits of every factor.
_TF32_EPS = 2.0**-10
# Roundings of a layer that folding changes: of the scaled factor, the bias, the product and the sum.
_ROUNDINGS = 4
# Half of float64's digits: rounding stays far below, a wrong fold far above.
_EXACT = torch.finfo(torch.float64).eps ** 0.5


class FusedModel(fx.GraphModule):
    """What `fuse_for_inference` returns: the network as a graph, in eval mode, under its old parameter names."""

    @property
    def fusion_report(self) -> list[FusedLayer]:
        """What became of every convolution, in the order of their calls."""
        report: list[FusedLayer] = self.meta["fusion_report"]
        return report


@torch.no_grad()
def fuse_for_inference(
    model: nn.Module, example_input: Tensor | tuple[Any, ...], *, tolerance: float | None = None
) -> FusedModel:
    """A copy of `model` for inference in which less is left to run behind its convolutions; `model` is untouched.

    BatchNorm is folded into the convolution ahead of it, factored (FusedTucker2Conv, FusedCPConv, LayerCPConv,
    SVDConv) or plain. Behind a FusedTucker2Conv, FusedCPConv or SVDConv an addition of the same shape and then a ReLU
    or SiLU become arguments of the layer, so that one operator does it all. What another reader still needs stays, and
    ``fusion_report`` of the result says why. The network is traced by `torch.fx`; modules that cannot be traced, or
    that carry hooks or parametrizations, are left whole.

    The result is proved on the example. In float64 it must give the outputs of `model` to half the digits, and in the
    model's own dtype its error against float64 may be at most twice that of `model`, plus the rounding of the
    layers that were changed. Where the network does not run in float64, both are compared in its own dtype.

    Args:
        model: any network; a copy is put into eval mode.
        example_input: the input of `model`, or a tuple of its positional inputs, on the model's device.
        tolerance: in place of the bound in the model's own dtype, the largest difference between the outputs of both,
            relative to the largest output.

    Raises TypeError or ValueError, naming the argument, for wrong arguments, for a network that cannot be traced, and
    for one whose fused form is not equal, with the worst error and the first place of it.
    """
    example = _checked(model, example_input)
    if tolerance is not None:
        _checks.number("tolerance", tolerance, 0)
    plain = prepared(model)
    wanted = _accepted(plain, example)
    fused, graph = _fused(plain, example)
    found = _prove.run(fused, example)
    # The roundings of many layers add up like independent errors.
    changed = sum(1 for row in fused.fusion_report if row.folded)
    rounding = max(_EXACT, _ROUNDINGS * changed**0.5 * max(_eps(value) for value in wanted))
    exact = _in_float64(plain, example)
    if exact is not None:
        plain64, example64, truth = exact
        fused64, graph64 = _fused(plain64, example64)
        apart = _prove.errors(_prove.run(fused64, example64), truth)
        _prove.require_equal(apart, [_EXACT] * len(truth), graph64, fused64, example64)
    if tolerance is not None or exact is None:
        bounds = [2 * rounding if tolerance is None else tolerance] * len(wanted)
        apart = _prove.errors(found, wanted)
    else:
        bounds = [2 * own + rounding for own in _prove.errors(wanted, truth)]
        apart = _prove.errors(found, truth)
    _prove.require_equal(apart, bounds, graph, fused, example)
    return fused


def _checked(model: Any, example_input: Any) -> tuple[Any, ...]:
    """The positional inputs of the model, on its device."""
    if not isinstance(model, nn.Module):
        raise _checks.fail_type("model", "a torch.nn.Module", model)
    example = (example_input,) if isinstance(example_input, Tensor) else example_input
    if not isinstance(example, tuple):
        raise _checks.fail_type("example_input", "a tensor or a tuple of the model's inputs", example_input)
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if any(device.type == "meta" for device in devices):
        raise _checks.fail("model", "on a device that holds values", "parameters on the meta device")
    for value in example:
        if isinstance(value, Tensor) and devices and value.device not in devices:
            known = ", ".join(sorted(map(str, devices)))
            raise _checks.fail("example_input", f"on the device of the model, {known}", value.device)
    return example


def _accepted(plain: nn.Module, example: tuple[Any, ...]) -> list[Tensor]:
    """What the network makes of the example: floating-point tensors, finite and not empty."""
    shapes = [tuple(value.shape) for value in example if isinstance(value, Tensor)]
    try:
        wanted = _prove.run(plain, example)
    except (RuntimeError, ValueError, TypeError, AssertionError, LookupError) as error:
        reason = str(error).partition("\n")[0]
        raise _checks.fail("example_input", "an input that the model accepts", f"shapes {shapes}: {reason}") from error
    if not any(value.numel() for value in wanted) or not all(bool(value.isfinite().all()) for value in wanted):
        raise _checks.fail("example_input", "an input of which the model makes finite outputs", f"shapes {shapes}")
    return wanted


def _eps(value: Tensor) -> float:
    eps = torch.finfo(value.dtype).eps
    return max(eps, _TF32_EPS) if value.is_cuda and value.dtype == torch.float32 else eps


def _in_float64(plain: nn.Module, example: tuple[Any, ...]) -> tuple[nn.Module, tuple[Any, ...], list[Tensor]] | None:
    """The network, the example and the outputs in float64, or None where it asks for a dtype of its own."""
    plain64, example64 = copy_with(plain, {}).double(), _prove.copied(example, torch.float64)
    try:
        return plain64, example64, _prove.run(plain64, example64)
    except (RuntimeError, TypeError, ValueError):
        return None


def _fused(plain: nn.Module, example: tuple[Any, ...]) -> tuple[FusedModel, fx.GraphModule]:
    """The rewritten form of a `prepared` network and its graph before; `plain` is untouched."""
    before, _ = traced(plain, example)
    twin = copy_with(plain, {})
    graph, whole = traced(twin, example)
    _record_kinds(graph, example)
    rows = Rewriter(graph, whole).run()
    seen = {row.layer for row in rows}
    for name, module in twin.named_modules():
        if isinstance(module, nn.Conv2d | FactoredConv2d) and name not in seen:
            around = next((outer for outer in whole if module in set(outer.modules())), None)
            left = "it is never called" if around is None else f"inside a {type(around).__name__}: {whole[around]}"
            rows.append(FusedLayer(name, type(module).__name__, (), left))
    fused = FusedModel(graph, graph.graph, type(plain).__name__)
    fused.meta["fusion_report"] = rows
    return fused, before


def _record_kinds(graph: fx.GraphModule, example: tuple[Any, ...]) -> None:
    """Run the graph on the example, then without values on larger ones, and note the shapes and dtypes of its nodes.

    Two addends may have one shape by the accident of a batch of 1 or a map of 1×1; the larger inputs tell them apart,
    as far into the network as it takes them.
    """
    for node in graph.graph.nodes:
        node.meta["kinds"] = {}

    def trial(name: str, module: fx.GraphModule, inputs: tuple[Any, ...]) -> None:
        nodes = {node.name: node for node in graph.graph.nodes}

        def note(node: fx.Node, value: Tensor) -> None:
            nodes[node.name].meta["kinds"][name] = tuple(value.shape), value.dtype

        Recorder(module, note).run(*inputs)

    try:
        trial(EXAMPLE, graph, _prove.copied(example))
    except UNTRACEABLE as error:
        reason = str(error).partition("\n")[0]
        raise _checks.fail("model", "the same function once traced by torch.fx", reason) from error
    for name, batch, size in (("batch", 2, 1), ("size", 1, 2)):
        larger = tuple(_larger(value, batch, size) if isinstance(value, Tensor) else value for value in example)
        try:
            trial(name, copy.deepcopy(graph).to("meta"), larger)
        except UNTRACEABLE:
            continue


def _larger(value: Tensor, batch: int, size: int) -> Tensor:
    """An image batch (N, C, H, W) on the meta device with N and H, W multiplied; other tensors as they are."""
    n, *rest = value.shape
    shape = (n * batch, rest[0], rest[1] * size, rest[2] * size) if value.dim() == 4 else tuple(value.shape)
    return torch.empty(shape, dtype=value.dtype, device="meta")
