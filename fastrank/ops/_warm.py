"""Warm starts: the eigenbases of the last call, one correction of first order, and a test of what it leaves out.

Weights move little in a training step, so the basis of an earlier one nearly serves (see `_correction`). What it leaves
out is of second order and is estimated; where that exceeds the tolerance, or the kept rank could be another, the basis
is computed anew. On a GPU the host does not wait for the estimate: see `_resident`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrank import _checks
from fastrank.ops import _gram, _parallel, _resident, _spectra
from fastrank.ops._correction import correct, turn
from fastrank.ops._entry import Entry

# Smaller matrices are decomposed anew in less time than a warm step takes.
LEAST_ROWS = 96
# After f failures in a row, 2^f − 1 steps pass before the next attempt, f at most this.
MOST_FAILURES = 5
# The basis is turned towards H's eigenvectors once the estimate reaches this share of the tolerance.
TURN_AT = 0.25
# Beyond it the error estimate, which is one of second order, says nothing.
LARGEST_TOLERANCE = 0.01
_FIELDS = tuple(field.name for field in fields(Entry))


class SpectralState:
    """Eigenbases that `nuclear_subgradient` and `project_energy` start from, one a place in the list of matrices.

    Pass the same object with every call of a training loop. A matrix is decomposed anew when it is new or has another
    shape than at its place before, every `refresh_every` calls, and when the estimated relative error (Frobenius norm)
    of the warm result would exceed `tolerance` or its rank might differ from an exact decomposition's; where that
    happens again and again, warm steps are tried less often. Matrices with fewer than 96 rows or columns are always
    decomposed anew, which is faster there. On a GPU the estimate is read one call or more later (see `check_pending`):
    a result beyond the tolerance has then been used, and the next one is exact.

    `counts`: warm and exact results so far, and `fallback`, how many of the exact ones the error estimate asked for.
    Raises ValueError or TypeError for a `refresh_every` below 1 or a `tolerance` outside (0, 0.01].
    """

    def __init__(self, *, refresh_every: int = 50, tolerance: float = 1e-4) -> None:
        self.refresh_every = _checks.integer("refresh_every", refresh_every, 1)
        self.tolerance = _checks.number("tolerance", tolerance, 0.0, LARGEST_TOLERANCE, open_low=True)
        self.counts = {"warm": 0, "exact": 0, "fallback": 0}
        self._entries: dict[int, Entry] = {}

    def __repr__(self) -> str:
        return f"SpectralState(refresh_every={self.refresh_every}, tolerance={self.tolerance}, {self.counts})"

    def state_dict(self) -> dict[str, Any]:
        """The bases, as copies, and their ages: all that a resume needs to go on bit for bit."""
        return {
            str(place): {**vars(entry), "shape": list(entry.shape), "basis": entry.basis.clone()}
            for place, entry in self._entries.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`; the counts start anew. Raises ValueError or TypeError where an entry is none of its."""
        entries = {}
        for place, saved in state.items():
            name = f"state[{place!r}]"
            if not str(place).isdigit() or not isinstance(saved, Mapping) or set(saved) != set(_FIELDS):
                raise _checks.fail(name, "an entry of SpectralState.state_dict()", saved)
            rows, columns = saved["shape"]
            n = min(rows, columns)
            basis = _checks.tensor(f"{name}['basis']", saved["basis"], (1, n, n), "(1, n, n)").clone()
            whole = (_checks.integer(f"{name}[{field!r}]", saved[field], 0) for field in _FIELDS[2:])
            entries[int(place)] = Entry((rows, columns), basis, *whole)
        self._entries = entries
        self.counts = dict.fromkeys(self.counts, 0)


class _Found(NamedTuple):
    """What became of one matrix."""

    result: Tensor
    rank: int
    events: tuple[str, ...]


def spectral(
    matrices: list[Tensor],
    kind: str,
    energy: float | None,
    state: SpectralState,
    places: list[int],
    targets: list[Tensor] | None = None,
) -> tuple[list[Tensor], Tensor, list[int], Tensor | None]:
    """As `_gram.spectral`, starting from `state` where it holds a basis for a matrix; `places` are its keys.

    The last result is the status (N,) int32 of matrices on a GPU, to be read when it has arrived; else None.
    """
    out: dict[int, Tensor] = {}
    device = matrices[0].device
    none = torch.zeros((), dtype=torch.int64, device=device)
    ranks, status = [none] * len(matrices), [none.to(torch.int32)] * len(matrices)
    small = [i for i, matrix in enumerate(matrices) if min(matrix.shape) < LEAST_ROWS]
    large = sorted(set(range(len(matrices))) - set(small))
    held = [i for i in large if usable(state, places[i], matrices[i])] if device.type != "cpu" else []
    if held:
        entries = [state._entries[places[i]] for i in held]
        steps = _resident.step([matrices[i] for i in held], entries, kind, energy, state.tolerance)
        for i, entry, x, k, flag in zip(held, entries, *steps, strict=True):
            out[i], ranks[i], status[i] = x, k, flag
            entry.age += 1
        state.counts["warm"] += len(held)

    def anew(some: list[int]) -> list[int]:
        """Decompose without a start; the places of those that are not finite."""
        into = None if targets is None else [targets[i] for i in some]
        results, found, bad = _gram.spectral([matrices[i] for i in some], kind, energy, into)
        for i, x, k in zip(some, results, found, strict=True):
            out[i], ranks[i] = x, k.to(device)
            state._entries.pop(places[i], None)
        return [some[i] for i in bad]

    def one(i: int) -> tuple[str, ...]:
        """A warm step where it serves, else a decomposition to start from; no event where it is not finite."""
        found = _one(places[i], matrices[i], kind, energy, state, None if targets is None else targets[i])
        if found is None:
            return ()
        out[i], ranks[i] = found.result, torch.full_like(none, found.rank)
        return found.events

    rest = sorted(set(large) - set(held))
    tasks: list[Callable[[], Sequence[Any]]] = [partial(anew, small), *(partial(one, i) for i in rest)]
    costs = [sum(_parallel.cost(matrices[i].shape) for i in some) for some in (small, *([i] for i in rest))]
    bad, *events = _parallel.each(lambda task: task(), tasks, costs) if device.type == "cpu" else [t() for t in tasks]
    for event in (event for found in events for event in found):
        state.counts[event] += 1
    state.counts["exact"] += len(small) - len(bad)
    bad = [*bad, *anew([i for i, found in zip(rest, events, strict=True) if not found])]
    late = torch.stack(status) if device.type != "cpu" else None
    return [out[i] for i in range(len(matrices))], torch.stack(ranks), bad, late


def usable(state: SpectralState, place: int, matrix: Tensor) -> bool:
    """Whether a warm step of `matrix` may be tried now."""
    entry = state._entries.get(place)
    return (
        entry is not None
        and entry.shape == tuple(matrix.shape)
        and entry.basis.device == matrix.device
        and entry.age < state.refresh_every
        and entry.pause == 0
    )


def stale(state: SpectralState, place: int) -> None:
    """What the host learns late of a step on a GPU: the basis at `place` has drifted too far."""
    if place in state._entries:
        state._entries[place].age = state.refresh_every
        state.counts["fallback"] += 1


def _one(
    place: int, matrix: Tensor, kind: str, energy: float | None, state: SpectralState, target: Tensor | None
) -> _Found | None:
    """The result of one matrix, its rank and what to count; None where it is not finite."""
    a = _spectra.orient(matrix.detach()).to(_spectra.working(matrix.dtype))[None]
    entry = state._entries.get(place)
    if entry is not None and entry.shape != tuple(matrix.shape):
        entry = None
    failures, known = 0 if entry is None else entry.failures, None
    events: tuple[str, ...] = ("exact",)
    if entry is not None and usable(state, place, matrix):
        wide, basis = a.to(entry.basis.dtype), entry.basis
        g = _spectra.gram(wide)
        step = correct(g, basis, kind, energy, a.shape[2])
        error = float(step.error)
        if error <= state.tolerance:
            result = _spectra.write(_spectra.symmetric(basis @ step.function, basis)[0], wide[0], matrix, target)
            entry.age, entry.failures = entry.age + 1, 0
            if error > TURN_AT * state.tolerance:
                entry.basis = torch.linalg.qr(turn(basis, step))[0]
            return _Found(result, int(step.ranks), ("warm",))
        known = g if g.dtype == a.dtype else None
        events = ("exact", "fallback")
        failures = min(failures + 1, MOST_FAILURES)
    pause = entry.pause - 1 if entry is not None and entry.pause else (1 << failures) - 1
    found = _gram.decompose(a, kind, energy, known)
    if found is None:
        return None
    state._entries[place] = Entry((matrix.shape[0], matrix.shape[1]), found.basis, 0, failures, pause)
    left, right = _gram.factorised(found, kind)
    return _Found(_spectra.write(left[0], right[0], matrix, target), int(found.ranks[0]), events)
