"""Resuming: bit for bit, from any step, in a new process, after a kill at any moment; never someone else's run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import same, step_of
from torch import Tensor, nn

from fastrank import _files
from fastrank.data import ImageSet
from fastrank.nn import GatedTucker2Conv
from fastrank.regularize import Exponential, Funnel
from fastrank.regularize.base import Regularizer
from fastrank.train import History, TrainConfig, fit
from fastrank.train._checkpoint import KEY

STEPS = 5
"""An epoch of 76 images in batches of 16."""
KILLED_EPOCHS = 30


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The subprocesses have one thread as well, and results depend on the count."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Pull(Regularizer):
    """Pulls a weight towards its running mean every second step: state in a tensor, a counter and a list."""

    def __init__(self, model: nn.Module, stop_at: int | None = None) -> None:
        self.weight, self._stop_at = model.get_parameter("0.weight"), stop_at
        self.mean, self.steps, self.norms = torch.zeros_like(self.weight), 0, [0.0]

    def add_gradients(self) -> None:
        assert self.weight.grad is not None
        if self._stop_at is not None and self.steps >= self._stop_at:
            raise KeyboardInterrupt
        if self.steps % 2:
            self.weight.grad.add_(self.weight.detach() - self.mean, alpha=0.1)

    def after_step(self, stepped: bool = True) -> None:
        self.steps += 1
        self.mean = 0.9 * self.mean + 0.1 * self.weight.detach()
        self.norms = [self.norms[-1], float(self.mean.norm())]

    def value(self) -> Tensor:
        return (self.weight.detach() - self.mean).square().sum()

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "counters": {"steps": self.steps}, "norms": self.norms, "unused": None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean = state["mean"].to(self.weight.device)
        self.steps, self.norms = state["counters"]["steps"], state["norms"]


def run(folder: Path, *, epochs: int = 3, stop_at: int | None = None, **options: Any) -> History:
    """A small run with everything that has state: batch statistics, dropout, augmentation, momentum, a regulariser."""
    numbers = torch.Generator().manual_seed(0)
    labels = torch.arange(76) % 4
    pixels = torch.randn(76, 1, 8, 8, generator=numbers) + labels.view(-1, 1, 1, 1)
    data = ImageSet(pixels, labels, classes=4)
    torch.manual_seed(1)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(144, 4)]
    model = nn.Sequential(*layers).to(options.get("device", "cpu"))
    config = TrainConfig(**{"epochs": epochs, "batch_size": 16, "lr": 0.05, "shift": 1, **options})
    return fit(model, data, data, config, regularizers=[Pull(model, stop_at)], run_dir=folder, progress=False)


@pytest.mark.parametrize("every", [1, 3])
def test_interrupted_at_any_step(tmp_path: Path, every: int) -> None:
    run(tmp_path / "whole")
    for stop_at in range(3 * STEPS):
        folder = tmp_path / str(stop_at)
        with pytest.raises(KeyboardInterrupt):
            run(folder, stop_at=stop_at, checkpoint_steps=every)
        torch.rand(3)
        history = run(folder, checkpoint_steps=every)
        assert same(folder, tmp_path / "whole")
        assert [row.epoch for row in history] == [1, 2, 3]


def test_interrupted_with_a_gradient_scaler(tmp_path: Path) -> None:
    run(tmp_path / "whole", amp="fp16", epochs=2)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", amp="fp16", epochs=2, stop_at=7, checkpoint_steps=2)
    run(tmp_path / "cut", amp="fp16", epochs=2, checkpoint_steps=2)
    assert same(tmp_path / "cut", tmp_path / "whole")


def run_gated(folder: Path, optimizer: str, *, stop_at: int | None = None, factor: float = 0.5, **options: Any) -> int:
    """A run whose gates close by proximal steps, at a C that falls from epoch to epoch; how many closed."""
    numbers = torch.Generator().manual_seed(0)
    labels = torch.arange(76) % 4
    data = ImageSet(torch.randn(76, 2, 6, 6, generator=numbers) + labels.view(-1, 1, 1, 1), labels, classes=4)
    torch.manual_seed(1)
    gated = GatedTucker2Conv.from_conv(nn.Conv2d(2, 8, 3))
    model = nn.Sequential(nn.Conv2d(2, 2, 1), gated, nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
    funnel = Funnel(model, 1.0, schedule=Exponential(0.5, factor, 1))
    config = TrainConfig(
        **{"epochs": 3, "batch_size": 16, "lr": 0.01, "optimizer": optimizer, "lr_for": {"*.gate_*": 0.05}, **options}
    )
    fit(model, data, None, config, regularizers=[funnel, Pull(model, stop_at)], run_dir=folder, progress=False)
    assert funnel.epoch == 2
    return sum(int((gate == 0).sum()) for gate in gated.penalized())


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_closing_gates_are_interrupted_in_mid_epoch(tmp_path: Path, optimizer: str) -> None:
    closed = run_gated(tmp_path / "whole", optimizer)
    assert 0 < closed < 10
    for stop_at in (3, 5, 7, 11):
        with pytest.raises(KeyboardInterrupt):
            run_gated(tmp_path / str(stop_at), optimizer, stop_at=stop_at, checkpoint_steps=1)
        assert run_gated(tmp_path / str(stop_at), optimizer, checkpoint_steps=1) == closed
        assert same(tmp_path / str(stop_at), tmp_path / "whole")
    assert run_gated(tmp_path / "whole", optimizer, stop_at=0) == closed, "a finished run"


def test_optimizers_rates_and_schedules_belong_to_a_run(tmp_path: Path) -> None:
    run_gated(tmp_path, "adam", epochs=3)
    options: dict[str, Any]
    for options, difference in (
        ({"optimizer": "sgd"}, "optimizer adam where this run has sgd"),
        ({"optimizer": "adam", "lr_for": {}}, r"lr_for \[\['\*\.gate_\*', 0\.05\]\] where this run has \[\]"),
        ({"optimizer": "adam", "factor": 0.4}, r"schedule Exponential\(start=0\.5, factor=0\.5.* this run has Exp"),
    ):
        with pytest.raises(ValueError, match=difference):
            run_gated(tmp_path, **options)
    path = tmp_path / "checkpoint.safetensors"
    tensors, metadata = _files.load_tensors(path)
    assert {"exp_avg/1.core", "exp_avg_sq/1.core", "adam_step/1.core"} < tensors.keys()
    for damage in ({"exp_avg/1.core": None}, {"adam_step/1.core": torch.zeros(3)}, {"exp_avg/1.core": torch.zeros(3)}):
        damaged = {name: tensor for name, tensor in {**tensors, **damage}.items() if tensor is not None}
        _files.save_tensors(path, damaged, metadata)
        with pytest.raises(ValueError, match="unusable in its part 'momentum'"):
            run_gated(tmp_path, "adam")


@pytest.mark.gpu
@pytest.mark.parametrize("amp", [False, "fp16"])
def test_interrupted_on_a_gpu(tmp_path: Path, amp: bool | str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    run(tmp_path / "whole", amp=amp, device="cuda")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", amp=amp, stop_at=7, checkpoint_steps=3, device="cuda")
    run(tmp_path / "cut", amp=amp, device="cuda")
    assert same(tmp_path / "cut", tmp_path / "whole")


def _process(*arguments: str) -> str:
    """Run this file as a program."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_in_a_new_process(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop_at=8, checkpoint_steps=1)
    _process("finish", str(tmp_path / "cut"))
    assert same(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes in order to kill them")
def test_killed_at_random_moments(tmp_path: Path) -> None:
    run(tmp_path / "whole", epochs=KILLED_EPOCHS)
    report = json.loads(_process("kill", str(tmp_path / "killed")))
    assert report["exit"] == 0
    assert len(set(report["reached"])) >= 4, "kills fell into the run, not before or after it"
    assert report["reached"] == sorted(report["reached"])
    assert same(tmp_path / "killed", tmp_path / "whole")
    assert os.listdir(tmp_path / "killed") == ["checkpoint.safetensors"]


def test_a_finished_run_is_restored_at_once(tmp_path: Path) -> None:
    first = run(tmp_path)
    before = (tmp_path / "checkpoint.safetensors").stat().st_mtime_ns
    assert run(tmp_path, stop_at=0) == first
    assert (tmp_path / "checkpoint.safetensors").stat().st_mtime_ns == before


def test_starting_over(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    data = ImageSet(torch.rand(8, 1, 2, 2), torch.arange(8) % 2, classes=2)
    for lr in (0.1, 0.2):
        fit(model, data, None, TrainConfig(1, 8, lr), run_dir=tmp_path, resume=False, progress=False)
    _, metadata = _files.load_tensors(tmp_path / "checkpoint.safetensors")
    assert json.loads(metadata[KEY])["identity"]["lr"] == 0.2


def test_what_does_not_change_the_result_may_change(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop_at=7, checkpoint_steps=1)
    run(tmp_path / "cut", checkpoint_every=2, workers=1, device="cpu")
    run(tmp_path / "whole")
    assert same(tmp_path / "cut", tmp_path / "whole")


def _small(width: int = 4, **options: Any) -> nn.Module:
    """A one-epoch run of a smaller model in options["run_dir"]; its weights before are zero."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, width), nn.Linear(width, 2))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    model[1].requires_grad_(not options.pop("frozen", False))
    count = options.pop("count", 8)
    data = ImageSet(torch.rand(count, 1, 2, 2), torch.arange(count) % 2, classes=2)
    regularizers = [Zero(strength) for strength in options.pop("regularizers", [1.0])]
    run_dir = options.pop("run_dir")
    config = TrainConfig(**{"epochs": 1, "batch_size": 4, "lr": 0.1, **options})
    try:
        fit(model, data, None, config, regularizers=regularizers, run_dir=run_dir, progress=False)
    except ValueError:
        assert all(not bool(parameter.any()) for parameter in model.parameters()), "a refusal changes nothing"
        raise
    return model


class Zero(Regularizer):
    """No penalty, and yet a setting."""

    def __init__(self, strength: float = 1.0) -> None:
        self.strength, self.powers = strength, (1, 2)

    def add_gradients(self) -> None: ...

    def value(self) -> Tensor:
        return torch.zeros(())


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"lr": 0.2}, "lr 0.1 where this run has 0.2"),
        ({"epochs": 2}, "epochs 1 where this run has 2"),
        ({"schedule": "steps", "milestones": (1,)}, "schedule cosine where this run has steps"),
        ({"count": 12}, "train_data length 8 where this run has 12"),
        ({"width": 5}, r"model tensor 1\.weight \(4, 4\) float32 where this run has \(5, 4\) float32"),
        ({"frozen": True}, r"requires_grad of 1\.weight True where this run has False"),
        ({"regularizers": []}, r"regularizers \['Zero'\] where this run has \[\]"),
        ({"regularizers": [2.0]}, r"regularizers\[0\]\.strength 1\.0 where this run has 2\.0"),
    ],
)
def test_another_run_is_refused_by_its_first_difference(
    tmp_path: Path, options: dict[str, Any], difference: str
) -> None:
    _small(run_dir=tmp_path)
    expected = rf"^run_dir must be free or hold a checkpoint of this run, got .*\.safetensors with {difference}; res"
    with pytest.raises(ValueError, match=expected):
        _small(run_dir=tmp_path, **options)


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    _small(run_dir=tmp_path)
    tensors, metadata = _files.load_tensors(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="path must be a whole safetensors file"):
        _small(run_dir=tmp_path)
    _files.save_tensors(path, tensors, {"something": "else"})
    with pytest.raises(ValueError, match="run_dir must be a folder whose checkpoint is one of a training run"):
        _small(run_dir=tmp_path)
    _files.save_tensors(path, tensors, {KEY: json.dumps({**json.loads(metadata[KEY]), "format": 2})})
    with pytest.raises(ValueError, match="with format 2 where this run has 1"):
        _small(run_dir=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="run_dir must be a folder, got"):
        _small(run_dir=tmp_path / "file")


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("identity", []),
        ("trained", None),
        ("step", "3"),
        ("step", -1),
        ("history", [3]),
        ("history", [{"epoch": 1}]),
        ("scaler", {"scale": "big"}),
        ("regularizers", []),
        ("seconds", None),
    ],
)
def test_a_hostile_header_with_a_true_checksum(tmp_path: Path, part: str, value: object) -> None:
    _small(run_dir=tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    tensors, metadata = _files.load_tensors(path)
    _files.save_tensors(path, tensors, {KEY: json.dumps({**json.loads(metadata[KEY]), part: value})})
    with pytest.raises(ValueError, match=rf"whose checkpoint is whole, got .*, unusable in its part '{part}'"):
        _small(run_dir=tmp_path)


@pytest.mark.parametrize("name", ["random/cpu", "totals", "momentum/1.weight"])
def test_a_hostile_tensor_with_a_true_checksum(tmp_path: Path, name: str) -> None:
    _small(run_dir=tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    tensors, metadata = _files.load_tensors(path)
    assert name in tensors
    _files.save_tensors(path, {**tensors, name: torch.zeros(3)}, metadata)
    with pytest.raises(ValueError, match="unusable in its part"):
        _small(run_dir=tmp_path)
    for text in ("{", "[" * 100_000, "3"):
        _files.save_tensors(path, tensors, {KEY: text})
        with pytest.raises(ValueError, match="run_dir must be"):
            _small(run_dir=tmp_path)


def test_state_that_no_checkpoint_holds_is_named(tmp_path: Path) -> None:
    class Odd(Zero):
        def __init__(self, state: dict[Any, Any]) -> None:
            self.state = state

        def state_dict(self) -> dict[str, Any]:
            return self.state

    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    data = ImageSet(torch.rand(8, 1, 2, 2), torch.arange(8) % 2, classes=2)
    states = (({"a": [object()]}, "regularizers/0/a/0 must be a tensor"), ({1: 2}, "keys of regularizers/0 must"))
    for state, message in states:
        with pytest.raises(TypeError, match=message):
            fit(model, data, None, TrainConfig(1, 8, 0.1), regularizers=[Odd(state)], run_dir=tmp_path, progress=False)
    assert os.listdir(tmp_path) == []


def _kill_and_resume(folder: Path) -> dict[str, Any]:
    """Fork runs and kill the first 15 after random times; the steps that their checkpoints had reached."""
    run(folder.with_name("warm-up"), epochs=1)  # what torch imports late is imported once, before the forks
    numbers, reached = random.Random(0), []
    while True:
        child = os.fork()
        if not child:
            run(folder, epochs=KILLED_EPOCHS, checkpoint_steps=1)
            os._exit(0)
        if len(reached) == 15:
            return {"exit": os.waitpid(child, 0)[1], "reached": reached}
        time.sleep(numbers.uniform(0.02, 0.2))
        finished, status = os.waitpid(child, os.WNOHANG)
        if finished:
            return {"exit": status, "reached": reached}
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        reached.append(step_of(folder))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "finish":
        run(Path(sys.argv[2]))
    else:
        print(json.dumps(_kill_and_resume(Path(sys.argv[2]))))
