"""Work on a list of matrices, shared by the ranks of a process group: who does which, and how all get the results.

Each matrix has one owner, found by the same rule on every rank: the largest first, to the rank with the least to do.
Small matrices of one shape, which the operators stack, stay together, so that each result has the bits that it has
where one process computes them all (on the same hardware, with one torch thread each).

The results travel as one broadcast an owner, each of just the bytes that it computed, so that every rank receives the
results it lacks once and nothing is padded. One reduction of six integers goes before: it finds out whether the ranks
mean the same matrices, and whether one of them failed, so that all of them go on or all raise.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastrank import _checks
from fastrank.ops._parallel import cost
from fastrank.ops._spectra import STACKED_ENTRIES
from fastrank.ops._warm import LEAST_ROWS
from fastrank.regularize._kernels import MASK


def bundles(shapes: Sequence[tuple[int, ...]], warm: bool) -> list[list[int]]:
    """The places of matrices that one rank has to compute: the small ones of one oriented shape, the others alone.

    warm: with a state, with which matrices of some size are not stacked.
    """
    found: dict[tuple[int, ...], list[int]] = {}
    for place, shape in enumerate(shapes):
        n, m = sorted(shape)
        stacked = n * m <= STACKED_ENTRIES and not (warm and n >= LEAST_ROWS)
        found.setdefault((n, m) if stacked else (n, m, place), []).append(place)
    return list(found.values())


def owners(shapes: Sequence[tuple[int, ...]], ranks: int, warm: bool) -> list[int]:
    """The rank that computes each matrix: largest cost first, to the least loaded rank; ties to the lower number."""
    loads = [(0, rank) for rank in range(ranks)]
    found = [0] * len(shapes)
    work = [(sum(cost(shapes[place]) for place in bundle), bundle) for bundle in bundles(shapes, warm)]
    for much, bundle in sorted(work, key=lambda item: (-item[0], item[1])):
        load, rank = heapq.heappop(loads)
        heapq.heappush(loads, (load + much, rank))
        for place in bundle:
            found[place] = rank
    return found


def fingerprint(*facts: object) -> int:
    """The same int on every machine for facts of the same representation."""
    return int.from_bytes(hashlib.sha256(repr(facts).encode()).digest()[:8], "little") & MASK


class Status(NamedTuple):
    """What the ranks found out together: do they agree on layout and contents, on the first bad kernel, on failures."""

    same_layout: bool
    same_content: bool
    first_bad: int | None
    failed: bool


class Share:
    """The part of a process group in a regulariser's work; alone where there is no group, or `enabled` is False."""

    def __init__(self, enabled: bool, group: dist.ProcessGroup | None) -> None:
        if not isinstance(enabled, bool):
            raise _checks.fail_type("share", "a bool", enabled)
        if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
            raise _checks.fail_type("process_group", "a torch.distributed.ProcessGroup", group)
        self.enabled, self.group = enabled, group
        self._owners: tuple[tuple[Any, ...], list[int]] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Share:
        return Share(self.enabled, self.group)  # a process group cannot be copied, and need not be

    @property
    def world(self) -> int:
        """How many ranks share the work."""
        ready = self.enabled and dist.is_available() and dist.is_initialized()
        return max(dist.get_world_size(self.group), 1) if ready else 1

    @property
    def rank(self) -> int:
        """This one's number among them."""
        return dist.get_rank(self.group) if self.world > 1 else 0

    def owners(self, shapes: Sequence[tuple[int, ...]], warm: bool) -> list[int]:
        """As the function, and remembered for the next step."""
        key = (self.world, warm, *shapes)
        if self._owners is None or self._owners[0] != key:
            self._owners = key, owners(shapes, self.world, warm)
        return self._owners[1]

    def settle(
        self, layout: int, content: int, bad: Sequence[int], failed: bool, kernels: int, device: torch.device
    ) -> Status:
        """Tell the others, and hear from them; the host waits for the answer.

        layout and content: what must be equal everywhere; bad: the numbers, out of `kernels`, of those not finite here.
        """
        first = kernels - min(bad) if bad else 0
        status = torch.tensor([layout, -layout, content, -content, first, failed], dtype=torch.int64, device=device)
        dist.all_reduce(status, dist.ReduceOp.MAX, group=self.group)
        high, low, most, least, worst, any_failed = status.tolist()
        return Status(high == -low, most == -least, kernels - worst if worst else None, bool(any_failed))

    def everywhere(self, good: Tensor) -> Tensor:
        """Which kernels are finite on all ranks: bool (K,)."""
        flags = good.to(torch.int32)
        dist.all_reduce(flags, dist.ReduceOp.MIN, group=self.group)
        return flags.bool()

    def exchange(self, owner: Sequence[int], like: Sequence[Tensor], mine: Mapping[int, Tensor]) -> list[Tensor]:
        """All results, in order, each with the bits that its owner found; `like` tells shapes, dtypes and devices."""
        parcels: dict[tuple[int, torch.dtype, torch.device], list[int]] = {}
        for place, tensor in enumerate(like):
            parcels.setdefault((owner[place], tensor.dtype, tensor.device), []).append(place)
        out, waiting = list(like), []
        for (source, dtype, device), places in parcels.items():
            sizes = [like[place].numel() for place in places]
            if source == self.rank:
                buffer = torch.cat([mine[place].reshape(-1) for place in places])
            else:
                buffer = torch.empty(sum(sizes), dtype=dtype, device=device)
            waiting.append(dist.broadcast(buffer, group=self.group, group_src=source, async_op=True))
            for place, part in zip(places, buffer.split_with_sizes(sizes), strict=True):
                out[place] = part.view(like[place].shape)
        for work in waiting:
            if work is not None:
                work.wait()
        return out

    def total(self, counts: Tensor) -> Tensor:
        """The sum of an integer tensor over the ranks."""
        dist.all_reduce(counts, dist.ReduceOp.SUM, group=self.group)
        return counts

    def gather(self, state: Any) -> list[Any]:
        """The states of all ranks, on each of them."""
        if self.world == 1:
            return [state]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, state, group=self.group)
        return found
