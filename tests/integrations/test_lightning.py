"""The Lightning callback against the same training written by hand, with the real package."""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import integration_loops as loops
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

lightning = pytest.importorskip("lightning.pytorch", reason="the Lightning callback needs lightning")

from fastrank.integrations.lightning import RankCallback  # noqa: E402
from fastrank.methods import funnel  # noqa: E402
from fastrank.regularize import NuclearNorm  # noqa: E402
from fastrank.report import TRAJECTORY_FILE, read_trajectory  # noqa: E402


class Module(lightning.LightningModule):
    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net

    def configure_model(self) -> None:
        if self.net is None:
            self.net = loops.Net()

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=loops.LR, momentum=0.9)


class Manual(Module):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], index: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(cross_entropy(self.net(batch[0]), batch[1]))
        optimizer.step()


def trainer(callback: RankCallback, others: list[Any] | None = None, **options: Any) -> Any:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    options = {"max_epochs": loops.EPOCHS, "logger": False, **quiet, **options}
    return lightning.Trainer(accelerator="cpu", devices=1, callbacks=[callback, *(others or [])], **options)


def fit(
    callback: RankCallback, module: Any = None, ckpt_path: str | None = None, same: bool = False, **options: Any
) -> Any:
    """Train, and return the trainer; `same`: all batches are alike."""
    own, module = trainer(callback, **options), module or Module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning on workers, loggers and litmodels
        own.fit(module, DataLoader(TensorDataset(*loops.images(same)), loops.BATCH), ckpt_path=ckpt_path)
    return own


def weights(own: Any) -> dict[str, Tensor]:
    return dict(own.lightning_module.net.state_dict())


def require_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("clip", "norm"), [("loss", None), ("loss", 0.05), ("all", 0.05)])
def test_lightning_trains_as_the_loop_by_hand(clip: str, norm: float | None, accumulate: int) -> None:
    own = fit(
        RankCallback(lambda module: loops.penalties(module.net), clip=clip),
        gradient_clip_val=norm,
        accumulate_grad_batches=accumulate,
    )
    wanted = loops.by_hand(loops.penalties, clip=clip, norm=norm, accumulate=accumulate)
    require_equal(weights(own), wanted)
    other = {"loss": "all", "all": "loss"}[clip]
    if norm is not None:  # the test tells the two orders apart
        differing = loops.by_hand(loops.penalties, clip=other, norm=norm, accumulate=accumulate)
        assert not torch.equal(weights(own)["0.weight"], differing["0.weight"])


@pytest.mark.parametrize("clip", ["loss", "all"])
def test_lightning_in_bfloat16(clip: str) -> None:
    own = fit(RankCallback(lambda m: loops.penalties(m.net), clip=clip), precision="bf16-mixed", gradient_clip_val=0.05)
    require_equal(weights(own), loops.by_hand(loops.penalties, clip=clip, norm=0.05, dtype=torch.bfloat16))


def half(scale: float) -> Any:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return lightning.plugins.precision.MixedPrecision("16-mixed", "cpu", scaler)


@pytest.mark.parametrize("clip", ["loss", "all"])
def test_lightning_unscales_before_the_penalty_and_the_clipping(clip: str) -> None:
    net = loops.Net()
    own = fit(RankCallback(loops.penalties(net), clip=clip), Module(net), plugins=[half(256.0)], gradient_clip_val=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    require_equal(
        weights(own), loops.by_hand(loops.penalties, clip=clip, norm=0.05, dtype=torch.float16, scaler=scaler)
    )


@pytest.mark.parametrize("clip", ["loss", "all"])
def test_lightning_does_nothing_around_a_step_that_the_scaler_skips(clip: str) -> None:
    net = loops.Net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    spy = loops.Spy(net)
    fit(RankCallback(spy, clip=clip), Module(net), plugins=[half(2.0**60)], max_epochs=1, limit_train_batches=1)
    assert "after" not in spy.told
    require_equal(dict(net.state_dict()), before)


def test_lightning_tells_epochs_and_lets_go_at_the_end() -> None:
    net = loops.Net()
    spy = loops.Spy(net)
    own = fit(RankCallback(spy, clip="all"), Module(net), limit_train_batches=2)
    assert spy.told == [0, 0, "add", "after", "add", "after", 1, "add", "after", "add", "after"]
    count = len(spy.told)
    own.optimizers[0].step()
    assert len(spy.told) == count


def test_lightning_lets_go_of_a_training_that_failed() -> None:
    class Failing(Module):
        def on_train_epoch_end(self) -> None:
            raise RuntimeError("failed on purpose")

    net = loops.Net()
    module, spy = Failing(net), loops.Spy(net)
    own = trainer(RankCallback(spy))
    loader = DataLoader(TensorDataset(*loops.images()), loops.BATCH)
    with pytest.raises(RuntimeError, match="on purpose"):
        own.fit(module, loader)
    optimizer, count = own.optimizers[0], len(spy.told)
    optimizer.step()
    assert len(spy.told) == count


@pytest.mark.parametrize("steps", [4, 6])
def test_lightning_resumes_where_it_was(tmp_path: Path, steps: int) -> None:
    """After an epoch and in the middle of one; the projection comes every third step, so its count matters."""

    def callback() -> RankCallback:
        return RankCallback(lambda module: loops.penalties(module.net), trajectory=tmp_path / "run")

    saver = lightning.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=steps, save_top_k=-1)
    # Lightning begins its loader anew in an epoch that it resumes, so all batches are alike.
    fit(callback(), same=True, others=[saver], enable_checkpointing=True)
    again = callback()
    second = fit(again, same=True, ckpt_path=str(tmp_path / f"step={steps}.ckpt"))
    require_equal(weights(second), loops.by_hand(loops.penalties, same=True))
    assert again.regularizers[1].steps == second.global_step == 8
    found = read_trajectory(tmp_path / "run" / TRAJECTORY_FILE)
    assert [moment.epoch for moment in found.moments] == [0, 1, 2]
    assert found.moments[-1].row["train_loss"] > 0
    assert set(found.moments[-1].spectra) == {"net.0", "net.2"}


def gated() -> nn.Module:
    torch.manual_seed(0)
    return funnel.factorize(loops.Net())


def test_lightning_resumes_the_schedule_of_a_funnel(tmp_path: Path) -> None:
    straight, first = RankCallback(lambda module: funnel.regularizer(module.net, 0.1)), Module(gated())
    fit(straight, first)
    half_way = fit(RankCallback(lambda module: funnel.regularizer(module.net, 0.1)), Module(gated()), max_epochs=1)
    half_way.save_checkpoint(tmp_path / "a.ckpt")
    resumed, second = RankCallback(lambda module: funnel.regularizer(module.net, 0.1)), Module(gated())
    fit(resumed, second, ckpt_path=str(tmp_path / "a.ckpt"))
    assert straight.regularizers[0].epoch == resumed.regularizers[0].epoch == 1
    require_equal(dict(second.state_dict()), dict(first.state_dict()))


def test_lightning_refuses_a_checkpoint_of_other_regularizers(tmp_path: Path) -> None:
    fit(RankCallback(lambda m: loops.penalties(m.net)), max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="regularizers must be the 2 that the checkpoint was written with, got 1"):
        fit(RankCallback(lambda m: NuclearNorm(m.net, 0.1)), ckpt_path=str(tmp_path / "a.ckpt"))


class Memory(lightning.loggers.logger.DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.entries: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.entries.append({**metrics, "step": step})


def test_lightning_logs_to_the_loggers_of_the_trainer() -> None:
    memory = Memory()
    options: dict[str, Any] = {"logger": memory, "max_epochs": 1, "accumulate_grad_batches": 2}
    fit(RankCallback(lambda m: funnel.regularizer(m.net), log_every=2, threshold=0.0), Module(gated()), **options)
    found = [entry for entry in memory.entries if "fastrank/penalty" in entry]
    assert [(entry["step"], entry["fastrank/gates/2.gate_in"]) for entry in found] == [(2, 6.0)]
    memory.entries.clear()
    fit(RankCallback(lambda m: NuclearNorm(m.net, 0.1), log_every=1, energy=0.9), **options)
    found = [entry for entry in memory.entries if "fastrank/penalty" in entry]
    assert [entry["step"] for entry in found] == [1, 2]
    assert all(1 <= entry["fastrank/rank/net.2.mode3"] <= 6 and entry["fastrank/penalty"] > 0 for entry in found)


def test_lightning_finds_the_optimizer_of_each_regularizer_in_manual_optimization() -> None:
    own = fit(RankCallback(lambda module: loops.penalties(module.net)), Manual())
    require_equal(weights(own), loops.by_hand(loops.penalties))
    with pytest.raises(ValueError, match="clip must be 'loss' where the module optimizes manually"):
        fit(RankCallback(lambda module: loops.penalties(module.net), clip="all"), Manual())


def test_lightning_refuses_what_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    net = loops.Net()
    with pytest.raises(ValueError, match=r"clip must be one of \['loss', 'all'\], got 'al' \(did you mean"):
        RankCallback(loops.penalties(net), clip="al")
    with pytest.raises(TypeError, match="regularizers must be fastrank.regularize.Regularizer"):
        RankCallback([net])
    with pytest.raises(TypeError, match="regularizers must be fastrank.regularize.Regularizer"):
        fit(RankCallback(lambda module: 3))
    with pytest.raises(ValueError, match=r"optimizer must be one that holds .* without that of '0'"):
        fit(RankCallback(loops.penalties(net)))  # of another network than the module's

    class Fused(Module):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.net.parameters(), lr=0.1, fused=True)

    with pytest.raises(ValueError, match="clip must be 'loss' where SGD unscales the gradients inside its step"):
        fit(RankCallback(lambda m: loops.penalties(m.net), clip="all"), Fused(), plugins=[half(256.0)])
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.delitem(sys.modules, "fastrank.integrations.lightning")
    wanted = r"^the Lightning callback needs lightning, which is absent: pip install 'fastrank\[lightning\]'$"
    with pytest.raises(ImportError, match=wanted):
        importlib.import_module("fastrank.integrations.lightning")


def test_lightning_checkpoints_hold_plain_values(tmp_path: Path) -> None:
    fit(RankCallback(lambda m: loops.penalties(m.net)), max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    found = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]["RankCallback"]
    assert found["regularizers"][1]["steps"] == 4
    json.dumps(sorted(found))
