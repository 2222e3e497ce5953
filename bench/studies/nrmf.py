"""NRMF's own studies on the digits: singular values over the epochs, and its layer table."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastrank import data, methods, models, ranks, train
from fastrank.decompose import unfold
from studies.lab import BATCH, Lab

LAYER, SIZE = "conv3", 16
EPOCHS_SHOWN = (0, 1, 2, 5, 10, 20, 40, 60)


def run(lab: Lab, seed: int = 0) -> dict[str, Any]:
    """Curves of the README's modified LeNet-5, and its layer table."""
    curves = {
        name: lab.cell(f"nrmf curves {name}", lambda name=name: _curves(lab, name == "NRMF", seed))
        for name in ("plain", "NRMF")
    }
    rows = []
    for layer, plain in curves["plain"]["layers"].items():
        row = {key: plain[key] for key in ("layer", "in", "out", "params")}
        rows.append({**row, "VBMF": plain["VBMF"], "NRMF": curves["NRMF"]["layers"][layer]["NRMF"]})
    return {"layer": LAYER, "curves": curves, "layers": rows}


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
    return {**found, "layers": _layers(model)}


def _layers(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Of every convolution EVBMF's ranks and those at p = 95 %, with the parameters of the Tucker-2 form."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            weight = module.weight.detach()
            out_channels, in_channels, kh, kw = weight.shape
            row: dict[str, Any] = {"layer": name, "in": in_channels, "out": out_channels, "params": weight.numel()}
            unfoldings = [unfold(weight, mode) for mode in ("mode3", "mode4")]
            for method, pair in (
                ("VBMF", [ranks.vbmf_rank(m) for m in unfoldings]),
                ("NRMF", [ranks.energy_rank(ranks.singular_values(m), 0.95) for m in unfoldings]),
            ):
                small = in_channels * pair[0] + kh * kw * pair[0] * pair[1] + pair[1] * out_channels
                row[method] = {"ranks": pair, "params": small}
            found[name] = row
    return found
