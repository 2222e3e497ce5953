"""The steps and epochs of a training run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.utils.data import Dataset

from fastrank import _checks
from fastrank.distributed import Parallel
from fastrank.distributed._parallel import local
from fastrank.regularize.base import Regularizer
from fastrank.train import _checkpoint, _optimizer, _progress
from fastrank.train._config import TrainConfig
from fastrank.train._evaluate import length
from fastrank.train._place import Place
from fastrank.train._progress import EpochRow
from fastrank.train._task import Task

LOOK_EVERY = {"cuda": 20}
"""How many steps pass between two readings of the loss, for which a GPU would have to wait; elsewhere one."""
MAX_SKIPPED = 40
"""Steps in a row that a gradient scaler may skip: by then it has halved the scale from 2^16 to 2^-24."""


class Loop:
    """A run with what it needs besides its state. The totals of an epoch: Σ loss, right answers, images of all ranks.

    model is what is evaluated and kept, called what training calls: the same module, or one wrapped around it.
    """

    def __init__(
        self,
        model: nn.Module,
        called: nn.Module,
        parallel: Parallel,
        train: Dataset[Any],
        test: Dataset[Any] | None,
        config: TrainConfig,
        regularizers: Sequence[Regularizer],
        label: str,
        device: torch.device,
        task: Task,
    ) -> None:
        self.task, self.called, self.parallel = task, called, parallel
        self.model, self.train, self.test, self.config, self.label = model, train, test, config, label
        self.place: Place | None = None
        self.reporter: _progress.Reporter
        self.images = images = length(train)
        self.drop_last = task.refuses_one_image and images > config.batch_size and images % config.batch_size == 1
        self.steps = -(-(images - self.drop_last) // config.batch_size)
        self.look_every = LOOK_EVERY.get(device.type, 1)
        half = {"fp16": torch.float16, "bf16": torch.bfloat16}
        amp = ("fp16" if device.type == "cuda" else "bf16") if config.amp is True else config.amp
        self.dtype = half[amp] if amp else None
        self.stepped, self.skipped = True, 0
        self.bad_step, self.bad_rank = torch.tensor(-1, device=device), torch.tensor(-1, device=device)
        if parallel.kind == "fsdp" and self.dtype == torch.float16:
            raise _checks.fail("amp", "False or 'bf16' where parallel is 'fsdp'", "'fp16'")
        self.run = _checkpoint.Run(
            model=model,
            optimizer=_optimizer.make(model, config),
            scaler=GradScaler(device.type, enabled=self.dtype == torch.float16),
            regularizers=regularizers,
            device=device,
            identity={**config.identity(), "task": task.name, "train_data length": images, **_settings(regularizers)},
            totals=torch.zeros(3, dtype=torch.float64, device=device),
            parallel=parallel,
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
        ranks = {} if self.parallel.world == 1 else {"parallel": self.parallel}
        for batch in self.task.batches(self.train, config, run.device, number, start, self.drop_last, **ranks):
            self.step(batch)
            run.seconds = time.monotonic() - started
            if config.checkpoint_steps and run.step % config.checkpoint_steps == 0:
                self.save()
        loss, accuracy = self.look()
        self.settle()
        penalty = sum((float(regularizer.value()) for regularizer in run.regularizers), 0.0)
        tested = {} if self.test is None else self.task.test(self.model, self.test, config, **ranks)
        self.parallel.reshard(self.model)
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
        if on_epoch is not None and self.parallel.main:
            on_epoch(row)
        if row.epoch % config.checkpoint_every == 0 or row.epoch == config.epochs:
            self.save()
        self.reporter.epoch(row)

    def step(self, batch: Any) -> None:
        """One optimizer step, which a gradient scaler may skip."""
        run = self.run
        run.optimizer.zero_grad(set_to_none=True)
        autocast = torch.autocast(run.device.type, self.dtype, enabled=self.dtype is not None)
        whole = self.batch_images()
        own = self.parallel.images(whole)
        self.parallel.counted.here = own > 0
        loss, right, images = self.task.outcome(self.called, batch, self.train, self.config, autocast)
        if self.parallel.world > 1:
            images, right = own, right if own else torch.zeros_like(right)
        finite = torch.isfinite(loss.detach())
        seen = torch.full_like(finite, images, dtype=torch.float64)
        found = torch.where(finite, torch.stack([loss.detach() * images, right, seen]), 0)
        if self.parallel.world > 1:
            found, finite = self.over_ranks(found, finite)
            loss = loss * (own * self.parallel.world / whole)
        run.totals += found
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
        self.parallel.reduce_whole(run.trained().values())
        for regularizer in run.regularizers:
            regularizer.add_gradients()
        if config.clip_norm is not None:
            self.parallel.clip(run.trained().values(), config.clip_norm)
        self.stepped = False
        run.scaler.step(run.optimizer)
        for regularizer in run.regularizers:
            regularizer.after_step(stepped=self.stepped)
        run.scaler.update()

    def batch_images(self) -> int:
        """The images of the batch of the current step, over all ranks."""
        position = self.run.step - len(self.run.history) * self.steps
        return min(self.config.batch_size, self.images - position * self.config.batch_size)

    def over_ranks(self, found: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
        """The sums of all ranks, zero where the loss of one is not finite, and whether all are; notes which one."""
        bad = (~finite).double()
        sums = self.parallel.sum(torch.cat([found, torch.stack([bad, bad * (self.parallel.rank + 1)])]))
        finite = sums[3] == 0
        alone = torch.where(sums[3] == 1, sums[4] - 1, -1).to(self.bad_rank.dtype)
        self.bad_rank = torch.where((self.bad_step < 0) & ~finite, alone, self.bad_rank)
        return torch.where(finite, sums[:3], 0), finite

    def settle(self) -> None:
        """Have all ranks hold the same buffers: without synchronised statistics, those of rank 0."""
        self.parallel.agree(self.model.buffers())

    def note(self, good: Tensor) -> None:
        """Remember the current step as the first bad one, without waiting for the device."""
        self.bad_step = torch.where((self.bad_step < 0) & ~good, self.run.step, self.bad_step)

    def look(self) -> tuple[float, float | None]:
        """Mean loss, and accuracy (%) where there is one, of the epoch so far; RuntimeError after a loss not finite."""
        bad = int(self.bad_step)
        if bad >= 0:
            where = f"step {bad % self.steps + 1} of epoch {bad // self.steps + 1}"
            if int(self.bad_rank) >= 0:
                where += f" on rank {int(self.bad_rank)}"
            raise self.diverged(f"loss or gradients were not finite at {where}")
        loss, right, seen = self.run.totals.tolist()
        mean, share = (loss / seen, 100 * right / seen) if seen else (float("inf"), 0.0)
        accuracy = share if self.task.counts_right else None
        self.reporter.steps(self.run.step, len(self.run.history) + 1, mean, accuracy)
        return mean, accuracy

    def save(self) -> None:
        """Write the checkpoint, where there is a place for one, unless the run has diverged."""
        if self.place is None:
            return
        if self.run.step:
            self.look()
        trained = self.run.trained()
        bad = (n for n, p in enumerate(trained.values()) if not bool(torch.isfinite(local(p)).all()))
        first = self.parallel.lowest(next(bad, len(trained)), self.run.device)
        if first < len(trained):
            raise self.diverged(f"{list(trained)[first]} was not finite after step {self.run.step}")
        self.settle()
        self.place.save(self.run)

    def diverged(self, what: str) -> RuntimeError:
        path = None if self.place is None else self.place.newest()
        kept = f"; the last checkpoint, {path}, is kept" if path is not None else ""
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
