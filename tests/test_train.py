"""The training loop: what a step does and in which order, what is refused, what is reported."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from fastrank.data import Augment, ImageSet, batches, load
from fastrank.regularize.base import Regularizer
from fastrank.train import EpochRow, TrainConfig, evaluate, fit
from fastrank.train._loop import LOOK_EVERY


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Results depend on the thread count, and tiny models lose time on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _images(count: int = 48, classes: int = 3, size: int = 4) -> ImageSet:
    numbers = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % classes
    pixels = torch.rand(count, 1, size, size, generator=numbers) + labels.view(-1, 1, 1, 1)
    return ImageSet(pixels, labels, classes=classes)


def _linear(classes: int = 3, pixels: int = 16) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, classes))


def _config(**options: Any) -> TrainConfig:
    return TrainConfig(**{"epochs": 2, "batch_size": 16, "lr": 0.05, "schedule": "constant", **options})


class _Recorder(Regularizer):
    """Notes every call with what it can see at that moment."""

    def __init__(self, model: nn.Module, push: float = 0.0) -> None:
        self.weight, self.push = model.get_parameter("1.weight"), push
        self.calls: list[tuple[str, Tensor]] = []
        self.stepped: list[bool] = []

    def add_gradients(self) -> None:
        assert self.weight.grad is not None
        self.calls.append(("before", self.weight.grad.clone()))
        self.weight.grad += self.push

    def after_step(self, stepped: bool = True) -> None:
        assert self.weight.grad is not None
        self.calls.append(("after", self.weight.grad.clone()))
        self.stepped.append(stepped)

    def value(self) -> Tensor:
        return torch.tensor(2.5)


class _Broken(nn.Module):
    """Gives NaN at its n-th call."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.inner, self.at, self.calls = _linear(), at, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        out: Tensor = self.inner(x)
        return out * float("nan") if self.training and self.calls == self.at else out


@pytest.mark.parametrize("decay_norm_and_bias", [True, False])
def test_equals_a_loop_written_out(decay_norm_and_bias: bool) -> None:
    config = _config(
        epochs=3,
        schedule="cosine",
        warmup_epochs=1,
        label_smoothing=0.1,
        clip_norm=0.3,
        shift=1,
        flip=True,
        seed=5,
        nesterov=True,
        decay_norm_and_bias=decay_norm_and_bias,
    )
    data, model, twin = _images(), _linear(), _linear()
    history = fit(model, data, data, config, progress=False)

    groups = [
        {"params": [twin[1].weight], "weight_decay": 5e-4},
        {"params": [twin[1].bias], "weight_decay": 5e-4 if decay_norm_and_bias else 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True)
    losses = []
    for step in range(9):
        epoch, position = divmod(step, 3)
        lr = 0.05 * (step + 1) / 3 if step < 3 else 0.025 * (1 + math.cos(math.pi * (step - 3) / 6))
        for group in optimizer.param_groups:
            group["lr"] = lr
        augment = Augment(1, True)
        images, labels = next(batches(data, 16, seed=5, epoch=epoch, start=position, shuffle=True, augment=augment))
        optimizer.zero_grad()
        loss = F.cross_entropy(twin(images), labels, label_smoothing=0.1)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.3)
        optimizer.step()
        losses.append(loss.item())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, twin.get_parameter(name), rtol=1e-6, atol=1e-7)
    assert [row.loss for row in history] == pytest.approx([sum(losses[i : i + 3]) / 3 for i in (0, 3, 6)])
    assert [row.lr for row in history] == pytest.approx([0.05, 0.0375, lr]), "those of steps 2, 5 and 8"
    assert [row.epoch for row in history] == [1, 2, 3]


def test_learns_the_digits_and_repeats_itself() -> None:
    train_data, test_data = load("digits"), load("digits", split="test")
    config = TrainConfig(epochs=4, batch_size=32, lr=0.1, shift=1)
    weights, histories = [], []
    for draws in range(2):
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1), nn.Linear(576, 10)]
        model = nn.Sequential(*layers)
        torch.rand(draws)  # dropout depends on the configuration's seed, not on what was drawn before
        histories.append(fit(model, train_data, test_data, config, progress=False))
        weights.append(torch.cat([tensor.flatten().double() for tensor in model.state_dict().values()]))
    assert torch.equal(weights[0], weights[1])
    assert [row.loss for row in histories[0]] == [row.loss for row in histories[1]]
    last = histories[0][-1]
    assert last.test_top1 is not None
    assert last.test_top1 > 95
    assert last.test_top1 == evaluate(model, test_data, 7).top1
    assert histories[0][0].loss > last.loss > 0


def test_global_random_state_and_training_flags_are_the_callers_again() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.BatchNorm1d(16), nn.Linear(16, 3))
    model[2].eval()
    before, flags = torch.get_rng_state(), [module.training for module in model.modules()]
    fit(model, _images(), _images(), _config(), progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == flags


def test_order_of_a_step_and_clipping_after_penalties() -> None:
    model = _linear()
    recorder = _Recorder(model, push=100.0)
    history = fit(model, _images(16), None, _config(epochs=2, clip_norm=0.5), regularizers=[recorder], progress=False)
    assert [name for name, _ in recorder.calls] == ["before", "after"] * 2
    assert recorder.stepped == [True, True]
    assert float(recorder.calls[1][1].norm()) == pytest.approx(0.5, rel=0.05), "the penalty itself is clipped"
    assert [row.penalty for row in history] == [2.5, 2.5]
    assert history[0].test_top1 is None


@pytest.mark.parametrize("amp", [True, "bf16", "fp16"])
def test_mixed_precision_hands_unscaled_float32_gradients_to_regularisers(amp: bool | str) -> None:
    seen = []
    for setting in (amp, False):
        model = _linear()
        recorder = _Recorder(model)
        fit(model, _images(16), None, _config(epochs=1, amp=setting), regularizers=[recorder], progress=False)
        seen.append(recorder.calls[0][1])
    assert seen[0].dtype == torch.float32
    assert not torch.equal(seen[0], seen[1]), "the forward pass ran in half precision"
    assert float((seen[0] - seen[1]).norm() / seen[1].norm()) < 2 * 2**-8, "two roundings of bfloat16"


def test_a_step_that_the_scaler_skips_is_no_error() -> None:
    model = _linear()
    recorder = _Recorder(model)
    overflow = iter([float("inf"), 1.0, 1.0])
    model[1].weight.register_hook(lambda gradient: gradient * next(overflow))
    start = model[1].weight.detach().clone()
    fit(model, _images(), None, _config(epochs=1, amp="fp16", lr=1e-4), regularizers=[recorder], progress=False)
    assert recorder.stepped == [False, True, True]
    assert bool(torch.isfinite(model[1].weight).all())
    assert not torch.equal(model[1].weight, start)


def test_a_scaler_that_skips_for_ever_is_an_error() -> None:
    model = _linear()
    model[1].weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(RuntimeError, match=r"gradients were not finite at step 1 of epoch 14"):
        fit(model, _images(), None, _config(epochs=20, amp="fp16"), progress=False)


def test_nan_names_its_step_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    for path in (None, tmp_path):
        model = _Broken(at=5)
        with pytest.raises(RuntimeError, match=r"^dense diverged: .* at step 2 of epoch 2; try a lower lr") as caught:
            fit(model, _images(), None, _config(), run_dir=path, label="dense", progress=False)
        assert ("is kept" in str(caught.value)) == (path is not None)
        assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())
    again = _Broken(at=99)
    assert len(fit(again, _images(), None, _config(), run_dir=tmp_path, progress=False)) == 2
    assert again.calls == 3, "the first epoch came from the checkpoint"


def test_nan_weights_after_a_finite_loss_are_not_checkpointed(tmp_path: Path) -> None:
    model = _linear()
    with pytest.raises(RuntimeError, match=r"1\.weight was not finite after step 1"):
        fit(
            *(model, _images(16), None, _config(epochs=1)),
            regularizers=[_Recorder(model, push=float("nan"))],
            run_dir=tmp_path,
            progress=False,
        )
    assert not any(tmp_path.iterdir())


def test_a_regulariser_that_meets_nan_is_not_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Picky(_Recorder):
        def add_gradients(self) -> None:
            assert self.weight.grad is not None
            if not bool(torch.isfinite(self.weight.grad).all()):
                raise ValueError("matrices must be finite")

    model, data, config = _linear(), _images(), _config(seed=2)
    data.pixels[5] = float("inf")
    with pytest.raises(RuntimeError, match="diverged: loss or gradients were not finite at") as early:
        fit(model, data, None, config, progress=False)
    assert "step 2 of epoch 1" in str(early.value), "neither one that is looked at anyway nor the last"
    monkeypatch.setitem(LOOK_EVERY, "cpu", 1000)
    for regularizers in ([], [Picky(model)]):
        model.load_state_dict(_linear().state_dict())
        with pytest.raises(RuntimeError) as late:
            fit(model, data, None, config, regularizers=regularizers, progress=False)
        assert str(late.value) == str(early.value), "a late look names the same step"


def test_frozen_parameters_stay() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 3))
    model[1].requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    fit(model, _images(), None, _config(), progress=False)
    moved = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert moved == ["2.weight", "2.bias"]
    with pytest.raises(ValueError, match="model must be a module with trainable parameters, got none"):
        fit(model.requires_grad_(False), _images(), None, _config(), progress=False)


class _OnDisk(Dataset[tuple[Tensor, int]]):
    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index]


def test_any_map_style_data_set_will_do() -> None:
    images = _images()
    results = []
    for data in (images, _OnDisk(images), TensorDataset(images.images, images.labels)):
        model = _linear()
        fit(model, data, data, _config(), progress=False)
        results.append((model[1].weight, evaluate(model, data)))
    assert all(torch.equal(weight, results[0][0]) for weight, _ in results)
    assert results[0][1] == results[1][1] == results[2][1]


def test_a_last_batch_of_one_image_is_left_out() -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 3))
    history = fit(model, _images(33), _images(33), _config(), progress=False)
    assert model[1].num_batches_tracked == 4
    assert len(history) == 2


def test_no_epochs_train_nothing(tmp_path: Path) -> None:
    model = _linear()
    before = model[1].weight.detach().clone()
    assert fit(model, _images(), _images(), _config(epochs=0), run_dir=tmp_path / "a" / "b", progress=False) == []
    assert torch.equal(model[1].weight, before)
    assert fit(_linear(), _images(), None, _config(epochs=0), run_dir=tmp_path / "a" / "b", progress=False) == []


def test_callback_sees_every_row() -> None:
    rows: list[EpochRow] = []
    assert fit(_linear(), _images(), _images(), _config(), progress=False, on_epoch=rows.append) == rows
    assert all(0 <= row.train_top1 <= 100 and row.test_top5 == 100 and row.seconds > 0 for row in rows)


def test_evaluate_counts() -> None:
    falling = [6, 5, 4, 3, 2, 1, 0]
    logits = torch.tensor([[9.0, 1, 2, 3, 4, 5, 6], [5, 9, 4, 3, 2, 1, 0], falling, falling])
    data = ImageSet(logits.view(4, 7, 1, 1), torch.tensor([0, 0, 5, 4]), classes=7)
    for size in (1, 3, 256):
        result = evaluate(nn.Flatten(), data, size)
        assert (result.top1, result.top5, result.count) == (25.0, 75.0, 4)
        assert result.loss == pytest.approx(float(F.cross_entropy(logits, data.labels)))
    few = ImageSet(logits[:, :3].reshape(4, 3, 1, 1), torch.tensor([0, 0, 2, 2]), classes=3)
    assert evaluate(nn.Flatten(), few).top5 == 100.0
    assert evaluate(nn.Flatten(), ImageSet(data.pixels.double(), data.labels, classes=7)).count == 4


def test_evaluate_restores_the_flags_and_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Dropout(0.9), nn.Linear(16, 3))
    model[1].eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert evaluate(model, _images()) == evaluate(model, _images())
    assert [module.training for module in model.modules()] == [True, True, False, True, True]
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())

    class Failing(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            raise OSError("no such luck")

    failing = Failing(nn.BatchNorm1d(3))
    with pytest.raises(OSError, match="no such luck"):
        evaluate(failing, _images())
    assert failing.training


def test_wrong_arguments_are_named() -> None:
    empty = ImageSet(torch.zeros(0, 1, 4, 4), torch.zeros(0, dtype=torch.int64), classes=3)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
        (("net", _images(), None, _config()), {}, TypeError, "model must be a torch.nn.Module, got str"),
        ((_linear(), empty, None, _config()), {}, ValueError, "train_data must be a data set of at least one image"),
        ((_linear(), _images(), 3, _config()), {}, TypeError, "test_data must be a map-style data set with a length"),
        ((_linear(), _images(), None, {"lr": 1}), {}, TypeError, "config must be a TrainConfig, got dict"),
        ((_linear(), _images(), None, _config()), {"regularizers": [nn.ReLU()]}, TypeError, "regularizers must be"),
        ((_linear(2), _images(), None, _config()), {}, ValueError, r"of at least 3 classes, as the data, got"),
        ((nn.Conv2d(1, 3, 1), _images(), None, _config()), {}, ValueError, r"output of the model must be of shape"),
        ((_linear(), _images(), None, _config(device="gpu")), {}, ValueError, "device must be 'cpu' or 'cuda'"),
        ((_linear(), _images(), None, _config(device="meta")), {}, ValueError, "device must be 'cpu' or 'cuda'"),
        ((_linear(), _images(), None, _config(device="cuda:99")), {}, ValueError, "device must be one of the"),
    ]
    for arguments, options, kind, message in cases:
        with pytest.raises(kind, match=message):
            fit(*arguments, progress=False, **options)
    with pytest.raises(ValueError, match="data must be a data set of at least one image"):
        evaluate(_linear(), empty)
    with pytest.raises(ValueError, match="batch_size must be an int at least 1, got 0"):
        evaluate(_linear(), _images(), 0)


def test_plain_lines_without_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    fit(_linear(), _images(), _images(), _config(), label="train [dense]")
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["train [dense]: epoch 1/2", "train [dense]: epoch 2/2"]
    assert all(word in lines[0] for word in ("loss ", "train ", "test ", "lr 0.05", " s", "ETA "))
    assert all(character.isprintable() for line in lines for character in line)
    fit(_linear(), _images(), _images(), _config(), progress=False)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, term: str) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("COLUMNS", "120")
    for variable in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(variable, raising=False)
    fit(_linear(), _images(), _images(), _config(), label="train [dense]")
    shown = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert all(word in shown for word in ("train [dense]", "2/2", "loss", "train", "test", "ETA"))
    assert ("\x1b[" in shown) == (term == "xterm")
