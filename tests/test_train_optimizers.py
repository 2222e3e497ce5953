"""Optimizers and learning rates of a training run, and what the loop does for regularisers besides their gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrank.data import ImageSet, batches
from fastrank.nn import GatedTucker2Conv
from fastrank.regularize import Constant, Funnel, GramTrace, Linear, LowRankProjection, NuclearNorm, Regularizer
from fastrank.train import TrainConfig, fit


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Results depend on the thread count, and tiny models lose time on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _images() -> ImageSet:
    numbers = torch.Generator().manual_seed(0)
    labels = torch.arange(48) % 3
    pixels = torch.randn(48, 1, 8, 8, generator=numbers) + labels.view(-1, 1, 1, 1)
    return ImageSet(pixels, labels, classes=3)


def _network() -> nn.Sequential:
    torch.manual_seed(1)
    gated = GatedTucker2Conv(4, 6, 3, (3, 4))
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), gated, nn.ReLU(), nn.Conv2d(6, 2, 3), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(8, 3))


def _config(**options: Any) -> TrainConfig:
    return TrainConfig(**{"epochs": 2, "batch_size": 16, "lr": 0.05, "schedule": "constant", **options})


def _same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("decay_norm_and_bias", [True, False])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_equals_a_loop_written_out(optimizer: str, decay_norm_and_bias: bool) -> None:
    """The rates of the gates, of one weight and of the rest all follow the schedule; weight decay is one for all."""
    config = _config(
        epochs=3,
        lr=0.004,
        schedule="cosine",
        warmup_epochs=1,
        optimizer=optimizer,
        lr_for={"2.gate_out": 0.001, "2.gate_*": 0.02, "0.weight": 0.03},
        weight_decay=0.01,
        decay_norm_and_bias=decay_norm_and_bias,
    )
    data, model, twin = _images(), _network(), _network()
    history = fit(model, data, None, config, progress=False)

    peaks = {"2.gate_out": 0.001, "2.gate_in": 0.02, "2.gate_core": 0.02, "0.weight": 0.03}
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "sgd": lambda groups: torch.optim.SGD(groups, lr=0.004, momentum=0.9),
        "adam": lambda groups: torch.optim.Adam(groups, lr=0.004),
        "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.004),
    }
    own = kinds[optimizer](
        [
            {"params": [p], "weight_decay": 0.01 if decay_norm_and_bias or p.dim() >= 2 else 0.0}
            for p in twin.parameters()
        ]
    )
    for step in range(9):
        share = (step + 1) / 3 if step < 3 else 0.5 * (1 + math.cos(math.pi * (step - 3) / 6))
        for group, (name, _) in zip(own.param_groups, twin.named_parameters(), strict=True):
            group["lr"] = peaks.get(name, 0.004) * share
        epoch, position = divmod(step, 3)
        images, labels = next(batches(data, 16, seed=0, epoch=epoch, start=position, shuffle=True))
        own.zero_grad()
        F.cross_entropy(twin(images), labels).backward()  # type: ignore[no-untyped-call]
        own.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, twin.get_parameter(name), rtol=1e-5, atol=1e-6)
    assert history[-1].lr == pytest.approx(0.004 * share), "the row shows the rate of the rest"


def test_a_pattern_that_matches_nothing_trained_is_named() -> None:
    def run(model: nn.Module, **rates: float) -> None:
        fit(model, _images(), None, _config(lr_for=rates), progress=False)

    message = "lr_for must be names or patterns of trained parameters of the model, got "
    with pytest.raises(ValueError, match=rf"^{message}'2\.gate_inn' \(did you mean '2\.gate_in'\?\)"):
        run(_network(), **{"2.gate_out": 0.1, "2.gate_inn": 0.1})
    model = _network()
    model[2].gate_in.requires_grad_(False)
    with pytest.raises(ValueError, match=f"^{message}"):
        run(model, **{"*.gate_in": 0.1})


REGULARIZERS: dict[str, Callable[[nn.Module], Regularizer]] = {
    "nuclear": lambda model: NuclearNorm(model, 0.0),
    "decoupled": lambda model: NuclearNorm(model, 0.0, energy=0.9, matricization="decoupled"),
    "gram": lambda model: GramTrace(model, 0.0),
    "projection": lambda model: LowRankProjection(model, every=1, energy=1.0),
    **{
        f"funnel {penalty} {step}": lambda model, penalty=penalty, step=step: Funnel(  # type: ignore[misc]
            model, 0.0, penalty=penalty, step=step
        )
        for penalty in ("funnel", "l1", "l2")
        for step in ("proximal", "subgradient")
    },
}


@pytest.mark.parametrize("name", REGULARIZERS)
def test_of_no_weight_it_is_plain_training_bit_for_bit(name: str) -> None:
    plain, model = _network(), _network()
    config = _config(clip_norm=0.5, lr_for={"*.gate_*": 0.1})
    rows = fit(plain, _images(), None, config, progress=False)
    penalised = fit(model, _images(), None, config, regularizers=[REGULARIZERS[name](model)], progress=False)
    assert _same(plain, model)
    assert [(row.loss, row.penalty) for row in penalised] == [(row.loss, 0.0) for row in rows]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_proximal_step_has_the_rate_of_its_group_at_that_step(optimizer: str) -> None:
    """With gradients of 0 the loop leaves a gate to the penalty alone: Σ lr over the steps, for |g|."""
    model = _network()
    with torch.no_grad():
        for parameter in model[2].parameters():
            parameter.fill_(1.0)
        model[4].weight.zero_()
    model[4].requires_grad_(False)
    config = _config(
        epochs=2, lr=0.01, schedule="cosine", optimizer=optimizer, lr_for={"2.gate_*": 0.02}, weight_decay=0.0
    )
    fit(model, _images(), None, config, regularizers=[Funnel(model, 0.5, penalty="l1")], progress=False)
    total = sum(0.02 * 0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6))
    assert model[2].gate_in.tolist() == pytest.approx([1 - 0.5 * total] * 3, rel=1e-5)
    assert model[2].gate_core.tolist() == pytest.approx([1 - 0.5 * total] * 4, rel=1e-5)
    assert model[2].gate_out.tolist() == [1.0] * 6, "not penalised"


class _Notes(Regularizer):
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def bind(self, optimizer: torch.optim.Optimizer) -> None:
        self.calls.append(type(optimizer).__name__)

    def start_epoch(self, epoch: int) -> None:
        self.calls.append(epoch)

    def add_gradients(self) -> None:
        self.calls.append("step")

    def value(self) -> Tensor:
        self.calls.append("value")
        return torch.zeros(())


def test_regularisers_meet_the_optimizer_and_every_epoch() -> None:
    notes = _Notes()
    fit(_network(), _images(), None, _config(optimizer="adamw"), regularizers=[notes], progress=False)
    steps = ["step"] * 3
    assert notes.calls == ["AdamW", 0, *steps, "value", 1, *steps, "value"]


def test_the_penalty_of_a_row_is_at_the_c_of_its_epoch() -> None:
    model = _network()
    funnel = Funnel(model, 1e-9, schedule=Linear(4.0, 1.0, 2), step="subgradient")
    values = []

    def note(row: object) -> None:
        values.append(float(Funnel(model, 1e-9, schedule=Constant([4.0, 2.5][len(values)])).value()))

    history = fit(model, _images(), None, _config(), regularizers=[funnel], progress=False, on_epoch=note)
    assert [row.penalty for row in history] == values


def test_a_regulariser_of_another_model_is_refused() -> None:
    model, other = _network(), _network()
    for regularizer in (NuclearNorm(other, 0.1), LowRankProjection(other), Funnel(other)):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        kind = type(regularizer).__name__
        with pytest.raises(ValueError, match=f"^optimizer must be one that holds every trained .* {kind} governs"):
            fit(model, _images(), None, _config(), regularizers=[regularizer], progress=False)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
