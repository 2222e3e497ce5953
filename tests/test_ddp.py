"""DDP: two and four processes train to the result of one, and share evaluation and decompositions; rank 0 reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import process_groups
import pytest
import torch
import torch.distributed as dist
from process_groups import SYSTEMS, apart, images, leave, left, network, penalties, train
from torch import Tensor, nn

from fastrank.distributed import Parallel, Traffic, cost
from fastrank.distributed._batchnorm import synchronise
from fastrank.regularize import LowRankProjection, NuclearNorm
from fastrank.train import TrainConfig, evaluate, fit

WORLDS = (2, 4)
TOLERANCE = 1e-6


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    """As the ranks have, since rounding depends on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """How one process ends, by system."""
    folder = tmp_path_factory.mktemp("alone")
    for system in SYSTEMS:
        model = network(system)
        own = penalties(system, model)
        leave(model, train(model, own), system, folder / f"{system}.safetensors")
        (folder / f"{system}.json").write_text(json.dumps([getattr(r, "counts", {}) for r in own]))
    return folder


@pytest.fixture(scope="module", params=WORLDS, ids="{} processes".format)
def several(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """The number of ranks, and the folder in which they left what they found."""
    folder = tmp_path_factory.mktemp("several")
    process_groups.run(job, request.param, folder)
    return request.param, folder


def job(rank: int, world: int, folder: Path) -> None:
    """Everything that the tests below look at."""
    for system in SYSTEMS:
        model = network(system)
        kept, own = list(model.parameters()), penalties(system, model)
        rows: list[int] = []
        history = train(model, own, parallel="ddp", on_epoch=lambda row, rows=rows: rows.append(row.epoch))
        assert rows == ([1, 2, 3] if rank == 0 else [])
        assert all(a is b for a, b in zip(model.parameters(), kept, strict=True))
        assert type(model[1]) is nn.BatchNorm2d
        assert "forward" not in vars(model[1]), "the twin alone is synchronised"
        everywhere_the_same(model)
        counts = Parallel("ddp").gather([getattr(r, "counts", {}) for r in own])
        if rank == 0:
            leave(model, history, system, folder / f"{system}.safetensors")
            (folder / f"{system}.json").write_text(json.dumps(counts))
    statistics_of_all_ranks(rank, world)
    evaluation_in_parts()
    (folder / f"traffic.{rank}").write_text(json.dumps(traffic(world)))
    if world > 2:
        return
    local_statistics(rank)
    starts_of_rank_0_count(rank)
    detectors_take_parts(rank)
    for dtype in ("fp16", "bf16"):
        model = network("nrmf")
        train(model, [], parallel="ddp", amp=dtype, epochs=1)
        everywhere_the_same(model)


def everywhere_the_same(model: nn.Module) -> None:
    mine = torch.cat([tensor.detach().double().flatten() for tensor in model.state_dict().values()])
    others = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(others, mine)
    assert all(torch.equal(mine, other) for other in others)


def statistics_of_all_ranks(rank: int, world: int) -> None:
    """In float64, against torch's own on the whole batch; the last rank has no images, but computes along."""
    torch.manual_seed(3)
    for dims, affine, momentum in ((2, True, 0.1), (1, True, None), (2, False, 0.3)):
        kind = nn.BatchNorm2d if dims == 2 else nn.BatchNorm1d
        own, whole = (kind(5, affine=affine, momentum=momentum).double() for _ in range(2))
        ranks = Parallel("ddp")
        synchronise(own, ranks.counted)
        for _ in range(2):
            x = torch.randn(2 * world - 1, 5, *[3] * dims, dtype=torch.float64) * 3 + 100
            g = torch.randn_like(x)
            first, end = 2 * rank, 2 * min(rank + 1, world - 1) if rank < world - 1 else 2 * rank
            total = 2 * (world - 1)
            ranks.counted.here = end > first
            mine = x[first : max(end, first + 1)].clone().requires_grad_()
            out = own(mine)
            out.backward(g[first : max(end, first + 1)] * (end > first))
            theirs = x[:total].clone().requires_grad_()
            wanted = whole(theirs)
            wanted.backward(g[:total])
            assert theirs.grad is not None
            assert mine.grad is not None
            scale = {"rtol": 1e-9, "atol": 1e-9}  # float64, and sums of a hundred numbers near 100
            if end > first:
                torch.testing.assert_close(out, wanted[first:end], **scale)
                torch.testing.assert_close(mine.grad, theirs.grad[first:end], **scale)
            else:
                assert not mine.grad.any()
        for (name, a), b in zip(own.named_buffers(), whole.buffers(), strict=True):
            torch.testing.assert_close(a, b, **scale, msg=name)
        for a, b in zip(own.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(ranks.sum(a.grad.clone()), b.grad, **scale)
        own.eval(), whole.eval()
        torch.testing.assert_close(own(x), whole(x), **scale)


def local_statistics(rank: int) -> None:
    """Each rank's own, but in the end all have the buffers of rank 0."""
    model = network("nrmf")
    first = train(model, [], parallel="ddp", sync_batchnorm=False, epochs=1)
    everywhere_the_same(model)
    every = Parallel("ddp").gather([row.test_top1 for row in first])
    assert all(found == every[0] for found in every)


def starts_of_rank_0_count(rank: int) -> None:
    """Ranks that begin with other weights, in a layout of their own."""
    model = network("nrmf").to(memory_format=torch.channels_last)
    model.register_buffer("mask", torch.tensor([rank == 0]))
    wanted = model[3].weight.detach().clone()
    with torch.no_grad():
        model[3].weight.add_(rank)
    train(model, [], parallel="ddp", epochs=0)
    assert torch.equal(model[3].weight, wanted)
    assert model[3].weight.is_contiguous(memory_format=torch.channels_last)
    assert bool(model.mask)


class Detector(nn.Module):
    """A loss that is a mean over images, so that parts of a batch add up."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        errors = [(image.mean((1, 2)) * self.scale).sum() - t["x"] for image, t in zip(images, targets, strict=True)]
        return {"loss": torch.stack(errors).square().mean()}


def detectors_take_parts(rank: int) -> None:
    numbers = torch.Generator().manual_seed(0)
    data: Any = [(torch.rand(3, 4, n % 3 + 3, generator=numbers), {"x": torch.tensor(1.0 * n)}) for n in range(11)]
    results = []
    for kind in (None, "ddp"):
        model = Detector()
        config = TrainConfig(epochs=2, batch_size=4, lr=0.01)
        fit(model, data, None, config, progress=False, task="detection", parallel=kind)
        results.append(model.scale.detach())
    torch.testing.assert_close(*results, rtol=1e-6, atol=0)
    try:
        fit(Detector(), data, None, TrainConfig(1, 10, 0.1), progress=False, task="detection", parallel="ddp")
    except ValueError as error:
        assert "parallel must be at most 1 ranks, the images of the last batch" in str(error)  # noqa: PT017
    else:
        raise AssertionError("a rank without images was taken")


def evaluation_in_parts() -> None:
    """The counts of one process; 41 images in batches of 8, of which the last has one."""
    model, data = network("nrmf").eval(), images(41)
    found, wanted = evaluate(model, data, 8, parallel=Parallel("ddp")), evaluate(model, data, 8)
    assert (found.top1, found.top5, found.count) == (wanted.top1, wanted.top5, wanted.count)
    assert abs(found.loss - wanted.loss) <= 1e-6 * wanted.loss


def traffic(world: int) -> list[tuple[dict[str, float], dict[str, float]]]:
    """Payload of a step by the counter, and by the model: what two epochs of six steps need more than two of four."""
    found = []
    for sync in (True, False) if world == 2 else (True,):
        payloads = []
        for count in (120, 180):
            model = network("nrmf")
            own = [NuclearNorm(model, 1e-3), LowRankProjection(model, every=1, energy=0.9)]
            with Traffic() as counted:
                train(model, own, parallel="ddp", data=images(count), epochs=2, sync_batchnorm=sync)
            payloads.append(counted.payload)
        a_step = {kind: (payloads[1][kind] - payloads[0][kind]) / 4 for kind in payloads[1]}
        wanted = cost(model, own, world=world, sync_batchnorm=sync).by_collective()
        found.append((a_step, wanted))
    return found


@pytest.mark.parametrize("system", SYSTEMS)
def test_ddp_trains_to_the_result_of_one_process(several: tuple[int, Path], alone: Path, system: str) -> None:
    found, rows, ranks = left(several[1] / f"{system}.safetensors")
    wanted, wanted_rows, wanted_ranks = left(alone / f"{system}.safetensors")
    assert apart(found, wanted) <= TOLERANCE
    assert ranks == wanted_ranks
    assert any(rank for found in ranks.values() for rank in found)
    for row, other in zip(rows, wanted_rows, strict=True):
        assert {name: row[name] for name in ("epoch", "train_top1", "test_top1", "test_top5", "lr")} == {
            name: other[name] for name in ("epoch", "train_top1", "test_top1", "test_top5", "lr")
        }
        assert row["loss"] == pytest.approx(other["loss"], rel=TOLERANCE)


def test_one_process_sends_nothing_and_computes_everything() -> None:
    """The cost model at one rank: no collective runs, and the decompositions are all its own."""
    model = network("nrmf")
    own = [NuclearNorm(model, 1e-3), LowRankProjection(model, every=1, energy=0.9)]
    with Traffic() as counted:
        train(model, own, data=images(30), epochs=1)
    wanted = cost(model, own, world=1)
    assert dict(counted.payload) == wanted.by_collective() == {}
    assert wanted.regularizer_flops == wanted.regularizer_flops_alone > 0


@pytest.mark.parametrize("system", ["nrmf", "trp"])
def test_decompositions_are_split_over_the_ranks(several: tuple[int, Path], alone: Path, system: str) -> None:
    world, folder = several
    wanted = [sum(counts.values()) for counts in json.loads((alone / f"{system}.json").read_text())]
    by_rank = [[sum(counts.values()) for counts in own] for own in json.loads((folder / f"{system}.json").read_text())]
    assert [sum(own) for own in zip(*by_rank, strict=True)] == wanted
    most = [max(own) for own in zip(*by_rank, strict=True)]
    assert len(by_rank) == world
    assert all(most[n] < wanted[n] for n in range(len(wanted)) if wanted[n]), "no rank did it all"
    assert sum(wanted) > 0


def test_bytes_are_those_of_the_cost_model(several: tuple[int, Path]) -> None:
    world, folder = several
    for rank in range(world):
        for found, wanted in json.loads((folder / f"traffic.{rank}").read_text()):
            assert found == wanted


def test_what_parallel_refuses() -> None:
    with pytest.raises(ValueError, match=r"parallel must be one of \['ddp', 'fsdp'\], got 'dpp' \(did you mean 'ddp'"):
        train(network("nrmf"), [], parallel="dpp")
    with pytest.raises(RuntimeError, match="parallel='ddp' must have a process group: start the program with torchrun"):
        train(network("nrmf"), [], parallel="ddp")
    with pytest.raises(TypeError, match="sync_batchnorm must be a bool, got int"):
        train(network("nrmf"), [], sync_batchnorm=1)
