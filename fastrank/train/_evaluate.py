"""Accuracy and loss of a classifier, and what training and evaluation ask of models and data alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from fastrank import _checks
from fastrank.data import ImageSet, batches
from fastrank.distributed import ALONE, Parallel


@dataclass(frozen=True)
class Evaluation:
    """Accuracies in percent, the mean cross-entropy, and the number of images they are taken over."""

    top1: float
    top5: float
    loss: float
    count: int


def evaluate(
    model: nn.Module,
    data: Dataset[Any],
    batch_size: int = 256,
    device: str | None = None,
    *,
    workers: int = 0,
    parallel: Parallel = ALONE,
) -> Evaluation:
    """Accuracy and loss of a classifier in evaluation mode, without gradients; every training flag is restored.

    device: by default the model's; otherwise the model is moved there. parallel: the ranks that look at a part each,
    all with the same model, and all get the result. Raises ValueError on empty data.
    """
    where = resolve_device(device, model)
    data = ready("data", data, where)
    if device is not None:
        model.to(where)
    done = 0
    totals = torch.zeros(3, dtype=torch.float64, device=where)
    with flags_restored(model), torch.no_grad():
        model.eval()
        for images, labels in batches(data, batch_size, workers=workers, part=parallel.part):
            labels = labels.to(where)
            logits = checked_logits(model(images.to(where)), labels, data)
            own = parallel.images(min(batch_size, length(data) - done))
            logits, labels, done = logits[:own], labels[:own], done + batch_size
            best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
            totals += torch.stack([best[:, 0].sum(), best.sum(), F.cross_entropy(logits, labels, reduction="sum")])
    top1, top5, loss = (total / length(data) for total in parallel.sum(totals).tolist())
    return Evaluation(100 * top1, 100 * top5, loss, length(data))


def checked_logits(logits: Any, labels: Tensor, data: Dataset[Any]) -> Tensor:
    """The model's output as float32 or float64 (N, classes), checked against the data."""
    _checks.tensor("output of the model", logits, (len(labels), None), "(N, classes)")
    classes = getattr(data, "classes", None)
    if isinstance(classes, int) and logits.shape[1] < classes:
        raise _checks.fail("output of the model", f"of at least {classes} classes, as the data", tuple(logits.shape))
    result: Tensor = logits if logits.dtype == torch.float64 else logits.float()
    return result


def length(data: Dataset[Any]) -> int:
    return len(data)  # type: ignore[arg-type]


def ready(name: str, data: Dataset[Any], device: torch.device) -> Dataset[Any]:
    """`data`, known to be map-style and not empty; in-memory images go to the device as a whole."""
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise _checks.fail_type(name, "a map-style data set with a length", data)
    if not length(data):
        raise _checks.fail(name, "a data set of at least one image", "0 images")
    return data.to(device) if isinstance(data, ImageSet) else data


def resolve_device(name: str | None, model: nn.Module) -> torch.device:
    if not isinstance(model, nn.Module):
        raise _checks.fail_type("model", "a torch.nn.Module", model)
    if name is None:
        return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise _checks.fail("device", "'cpu' or 'cuda', with or without a number", repr(name)) from error
    if device.type not in ("cpu", "cuda"):
        raise _checks.fail("device", "'cpu' or 'cuda', with or without a number", repr(name))
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise _checks.fail("device", f"one of the {torch.cuda.device_count()} CUDA devices visible here", repr(name))
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else device


@contextmanager
def flags_restored(model: nn.Module) -> Iterator[None]:
    """Give every module its own training flag back, since parts of a model may be frozen in evaluation mode."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
