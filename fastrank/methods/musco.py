"""MUSCO: weaken every Tucker rank a part of the way towards EVBMF's, fine-tune, and repeat.

Source: Gusak et al., "Automated multi-stage compression of neural networks", ICCV workshops 2019. A baseline of Funnel.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn

from fastrank import _checks, convert, decompose, ranks
from fastrank.decompose.tucker import max_ranks
from fastrank.decompose.unfold import unfold
from fastrank.methods._spectra import dense
from fastrank.plan import LayerPlan, Plan


def weakened(rank: int, extreme: int, weaken: float) -> int:
    """R − ⌈w·(R − R_extreme)⌉: between the two, and nearer to the extreme rank the larger w is; never above R."""
    return rank - math.ceil(weaken * max(rank - extreme, 0))


def compress(
    model: nn.Module,
    *,
    between: Callable[[nn.Module, int], None] | None = None,
    rounds: int = 3,
    weaken: float = 0.8,
    example_input: Tensor | None = None,
) -> nn.Module:
    """A compressed copy of `model`: `rounds` times, weaken the Tucker-2 ranks of every k×k convolution and fine-tune.

    A round takes the EVBMF ranks of the weights as they are by then, moves each rank the share `weaken` of the way from
    where it is (the full rank at first) to them, and factors again. A layer factored before is seen through its core:
    its merged kernel has no noise left outside of the kept subspaces, and EVBMF would take all the rest for signal.
    between(model, round) fine-tunes the result, round counted from 1; the last round's is left to the caller. A layer
    stays dense where its factored form takes more multiply-adds on example_input's maps (without one: more weights).
    The published code weakens by 0.8; the number of rounds is the user's.
    """
    _checks.integer("rounds", rounds, 1)
    _checks.number("weaken", weaken, 0.0, 1.0, open_low=True)
    sizes = {} if example_input is None else convert.input_sizes(model, example_input)
    reached: dict[str, tuple[int, int]] = {}
    for number in range(1, rounds + 1):
        merged = convert.decompress(model)
        layers: dict[str, LayerPlan] = {}
        for site in convert.sites(merged):
            if site.reason or (sizes and site.name not in sizes):
                layers[site.name] = dense(site.reason or "the model does not run it on the example input")
                continue
            if site.conv.kernel_size == (1, 1):
                layers[site.name] = dense("a 1×1 kernel has no spatial core to shrink")
                continue
            weight = site.conv.weight.detach()
            before = reached.get(site.name, max_ranks(tuple(weight.shape)))
            seen = decompose.tucker2(weight, before).core if site.name in reached else weight
            extreme = tuple(ranks.vbmf_rank(unfold(seen, mode)) for mode in ("mode3", "mode4"))
            if 0 in extreme:
                layers[site.name] = dense(f"EVBMF sees only noise (ranks {extreme[0]}×{extreme[1]})")
                continue
            pair = (weakened(before[0], extreme[0], weaken), weakened(before[1], extreme[1], weaken))
            reached[site.name] = pair
            reason = f"round {number}: {weaken:g} of the way to EVBMF's {extreme[0]}×{extreme[1]}"
            layer = LayerPlan("tucker2", pair, reason)
            cost = "macs" if sizes else "params"
            layers[site.name] = convert.guarded(site.conv, layer, cost, sizes.get(site.name, (1, 1)))
        options = {"rounds": rounds, "weaken": weaken, "guard": "macs" if sizes else "params"}
        model = convert.compress(merged, Plan(layers, "musco", options))
        if between is not None and number < rounds:
            between(model, number)
    return model
