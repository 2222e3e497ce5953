"""A small network, its data, and the training loop by hand that those of other packages have to equal."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastrank.regularize import LowRankProjection, NuclearNorm, Regularizer

BATCH, EPOCHS, LR = 2, 2, 0.1
Make = Callable[[nn.Module], list[Regularizer]]


class Net(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        super().__init__(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), pooled, nn.Linear(8, 3))


def images(same: bool = False) -> tuple[Tensor, Tensor]:
    """Eight images and their labels; `same`: one batch, again and again."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(8, 1, 8, 8, generator=generator), torch.randint(3, (8,), generator=generator)
    return (x[:BATCH].repeat(4, 1, 1, 1), y[:BATCH].repeat(4)) if same else (x, y)


def penalties(model: nn.Module) -> list[Regularizer]:
    """One that acts on gradients, strong enough to be clipped, and one that acts on weights and counts its steps."""
    return [NuclearNorm(model, 0.1), LowRankProjection(model, every=3, energy=0.9)]


class Spy(Regularizer):
    """Writes down what it is told, and the gradient that it meets."""

    def __init__(self, model: nn.Module) -> None:
        self.parameter = model.get_parameter("0.weight")
        self.told: list[object] = []
        self.met: list[Tensor] = []

    def governed(self) -> dict[str, nn.Parameter]:
        return {"0.weight": self.parameter}

    def start_epoch(self, epoch: int) -> None:
        self.told.append(epoch)

    def add_gradients(self) -> None:
        assert self.parameter.grad is not None
        self.told.append("add")
        self.met.append(self.parameter.grad.clone())

    def after_step(self, stepped: bool = True) -> None:
        self.told.append("after" if stepped else "skipped")

    def value(self) -> Tensor:
        return torch.tensor(2.5)


def by_hand(
    make: Make,
    *,
    clip: str = "loss",
    norm: float | None = None,
    accumulate: int = 1,
    dtype: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    same: bool = False,
) -> dict[str, Tensor]:
    """The weights after a training with momentum."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    regularizers = make(model)
    for regularizer in regularizers:
        regularizer.bind(optimizer)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)

    def clip_now(when: str) -> None:
        if norm is not None and clip == when:
            nn.utils.clip_grad_norm_(model.parameters(), norm)

    for epoch in range(EPOCHS):
        for regularizer in regularizers:
            regularizer.start_epoch(epoch)
        batches = zip(*(part.split(BATCH) for part in images(same)), strict=True)
        for number, (x, y) in enumerate(batches, 1):
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                loss = cross_entropy(model(x), y) / accumulate
            scaler.scale(loss).backward()
            if number % accumulate:
                continue
            scaler.unscale_(optimizer)
            clip_now("loss")
            for regularizer in regularizers:
                regularizer.add_gradients()
            clip_now("all")
            scaler.step(optimizer)
            for regularizer in regularizers:
                regularizer.after_step()
            scaler.update()
            optimizer.zero_grad()
    return {name: value.clone() for name, value in model.state_dict().items()}
