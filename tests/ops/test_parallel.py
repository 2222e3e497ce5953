"""Working off a list by several threads: order, errors, torch's thread count, and the bits of one thread."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from helpers import randn

from fastrank import ops
from fastrank.ops import _parallel


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("costs", "threads", "wanted"),
    [
        ([], 2, 1),
        ([1e8, 1e8], 2, 1),  # not worth a thread
        ([1e9, 1e9], 1, 1),
        ([1e9, 1e9], 2, 2),
        ([9e9, 1e9], 2, 1),  # the large one needs both
        ([1e9] * 10, 32, 10),
        ([4e9, 1e9, 1e9, 1e9, 1e9], 32, 2),
    ],
)
def test_how_many_work_at_a_time(costs, threads, wanted):
    assert _parallel.workers(costs, threads) == wanted


def test_results_come_in_order_from_threads_with_their_share():
    seen = []

    def slow(item: int) -> int:
        seen.append((threading.current_thread().name, torch.get_num_threads(), torch.is_grad_enabled()))
        time.sleep(0.01 * (5 - item))
        return item * item

    assert _parallel.each(slow, range(5), [1e9] * 5) == [0, 1, 4, 9, 16]
    assert {name for name, _, _ in seen} == {"fastrank_0", "fastrank_1"}
    assert {(count, grad) for _, count, grad in seen} == {(1, False)}
    assert torch.get_num_threads() == 2


def test_an_error_is_raised_after_all_have_ended_and_leaves_nothing_changed():
    done = []

    def broken(item: int) -> None:
        if item == 1:
            raise ValueError("one is broken")
        time.sleep(0.02)
        done.append(item)

    for _ in range(2):
        with pytest.raises(ValueError, match="^one is broken$"):
            _parallel.each(broken, range(4), [1e9] * 4)
        assert sorted(done) == [0, 2, 3]
        done.clear()
        assert torch.get_num_threads() == 2


def test_a_list_inside_a_list_and_a_second_caller_work_alone():
    def inner(item: int) -> list[str]:
        names = _parallel.each(lambda _: threading.current_thread().name, range(2), [1e9] * 2)
        return [*names, threading.current_thread().name]

    for names in _parallel.each(inner, range(2), [1e9] * 2):
        assert len(set(names)) == 1


@pytest.mark.parametrize("warm", [False, True])
def test_the_bits_are_those_of_one_thread(warm):
    matrices = [randn(200, 600, seed=i) for i in range(10)] + [randn(70, 3000, seed=9)]
    assert _parallel.workers([_parallel.cost(w.shape) for w in matrices], 2) == 2
    found = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        state = ops.SpectralState() if warm else None
        for _ in range(2):
            found[threads] = ops.nuclear_subgradient(matrices, state=state)
        if state is not None:
            assert state.counts == {"warm": 10, "exact": 12, "fallback": 0}
    for one, two in zip(found[1], found[2], strict=True):
        assert torch.equal(one, two)


def test_inference_mode_goes_along():
    matrices = [randn(200, 600, seed=i) for i in range(10)]
    with torch.inference_mode():
        out = [torch.empty_like(w) for w in matrices]
        found = ops.nuclear_subgradient(matrices, out=out)
        assert all(x.is_inference() for x in ops.nuclear_subgradient(matrices))
    for x, y in zip(found, ops.nuclear_subgradient(matrices), strict=True):
        assert torch.equal(x, y)


def _in_a_child(queue: multiprocessing.Queue) -> None:
    queue.put(_parallel.each(lambda item: item + 1, range(3), [1e9] * 3))


def test_a_forked_process_makes_threads_of_its_own():
    _parallel.each(lambda item: item, range(3), [1e9] * 3)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_a_child, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == [1, 2, 3]
    child.join(60)
    assert child.exitcode == 0
