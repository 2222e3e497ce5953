"""Where a run is kept: one file, or where several ranks train, a folder that a small file beside it names."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from fastrank import _atomic, _checks
from fastrank.distributed import Parallel
from fastrank.train import _checkpoint, _sharded
from fastrank.train._checkpoint import Run

CHECKPOINT = "checkpoint.safetensors"
POINTER = "checkpoint.json"


class Place:
    """The checkpoint of a run in the folder `run_dir`, which is made, and freed of what killed writers left.

    One process writes ``checkpoint.safetensors``, several a folder that ``checkpoint.json`` names; either reads both.
    Whichever is written last removes the other once it is whole.
    """

    def __init__(self, run_dir: str | os.PathLike[str], parallel: Parallel) -> None:
        self.folder, self.parallel = Path(run_dir), parallel
        if self.folder.exists() and not self.folder.is_dir():
            raise _checks.fail("run_dir", "a folder", self.folder)
        self._by_rank_0(self._make)

    def _make(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in (CHECKPOINT, POINTER):
            _atomic.remove_leftovers(self.folder / name)
        _sharded.clean(self.folder / POINTER)

    def _by_rank_0(self, act: Callable[[], object]) -> None:
        """Have rank 0 act, and every rank raise the OSError that it meets."""
        failure: OSError | None = None
        if self.parallel.main:
            try:
                act()
            except OSError as error:
                failure = error
        failure = self.parallel.decide(failure)
        if failure is not None:
            raise failure

    def require(self) -> None:
        """Raise PermissionError where no checkpoint can be written: before the training, not after its first epoch."""
        self._by_rank_0(lambda: _atomic.require_place(self.folder / CHECKPOINT))

    def newest(self) -> Path | None:
        """The file that was written last, if there is one."""
        found = [path for name in (CHECKPOINT, POINTER) if (path := self.folder / name).exists()]
        return max(found, key=lambda path: path.stat().st_mtime_ns) if found else None

    def restore(self, run: Run) -> None:
        """Bring `run` to where the newest checkpoint left it; ValueError where that is damaged or another run's."""
        path = self.parallel.decide(self.newest())
        if path.name == POINTER:
            _sharded.restore(path, run)
        else:
            _checkpoint.restore(path, run)

    def save(self, run: Run) -> None:
        """Write the checkpoint; until it is whole, the one before counts. Every rank calls this."""
        if self.parallel.world == 1:
            _checkpoint.save(self.folder / CHECKPOINT, run)
            (self.folder / POINTER).unlink(missing_ok=True)
            _sharded.clean(self.folder / POINTER)
        else:
            _sharded.save(self.folder / POINTER, run)
            if self.parallel.main:
                (self.folder / CHECKPOINT).unlink(missing_ok=True)
            self.parallel.wait()
