"""What a network is trained for: its batches, its loss and its test; classification here, detection in `_detection`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from fastrank.data import Augment, batches
from fastrank.distributed import ALONE, Parallel
from fastrank.train._config import TrainConfig
from fastrank.train._evaluate import checked_logits, evaluate, ready


class Outcome(NamedTuple):
    """What one batch gave: the mean loss over its images (0-d, with its graph), how many of them were right (0-d; 0
    where the task has no such count), and how many they are."""

    loss: Tensor
    right: Tensor
    images: int


class Task(ABC):
    """What the training loop does not know by itself.

    Batches must be functions of (config.seed, epoch, position) alone, and everything random in `outcome` must come from
    torch's global generators: then a run resumes bit for bit. `batches` and `test` are told of `parallel` only where
    several ranks train together.
    """

    name: str
    counts_right = False
    """Whether `Outcome.right` counts something; otherwise rows have no training accuracy."""
    refuses_one_image = False
    """Whether a last batch of one image has to be left out."""

    @abstractmethod
    def check(self, config: TrainConfig, train: Dataset[Any], test: Dataset[Any] | None) -> None:
        """Raise ValueError or TypeError where settings and data do not belong to this task."""

    def ready(self, name: str, data: Dataset[Any], device: torch.device) -> Dataset[Any]:
        """`data` as the loop uses it; raises ValueError or TypeError, under `name`, for what is no data set."""
        return ready(name, data, device)

    @abstractmethod
    def batches(
        self,
        data: Dataset[Any],
        config: TrainConfig,
        device: torch.device,
        epoch: int,
        start: int,
        drop_last: bool,
        parallel: Parallel = ALONE,
    ) -> Iterator[Any]:
        """The training batches of one epoch on `device`, from batch number `start` on; of each a rank's own part."""

    @abstractmethod
    def outcome(
        self,
        model: nn.Module,
        batch: Any,
        data: Dataset[Any],
        config: TrainConfig,
        autocast: AbstractContextManager[Any],
    ) -> Outcome:
        """Forward and loss of one batch; `autocast` is entered around what may run in half precision."""

    @abstractmethod
    def test(
        self, model: nn.Module, data: Dataset[Any], config: TrainConfig, parallel: Parallel = ALONE
    ) -> Mapping[str, Any]:
        """The fields of an `EpochRow` that testing fills: test_top1 and test_top5, or metrics."""


class Classification(Task):
    """Cross-entropy of logits (N, classes), with label smoothing and augmentation as configured."""

    name = "classification"
    counts_right = True
    refuses_one_image = True  # batch normalisation does

    def check(self, config: TrainConfig, train: Dataset[Any], test: Dataset[Any] | None) -> None:
        """Every configuration is one of classification."""

    def batches(
        self,
        data: Dataset[Any],
        config: TrainConfig,
        device: torch.device,
        epoch: int,
        start: int,
        drop_last: bool,
        parallel: Parallel = ALONE,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (B, C, H, W) and labels (B,), shuffled and augmented."""
        source = batches(
            data,
            config.batch_size,
            seed=config.seed,
            epoch=epoch,
            start=start,
            shuffle=True,
            augment=Augment(config.shift, config.flip) if config.shift or config.flip else None,
            drop_last=drop_last,
            workers=config.workers,
            part=parallel.part,
        )
        for images, labels in source:
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    def outcome(
        self,
        model: nn.Module,
        batch: tuple[Tensor, Tensor],
        data: Dataset[Any],
        config: TrainConfig,
        autocast: AbstractContextManager[Any],
    ) -> Outcome:
        """Cross-entropy in float32, and the images whose largest logit is the right one."""
        images, labels = batch
        with autocast:
            logits = model(images)
        logits = checked_logits(logits, labels, data)
        loss = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
        return Outcome(loss, (logits.detach().argmax(1) == labels).sum(), len(labels))

    def test(
        self, model: nn.Module, data: Dataset[Any], config: TrainConfig, parallel: Parallel = ALONE
    ) -> Mapping[str, Any]:
        """Accuracies among one and among five classes, in percent; each rank looks at a part of the images."""
        found = evaluate(model, data, workers=config.workers, parallel=parallel)
        return {"test_top1": found.top1, "test_top5": found.top5}
