"""Runs to kill and to starve: small trainings of every published system, and faults at each step of saving."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import process_groups

from fastrank import _atomic
from fastrank.nn import FusedCPConv
from fastrank.regularize import LowRankProjection, NuclearNorm
from fastrank.regularize.base import Regularizer
from fastrank.train import History

SYSTEMS = ("nrmf", "trp", "funnel", "norton")
STEPS = 4
"""Steps an epoch of `train`."""


def network(system: str) -> nn.Sequential:
    """A network with batch statistics and a kernel of 96 rows; for NORTON that kernel as CP filters."""
    model = process_groups.network("nrmf" if system == "norton" else system)
    if system == "norton":
        wide: Any = model[3]
        model[3] = FusedCPConv.from_conv(wide, 2)
    return model


def penalties(system: str, model: nn.Module) -> list[Regularizer]:
    """The regularisers of a system; those of TRP start warm in the projection too. A fine-tuning has none."""
    if system == "norton":
        return []
    if system == "trp":
        projection = LowRankProjection(model, every=3, energy=0.98, warm=True)
        return [projection, NuclearNorm(model, 3e-4, energy=0.98, matricization="channel")]
    return process_groups.penalties(system, model)


def train(system: str, folder: Path | None, *, epochs: int = 3, **options: Any) -> tuple[nn.Sequential, History]:
    """Train a system in a folder, with a checkpoint after every step."""
    model = network(system)
    settings = {"checkpoint_steps": 1, "epochs": epochs, "lr": 0.02, **options}
    regularizers = settings.pop("regularizers", None) or penalties(system, model)
    return model, process_groups.train(model, regularizers, folder, **settings)


class _Cut:
    """A file that is opened for writing: every write has a point in its middle."""

    def __init__(self, file: Any, reach: Callable[[str], None]) -> None:
        self._file, self._reach = file, reach

    def write(self, data: bytes) -> int:
        half = len(data) // 2
        self._file.write(data[:half])
        self._file.flush()
        self._reach("write")
        return half + int(self._file.write(data[half:]))

    def __enter__(self) -> _Cut:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def points(reach: Callable[[str], None]) -> Iterator[None]:
    """Have `reach` called, with its name, at every step of saving: before system calls, and in the middle of writes.

    `reach` may end the process, or raise what the system would.
    """
    from torch.distributed.checkpoint.filesystem import FileSystem

    before = {name: getattr(os, name) for name in ("fsync", "replace", "mkdir")}
    create_stream = FileSystem.create_stream

    def pointed(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            reach(name)
            return before[name](*arguments, **options)

        return call

    def opened(path: Any, mode: str) -> Any:
        reach("open")
        return _Cut(open(path, mode), reach)

    @contextmanager
    def stream(self: FileSystem, path: Any, mode: str) -> Iterator[Any]:
        with create_stream(self, path, mode) as file:
            yield _Cut(file, reach) if "w" in mode else file

    module: Any = _atomic
    try:
        for name in before:
            setattr(os, name, pointed(name))
        module.open, FileSystem.create_stream = opened, stream
        yield
    finally:
        for name, call in before.items():
            setattr(os, name, call)
        del module.open
        FileSystem.create_stream = create_stream


class At:
    """Acts at the point of that number, counted from 1, and never again."""

    def __init__(self, number: int, act: Callable[[], None]) -> None:
        self.number, self.act, self.seen = number, act, list[str]()

    def __call__(self, name: str) -> None:
        self.seen.append(name)
        if len(self.seen) == self.number:
            self.act()
