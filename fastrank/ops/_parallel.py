"""Several matrices at a time on a CPU, each with a share of torch's threads.

One matrix after the other leaves all threads but one idle between products: in the eigensolver, in small elementwise
steps, in Python. So a list is worked off by several threads of Python, and torch's threads are divided among them. A
result then has the same bits whatever the number of threads, as long as each worker has one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")
# FLOP from which on it pays to hand work to other threads: some milliseconds.
WORTHWHILE = 1e9
_ONE_AT_A_TIME = threading.Lock()
_POOLS: list[tuple[int, ThreadPoolExecutor]] = []


def cost(shape: Sequence[int]) -> int:
    """FLOP of a spectral operator on a matrix, n the shorter side: two products of n²·m, and an eigensolver of 9 n³."""
    n, m = sorted(shape)
    return 4 * n * n * m + 9 * n**3


def workers(costs: Sequence[float], threads: int) -> int:
    """How many matrices at a time: as many as keep busy until the largest one is through, at most one a thread."""
    total = sum(costs)
    if threads < 2 or total < WORTHWHILE:
        return 1
    return max(1, min(threads, int(total / max(costs))))


def each(function: Callable[[Item], Result], items: Sequence[Item], costs: Sequence[float]) -> list[Result]:
    """`function` of every item, in order; the costly ones are started first. An exception of one of them is raised."""
    threads = torch.get_num_threads()
    count = workers(costs, threads)
    if count == 1 or not _ONE_AT_A_TIME.acquire(blocking=False):
        return [function(item) for item in items]
    inference, share = torch.is_inference_mode_enabled(), threads // count

    def call(item: Item) -> Result:
        if torch.get_num_threads() != share:  # of this thread
            torch.set_num_threads(share)
        with torch.inference_mode(inference), torch.no_grad():
            return function(item)

    try:
        with _threads(share):
            pool = _pool(count)
            order = sorted(range(len(items)), key=lambda i: -costs[i])
            futures = {i: pool.submit(call, items[i]) for i in order}
            wait(futures.values())
            return [futures[i].result() for i in range(len(items))]
    finally:
        _ONE_AT_A_TIME.release()


def _pool(count: int) -> ThreadPoolExecutor:
    """The threads of the last call, where they are as many: new ones would get memory that nobody has touched."""
    if _POOLS and _POOLS[0][0] != count:
        _POOLS.pop()[1].shutdown()
    if not _POOLS:
        _POOLS.append((count, ThreadPoolExecutor(count, thread_name_prefix="fastrank")))
    return _POOLS[0][1]


def _forget() -> None:
    """A forked process has none of its parent's threads."""
    global _ONE_AT_A_TIME
    _ONE_AT_A_TIME = threading.Lock()
    _POOLS.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """torch's number of threads, which the matrix products of all threads of Python follow, set for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
