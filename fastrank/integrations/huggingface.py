"""Rank regularisers in the Trainer of Hugging Face's transformers: `RankCallback`."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fastrank import _checks, _files, report
from fastrank.integrations import _hooks, _measure
from fastrank.integrations._optional import require
from fastrank.regularize.base import Regularizer
from fastrank.train import _checkpoint

TrainerCallback: Any = require("transformers", "hf", "the Hugging Face callback").TrainerCallback
FILE, KEY = "fastrank.safetensors", "fastrank.regularizers"


class RankCallback(TrainerCallback):  # type: ignore[misc]
    """Regularises the ranks of a model while a ``transformers.Trainer`` trains it: ``callbacks=[RankCallback(...)]``.

    regularizers: one or several of `fastrank.regularize`, or a function of the model that makes them.

    clip_norm: the Trainer clips the gradient of the loss (``max_grad_norm``) before any callback could add to it, so
    the penalty is not clipped. To clip both together, set ``max_grad_norm=0`` and give the norm here instead.
    Either way the penalty meets unscaled gradients, once an optimizer step, and a step that the scaler skips is none.

    Every entry with a loss in the Trainer's log gets "fastrank/penalty", with `energy` also the ranks of the layers
    that keep that share of the squared singular values, with `threshold` how many gates of every gated layer are at
    least that large. They stand in ``trainer.state.log_history``, and reach the loggers (TensorBoard, ...) where the
    callback comes first: ``callback.add_to(trainer)``. trajectory: a folder for the spectra after every epoch, which
    ``fastrank report`` draws; their ranks keep `energy`, or 95 %.

    The regularisers' states are kept as ``fastrank.safetensors`` in every checkpoint folder, and read from there on a
    resume: from `resume_from`, where that is given, else the path in the arguments, else
    ``output_dir/checkpoint-STEP``. Raises ValueError or TypeError, naming the argument; what concerns the Trainer,
    when training starts.
    """

    def __init__(
        self,
        regularizers: _hooks.Given,
        *,
        clip_norm: float | None = None,
        energy: float | None = None,
        threshold: float | None = None,
        trajectory: str | os.PathLike[str] | None = None,
        resume_from: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        self._given = regularizers if callable(regularizers) else _hooks.listed(regularizers)
        self._clip_norm = None if clip_norm is None else _checks.number("clip_norm", clip_norm, 0.0, open_low=True)
        self._logged = _measure.Logged(energy, threshold)
        self._folder, self._resume_from = trajectory, resume_from
        self.regularizers: list[Regularizer] = []
        self._handles = _hooks.Attachments(())
        self._recorder: report.Recorder | None = None

    def add_to(self, trainer: Any) -> None:
        """Make this the first callback of `trainer`, so that its loggers see what is measured here."""
        trainer.callback_handler.callbacks.insert(0, self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make and attach the regularisers, as they were where the run is a resumed one."""
        if self._clip_norm is not None and args.max_grad_norm:
            raise _checks.fail(
                "clip_norm", "None where the Trainer clips too (max_grad_norm=0 ends that)", self._clip_norm
            )
        self._handles.remove()
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        while hasattr(optimizer, "optimizer"):  # accelerate wraps the one whose step has hooks
            optimizer = optimizer.optimizer
        self.regularizers = _hooks.listed(self._given, model)
        if state.global_step:
            self._restore(args, state)
        self._handles = _hooks.attach_all(self.regularizers, optimizer, clip_norm=self._clip_norm)
        if self._folder is not None:
            energy = self._logged.energy or report.ENERGY
            self._recorder = report.Recorder(model, self._folder, energy=energy, resume=state.global_step > 0)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the regularisers which epoch it is."""
        for regularizer in self.regularizers:
            regularizer.start_epoch(int(state.epoch or 0))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add what is measured to an entry that bears a loss."""
        if logs is None or "loss" not in logs:
            return
        measured = self._logged(_model(kwargs), self.regularizers)
        logs.update(measured)
        if state.log_history:
            state.log_history[-1].update(measured)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the spectra of the epoch, with what was logged in it so far."""
        if self._recorder is not None:
            epoch = round(state.epoch)
            rows = [row for row in state.log_history if epoch - 1 < row.get("epoch", 0) <= epoch]
            self._recorder(epoch, {name: value for row in rows for name, value in row.items() if name in _KEPT})

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the regularisers' states into the checkpoint that was just written; every process has to come here."""
        found = _measure.states(self.regularizers)
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            tensors: dict[str, Any] = {}
            packed = _checkpoint._pack("regularizers", found, tensors)
            _files.save_tensors(folder / FILE, tensors, {KEY: json.dumps(packed)})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the regularisers off the optimizer."""
        self._handles.remove()

    def _restore(self, args: Any, state: Any) -> None:
        given = args.resume_from_checkpoint
        usual = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        folder = Path(self._resume_from or (given if isinstance(given, str) and os.path.isdir(given) else usual))
        path = folder / FILE
        if not path.exists():
            what = "the regularizers start anew, because their state is not in the checkpoint"
            warnings.warn(f"{what}: no {path}; resume_from names another folder", RuntimeWarning, stacklevel=2)
            return
        tensors, metadata = _files.load_tensors(path)
        if KEY not in metadata:
            raise _checks.fail("resume_from", f"a folder whose {FILE} holds regularizers", f"{path} of another kind")
        _measure.restore(self.regularizers, _checkpoint._unpack(json.loads(metadata[KEY]), tensors), str(path))


_KEPT = ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_accuracy")


def _model(kwargs: Mapping[str, Any]) -> nn.Module:
    model: nn.Module = kwargs["model"]
    return model
