"""Training configurations: what they refuse, and the learning rates they give."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
import yaml

from fastrank.train import TrainConfig


def _config(**options: Any) -> TrainConfig:
    return TrainConfig(**{"epochs": 2, "batch_size": 16, "lr": 0.05, "schedule": "constant", **options})


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"epochs": -1}, ValueError, "epochs must be an int at least 0, got -1"),
        ({"epochs": 1.5}, TypeError, "epochs must be an int, got float"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"lr": 0.0}, ValueError, "lr must be a finite number above 0, got 0.0"),
        ({"lr": "1e-3"}, TypeError, "lr must be a number, got str"),
        ({"lr": float("nan")}, ValueError, "lr"),
        ({"momentum": 1.5}, ValueError, "momentum"),
        ({"weight_decay": -1e-4}, ValueError, "weight_decay"),
        ({"nesterov": 1}, TypeError, "nesterov must be a bool, got int"),
        ({"nesterov": True, "momentum": 0}, ValueError, "momentum must be above 0 where nesterov is True"),
        ({"schedule": "cosin"}, ValueError, "did you mean 'cosine'"),
        ({"schedule": "steps"}, ValueError, "milestones must be given where schedule is 'steps'"),
        ({"schedule": "steps", "milestones": (3, 3)}, ValueError, "milestones, which increase, must be an int at"),
        ({"schedule": "steps", "milestones": 3}, TypeError, "milestones must be a sequence of ints, got int"),
        ({"schedule": "cosine", "milestones": (3,)}, ValueError, "milestones must be empty where schedule is 'cosine'"),
        ({"gamma": 0}, ValueError, "gamma"),
        ({"warmup_epochs": 3}, ValueError, r"warmup_epochs must be a finite number in \[0, 2\], got 3"),
        ({"label_smoothing": 1.1}, ValueError, "label_smoothing"),
        ({"decay_norm_and_bias": None}, TypeError, "decay_norm_and_bias"),
        ({"amp": "fp8"}, ValueError, r"amp must be one of \['fp16', 'bf16'\], got 'fp8'"),
        ({"amp": 1}, TypeError, "amp"),
        ({"clip_norm": 0}, ValueError, "clip_norm"),
        ({"shift": -1}, ValueError, "shift"),
        ({"flip": "yes"}, TypeError, "flip"),
        ({"seed": -1}, ValueError, "seed"),
        ({"checkpoint_every": 0}, ValueError, "checkpoint_every"),
        ({"checkpoint_steps": 0}, ValueError, "checkpoint_steps"),
        ({"device": 0}, TypeError, "device"),
        ({"workers": -1}, ValueError, "workers"),
        ({"optimizer": "adamww"}, ValueError, r"optimizer must be one of .*did you mean 'adamw'"),
        ({"optimizer": None}, TypeError, "optimizer must be one of"),
        (
            {"optimizer": "adam", "momentum": 0.5},
            ValueError,
            "momentum must be left at 0.9 where optimizer is 'adam', which has no such setting, got 0.5",
        ),
        ({"optimizer": "adamw", "nesterov": True}, ValueError, "nesterov must be left at False where optimizer is 'ad"),
        ({"lr_for": 0.1}, TypeError, "lr_for must be a mapping of parameter names or patterns to learning rates, got"),
        ({"lr_for": "*.gate_*"}, TypeError, "lr_for must be a mapping"),
        ({"lr_for": [("*.gate_*", 0.1, 2)]}, TypeError, "lr_for must be a mapping"),
        ({"lr_for": {3: 0.1}}, TypeError, "keys of lr_for must be str, got int"),
        ({"lr_for": {"*.gate_*": 0}}, ValueError, r"lr_for\['\*\.gate_\*'\] must be a finite number above 0, got 0"),
        ({"lr_for": {"a": "1e-3"}}, TypeError, r"lr_for\['a'\] must be a number, got str"),
    ],
)
def test_configurations_are_checked(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        _config(**options)


def test_rates_of_their_own_are_stored_as_pairs_and_the_first_match_counts() -> None:
    rates = {"*.gate_out": 1, "*.gate_*": 0.01, "stem.weight": 0.5}
    config = _config(lr=0.001, lr_for=rates)
    assert config.lr_for == config.rates == (("*.gate_out", 1.0), ("*.gate_*", 0.01), ("stem.weight", 0.5))
    found = [config.peak_lr(name) for name in ("a.gate_out", "a.b.gate_in", "stem.weight", "stem.bias", "gate_in")]
    assert found == [1.0, 0.01, 0.5, 0.001, 0.001]
    assert hash(config) == hash(_config(lr=0.001, lr_for=list(rates.items())))
    assert replace(config, epochs=3).lr_for == config.lr_for
    parsed = yaml.safe_load("{epochs: 2, batch_size: 16, lr: 0.001, schedule: constant, lr_for: {'*.gate_*': 0.01}}")
    assert TrainConfig(**parsed).lr_for == (("*.gate_*", 0.01),)
    assert json.loads(json.dumps(asdict(config)))["lr_for"][1] == ["*.gate_*", 0.01]
    identity = config.identity()
    assert (identity["optimizer"], identity["lr_for"]) == ("sgd", config.lr_for)
    assert _config().lr_for == ()


def test_learning_rates() -> None:
    cosine = _config(epochs=10, lr=1.0, schedule="cosine")
    assert [cosine.lr_at(step, 10) for step in (0, 50, 100)] == pytest.approx([1, 0.5, 0])
    warm = _config(epochs=10, lr=1.0, schedule="cosine", warmup_epochs=0.5)
    assert [warm.lr_at(step, 10) for step in (0, 1, 4, 5)] == pytest.approx([0.2, 0.4, 1.0, 1.0])
    steps = _config(epochs=10, lr=1.0, schedule="steps", milestones=[5, 8], gamma=0.1)
    assert [steps.lr_at(step, 10) for step in (0, 49, 50, 79, 80)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    assert steps.milestones == (5, 8)
    assert _config(lr=0.3).lr_at(10**6, 10) == 0.3
