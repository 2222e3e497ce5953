"""Training configurations: what they refuse, and the learning rates they give."""

from __future__ import annotations

from typing import Any

import pytest

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
    ],
)
def test_configurations_are_checked(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        _config(**options)


def test_learning_rates() -> None:
    cosine = _config(epochs=10, lr=1.0, schedule="cosine")
    assert [cosine.lr_at(step, 10) for step in (0, 50, 100)] == pytest.approx([1, 0.5, 0])
    warm = _config(epochs=10, lr=1.0, schedule="cosine", warmup_epochs=0.5)
    assert [warm.lr_at(step, 10) for step in (0, 1, 4, 5)] == pytest.approx([0.2, 0.4, 1.0, 1.0])
    steps = _config(epochs=10, lr=1.0, schedule="steps", milestones=[5, 8], gamma=0.1)
    assert [steps.lr_at(step, 10) for step in (0, 49, 50, 79, 80)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    assert steps.milestones == (5, 8)
    assert _config(lr=0.3).lr_at(10**6, 10) == 0.3
