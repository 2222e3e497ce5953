"""What a training run shows on standard error: a bar on a terminal, otherwise one plain line an epoch."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


@dataclass(frozen=True)
class EpochRow:
    """One finished epoch, numbered from 1.

    loss: mean cross-entropy over the training images, while the weights moved; penalty: the regularisers' values at the
    end of the epoch; accuracies in percent, the training one over augmented images, the test ones None without test
    data; lr of the last step; seconds with evaluation.
    """

    epoch: int
    loss: float
    penalty: float
    train_top1: float
    test_top1: float | None
    test_top5: float | None
    lr: float
    seconds: float


class Reporter(Protocol):
    """Where a training loop says how far it is."""

    def steps(self, done: int, epoch: int, loss: float, accuracy: float) -> None:
        """`done` steps of the whole run lie behind, in epoch number `epoch` (from 1), of mean loss and accuracy (%)."""

    def epoch(self, row: EpochRow) -> None:
        """An epoch is finished; `row` is its line in the history."""


@contextmanager
def reporting(label: str, epochs: int, steps_per_epoch: int, done: int, progress: bool | None) -> Iterator[Reporter]:
    """A reporter for a run of which `done` steps lie behind; `progress=False` gives one that says nothing."""
    if progress is False:
        yield _Silent()
    elif sys.stderr.isatty() and not (console := Console(stderr=True)).is_dumb_terminal:
        columns = (
            TextColumn("{task.description}", markup=False),
            TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[numbers]}", markup=False),
            TextColumn("ETA"),
            TimeRemainingColumn(compact=True),
        )
        with Progress(*columns, console=console) as bar:
            yield _Bar(bar, label, epochs, steps_per_epoch, done)
    else:
        yield _Lines(label, epochs, done / max(steps_per_epoch, 1))


def summary(row: EpochRow) -> str:
    """A finished epoch in one line, without its number."""
    parts = [f"loss {row.loss:.4f}"]
    if row.penalty:
        parts.append(f"penalty {row.penalty:.4g}")
    parts.append(f"train {row.train_top1:.2f} %")
    if row.test_top1 is not None:
        parts.append(f"test {row.test_top1:.2f} %")
    return "  ".join(parts)


class _Silent:
    def steps(self, done: int, epoch: int, loss: float, accuracy: float) -> None: ...

    def epoch(self, row: EpochRow) -> None: ...


class _Lines:
    def __init__(self, label: str, epochs: int, done: float) -> None:
        self.label, self.epochs, self.done, self.started = label, epochs, done, time.monotonic()

    def steps(self, done: int, epoch: int, loss: float, accuracy: float) -> None: ...

    def epoch(self, row: EpochRow) -> None:
        left = (time.monotonic() - self.started) / (row.epoch - self.done) * (self.epochs - row.epoch)
        head = f"{self.label}: epoch {row.epoch}/{self.epochs}"
        print(f"{head}  {summary(row)}  lr {row.lr:.3g}  {row.seconds:.1f} s  ETA {left:.0f} s", file=sys.stderr)


class _Bar:
    def __init__(self, bar: Progress, label: str, epochs: int, steps_per_epoch: int, done: int) -> None:
        self.bar, self.epochs, self.tested = bar, epochs, ""
        total = epochs * steps_per_epoch
        epoch = min(done // max(steps_per_epoch, 1) + 1, epochs)
        self.task = bar.add_task(label, total=total, completed=done, epoch=epoch, epochs=epochs, numbers="")

    def steps(self, done: int, epoch: int, loss: float, accuracy: float) -> None:
        numbers = f"loss {loss:.4f}  train {accuracy:.1f} %{self.tested}"
        self.bar.update(self.task, completed=done, epoch=epoch, numbers=numbers)

    def epoch(self, row: EpochRow) -> None:
        self.tested = "" if row.test_top1 is None else f"  test {row.test_top1:.1f} %"
        # Fewer digits than in a plain line: the row has to fit a terminal of 80 columns.
        numbers = f"loss {row.loss:.4f}  train {row.train_top1:.1f} %{self.tested}"
        self.bar.update(self.task, epoch=row.epoch, numbers=numbers)
