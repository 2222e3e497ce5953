"""Rank regularisers in a Lightning Trainer: `RankCallback`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from fastrank import _checks, report
from fastrank.integrations import _hooks, _measure
from fastrank.integrations._optional import require
from fastrank.regularize.base import Attachment, Regularizer

Callback: Any = require("lightning.pytorch", "lightning", "the Lightning callback").Callback
CLIPS = ("loss", "all")


class RankCallback(Callback):  # type: ignore[misc]
    """Regularises the ranks of a LightningModule while a ``lightning.pytorch.Trainer`` fits it.

    regularizers: one or several of `fastrank.regularize`, or a function of the LightningModule that makes them when
    training starts, for modules that build their network late. Each acts on the optimizer that holds what it governs.

    clip, where the trainer has a ``gradient_clip_val``: "loss", the gradient of the loss alone is clipped and the
    penalty's is added after; "all", both are clipped together. Either way the penalty meets unscaled gradients, once
    an optimizer step (also with ``accumulate_grad_batches``), and a step that a gradient scaler skips is none.

    log_every: optimizer steps between two entries "fastrank/penalty" in the trainer's loggers (None: the trainer's
    ``log_every_n_steps``; 0: never), with `energy` also the ranks of the layers that keep that share of the squared
    singular values, with `threshold` how many gates of every gated layer are at least that large. trajectory: a folder
    for the spectra after every epoch, which ``fastrank report`` draws; their ranks keep `energy`, or 95 %.

    The regularisers' states are part of the trainer's checkpoints. Raises ValueError or TypeError, naming the argument;
    what concerns the trainer, when training starts.
    """

    def __init__(
        self,
        regularizers: _hooks.Given,
        *,
        clip: str = "loss",
        log_every: int | None = None,
        energy: float | None = None,
        threshold: float | None = None,
        trajectory: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        self._given = regularizers if callable(regularizers) else _hooks.listed(regularizers)
        self._clip = _checks.choice("clip", clip, CLIPS)
        self._log_every = None if log_every is None else _checks.integer("log_every", log_every, 0)
        self._logged = _measure.Logged(energy, threshold)
        self._folder = trajectory
        self.regularizers: list[Regularizer] = []
        self._handles = _hooks.Attachments(())
        self._optimizers: dict[int, list[Regularizer]] = {}
        self._state: Sequence[dict[str, Any]] | None = None
        self._recorder: report.Recorder | None = None
        self._last_step = 0

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Make and attach the regularisers, as they were where the run is a resumed one."""
        self._handles.remove()
        self.regularizers = _hooks.listed(self._given, pl_module)
        if self._state is not None:
            _measure.restore(self.regularizers, self._state, "the checkpoint")
            self._state = None
        handles: list[Attachment | RemovableHandle] = []
        self._optimizers = {}
        for regularizer in self.regularizers:
            optimizer = _hooks.optimizer_of(regularizer, trainer.optimizers)
            if self._clip == "all":
                _require_clippable(trainer, optimizer)
                handles.append(_hooks.attach_unclipped(regularizer, optimizer))
                self._optimizers.setdefault(id(optimizer), []).append(regularizer)
            else:
                handles.append(regularizer.attach(optimizer))
        self._handles = _hooks.Attachments(handles)
        self._last_step = trainer.global_step
        if self._folder is not None:
            energy = self._logged.energy or report.ENERGY
            self._recorder = report.Recorder(pl_module, self._folder, energy=energy, resume=trainer.current_epoch > 0)
        self.on_train_epoch_start(trainer, pl_module)  # which Lightning leaves out of an epoch that is resumed

    def on_train_epoch_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Tell the regularisers which epoch it is."""
        for regularizer in self.regularizers:
            regularizer.start_epoch(trainer.current_epoch)

    def on_before_optimizer_step(self, trainer: Any, pl_module: nn.Module, optimizer: Any) -> None:
        """Where all is to be clipped, add the penalty's gradient: after the unscaling, before the clipping."""
        for regularizer in self._optimizers.get(id(optimizer), ()):
            regularizer.add_gradients()

    def on_train_batch_end(self, trainer: Any, pl_module: nn.Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log, where it is time."""
        every = trainer.log_every_n_steps if self._log_every is None else self._log_every
        step = trainer.global_step
        if every and trainer.loggers and step != self._last_step and step % every == 0:
            metrics = self._logged(pl_module, self.regularizers)
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=step)
        self._last_step = step

    def on_train_epoch_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Record the spectra of the epoch."""
        if self._recorder is not None:
            self._recorder(trainer.current_epoch + 1, _numbers(trainer.callback_metrics))

    def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Take the regularisers off the optimizers."""
        self._handles.remove()

    def on_exception(self, trainer: Any, pl_module: nn.Module, exception: BaseException) -> None:
        """Take the regularisers off the optimizers of a training that failed."""
        self._handles.remove()

    def state_dict(self) -> dict[str, Any]:
        """The states of the regularisers, for the trainer's checkpoint; every process has to call this."""
        return {"regularizers": _measure.states(self.regularizers)} if self.regularizers else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states of a checkpoint until the regularisers are there."""
        self._state = state_dict.get("regularizers")


def _require_clippable(trainer: Any, optimizer: Any) -> None:
    """Raise ValueError where the penalty cannot be added between the unscaling and the clipping."""
    if not trainer.lightning_module.automatic_optimization:
        raise _checks.fail("clip", "'loss' where the module optimizes manually", "'all'")
    scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
    if scaled and getattr(optimizer, "_step_supports_amp_scaling", False):
        what = f"'loss' where {type(optimizer).__name__} unscales the gradients inside its step (fused)"
        raise _checks.fail("clip", what, "'all'")


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if getattr(value, "numel", lambda: 1)() == 1}
