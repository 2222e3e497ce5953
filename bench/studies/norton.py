"""NORTON's own studies on the digits: the rank, and the rank against pruning at one budget."""

from __future__ import annotations

from typing import Any

import torch

from fastrank import methods, models
from studies.lab import NETWORK, Lab

RANKS = range(1, 9)
POSITIONS = 12
# The README's trade-off is at the multiply-adds of rank 3 without pruning.
TRADE_OFF_RANKS = (3, 4, 6, 8)
CRITERIA = ("pabs", "csa", "vbd")


def run(lab: Lab, seed: int = 0) -> dict[str, Any]:
    """The README's two tables and the criteria side by side."""
    dense = lab.dense("plain", seed)
    whole = lab.cost(dense)

    def at(rank: int, rates: list[float] | None = None, criterion: str = "pabs") -> dict[str, Any]:
        model = methods.norton.compress(dense, rank=rank, compress_rate=rates, criterion=criterion)
        nmse = methods.norton.nmse(dense, model) if rates is None else None
        found = lab.both(model, seed)
        fewer = {key: 100 * (1 - found[key] / whole[key]) for key in ("macs", "params")}
        return {"rank": rank, "rates": rates, "nmse": nmse, "fewer": fewer, **found}

    ranks = [lab.cell(f"norton rank {rank}", lambda rank=rank: at(rank)) for rank in RANKS]
    limit = next(row["macs"] for row in ranks if row["rank"] == 3)
    trade = []
    for rank in TRADE_OFF_RANKS:
        rate = _rate(lab, rank, limit)
        if rate is None:
            continue
        rates = None if rate == 0 else [0.0, *[rate] * (POSITIONS - 1)]
        trade.append({"rate": rate, **lab.cell(f"norton trade {rank}", lambda k=rank, r=rates: at(k, r))})
    rates = [0.0, *[0.4] * (POSITIONS - 1)]
    criteria = {
        name: lab.cell(f"norton criterion {name}", lambda name=name: at(4, rates, name)) for name in CRITERIA
    }
    return {"dense": {**whole, "top1": lab.top1(dense)}, "ranks": ranks, "trade_off": trade, "criteria": criteria}


def _rate(lab: Lab, rank: int, limit: float) -> float | None:
    """The smallest rate in percent steps, alike at every position but the stem, that brings `rank` down to `limit`."""
    for percent in range(96):
        rates = [0.0, *[percent / 100] * (POSITIONS - 1)]
        with torch.device("meta"):
            model = models.build(NETWORK, rank=rank, compress_rate=rates)
        if lab.cost(model.to_empty(device="cpu"))["macs"] <= limit * 1.01:
            return percent / 100
    return None
