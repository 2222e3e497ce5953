"""The folder that a run leaves behind: its summary, its training history and its gates, read without a model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastrank import _checks
from fastrank.report._plots import COLOURS, figure_of, tidy, write
from fastrank.report._text import table, thousands
from fastrank.report._trajectory import FILE, Trajectory, read_trajectory

# The file and the metadata key that a training run keeps its state under.
_CHECKPOINT, _KEY = "checkpoint.safetensors", "fastrank.checkpoint"
# The file that names the folder of a checkpoint by several ranks, and the file in there with all but the tensors.
_POINTER, _HEADER = "checkpoint.json", "header.json"
# Of an epoch's row, what is no accuracy.
_NO_ACCURACY = ("epoch", "loss", "penalty", "lr", "seconds")
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """What a run left.

    summary: its summary.json, empty where there is none yet. stages: of the summary, each network that was measured, by
    the name of its stage. history: the epochs of each training, by the name of its folder, the oldest training first.
    gates: the gates of the last training that had any, by kind ("gate_in", "gate_core", ...), all layers together.
    trajectories: what a `Recorder` wrote of each training, by the name of its folder.
    """

    summary: dict[str, Any]
    stages: dict[str, dict[str, Any]]
    history: dict[str, list[Row]]
    gates: dict[str, Tensor]
    trajectories: dict[str, Trajectory] = field(default_factory=dict)


def read_run(folder: str | os.PathLike[str]) -> Run:
    """Read the folder of a run, finished or not.

    Raises FileNotFoundError where it holds neither a summary nor a checkpoint nor a trajectory, ValueError for damaged
    files.
    """
    folder = Path(folder)
    record = folder / "summary.json"
    checkpoints, pointers, recorded = (
        sorted(folder.rglob(name), key=lambda path: (path.stat().st_mtime, path))
        for name in (_CHECKPOINT, _POINTER, FILE)
    )
    if not record.is_file() and not checkpoints and not pointers and not recorded:
        wanted = "the folder of a run, which holds a summary.json or checkpoints"
        raise FileNotFoundError(f"run must be {wanted}, got {folder}, which has neither")
    summary: Any = {}
    if record.is_file():
        try:
            summary = json.loads(record.read_bytes())
        except (ValueError, RecursionError) as error:
            raise _checks.fail("run", "a folder with a whole summary.json", f"{record}, which is no JSON") from error
        if not isinstance(summary, dict):
            raise _checks.fail("run", "a folder with a summary.json that holds a mapping", record)
    history: dict[str, list[Row]] = {}
    gates: dict[str, Tensor] = {}
    for path in checkpoints:
        rows, found = _checkpoint(path)
        history[str(path.parent.relative_to(folder))] = rows
        gates = found or gates
    for path in pointers:  # of several ranks, whose gates are in their shards
        history[str(path.parent.relative_to(folder))] = _rows(path, _header(path))
    trajectories = {str(path.parent.relative_to(folder)): read_trajectory(path) for path in recorded}
    return Run(summary, stages_of(summary), history, gates, trajectories)


def stages_of(summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Of a run's summary, what was measured of each network ("dense", "compressed", ...), in the order of the run."""
    measured = {"params", "macs"}
    return {name: value for name, value in summary.items() if isinstance(value, dict) and measured <= value.keys()}


def published(summary: Mapping[str, Any]) -> str:
    """What was published for the experiment that a run repeats, in one line; empty where its recipe names none."""
    experiment = summary.get("experiment") or {}
    figures = experiment.get("published") or {}
    if not figures:
        return ""
    told = [f"{key.replace('top', 'Acc@')} {thousands(round(v)) if v >= 1e4 else v}" for key, v in figures.items()]
    return f"Published ({experiment.get('source', 'no source given')}): {', '.join(told)}"


def stage_table(stages: Mapping[str, Mapping[str, Any]], *, title: str) -> Table:
    """A row a measured network: its accuracies, its sizes, and what it saves against the first."""
    first = next(iter(stages.values()))
    scores = [key for key, value in first.items() if isinstance(value, float)]
    cells = []
    for name, row in stages.items():
        saved = [f"{100 * (1 - row[key] / first[key]):.2f} %" if row is not first else "" for key in ("params", "macs")]
        accuracies = [f"{row[key]:.2f}" if key.startswith("top") else f"{row[key]:.4f}" for key in scores]
        cells.append([name, *accuracies, thousands(row["params"]), saved[0], thousands(row["macs"]), saved[1]])
    names = [key.replace("top", "Acc@") for key in scores]
    return table(["stage", *names, "params", "fewer", "MACs", "fewer"], cells, title=title)


def _checkpoint(path: Path) -> tuple[list[Row], dict[str, Tensor]]:
    """The epochs in a training's checkpoint, and its gates by kind."""
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {})[_KEY])
            kinds: dict[str, list[Tensor]] = {}
            for name in file.keys():  # noqa: SIM118  (the handle is no mapping)
                kind = name.rpartition(".")[2]
                if name.startswith("model/") and kind.startswith("gate_"):
                    kinds.setdefault(kind, []).append(file.get_tensor(name).flatten().float())
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise _checks.fail("run", "a folder with whole checkpoints", f"{path}, which is not one: {error}") from error
    return _rows(path, header), {kind: torch.cat(values) for kind, values in kinds.items()}


def _header(pointer: Path) -> Any:
    """What the checkpoint of several ranks that `pointer` names says of its run."""
    try:
        name = json.loads(pointer.read_bytes())["folder"]
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError("it names no folder beside it")
        return json.loads((pointer.parent / name / _HEADER).read_bytes())
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _checks.fail("run", "a folder with whole checkpoints", f"{pointer}, which is not one: {error}") from error


def _rows(path: Path, header: Any) -> list[Row]:
    """The history in a checkpoint's header."""
    rows = header.get("history") if isinstance(header, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "loss" in row for row in rows):
        raise _checks.fail("run", "a folder with whole checkpoints", f"{path}, whose history is damaged")
    # What a test of another task than classification measured has a mapping of its own in the row.
    return [{**row, **row.get("metrics", {})} for row in rows]


def plot_history(path: str | os.PathLike[str], history: Mapping[str, Sequence[Row]], *, title: str) -> None:
    """Loss and accuracies over the epochs of all trainings, one behind the other, each under its name.

    Raises ValueError where no training has finished an epoch.
    """
    trainings = {name: rows for name, rows in history.items() if rows}
    if not trainings:
        raise _checks.fail("history", "of at least one finished epoch", "none")
    figure, axes = figure_of(1, 2, width=10, height=3.8)
    rows = [row for rows in trainings.values() for row in rows]
    measured = [key for key in rows[0] if key not in _NO_ACCURACY and any(_number(row.get(key)) for row in rows)]
    scale = "accuracy, %" if any("top" in key for key in measured) else "measured on test data"
    panels = {"training loss": ["loss"], scale: measured}
    for ax, (label, keys) in zip(axes[0], panels.items(), strict=True):
        for colour, key in zip(COLOURS, keys, strict=False):
            first = 0
            for number, part in enumerate(trainings.values()):
                points = [(first + i + 1, row[key]) for i, row in enumerate(part) if _number(row.get(key))]
                style: dict[str, Any] = {"color": colour, "linewidth": 2, "marker": "o" if len(part) < 2 else None}
                name = key.replace("_", " ").replace("top", "Acc@")
                ax.plot(*zip(*points, strict=True), label=name if number == 0 else None, **style) if points else None
                first += len(part)
        first = 0
        for name, part in trainings.items():
            if first:
                ax.axvline(first + 0.5, color="#888888", linewidth=1, linestyle="--")
            ax.text(first + 0.6, 1.01, name, transform=ax.get_xaxis_transform(), fontsize=8, color="#555555")
            first += len(part)
        ax.set_xlim(0.5, first + 0.5)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_xlabel("epoch")
        ax.set_ylabel(label)
        tidy(ax)
        if len(keys) > 1:
            ax.legend(frameon=False, loc="best")
    write(figure, path, title)


def plot_gates(path: str | os.PathLike[str], gates: Mapping[str, Tensor], *, title: str) -> None:
    """Histograms of |gate| on a logarithmic axis, one panel a kind, with the number of gates that are exactly 0."""
    if not gates:
        raise _checks.fail("gates", "of at least one kind", "none")
    figure, axes = figure_of(1, len(gates), width=3.6 * len(gates) + 1, height=3.4)
    for ax, colour, (kind, values) in zip(axes[0], COLOURS, gates.items(), strict=False):
        size = values.abs()
        alive = size[size > 0]
        zeros = len(size) - len(alive)
        if len(alive):
            low, high = float(alive.min().log10()), float(alive.max().log10())
            edges = torch.logspace(low - 0.05, high + 0.05, 41)
            ax.hist(alive.tolist(), bins=edges.tolist(), color=colour)
            ax.set_xscale("log")
        ax.set_title(f"{kind}: {zeros:,} of {len(size):,} exactly 0", loc="left", fontsize=10)
        ax.set_xlabel("|gate|")
        tidy(ax)
    axes[0][0].set_ylabel("gates")
    write(figure, path, title)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
