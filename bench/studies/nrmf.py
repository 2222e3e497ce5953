"""NRMF's own studies on the digits: singular values over the epochs, and its layer table."""

from __future__ import annotations

from typing import Any

import torch

from fastrank import data, make_plan, methods, models, ranks, train
from fastrank.decompose import unfold
from studies.lab import BATCH, Lab

LAYER, SIZE = "conv3", 16
EPOCHS_SHOWN = (0, 1, 2, 5, 10, 20, 40, 60)


def run(lab: Lab, seed: int = 0) -> dict[str, Any]:
    """Curves of the README's modified LeNet-5, and the layer table of the network of the comparison."""
    curves = {
        name: lab.cell(f"nrmf curves {name}", lambda name=name: _curves(lab, name == "NRMF", seed))
        for name in ("plain", "NRMF")
    }
    table = lab.cell("nrmf layers", lambda: {"rows": _layers(lab, seed)})
    return {"layer": LAYER, "curves": curves, "layers": table["rows"]}


def _curves(lab: Lab, regularised: bool, seed: int) -> dict[str, Any]:
    """Normalised σ of both unfoldings of the inserted layer after some epochs."""
    images = data.load("digits", split="train", size=SIZE)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = models.build("lenet5_nrmf")
    found: dict[str, Any] = {"mode3": {}, "mode4": {}, "energy_ranks": {}}

    def note(epoch: int) -> None:
        weight = model.get_submodule(LAYER).weight.detach()
        spectra = {mode: ranks.singular_values(unfold(weight, mode)) for mode in ("mode3", "mode4")}
        found["energy_ranks"][str(epoch)] = [ranks.energy_rank(s, 0.95) for s in spectra.values()]
        if epoch in EPOCHS_SHOWN or epoch == lab.length.curve:
            for mode, spectrum in spectra.items():
                found[mode][str(epoch)] = (spectrum / spectrum[0]).tolist()

    note(0)
    train.fit(
        model,
        images,
        None,
        train.TrainConfig(lab.length.curve, BATCH, 0.05, shift=1, seed=seed),
        regularizers=[methods.nrmf.regularizer(model, 1e-2)] if regularised else [],
        progress=False,
        on_epoch=lambda row: note(row.epoch),
    )
    return found


def _layers(lab: Lab, seed: int) -> list[dict[str, Any]]:
    """The README's layer table: VBMF's ranks in the plain network, NRMF's at p = 95 % in the regularised one."""
    plans = {
        "VBMF": make_plan(lab.dense("plain", seed), "vbmf", example_input=lab.example),
        "NRMF": make_plan(lab.dense("NRMF", seed), "nrmf", example_input=lab.example, energy=0.95),
    }
    model = lab.dense("plain", seed)
    rows = []
    for name, module in model.named_modules():
        if name in plans["VBMF"].layers and getattr(module, "kernel_size", None) == (3, 3):
            out_channels, in_channels = module.weight.shape[:2]
            row = {"layer": name, "in": in_channels, "out": out_channels, "params": module.weight.numel()}
            for method, plan in plans.items():
                pair = plan.layers[name].ranks
                small = None if not pair else in_channels * pair[0] + 9 * pair[0] * pair[1] + pair[1] * out_channels
                row[method] = {"ranks": list(pair), "params": small}
            rows.append(row)
    return rows
