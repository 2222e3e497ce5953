"""What the regularisers that decompose kernels share: their matrices, warm starts, ranks of a group, bad values."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastrank import _checks, ops
from fastrank.decompose.unfold import unfold_all
from fastrank.ops import SpectralState
from fastrank.ops.linalg import ON_NONFINITE
from fastrank.regularize import _kernels
from fastrank.regularize._share import Share, fingerprint
from fastrank.regularize.base import Regularizer, trained

Operator = Callable[[list[Tensor], SpectralState | None], tuple[list[Tensor], Tensor | None]]
"""Matrices and what is kept of the last call -> a result each, and, where it has them, ranks (N,) int64."""


class Kernel(NamedTuple):
    """A kernel and what the operator found for it.

    value: all its entries, detached; results: one list a matricization, one tensor a matrix; ranks: the largest one,
    0-d; good: whether it is finite, 0-d, where that is not known without waiting for a device.
    """

    name: str
    parameter: nn.Parameter
    value: Tensor
    results: list[list[Tensor]]
    rank: Tensor | None
    good: Tensor | None


class SpectralRegularizer(Regularizer):
    """A regulariser that hands all matrices of all its kernels to one operator at a time.

    warm: start each decomposition from the last one's; `refresh_every` and `tolerance` are those of
    `fastrank.ops.SpectralState`. on_nonfinite: "raise" names the layer of a kernel that is not finite, "skip" leaves
    that kernel alone, counts it in `skipped`, and warns once. share: where torch.distributed is initialised, each rank
    of `process_group` (None: all) decomposes a share of the matrices, and all get all results; every rank must then
    call `add_gradients`, `after_step` and `project` alike.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Conv2d],
        matricization: Sequence[str],
        *,
        warm: bool,
        refresh_every: int,
        tolerance: float,
        on_nonfinite: str,
        share: bool,
        process_group: dist.ProcessGroup | None,
    ) -> None:
        if not isinstance(warm, bool):
            raise _checks.fail_type("warm", "a bool", warm)
        # How a result is computed is no setting of a run: these stay out of the public attributes that name one.
        state = SpectralState(refresh_every=refresh_every, tolerance=tolerance)
        self._state = state if warm else None
        self._tolerance = state.tolerance
        self._on_nonfinite = _checks.choice("on_nonfinite", on_nonfinite, ON_NONFINITE)
        self._share = Share(share, process_group)
        self._kernels, self._names = _kernels.Kernels(layers), tuple(matricization)
        self._skips = Skips()
        self._agreed: int | None = None
        self._gathered: dict[str, Any] | None = None

    @property
    def kernels(self) -> dict[str, nn.Parameter]:
        """The kernels that it governs at this moment, by layer name."""
        return self._kernels.current()

    def governed(self) -> Mapping[str, nn.Parameter]:
        """The kernels, by layer name."""
        return self.kernels

    @property
    def skipped(self) -> int:
        """How often a kernel was left alone because it was not finite; reading it waits for a GPU."""
        return self._skips.total()

    @property
    def counts(self) -> dict[str, int]:
        """Decompositions of this rank so far that were "warm", "exact", and exact as a "fallback" from a warm start."""
        return dict(self._state.counts) if self._state is not None else {}

    def state_dict(self) -> dict[str, Any]:
        """The count of skipped kernels, and what warm starts go on from: on a rank that shares work, its own share.

        After `gather_state`, and until the next step, the shares of all ranks. Waits for a GPU, and raises where an
        earlier step on it met a kernel that was not finite.
        """
        ops.check_pending()
        found: dict[str, Any] = {"skipped": self.skipped}
        if self._state is not None:
            shares = self._gathered or {str(self._share.rank): self._state.state_dict()}
            found["spectral"] = {"world": self._share.world, "shares": shares}
        return found

    def gather_state(self) -> None:
        """Have `state_dict` hold the shares of all ranks, for one rank to save; every rank has to call this."""
        failure: Exception | None = None
        try:
            ops.check_pending()
        except ValueError as error:
            failure = error  # raised once the others have what they wait for
        if self._state is not None:
            own = _moved(self._state.state_dict(), torch.device("cpu"))
            self._gathered = {str(rank): state for rank, state in enumerate(self._share.gather(own))}
        if failure is not None:
            raise failure

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`; a share that is missing, or of another number of ranks, starts from exact results."""
        skipped = _checks.integer("state['skipped']", state.get("skipped", 0), 0)
        kept = _mapping("state['spectral']", state.get("spectral", {}))
        shares = _mapping("state['spectral']['shares']", kept.get("shares", {}))
        own = shares.get(str(self._share.rank), {}) if kept.get("world") == self._share.world else {}
        if self._state is not None:
            device = next(iter(self.kernels.values())).device
            self._state.load_state_dict(_moved(_mapping("a share of state['spectral']", own), device))
        self._skips.start(skipped)
        self._gathered = None

    def _matrices(self, values: Mapping[str, Tensor]) -> list[list[list[Tensor]]]:
        """The matrices of each kernel, by matricization."""
        return [[unfold_all(value, name) for name in self._names] for value in values.values()]

    def _values(self) -> dict[str, Tensor]:
        """All entries of the kernels to be trained, by layer name."""
        return {name: _kernels.whole(name, kernel) for name, kernel in trained(self.kernels).items()}

    def _zeroed(self, values: Mapping[str, Tensor], good: Tensor) -> dict[str, Tensor]:
        """The values with zeros in place of kernels that are not finite: what costs nothing and adds nothing."""
        if not good.is_cuda and bool(good.all()):
            return dict(values)
        return {
            name: torch.where(flag.to(value.device), value, torch.zeros_like(value))
            for (name, value), flag in zip(values.items(), good, strict=True)
        }

    def _solve(self, operator: Operator, *settings: object) -> list[Kernel]:
        """What `operator` finds for the kernels to be trained; under "skip", and known, without those not finite.

        settings: what besides the kernels makes the results, and must be the same on all ranks.
        """
        values = self._values()
        if not values:
            return []
        self._gathered = None
        skip, shared = self._on_nonfinite == "skip", self._share.world > 1
        good = _kernels.finite(list(values.values())) if skip or shared else None
        groups = self._matrices(self._zeroed(values, good) if skip and good is not None else values)
        flat = [matrix for group in groups for part in group for matrix in part]
        if shared and good is not None:
            facts = [(name, tuple(value.shape), str(value.dtype)) for name, value in values.items()]
            layout = fingerprint(type(self).__name__, facts, self._names, self._on_nonfinite, settings)
            results, ranks, good = self._solve_shared(operator, flat, values, good, layout)
        else:
            with _kernels.named(values):
                results, ranks = operator(flat, self._state)
        found = iter(results)
        solved = [[[next(found) for _ in part] for part in group] for group in groups]
        sizes = [sum(len(part) for part in group) for group in groups]
        largest = [None] * len(sizes) if ranks is None else [part.max() for part in ranks.split_with_sizes(sizes)]
        known, flags = self._left(good if skip else None, len(sizes))
        parameters = self.kernels
        kernels = zip(values.items(), solved, largest, flags, strict=True)
        return [
            Kernel(name, parameters[name], value, own, rank, flag)
            for place, ((name, value), own, rank, flag) in enumerate(kernels)
            if place not in known
        ]

    def _left(self, good: Tensor | None, count: int) -> tuple[set[int], list[Tensor | None]]:
        """Count the kernels to leave alone: their places where those are known, else flags on the device for all."""
        unknown: list[Tensor | None] = [None] * count
        if good is None:
            return set(), unknown
        self._skips.note(good)
        if good.is_cuda:
            return set(), list(good)
        return {place for place, flag in enumerate(good.tolist()) if not flag}, unknown

    def _solve_shared(
        self, operator: Operator, flat: list[Tensor], values: Mapping[str, Tensor], good: Tensor, layout: int
    ) -> tuple[list[Tensor], Tensor | None, Tensor]:
        """As the operator on the whole list, and which kernels are finite on all ranks; all of them raise, or none."""
        share, raising = self._share, self._on_nonfinite == "raise"
        owner = share.owners([tuple(matrix.shape) for matrix in flat], self._state is not None)
        places = [place for place, rank in enumerate(owner) if rank == share.rank]
        bad = [place for place, flag in enumerate(good.tolist()) if not flag]
        first = self._agreed != layout
        content = _kernels.checksum(list(values.values())) if first else 0
        mine: list[Tensor] = []
        own_ranks: Tensor | None = None
        failure: Exception | None = None
        try:
            if not (bad and raising):
                mine, own_ranks = operator([flat[place] for place in places], self._state)
        except (ValueError, RuntimeError) as error:
            failure = error
        status = share.settle(layout, content, bad, failure is not None, len(values), good.device)
        if not status.same_layout:
            what = "of ranks that regularise the same kernels alike (or share=False)"
            raise _checks.fail("process_group", what, "ranks with other kernels or settings")
        if raising and status.first_bad is not None:
            name, value = list(values.items())[status.first_bad]
            _checks.finite(f"the kernel of layer {name!r}", value)
            raise _checks.fail(f"the kernel of layer {name!r}", "finite", "NaN or infinite values on another rank")
        if failure is not None:
            raise failure
        if status.failed:
            raise RuntimeError("process_group must be of ranks that all succeed, got a failure on another rank")
        if status.first_bad is None:
            if not status.same_content:
                what = "of ranks that hold the same weights (or share=False)"
                raise _checks.fail("process_group", what, "ranks whose kernels differ")
            self._agreed = layout
        else:
            good = share.everywhere(good)
        results = share.exchange(owner, flat, dict(zip(places, mine, strict=True)))
        ranks = None
        if own_ranks is not None:
            ranks = torch.zeros(len(flat), dtype=torch.int64, device=flat[0].device)
            ranks[torch.tensor(places, dtype=torch.int64, device=ranks.device)] = own_ranks.to(ranks)
            ranks = share.total(ranks)
        return results, ranks, good


class Skips:
    """How often kernels were skipped: counted where they are, so that nothing waits for a GPU, and warned of once."""

    def __init__(self) -> None:
        self.start(0)
        self._warned = False

    def start(self, count: int) -> None:
        """Count on from here."""
        self._before, self._count, self._seen = count, torch.zeros((), dtype=torch.int64), torch.zeros(0)

    def total(self) -> int:
        """The count."""
        return self._before + int(self._count)

    def note(self, good: Tensor) -> None:
        """Count the kernels that are not good; on a GPU the warning comes with a later call."""
        self._count = self._count.to(good.device) + (~good).sum()
        if good.is_cuda:
            if not self._seen.numel():
                self._seen = torch.zeros(1, dtype=torch.int64, pin_memory=True)
            some = bool(self._seen)
            self._seen.copy_(self._count, non_blocking=True)
        else:
            some = bool(self._count)
        if some and not self._warned:
            self._warned = True
            what = 'a kernel with NaN or infinite values was left alone (on_nonfinite="skip"); `skipped` counts on'
            warnings.warn(what, RuntimeWarning, stacklevel=5)


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _checks.fail_type(name, "a mapping", value)
    return value


def _moved(value: Any, device: torch.device) -> Any:
    """A nest of dicts with its tensors on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    return {key: _moved(item, device) for key, item in value.items()} if isinstance(value, Mapping) else value
