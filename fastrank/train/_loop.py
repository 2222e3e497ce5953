"""The steps and epochs of a training run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.utils.data import Dataset

from fastrank.regularize.base import Regularizer
from fastrank.train import _checkpoint, _optimizer, _progress
from fastrank.train._config import TrainConfig
from fastrank.train._evaluate import length
from fastrank.train._progress import EpochRow
from fastrank.train._task import Task

LOOK_EVERY = {"cuda": 20}
"""How many steps pass between two readings of the loss, for which a GPU would have to wait; elsewhere one."""
MAX_SKIPPED = 40
"""Steps in a row that a gradient scaler may skip: by then it has halved the scale from 2^16 to 2^-24."""


class Loop:
    """A run with what it needs besides its state. The totals of an epoch: Σ loss, right answers, images."""

    def __init__(
        self,
        model: nn.Module,
        train: Dataset[Any],
        test: Dataset[Any] | None,
        config: TrainConfig,
        regularizers: Sequence[Regularizer],
        label: str,
        device: torch.device,
        task: Task,
    ) -> None:
        self.task = task
        self.model, self.train, self.test, self.config, self.label = model, train, test, config, label
        self.path: Path | None = None
        self.reporter: _progress.Reporter
        images = length(train)
        self.drop_last = task.refuses_one_image and images > config.batch_size and images % config.batch_size == 1
        self.steps = -(-(images - self.drop_last) // config.batch_size)
        self.look_every = LOOK_EVERY.get(device.type, 1)
        half = {"fp16": torch.float16, "bf16": torch.bfloat16}
        amp = ("fp16" if device.type == "cuda" else "bf16") if config.amp is True else config.amp
        self.dtype = half[amp] if amp else None
        self.stepped, self.skipped = True, 0
        self.bad_step = torch.tensor(-1, device=device)
        self.run = _checkpoint.Run(
            model=model,
            optimizer=_optimizer.make(model, config),
            scaler=GradScaler(device.type, enabled=self.dtype == torch.float16),
            regularizers=regularizers,
            device=device,
            identity={**config.identity(), "task": task.name, "train_data length": images, **_settings(regularizers)},
            totals=torch.zeros(3, dtype=torch.float64, device=device),
        )
        self.run.optimizer.register_step_post_hook(lambda *_: setattr(self, "stepped", True))
        for regularizer in regularizers:
            regularizer.bind(self.run.optimizer)

    def epoch(self, on_epoch: Callable[[EpochRow], object] | None) -> None:
        """The rest of the current epoch, its evaluation, its row and, where one is due, its checkpoint."""
        config, run = self.config, self.run
        number = len(run.history)
        started = time.monotonic() - run.seconds
        for regularizer in run.regularizers:
            regularizer.start_epoch(number)
        start = run.step - number * self.steps
        for batch in self.task.batches(self.train, config, run.device, number, start, self.drop_last):
            self.step(batch)
            run.seconds = time.monotonic() - started
            if config.checkpoint_steps and run.step % config.checkpoint_steps == 0:
                self.save()
        loss, accuracy = self.look()
        penalty = sum((float(regularizer.value()) for regularizer in run.regularizers), 0.0)
        tested = {} if self.test is None else self.task.test(self.model, self.test, config)
        row = EpochRow(
            epoch=number + 1,
            loss=loss,
            penalty=penalty,
            train_top1=accuracy,
            lr=config.lr_at(run.step - 1, self.steps),
            seconds=time.monotonic() - started,
            **tested,
        )
        run.history.append(row)
        run.totals.zero_()
        run.seconds = 0.0
        if on_epoch is not None:
            on_epoch(row)
        if row.epoch % config.checkpoint_every == 0 or row.epoch == config.epochs:
            self.save()
        self.reporter.epoch(row)

    def step(self, batch: Any) -> None:
        """One optimizer step, which a gradient scaler may skip."""
        run = self.run
        run.optimizer.zero_grad(set_to_none=True)
        autocast = torch.autocast(run.device.type, self.dtype, enabled=self.dtype is not None)
        loss, right, images = self.task.outcome(self.model, batch, self.train, self.config, autocast)
        finite = torch.isfinite(loss.detach())
        seen = torch.full_like(finite, images, dtype=torch.float64)
        run.totals += torch.where(finite, torch.stack([loss.detach() * images, right, seen]), 0)
        if not run.scaler.is_enabled():
            self.note(finite)
        if run.step % self.look_every == 0:
            self.look()
        try:
            self.update(loss)
        except (ValueError, RuntimeError):
            self.look()  # a regulariser that met NaN is not to blame where the loss was NaN before
            raise
        if run.scaler.is_enabled():
            self.skipped = 0 if self.stepped else self.skipped + 1
            self.note(finite if self.stepped else torch.full_like(finite, self.skipped < MAX_SKIPPED))
        run.step += 1

    def update(self, loss: Tensor) -> None:
        """Gradients, penalties, clipping, and the step itself."""
        config, run = self.config, self.run
        for group in run.optimizer.param_groups:
            group["lr"] = config.lr_at(run.step, self.steps) * group["share"]
        torch.autograd.backward(run.scaler.scale(loss))
        run.scaler.unscale_(run.optimizer)
        for regularizer in run.regularizers:
            regularizer.add_gradients()
        if config.clip_norm is not None:
            nn.utils.clip_grad_norm_(run.trained().values(), config.clip_norm)
        self.stepped = False
        run.scaler.step(run.optimizer)
        for regularizer in run.regularizers:
            regularizer.after_step(stepped=self.stepped)
        run.scaler.update()

    def note(self, good: Tensor) -> None:
        """Remember the current step as the first bad one, without waiting for the device."""
        self.bad_step = torch.where((self.bad_step < 0) & ~good, self.run.step, self.bad_step)

    def look(self) -> tuple[float, float | None]:
        """Mean loss, and accuracy (%) where there is one, of the epoch so far; RuntimeError after a loss not finite."""
        bad = int(self.bad_step)
        if bad >= 0:
            where = f"step {bad % self.steps + 1} of epoch {bad // self.steps + 1}"
            raise self.diverged(f"loss or gradients were not finite at {where}")
        loss, right, seen = self.run.totals.tolist()
        mean, share = (loss / seen, 100 * right / seen) if seen else (float("inf"), 0.0)
        accuracy = share if self.task.counts_right else None
        self.reporter.steps(self.run.step, len(self.run.history) + 1, mean, accuracy)
        return mean, accuracy

    def save(self) -> None:
        """Write the checkpoint, where there is a place for one, unless the run has diverged."""
        if self.path is None:
            return
        if self.run.step:
            self.look()
        for name, parameter in self.run.trained().items():
            if not bool(torch.isfinite(parameter).all()):
                raise self.diverged(f"{name} was not finite after step {self.run.step}")
        _checkpoint.save(self.path, self.run)

    def diverged(self, what: str) -> RuntimeError:
        kept = f"; the last checkpoint, {self.path}, is kept" if self.path is not None and self.path.exists() else ""
        return RuntimeError(f"{self.label} diverged: {what}; try a lower lr or clip_norm{kept}")


def _settings(regularizers: Sequence[Regularizer]) -> dict[str, Any]:
    """The classes of the regularisers and, as far as plain public attributes and dataclasses show, their settings."""
    plain = (bool, int, float, str, type(None))
    settings: dict[str, Any] = {"regularizers": [type(regularizer).__name__ for regularizer in regularizers]}
    for position, regularizer in enumerate(regularizers):
        state = regularizer.state_dict()
        for name, value in vars(regularizer).items():
            if name.startswith("_") or name in state:
                continue
            value = repr(value) if is_dataclass(value) else value
            items = value if isinstance(value, tuple) else (value,)
            if all(isinstance(item, plain) for item in items):
                settings[f"regularizers[{position}].{name}"] = value
    return settings
