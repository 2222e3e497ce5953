"""The optimizer of a training run: which parameters it moves, how fast each, and what it remembers of them."""

from __future__ import annotations

from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.optim import Optimizer

from fastrank import _checks
from fastrank.regularize._kernels import is_sharded
from fastrank.train._config import TrainConfig


def make(model: nn.Module, config: TrainConfig) -> Optimizer:
    """The optimizer that `config` asks for, over the trainable parameters of `model`.

    Each group has the key "share", the ratio of its learning rate to that of `config.lr_at`.
    Raises ValueError where there is nothing to train, or a pattern of `config.lr_for` matches nothing that is trained.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise _checks.fail("model", "a module with trainable parameters", "none")
    for pattern, _ in config.rates:
        if not any(fnmatchcase(name, pattern) for name in trained):
            got = f"{pattern!r}{_checks.near(pattern, trained)}"
            raise _checks.fail("lr_for", "names or patterns of trained parameters of the model", got)
    # Sharded and whole parameters do not go together in one call of an optimizer.
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        decay = config.weight_decay if config.decay_norm_and_bias or parameter.dim() >= 2 else 0.0
        groups.setdefault((config.peak_lr(name), decay, is_sharded(parameter)), []).append(parameter)
    options = [
        {"params": parameters, "lr": peak, "share": peak / config.lr, "weight_decay": decay}
        for (peak, decay, _), parameters in groups.items()
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(options, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)
    return (torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam)(options, lr=config.lr)


def state_names(optimizer: Optimizer) -> tuple[str, ...]:
    """The tensors that the optimizer keeps of a parameter: of its shape, but for "step", one number on the CPU."""
    return ("momentum_buffer",) if isinstance(optimizer, torch.optim.SGD) else ("exp_avg", "exp_avg_sq", "step")
