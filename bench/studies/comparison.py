"""Every method at the same budgets of multiply-adds, from the same trainings, fine-tuned alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastrank import compress, load, make_plan, methods, models, save, train
from studies import funnel
from studies.lab import NETWORK, Lab

BUDGETS = {"2×": 0.5, "4×": 0.25, "8×": 0.125}
SEEDS = (0, 1, 2)
MUSCO_ROUNDS = 8
TIMED = 0  # the seed whose networks are timed
# Plans that a budget can turn: row -> training of the dense network, method of make_plan.
PLANNED = {
    "SVD channel": ("plain", "trp-channel"),
    "SVD spatial": ("plain", "trp-spatial"),
    "Tucker-2 (energy)": ("plain", "nrmf"),
    "NRMF": ("NRMF", "nrmf"),
    "TRP channel": ("TRP channel", "trp-channel"),
    "TRP+Nu channel": ("TRP+Nu channel", "trp-channel"),
    "TRP spatial": ("TRP spatial", "trp-spatial"),
    "TRP+Nu spatial": ("TRP+Nu spatial", "trp-spatial"),
}
ROWS = (*PLANNED, "VBMF", "MUSCO", "Funnel", "NORTON")


class Unreachable(Exception):
    """The method has nothing to offer at the budget; the message says what is the least."""


def run(lab: Lab) -> dict[str, Any]:
    """Cells of every row, budget and seed, and their means."""
    dense = {
        f"{training} {seed}": lab.cell(
            f"dense {training} {seed}",
            lambda training=training, seed=seed: {"top1": lab.top1(lab.dense(training, seed))},
        )["top1"]
        for training in sorted({training for training, _ in PLANNED.values()})
        for seed in SEEDS
    }
    whole = lab.cost(models.build(NETWORK))
    rows = []
    for row in ROWS:
        for budget, share in BUDGETS.items():
            if row == "VBMF" and budget != "2×":
                continue  # its ranks leave nothing to choose: one point, whatever the budget
            cells = [
                lab.cell(f"compare {row} {budget} {seed}", lambda r=row, s=share, seed=seed: _cell(lab, r, s, seed))
                for seed in SEEDS
            ]
            rows.append(_mean(row, "own" if row == "VBMF" else budget, cells))
    times = lab.cell("compare times", lambda: _times(lab))
    for row in rows:
        key = f"{row['row']} {'2×' if row['budget'] == 'own' else row['budget']}"
        if key in times:
            row.update(ms=times[key], dense_ms=times["dense"])
    return {"network": NETWORK, "input": list(lab.shape), "dense": {"top1": dense, **whole}, "rows": rows}


def _cell(lab: Lab, row: str, share: float, seed: int) -> dict[str, Any]:
    try:
        model, before = MAKERS.get(row, _planned)(lab, row, share, seed)
    except Unreachable as error:
        return {"unreachable": str(error)}
    found = lab.both(model, seed)
    if seed == TIMED:
        save(model, _file(lab, row, share))
    return {**found, "trained": before}


def _file(lab: Lab, row: str, share: float) -> Path:
    folder = lab.out / "models"
    folder.mkdir(exist_ok=True)
    return folder / f"{row.replace(' ', '_').replace('+', '_')}_{share:g}.safetensors"


def _times(lab: Lab) -> dict[str, float]:
    """Milliseconds of a batch of every network of seed TIMED, all in turn in one process; "dense" is the plain one."""
    contenders: dict[str, nn.Module] = {"dense": lab.dense("plain", TIMED)}
    for row in ROWS:
        for budget, share in BUDGETS.items():
            path = _file(lab, row, share)
            if path.is_file():
                contenders[f"{row} {budget}"] = load(path)
    return lab.times(contenders)


def _planned(lab: Lab, row: str, share: float, seed: int) -> tuple[nn.Module, float]:
    training, method = PLANNED[row]
    dense = lab.dense(training, seed)
    try:
        plan = make_plan(dense, method, example_input=lab.example, budget={"macs": share})
    except ValueError as error:
        raise Unreachable(str(error)) from error
    return compress(dense, plan), lab.top1(dense)


def _vbmf(lab: Lab, row: str, share: float, seed: int) -> tuple[nn.Module, float]:
    dense = lab.dense("plain", seed)
    return compress(dense, make_plan(dense, "vbmf", example_input=lab.example)), lab.top1(dense)


def _musco(lab: Lab, row: str, share: float, seed: int) -> tuple[nn.Module, float]:
    """As many rounds as it takes to meet the budget, a third of the way to EVBMF's ranks each."""
    dense = lab.dense("plain", seed)
    folder = lab.out / "musco" / str(seed)
    if not (folder / f"{MUSCO_ROUNDS}.safetensors").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        tune = train.TrainConfig(max(lab.length.tune // 3, 1), 64, 0.01, shift=1, seed=seed)

        def between(model: nn.Module, number: int) -> None:
            save(model, folder / f"{number}.safetensors")
            lab.fit(model, tune)

        last = methods.musco.compress(
            dense, rounds=MUSCO_ROUNDS, weaken=1 / 3, example_input=lab.example, between=between
        )
        save(last, folder / f"{MUSCO_ROUNDS}.safetensors")
    left = 1.0
    for number in range(1, MUSCO_ROUNDS + 1):
        small = load(folder / f"{number}.safetensors")
        left = lab.cost(small)["macs"] / lab.cost(dense)["macs"]
        if left <= share:
            return small, lab.top1(dense)
    raise Unreachable(f"after {MUSCO_ROUNDS} rounds {left:.3f} of the multiply-adds are left")


def _funnel(lab: Lab, row: str, share: float, seed: int) -> tuple[nn.Module, float]:
    dense = lab.dense("plain", seed)
    closed = funnel.closed(lab, seed)
    return funnel.within(lab, closed, share * lab.cost(dense)["macs"]), lab.top1(dense)


def _norton(lab: Lab, row: str, share: float, seed: int) -> tuple[nn.Module, float]:
    """The largest rank that meets the budget, without pruning; the other side of that choice is a study of its own."""
    dense = lab.dense("plain", seed)
    limit = share * lab.cost(dense)["macs"]
    for rank in range(9, 0, -1):
        with torch.device("meta"):
            target = models.build(NETWORK, rank=rank)
        if lab.cost(target.to_empty(device="cpu"))["macs"] <= limit:
            return methods.norton.compress(dense, rank=rank), lab.top1(dense)
    # Rank 1 alone is too big: prune as well.
    for percent in range(5, 95, 5):
        rates = [0.0, *[percent / 100] * 11]
        if lab.cost(models.build(NETWORK, rank=1, compress_rate=rates))["macs"] <= limit:
            return methods.norton.compress(dense, rank=1, compress_rate=rates), lab.top1(dense)
    raise Unreachable("no rank and rate meet it")


MAKERS: dict[str, Callable[[Lab, str, float, int], tuple[nn.Module, float]]] = {
    "VBMF": _vbmf,
    "MUSCO": _musco,
    "Funnel": _funnel,
    "NORTON": _norton,
}


def _mean(row: str, budget: str, cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread over the seeds that reached the budget."""
    reached = [cell for cell in cells if "unreachable" not in cell]
    found: dict[str, Any] = {"row": row, "budget": budget, "seeds": len(reached), "cells": cells}
    if not reached:
        return {**found, "unreachable": cells[0]["unreachable"]}
    for key in ("macs", "params", "trained", "converted", "tuned"):
        values = [cell[key] for cell in reached]
        found[key] = statistics.fmean(values)
        found[f"{key}_spread"] = max(values) - min(values)
    return found
