"""TensorBoard's logs of a training by `fastrank.train`: `Writer`."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any

from torch import nn

from fastrank import _checks, report
from fastrank.integrations._optional import require
from fastrank.train import EpochRow


class Writer:
    """Writes epochs as TensorBoard events into `folder`: ``fit(..., on_epoch=Writer(folder))``.

    Every number of the row becomes a scalar under its name ("loss", "test_top1", ...). With `model`, also the rank of
    every kernel that keeps `energy` of the squared singular values ("rank/LAYER.MATRIX"), and a histogram of every gate
    vector ("gate/NAME"). Use it in a ``with`` block, or `close` it. Raises ImportError without tensorboard, ValueError
    or TypeError for a wrong argument, OSError where it cannot write.
    """

    def __init__(
        self, folder: str | os.PathLike[str], model: nn.Module | None = None, *, energy: float = report.ENERGY
    ) -> None:
        module = require("torch.utils.tensorboard", "tensorboard", "TensorBoard logging")
        if model is not None and not isinstance(model, nn.Module):
            raise _checks.fail_type("model", "a torch.nn.Module", model)
        self._energy = _checks.number("energy", energy, 0.0, 1.0, open_low=True)
        self._model = model
        os.makedirs(folder, exist_ok=True)
        self._events: Any = module.SummaryWriter(os.fspath(folder))

    def __call__(self, row: EpochRow) -> None:
        """Write an epoch."""
        numbers = {**vars(row), **row.metrics}
        for name, value in numbers.items():
            if name != "epoch" and report.is_number(value):
                self._events.add_scalar(name, value, row.epoch)
        if self._model is not None:
            for layer, spectra in report.spectra(self._model, energy=self._energy).items():
                for name, spectrum in spectra.items():
                    self._events.add_scalar(f"rank/{layer}.{name}", spectrum.rank, row.epoch)
            for name, gate in report.gates_of(self._model).items():
                self._events.add_histogram(f"gate/{name}", gate, row.epoch)
        self._events.flush()

    def close(self) -> None:
        """Write what is left and close the files."""
        self._events.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def epoch_logger(folder: str | os.PathLike[str], model: nn.Module | None = None) -> Writer:
    """A `Writer` as the `on_epoch` of `fastrank.train.fit`."""
    return Writer(folder, model)
