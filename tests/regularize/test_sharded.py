"""Kernels that are sharded over ranks as DTensors: what a whole kernel gets, laid out as the shards are."""

from __future__ import annotations

import pytest
import torch
from helpers import randn
from several_ranks import check, network, refused, run, same_bits
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from fastrank.regularize import GramTrace, LowRankProjection, NuclearNorm, overhead
from fastrank.regularize._kernels import laid_out_as

CASES = {}


def case(function):
    """Run it in every rank, in a process group of its own."""
    CASES[function.__name__] = function
    return function


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """The number of processes, and the folder in which they noted how their cases ended."""
    folder = tmp_path_factory.mktemp("ranks")
    run(CASES, 2, folder)
    return 2, folder


def meshes(world):
    """FSDP, and hybrid sharding; and whether the regularisers meet the model before it is sharded."""
    plain = init_device_mesh("cpu", (world,))
    yield from ((plain, True), (plain, False))
    yield init_device_mesh("cpu", (world, 1), mesh_dim_names=("replicate", "shard")), False


def regularizers(model):
    return [NuclearNorm(model, 0.1), LowRankProjection(model, energy=0.7), GramTrace(model, 0.1)]


@case
def fsdp(rank, world):
    for mesh, made_before in meshes(world):
        model, twin = network(), network()
        own = regularizers(model) if made_before else []
        fully_shard(model.wide, mesh=mesh)
        fully_shard(model, mesh=mesh)
        own, others = own or regularizers(model), regularizers(twin)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for regularizer in own:
            regularizer.bind(optimizer)
        x = randn(2, 3, 6, 6)
        for net, penalties in ((model, own), (twin, others)):
            net(x).square().mean().backward()
            net.zero_grad()
            penalties[0].add_gradients()
            penalties[2].add_gradients()
        names = list(others[0].kernels)
        for name in names:
            kernel, wanted = own[0].kernels[name], others[0].kernels[name]
            assert isinstance(kernel, DTensor)
            assert isinstance(kernel.grad, DTensor)
            assert kernel.grad.placements == kernel.placements
            same_bits([kernel.grad.full_tensor()], [wanted.grad])
        for a, b in zip(own, others, strict=True):
            assert torch.equal(a.value(), b.value())
        own[1].project()
        others[1].project()
        same_bits([own[1].kernels[n].full_tensor() for n in names[1:]], [others[1].kernels[n] for n in names[1:]])
        assert own[1].ranks == others[1].ranks
        optimizer.step()
        with torch.no_grad():
            model(x)
        assert not isinstance(model.stem.weight, DTensor), "the root lends gathered kernels until the next backward"
        assert all(isinstance(kernel, DTensor) for kernel in own[0].kernels.values())


@case
def fsdp_training_is_that_of_one_process(rank, world):
    """All ranks see the same images; averages of equal gradients round, by up to an eps a rank and step."""
    models = [network(), network()]
    fully_shard(models[0], mesh=init_device_mesh("cpu", (world,)), reshard_after_forward=False)
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        for regularizer in (NuclearNorm(model, 1e-3), LowRankProjection(model, every=2, energy=0.9)):
            regularizer.attach(optimizer)
        for step in range(4):
            optimizer.zero_grad()
            model(randn(2, 3, 6, 6, seed=step)).square().mean().backward()
            optimizer.step()
    for found, wanted in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(found.full_tensor(), wanted, rtol=1e-4, atol=1e-5)


@case
def tensors_sharded_by_hand_along_any_dimension(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    for placement in (Shard(0), Shard(1), Shard(3), Replicate()):
        model, twin = network(), network()
        layer = model.wide
        layer.weight = torch.nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [placement]))
        for net in (model, twin):
            NuclearNorm(net, 0.1, matricization="decoupled", energy=0.9).add_gradients()
        same_bits([layer.weight.grad.full_tensor()], [twin.wide.weight.grad])


@case
def what_is_not_finite_in_one_shard_is_named_and_skipped_on_all(rank, world):
    for on_nonfinite in ("raise", "skip"):
        model = network()
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
        if rank == 1:
            model.wide.weight.detach().to_local().view(-1)[0] = torch.nan
        penalty = NuclearNorm(model, 1.0, on_nonfinite=on_nonfinite)
        if on_nonfinite == "raise":
            refused(penalty.add_gradients, ValueError, "the kernel of layer 'wide' must be finite, got 1 NaN or")
            continue
        penalty.add_gradients()
        assert penalty.skipped == 1
        assert model.wide.weight.grad is None
        assert model.down.weight.grad is not None


@case
def results_are_laid_out_without_traffic(rank, world):
    model = network()
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    with CommDebugMode() as counted:
        part = laid_out_as("wide", model.wide.weight, network().wide.weight.detach())
    assert counted.get_total_counts() == 0
    same_bits([part.to_local()], [model.wide.weight.to_local()])


@case
def layouts_that_cannot_be_gathered_or_restored_name_the_layer(rank, world):
    model = network()
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    penalty = NuclearNorm(model, 1.0)
    wanted = "the kernel of layer 'stem' must be a tensor or a DTensor that can be gathered and sharded again, got a D"

    def fails(*args, **options):
        raise RuntimeError("no such backend")

    for owner, name in ((DTensor, "full_tensor"), (torch.distributed.tensor, "distribute_tensor")):
        working = getattr(owner, name)
        setattr(owner, name, fails)
        try:
            refused(penalty.add_gradients, ValueError, wanted)
        finally:
            setattr(owner, name, working)
    refused(lambda: overhead(model, penalty, randn(1, 3, 6, 6)), ValueError, "model must be one that can be copied")


@pytest.mark.parametrize("name", CASES)
def test_in_several_processes(ended, name):
    check(name, *ended)
