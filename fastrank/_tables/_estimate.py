"""How long each backend takes for a work, and how that is known. Pure functions of tables that do not change."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from fastrank._tables import _store
from fastrank._tables._store import Key, Table
from fastrank._tables._work import LIBRARY, ConvWork, steps

NEIGHBOURS = 4
REACH = 2.0  # octaves; a row further away says nothing
UNKNOWN = "nothing known"


@dataclass(frozen=True)
class Estimate:
    """us: backend -> microseconds a call (only ratios count where `source` names neighbours); source: where from."""

    us: dict[str, float] = field(default_factory=dict)
    source: str = UNKNOWN


@_store.remembered
def estimate(op: str, work: ConvWork, dtype: torch.dtype, device: str, threads: int) -> Estimate:
    """The user's row, else the shipped row, else the user's model, the shipped model, the rows nearest by, or nothing.

    device: as `device_name` spells it; threads: of a CPU, else 0. Calls that consist of others are sums.
    """
    if work.call in ("training", "gradient"):
        forward, backward = (
            estimate(op, replace(work, call=call), dtype, device, threads) for call in ("forward", "backward")
        )
        return _summed(op, work.call, forward, backward)
    key = Key(op, str(dtype).removeprefix("torch."), threads, work)
    tables = [
        (table, where)
        for table, where in ((_store.cached(device), "here"), (_store.shipped(device), "shipped table"))
        if table is not None
    ]
    for table, where in tables:
        if key in table.rows:
            return Estimate(table.rows[key], f"measured {where}" if where == "here" else where)
    for find in (_modelled, _neighboured):
        for table, where in tables:
            found = find(table, key, dtype, where)
            if found is not None:
                return found
    return Estimate()


def _summed(op: str, call: str, forward: Estimate, backward: Estimate) -> Estimate:
    """A forward and a backward; or the backward alone, and for the library's chains the forward that they run again."""
    if call == "training":
        us = {name: forward.us[name] + own for name, own in backward.us.items() if name in forward.us}
    else:
        again = set(LIBRARY[op]) - {"dense"}
        us = {name: own + (forward.us.get(name, 0.0) if name in again else 0.0) for name, own in backward.us.items()}
    return Estimate(us, backward.source)


def _modelled(table: Table, key: Key, dtype: torch.dtype, where: str) -> Estimate | None:
    """By the model of the same dtype and layout whose number of threads is nearest."""
    setups = [s for s in table.models if s[:2] == (key.dtype, key.work.channels_last)]
    if not setups or key.work.batch == 0:
        return None
    nearest = min(setups, key=lambda s: (abs(math.log(s[2] / max(key.threads, 1))), s[2]))
    times = {}
    for backend in LIBRARY[key.op]:
        parts = steps(key.op, backend, key.work, dtype, nearest[2])
        us = table.models[nearest].predict(f"{key.op} {backend} {key.work.call}", parts)
        if us is not None:
            times[backend] = us
    if not {"sequence", "dense"} <= times.keys():
        return None
    threads = "1 thread" if nearest[2] == 1 else f"{nearest[2]} threads"
    return Estimate(times, f"model ({where}, {threads})")


def _neighboured(table: Table, key: Key, dtype: torch.dtype, where: str) -> Estimate | None:
    """From the nearest rows of the same kind: relative costs of the backends, means of logarithms by distance.

    Absolute times change with the size, which backend is how much faster changes slowly.
    """
    near = sorted(_near(table, key), key=lambda pair: pair[0])[:NEIGHBOURS]
    if not near:
        return None
    shared = [name for name in near[0][1] if all(name in us for _, us in near)]
    if "sequence" not in shared:
        return None
    weights = [1 / (distance**2 + 0.05) for distance, _ in near]
    times = {}
    for name in shared:
        logs = [math.log(us[name] / us["sequence"]) for _, us in near]
        times[name] = math.exp(sum(w * v for w, v in zip(weights, logs, strict=True)) / sum(weights))
    return Estimate(times, f"nearest rows ({where})")


def _near(table: Table, key: Key) -> Iterator[tuple[float, dict[str, float]]]:
    def same(work: ConvWork) -> tuple[object, ...]:
        return work.kernel, work.stride, work.dilation, work.channels_last, work.call

    here = _place(key.work)
    for other, us in table.rows.items():
        if (other.op, other.dtype, other.threads, same(other.work)) == (key.op, key.dtype, key.threads, same(key.work)):
            distance = math.dist(here, _place(other.work))
            if distance <= REACH:
                yield distance, us


def _place(work: ConvWork) -> tuple[float, ...]:
    out = work.out_size
    sizes = work.in_channels, work.out_channels, *work.ranks, work.batch * out[0] * out[1]
    return tuple(math.log2(max(size, 1)) for size in sizes)
