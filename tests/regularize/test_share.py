"""Work shared by two and three processes: the results of one process, on all of them; errors on all, never a hang."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from helpers import generator, randn
from several_ranks import (
    WORLDS,
    check,
    drift,
    grads,
    network,
    refused,
    run,
    same_bits,
    same_everywhere,
    total,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastrank import ops
from fastrank.ops._parallel import cost
from fastrank.regularize import LowRankProjection, NuclearNorm, overhead
from fastrank.regularize._share import bundles, owners

CASES = {}


def case(function):
    """Run it in every rank of every world, in a process group of its own."""
    CASES[function.__name__] = function
    return function


@pytest.fixture(scope="module", params=WORLDS, ids="{} processes".format)
def ended(request, tmp_path_factory):
    """The number of processes, and the folder in which they noted how their cases ended."""
    folder = tmp_path_factory.mktemp("ranks")
    run(CASES, request.param, folder)
    return request.param, folder


@case
def gradients_are_those_of_one_process(rank, world):
    options = [
        {},
        {"energy": 0.8, "matricization": "channel"},
        {"energy": 0.7, "matricization": ("decoupled", "spatial")},
        {"warm": False},
        {"on_nonfinite": "skip"},
    ]
    for option in options:
        model, twin = network(), network()
        shared, alone = NuclearNorm(model, 0.1, **option), NuclearNorm(twin, 0.1, share=False, **option)
        for step in range(3):
            for own in (model, twin):
                drift(own, step)
            shared.add_gradients()
            alone.add_gradients()
            same_bits(grads(model), grads(twin))
            same_everywhere(grads(model))
        assert torch.equal(shared.value(), alone.value())
        if option.get("warm", True):
            assert total(shared.counts) == alone.counts
            assert alone.counts["warm"] > 0 or "energy" in option


@case
def projections_are_those_of_one_process(rank, world):
    for option in ({"energy": 0.6}, {"energy": 0.7, "warm": True}, {"energy": 0.9, "matricization": "decoupled"}):
        model, twin = network(), network()
        shared = LowRankProjection(model, every=1, **option)
        alone = LowRankProjection(twin, every=1, share=False, **option)
        for step in range(3):
            for own in (model, twin):
                drift(own, step)
            shared.after_step()
            alone.after_step()
            same_bits(model.parameters(), twin.parameters())
            same_everywhere(model.parameters())
            assert shared.ranks == alone.ranks
            assert set(shared.ranks) == {"down", "wide", "twice.0", "twice.2"}


@case
def training_under_ddp_is_the_same_shared_or_not(rank, world):
    """Each rank has images of its own; the twin's regularisers decompose everything everywhere."""
    models = [network(), network()]
    for own, share in zip(models, (True, False), strict=True):
        outer = DistributedDataParallel(own)
        optimizer = torch.optim.SGD(outer.parameters(), 0.05, momentum=0.9)
        penalty = NuclearNorm(outer, 1e-3, share=share)
        projection = LowRankProjection(outer, every=2, energy=0.9, share=share)
        for regularizer in (penalty, projection):
            regularizer.attach(optimizer)
        for step in range(4):
            optimizer.zero_grad()
            outer(randn(2, 3, 6, 6, seed=10 * step + rank)).square().mean().backward()
            optimizer.step()
        assert projection.steps == 4
    same_bits(models[0].parameters(), models[1].parameters())
    same_everywhere(models[0].parameters())


@case
def overhead_is_measured_by_all_ranks_together(rank, world):
    outer = DistributedDataParallel(network())
    before = [p.detach().clone() for p in outer.parameters()]
    penalty = NuclearNorm(outer, 1e-3)
    found = overhead(outer, penalty, randn(2, 3, 6, 6, seed=rank), steps=1)
    assert found.step_us > 0
    assert sum(penalty.counts.values()) == 0
    same_bits(outer.parameters(), before)


@case
def each_result_travels_once(rank, world):
    sent = []
    broadcast = dist.broadcast

    def counted(buffer, **options):
        sent.append(buffer.numel())
        return broadcast(buffer, **options)

    dist.broadcast = counted
    try:
        NuclearNorm(network(), 1.0).add_gradients()
    finally:
        dist.broadcast = broadcast
    assert sum(sent) == 2 * sum(w.numel() for w in NuclearNorm(network(), 1.0).kernels.values())
    assert len(sent) <= world


@case
def more_ranks_than_matrices(rank, world):
    model, twin = nn.Sequential(nn.Conv2d(4, 4, 3)), nn.Sequential(nn.Conv2d(4, 4, 3))
    for own in (model, twin):
        own.load_state_dict({"0.weight": randn(4, 4, 3, 3), "0.bias": torch.zeros(4)})
    projection = LowRankProjection(model, energy=0.5)
    projection.project()
    LowRankProjection(twin, energy=0.5, share=False).project()
    same_bits(model.parameters(), twin.parameters())
    assert 1 <= projection.ranks["0"] < 4


@case
def what_is_not_finite_on_one_rank_raises_on_all(rank, world):
    for make in (
        lambda m: NuclearNorm(m, 1.0).add_gradients,
        lambda m: LowRankProjection(m, energy=0.5).project,
        lambda m: NuclearNorm(m, 1.0, matricization="decoupled").add_gradients,
    ):
        for earlier in (False, True):
            for where in range(world):
                model = network()
                act = make(model)
                if earlier:
                    act()
                if rank == where:
                    with torch.no_grad():
                        model.wide.weight[0, 0, 0, 0] = torch.nan
                        model.twice[2].weight[1] = torch.inf
                before = [w.detach().clone() for w in model.parameters()]
                got = "1 NaN or infinite values out of" if rank == where else "NaN or infinite values on another rank"
                refused(act, ValueError, f"the kernel of layer 'wide' must be finite, got {got}")
                same_bits(model.parameters(), before)


@case
def what_is_not_finite_on_one_rank_is_skipped_on_all(rank, world):
    model = network()
    penalty = NuclearNorm(model, 1.0, on_nonfinite="skip")
    projection = LowRankProjection(model, energy=0.5, on_nonfinite="skip")
    if rank == world - 1:
        with torch.no_grad():
            model.wide.weight[0, 0, 0, 0] = torch.nan
    before = model.wide.weight.detach().clone()
    penalty.add_gradients()
    projection.project()
    assert (penalty.skipped, projection.skipped) == (1, 1)
    assert model.wide.weight.grad is None
    same_bits([model.wide.weight], [before])
    same_everywhere([*grads(model), model.down.weight, model.stem.weight])
    assert "wide" not in projection.ranks
    assert "down" in projection.ranks


@case
def a_failure_on_one_rank_is_one_on_all(rank, world):
    model = network()
    penalty = NuclearNorm(model, 1.0)
    solve = ops.nuclear_subgradient

    def broken(*args, **options):
        raise RuntimeError("out of memory")

    if rank == 1:
        ops.nuclear_subgradient = broken
    try:
        refused(penalty.add_gradients, RuntimeError, "out of memory" if rank == 1 else "got a failure on another rank")
    finally:
        ops.nuclear_subgradient = solve
    assert not grads(model)
    penalty.add_gradients()
    same_everywhere(grads(model))
    check_pending = ops.check_pending

    def late():
        raise ValueError("an earlier step")

    if rank == 1:
        ops.check_pending = late
    try:
        if rank == 1:
            refused(penalty.gather_state, ValueError, "an earlier step")
        else:
            penalty.gather_state()
    finally:
        ops.check_pending = check_pending


@case
def ranks_that_do_not_belong_together_are_told(rank, world):
    weights = NuclearNorm(network(seed=rank), 1.0)
    refused(weights.add_gradients, ValueError, "process_group must be of ranks that hold the same weights")
    settings = NuclearNorm(network(), 1.0, energy=0.8 if rank else 0.9)
    refused(settings.add_gradients, ValueError, "process_group must be of ranks that regularise the same kernels alike")
    model = network()
    if rank:
        model.wide.requires_grad_(False)
    refused(NuclearNorm(model, 1.0).add_gradients, ValueError, "must be of ranks that regularise the same kernels")
    NuclearNorm(network(seed=rank), 1.0, share=False).add_gradients()


@case
def a_group_of_some_ranks_shares_among_them(rank, world):
    pair = dist.new_group([0, 1])
    model, twin = network(), network()
    shared = NuclearNorm(model, 1.0, process_group=pair) if rank < 2 else NuclearNorm(model, 1.0, share=False)
    shared.add_gradients()
    assert sum(copy.deepcopy(shared).counts.values()) == sum(shared.counts.values())
    NuclearNorm(twin, 1.0, share=False).add_gradients()
    same_bits(grads(model), grads(twin))
    refused(lambda: NuclearNorm(model, 1.0, process_group=3), TypeError, "process_group must be a torch.distributed.P")


def act(model, penalty, steps):
    """The gradients of some steps; weights drift as they do in training."""
    found = []
    for step in steps:
        drift(model, step)
        model.zero_grad()
        penalty.add_gradients()
        found += grads(model)
    return found


@case
def a_resume_goes_on_bit_for_bit(rank, world):
    for gathered in (False, True):
        whole, cut = network(), network()
        penalty = NuclearNorm(whole, 1.0)
        act(whole, penalty, range(3))
        if gathered:
            penalty.gather_state()
            assert set(penalty.state_dict()["spectral"]["shares"]) == set(map(str, range(world)))
        kept = copy.deepcopy((whole.state_dict(), penalty.state_dict()))
        if gathered:  # only the first rank's is saved
            box = [kept[1]]
            dist.broadcast_object_list(box, 0)
            kept = kept[0], box[0]
        wanted = act(whole, penalty, range(3, 6))
        assert set(penalty.state_dict()["spectral"]["shares"]) == {str(rank)}
        cut.load_state_dict(kept[0])
        second = NuclearNorm(cut, 1.0)
        second.load_state_dict(kept[1])
        same_bits(act(cut, second, range(3, 6)), wanted)
        assert total(second.counts)["warm"] >= 6


@case
def the_state_of_another_world_starts_anew(rank, world):
    model = network()
    penalty = NuclearNorm(model, 1.0)
    act(model, penalty, range(2))
    kept = penalty.state_dict()
    kept["spectral"]["world"] += 1
    alone = NuclearNorm(network(), 1.0, share=False)
    alone.add_gradients()
    for state in (kept, alone.state_dict()):
        second, fresh = NuclearNorm(model, 1.0), NuclearNorm(model, 1.0)
        second.load_state_dict(state)
        found = []
        for own in (second, fresh):
            model.zero_grad()
            own.add_gradients()
            found.append(grads(model))
        same_bits(*found)
        assert second.counts["warm"] == 0


@pytest.mark.parametrize("name", CASES)
def test_in_several_processes(ended, name):
    check(name, *ended)


@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_matrices_go_to_the_least_loaded_rank(ranks, warm):
    """Largest first is within 4/3 of the best (Graham 1969), and so of the mean load where no bundle exceeds it."""
    numbers = generator(ranks)
    for count in (0, 1, 5, 40, 300):
        shapes = [tuple(torch.randint(1, 400, (2,), generator=numbers).tolist()) for _ in range(count)]
        found = owners(shapes, ranks, warm)
        assert found == owners(list(shapes), ranks, warm)
        assert all(0 <= rank < ranks for rank in found)
        work = [sum(cost(shapes[place]) for place in bundle) for bundle in bundles(shapes, warm)]
        loads = [sum(cost(s) for s, own in zip(shapes, found, strict=True) if own == rank) for rank in range(ranks)]
        ordered = sorted(work, reverse=True)
        pair = sum(ordered[ranks - 1 : ranks + 1]) if len(ordered) > ranks else 0
        least = max([sum(work) / ranks, pair, *ordered[:1]])
        assert max(loads) <= (4 / 3) * least


def test_small_matrices_of_one_shape_stay_together():
    shapes = [(9, 64), (512, 4608), (64, 9), (512, 4608), (9, 65), (9, 64), (96, 200), (200, 96)]
    assert sorted(map(sorted, bundles(shapes, warm=False))) == [[0, 2, 5], [1], [3], [4], [6, 7]]
    assert sorted(map(sorted, bundles(shapes, warm=True))) == [[0, 2, 5], [1], [3], [4], [6], [7]]
    found = owners(shapes, 2, warm=False)
    assert found[1] != found[3]
    assert found[0] == found[2] == found[5]
