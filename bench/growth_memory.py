"""Peak memory of a call: on a GPU what the allocator counts, on a CPU the bytes of the tensors alive.

The count on a CPU is exact and the same at every run. It leaves out what a library takes for itself inside one
operator, such as the work space of a decomposition.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BELOW = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of CPU storages that are made while it is on: `now` alive, and `peak`.

    A storage counts once, however many tensors share it, from when an operator returns it until it is freed. fastrank's
    own operators are entered, so that what they make in between counts too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            self._meet(tensor, counts=False)
        if func.namespace == "fastrank":
            with self:
                found = func.redispatch(BELOW, *args, **kwargs)
        else:
            found = func(*args, **kwargs)
        for tensor in _tensors(found):
            self._meet(tensor, counts=True)
        return found

    def _meet(self, tensor: Tensor, *, counts: bool) -> None:
        """A storage is known from its first tensor on; those that were there before count nothing."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = size = storage.nbytes() if counts else 0
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, key).atexit = False

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def _tensors(nest: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(nest) if isinstance(leaf, Tensor) and leaf.device.type == "cpu"]


def peak_bytes(call: Callable[[], Any]) -> int:
    """Most bytes at a time that one call holds beyond what was there before, its result included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the mode sees what this thread does, and with one thread no other does anything
    try:
        with LiveBytes() as live:
            call()
    finally:
        torch.set_num_threads(threads)
    return live.peak
