"""Joining the other ranks of a program, and ending together, with the error of the one that failed."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fastrank import _checks

FAILED = "fastrank/failed"
POLL = 0.25
"""Seconds between two looks at whether another rank has failed."""
GRACE = 2.0
"""Seconds that a rank has to end by itself once another one has failed."""
SENTENCES = (ValueError, TypeError, ImportError, OSError)
"""Errors in what the caller gave, which a command reports as one sentence."""


def started_as_rank() -> bool:
    """Whether this process was started as one of several, by torchrun or another launcher that sets its variables."""
    return os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ


def rank() -> int:
    """The number of this process among those of its process group; 0 where there is none."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@contextmanager
def joined(*, timeout: float = 1800.0) -> Iterator[None]:
    """Be one of the ranks that torchrun started: a process group (gloo, with NCCL for GPUs) for the time of the block.

    On a machine with GPUs rank r of a node uses GPU number r (LOCAL_RANK). A rank that fails tells the others, which
    end within seconds, wherever they are waiting, with its error: those that can raise a RuntimeError that names rank
    and cause, the others print it and exit with status 1. Its own error gets the rank as well. timeout: seconds that a
    collective waits. Does nothing where this process was not started as one of several.
    """
    if not started_as_rank():
        yield
        return
    if not dist.is_available():
        raise RuntimeError("several ranks need a torch with torch.distributed, got one built without it")
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise _checks.fail("LOCAL_RANK", f"below the number of GPUs, {torch.cuda.device_count()}", local)
        torch.cuda.set_device(local)
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    with watched():
        yield
    dist.destroy_process_group()


@contextmanager
def watched() -> Iterator[None]:
    """What `joined` promises about failures, in a process group that exists already."""
    from torch.distributed.distributed_c10d import _get_default_store

    watch = _Watch(_get_default_store(), dist.get_rank(), dist.get_world_size())
    try:
        yield
        dist.barrier()  # no rank leaves while another may still need it, or fail
    except BaseException as error:
        raise watch.failure(error) from error
    finally:
        watch.over.set()


class _Watch:
    """A thread that looks whether another rank has failed, and ends this process where it goes on waiting for it."""

    def __init__(self, store: Any, rank: int, world: int) -> None:
        self.store, self.rank, self.world = store, rank, world
        self.over = threading.Event()
        # A store serves one thread at a time.
        self.thread = threading.Thread(target=self.look, args=(store.clone(),), daemon=True)
        self.thread.start()

    def look(self, store: Any) -> None:
        while not self.over.wait(POLL):
            try:
                what = store.get(FAILED).decode() if store.check([FAILED]) else None
            except RuntimeError:
                what = "the process that holds the store of the process group has ended"
            if what is not None and not self.over.wait(GRACE):
                print(f"fastrank: rank {self.rank} of {self.world} ends: {what}", file=sys.stderr, flush=True)
                os._exit(1)

    def failure(self, error: BaseException) -> BaseException:
        """The error to raise for `error`: its own with the rank, or that of the rank that failed first."""
        own = f"rank {self.rank} of {self.world}: {type(error).__name__}: {error}"
        try:
            first = self.store.compare_set(FAILED, "", own).decode()
        except RuntimeError:
            first = own  # the store went with the rank that held it
        self.over.set()
        if first != own:
            return RuntimeError(first)
        _record(error)
        if self.rank == 0:
            time.sleep(2 * POLL)  # where this process holds the store, the others have to read it first
        if isinstance(error, SENTENCES):
            return ValueError(f"rank {self.rank} of {self.world}: {error}")
        if type(error) is RuntimeError:
            return RuntimeError(f"rank {self.rank} of {self.world}: {error}")
        return error


def _record(error: BaseException) -> None:
    """Leave the error where torchrun looks for it, so that its summary shows it."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def leave() -> None:
    """End the process of a rank that is through, with status 0.

    Threads of torch that are left over from FSDP on gloo now and then abort a process in its last moments, and
    torchrun would take that for a failure.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
