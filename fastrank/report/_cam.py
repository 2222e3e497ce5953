"""Class activation maps (Grad-CAM): what of an image the last feature maps of a network answer to."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastrank import _checks
from fastrank.report._plots import figure_of, write


@dataclass(frozen=True)
class Activation:
    """heat: (H, W) in [0, 1], of the image's size; layer: where it was read; predicted: the class of the largest logit
    and its softmax probability."""

    heat: Tensor
    layer: str
    predicted: int
    probability: float


def activation_map(
    model: nn.Module, image: Tensor, *, layer: str | None = None, target: int | None = None
) -> Activation:
    """Grad-CAM of one normalised image (C, H, W) under a classifier, by the pytorch-grad-cam library.

    layer: the module whose maps are weighted; by default the last convolution, dense or factored, that the forward
    calls on a map of more than one pixel. target: the class that is explained; by default the predicted one.
    Training flags, gradients and requires_grad of the model are as before afterwards.
    Raises ValueError for an unknown layer or class, ImportError where the library is missing.
    """
    try:
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    except ImportError as error:
        message = "class activation maps need grad-cam, which is absent: pip install 'fastrank[cam]'"
        raise ImportError(message) from error
    _checks.tensor("image", image, (None, None, None), "(C, H, W)")
    like = next((parameter for parameter in model.parameters()), image)
    flags = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        model.eval()
        batch = image.detach().to(like.device, like.dtype)[None]
        logits, shapes = _watched(model, batch)
        layer = _layer(model, shapes, layer)
        probabilities = logits[0].float().softmax(0)
        predicted = int(probabilities.argmax())
        target = predicted if target is None else _checks.integer("target", target, 0, logits.shape[1] - 1)
        # The image asks for a gradient too, so that the maps of a frozen network have one.
        with torch.enable_grad(), GradCAM(model=model, target_layers=[model.get_submodule(layer)]) as cam:
            heat = cam(input_tensor=batch.requires_grad_(True), targets=[ClassifierOutputTarget(target)])[0]
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, training in flags:
            module.training = training
    return Activation(torch.from_numpy(heat).float(), layer, predicted, float(probabilities[predicted]))


def _watched(model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, tuple[int, ...]]]:
    """The logits, and the output shape of every module that was called, in the order of the last calls."""
    shapes: dict[str, tuple[int, ...]] = {}
    handles = []

    def note(name: str, output: Any) -> None:
        shapes.pop(name, None)
        shapes[name] = tuple(output.shape) if isinstance(output, Tensor) else ()

    for name, module in model.named_modules():
        handles.append(module.register_forward_hook(lambda _m, _i, output, name=name: note(name, output)))
    try:
        with torch.no_grad():
            logits = model(batch)
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise _checks.fail("model", "a classifier with an output of shape (1, classes)", got)
    return logits, shapes


def _layer(model: nn.Module, shapes: dict[str, tuple[int, ...]], wanted: str | None) -> str:
    maps = [name for name, shape in shapes.items() if len(shape) == 4 and shape[-1] * shape[-2] > 1]
    if wanted is not None:
        if wanted not in maps:
            expected = "a module whose output is a batch of maps of more than one pixel"
            raise _checks.fail("layer", expected, f"{wanted!r}{_checks.near(wanted, maps)}")
        return wanted
    modules = dict(model.named_modules())
    convolutions = [
        name
        for name in maps
        if isinstance(modules[name], nn.Conv2d) or callable(getattr(modules[name], "conv_stages", None))
    ]
    if not convolutions:
        raise _checks.fail("model", "a network with a convolution over maps of more than one pixel", "none")
    return convolutions[-1]


def plot_activations(
    path: str | os.PathLike[str],
    images: Sequence[tuple[str, Tensor]],
    columns: Sequence[tuple[str, Sequence[Activation]]],
    *,
    title: str,
) -> None:
    """Images beside their activation maps under several networks, written as PNG.

    images: a caption and an image (C, H, W) in [0, 1] a row; columns: a heading and one activation a row each.
    """
    rows = len(images)
    figure, axes = figure_of(rows, 1 + len(columns), width=1.9 * (1 + len(columns)) + 0.7, height=2.0 * rows + 0.7)
    shown = None
    for row, (caption, image) in enumerate(images):
        picture = image.permute(1, 2, 0).expand(-1, -1, 3).clamp(0, 1).numpy()
        for column, ax in enumerate(axes[row]):
            ax.set_xticks([])
            ax.set_yticks([])
            for side in ax.spines.values():
                side.set_visible(False)
            ax.imshow(picture, interpolation="nearest")
            if column == 0:
                ax.set_xlabel(caption, fontsize=8)
            else:
                heading, activations = columns[column - 1]
                found = activations[row]
                heat = found.heat.numpy()
                shown = ax.imshow(heat, cmap="turbo", vmin=0, vmax=1, alpha=0.55, interpolation="bilinear")
                ax.set_xlabel(f"predicts {found.predicted} ({100 * found.probability:.0f} %)", fontsize=8)
            if row == 0:
                ax.set_title("Input" if column == 0 else heading, fontsize=10)
    if shown is not None:
        bar = figure.colorbar(shown, ax=axes, fraction=0.025, pad=0.01, ticks=[0, 1])
        bar.outline.set_visible(False)
        if bar.solids is not None:
            bar.solids.set_alpha(1)
        bar.ax.tick_params(labelsize=8, length=0)
        bar.set_label("share of the largest activation", fontsize=8)
    write(figure, path, title)
