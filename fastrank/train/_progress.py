"""What a training run shows on standard error: a bar on a terminal, otherwise one plain line an epoch."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress


@dataclass(frozen=True, kw_only=True)
class EpochRow:
    """One finished epoch, numbered from 1.

    loss: mean loss over the training images, while the weights moved; penalty: the regularisers' values at the end of
    the epoch; accuracies of a classifier in percent, the training one over augmented images, the test ones None without
    test data; lr of the last step; seconds with evaluation; metrics: what the test gave of another task, the foremost
    first, such as "bbox_ap" (a share of 1).
    """

    epoch: int
    loss: float
    penalty: float
    train_top1: float | None
    test_top1: float | None = None
    test_top5: float | None = None
    lr: float
    seconds: float
    metrics: Mapping[str, float] = field(default_factory=dict)


class Reporter(Protocol):
    """Where a training loop says how far it is."""

    def steps(self, done: int, epoch: int, loss: float, accuracy: float | None) -> None:
        """`done` steps of the whole run lie behind, in epoch number `epoch` (from 1), of mean loss and accuracy (%)."""

    def epoch(self, row: EpochRow) -> None:
        """An epoch is finished; `row` is its line in the history."""


@contextmanager
def reporting(label: str, epochs: int, steps_per_epoch: int, done: int, progress: bool | None) -> Iterator[Reporter]:
    """A reporter for a run of which `done` steps lie behind; `progress=False` gives one that says nothing."""
    bar = None if progress is False else _bar()
    if progress is False:
        yield _Silent()
    elif bar is not None:
        with bar:
            yield _Bar(bar, label, epochs, steps_per_epoch, done)
    else:
        yield _Lines(label, epochs, done / max(steps_per_epoch, 1))


def _bar() -> Progress | None:
    """A bar on standard error, None where that is no terminal that can show one."""
    if not sys.stderr.isatty():
        return None
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if console.is_dumb_terminal:
        return None
    columns = (
        TextColumn("{task.description}", markup=False),
        TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[numbers]}", markup=False),
        TextColumn("ETA"),
        TimeRemainingColumn(compact=True),
    )
    return Progress(*columns, console=console)


def summary(row: EpochRow) -> str:
    """A finished epoch in one line, without its number."""
    parts = [f"loss {row.loss:.4f}"]
    if row.penalty:
        parts.append(f"penalty {row.penalty:.4g}")
    if row.train_top1 is not None:
        parts.append(f"train {row.train_top1:.2f} %")
    return "  ".join([*parts, *_tested(row, 2)])


def _tested(row: EpochRow, digits: int) -> list[str]:
    """The foremost figure of the test, if there was one; accuracies with as many digits as given."""
    if row.test_top1 is not None:
        return [f"test {row.test_top1:.{digits}f} %"]
    return [f"{name} {value:.{digits + 2}f}" for name, value in [*row.metrics.items()][:1]]


class _Silent:
    def steps(self, done: int, epoch: int, loss: float, accuracy: float | None) -> None: ...

    def epoch(self, row: EpochRow) -> None: ...


class _Lines:
    def __init__(self, label: str, epochs: int, done: float) -> None:
        self.label, self.epochs, self.done, self.started = label, epochs, done, time.monotonic()

    def steps(self, done: int, epoch: int, loss: float, accuracy: float | None) -> None: ...

    def epoch(self, row: EpochRow) -> None:
        left = (time.monotonic() - self.started) / (row.epoch - self.done) * (self.epochs - row.epoch)
        head = f"{self.label}: epoch {row.epoch}/{self.epochs}"
        print(f"{head}  {summary(row)}  lr {row.lr:.3g}  {row.seconds:.1f} s  ETA {left:.0f} s", file=sys.stderr)


class _Bar:
    def __init__(self, bar: Progress, label: str, epochs: int, steps_per_epoch: int, done: int) -> None:
        self.bar, self.epochs, self.tested = bar, epochs, list[str]()
        total = epochs * steps_per_epoch
        epoch = min(done // max(steps_per_epoch, 1) + 1, epochs)
        self.task = bar.add_task(label, total=total, completed=done, epoch=epoch, epochs=epochs, numbers="")

    def steps(self, done: int, epoch: int, loss: float, accuracy: float | None) -> None:
        self.bar.update(self.task, completed=done, epoch=epoch, numbers=self.numbers(loss, accuracy))

    def epoch(self, row: EpochRow) -> None:
        self.tested = _tested(row, 1)
        self.bar.update(self.task, epoch=row.epoch, numbers=self.numbers(row.loss, row.train_top1))

    def numbers(self, loss: float, accuracy: float | None) -> str:
        # Fewer digits than in a plain line: the row has to fit a terminal of 80 columns.
        right = [] if accuracy is None else [f"train {accuracy:.1f} %"]
        return "  ".join([f"loss {loss:.4f}", *right, *self.tested])
