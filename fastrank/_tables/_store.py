"""Tables of measurements as files: the shipped ones beside this code, the user's own in a cache folder."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

from fastrank._atomic import locked, write_atomically
from fastrank._tables._model import COSTS, PLACE, Group, Model
from fastrank._tables._work import ConvWork

FORMAT, VERSION = "fastrank-table", 1
MAX_SIZE = 2**40
SHIPPED = Path(__file__).parent
Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")
Setup = tuple[str, bool, int]  # dtype as "float32", channels_last, threads


@dataclass(frozen=True)
class Key:
    """What a row of a table was measured for. threads is 0 where the device is no CPU."""

    op: str
    dtype: str
    threads: int
    work: ConvWork


@dataclass
class Table:
    """Measurements of one device. rows: microseconds of each backend; models: what predicts a work that is no row.

    start: the user's own table that this one is a copy of, with more; where it is None, saving replaces that.
    """

    device: str
    environment: dict[str, Any] = field(default_factory=dict)
    rows: dict[Key, dict[str, float]] = field(default_factory=dict)
    models: dict[Setup, Model] = field(default_factory=dict)
    validation: list[dict[str, Any]] = field(default_factory=list)
    start: Table | None = field(default=None, compare=False, repr=False)

    def dumps(self) -> str:
        """The table as JSON, one row or group a line, in an order that does not depend on the measuring's."""
        rows = [
            {"op": k.op, "dtype": k.dtype, "threads": k.threads, "work": _flat(k.work), "us": us}
            for k, us in sorted(self.rows.items(), key=lambda item: repr(item[0]))
        ]
        models = [
            {
                "dtype": dtype,
                "channels_last": channels_last,
                "threads": threads,
                "scale": dict(model.scale),
                "groups": {name: asdict(group) for name, group in sorted(model.groups.items())},
            }
            for (dtype, channels_last, threads), model in sorted(self.models.items())
        ]
        head = {"format": FORMAT, "version": VERSION, "device": self.device, "environment": self.environment}
        parts = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
        for key, entries in (("validation", self.validation), ("rows", rows), ("models", models)):
            lines = ",\n".join(json.dumps(entry) for entry in entries)
            parts.append(f"{json.dumps(key)}: [\n{lines}\n]" if entries else f"{json.dumps(key)}: []")
        return "{\n" + ",\n".join(parts) + "\n}\n"

    @staticmethod
    def loads(text: str) -> Table:
        """The table that `dumps` wrote. Raises ValueError, in words that follow "it", for everything else."""
        try:
            found = json.loads(text)
            kind, version = found["format"], found["version"]
            if (kind, version) == (FORMAT, VERSION):
                return _table(found)
        except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError) as error:
            raise ValueError("is damaged") from error
        if kind != FORMAT:
            raise ValueError("is no table of fastrank")
        raise ValueError(f"is of version {str(version)[:20]}, and this fastrank reads version {VERSION}")


def _table(found: Mapping[str, Any]) -> Table:
    """The table in a document of this version; raises one of many errors where it is damaged."""
    rows = {
        Key(_text(row["op"]), _text(row["dtype"]), _threads(row["threads"], 0), _work(row["work"])): _times(row["us"])
        for row in found["rows"]
    }
    models = {
        (_text(m["dtype"]), bool(m["channels_last"]), _threads(m["threads"], 1)): Model(
            {name: _group(group) for name, group in m["groups"].items()}, _times(m["scale"])
        )
        for m in found["models"]
    }
    return Table(_text(found["device"]), dict(found["environment"]), rows, models, [{**v} for v in found["validation"]])


def _text(found: Any) -> str:
    if not isinstance(found, str):
        raise TypeError("a name is a text")
    return found


def _threads(found: Any, low: int) -> int:
    if type(found) is not int or not low <= found <= MAX_SIZE:
        raise TypeError("threads are an int")
    return found


def _flat(work: ConvWork) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(work).items()}


def _work(found: Mapping[str, Any]) -> ConvWork:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
    work = ConvWork(**values)
    pairs = (work.size, work.kernel, work.ranks, work.stride, work.dilation)
    sizes = [(size, 1) for size in (work.in_channels, work.out_channels, *(size for pair in pairs for size in pair))]
    sizes += [(size, 0) for size in (work.batch, *work.padding)]
    if not all(type(size) is int and low <= size <= MAX_SIZE for size, low in sizes) or min(work.out_size) < 1:
        raise TypeError("a size is an int")
    return work


def _group(found: Mapping[str, Any]) -> Group:
    points = tuple(tuple(map(float, point)) for point in found["points"])
    group = Group(tuple(map(float, found["coefficients"])), points, tuple(map(float, found["weights"])))
    numbers = [*group.coefficients, *group.weights, *(number for point in points for number in point)]
    lengths = {len(point) for point in points} <= {PLACE} and len(group.coefficients) == COSTS
    if not lengths or len(points) != len(group.weights) or not all(map(math.isfinite, numbers)):
        raise TypeError("a group is of another form")
    return group


def _times(found: Mapping[str, Any]) -> dict[str, float]:
    times = {str(name): float(value) for name, value in found.items()}
    if not all(0 < value < float("inf") for value in times.values()):
        raise TypeError("a time or a scale is a number above 0")
    return times


_remembered: list[Any] = []


def remembered(function: Callable[Arguments, Answer]) -> Callable[Arguments, Answer]:
    """`function` asked once for the same arguments, until `forget`: what tables say does not change while they lie."""
    caching = lru_cache(maxsize=8192)(function)
    _remembered.append(caching)
    return caching  # type: ignore[return-value]


@lru_cache(maxsize=1)
def cpu_name() -> str:
    """The processor's name, as far as the system tells it."""
    if os.path.isfile("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@lru_cache(maxsize=64)
def device_name(kind: str, index: int | None) -> str:
    """What tables call a device: "cpu-..." with the processor and its vector unit, or the name of the GPU."""
    if kind == "cpu":
        name = f"cpu {cpu_name()} {torch.backends.cpu.get_cpu_capability()}"
    elif kind == "cuda":
        name = torch.cuda.get_device_name(index)
    else:
        name = kind
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def cache_folder() -> Path:
    """$FASTRANK_CACHE, else fastrank in $XDG_CACHE_HOME, else in ~/.cache."""
    named = os.environ.get("FASTRANK_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastrank"


def cache_file(device: str) -> Path:
    """Where the user's own measurements of a device lie."""
    return cache_folder() / f"{device}.json"


@remembered
def shipped(device: str) -> Table | None:
    """The checked-in table of a device, or None: of a CPU that of its vector unit, else one for all."""
    names = [f"cpu-{device.rpartition('-')[2]}", "cpu"] if device.startswith("cpu-") else [device]
    for path in (SHIPPED / f"{name}.json" for name in names):
        if path.is_file():
            return Table.loads(path.read_text(encoding="utf-8"))
    return None


@remembered
def cached(device: str) -> Table | None:
    """The user's own table of a device; None, with a warning where there is one that cannot be read."""
    path = cache_file(device)
    try:
        return Table.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        # UnicodeDecodeError is a ValueError that speaks of codecs.
        reason = str(error) if type(error) is ValueError else "cannot be read"
        warnings.warn(
            f"the table {path} {reason}: it is ignored (`fastrank bench --tune` writes it anew)", stacklevel=2
        )
        return None


def save(table: Table, path: str | os.PathLike[str] | None = None) -> Path:
    """Write a table to `path`, or over the user's own of its device, and forget what was read before.

    What other processes have added to the user's own since `table.start` was read stays; of what both measured, the
    last one's counts.
    """
    target = cache_file(table.device) if path is None else Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target) if path is None else nullcontext():
        if path is None and table.start is not None:
            with suppress(OSError, ValueError):  # one that is absent or damaged is replaced
                table = _joined(table.start, table, Table.loads(target.read_text(encoding="utf-8")))
        write_atomically(target, table.dumps().encode())
    forget()
    return target


def _joined(before: Table, mine: Table, theirs: Table) -> Table:
    """`theirs` with what is new or otherwise in `mine` than it was in `before`."""
    judged = [{_setup(entry): entry for entry in table.validation} for table in (before, mine, theirs)]
    return Table(
        mine.device,
        mine.environment,
        theirs.rows | _new(before.rows, mine.rows),
        theirs.models | _new(before.models, mine.models),
        list((judged[2] | _new(*judged[:2])).values()),
    )


def _setup(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(entry.get(name) for name in ("dtype", "channels_last", "threads"))


def _new(before: Mapping[Any, Any], mine: Mapping[Any, Any]) -> dict[Any, Any]:
    return {key: value for key, value in mine.items() if key not in before or before[key] != value}


def forget() -> None:
    """Read tables anew at the next question."""
    for function in _remembered:
        function.cache_clear()
