"""Multiply-adds and parameters of a network, by two conventions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from fastrank import _checks
from fastrank._stages import ConvStage

Convention = Literal["conv_fc", "ptflops"]
CONVENTIONS: tuple[Convention, ...] = ("conv_fc", "ptflops")

_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU)
_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d)
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm)


@dataclass(frozen=True)
class LayerCost:
    """Cost of one module for one image.

    name: its name in the model ("" is the model itself).
    kind: its class.
    macs: multiply-adds by the convention of the count, over all calls of the module in one forward.
    params: its parameters that no row above it has counted.
    output_shape: shape of its first output with the batch of 1, None where the forward never called it or where
        the output is no tensor.
    stages: what a factored layer stands for, empty for every other module.
    """

    name: str
    kind: str
    macs: int
    params: int
    output_shape: tuple[int, ...] | None
    stages: tuple[ConvStage, ...] = ()


@dataclass(frozen=True)
class Complexity:
    """What `count` found.

    macs: multiply-adds for one image. params: true parameters, shared ones once.
    per_layer: module name -> LayerCost, for every module with parameters or multiply-adds; sums to both totals.
    input_size: (C, H, W). block_biases: biases of CP blocks, added after the sum over the rank and so part of no
    stage; the VGG row of the NORTON README leaves them out of its parameters.
    """

    macs: int
    params: int
    per_layer: Mapping[str, LayerCost]
    convention: Convention
    input_size: tuple[int, int, int]
    block_biases: int = 0

    @property
    def params_without_block_biases(self) -> int:
        """Parameters as the NORTON README counts them."""
        return self.params - self.block_biases

    def reduction_from(self, dense: Complexity) -> tuple[float, float]:
        """Reductions of (macs, params) against `dense`, in percent, as the NORTON README prints them.

        Raises ValueError where `dense` was counted by another convention or has nothing to reduce.
        """
        if dense.convention != self.convention:
            raise _checks.fail("dense", f"counted by the convention {self.convention!r}", repr(dense.convention))
        if dense.macs == 0 or dense.params == 0:
            raise _checks.fail("dense", "a count above 0", f"{dense.macs} multiply-adds and {dense.params} parameters")
        return 100 * (1 - self.macs / dense.macs), 100 * (1 - self.params / dense.params)

    def table(self) -> list[dict[str, Any]]:
        """One JSON-able row a layer: name, kind, macs, params, output_shape, and the shares of both totals."""
        return [
            {
                "name": cost.name,
                "kind": cost.kind,
                "macs": cost.macs,
                "params": cost.params,
                "output_shape": None if cost.output_shape is None else list(cost.output_shape),
                "macs_share": cost.macs / max(self.macs, 1),
                "params_share": cost.params / max(self.params, 1),
            }
            for cost in self.per_layer.values()
        ]


@dataclass
class _Tally:
    macs: int = 0
    output_shape: tuple[int, ...] | None = None
    stages: tuple[ConvStage, ...] = ()


def count(model: nn.Module, input_size: int | tuple[int, ...], *, convention: Convention = "conv_fc") -> Complexity:
    """Multiply-adds and parameters of `model` for one image.

    Runs one forward on zeros in eval mode without gradients, on the model's own device and dtype; training flags and
    hooks are as before afterwards, also where the forward fails. Only modules are seen: attention products and other
    functional work count 0. Subclasses count as what they derive from.

    A two-stage detector of torchvision works on what it finds, so its parts are run by themselves: backbone, pyramid
    and proposals at the size that its own transform makes of the image, the box head on as many proposals as survive at
    most (1,000), and no mask or keypoint head, since a blank image shows nothing to detect. At 3×800×800, "ptflops"
    then gives the NORTON README's figures of Faster and Mask R-CNN. Not that of Keypoint R-CNN, 137.42 G, which is
    torchvision's own: "conv_fc" and the keypoint head, transposed convolution included, on one detection.

    Args:
        model: any network that maps one image tensor to something.
        input_size: (C, H, W), (N, C, H, W) whose N is not used, or an int for a square RGB image.
        convention: "conv_fc" counts the multiply-adds of Conv2d, Linear and factored layers, no bias. "ptflops" is
            what the ptflops tool prints for modules (used by the NORTON README): the same plus one for every bias
            addition, 2·numel(input) for affine normalisations (numel without affine), numel(output) for rectifiers
            and numel(input) for pooling modules; padding, concatenation, additions and the rank sum of a CP block
            with its bias count 0.

    Raises ValueError for an impossible size, an unknown convention, lazy modules, or a size the model refuses.
    """
    if not isinstance(model, nn.Module):
        raise _checks.fail_type("model", "a torch.nn.Module", model)
    _checks.choice("convention", convention, CONVENTIONS)
    size = _image_size(input_size)
    lazy = [name for name, p in model.named_parameters() if isinstance(p, UninitializedParameter)]
    if lazy:
        raise _checks.fail("model", "initialised (run one forward through its lazy modules)", f"no shape for {lazy[0]}")

    tallies: dict[nn.Module, _Tally] = {}
    with _watched(model, tallies, convention):
        try:
            _forward(model, _blank_image(model, size))
        except (RuntimeError, ValueError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"input_size must be a size that the model accepts, got {size}: {reason}") from error

    per_layer: dict[str, LayerCost] = {}
    seen: set[nn.Parameter] = set()
    block_biases = 0
    for name, module in _rows(model):
        own = [p for p in module.parameters(recurse=_is_factored(module)) if p not in seen]
        seen.update(own)
        tally, params = tallies.get(module, _Tally()), sum(p.numel() for p in own)
        if params or tally.macs:
            cost = LayerCost(name, type(module).__name__, tally.macs, params, tally.output_shape, tally.stages)
            per_layer[name] = cost
        bias = getattr(module, "bias", None)
        if tally.stages and isinstance(bias, Tensor) and not any(stage.bias for stage in tally.stages):
            block_biases += bias.numel()
    macs = sum(cost.macs for cost in per_layer.values())
    params = sum(cost.params for cost in per_layer.values())
    return Complexity(macs, params, per_layer, convention, size, block_biases)


def _image_size(value: Any) -> tuple[int, int, int]:
    if isinstance(value, int) and not isinstance(value, bool):
        value = (3, value, value)
    if not isinstance(value, tuple | list | torch.Size) or len(value) not in (3, 4):
        raise _checks.fail("input_size", "an int, (C, H, W) or (N, C, H, W)", repr(value))
    sizes = [_checks.integer(f"input_size[{i}]", n, 1) for i, n in enumerate(value)]
    return sizes[-3], sizes[-2], sizes[-1]


def _blank_image(model: nn.Module, size: tuple[int, int, int]) -> Tensor:
    """Zeros (1, C, H, W) where and as the model's first floating-point parameter or buffer is."""
    tensors = [*model.parameters(), *model.buffers()]
    like = next((t for t in tensors if t.is_floating_point()), torch.empty(0))
    return torch.zeros(1, *size, device=like.device, dtype=like.dtype)


def _forward(model: nn.Module, image: Tensor) -> None:
    """One forward on image (1, C, H, W); the parts of a two-stage detector with the work that they have at most."""
    names = ("transform", "backbone", "rpn", "roi_heads")
    if not all(isinstance(getattr(model, name, None), nn.Module) for name in names):
        model(image)
        return
    parts: Any = model
    images, _ = parts.transform(list(image))
    found = parts.backbone(images.tensors)
    features = [found] if isinstance(found, Tensor) else list(found.values())
    objectness, _ = parts.rpn.head(features)
    # The proposal stage keeps some of each level before it suppresses overlaps, and some of all levels after.
    kept = sum(min(parts.rpn.pre_nms_top_n(), scores.numel()) for scores in objectness)
    proposals = min(parts.rpn.post_nms_top_n(), kept)
    heads = parts.roi_heads
    pooled = image.new_zeros(proposals, features[0].shape[1], *heads.box_roi_pool.output_size)
    heads.box_predictor(heads.box_head(pooled))


def _is_factored(module: nn.Module) -> bool:
    return callable(getattr(module, "conv_stages", None))


def _rows(module: nn.Module, prefix: str = "", seen: set[nn.Module] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """Every module once, by its first name; what is inside a factored layer belongs to that layer."""
    seen = set() if seen is None else seen
    if module in seen:
        return
    seen.add(module)
    yield prefix, module
    if not _is_factored(module):
        for name, child in module.named_children():
            yield from _rows(child, f"{prefix}.{name}" if prefix else name, seen)


@contextmanager
def _watched(model: nn.Module, tallies: dict[nn.Module, _Tally], convention: Convention) -> Iterator[None]:
    """Eval mode, no gradients, and a hook on every module that fills `tallies`; all undone on the way out."""

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        tally = tallies.setdefault(module, _Tally())
        if not isinstance(output, Tensor):
            return
        tally.output_shape = tally.output_shape or tuple(output.shape)
        x = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if x is not None:
            macs, stages = _module_macs(module, x, output, convention)
            tally.macs += macs
            tally.stages = tally.stages or stages

    training = [(module, module.training) for module in model.modules()]
    handles = []
    try:
        model.eval()
        handles = [m.register_forward_hook(note, with_kwargs=True) for _, m in _rows(model)]
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for module, flag in training:
            module.training = flag


def _module_macs(
    module: nn.Module, x: Tensor, output: Tensor, convention: Convention
) -> tuple[int, tuple[ConvStage, ...]]:
    """Multiply-adds of one call of one module, and its stages where it is a factored layer."""
    everything = convention == "ptflops"
    if _is_factored(module):
        stages: tuple[ConvStage, ...] = tuple(module.conv_stages((x.shape[-2], x.shape[-1])))  # type: ignore[operator]
        images = math.prod(x.shape[:-3])
        return images * sum(s.macs + (s.bias_adds if everything else 0) for s in stages), stages
    if isinstance(module, nn.Conv2d):
        kh, kw = module.kernel_size
        each = kh * kw * (module.in_channels // module.groups)
    elif isinstance(module, nn.Linear):
        each = module.in_features
    elif everything and isinstance(module, _ACTIVATIONS):
        return output.numel(), ()
    elif everything and isinstance(module, _POOLS):
        return x.numel(), ()
    elif everything and isinstance(module, _NORMS):
        return x.numel() * (2 if module.affine else 1), ()
    else:
        return 0, ()
    return output.numel() * (each + (1 if everything and module.bias is not None else 0)), ()
