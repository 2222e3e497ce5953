"""`fit`: a training run from its arguments to its history."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from fastrank import _checks
from fastrank.data._batches import batch_generator
from fastrank.distributed import Parallel
from fastrank.regularize.base import Regularizer
from fastrank.train import _progress
from fastrank.train._config import TrainConfig
from fastrank.train._detection import Detection
from fastrank.train._evaluate import flags_restored, length, resolve_device
from fastrank.train._loop import Loop
from fastrank.train._place import Place
from fastrank.train._progress import EpochRow
from fastrank.train._task import Classification, Task

History = list[EpochRow]
TASKS: dict[str, type[Task]] = {task.name: task for task in (Classification, Detection)}


def fit(
    model: nn.Module,
    train_data: Dataset[Any],
    test_data: Dataset[Any] | None,
    config: TrainConfig,
    *,
    regularizers: Sequence[Regularizer] = (),
    run_dir: str | os.PathLike[str] | None = None,
    resume: bool = True,
    label: str = "train",
    progress: bool | None = None,
    on_epoch: Callable[[EpochRow], object] | None = None,
    task: str | Task = "classification",
    parallel: str | None = None,
    sync_batchnorm: bool = True,
) -> History:
    """Train `model`, a classifier (N, C, H, W) -> (N, classes), in place; one row of history an epoch.

    With ``task="detection"`` it is a detector of torchvision's kind instead, `train_data` gives images and targets, and
    `test_data` is a `fastrank.data.CocoSet`; rows then bear average precisions as `metrics`. A `Task` of one's own is
    taken as well.

    Parameters with ``requires_grad=False`` are left alone. Before the first step every regulariser's `bind` meets the
    optimizer, which has to hold what the regulariser governs; an epoch begins with its `start_epoch`. A step is:
    gradients, unscaled; every regulariser's `add_gradients`; clipping; the optimizer; every regulariser's `after_step`.
    `on_epoch` is called after each epoch and before its checkpoint. A last batch of a single image is left out, because
    batch normalisation refuses it.

    With `run_dir`, the run is kept in ``run_dir/checkpoint.safetensors``; with `resume`, a checkpoint found there is
    continued, bit for bit as if never interrupted (on a GPU, under deterministic algorithms), and a finished one is
    restored at once. It must agree in the configuration, the model's tensors, the number of training images, and the
    regularisers' classes and public attributes that are plain or dataclasses (names without a leading underscore, not
    in their state).
    Afterwards the global random state and every module's training flag are the caller's again.
    `progress`: a bar on a terminal, a line an epoch elsewhere, both on standard error; False: nothing.

    parallel: "ddp" or "fsdp", where every rank of a process group calls `fit` alike (`fastrank.distributed.joined`). Of
    a batch each rank takes its part; the weights are those of one process but for rounding, and for dropout, which has
    other random numbers. sync_batchnorm: batch statistics over all ranks. Rank 0 alone shows progress and calls
    `on_epoch`. Checkpoints are then folders of one file a rank; any number of ranks, also one, may resume the run.

    Raises ValueError or TypeError for a wrong argument or the checkpoint of another run, OSError where a checkpoint
    cannot be written (PermissionError before the first step) or data cannot be read, RuntimeError, naming epoch and
    step, where the loss becomes NaN or infinite; the last checkpoint then stays.
    """
    if not isinstance(config, TrainConfig):
        raise _checks.fail_type("config", "a TrainConfig", config)
    regularizers = tuple(regularizers)
    for regularizer in regularizers:
        if not isinstance(regularizer, Regularizer):
            raise _checks.fail_type("regularizers", "a sequence of fastrank.regularize.Regularizer", regularizer)
    device = resolve_device(config.device, model)
    if not isinstance(task, Task):
        task = TASKS[_checks.choice("task", task, TASKS)]()
    train_data = task.ready("train_data", train_data, device)
    test_data = None if test_data is None else task.ready("test_data", test_data, device)
    task.check(config, train_data, test_data)
    ranks = Parallel(parallel, sync_batchnorm=sync_batchnorm)
    _require_images(ranks, task, train_data, config)
    with ranks.prepared(model.to(device), regularizers) as (inner, called), flags_restored(inner):
        loop = Loop(inner, called, ranks, train_data, test_data, config, regularizers, label, device, task)
        with _seeded(config.seed, device, ranks.rank):
            if run_dir is not None:
                loop.place = Place(run_dir, ranks)
                if resume and loop.place.newest() is not None:
                    loop.place.restore(loop.run)
                if len(loop.run.history) < config.epochs:
                    loop.place.require()
            called.train()
            shown = progress if ranks.main else False
            with _progress.reporting(label, config.epochs, loop.steps, loop.run.step, shown) as loop.reporter:
                while len(loop.run.history) < config.epochs:
                    loop.epoch(on_epoch)
            if not config.epochs:
                loop.save()
    return loop.run.history


def _require_images(parallel: Parallel, task: Task, data: Dataset[Any], config: TrainConfig) -> None:
    """Refuse batches of which some rank would get no image, where the task has no loss that leaves images out."""
    last = length(data) % config.batch_size or config.batch_size
    if not task.counts_right and min(last, length(data)) < parallel.world:
        what = f"at most {last} ranks, the images of the last batch, where task is {task.name!r}"
        raise _checks.fail("parallel", what, f"{parallel.world} (another batch_size leaves another rest)")


@contextmanager
def _seeded(seed: int, device: torch.device, rank: int) -> Iterator[None]:
    """Seed the global generators that dropout draws from, each rank's otherwise, and give the caller's state back."""
    seed = batch_generator(seed, rank).initial_seed() if rank else seed
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
