"""The callback for Hugging Face's Trainer against the same training written by hand, with the real package."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import integration_loops as loops
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, SequentialSampler

transformers = pytest.importorskip("transformers", reason="the Hugging Face callback needs transformers")
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")

from fastrank.integrations.huggingface import FILE, RankCallback  # noqa: E402
from fastrank.methods import funnel  # noqa: E402
from fastrank.report import TRAJECTORY_FILE, read_trajectory  # noqa: E402


class Model(nn.Module):
    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net or loops.Net()

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(pixel_values)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


class Images(Dataset[dict[str, Tensor]]):
    def __init__(self) -> None:
        self.pixels, self.labels = loops.images()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


class Ordered(transformers.Trainer):
    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def trainer(folder: Path, callback: RankCallback, model: nn.Module | None = None, **options: Any) -> Any:
    model = model or Model()
    options = {"max_grad_norm": 0.0, "save_strategy": "no", "logging_strategy": "no", **options}
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=loops.EPOCHS,
        per_device_train_batch_size=loops.BATCH,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=loops.LR, momentum=0.9)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    return Ordered(model, arguments, train_dataset=Images(), optimizers=(optimizer, schedule), callbacks=[callback])


def require_equal(model: nn.Module, wanted: dict[str, Tensor]) -> None:
    for name, value in wanted.items():
        torch.testing.assert_close(model.net.state_dict()[name], value, rtol=0, atol=0)


def make(model: nn.Module) -> Any:
    return loops.penalties(model.net)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("clip", "norm"), [("loss", None), ("loss", 0.05), ("all", 0.05)])
def test_hf_trains_as_the_loop_by_hand(tmp_path: Path, clip: str, norm: float | None, accumulate: int) -> None:
    callback = RankCallback(make, clip_norm=norm if clip == "all" else None)
    options = {"max_grad_norm": norm} if norm and clip == "loss" else {}
    own = trainer(tmp_path, callback, gradient_accumulation_steps=accumulate, **options)
    own.train()
    require_equal(own.model, loops.by_hand(loops.penalties, clip=clip, norm=norm, accumulate=accumulate))


def test_hf_in_bfloat16(tmp_path: Path) -> None:
    own = trainer(tmp_path, RankCallback(make), bf16=True, max_grad_norm=0.05)
    own.train()
    require_equal(own.model, loops.by_hand(loops.penalties, norm=0.05, dtype=torch.bfloat16))


def test_hf_tells_epochs_and_lets_go_at_the_end(tmp_path: Path) -> None:
    net = loops.Net()
    spy = loops.Spy(net)
    own = trainer(tmp_path, RankCallback(spy), Model(net), gradient_accumulation_steps=2)
    own.train()
    assert spy.told == [0, "add", "after", "add", "after", 1, "add", "after", "add", "after"]
    own.optimizer.step()
    assert len(spy.told) == 10


@pytest.mark.parametrize("steps", [4, 6])
def test_hf_resumes_where_it_was(tmp_path: Path, steps: int) -> None:
    """After an epoch and in the middle of one; the projection comes every third step, so its count matters."""
    run = tmp_path / "run"
    saving = {"save_strategy": "steps", "save_steps": steps, "logging_strategy": "steps", "logging_steps": 1}
    first = trainer(tmp_path / "a", RankCallback(make, trajectory=run), **saving)
    first.train()
    checkpoint = tmp_path / "a" / f"checkpoint-{steps}"
    assert (checkpoint / FILE).is_file()
    callback = RankCallback(make, trajectory=run)
    second = trainer(tmp_path / "a", callback)
    second.train(resume_from_checkpoint=str(checkpoint))
    require_equal(second.model, loops.by_hand(loops.penalties))
    assert callback.regularizers[1].steps == 8
    assert callback.regularizers[0].counts["warm"] + callback.regularizers[0].counts["exact"] > 0
    found = read_trajectory(run / TRAJECTORY_FILE)
    assert [moment.epoch for moment in found.moments] == [0, 1, 2]
    assert set(found.moments[-1].spectra) == {"net.0", "net.2"}


def test_hf_finds_its_state_elsewhere_or_says_that_it_is_missing(tmp_path: Path) -> None:
    trainer(tmp_path / "a", RankCallback(make), save_strategy="epoch").train()
    checkpoint = tmp_path / "a" / "checkpoint-4"
    callback = RankCallback(make, resume_from=checkpoint)
    trainer(tmp_path / "b", callback).train(resume_from_checkpoint=str(checkpoint))
    assert callback.regularizers[1].steps == 8
    callback = RankCallback(make)
    with pytest.warns(RuntimeWarning, match=r"start anew, .* no .*b.checkpoint-4.fastrank.safetensors; resume_from"):
        trainer(tmp_path / "b", callback).train(resume_from_checkpoint=str(checkpoint))
    assert callback.regularizers[1].steps == 4
    with pytest.raises(ValueError, match="regularizers must be the 2 that .* was written with, got 1"):
        trainer(tmp_path / "a", RankCallback(lambda m: make(m)[:1])).train(resume_from_checkpoint=str(checkpoint))


class Reporter(transformers.TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        self.seen.append(dict(logs))


def test_hf_logs_with_the_losses(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Model(funnel.factorize(loops.Net()))
    callback = RankCallback(lambda m: funnel.regularizer(m.net), threshold=0.0, energy=0.9)
    reporter = Reporter()
    own = trainer(tmp_path, reporter, model, logging_strategy="steps", logging_steps=4)
    callback.add_to(own)
    own.train()
    assert [entry["fastrank/gates/2.gate_in"] for entry in reporter.seen if "loss" in entry] == [6.0, 6.0]
    history = [entry for entry in own.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in history] == [4, 8]
    assert all(entry["fastrank/penalty"] > 0 for entry in history)
    json.dumps(history)
    # The first convolution alone is left with a kernel that has ranks: 1 of 1 on its input's side.
    assert history[-1]["fastrank/rank/net.0.mode3"] == 1


def test_hf_refuses_what_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="clip_norm must be a finite number above 0, got 0"):
        RankCallback(make, clip_norm=0)
    with pytest.raises(ValueError, match=r"clip_norm must be None where the Trainer clips too \(max_grad_norm=0"):
        trainer(tmp_path, RankCallback(make, clip_norm=1.0), max_grad_norm=1.0).train()
    with pytest.raises(TypeError, match="regularizers must be fastrank.regularize.Regularizer"):
        RankCallback(3)
    stranger = trainer(tmp_path, RankCallback(loops.penalties(loops.Net())))
    with pytest.raises(ValueError, match="without that of '0'"):
        stranger.train()
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "fastrank.integrations.huggingface")
    wanted = r"^the Hugging Face callback needs transformers, which is absent: pip install 'fastrank\[hf\]'$"
    with pytest.raises(ImportError, match=wanted):
        importlib.import_module("fastrank.integrations.huggingface")
