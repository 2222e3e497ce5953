"""What the convolutions of a model see on given data: the second moment of each layer's patches.

Decompositions that know it keep what a layer computes, not its kernel's entries: see `fastrank.decompose.weighted`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from fastrank import _checks
from fastrank.data import batches
from fastrank.nn._conv import why_not_factorable

BATCH = 64
POSITIONS = 8192
"""Patches of a batch that enter a moment at most, drawn at random: more hardly change it, and cost time."""
LARGEST = 9216
"""The longest patch I·kh·kw that a moment is taken of: a third of a gigabyte."""


@dataclass(frozen=True)
class Calibration:
    """moments: layer name -> mean of x xᵀ (I·kh·kw, I·kh·kw) float32 over its patches x; patches: how many entered;
    images: how many were seen."""

    moments: Mapping[str, Tensor]
    patches: Mapping[str, int]
    images: int

    def moment(self, name: str) -> Tensor | None:
        """The estimate of E[x xᵀ] that decompositions use; None for a layer that has none.

        It is the mean drawn towards inputs of no direction, as if that many more patches of white noise of the same
        energy had been seen as a patch has entries: few patches leave most directions unseen, and a decomposition that
        took them for impossible would fail on the next image.
        """
        mean = self.moments.get(name)
        if mean is None:
            return None
        side, count = len(mean), self.patches[name]
        white = torch.eye(side, dtype=mean.dtype, device=mean.device) * mean.diagonal().mean()
        return (count * mean + side * white) / (count + side)


def calibrate(model: nn.Module, data: Any, *, images: int = 512, seed: int = 0) -> Calibration:
    """Run `model` on up to `images` images of `data` and take the second moment of every convolution's patches.

    data: a batch (N, C, H, W), a data set of (image, label), or an iterable of batches with or without labels; the
    first images of it, of a data set random ones. Labels are not used. The model runs in eval mode without gradients,
    on its own device, and is left as it was. Layers that cannot be factored, and patches above 9,216 entries, are left
    out. Raises ValueError or TypeError, naming the argument.
    """
    if not isinstance(model, nn.Module):
        raise _checks.fail_type("model", "a torch.nn.Module", model)
    _checks.integer("images", images, 1)
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    draw = torch.Generator().manual_seed(_checks.integer("seed", seed, 0))

    def note(name: str, conv: nn.Conv2d, x: Tensor) -> None:
        patches = _patches(conv, x.detach().float() if x.dim() == 4 else x.detach().float()[None])
        if patches.shape[1] > POSITIONS:
            patches = patches[:, torch.randperm(patches.shape[1], generator=draw)[:POSITIONS].to(patches.device)]
        sums[name] = patches @ patches.T + sums.get(name, 0)
        counts[name] = counts.get(name, 0) + patches.shape[1]

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and not why_not_factorable(module) and module.weight[0].numel() <= LARGEST:
            handles.append(module.register_forward_pre_hook(lambda conv, args, name=name: note(name, conv, args[0])))
    if not handles:
        raise _checks.fail("model", "a model with a convolution that can be factored", type(model).__name__)
    like = next(parameter for parameter in model.parameters())
    seen = 0
    try:
        with evaluating(model):
            for x, _ in image_batches(data, images, seed):
                model(x.to(like.device, like.dtype))
                seen += len(x)
    finally:
        for handle in handles:
            handle.remove()
    moments = {name: total / counts[name] for name, total in sums.items()}
    for name, moment in moments.items():
        _checks.finite(f"data (what the layer {name!r} sees of it)", moment)
    return Calibration(moments, counts, seen)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every module has its own training flag back afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, flag in flags:
            module.training = flag


def image_batches(data: Any, images: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Batches (N, C, H, W) of up to `images` images in all, with labels (N,) where `data` has them."""
    found = 0
    for batch in _raw(data, seed):
        x, labels = (batch[0], batch[1]) if isinstance(batch, tuple | list) and len(batch) == 2 else (batch, None)
        _checks.tensor("data (a batch of it)", x, (None, None, None, None), "(N, C, H, W)")
        take = min(len(x), images - found)
        if take:
            yield x[:take], None if labels is None else labels[:take]
        found += take
        if found >= images:
            return
    if not found:
        raise _checks.fail("data", "of at least one image", "none")


def _raw(data: Any, seed: int) -> Iterable[Any]:
    if isinstance(data, Tensor):
        return torch.split(data, BATCH) if data.dim() else [data]
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        return zip(torch.split(data[0], BATCH), torch.split(data[1], BATCH), strict=True)
    if isinstance(data, Dataset) and hasattr(data, "__len__"):
        return batches(data, BATCH, seed=seed, shuffle=True)
    if isinstance(data, Iterable):
        return data
    raise _checks.fail_type("data", "a batch of images, a data set, or an iterable of batches", data)


def _patches(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """What the kernel of `conv` meets on the maps x (N, I, H, W): (I·kh·kw, patches)."""
    if any(conv._reversed_padding_repeated_twice):
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
    columns = F.unfold(x, conv.kernel_size, conv.dilation, 0, conv.stride)
    return columns.transpose(0, 1).flatten(1)
