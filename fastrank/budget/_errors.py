"""How much a choice hurts, by what the layer computes on data, or by what the network loses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrank import _checks
from fastrank.budget._choices import Choice, Place, approximation
from fastrank.calibration import evaluating, image_batches
from fastrank.decompose.weighted import output_error

PROBES = 4
"""Choices of a layer whose loss is measured; between them it is taken to grow evenly with the error."""


def by_outputs(place: Place, options: Sequence[Choice], moment: Tensor | None, calibrated: bool) -> list[Choice]:
    """`options` with the share of the outputs' energy that each loses; as they are where no moment is known.

    calibrated: the decompositions are made for that moment too.
    """
    if moment is None:
        return list(options)
    own = moment if calibrated else None
    return [
        replace(c, error=output_error(place.conv.weight, approximation(place.conv, c.layer, own), moment))
        for c in options
    ]


def by_loss(
    model: nn.Module,
    places: Sequence[Place],
    options: Sequence[Sequence[Choice]],
    data: Any,
    images: int,
    moments: Mapping[str, Tensor | None],
) -> list[list[Choice]]:
    """`options` with the growth of the mean cross-entropy on `images` images that each causes alone.

    Of every layer a few choices are tried, in the model itself, whose weights are as before afterwards.
    """
    import numpy

    batches = [(x, labels) for x, labels in image_batches(data, images)]
    base = mean_loss(model, batches)
    found = []
    for place, mine in zip(places, options, strict=True):
        ordered = sorted(mine, key=lambda choice: choice.error)
        probed = {round(i * (len(ordered) - 1) / (PROBES - 1)) for i in range(PROBES)} if ordered else set()
        errors, losses = [0.0], [0.0]
        kept = place.conv.weight.data
        try:
            for probe in (ordered[i] for i in sorted(probed)):
                place.conv.weight.data = approximation(place.conv, probe.layer, moments.get(place.name))
                loss = mean_loss(model, batches) - base
                place.conv.weight.data = kept
                if probe.error > errors[-1]:
                    errors.append(probe.error)
                    # A network may get better by chance; a larger error is never taken for the smaller harm.
                    losses.append(max(losses[-1], loss))
        finally:
            place.conv.weight.data = kept
        found.append([replace(c, error=float(numpy.interp(c.error, errors, losses)) + 1e-6 * c.error) for c in mine])
    return found


def mean_loss(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor | None]]) -> float:
    """Mean cross-entropy of a classifier over batches with labels, in eval mode."""
    total, count = _run(model, batches, lambda logits, labels: F.cross_entropy(logits, labels, reduction="sum"))
    return total / count


def top1(model: nn.Module, data: Any, images: int) -> float:
    """Accuracy in percent on up to `images` images of `data`."""
    batches = list(image_batches(data, images))
    total, count = _run(model, batches, lambda logits, labels: (logits.argmax(1) == labels).sum())
    return 100 * total / count


def _run(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor | None]], score: Any) -> tuple[float, int]:
    like = next(parameter for parameter in model.parameters())
    total, count = torch.zeros((), dtype=torch.float64, device=like.device), 0
    with evaluating(model):
        for x, labels in batches:
            if labels is None:
                raise _checks.fail("data", "batches of images and labels for an accuracy", "images alone")
            logits = model(x.to(like.device, like.dtype))
            _checks.tensor("output of the model", logits, (len(x), None), "(N, classes)")
            total += score(logits.double(), labels.to(like.device))
            count += len(x)
    return float(total), count
