"""Spectra, ranks and gates of a network while it trains: a line of JSON an epoch, and its reader."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastrank import _atomic, _checks, decompose, ranks
from fastrank.decompose.unfold import MATRICIZATIONS
from fastrank.nn._gated import GatedConv2d
from fastrank.regularize import _kernels

FILE = "trajectory.jsonl"
FORMAT, VERSION = "fastrank-trajectory", 1
ENERGY = 0.95
"""The share of the squared singular values that recorded ranks keep, by default."""
# Histograms of |gate|: equal bins of log10, what lies outside in the first and the last one; zeros are counted apart.
LOW, HIGH, BINS = -6.0, 2.0, 80


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one matrix. full: how many; rank: of the energy kept; sigma: those at `places`, over σ₁."""

    full: int
    rank: int
    sigma: tuple[float, ...]


@dataclass(frozen=True)
class Gates:
    """Gates of one parameter. total; zero: how many are exactly 0; counts: the others by |gate|, in BINS bins;
    penalized: whether a regulariser closes them, so that those open are a rank."""

    total: int
    zero: int
    counts: tuple[int, ...]
    penalized: bool = True


@dataclass(frozen=True)
class Moment:
    """A network after `epoch` epochs (0: before the first). row: what was measured, by name; spectra: layer ->
    matricization -> Spectrum; gates: parameter -> Gates."""

    epoch: int
    row: Mapping[str, float]
    spectra: Mapping[str, Mapping[str, Spectrum]]
    gates: Mapping[str, Gates]


@dataclass(frozen=True)
class Trajectory:
    """The moments of one training, epochs ascending, and the share of energy that their ranks keep."""

    energy: float
    moments: tuple[Moment, ...]


class Recorder:
    """Writes the trajectory of `model` into ``folder/trajectory.jsonl``; call it after each epoch.

    Called with a row of `fastrank.train` (``fit(..., on_epoch=recorder)``), or with a number of epochs and, if wanted,
    measurements by name. Recorded are, of every kernel that the rank regularisers act on, the singular values by
    `matricization` ("mode3", "mode4", "channel" or "spatial"; at most `points` a matrix, relative to the largest) and
    the rank that keeps `energy`; and of gated layers the histogram of every gate vector. One eigendecomposition a
    matrix an epoch.

    A file that is there is continued (`resume`): epochs after the one recorded now are dropped. Otherwise, or where it
    was recorded with other settings, it is replaced, and the network as it is now becomes epoch 0. Where
    torch.distributed is initialised, rank 0 alone writes; where parameters are sharded (FSDP2), all ranks have to make
    and call it, which ``fit(parallel="fsdp")`` does not do.
    Raises ValueError or TypeError, naming the argument or a damaged file, and OSError where it cannot write.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: str | os.PathLike[str],
        *,
        energy: float = ENERGY,
        matricization: Iterable[str] | str = ("mode3", "mode4"),
        points: int = 48,
        resume: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise _checks.fail_type("model", "a torch.nn.Module", model)
        names = (matricization,) if isinstance(matricization, str) else tuple(matricization)
        self._model = model
        self._names = [_checks.choice("matricization", name, MATRICIZATIONS) for name in names]
        self._energy = _checks.number("energy", energy, 0.0, 1.0, open_low=True)
        self._points = _checks.integer("points", points, 2)
        self._path = Path(folder) / FILE
        settings = {"energy": self._energy, "matricization": self._names, "points": self._points}
        self._header = _line({"format": FORMAT, "version": VERSION, **settings, "bins": [LOW, HIGH, BINS]})
        self._writes = not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0
        self._last = -1
        if self._writes:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _atomic.remove_leftovers(self._path)
        lines = self._kept() if self._writes and resume and self._path.exists() else []
        if lines:
            self._replace(lines)  # without what a killed writer left
        if self._agreed(not lines):
            self(0)

    def __call__(self, row: Any, measured: Mapping[str, float] | None = None) -> None:
        """Record the network after an epoch: `row` is an `EpochRow`, or the number of epochs so far."""
        numbers: dict[str, Any] = dict(measured or {})
        if is_dataclass(row) and not isinstance(row, type):
            numbers.update(asdict(row))
            numbers.update(numbers.pop("metrics", {}))
            row = numbers.pop("epoch")
        epoch = _checks.integer("epoch", row, 0)
        if not self._writes and not self._sharded():
            return
        moment = {
            "epoch": epoch,
            "row": {name: float(value) for name, value in numbers.items() if is_number(value)},
            "spectra": {
                layer: {name: asdict(spectrum) for name, spectrum in found.items()}
                for layer, found in spectra(self._model, self._names, energy=self._energy, points=self._points).items()
            },
            "gates": {
                name: asdict(histogram(gate, penalized)) for name, (gate, penalized) in _gates_of(self._model).items()
            },
        }
        if self._writes:
            self._write(epoch, _line(moment))

    def _sharded(self) -> bool:
        return any(map(_kernels.is_sharded, self._model.parameters()))

    def _agreed(self, fresh: bool) -> bool:
        """What rank 0 says, where the others have to do as it does."""
        if not self._sharded():
            return fresh
        said = [fresh]
        dist.broadcast_object_list(said, src=0)
        return said[0]

    def _kept(self) -> list[str]:
        """The lines of the file that is there, without the first and without a torn last one; none of other settings.

        A killed writer leaves a last line without its end.
        """
        header, *lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True) or [""]
        if header != self._header:
            return []
        if lines and not lines[-1].endswith("\n"):
            lines.pop()
        for number, line in enumerate(lines, 2):
            _moment(self._path, number, line)
        return lines

    def _write(self, epoch: int, line: str) -> None:
        if epoch > self._last >= 0:
            with _atomic.naming(self._path), open(self._path, "a", encoding="utf-8") as file:
                file.write(line)
            self._last = epoch
            return
        lines = self._kept() if epoch else []
        earlier = [kept for number, kept in enumerate(lines, 2) if _moment(self._path, number, kept).epoch < epoch]
        self._replace([*earlier, line])

    def _replace(self, lines: list[str]) -> None:
        _atomic.write_atomically(self._path, "".join([self._header, *lines]).encode())
        self._last = _moment(self._path, len(lines) + 1, lines[-1]).epoch


def spectra(
    model: nn.Module,
    matricization: Iterable[str] = ("mode3", "mode4"),
    *,
    energy: float = ENERGY,
    points: int = 48,
) -> dict[str, dict[str, Spectrum]]:
    """Layer -> matricization -> Spectrum, of every kernel that rank regularisers act on; empty where it is not finite.

    energy: the share of the squared singular values that `rank` keeps; points: how many values are kept at most.
    """
    result: dict[str, dict[str, Spectrum]] = {}
    for layer, kernel in trained_kernels(model).items():
        weight = _kernels.whole(layer, kernel)
        result[layer] = found = {}
        for name in matricization if bool(weight.isfinite().all()) else ():
            values = ranks.singular_values(decompose.unfold(weight, name))
            share = (values / values[0] if float(values[0]) else values)[places(len(values), points)]
            sigma = tuple(round(value, 5) for value in share.tolist())
            found[name] = Spectrum(len(values), ranks.energy_rank(values, energy), sigma)
    return result


def read_trajectory(path: str | os.PathLike[str]) -> Trajectory:
    """What a `Recorder` wrote; a torn last line, as a killed run leaves, is left out.

    Raises FileNotFoundError, and ValueError, naming file and line, for what is damaged or newer than this version.
    """
    path = Path(path)
    header, *lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) or [""]
    try:
        settings = json.loads(header)
        if not isinstance(settings, dict) or settings.get("format") != FORMAT:
            raise ValueError("no trajectory")
    except (ValueError, RecursionError) as error:
        raise _broken(path, 1) from error
    if settings.get("version") != VERSION:
        wanted = f"a trajectory of version {VERSION}, the newest that is known here"
        raise _checks.fail("run", f"a folder with {wanted}", f"{path} of version {settings.get('version')!r}")
    energy = settings.get("energy")
    if not is_number(energy):
        raise _broken(path, 1)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    return Trajectory(float(energy), tuple(_moment(path, number, line) for number, line in enumerate(lines, 2)))


def places(full: int, points: int) -> list[int]:
    """The indices, from 0, of at most `points` out of `full` singular values: first, last and evenly between."""
    if full <= points:
        return list(range(full))
    return [round(i * (full - 1) / (points - 1)) for i in range(points)]


def trained_kernels(model: nn.Module) -> dict[str, nn.Parameter]:
    """The kernels that rank regularisers would act on, by layer name; empty where there is none."""
    try:
        return _kernels.spatial_kernels(model)
    except ValueError:  # no layer of that kind is no error here
        return {}


def gates_of(model: nn.Module) -> dict[str, Tensor]:
    """The gate vectors of all gated layers, by parameter name."""
    return {name: gate for name, (gate, _) in _gates_of(model).items()}


def _gates_of(model: nn.Module) -> dict[str, tuple[Tensor, bool]]:
    return {
        f"{name}.{gate}" if name else gate: (_kernels.whole(name, getattr(module, gate)), gate in module.PENALIZED)
        for name, module in model.named_modules()
        if isinstance(module, GatedConv2d)
        for gate in module.GATES.values()
    }


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is an int or float that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def histogram(gate: Tensor, penalized: bool = True) -> Gates:
    """A gate vector, counted by |gate|."""
    size = gate.detach().flatten().abs().double().cpu()
    alive = size[size > 0]
    place = ((alive.log10() - LOW) / (HIGH - LOW) * BINS).floor().nan_to_num(0, BINS - 1, 0).clamp(0, BINS - 1).long()
    return Gates(len(size), len(size) - len(alive), tuple(torch.bincount(place, minlength=BINS).tolist()), penalized)


def _line(document: Mapping[str, Any]) -> str:
    return json.dumps(document, separators=(",", ":")) + "\n"


def _moment(path: Path, number: int, line: str) -> Moment:
    """A line as what it stands for; ValueError, naming it, where it stands for nothing."""
    try:
        found = json.loads(line)
        spectra = {
            _text(layer): {_text(name): _spectrum(value) for name, value in _mapping(group).items()}
            for layer, group in _mapping(found["spectra"]).items()
        }
        gates = {_text(name): _gates(value) for name, value in _mapping(found["gates"]).items()}
        row = {_text(name): _number(value) for name, value in _mapping(found["row"]).items()}
        return Moment(_count(found["epoch"]), row, spectra, gates)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _broken(path, number) from error


def _spectrum(value: Any) -> Spectrum:
    sigma = tuple(map(_number, value["sigma"]))
    full = _count(value["full"])
    if not 1 <= len(sigma) <= full:
        raise ValueError("sigma")
    return Spectrum(full, _count(value["rank"]), sigma)


def _gates(value: Any) -> Gates:
    counts = tuple(map(_count, value["counts"]))
    if len(counts) != BINS:
        raise ValueError("counts")
    return Gates(_count(value["total"]), _count(value["zero"]), counts, value["penalized"] is True)


def _typed(test: Callable[[Any], bool]) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if not test(value):
            raise ValueError("type")
        return value

    return check


_mapping = _typed(lambda value: isinstance(value, dict))
_text = _typed(lambda value: isinstance(value, str))
_number = _typed(is_number)
_count = _typed(lambda value: type(value) is int and value >= 0)


def _broken(path: Path, line: int) -> ValueError:
    return _checks.fail("run", "a folder with whole trajectories", f"{path}, which is damaged in line {line}")
