"""Funnel's own tables on the digits: penalty, schedule of C, learning rate, threshold, and where the gates end up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastrank import methods, train
from fastrank.regularize.schedules import Constant, Exponential, Linear
from studies.lab import BATCH, Lab

# Closing is λ · learning rate of the gates · number of steps. The published 0.002 · 0.01 · half a million steps is 10;
# here are 240 steps, so λ and the rates are larger, by factors that are ours.
WEIGHT, THRESHOLD = 0.3, 0.02
LR = 0.01  # of the gates ten times as much, as published
THRESHOLDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
LEARNING_RATES = (0.03, 0.01, 0.003)


def schedules(epochs: int) -> dict[str, Any]:
    """The schedules of C that the paper compares, over as many epochs as there are."""
    decay = max(epochs / 20, 1)  # the paper's "every 5 epochs" of 100
    return {
        "constant 10": Constant(10.0),
        "constant 1": Constant(1.0),
        "constant 0.1": Constant(0.1),
        "constant 0.01": Constant(0.01),
        "constant 0.001": Constant(0.001),
        "linear 10 to 0.001": Linear(10.0, 0.001, epochs),
        "exponential ×0.5": Exponential(10.0, 0.5, round(decay)),
        "exponential ×0.8": Exponential(10.0, 0.8, round(decay)),
    }


def factored(lab: Lab, seed: int) -> nn.Module:
    """Steps 1 and 2: the plain network at full rank with gates, trained a little."""
    model = methods.funnel.factorize(lab.dense("plain", seed), example_input=lab.example)
    warm = train.TrainConfig(2 if lab.length.close > 1 else 1, BATCH, 1e-4, weight_decay=0.0, shift=1, seed=seed)
    lab.fit(model, warm, run_dir=lab.out / "funnel" / f"factored_{seed}")
    return model


def closed(
    lab: Lab, seed: int, name: str = "default", *, lr: float = LR, step: str = "proximal", **options: Any
) -> nn.Module:
    """Step 3: the gates closed under a penalty; `options` are those of `methods.funnel.regularizer`."""
    model = factored(lab, seed)
    options = {"schedule": Linear(10.0, 0.001, lab.length.close), **options}
    penalty = methods.funnel.regularizer(model, WEIGHT, step=step, **options)
    lab.fit(model, _closing(lab, lr, seed), [penalty], run_dir=lab.out / "funnel" / f"{name.replace(' ', '_')}_{seed}")
    return model


def _closing(lab: Lab, lr: float, seed: int) -> train.TrainConfig:
    return train.TrainConfig(
        lab.length.close,
        BATCH,
        lr,
        lr_for={"*.gate_*": 10 * lr},
        weight_decay=0.0,
        schedule="constant",
        shift=1,
        seed=seed,
    )


def within(lab: Lab, model: nn.Module, macs: float) -> nn.Module:
    """Step 4 at the smallest threshold whose network fits into `macs`."""
    sizes = all_gates(model).abs().sort().values
    low, high = 0, len(sizes) - 1  # indices: everything below sizes[i] is pruned
    while low < high:
        middle = (low + high) // 2
        fits = lab.cost(_pruned(lab, model, float(sizes[middle])))["macs"] <= macs
        low, high = (low, middle) if fits else (middle + 1, high)
    return _pruned(lab, model, float(sizes[low]))


def all_gates(model: nn.Module) -> Tensor:
    """Every penalised gate, in one vector."""
    return torch.cat([gate.detach().flatten() for gate in methods.funnel.gates(model).values()])


def _pruned(lab: Lab, model: nn.Module, threshold: float) -> nn.Module:
    return methods.funnel.prune(model, threshold, example_input=lab.example)


def _row(lab: Lab, model: nn.Module, threshold: float = THRESHOLD) -> dict[str, Any]:
    gates = all_gates(model).abs()
    small = _pruned(lab, model, threshold)
    return {
        "closed": lab.top1(model),
        "pruned_percent": 100 * float((gates < threshold).double().mean()),
        "zero_percent": 100 * float((gates == 0).double().mean()),
        "pruned": lab.top1(small),
        **lab.cost(small),
    }


def run(lab: Lab, seed: int = 0) -> dict[str, Any]:
    """The four tables and the histogram."""

    def row(name: str, options: dict[str, Any]) -> dict[str, Any]:
        try:
            return _row(lab, closed(lab, seed, name, **options))
        except RuntimeError as error:  # a setting under which the training diverges is a result, too
            if "diverged" not in str(error):
                raise
            return {"diverged": str(error)}

    def table(kind: str, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
        return {
            name: lab.cell(f"funnel {kind} {name}", lambda n=name, o=options: row(f"{kind} {n}", o))
            for name, options in cases.items()
        }

    found = {
        "penalty": table("penalty", {name: {"penalty": name} for name in ("l1", "l2", "funnel")}),
        "step": table("step", {name: {"step": name} for name in ("proximal", "subgradient")}),
        "schedule": table("schedule", {n: {"schedule": s} for n, s in schedules(lab.length.close).items()}),
        "lr": table("lr", {f"{lr:g}": {"lr": lr} for lr in LEARNING_RATES}),
        "form": {form: lab.cell(f"funnel form {form}", lambda form=form: _form(lab, form, seed)) for form in FORMS},
    }

    def thresholds() -> dict[str, Any]:
        model = closed(lab, seed)
        rows = {}
        for threshold in THRESHOLDS:
            small = _pruned(lab, model, threshold)
            rows[f"{threshold:g}"] = lab.both(small, seed)
        return rows

    def histogram() -> dict[str, Any]:
        before, after = factored(lab, seed), closed(lab, seed)
        return {"before": all_gates(before).abs().tolist(), "after": all_gates(after).abs().tolist()}

    found["threshold"] = lab.cell("funnel thresholds", thresholds)
    found["gates"] = lab.cell("funnel gates", histogram)
    return found


FORMS = ("svd", "cp", "tucker2")


def _form(lab: Lab, form: str, seed: int) -> dict[str, Any]:
    """One factorisation at half of the multiply-adds, fine-tuned."""
    dense = lab.dense("plain", seed)
    model = methods.funnel.factorize(dense, form=form, example_input=lab.example)
    penalty = methods.funnel.regularizer(model, WEIGHT, schedule=Linear(10.0, 0.001, lab.length.close))
    lab.fit(model, _closing(lab, LR, seed), [penalty])
    small = within(lab, model, 0.5 * lab.cost(dense)["macs"])
    return lab.both(small, seed)
