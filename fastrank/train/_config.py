"""What a training run does, checked when it is written down."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from typing import Any, cast

from fastrank import _checks
from fastrank.data import Augment

SCHEDULES = ("cosine", "steps", "constant")
OPTIMIZERS = ("sgd", "adam", "adamw")


@dataclass(frozen=True)
class TrainConfig:
    """What a training run does; every field but the last four must agree for a run to be resumed.

    lr is the peak of the schedule, which moves at every step: "cosine" falls to 0 at the end of the last epoch, "steps"
    multiplies by `gamma` at the start of every epoch (from 0) in `milestones`, "constant" stays; each begins with
    `warmup_epochs` (may be a fraction) of linear growth. `lr_for` maps names of parameters, or patterns such as
    "*.gate_*", to a peak of their own, which the schedule moves in proportion; of several patterns that match, the
    first counts. It is stored as a tuple of pairs.

    optimizer: "sgd", to which alone `momentum` and `nesterov` belong; "adam" or "adamw", with torch's betas.
    `weight_decay` acts on all trained parameters, whatever their learning rate, as in the published recipes, or only on
    those of two dimensions and more where `decay_norm_and_bias` is False; only "adamw" keeps it out of the gradient.

    amp: False; "bf16"; "fp16", with a gradient scaler; True, which is "fp16" on a GPU and "bf16" elsewhere. Weights,
    regularisers and evaluation stay in float32. `clip_norm` bounds the norm of all gradients, penalties included.
    `shift` and `flip` augment the training images, see `fastrank.data.Augment`. `seed` decides the order of the images,
    their augmentation, and dropout; not the initial weights, which the model brings.

    A checkpoint is written every `checkpoint_every` epochs and at the end, and besides every `checkpoint_steps` steps.
    `device` is by default the model's; `workers` processes read data that is not in memory.
    Raises ValueError or TypeError, naming the argument.
    """

    epochs: int
    batch_size: int
    lr: float
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False
    schedule: str = "cosine"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    warmup_epochs: float = 0
    label_smoothing: float = 0.0
    decay_norm_and_bias: bool = True
    optimizer: str = "sgd"
    lr_for: Mapping[str, float] | tuple[tuple[str, float], ...] = ()
    amp: bool | str = False
    clip_norm: float | None = None
    shift: int = 0
    flip: bool = False
    seed: int = 0
    checkpoint_every: int = 1
    checkpoint_steps: int | None = None
    device: str | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        for name, low in (("epochs", 0), ("batch_size", 1), ("seed", 0), ("checkpoint_every", 1), ("workers", 0)):
            _checks.integer(name, getattr(self, name), low)
        for name in ("nesterov", "flip", "decay_norm_and_bias"):
            if not isinstance(getattr(self, name), bool):
                raise _checks.fail_type(name, "a bool", getattr(self, name))
        _checks.number("lr", self.lr, 0, open_low=True)
        _checks.number("momentum", self.momentum, 0, 1)
        _checks.number("weight_decay", self.weight_decay, 0)
        _checks.number("gamma", self.gamma, 0, 1, open_low=True)
        _checks.number("warmup_epochs", self.warmup_epochs, 0, max(self.epochs, 1))
        _checks.number("label_smoothing", self.label_smoothing, 0, 1)
        if self.nesterov and not self.momentum:
            raise _checks.fail("momentum", "above 0 where nesterov is True", self.momentum)
        if self.clip_norm is not None:
            _checks.number("clip_norm", self.clip_norm, 0, open_low=True)
        if self.checkpoint_steps is not None:
            _checks.integer("checkpoint_steps", self.checkpoint_steps, 1)
        if not isinstance(self.amp, bool):
            _checks.choice("amp", self.amp, ("fp16", "bf16"))
        if self.device is not None and not isinstance(self.device, str):
            raise _checks.fail_type("device", "a str or None", self.device)
        self._check_optimizer()
        Augment(self.shift, self.flip)
        _checks.choice("schedule", self.schedule, SCHEDULES)
        if not isinstance(self.milestones, tuple | list):
            raise _checks.fail_type("milestones", "a sequence of ints", self.milestones)
        object.__setattr__(self, "milestones", tuple(self.milestones))  # a list, as YAML gives it, will do
        for before, epoch in zip((0, *self.milestones), self.milestones, strict=False):
            _checks.integer("milestones, which increase,", epoch, before + 1)
        if bool(self.milestones) != (self.schedule == "steps"):
            expected = "given" if self.schedule == "steps" else "empty"
            raise _checks.fail("milestones", f"{expected} where schedule is {self.schedule!r}", self.milestones)

    def _check_optimizer(self) -> None:
        _checks.choice("optimizer", self.optimizer, OPTIMIZERS)
        defaults = {field.name: field.default for field in fields(self)}
        for name in ("momentum", "nesterov"):
            if self.optimizer != "sgd" and getattr(self, name) != defaults[name]:
                expected = f"left at {defaults[name]} where optimizer is {self.optimizer!r}, which has no such setting"
                raise _checks.fail(name, expected, getattr(self, name))
        pairs = tuple(self.lr_for.items()) if isinstance(self.lr_for, Mapping) else self.lr_for
        if not isinstance(pairs, tuple | list) or any(not isinstance(p, tuple | list) or len(p) != 2 for p in pairs):
            raise _checks.fail_type("lr_for", "a mapping of parameter names or patterns to learning rates", self.lr_for)
        for pattern, peak in pairs:
            if not isinstance(pattern, str):
                raise _checks.fail_type("keys of lr_for", "str", pattern)
            _checks.number(f"lr_for[{pattern!r}]", peak, 0, open_low=True)
        object.__setattr__(self, "lr_for", tuple((pattern, float(peak)) for pattern, peak in pairs))

    @property
    def rates(self) -> tuple[tuple[str, float], ...]:
        """`lr_for` as it is stored: pairs of a pattern and a peak learning rate."""
        return cast("tuple[tuple[str, float], ...]", self.lr_for)

    def peak_lr(self, parameter: str) -> float:
        """The peak learning rate of the parameter of that name."""
        return next((peak for pattern, peak in self.rates if fnmatchcase(parameter, pattern)), self.lr)

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of optimizer step number `step`, counted from 0 over the whole run, from the peak `lr`."""
        warmup = round(self.warmup_epochs * steps_per_epoch)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        if self.schedule == "cosine":
            share = (step - warmup) / max(self.epochs * steps_per_epoch - warmup, 1)
            return self.lr * 0.5 * (1 + math.cos(math.pi * share))
        passed = sum(epoch * steps_per_epoch <= step for epoch in self.milestones)
        return float(self.lr * self.gamma**passed)

    def identity(self) -> dict[str, Any]:
        """The fields that decide the result: all but those of checkpoints, device and workers."""
        fields = asdict(self)
        for name in ("checkpoint_every", "checkpoint_steps", "device", "workers"):
            del fields[name]
        return fields
